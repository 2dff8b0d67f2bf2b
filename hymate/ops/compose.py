"""The mixers' inner parts put together from single operators, for the implementations that have those.

Shape legend: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, Tensor]  # of the convolution (B, D, K-1) and of the scan


@dataclass(frozen=True)
class Composed:
    """Single operators of one implementation, with the signatures of reference.py, and the mixers made of them."""

    causal_conv1d: Callable[..., tuple[Tensor, Tensor]]
    ssd_scan: Callable[..., tuple[Tensor, Tensor]]
    selective_scan: Callable[..., tuple[Tensor, Tensor]]
    gated_rms_norm: Callable[..., Tensor]

    def mamba2(
        self,
        zxbcdt_BLE: Tensor,
        conv_weight_XK: Tensor,
        conv_bias_X: Tensor,
        dt_bias_H: Tensor,
        A_H: Tensor,
        D_H: Tensor,
        norm_weight_D: Tensor,
        *,
        groups: int,
        eps: float,
        chunk_size: int,
        time_BLH: Tensor | None,
        segment_BL: Tensor | None,
        state: State | None,
        reverse: bool,
    ) -> tuple[Tensor, State]:
        """Convolution, scan and gated norm, one after the other."""
        conv, scan = state or (None, None)
        heads, inner = len(A_H), len(norm_weight_D)
        width = (len(conv_bias_X) - inner) // 2
        if reverse:
            zxbcdt_BLE, time_BLH, segment_BL = _turned_round(zxbcdt_BLE, time_BLH, segment_BL)
        z, xbc, dt = zxbcdt_BLE.split([inner, len(conv_bias_X), heads], dim=-1)
        xbc, conv = self.causal_conv1d(xbc, conv_weight_XK, conv_bias_X, segment_BL=segment_BL, initial_state_BDK1=conv)
        x, B, C = xbc.split([inner, width, width], dim=-1)
        dt = dt.to(torch.promote_types(dt.dtype, torch.float32)) + dt_bias_H
        y, scan = self.ssd_scan(
            x.unflatten(-1, (heads, -1)),
            # mamba_ssm's own softplus is log(exp(dt) + 1), which loses digits of small steps
            F.softplus(dt if time_BLH is None else dt + time_BLH),
            A_H,
            B.unflatten(-1, (groups, -1)),
            C.unflatten(-1, (groups, -1)),
            D_H,
            chunk_size=chunk_size,
            segment_BL=segment_BL,
            initial_state_BHPN=scan,
        )
        y = self.gated_rms_norm(y.flatten(-2), z, norm_weight_D, eps, inner // groups)
        return y.flip(1) if reverse else y, (conv, scan)

    def mamba1(
        self,
        xz_BLE: Tensor,
        conv_weight_DK: Tensor,
        conv_bias_D: Tensor,
        x_weight_SD: Tensor,
        dt_weight_DR: Tensor,
        dt_bias_D: Tensor,
        A_DN: Tensor,
        D_D: Tensor,
        *,
        time_BLD: Tensor | None,
        segment_BL: Tensor | None,
        state: State | None,
        reverse: bool,
    ) -> tuple[Tensor, State]:
        """Convolution, the two small projections, scan and gate, one after the other."""
        conv, scan = state or (None, None)
        d_state = A_DN.shape[1]
        if reverse:
            xz_BLE, time_BLD, segment_BL = _turned_round(xz_BLE, time_BLD, segment_BL)
        x, z = xz_BLE.chunk(2, dim=-1)
        x, conv = self.causal_conv1d(x, conv_weight_DK, conv_bias_D, segment_BL=segment_BL, initial_state_BDK1=conv)
        dt, B, C = F.linear(x, x_weight_SD.to(x.dtype)).split([dt_weight_DR.shape[1], d_state, d_state], dim=-1)
        dt = F.linear(dt, dt_weight_DR.to(dt.dtype))
        dt = dt if time_BLD is None else (dt + time_BLD).to(dt.dtype)  # the kernel takes one dtype
        y, scan = self.selective_scan(x, dt, dt_bias_D, A_DN, B, C, D_D, segment_BL=segment_BL, initial_state_BDN=scan)
        y = y * F.silu(z)
        return y.flip(1) if reverse else y, (conv, scan)


def _turned_round(
    events_BLE: Tensor, time_BLX: Tensor | None, segment_BL: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The row from its end to its start, once for all operators."""
    segment_BL = None if segment_BL is None else (segment_BL[:, -1:] - segment_BL).flip(1)
    return events_BLE.flip(1), None if time_BLX is None else time_BLX.flip(1), segment_BL
