"""Random packed rows for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hymate.model.batch import FIRST_CODE_ID, Batch


def random_row(lengths: Sequence[int], *, vocab_size: int = 30, seed: int = 0, statics: int = 2) -> Batch:
    """One row with a segment of each length: random codes, values (a third missing), times and labels."""
    g = torch.Generator().manual_seed(seed)
    L, S = sum(lengths), len(lengths)
    counts = torch.tensor(list(lengths))
    segment = torch.arange(S, dtype=torch.int32).repeat_interleave(counts)
    gaps = torch.rand(L, generator=g) * 3
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)[:-1]])
    gaps[starts] = 0.0
    times = gaps.cumsum(0)
    times = times - times[starts].repeat_interleave(counts)

    def values(n: int) -> tuple[Tensor, Tensor]:
        z = torch.randn(n, generator=g)
        z[torch.rand(n, generator=g) < 1 / 3] = torch.nan
        return z, torch.tanh(z)

    value, quantile = values(L)
    static_value, static_quantile = values(S * statics)
    return Batch(
        code_L=torch.randint(FIRST_CODE_ID, vocab_size, (L,), generator=g),
        value_L=value,
        quantile_L=quantile,
        time_hours_L=times,
        gap_hours_L=gaps,
        segment_L=segment,
        cu_seqlens=[0, *counts.cumsum(0).tolist()],
        bounds=F.pad(counts.cumsum(0), (1, 0)),
        static_code_F=torch.randint(FIRST_CODE_ID, vocab_size, (S * statics,), generator=g),
        static_value_F=static_value,
        static_quantile_F=static_quantile,
        static_segment_F=torch.arange(S, dtype=torch.int32).repeat_interleave(statics),
        age_years_A=torch.where(torch.rand(S, generator=g) < 0.3, torch.nan, 60 + torch.randn(S, generator=g)),
        lag_hours_A=torch.rand(S, generator=g),
        example_A=torch.arange(S),
        label_AT=(torch.rand(S, 1, generator=g) < 0.5).float(),
        days_AT=torch.full((S, 1), torch.nan),
        label_weight_AT=torch.ones(S, 1),
        seed_S=seed * S + torch.arange(S),
        seed=seed,
    )


def segment_of(batch: Batch, s: int) -> Batch:
    """Patient s of a row in a row of its own."""
    a, b = batch.cu_seqlens[s], batch.cu_seqlens[s + 1]
    own = batch.static_segment_F == s
    return Batch(
        code_L=batch.code_L[a:b],
        value_L=batch.value_L[a:b],
        quantile_L=batch.quantile_L[a:b],
        time_hours_L=batch.time_hours_L[a:b],
        gap_hours_L=batch.gap_hours_L[a:b],
        segment_L=torch.zeros(b - a, dtype=torch.int32),
        cu_seqlens=[0, b - a],
        bounds=torch.tensor([0, b - a]),
        static_code_F=batch.static_code_F[own],
        static_value_F=batch.static_value_F[own],
        static_quantile_F=batch.static_quantile_F[own],
        static_segment_F=torch.zeros(int(own.sum()), dtype=torch.int32),
        age_years_A=batch.age_years_A[s : s + 1],
        lag_hours_A=batch.lag_hours_A[s : s + 1],
        example_A=batch.example_A[s : s + 1],
        label_AT=batch.label_AT[s : s + 1],
        days_AT=batch.days_AT[s : s + 1],
        label_weight_AT=batch.label_weight_AT[s : s + 1],
        seed_S=batch.seed_S[s : s + 1],
        seed=batch.seed,
    )


def joined(rows: Sequence[Batch]) -> Batch:
    """One row of the patients of several."""
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(row, name) for row in rows])
        for name, value in vars(rows[0]).items()
        if isinstance(value, Tensor)
    }
    counts = torch.cat([torch.tensor(row.cu_seqlens).diff() for row in rows])
    first = torch.tensor([0, *(row.num_segments for row in rows)]).cumsum(0)
    for name in ("segment_L", "static_segment_F"):
        shifted = [getattr(row, name) + start for row, start in zip(rows, first.tolist(), strict=False)]
        tensors[name] = torch.cat(shifted).int()
    tensors["bounds"] = F.pad(counts.cumsum(0), (1, 0))
    return replace(rows[0], **tensors, cu_seqlens=tensors["bounds"].tolist())


def repacked(row: Batch, num_rows: int, seed: int) -> list[Batch]:
    """The same patients in random order in so many rows, each of one or more of them."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(row.num_segments, generator=g).tolist()
    cuts = (1 + torch.randperm(row.num_segments - 1, generator=g)[: num_rows - 1]).sort().values.tolist()
    bounds = zip([0, *cuts], [*cuts, row.num_segments], strict=True)
    return [joined([segment_of(row, s) for s in order[a:b]]) for a, b in bounds]


def in_double(row: Batch) -> Batch:
    """The same in float64."""
    floats: dict[str, Any] = {
        k: v.double() for k, v in vars(row).items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    return replace(row, **floats)


def answered_at(row: Batch, last_events: Sequence[Sequence[int]], seed: int = 0) -> Batch:
    """The row with an answer after each of these events of each segment (places in it, never decreasing)."""
    g = torch.Generator().manual_seed(seed)
    A, T = sum(map(len, last_events)), row.label_AT.shape[1]
    last = [start + place for start, places in zip(row.cu_seqlens, last_events, strict=False) for place in places]
    label_AT = (torch.rand(A, T, generator=g) < 0.5).float()
    label_AT[torch.rand(A, T, generator=g) < 0.2] = torch.nan
    return replace(
        row,
        last_A=torch.tensor(last),
        age_years_A=torch.where(torch.rand(A, generator=g) < 0.3, torch.nan, 60 + torch.randn(A, generator=g)),
        lag_hours_A=torch.rand(A, generator=g),
        example_A=torch.arange(A),
        label_AT=label_AT,
        days_AT=torch.where(label_AT.isnan(), torch.nan, 9 * torch.rand(A, T, generator=g)),
        label_weight_AT=0.5 + torch.rand(A, T, generator=g),
    )


def answered_alone(row: Batch) -> Batch:
    """The same answers, each at the end of a segment of its own, which holds what it reads."""
    assert row.last_A is not None
    of_A = row.segment_L[row.last_A].tolist()
    start = [row.cu_seqlens[s] for s in of_A]
    stop = (row.last_A + 1).tolist()
    at_L = torch.cat([torch.arange(a, b) for a, b in zip(start, stop, strict=True)])
    own = [torch.nonzero(row.static_segment_F == s)[:, 0] for s in of_A]
    count = torch.tensor(stop) - torch.tensor(start)
    segment = torch.arange(len(of_A), dtype=torch.int32)
    bounds = F.pad(count.cumsum(0), (1, 0))
    events = ("code_L", "value_L", "quantile_L", "time_hours_L", "gap_hours_L")
    statics = ("static_code_F", "static_value_F", "static_quantile_F")
    columns: dict[str, Any] = {name: getattr(row, name)[at_L] for name in events}
    columns |= {name: getattr(row, name)[torch.cat(own)] for name in statics}
    return replace(
        row,
        **columns,
        segment_L=segment.repeat_interleave(count),
        cu_seqlens=bounds.tolist(),
        bounds=bounds,
        static_segment_F=segment.repeat_interleave(torch.tensor([len(statics) for statics in own])),
        seed_S=row.seed_S[of_A],
        last_A=None,
        variables=None,
        ends=None,
    )
