"""Explaining in parts: processes of this machine, or tasks of a cluster, each have some of the predictions.

A part reads its histories where they are: in a prepared dataset, or in what was kept of a MEDS folder's shards, the
events of the subjects that are explained.

Shape legend: that of `hymate.evaluation.attribution`; R removed variables.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.meds import DATA_SCHEMA, iter_events, write_parquet
from hymate.data.parts import load_arrays, read_input, run_parts, save_arrays
from hymate.evaluation.attribution import Attribution, Case, Explainer, deletion_and_insertion
from hymate.inference.bundle import read_bundle
from hymate.inference.dataset import Request, is_prepared, open_for
from hymate.inference.predictions import RISK
from hymate.storage.paths import Location, files_below, locate, readable, remove_tree
from hymate.work import worth

PART = 16  # predictions, each of which costs hundreds of passes
WORTH_PARTS = 4  # take longer than another process takes to start
REMOVED = 40  # variables whose removal is scored, those with the largest attributions; each costs a pass
FOUND = "-attributions"
ORDERS = ("attribution", "size", "attention", "random")  # in which events are deleted and inserted


@dataclass(frozen=True)
class Measured:
    """What is known of N cases. change_NR: the logit less that without each of the `removed` variables (code ids of the
    dataset), NaN where a case does not have it. moved: by order, the logits of `deletion_and_insertion`, (2, G, N).
    """

    attributions: list[Attribution]
    removed: list[int]
    change_NR: np.ndarray
    moved: dict[str, np.ndarray]


@contextmanager
def work_beside(out: Location) -> Iterator[Location]:
    """A folder for the parts of what will be in `out`; it goes with the block, but for a kill."""
    folder = out.parent / f".{out.name}.parts"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # patient data
    try:
        yield folder
    except Exception:
        remove_tree(folder)
        raise
    remove_tree(folder)


class Spread:
    """Explains those of all `predictions` (a table with subject_id and prediction_time) of a request whose rows are
    `chosen`, in the folder `work` and in so many processes at most.
    """

    def __init__(
        self, request: Request, predictions: pa.Table, chosen: np.ndarray, work: Location, workers: int
    ) -> None:
        self._request, self._work, self._workers = request, work, workers
        _explainer.cache_clear()
        asked = predictions.select(["subject_id", "prediction_time"]).take(chosen)
        # the risks differ where the model does, or what it read
        seen = [predictions[name].to_numpy().tobytes() for name in (*asked.column_names, RISK)]
        self._made_of = f"{hashlib.sha256(b''.join([*seen, chosen.tobytes()])).hexdigest()}{request.made_of}"
        if not is_prepared(request.data):
            files, folder = files_below(request.data / meds.data_subdirectory, ".parquet"), work / "shards"
            names = sorted(name.removesuffix(".parquet") for name in files)
            keep = functools.partial(_keep, request=request, subjects=asked["subject_id"].unique(), folder=folder)
            processes = min(workers, worth(sum(file.stat().st_size for file in files.values())))
            run_parts("read", keep, names, folder, self._made_of, processes)
        self.explainer = _explainer(*self._key)
        # what a case reads may depend on the subject's other predictions
        of_subjects = predictions.filter(pc.is_in(predictions["subject_id"], asked["subject_id"].unique()))
        histories = self.explainer.histories
        histories = histories.with_splits(dict.fromkeys(histories.splits, "all"))
        examples = labelled_examples(histories, of_subjects.select(asked.column_names), "all")
        keys = zip(examples.subject_id_E.tolist(), examples.prediction_time_E.tolist(), strict=True)
        place = {key: example for example, key in enumerate(keys)}
        time_us = asked["prediction_time"].cast(pa.timestamp("us")).cast(pa.int64())
        wanted = zip(asked["subject_id"].to_pylist(), time_us.to_pylist(), strict=True)
        self._places = self.explainer.places(examples, np.array([place[key] for key in wanted]))
        self.cases = self.explainer.cases_at(self._places)

    @property
    def _key(self) -> tuple[str, str, str, str, str]:
        request = self._request
        return str(request.bundle), str(request.data), request.task.name, request.device, str(self._work)

    def measured(self, first: int) -> Measured:
        """All that is known of the cases from `first` on."""
        cases, folder, into = self.cases[first:], self._work / "attributions", self._work / "removals"
        starts = range(0, len(cases), PART)
        parts = [f"{start // PART:06d}" for start in starts]
        inputs = {part: self._places.slice(first + at, PART) for part, at in zip(parts, starts, strict=True)}
        workers, gpus = min(self._workers, max(1, len(parts) // WORTH_PARTS)), self._request.device == "cuda"
        attribute = functools.partial(_attribute, key=self._key, folder=folder)
        run_parts("attributions", attribute, parts, folder, self._made_of, workers, inputs=inputs, gpus=gpus)
        attributions = [a for part in parts for a in _attributions(part, folder)]
        removed = most_important(self.explainer, cases, attributions)
        # the random order of all events is one sequence, of which each part takes its own
        before = np.cumsum([0, *(len(case.history) for case in cases)])
        skipped = {part: int(before[start]) for part, start in zip(parts, starts, strict=True)}
        move = functools.partial(_move, key=self._key, folder=folder, removed=removed, skipped=skipped, into=into)
        run_parts("removals", move, parts, into, f"{self._made_of} {removed}", workers, gpus=gpus)
        found = [load_arrays(into / f"{part}.npz") for part in parts]
        moved = {
            order: np.concatenate([of_part[order] for of_part in found], axis=2)
            for order in ORDERS
            if order in found[0]
        }
        return Measured(attributions, removed, np.concatenate([of_part["change"] for of_part in found]), moved)


def most_important(explainer: Explainer, cases: Sequence[Case], attributions: Sequence[Attribution]) -> list[int]:
    """The REMOVED variables with the largest attributions, and the birth, which has none."""
    size_C = np.zeros(len(explainer.histories.codes))
    for case, attribution in zip(cases, attributions, strict=True):
        size_C += np.abs(attribution.by_code(case, len(size_C)))
    removed = np.argsort(-size_C, kind="stable")[:REMOVED].tolist()
    return removed + ([] if explainer.birth_code is None else [explainer.birth_code])


def changes(explainer: Explainer, cases: Sequence[Case], removed: Sequence[int]) -> np.ndarray:
    """`Measured.change_NR`."""
    effects = [explainer.effects(case, removed) for case in cases]
    return np.array([[of_case.get(code, np.nan) for code in removed] for of_case in effects]).reshape(-1, len(removed))


def movements(
    explainer: Explainer, cases: Sequence[Case], attributions: Sequence[Attribution], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """`Measured.moved`; attention only where the model has any."""
    importance = {
        "attribution": [a.event_L for a in attributions],
        "size": [np.abs(a.event_L) for a in attributions],
        "attention": [a.attention_L for a in attributions if a.attention_L is not None],
        "random": [rng.random(len(a.event_L)) for a in attributions],
    }
    return {order: np.stack(deletion_and_insertion(explainer, cases, of)) for order, of in importance.items() if of}


# -------------------------------------------------------------------------------------------------------- a part


def _keep(shard: str, request: Request, subjects: pa.Array, folder: Location) -> None:
    """Keep the events of the subjects that are in a shard, their codes mapped."""
    path = request.data / meds.data_subdirectory / f"{shard}.parquet"
    columns = [name for name in pq.read_schema(readable(path)).names if name in DATA_SCHEMA.names]
    own = pq.read_table(readable(path), columns=columns, filters=pc.field("subject_id").isin(subjects))
    if len(own):
        own = request.codes.apply_to_table(own, path) if request.codes else own
        write_parquet(own, folder / f"{shard}.parquet")


@functools.lru_cache(maxsize=1)
def _explainer(bundle: str, data: str, task: str, device: str, work: str) -> Explainer:
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the other CPUs have parts of their own
    found = read_bundle(locate(bundle), kind="risk").for_task(task)
    if is_prepared(locate(data)):
        return Explainer(found, open_for(found, locate(data)), torch.device(device))
    code_ids: dict[str, int] = {}
    kept = files_below(locate(work) / "shards", ".parquet")
    pieces = [piece for shard in sorted(kept) for piece in iter_events(kept[shard], code_ids)]
    events = functools.reduce(lambda one, other: one.followed_by(other), pieces)
    return Explainer(found, Histories.of_events(events, code_ids, found.known), torch.device(device))


def _cases(part: str, key: tuple[str, str, str, str, str], folder: Location) -> tuple[Explainer, list[Case]]:
    explainer = _explainer(*key)
    return explainer, explainer.cases_at(read_input(part, folder))


def _attribute(part: str, key: tuple[str, str, str, str, str], folder: Location) -> None:
    explainer, cases = _cases(part, key, folder)
    found = explainer.attributions(cases)
    columns = {spec.name: [getattr(attribution, spec.name) for attribution in found] for spec in fields(Attribution)}
    write_parquet(pa.table(columns), folder / f"{part}{FOUND}.parquet")


def _attributions(part: str, folder: Location) -> list[Attribution]:
    """What `_attribute` wrote."""
    rows = (row.values() for row in read_input(f"{part}{FOUND}", folder).to_pylist())
    cases: list[list[Any]] = [[np.array(x) if isinstance(x, list) else x for x in row] for row in rows]
    return [Attribution(*case) for case in cases]


def _move(
    part: str,
    key: tuple[str, str, str, str, str],
    folder: Location,
    removed: Sequence[int],
    skipped: dict[str, int],
    into: Location,
) -> None:
    explainer, cases = _cases(part, key, folder)
    bits = np.random.PCG64(0)
    bits.advance(skipped[part])
    moved = movements(explainer, cases, _attributions(part, folder), np.random.Generator(bits))
    save_arrays(into / f"{part}.npz", change=changes(explainer, cases, removed), **moved)
