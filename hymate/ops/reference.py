"""The operators behind the Mamba mixers, written as plain loops that are obviously right.

Everything else in this package is tested against this file. It needs only torch, runs on any device
and in any floating dtype, and its gradients are autograd's.

Shape legend: B batch rows, L events, H heads, P headdim, G groups, N d_state, D channels, K conv width.
``segment_BL`` holds a non-decreasing segment (patient) index per row: the state is zero where a
segment starts. The initial state enters the first segment; the final state is that of the last one.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from hymate.ops import compose


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _starts(segment_BL: Tensor | None, length: int) -> list[Tensor | None]:
    """For each event, which rows (B,) start a new segment there."""
    if segment_BL is None:
        return [None] * length
    return [None, *(now != before for before, now in itertools.pairwise(segment_BL.unbind(1)))]


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
) -> tuple[Tensor, Tensor]:
    """Mamba-2 recurrence (Dao & Gu 2024, arXiv 2405.21060): h = exp(dt A) h + dt x B, y = h C + D x."""
    acc = _accumulation_dtype(x_BLHP.dtype)
    _, length, heads, headdim = x_BLHP.shape
    groups, d_state = B_BLGN.shape[2:]
    A, D = A_H.to(acc), D_H.to(acc)
    B_BLHN, C_BLHN = (v.repeat_interleave(heads // groups, dim=2) for v in (B_BLGN, C_BLGN))
    x, dt, B, C = (v.to(acc).unbind(1) for v in (x_BLHP, dt_BLH, B_BLHN, C_BLHN))  # one tensor an event
    state = A.new_zeros(x_BLHP.shape[0], heads, headdim, d_state)
    if initial_state_BHPN is not None:
        state = initial_state_BHPN.to(acc)

    outputs = []
    for t, starts_B in enumerate(_starts(segment_BL, length)):
        if starts_B is not None:
            state = torch.where(starts_B[:, None, None, None], torch.zeros_like(state), state)
        decay_BH = torch.exp(dt[t] * A)
        inflow_BHPN = (dt[t][..., None] * x[t])[..., None] * B[t][:, :, None, :]
        state = decay_BH[..., None, None] * state + inflow_BHPN
        outputs.append((state * C[t][:, :, None, :]).sum(-1) + D[:, None] * x[t])
    y_BLHP = torch.stack(outputs, dim=1).to(x_BLHP.dtype)
    return y_BLHP, state


def selective_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    dt_bias_D: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1 recurrence (Gu & Dao 2023, arXiv 2312.00752): h = exp(dt A) h + dt x B, y = h C + D x.

    dt is softplus of dt_BLD + dt_bias_D.
    """
    acc = _accumulation_dtype(x_BLD.dtype)
    A, D = A_DN.to(acc), D_D.to(acc)
    dt_BLD = F.softplus(dt_BLD.to(acc) + dt_bias_D)
    x, dt, B, C = (v.to(acc).unbind(1) for v in (x_BLD, dt_BLD, B_BLN, C_BLN))  # one tensor an event
    length = len(x)
    state = A.new_zeros(x_BLD.shape[0], *A.shape)
    if initial_state_BDN is not None:
        state = initial_state_BDN.to(acc)

    outputs = []
    for t, starts_B in enumerate(_starts(segment_BL, length)):
        if starts_B is not None:
            state = torch.where(starts_B[:, None, None], torch.zeros_like(state), state)
        decay_BDN = torch.exp(dt[t][..., None] * A)
        state = decay_BDN * state + (dt[t] * x[t])[..., None] * B[t][:, None, :]
        outputs.append((state * C[t][:, None, :]).sum(-1) + D * x[t])
    y_BLD = torch.stack(outputs, dim=1).to(x_BLD.dtype)
    return y_BLD, state


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDK1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution then SiLU: y_t = silu(bias + sum_k weight_k x_{t-K+1+k}).

    The state is the last K-1 inputs of the segment, zero where there are none.
    """
    acc = _accumulation_dtype(x_BLD.dtype)
    x, weight = x_BLD.to(acc).unbind(1), weight_DK.to(acc)
    batch, length, channels = x_BLD.shape
    window_BDK = weight.new_zeros(batch, channels, weight.shape[1])
    if initial_state_BDK1 is not None:
        window_BDK = torch.cat([window_BDK[:, :, :1], initial_state_BDK1.to(acc)], dim=2)

    outputs = []
    for t, starts_B in enumerate(_starts(segment_BL, length)):
        if starts_B is not None:
            window_BDK = torch.where(starts_B[:, None, None], torch.zeros_like(window_BDK), window_BDK)
        window_BDK = torch.cat([window_BDK[:, :, 1:], x[t][..., None]], dim=2)
        pre = (window_BDK * weight).sum(-1)
        outputs.append(F.silu(pre if bias_D is None else pre + bias_D.to(acc)))
    y_BLD = torch.stack(outputs, dim=1).to(x_BLD.dtype)
    return y_BLD, window_BDK[:, :, 1:].to(x_BLD.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """Root-mean-square norm of x * silu(z) over groups of ``group_size`` channels, times weight.

    As ``RMSNormGated(norm_before_gate=False)`` of mamba_ssm.
    """
    acc = _accumulation_dtype(x.dtype)
    gated = (x.to(acc) * F.silu(z.to(acc))).unflatten(-1, (-1, group_size))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(acc)).to(x.dtype)


_composed = compose.Composed(causal_conv1d, ssd_scan, selective_scan, gated_rms_norm)
mamba1, mamba2 = _composed.mamba1, _composed.mamba2
