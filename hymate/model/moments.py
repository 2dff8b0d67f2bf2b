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
    B, R = ends.place_BR.shape

    def chunks(x_LX: Tensor, fill: int = 0) -> Tensor:
        padding = [0, 0] * (x_LX.ndim - 1) + [0, B * CHUNK - len(x_LX)]
        return F.pad(x_LX, padding, value=fill).unflatten(0, (B, CHUNK))

    hours_BC, segment_BC = chunks(batch.time_hours_L.to(h_LD.dtype)), chunks(batch.segment_L, fill=-1)
    # each chunk's last event is read up to as well: for the chunks after it
    place_BR = F.pad(ends.place_BR, (0, 1), value=CHUNK - 1)
    segment_BR = segment_BC.gather(1, place_BR)
    found = _within(chunks(h_LD), chunks(score_LQ), rate_Q, hours_BC, segment_BC, place_BR, segment_BR)
    last_segment_B, before = segment_BR[:, -1], found.at((slice(None), -1))
    step = 1
    while step * CHUNK < max(batch.lengths):
        goes_on_B = last_segment_B[step:] == last_segment_B[:-step]
        joined = before.at(slice(step, None)).after(before.at(slice(None, -step)), goes_on_B, rate_Q)
        before = _one_after_the_other(before.at(slice(None, step)), joined)
        step *= 2
    # the state before a chunk is the one up to the last event of the chunk before it; the first has none
    before = before.each(lambda x_BX: x_BX.roll(1, 0)[:, None].expand(-1, R, *x_BX.shape[1:]).flatten(0, 1))
    goes_on_BR = segment_BR[:, :-1] == last_segment_B.roll(1, 0)[:, None]
    goes_on_BR = goes_on_BR & (torch.arange(B, device=goes_on_BR.device) > 0)[:, None]
    own = found.each(lambda x_BRX: x_BRX[:, :-1].flatten(0, 1))
    return own.after(before, goes_on_BR.flatten(), rate_Q).at(ends.end_A)


def _within(
    h_BCD: Tensor,
    score_BCQ: Tensor,
    rate_Q: Tensor,
    hours_BC: Tensor,
    segment_BC: Tensor,
    place_BR: Tensor,
    segment_BR: Tensor,
) -> Moments:
    """Of the events of its own chunk and segment up to each of the places; N is (B, R)."""
    R, Q = place_BR.shape[1], len(rate_Q)
    hours_BR = hours_BC.gather(1, place_BR)
    since_BRC = hours_BC[:, None] - hours_BR[:, :, None]
    place_C = torch.arange(CHUNK, device=place_BR.device)
    read_BRC = (segment_BC[:, None] == segment_BR[:, :, None]) & (place_C <= place_BR[:, :, None])
    since_BRC = since_BRC.where(read_BRC, 0.0)
    log_BQRC = score_BCQ.transpose(1, 2)[:, :, None] + since_BRC[:, None] * rate_Q[:, None, None]
    log_BQRC = log_BQRC.masked_fill(~read_BRC[:, None], -torch.inf)
    log_weight_BQR, weight_BQRC = log_BQRC.logsumexp(dim=3), log_BQRC.softmax(dim=3)
    mean_BQR = (weight_BQRC * since_BRC[:, None]).sum(dim=3)
    offset_BQRC = since_BRC[:, None] - mean_BQR[..., None]
    timed_BQRC = weight_BQRC * offset_BQRC
    sums_BND = torch.cat([weight_BQRC, timed_BQRC], dim=1).flatten(1, 2) @ h_BCD
    level_BRQD, covariance_BRQD = sums_BND.unflatten(1, (2 * Q, R)).transpose(1, 2).chunk(2, dim=2)
    variance_BQR = (timed_BQRC * offset_BQRC).sum(dim=3)
    mean_BRQ, variance_BRQ, log_weight_BRQ = (
        x_BQR.transpose(1, 2) for x_BQR in (mean_BQR, variance_BQR, log_weight_BQR)
    )
    return Moments(hours_BR, log_weight_BRQ, mean_BRQ, variance_BRQ, level_BRQD, covariance_BRQD)


def _one_after_the_other(first: Moments, second: Moments) -> Moments:
    return Moments(*(torch.cat([getattr(part, field.name) for part in (first, second)]) for field in fields(Moments)))
