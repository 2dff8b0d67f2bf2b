"""Where each subject's history is: arrays mapped from files, which the processes of a host share.

`prepare` writes histories/index.parquet, which moves between machines. Whoever opens it first makes the arrays of it:
beside it, or, where it lies at a URL or may not be written to, in the host's folder of temporary files. A process holds
no more of them than the pages that it looks at.

A subject's position is its place in these arrays. They are sorted by split, in each split by whether there are events
(subjects without come last), and then as in the files. So a split is a range of positions, and a row group's subjects
of one split lie side by side.

Legend: P subjects; G groups, each the subjects of one split in one row group; R rows of a batch; N any subjects.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hymate.data.meds import ROWS, open_parquet
from hymate.errors import UserError
from hymate.storage.paths import Location, Stat, locked, naming_a_full_disk, new_folder

INDEX, ARRAYS, ABOUT = "index.parquet", ".index", "about.json"
VERSION = 1  # of the arrays
SORTED_AT_ONCE = 1 << 21  # subjects
INDEX_SCHEMA = pa.schema(
    [
        ("subject_id", pa.int64()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int32()),
        ("num_events", pa.int32()),
    ]
)
_TYPES = {
    "subject_id_P": np.int64,
    "num_events_P": np.int32,
    "record_P": np.int32,
    "by_subject_P": np.int64,
    "start_G": np.int64,
    "shard_G": np.int32,
    "row_group_G": np.int32,
    "events_G": np.int64,
}


class Segment(NamedTuple):
    """A split's positions: those with events from `start` to `empty`, those without from there to `stop`."""

    split: str
    start: int
    empty: int
    stop: int


class Place(NamedTuple):
    """Where a history is."""

    shard: str
    row_group: int
    record: int


@dataclass(frozen=True)
class Index:
    """subject_id_P int64, num_events_P int32 (without the static ones), record_P int32: of its row group.

    by_subject_P: int64, positions in the order of subject ids.
    start_G: int64, a group's first position; shard_G int32 (a place in `shards`) and row_group_G int32: its row group;
        events_G: int64, the events of all subjects in that row group, whatever their split.
    segments: in the order of positions.
    """

    subject_id_P: np.ndarray
    num_events_P: np.ndarray
    record_P: np.ndarray
    by_subject_P: np.ndarray
    start_G: np.ndarray
    shard_G: np.ndarray
    row_group_G: np.ndarray
    events_G: np.ndarray
    shards: list[str]
    segments: list[Segment]

    def __len__(self) -> int:
        return len(self.subject_id_P)

    @classmethod
    def of_table(cls, table: pa.Table) -> Index:
        """In memory, of a table of INDEX_SCHEMA. Raises pa.ArrowInvalid where it is not what `prepare` writes."""
        return _filled(table.to_batches, lambda name, length: np.empty(length, _TYPES[name]))

    def renamed(self, names: Mapping[str, str]) -> Index:
        """With other names for the splits; several may get the same."""
        return replace(self, segments=[segment._replace(split=names[segment.split]) for segment in self.segments])

    def is_in(self, position_N: np.ndarray, split: str) -> np.ndarray:
        """Whether subjects are in a split, bool (N,)."""
        stop_S = np.array([segment.stop for segment in self.segments])
        wanted_S = np.array([segment.split == split for segment in self.segments])
        return wanted_S[np.searchsorted(stop_S, position_N, side="right")]

    def find(self, subject_id_N: np.ndarray) -> np.ndarray:
        """The positions (int64) of subject ids, -1 for those that are not here."""
        if not len(self):
            return np.full(len(subject_id_N), -1)
        order_N = np.argsort(subject_id_N)  # sorted ids are next to each other in the arrays, too
        wanted_N, at_N = subject_id_N[order_N].astype(np.int64), np.empty(len(order_N), np.int64)
        at_N[order_N] = np.searchsorted(self.subject_id_P, wanted_N, sorter=self.by_subject_P)
        position_N = self.by_subject_P[np.minimum(at_N, len(self) - 1)]
        return np.where(self.subject_id_P[position_N] == subject_id_N, position_N, -1)

    def places(self, position_N: np.ndarray) -> list[Place]:
        """Where the histories at positions are."""
        group_N = np.searchsorted(self.start_G, position_N, side="right") - 1
        shards = [self.shards[shard] for shard in self.shard_G[group_N]]
        return list(map(Place, shards, self.row_group_G[group_N].tolist(), self.record_P[position_N].tolist()))


