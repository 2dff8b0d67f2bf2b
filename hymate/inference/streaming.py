"""Histories of any length, scored as they grow: a state of bounded size stands for all events so far.

A whole history in one pass and the same history in pieces give the same logits but for rounding. What is held in
memory depends on the piece and on the model's window, not on the history; the cost of more events depends on their
number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hymate.config import ModelConfig
from hymate.data.histories import History, ages
from hymate.data.loader import ratio
from hymate.data.meds import US_PER_HOUR
from hymate.data.vocabulary import Vocabulary
from hymate.errors import UserError
from hymate.model.batch import Batch, Variables
from hymate.model.encoder import BlockState, RiskModel
from hymate.model.moments import Moments, moments_of_answers
from hymate.model.variables import VariableSums

CHUNK_EVENTS = 2048  # as fast as larger ones, at less memory
EVENT = np.dtype([("time_us", "<i8"), ("id", "<i4"), ("value", "<f4")])
NO_VALUE = np.float32(np.nan)  # one bit pattern, for events are also hashed
NO_EVENTS = np.empty(0, EVENT)
NOTHING = torch.empty(0)


@dataclass(frozen=True)
class PatientState:
    """What the model keeps of a patient's events so far. It is never changed: more events make a new one."""

    blocks: tuple[BlockState, ...]
    pooled: Moments | VariableSums
    num_events: int
    first_time_us: int
    last_time_us: int


def check_streamable(config: ModelConfig) -> None:
    """Raises UserError where no state of bounded size can stand for the events so far."""
    if config.sees_ahead:
        raise UserError(
            "a model that reads histories in both directions (model.bidirectional=true or model.causal=false) cannot "
            "go on from a state: use context=bundle, or train with model.bidirectional=false and model.causal=true"
        )
    if "A" in config.layers and config.window == 0:
        raise UserError(
            "a model that attends to whole histories (model.window=0) has no state of bounded size: use "
            "context=bundle, or train with a model.window"
        )


