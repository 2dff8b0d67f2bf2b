"""Pooling: the contextual states of a segment's events -> the vector that a patient's risk is predicted from.

Where a segment has several answers, each has its own vector, of the events up to the last that it reads.

Shape legend, besides that of `hymate.model.encoder`:
    N  distinct codes, or events, of the variables of a row's answers
    M  members, each with weights of its own
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hymate.config import ModelConfig
from hymate.model.batch import Batch, Ends, Variables, VariablesSoFar
from hymate.model.embedding import EventEmbedding
from hymate.model.moments import Moments, moments_of_answers
from hymate.model.segments import rows_of, segment_count, segment_mean, segment_softmax, segment_sum, wide
from hymate.model.variables import HORIZONS_HOURS, VariableSums, variables_so_far

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
            horizon_Q = torch.tensor(members * list(islice(cycle(HORIZONS_HOURS), num_queries)))
            self.log_rate_Q = nn.Parameter(-horizon_Q.log())

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


class VariableVectors(nn.Module):
    """Codes and VariablePooling.FEATURES -> vectors; the code shifts and scales what the features say, as of values."""

    def __init__(self, d_model: int, members: int) -> None:
        super().__init__()
        self.told = MemberLinear(members, len(VariablePooling.FEATURES), d_model)
        self.code = MemberLinear(members, d_model, 2 * d_model, bias=False)
        self.out = MemberLinear(members, d_model, d_model)

    def forward(self, code_GD: Tensor, features_GX: Tensor) -> Tensor:
        """Embedded codes (G, D) and features (G, X) -> (G, M, D)."""
        return self.of_codes(code_GD, self.code(code_GD), features_GX)

    def of_codes(self, code_GD: Tensor, changes_GME: Tensor, features_GX: Tensor) -> Tensor:
        """`forward`, with what `code` gives for the codes, E = 2 * D."""
        shift_GMD, scale_GMD = changes_GME.chunk(2, dim=-1)
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
        answer_G = sums.key_R // len(code_VD)
        vector_GMD = self.vectors(code_VD[sums.key_R % len(code_VD)], sums.features(lag_hours_A[answer_G]))
        x_GMD, weight_GMQ, part_GMQ = self.weighed(vector_GMD, self.states(sums.states), answer_G, len(lengths))
        parts = zip(part_GMQ.split(lengths), wide(x_GMD).split(lengths), strict=True)
        with torch.autocast(x_GMD.device.type, enabled=False):
            pooled_AMQD = torch.stack([torch.einsum("gmq,gmd->mqd", part, x) for part, x in parts])
        return pooled_AMQD.flatten(2), weight_GMQ.flatten(1)

    def of_answers(self, h_LD: Tensor, batch: Batch, code_VD: Tensor) -> Tensor:
        """`forward`, of several answers a segment; where that is much, block by block, and again in the backward.

        What depends on the code alone is computed once a code, and what on the contextual states once an event.
        """
        own = batch.variables or variables_so_far(batch, len(code_VD))
        assert isinstance(own, VariablesSoFar)
        h_LD = wide(h_LD)[own.order_L]
        total_LD = F.pad(h_LD.double().cumsum(0), (0, 0, 1, 0))
        mean_ND = (total_LD[own.last_N + 1] - total_LD[own.first_N]) / (own.last_N - own.first_N + 1)[:, None]
        states_NMD = self.states(torch.cat([mean_ND.to(h_LD.dtype), h_LD[own.last_N]], dim=1))
        code_ND = code_VD[own.code_N]
        changes_NME = self.vectors.code(code_ND)

        def of_block(block_A: slice, block_G: slice) -> Tensor:
            code_G, lengths = own.code_G[block_G], own.lengths[block_A]
            vector_GMD = self.vectors.of_codes(
                rows_of(code_ND, code_G), rows_of(changes_NME, code_G), own.features_GX[block_G]
            )
            answer_G, A, most = own.answer_G[block_G] - block_A.start, len(lengths), max(lengths)
            x_GMD, _, part_GMQ = self.weighed(vector_GMD, rows_of(states_NMD, own.events_G[block_G]), answer_G, A)
            count_A = segment_count(answer_G, A)
            first_A = torch.arange(A, device=answer_G.device) * most - (count_A.cumsum(0) - count_A)
            at_G = first_A[answer_G] + torch.arange(len(answer_G), device=answer_G.device)
            part_AV, x_AV = (
                x.new_zeros(A * most, *x.shape[1:]).index_copy(0, at_G, x).unflatten(0, (A, most))
                for x in (part_GMQ, wide(x_GMD))
            )
            with torch.autocast(h_LD.device.type, enabled=False):
                return torch.einsum("avmq,avmd->amqd", part_AV, x_AV).flatten(2)

        blocks = list(own.blocks(AT_ONCE // changes_NME[0].numel()))
        if not self.training or len(blocks) == 1:
            return torch.cat([of_block(*block) for block in blocks])
        return torch.cat([checkpoint(of_block, *block, use_reentrant=False) for block in blocks])

    def weighed(
        self, vector_GMD: Tensor, states_GMD: Tensor, answer_G: Tensor, num_answers: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The variables' vectors with what their states add to them (G, M, D); their weights (G, M, Q), which sum to 1
        over each answer; and these with another, by which they are added up (G, M, Q + 1).
        """
        if self.training:
            kept_AM = torch.rand(num_answers, states_GMD.shape[1], device=states_GMD.device) >= STATES_DROPPED
            states_GMD = states_GMD * (kept_AM.to(states_GMD.dtype) / (1 - STATES_DROPPED))[answer_G, :, None]
        x_GMD = self.norm(vector_GMD + states_GMD)
        score_GMQ = wide(self.query(torch.tanh(self.key(x_GMD))))
        weight_GMQ = segment_softmax(score_GMQ.flatten(1), answer_G, num_answers).view_as(score_GMQ)
        # the sum adds up evidence, which a mean cannot; over the root of their number, to keep its size
        number_A = segment_count(answer_G, num_answers)
        share_G11 = number_A.to(weight_GMQ.dtype).rsqrt()[answer_G, None, None]
        return x_GMD, weight_GMQ, torch.cat([weight_GMQ, share_G11.expand(-1, weight_GMQ.shape[1], 1)], dim=2)


