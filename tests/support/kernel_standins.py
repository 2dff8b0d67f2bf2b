"""Stand-ins for the GPU's kernels: plain PyTorch under the names of the real functions, with their rules.

What the kernels refuse (strides, multiples, types, widths) is refused here, forward and backward; what they keep for
the backward is kept. float64 is taken, too, so that what surrounds the kernels can be compared exactly. Nothing here
looks at numbers, so FakeTensorMode runs it. The rules are those of mamba-ssm 2.3.2, causal-conv1d 1.7 and torch 2.11.

Shape legend: as in `hymate.ops`; T events of a packed row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hymate.ops import attention, reference
from hymate.ops.shapes import in_place_of_kernels

NARROW = (torch.float16, torch.bfloat16)
SELECTIVE_SCAN_CHUNK = 2048  # events between two states that Mamba-1's kernel keeps


@contextmanager
def standing_in() -> Iterator[None]:
    """The stand-ins under the names of the real functions, until the block ends: they never reach another test."""
    functions = (selective_scan_fn, mamba_chunk_scan_combined, rmsnorm_fn, causal_conv1d_fn)
    attention_module = ModuleType("torch.nn.attention.varlen")
    vars(attention_module)["varlen_attn"] = varlen_attn
    with in_place_of_kernels(*functions), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, attention_module.__name__, attention_module)
        patch.setattr(attention, "HAS_KERNEL", True)
        yield


def require(condition: bool, rule: str) -> None:
    """The kernels raise RuntimeError, too."""
    if not condition:
        raise RuntimeError(rule)


Checks = Callable[[Sequence[Tensor | None]], None]


class _Kernel(torch.autograd.Function):
    """Runs `compute(*tensors) -> outputs, kept`; the backward has the inputs and `kept`, and computes again."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Any], check_gradients: Checks, *tensors: Tensor | None) -> Any:
        for tensor in tensors:
            assert tensor is None or tensor.device.type != "cuda", "a stand-in in the place of a real kernel"
        outputs, kept = compute(*tensors)
        ctx.save_for_backward(*tensors, *kept)
        ctx.compute, ctx.check_gradients, ctx.count = compute, check_gradients, len(tensors)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.check_gradients(gradients)
        tensors = ctx.saved_tensors[: ctx.count]
        wanted = ctx.needs_input_grad[2:]
        leaves = [
            x if x is None or not need else x.detach().requires_grad_() for x, need in zip(tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            outputs, _ = ctx.compute(*leaves)
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None]
        inputs = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
        found = iter(torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True))
        return None, None, *(next(found) if need else None for need in wanted)


# ---------------------------------------------------------------------------------------------- causal_conv1d


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """(B, D, L) -> (B, D, L)."""
    require(initial_states is None and not return_final_states, "no states: older versions take none beside seq_idx")
    require(activation == "silu", "the tests know silu only")
    batch, channels, length = x.shape
    require(weight.shape[0] == channels and 2 <= weight.shape[1] <= 4, "width between 2 and 4")
    require(x.dtype in (torch.float32, torch.float64, *NARROW), "x: no such kernel")
    require(weight.dtype in (torch.float32, *NARROW) or weight.dtype == x.dtype, "weight: no such kernel")
    require(bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1), "bias as weight")
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    channels_last = x.stride(1) == 1 and x.stride(2) > 1
    if channels_last:
        require(channels % 8 == 0, "channel dimension divisible by 8")
        require(x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "strides of x multiples of 8")
        require(x.storage_offset() * x.element_size() % 16 == 0, "misaligned address")
    if seq_idx is not None:
        require(channels_last, "seq_idx is only supported for channel last layout")
        require(seq_idx.dtype == torch.int32 and seq_idx.is_contiguous(), "seq_idx: int32, contiguous")
        require(seq_idx.shape == (batch, length), "seq_idx (B, L)")

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Any:
        return (reference.causal_conv1d(x.mT, weight, bias, segment_BL=seq_idx)[0].mT,), ()

    def check(gradients: Sequence[Tensor | None]) -> None:
        (dout,) = gradients
        assert dout is not None
        if dout.stride(2) != 1 and dout.stride(1) != 1:
            dout = dout.contiguous()
        if channels_last and dout.stride(1) != 1:
            dout = dout.mT.contiguous().mT
        if channels_last:
            require(dout.stride(2) % 8 == 0 and dout.stride(0) % 8 == 0, "strides of dout multiples of 8")

    return _Kernel.apply(compute, check, x, weight, bias, seq_idx)[0]


