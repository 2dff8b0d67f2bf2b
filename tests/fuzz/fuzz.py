"""Command: mutated inputs for every reader of files that others may have made.

    python tests/fuzz/fuzz.py [READER ...] --first 0 --count 1000 [--findings DIR]

An input is a pure function of the reader and its seed, so that a run is resumed with --first, and a finding repeated
with --first SEED --count 1. The inputs are read in a process with bounded memory, which a watchdog follows: whatever
ends it, keeps it busy for long or makes it need more memory is a finding. Of every input the reader must either

    refuse it: a UserError of one line that says where, and quotes neither a subject's id nor a value; or
    accept it: then what was read equals what another program reads of the same bytes (of Parquet: Polars, or PyArrow in
        one piece and without our checks where Polars can't or reads a contradictory footer otherwise, which is counted
        apart; of text, YAML and safetensors: a plain reading below), and the format's invariants hold, which each
        reader below names.

`tests/fuzz/corpus/READER/NAME/` holds the changed files of inputs that once were findings; test_fuzz.py replays them.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import datetime
import hashlib
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from challenge import STAY

from hymate.config import DataConfig, ModelConfig, TaskConfig
from hymate.data.extras import SCHEMA as EXTRA_SCHEMA
from hymate.data.histories import Histories, History
from hymate.data.meds import DATA_SCHEMA, LABEL_SCHEMA, SplitsConfig, is_code, iter_events, read_labels, read_splits
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.sources import physionet2012
from hymate.data.sources.meds import MedsSource
from hymate.data.sources.physionet2012 import PhysioNet2012Source
from hymate.data.statistics import NUM_KNOTS, VOCABULARY_SCHEMA
from hymate.data.vocabulary import Vocabulary
from hymate.errors import UserError

MEMORY_BYTES = 1 << 30  # more than the process had after its first input
PATIENCE_S, SLOW_S = 30.0, 5.0
SUBJECT = 7_310_000_000_000  # the subjects' ids begin here, so that they can be found in a message
VALUE = 4096.8125  # and the values, exact in float32
Files = dict[str, bytes]


GOOD = ("refused", "accepted", "accepted as PyArrow reads it")


class Finding(Exception):
    """A reader broke its contract."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Finding(what)


# ----------------------------------------------------------------------------------------------------- mutations

NUMBERS = [0, 1, -1, 2, 127, 128, 255, 2**15, 2**31 - 1, -(2**31), 2**32, 2**53 + 1, 2**62, 2**63 - 1, -(2**63)]
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38, 1e300, -1.0, 0.5, 2.0]
TEXTS = ["", " ", "\n", "\x00", "a\nb", "../../x", "/etc/passwd", "é" * 300, "null", "NaN", "1e999", "true", "\u2028"]


def mutated_bytes(rng: random.Random, data: bytes, others: list[bytes], tail: int = 0) -> bytes:
    """Some bits, bytes or pieces of `data` changed; half of the time in its last `tail` bytes."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        low = max(0, len(content) - tail) if tail and rng.random() < 0.5 else 0
        at = rng.randrange(low, len(content)) if len(content) > low else 0
        size = rng.choice((1, 2, 4, 8, 16, 64))
        kind = rng.randrange(9)
        if not content:
            break
        if kind <= 2:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            content[at : at + size] = rng.randbytes(size)
        elif kind == 4:
            del content[at : len(content) if rng.random() < 0.3 else at + size]
        elif kind == 5:
            content[at:at] = rng.randbytes(size)
        elif kind == 6:
            number = rng.choice(NUMBERS) & (2**64 - 1)
            width = rng.choice((1, 2, 4, 8))
            content[at : at + width] = (number % 256**width).to_bytes(width, "little")
        elif kind == 7:
            other = rng.choice([data, *others])
            start = rng.randrange(len(other) or 1)
            content[at : at + size] = other[start : start + size]
        else:
            start = rng.randrange(len(content))
            content[at:at] = content[start : start + size]
    return bytes(content)


def mutated_table(rng: random.Random, table: pa.Table) -> pa.Table:
    """Wrong types, nulls, odd numbers, another order, columns twice, missing or strange."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        with contextlib.suppress(pa.ArrowException, LookupError, OverflowError, ValueError, TypeError):
            table = changed_table(rng, table) if table.num_columns else table
    return table


