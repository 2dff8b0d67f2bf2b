"""Hand-written hospital stays as MEDS shards, and the labels that a task gives them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hymate.command import load
from hymate.config import TaskConfig
from hymate.data import tasks

START = datetime(2100, 1, 1, 9)
ADMITTED, HOME, DIED = "HOSPITAL_ADMISSION//EW EMER.", "HOSPITAL_DISCHARGE//HOME", "HOSPITAL_DISCHARGE//DIED"
DEATH, LAB = "MEDS_DEATH", "LAB//50912//mg/dL"
History = list[tuple[float, str]]  # days since START, code
Labels = dict[float, bool]  # prediction time in days since START -> label


@dataclass(frozen=True)
class Root:
    task: TaskConfig


def task(name: str, *overrides: str) -> TaskConfig:
    return load(f"task/{name}", overrides, Root).task


def write_histories(root: Path, histories: list[History], shard: str = "train/0", first_subject: int = 1) -> None:
    """A MEDS shard with one subject a history, each with a static event."""
    rows: list[tuple[int, datetime | None, str]] = []
    for subject, history in enumerate(histories, start=first_subject):
        rows.append((subject, None, "GENDER//F"))
        rows += [(subject, START + timedelta(days=day), code) for day, code in history]
    subjects, times, codes = zip(*rows, strict=True)
    path = root / "data" / f"{shard}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "subject_id": pa.array(subjects, pa.int64()),
        "time": pa.array(times, pa.timestamp("us")),
        "code": pa.array(codes, pa.string()),
        "numeric_value": pa.nulls(len(rows), pa.float32()),
    }
    pq.write_table(pa.table(columns), path)


def write_splits(root: Path, split_of: dict[int, str]) -> None:
    (root / "metadata").mkdir(exist_ok=True)
    columns = {"subject_id": pa.array(split_of, pa.int64()), "split": list(split_of.values())}
    pq.write_table(pa.table(columns), root / "metadata" / "subject_splits.parquet")


def stay(start: float, end: float, discharge: str = HOME) -> History:
    return [(start, ADMITTED), (end, discharge)]


def days(time: datetime) -> float:
    return round((time - START) / timedelta(days=1), 6)


def extract(root: Path, history: History, config: TaskConfig) -> tuple[Labels, dict[str, int]]:
    """Labels and counts of one history; a second subject makes sure that there is a label at all."""
    other = [*stay(0, 2), *stay(10, 12), (100, LAB), (200, DEATH)]
    write_histories(root, [history, other])
    result = tasks.read_or_extract_labels(root, config)
    rows = [row for row in result.table.to_pylist() if row["subject_id"] == 1]
    return {days(row["prediction_time"]): row["boolean_value"] for row in rows}, result.counts
