"""The operators on the CPU: compiled loops (kernels.py) inside hand-written autograd functions.

Both scans run the recurrence itself, one block of channels at a time, so that the state stays in the
first-level cache. On a CPU this needs no more arithmetic than the chunked matrix form, reads every input
once and costs time and memory linear in L. The forward keeps the state before every chunk of events; the
backward recomputes the others from it. Accumulation is in float32, or in float64 for float64 inputs.

Shape legend: as in reference.py, which also defines what each function computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hymate.ops import kernels, launch

SSD_CHUNK = 64  # Mamba-2: most events between two saved states; what is between stays in cache
SELECTIVE_CHUNK = 16  # Mamba-1: events between two saved states
SPAN = 512  # fewest events in one unit of work of a scan, where the row has so many


def _run(kernel: Callable[..., None], units: int, *args: Any) -> None:
    arrays = (a.detach().numpy() if isinstance(a, Tensor) else a for a in args)
    threads = torch.get_num_threads()
    launch.run(kernel, units, threads, *arrays)
    if torch.get_num_threads() != threads:  # starting Numba's OpenMP layer resets the calling thread's setting
        torch.set_num_threads(threads)


def _prepare(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Contiguous copies or views in the dtype of accumulation."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.detach().to(acc).contiguous() for t in tensors]


def _restore(gradients: tuple[Tensor, ...], dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    return [None if dtype is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


def _starts(segment_BL: Tensor | None, shape: tuple[int, int], reverse: bool, carried: bool) -> np.ndarray:
    """(B, L) True where the state before the event is zero; the first one processed may carry a state in."""
    starts = np.zeros(shape, np.bool_)
    starts[:, -1 if reverse else 0] = not carried
    if segment_BL is not None:
        segment = segment_BL.numpy()
        inner = starts[:, :-1] if reverse else starts[:, 1:]
        inner |= segment[:, 1:] != segment[:, :-1]
    return starts


def _spans(starts: np.ndarray, reverse: bool, chunk: int) -> tuple[np.ndarray, int]:
    """Cut rows, where segments start, into the spans that kernels.py describes; also the number of saved states."""
    spans, slots = [], 0
    length = starts.shape[1]
    for row, row_starts in enumerate(starts):
        cuts = np.flatnonzero(row_starts[:-1]) + 1 if reverse else np.flatnonzero(row_starts)
        lo = 0
        while lo < length:
            later = np.searchsorted(cuts, lo + SPAN)
            hi = int(cuts[later]) if later < len(cuts) else length
            ends = (hi == length, lo == 0) if reverse else (lo == 0, hi == length)
            spans.append((row, row * length + lo, row * length + hi, slots, *ends))
            slots += -(-(hi - lo) // chunk)
            lo = hi
    return np.array(spans, np.int64), slots


def _blocks(channels: int, groups: int) -> np.ndarray:
    """Cut channels into the blocks that kernels.py describes."""
    size = channels // groups
    cuts = range(0, size, kernels.BLOCK)
    return np.array(
        [(g * size + lo, min(kernels.BLOCK, size - lo), g, k) for g in range(groups) for k, lo in enumerate(cuts)]
    )


class _SSDScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLHP: Tensor,
        dt_BLH: Tensor,
        A_H: Tensor,
        B_BLGN: Tensor,
        C_BLGN: Tensor,
        D_H: Tensor,
        initial_BHPN: Tensor | None,
        segment_BL: Tensor | None,
        reverse: bool,
        chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, headdim = x_BLHP.shape
        groups, d_state = B_BLGN.shape[2:]
        matrices = [t.flatten(0, 1).flatten(1) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN)]
        x, dt, B, C, A, D = _prepare(x_BLHP.dtype, *matrices, A_H, D_H)
        initial = x.new_zeros(batch, d_state, heads * headdim)
        if initial_BHPN is not None:
            initial.copy_(initial_BHPN.flatten(1, 2).transpose(1, 2))
        starts = _starts(segment_BL, (batch, length), reverse, initial_BHPN is not None)
        spans, slots = _spans(starts, reverse, chunk)
        blocks = _blocks(heads * headdim, groups)
        plan = (len(spans) * len(blocks), spans, blocks, d_state, headdim, chunk, reverse)
        decay = torch.exp(dt * A).masked_fill_(torch.from_numpy(starts).view(-1, 1), 0)
        A_D, D_D = A.repeat_interleave(headdim), D.repeat_interleave(headdim)
        saved = x.new_empty(slots if keep else 0, *initial.shape[1:])
        y, final = torch.empty_like(x), torch.empty_like(initial)
        _run(kernels.ssd_forward, *plan, x, dt, decay, B, C, D_D, initial, y, saved, final)
        ctx.save_for_backward(x, dt, decay, A_D, B, C, D_D, y, saved)
        ctx.plan, ctx.groups = plan, groups
        ctx.dtypes = _dtypes(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_BHPN)
        return y.view(x_BLHP.shape).to(x_BLHP.dtype), final.transpose(1, 2).unflatten(1, (heads, headdim))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLHP: Tensor, dfinal_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, y, saved = ctx.saved_tensors
        x, B = inputs[0], inputs[4]
        batch, length, heads, headdim = dy_BLHP.shape
        _, spans, blocks = ctx.plan[:3]
        dy, dfinal = _prepare(x.dtype, dy_BLHP.reshape(x.shape), dfinal_BHPN.flatten(1, 2).transpose(1, 2))
        dx, ddt, dinitial = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(dfinal)
        dA, dD = x.new_zeros(2, len(spans), x.shape[1])
        dB, dC = x.new_empty(2, len(blocks) // ctx.groups, *B.shape)
        outputs = (dx, ddt, dA, dB, dC, dD, dinitial)
        _run(kernels.ssd_backward, *ctx.plan, *inputs, y, saved, dy, dfinal, *outputs)
        gradients = (
            dx.view(dy_BLHP.shape),
            ddt.view(dy_BLHP.shape).sum(-1),
            dA.sum(0).view(heads, headdim).sum(-1),
            dB.sum(0).view(batch, length, ctx.groups, -1),
            dC.sum(0).view(batch, length, ctx.groups, -1),
            dD.sum(0).view(heads, headdim).sum(-1),
            dinitial.transpose(1, 2).unflatten(1, (heads, headdim)),
        )
        return *_restore(gradients, ctx.dtypes), None, None, None, None


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
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2 scan; ``chunk_size`` events, but at most SSD_CHUNK, lie between two states kept for the backward."""
    chunk = min(chunk_size + chunk_size % 2, SSD_CHUNK)
    keep = torch.is_grad_enabled()
    y_BLHP, final_BHPN = _SSDScan.apply(
        x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, initial_state_BHPN, segment_BL, reverse, chunk, keep
    )
    return (y_BLHP, final_BHPN) if return_final_state else y_BLHP


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        dt_BLD: Tensor,
        A_DN: Tensor,
        B_BLN: Tensor,
        C_BLN: Tensor,
        D_D: Tensor,
        initial_BDN: Tensor | None,
        segment_BL: Tensor | None,
        reverse: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = x_BLD.shape
        matrices = (x_BLD.flatten(0, 1), dt_BLD.flatten(0, 1), A_DN.T, B_BLN.flatten(0, 1), C_BLN.flatten(0, 1))
        x, *_ = inputs = _prepare(x_BLD.dtype, *matrices, D_D)
        initial = x.new_zeros(batch, A_DN.shape[1], channels)
        if initial_BDN is not None:
            initial.copy_(initial_BDN.transpose(1, 2))
        starts = _starts(segment_BL, (batch, length), reverse, initial_BDN is not None)
        spans, slots = _spans(starts, reverse, SELECTIVE_CHUNK)
        starts = starts.reshape(1, -1)
        blocks = _blocks(channels, 1)
        plan = (len(spans) * len(blocks), spans, blocks, starts.astype(np.int64), SELECTIVE_CHUNK, reverse)
        saved = x.new_empty(slots if keep else 0, *initial.shape[1:])
        y, final = torch.empty_like(x), torch.empty_like(initial)
        _run(kernels.selective_forward, *plan, *inputs, initial, y, saved, final)
        ctx.save_for_backward(*inputs, saved)
        ctx.plan = plan
        ctx.dtypes = _dtypes(x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, D_D, initial_BDN)
        return y.view(x_BLD.shape).to(x_BLD.dtype), final.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor, dfinal_BDN: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, saved = ctx.saved_tensors
        x, B = inputs[0], inputs[3]
        _, spans, blocks = ctx.plan[:3]
        dy, dfinal = _prepare(x.dtype, dy_BLD.flatten(0, 1), dfinal_BDN.transpose(1, 2))
        dx, ddt, dinitial = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(dfinal)
        dA, dD = x.new_empty(len(spans), *saved.shape[1:]), x.new_empty(len(spans), x.shape[1])
        dB, dC = x.new_empty(2, len(blocks), *B.shape)
        outputs = (dx, ddt, dA, dB, dC, dD, dinitial)
        _run(kernels.selective_backward, *ctx.plan, *inputs, saved, dy, dfinal, *outputs)
        rows = dy_BLD.shape[:2]
        gradients = (
            dx.view(dy_BLD.shape),
            ddt.view(dy_BLD.shape),
            dA.sum(0).T,
            dB.sum(0).unflatten(0, rows),
            dC.sum(0).unflatten(0, rows),
            dD.sum(0),
            dinitial.transpose(1, 2),
        )
        return *_restore(gradients, ctx.dtypes), None, None, None


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
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-1 scan."""
    y_BLD, final_BDN = _SelectiveScan.apply(
        x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, D_D, initial_state_BDN, segment_BL, reverse, torch.is_grad_enabled()
    )
    return (y_BLD, final_BDN) if return_final_state else y_BLD


def _first_tap(segment_BL: Tensor | None, shape: tuple[int, int], width: int) -> np.ndarray:
    """(B, L) the first tap of each event's window that lies in its own segment."""
    since = np.full(shape, width - 1, np.int64)  # events since the segment's start, at most K-1
    if segment_BL is not None:
        segment = segment_BL.numpy()
        for back in range(min(width, shape[1]) - 1, 0, -1):
            since[:, back:][segment[:, back:] != segment[:, :-back]] = back - 1
    return width - 1 - since