def changed_table(rng: random.Random, table: pa.Table) -> pa.Table:
    at, kind = rng.randrange(table.num_columns), rng.randrange(12)
    name, column = table.column_names[at], table.column(at)
    if kind == 0:
        return table.remove_column(at)
    if kind == 1:
        return table.append_column(name, column)
    if kind == 2:
        return table.rename_columns([rng.choice([name, name.upper(), "x"]) for name in table.column_names])
    if kind == 3:
        kept = rng.sample(range(table.num_rows), rng.randint(0, table.num_rows))
        return table.take(pa.array(kept, pa.int64()))
    if kind == 4:
        return pa.concat_tables([table, table.slice(0, rng.randint(0, table.num_rows))])
    if kind == 5:
        return table.set_column(at, name, cast(rng, column))
    if kind == 6:
        return table.set_column(at, name, pa.nulls(table.num_rows, rng.choice([column.type, pa.null()])))
    if kind == 7:
        return table.append_column(rng.choice(["extra", "text_value"]), pa.array([[1]] * table.num_rows))
    if kind == 8:
        return table.select(rng.sample(range(table.num_columns), table.num_columns))
    values = column.to_pylist()
    for _ in range(rng.choice((1, 1, 3))):
        values[rng.randrange(len(values))] = odd_value(rng, values)
    return table.set_column(at, name, pa.array(values, column.type))


def odd_value(rng: random.Random, values: list[Any]) -> Any:
    known = next((value for value in values if value is not None), None)
    if rng.random() < 0.3:
        return None
    if rng.random() < 0.3:
        return rng.choice(values)
    if isinstance(known, list):
        return rng.choice([[], known * 2, [None], known[:-1], known[::-1], [rng.choice(NUMBERS)], [rng.choice(FLOATS)]])
    if isinstance(known, str):
        return rng.choice(TEXTS)
    if isinstance(known, float):
        return rng.choice(FLOATS)
    if isinstance(known, datetime.datetime):
        return rng.choice([datetime.datetime.min, datetime.datetime.max, *NUMBERS])
    return rng.choice(NUMBERS)


def cast(rng: random.Random, column: pa.ChunkedArray) -> pa.ChunkedArray:
    kinds = [pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float64(), pa.float16(), pa.float32(), pa.string()]
    kinds += [pa.large_string(), pa.binary(), pa.bool_(), pa.dictionary(pa.int32(), pa.string()), pa.decimal128(38, 3)]
    kinds += [pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.date32(), pa.list_(pa.int64())]
    kinds += [pa.string_view(), pa.list_(pa.float64()), pa.large_list(pa.int32()), pa.duration("us")]
    try:
        return column.cast(rng.choice(kinds), safe=rng.random() < 0.5)
    except pa.ArrowException:
        return column


def written(rng: random.Random, table: pa.Table, pristine: bytes) -> bytes:
    """The table as a Parquet file, in one of the many ways to write it."""
    sink = io.BytesIO()
    try:
        pq.write_table(
            table,
            sink,
            compression=rng.choice(["zstd", "snappy", "none", "gzip"]),
            use_dictionary=rng.random() < 0.5,
            data_page_version=rng.choice(["1.0", "2.0"]),
            version=rng.choice(["1.0", "2.4", "2.6"]),
            row_group_size=rng.choice([None, 1, 1, 1, 2]),  # 1 as the prepared shard has it
            store_schema=rng.random() < 0.7,
            write_page_checksum=rng.random() < 0.3,
        )
    except (pa.ArrowException, OverflowError):
        return pristine
    return sink.getvalue()


