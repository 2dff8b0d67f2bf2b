"""The two Mamba mixers, with the keywords, parameter names and shapes of `mamba_ssm`: its checkpoints fit, both ways.
`time_aware` and its `time_weight` are ours.

Shape legend: B batch rows, L events, D d_model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hymate import ops

# What a block carries from a history's events to those after them (B = 1). M: the convolution's last inputs and the
# scan's state; A: the keys and values (n, H, E) that later events can still see, n < window; G: the unit's state and
# nothing.
BlockState = tuple[Tensor, Tensor]

SCALES_HOURS = (1.0, 24.0, 720.0)  # an hour, a day, a month: between them steps may grow at different rates


class MambaMixer(nn.Module, ABC):
    """What both have in common.

    Where they are `time_aware`, the step of an event also depends on the hours since the event before:
    dt = softplus(x W + b + f(hours)), for each head (Mamba-1: channel). f is a sum of `time_weight` times log(1 + hours
    / scale) over SCALES_HOURS, so that a small step is a power of the hours. f(0) is 0, and so are all weights at first
    and where a checkpoint has none: then steps are as without.
    """

    in_proj: nn.Linear
    out_proj: nn.Linear
    A_log: nn.Parameter
    time_weight: nn.Parameter | None

    def forward(
        self,
        u_BLD: Tensor,
        gap_hours_BL: Tensor | None = None,
        segment_BL: Tensor | None = None,
        *,
        reverse: bool = False,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D).

        gap_hours_BL: hours since the event that is read before each, 0 at a patient's first; needed where `time_aware`.
        segment_BL: int32 patient index of each event, None for one patient a row.
        reverse: every patient's history is read from its end to its start.
        """
        return self._mix(u_BLD, gap_hours_BL, segment_BL=segment_BL, reverse=reverse)[0]

    def carry(self, u_BLD: Tensor, gap_hours_BL: Tensor | None, state: BlockState | None) -> tuple[Tensor, BlockState]:
        """`forward` of one patient a row after the events that left `state`, and the state that these leave."""
        return self._mix(u_BLD, gap_hours_BL, state=state)

    def _mix(self, u_BLD: Tensor, gap_hours_BL: Tensor | None, **row: Any) -> tuple[Tensor, BlockState]:
        inner_BLE, A = self.in_proj(u_BLD), -self.A_log.float().exp()
        y_BLD, state = self._operate(inner_BLE, A, self._time(gap_hours_BL), **row)
        return self.out_proj(y_BLD), state

    @abstractmethod
    def _operate(self, inner_BLE: Tensor, A: Tensor, time_BLX: Tensor | None, **row: Any) -> tuple[Tensor, BlockState]:
        """What lies between the two projections. row: segment_BL, state and reverse, as `hymate.ops` takes them."""

    def _init_time(self, time_aware: bool, num_steps: int) -> None:
        """num_steps: of an event, one for each head or channel."""
        self.time_weight = nn.Parameter(torch.zeros(num_steps, len(SCALES_HOURS))) if time_aware else None
        self.register_load_state_dict_pre_hook(_without_time)

    def _time(self, gap_hours_BL: Tensor | None) -> Tensor | None:
        """f(hours) of each step (B, L, steps); at least float32, as all that the scan's decay is made of."""
        if self.time_weight is None:
            return None
        assert gap_hours_BL is not None, "the steps of a time-aware scan depend on the hours between events"
        with torch.autocast(gap_hours_BL.device.type, enabled=False):
            logs_BLK = torch.stack([(gap_hours_BL / hours).log1p() for hours in SCALES_HOURS], dim=-1)
            return F.linear(logs_BLK.to(self.time_weight.dtype), self.time_weight)


def _without_time(mixer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Weights from before a scan was time-aware leave its steps as they were."""
    assert isinstance(mixer, MambaMixer)
    if mixer.time_weight is not None:
        state.setdefault(f"{prefix}time_weight", torch.zeros_like(mixer.time_weight))


class Mamba2Mixer(MambaMixer):
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
        time_aware: bool = False,
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
        self.norm = nn.RMSNorm(self.d_inner, eps=1e-5)  # over each group, of what z gates
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self._init_time(time_aware, self.nheads)

    def _operate(self, inner_BLE: Tensor, A: Tensor, time_BLX: Tensor | None, **row: Any) -> tuple[Tensor, BlockState]:
        given = ops.Mamba2(
            inner_BLE,
            self.conv1d.weight[:, 0],
            _bias(self.conv1d),
            self.dt_bias,
            A,
            self.D,
            self.norm.weight,
            groups=self.ngroups,
            chunk_size=self.chunk_size,
            time_BLH=time_BLX,
            **row,
        )
        return ops.mamba2(given)


class Mamba1Mixer(MambaMixer):
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
        time_aware: bool = False,
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
        self._init_time(time_aware, self.d_inner)

    def _operate(self, inner_BLE: Tensor, A: Tensor, time_BLX: Tensor | None, **row: Any) -> tuple[Tensor, BlockState]:
        given = ops.Mamba1(
            inner_BLE,
            self.conv1d.weight[:, 0],
            _bias(self.conv1d),
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            A,
            self.D,
            time_BLD=time_BLX,
            **row,
        )
        return ops.mamba1(given)


def _bias(conv: nn.Conv1d) -> Tensor:
    """A convolution's bias, zeros where it has none."""
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _dt_bias(n: int, dt_min: float, dt_max: float, floor: float) -> Tensor:
    """softplus^-1 of n step sizes drawn log-uniformly from [dt_min, dt_max]."""
    dt = torch.exp(torch.rand(n) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
