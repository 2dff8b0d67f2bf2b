"""Softmaxes over a segment's events up to any of them, each event read once.

A row is cut into chunks of CHUNK events, whatever its segments. Within a chunk, what an answer reads is a product of
matrices; what lies before the chunk is one state, and states join as those of a softmax do (Milakov & Gimelshein 2018),
with the moments by their pairwise formulas (Chan et al. 1979). All weights are logarithms until they are normalised, so
that nothing overflows or vanishes, however much higher later scores are.

Shape legend, besides that of `hymate.model.batch`:
    B  chunks    C  events of a chunk    R  events that are read up to, of a chunk    Q  queries    N  states
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hymate.model.batch import CHUNK, Batch, Ends


@dataclass(frozen=True)
class Moments:
    """Weighted moments of some of a segment's events, as they are seen at the last one's time.

    A weight is exp(score - rate * hours since the event). Times are hours from the last event (not positive).

    hours_N: the last event's time since the window's first.
    log_weight_NQ: the logarithm of the sum of the weights.
    mean_NQ, variance_NQ: of the times.
    level_NQD: the mean of the states.
    covariance_NQD: of states and times.
    """

    hours_N: Tensor
    log_weight_NQ: Tensor
    mean_NQ: Tensor
    variance_NQ: Tensor
    level_NQD: Tensor
    covariance_NQD: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Moments:
        """With every tensor changed."""
        return Moments(*(change(getattr(self, field.name)) for field in fields(self)))

    def at(self, index: Any) -> Moments:
        """Some of them."""
        return self.each(lambda x_NX: x_NX[index])

    def after(self, earlier: Moments, goes_on_N: Tensor, rate_Q: Tensor) -> Moments:
        """With the events of `earlier`, which come before; only where `goes_on_N` (bool) says so."""
        gap_N1 = (earlier.hours_N - self.hours_N)[:, None]
        log_before_NQ = (earlier.log_weight_NQ + gap_N1 * rate_Q).masked_fill(~goes_on_N[:, None], -torch.inf)
        more_NQ = log_before_NQ - self.log_weight_NQ
        before_NQ, own_NQ = more_NQ.sigmoid(), (-more_NQ).sigmoid()
        apart_NQ = earlier.mean_NQ + gap_N1 - self.mean_NQ
        between_NQ = before_NQ * own_NQ * apart_NQ

        def mean(name: str) -> Tensor:
            x_NQX, own_NQX = getattr(earlier, name), getattr(self, name)
            shape = (*before_NQ.shape, *[1] * (own_NQX.ndim - 2))
            return before_NQ.view(shape) * x_NQX + own_NQ.view(shape) * own_NQX

        return Moments(
            hours_N=self.hours_N,
            log_weight_NQ=torch.logaddexp(log_before_NQ, self.log_weight_NQ),
            mean_NQ=before_NQ * (earlier.mean_NQ + gap_N1) + own_NQ * self.mean_NQ,
            variance_NQ=mean("variance_NQ") + between_NQ * apart_NQ,
            level_NQD=mean("level_NQD"),
            covariance_NQD=mean("covariance_NQD") + between_NQ[:, :, None] * (earlier.level_NQD - self.level_NQD),
        )


def moments_of_answers(h_LD: Tensor, score_LQ: Tensor, rate_Q: Tensor, batch: Batch) -> Moments:
    """Of the events that each of a row's answers reads, N = A.

    score_LQ: without what is forgotten, at rate_Q an hour (not negative). Both and h_LD are float32 or float64.
    """
    ends = batch.ends or Ends.of(batch)
    B = len(ends.place_BR)

    def chunks(x_LX: Tensor, fill: int = 0) -> Tensor:
        padding = [0, 0] * (x_LX.ndim - 1) + [0, B * CHUNK - len(x_LX)]
        return F.pad(x_LX, padding, value=fill).unflatten(0, (B, CHUNK))

    read = _Chunks(
        h_BCD=chunks(h_LD),
        score_BQC=chunks(score_LQ).transpose(1, 2),
        hours_BC=chunks(batch.time_hours_L.to(h_LD.dtype)),
        segment_BC=chunks(batch.segment_L, fill=-1),
        rate_Q=rate_Q,
    )
    before = read.up_to(torch.full_like(ends.place_BR[:, :1], CHUNK - 1)).at((slice(None), 0))
    segment_B, step = read.segment_BC[:, -1], 1
    while step * CHUNK < max(batch.lengths):
        goes_on_B = segment_B[step:] == segment_B[:-step]
        joined = before.at(slice(step, None)).after(before.at(slice(None, -step)), goes_on_B, rate_Q)
        before = _one_after_the_other(before.at(slice(None, step)), joined)
        step *= 2
    # the state before a chunk is the one up to the last event of the chunk before it; the first has none
    first_B = torch.arange(B, device=segment_B.device) == 0
    before_segment_B = segment_B.roll(1).masked_fill(first_B, -2)
    return read.up_to(ends.place_BR, before.each(lambda x_BX: x_BX.roll(1, 0)), before_segment_B).at(
        (ends.end_A // ends.place_BR.shape[1], ends.end_A % ends.place_BR.shape[1])
    )


@dataclass(frozen=True)
class _Chunks:
    """A row's events by chunks."""

    h_BCD: Tensor
    score_BQC: Tensor
    hours_BC: Tensor
    segment_BC: Tensor
    rate_Q: Tensor

    def up_to(self, place_BR: Tensor, before: Moments | None = None, before_segment_B: Tensor | None = None) -> Moments:
        """Of the events of its chunk and segment up to each of the places, N = (B, R); and of those before the chunk.

        before, before_segment_B: what lies before each chunk, N = B, and of which segment it is.
        """
        (R, Q), segment_BR = (place_BR.shape[1], len(self.rate_Q)), self.segment_BC.gather(1, place_BR)
        hours_BR = self.hours_BC.gather(1, place_BR)
        place_C = torch.arange(CHUNK, device=place_BR.device)
        read_BRC = (self.segment_BC[:, None] == segment_BR[:, :, None]) & (place_C <= place_BR[:, :, None])
        # X: the chunk's events and, where there is one, the state before them
        since_BQRX = (self.hours_BC[:, None] - hours_BR[:, :, None]).where(read_BRC, 0.0)[:, None]
        log_BQRX = self.score_BQC[:, :, None] + since_BQRX * self.rate_Q[:, None, None]
        log_BQRX = log_BQRX.masked_fill(~read_BRC[:, None], -torch.inf)
        if before is not None and before_segment_B is not None:
            goes_on_B1R = (segment_BR == before_segment_B[:, None])[:, None]
            gap_B1R = (before.hours_N[:, None] - hours_BR).where(goes_on_B1R[:, 0], 0.0)[:, None]
            log_BQR = before.log_weight_NQ[:, :, None] + gap_B1R * self.rate_Q[:, None]
            log_BQR = log_BQR.masked_fill(~goes_on_B1R, -torch.inf)
            log_BQRX = torch.cat([log_BQRX, log_BQR[..., None]], dim=3)
            since_BQR = before.mean_NQ[:, :, None] + gap_B1R
            since_BQRX = torch.cat([since_BQRX.expand(-1, Q, -1, -1), since_BQR[..., None]], dim=3)
        weight_BQRX = log_BQRX.softmax(dim=3)
        mean_BQR = (weight_BQRX * since_BQRX).sum(dim=3)
        offset_BQRX = since_BQRX - mean_BQR[..., None]
        timed_BQRX = weight_BQRX * offset_BQRX
        variance_BQR = (timed_BQRX * offset_BQRX).sum(dim=3)
        weights_BNC = torch.cat([weight_BQRX[..., :CHUNK], timed_BQRX[..., :CHUNK]], dim=1).flatten(1, 2)
        level_BQRD, covariance_BQRD = (weights_BNC @ self.h_BCD).unflatten(1, (2 * Q, R)).chunk(2, dim=1)
        if before is not None:
            of_level_BQR1, of_trend_BQR1 = weight_BQRX[..., CHUNK:], timed_BQRX[..., CHUNK:]
            before_BQ1D = before.level_NQD[:, :, None]
            level_BQRD = torch.addcmul(level_BQRD, of_level_BQR1, before_BQ1D)
            covariance_BQRD = torch.addcmul(covariance_BQRD, of_trend_BQR1, before_BQ1D)
            covariance_BQRD = torch.addcmul(covariance_BQRD, of_level_BQR1, before.covariance_NQD[:, :, None])
            variance_BQR = variance_BQR + of_level_BQR1[..., 0] * before.variance_NQ[:, :, None]
        by_query = (log_BQRX.logsumexp(dim=3), mean_BQR, variance_BQR, level_BQRD, covariance_BQRD)
        return Moments(hours_BR, *(x_BQRX.transpose(1, 2) for x_BQRX in by_query))


def _one_after_the_other(first: Moments, second: Moments) -> Moments:
    return Moments(*(torch.cat([getattr(part, field.name) for part in (first, second)]) for field in fields(Moments)))
