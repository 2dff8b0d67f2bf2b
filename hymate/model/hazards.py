"""Hazards that are constant within bins of time: (0, e1], (e1, e2], ..., and all hours after the last edge.

Shape legend: N times, J bins, that is J - 1 edges.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bin_of(hours_N: Tensor, edges: Tensor) -> Tensor:
    """The bin that each time lies in: int64 (N,)."""
    return torch.bucketize(hours_N, edges)


def hours_in_bins(hours_N: Tensor, edges: Tensor) -> Tensor:
    """How much of the time until each of the hours lies in each bin: (N, J).

    >>> hours_in_bins(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 4.0])).tolist()
    [[1.0, 0.0, 0.0], [2.0, 2.0, 1.0]]
    """
    starts_J = F.pad(edges, (1, 0))
    ends_J = F.pad(edges, (0, 1), value=torch.inf)
    return (torch.minimum(hours_N[:, None], ends_J) - starts_J).clamp(min=0)


def edges_of(hours_N: Tensor, num_bins: int) -> Tensor:
    """Edges between which as many of the times lie in each bin, but for ties."""
    last_J = (torch.arange(1, num_bins) * len(hours_N) // num_bins - 1).clamp(min=0)
    return hours_N.sort().values[last_J]
