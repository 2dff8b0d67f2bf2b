"""Pooling: the contextual states of a segment's events -> the vector that a patient's risk is predicted from.

Shape legend, besides that of `hymate.model.encoder`:
    H  horizons      R  rows: events, or variables so far      G  variables: pairs of a segment and a code it holds
    M  members, each with weights of its own
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymate.config import ModelConfig
from hymate.model.batch import Batch, Variables
from hymate.model.embedding import EventEmbedding

HORIZONS_HOURS = (8766.0, 168.0, 24.0, 4.0)  # a year to the last few events: how far pooling looks back
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

    def forward(self, h_LD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(L, D) -> pooled (S, M, Q * D or, timed, twice that), weights (L, M * Q) that sum to 1 over each segment."""
        segment_L, S = batch.segment_L.long(), batch.num_segments
        last_L = batch.bounds[1:][segment_L] - 1
        hours_L1 = (batch.time_hours_L - batch.time_hours_L[last_L])[:, None]  # 0 at the end, negative before
        score_LQ = self.score(h_LD, hours_L1)
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

    def score(self, h_LD: Tensor, hours_L1: Tensor) -> Tensor:
        """(L, D), hours from the end (not positive) -> logarithms of the weights (L, M * Q), up to a constant."""
        score_LQ = wide(self.query(torch.tanh(self.key(h_LD)))).flatten(1)
        return score_LQ if self.log_rate_Q is None else score_LQ + hours_L1 * self.log_rate_Q.exp()

    def pooled(self, level_SQD: Tensor, trend_SQD: Tensor | None = None) -> Tensor:
        """Levels and, where timed, trends (S, M * Q, D) -> (S, M, Q * D) or twice that."""
        sums = [level_SQD] if self.log_rate_Q is None or trend_SQD is None else [level_SQD, trend_SQD]
        return torch.cat([x_SQD.unflatten(1, (self.members, -1)).flatten(2) for x_SQD in sums], dim=2)


