"""Prepared histories: one record for each subject in sharded Parquet, read by row group.

Shape legend: R events of a shard's chunk, N subjects, L events of one subject, F its static events.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hymate.data.index import INDEX_SCHEMA, Index, open_index
from hymate.data.known import NEVER, KnownConfig, KnownTimes
from hymate.data.mapped import New, argsort, find, mapped, numbered
from hymate.data.meds import (
    RENAME_SPLITS,
    SPLITS,
    STATIC_TIME,
    UNREADABLE,
    US_PER_YEAR,
    Events,
    is_code,
    iter_events,
    open_parquet,
    read_parquet,
    read_splits,
)
from hymate.errors import ConfigError, UserError
from hymate.storage.paths import Location, atomic_path, locate
from hymate.trees import build

FORMAT_VERSION = 1
FOLDER = "histories"
WORK = ".work"  # inside it, while a dataset is prepared: the journal and what later stages need
HISTORY_SCHEMA = pa.schema(
    [
        ("subject_id", pa.int64()),
        ("birth_time", pa.int64()),
        ("static_code", pa.list_(pa.int32())),
        ("static_value", pa.list_(pa.float32())),
        ("time", pa.list_(pa.int64())),
        ("code", pa.list_(pa.int32())),
        ("value", pa.list_(pa.float32())),
    ],
    metadata={"hymate.format_version": str(FORMAT_VERSION), "time_unit": "us"},
)
# Times rise in small steps, so differences beat a dictionary in size and in speed.
_ENCODING = {
    "compression": "zstd",
    "use_dictionary": [f"{name}.list.element" for name in ("static_code", "static_value", "code", "value")],
    "column_encoding": {"time.list.element": "DELTA_BINARY_PACKED"},
    "write_page_checksum": True,
}
_CACHE_BYTES = 256 << 20
_OPEN_FILES = 32


@dataclass(frozen=True)
class History:
    """One subject's events; the arrays are views that must not be written to.

    birth_time: microseconds since 1970, None where unknown.
    static_code_F int32, static_value_F float32: events without a time.
    time_L int64 (microseconds since 1970, non-decreasing), code_L int32 (the dataset's ids: records of its
    vocabulary), value_L float32 (raw; NaN where none).
    """

    subject_id: int
    birth_time: int | None
    static_code: np.ndarray
    static_value: np.ndarray
    time: np.ndarray
    code: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.time)

    def keep(self, kept: slice | np.ndarray) -> History:
        """The same subject with some of the events alone: a slice, or booleans (L,)."""
        return replace(self, time=self.time[kept], code=self.code[kept], value=self.value[kept])


def ages(birth_time: Sequence[int | None], time_N: np.ndarray) -> np.ndarray:
    """In years, float32 (N,), at times of subjects with these births; NaN where the birth is unknown."""
    known_N = np.array([birth is not None for birth in birth_time])
    age_us_N = time_N - np.array([birth or 0 for birth in birth_time], dtype=np.int64)  # taken in integers
    return (np.where(known_N, age_us_N, np.nan) / US_PER_YEAR).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ writing


def write_histories(
    data: Location, histories: Location, shard: str, code_ids: dict[str, int], splits: Splits, known: KnownTimes
) -> pa.Table:
    """Write one MEDS shard (`data`) as histories, atomically, and return its part of the index.

    code_ids: every code of the shard -> its record in the vocabulary. known: when its events become known.
    """
    parts = []
    with atomic_path(histories) as temporary, pq.ParquetWriter(temporary, HISTORY_SCHEMA, **_ENCODING) as writer:
        births = _birth_codes(code_ids)
        for row_group, events in enumerate(iter_events(data, code_ids)):
            records = _records(known.apply(events, code_ids), births)
            writer.write_table(records, row_group_size=records.num_rows)
            parts.append(_index_of(records, shard, row_group, splits.of(records["subject_id"].to_numpy())))
    return pa.concat_tables(parts)


def _index_of(records: pa.Table, shard: str, row_group: int, split_N: Sequence[str] | np.ndarray) -> pa.Table:
    """The index of a row group."""
    N = records.num_rows
    columns = [
        records["subject_id"],
        pa.array(split_N, pa.string()),
        pa.array([shard] * N, pa.string()),
        np.full(N, row_group, np.int32),
        np.arange(N, dtype=np.int32),
        records["time"].combine_chunks().value_lengths(),
    ]
    return pa.table(columns, schema=INDEX_SCHEMA)


class Splits:
    """The split of each subject of a MEDS folder: arrays in the folder `beside`, which the processes of a host share.

    Raises as `read_splits` does.
    """

    def __init__(self, root: Location, beside: Location) -> None:
        def fill(new: New) -> dict[str, Any]:
            table = read_splits(root)
            names: dict[str, int] = {}
            subject_id_N = new("subject_id_N", len(table))
            subject_id_N[:] = table["subject_id"].to_numpy()
            new("split_N", len(table))[:] = numbered(table["split"].combine_chunks(), names)
            argsort(subject_id_N, new("order_N", len(table)))
            return {"names": list(names)}

        types = {"subject_id_N": np.int64, "split_N": np.int32, "order_N": np.int64}
        self._arrays, known = mapped(root / meds.subject_splits_filepath, beside, types, fill)
        self._names = np.array(known["names"], dtype=object)

    def of(self, subject_id_S: np.ndarray) -> np.ndarray:
        """Split names (object array) of subjects, every one of which has one."""
        place_S = find(self._arrays["subject_id_N"], self._arrays["order_N"], subject_id_S)
        assert (place_S >= 0).all(), "a subject without a split"
        return self._names[self._arrays["split_N"][place_S]]


def _birth_codes(code_ids: dict[str, int]) -> np.ndarray:
    return np.array([id for code, id in code_ids.items() if is_code(code, meds.birth_code)], np.int32)


def _records(events: Events, birth_codes: np.ndarray) -> pa.Table:
    """Whole subjects' events as records of HISTORY_SCHEMA."""
    starts = events.starts
    subject_R = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(events)))
    static_R = events.time_R == STATIC_TIME

    def lists(values_R: np.ndarray, kept_R: np.ndarray) -> pa.ListArray:
        lengths_N = np.bincount(subject_R[kept_R], minlength=len(starts))
        offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, values_R[kept_R])

    birth_R = np.isin(events.code_R, birth_codes) & ~static_R
    # the birth has a column of its own: as an event it would start the history decades before all others
    event_R = ~static_R & ~birth_R & (events.time_R != NEVER)
    births = np.flatnonzero(birth_R)
    born, first = np.unique(subject_R[births], return_index=True)
    birth_N = np.zeros(len(starts), np.int64)
    birth_N[born] = events.time_R[births[first]]
    return pa.table(
        [
            events.subject_id_R[starts],
            pa.array(birth_N, mask=~np.isin(np.arange(len(starts)), born)),
            lists(events.code_R, static_R),
            lists(events.value_R, static_R),
            *(lists(column_R, event_R) for column_R in (events.time_R, events.code_R, events.value_R)),
        ],
        schema=HISTORY_SCHEMA,
    )


