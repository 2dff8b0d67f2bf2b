"""MEDS 0.4 (Medical Event Data Standard): reading, checking and writing shards and splits.

A shard holds whole subjects, each contiguous and sorted by time; events without a time are static. Readers here
stream: what they hold does not grow with a shard.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from flexible_schema.exceptions import SchemaValidationError, TableValidationError  # type: ignore[import-untyped]

from hymate.errors import ConfigError, UserError
from hymate.storage.paths import Location, UrlPath, atomic_path, readable, write_text

DATA_SCHEMA: pa.Schema = meds.DataSchema.schema().remove(4)  # text_value is never used
MEDS_VERSION = "0.4"
SPLITS = (meds.train_split, meds.tuning_split, meds.held_out_split)
RENAME_SPLITS = (
    f"MEDS calls the splits {', '.join(SPLITS)}; rename them in metadata/subject_splits.parquet (validation is tuning, "
    "test is held_out)"
)
STATIC_TIME = np.iinfo(np.int64).min  # stands for a null time in integer arrays
ROWS = 1 << 18  # rows decoded at once, and rows of a written row group (about 4 MB)
MAX_ROWS_PER_BYTE = 64  # of a file; real data are far below, and a footer of a few bytes can declare any number of rows
Named = Location | str  # what errors name
UTC = ("UTC", "Etc/UTC", "+00:00", "Z")  # as Parquet files name it
US_PER_HOUR = 3_600_000_000
US_PER_DAY = 24 * US_PER_HOUR
US_PER_YEAR = 8766 * US_PER_HOUR  # of 365.25 days
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # what pyarrow raises at a damaged file
# Times that Python and ACES can hold, in microseconds since 1970; their differences fit an integer.
FIRST_TIME, LAST_TIME = (int(np.datetime64(f"{year:04d}-01-01", "us").astype(np.int64)) for year in (1, 10_000))


def is_code(code: str, standard: str) -> bool:
    """Whether a code is one of the standard's, such as meds.birth_code, which may have a suffix after `//`."""
    return code == standard or code.startswith(f"{standard}//")


class DataError(UserError):
    """The data a user handed in are wrong; one line that names the file and the remedy."""


class Source(Protocol):
    """Raw data that can be written as MEDS, shard by shard, in several processes (so it pickles)."""

    @property
    def name(self) -> str:
        """As in source=NAME."""

    def fingerprint(self) -> str:
        """A digest of everything the output depends on."""

    def shards(self) -> list[str]:
        """Names such as "train/0"; raises DataError where the raw data are visibly wrong."""

    def counts(self) -> dict[str, int]:
        """What reading the raw data left out or mended, in words, and how often."""

    def write_shard(self, shard: str, out: Location) -> None:
        """Write data/<shard>.parquet and labels/<task>/<shard>.parquet, atomically."""

    def finish(self, out: Location) -> None:
        """Write metadata/ (subject_splits.parquet, codes.parquet, dataset.json) once every shard is written."""


@dataclass(frozen=True)
class SplitsConfig:
    """Fractions of the subjects in each split; they add up to 1.

    train: what the model learns from.
    tuning: what chooses checkpoints, recalibrates and sets thresholds.
    held_out: what is scored once.
    by: "subject" draws subjects at random; "time" takes those who came first for training and the last ones to be held
        out, by the day of their first event, whatever splits the source brings. It needs real dates.
    """

    train: float = 0.8
    tuning: float = 0.1
    held_out: float = 0.1
    by: Literal["subject", "time"] = field(default="subject", repr=False)  # fingerprints of before have it not

    def __post_init__(self) -> None:
        fractions = (self.train, self.tuning, self.held_out)
        if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ConfigError(
                f"train, tuning and held_out must be fractions that add up to 1, got {', '.join(map(str, fractions))}: "
                "e.g. splits.train=0.8 splits.tuning=0.1 splits.held_out=0.1"
            )

    def assign(self, fraction_N: np.ndarray) -> np.ndarray:
        """Split names for numbers in [0, 1)."""
        bounds = np.cumsum([self.train, self.tuning])
        return np.array(SPLITS)[np.searchsorted(bounds, fraction_N, side="right")]


# ------------------------------------------------------------------------------------------------------ writing


