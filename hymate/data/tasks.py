"""The labels of a prediction task: those that came with the dataset, or extracted with its ACES definition and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hymate.config import TaskConfig
from hymate.data.details import SUMMARY, Details, no_event_error
from hymate.data.histories import read_metadata
from hymate.data.known import KnownConfig
from hymate.data.label_files import COMPETING, EVENT, KEYS, read_labels, sizes
from hymate.data.meds import FIRST_TIME, read_splits
from hymate.errors import UserError
from hymate.storage.paths import Location, files_below, locate, present

RULES_VERSION = 7  # of definition.py and outcomes.py: a new one has labels that were kept extracted again


@dataclass(frozen=True)
class LabelSet:
    """table: subject_id, prediction_time, boolean_value (float_value in days where the task has it) and, where known,
    `start` and `weight` (see `hymate.data.label_files`). Of a task in time `cause`, the files' integer_value, and the
    days in float_value, both as seen up to the last horizon.
    counts: labels, positives and subjects; for extracted labels also the other counts of `hymate.data.outcomes`.
    details: of extracted labels.
    """

    table: pa.Table
    counts: dict[str, int]
    details: Details | None = None

    def digest(self) -> str:
        """Of what a model learns from them."""
        found = hashlib.sha256()
        for name in ("subject_id", "prediction_time", "boolean_value", "float_value", "start", "weight", "cause"):
            if name in self.table.column_names:
                found.update(np.ascontiguousarray(self.table[name].to_numpy()).tobytes())
        return found.hexdigest()

    def summary(self) -> dict[str, dict[str, Any]]:
        """The counts and details as results.json holds them."""
        return {"labels": self.counts, "label_details": asdict(self.details) if self.details else {}}


def read_or_extract_labels(root: Location, task: TaskConfig, times_only: bool = False) -> LabelSet:
    """The labels of `task` in the dataset at `root`, extracted and kept in `root`/labels/<name> if need be.

    In this order: the folder `task.labels`; `root`/labels/<name> that came with the dataset; what `task.definition`
    finds, extracted again if the definition or the data changed since. Raises UserError where there is no label,
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
        from hymate.data.extraction import extract  # late: most runs find labels that are kept, and need no polars

        summary = extract(task, shards, splits, known, folder, fingerprint)
    details = Details(**{spec.name: summary[spec.name] for spec in fields(Details)})
    if summary["never_positive"] and not times_only:
        raise no_event_error(task, "label's predicate", summary["never_positive"], details.unmatched())
    table = read_labels(folder)
    return LabelSet(in_time(table, task, str(folder)) if task.in_time else table, summary["counts"], details)


def _given(folder: Location, key: str, task: TaskConfig) -> LabelSet:
    if not folder.is_dir():
        raise UserError(f"{key}: {folder} is not a folder: give a folder of MEDS label Parquet files")
    table, where = read_labels(folder), f"{key}: labels in {folder}"
    table = in_time(table, task, where) if task.in_time else _binary(table, task, where)
    if not table.num_rows:
        raise UserError(f"{key}: {folder} holds no labels")
    _require_agreement(table, ("boolean_value", "float_value", "cause"), key, folder)
    one_each = pc.count_distinct(table["subject_id"]).as_py() == table.num_rows
    if "start" not in table.column_names and one_each and (task.start is not None or task.definition is None):
        # a subject's only label is about all that is known of it: its first event is the start. A definition without a
        # start asks at an event of its own (readmission, at the discharge), which a label's being alone does not change
        table = table.append_column("start", pa.array([FIRST_TIME] * table.num_rows, pa.timestamp("us")))
    return LabelSet(table, sizes(table))


def read_times(folder: Location, key: str, task: TaskConfig) -> pa.Table:
    """The prediction times in a folder of labels, in `LabelSet`'s columns; nobody needs to know their labels yet.

    Raises UserError where labels of one subject and time contradict each other.
    """
    table = read_labels(folder)
    if not task.in_time:  # its labels are not read where only the times are wanted
        values = ("boolean_value",) if task.longer_than_days is None else ("boolean_value", "float_value")
        _require_agreement(table, values, key, folder)
    return table


def _require_agreement(table: pa.Table, values: Sequence[str], key: str, folder: Location) -> None:
    """Raises UserError where labels of one subject and time differ in one of these columns, which need not be there."""
    known = [name for name in values if name in table.column_names]
    distinct, times = (table.group_by([*KEYS, *more]).aggregate([]).num_rows for more in (known, []))
    if contradicting := distinct - times:
        raise UserError(
            f"{key}: {contradicting} labels in {folder} contradict another one of the same subject and time: keep one"
        )


def _binary(table: pa.Table, task: TaskConfig, where: str) -> pa.Table:
    if "boolean_value" not in table.column_names or table["boolean_value"].null_count:
        raise UserError(f"{where} need a boolean_value without nulls")
    if task.longer_than_days is None:
        return table.select([name for name in table.column_names if name != "float_value"])
    if "float_value" not in table.column_names or not _are_days(table["float_value"]):
        raise UserError(
            f"{where} need a float_value, the days (0 or more, null where unknown), because longer_than_days of task "
            f"{task.name} is set: set it to null to learn boolean_value alone"
        )
    return table


def in_time(table: pa.Table, task: TaskConfig, where: str) -> pa.Table:
    """The labels of a task in time, as `LabelSet` has them. Raises UserError where they are none."""
    for name, holds in (("integer_value", "what came first"), ("float_value", "the days until then")):
        if name not in table.column_names or table[name].null_count:
            raise UserError(f"{where} need {name}, {holds}, without nulls: task {task.name} is in time")
    cause_N, days_N = table["integer_value"].to_numpy(), table["float_value"].to_numpy()
    assert task.in_time is not None
    if not np.isin(cause_N, range(1 + task.in_time.num_causes)).all():
        competing = f" or {COMPETING} ({task.competing})" if task.competing else ", unless task.competing names another"
        raise UserError(f"{where} need an integer_value of 0 (nothing came), {EVENT} (the event){competing}: mend it")
    if not _are_days(table["float_value"]):
        raise UserError(f"{where} need a float_value of finite days, 0 or more: mend it")
    if at_once := int(((cause_N > 0) & (days_N == 0)).sum()):
        raise UserError(
            f"{where}: of {at_once} labels the event comes 0 days after the prediction, which nobody can predict: "
            "leave them out or, where days are whole, add half a day to every float_value and to task.horizons_days"
        )
    last = np.float32(task.horizons_days[-1])
    cause_N = np.where(days_N > last, 0, cause_N)
    kept = table.drop_columns([name for name in ("boolean_value", "integer_value") if name in table.column_names])
    kept = kept.set_column(kept.column_names.index("float_value"), "float_value", pa.array(np.minimum(days_N, last)))
    return kept.append_column("boolean_value", pa.array(cause_N == EVENT)).append_column("cause", pa.array(cause_N))


def _are_days(column: pa.ChunkedArray) -> bool:
    days = column.drop_null().to_numpy()
    return bool((np.isfinite(days) & (days >= 0)).all())


# ---------------------------------------------------------------------------------------------- kept extractions


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
        *([task.kind, task.horizons_days] if task.in_time else []),
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