# ------------------------------------------------------------------------------------------------------ reading


class Histories:
    """The histories of a prepared dataset.

    codes: the dataset's codes; History.code holds positions in it.
    index: where each subject's history is; a subject's place in it is its position.
    fingerprint: a digest of what the dataset was prepared from.
    known: when events become known, as far as the histories go by that; known_events: by rule, how many events were
        "moved" and "left_out".
    code_maps: digests of the code maps that were applied, each after its file's name.
    """

    def __init__(
        self,
        path: Location,
        codes: list[str],
        index: Index,
        fingerprint: str,
        known: KnownConfig | None = None,
        known_events: dict[str, dict[str, int]] | None = None,
        code_maps: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.codes = codes
        self.index = index
        self.fingerprint = fingerprint
        self.known = known or KnownConfig()
        self.known_events = known_events or {}
        self.code_maps = code_maps
        self._cache = _RowGroups(path / FOLDER, len(codes))

    @classmethod
    def open(cls, path: str | Location) -> Histories:
        """Open what `python -m hymate.data.prepare` wrote; raises UserError where it is not complete."""
        path = locate(path) if isinstance(path, str) else path
        metadata = read_metadata(path)
        if metadata is None:
            raise UserError(f"{path}: not a prepared dataset: run python -m hymate.data.prepare source=... out={path}")
        try:
            vocabulary = read_parquet(path / FOLDER / "vocabulary.parquet", ["code", "id"])
            _check_vocabulary(vocabulary)
            codes = vocabulary["code"].to_pylist()
            index = open_index(path / FOLDER)
            if len(index) != sum(size["subjects"] for size in metadata["splits"].values()):
                raise pa.ArrowInvalid("another number of subjects")
        except (*UNREADABLE, KeyError) as error:
            raise UserError(f"{path / FOLDER}: damaged: delete {path} and prepare the dataset again") from error
        maps = [f"{found['name']} {found['sha256']}" for found in metadata["codes"] if found]
        return cls(path, codes, index, metadata["fingerprint"], metadata["known"], metadata["known_events"], maps)

    @classmethod
    def of_events(cls, events: Events, code_ids: dict[str, int], known: KnownConfig) -> Histories:
        """Those of events in memory (sorted as a shard is), as `write_histories` writes them; all in split "all"."""
        records = _records(KnownTimes(known).apply(events, code_ids), _birth_codes(code_ids))
        index = Index.of_table(_index_of(records, "", 0, ["all"] * records.num_rows))
        histories = cls(Path(), list(code_ids), index, fingerprint="", known=known)
        histories._cache.keep("", 0, _RowGroup(records, len(code_ids)))
        return histories

    def __len__(self) -> int:
        return len(self.index)

    @property
    def inputs(self) -> dict[str, str]:
        """What a run's record keeps of the dataset."""
        return {"data.path": self.fingerprint} | ({"data.codes": ", ".join(self.code_maps)} if self.code_maps else {})

    def positions(self, split: str) -> range:
        """Those of the subjects of a split."""
        segments = [segment for segment in self.index.segments if segment.split == split]
        assert len(segments) < 2, "several splits have been given this name"
        return range(segments[0].start, segments[0].stop) if segments else range(0)

    def with_splits(self, names: Mapping[str, str]) -> Histories:
        """The same histories with other names for the splits."""
        other = copy.copy(self)
        other.index = self.index.renamed(names)
        return other

    @property
    def splits(self) -> list[str]:
        return sorted({segment.split for segment in self.index.segments})

    @property
    def odd_splits(self) -> list[str]:
        """The splits with other names than MEDS's."""
        return [split for split in self.splits if split not in SPLITS]

    def without_subjects_error(self, split: str) -> UserError:
        """The error where a split is needed and holds nobody."""
        remedy = "prepare the dataset with subjects in this split"
        if self.odd_splits:
            names = ", ".join(map(repr, self.odd_splits))[:200]
            remedy = f"there are subjects in {names}: {RENAME_SPLITS}, and prepare the dataset again"
        return UserError(f"{self.path}: no subject is in the {split} split: {remedy}")

    def read(self, positions: Sequence[int] | np.ndarray) -> list[History]:
        """The histories at `positions`, in that order; each row group is decoded once."""
        positions = np.asarray(positions, np.int64)
        places = self.index.places(positions)
        histories: list[History | None] = [None] * len(positions)
        for k in sorted(range(len(positions)), key=lambda k: places[k]):
            shard, row_group, record = places[k]
            history = self._cache.get(shard, row_group).history(record)
            known = self.index.subject_id_P[positions[k]], self.index.num_events_P[positions[k]]
            if history is None or (history.subject_id, len(history)) != known:
                raise _damaged_error(self.path / FOLDER / f"{shard}.parquet")
            histories[k] = history
        return [history for history in histories if history is not None]


def read_metadata(path: Location) -> dict | None:
    """histories/metadata.json of a prepared dataset, None where it is not there; `known` is a KnownConfig.

    Raises UserError where another version of the format wrote it.
    """
    file = path / FOLDER / "metadata.json"
    if not file.is_file():
        return None
    try:
        # older datasets have no rules, no counts and no code maps
        older: dict[str, Any] = {"known": {}, "known_events": {}, "source_counts": {}, "codes": []}
        metadata = {**older, **json.loads(file.read_text())}
        version = metadata["format_version"]
        numbers = [version, *(size["subjects"] for size in metadata["splits"].values())]
        metadata["known"] = build(KnownConfig, metadata["known"], "known.")
        numbers += [of[count] for of in metadata["known_events"].values() for count in ("moved", "left_out")]
        numbers += metadata["source_counts"].values()
        odd = set(metadata["known_events"]) - set(metadata["known"].rules)
        texts = [metadata["fingerprint"], *(of[key] for of in metadata["codes"] if of for key in ("name", "sha256"))]
        if any(type(text) is not str for text in texts) or odd or any(type(number) is not int for number in numbers):
            raise ValueError("malformed")
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: damaged: delete {path} and prepare the dataset again") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format version {version}, this version reads {FORMAT_VERSION}: "
            "run python -m hymate.data.prepare into a new folder, or use the version that wrote it"
        )
    return metadata


