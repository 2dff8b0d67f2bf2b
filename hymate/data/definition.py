"""ACES task definitions: reading one, and finding its triggers and windows in a shard's events.

ACES (Xu et al. 2024) parses the definition and its predicates. The windows are evaluated here, by ACES's documented
meaning, because its own `query` silently departs from it (es-aces 0.7.3):

    `start: end - 24h`            the window's two edges are exchanged, and with them `index_timestamp`
    `end: start -> P`             with the start excluded, a P at the start still ends the window there
    `start: end <- P`             likewise
    `start: end` and the like     an edge that equals the other is lost, and with it the window's conditions

The rules, where ACES's documentation leaves room: an edge `X -> P` (or `X <- P`) is the first P after X (the last one
before it), or at X itself where the window includes that edge. `null` is the first or last event of the record.
A trigger with an edge that isn't in the record is left out, and so is one with nothing left to predict: the label
window is over before the prediction time, or its event has been seen by then.

Legend: R rows, the distant times of each subject in order; N triggers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import meds
import numpy as np
import polars as pl
import pyarrow as pa

from hymate.config import TaskConfig
from hymate.data.codemap import CodeMap
from hymate.data.details import CODE_ALONE
from hymate.data.known import KnownConfig
from hymate.data.meds import UNREADABLE, DataError, open_parquet, unreadable_error
from hymate.errors import ConfigError, UserError, first_line
from hymate.storage.paths import Location

# aces is imported where it is needed: it takes seconds (matplotlib among others), and most runs find labels
KEYS = {"predicates", "patient_demographics", "trigger", "windows", "description", "metadata"}
LONGEST = timedelta(days=3_652_059)  # years 1 to 9999
MICROSECOND = timedelta(microseconds=1)
ANY_EVENT, RECORD_START, RECORD_END = "_ANY_EVENT", "_RECORD_START", "_RECORD_END"
TRANSFER = timedelta(hours=6)  # as in configs/task/readmission.yaml
LAST_OF_DAY = timedelta(days=1) - MICROSECOND  # when a death of a date happened; it is known at the midnight after
DEAD = re.compile("DIED|DEAD|DEATH|DECEASED|EXPIRED")  # in the codes of discharges
UNCLEAR = re.compile(r"|UNK|.*UNKNOWN.*|OTHER|N/?A|NAN|NONE|NULL|MISSING|UNSPECIFIED|NOT .*|\W+")
OVER, KNOWN = "over before the prediction time", "its event is at or before the prediction time"
LATE, WHOLE = "_late", "_whole"
SEEN = "_seen"  # the label's predicate, without events that become known later than their stamps


# ----------------------------------------------------------------------------------------------------- the definition


def parse(task: TaskConfig) -> Any:
    """`task.definition` as ACES's own configuration object.

    Built from its parts, as ACES's `load` reads files only and drops predicates that no window names, among them
    `competing`. Raises ConfigError for a definition that cannot be used.
    """
    from aces.config import DerivedPredicateConfig, EventConfig, PlainPredicateConfig, TaskExtractorConfig, WindowConfig
    from bigtree.utils.exceptions import TreeError

    definition = copy.deepcopy(task.definition) or {}  # ACES parses `has` in place
    fields = PlainPredicateConfig.__dataclass_fields__

    def predicate(spec: dict[str, Any], **static: bool) -> Any:
        if "expr" in spec:
            return DerivedPredicateConfig(**spec)
        known = {name: value for name, value in spec.items() if name in fields}
        plain = PlainPredicateConfig(**known, **static, other_cols={k: v for k, v in spec.items() if k not in fields})
        pl.DataFrame(schema=dict.fromkeys(_columns({"": plain}), pl.String) | {"numeric_value": pl.Float32}).select(
            plain.MEDS_eval_expr()
        )
        return plain

    try:
        predicates = {name: predicate(spec) for name, spec in definition["predicates"].items()}
        for name, spec in definition.get("patient_demographics", {}).items():
            predicates[name] = predicate(spec, static=True)
        config = TaskExtractorConfig(
            predicates=predicates,
            trigger=EventConfig(definition["trigger"]),
            windows={name: WindowConfig(**spec) for name, spec in definition["windows"].items()},
        )
        if unknown := sorted(set(definition) - KEYS):
            raise ValueError(f"unknown key {unknown[0]}")
        _require_possible(config)
    except (KeyError, TypeError, ValueError, AttributeError, TreeError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"task.definition is not an ACES task: {_fault(error)}") from error
    if config.label_window is None or config.index_timestamp_window is None:
        raise ConfigError("task.definition needs a window with a label and one with an index_timestamp")
    for setting, name, others in (
        (f"task.competing={task.competing}", task.competing, ["null"]),
        *((f"task.kinds.{kind}", kind, []) for kind in sorted(task.kinds)),
        (f"task.start={task.start}", task.start, ["null", "trigger"]),
    ):
        if name not in (None, *others, *predicates):
            choices = ", ".join([*others, *predicates])
            raise ConfigError(f"{setting} is not a predicate of task.definition: choose one of {choices}")
    return config


def _require_possible(config: Any) -> None:
    """Raises ValueError for a definition that ACES accepts although it cannot be meant."""
    static = {name for name, plain in config.plain_predicates.items() if plain.static}
    for name, window in config.windows.items():
        for expr in (window.start_endpoint_expr, window.end_endpoint_expr):
            if abs(getattr(expr, "window_size", timedelta(0))) > LONGEST:
                raise ValueError(f"window {name} is longer than the years 1 to 9999")
        for counted in {*window.referenced_predicates, *([window.label] if window.label else [])} & static:
            raise ValueError(f"window {name} counts {counted}, which is static: static events have no time")
        for counted, (least, most) in window.has.items():
            if (least is None and most is None) or (least is not None and most is not None and most < least):
                raise ValueError(f"window {name}: has {counted}: ({least}, {most}) is no range")
    if config.trigger.predicate in static:
        raise ValueError(f"trigger {config.trigger.predicate} is static: static events have no time")
    if taken := {"subject_id", "time", SEEN, LATE, WHOLE} & set(config.predicates):
        raise ValueError(f"a predicate cannot be named {min(taken)}")


def _evaluation_order(config: Any) -> list[str]:
    """The windows' names, each after the one that it refers to (ACES refuses circles)."""
    refers = {name: window.referenced_event[0] for name, window in config.windows.items()}
    order: list[str] = []
    while len(order) < len(refers):
        ready = [name for name, other in refers.items() if name not in order and other in ("trigger", *order)]
        assert ready
        order += ready
    return order


