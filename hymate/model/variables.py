"""What is known of each variable of a history: sums over its events that can go on as events come.

Shape legend, besides that of `hymate.model.batch`:
    H  horizons    R  rows: events, or variables so far    X  several numbers of one kind    U  variables of segments
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hymate.model.batch import Batch, VariablesSoFar, ranges
from hymate.model.segments import segment_sum, wide

HORIZONS_HOURS = (8766.0, 168.0, 24.0, 4.0)  # a year to the last few events: how far pooling looks back


@dataclass(frozen=True)
class VariableSums:
    """What is known of each variable, as sums that can go on as events come; float64 but for the states.

    Times are hours from the event that they are seen from, in `of` the segment's last (not positive); z is asinh of
    the normalised value and rank its rank (`Batch.value_L`, `Batch.quantile_L`). Sums are over the variable's events,
    and over those with a value.

    key_R: int64, segment * vocabulary size + code; ascending once grouped.
    sum_RX: of the events 1; of the values 1, z, z**2, t, t**2, t z and rank.
    near_RH: sums over the events of exp(t / horizon).
    share_RH, shared_RH: sums over the values of exp((t - t of the last value) / horizon), and of that times z.
    least_RX, greatest_RX: of the events t; of the values t, z and rank; infinite without any.
    first_R, last_RX: z of the first value; z and rank of the last; 0 without any.
    state_RD, last_RD: the sum of the contextual states, and the last.
    """

    key_R: Tensor
    sum_RX: Tensor
    near_RH: Tensor
    share_RH: Tensor
    shared_RH: Tensor
    least_RX: Tensor
    greatest_RX: Tensor
    first_R: Tensor
    last_RX: Tensor
    state_RD: Tensor
    last_RD: Tensor

    @classmethod
    def of(cls, h_LD: Tensor, batch: Batch, vocab_size: int, last_L: Tensor | None = None) -> VariableSums:
        """Of a row's events, in their order; last_L: the event that each is seen from, if not its segment's last."""
        segment_L = batch.segment_L.long()
        last_L = batch.bounds[1:][segment_L] - 1 if last_L is None else last_L
        t_L = (batch.time_hours_L - batch.time_hours_L[last_L]).double()
        known_L = ~torch.isnan(batch.value_L)
        z_L, rank_L = (torch.nan_to_num(x_L).double() for x_L in (torch.asinh(batch.value_L), batch.quantile_L))
        known_t_L, one_L = t_L * known_L, torch.ones_like(t_L)
        sums = (one_L, known_L, z_L, z_L * z_L, known_t_L, known_t_L * t_L, t_L * z_L, rank_L)
        values_LX = torch.stack([t_L, z_L, rank_L], dim=1)
        near_LH = _in_horizons(t_L).exp()
        share_LH = known_L[:, None].expand_as(near_LH).double()
        least_LX, greatest_LX = (torch.where(known_L[:, None], values_LX, bound) for bound in (torch.inf, -torch.inf))
        return cls(
            key_R=segment_L * vocab_size + batch.code_L,
            sum_RX=torch.stack([x_L.double() for x_L in sums], dim=1),
            near_RH=near_LH,
            share_RH=share_LH,
            shared_RH=share_LH * z_L[:, None],
            least_RX=torch.cat([t_L[:, None], least_LX], dim=1),
            greatest_RX=torch.cat([t_L[:, None], greatest_LX], dim=1),
            first_R=z_L,
            last_RX=values_LX[:, 1:],
            state_RD=wide(h_LD),
            last_RD=wide(h_LD),
        )

    def grouped(self, key_G: Tensor, group_R: Tensor) -> VariableSums:
        """One row for each key, where the rows go; of equal keys, later rows are later events."""
        G, at_R = len(key_G), torch.arange(len(group_R), device=group_R.device)

        def extreme(x_RX: Tensor, which: str) -> Tensor:
            index = group_R.view(-1, *[1] * (x_RX.ndim - 1)).expand_as(x_RX)
            start = x_RX.new_zeros(G, *x_RX.shape[1:])
            return start.scatter_reduce(0, index, x_RX, which, include_self=False)

        valued_R = self.sum_RX[:, 1] > 0
        valued_G = extreme(valued_R.double(), "amax")
        last_G = extreme(torch.where(valued_R, at_R, 0), "amax")
        first_G = extreme(torch.where(valued_R, at_R, len(at_R) - 1), "amin")
        greatest_GX = extreme(self.greatest_RX, "amax")
        since_R = self.greatest_RX[:, 1] - greatest_GX[group_R, 1]  # NaN where there is no value at all
        fading_RH = torch.nan_to_num(_in_horizons(since_R), nan=0.0).exp()
        return VariableSums(
            key_R=key_G,
            sum_RX=segment_sum(self.sum_RX, group_R, G),
            near_RH=segment_sum(self.near_RH, group_R, G),
            share_RH=segment_sum(self.share_RH * fading_RH, group_R, G),
            shared_RH=segment_sum(self.shared_RH * fading_RH, group_R, G),
            least_RX=extreme(self.least_RX, "amin"),
            greatest_RX=greatest_GX,
            first_R=self.first_R[first_G] * valued_G,
            last_RX=self.last_RX[last_G] * valued_G[:, None],
            state_RD=segment_sum(self.state_RD, group_R, G),
            last_RD=self.last_RD[extreme(at_R, "amax")],
        )

    def later(self, hours: float | Tensor) -> VariableSums:
        """The same events seen from `hours` later: a number, or one for each row."""
        hours_R = self.near_RH.new_zeros(len(self.key_R)) + hours
        events, values, z, z2, t, t2, tz, rank = self.sum_RX.unbind(dim=1)
        moved = (t - hours_R * values, t2 - 2 * hours_R * t + hours_R**2 * values, tz - hours_R * z)
        ago_RX = F.pad(hours_R[:, None].expand(-1, 2), (0, 2))  # of times only
        return replace(
            self,
            sum_RX=torch.stack((events, values, z, z2, *moved, rank), dim=1),
            near_RH=self.near_RH * _in_horizons(-hours_R).exp(),
            least_RX=self.least_RX - ago_RX,
            greatest_RX=self.greatest_RX - ago_RX,
        )

    def at(self, index: Any) -> VariableSums:
        """Some of the rows."""
        return VariableSums(*(getattr(self, field.name)[index] for field in fields(self)))

    def then(self, other: VariableSums) -> VariableSums:
        """Row by row, of both's events, the other's being later; both are seen from the same time."""
        greatest_RX = torch.maximum(self.greatest_RX, other.greatest_RX)
        valued_R, other_valued_R = self.sum_RX[:, 1] > 0, other.sum_RX[:, 1] > 0
        fading = [
            torch.nan_to_num(_in_horizons(part.greatest_RX[:, 1] - greatest_RX[:, 1]), nan=0.0).exp()
            for part in (self, other)
        ]
        return VariableSums(
            key_R=self.key_R,
            sum_RX=self.sum_RX + other.sum_RX,
            near_RH=self.near_RH + other.near_RH,
            share_RH=self.share_RH * fading[0] + other.share_RH * fading[1],
            shared_RH=self.shared_RH * fading[0] + other.shared_RH * fading[1],
            least_RX=torch.minimum(self.least_RX, other.least_RX),
            greatest_RX=greatest_RX,
            first_R=self.first_R.where(valued_R, other.first_R),
            last_RX=other.last_RX.where(other_valued_R[:, None], self.last_RX),
            state_RD=self.state_RD + other.state_RD,
            last_RD=other.last_RD,
        )

    def running(self, hours_R: Tensor, most: int) -> VariableSums:
        """Of all rows of the same key up to each. They stand by key, then time, at most `most` of a key.

        hours_R: the times from which they are, and will be, seen; on one clock for a key.
        """
        sums, step = self, 1
        while step < most:
            at_N = torch.nonzero(self.key_R[step:] == self.key_R[:-step])[:, 0]
            next_N = at_N + step
            both = sums.at(at_N).later(hours_R[next_N] - hours_R[at_N]).then(sums.at(next_N))
            pairs = ((getattr(sums, field.name), getattr(both, field.name)) for field in fields(sums))
            sums = VariableSums(*(x.index_copy(0, next_N, new) for x, new in pairs))
            step *= 2
        return sums

    def __add__(self, other: VariableSums) -> VariableSums:
        """Of both's events, the other's being later; both are seen from the same time."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        both = VariableSums(*(torch.cat(pair) for pair in pairs))
        return both.grouped(*torch.unique(both.key_R, return_inverse=True))

    @property
    def states(self) -> Tensor:
        """The mean of the contextual states, and the last: (R, 2 * D)."""
        return torch.cat([self.state_RD / self.sum_RX[:, :1].to(self.state_RD.dtype), self.last_RD], dim=1)

    def features(self, lag_hours_R: Tensor) -> Tensor:
        """VariablePooling.FEATURES (R, X) at prediction times that lie lag_hours_R after the last event."""
        _, values_R, *rest = self.sum_RX.unbind(dim=1)
        known_R = values_R > 0
        z_R, z2_R, t_R, t2_R, tz_R, rank_R = (x_R / values_R.clamp(min=1) for x_R in rest)
        spread_R, spread_t_R = ((x2_R - x_R * x_R).clamp(min=0) for x_R, x2_R in ((z_R, z2_R), (t_R, t2_R)))
        lag_R = lag_hours_R.double()
        columns = [
            known_R[:, None],
            (self.near_RH * _in_horizons(-lag_R).exp()).log1p(),
            self.shared_RH / self.share_RH.clamp(min=1),
            (lag_R[:, None] - torch.stack([self.least_RX[:, 0], self.greatest_RX[:, 0]], dim=1)).log1p(),
            torch.stack([spread_R.sqrt(), (tz_R - t_R * z_R) * (spread_t_R + 1.0).rsqrt(), rank_R], dim=1),
            torch.where(known_R[:, None], self.least_RX[:, 2:], 0.0),
            torch.where(known_R[:, None], self.greatest_RX[:, 2:], 0.0),
            torch.where(known_R, self.first_R, 0.0)[:, None],
            torch.where(known_R[:, None], self.last_RX, 0.0),
        ]
        return torch.cat([column.to(self.state_RD.dtype) for column in columns], dim=1)


