"""The mixers' inner parts: what they are given, and how they are put together from single operators.

Shape legend: as in `hymate.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, Tensor]  # of the convolution (B, D, K-1) and of the scan


@dataclass(frozen=True)
class Mamba2:
    """What lies between the two projections of a Mamba-2 mixer (arXiv 2405.21060), and what that needs.

    The columns of zxbcdt are z (D), x (D), B and C (G N each), dt (H). Depthwise causal convolution and SiLU of x, B
    and C (X = D + 2 G N); dt = softplus(dt + bias + time), where None is 0; per head h = exp(dt A) h + dt x B,
    y = h C + D x; root-mean-square norm of y silu(z) over each group. A is negative.

    The state, (B, X, K-1) and (B, H, P, N), enters the first segment that is processed and comes from the last.
    `reverse` runs every row from its end to its start.
    """

    zxbcdt_BLE: Tensor
    conv_weight_XK: Tensor
    conv_bias_X: Tensor
    dt_bias_H: Tensor
    A_H: Tensor
    D_H: Tensor
    norm_weight_D: Tensor
    groups: int = 1
    eps: float = 1e-5
    chunk_size: int = 64
    time_BLH: Tensor | None = None
    segment_BL: Tensor | None = None
    state: State | None = None
    reverse: bool = False


@dataclass(frozen=True)
class Mamba1:
    """What lies between the two projections of a Mamba mixer (arXiv 2312.00752), and what that needs.

    The columns of xz are x and z (D each). Depthwise causal convolution and SiLU of x; its projection (S = R + 2 N)
    gives dt, B and C; dt = softplus(dt's projection + bias + time), where None is 0; h = exp(dt A) h + dt x B,
    y = h C + D x; y silu(z).

    The state is (B, D, K-1) and (B, D, N); otherwise as `Mamba2`.
    """

    xz_BLE: Tensor
    conv_weight_DK: Tensor
    conv_bias_D: Tensor
    x_weight_SD: Tensor
    dt_weight_DR: Tensor
    dt_bias_D: Tensor
    A_DN: Tensor
    D_D: Tensor
    time_BLD: Tensor | None = None
    segment_BL: Tensor | None = None
    state: State | None = None
    reverse: bool = False


@dataclass(frozen=True)
class Composed:
    """Single operators of one implementation, with the signatures of reference.py, and the mixers made of them."""

    causal_conv1d: Callable[..., tuple[Tensor, Tensor]]
    ssd_scan: Callable[..., tuple[Tensor, Tensor]]
    selective_scan: Callable[..., tuple[Tensor, Tensor]]
    gated_rms_norm: Callable[..., Tensor]

    def mamba2(self, given: Mamba2) -> tuple[Tensor, State]:
        """Convolution, scan and gated norm, one after the other."""
        conv, scan = given.state or (None, None)
        heads, inner, mixed = len(given.A_H), len(given.norm_weight_D), len(given.conv_bias_X)
        width = (mixed - inner) // 2
        events_BLE, time_BLH, segment_BL = given.zxbcdt_BLE, given.time_BLH, given.segment_BL
        if given.reverse:
            events_BLE, time_BLH, segment_BL = _turned_round(events_BLE, time_BLH, segment_BL)
        z, xbc, dt = events_BLE.split([inner, mixed, heads], dim=-1)
        xbc, conv = self.causal_conv1d(
            xbc, given.conv_weight_XK, given.conv_bias_X, segment_BL=segment_BL, initial_state_BDK1=conv
        )
        x, B, C = xbc.split([inner, width, width], dim=-1)
        dt = dt.to(torch.promote_types(dt.dtype, torch.float32)) + given.dt_bias_H
        y, scan = self.ssd_scan(
            x.unflatten(-1, (heads, -1)),
            # mamba_ssm's own softplus is log(exp(dt) + 1), which loses digits of small steps
            F.softplus(dt if time_BLH is None else dt + time_BLH),
            given.A_H,
            B.unflatten(-1, (given.groups, -1)),
            C.unflatten(-1, (given.groups, -1)),
            given.D_H,
            chunk_size=given.chunk_size,
            segment_BL=segment_BL,
            initial_state_BHPN=scan,
        )
        y = self.gated_rms_norm(y.flatten(-2), z, given.norm_weight_D, given.eps, inner // given.groups)
        return y.flip(1) if given.reverse else y, (conv, scan)

    def mamba1(self, given: Mamba1) -> tuple[Tensor, State]:
        """Convolution, the two small projections, scan and gate, one after the other."""
        conv, scan = given.state or (None, None)
        rank, d_state = given.dt_weight_DR.shape[1], given.A_DN.shape[1]
        events_BLE, time_BLD, segment_BL = given.xz_BLE, given.time_BLD, given.segment_BL
        if given.reverse:
            events_BLE, time_BLD, segment_BL = _turned_round(events_BLE, time_BLD, segment_BL)
        x, z = events_BLE.chunk(2, dim=-1)
        x, conv = self.causal_conv1d(
            x, given.conv_weight_DK, given.conv_bias_D, segment_BL=segment_BL, initial_state_BDK1=conv
        )
        dt, B, C = F.linear(x, given.x_weight_SD.to(x.dtype)).split([rank, d_state, d_state], dim=-1)
        dt = F.linear(dt, given.dt_weight_DR.to(dt.dtype))
        dt = dt if time_BLD is None else (dt + time_BLD).to(dt.dtype)  # the kernel takes one dtype
        options = {"segment_BL": segment_BL, "initial_state_BDN": scan}
        y, scan = self.selective_scan(x, dt, given.dt_bias_D, given.A_DN, B, C, given.D_D, **options)
        y = y * F.silu(z)
        return y.flip(1) if given.reverse else y, (conv, scan)


def _turned_round(
    events_BLE: Tensor, time_BLX: Tensor | None, segment_BL: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The row from its end to its start, once for all operators."""
    segment_BL = None if segment_BL is None else (segment_BL[:, -1:] - segment_BL).flip(1)
    return events_BLE.flip(1), None if time_BLX is None else time_BLX.flip(1), segment_BL
