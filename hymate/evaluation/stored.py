"""Feature tables on disk, made in parts: by processes of this machine, or as tasks of a cluster.

A part is the examples of some subjects, and its table a file of float32, which is mapped and not read. So a table may
be larger than the memory. What is killed goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq

from hymate.data.examples import Examples
from hymate.data.features import FeatureConfig, FeatureSpec, FeatureTable, Rows, chosen, features, filled
from hymate.data.histories import Histories
from hymate.data.meds import write_parquet
from hymate.storage.paths import Location, atomic_path, local_copy, readable
from hymate.work import Journal, stages, worth

PART = 20_000  # labels whose columns are counted at a time
PART_CELLS = 16_000_000  # of a part's table: 64 MB
EVENT_BYTES = 16  # of a history


def chosen_in_parts(
    histories: Histories, train: Examples, config: FeatureConfig, folder: Location, here: bool
) -> FeatureSpec:
    """`hymate.data.features.choose`, in parts; `folder` keeps what is done until the columns are known."""
    parts = train.in_parts(PART)
    windows_hours = config.windows(train)
    call = functools.partial(_count, data=histories.path, windows_hours=windows_hours, folder=folder / "columns")
    _run("columns", call, histories, parts, json.dumps(asdict(config)), folder / "columns", here)
    counted = (np.load(io.BytesIO((folder / "columns" / f"{part}.npy").read_bytes())) for part in parts)
    filled_2WV = functools.reduce(np.add, counted)
    return chosen(histories.codes, filled_2WV, len(train), windows_hours, config)


@contextmanager
def stored_tables(
    histories: Histories, examples: Mapping[str, Examples], spec: FeatureSpec, folder: Location, here: bool
) -> Iterator[dict[str, FeatureTable]]:
    """`hymate.data.features.features` of each split, in files in `folder`; those of a URL are copied here."""
    about = max(1, PART_CELLS // len(spec.columns))
    parts = {
        f"{split}-{name}": part
        for split, of_split in examples.items()
        for name, part in of_split.in_parts(about).items()
    }
    folder = folder / "tables"
    call = functools.partial(_compute, data=histories.path, spec=spec, folder=folder)
    _run("features", call, histories, parts, repr(spec), folder, here, 4 * len(spec.columns))
    with local_copy(folder) as local:
        mapped = {part: np.load(local / f"{part}.npy", mmap_mode="r") for part in parts}
        of_split = {split: [mapped[part] for part in parts if part.startswith(f"{split}-")] for split in examples}
        yield {split: FeatureTable(spec, examples[split], Rows.of(of_split[split])) for split in examples}


def _run(
    stage: str,
    call: Callable[[str], None],
    histories: Histories,
    parts: Mapping[str, Examples],
    made_of: str,
    folder: Location,
    here: bool,
    bytes_a_label: int = 0,
) -> None:
    """Call it for every part, whose examples it finds in `folder`."""
    _histories.cache_clear()  # an earlier call in this process may have found something else in the same place
    digests = " ".join(f"{part} {examples.digest()}" for part, examples in parts.items())
    fingerprint = hashlib.sha256(f"{histories.fingerprint} {made_of} {digests}".encode()).hexdigest()
    journal = Journal(folder / "journal.jsonl", fingerprint)
    num_bytes = 0
    for part, examples in parts.items():
        write_parquet(examples.table(), folder / f"{part}.parquet")
        position_H = np.unique(examples.position_E)
        num_bytes += EVENT_BYTES * int(histories.index.num_events_P[position_H].sum()) + bytes_a_label * len(examples)
    workers = min(worth(num_bytes), len(parts))
    with stages(list(parts), journal, workers, here, quiet=not sys.stderr.isatty()) as run:
        run.each(stage, call)


def _count(part: str, data: Location, windows_hours: tuple[float, ...], folder: Location) -> None:
    _save(filled(_histories(data), _examples(part, folder), windows_hours), folder / f"{part}.npy")


def _compute(part: str, data: Location, spec: FeatureSpec, folder: Location) -> None:
    table = features(_histories(data), _examples(part, folder), spec)
    assert isinstance(table.value_EX, np.ndarray)
    _save(table.value_EX, folder / f"{part}.npy")


@functools.lru_cache(maxsize=1)
def _histories(data: Location) -> Histories:
    return Histories.open(data)


def _examples(part: str, folder: Location) -> Examples:
    return Examples.of_table(pq.read_table(readable(folder / f"{part}.parquet")))


def _save(array: np.ndarray, path: Location) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)
