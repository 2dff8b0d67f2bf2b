"""Attention inside a packed row: each segment attends to itself only, and masked blocks are never computed.

Shape legend: L events of the row, n events of one segment, H heads, E width of a head, W window, K keys of a block.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_attention(
    q_LHE: Tensor, k_LHE: Tensor, v_LHE: Tensor, cu_seqlens: list[int], *, window: int | None, causal: bool
) -> Tensor:
    """Scaled dot-product attention (L, H, E) within each segment cu_seqlens[s]:cu_seqlens[s + 1] of a row.

    window: events see those less than `window` events away, None sees the whole segment; causal: only those at or
    before themselves. With a window, time and memory are linear in L. On CUDA in half precision one fused
    variable-length kernel does the row (not yet run on a GPU).
    """
    lengths = [stop - start for start, stop in itertools.pairwise(cu_seqlens)]
    if q_LHE.is_cuda and q_LHE.dtype in (torch.float16, torch.bfloat16):
        return _fused(q_LHE, k_LHE, v_LHE, cu_seqlens, max(lengths), window, causal)
    # split, not slices: the backward of each slice would fill a tensor as long as the row
    parts = zip(*(x.split(lengths) for x in (q_LHE, k_LHE, v_LHE)), strict=True)
    return torch.cat([_one_segment(q, k, v, window, causal) for q, k, v in parts])


def continued_attention(q_LHE: Tensor, k_KHE: Tensor, v_KHE: Tensor, *, window: int) -> Tensor:
    """Causal attention (L, H, E) of the last L of K >= L events; those before them are seen and ask nothing.

    As `packed_attention` over all K events gives for the last L, with the same window.
    """
    past, device = len(k_KHE) - len(q_LHE), q_LHE.device
    outputs = []
    for first in range(past, len(k_KHE), window):
        stop, seen = min(first + window, len(k_KHE)), max(0, first - window + 1)
        distance = torch.arange(first, stop, device=device)[:, None] - torch.arange(seen, stop, device=device)
        q = q_LHE[first - past : stop - past].transpose(0, 1)[None]
        k, v = (x[seen:stop].transpose(0, 1)[None] for x in (k_KHE, v_KHE))
        mask = (distance >= 0) & (distance < window)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(outputs)


def _one_segment(q_nHE: Tensor, k_nHE: Tensor, v_nHE: Tensor, window: int | None, causal: bool) -> Tensor:
    if window is not None and len(q_nHE) > window:
        return _windowed(q_nHE, k_nHE, v_nHE, window, causal)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_nHE, k_nHE, v_nHE))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)[0].transpose(0, 1)


def _windowed(q_nHE: Tensor, k_nHE: Tensor, v_nHE: Tensor, window: int, causal: bool) -> Tensor:
    """Blocks of `window` queries attend to their own block and its neighbours under a band mask.

    Blocks inside the segment share one mask; those at its ends also mask what lies outside the segment.
    """
    n, W, device = len(q_nHE), window, q_nHE.device
    padded = [F.pad(x, (0, 0, 0, 0, 0, -n % W)) for x in (q_nHE, k_nHE, v_nHE)]
    q, k, v = (x.unflatten(0, (-1, W)).transpose(1, 2) for x in padded)  # (blocks, H, W, E)
    shifts = (-1, 0) if causal else (-1, 0, 1)
    k, v = (torch.cat([_shifted(x, shift) for shift in shifts], dim=2) for x in (k, v))
    query_W = torch.arange(W, device=device)
    key_K = torch.arange(-W, (len(shifts) - 1) * W, device=device)
    distance_WK = query_W[:, None] - key_K
    band_WK = distance_WK.abs() < W
    if causal:
        band_WK &= distance_WK >= 0

    def attend(first: int, stop: int) -> Tensor:
        mask = band_WK
        if first == 0 or stop == len(q):
            begin = W * torch.arange(first, stop, device=device)[:, None, None]
            key = begin + key_K
            # a padded query sees everything, for a softmax over nothing would not be a number
            mask = ((band_WK & (key >= 0) & (key < n)) | (begin + query_W[:, None] >= n))[:, None]
        return F.scaled_dot_product_attention(q[first:stop], k[first:stop], v[first:stop], attn_mask=mask)

    last = max(1, len(q) - (1 if causal else 2))
    bounds = [0, 1, last, len(q)]
    blocks = torch.cat([attend(a, b) for a, b in itertools.pairwise(bounds) if a < b])
    return blocks.transpose(1, 2).flatten(0, 1)[:n]


def _shifted(x: Tensor, shift: int) -> Tensor:
    """Each block's neighbour `shift` blocks on, zeros beyond the ends."""
    if shift == 0:
        return x
    zero = torch.zeros_like(x[:1])
    return torch.cat([zero, x[:-1]] if shift < 0 else [x[1:], zero])


def _fused(
    q_LHE: Tensor, k_LHE: Tensor, v_LHE: Tensor, cu_seqlens: list[int], longest: int, window: int | None, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor(cu_seqlens, dtype=torch.int32, device=q_LHE.device)
    reach = -1 if window is None else window - 1
    limits = (reach, 0 if causal else reach)
    y_LHE = varlen_attn(q_LHE, k_LHE, v_LHE, bounds, bounds, longest, longest, window_size=limits)
    assert isinstance(y_LHE, Tensor)
    return y_LHE
