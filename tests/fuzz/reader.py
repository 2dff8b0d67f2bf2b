"""What every fuzzed reader has, and how other programs read the same files."""

from __future__ import annotations

import abc
import contextlib
import datetime
import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

Files = dict[str, bytes]

SUBJECT = 7_310_000_000_000  # the subjects' ids begin here, so that they can be found in a message
VALUE = 4096.8125  # and the values, exact in float32


class Finding(Exception):
    """A reader broke its contract."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Finding(what)


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


def files_of(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