def open_index(folder: Location) -> Index:
    """The index of a folder of histories, mapped; where need be, its arrays are made.

    That takes memory for SORTED_AT_ONCE subjects and a few batches, however many there are. Raises pa.ArrowInvalid and
    what `open_parquet` raises where the file is not what `prepare` writes.
    """
    source = folder / INDEX
    made_of = source.stat()
    if isinstance(folder, Path):
        try:
            return _made(folder / ARRAYS, source, made_of)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    name = hashlib.sha256(str(source.absolute()).encode()).hexdigest()[:32]
    return _made(_host_folder() / name, source, made_of)


def _host_folder() -> Path:
    """Of this user alone: subject ids are in it."""
    folder = Path(tempfile.gettempdir()) / f"hymate-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise UserError(f"{folder}: belongs to another user: set TMPDIR to a folder of your own")
    return folder


def _made(place: Path, source: Location, made_of: Stat | os.stat_result) -> Index:
    """The arrays of `source` in a folder; the first process makes them, others wait for it."""
    if (index := _mapped(place, made_of)) is None:
        with naming_a_full_disk(place), locked(place.with_name(f"{place.name}.lock")):
            if _mapped(place, made_of) is None:
                with new_folder(place, ABOUT) as new:
                    _write(source, new, made_of)
        index = _mapped(place, made_of)
        assert index is not None
    return index


def _mapped(folder: Path, made_of: Stat | os.stat_result) -> Index | None:
    """The arrays in a folder, None where they are missing or were made of another file."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["version"] != VERSION or about["bytes"] != made_of.st_size:
            return None
        if (folder / ABOUT).stat().st_mtime_ns != made_of.st_mtime_ns:
            return None
        # np.load unpickles nothing unless it is asked to; np.asarray: indexing a plain array is faster
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _TYPES}
        index = Index(**arrays, shards=about["shards"], segments=[Segment(*segment) for segment in about["segments"]])
        _check_shards(index.shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowInvalid):
        return None
    lengths = {name[-1]: len(array) for name, array in arrays.items()}
    sound = all(a.dtype == _TYPES[name] and a.shape == (lengths[name[-1]],) for name, a in arrays.items())
    return index if sound else None


def _write(source: Location, folder: Path, made_of: Stat | os.stat_result) -> None:
    """Make the arrays of an index in a new folder, with the file's own time."""
    with open_parquet(source) as file:
        if not file.schema_arrow.equals(INDEX_SCHEMA):
            raise pa.ArrowInvalid("not what prepare writes")

        def new(name: str, length: int) -> np.ndarray:
            return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", _TYPES[name], (length,))

        index = _filled(lambda: file.iter_batches(batch_size=ROWS, use_threads=False), new)
    about = {"version": VERSION, "bytes": made_of.st_size, "shards": index.shards, "segments": index.segments}
    (folder / ABOUT).write_text(json.dumps(about))
    os.utime(folder / ABOUT, ns=(made_of.st_mtime_ns, made_of.st_mtime_ns))


