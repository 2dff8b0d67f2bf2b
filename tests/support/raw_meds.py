"""A MEDS dataset of a few rows, written, prepared and read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hymate.data.histories import Histories
from hymate.data.meds import DATA_SCHEMA
from hymate.data.prepare import PrepareConfig

Row = tuple[int, int | None, str, float | None]  # subject_id, time in microseconds, code, numeric_value
BIRTH = -(10**15)
ROWS: dict[str, list[Row]] = {
    "train/0": [
        (1, None, "GENDER//F", None),
        (1, BIRTH, "MEDS_BIRTH", None),
        (1, 10, "HR", 80.0),
        (1, 10, "K", 4.5),
        (1, 20, "HR", None),
        (2, 5, "HR", 90.0),
    ],
    "train/1": [(3, None, "Height", 170.0), (3, 7, "K", 4.0)],
    "tuning/0": [(4, 1, "HR", 85.0)],
    "held_out/0": [(5, 2, "Na", 140.0), (5, 3, "HR", 70.0)],
}


def data_table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(DATA_SCHEMA.names, row, strict=True)) for row in rows], DATA_SCHEMA)


def write_raw(raw: Path, rows: dict[str, list[Row]] = ROWS, with_splits: bool = True) -> Path:
    """A MEDS dataset whose splits are the first parts of the shards' names."""
    for shard, shard_rows in rows.items():
        write_table(data_table(shard_rows), raw / "data" / f"{shard}.parquet")
    splits = {row[0]: shard.split("/")[0] for shard, shard_rows in rows.items() for row in shard_rows}
    if with_splits:
        write_table(pa.table({"subject_id": list(splits), "split": list(splits.values())}), splits_file(raw))
    (raw / "metadata").mkdir(exist_ok=True, parents=True)
    (raw / "metadata" / "dataset.json").write_text(json.dumps({"meds_version": "0.4.1", "license": "CC0"}))
    return raw


def write_table(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def splits_file(raw: Path) -> Path:
    return raw / "metadata" / "subject_splits.parquet"


def config(raw: Path, out: Path, **changes: object) -> PrepareConfig:
    return PrepareConfig(**{"source": "meds", "raw": str(raw), "out": str(out), "workers": 1, **changes})  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_back(out: Path) -> dict[int, list[Row]]:
    """subject -> rows as in ROWS."""
    histories = Histories.open(out)
    found = {}
    for history in histories.read(np.arange(len(histories))):
        code = np.concatenate([history.static_code, history.code])
        value = np.concatenate([history.static_value, history.value])
        times = [None] * len(history.static_code) + history.time.tolist()
        found[history.subject_id] = [
            (history.subject_id, t, histories.codes[c], None if np.isnan(v) else float(v))
            for t, c, v in zip(times, code, value, strict=True)
        ]
    return found


def by_subject(rows: dict[str, list[Row]]) -> dict[int, list[Row]]:
    """subject -> its rows, without the births, which histories hold apart."""
    found: dict[int, list[Row]] = {}
    for row in (row for shard_rows in rows.values() for row in shard_rows):
        found.setdefault(row[0], [])
        if row[2] != "MEDS_BIRTH" or row[1] is None:
            found[row[0]].append(row)
    return found
