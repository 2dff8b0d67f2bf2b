"""The operators behind the Mamba mixers and attention: which implementation runs is decided here and nowhere else.

    reference   plain loops, obviously right; what the others are tested against
    cpu         compiled loops with hand-written backwards
    fused       mamba_ssm's and causal_conv1d's CUDA kernels

The choice is made once for each kind of device, logged with its reason on the logger "hymate", and can be forced with
the environment variable HYMATE_OPS or, in tests, with `forced`.

Shape legend: B batch rows, L events, H heads, P headdim, G groups, N d_state, D channels, K conv width.
segment_BL: int32, non-decreasing index of the patient each event belongs to; nothing passes from one to the next.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import Tensor
from torch.nn import functional as F

from hymate.config import UserError
from hymate.ops.attention import continued_attention, packed_attention
from hymate.ops.cross_entropy import linear_cross_entropy

__all__ = [
    "add_dropout",
    "causal_conv1d",
    "continued_attention",
    "forced",
    "gated_rms_norm",
    "linear_cross_entropy",
    "packed_attention",
    "selective_scan",
    "ssd_scan",
]

IMPLEMENTATIONS = ("reference", "cpu", "fused")
_forced: list[str] = []
_chosen: dict[str, ModuleType] = {}


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Use one implementation for everything inside the block."""
    assert name in IMPLEMENTATIONS
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def _implementation(x: Tensor) -> ModuleType:
    if _forced:
        return importlib.import_module(f"hymate.ops.{_forced[-1]}")
    kind = x.device.type
    if kind not in _chosen:
        name, reason = _choose(kind)
        logging.getLogger("hymate").info("operators on %s: %s (%s)", kind, name, reason)
        _chosen[kind] = importlib.import_module(f"hymate.ops.{name}")
    return _chosen[kind]


def _choose(kind: str) -> tuple[str, str]:
    wanted = os.environ.get("HYMATE_OPS")
    if wanted:
        if wanted not in IMPLEMENTATIONS:
            raise UserError(f"HYMATE_OPS must be one of {', '.join(IMPLEMENTATIONS)}; got {wanted!r}")
        return wanted, "HYMATE_OPS"
    if kind == "cpu":
        return "cpu", "compiled loops"
    if importlib.util.find_spec("mamba_ssm") and importlib.util.find_spec("causal_conv1d"):
        return "fused", "mamba_ssm and causal_conv1d are installed"
    raise UserError('training on a GPU needs the fused kernels: pip install -e ".[cuda]", or train.use_gpu=false')


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
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan (arXiv 2405.21060): h = exp(dt A) h + dt x B, y = h C + D x; y (B, L, H, P), last h (B, H, P, N).

    dt is positive (after softplus), A negative. The initial state enters the first segment processed, the final state
    is the last one's; `reverse` runs every segment from its end to its start.
    """
    return _implementation(x_BLHP).ssd_scan(
        x_BLHP,
        dt_BLH,
        A_H,
        B_BLGN,
        C_BLGN,
        D_H,
        chunk_size=chunk_size,
        segment_BL=segment_BL,
        initial_state_BHPN=initial_state_BHPN,
        reverse=reverse,
        return_final_state=True,
    )


def selective_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDN: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's scan (arXiv 2312.00752): y (B, L, D) and the final state (B, D, N); otherwise as `ssd_scan`."""
    return _implementation(x_BLD).selective_scan(
        x_BLD,
        dt_BLD,
        A_DN,
        B_BLN,
        C_BLN,
        D_D,
        segment_BL=segment_BL,
        initial_state_BDN=initial_state_BDN,
        reverse=reverse,
        return_final_state=True,
    )


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDK1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, then SiLU: y (B, L, D) and the last K-1 inputs (B, D, K-1), oldest first."""
    return _implementation(x_BLD).causal_conv1d(
        x_BLD,
        weight_DK,
        bias_D,
        segment_BL=segment_BL,
        initial_state_BDK1=initial_state_BDK1,
        return_final_state=True,
    )


def add_dropout(x: Tensor, branch: Tensor, p: float) -> Tensor:
    """x + branch, a share p of whose elements is zero and the rest 1 / (1 - p) times as large.

    Which ones follows from torch's generator, but differs between implementations.
    """
    if p == 0:
        return x + branch
    if _implementation(x).__name__ == "hymate.ops.cpu":
        return importlib.import_module("hymate.ops.dropout").add_dropout(x, branch, p)
    return x + F.dropout(branch, p)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """Root-mean-square norm of x * silu(z) over groups of `group_size` channels, times weight; x, z: (..., D)."""
    return _implementation(x).gated_rms_norm(x, z, weight, eps, group_size)
