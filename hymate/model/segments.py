"""Sums and softmaxes over the segments of a row, or over any other groups of its rows.

Shape legend, besides that of `hymate.model.batch`: Q queries, D widths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def rows_of(x_NX: Tensor, index_G: Tensor) -> Tensor:
    """x_NX[index_G], whose backward is fast where rows come many times."""
    return F.embedding(index_G, x_NX.flatten(1)).unflatten(1, x_NX.shape[1:])


def wide(x: Tensor) -> Tensor:
    """At least float32: sums over a whole history are not for half precision, nor for what autocast makes of them."""
    return x if x.dtype == torch.float64 else x.float()


def segment_softmax(score_LQ: Tensor, segment_L: Tensor, num_segments: int) -> Tensor:
    """Weights (L, Q) that sum to 1 over each segment."""
    top_SQ = score_LQ.new_full((num_segments, score_LQ.shape[1]), -torch.inf)
    top_SQ = top_SQ.scatter_reduce(0, segment_L[:, None].expand_as(score_LQ), score_LQ.detach(), "amax")
    weight_LQ = (score_LQ - top_SQ[segment_L]).exp()
    return weight_LQ / segment_sum(weight_LQ, segment_L, num_segments)[segment_L]
