"""Attention inside a packed row."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_attention(
    q_LHE: Tensor,
    k_LHE: Tensor,
    v_LHE: Tensor,
    cu_seqlens: list[int] | Tensor,
    *,
    window: int | None,
    causal: bool,
    dropout_p: float = 0.0,
) -> Tensor:
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    outputs = []
    for start, end in itertools.pairwise(bounds):
        q, k, v = (t[start:end].transpose(0, 1)[None] for t in (q_LHE, k_LHE, v_LHE))
        i = torch.arange(end - start, device=q.device)
        gap = i[:, None] - i[None, :]
        mask = gap >= 0 if causal else torch.ones_like(gap, dtype=torch.bool)
        if window is not None:
            mask = mask & (gap.abs() < window)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)[0].transpose(0, 1))
    return torch.cat(outputs)
