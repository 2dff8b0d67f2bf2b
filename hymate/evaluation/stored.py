"""Feature tables on disk, made in parts: by processes of this machine, or as tasks of a cluster.

A part is the examples of some subjects, and its table a file of float32, which is mapped and not read. So a table may
be larger than the memory. What is killed goes on where it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from hymate.data.examples import Examples
from hymate.data.features import FeatureConfig, FeatureSpec, FeatureTable, Rows, chosen, features, filled
from hymate.data.histories import Histories
from hymate.data.parts import load_arrays, open_histories, read_input, run_parts, save_arrays
from hymate.storage.paths import Location, atomic_path, local_copy
from hymate.work import worth

PART = 20_000  # labels whose columns are counted at a time
PART_CELLS = 16_000_000  # of a part's table: 64 MB
EVENT_BYTES = 16  # of a history


def chosen_in_parts(
    histories: Histories, train: Examples, config: FeatureConfig, folder: Location, here: bool
) -> FeatureSpec:
    """`hymate.data.features.choose`, in parts; `folder` keeps what is done."""
    parts, windows_hours = train.in_parts(PART), config.windows(train)
    folder = folder / "columns"
    call = functools.partial(_count, data=histories.path, windows_hours=windows_hours, folder=folder)
    _run("columns", call, histories, parts, repr(windows_hours), folder, here)
    filled_2WV = functools.reduce(np.add, (load_arrays(folder / f"{part}.npz")["filled"] for part in parts))
    return chosen(histories.codes, filled_2WV, len(train), windows_hours, config)


def store_tables(
    histories: Histories, examples: Mapping[str, Examples], spec: FeatureSpec, folder: Location, here: bool
) -> str:
    """`hymate.data.features.features` of each split, in files in `folder`; returns what they are made of."""
    about = max(1, PART_CELLS // len(spec.columns))
    parts = {
        f"{split}-{name}": part
        for split, of_split in examples.items()
        for name, part in of_split.in_parts(about).items()
    }
    folder = folder / "tables"
    call = functools.partial(_compute, data=histories.path, spec=spec, folder=folder)
    return _run("features", call, histories, parts, repr(spec), folder, here, 4 * len(spec.columns))


@contextmanager
def stored_tables(spec: FeatureSpec, folder: Location) -> Iterator[dict[str, FeatureTable]]:
    """What `store_tables` left, by split; what is at a URL is copied here."""
    with local_copy(folder / "tables") as local:
        of_split: dict[str, list[str]] = {}
        for path in sorted(local.glob("*.npy")):
            of_split.setdefault(path.stem.partition("-")[0], []).append(path.stem)
        yield {
            split: FeatureTable(
                spec,
                Examples.of_table(pa.concat_tables(read_input(part, local) for part in parts)),
                Rows.of([np.load(local / f"{part}.npy", mmap_mode="r") for part in parts]),
            )
            for split, parts in of_split.items()
        }


def _run(
    stage: str,
    call: Callable[[str], None],
    histories: Histories,
    parts: Mapping[str, Examples],
    made_of: str,
    folder: Location,
    here: bool,
    bytes_a_label: int = 0,
) -> str:
    """Call it for every part, whose examples it finds in `folder`; returns what the results are made of."""
    num_bytes = 0
    for examples in parts.values():
        made_of += f" {examples.digest()}"
        position_H = np.unique(examples.position_E)
        num_bytes += EVENT_BYTES * int(histories.index.num_events_P[position_H].sum()) + bytes_a_label * len(examples)
    inputs = {part: examples.table() for part, examples in parts.items()}
    workers = min(worth(num_bytes), len(parts))
    made_of = f"{histories.fingerprint} {made_of}"
    run_parts(stage, call, list(parts), folder, made_of, workers, inputs=inputs, here=here)
    return made_of


def _count(part: str, data: Location, windows_hours: tuple[float, ...], folder: Location) -> None:
    examples = Examples.of_table(read_input(part, folder))
    save_arrays(folder / f"{part}.npz", filled=filled(open_histories(data), examples, windows_hours))


def _compute(part: str, data: Location, spec: FeatureSpec, folder: Location) -> None:
    table = features(open_histories(data), Examples.of_table(read_input(part, folder)), spec)
    with atomic_path(folder / f"{part}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, table.value_EX[:])
