"""Prediction tasks: MEDS labels that are there already, or extracted with an ACES task definition.

`hymate.data.definition` finds the triggers, the windows and whether the label's event happened. Whether a missing
event was not observed because the patient died (a competing risk) or because the record ends (censoring) is settled
here, with every outcome counted:

    triggers            times at which the definition's trigger matches (several codes at one time are one trigger)
    excluded            its windows do not hold there (e.g. discharged before the prediction time), or nothing is left
                        to predict: the label window is over before the prediction time, or its event has been seen
    died_in_hospital    the competing event, death, came at or before the prediction time: not at risk, no label
    competing_deaths    death after it, before the label window ends and without the label's event: no label under
                        `competing_rule: exclude`, a negative one under `negative`
    censored            the record ends inside the window, without a death there: no label. Under `censoring_rule:
                        exclude` with the label's event or without, under the other rules without
    positives_unseen    with the label's event, and the record ends inside the window, without a death there
    labels, positives, subjects     what remains

so triggers = excluded + died_in_hospital + censored + labels, + competing_deaths under `exclude`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import track

from hymate.config import TaskConfig
from hymate.data.definition import CODE_ALONE, find, parse, read_predicates
from hymate.data.extras import read_labels_and_extras, write_labels
from hymate.data.histories import read_metadata
from hymate.data.known import KnownConfig
from hymate.data.meds import FIRST_TIME, US_PER_DAY, read_splits
from hymate.errors import ConfigError, UserError
from hymate.storage.paths import Location, files_below, locate, new_folder, present, write_text

RULES_VERSION = 5  # of the rules above and of definition.py; a new one makes old extractions be redone
SUMMARY = "counts.json"
DETAILS = ("excluded", "kinds", "predicates")


@dataclass(frozen=True)
class LabelSet:
    """table: subject_id, prediction_time, boolean_value (float_value in days where the task has it) and, where known,
    `start` and `weight` (see `hymate.data.extras`).
    counts: labels, positives and subjects; for extracted labels also the other counts of this file's head.
    details: for extracted labels, "excluded": how many triggers each window leaves out; "kinds": how many first events
        in the label window are of each of the task's kinds, counted or left out; "predicates": how many events of the
        dataset each plain predicate of the definition matches.
    """

    table: pa.Table
    counts: dict[str, int]
    details: dict[str, dict[str, int]] = field(default_factory=dict)

    def digest(self) -> str:
        """Of what a model learns from them."""
        found = hashlib.sha256()
        for name in ("subject_id", "prediction_time", "boolean_value", "float_value", "start", "weight"):
            if name in self.table.column_names:
                found.update(np.ascontiguousarray(self.table[name].to_numpy()).tobytes())
        return found.hexdigest()


def labels(root: Location, task: TaskConfig, times_only: bool = False) -> LabelSet:
    """The labels of `task` in the dataset at `root`, extracted and kept in `root`/labels/<name> if need be.

    In this order: the folder `task.labels`; `root`/labels/<name> that came with the dataset; what `task.definition`
    finds, redone when the definition or the data changed since. Raises UserError where there is no label to be had,
    and where no event can make a label positive, unless the prediction times alone are wanted (`times_only`).
    """
    if task.labels is not None:
        return _given(locate(task.labels), "task.labels", task)
    folder = root / "labels" / task.name
    if present(folder) and not (folder / SUMMARY).exists():  # it came with the dataset
        return _given(folder, f"task.name={task.name}", task)
    if task.definition is None:
        raise UserError(f"task {task.name} has no labels in {folder}: give task.labels=FOLDER or a task.definition")
    shards = _shards(root)
    splits = read_splits(root) if task.censoring_rule == "weights" else None
    metadata = read_metadata(root)
    known = metadata["known"] if metadata else KnownConfig()
    fingerprint = _fingerprint(task, shards, splits, known)
    summary = _summary(folder)
    if summary.get("fingerprint") != fingerprint:
        summary = _extract(task, shards, splits, known, folder, fingerprint)
    if summary["never_positive"] and not times_only:
        raise _no_event(task, "label's predicate", summary["never_positive"], unmatched(summary["predicates"]))
    details = {name: summary[name] for name in DETAILS}
    return LabelSet(read_labels_and_extras(folder), summary["counts"], details)


def _given(folder: Location, key: str, task: TaskConfig) -> LabelSet:
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is not a folder: give a folder of MEDS label Parquet files")
    table = read_labels_and_extras(folder)
    if "boolean_value" not in table.column_names or table["boolean_value"].null_count:
        raise UserError(f"{key}: labels in {folder} need a boolean_value without nulls")
    if not table.num_rows:
        raise UserError(f"{key}: {folder} holds no labels")
    if task.longer_than_days is None:
        table = table.select([name for name in table.column_names if name != "float_value"])
    elif "float_value" not in table.column_names or not _are_days(table["float_value"]):
        raise UserError(
            f"{key}: labels in {folder} need a float_value, the days (0 or more, null where unknown), because "
            f"longer_than_days of task {task.name} is set: set it to null to learn boolean_value alone"
        )
    if "start" not in table.column_names and pc.count_distinct(table["subject_id"]).as_py() == table.num_rows:
        # a subject's only label is about all that is known of it: its first event is the start
        table = table.append_column("start", pa.array([FIRST_TIME] * table.num_rows, pa.timestamp("us")))
    return LabelSet(table, _sizes(table))


def _are_days(column: pa.ChunkedArray) -> bool:
    days = column.drop_null().to_numpy()
    return bool((np.isfinite(days) & (days >= 0)).all())


def _sizes(table: pa.Table) -> dict[str, int]:
    return {
        "labels": table.num_rows,
        "positives": pc.sum(table["boolean_value"]).as_py() or 0,
        "subjects": pc.count_distinct(table["subject_id"]).as_py(),
    }


# --------------------------------------------------------------------------------------------------- extraction


def _shards(root: Location) -> dict[str, Location]:
    """Shard name ("train/0") -> MEDS data file."""
    data = root / "data"
    files = {name.removesuffix(".parquet"): path for name, path in files_below(data, ".parquet").items()}
    if not files:
        raise UserError(f"{data} holds no MEDS shards: make them with python -m hymate.data.prepare out={root}")
    return files


def _fingerprint(task: TaskConfig, shards: dict[str, Location], splits: pa.Table | None, known: KnownConfig) -> str:
    """Changes with the definition, the rules, the data files (names and sizes) and, where weights need them, splits."""
    parts = [
        RULES_VERSION,
        task.definition,
        task.competing,
        task.competing_rule,
        task.censoring_rule,
        task.kinds,
        task.start,
        task.longer_than_days,
        asdict(known),
        [(shard, path.stat().st_size) for shard, path in shards.items()],
        *([] if splits is None else [splits.to_pydict()]),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _summary(folder: Location) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SUMMARY).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _extract(
    task: TaskConfig,
    shards: dict[str, Location],
    splits: pa.Table | None,
    known: KnownConfig,
    folder: Location,
    fingerprint: str,
) -> dict[str, Any]:
    """Extract every shard's labels beside `folder` and put them there in one move; with splits they have weights."""
    config = _definition(task)
    triggers: dict[str, pl.DataFrame] = {}
    of_shards: dict[str, dict[str, dict[str, int]]] = {}
    try:
        with new_folder(folder, SUMMARY) as new:
            progress = Console(stderr=True, quiet=not sys.stderr.isatty())
            for shard in track(shards, f"Labels of {task.name}", console=progress, transient=True):
                triggers[shard], of_shards[shard] = _extract_shard(shards[shard], task, config, known)
            if splits is not None:
                _weigh(triggers, splits)
            for shard, rows in triggers.items():
                write_labels(_labels_of(rows, task), new / f"{shard}.parquet")
            total = {name: Counter[str]() for name in (*DETAILS, "counts")}
            for name, counter in total.items():
                for found in of_shards.values():
                    counter.update(found[name])
            without = unmatched(total["predicates"])
            _require_labels(task, config, total, without)
            if unexpected := [name for name in without if name not in task.kinds]:
                names = ", ".join(unexpected)
                print(
                    f"task {task.name}: no event matches {names}: check the codes in task.definition", file=sys.stderr
                )
            for what, number in total["excluded"].items():
                if what not in config.windows:
                    print(f"task {task.name}: {number} triggers get no label by {what}", file=sys.stderr)
            label = config.windows[config.label_window].label
            summary = {
                "fingerprint": fingerprint,
                **{name: dict(counter) for name, counter in total.items()},
                "never_positive": _never(config, label, without),
                "shards": {shard: found["counts"] for shard, found in of_shards.items()},
            }
            write_text(json.dumps(summary, indent=2) + "\n", new / SUMMARY)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"{folder.parent} cannot be written: make it writable for the labels of {task.name}, or give "
            "task.labels=FOLDER"
        ) from error
    return summary


