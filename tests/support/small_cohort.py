"""A small MEDS dataset with labels, whose outcome follows the mean of one lab value; a history of its codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from hymate.data.histories import History
from hymate.data.label_files import LABEL_SCHEMA
from hymate.data.meds import DATA_SCHEMA, US_PER_HOUR, US_PER_YEAR, write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.storage.paths import write_text

SIZES = {"train": 60, "tuning": 24, "held_out": 24}
START_US = 1_500_000_000_000_000
STREAM_START_US = 1_600_000_000_123_456
LABS = ("LAB//marker", "LAB//sodium", "LAB//glucose")
CODES = [*LABS, "OTHER"]


def write_meds(raw: Path, seed: int = 0, prefix: str = "") -> Path:
    """MEDS 0.4 with the label folder labels/readmission; `prefix` changes every code."""
    rng = np.random.default_rng(seed)
    splits, subject_id = [], 0
    for split, size in SIZES.items():
        events, labels = [], []
        for _ in range(size):
            subject_id += 1
            splits.append({"subject_id": subject_id, "split": split})
            events += _history(rng, subject_id, risk=subject_id % 2, prefix=prefix)
            labels += [
                {"subject_id": subject_id, "prediction_time": events[at]["time"], "boolean_value": bool(subject_id % 2)}
                for at in (-5, -1)
            ]
        write_parquet(pa.Table.from_pylist(events, DATA_SCHEMA), raw / "data" / split / "0.parquet")
        table = pa.Table.from_pylist(labels, LABEL_SCHEMA).select(["subject_id", "prediction_time", "boolean_value"])
        write_parquet(table, raw / "labels" / "readmission" / split / "0.parquet")
    write_parquet(pa.Table.from_pylist(splits), raw / "metadata" / "subject_splits.parquet")
    write_text(json.dumps({"dataset_name": "small", "meds_version": "0.4.1"}), raw / "metadata" / "dataset.json")
    codes = {"code": [prefix + code for code in LABS], "description": LABS, "parent_codes": [[]] * len(LABS)}
    schema = pa.schema({"code": pa.string(), "description": pa.string(), "parent_codes": pa.list_(pa.string())})
    write_parquet(pa.table(codes, schema=schema), raw / "metadata" / "codes.parquet")
    return raw


def _history(rng: np.random.Generator, subject_id: int, risk: int, prefix: str) -> list[dict]:
    length = int(rng.integers(12, 40))
    times = START_US + np.cumsum(rng.integers(1, 10, length)) * US_PER_HOUR
    codes = rng.integers(0, len(LABS), length)
    values = rng.normal(size=length) + np.where(codes == 0, 1.0 * risk, 0)
    return [
        {"subject_id": subject_id, "time": int(time), "code": prefix + LABS[code], "numeric_value": float(value)}
        for time, code, value in zip(times, codes, values, strict=True)
    ]


def prepare_small(folder: Path) -> Path:
    """The dataset, prepared, at `folder`/data."""
    raw = write_meds(folder / "raw")
    prepare(PrepareConfig(source="meds", raw=str(raw), out=str(folder / "data"), workers=1))
    return folder / "data"


def a_history(length: int, seed: int = 0) -> History:
    """Irregular times with ties, one unknown code among the known, a third of the values missing."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=length).astype(np.float32)
    value[rng.random(length) < 1 / 3] = np.nan
    return History(
        subject_id=7,
        birth_time=STREAM_START_US - 50 * US_PER_YEAR,
        static_code=np.array([1], np.int32),
        static_value=np.array([0.3], np.float32),
        time=STREAM_START_US + np.cumsum(rng.integers(0, 4, length) * US_PER_HOUR),
        code=rng.integers(0, len(LABS) + 1, length).astype(np.int32),
        value=value,
    )
