"""Work in parts, each a task that reads and writes files of one folder, and that a killed command finds done."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hymate.data.histories import Histories
from hymate.data.meds import write_parquet
from hymate.storage.paths import Location, atomic_path, readable
from hymate.work import Journal, stages

NOTHING: Mapping[str, pa.Table] = {}


def run_parts(
    stage: str,
    call: Callable[[str], None],
    parts: Sequence[str],
    folder: Location,
    made_of: str,
    workers: int = 1,
    *,
    inputs: Mapping[str, pa.Table] = NOTHING,
    refusal: str | None = None,
    **options: Any,
) -> None:
    """Run `call(part)`, which pickles, for every part, where `hymate.work.stages` says (options: its), but for those
    that an earlier command had done.

    folder: holds the journal, the inputs for `read_input`, and what the calls leave. made_of: differs where what they
    leave would; if the folder holds what is made of something else: UserError(refusal), or without one it is emptied.
    """
    open_histories.cache_clear()  # an earlier call in this process may have found something else in the same place
    fingerprint = hashlib.sha256(f"{made_of} {' '.join(parts)}".encode()).hexdigest()
    journal = Journal(folder / "journal.jsonl", fingerprint, refusal)
    for name, table in inputs.items():
        write_parquet(table, folder / f"{name}.parquet")
    with stages(parts, journal, workers, **options) as run:
        run.each(stage, call)


def read_input(name: str, folder: Location, **options: Any) -> pa.Table:
    """One of the inputs; options: those of `pyarrow.parquet.read_table`."""
    return pq.read_table(readable(folder / f"{name}.parquet"), **options)


@functools.lru_cache(maxsize=1)
def open_histories(data: Location) -> Histories:
    """A dataset that stays open for the next part."""
    return Histories.open(data)


def save_arrays(path: Location, **arrays: np.ndarray) -> None:
    """What a part has found."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Location) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote."""
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return dict(arrays)