def mutated_parquet(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    if rng.random() < 0.5:
        return mutated_bytes(rng, data, others, tail=1500)
    changed = written(rng, mutated_table(rng, pq.read_table(io.BytesIO(data))), data)
    return mutated_bytes(rng, changed, others, tail=1500) if rng.random() < 0.2 else changed


def mutated_text(rng: random.Random, data: bytes) -> bytes:
    """Lines and fields of a text changed, in a way that a wrong program or hand might."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data, [])
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind == 0:
            lines.insert(at, rng.choice(lines))
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3:
            lines[at] += rng.choice([b"\r", b" ", b"\x00", b",", b"\x0b", b"\xe2\x80\xa8", b"\xff", b"\x85"])
        else:
            separator = rng.choice([b",", b": "]) if b": " in lines[at] else b","
            fields = lines[at].split(separator)
            fields[rng.randrange(len(fields))] = rng.choice(FIELDS)
            lines[at] = separator.join(fields)
    return rng.choice([b"\n", b"\n", b"\n", b"\r\n", b"\r"]).join(lines)


FIELDS = [
    b"",
    b"-1",
    b"0",
    b"1e3",
    b"1e999",
    b"nan",
    b"inf",
    b"0x10",
    b"7_3",
    b" 73",
    b"73 ",
    b"+5",
    b"5.",
    b".5",
    b"-0",
]
FIELDS += [
    b"00:00",
    b"48:00",
    b"99:59",
    b"24:60",
    b"1:00",
    "１".encode(),
    b'"HR"',
    b'"',
    b"HR",
    b"Weight",
    b"RecordID",
    b"Age",
]
FIELDS += [
    b"9" * 30,
    b"9" * 5000,
    b"1;2",
    b"true",
    b"\xff\xfe",
    b"1,2",
    b"Gender",
    b"2.5",
    b"0.1e-400",
    b"1d5",
    b"&a [*a]",
]
FIELDS += [
    b"!!python/object/apply:os.getcwd []",
    b"[[[",
    b"0x" + b"f" * 6000,
    b"2020-01-01",
    b"~",
    b"{}",
    b".nan",
    b"MAMA",
]


# ------------------------------------------------------------------------------------------------- other readings


def frame_of(path: Path, program: str) -> pl.DataFrame:
    """A Parquet file as another program reads it in one piece."""
    if program == "polars":
        return pl.read_parquet(path, hive_partitioning=False)
    columns: dict[str, list[Any]] = {}
    with pq.ParquetFile(path) as file:
        for group, name in itertools.product(range(file.num_row_groups), dict.fromkeys(file.schema_arrow.names)):
            values = [None] * file.metadata.row_group(group).num_rows  # a reader need not look at all of them
            with contextlib.suppress(pa.ArrowException, OSError, KeyError):
                values = file.read_row_group(group, columns=[name], use_threads=False)[name].to_pylist()
            columns[name] = columns.get(name, []) + values
    return pl.from_dict({name: pl.Series(values) for name, values in columns.items()})


def microseconds(values: list[Any]) -> list[int | None]:
    origin, us = datetime.datetime(1970, 1, 1), datetime.timedelta(microseconds=1)
    return [None if v is None else (v.replace(tzinfo=None) - origin) // us for v in map(as_datetime, values)]


def as_datetime(value: Any) -> Any:
    is_date = isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)
    return datetime.datetime.combine(value, datetime.time()) if is_date else value


def float32s(values: list[Any]) -> list[float | None]:
    """As float32, None for NaN."""
    floats = [None if value is None else float(np.float32(value)) for value in values]
    return [None if value is None or math.isnan(value) else value for value in floats]


# -------------------------------------------------------------------------------------------------------- readers


class Reader(abc.ABC):
    """files: a sound input. check reads a mutated one at `folder`: UserError where it is refused."""

    name: str
    files: Files

    @abc.abstractmethod
    def mutate(self, rng: random.Random) -> Files:
        """The changed files."""

    @abc.abstractmethod
    def check(self, folder: Path, rng: random.Random, program: str) -> None:
        """Raises Finding where what was read is not what the files say."""


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
                require(len(history) == histories.index["num_events"][position], "the index is wrong")
            splits = dict(zip(histories.index["subject_id"].tolist(), histories.index["split"].tolist(), strict=True))
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


class Challenge(Reader):
    """The challenge's text, from a folder and from an archive. Invariants: each stay once, with its outcome."""

    name = "challenge"

    def __init__(self, scratch: Path) -> None:
        self.files = {}
        for letter, first in (("a", 731001), ("b", 731101)):
            records = range(first, first + 3)
            for record in records:
                self.files[f"set-{letter}/{record}.txt"] = STAY.format(record=record).encode()
            rows = "".join(f"{record},6,1,{record % 9},-1,{record % 2}\n" for record in records)
            self.files[f"Outcomes-{letter}.txt"] = (physionet2012._OUTCOMES_HEADER + "\n" + rows).encode()
        stays = {name: self.files.pop(name) for name in list(self.files) if name.startswith("set-b/")}
        self.tar = tar_of([(name, data, {}) for name, data in stays.items()])
        self.members = list(stays.items())
        self.files["set-b.tar.xz"] = lzma.compress(self.tar, preset=0)

    def mutate(self, rng: random.Random) -> Files:
        kind = rng.random()
        texts = [name for name in self.files if name.startswith("set-a/")]
        if kind < 0.6:
            name = rng.choice(texts)
            return {name: mutated_text(rng, self.files[name])}
        if kind < 0.75:
            name = rng.choice(["Outcomes-a.txt", "Outcomes-b.txt"])
            return {name: mutated_text(rng, self.files[name])}
        if kind < 0.78:
            name = rng.choice(
                ["set-a/0731001.txt", "set-a/x.txt", "set-a/9999999999999999999.txt", "Outcomes-b.txt.txt"]
            )
            return {name: self.files[rng.choice(texts)]}
        if kind < 0.83:
            return {"set-b.tar.xz": mutated_bytes(rng, self.files["set-b.tar.xz"], [])}
        if kind < 0.92:
            tar = mutated_bytes(rng, self.tar, [])
        else:
            members: list[tuple[str, bytes, dict[str, Any]]] = [(name, data, {}) for name, data in self.members]
            name, data = rng.choice(self.members)
            settings = {"type": rng.choice([b"0", b"1", b"2", b"5", b"6", b"S", b"L", b"x"])}
            settings |= rng.choice([{}, {"linkname": "/etc/passwd"}, {"linkname": self.members[0][0]}, {"mode": 0}])
            name = rng.choice([name, f"../{name}", f"/tmp/{name}", f"set-b/sub/{name[6:]}", "set-b/notes.md"])
            members.insert(rng.randrange(len(members) + 1), (name, mutated_text(rng, data), settings))
            tar = tar_of(members)
        return {"set-b.tar.xz": lzma.compress(tar, preset=0)}

    def check(self, folder: Path, rng: random.Random, program: str) -> None:
        out = folder.with_name("out")
        shutil.rmtree(out, ignore_errors=True)
        source = PhysioNet2012Source(folder, SplitsConfig(1, 0, 0), 0)
        require(source.fingerprint(), "no fingerprint")
        found: dict[int, list[tuple]] = {}
        for shard in source.shards():
            source.write_shard(shard, out)
            for subject, *row in frame_of(out / "data" / f"{shard}.parquet", program).iter_rows():
                found.setdefault(subject, []).append(tuple(row))
        source.finish(out)
        texts = [(path.stem, path.read_bytes()) for path in (folder / "set-a").glob("*.txt")]
        with tarfile.open(folder / "set-b.tar.xz") as archive:
            members = [member for member in archive.getmembers() if member.isreg() and member.name.endswith(".txt")]
            texts += [(Path(member.name).stem, archive.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
        require(sorted(found) == sorted(int(stem) for stem, _ in texts), "other stays")
        for stem, text in texts:
            require(found[int(stem)] == plain_stay(text), "other events")
        died = frame_of(out / "labels" / "mortality" / f"{source.shards()[0]}.parquet", program)
        labels = dict(zip(died["subject_id"].to_list(), died["boolean_value"].to_list(), strict=True))
        outcomes = b"\n".join(folder.joinpath(f"Outcomes-{letter}.txt").read_bytes() for letter in "ab").decode()
        rows = [
            line.strip().split(",")
            for line in re.split("[\r\n]+", outcomes)
            if line.strip() and not line.startswith("Record")
        ]
        require(labels == {int(row[0]): row[5] == "1" for row in rows}, "other outcomes")


def plain_stay(text: bytes) -> list[tuple]:
    """(time, code, value) of a stay's events, line by line."""
    lines = [line.rstrip("\r") for line in text.decode().split("\n")]
    require(lines[0] == "Time,Parameter,Value", "no header")
    units = {code.split("//")[0]: code for code in list(physionet2012.CODES)[:37]}
    static: list[tuple] = []
    timed: list[tuple] = [(physionet2012.ORIGIN, physionet2012.ADMISSION, None)]
    seen = set()
    for line in lines[1:-1] if not lines[-1] else lines[1:]:
        clock, parameter, value_text = line.split(",")
        require(re.fullmatch("[0-9][0-9]:[0-5][0-9]", clock), "an odd time")
        minutes, value = int(clock[:2]) * 60 + int(clock[3:]), float(np.float32(float(value_text)))
        if minutes == 0 and parameter in physionet2012.DESCRIPTORS and parameter not in seen:
            seen.add(parameter)
            coded = {
                "Gender": {0.0: "GENDER//F", 1.0: "GENDER//M"},
                "ICUType": {k: f"ICUType//{k:.0f}" for k in range(1, 5)},
            }
            if parameter in coded:
                require(value == -1 or value in coded[parameter], "an odd category")
                static += [(None, coded[parameter][value], None)] if value in coded[parameter] else []
            elif parameter != "RecordID" and value != -1:
                static.append((None, parameter, value))
        elif parameter in units and value != -1:
            timed.append((physionet2012.ORIGIN + datetime.timedelta(minutes=minutes), units[parameter], value))
    return static + sorted(timed, key=lambda event: event[0])


def tar_of(members: list[tuple[str, bytes, dict[str, Any]]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data, settings in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in settings.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


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
        from hymate.data.tasks import labels

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
        table = labels(folder, TaskConfig("stay", labels=str(folder), longer_than_days=1.0)).table
        days = table["float_value"].to_pylist()
        require(all(value is None or 0 <= value < math.inf for value in days), "impossible days")
        if "weight" in table.column_names:
            require(all(0 < value < math.inf for value in table["weight"].to_pylist()), "impossible weights")
        if "start" in table.column_names:
            times = (table[name].cast(pa.int64()).to_pylist() for name in ("start", "prediction_time"))
            require(all(start is None or start <= time for start, time in zip(*times, strict=True)), "a late start")


class Prepared(Reader):
    """A prepared dataset. Invariants: each subject of the index has its history, of as many events as the index says,
    with codes of the vocabulary, times that never decrease and finite values; nothing outside the folder is read."""

    name = "histories"

    def __init__(self, scratch: Path) -> None:
        raw = write_meds(scratch / "meds-for-histories")
        with contextlib.redirect_stderr(io.StringIO()):
            prepare(PrepareConfig(source="meds", raw=str(raw), out=str(scratch / "prepared"), workers=1))
        self.files = {
            name: data for name, data in files_of(scratch / "prepared").items() if name.startswith("histories/")
        }

    def mutate(self, rng: random.Random) -> Files:
        shard, index, vocabulary = (f"histories/{name}.parquet" for name in ("train/0", "index", "vocabulary"))
        name = rng.choices([shard, index, vocabulary, "histories/metadata.json"], [50, 22, 22, 6])[0]
        if name.endswith(".json"):
            return {name: mutated_text(rng, self.files[name])}
        return {name: mutated_parquet(rng, self.files[name], list(self.files.values()))}

    def check(self, folder: Path, rng: random.Random, program: str) -> None:
        histories = Histories.open(folder)
        read = histories.read(rng.sample(range(len(histories)), len(histories)))
        vocabulary = Vocabulary.read(folder / "histories" / "vocabulary.parquet")
        frame = frame_of(folder / "histories" / "vocabulary.parquet", program)
        require(histories.codes == frame["code"].to_list(), "other codes")
        check_vocabulary(vocabulary, frame)
        index = frame_of(folder / "histories" / "index.parquet", program)
        by_id = {history.subject_id: history for history in read}
        require(sorted(by_id) == sorted(index["subject_id"].to_list()), "other subjects")
        shards = {name: frame_of(folder / "histories" / f"{name}.parquet", program) for name in index["shard"].unique()}
        for entry in index.iter_rows(named=True):
            history, shard = by_id[entry["subject_id"]], shards[entry["shard"]]
            rows = shard.filter(pl.col("subject_id") == entry["subject_id"]).to_dicts()
            require(any(is_history(history, row) for row in rows), "no such history")
            require(len(history) == entry["num_events"], "another number of events")
            require(history.time.tolist() == sorted(history.time.tolist()), "times decrease")
            codes = [*history.code.tolist(), *history.static_code.tolist()]
            require(all(0 <= code < len(histories.codes) for code in codes), "codes outside the vocabulary")
            require(not np.isinf([*history.value, *history.static_value]).any(), "infinite values")


def is_history(history: History, row: dict[str, Any]) -> bool:
    def same(name: str) -> bool:
        found, expected = getattr(history, name).tolist(), row[name]
        return float32s(found) == float32s(expected) if "value" in name else found == expected

    lists = ("time", "code", "value", "static_code", "static_value")
    return history.birth_time == row["birth_time"] and all(same(name) for name in lists)


def check_vocabulary(vocabulary: Vocabulary, frame: pl.DataFrame) -> None:
    """Whether a vocabulary is that of a file, and can normalise values."""
    rows = sorted((row for row in frame.to_dicts() if row["count"] >= 1), key=lambda row: (-row["count"], row["code"]))
    require(vocabulary.codes == [row["code"] for row in rows], "other codes in the vocabulary")
    require(vocabulary.count_V[2:].tolist() == [row["count"] for row in rows], "other counts")
    require(len(set(vocabulary.codes)) == len(vocabulary.codes), "a code twice")
    knots_VQ = vocabulary.quantiles_VQ[2:]
    for row, knots_Q in zip(rows, knots_VQ, strict=True):
        expected = row["quantiles"] or [math.nan] * NUM_KNOTS
        require(np.array_equal(knots_Q, np.array(expected, np.float32), equal_nan=True), "other quantiles")
        require(bool(row["quantiles"]) == (row["value_count"] > 0), "quantiles without values")
    require((vocabulary.scale_V > 0).all() and not np.isnan(vocabulary.median_V).any(), "an impossible scale")


class Bundles(Reader):
    """A bundle into a model. Invariants: the settings are those of config.yaml, the weights and the vocabulary those of
    their files, all finite, and the model computes."""

    name = "bundle"

    def __init__(self, scratch: Path) -> None:
        import torch

        from hymate.inference.bundle import write_bundle
        from hymate.model.encoder import RiskModel

        torch.set_num_threads(1)
        torch.manual_seed(0)
        quantiles = np.linspace(0, 1, NUM_KNOTS, dtype=np.float32).tolist()
        row = {
            "id": 0,
            "count": 9,
            "subjects": 3,
            "value_count": 5,
            "median": 0.5,
            "scale": 2.0,
            "quantiles": quantiles,
        }
        codes = [{**row, "code": f"LAB//{n}", "id": n, "count": 9 - n} for n in range(4)]
        codes[3] |= {"value_count": 0, "quantiles": []}
        vocabulary = Vocabulary(pa.Table.from_pylist(codes, VOCABULARY_SCHEMA))
        model = ModelConfig(d_model=8, layers="MA", d_state=8, headdim=8, num_heads=2, num_queries=2, dropout=0.0)
        write_bundle(
            scratch / "bundle",
            RiskModel(model, vocabulary.size, ["stay"], ["stay"]).state_dict(),
            kind="risk",
            model=model,
            data=DataConfig("", context=64, tokens_per_row=128, min_count=1),
            vocabulary=vocabulary,
            tasks=["stay"],
            in_days=["stay"],
            extra={"auroc": 0.8},
        )
        self.files = files_of(scratch / "bundle")

    def mutate(self, rng: random.Random) -> Files:
        name = rng.choices(["config.yaml", "model.safetensors", "vocabulary.parquet"], [45, 30, 25])[0]
        data = self.files[name]
        if name == "config.yaml":
            return {name: mutated_text(rng, data) if rng.random() < 0.5 else mutated_tree(rng, data)}
        if name == "vocabulary.parquet":
            data = mutated_parquet(rng, data, list(self.files.values()))
        else:
            data = mutated_weights(rng, data)
        if rng.random() < 0.1:
            return {name: data}
        tree = yaml.load(
            self.files["config.yaml"], yaml.CSafeLoader
        )  # whoever means harm writes a checksum that agrees
        tree["sha256"][name] = hashlib.sha256(data).hexdigest()
        return {name: data, "config.yaml": yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False).encode()}

    def check(self, folder: Path, rng: random.Random, program: str) -> None:
        import torch
        from rows import random_row

        from hymate import ops
        from hymate.inference.bundle import build_model, read_bundle

        bundle = read_bundle(folder)
        tree = yaml.load((folder / "config.yaml").read_text(), yaml.CSafeLoader)
        for section, config in (("model", bundle.model), ("data", bundle.data)):
            for key, value in tree[section].items():
                require(key == "path" or getattr(config, key) == value, f"{section}.{key} is another")
        require(bundle.tasks == tree["tasks"] and bundle.kind == tree["kind"], "other tasks")
        header_size = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        content = (folder / "model.safetensors").read_bytes()
        header, body = json.loads(content[8 : 8 + header_size]), content[8 + header_size :]
        header.pop("__metadata__", None)
        require(bundle.state.keys() == header.keys(), "other weights")
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            expected = np.frombuffer(body[start:stop], np.float32).reshape(entry["shape"])
            require(np.array_equal(bundle.state[name].numpy(), expected), "other numbers")
        check_vocabulary(bundle.vocabulary, frame_of(folder / "vocabulary.parquet", program))
        if bundle.kind != "risk":
            return
        model = build_model(bundle)
        if rng.random() < 0.1:
            with torch.no_grad(), ops.forced("reference"):
                said = model(random_row((3, 2), vocab_size=bundle.vocabulary.size))
            require(said["logit_ST"].shape == (2, len(bundle.tasks)), "another shape")


def mutated_tree(rng: random.Random, data: bytes) -> bytes:
    """A YAML file with a value changed."""
    tree = yaml.load(data, yaml.CSafeLoader)
    place, key = tree, rng.choice(list(tree))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place))
    odd = [*NUMBERS, *FLOATS, *TEXTS, None, True, [], {}, [[]], {"a": 1}, b"\xff", datetime.date(2020, 1, 1)]
    value = place[key]
    if rng.random() < 0.15:
        place[rng.choice(TEXTS)] = value
    elif rng.random() < 0.15:
        del place[key]
    elif isinstance(value, int) and rng.random() < 0.5:
        place[key] = value * rng.choice([2, 3, -1, 1000, 10**6, 10**9, 10**30])
    elif isinstance(value, str) and value and rng.random() < 0.5:
        place[key] = value * rng.choice([2, 1000, 20000])
    elif isinstance(value, list) and rng.random() < 0.6:
        place[key] = rng.choice([value * 2, [*value, *TEXTS], [f"t{n}" for n in range(2000)], [1], [None], ["a.b"]])
    else:
        place[key] = rng.choice(odd)
    return yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False).encode()


def mutated_weights(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with its bytes, or an entry of its header, changed."""
    if rng.random() < 0.35:
        return mutated_bytes(rng, data, [])
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice(list(header))
    entry = header[name]
    kind = rng.randrange(6)
    if kind == 0:
        header[rng.choice(["x", "heads.stay.0.weight", "backbone", *TEXTS])] = header.pop(name)
    elif kind == 1 and "dtype" in entry:
        entry["dtype"] = rng.choice(["F16", "BF16", "I32", "U8", "F64", "BOOL", "F8_E4M3", "F32", "C64", "X", 5])
    elif kind == 2 and "shape" in entry:
        entry["shape"] = rng.choice(
            [[], [0], [2**31], [2**62, 4], [-1], entry["shape"][::-1], [*entry["shape"], 1], ["a"]]
        )
    elif kind == 3 and "data_offsets" in entry:
        entry["data_offsets"] = [rng.choice([*NUMBERS, offset, offset + 4]) for offset in entry["data_offsets"]]
    elif kind == 4:
        header["__metadata__"] = rng.choice([{}, {"format": "tf"}, {"a": 1}, [], "x", {"a": "b" * 1000}])
    else:
        at = rng.randrange(0, len(body) - 4, 4)
        with np.errstate(over="ignore"):
            number = np.float32(rng.choice(FLOATS)).tobytes()
        body = body[:at] + number + body[at + 4 :]
    text = json.dumps(header).encode()
    size = rng.choice([len(text)] * 8 + [0, 2**40, 2**63, len(text) + 1])
    return size.to_bytes(8, "little") + text + body


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


def files_of(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


READERS: dict[str, Callable[[Path], Reader]] = {
    reader.name: reader for reader in (Meds, Challenge, Labels, Prepared, Bundles)
}


# ------------------------------------------------------------------------------------------------------- one input


class Bench:
    """A reader and a folder in which its inputs are laid out one after the other."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.reader = READERS[name](scratch)
        self.folder = scratch / "input"
        for file, data in self.reader.files.items():
            self._write(file, data)
        require(self.run({}) == "accepted", "a sound input is refused")

    def _write(self, file: str, data: bytes) -> None:
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / file).write_bytes(data)

    def inputs(self, seed: int) -> Files:
        """The changed files of an input."""
        return self.reader.mutate(self._rng(seed))

    def _rng(self, seed: int) -> random.Random:
        return random.Random(f"{self.reader.name} {seed}")

    def run(self, changed: Files, seed: int = 0) -> str:
        """One of GOOD. Raises Finding, or whatever else the reader let through."""
        for file, data in changed.items():
            self._write(file, data)
        try:
            try:
                self.reader.check(self.folder, self._rng(seed), "polars")
                return "accepted"
            except (UserError, KeyboardInterrupt):
                raise
            except BaseException:  # a panic of Polars is no Exception
                self.reader.check(self.folder, self._rng(seed), "pyarrow")
                return "accepted as PyArrow reads it"
        except UserError as error:
            require_one_clear_line(str(error))
            return "refused"
        finally:
            for file in changed:
                (self.folder / file).unlink()
                if file in self.reader.files:
                    self._write(file, self.reader.files[file])


def require_one_clear_line(text: str) -> None:
    require(text and "\n" not in text and "\r" not in text, "an error of several lines")
    require(len(text) < 1000, "a very long error")
    require(text.isprintable(), "an error with control characters")
    require(str(SUBJECT)[:4] not in re.sub(r"\S*/\S*", "", text), "an error that quotes a subject's id")
    require(str(VALUE)[:4] not in text, "an error that quotes a value")


@contextlib.contextmanager
def bench(name: str) -> Iterator[Bench]:
    memory = Path("/dev/shm")  # files of a moment; preparing waits for the disk a dozen times
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as scratch:
        yield Bench(name, Path(scratch))


# --------------------------------------------------------------------------------------------------------- command


def work(name: str, first: int, stop: int, out: Connection) -> None:
    """Runs inputs first:stop in this process; tells `out` of each before it starts and after it ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Polars tells of each file that it cannot read
    pa.set_cpu_count(1)
    with bench(name) as made:
        for seed in range(first, stop):
            out.send(("started", seed, ""))
            started = time.monotonic()
            try:
                result, detail = made.run(made.inputs(seed), seed), ""
            except MemoryError as error:
                result, detail = "memory", describe(error)
            except Exception as error:
                result, detail = "error", describe(error)
            if time.monotonic() - started > SLOW_S:
                result, detail = "slow", f"{time.monotonic() - started:.0f} s"
            out.send((result, seed, detail))
            if seed == first:  # what the libraries take for themselves is there by now
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
        out.send(("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""))


def describe(error: Exception) -> str:
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:200]!r} at {' '.join(frames[-4:])}"


def fuzz(name: str, first: int, count: int, findings: Path | None, seconds: float) -> Counter[str]:
    """Inputs first:first+count of a reader, as many as fit into `seconds`; the number of each outcome."""
    outcomes: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    seed, stop, peak, began = first, first + count, 0, math.inf
    while seed < stop and time.monotonic() - began < seconds:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(name, seed, stop, sender))
        process.start()
        sender.close()
        running = False
        while True:
            try:
                if not receiver.poll(PATIENCE_S + 60 * (not running)):
                    result, detail = "hang", f"no answer in {PATIENCE_S:.0f} s"
                else:
                    result, number, detail = receiver.recv()
                    if result == "peak":
                        peak = max(peak, number)
                        break
                    running, seed = result == "started", number
                    if running:
                        began = min(began, time.monotonic())  # not the imports
                        continue
            except EOFError:
                process.join()
                result, detail = "crash", f"exit code {process.exitcode}"
            outcomes[result] += 1
            if result not in GOOD:
                print(f"{name} {seed}: {result}: {detail}", flush=True)
                if findings is not None:
                    keep(name, seed, findings)
            seed += 1
            if result in ("hang", "crash", "memory") or time.monotonic() - began >= seconds:
                break
        process.kill()
        process.join()
    told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    took = time.monotonic() - began
    print(
        f"{name}: seeds {first} to {seed - 1}: {outcomes.total()} inputs: {told}; {took:.0f} s, {peak >> 10} MiB",
        flush=True,
    )
    return outcomes


def keep(name: str, seed: int, findings: Path) -> None:
    """The changed files of an input, for tests/fuzz/corpus."""
    with bench(name) as made:
        for file, data in made.inputs(seed).items():
            target = findings / name / str(seed) / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; all by default")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=1000, help="inputs a reader")
    parser.add_argument("--seconds", type=float, default=math.inf, help="most seconds a reader")
    parser.add_argument("--findings", type=Path, help="folder for the inputs that were findings")
    given = parser.parse_args()
    outcomes: Counter[str] = Counter()
    for name in given.readers or READERS:
        outcomes += fuzz(name, given.first, given.count, given.findings, given.seconds)
    sys.exit(1 if outcomes.keys() - set(GOOD) else 0)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main()
