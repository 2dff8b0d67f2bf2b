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


def forecast_targets(batch: Batch, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Anchor events (A,) and the mean normalised value (A, K) of each variable in the hours that follow; NaN if none.

    The K variables are the most frequent codes. What counts is strictly later than the anchor's time, up to and
    including `horizon_hours` on, within the same patient (the paper family's forecasting objective, STraTS,
    arXiv 2107.14293).
    """
    device, K = batch.code_L.device, objective.forecast_variables
    generator = torch.Generator().manual_seed(batch.seed + 1)
    starts = torch.tensor(batch.cu_seqlens[:-1])
    lengths = torch.tensor(batch.cu_seqlens).diff()
    draw_SP = torch.rand(len(starts), objective.forecast_points, generator=generator)
    anchor_A = (starts[:, None] + (draw_SP * lengths[:, None]).long()).flatten().to(device)
    span = batch.time_hours_L.max().double() + objective.horizon_hours + 1
    clock_L = batch.segment_L.double() * span + batch.time_hours_L.double()
    first_A = torch.searchsorted(clock_L, clock_L[anchor_A], right=True)
    stop_A = torch.searchsorted(clock_L, clock_L[anchor_A] + objective.horizon_hours, right=True)
    variable_L = batch.code_L - FIRST_CODE_ID
    counted = (variable_L >= 0) & (variable_L < K) & ~torch.isnan(batch.value_L)
    at = torch.nonzero(counted)[:, 0]
    # by variable, then place: what lies ahead of an anchor is one run of each variable's values
    key, order = (variable_L[at] * batch.num_events + at).sort()
    running = F.pad(batch.value_L[at[order]].double().cumsum(dim=0), (1, 0))
    variable_K = torch.arange(K, device=device) * batch.num_events
    first_AK, stop_AK = (torch.searchsorted(key, place_A[:, None] + variable_K) for place_A in (first_A, stop_A))
    return anchor_A, ((running[stop_AK] - running[first_AK]) / (stop_AK - first_AK)).float()


def masked_mean(x: Tensor) -> Tensor:
    """Mean of what is there; zero, still connected to the graph, when nothing is."""
    return x.sum() / max(x.numel(), 1)
