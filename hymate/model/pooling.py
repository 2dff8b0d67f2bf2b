"""Pooling: the contextual states of a segment's events -> the vector that a patient's risk is predicted from.

Where a segment has several answers, each has its own vector, of the events up to the last that it reads.

Shape legend, besides that of `hymate.model.encoder`:
    H  horizons      R  rows: events, or variables so far      G  variables: pairs of a segment and a code it holds
    M  members, each with weights of its own
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hymate.config import ModelConfig
from hymate.model.batch import Batch, Ends, Variables, VariablesSoFar, ranges
from hymate.model.embedding import EventEmbedding
from hymate.model.moments import Moments, moments_of_answers

HORIZONS_HOURS = (8766.0, 168.0, 24.0, 4.0)  # a year to the last few events: how far pooling looks back
AT_ONCE = 2**22  # numbers of the variables' vectors of a row's answers that are computed together
STATES_DROPPED = 0.5  # fraction of the patients that VariablePooling is trained on without contextual states


class MemberLinear(nn.Module):
    """A linear layer for each member, initialised as torch.nn.Linear is."""

    def __init__(self, members: int, width_in: int, width_out: int, bias: bool = True) -> None:
        super().__init__()
        bound = width_in**-0.5
        self.weight = nn.Parameter(torch.empty(members, width_in, width_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, width_out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, M, I), or (N, I) that is the same for all members -> (N, M, O)."""
        y_NMO = torch.einsum("ni,mio->nmo" if x.ndim == 2 else "nmi,mio->nmo", x, self.weight)
        return y_NMO if self.bias is None else y_NMO + self.bias


