"""What moved a prediction: integrated gradients over the events, real removal, and how faithful an order of events is.

Attribution. Integrated gradients (Sundararajan et al. 2017) over the event embeddings and, where the pooling is over
variables, over what it knows of each of them, which its events share. The baseline of an event is an event of an
unknown code without a value at the same time: the model then only knows that something was recorded.
(Zero is no baseline here: the blocks normalise their inputs, so that a small embedding acts as a whole one and the path
jumps at its start.) An event's attribution is in units of the logit, positive where it raised the
risk; all of a prediction's, static events included, sum to its logit less that of the baseline. Age, the time since
the last event and the number of events are the same at both ends. The cost is that of NUM_STEPS training steps.

Removal. A variable's effect is the logit less the logit of the same history without it, scored as `predict` would
score it: shorter, with its times and its count of events changed. Such a history may be unlike any of the training's.

Faithfulness. Events are deleted, or alone inserted, in an order of importance, and the shortened history is scored
(Petsiuk et al. 2018; the mean over growing fractions is Samek et al. 2017's area over the perturbation curve).

Shape legend, besides that of `hymate.model.batch`: N cases, G fractions of events; L and F are one case's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import meds
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from hymate.data.examples import Examples
from hymate.data.histories import Histories, History
from hymate.data.loader import packed_row
from hymate.data.meds import is_code
from hymate.data.packing import pack, window_starts
from hymate.errors import UserError
from hymate.inference.bundle import Bundle, build_model
from hymate.model.batch import UNKNOWN_ID, Batch, Variables
from hymate.model.encoder import RiskModel
from hymate.model.segments import segment_count

NUM_STEPS = 32  # points of the Gauss-Legendre rule; measured gaps are in tests/benchmarks/RESULTS.md
FRACTIONS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)  # of a history's events; at least one is deleted, one is left


@dataclass(frozen=True)
class Case:
    """What a prediction is made from: a history cut to the events that the model reads, and the prediction time."""

    history: History
    time_us: int


@dataclass(frozen=True)
class Attribution:
    """A prediction taken apart.

    logit, baseline: of the history, and of the same with nothing known of its events.
    event_L, static_F: float64, each event's part of their difference.
    attention_L: float64, the mean over the queries of the pooling's attention; None where the model pools otherwise.
    """

    logit: float
    baseline: float
    event_L: np.ndarray
    static_F: np.ndarray
    attention_L: np.ndarray | None

    def by_code(self, case: Case, num_codes: int) -> np.ndarray:
        """The sum over each code's events of the case, float64 (num_codes,)."""
        code = np.concatenate([case.history.static_code, case.history.code])
        return np.bincount(code, np.append(self.static_F, self.event_L), minlength=num_codes)

    @property
    def gap(self) -> float:
        """By how much the parts miss the difference: the error of the integral."""
        return float(self.event_L.sum() + self.static_F.sum()) - (self.logit - self.baseline)


