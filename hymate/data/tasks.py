"""Prediction tasks: MEDS labels that are there already, or extracted with an ACES task definition.

ACES finds the triggers, the windows and whether the label's event happened. What it cannot say, whether a missing
event was not observed because the patient died (a competing risk) or because the record ends (censoring), is
settled here, with every outcome counted:

    triggers            times at which the definition's trigger matches (several codes at one time are one trigger)
    excluded            its windows do not hold there (e.g. discharged before the prediction time)
    died_in_hospital    the competing event, death, came at or before the prediction time: not at risk, no label
    competing_deaths    death after it, before the label window ends and without the label's event: no label under
                        `competing_rule: exclude`, a negative one under `negative`
    censored            no event, no death, and the record ends before the window: no label
    labels, positives, subjects     what remains

so triggers = excluded + died_in_hospital + censored + labels, + competing_deaths under `exclude`. A positive
stays positive even where the record ends inside the window, which is why ACES's own `censoring` windows, which
drop it, are not used.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from hymate.config import ConfigError, TaskConfig, UserError
from hymate.data.meds import read_labels, write_parquet
from hymate.storage import Location, files_below, local_copy, locate, new_folder, write_text

# aces is imported where labels are extracted: it takes seconds (matplotlib among others), and most runs find labels
RULES_VERSION = 1  # of the rules above; a new one makes old extractions be redone
SUMMARY = "counts.json"
MICROSECONDS_PER_DAY = 86_400_000_000
WINDOW_SCHEMA: dict[str, Any] = {
    "subject_id": pl.Int64,
    "trigger": pl.Datetime("us"),
    "prediction_time": pl.Datetime("us"),
    "end": pl.Datetime("us"),
    "event": pl.Boolean,
}


@dataclass(frozen=True)
class LabelSet:
    """table: subject_id, prediction_time, boolean_value (and float_value in days where the task has it).
    counts: labels, positives and subjects; for extracted labels also the other counts of this file's head.
    """

    table: pa.Table
    counts: dict[str, int]

    def digest(self) -> str:
        """Of what a model learns from them."""
        found = hashlib.sha256()
        for name in ("subject_id", "prediction_time", "boolean_value", "float_value"):
            if name in self.table.column_names:
                found.update(np.ascontiguousarray(self.table[name].to_numpy()).tobytes())
        return found.hexdigest()


def labels(root: Location, task: TaskConfig) -> LabelSet:
    """The labels of `task` in the dataset at `root`, extracted and kept in `root`/labels/<name> if need be.

    In this order: the folder `task.labels`; `root`/labels/<name> that came with the dataset; ACES's extraction,
    redone when the definition or the data changed since. Raises UserError where there is no label to be had.
    """
    if task.labels is not None:
        return _given(locate(task.labels), "task.labels", task)
    folder = root / "labels" / task.name
    came_with_data = folder.is_dir() and not (folder / SUMMARY).exists()
    if came_with_data:
        return _given(folder, f"task.name={task.name}", task)
    if task.definition is None:
        raise UserError(f"task {task.name} has no labels in {folder}: give task.labels=FOLDER or a task.definition")
    shards = _shards(root)
    fingerprint = _fingerprint(task, shards)
    summary = _summary(folder)
    if summary.get("fingerprint") != fingerprint:
        summary = _extract(task, shards, folder, fingerprint)
    return LabelSet(read_labels(folder), summary["counts"])


def _given(folder: Location, key: str, task: TaskConfig) -> LabelSet:
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is not a folder: give a folder of MEDS label Parquet files")
    table = read_labels(folder)
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


def _fingerprint(task: TaskConfig, shards: dict[str, Location]) -> str:
    """Changes with the definition, the rules and the data files (names and sizes)."""
    parts = [
        RULES_VERSION,
        task.definition,
        task.competing,
        task.competing_rule,
        task.longer_than_days,
        [(shard, path.stat().st_size) for shard, path in shards.items()],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _summary(folder: Location) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / SUMMARY).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _extract(task: TaskConfig, shards: dict[str, Location], folder: Location, fingerprint: str) -> dict[str, Any]:
    """Extract every shard's labels beside `folder` and put them there in one move."""
    counts: dict[str, dict[str, int]] = {}
    _aces_config(task)
    try:
        with new_folder(folder, SUMMARY) as new, _quiet_aces():
            progress = Console(stderr=True, quiet=not sys.stderr.isatty())
            for shard in track(shards, f"Labels of {task.name}", console=progress, transient=True):
                table, counts[shard] = _extract_shard(shards[shard], task)
                write_parquet(table, new / f"{shard}.parquet")
            total: Counter[str] = Counter()
            for of_shard in counts.values():
                total.update(of_shard)
            _require_labels(task, total)
            summary = {"fingerprint": fingerprint, "counts": dict(total), "shards": counts}
            write_text(json.dumps(summary, indent=2) + "\n", new / SUMMARY)
    except PermissionError as error:
        raise UserError(
            f"{folder.parent} cannot be written: make it writable for the labels of {task.name}, or give "
            "task.labels=FOLDER"
        ) from error
    return summary


def _require_labels(task: TaskConfig, counts: Counter[str]) -> None:
    assert task.definition is not None
    if not counts["triggers"]:
        name = task.definition["trigger"]
        raise UserError(
            f"task {task.name}: no event matches its trigger {name}: set task.definition.predicates.{name} to the "
            "codes of this dataset (metadata/codes.parquet)"
        )
    if not counts["labels"]:
        told = ", ".join(f"{value} {name}" for name, value in counts.items())
        raise UserError(f"task {task.name}: no trigger gets a label ({told}): mend task.definition")