def _definition(task: TaskConfig) -> Any:
    config = parse(task)
    predicates = list(config.predicates)
    for setting, name, others in (
        (f"task.competing={task.competing}", task.competing, ["null"]),
        *((f"task.kinds.{kind}", kind, []) for kind in sorted(task.kinds)),
        (f"task.start={task.start}", task.start, ["null", "trigger"]),
    ):
        if name not in (None, *others, *predicates):
            choices = ", ".join([*others, *predicates])
            raise ConfigError(f"{setting} is no predicate of task.definition: choose one of {choices}")
    return config


def unmatched(matches: Mapping[str, int]) -> dict[str, str]:
    """The predicates that match no event, and why where it is known; see `Predicates.matches`."""
    found = {}
    for name, count in matches.items():
        if not count and not name.startswith(CODE_ALONE.format("")):
            of_code = matches.get(CODE_ALONE.format(name), 0)
            found[name] = f"{of_code} events have the code of {name}, but no value in its range" if of_code else ""
    return found


def _never(config: Any, name: str, without: Mapping[str, str]) -> list[str]:
    """Why a predicate holds nowhere: its plain predicates without an event, or itself where each of them has one; none
    where it holds somewhere, as ACES's own do.
    """
    if name not in without:
        return []
    inputs = config.predicates[name].input_predicates if name in config.derived_predicates else []
    return sorted({other for each in inputs for other in _never(config, each, without)}) or [name]