class Explainer:
    """A bundle's model, asked about cases of one dataset. Results do not depend on which cases are asked together.

    birth_code: the dataset's code id of the birth (the first one's where there are several), None where it has none.
    """

    def __init__(self, bundle: Bundle, histories: Histories, device: torch.device) -> None:
        check_explainable(bundle)
        self.model = build_model(bundle).to(device).requires_grad_(False)
        self.device = device
        self.histories = histories
        self._bundle = bundle
        self._id_of_code = bundle.vocabulary.ids_of(histories.codes).astype(np.int64)
        births = (id for id, code in enumerate(histories.codes) if is_code(code, meds.birth_code))
        self.birth_code = next(births, None)

    def cases(self, examples: Examples, chosen: np.ndarray) -> list[Case]:
        """The cases of the `chosen` examples (int64), in that order: what predicting all of them reads."""
        return self.cases_at(self.places(examples, chosen))

    def places(self, examples: Examples, chosen: np.ndarray) -> pa.Table:
        """Where the cases of the `chosen` examples are: subject_id, time_us, and the events from start to stop."""
        context = self._bundle.data.context
        start_E = np.maximum(examples.stop_E.astype(np.int64) - context, 0)
        if not self._bundle.model.sees_ahead:
            start_E = window_starts(np.asarray(examples.position_E), examples.stop_E, context)
        columns = {
            "subject_id": examples.subject_id_E,
            "time_us": examples.prediction_time_E,
            "start": start_E,
            "stop": examples.stop_E,
        }
        return pa.table({name: column[chosen] for name, column in columns.items()})

    def cases_at(self, places: pa.Table) -> list[Case]:
        """The cases at `places`, in their order."""
        return [self._case(**place) for place in places.to_pylist()]

    def _case(self, subject_id: int, time_us: int, start: int, stop: int) -> Case:
        (history,) = self.histories.read(self.histories.index.find(np.array([subject_id])))
        seen = history.keep(slice(start, stop))
        # a view would keep the whole row group that it was read with
        own: dict[str, Any] = {
            name: array.copy() for name, array in vars(seen).items() if isinstance(array, np.ndarray)
        }
        return Case(replace(seen, **own), time_us)

    def logits(self, cases: Sequence[Case]) -> np.ndarray:
        """The model's logits, float64 (N,)."""
        logit_N = np.empty(len(cases))
        with torch.no_grad():
            for members, row in self.rows(cases):
                logit_N[members] = _logit(self.model, self.model.patient(row)[0]).double().cpu().numpy()
        return logit_N

    def attributions(self, cases: Sequence[Case]) -> list[Attribution]:
        """Integrated gradients and attention of each case."""
        found: dict[int, Attribution] = {}
        for members, row in self.rows(cases):
            found |= dict(zip(members.tolist(), integrated_gradients(self.model, row), strict=True))
        return [found[case] for case in range(len(cases))]

    def variables(self, case: Case) -> list[int]:
        """The dataset's code ids of all that a case has: its events, static ones too, and the birth (its age)."""
        codes = np.union1d(case.history.code, case.history.static_code).tolist()
        born = case.history.birth_time is not None and self.birth_code is not None
        return codes + ([self.birth_code] if born else [])

    def effects(self, case: Case, codes: Iterable[int]) -> dict[int, float]:
        """Code id -> the logit less that without the variable, for those of `codes` that the case has.

        A variable that is all there is has no effect that could be measured, and is left out.
        """
        shortened = {code: self.without(case, code) for code in set(codes).intersection(self.variables(case))}
        scored = {code: rest for code, rest in shortened.items() if len(rest.history)}
        logit, *logits = self.logits([case, *scored.values()]).tolist()
        return {code: logit - rest for code, rest in zip(scored, logits, strict=True)}

    def without(self, case: Case, code: int) -> Case:
        """The case as it were if a variable had never been recorded."""
        history = case.history.keep(case.history.code != code)
        static = history.static_code != code
        history = replace(history, static_code=history.static_code[static], static_value=history.static_value[static])
        return replace(case, history=replace(history, birth_time=None) if code == self.birth_code else history)

    def rows(self, cases: Sequence[Case]) -> Iterator[tuple[np.ndarray, Batch]]:
        """Packed rows and which cases are in them, in the order of their segments."""
        lengths = np.array([len(case.history) for case in cases])
        for members in pack(lengths, self._bundle.data.tokens_per_row):
            end_S = np.array([cases[i].time_us for i in members])
            windows = [cases[i].history for i in members]
            row = packed_row(windows, end_S, self._bundle.vocabulary, self._id_of_code)
            yield members, self.model.ask(row).to(self.device)


def check_explainable(bundle: Bundle) -> None:
    """Raises UserError where the risk is not the network's alone."""
    if bundle.plain:
        raise UserError(
            "the bundle's risk is the mean of a network and plain models, and only a network can be explained: tune "
            "with report.ensemble=false, and explain that bundle"
        )


def event_table(codes: Sequence[str], case: Case, attribution: Attribution) -> pa.Table:
    """A case's events in their order, after its static ones, which have neither time nor attention.

    Columns: subject_id, prediction_time, time, code, numeric_value, attention, attribution.
    """
    history = case.history
    static, size = len(history.static_code), len(history.static_code) + len(history)
    is_static = np.arange(size) < static
    value = np.concatenate([history.static_value, history.value])
    without = attribution.attention_L is None
    attention_L = np.zeros(len(history)) if attribution.attention_L is None else attribution.attention_L
    time_us = np.concatenate([np.zeros(static, np.int64), history.time])
    return pa.table(
        {
            "subject_id": pa.array(np.full(size, history.subject_id), pa.int64()),
            "prediction_time": pa.array(np.full(size, case.time_us), pa.timestamp("us")),
            "time": pa.array(time_us, pa.timestamp("us"), mask=is_static),
            "code": pa.array([codes[code] for code in [*history.static_code, *history.code]], pa.string()),
            "numeric_value": pa.array(value, pa.float32(), mask=np.isnan(value)),
            "attention": pa.array(np.append(np.zeros(static), attention_L), pa.float64(), mask=is_static | without),
            "attribution": pa.array(np.concatenate([attribution.static_F, attribution.event_L]), pa.float64()),
        }
    )


# ---------------------------------------------------------------------------------------- integrated gradients