def _damaged_error(path: Location) -> UserError:
    return UserError(f"{path}: missing or damaged: prepare the dataset again")


def _check_vocabulary(vocabulary: pa.Table) -> None:
    """Raises pa.ArrowInvalid where it is not what `prepare` writes."""
    sound = vocabulary.schema.types == [pa.string(), pa.int32()] and not any(c.null_count for c in vocabulary.columns)
    if not sound or not np.array_equal(vocabulary["id"].to_numpy(), np.arange(vocabulary.num_rows)):
        raise pa.ArrowInvalid("not what prepare writes")


class _RowGroup:
    """A decoded row group. Raises pa.ArrowInvalid where it holds anything but sound histories of `num_codes` codes."""

    def __init__(self, table: pa.Table, num_codes: int) -> None:
        table.validate(full=True)
        columns = table.columns
        if not table.schema.equals(HISTORY_SCHEMA) or any(c.null_count for c in (columns[0], *columns[2:])):
            raise pa.ArrowInvalid("not a table of histories")
        self._subject_id = table["subject_id"].to_numpy()
        self._birth_time = table["birth_time"].to_pylist()
        self.nbytes = table.nbytes
        self._lists = {}
        for name in HISTORY_SCHEMA.names[2:]:
            column = table[name].combine_chunks()
            self._lists[name] = (column.offsets.to_numpy(), column.values.to_numpy())
        self._check(num_codes)

    def _check(self, num_codes: int) -> None:
        offsets = {name: offsets for name, (offsets, _) in self._lists.items()}
        time, starts = self._lists["time"][1], offsets["time"][1:-1]
        rises = time[1:] >= time[:-1]
        rises[starts[(starts > 0) & (starts < len(time))] - 1] = True  # from a subject to the next
        sound = (
            all(np.array_equal(offsets[name], offsets["time"]) for name in ("code", "value"))
            and np.array_equal(offsets["static_code"], offsets["static_value"])
            and all(((c >= 0) & (c < num_codes)).all() for c in (self._lists[n][1] for n in ("code", "static_code")))
            and not any(np.isinf(self._lists[name][1]).any() for name in ("value", "static_value"))
            and rises.all()
        )
        if not sound:
            raise pa.ArrowInvalid("not sound histories")

    def history(self, record: int) -> History | None:
        """The history in a record, None where there is no such record."""
        if record >= len(self._subject_id):
            return None
        views = {name: values[offsets[record] : offsets[record + 1]] for name, (offsets, values) in self._lists.items()}
        return History(int(self._subject_id[record]), self._birth_time[record], **views)