def _filled(batches: Callable[[], Iterable[pa.RecordBatch]], new: Callable[[str, int], np.ndarray]) -> Index:
    """An index of two passes over `batches`, its arrays made by new(name, length)."""
    splits: dict[str, int] = {}
    count_S = np.zeros(0, np.int64)  # segment 2 s holds the subjects of split s with events, 2 s + 1 those without
    for batch in batches():
        _check(batch)
        segment_R = _segments(batch, splits)
        counted_S = np.bincount(segment_R, minlength=2 * len(splits))
        counted_S[: len(count_S)] += count_S
        count_S = counted_S
    segments, next_S, stop = [], np.zeros_like(count_S), 0
    for split, s in sorted(splits.items()):
        start, empty = stop, stop + int(count_S[2 * s])
        stop = empty + int(count_S[2 * s + 1])
        next_S[2 * s : 2 * s + 2] = start, empty
        segments.append(Segment(split, start, empty, stop))

    arrays = {name: new(name, stop) for name in _TYPES if name.endswith("_P")}
    shards: dict[str, int] = {}
    last_S = np.full_like(count_S, -1)
    groups: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for batch in batches():
        segment_R = _segments(batch, splits)
        row_group_R = (_numbered(batch["shard"], shards) << 32) + batch["row_group"].to_numpy()
        for segment in np.unique(segment_R):
            own = np.flatnonzero(segment_R == segment)
            start = next_S[segment]
            next_S[segment] += len(own)
            for name, column in (("subject_id", "subject_id"), ("num_events", "num_events"), ("record", "row")):
                arrays[f"{name}_P"][start : next_S[segment]] = batch[column].to_numpy()[own]
            first = np.diff(row_group_R[own], prepend=last_S[segment]) != 0
            last_S[segment] = row_group_R[own[-1]]
            groups.append((start + np.flatnonzero(first), row_group_R[own][first]))
    _check_shards(list(shards))
    start_G, row_group_G = (np.concatenate(part) for part in zip(*groups, strict=True))
    order_G = np.argsort(start_G)
    start_G, row_group_G = start_G[order_G], row_group_G[order_G]
    _, whole_G = np.unique(row_group_G, return_inverse=True)
    events_G = np.add.reduceat(arrays["num_events_P"], start_G, dtype=np.int64) if stop else start_G
    events_G = np.bincount(whole_G, weights=events_G)[whole_G]
    found = {"start": start_G, "shard": row_group_G >> 32, "row_group": row_group_G & 0xFFFFFFFF, "events": events_G}
    for name, values_G in found.items():
        arrays[f"{name}_G"] = new(f"{name}_G", len(start_G))
        arrays[f"{name}_G"][:] = values_G

    _sort_by_subject(arrays["subject_id_P"], arrays["by_subject_P"])
    return Index(**arrays, shards=list(shards), segments=segments)


def _sort_by_subject(subject_id_P: np.ndarray, by_subject_P: np.ndarray) -> None:
    """Fill by_subject_P. Raises pa.ArrowInvalid where a subject is there twice.

    The subjects are dealt out into parts (Q) that follow one another, so that one part at a time is sorted and held.
    """
    P = len(subject_id_P)
    num_parts = P // SORTED_AT_ONCE + 1
    sample = np.sort(subject_id_P[:: P // (1000 * num_parts) + 1])
    first_Q = sample[len(sample) * np.arange(1, num_parts) // num_parts]  # ids; those below the first are a part, too
    starts = range(0, P, ROWS)

    def part_of(start: int) -> np.ndarray:
        return np.searchsorted(first_Q, subject_id_P[start : start + ROWS], side="right")

    count_Q = sum((np.bincount(part_of(start), minlength=num_parts) for start in starts), np.zeros(num_parts, np.int64))
    next_Q = np.cumsum(count_Q) - count_Q
    for start in starts:
        part_N = part_of(start)
        for part in np.unique(part_N):
            own_N = start + np.flatnonzero(part_N == part)
            by_subject_P[next_Q[part] : next_Q[part] + len(own_N)] = own_N
            next_Q[part] += len(own_N)
    for stop, count in zip(next_Q.tolist(), count_Q.tolist(), strict=True):
        part_P = by_subject_P[stop - count : stop]
        subject_id_N = subject_id_P[part_P]
        order_N = np.argsort(subject_id_N)
        part_P[:] = part_P[order_N]
        if (np.diff(subject_id_N[order_N]) == 0).any():
            raise pa.ArrowInvalid("a subject twice")


def _check(batch: pa.RecordBatch) -> None:
    batch.validate(full=True)
    numbers = (batch[name] for name in ("row_group", "row", "num_events"))
    if any(column.null_count for column in batch.columns) or any((pc.min(n).as_py() or 0) < 0 for n in numbers):
        raise pa.ArrowInvalid("not what prepare writes")


def _check_shards(shards: list[str]) -> None:
    """What an index says is also which files are read: their names must not lead out of the folder."""
    for shard in map(PurePosixPath, shards):
        if not str(shard).isprintable() or shard.is_absolute() or ".." in shard.parts:
            raise pa.ArrowInvalid("a shard outside the folder")


def _segments(batch: pa.RecordBatch, splits: dict[str, int]) -> np.ndarray:
    return 2 * _numbered(batch["split"], splits) + (batch["num_events"].to_numpy() == 0)


def _numbered(names_R: pa.Array, numbers: dict[str, int]) -> np.ndarray:
    """The numbers (int64) of names; new ones get the next."""
    encoded = names_R.dictionary_encode()
    number_D = np.array([numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()], np.int64)
    return number_D[encoded.indices.to_numpy()]