def _no_event(task: TaskConfig, role: str, names: list[str], without: Mapping[str, str]) -> UserError:
    assert task.definition is not None
    keys = [
        f"task.definition.{'predicates' if name in task.definition['predicates'] else 'patient_demographics'}.{name}"
        for name in names
    ]
    why = "".join(f" ({without[name]})" for name in names if without[name])
    return UserError(
        f"task {task.name}: no event matches its {role} {', '.join(names)}{why}: set {' and '.join(keys)} to the codes "
        "of this dataset (metadata/codes.parquet)"
    )


def _require_labels(
    task: TaskConfig, config: Any, total: Mapping[str, Mapping[str, int]], without: Mapping[str, str]
) -> None:
    counts = total["counts"]
    static = [name for name, predicate in config.plain_predicates.items() if predicate.static and name in without]
    if not counts["triggers"]:
        never = _never(config, config.trigger.predicate, without)
        if never or static:
            raise _no_event(task, "trigger" if never else "static predicate", never or static, without)
    if not counts["labels"]:
        why = ", ".join(f"{value} {name}" for name, value in counts.items())
        left_out = [f"{value} by {name}" for name, value in total["excluded"].items() if value]
        why += f"; excluded: {', '.join(left_out)}" if left_out else ""
        why += f"; predicates that match no event: {', '.join(without)}" if without else ""
        raise UserError(f"task {task.name}: no trigger gets a label ({why}): correct task.definition")


def _extract_shard(
    path: Location, task: TaskConfig, config: Any, known: KnownConfig
) -> tuple[pl.DataFrame, dict[str, dict[str, int]]]:
    """One MEDS data file's triggers at which every window holds, with what becomes of them, and the counts."""
    predicates = read_predicates(path, config, known)
    found = find(config, predicates.events, task.start, task.kinds)
    died = pl.col(task.competing) > 0 if task.competing else pl.lit(False)
    subjects = predicates.events.group_by("subject_id").agg(
        last=pl.col("time").max(), died=pl.col("time").filter(died).min()
    )
    rows = found.rows.join(subjects, on="subject_id", how="left").sort("subject_id", "prediction_time")
    rows = _settled(rows, task)
    at_risk, kept = rows.filter(~pl.col("dead")), rows.filter("label")
    counts = {
        "triggers": found.num_triggers,
        "excluded": found.num_triggers - rows.height,
        "died_in_hospital": rows.height - at_risk.height,
        "competing_deaths": int(rows["competing"].sum()),
        "censored": int((rows["unseen"] & ~rows["label"]).sum()),
        "positives_unseen": int((rows["unseen"] & rows["event"]).sum()),
        **_sizes(_labels_of(kept, task)),
    }
    kinds = {kind: int(at_risk[kind].sum()) for kind in task.kinds}
    return rows, {"counts": counts, "excluded": found.excluded, "kinds": kinds, "predicates": predicates.matches}


