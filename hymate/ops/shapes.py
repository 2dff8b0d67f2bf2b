"""The GPU's kernels in shapes alone: what each keeps for its backward and what it needs on the way, without a number.

`hymate.plan` runs the model over them under torch's FakeTensorMode, to count memory on a machine that has neither a GPU
nor the kernels. Between the kernels `hymate.ops.fused` itself runs, so its own copies are counted, too. What is
allocated here follows mamba-ssm 2.3.2, causal-conv1d 1.7 and the variable-length attention of torch.

Shape legend: as in `hymate.ops`; n chunks of Q events.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from hymate import ops
from hymate.ops import fused

MODULE_OF = {
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "rmsnorm_fn": "mamba_ssm.ops.triton.layernorm_gated",
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "causal_conv1d_fn": "causal_conv1d",
}
SELECTIVE_SCAN_CHUNK = 2048  # events between two states that Mamba-1's kernel keeps
BACKWARD_SPLITS = 2  # partial sums of B's and C's gradients: so many for a device that has room for them


@contextmanager
def as_on_gpu(linear: Callable[..., Tensor] | None = None) -> Iterator[None]:
    """Run models of fake tensors as a GPU would, in shapes; `linear` in place of torch's linear layer."""
    with ExitStack() as stack:
        kernels = selective_scan_fn, mamba_chunk_scan_combined, rmsnorm_fn, causal_conv1d_fn
        stack.enter_context(in_place_of_kernels(*kernels))
        stack.enter_context(ops.forced("fused"))
        for owner, name, value in (
            (FakeTensor, "is_cuda", True),
            (F, "linear", linear or F.linear),
            (F, "rms_norm", _rms_norm if hasattr(torch.ops.aten, "_fused_rms_norm") else F.rms_norm),
            (F, "dropout", _dropout),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextmanager
def in_place_of_kernels(*functions: Callable[..., Any]) -> Iterator[None]:
    """Functions in the place of those of their names in mamba_ssm and causal_conv1d, installed or not."""
    put: dict[str, ModuleType] = {}
    for function in functions:
        parts = MODULE_OF[function.__name__].split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            put.setdefault(name, ModuleType(name)).__spec__ = ModuleSpec(name, None)
        vars(put[".".join(parts)])[function.__name__] = function
    before = {name: sys.modules.get(name) for name in put}
    sys.modules.update(put)
    try:
        with mock.patch.object(fused, "HAS_CAUSAL_CONV1D", True):
            yield
    finally:
        for name, module in before.items():  # these alone: what is imported meanwhile stays
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


# Where torch itself does one thing on a CPU and another on a GPU: the latter.


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


# ----------------------------------------------------------------------------------------------------- kernels


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """(B, E, L) -> (B, E, L)."""
    return _Convolution.apply(x, weight, bias, seq_idx)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, seq_idx)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, weight, bias, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None if bias is None else torch.empty_like(bias), None


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    """x (B, L, H, P), dt (B, L, H), B and C (B, L, G, N) -> (B, L, H, P) and, where asked for, states (B, H, P, N)."""
    out, final = _ChunkScan.apply(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, chunk_size)
    return (out, final) if return_final_states else out


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, chunk = inputs
        x, dt, _, B, *_, z = tensors[:7]
        chunks = -(-x.shape[1] // chunk)
        dA_cumsum, _dt = (x.new_empty(len(x), dt.shape[2], chunks, chunk, dtype=torch.float32) for _ in range(2))
        _states, passed, _CB = _chunked(x, B, chunks, chunk, torch.float32, x.dtype)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        before_gate = out if z is None else torch.empty_like(out)
        ctx.save_for_backward(before_gate, dA_cumsum, *tensors)
        ctx.chunk = chunk
        return out, passed.new_empty(len(x), *passed.shape[2:], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> Any:
        _out, _dA, *tensors = ctx.saved_tensors
        x, dt, _, B = tensors[:4]
        chunks = -(-x.shape[1] // ctx.chunk)
        _dt = dt.clone(), *(x.new_empty(len(x), dt.shape[2], chunks, ctx.chunk, dtype=torch.float32) for _ in range(2))
        states, passed, _CB = _chunked(x, B, chunks, ctx.chunk, torch.float32, torch.float32)
        del states
        dstates = torch.empty_like(passed)
        narrow = torch.empty_like(passed, dtype=x.dtype), torch.empty_like(dstates, dtype=x.dtype)
        del passed, dstates
        gradients = [None if t is None else torch.empty_like(t) for t in tensors]
        _partial = [B.new_empty(len(x), x.shape[1], BACKWARD_SPLITS, *B.shape[2:], dtype=torch.float32) for _ in "BC"]
        del narrow
        return *gradients[:-1], None, None


def _chunked(x: Tensor, B: Tensor, chunks: int, chunk: int, *dtypes: torch.dtype) -> list[Tensor]:
    """Each chunk's state before and after they are passed on, (B, n, H, P, N), and C B^T (B, n, G, Q, Q)."""
    states = [x.new_empty(len(x), chunks, *x.shape[2:], B.shape[3], dtype=dtype) for dtype in dtypes]
    return [*states, x.new_empty(len(x), chunks, B.shape[2], chunk, chunk, dtype=torch.float32)]


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """The gated norm (..., D) -> (..., D)."""
    return _GatedNorm.apply(x, weight, z, group_size or x.shape[-1])


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, z: Tensor | None, group_size: int) -> Tensor:
        rstd = x.new_empty(x.numel() // group_size, dtype=torch.float32)
        ctx.save_for_backward(x, weight, z, rstd)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return *(None if t is None else torch.empty_like(t) for t in ctx.saved_tensors[:3]), None


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """u and delta (B, D, L), B and C (B, N, L) -> (B, D, L) and, where asked for, the last state (B, D, N)."""
    out, last = _SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias)
    return (out, last) if return_last_state else out


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        u, A, z = tensors[0], tensors[2], tensors[6]
        kept = u.new_empty(*u.shape[:2], -(-u.shape[2] // SELECTIVE_SCAN_CHUNK), 2 * A.shape[1], dtype=torch.float32)
        out = torch.empty_like(u)
        ctx.save_for_backward(kept, *(() if z is None else (out,)), *tensors)
        ctx.count = len(tensors)
        last = u.new_empty(*u.shape[:2], A.shape[1], dtype=torch.float32)
        ctx.mark_non_differentiable(last)
        return out if z is None else torch.empty_like(u), last

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> Any:
        # the kernel adds up the gradients of B and C in float32
        wide = (torch.float32 if number in (3, 4) else None for number in range(ctx.count))
        tensors = zip(ctx.saved_tensors[-ctx.count :], wide, strict=True)
        return tuple(None if t is None else torch.empty_like(t, dtype=dtype).to(t.dtype) for t, dtype in tensors)
