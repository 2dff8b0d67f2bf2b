"""Predictions of a risk bundle for examples: the network's, or its mean with that of plain models.

Shape legend: E examples, T tasks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hymate.config import InTime
from hymate.data.examples import Examples
from hymate.data.feeding import fed
from hymate.data.histories import Histories
from hymate.data.loader import Rows
from hymate.data.meds import write_parquet
from hymate.inference.bundle import Bundle, build_model
from hymate.inference.predictions import day_table, incidence_table, prediction_table
from hymate.inference.states import States
from hymate.inference.streaming import StreamingModel
from hymate.model.batch import UNKNOWN_ID, Batch
from hymate.model.encoder import RiskModel
from hymate.storage.paths import Location


@dataclass(frozen=True)
class Outputs:
    """A model's predictions for E examples and T tasks; float32. log_days_ET: log(1 + days), NaN for tasks without.
    incidence_EX: of all tasks in time, one after the other, see `incidences`.
    """

    logit_ET: np.ndarray
    log_days_ET: np.ndarray
    incidence_EX: np.ndarray

    @classmethod
    def empty(cls, num_examples: int, num_tasks: int) -> Outputs:
        """To be filled, of tasks that are not in time."""
        shapes = (num_examples, num_tasks), (num_examples, num_tasks), (num_examples, 0)
        return cls(*(np.full(shape, np.nan, dtype=np.float32) for shape in shapes))

    @property
    def probability_ET(self) -> np.ndarray:
        return torch.sigmoid(torch.from_numpy(self.logit_ET)).numpy()

    @property
    def days_ET(self) -> np.ndarray:
        with np.errstate(over="ignore"):  # `check` raises
            return np.expm1(np.maximum(self.log_days_ET, 0))

    def only(self, task: int) -> Outputs:
        """Those for one task, by its number; it is not in time."""
        return Outputs(self.logit_ET[:, [task]], self.log_days_ET[:, [task]], self.incidence_EX[:, :0])

    def incidences(self, in_time: Mapping[str, InTime], task: str) -> np.ndarray:
        """Of one of the model's tasks `in_time`: (E, C, H), the event and the competing one by each horizon."""
        start = 0
        for name, asked in in_time.items():
            shape = asked.num_causes, len(asked.horizons_days)
            stop = start + math.prod(shape)
            if name == task:
                return self.incidence_EX[:, start:stop].reshape(-1, *shape)
            start = stop
        raise KeyError(task)

    def check(self) -> None:
        """Raises FloatingPointError when anything but finite numbers was predicted."""
        in_days_T = ~np.isnan(self.log_days_ET).all(axis=0)
        risks = self.logit_ET, self.incidence_EX, self.days_ET[:, in_days_T]
        if not all(np.isfinite(found).all() for found in risks):
            raise FloatingPointError("the model's predictions are not finite numbers: its training has diverged")


def score(model: RiskModel, rows: Rows, device: torch.device, rank: int = 0, world_size: int = 1) -> Outputs:
    """One pass over `rows`: predictions for each of its examples, which must have the model's tasks.

    Of several processes each scores its part of the rows and gets the predictions for all; collective.
    Raises FloatingPointError when the model gives anything but finite numbers.
    """

    def said(batch: Batch) -> tuple[Tensor, ...]:
        found = model(batch)
        return tuple(found[name].float() for name in ("logit_AT", "log_days_AT", "incidence_AX"))

    outputs = Outputs(*_of_examples(model, rows, device, said, rank, world_size))
    outputs.check()
    return outputs


def patient_vectors(model: RiskModel, rows: Rows, device: torch.device) -> np.ndarray:
    """What the model's heads see of each example of `rows`, the vectors of its members one after the other: float32,
    (E, X).
    """
    (vector_EX,) = _of_examples(model, rows, device, lambda batch: (model.patient(batch)[0].flatten(1).float(),))
    return vector_EX


def _of_examples(
    model: RiskModel,
    rows: Rows,
    device: torch.device,
    ask: Callable[[Batch], tuple[Tensor, ...]],
    rank: int = 0,
    world_size: int = 1,
) -> list[np.ndarray]:
    """What `ask` gives for each answer of a row, of each example of `rows`."""
    parts = []
    with torch.no_grad(), contextlib.closing(fed(rows.once(rank, world_size), device, model.ask)) as ready:
        for batch, counts in ready:
            answers = batch.example_A, *ask(batch)
            parts.append(answers if counts else tuple(answer[:0] for answer in answers))
    example_E, *found = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))  # the only wait
    if world_size > 1:
        of_ranks: list[Any] = [None] * world_size
        dist.all_gather_object(of_ranks, (example_E, *found))
        example_E, *found = (np.concatenate(arrays) for arrays in zip(*of_ranks, strict=True))
    order_E = np.argsort(example_E)
    return [of_examples[order_E] for of_examples in found]