# -------------------------------------------------------------------------------------------------- mamba_ssm


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
    batch, channels, length = u.shape
    d_state = A.shape[1]
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    require(u.dtype in (wide, *NARROW), "u: no such kernel")
    require(delta.dtype == B.dtype == C.dtype == u.dtype, "delta, B and C have u's type")
    require(all(each is None or each.dtype == wide for each in (A, D, delta_bias)), "A, D and delta_bias: float32")
    require(z is None and delta_softplus and delta_bias is not None, "not in the tests")
    require(d_state <= 256, "selective_scan only supports state dimension <= 256")
    require(delta.shape == u.shape and A.shape == (channels, d_state), "shapes")
    require(B.shape == C.shape == (batch, d_state, length), "shapes")

    def compute(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, delta_bias: Any) -> Any:
        skip = A.new_zeros(channels) if D is None else D
        y, state = reference.selective_scan(u.mT, delta.mT, delta_bias, A, B.mT, C.mT, skip)
        chunks = math.ceil(length / SELECTIVE_SCAN_CHUNK)
        states = A.new_zeros(batch, channels, chunks, 2 * d_state)
        states[:, :, -1, 1::2] = state
        return (y.mT.contiguous(), states[:, :, -1, 1::2]), (states,)

    def check(gradients: Sequence[Tensor | None]) -> None:
        assert gradients[1] is None, "the kernel leaves out the gradient of its last state"

    y, state = _Kernel.apply(compute, check, u, delta, A, B, C, D, delta_bias)
    return (y, state) if return_last_state else y


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
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Any:
    """x (B, L, H, P), dt (B, L, H), B and C (B, L, G, N) -> (B, L, H, P) and, where asked for, states (B, H, P, N)."""
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    require(x.dtype == B.dtype == C.dtype, "x, B and C are multiplied with each other")
    require(z is None and cu_seqlens is None and dt_limit == (0.0, float("inf")), "not in the tests")
    require(D is not None and not dt_softplus and dt_bias is None, "not in the tests")
    require(heads % groups == 0 and dt.shape == (batch, length, heads) and A.shape == (heads,), "shapes")
    require(B.shape == C.shape == (batch, length, groups, d_state), "shapes")
    require(seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.shape == (batch, length)), "seq_idx: int32")
    require(initial_states is None or initial_states.shape == (batch, heads, headdim, d_state), "shapes")

    def compute(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Any, seq_idx: Any) -> Any:
        if initial is not None and seq_idx is not None:  # it enters segment 0, wherever that is
            initial = initial * (seq_idx[:, 0] == 0)[:, None, None, None]
        y, state = reference.ssd_scan(x, dt, A, B, C, D, segment_BL=seq_idx, initial_state_BHPN=initial)
        dA = A.new_empty(batch, heads, math.ceil(length / chunk_size) * chunk_size)
        return (y, state), (y.detach(), dA)

    y, state = _Kernel.apply(compute, lambda _: None, x, dt, A, B, C, D, initial_states, seq_idx)
    return (y, state) if return_final_states else y


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
    require(z is not None and bias is None and not norm_before_gate, "not in the tests")
    assert z is not None
    size = group_size or x.shape[-1]
    require(z.shape == x.shape and weight.shape == (x.shape[-1],) and x.shape[-1] % size == 0, "shapes")
    require(size * x.element_size() <= 65536 or x.dtype == torch.float64, "feature dim >= 64KB")

    def compute(x: Tensor, weight: Tensor, z: Tensor) -> Any:
        y = reference.gated_rms_norm(x, z, weight, eps, size)
        return (y,), (x.new_empty(x.numel() // size, dtype=torch.float32),)

    return _Kernel.apply(compute, lambda _: None, x, weight, z)[0]


# ------------------------------------------------------------------------------------------------------ torch


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """(T, H, E) -> (T, H, E), each segment by itself; window_size: how far it sees back and ahead, -1 without end."""
    assert cu_seq_k is not None
    for each in (query, key, value):
        require(each.dtype in NARROW and each.dtype == query.dtype, "FlashAttention only supports fp16 and bf16")
        require(each.shape[2] % 8 == 0 and each.shape[2] <= 256, "head dimension: a multiple of 8, at most 256")
        require(each.stride(-1) == 1, "contiguous last dimension")
    for bounds in (cu_seq_q, cu_seq_k):
        require(bounds.dtype == torch.int32 and bounds.is_contiguous(), "cu_seq: int32, contiguous")
        require(bounds.device == query.device, "cu_seq on another device")

    def compute(q: Tensor, k: Tensor, v: Tensor, cu_seq: Tensor) -> Any:
        place = torch.arange(len(q), device=q.device)
        segment = (place[:, None] >= cu_seq[1:]).sum(1)
        distance = place[:, None] - place  # how far back the key is
        back, ahead = window_size
        seen = segment[:, None] == segment
        seen = seen if back < 0 else seen & (distance <= back)
        seen = seen if ahead < 0 else seen & (distance >= -ahead)
        scores = torch.einsum("qhe,khe->hqk", q.float(), k.float()) * q.shape[2] ** -0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        y = torch.einsum("hqk,khe->qhe", weights, v.float()).to(q.dtype)
        return (y,), (y.detach(), scores.new_empty(q.shape[1], len(q)))

    return _Kernel.apply(compute, lambda _: None, query, key, value, cu_seq_q)[0]
