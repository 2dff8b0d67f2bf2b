"""Events -> vectors: code + value + time, the paper's triplet, plain or with our additions.

Shape legend: L events, or static events; D d_model; K time periods.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_PERIODS_HOURS = (2.0, 6.0, 24.0, 72.0, 168.0, 720.0, 2160.0, 8766.0)
NO_VALUE, HIDDEN_VALUE = 0, 1


class EventEmbedding(nn.Module, ABC):
    """e = code + value + time, one vector for each event. A missing and a hidden value each have their own vector."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.code = nn.Embedding(vocab_size, d_model)
        self.no_value = nn.Embedding(2, d_model)
        nn.init.normal_(self.code.weight, std=0.5)
        nn.init.normal_(self.no_value.weight, std=0.5)

    def forward(
        self,
        code_L: Tensor,
        value_L: Tensor,
        quantile_L: Tensor,
        hidden_L: Tensor | None = None,
        time_hours_L: Tensor | None = None,
        gap_hours_L: Tensor | None = None,
    ) -> Tensor:
        """(L,) ids, normalised values, ranks, value-hidden flags and times -> (L, D); static events have no time."""
        code_LD = self.code(code_L)
        absent_L, kind_L = torch.isnan(value_L), torch.full_like(code_L, NO_VALUE)
        if hidden_L is not None:
            absent_L, kind_L = absent_L | hidden_L, torch.where(hidden_L, HIDDEN_VALUE, kind_L)
        value_LD = self._value(code_LD, torch.nan_to_num(value_L), torch.nan_to_num(quantile_L))
        event_LD = code_LD + torch.where(absent_L[:, None], self.no_value(kind_L), value_LD)
        if time_hours_L is not None and gap_hours_L is not None:
            event_LD = event_LD + self._time(time_hours_L, gap_hours_L)
        return event_LD

    @abstractmethod
    def _value(self, code_LD: Tensor, z_L: Tensor, rank_L: Tensor) -> Tensor:
        """Embedded codes, values and ranks, 0 where there are none -> (L, D)."""

    @abstractmethod
    def _time(self, time_hours_L: Tensor, gap_hours_L: Tensor) -> Tensor:
        """Hours since the window began, and since the event before -> (L, D)."""


class ModulatedEmbedding(EventEmbedding):
    """A small network encodes the value, and the code shifts and scales each of its channels (FiLM, Perez et al. 2018),
    because what a value means depends on the code. Time enters as log-scaled hours since the window began and since the
    event before, and as phases of daily to yearly cycles.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__(vocab_size, d_model)
        self.value_in = nn.Linear(4, d_model)
        self.value_code = nn.Linear(d_model, 2 * d_model, bias=False)
        self.value_out = nn.Linear(d_model, d_model)
        self.time_in = nn.Linear(2 + 2 * len(TIME_PERIODS_HOURS), d_model)
        self.time_out = nn.Linear(d_model, d_model)
        self.frequency_K: Tensor
        self.register_buffer("frequency_K", 2 * math.pi / torch.tensor(TIME_PERIODS_HOURS), persistent=False)

    def _value(self, code_LD: Tensor, z_L: Tensor, rank_L: Tensor) -> Tensor:
        features = torch.stack([torch.asinh(z_L), z_L.clamp(-3, 3), rank_L, rank_L.square()], dim=-1)
        shift_LD, scale_LD = self.value_code(code_LD).chunk(2, dim=-1)
        return self.value_out(F.gelu(self.value_in(features) + shift_LD) * (1 + scale_LD))

    def _time(self, time_hours_L: Tensor, gap_hours_L: Tensor) -> Tensor:
        phase_LK = time_hours_L[:, None] * self.frequency_K
        logs = torch.stack([torch.log1p(time_hours_L), torch.log1p(gap_hours_L)], dim=-1)
        features = torch.cat([logs, phase_LK.sin(), phase_LK.cos()], dim=-1)
        return self.time_out(F.gelu(self.time_in(features)))


class PlainEmbedding(EventEmbedding):
    """The paper's: a network of the value and a network of the time, the same for all codes. Each has one input, a
    hidden layer of sqrt(D) cells with tanh, and D outputs (STraTS, arXiv 2107.14293).
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__(vocab_size, d_model)
        self.value, self.time = (
            nn.Sequential(nn.Linear(1, math.isqrt(d_model)), nn.Tanh(), nn.Linear(math.isqrt(d_model), d_model))
            for _ in range(2)
        )

    def _value(self, code_LD: Tensor, z_L: Tensor, rank_L: Tensor) -> Tensor:
        return self.value(z_L[:, None])

    def _time(self, time_hours_L: Tensor, gap_hours_L: Tensor) -> Tensor:
        return self.time(time_hours_L[:, None] / 24)


EMBEDDINGS: dict[str, type[ModulatedEmbedding | PlainEmbedding]] = {
    "modulated": ModulatedEmbedding,
    "plain": PlainEmbedding,
}