def integrated_gradients(model: RiskModel, row: Batch, num_steps: int = NUM_STEPS) -> list[Attribution]:
    """The attributions of each segment of a row, S of them; see the module's text."""
    row = model.ask(row)
    node_G, weight_G = np.polynomial.legendre.leggauss(num_steps)
    parts: dict[str, Tensor] = {}
    for node, weight in zip(((node_G + 1) / 2).tolist(), (weight_G / 2).tolist(), strict=True):
        logit_S, points, ways = _logits_on_the_way(model, row, node)
        # segments are independent: each gets its own gradient
        gradients = torch.autograd.grad(logit_S.sum(), list(points.values()))
        for name, gradient_ND in zip(points, gradients, strict=True):
            change_N = (gradient_ND * ways[name]).flatten(1).sum(dim=1)
            parts[name] = parts.get(name, 0.0) + weight * change_N.double()
    with torch.no_grad():
        baseline_S, *_ = _logits_on_the_way(model, row, 0.0)
        patient_AME, weight_LQ = model.patient(row)
        logit_S = _logit(model, patient_AME)
    if "variables" in parts:
        assert isinstance(row.variables, Variables)
        variable_L = row.variables.variable_L
        count_G = segment_count(variable_L, len(row.variables.key_G))
        parts["events"] = parts["events"] + (parts["variables"] / count_G)[variable_L]
    static_lengths = torch.bincount(row.static_segment_F.cpu(), minlength=row.num_segments).tolist()
    attention: list[np.ndarray | None] = [None] * row.num_segments
    if weight_LQ is not None:
        attention = list(_split(weight_LQ.double().mean(dim=1), row.lengths))
    of_events, of_static = _split(parts["events"], row.lengths), _split(parts["static"], static_lengths)
    found = zip(logit_S.tolist(), baseline_S.tolist(), of_events, of_static, attention, strict=True)
    return [Attribution(*of_segment) for of_segment in found]


def _split(x_N: Tensor, lengths: list[int]) -> list[np.ndarray]:
    return [part.numpy() for part in x_N.cpu().split(lengths)]


def _logits_on_the_way(
    model: RiskModel, row: Batch, fraction: float
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits (S,) with all embeddings at a fraction of their way from the baseline; where they are, and their ways.

    These of the "events" (L, D), of the "static" events (F, D), and where the pooling is over variables of what it is
    known of the "variables" (G, M, D), whose baseline is an unknown code with no event.
    """
    points: dict[str, Tensor] = {}
    ways: dict[str, Tensor] = {}

    def moved(name: str, start_ND: Tensor, end_ND: Tensor) -> Tensor:
        ways[name] = (end_ND - start_ND).detach()
        points[name] = (start_ND + fraction * ways[name]).detach().requires_grad_(torch.is_grad_enabled())
        return points[name]

    def move_events(embedding: nn.Module, inputs: tuple[Tensor, ...], end_ND: Tensor) -> Tensor:
        code_N, value_N, _, *rest = inputs
        no_value_N = torch.full_like(value_N, torch.nan)
        start_ND = embedding.forward(torch.full_like(code_N, UNKNOWN_ID), no_value_N, no_value_N, *rest)
        return moved("static" if "events" in points else "events", start_ND, end_ND)

    def move_variables(vectors: nn.Module, inputs: tuple[Tensor, ...], end_GMD: Tensor) -> Tensor:
        code_GD, features_GX = inputs
        unknown_GD = model.backbone.embedding.code.weight[UNKNOWN_ID].expand_as(code_GD)
        return moved("variables", vectors.forward(unknown_GD, torch.zeros_like(features_GX)), end_GMD)

    hooks = [model.backbone.embedding.register_forward_hook(move_events)]
    if model.pooling.variables is not None:
        hooks.append(model.pooling.variables.vectors.register_forward_hook(move_variables))
    try:
        patient_AME, _ = model.patient(row)
        return _logit(model, patient_AME), points, ways
    finally:
        for hook in hooks:
            hook.remove()


def _logit(model: RiskModel, patient_AME: Tensor) -> Tensor:
    """(S,) of the model's only task."""
    return model.outputs(patient_AME)[0][:, 0]


# ------------------------------------------------------------------------------------------------ faithfulness


def deletion_and_insertion(
    explainer: Explainer, cases: Sequence[Case], importance: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (G, N) of each case without the most important fraction of its events, and of that fraction alone.

    importance: (L,) of each case, the largest first. G goes over FRACTIONS. A history of one event is never shortened.
    """
    order = [np.argsort(-of_case, kind="stable") for of_case in importance]
    deleted_GN, inserted_GN = np.empty((2, len(FRACTIONS), len(cases)))
    for g, fraction in enumerate(FRACTIONS):
        for logit_GN, insert in ((deleted_GN, False), (inserted_GN, True)):
            shortened = []
            for case, first in zip(cases, order, strict=True):
                L = len(first)
                count = max(1, round(fraction * L))
                if not insert:
                    count = min(count, L - 1)
                kept_L = np.full(L, not insert)
                kept_L[first[:count]] = insert
                shortened.append(replace(case, history=case.history.keep(kept_L)))
            logit_GN[g] = explainer.logits(shortened)
    return deleted_GN, inserted_GN
