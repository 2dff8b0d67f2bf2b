"""Hazards that are constant within bins of time: (0, e1], (e1, e2], ..., and all hours after the last edge.

Times are in any unit, and hazards one over it.

Shape legend: N times, J bins, that is J - 1 edges; C causes, of which one comes first; H horizons.
"""

from __future__ import annotations

import numpy as np
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


def smooth_basis(num_bins: int) -> Tensor:
    """(J, J): 1 in every bin, and cosines over the bins, each quicker than the one before and smaller.

    >>> (1000 * smooth_basis(2)).round().int().tolist()
    [[1000, 1000], [177, -177]]
    """
    turns_J, middle_J = np.arange(num_bins), np.arange(num_bins) + 0.5
    cosine_JJ = np.cos(np.pi * np.outer(turns_J, middle_J) / num_bins)
    return torch.tensor(cosine_JJ / (1 + turns_J[:, None]) ** 2, dtype=torch.float32)


def first_hazards(time_N: Tensor, cause_N: Tensor, edges: Tensor, num_causes: int) -> Tensor:
    """The hazards (C, J) of all: events over the time at risk, with half an event more at the cause's mean hazard.

    cause_N: 1 to C, or 0 where none had come by then.
    """
    passed_J = hours_in_bins(time_N.double(), edges.double()).sum(dim=0)
    bin_N = bin_of(time_N, edges)
    count_CJ = torch.stack(
        [torch.bincount(bin_N[cause_N == cause + 1], minlength=len(passed_J)) for cause in range(num_causes)]
    )
    mean_C1 = (count_CJ.sum(dim=1, keepdim=True) + 0.5) / passed_J.sum()
    return (count_CJ + 0.5) / (passed_J + 0.5 / mean_C1)


def log_likelihood(log_hazard_NCJ: Tensor, time_N: Tensor, cause_N: Tensor, edges: Tensor) -> Tensor:
    """Of the first cause, 1 to C, that came at each time, or of none until then, 0: (N,)."""
    C = log_hazard_NCJ.shape[1]
    at_NC1 = bin_of(time_N, edges)[:, None, None].expand(-1, C, 1)
    came_NC = cause_N[:, None] == torch.arange(1, C + 1, device=cause_N.device)
    cumulative_N = (log_hazard_NCJ.exp().sum(dim=1) * hours_in_bins(time_N, edges)).sum(dim=1)
    return (log_hazard_NCJ.gather(2, at_NC1)[..., 0] * came_NC).sum(dim=1) - cumulative_N


def cumulative_incidence(log_hazard_NCJ: Tensor, time_H: Tensor, edges: Tensor) -> Tensor:
    """How likely each cause has come first by each time: (N, C, H)."""
    ended_NHJ = log_hazard_NCJ.exp().sum(dim=1)[:, None] * hours_in_bins(time_H, edges)
    before_NHJ = ended_NHJ.cumsum(dim=2) - ended_NHJ
    in_bin_NHJ = (-before_NHJ).exp() * -torch.expm1(-ended_NHJ)
    return (log_hazard_NCJ.softmax(dim=1)[:, :, None] * in_bin_NHJ[:, None]).sum(dim=3)
