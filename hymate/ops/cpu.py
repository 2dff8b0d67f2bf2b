"""First CPU version; see reference.py for the shapes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hymate.ops.reference import gated_rms_norm, selective_scan

__all__ = ["causal_conv1d", "gated_rms_norm", "selective_scan", "ssd_scan"]


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    *,
    chunk_size: int = 64,
    segment_BL: Tensor | None = None,
    initial_state_BHPN: Tensor | None = None,
    reverse: bool = False,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    acc = torch.float64 if x_BLHP.dtype == torch.float64 else torch.float32
    b, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    T = chunk_size
    seg = torch.zeros(b, L, dtype=torch.int32, device=x_BLHP.device) if segment_BL is None else segment_BL
    x, dt, B, C = (v.to(acc) for v in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
    if reverse:
        x, dt, B, C, seg = (v.flip(1) for v in (x, dt, B, C, seg))
    x0 = x
    pad = -L % T
    if pad:
        x, B, C = (F.pad(v, (0, 0, 0, 0, 0, pad)) for v in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
        seg = torch.cat([seg, seg[:, -1:].expand(b, pad)], 1)
    n = (L + pad) // T
    r = H // G
    x = (x * dt[..., None]).view(b, n, T, G, r, P)
    B, C = B.view(b, n, T, G, N), C.view(b, n, T, G, N)
    seg = seg.view(b, n, T)
    carried = torch.cat([seg[:, :1, 0], seg[:, :-1, -1]], 1)
    cum = (dt * A_H.to(acc)).view(b, n, T, G, r).cumsum(2)
    mask = (seg[:, :, :, None] == seg[:, :, None, :]).tril()
    cumh = cum.permute(0, 1, 3, 4, 2)
    decay = (cumh[..., :, None] - cumh[..., None, :]).masked_fill(~mask[:, :, None, None], -torch.inf).exp()
    CB = torch.einsum("bntgk,bnsgk->bngts", C, B)
    y = torch.einsum("bngrts,bnsgrp->bntgrp", CB[:, :, :, None] * decay, x)
    to_end = (cum[:, :, -1:] - cum).exp() * (seg == seg[:, :, -1:])[..., None, None]
    states = torch.einsum("bnsgrp,bnsgk->bngrpk", x * to_end[..., None], B)
    through = cum[:, :, -1].exp() * (seg[:, :, -1] == carried)[..., None, None]
    state = x.new_zeros(b, G, r, P, N) if initial_state_BHPN is None else initial_state_BHPN.to(acc).view(b, G, r, P, N)
    starts = []
    for part, gain in zip(states.unbind(1), through.unbind(1)):
        starts.append(state)
        state = state * gain[..., None, None] + part
    from_start = cum.exp() * (seg == carried[..., None])[..., None, None]
    y = y + torch.einsum("bntgk,bngrpk->bntgrp", C, torch.stack(starts, 1)) * from_start[..., None]
    y = y.reshape(b, L + pad, H, P)[:, :L] + D_H.to(acc)[:, None] * x0
    if reverse:
        y = y.flip(1)
    y = y.to(x_BLHP.dtype)
    return (y, state.reshape(b, H, P, N)) if return_final_state else y


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDK1: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    b, L, D = x_BLD.shape
    K = weight_DK.shape[1]
    past = x_BLD.new_zeros(b, K - 1, D) if initial_state_BDK1 is None else initial_state_BDK1.to(x_BLD.dtype).transpose(1, 2)
    xp = torch.cat([past, x_BLD], 1)
    if segment_BL is None:
        segment_BL = torch.zeros(b, L, dtype=torch.int32, device=x_BLD.device)
    segp = torch.cat([segment_BL[:, :1].expand(b, K - 1), segment_BL], 1)
    pre = x_BLD * weight_DK[:, K - 1]
    for k in range(K - 1):
        pre = pre + xp[:, k : k + L] * (segp[:, k : k + L] == segment_BL)[..., None] * weight_DK[:, k]
    y = F.silu(pre if bias_D is None else pre + bias_D)
    if not return_final_state:
        return y
    last = xp[:, L:] * (segp[:, L:] == segment_BL[:, -1:])[..., None]
    return y, last.transpose(1, 2)
