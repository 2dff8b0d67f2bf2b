"""Attention inside a packed row: each segment attends to itself only, and masked blocks are never computed.

Shape legend: L events of the row, n events of one segment, H heads, E width of a head, W window, K keys of a block.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

HAS_KERNEL = torch.__version__ >= "2.11"  # compared as versions; older ones' variable-length attention has no window


def packed_attention(
    q_LHE: Tensor,
    k_LHE: Tensor,
    v_LHE: Tensor,
    cu_seqlens: list[int],
    *,
    window: int | None,
    causal: bool,
    bounds: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention (L, H, E) within each segment cu_seqlens[s]:cu_seqlens[s + 1] of a row.

    window: events see those less than `window` events away, None sees the whole segment; causal: only those at or
    before themselves. With a window, time and memory are linear in L. On a GPU one kernel does a row in half precision,
    where the kernel can; otherwise each segment is attended to by itself. (Not yet run on a GPU.)

    bounds: cu_seqlens on the device, where it is there already.
    """
    lengths = [stop - start for start, stop in itertools.pairwise(cu_seqlens)]
    if q_LHE.is_cuda and _kernel_takes(q_LHE):
        bounds = torch.tensor(cu_seqlens, device=q_LHE.device) if bounds is None else bounds
        return _fused(q_LHE, k_LHE, v_LHE, bounds.int(), max(lengths), window, causal)
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
    """Blocks of queries attend to the keys that their events can see, under a band mask; nothing is padded.

    The blocks between the first `window` queries and the last ones all see as many keys and share one mask; their
    keys are overlapping views of one tensor.
    """
    n, W, ahead = len(q_nHE), window, 0 if causal else window
    size = max(1, W // 4)  # of a block: small ones share less of their keys but compute less that is masked
    count = max(0, (n - W - ahead) // size)
    inner = slice(W, W + count * size)

    def attend(q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        """(blocks, H, queries or keys, E); each block's first query is `offset` events after its first key."""
        query, key = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
        distance = query[:, None] + offset - key
        seen = (distance < W) & (distance >= 0 if causal else distance > -W)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def piece(x: Tensor, start: int, stop: int) -> Tensor:
        return x[start:stop].transpose(0, 1)[None]

    parts = [attend(piece(q_nHE, 0, W), piece(k_nHE, 0, W + ahead), piece(v_nHE, 0, W + ahead), 0)]
    if count:
        q = q_nHE[inner].unflatten(0, (count, size)).transpose(1, 2)
        reach = W + size + ahead
        k, v = (x[: inner.stop + ahead].unfold(0, reach, size).transpose(2, 3) for x in (k_nHE, v_nHE))
        parts.append(attend(q, k, v, W))
    if inner.stop < n:
        first = inner.stop - W
        parts.append(attend(piece(q_nHE, inner.stop, n), piece(k_nHE, first, n), piece(v_nHE, first, n), W))
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])


def _kernel_takes(q_LHE: Tensor) -> bool:
    """FlashAttention's rules."""
    width, half = q_LHE.shape[2], q_LHE.dtype in (torch.float16, torch.bfloat16)
    return HAS_KERNEL and half and width % 8 == 0 and width <= 256


def _fused(
    q_LHE: Tensor, k_LHE: Tensor, v_LHE: Tensor, bounds: Tensor, longest: int, window: int | None, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    reach = -1 if window is None else window - 1
    limits = (reach, 0 if causal else reach)
    y_LHE = varlen_attn(q_LHE, k_LHE, v_LHE, bounds, bounds, longest, longest, window_size=limits)
    assert isinstance(y_LHE, Tensor)
    return y_LHE
