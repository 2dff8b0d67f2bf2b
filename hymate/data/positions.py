"""How many events of a history lie before a time: counted here, or for many labels by processes of this machine."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from hymate.data.histories import Histories
from hymate.data.packing import blocks
from hymate.data.parts import run_parts
from hymate.machine import available_cpus
from hymate.storage.paths import Location

WORTH_EVENTS = 100_000_000  # take longer to read than another process takes to start
PARTS = 4  # of a process, for some histories are longer than others
Side = Literal["left", "right"]


def events_until(histories: Histories, position_E: np.ndarray, times: Sequence[tuple[np.ndarray, Side]]) -> np.ndarray:
    """How many events lie before each example's times ("left") or at them, too ("right"): int64, (len(times), E).

    position_E must be sorted. times: in each, int64 microseconds (E,).
    """
    starts = np.flatnonzero(np.diff(position_E, prepend=-1))
    num_events = int(histories.index.num_events_P[position_E[starts]].sum())
    workers = min(available_cpus(), 1 + num_events // WORTH_EVENTS)
    if workers == 1:
        return _count(histories, position_E, times)
    cuts = np.unique(starts[np.linspace(0, len(starts), PARTS * workers, endpoint=False).astype(np.int64)])
    parts = {f"{number:06d}": slice(*ends) for number, ends in enumerate(zip(cuts, [*cuts[1:], None], strict=True))}
    with tempfile.TemporaryDirectory(prefix="hymate-") as name:
        folder = Path(name)
        for part, own in parts.items():
            np.savez(folder / f"{part}.npz", position_E=position_E[own], times=np.stack([t[own] for t, _ in times]))
        call = functools.partial(_count_part, data=histories.path, sides=[side for _, side in times], folder=folder)
        run_parts("find labels", call, list(parts), folder, "", workers, here=True)
        return np.concatenate([np.load(folder / f"{part}.npy") for part in parts], axis=1)


def _count_part(part: str, data: Location, sides: Sequence[Side], folder: Path) -> None:
    with np.load(folder / f"{part}.npz") as asked:
        times = list(zip(asked["times"], sides, strict=True))
        np.save(folder / f"{part}.npy", _count(Histories.open(data), asked["position_E"], times))


def _count(histories: Histories, position_E: np.ndarray, times: Sequence[tuple[np.ndarray, Side]]) -> np.ndarray:
    count_E = np.empty((len(times), len(position_E)), dtype=np.int64)
    start_H = np.flatnonzero(np.diff(position_E, prepend=-1))
    position_H, stop_H = position_E[start_H], np.append(start_H[1:], len(position_E))
    for block in blocks(histories.index.num_events_P[position_H]):
        for h, history in zip(block.tolist(), histories.read(position_H[block]), strict=True):
            own = slice(start_H[h], stop_H[h])
            for number, (time_E, side) in enumerate(times):
                count_E[number, own] = np.searchsorted(history.time, time_E[own], side=side)
    return count_E