def predict(bundle: Bundle, histories: Histories, examples: Examples, device: torch.device) -> Outputs:
    """Predictions for each example, which must have the bundle's tasks (see `Bundle.for_task`)."""
    return predict_last(build_model(bundle).to(device), bundle, histories, examples, device)[0]


def predict_last(
    model: RiskModel, bundle: Bundle, histories: Histories, examples: Examples, device: torch.device
) -> tuple[Outputs, int, int]:
    """As `predict`; also how many events were read, and how many of them unknown. model: the bundle's, on `device`."""
    rows = last_rows(bundle, histories, examples)
    outputs = _averaged(score(model, rows, device), bundle, histories, examples)
    return outputs, rows.events_read, rows.events_unknown


def _averaged(outputs: Outputs, bundle: Bundle, histories: Histories, examples: Examples) -> Outputs:
    """The network's outputs; where a task has plain models, too, its risks are the mean."""
    logit_ET = outputs.logit_ET.copy()
    with np.errstate(over="ignore", invalid="ignore"):  # `check` raises
        for task, plain in bundle.plain.items():
            number = bundle.tasks.index(task)
            logit_ET[:, number] = plain.mean(logit_ET[:, number], histories, examples)
    averaged = replace(outputs, logit_ET=logit_ET)
    averaged.check()
    return averaged


def last_rows(
    bundle: Bundle, histories: Histories, examples: Examples, seed: int = 0, early_fraction: float = 0.0
) -> Rows:
    """The rows that a bundle is fine-tuned on and predicts from: the last events up to each prediction time.

    seed, early_fraction: of training alone, see `Rows`.
    """
    return Rows(
        histories,
        bundle.vocabulary,
        examples,
        context=bundle.data.context,
        tokens_per_row=bundle.data.tokens_per_row,
        seed=seed,
        crop="last",
        early_fraction=early_fraction,
        together=not bundle.model.sees_ahead,
    )


def predict_whole(
    model: RiskModel,
    bundle: Bundle,
    histories: Histories,
    examples: Examples,
    device: torch.device,
    states: States | None = None,
) -> tuple[Outputs, int, int]:
    """As `predict`, from all events up to each example's time; also how many were read, and how many of them unknown.

    model: the bundle's, on `device`.

    Each history is read once, chunk by chunk, for all of its examples; it goes on from a state in `states` for
    the examples that lie after it, and leaves there its state after its last example. Raises as `score` does.
    """
    streaming = StreamingModel(model, bundle.vocabulary, histories.codes)
    outputs = Outputs.empty(len(examples), len(bundle.tasks))
    read = unknown = 0
    order_E = np.lexsort((examples.stop_E, examples.position_E))
    for own_E in np.split(order_E, np.flatnonzero(np.diff(examples.position_E[order_E])) + 1):
        (history,) = histories.read(examples.position_E[own_E[:1]])
        events_L = streaming.events(history)
        kept = states.load(history.subject_id, events_L, device) if states is not None else None
        state, start = None, 0
        for example in own_E.tolist():
            stop = int(examples.stop_E[example])
            if kept and start < kept.num_events <= stop:
                state, start = kept, kept.num_events
            state = streaming.append(state, events_L[start:stop])
            read, unknown = read + stop - start, unknown + int((events_L["id"][start:stop] == UNKNOWN_ID).sum())
            start = stop
            said = streaming.outputs(state, history, int(examples.prediction_time_E[example]))
            outputs.logit_ET[example], outputs.log_days_ET[example] = said
        Outputs(outputs.logit_ET[own_E], outputs.log_days_ET[own_E], outputs.incidence_EX[own_E]).check()
        if states is not None and state and (kept is None or kept.num_events < state.num_events):
            states.save(history.subject_id, state, events_L)
    return _averaged(outputs, bundle, histories, examples), read, unknown


def write_predictions(examples: Examples, outputs: Outputs, path: Location) -> None:
    """One task's predictions into `path` and, where it predicts days, these into a file beside it."""
    write_parquet(prediction_table(examples, outputs.probability_ET[:, 0]), path)
    if not np.isnan(outputs.log_days_ET).any():
        write_parquet(day_table(examples, outputs.days_ET[:, 0]), path.with_stem(f"{path.stem}-days"))


def write_incidences(examples: Examples, outputs: Outputs, asked: InTime, task: str, path: Location) -> None:
    """The predictions of one task in time into `path`, and by each horizon into a file beside it."""
    unknown = examples.without_labels()
    write_parquet(prediction_table(unknown, outputs.probability_ET[:, 0]), path)
    incidence_ECH = outputs.incidences({task: asked}, task)
    write_parquet(incidence_table(unknown, incidence_ECH, asked), path.with_stem(f"{path.stem}-incidence"))
