"""Where each subject's history is: arrays of histories/index.parquet, which the processes of a host share.

A subject's position is its place in these arrays. They are sorted by split, in each split by whether there are events
(subjects without come last), and then as in the files. So a split is a range of positions, and a row group's subjects
of one split lie side by side.

Legend: P subjects; G groups, each the subjects of one split in one row group; R rows of a batch; N any subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hymate.data.mapped import New, argsort, find, mapped, numbered
from hymate.data.meds import ROWS, open_parquet
from hymate.storage.paths import Location

INDEX, ARRAYS = "index.parquet", ".index"
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
        return find(self.subject_id_P, self.by_subject_P, subject_id_N)

    def places(self, position_N: np.ndarray) -> list[Place]:
        """Where the histories at positions are."""
        group_N = np.searchsorted(self.start_G, position_N, side="right") - 1
        shards = [self.shards[shard] for shard in self.shard_G[group_N]]
        return list(map(Place, shards, self.row_group_G[group_N].tolist(), self.record_P[position_N].tolist()))


def open_index(folder: Location) -> Index:
    """The index of a folder of histories, mapped; where need be, its arrays are made, in memory that doesn't grow.

    Raises pa.ArrowInvalid and what `open_parquet` raises where the file is not what `prepare` writes.
    """

    def fill(new: New) -> dict[str, Any]:
        with open_parquet(folder / INDEX) as file:
            if not file.schema_arrow.equals(INDEX_SCHEMA):
                raise pa.ArrowInvalid("not what prepare writes")
            index = _filled(lambda: file.iter_batches(batch_size=ROWS, use_threads=False), new)
        return {"shards": index.shards, "segments": index.segments}

    arrays, known = mapped(folder / INDEX, folder / ARRAYS, _TYPES, fill)
    _check_shards(known["shards"])
    return Index(**arrays, shards=known["shards"], segments=[Segment(*segment) for segment in known["segments"]])


def _filled(batches: Callable[[], Iterable[pa.RecordBatch]], new: New) -> Index:
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
        row_group_R = (numbered(batch["shard"], shards) << 32) + batch["row_group"].to_numpy()
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

    if not argsort(arrays["subject_id_P"], arrays["by_subject_P"]):
        raise pa.ArrowInvalid("a subject twice")
    return Index(**arrays, shards=list(shards), segments=segments)


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
    return 2 * numbered(batch["split"], splits) + (batch["num_events"].to_numpy() == 0)