def write_parquet(table: pa.Table, path: Location) -> None:
    """Write a table atomically (zstd), making its folder."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROWS, write_page_checksum=True)


def write_metadata(out: Location, dataset: Mapping[str, Any], splits: pa.Table, codes: pa.Table) -> None:
    """Write MEDS metadata/: dataset.json, subject_splits.parquet (subject_id, split) and codes.parquet."""
    write_parquet(meds.SubjectSplitSchema.align(splits), out / meds.subject_splits_filepath)
    write_parquet(meds.CodeMetadataSchema.align(codes), out / meds.code_metadata_filepath)
    dataset = {"meds_version": meds.__version__, **dataset}
    write_text(json.dumps(dataset, indent=1) + "\n", out / meds.dataset_metadata_filepath)


def codes_table(descriptions: Mapping[str, str | None]) -> pa.Table:
    """MEDS code metadata from code -> description."""
    return pa.table(
        {
            "code": pa.array(list(descriptions), pa.string()),
            "description": pa.array(list(descriptions.values()), pa.string()),
            "parent_codes": pa.nulls(len(descriptions), pa.list_(pa.string())),
        }
    )


# ------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Events:
    """Consecutive rows of a shard (R of them) that hold whole subjects.

    subject_id_R int64; time_R int64, microseconds since 1970, STATIC_TIME where null; code_R int32;
    value_R float32, NaN where none; first_row: row number in the shard of the first.
    """

    subject_id_R: np.ndarray
    time_R: np.ndarray
    code_R: np.ndarray
    value_R: np.ndarray
    first_row: int = field(kw_only=True)

    def __len__(self) -> int:
        return len(self.subject_id_R)

    @property
    def starts(self) -> np.ndarray:
        """Positions of the subjects' first rows."""
        changes_R = self.subject_id_R[1:] != self.subject_id_R[:-1]
        return np.flatnonzero(np.concatenate([[True], changes_R]))

    def slice(self, start: int, stop: int) -> Events:
        """Rows start:stop."""
        columns = (column_R[start:stop] for column_R in self._columns)
        return Events(*columns, first_row=self.first_row + start)

    def sorted(self) -> Events:
        """The rows by subject and time; of those at one time, the order stays."""
        order = np.lexsort((self.time_R, self.subject_id_R))
        return Events(*(column_R[order] for column_R in self._columns), first_row=self.first_row)

    def followed_by(self, other: Events) -> Events:
        """These rows and those."""
        columns = (np.concatenate(pair) for pair in zip(self._columns, other._columns, strict=True))
        return Events(*columns, first_row=self.first_row)

    @property
    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.subject_id_R, self.time_R, self.code_R, self.value_R


def iter_events(
    path: Location,
    code_ids: dict[str, int],
    named: Location | None = None,
    mapped: Callable[[pa.RecordBatch, Location, int], pa.RecordBatch] | None = None,
) -> Iterator[Events]:
    """A shard's rows in order, about ROWS at a time, never cutting a subject in two.

    code_ids: code -> the integer that stands for it; new codes are added with the next free number.
    named: the file that errors name, where it is not `path`.
    mapped: what becomes of rows first, such as `CodeMap.apply`.

    Raises DataError for an unreadable file, and as `decode` does.
    """
    carried: Events | None = None
    row = 0
    for batch in read_batches(path, DATA_SCHEMA.names, named or path):
        batch = mapped(batch, named or path, row) if mapped else batch
        part = decode(batch, code_ids, row, named or path)
        row += len(part)
        part = carried.followed_by(part) if carried is not None else part
        others = np.flatnonzero(part.subject_id_R != part.subject_id_R[-1])
        cut = int(others[-1]) + 1 if len(others) else 0
        if cut:
            yield part.slice(0, cut)
        carried = part.slice(cut, len(part))
    if carried is not None:
        yield carried


def open_parquet(path: Location, **options: Any) -> pq.ParquetFile:
    """A Parquet file, its pages' checksums verified where it has any.

    Raises one of UNREADABLE where it is none, or where its footer declares more rows than the file can hold.
    """
    source = readable(path)
    num_bytes = path.stat().st_size if isinstance(source, Path) else source.size()
    # at a URL one request brings a whole row group
    options = {"pre_buffer": isinstance(path, UrlPath), **options}
    file = pq.ParquetFile(source, page_checksum_verification=True, **options)
    # not the columns' sizes: PyArrow ends the process where a damaged footer contradicts itself about them
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    declared = max(file.metadata.num_rows, sum(group.num_rows for group in groups))
    if declared > (1 << 20) + MAX_ROWS_PER_BYTE * num_bytes:
        file.close()
        raise pa.ArrowInvalid(f"{declared} rows are more than its bytes can hold")
    _ = file.schema_arrow.names  # UnicodeDecodeError, here rather than wherever they are first looked at
    return file