@dataclass(frozen=True)
class VariableSums:
    """What is known of each variable, as sums that can go on as events come; float64 but for the states.

    Times are hours from the segment's last event (not positive); z is asinh of the normalised value and rank its rank
    (`Batch.value_L`, `Batch.quantile_L`). Sums are over the variable's events, and over those with a value.

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
    def of(cls, h_LD: Tensor, batch: Batch, vocab_size: int) -> VariableSums:
        """Of a row's events, in their order."""
        segment_L = batch.segment_L.long()
        last_L = batch.bounds[1:][segment_L] - 1
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

    def later(self, hours: float) -> VariableSums:
        """The same events seen from `hours` later."""
        events, values, z, z2, t, t2, tz, rank = self.sum_RX.unbind(dim=1)
        sums = (events, values, z, z2, t - hours * values, t2 - 2 * hours * t + hours**2 * values, tz - hours * z, rank)
        ago_X = F.pad(self.least_RX.new_full((2,), hours), (0, 2))  # of times only
        return replace(
            self,
            sum_RX=torch.stack(sums, dim=1),
            near_RH=self.near_RH * _in_horizons(self.near_RH.new_full((), -hours)).exp(),
            least_RX=self.least_RX - ago_X,
            greatest_RX=self.greatest_RX - ago_X,
        )

    def __add__(self, other: VariableSums) -> VariableSums:
        """Of both's events, the other's being later; both are seen from the same time."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        both = VariableSums(*(torch.cat(pair) for pair in pairs))
        return both.grouped(*torch.unique(both.key_R, return_inverse=True))

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
        self.width = (num_queries + 1) * d_model
        nn.init.zeros_(self.states.weight)

    def forward(self, h_LD: Tensor, batch: Batch, code_VD: Tensor) -> tuple[Tensor, Tensor]:
        """(L, D), the embedding of codes -> pooled (S, M, (Q + 1) * D) and weights (L, M * Q) that sum to 1 over each
        segment.
        """
        own = batch.variables or Variables.of(batch, len(code_VD))
        sums = VariableSums.of(h_LD, batch, len(code_VD)).grouped(own.key_G, own.variable_L)
        pooled, weight_GQ = self.pool(sums, own.lengths, batch.lag_hours_S, code_VD)
        return pooled, (weight_GQ / wide(sums.sum_RX[:, :1].to(weight_GQ.dtype)))[own.variable_L]

    def pool(
        self, sums: VariableSums, lengths: list[int], lag_hours_S: Tensor, code_VD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pooled (S, M, (Q + 1) * D) and the variables' weights (G, M * Q), which sum to 1 over each segment; lengths:
        of how many variables each has.
        """
        S, segment_G = len(lag_hours_S), sums.key_R // len(code_VD)
        events_G1 = sums.sum_RX[:, :1].to(sums.state_RD.dtype)
        states_GMD = self.states(torch.cat([sums.state_RD / events_G1, sums.last_RD], dim=1))
        if self.training:
            kept_SM = torch.rand(S, states_GMD.shape[1], device=states_GMD.device) >= STATES_DROPPED
            states_GMD = states_GMD * (kept_SM.to(states_GMD.dtype) / (1 - STATES_DROPPED))[segment_G, :, None]
        vector_GMD = self.vectors(code_VD[sums.key_R % len(code_VD)], sums.features(lag_hours_S[segment_G]))
        x_GMD = self.norm(vector_GMD + states_GMD)
        score_GMQ = wide(self.query(torch.tanh(self.key(x_GMD))))
        weight_GMQ = segment_softmax(score_GMQ.flatten(1), segment_G, S).view_as(score_GMQ)
        # the sum adds up evidence, which a mean cannot; over the root of their number, to keep its size
        number_S = segment_count(segment_G, S)
        share_G11 = number_S.to(weight_GMQ.dtype).rsqrt()[segment_G, None, None]
        part_GMQ = torch.cat([weight_GMQ, share_G11.expand(-1, weight_GMQ.shape[1], 1)], dim=2)
        parts = zip(part_GMQ.split(lengths), wide(x_GMD).split(lengths), strict=True)
        with torch.autocast(x_GMD.device.type, enabled=False):
            pooled_SMQD = torch.stack([torch.einsum("gmq,gmd->mqd", part, x) for part, x in parts])
        return pooled_SMQD.flatten(2), weight_GMQ.flatten(1)


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
        """The row with its variables, where they are what is pooled."""
        if self.variables is None or batch.variables is not None:
            return batch
        return replace(batch, variables=Variables.of(batch, embedding.code.num_embeddings))

    def forward(self, h_LD: Tensor, batch: Batch, embedding: EventEmbedding) -> tuple[Tensor, Tensor | None]:
        """(L, D) -> patient vectors (S, M, E) and the attention weights (L, M * Q), None for other poolings."""
        weight_LQ = None
        count_S = batch.bounds.diff().float()
        if self.variables is not None:
            pooled, weight_LQ = self.variables(h_LD, batch, embedding.code.weight)
        elif self.fusion is not None:
            pooled, weight_LQ = self.fusion(h_LD, batch)
        elif self.kind == "last":
            pooled = wide(h_LD[batch.bounds[1:] - 1])[:, None]
        else:
            pooled = segment_mean(h_LD, batch.segment_L, batch.num_segments)[:, None]
        return self.join(pooled, count_S, batch, embedding), weight_LQ

    def join(self, pooled: Tensor, count_S: Tensor, batch: Batch, embedding: EventEmbedding) -> Tensor:
        """Pooled events (S, M or 1, X), count_S of them, and the batch's static features and scalars -> (S, M, E)."""
        static_FD = embedding(batch.static_code_F, batch.static_value_F, batch.static_quantile_F)
        static_SD = segment_mean(static_FD, batch.static_segment_F, batch.num_segments)
        known_S = ~torch.isnan(batch.age_years_S)
        age_S2 = torch.stack([torch.nan_to_num(batch.age_years_S) / 100, known_S.float()], -1).to(pooled.dtype)
        parts: list[Tensor] = [pooled]
        if isinstance(self.static, StaticNetwork):
            parts.append(wide(self.static(torch.cat([static_SD, age_S2], -1))))
        else:
            logs_S2 = torch.stack([torch.log1p(batch.lag_hours_S), torch.log(count_S) / 10], -1).to(pooled.dtype)
            parts += [wide(F.gelu(self.static(static_SD))), age_S2[:, None], logs_S2[:, None]]
        return torch.cat([part.expand(-1, parts[1].shape[1], -1) for part in parts], dim=-1)