class StaticNetwork(nn.Module):
    """The paper's dense network of the static features: two layers, for each member (STraTS, arXiv 2107.14293)."""

    def __init__(self, members: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.hidden = MemberLinear(members, width_in, 2 * width_out)
        self.out = MemberLinear(members, 2 * width_out, width_out)

    def forward(self, x_SX: Tensor) -> Tensor:
        """(S, X) -> (S, M, D)."""
        return torch.tanh(self.out(torch.tanh(self.hidden(x_SX))))


class Elapsed(nn.Module):
    """How long a window has lasted -> a vector: learned ones at eight moments an octave, from an hour to a year, and
    lines between them. So what is usual by then is soon learned, and where it jumps.
    """

    OCTAVE, LAST = 8, 8 * 13

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.moment = nn.Embedding(self.LAST + 1, d_model)
        nn.init.normal_(self.moment.weight, std=0.5)

    def forward(self, hours_A: Tensor) -> Tensor:
        """(A,) -> (A, D)."""
        place_A = (self.OCTAVE * wide(hours_A).clamp(min=1).log2()).clamp(max=self.LAST)
        before_A = place_A.long().clamp(max=self.LAST - 1)
        before_AD, after_AD = wide(self.moment(before_A)), wide(self.moment(before_A + 1))
        return torch.lerp(before_AD, after_AD, (place_A - before_A).to(before_AD.dtype)[:, None])


class PatientPooling(nn.Module):
    """Event states and static features -> `config.members` vectors for each patient's window, each by its own weights.

    Pooled events (by `config.pooling`), the mean of the static events' embeddings through a layer, and four
    scalars: age, whether it is known, hours since the last event and number of events (both log-scaled); with
    `config.elapsed` also what `Elapsed` gives.
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
        self.elapsed = Elapsed(config.d_model) if config.elapsed else None
        self.width = (attention.width if attention else config.d_model) + config.d_model + scalars
        self.width += config.d_model if config.elapsed else 0

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
        hours_A = batch.time_hours_L[batch.last_of_answers] + batch.lag_hours_A
        return self.join(pooled, count_A, hours_A, batch, embedding), weight_LQ

    def join(self, pooled: Tensor, count_A: Tensor, hours_A: Tensor, batch: Batch, embedding: EventEmbedding) -> Tensor:
        """Pooled events (A, M or 1, X), count_A of them, hours since the first, and the batch's static features and
        scalars -> (A, M, E).
        """
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
        if self.elapsed is not None:
            parts.append(self.elapsed(hours_A)[:, None])
        return torch.cat([part.expand(-1, parts[1].shape[1], -1) for part in parts], dim=-1)
