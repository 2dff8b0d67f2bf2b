"""Self-supervised objectives: which events are hidden, what lies ahead of a moment, and when each code comes next.

All depend only on a segment and its seed (`Batch.seed_S`): not on the row that it stands in, on a global random state,
or on the numbers that dropout draws. So they are the same in any packing, on any number of workers and after a resume.

A loss is a weighted sum of terms, each the mean over its targets in all rows of an optimiser step, on all workers.
`LossModel` gives the sum over a row's targets and beforehand, from the row alone, their number; `mean_loss` joins them.

Shape legend: see `hymate.model.batch`; A anchors, K forecast variables, or terms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hymate.config import ObjectiveConfig
from hymate.hashing import SPLITMIX_STEP, shifted_right, splitmix64
from hymate.model.batch import FIRST_CODE_ID, HOURS_PER_YEAR, MASK_ID, Ahead, Asked, Batch, Coming, ranges
from hymate.model.segments import segment_count

# What a random number is for: so that no two uses share numbers.
EVENT_USES, ANCHOR_USE, NUM_USES = range(4), 4, 5


@dataclass
class Hidden:
    """A row with events hidden: the batch the model sees, and bool masks of the hidden codes and values (L,)."""

    batch: Batch
    code_L: Tensor
    value_L: Tensor


def hide_events(batch: Batch, objective: ObjectiveConfig) -> Hidden:
    """Hide `mask_fraction` of the events, single ones and whole spans: of each the code, the value or both.

    An event without a value only ever loses its code. When no `masked_event` term has a weight, nothing is hidden.
    """
    L, device = batch.num_events, batch.code_L.device
    if not objective.code_weight and not objective.value_weight:
        nothing = torch.zeros(L, dtype=torch.bool, device=device)
        return Hidden(batch, nothing, nothing)
    segment_L, place_L = batch.segment_L.long(), torch.arange(L, device=device)
    bounds = batch.bounds
    seed_L, of_segment_L = batch.seed_S[segment_L], place_L - bounds[segment_L]
    single_L, starting_L, length_L, part_L = (_uniform(seed_L, of_segment_L, use) for use in EVENT_USES)
    starts = starting_L < objective.mask_fraction * objective.span_fraction / objective.span_length
    # a span reaches from its start a geometric-like number of events on, and never into the next patient
    lengths = (1 + length_L * (2 * objective.span_length - 1)).long()
    stops = torch.minimum(place_L + lengths, bounds[segment_L + 1])
    edges = torch.zeros(L + 1, dtype=torch.long, device=device)
    edges.index_add_(0, place_L, starts.long())
    edges.index_add_(0, stops, -starts.long())
    hidden = (single_L < objective.mask_fraction * (1 - objective.span_fraction)) | (edges.cumsum(0)[:L] > 0)
    has_value = ~torch.isnan(batch.value_L)
    code_L = hidden & ((part_L < 2 / 3) | ~has_value)
    value_L = hidden & has_value & (part_L >= 1 / 3)
    seen = replace(batch, code_L=torch.where(code_L, MASK_ID, batch.code_L))
    return Hidden(seen, code_L, value_L)


def _uniform(seed: Tensor, place: Tensor, use: int) -> Tensor:
    """Numbers in [0, 1), float64: each is the (place, use)-th output of a SplitMix64 that starts at its seed.

    Counted, not drawn in turn: the same wherever a segment stands, and on every device.
    """
    state = seed + (place * NUM_USES + use + 1) * SPLITMIX_STEP
    return shifted_right(splitmix64(state), 11).double() / 2**53


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
    arXiv 2107.14293); what is measured at all shows how ill a patient is thought to be. Anchors are drawn from the
    events whose horizon is whole, where a segment has any.
    """
    device, K, P = batch.code_L.device, objective.forecast_variables, objective.forecast_points
    horizon = objective.horizon_hours
    start_S, stop_S = batch.bounds[:-1], batch.bounds[1:]
    draw_SP = _uniform(batch.seed_S[:, None], torch.arange(P, device=device), ANCHOR_USE)
    clock_L = _clock(batch, horizon + 1)  # no horizon reaches the next segment
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