def _extract_shard(path: Location, task: TaskConfig) -> tuple[pa.Table, dict[str, int]]:
    """Labels (sorted by subject and time) and counts of one MEDS data file."""
    from aces.predicates import get_predicates_df
    from aces.query import query

    config = _aces_config(task)  # a fresh one a shard: query adds up window offsets inside it
    try:
        with local_copy(path) as found:
            events = get_predicates_df(config, DictConfig({"standard": "meds", "path": str(found)}))
        windows = query(config, events)
    except (pl.exceptions.PolarsError, pa.ArrowException) as error:
        fault = _one_line(error).partition("[")[0]  # where Polars quotes values
        raise UserError(f"{path}: ACES cannot read it with task.definition: {fault}") from error
    events = events.drop_nulls("timestamp")
    num_triggers = events.filter(pl.col(config.trigger.predicate) > 0).height
    rows = _windows(config, windows) if not windows.is_empty() else pl.DataFrame(schema=WINDOW_SCHEMA)
    died = pl.col(task.competing) > 0 if task.competing else pl.lit(False)
    subjects = events.group_by("subject_id").agg(
        last=pl.col("timestamp").max(), died=pl.col("timestamp").filter(died).min()
    )
    rows = rows.join(subjects, on="subject_id").sort("subject_id", "prediction_time")
    return _settle(rows, task, num_triggers)


def _windows(config: Any, windows: pl.DataFrame) -> pl.DataFrame:
    """ACES's answer, a row a trigger whose windows hold: when the label window ends and whether its event came."""
    root = config.windows[config.label_window].root_node
    summary = pl.col(f"{config.label_window}.{'end' if root == 'start' else 'start'}_summary")
    return windows.select(
        "subject_id",
        "trigger",
        prediction_time="index_timestamp",
        end=summary.struct.field("timestamp_at_end"),
        event=pl.col("label") > 0,
    ).cast(pl.Schema(WINDOW_SCHEMA))


def _settle(rows: pl.DataFrame, task: TaskConfig, num_triggers: int) -> tuple[pa.Table, dict[str, int]]:
    """Which rows become labels, by the rules at the head of this file."""
    no_event = ~pl.col("event")
    dead = (pl.col("died") <= pl.col("prediction_time")).fill_null(False)
    dies = (pl.col("died") <= pl.col("end")).fill_null(False)
    unseen = (pl.col("last") < pl.col("end")).fill_null(False)  # a null end: the window runs to the end of the record
    rows = rows.with_columns(dead=dead, competing=~dead & no_event & dies, censored=~dead & no_event & ~dies & unseen)
    dropped = pl.col("dead") | pl.col("censored")
    if task.competing_rule == "exclude":
        dropped |= pl.col("competing")
    kept = rows.filter(~dropped)
    values = {"boolean_value": pl.col("event")}
    if task.longer_than_days is not None:
        days = (pl.col("end") - pl.col("trigger")).dt.total_microseconds() / MICROSECONDS_PER_DAY
        values = {"boolean_value": days > task.longer_than_days, "float_value": days.cast(pl.Float32)}
    table = kept.select("subject_id", "prediction_time", **values).to_arrow()
    counts = {
        "triggers": num_triggers,
        "excluded": num_triggers - rows.height,
        "died_in_hospital": int(rows["dead"].sum()),
        "competing_deaths": int(rows["competing"].sum()),
        "censored": int(rows["censored"].sum()),
        **_sizes(table),
    }
    return table, counts


# --------------------------------------------------------------------------------------------------------- ACES


def _aces_config(task: TaskConfig) -> Any:
    """`task.definition` as ACES's own configuration object.

    Built from its parts, as ACES's `load` reads files only and drops predicates that no window names, among them
    `competing`. Raises ConfigError for a definition that ACES cannot use.
    """
    from aces.config import DerivedPredicateConfig, EventConfig, PlainPredicateConfig, TaskExtractorConfig, WindowConfig

    definition = copy.deepcopy(task.definition) or {}  # ACES parses `has` in place
    fields = PlainPredicateConfig.__dataclass_fields__

    def predicate(spec: dict[str, Any], **static: bool) -> Any:
        if "expr" in spec:
            return DerivedPredicateConfig(**spec)
        known = {name: value for name, value in spec.items() if name in fields}
        plain = PlainPredicateConfig(**known, **static, other_cols={k: v for k, v in spec.items() if k not in fields})
        if isinstance(plain.code, dict) and plain.code.get("regex"):
            pl.Series([""]).str.contains(plain.code["regex"])
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
        unknown = set(definition) - {
            "predicates",
            "patient_demographics",
            "trigger",
            "windows",
            "description",
            "metadata",
        }
        if unknown:
            raise ValueError(f"unknown key {sorted(unknown)[0]}")
    except (KeyError, TypeError, ValueError, AttributeError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"task.definition is not an ACES task: {_one_line(error)}") from error
    if config.label_window is None or config.index_timestamp_window is None:
        raise ConfigError("task.definition needs a window with a label and one with an index_timestamp")
    if task.competing is not None and task.competing not in predicates:
        raise ConfigError(
            f"task.competing={task.competing} is no predicate of task.definition: it has {', '.join(predicates)}"
        )
    return config


@contextmanager
def _quiet_aces() -> Iterator[None]:
    """ACES logs each step, and warns e.g. of a shard without a trigger; its errors are exceptions."""
    logger = logging.getLogger("aces")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