class _CausalConv1d(torch.autograd.Function):
    """``x`` begins with the K-1 events before the row."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, weight_DK: Tensor, bias_D: Tensor, segment_BL: Tensor | None) -> Tensor:
        x, weight, _ = inputs = _prepare(x_BSD.dtype, x_BSD, weight_DK.T, bias_D)
        batch, padded, channels = x.shape
        length = padded - len(weight) + 1
        y = x.new_empty(batch, length, channels)
        first = _first_tap(segment_BL, (batch, length), len(weight))
        _run(kernels.conv_forward, batch * -(-length // kernels.ROWS), length, *inputs, first, y)
        ctx.save_for_backward(*inputs)
        ctx.first = first
        ctx.dtypes = _dtypes(x_BSD, weight_DK, bias_D)
        return y.to(x_BSD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = inputs = ctx.saved_tensors
        (dy,) = _prepare(x.dtype, dy_BLD)
        dx = torch.zeros_like(x)
        units = x.shape[0] * -(-x.shape[1] // kernels.ROWS)
        dweight, dbias = x.new_zeros(units, *weight.shape), x.new_zeros(units, *bias.shape)
        _run(kernels.conv_backward, units, dy_BLD.shape[1], *inputs, ctx.first, dy, dx, dweight, dbias)
        return *_restore((dx, dweight.sum(0).T, dbias.sum(0)), ctx.dtypes), None


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    *,
    segment_BL: Tensor | None = None,
    initial_state_BDK1: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution then SiLU."""
    batch, _, channels = x_BLD.shape
    past = weight_DK.shape[1] - 1
    if bias_D is None:
        bias_D = weight_DK.new_zeros(channels)
    if initial_state_BDK1 is None:
        initial_state_BDK1 = x_BLD.new_zeros(batch, channels, past)
    x_BSD = torch.cat([initial_state_BDK1.to(x_BLD.dtype).transpose(1, 2), x_BLD], dim=1)
    y_BLD = _CausalConv1d.apply(x_BSD, weight_DK, bias_D, segment_BL)
    if not return_final_state:
        return y_BLD
    final_BK1D = x_BSD[:, x_BSD.shape[1] - past :]
    if segment_BL is not None:
        segment_BS = torch.cat([segment_BL[:, :1].expand(batch, past), segment_BL], dim=1)
        final_BK1D = final_BK1D * (segment_BS[:, segment_BS.shape[1] - past :] == segment_BL[:, -1:])[..., None]
    return y_BLD, final_BK1D.transpose(1, 2)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
        inputs = [t.view(-1, group_size) for t in _prepare(x.dtype, x, z, weight)]
        inputs.append(inputs[0].new_full((1, 1), eps))
        y = torch.empty_like(inputs[0])
        _run(kernels.norm_forward, -(-len(y) // kernels.ROWS), *inputs, y)
        ctx.save_for_backward(*inputs)
        ctx.dtypes = _dtypes(x, z, weight)
        return y.view(x.shape).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _, weight, _ = inputs = ctx.saved_tensors
        rows_dy = _prepare(x.dtype, dy)[0].view(x.shape)
        dx, dz = torch.empty_like(x), torch.empty_like(x)
        units = -(-len(x) // kernels.ROWS)
        dweight = x.new_zeros(units, *weight.shape)
        _run(kernels.norm_backward, units, *inputs, rows_dy, dx, dz, dweight)
        gradients = (dx.view(dy.shape), dz.view(dy.shape), dweight.sum(0).flatten())
        return *_restore(gradients, ctx.dtypes), None, None


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """Root-mean-square norm of x * silu(z) over groups of ``group_size`` channels, times weight."""
    return _GatedRMSNorm.apply(x, z, weight, eps, group_size)
