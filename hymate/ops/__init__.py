"""The operators behind the Mamba mixers and attention. The implementation of Mamba's is chosen here:

    reference   plain loops, obviously right; what the others are tested against
    cpu         compiled loops with hand-written backwards
    fused       mamba_ssm's kernels for GPUs, and causal_conv1d's where it is installed

The choice is made once for each kind of device, logged with its reason on the logger "hymate", and can be forced with
the environment variable HYMATE_OPS or, in tests, with `forced`. Attention chooses for itself (attention.py), and
`hymate.device` asks here whether a GPU can be used.

Shape legend: B batch rows, L events, H heads, P headdim, G groups, N d_state, D = H P channels, K conv width, R
dt_rank.
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

from hymate.errors import UserError
from hymate.ops.attention import continued_attention, packed_attention
from hymate.ops.compose import Mamba1, Mamba2, State
from hymate.ops.cross_entropy import linear_cross_entropy
from hymate.ops.hazards import linear_hazard_loss

__all__ = [
    "Mamba1",
    "Mamba2",
    "add_dropout",
    "continued_attention",
    "forced",
    "linear_cross_entropy",
    "linear_hazard_loss",
    "mamba1",
    "mamba2",
    "packed_attention",
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
    if importlib.util.find_spec("mamba_ssm"):
        has_conv = importlib.import_module("hymate.ops.fused").HAS_CAUSAL_CONV1D
        return "fused", f"mamba_ssm with{'' if has_conv else 'out'} causal_conv1d"
    raise UserError("a GPU needs mamba-ssm: install it (docs/gpu.md), or set device=cpu")


def mamba2(given: Mamba2) -> tuple[Tensor, State]:
    """What `Mamba2` describes: (B, L, D) and the state after it."""
    return _implementation(given.zxbcdt_BLE).mamba2(given)


def mamba1(given: Mamba1) -> tuple[Tensor, State]:
    """What `Mamba1` describes: (B, L, D) and the state after it."""
    return _implementation(given.xz_BLE).mamba1(given)


def add_dropout(x: Tensor, branch: Tensor, p: float) -> Tensor:
    """x + branch, a fraction p of whose elements is zero and the rest 1 / (1 - p) times as large.

    Which ones follows from torch's generator, but differs between implementations.
    """
    if p == 0:
        return x + branch
    # a model without Mamba blocks needs no kernels on a GPU, so they are not asked for
    if x.device.type == "cpu" and _implementation(x).__name__ == "hymate.ops.cpu":
        return importlib.import_module("hymate.ops.cpu.dropout").add_dropout(x, branch, p)
    return x + F.dropout(branch, p)
