"""Self-supervised objectives: which events are hidden, and what lies ahead of a moment.

Both depend only on the row and its `seed`, never on a global random state, so that they are the same on any
number of workers and after a resume. Shape legend: see `hymate.batch`; A anchors, K forecast variables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hymate.batch import FIRST_CODE_ID, MASK_ID, Batch
from hymate.config import ObjectiveConfig


@dataclass
class Hidden:
    """A row with events hidden: the batch the model sees, and bool masks of the hidden codes and values (L,)."""

    batch: Batch
    code_L: Tensor
    value_L: Tensor


def hide_events(batch: Batch, objective: ObjectiveConfig) -> Hidden:
    """Hide `mask_share` of the events, single ones and whole spans: of each the code, the value or both.

    An event without a value only ever loses its code. At least one event of the row loses its code. When no
    `masked_event` term has a weight, nothing is hidden.
    """
    L, device = batch.num_events, batch.code_L.device
    if not objective.code_weight and not objective.value_weight:
        nothing = torch.zeros(L, dtype=torch.bool, device=device)
        return Hidden(batch, nothing, nothing)
    generator = torch.Generator().manual_seed(batch.seed)
    hidden = torch.rand(L, generator=generator) < objective.mask_share * (1 - objective.span_share)
    starts = torch.rand(L, generator=generator) < objective.mask_share * objective.span_share / objective.span_length
    # a span reaches from its start a geometric-like number of events on, and never into the next patient
    lengths = (1 + torch.rand(L, generator=generator) * (2 * objective.span_length - 1)).long()
    segment_end = torch.tensor(batch.cu_seqlens[1:])[batch.segment_L.cpu().long()]
    stops = torch.minimum(torch.arange(L) + lengths, segment_end)[starts]
    edges = torch.zeros(L + 1, dtype=torch.long)
    edges.index_add_(0, torch.nonzero(starts)[:, 0], torch.ones(len(stops), dtype=torch.long))
    edges.index_add_(0, stops, -torch.ones(len(stops), dtype=torch.long))
    hidden |= edges.cumsum(0)[:L] > 0
    part = torch.rand(L, generator=generator)
    fallback = int(torch.randint(L, (1,), generator=generator))
    hidden, part = hidden.to(device), part.to(device)
    has_value = ~torch.isnan(batch.value_L)
    code_L = hidden & ((part < 2 / 3) | ~has_value)
    code_L[fallback] |= ~code_L.any()
    value_L = hidden & has_value & (part >= 1 / 3)
    seen = replace(batch, code_L=torch.where(code_L, MASK_ID, batch.code_L))
    return Hidden(seen, code_L, value_L)


@dataclass
class Forecast:
    """What lies ahead of anchor events.

    anchor_A: int64, positions in the row, in the order of the segments and as many in each.
    whole_A: bool, whether all of the horizon lies before the segment's last event; of others it is not known what
        was not measured.
    measured_AK: bool, whether each variable has an event within the horizon.
    value_AK: the mean of its normalised values there; NaN where there is none.
    """

    anchor_A: Tensor
    whole_A: Tensor
    measured_AK: Tensor
    value_AK: Tensor


def forecast_targets(batch: Batch, objective: ObjectiveConfig) -> Forecast:
    """What lies ahead of `forecast_points` random events of each segment.

    The K variables are the most frequent codes. What counts is strictly later than the anchor's time, up to and
    including `horizon_hours` on, within the same segment. Values are the paper family's forecasting objective (STraTS,
    arXiv 2107.14293); what is measured at all tells how ill a patient is thought to be. Anchors are drawn from the
    events whose horizon is whole, where a segment has any.
    """
    device, K, P = batch.code_L.device, objective.forecast_variables, objective.forecast_points
    horizon = objective.horizon_hours
    generator = torch.Generator().manual_seed(batch.seed + 1)
    start_S, stop_S = (torch.tensor(batch.cu_seqlens, device=device)[at] for at in (slice(-1), slice(1, None)))
    draw_SP = torch.rand(len(start_S), P, generator=generator).to(device)
    # one clock for all segments, each far enough from the next that no horizon reaches it
    span = batch.time_hours_L.max().double() + horizon + 1
    clock_L = batch.segment_L.double() * span + batch.time_hours_L.double()
    whole_S = torch.searchsorted(clock_L, clock_L[stop_S - 1] - horizon, right=True) - start_S
    choices_S = torch.where(whole_S > 0, whole_S, stop_S - start_S)
    anchor_A = (start_S[:, None] + (draw_SP * choices_S[:, None]).long()).flatten()
    first_A = torch.searchsorted(clock_L, clock_L[anchor_A], right=True)
    stop_A = torch.searchsorted(clock_L, clock_L[anchor_A] + horizon, right=True)

    variable_L = batch.code_L - FIRST_CODE_ID
    at = torch.nonzero((variable_L >= 0) & (variable_L < K))[:, 0]
    # by variable, then place: what lies ahead of an anchor is one run of each variable's events
    key, order = (variable_L[at] * batch.num_events + at).sort()
    value = batch.value_L[at[order]].double()
    sums, counts = (F.pad(x.cumsum(dim=0), (1, 0)) for x in (torch.nan_to_num(value), (~torch.isnan(value)).long()))
    variable_K = torch.arange(K, device=device) * batch.num_events
    first_AK, stop_AK = (torch.searchsorted(key, place_A[:, None] + variable_K) for place_A in (first_A, stop_A))
    return Forecast(
        anchor_A=anchor_A,
        whole_A=(whole_S > 0).repeat_interleave(P),
        measured_AK=stop_AK > first_AK,
        value_AK=((sums[stop_AK] - sums[first_AK]) / (counts[stop_AK] - counts[first_AK])).float(),
    )


def histories_until(batch: Batch, anchor_A: Tensor, seen_L: Tensor) -> tuple[Batch, Tensor]:
    """A segment for each anchor: the events up to it that are seen (bool, L), and itself. Also where in the row each
    of these events is.

    The anchors are in the order of the segments and as many in each, as `Forecast` has them.
    """
    device = anchor_A.device
    start_S = torch.tensor(batch.cu_seqlens[:-1], device=device)
    of_A = torch.arange(len(start_S), device=device).repeat_interleave(len(anchor_A) // len(start_S))
    at_L, segment_L = _ranges(start_S[of_A], anchor_A + 1 - start_S[of_A])
    kept_L = seen_L[at_L] | (at_L == anchor_A[segment_L])
    at_L, segment_L = at_L[kept_L], segment_L[kept_L]
    count_S = torch.bincount(batch.static_segment_F.long(), minlength=len(start_S))
    static_at_F, static_segment_F = _ranges((count_S.cumsum(0) - count_S)[of_A], count_S[of_A])
    events, statics = (
        {name: getattr(batch, name)[at] for name in names}
        for at, names in (
            (at_L, ("code_L", "value_L", "quantile_L", "time_hours_L", "gap_hours_L")),
            (static_at_F, ("static_code_F", "static_value_F", "static_quantile_F")),
        )
    )
    return replace(
        batch,
        **events,
        **statics,
        segment_L=segment_L.int(),
        cu_seqlens=[0, *torch.bincount(segment_L, minlength=len(of_A)).cumsum(0).tolist()],
        static_segment_F=static_segment_F.int(),
        age_years_S=batch.age_years_S[of_A],
        lag_hours_S=torch.zeros_like(batch.lag_hours_S[of_A]),
        example_S=batch.example_S[of_A],
        label_ST=batch.label_ST[of_A],
        days_ST=batch.days_ST[of_A],
    ), at_L


def _ranges(start_A: Tensor, length_A: Tensor) -> tuple[Tensor, Tensor]:
    """start, start + 1, ... of each range one after the other, and the number of the range that each belongs to."""
    range_N = torch.arange(len(start_A), device=start_A.device).repeat_interleave(length_A)
    first_A = length_A.cumsum(0) - length_A
    return torch.arange(len(range_N), device=start_A.device) + (start_A - first_A)[range_N], range_N


def masked_mean(x: Tensor) -> Tensor:
    """Mean of what is there; zero, still connected to the graph, when nothing is."""
    return x.sum() / max(x.numel(), 1)