class _RowGroups:
    """Decoded row groups, the most recently used ones kept; safe to use from several threads."""

    def __init__(self, folder: Location, num_codes: int) -> None:
        self._folder, self._num_codes = folder, num_codes
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], _RowGroup] = OrderedDict()
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._nbytes = 0

    def get(self, shard: str, row_group: int) -> _RowGroup:
        with self._lock:
            key = (shard, row_group)
            if key not in self._groups:
                self.keep(shard, row_group, self._read(shard, row_group))
                while self._nbytes > _CACHE_BYTES and len(self._groups) > 1:
                    self._nbytes -= self._groups.popitem(last=False)[1].nbytes
            self._groups.move_to_end(key)
            return self._groups[key]

    def keep(self, shard: str, row_group: int, group: _RowGroup) -> None:
        """Have a decoded row group."""
        self._groups[shard, row_group] = group
        self._nbytes += group.nbytes

    def _read(self, shard: str, row_group: int) -> _RowGroup:
        path = self._folder / f"{shard}.parquet"
        try:
            if shard not in self._files:
                self._files[shard] = open_parquet(path)
                while len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(shard)
            file = self._files[shard]
            if row_group >= file.num_row_groups:
                raise pa.ArrowInvalid("no such row group")
            return _RowGroup(file.read_row_group(row_group, use_threads=False), self._num_codes)
        except UNREADABLE as error:
            raise _damaged_error(path) from error