def _settled(rows: pl.DataFrame, task: TaskConfig) -> pl.DataFrame:
    """What becomes of each trigger, by the rules at the head of this file, as further columns.

    dead: before the prediction time. dies: in the label window. competing: that, without the label's event. unseen: the
    record ends in the window, without a death there. label: whether there is one.
    """
    dead = (pl.col("died") <= pl.col("prediction_time")).fill_null(False)
    rows = rows.with_columns(dead=dead, dies=~dead & (pl.col("died") <= pl.col("end")).fill_null(False))
    rows = rows.with_columns(
        competing=pl.col("dies") & ~pl.col("event"),
        unseen=~pl.col("dead") & ~pl.col("dies") & (pl.col("last") < pl.col("end")),
    )
    censored = pl.col("unseen") if task.censoring_rule == "exclude" else pl.col("unseen") & ~pl.col("event")
    lost = pl.col("dead") | censored
    if task.competing_rule == "exclude":
        lost |= pl.col("competing")
    return rows.with_columns(label=~lost)


def _labels_of(rows: pl.DataFrame, task: TaskConfig) -> pa.Table:
    """Labels, and `start` and `weight` where the task has them."""
    values = {"boolean_value": pl.col("event")}
    if task.longer_than_days is not None:
        days = (pl.col("end") - pl.col("trigger")).dt.total_microseconds() / US_PER_DAY
        values = {"boolean_value": days > task.longer_than_days, "float_value": days.cast(pl.Float32)}
    extra = ["start"] if task.start is not None else []
    extra += ["weight"] if "weight" in rows.columns else []
    return rows.filter("label").select("subject_id", "prediction_time", *extra, **values).to_arrow()


# ------------------------------------------------------------------------------------------------------- censoring


def _weigh(triggers: dict[str, pl.DataFrame], splits: pa.Table) -> None:
    """Give the triggers of each shard their `weight`, by the censoring in the split of their subject.

    Each split by itself: its scores then are an estimate from its patients alone, nothing of the held-out ones reaches
    training, and where follow-up differs between splits (by calendar time, say) each has its own.
    """
    rows = pl.concat(list(triggers.values()))
    split_of = dict(zip(splits["subject_id"].to_pylist(), splits["split"].to_pylist(), strict=True))
    split = np.array([split_of.get(subject) for subject in rows["subject_id"].to_list()], dtype=object)
    until = pl.coalesce(
        pl.when("event").then("event_time"), pl.when("dies").then("died"), pl.when("unseen").then("last"), "end"
    )
    followed = rows.select((until - pl.col("prediction_time")).dt.total_microseconds()).to_series().to_numpy()
    censored = (rows["unseen"] & ~rows["event"]).to_numpy()
    at_risk = ~rows["dead"].to_numpy()
    weight = np.ones(rows.height)
    for name in set(split.tolist()):
        own = at_risk & (split == name)
        weight[own] = censoring_weights(followed[own], censored[own])
    first = 0
    for shard, found in triggers.items():
        stop = first + found.height
        triggers[shard] = found.with_columns(weight=pl.Series(weight[first:stop], dtype=pl.Float32))
        first = stop


def censoring_weights(followed_N: np.ndarray, censored_N: np.ndarray) -> np.ndarray:
    """One over the Kaplan-Meier probability of being followed up to just before each time (Robins & Finkelstein 2000).

    followed_N: time to the event or the end of the window, or, where censored_N, to the end of the record. At one time
    events come before censoring. Those that are followed thus stand for those that were lost before.
    """
    order_N = np.lexsort((censored_N, followed_N))
    at_risk_N = np.arange(len(order_N), 0, -1)
    followed = np.cumprod(np.where(censored_N[order_N], 1 - 1 / at_risk_N, 1.0))
    weight_N = np.empty(len(order_N))
    weight_N[order_N] = 1 / np.concatenate([[1.0], followed[:-1]])[: len(order_N)]
    return weight_N
