"""The two Mamba mixers, with the keywords, parameter names and shapes of `mamba_ssm`: its checkpoints fit, both ways.

Shape legend: B batch rows, L events, D d_model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymate import ops

# What a block carries from a history's events to those after them (B = 1). M: the convolution's last inputs and the
# scan's state; A: the keys and values (n, H, E) that later events can still see, n < window.
BlockState = tuple[Tensor, Tensor]


class GatedRMSNorm(nn.Module):
    """rmsnorm(x * silu(z)) * weight, in groups (`mamba_ssm`'s RMSNormGated with norm_before_gate=False)."""

    def __init__(self, d: int, group_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.group_size, self.eps = group_size, eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z: (..., d)."""
        return ops.gated_rms_norm(x, z, self.weight, self.eps, self.group_size)


class Mamba2Mixer(nn.Module):
    """Mamba-2 (Dao & Gu 2024, arXiv 2405.21060) with `mamba_ssm.Mamba2`'s keywords, parameter names and shapes."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.d_inner, self.chunk_size = expand * d_model, chunk_size
        assert self.d_inner % headdim == 0, "headdim must divide expand * d_model"
        self.nheads = self.d_inner // headdim
        self.d_xbc = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_xbc + self.nheads, bias=bias)
        self.conv1d = nn.Conv1d(self.d_xbc, self.d_xbc, d_conv, groups=self.d_xbc, padding=d_conv - 1, bias=conv_bias)
        self.dt_bias = nn.Parameter(_dt_bias(self.nheads, dt_min, dt_max, dt_init_floor))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedRMSNorm(self.d_inner, self.d_inner // ngroups)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, u_BLD: Tensor, segment_BL: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); segment_BL: int32 patient index of each event, None for one patient a row."""
        return self.carry(u_BLD, None, segment_BL)[0]

    def carry(
        self, u_BLD: Tensor, state: BlockState | None, segment_BL: Tensor | None = None
    ) -> tuple[Tensor, BlockState]:
        """`forward` after the events that left `state`, and the state that these leave."""
        conv, scan = state or (None, None)
        z, xbc, dt = self.in_proj(u_BLD).split([self.d_inner, self.d_xbc, self.nheads], dim=-1)
        xbc, conv = ops.causal_conv1d(
            xbc, self.conv1d.weight[:, 0], self.conv1d.bias, segment_BL=segment_BL, initial_state_BDK1=conv
        )
        width = self.ngroups * self.d_state
        x, B, C = xbc.split([self.d_inner, width, width], dim=-1)
        y, scan = ops.ssd_scan(
            x.unflatten(-1, (self.nheads, self.headdim)),
            F.softplus(dt.float() + self.dt_bias.float()),
            -self.A_log.float().exp(),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
            self.D,
            chunk_size=self.chunk_size,
            segment_BL=segment_BL,
            initial_state_BHPN=scan,
        )
        return self.out_proj(self.norm(y.flatten(-2), z)), (conv, scan)


class Mamba1Mixer(nn.Module):
    """Mamba (Gu & Dao 2023, arXiv 2312.00752) with `mamba_ssm.Mamba`'s keywords, parameter names and shapes."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state = expand * d_model, d_state
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_dt_bias(self.d_inner, dt_min, dt_max, dt_init_floor))
        A = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(self.d_inner, 1)
        self.A_log = nn.Parameter(A.log())
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, u_BLD: Tensor, segment_BL: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); segment_BL: int32 patient index of each event, None for one patient a row."""
        return self.carry(u_BLD, None, segment_BL)[0]

    def carry(
        self, u_BLD: Tensor, state: BlockState | None, segment_BL: Tensor | None = None
    ) -> tuple[Tensor, BlockState]:
        """`forward` after the events that left `state`, and the state that these leave."""
        conv, scan = state or (None, None)
        x, z = self.in_proj(u_BLD).chunk(2, dim=-1)
        x, conv = ops.causal_conv1d(
            x, self.conv1d.weight[:, 0], self.conv1d.bias, segment_BL=segment_BL, initial_state_BDK1=conv
        )
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(self.dt_proj(dt).float())
        A = -self.A_log.float().exp()
        y, scan = ops.selective_scan(x, dt, A, B, C, self.D, segment_BL=segment_BL, initial_state_BDN=scan)
        return self.out_proj(y * F.silu(z)), (conv, scan)


def _dt_bias(n: int, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """softplus^-1 of n step sizes drawn log-uniformly from [dt_min, dt_max]."""
    dt = torch.exp(torch.rand(n) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
