"""Bytes, tables and texts changed in ways that a broken disk, a wrong program or a hand might."""

from __future__ import annotations

import contextlib
import datetime
import io
import math
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
