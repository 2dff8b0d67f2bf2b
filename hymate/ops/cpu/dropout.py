"""Dropout added to the residual stream on the CPU: the masks come from a counter and are never stored.

Whether an element is kept is a hash of the call's seed and the element's place, so the backward makes the same mask
again. The seed comes from torch's generator: `torch.manual_seed` and activation checkpointing govern it as they do
torch's own dropout, whose masks one thread draws one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymate.ops.cpu import _prepare, _run
from hymate.ops.cpu.kernels import INDEX, OPTIONS

SPAN = 1 << 14  # elements in one unit of work


# ----------------------------------------------------------------------------------------------------- kernels
# Every matrix is one row. Numba widens what it computes from 32-bit numbers: each step is cut back.


@njit(**OPTIONS)
def _mixed(x: Any, key: Any) -> Any:
    """A hash of 32 bits in which every bit depends on all of x's (C. Wellons, hash-prospector), keyed half-way."""
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(16))) * np.uint32(0x21F0AAAD))
    x = np.uint32(x ^ np.uint32(x >> np.uint32(15))) ^ key
    x = np.uint32(np.uint32(x) * np.uint32(0x735A2D97))
    return np.uint32(x ^ np.uint32(x >> np.uint32(15)))


@njit(**OPTIONS)
def _keys(seed: Any, unit: Any) -> Any:
    """Two numbers that no other unit and no other call has."""
    low, high, place = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32), np.uint32(unit)
    return _mixed(place, low), _mixed(np.uint32(~place), high)


def forward(unit: Any, seed: Any, threshold: Any, scale: Any, x: Any, branch: Any, out: Any) -> None:
    """out = x + branch / (1 - p) where the element's hash reaches p * 2**32, else x."""
    key, start = _keys(seed, unit)
    x, branch, out = x[0, unit * SPAN :], branch[0, unit * SPAN :], out[0, unit * SPAN :]
    for j in range(min(SPAN, x.size)):
        kept = _mixed(np.uint32(np.uint32(j) ^ start), key) >= np.uint32(threshold)
        out[j & INDEX] = x[j & INDEX] + (branch[j & INDEX] * scale[0, 0] if kept else x.dtype.type(0))


def backward(unit: Any, seed: Any, threshold: Any, scale: Any, dout: Any, dbranch: Any) -> None:
    """The gradient of the branch from that of the output."""
    key, start = _keys(seed, unit)
    dout, dbranch = dout[0, unit * SPAN :], dbranch[0, unit * SPAN :]
    for j in range(min(SPAN, dout.size)):
        kept = _mixed(np.uint32(np.uint32(j) ^ start), key) >= np.uint32(threshold)
        dbranch[j & INDEX] = dout[j & INDEX] * scale[0, 0] if kept else dout.dtype.type(0)


# --------------------------------------------------------------------------------------------------- operators


def _launch(kernel: Callable[..., None], seed: int, p: float, **tensors: Tensor) -> None:
    rows = {name: tensor.view(1, -1) for name, tensor in tensors.items()}
    one = next(iter(rows.values()))
    scale = one.new_full((1, 1), 1 / (1 - p))
    _run(kernel, -(-one.numel() // SPAN), seed=seed, threshold=int(p * 2**32), scale=scale, **rows)


class _AddDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, p: float, seed: int) -> Tensor:
        dtype = torch.promote_types(x.dtype, branch.dtype)
        wide, wide_branch = _prepare(dtype, x, branch)
        out = torch.empty_like(wide)
        _launch(forward, seed, p, x=wide, branch=wide_branch, out=out)
        ctx.p, ctx.seed, ctx.dtypes = p, seed, (x.dtype, branch.dtype)
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (wide,) = _prepare(dout.dtype, dout)
        dbranch = torch.empty_like(wide)
        _launch(backward, ctx.seed, ctx.p, dout=wide, dbranch=dbranch)
        x_dtype, branch_dtype = ctx.dtypes
        return dout.to(x_dtype), dbranch.to(branch_dtype), None, None


def add_dropout(x: Tensor, branch: Tensor, p: float) -> Tensor:
    """x + dropout(branch), as `hymate.ops.add_dropout`; both of one shape."""
    return _AddDropout.apply(x, branch, p, int(torch.randint(2**62, ())))