def read_parquet(path: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole Parquet file, its columns as given. Raises as `open_parquet` does; KeyError where one is missing."""
    with open_parquet(path) as file:
        table = file.read() if columns is None else file.read(columns=list(columns)).select(columns)
    table.validate(full=True)
    return table


def read_whole(path: Location) -> pa.Table:
    """A whole Parquet file that a user handed in; raises DataError where it cannot be read."""
    try:
        return read_parquet(path)
    except UNREADABLE as error:
        raise unreadable_error(path) from error


def read_batches(path: Location, columns: Sequence[str], named: Location) -> Iterator[pa.RecordBatch]:
    """Columns of a shard, as far as it has them, in batches of ROWS; raises DataError that names the file `named`."""
    try:
        with open_parquet(path, read_dictionary=["code"], buffer_size=1 << 20, pre_buffer=False) as file:
            present = [c for c in columns if c in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=ROWS, columns=present, use_threads=False):
                batch.validate(full=True)  # PyArrow reads damaged pages into places in a dictionary that it hasn't
                if batch.num_rows:
                    yield batch
    except UNREADABLE as error:
        raise unreadable_error(named) from error


def unreadable_error(path: Location) -> DataError:
    """The error for a file whose reading raises UNREADABLE."""
    return DataError(f"{path}: not a readable Parquet file (truncated or damaged): fetch or write it again")


def decode(batch: pa.RecordBatch, code_ids: dict[str, int], first_row: int, named: Named) -> Events:
    """Rows in the types of DATA_SCHEMA as arrays, the first of which is row `first_row` of what errors call `named`.

    Raises DataError for null subjects or codes, times outside the years 1 to 9999 and infinite values.
    """
    for name in ("subject_id", "code"):
        if batch.column(name).null_count:
            row = first_row + int(pc.index(batch.column(name).is_null(), pa.scalar(True)).as_py())
            raise DataError(f"{named}: row {row}: {name} is null: drop such rows from the dataset")
    codes = batch.column("code")
    codes = codes if isinstance(codes, pa.DictionaryArray) else codes.dictionary_encode()
    ids = np.array([code_ids.setdefault(c, len(code_ids)) for c in codes.dictionary.to_pylist()], np.int32)
    time = batch.column("time").cast(pa.int64())
    odd = pc.index(pc.or_(pc.less(time, FIRST_TIME), pc.greater_equal(time, LAST_TIME)), pa.scalar(True)).as_py()
    if odd >= 0:
        raise DataError(f"{named}: row {first_row + odd}: time is outside the years 1 to 9999: mend it or drop the row")
    time_R = time.fill_null(STATIC_TIME).to_numpy()
    if "numeric_value" in batch.schema.names:
        value_R = batch.column("numeric_value").fill_null(np.nan).to_numpy()
    else:
        value_R = np.full(batch.num_rows, np.nan, np.float32)
    infinite = np.flatnonzero(np.isinf(value_R))
    if len(infinite):
        row = first_row + infinite[0]
        raise DataError(f"{named}: row {row}: numeric_value is infinite: write null where there is no number")
    return Events(
        batch.column("subject_id").to_numpy(), time_R, ids[codes.indices.to_numpy()], value_R, first_row=first_row
    )


def read_splits(root: Location) -> pa.Table:
    """The subjects' splits (subject_id int64, split string) of a MEDS folder.

    Raises DataError where the file is missing, malformed or names a subject twice.
    """
    path = root / meds.subject_splits_filepath
    table = read_small(path, meds.SubjectSplitSchema)
    ids = table["subject_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(np.diff(ids[order]) == 0)
    if len(twice):
        rows = sorted(int(r) for r in order[twice[0] : twice[0] + 2])
        raise DataError(f"{path}: rows {rows[0]} and {rows[1]} are the same subject: a subject has one split")
    return table


def read_small(path: Location, schema: Any) -> pa.Table:
    """A small MEDS file as its schema wants it; raises DataError where it is missing or malformed."""
    if not path.is_file():
        raise DataError(f"{path}: missing: a MEDS dataset has it")
    try:
        table = read_whole(path)
        check_columns(path, table.schema, TABLE_KINDS, schema.schema(), f"MEDS {MEDS_VERSION} has")
        return schema.align(table)
    except (SchemaValidationError, TableValidationError) as error:
        fault = str(error).encode("unicode_escape").decode()  # it quotes columns' names
        raise DataError(f"{path}: {fault[:300]}: write it as MEDS {MEDS_VERSION} has it") from error


# ------------------------------------------------------------------------------------------------------ columns


def check_events(schema: pa.Schema, path: Named) -> None:
    """Raises DataError where columns of MEDS data are missing, twice there, or of a kind that no cast can mend."""
    check_columns(path, schema, DATA_KINDS, DATA_SCHEMA, f"MEDS {MEDS_VERSION} has")
    missing = [name for name in ("subject_id", "time", "code") if name not in schema.names]
    if missing:
        raise DataError(f"{path}: column {', '.join(missing)} is missing: MEDS {MEDS_VERSION} has it")


def aligned_events(table: pa.Table | pa.RecordBatch, path: Named, first_row: int = 0) -> pa.Table:
    """MEDS data's columns, checked before with `check_events`, in the standard's types; as `cast_column` does."""
    columns = [
        cast_column(table.column(spec.name), spec, path, first_row)
        if spec.name in table.schema.names
        else pa.nulls(table.num_rows, spec.type)
        for spec in DATA_SCHEMA
    ]
    return pa.table(columns, schema=DATA_SCHEMA)


def check_columns(
    path: Named, schema: pa.Schema, kinds: Mapping[str, Callable[[pa.DataType], bool]], wanted: pa.Schema, says: str
) -> None:
    """Raises DataError where a column occurs twice, or one of `wanted` is not of the kind that a cast can mend."""
    for name, count in Counter(schema.names).items():
        if count > 1:
            raise DataError(f"{path}: column {name!r} occurs {count} times: write it once")
        if name in kinds and name in wanted.names and not kinds[name](schema.field(name).type):
            kind, found = wanted.field(name).type, schema.field(name).type
            zoned = pa.types.is_timestamp(found) and found.tz is not None
            remedy = "write the times of all files in one zone, without its name" if zoned else "write it as that"
            raise DataError(f"{path}: column {name} is {found}, {says} {kind}: {remedy}")


def cast_column(column: pa.Array, spec: pa.Field, path: Named, first_row: int = 0) -> pa.Array:
    """A column, whose first row is the file's `first_row`, in its type of the standard.

    Raises DataError that names the first row whose value the type cannot hold, such as 1e39 in a float32.
    """
    if (cast := _cast(column, spec.type)) is not None:
        return cast
    good, bad = 0, len(column)  # the rows before `good` can be cast, those before `bad` cannot
    while bad - good > 1:
        middle = (good + bad) // 2
        fits = _cast(column[good:middle], spec.type) is not None
        good, bad = (middle, bad) if fits else (good, middle)
    raise DataError(
        f"{path}: row {first_row + good}: {spec.name} does not fit {spec.type} or would lose digits: mend the value "
        "or drop the row"
    )


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """None where a value does not fit; PyArrow makes infinities of numbers that are too large for a float."""
    try:
        cast = column.cast(kind)
    except pa.ArrowInvalid:
        return None
    if pa.types.is_floating(kind) and pc.any(pc.is_inf(cast)).as_py():
        return None if pc.any(pc.and_(pc.is_inf(cast), pc.is_finite(column))).as_py() else cast
    return cast


def is_time(kind: pa.DataType) -> bool:
    """Whether a column holds times that can be taken as they stand: in UTC or without a zone.

    A cast would make those of another zone UTC, hours beside the times of files without one.
    """
    return pa.types.is_timestamp(kind) and kind.tz in (None, *UTC)


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)


DATA_KINDS = {
    "subject_id": pa.types.is_integer,
    "time": is_time,
    "code": is_text,
    "numeric_value": is_number,
}
TABLE_KINDS = {"subject_id": pa.types.is_integer, "split": is_text, "code": is_text}  # of splits and code metadata
