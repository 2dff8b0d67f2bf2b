"""Arrays made of a Parquet file once on a host, and mapped by its processes.

They lie in a folder beside the file, or, where it is at a URL or in a folder that cannot be written to, in the host's
folder of temporary files. A process holds no more of them than the pages that it looks at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hymate.data.meds import ROWS
from hymate.errors import UserError
from hymate.storage.paths import Location, Stat, locked, naming_a_full_disk, new_folder

ABOUT = "about.json"
SORTED_AT_ONCE = 1 << 21  # numbers
New = Callable[[str, int], np.ndarray]  # makes the array of a name and a length, to be filled
Arrays = dict[str, np.ndarray]


def mapped(
    source: Location, beside: Location, types: Mapping[str, type], fill: Callable[[New], dict[str, Any]]
) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a file, by the names in `types`, and what else is known of them.

    Where the folder `beside` doesn't hold those of the file as it is now, the first process of the host makes them and
    others wait: fill(new) makes and fills all, and returns the rest, plain enough for JSON. Names that end in the same
    letter have the same length.
    """
    made_of = source.stat()
    if isinstance(beside, Path):
        try:
            return _made(beside, made_of, types, fill)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
    name = hashlib.sha256(str(source.absolute()).encode()).hexdigest()[:32]
    return _made(_host_folder() / name, made_of, types, fill)


def argsort(value_N: np.ndarray, order_N: np.ndarray) -> bool:
    """Fill order_N with the places of values in their order; whether all are different.

    The values are dealt out into parts (Q) that follow one another, so that one part at a time is sorted and held.
    """
    N = len(value_N)
    num_parts = N // SORTED_AT_ONCE + 1
    sample = np.sort(value_N[:: N // (1000 * num_parts) + 1])
    first_Q = sample[len(sample) * np.arange(1, num_parts) // num_parts]  # what lies below the first is a part, too
    starts = range(0, N, ROWS)

    def part_of(start: int) -> np.ndarray:
        return np.searchsorted(first_Q, value_N[start : start + ROWS], side="right")

    count_Q = sum((np.bincount(part_of(start), minlength=num_parts) for start in starts), np.zeros(num_parts, np.int64))
    next_Q = np.cumsum(count_Q) - count_Q
    for start in starts:
        part_R = part_of(start)
        for part in np.unique(part_R):
            own = start + np.flatnonzero(part_R == part)
            order_N[next_Q[part] : next_Q[part] + len(own)] = own
            next_Q[part] += len(own)
    for stop, count in zip(next_Q.tolist(), count_Q.tolist(), strict=True):
        place_N = order_N[stop - count : stop]
        own_N = value_N[place_N]
        sorted_N = np.argsort(own_N)
        place_N[:] = place_N[sorted_N]
        if (np.diff(own_N[sorted_N]) == 0).any():
            return False
    return True


def find(value_N: np.ndarray, order_N: np.ndarray, wanted_M: np.ndarray) -> np.ndarray:
    """The places (int64) of some numbers among others, whose order is known; -1 for those that are not there."""
    if not len(value_N):
        return np.full(len(wanted_M), -1)
    sorted_M = np.argsort(wanted_M)  # neighbours lie on one page
    at_M = np.empty(len(wanted_M), np.int64)
    at_M[sorted_M] = np.searchsorted(value_N, wanted_M[sorted_M].astype(np.int64), sorter=order_N)
    place_M = order_N[np.minimum(at_M, len(value_N) - 1)]
    return np.where(value_N[place_M] == wanted_M, place_M, -1)


def numbered(names_R: pa.Array, numbers: dict[str, int]) -> np.ndarray:
    """The numbers (int64) of names; new ones get the next."""
    encoded = names_R.dictionary_encode()
    number_D = np.array([numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.to_pylist()], np.int64)
    return number_D[encoded.indices.to_numpy()]


def _host_folder() -> Path:
    """Of this user alone: subject ids are in it."""
    folder = Path(tempfile.gettempdir()) / f"hymate-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise UserError(f"{folder}: belongs to another user: set TMPDIR to a folder of your own")
    return folder


def _made(
    place: Path, made_of: Stat | os.stat_result, types: Mapping[str, type], fill: Callable[[New], dict[str, Any]]
) -> tuple[Arrays, dict[str, Any]]:
    if (found := _read(place, made_of, types)) is None:
        with naming_a_full_disk(place), locked(place.with_name(f"{place.name}.lock")):
            if _read(place, made_of, types) is None:
                with new_folder(place, ABOUT) as folder:
                    _write(folder, made_of, types, fill)
        found = _read(place, made_of, types)
        assert found is not None
    return found


def _read(
    folder: Path, made_of: Stat | os.stat_result, types: Mapping[str, type]
) -> tuple[Arrays, dict[str, Any]] | None:
    """None where there are none, where they were made of another file, and where they are damaged."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        if (about["bytes"], (folder / ABOUT).stat().st_mtime_ns) != (made_of.st_size, made_of.st_mtime_ns):
            return None
        # np.load unpickles nothing unless it is asked to; indexing a plain array is faster
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in types}
        lengths = {name[-1]: len(array) for name, array in arrays.items()}
        known = about["known"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = all(a.dtype == types[name] and a.shape == (lengths[name[-1]],) for name, a in arrays.items())
    return (arrays, known) if sound else None


def _write(
    folder: Path, made_of: Stat | os.stat_result, types: Mapping[str, type], fill: Callable[[New], dict[str, Any]]
) -> None:
    """The file's size and time mark what was made of it."""
    known = fill(lambda name, length: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", types[name], (length,)))
    (folder / ABOUT).write_text(json.dumps({"bytes": made_of.st_size, "known": known}))
    os.utime(folder / ABOUT, ns=(made_of.st_mtime_ns, made_of.st_mtime_ns))
