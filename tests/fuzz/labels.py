"""Folders of MEDS labels."""

from __future__ import annotations

import datetime
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuzz.mutations import mutated_parquet
from fuzz.reader import SUBJECT, VALUE, Files, Reader, files_of, float32s, frame_of, microseconds, require
from hymate.config import TaskConfig
from hymate.data.label_files import EXTRA_SCHEMA, LABEL_SCHEMA, read_labels


class Labels(Reader):
    """A folder of MEDS labels, as `task.labels` takes it. Invariants: no label without a subject and a time, no
    boolean that was not one."""

    name = "labels"

    def __init__(self, scratch: Path) -> None:
        folder = scratch / "labels"
        folder.mkdir()
        for part in range(2):
            rows = [
                {
                    "subject_id": SUBJECT + part * 10 + n // 2,
                    "prediction_time": datetime.datetime(2020, 1, 1 + n),
                    "boolean_value": n % 2 == 0,
                    "float_value": VALUE + n,
                }
                for n in range(6)
            ]
            pq.write_table(
                pa.Table.from_pylist(rows, LABEL_SCHEMA), folder / f"{part}.parquet", write_page_checksum=bool(part)
            )
            keys = [{name: row[name] for name in ("subject_id", "prediction_time")} for row in rows]
            extra = [
                {**key, "start": datetime.datetime(2019, 1, 1) if n % 2 else None, "weight": 1.0 + n}
                for n, key in enumerate(keys)
            ]
            if part:
                pq.write_table(pa.Table.from_pylist(extra, EXTRA_SCHEMA), folder / f"{part}.extra.pq")
        self.files = files_of(folder)

    def mutate(self, rng: random.Random) -> Files:
        name = rng.choice(list(self.files))
        return {name: mutated_parquet(rng, self.files[name], list(self.files.values()))}

    def check(self, folder: Path, rng: random.Random, program: str) -> None:
        from hymate.data.tasks import read_or_extract_labels

        table = read_labels(folder)
        frames = [frame_of(path, program) for path in sorted(folder.glob("*.parquet"))]
        for name in LABEL_SCHEMA.names:
            expected: list[Any] = []
            for frame in frames:
                expected += frame[name].to_list() if name in frame.columns else [None] * len(frame)
            if name == "prediction_time":
                expected = microseconds(expected)
            elif name == "float_value":
                expected = float32s(expected)
            if name not in table.column_names:
                require(all(value is None for value in expected), f"{name} is lost")
                continue
            column = table[name].cast(pa.int64()) if name == "prediction_time" else table[name]
            found = float32s(column.to_pylist()) if name == "float_value" else column.to_pylist()
            require(found == expected, f"{name} differs")
            require(name != "boolean_value" or all(value in (True, False, None) for value in expected), "no boolean")
        require(None not in table["subject_id"].to_pylist() + table["prediction_time"].to_pylist(), "nulls")
        table = read_or_extract_labels(folder, TaskConfig("stay", labels=str(folder), longer_than_days=1.0)).table
        days = table["float_value"].to_pylist()
        require(all(value is None or 0 <= value < math.inf for value in days), "impossible days")
        if "weight" in table.column_names:
            require(all(0 < value < math.inf for value in table["weight"].to_pylist()), "impossible weights")
        if "start" in table.column_names:
            times = (table[name].cast(pa.int64()).to_pylist() for name in ("start", "prediction_time"))
            require(all(start is None or start <= time for start, time in zip(*times, strict=True)), "a late start")