class StreamingModel:
    """A risk model that reads each patient's history in pieces of any size.

    model: in evaluation mode. codes: what History.code refers to (`Histories.codes`).
    Raises UserError where `check_streamable` does.
    """

    def __init__(
        self, model: RiskModel, vocabulary: Vocabulary, codes: Sequence[str], chunk_events: int = CHUNK_EVENTS
    ) -> None:
        check_streamable(model.backbone.config)
        assert not model.training and chunk_events > 0
        self._model, self._vocabulary, self._chunk_events = model, vocabulary, chunk_events
        self._id_of_code = vocabulary.ids_of(codes)
        self._like = next(model.parameters())

    def events(self, history: History) -> np.ndarray:
        """A history's events as the model knows them: EVENT (L,) of time, model id and raw value (NaN where none)."""
        events_L = np.empty(len(history), EVENT)
        events_L["time_us"], events_L["id"] = history.time, self._id_of_code[history.code]
        events_L["value"] = np.where(np.isnan(history.value), NO_VALUE, history.value)
        return events_L

    def append(self, state: PatientState | None, events_L: np.ndarray) -> PatientState:
        """The state after more events; `state` is None at a patient's first, of which there must be one.

        Their times are those at which they became known, by the rules of the model's bundle (`hymate.data.known`).
        Raises UserError where they are not in the order of their times.
        """
        time_L = events_L["time_us"]
        if (np.diff(time_L, prepend=state.last_time_us if state else time_L[0]) < 0).any():
            raise UserError("events must be appended in the order of their times")
        with torch.no_grad():
            for start in range(0, len(events_L), self._chunk_events):
                state = self._append_chunk(state, events_L[start : start + self._chunk_events])
        assert state is not None
        return state

    def outputs(self, state: PatientState, history: History, prediction_time_us: int) -> tuple[np.ndarray, np.ndarray]:
        """Each task's logit and log(1 + days) (T,) at a time, after the events in `state`, as `RiskModel.outputs` has
        them; `history` gives static events and birth.

        Raises UserError where the time lies before those events.
        """
        if prediction_time_us < state.last_time_us:
            raise UserError("a prediction time must not lie before the events that it is predicted from")
        static_F = np.zeros(len(history.static_code), EVENT)
        static_F["id"], static_F["value"] = self._id_of_code[history.static_code], history.static_value
        end_S = np.array([prediction_time_us])
        batch = self._batch(
            static_F=static_F,
            age_years_A=torch.from_numpy(ages([history.birth_time], end_S)),
            lag_hours_A=ratio(end_S - state.last_time_us, US_PER_HOUR),
        )
        count_S = torch.full((1,), float(state.num_events), device=self._like.device)
        hours_S = ratio(end_S - state.first_time_us, US_PER_HOUR).to(self._like.device)
        embedding = self._model.backbone.embedding
        with torch.no_grad():
            pooled = self._pooled(state.pooled, batch.lag_hours_A).to(self._like.dtype)
            patient_AME = self._model.pooling.join(pooled, count_S, hours_S, batch, embedding)
            logit_AT, log_days_AT = self._model.outputs(patient_AME)
        return logit_AT[0].cpu().numpy(), log_days_AT[0].cpu().numpy()

    def _append_chunk(self, state: PatientState | None, events_L: np.ndarray) -> PatientState:
        time_L = events_L["time_us"]
        first_time_us = state.first_time_us if state else int(time_L[0])
        batch = self._batch(
            events_L=events_L,
            time_hours_L=ratio(time_L - first_time_us, US_PER_HOUR),
            gap_hours_L=ratio(np.diff(time_L, prepend=state.last_time_us if state else time_L[0]), US_PER_HOUR),
        )
        h_LD, blocks = self._model.backbone.carry(batch, state.blocks if state else None)
        return PatientState(
            blocks=blocks,
            pooled=self._pool(state, h_LD, batch, time_L),
            num_events=(state.num_events if state else 0) + len(events_L),
            first_time_us=first_time_us,
            last_time_us=int(time_L[-1]),
        )

    def _pool(
        self, before: PatientState | None, h_LD: Tensor, batch: Batch, time_us_L: np.ndarray
    ) -> Moments | VariableSums:
        """What to keep of all events so far; see `_pooled`."""
        pooling = self._model.pooling
        kept = before.pooled if before else None
        if pooling.variables is not None:
            assert isinstance(batch.variables, Variables)
            sums = VariableSums.of(h_LD, batch, self._vocabulary.size)
            sums = sums.grouped(batch.variables.key_G, batch.variables.variable_L)
            if not isinstance(kept, VariableSums):
                return sums
            assert before is not None
            return kept.later((int(time_us_L[-1]) - before.last_time_us) / US_PER_HOUR) + sums
        if pooling.kind == "last":
            last_1QD = h_LD[-1:, None].double()
            none_1Q = last_1QD.new_zeros(1, 1)
            hours_1 = batch.time_hours_L[-1:].double()
            # tensors that share memory cannot be written
            return Moments(hours_1, none_1Q, none_1Q.clone(), none_1Q.clone(), last_1QD, torch.zeros_like(last_1QD))
        score_LQ = h_LD.new_zeros(len(h_LD), 1) if pooling.fusion is None else pooling.fusion.score(h_LD)
        rate_Q = (score_LQ[0] if pooling.fusion is None else pooling.fusion.rates(score_LQ)).double()
        new = moments_of_answers(h_LD.double(), score_LQ.double(), rate_Q, batch)
        goes_on_1 = torch.ones(1, dtype=torch.bool, device=h_LD.device)
        return new.after(kept, goes_on_1, rate_Q) if isinstance(kept, Moments) else new

    def _pooled(self, kept: Moments | VariableSums, lag_hours_A: Tensor) -> Tensor:
        """(1, M or 1, X) of what was kept."""
        pooling = self._model.pooling
        if isinstance(kept, VariableSums):
            assert pooling.variables is not None
            code_VD = self._model.backbone.embedding.code.weight
            return pooling.variables.pool(kept, [len(kept.key_R)], lag_hours_A, code_VD)[0]
        return kept.level_NQD if pooling.fusion is None else pooling.fusion.of_moments(kept)

    def _batch(
        self,
        events_L: np.ndarray = NO_EVENTS,
        static_F: np.ndarray = NO_EVENTS,
        time_hours_L: Tensor = NOTHING,
        gap_hours_L: Tensor = NOTHING,
        age_years_A: Tensor = NOTHING,
        lag_hours_A: Tensor = NOTHING,
    ) -> Batch:
        """One segment's events, or one patient's static part; in the model's dtype and on its device."""
        code_L, value_L, quantile_L = self._triplet(events_L)
        static_code_F, static_value_F, static_quantile_F = self._triplet(static_F)
        batch = Batch(
            code_L=code_L,
            value_L=value_L,
            quantile_L=quantile_L,
            time_hours_L=time_hours_L.to(self._like.dtype),
            gap_hours_L=gap_hours_L.to(self._like.dtype),
            segment_L=torch.zeros(len(events_L), dtype=torch.int32),
            cu_seqlens=[0, len(events_L)],
            bounds=torch.tensor([0, len(events_L)]),
            static_code_F=static_code_F,
            static_value_F=static_value_F,
            static_quantile_F=static_quantile_F,
            static_segment_F=torch.zeros(len(static_F), dtype=torch.int32),
            age_years_A=age_years_A,
            lag_hours_A=lag_hours_A,
            example_A=torch.zeros(1, dtype=torch.int64),
            label_AT=torch.empty(1, 0),
            days_AT=torch.empty(1, 0),
            label_weight_AT=torch.empty(1, 0),
            seed_S=torch.zeros(1, dtype=torch.int64),
        )
        if len(events_L) and self._model.pooling.variables is None:
            batch = replace(batch, last_A=batch.bounds[1:] - 1)  # as one of several answers
        return self._model.ask(batch).to(self._like.device)

    def _triplet(self, events_L: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, normalised values and ranks."""
        id_L = events_L["id"].astype(np.int64)
        z_L, quantile_L = self._vocabulary.normalise(id_L, events_L["value"])
        dtype = self._like.dtype
        return torch.from_numpy(id_L), torch.from_numpy(z_L).to(dtype), torch.from_numpy(quantile_L).to(dtype)