def next_events(batch: Batch, objective: ObjectiveConfig) -> Coming:
    """When each code comes next after the anchors: `time_to_event_fraction` of the events, drawn at random.

    What counts is strictly later than the anchor's time; what has not come by the segment's end is censored. Each event
    is drawn by itself: with a fixed number for each segment, an event would be drawn less often the more comes after
    it, and the hazards be too low. A segment without any has its last event, after which nothing comes.
    """
    device, L, fraction = batch.code_L.device, batch.num_events, objective.time_to_event_fraction
    segment_L, place_L = batch.segment_L.long(), torch.arange(L, device=device)
    # counted backwards: the numbers of forecasts' anchors are counted on from 0
    draw_L = _uniform(batch.seed_S[segment_L], batch.bounds[segment_L] - place_L - 1, ANCHOR_USE) / fraction
    last_S = batch.bounds[1:] - 1
    none_S = segment_count(segment_L[draw_L < 1], batch.num_segments) == 0
    anchor_A = _places((draw_L < 1).index_put((last_S,), none_S | (draw_L[last_S] < 1)))
    of_A, hours_L, clock_L = segment_L[anchor_A], batch.time_hours_L, _clock(batch, 1.0)
    later_A = torch.searchsorted(clock_L, clock_L[anchor_A], right=True)
    # by segment and code, then place: the first from an anchor on is found in each code's own run of events
    codes = batch.code_L.max() + 1
    key_L = ((segment_L * codes + batch.code_L) * L + place_L).sort().values
    own_U = torch.unique_consecutive(key_L // L)
    count_S = torch.bincount(own_U // codes, minlength=batch.num_segments)
    at_N, anchor_N = ranges((count_S.cumsum(0) - count_S)[of_A], count_S[of_A])
    own_N = own_U[at_N]
    key_N = key_L[torch.searchsorted(key_L, own_N * L + later_A[anchor_N]).clamp(max=L - 1)]
    came_N = (key_N // L == own_N) & (key_N % L >= later_A[anchor_N]) & (own_N % codes >= FIRST_CODE_ID)
    anchor_N, event_N = anchor_N[came_N], key_N[came_N] % L
    value_N = batch.value_L[event_N]
    return Coming(
        anchor_A=anchor_A,
        draw_A=draw_L[anchor_A],
        age_years_A=_age_at(batch, anchor_A, of_A),
        until_hours_A=hours_L[last_S[of_A]] - hours_L[anchor_A],
        anchor_N=anchor_N,
        code_N=batch.code_L[event_N],
        hours_N=hours_L[event_N] - hours_L[anchor_A[anchor_N]],
        value_N=value_N,
        valued_N=_places(~value_N.isnan()),
        lengths=torch.bincount(anchor_N, minlength=len(anchor_A)).tolist(),
    )


def _clock(batch: Batch, apart_hours: float) -> Tensor:
    """One clock for all segments (L,), float64, each so far after the one before.

    Of whole hours, so that a sum with a time is not rounded.
    """
    span = (batch.time_hours_L.max().double() + apart_hours).ceil()
    return batch.segment_L.double() * span + batch.time_hours_L.double()


def _age_at(batch: Batch, anchor_A: Tensor, of_A: Tensor) -> Tensor:
    """In years, at events of the segments of_A."""
    last_A = batch.bounds[1:][of_A] - 1
    ahead_hours_A = batch.lag_hours_A[of_A] + batch.time_hours_L[last_A].double() - batch.time_hours_L[anchor_A]
    return (batch.age_years_A[of_A] - ahead_hours_A / HOURS_PER_YEAR).to(batch.age_years_A.dtype)


def histories_until(batch: Batch, anchor_A: Tensor, seen_L: Tensor) -> tuple[Batch, Tensor]:
    """A segment for each anchor: the events up to it that are seen (bool, L), and itself, as of its time. Also where in
    the row each of these events is.

    The anchors are in the order of the segments and as many in each, as `Forecast` has them.
    """
    start_S = batch.bounds[:-1]
    of_A = torch.arange(len(start_S), device=anchor_A.device).repeat_interleave(len(anchor_A) // len(start_S))
    at_L, segment_L = ranges(start_S[of_A], anchor_A + 1 - start_S[of_A])
    kept_L = seen_L[at_L] | (at_L == anchor_A[segment_L])
    at_L, segment_L = at_L[kept_L], segment_L[kept_L]
    count_S = torch.bincount(batch.static_segment_F.long(), minlength=len(start_S))
    static_at_F, static_segment_F = ranges((count_S.cumsum(0) - count_S)[of_A], count_S[of_A])
    events, statics = (
        {name: getattr(batch, name)[at] for name in names}
        for at, names in (
            (at_L, ("code_L", "value_L", "quantile_L", "time_hours_L", "gap_hours_L")),
            (static_at_F, ("static_code_F", "static_value_F", "static_quantile_F")),
        )
    )
    bounds = F.pad(torch.bincount(segment_L, minlength=len(of_A)).cumsum(0), (1, 0))
    return replace(
        batch,
        **events,
        **statics,
        segment_L=segment_L.int(),
        cu_seqlens=bounds.tolist(),
        bounds=bounds,
        static_segment_F=static_segment_F.int(),
        age_years_A=_age_at(batch, anchor_A, of_A),
        lag_hours_A=torch.zeros_like(batch.lag_hours_A[of_A]),
        example_A=batch.example_A[of_A],
        label_AT=batch.label_AT[of_A],
        days_AT=batch.days_AT[of_A],
        label_weight_AT=batch.label_weight_AT[of_A],
        seed_S=batch.seed_S[of_A],
        variables=None,
    ), at_L


def ask(batch: Batch, objective: ObjectiveConfig, terms: Collection[str], members: int) -> Asked:
    """What a row is asked by `terms`, of a forecast's heads by each of `members`."""
    hidden = hide_events(batch, objective)
    counts, ahead, coming = {"code": hidden.code_L.sum(), "value": hidden.value_L.sum()}, None, None
    if objective.forecast_weight:
        found = forecast_targets(batch, objective)
        past, at_L = histories_until(batch, found.anchor_A, ~(hidden.code_L | hidden.value_L))
        known_AK = ~found.value_AK.isnan()
        value_N = _places(known_AK[:, None].expand(-1, members, -1).flatten())
        ahead = Ahead(past, at_L, _places(found.whole_A), value_N, found.measured_AK, found.value_AK)
        counts["measured"] = found.whole_A.sum() * found.measured_AK.shape[1]
        counts["forecast"] = known_AK.sum()
    if objective.time_to_event_weight:
        coming = next_events(batch, objective)
        counts |= {"time": batch.bounds.new_full((), len(coming.code_N))}
        counts |= {"next": batch.bounds.new_full((), len(coming.valued_N))}
    return Asked(
        code_L=hidden.batch.code_L,
        hidden_L=hidden.value_L,
        code_N=_places(hidden.code_L),
        value_N=_places(hidden.value_L),
        count_K=torch.stack([counts[name.split("_")[0]] for name in terms]).double(),
        ahead=ahead,
        coming=coming,
    )


def _places(mask_N: Tensor) -> Tensor:
    return torch.nonzero(mask_N)[:, 0]


class LossModel(nn.Module, ABC):
    """A model with a loss. Its forward returns "sum_K", the sum of each of `terms` over its targets in a row.

    terms: each term's weight in the loss; 0 for what is only measured.
    """

    terms: dict[str, float]

    @abstractmethod
    def ask(self, batch: Batch) -> Batch:
        """The same row with what the model would else find by itself; best done where the row is made, on the CPU."""

    @abstractmethod
    def count_targets(self, batch: Batch) -> Tensor:
        """How many targets, or the sum of their weights, each of `terms` has in a row: (K,), float64."""

    def loss(self, batch: Batch) -> Tensor:
        """Of a step that is this row alone."""
        return mean_loss(self.terms, self(batch)["sum_K"], self.count_targets(batch))[0]


def huber(error: Tensor) -> Tensor:
    """The sum of the Huber losses."""
    return F.huber_loss(error, torch.zeros_like(error), reduction="sum")


def mean_loss(terms: Mapping[str, float], sum_K: Tensor, count_K: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and each term's mean (K,): its sum over count_K targets; 0 where there is none.

    With the count of a whole step and the sum of a part of it: what that part adds to both.
    """
    mean_K = sum_K / torch.where(count_K > 0, count_K, 1.0).to(sum_K.dtype)
    parts = [weight * mean for weight, mean in zip(terms.values(), mean_K, strict=True) if weight]
    return torch.stack(parts).sum(), mean_K
