"""What PhysioNet's challenges have in common: one text file a stay, in a folder or a tar archive; splits by stay."""

from __future__ import annotations

import abc
import contextlib
import functools
import lzma
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from hymate.data.meds import DATA_SCHEMA, STATIC_TIME, DataError, SplitsConfig, codes_table, write_metadata
from hymate.hashing import seeded_hash
from hymate.storage.paths import Location, files_below, local_copy

MAX_STAY_BYTES = 16 << 20  # the challenges' have a few kilobytes, and an archive can declare any size
STAYS_PER_SHARD = 1000


@dataclass(frozen=True)
class Stays:
    """What one look at all stays found: their numbers, rising, and whether each has the outcome, bool (N,)."""

    number_N: np.ndarray
    outcome_N: np.ndarray


@dataclass(frozen=True)
class ChallengeSource(abc.ABC):
    """A challenge's files as a `Source`. Splits are by stay, with the same fraction of outcomes in each.

    codes: with their descriptions.
    """

    codes: ClassVar[Mapping[str, str]]
    raw: Location
    splits: SplitsConfig
    seed: int

    @property
    @abc.abstractmethod
    def stays(self) -> Stays:
        """All of them."""

    @abc.abstractmethod
    def dataset(self) -> dict[str, Any]:
        """MEDS's metadata/dataset.json."""

    def shards(self) -> list[str]:
        return list(self.places)

    def counts(self) -> dict[str, int]:
        return {}

    def finish(self, out: Location) -> None:
        splits = pa.table({"subject_id": self.stays.number_N, "split": self._split_N})
        write_metadata(out, self.dataset(), splits, codes_table(self.codes))

    @functools.cached_property
    def places(self) -> dict[str, np.ndarray]:
        """Shard name -> the places of its stays; a shard holds stays of one split."""
        shards: dict[str, np.ndarray] = {}
        for split in sorted(set(self._split_N)):
            rows = np.flatnonzero(self._split_N == split)
            parts = np.array_split(rows, -(-len(rows) // STAYS_PER_SHARD))
            shards |= {f"{split}/{number}": part for number, part in enumerate(parts)}
        return shards

    @functools.cached_property
    def _split_N(self) -> np.ndarray:
        """By a seeded hash of the stay's number."""
        split_N = np.empty(len(self.stays.number_N), dtype=object)
        hash_N = seeded_hash(self.stays.number_N, self.seed)
        for outcome in (False, True):
            rows = np.flatnonzero(self.stays.outcome_N == outcome)
            shuffled = rows[np.argsort(hash_N[rows])]
            split_N[shuffled] = self.splits.assign((np.arange(len(rows)) + 0.5) / len(rows))
        return split_N


@dataclass(frozen=True)
class StayFiles:
    """The stays of a folder, or of a tar archive with all its folders.

    suffix: that a stay's file name ends in; others are ignored.
    stem, example: what precedes it, as a regular expression whose group 1 is the stay's number, and in words.
    nested: whether stays lie in the folder's folders, too.
    """

    place: Location
    suffix: str
    stem: str
    example: str
    nested: bool = False

    def numbers(self) -> list[int]:
        """Of all stays."""
        with self._reading():
            return [number for _, number, _ in self._files()]

    def texts(self, wanted: Collection[int] | None = None) -> Iterator[tuple[Location, int, bytes]]:
        """(path, number, text) of the stays in `wanted`, or of all."""
        with self._reading():
            if wanted is None or self.place.is_dir():
                for path, number, read in self._files():
                    if wanted is None or number in wanted:
                        yield path, number, read()
                return
            about = self.place.stat()
            start, (unpacked, stays) = 0, _unpacked(self, about.st_size, about.st_mtime_ns)
            for path, number, size in stays:
                if number in wanted:
                    yield path, number, unpacked[start : start + size]
                start += size

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError, MemoryError) as error:
            raise DataError(f"{self.place}: not readable (truncated or damaged): fetch it again") from error

    def _files(self) -> Iterator[tuple[Location, int, Callable[[], bytes]]]:
        if self.place.is_dir():
            for name, path in files_below(self.place, self.suffix).items():
                if self.nested or "/" not in name:
                    yield path, self._number(path), functools.partial(_read_stay, path)
            return
        with local_copy(self.place) as place, tarfile.open(place, "r|*", tarinfo=_Member) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                path = self.place / member.name
                if file is not None and path.name.endswith(self.suffix) and not path.name.startswith("."):
                    if member.size > MAX_STAY_BYTES:  # a sparse one's true size
                        raise tarfile.ReadError("a member is too large for a stay")
                    yield path, self._number(path), file.read

    def _number(self, path: Location) -> int:
        match = re.fullmatch(self.stem, path.stem)
        if not match:
            raise DataError(f"{path}: not the name of a stay ({self.example}{self.suffix}): remove the file")
        return int(match[1])


@functools.lru_cache(maxsize=8)
def _unpacked(files: StayFiles, num_bytes: int, time_ns: int) -> tuple[mmap | bytes, list[tuple[Location, int, int]]]:
    """The texts of an archive of this size and time, one after the other in a mapped temporary file, and of each its
    path, number and size: once for all shards that a process writes.
    """
    with tempfile.TemporaryFile() as unpacked:
        stays = [(path, number, unpacked.write(read())) for path, number, read in files._files()]
        unpacked.flush()
        return mmap(unpacked.fileno(), 0, access=ACCESS_READ) if unpacked.tell() else b"", stays


class _Member(tarfile.TarInfo):
    """A member that is not read where it is larger than a stay can be, whatever kind it is."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if not 0 <= self.size <= MAX_STAY_BYTES:
            raise tarfile.ReadError("a member is too large for a stay")
        return super()._proc_member(archive)  # type: ignore[misc]


def _read_stay(path: Location) -> bytes:
    if path.stat().st_size > MAX_STAY_BYTES:
        raise DataError(f"{path}: too large for a stay: remove the file or fetch the set again")
    return path.read_bytes()


def events_table(
    number_E: np.ndarray, time_E: np.ndarray, code_E: np.ndarray, value_E: np.ndarray, codes: Mapping[str, object]
) -> pa.Table:
    """MEDS data of a shard: by stay and time, events of one time in the order given.

    number_E: the stay's; time_E: microseconds since 1970, STATIC_TIME for none; code_E: place in `codes`; value_E: NaN
    for none.
    """
    order = np.lexsort((time_E, number_E))
    time_E, value_E = time_E[order], value_E[order]
    return pa.table(
        [
            number_E[order],
            pa.array(time_E, mask=time_E == STATIC_TIME).cast(pa.timestamp("us")),
            pa.DictionaryArray.from_arrays(code_E[order].astype(np.int32), list(codes)).cast(pa.string()),
            pa.array(value_E.astype(np.float32), mask=np.isnan(value_E)),
        ],
        schema=DATA_SCHEMA,
    )
