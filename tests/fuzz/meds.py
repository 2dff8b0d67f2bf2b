"""MEDS datasets."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuzz.mutations import mutated_bytes, mutated_parquet
from fuzz.reader import SUBJECT, VALUE, Files, Reader, files_of, float32s, frame_of, microseconds, require
from hymate.data.histories import Histories
from hymate.data.meds import DATA_SCHEMA, SplitsConfig, is_code, iter_events, read_splits
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.sources.meds import MedsSource


class Meds(Reader):
    """A MEDS dataset into prepared histories. Invariants: no time decreases, every value is finite or absent, every
    subject is in one place, with its split."""

    name = "meds"

    def __init__(self, scratch: Path) -> None:
        raw = write_meds(scratch / "meds")
        self.files = files_of(raw)

    def mutate(self, rng: random.Random) -> Files:
        name = rng.choices(
            [
                "data/train/0.parquet",
                "metadata/subject_splits.parquet",
                "metadata/codes.parquet",
                "metadata/dataset.json",
            ],
            [85, 10, 3, 2],
        )[0]
        others = [data for other, data in self.files.items() if other != name]
        change = mutated_parquet if name.endswith(".parquet") else mutated_bytes
        return {name: change(rng, self.files[name], others)}

    def check(self, folder: Path, rng: random.Random, program: str) -> None:
        out = folder.with_name("out")
        shutil.rmtree(out, ignore_errors=True)
        shards = {"train/0": "train", "held_out/0": "held_out"}
        found: dict[int, list[tuple]] = {}
        if rng.random() < 0.06:
            with contextlib.redirect_stderr(io.StringIO()):
                prepare(PrepareConfig(source="meds", raw=str(folder), out=str(out), workers=1))
            histories = Histories.open(out)
            for position, history in enumerate(histories.read(np.arange(len(histories)))):
                code = [histories.codes[c] for c in [*history.static_code, *history.code]]
                value = float32s([*history.static_value.tolist(), *history.value.tolist()])
                time_us = [None] * len(history.static_code) + history.time.tolist()
                found[history.subject_id] = list(zip(time_us, code, value, strict=True))
                require(history.time.tolist() == sorted(history.time.tolist()), "times decrease")
                require(len(history) == histories.index.num_events_P[position], "the index is wrong")
            ids = histories.index.subject_id_P
            splits = {id: split for split in histories.splits for id in ids[histories.positions(split)].tolist()}
        else:
            source, codes = MedsSource(folder, SplitsConfig(), 0), {}
            require(source.fingerprint(), "no fingerprint")
            for shard in source.shards():
                source.write_shard(shard, out)
                for events in iter_events(out / "data" / f"{shard}.parquet", codes):
                    names, times = (
                        list(codes),
                        [None if t == np.iinfo(np.int64).min else t for t in events.time_R.tolist()],
                    )
                    values = float32s(events.value_R.tolist())
                    for subject, *row in zip(
                        events.subject_id_R.tolist(), times, events.code_R.tolist(), values, strict=True
                    ):
                        found.setdefault(subject, []).append((row[0], names[row[1]], row[2]))
            source.finish(out)
            table = read_splits(out)
            splits = dict(zip(table["subject_id"].to_pylist(), table["split"].to_pylist(), strict=True))
        expected: dict[int, list[tuple]] = {}
        frames = {shard: frame_of(folder / "data" / f"{shard}.parquet", program) for shard in shards}
        for frame in frames.values():
            columns = frame.to_dict(as_series=False)
            values = columns.get("numeric_value", [None] * len(frame))
            rows = zip(microseconds(columns["time"]), columns["code"], float32s(values), strict=True)
            for subject, row in zip(columns["subject_id"], rows, strict=True):
                expected.setdefault(subject, []).append(row)
        require(found.keys() == expected.keys(), "other subjects")
        for subject, rows in expected.items():
            static = [row for row in rows if row[0] is None]
            timed = [row for row in rows if row[0] is not None and not is_code(row[1], "MEDS_BIRTH")]
            births = [row for row in rows if row[0] is not None and is_code(row[1], "MEDS_BIRTH")]
            got = found[subject]
            require([row for row in got if row[0] is None] == static, "other static events")
            got = [row for row in got if row[0] is not None]
            require([row for row in got if not is_code(row[1], "MEDS_BIRTH")] == timed, "other events")
            require(len(births) >= len(got) - len(timed), "other births")
            times = [row[0] for row in rows if row[0] is not None]
            require(times == sorted(times), "times decrease")
            require(all(row[2] is None or math.isfinite(row[2]) for row in rows), "infinite values")
        known = frame_of(folder / "metadata" / "subject_splits.parquet", program)
        given = dict(zip(known["subject_id"].to_list(), known["split"].to_list(), strict=True))
        require(len(known) == len(given), "a subject with two splits")
        require(all(splits[subject] == given[subject] for subject in expected), "other splits")


def write_meds(raw: Path) -> Path:
    """A MEDS dataset of four subjects."""
    start = datetime.datetime(2020, 1, 1)
    for shard, subjects in {"train/0": range(3), "held_out/0": range(3, 4)}.items():
        rows: list[dict] = []
        for subject in subjects:
            rows.append({"subject_id": SUBJECT + subject, "time": None, "code": "GENDER//F"})
            rows.append({"subject_id": SUBJECT + subject, "time": start.replace(year=1950), "code": "MEDS_BIRTH"})
            rows += [
                {
                    "subject_id": SUBJECT + subject,
                    "time": start + datetime.timedelta(hours=n),
                    "code": ("HR", "K", "DX//I50")[n % 3],
                    "numeric_value": None if n % 3 == 2 else VALUE + n,
                }
                for n in range(6)
            ]
        path = raw / "data" / f"{shard}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, DATA_SCHEMA), path, compression="zstd", row_group_size=13)
    (raw / "metadata").mkdir()
    splits = {"subject_id": [SUBJECT + n for n in range(4)], "split": ["train", "train", "tuning", "held_out"]}
    pq.write_table(pa.table(splits), raw / "metadata" / "subject_splits.parquet")
    codes = pa.table(
        {"code": ["HR"], "description": ["Heart rate"], "parent_codes": pa.array([None], pa.list_(pa.string()))}
    )
    pq.write_table(codes, raw / "metadata" / "codes.parquet")
    (raw / "metadata" / "dataset.json").write_text(json.dumps({"meds_version": "0.4.1", "dataset_name": "fuzz"}))
    return raw