def _fault(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


# ------------------------------------------------------------------------------------------------------- predicates


@dataclass(frozen=True)
class Predicates:
    """A shard seen through a definition's predicates.

    events: a row a subject and time, sorted: subject_id, time and, for each predicate and SEEN, how many events
        match; only of subjects with the definition's static predicates.
    matches: for each plain predicate how many of the shard's events match: of those with a time, or for a static one
        of those without. A predicate with bounds on its value is there a second time, without them (CODE_ALONE). For
        each derived predicate at how many times it holds.
    deaths: how many deaths have a date and no time of day, by where on that day they were put.
    """

    events: pl.DataFrame
    matches: dict[str, int]
    deaths: dict[str, int]


def read_predicates(path: Location, config: Any, known: KnownConfig, mapped: CodeMap | None = None) -> Predicates:
    """Evaluate the predicates on one MEDS data file; DataError where it cannot be read, UserError without a column.

    A MEDS_DEATH at 00:00 is a date without a time of day (registries give no more). It is taken to come at the end of
    its day, for a patient who was discharged alive on that day was alive then. Where the code of the last discharge of
    the day does not say so (death, unknown, or nothing), and no admission follows, the patient most likely died in
    hospital: it comes at that discharge.

    An admission and a discharge at one time are a transfer, or the ends of one stay: stamps may have days alone. They
    are one stay where the patient is out of hospital afterwards: the admission is then taken to come before. known
    says which codes begin and end a stay; mapped, what the file's codes are replaced by.
    """
    plain = dict(config.plain_predicates)
    for name, found in config.plain_predicates.items():
        if found.value_min is not None or found.value_max is not None:
            plain[CODE_ALONE.format(name)] = type(found)(found.code, static=found.static)
    data = _read(path, _columns(plain), mapped)
    codes = data["code"].drop_nulls().unique().to_list()
    begin, end = known.stays(codes)
    data, deaths = _deaths_of_dates(_one_after_the_other(data, begin, end), begin, end)
    counts = {name: p.MEDS_eval_expr().cast(pl.Int64) for name, p in plain.items()}
    late = known.late(codes)
    data = data.select("subject_id", "time", pl.col("code").is_in(late).alias(LATE), **counts)
    has_time = pl.col("time").is_not_null()
    matches = data.select(
        **{name: pl.col(name).filter(~has_time if p.static else has_time).sum() for name, p in plain.items()}
    ).row(0, named=True)
    events = of_stamps = _by_time(data, config)
    if late:
        plain_counts = pl.col(*config.plain_predicates)
        of_stamps = _by_time(
            data.with_columns(pl.when(~has_time | ~pl.col(LATE)).then(plain_counts).otherwise(0)), config
        )
    matches |= {name: int((events[name] > 0).sum()) for name in config.derived_predicates}
    label = config.windows[config.label_window].label
    return Predicates(events.with_columns(of_stamps[label].alias(SEEN)), matches, deaths)


def _deaths_of_dates(data: pl.DataFrame, begin: list[str], end: list[str]) -> tuple[pl.DataFrame, dict[str, int]]:
    """Events whose deaths without a time of day have one (see `read_predicates`), and how many there are, by case.

    begin, end: the codes that begin and end a stay.
    """
    time, code, day = pl.col("time"), pl.col("code"), pl.col("time").dt.truncate("1d")
    dated = code.str.contains(f"^{meds.death_code}(//.*)?$") & (time == day)
    last = (
        data.filter(time.is_not_null(), code.is_in([*begin, *end]))
        .filter(time == time.max().over("subject_id", day))
        .group_by("subject_id", day.alias("day"))
        .agg(
            discharged=time.first(),
            inside=code.is_in(begin).any(),
            alive=code.is_in([each for each in end if _left_alive(each)]).any(),
        )
        .filter(~pl.col("inside"))
    )
    data = data.with_columns(day=day).join(last, on=["subject_id", "day"], how="left", maintain_order="left")
    alive = pl.col("alive")  # null: no discharge ends a stay on that day
    at = pl.when(dated & ~alive).then("discharged").when(dated).then(time + LAST_OF_DAY).otherwise("time")
    of_case = {"after a discharge alive": alive, "at a discharge": ~alive, "without a discharge": alive.is_null()}
    counts = data.select(**{name: (dated & case).sum() for name, case in of_case.items()}).row(0, named=True)
    return data.with_columns(time=at).drop("day", "discharged", "inside", "alive"), counts


def _left_alive(discharge: str) -> bool:
    """Whether a discharge's code says that the patient left alive: it names where to, or how."""
    said = [part for part in map(str.strip, discharge.upper().split("//")[1:]) if not UNCLEAR.fullmatch(part)]
    return bool(said) and not any(DEAD.search(part) for part in said)


def _one_after_the_other(data: pl.DataFrame, begin: list[str], end: list[str]) -> pl.DataFrame:
    """Events whose admissions come a microsecond before the discharge at their time that ends their own stay.

    begin, end: the codes that begin and end a stay. A patient is in hospital after a time with both where there are
    more admissions than discharges, or as many, and it was in hospital before.
    """
    at = ["subject_id", "time"]
    admitted, change = pl.col("code").is_in(begin), pl.col("change")
    discharged = pl.col("code").is_in(end)
    counts = {
        "both": admitted.any() & discharged.any(),
        "change": admitted.sum().cast(pl.Int64) - discharged.sum().cast(pl.Int64),
    }
    stays = data.filter(pl.col("time").is_not_null(), admitted | discharged).group_by(at).agg(**counts)
    inside = pl.when(change != 0).then(change > 0).forward_fill().over("subject_id").fill_null(False)
    whole = stays.sort(at).filter(pl.col("both") & ~inside).select(*at, pl.lit(True).alias(WHOLE))
    if whole.is_empty():
        return data
    data = data.join(whole, on=at, how="left", maintain_order="left")
    earlier = pl.col(WHOLE).fill_null(False) & admitted
    return data.with_columns(time=pl.when(earlier).then(pl.col("time") - MICROSECOND).otherwise("time"))


def _by_time(data: pl.DataFrame, config: Any) -> pl.DataFrame:
    """`Predicates.events`, from how often each event matches each plain predicate."""
    data = data.select("subject_id", "time", *config.plain_predicates)
    data = data.group_by("subject_id", "time").agg(pl.all().sum()).sort("subject_id", "time", nulls_last=False)
    has_time = pl.col("time").is_not_null()
    static = [name for name, p in config.plain_predicates.items() if p.static]
    data = data.with_columns(pl.col(static).filter(~has_time).sum().over("subject_id"))
    derived = config.derived_predicates
    read_by_derived = {name for p in derived.values() for name in p.input_predicates}
    for name, p in derived.items():
        data = data.with_columns(p.eval_expr().cast(pl.Int64).alias(name))
    data = data.filter(has_time, *[pl.col(name) > 0 for name in static if name not in read_by_derived])
    return data.with_columns(
        pl.lit(1).alias(ANY_EVENT),
        (pl.col("time") == pl.col("time").min().over("subject_id")).cast(pl.Int64).alias(RECORD_START),
        (pl.col("time") == pl.col("time").max().over("subject_id")).cast(pl.Int64).alias(RECORD_END),
    )


def _columns(plain: Mapping[str, Any]) -> list[str]:
    others = {name for predicate in plain.values() for name in predicate.other_cols}
    return ["subject_id", "time", "code", "numeric_value", *sorted(others)]


def _read(path: Location, columns: list[str], mapped: CodeMap | None) -> pl.DataFrame:
    optional = "numeric_value"
    try:
        with open_parquet(path) as file:
            table = file.read(columns=columns)
        table.validate(full=True)
        if optional not in table.column_names:
            table = table.append_column(optional, pa.nulls(table.num_rows, pa.float32()))
        table = mapped.apply_to_table(table, path) if mapped else table
        data = pl.DataFrame(pl.from_arrow(table.select(columns)))
        return data.with_columns(pl.col("time").cast(pl.Datetime("us")), pl.col("code").cast(pl.String))
    except KeyError as error:
        raise UserError(f"{path} lacks a column that task.definition names: {_fault(error)}") from error
    except UNREADABLE as error:
        raise unreadable_error(path) from error
    except pl.exceptions.PolarsError as error:
        fault = _fault(error).partition("[")[0]  # where Polars quotes values
        raise DataError(f"{path}: task.definition cannot be evaluated on it: {fault}") from error


# ---------------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class Found:
    """The triggers of a shard.

    rows: subject_id, trigger, prediction_time, start (see `find`), end of the window that has the label, event
        (whether its label's predicate holds there), event_time (when first) and, for each kind, whether the first of
        all its events is of that kind, transferred (whether the label window ends at an event and the trigger comes
        again within 6 hours of it: the stay goes on elsewhere); of triggers at which every window holds. With
        `competing` also rival_before (whether that predicate holds from the trigger to the prediction time) and
        rival_time (when first after it, in the label window).
    num_triggers; excluded: for each window how many triggers it leaves out, of those that the ones before it, in the
        order of their evaluation, have left; then, by other names, those with nothing left to predict.
    """

    rows: pl.DataFrame
    num_triggers: int
    excluded: dict[str, int]


def find(
    config: Any,
    events: pl.DataFrame,
    start: str | None = None,
    kinds: Mapping[str, bool] | None = None,
    competing: str | None = None,
) -> Found:
    """Triggers, windows and labels in `Predicates.events`.

    start: what a label is about begins at the "trigger" (null where the prediction time is before it), or at the last
        event of a predicate up to the prediction time (null where there is none), or is unknown (None).
    kinds: predicates that distinguish kinds of the label's event; where false, events at times of this kind make no
        label.
    competing: a predicate of which it is asked when it first holds.
    """
    record, kinds = _Record(events), kinds or {}
    trigger = np.flatnonzero(record.count[config.trigger.predicate])
    edges, holds_N, excluded = _evaluated(config, record, trigger)
    target = config.label_window
    window, prediction_N = config.windows[target], edges[f"{config.index_timestamp_window}.{_index(config)}"][0]
    (start_N, _), (end_N, _) = edges[f"{target}.start"], edges[f"{target}.end"]
    last_N = np.minimum(end_N - (not window.end_inclusive), prediction_N)
    until = _Span(start_N, last_N, window.start_inclusive, at_end=True)
    for what, lost_N in (
        (OVER, end_N < prediction_N),
        (KNOWN, record.counted(record.count[SEEN], record.subject_R[trigger], until) > 0),
    ):
        if num_lost := int((holds_N & lost_N).sum()):
            excluded[f"{target} ({what})"] = num_lost
        holds_N = holds_N & ~lost_N
    subject_N = record.subject_R[trigger][holds_N]
    time_N = {name: edge_N[holds_N] for name, (edge_N, _) in edges.items()}
    prediction_N = time_N[f"{config.index_timestamp_window}.{_index(config)}"]

    span = _Span(time_N[f"{target}.start"], time_N[f"{target}.end"], *_includes(window))
    every_R = record.count[window.label]
    left_out_R = np.any([record.count[kind] > 0 for kind, counts in kinds.items() if not counts], axis=0)
    event_N, first_N = record.first(np.where(left_out_R, 0, every_R), subject_N, span)
    any_N, first_of_any_N = record.first(every_R, subject_N, span)
    then = _Span(first_of_any_N, first_of_any_N, True, True)

    always_N = np.ones(len(subject_N), dtype=bool)
    about_N, known_N = time_N["trigger"], (time_N["trigger"] <= prediction_N) & (start is not None)
    if start not in (None, "trigger"):
        about_N, known_N = record.nearest(record.count[start], subject_N, prediction_N, True, before=True)
    rows = pl.DataFrame(
        {
            "subject_id": record.subject_id_S[subject_N],
            "trigger": _times(time_N["trigger"], always_N),
            "prediction_time": _times(prediction_N, always_N),
            "start": _times(about_N, known_N),
            "end": _times(span.end_N, always_N),
            "event": event_N,
            "event_time": _times(first_N, event_N),
            "transferred": _transferred(config, record, subject_N, span.end_N),
            **{kind: any_N & (record.counted(record.count[kind], subject_N, then) > 0) for kind in kinds},
        }
    )
    if competing is not None:
        rival_R, before = record.count[competing], _Span(time_N["trigger"], prediction_N, True, True)
        there_N, rival_N = record.first(rival_R, subject_N, span._replace(start_N=prediction_N, at_start=False))
        held_N = record.counted(rival_R, subject_N, before) > 0
        rows = rows.with_columns(rival_before=pl.Series(held_N), rival_time=_times(rival_N, there_N))
    return Found(rows, len(trigger), excluded)


def _transferred(config: Any, record: _Record, subject_N: np.ndarray, end_N: np.ndarray) -> np.ndarray:
    """Whether the trigger comes again where the label window ends, or soon after; never where it ends by the clock."""
    window, trigger = config.windows[config.label_window], config.trigger.predicate
    if getattr(window.end_endpoint_expr, "end_event", RECORD_END) in (RECORD_END, trigger):
        return np.zeros(len(subject_N), dtype=bool)
    soon = _Span(end_N, end_N + TRANSFER // MICROSECOND, True, True)
    return record.counted(record.count[trigger], subject_N, soon) > 0


Edge = tuple[np.ndarray, np.ndarray]  # time_N int64 in microseconds, void where not known_N


class _Span(NamedTuple):
    """From start to end, at which events count or not."""

    start_N: np.ndarray
    end_N: np.ndarray
    at_start: bool
    at_end: bool


def _includes(window: Any) -> tuple[bool, bool]:
    return window.start_inclusive, window.end_inclusive


def _index(config: Any) -> str:
    return str(config.windows[config.index_timestamp_window].index_timestamp)


def _evaluated(config: Any, record: _Record, trigger: np.ndarray) -> tuple[dict[str, Edge], np.ndarray, dict[str, int]]:
    """Every window's edges by name ("gap.start"), at which triggers all windows hold, and how many each leaves out."""
    subject_N, always_N = record.subject_R[trigger], np.ones(len(trigger), dtype=bool)
    edges: dict[str, Edge] = {"trigger": (record.time_R[trigger], always_N)}
    holds_N, excluded = always_N, {}
    for name in _evaluation_order(config):
        window = config.windows[name]
        root, other = ("end", "start") if window.root_node == "end" else ("start", "end")
        expression = {"start": window.start_endpoint_expr, "end": window.end_endpoint_expr}
        at_root = window.end_inclusive if root == "end" else window.start_inclusive
        reference = edges[".".join(window.referenced_event)]
        edges[f"{name}.{root}"] = edge = record.edge(subject_N, reference, expression[root], at_reference=False)
        edges[f"{name}.{other}"] = record.edge(subject_N, edge, expression[other], at_reference=at_root)
        (start_N, start_known_N), (end_N, end_known_N) = edges[f"{name}.start"], edges[f"{name}.end"]
        here_N = start_known_N & end_known_N
        for predicate, (least, most) in window.has.items():
            span = _Span(start_N, end_N, *_includes(window))
            count_N = record.counted(record.count[predicate], subject_N, span)
            here_N = here_N & (count_N >= (least or 0)) & (count_N <= (count_N if most is None else most))
        excluded[name] = int((holds_N & ~here_N).sum())
        holds_N = holds_N & here_N
    return edges, holds_N, excluded


class _Record:
    """The rows of `Predicates.events`, searched by subject and time.

    key_R rises with subject and time, so that one search finds a place among all subjects' rows.
    """

    def __init__(self, events: pl.DataFrame) -> None:
        subject_id_R = events["subject_id"].to_numpy()
        self.time_R = events["time"].to_physical().to_numpy()
        self.count = {name: events[name].to_numpy() for name in events.columns[2:]}
        new_R = np.diff(subject_id_R, prepend=subject_id_R[:1] - 1) != 0
        self.subject_R = np.cumsum(new_R) - 1
        self.first_S = np.flatnonzero(new_R)
        self.last_S = np.append(self.first_S[1:], len(new_R)) - 1
        self.subject_id_S = subject_id_R[self.first_S]
        self._time_U = np.unique(self.time_R)
        self._key_R = self._key(self.subject_R, np.searchsorted(self._time_U, self.time_R))

    def _key(self, subject_N: np.ndarray, rank_N: np.ndarray) -> np.ndarray:
        return subject_N * (len(self._time_U) + 1) + rank_N

    def _rows_before(self, subject_N: np.ndarray, time_N: np.ndarray, and_at: bool) -> np.ndarray:
        """How many rows, other subjects' included, come before each time (or at it)."""
        rank_N = np.searchsorted(self._time_U, time_N, side="right" if and_at else "left")
        return np.searchsorted(self._key_R, self._key(subject_N, rank_N))

    def counted(self, count_R: np.ndarray, subject_N: np.ndarray, span: _Span) -> np.ndarray:
        """How many events lie in a span."""
        until = np.concatenate([[0], np.cumsum(count_R)])
        from_N = self._rows_before(subject_N, span.start_N, and_at=not span.at_start)
        to_N = self._rows_before(subject_N, span.end_N, and_at=span.at_end)
        return np.maximum(until[to_N] - until[from_N], 0)

    def first(self, count_R: np.ndarray, subject_N: np.ndarray, span: _Span) -> tuple[np.ndarray, np.ndarray]:
        """Whether a span has an event, and the time of its first one."""
        time_N, _ = self.nearest(count_R, subject_N, span.start_N, span.at_start)
        return self.counted(count_R, subject_N, span) > 0, time_N

    def nearest(
        self, count_R: np.ndarray, subject_N: np.ndarray, time_N: np.ndarray, at_time: bool, before: bool = False
    ) -> Edge:
        """The next (or last) time that has an event, and whether there is one."""
        row_H = np.flatnonzero(count_R)
        place_N = self._rows_before(subject_N, time_N, and_at=at_time == before)
        hit_N = np.searchsorted(row_H, place_N) - before
        row_N = np.append(row_H, -1)[np.clip(hit_N, -1, len(row_H))]
        known_N = (hit_N >= 0) & (row_N >= 0) & (self.subject_R[row_N] == subject_N)
        return np.where(known_N, self.time_R[row_N], time_N), known_N

    def edge(self, subject_N: np.ndarray, reference: Edge, expression: Any, at_reference: bool) -> Edge:
        """A window's edge, relative to another one."""
        time_N, known_N = reference
        if expression is None:
            return time_N, known_N
        if hasattr(expression, "window_size"):
            return time_N + expression.window_size // MICROSECOND, known_N
        predicate = expression.end_event
        if predicate == RECORD_END:
            found_N = self.time_R[self.last_S[subject_N]]
            return found_N, known_N & (found_N >= time_N)
        if predicate == f"-{RECORD_START}":
            found_N = self.time_R[self.first_S[subject_N]]
            return found_N, known_N & (found_N <= time_N)
        before = predicate.startswith("-")
        count_R = self.count[predicate.removeprefix("-")]
        found_N, there_N = self.nearest(count_R, subject_N, time_N, at_reference, before)
        return found_N, known_N & there_N


def _times(time_N: np.ndarray, known_N: np.ndarray) -> pl.Series:
    times = pl.Series(time_N.astype("datetime64[us]"), dtype=pl.Datetime("us"))
    return times.set(pl.Series(~known_N), None) if len(times) else times