def variables_so_far(row: Batch, vocab_size: int) -> VariablesSoFar:
    """What each of a row's answers has read of each variable."""
    assert row.last_A is not None
    L, device = row.num_events, row.code_L.device
    order_L = (row.segment_L.long() * vocab_size + row.code_L).argsort(stable=True)
    row_sums = VariableSums.of(row.value_L.new_zeros(L, 0), row, vocab_size, torch.arange(L, device=device))
    sums, hours_L = row_sums.at(order_L), row.time_hours_L[order_L].double()
    key_U, variable_L, count_U = sums.key_R.unique_consecutive(return_inverse=True, return_counts=True)
    sums = sums.running(hours_L, int(count_U.max()))
    # each answer and each variable of its segment, and the variable's last event that it reads, if there is one
    number_S = torch.bincount(key_U // vocab_size, minlength=row.num_segments)
    segment_A = row.segment_L[row.last_A].long()
    variable_N, answer_N = ranges((number_S.cumsum(0) - number_S)[segment_A], number_S[segment_A])
    last_N = torch.searchsorted(variable_L * L + order_L, variable_N * L + row.last_A[answer_N], right=True) - 1
    first_U = count_U.cumsum(0) - count_U
    read_N = last_N >= first_U[variable_N]
    last_G, answer_G = last_N[read_N], answer_N[read_N]
    since_G = row.time_hours_L[row.last_A].double()[answer_G] - hours_L[last_G]
    features_GX = sums.at(last_G).later(since_G).features(row.lag_hours_A[answer_G])
    code_N, code_U = torch.unique(key_U % vocab_size, return_inverse=True)
    last_N, events_G = torch.unique(last_G, return_inverse=True)
    return VariablesSoFar(
        answer_G=answer_G,
        lengths=torch.bincount(answer_G, minlength=len(row.last_A)).tolist(),
        code_G=code_U[variable_N[read_N]],
        code_N=code_N,
        features_GX=features_GX,
        order_L=order_L,
        events_G=events_G,
        first_N=first_U[variable_L[last_N]],
        last_N=last_N,
    )


def _in_horizons(hours: Tensor) -> Tensor:
    """(...) -> (..., H); by Python's numbers, for a tensor of them would be sent to the device."""
    return torch.stack([hours / horizon for horizon in HORIZONS_HOURS], dim=-1)