class FusionPooling(nn.Module):
    """The paper's additive attention over a segment's events, `num_queries` times; its weights explain the prediction.
    It returns the level of what it attends to: the weighted mean of the states.

    Where `timed`, each query also forgets: an event's score falls with its hours before the segment's end, at a learned
    rate that starts at one of HORIZONS_HOURS. And it returns the trend: the weighted covariance of states and time over
    the standard deviation of time, which is the least-squares slope in units of that deviation.
    """

    def __init__(self, d_model: int, num_queries: int, members: int = 1, timed: bool = True) -> None:
        super().__init__()
        self.key = MemberLinear(members, d_model, d_model)
        self.query = MemberLinear(members, d_model, num_queries, bias=False)
        self.members, self.width = members, (1 + timed) * num_queries * d_model
        self.log_rate_Q: nn.Parameter | None = None
        if timed:
            horizon_Q = torch.tensor(list(islice(cycle(HORIZONS_HOURS), num_queries)))
            self.log_rate_Q = nn.Parameter(-horizon_Q.log().repeat(members))

    def forward(self, h_LD: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(L, D) -> pooled (A, M, Q * D or, timed, twice that), weights (L, M * Q) that sum to 1 over each segment; no
        weights where segments have several answers.
        """
        if batch.last_A is not None:
            return self.of_answers(h_LD, batch), None
        segment_L, S = batch.segment_L.long(), batch.num_segments
        last_L = batch.bounds[1:][segment_L] - 1
        hours_L1 = (batch.time_hours_L - batch.time_hours_L[last_L])[:, None]  # 0 at the end, negative before
        score_LQ = self.score(h_LD)
        if self.log_rate_Q is not None:
            score_LQ = score_LQ + hours_L1 * self.log_rate_Q.exp()
        weight_LQ = segment_softmax(score_LQ, segment_L, S)
        bases_LQ = [weight_LQ]
        if self.log_rate_Q is not None:
            offset_LQ = hours_L1 - segment_sum(weight_LQ * hours_L1, segment_L, S)[segment_L]
            variance_SQ = segment_sum(weight_LQ * offset_LQ.square(), segment_L, S)
            # 1: an hour, where time stands still
            bases_LQ.append(weight_LQ * offset_LQ * (variance_SQ + 1.0).rsqrt()[segment_L])
        parts = zip(torch.cat(bases_LQ, dim=1).split(batch.lengths), wide(h_LD).split(batch.lengths), strict=True)
        with torch.autocast(h_LD.device.type, enabled=False):
            sums_SQD = torch.stack([basis.T @ h for basis, h in parts]).chunk(len(bases_LQ), dim=1)
        return self.pooled(*sums_SQD), weight_LQ

    def of_answers(self, h_LD: Tensor, batch: Batch) -> Tensor:
        """`forward`, of several answers a segment."""
        score_LQ = self.score(h_LD)
        with torch.autocast(h_LD.device.type, enabled=False):
            return self.of_moments(moments_of_answers(wide(h_LD), score_LQ, self.rates(score_LQ), batch))

    def score(self, h_LD: Tensor) -> Tensor:
        """(L, D) -> logarithms of the weights (L, M * Q), up to a constant and without what is forgotten."""
        return wide(self.query(torch.tanh(self.key(h_LD)))).flatten(1)

    def rates(self, like_LQ: Tensor) -> Tensor:
        """By how much the scores of each query fall in an hour: (M * Q,)."""
        return like_LQ.new_zeros(like_LQ.shape[1]) if self.log_rate_Q is None else self.log_rate_Q.exp()

    def of_moments(self, found: Moments) -> Tensor:
        """Pooled (N, M, Q * D or, timed, twice that)."""
        return self.pooled(found.level_NQD, found.covariance_NQD * (found.variance_NQ + 1.0).rsqrt()[:, :, None])

    def pooled(self, level_SQD: Tensor, trend_SQD: Tensor | None = None) -> Tensor:
        """Levels and, where timed, trends (A, M * Q, D) -> (A, M, Q * D) or twice that."""
        sums = [level_SQD] if self.log_rate_Q is None or trend_SQD is None else [level_SQD, trend_SQD]
        return torch.cat([x_SQD.unflatten(1, (self.members, -1)).flatten(2) for x_SQD in sums], dim=2)


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


class VariableVectors(nn.Module):
    """Codes and VariablePooling.FEATURES -> vectors; the code shifts and scales what the features say, as of values."""

    def __init__(self, d_model: int, members: int) -> None:
        super().__init__()
        self.told = MemberLinear(members, len(VariablePooling.FEATURES), d_model)
        self.code = MemberLinear(members, d_model, 2 * d_model, bias=False)
        self.out = MemberLinear(members, d_model, d_model)

    def forward(self, code_GD: Tensor, features_GX: Tensor) -> Tensor:
        """Embedded codes (G, D) and features (G, X) -> (G, M, D)."""
        shift_GMD, scale_GMD = self.code(code_GD).chunk(2, dim=-1)
        return code_GD[:, None] + self.out(F.gelu(self.told(features_GX) + shift_GMD) * (1 + scale_GMD))


class VariablePooling(nn.Module):
    """One vector for each variable (code) that a segment holds; additive attention over them, and their sum.

    A variable's vector knows what aggregate features would say of it (FEATURES), and the contextual states of its
    events, their mean and the last. So a variable that was measured twice weighs as much as one measured every hour,
    and counts, extremes and absence can be seen. Contextual states know each patient so well that a few thousand
    labels are soon learned by heart: in training half of the patients go without (stochastic depth, Huang et al. 2016).
    The weights of the variables, shared by their events, explain the prediction.

    The vectors are normalised without gains: what reads them has weights for that.
    """

    FEATURES = (
        "has a value",
        *(f"events, forgotten within {hours:g} hours (log)" for hours in HORIZONS_HOURS),
        *(f"mean value, forgotten within {hours:g} hours" for hours in HORIZONS_HOURS),
        *("hours since the first event (log)", "hours since the last event (log)"),
        *("standard deviation", "trend, as FusionPooling's", "mean rank"),
        *("least value", "least rank", "greatest value", "greatest rank"),
        *("first value", "last value", "last rank"),
    )

    def __init__(self, d_model: int, num_queries: int, members: int = 1) -> None:
        super().__init__()
        self.vectors = VariableVectors(d_model, members)
        self.states = MemberLinear(members, 2 * d_model, d_model, bias=False)
        self.norm = nn.RMSNorm(d_model, elementwise_affine=False)
        self.key = MemberLinear(members, d_model, d_model)
        self.query = MemberLinear(members, d_model, num_queries, bias=False)
        self.members, self.width = members, (num_queries + 1) * d_model
        nn.init.zeros_(self.states.weight)

    def forward(self, h_LD: Tensor, batch: Batch, code_VD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(L, D), the embedding of codes -> pooled (A, M, (Q + 1) * D) and weights (L, M * Q) that sum to 1 over each
        segment; no weights where segments have several answers.
        """
        if batch.last_A is not None:
            return self.of_answers(h_LD, batch, code_VD), None
        own = batch.variables or Variables.of(batch, len(code_VD))
        assert isinstance(own, Variables)
        sums = VariableSums.of(h_LD, batch, len(code_VD)).grouped(own.key_G, own.variable_L)
        pooled, weight_GQ = self.pool(sums, own.lengths, batch.lag_hours_A, code_VD)
        return pooled, (weight_GQ / wide(sums.sum_RX[:, :1].to(weight_GQ.dtype)))[own.variable_L]

    def pool(
        self, sums: VariableSums, lengths: list[int], lag_hours_A: Tensor, code_VD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pooled (A, M, (Q + 1) * D) and the variables' weights (G, M * Q), which sum to 1 over each answer; lengths:
        of how many variables each has.
        """
        features_GX = sums.features(lag_hours_A[sums.key_R // len(code_VD)])
        x_GMD, weight_GMQ, part_GMQ = self.weighed(sums.key_R, features_GX, sums.states, len(lengths), code_VD)
        parts = zip(part_GMQ.split(lengths), wide(x_GMD).split(lengths), strict=True)
        with torch.autocast(x_GMD.device.type, enabled=False):
            pooled_AMQD = torch.stack([torch.einsum("gmq,gmd->mqd", part, x) for part, x in parts])
        return pooled_AMQD.flatten(2), weight_GMQ.flatten(1)

    def of_answers(self, h_LD: Tensor, batch: Batch, code_VD: Tensor) -> Tensor:
        """`forward`, of several answers a segment; where that is much, block by block, and again in the backward."""
        own = batch.variables or variables_so_far(batch, len(code_VD))
        assert isinstance(own, VariablesSoFar)
        h_LD = wide(h_LD)[own.order_L]
        total_LD = F.pad(h_LD.double().cumsum(0), (0, 0, 1, 0))
        blocks = list(own.blocks(AT_ONCE // (code_VD.shape[1] * self.members), len(code_VD)))
        parts = []
        for block in blocks:
            inputs = (total_LD, h_LD, block, code_VD)
            parts.append(
                checkpoint(self.of_block, *inputs, use_reentrant=False)
                if self.training and len(blocks) > 1
                else self.of_block(*inputs)
            )
        return torch.cat(parts)

    def of_block(self, total_LD: Tensor, h_LD: Tensor, own: VariablesSoFar, code_VD: Tensor) -> Tensor:
        """Of some answers; total_LD: running sums of the contextual states h_LD, before each of them and at the end."""
        mean_GD = (total_LD[own.last_G + 1] - total_LD[own.first_G]) / (own.last_G - own.first_G + 1)[:, None]
        states_GD = torch.cat([mean_GD.to(h_LD.dtype), h_LD[own.last_G]], dim=1)
        A, most = len(own.lengths), max(own.lengths)
        x_GMD, _, part_GMQ = self.weighed(own.key_G, own.features_GX, states_GD, A, code_VD)
        answer_G = own.key_G // len(code_VD)
        count_A = segment_count(answer_G, A)
        place_G = torch.arange(len(answer_G), device=answer_G.device) - (count_A.cumsum(0) - count_A)[answer_G]
        at_G = answer_G * most + place_G
        part_AV, x_AV = (
            x.new_zeros(A * most, *x.shape[1:]).index_copy(0, at_G, x).unflatten(0, (A, most))
            for x in (part_GMQ, wide(x_GMD))
        )
        with torch.autocast(h_LD.device.type, enabled=False):
            return torch.einsum("avmq,avmd->amqd", part_AV, x_AV).flatten(2)

    def weighed(
        self, key_G: Tensor, features_GX: Tensor, states_GD: Tensor, num_answers: int, code_VD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The variables' vectors (G, M, D); their weights (G, M, Q), which sum to 1 over each answer; and these with
        another, by which they are added up (G, M, Q + 1).

        key_G: int64, answer * vocabulary size + code; ascending. states_GD: the mean of the contextual states and the
        last, (G, 2 * D).
        """
        answer_G, states_GMD = key_G // len(code_VD), self.states(states_GD)
        if self.training:
            kept_AM = torch.rand(num_answers, states_GMD.shape[1], device=states_GMD.device) >= STATES_DROPPED
            states_GMD = states_GMD * (kept_AM.to(states_GMD.dtype) / (1 - STATES_DROPPED))[answer_G, :, None]
        vector_GMD = self.vectors(code_VD[key_G % len(code_VD)], features_GX)
        x_GMD = self.norm(vector_GMD + states_GMD)
        score_GMQ = wide(self.query(torch.tanh(self.key(x_GMD))))
        weight_GMQ = segment_softmax(score_GMQ.flatten(1), answer_G, num_answers).view_as(score_GMQ)
        # the sum adds up evidence, which a mean cannot; over the root of their number, to keep its size
        number_A = segment_count(answer_G, num_answers)
        share_G11 = number_A.to(weight_GMQ.dtype).rsqrt()[answer_G, None, None]
        return x_GMD, weight_GMQ, torch.cat([weight_GMQ, share_G11.expand(-1, weight_GMQ.shape[1], 1)], dim=2)


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
    first_N = (count_U.cumsum(0) - count_U)[variable_N]
    read_N = last_N >= first_N
    first_G, last_G, answer_G = first_N[read_N], last_N[read_N], answer_N[read_N]
    since_G = row.time_hours_L[row.last_A].double()[answer_G] - hours_L[last_G]
    features_GX = sums.at(last_G).later(since_G).features(row.lag_hours_A[answer_G])
    key_G = answer_G * vocab_size + key_U[variable_N[read_N]] % vocab_size
    lengths = torch.bincount(answer_G, minlength=len(row.last_A)).tolist()
    return VariablesSoFar(key_G, lengths, features_GX, order_L, first_G, last_G)


def _in_horizons(hours: Tensor) -> Tensor:
    """(...) -> (..., H); by Python's numbers, for a tensor of them would be sent to the device."""
    return torch.stack([hours / horizon for horizon in HORIZONS_HOURS], dim=-1)


# ---------------------------------------------------------------------------------------------------- segments


def segment_mean(x_LD: Tensor, segment_L: Tensor, num_segments: int) -> Tensor:
    """Mean over each segment (S, D); zero where a segment has nothing."""
    index = segment_L.long()
    count_S = segment_count(index, num_segments).clamp(min=1)
    return segment_sum(wide(x_LD), index, num_segments) / count_S[:, None]


def segment_count(segment_L: Tensor, num_segments: int) -> Tensor:
    """How many events each segment has (S,); a GPU's bincount would be waited for."""
    return segment_L.new_zeros(num_segments).index_add(0, segment_L, torch.ones_like(segment_L))


def segment_sum(x_LD: Tensor, segment_L: Tensor, num_segments: int) -> Tensor:
    """Sum over each segment (S, D)."""
    return x_LD.new_zeros(num_segments, x_LD.shape[1]).index_add(0, segment_L, x_LD)


def wide(x: Tensor) -> Tensor:
    """At least float32: sums over a whole history are not for half precision, nor for what autocast makes of them."""
    return x if x.dtype == torch.float64 else x.float()


def segment_softmax(score_LQ: Tensor, segment_L: Tensor, num_segments: int) -> Tensor:
    """Weights (L, Q) that sum to 1 over each segment."""
    top_SQ = score_LQ.new_full((num_segments, score_LQ.shape[1]), -torch.inf)
    top_SQ = top_SQ.scatter_reduce(0, segment_L[:, None].expand_as(score_LQ), score_LQ.detach(), "amax")
    weight_LQ = (score_LQ - top_SQ[segment_L]).exp()
    return weight_LQ / segment_sum(weight_LQ, segment_L, num_segments)[segment_L]


class StaticNetwork(nn.Module):
    """The paper's dense network of the static features: two layers, for each member (STraTS, arXiv 2107.14293)."""

    def __init__(self, members: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.hidden = MemberLinear(members, width_in, 2 * width_out)
        self.out = MemberLinear(members, 2 * width_out, width_out)

    def forward(self, x_SX: Tensor) -> Tensor:
        """(S, X) -> (S, M, D)."""
        return torch.tanh(self.out(torch.tanh(self.hidden(x_SX))))


class PatientPooling(nn.Module):
    """Event states and static features -> `config.members` vectors for each patient's window, each by its own weights.

    Pooled events (by `config.pooling`), the mean of the static events' embeddings through a layer, and four
    scalars: age, whether it is known, hours since the last event and number of events (both log-scaled).
    With "attention", the paper's: pooled events, and a dense network of that mean and the age alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.pooling
        widths = (config.d_model, config.num_queries, config.members)
        timed = self.kind == "fusion"
        self.fusion = FusionPooling(*widths, timed=timed) if self.kind in ("fusion", "attention") else None
        self.variables = VariablePooling(*widths) if self.kind == "variables" else None
        self.static: MemberLinear | StaticNetwork
        if self.kind == "attention":
            self.static, scalars = StaticNetwork(config.members, config.d_model + 2, config.d_model), 0
        else:
            self.static, scalars = MemberLinear(config.members, config.d_model, config.d_model), 4
        attention = self.fusion or self.variables
        self.width = (attention.width if attention else config.d_model) + config.d_model + scalars

    def ask(self, batch: Batch, embedding: EventEmbedding) -> Batch:
        """The row with its variables, where they are what is pooled, or with where its answers end."""
        vocab_size = embedding.code.num_embeddings
        if self.variables is not None and batch.variables is None:
            of_row = Variables.of if batch.last_A is None else variables_so_far
            return replace(batch, variables=of_row(batch, vocab_size))
        if self.kind != "last" and self.variables is None and batch.last_A is not None and batch.ends is None:
            return replace(batch, ends=Ends.of(batch))
        return batch

    def forward(self, h_LD: Tensor, batch: Batch, embedding: EventEmbedding) -> tuple[Tensor, Tensor | None]:
        """(L, D) -> patient vectors (A, M, E) and the attention weights (L, M * Q); None for other poolings, and where
        segments have several answers.
        """
        weight_LQ = None
        count_A = (batch.last_of_answers - batch.by_answer(batch.bounds[:-1]) + 1).float()
        if self.variables is not None:
            pooled, weight_LQ = self.variables(h_LD, batch, embedding.code.weight)
        elif self.fusion is not None:
            pooled, weight_LQ = self.fusion(h_LD, batch)
        elif self.kind == "last":
            pooled = wide(h_LD[batch.last_of_answers])[:, None]
        elif batch.last_A is not None:
            equal_L1 = wide(h_LD).new_zeros(len(h_LD), 1)
            pooled = moments_of_answers(wide(h_LD), equal_L1, equal_L1[0], batch).level_NQD
        else:
            pooled = segment_mean(h_LD, batch.segment_L, batch.num_segments)[:, None]
        return self.join(pooled, count_A, batch, embedding), weight_LQ

    def join(self, pooled: Tensor, count_A: Tensor, batch: Batch, embedding: EventEmbedding) -> Tensor:
        """Pooled events (A, M or 1, X), count_A of them, and the batch's static features and scalars -> (A, M, E)."""
        static_FD = embedding(batch.static_code_F, batch.static_value_F, batch.static_quantile_F)
        static_AD = batch.by_answer(segment_mean(static_FD, batch.static_segment_F, batch.num_segments))
        known_A = ~torch.isnan(batch.age_years_A)
        age_A2 = torch.stack([torch.nan_to_num(batch.age_years_A) / 100, known_A.float()], -1).to(pooled.dtype)
        parts: list[Tensor] = [pooled]
        if isinstance(self.static, StaticNetwork):
            parts.append(wide(self.static(torch.cat([static_AD, age_A2], -1))))
        else:
            logs_A2 = torch.stack([torch.log1p(batch.lag_hours_A), torch.log(count_A) / 10], -1).to(pooled.dtype)
            parts += [wide(F.gelu(self.static(static_AD))), age_A2[:, None], logs_A2[:, None]]
        return torch.cat([part.expand(-1, parts[1].shape[1], -1) for part in parts], dim=-1)
