"""The operators on the CPU: compiled loops inside hand-written autograd functions.

Each mixer is one autograd function from the output of its first projection to the input of its last. So the loops read
the columns of one matrix in place, and write its gradient in place, where single operators would copy both.

Both scans keep the state before every chunk of events; the backward computes the others again from it. Time and memory
are linear in L. Accumulation is in float32, or in float64 for float64 inputs.

Shape legend: as in reference.py, which also defines what each function computes; M events of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hymate.ops.compose import Mamba1, Mamba2, State
from hymate.ops.cpu import launch, rowwise, selective, simd, ssd

SSD_CHUNK = 64  # Mamba-2: most events between two saved states; what is between stays in cache
SELECTIVE_CHUNK = 16  # Mamba-1: events between two saved states
SPAN = 512  # fewest events in one unit of work of a scan, where the row has so many


def _run(kernel: Callable[..., None], units: int, **arguments: Any) -> None:
    arrays = {name: a.detach().numpy() if isinstance(a, Tensor) else a for name, a in arguments.items()}
    threads = torch.get_num_threads()
    launch.run(kernel, units, threads, **arrays)
    if torch.get_num_threads() != threads:  # starting Numba's OpenMP layer resets the calling thread's setting
        torch.set_num_threads(threads)


def _prepare(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Contiguous copies or views in the dtype of accumulation."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.detach().to(acc).contiguous() for t in tensors]


def _restore(gradients: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Each gradient in the shape and dtype of its input."""
    return [g.view(x.shape).to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]


def _later(raw_MX: Tensor, time_BLX: Tensor | None) -> Tensor:
    """What the steps are made of, with what the hours add."""
    return raw_MX if time_BLX is None else raw_MX + time_BLX.detach().flatten(0, 1).to(raw_MX.dtype)


# ------------------------------------------------------------------------------------------------- units of work


def _starts(segment_BL: Tensor | None, shape: tuple[int, int], reverse: bool) -> np.ndarray:
    """(B, L) True where the state before the event is zero."""
    starts = np.zeros(shape, np.bool_)
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


def _runs(heads: int, groups: int, spans: int) -> np.ndarray:
    """Cut heads into the runs that ssd.py describes: as few as give every thread work, for each reads all of B and C
    and has its own gradients of them."""
    size = heads // groups
    count = min(size, -(-torch.get_num_threads() // (spans * groups)))
    cuts = [size * k // count for k in range(count + 1)]
    return np.array([(g * size + cuts[k], cuts[k + 1] - cuts[k], g, k) for g in range(groups) for k in range(count)])


def _blocks(channels: int) -> np.ndarray:
    """Cut channels into the blocks that selective.py describes."""
    size = selective.BLOCK
    return np.array([(lo, min(size, channels - lo)) for lo in range(0, channels, size)])


def _first_tap(segment_BL: Tensor | None, shape: tuple[int, int], width: int, reverse: bool) -> np.ndarray:
    """(B, L) the first tap of each event's window, in the order of processing, that lies in its own segment."""
    since = np.full(shape, width - 1, np.int64)  # events since the segment's start, at most K-1
    if segment_BL is not None:
        segment = segment_BL.numpy()[:, :: -1 if reverse else 1]
        for back in range(min(width, shape[1]) - 1, 0, -1):
            since[:, back:][segment[:, back:] != segment[:, :-back]] = back - 1
    return width - 1 - since


# ------------------------------------------------------------------------------------------------- convolution


class _Convolution:
    """The convolution of one call: ``x`` are columns of a wider matrix."""

    def __init__(
        self,
        dtype: torch.dtype,
        weight_DK: Tensor,
        bias_D: Tensor,
        past_BDK1: Tensor,
        segment_BL: Tensor | None,
        length: int,
        reverse: bool,
    ) -> None:
        rows, weight = len(past_BDK1), torch.cat([weight_DK.T, bias_D[None]])
        self.past, self.weight = _prepare(dtype, past_BDK1.transpose(1, 2), weight)
        first = _first_tap(segment_BL, (rows, length), weight_DK.shape[1], reverse)
        self.units = rows * -(-length // rowwise.ROWS)
        self.inputs = dict(L=length, reverse=reverse, past=self.past, weight=self.weight, first=first)

    def forward(self, x_MD: Tensor) -> Tensor:
        y_MD = torch.empty(x_MD.shape, dtype=x_MD.dtype)
        _run(rowwise.conv_forward, self.units, x=x_MD, y=y_MD, **self.inputs)
        return y_MD

    def backward(self, x_MD: Tensor, dy_MD: Tensor, dx_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill dx; return the gradients of weight (D, K), bias (D) and past (B, D, K-1)."""
        dpast, dweight = torch.zeros_like(self.past), self.weight.new_empty(self.units, *self.weight.shape)
        outputs = dict(dx=dx_MD, dpast=dpast, dweight=dweight)
        _run(rowwise.conv_backward, self.units, x=x_MD, dy=dy_MD, **self.inputs, **outputs)
        dweight = dweight.sum(0)
        return dweight[:-1].T.contiguous(), dweight[-1], dpast.transpose(1, 2).contiguous()


def _past(state: State | None, x_BLD: Tensor, width: int) -> Tensor:
    return x_BLD.new_zeros(x_BLD.shape[0], x_BLD.shape[2], width - 1) if state is None else state[0]


def _last_inputs(x_BLD: Tensor, past_BDK1: Tensor, segment_BL: Tensor | None, reverse: bool) -> Tensor:
    """(B, D, K-1) what the convolution carries on: the last inputs of the segment that is processed last."""
    past = past_BDK1.shape[2]
    order = slice(0, past) if reverse else slice(max(0, x_BLD.shape[1] - past), None)
    window_BnD = x_BLD[:, order].flip(1) if reverse else x_BLD[:, order]
    if segment_BL is not None:
        segment_Bn = segment_BL[:, order].flip(1) if reverse else segment_BL[:, order]
        window_BnD = window_BnD * (segment_Bn == segment_Bn[:, -1:])[..., None]
        first = segment_BL[:, -1:] if reverse else segment_BL[:, :1]
        past_BDK1 = past_BDK1 * (first == segment_Bn[:, -1:])[..., None]
    return torch.cat([past_BDK1.to(x_BLD.dtype), window_BnD.transpose(1, 2)], dim=2)[:, :, window_BnD.shape[1] :]


# ----------------------------------------------------------------------------------------------------- Mamba-2


class _Mamba2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Mamba2, chunk: int, keep: bool, *tracked: Any) -> tuple[Tensor, Tensor]:
        """tracked: what has a gradient, in the order of `Mamba2`: the two states apart, the hours last."""
        zxbcdt_BLE, conv_weight_XK, conv_bias_X, *vectors, past_BXK1, initial_BHPN, time_BLH = tracked
        segment_BL, groups, reverse = given.segment_BL, given.groups, given.reverse
        batch, length, _ = zxbcdt_BLE.shape
        _, heads, P, N = initial_BHPN.shape
        D, X = heads * P, len(conv_bias_X)
        (zxbcdt,) = _prepare(zxbcdt_BLE.dtype, zxbcdt_BLE.flatten(0, 1))
        z, xbc, raw = zxbcdt.split([D, X, heads], dim=1)
        weights = _prepare(zxbcdt.dtype, *vectors, initial_BHPN.flatten(0, 2))
        dt_bias, A, skip, norm_weight, initial = (w.view(-1, w.shape[-1]) for w in weights)

        convolution = _Convolution(zxbcdt.dtype, conv_weight_XK, conv_bias_X, past_BXK1, segment_BL, length, reverse)
        xbc = convolution.forward(xbc)
        starts = _starts(segment_BL, (batch, length), reverse)
        spans, slots = _spans(starts, reverse, chunk)
        runs = _runs(heads, groups, len(spans))
        plan = dict(spans=spans, runs=runs, N=N, P=P, chunk=chunk, reverse=reverse)
        dt = F.softplus(_later(raw + dt_bias, time_BLH))
        decay = torch.exp(dt * A).masked_fill_(torch.from_numpy(starts).view(-1, 1), 0)
        x, B, C = xbc.split([D, groups * N, groups * N], dim=1)
        inputs = dict(x=x, B=B, C=C, dt=dt, decay=decay, D=skip, initial=initial)
        padded = [-(-n // simd.LANES) * simd.LANES for n in (N, P)]
        saved = xbc.new_empty(slots * heads if keep else 0, *padded)
        y, final = xbc.new_empty(len(xbc), D), torch.empty_like(initial)
        _run(ssd.ssd_forward, len(spans) * len(runs), **plan, **inputs, y=y, saved=saved, final=final)

        norm = dict(size=D // groups, x=y, z=z, weight=norm_weight, eps=y.new_full((1, 1), given.eps))
        out = torch.empty_like(y)
        _run(rowwise.norm_forward, -(-len(y) // rowwise.ROWS), **norm, y=out)

        ctx.save_for_backward(*tracked[:-1], xbc, dt, decay, y, saved)
        ctx.convolution, ctx.plan, ctx.groups, ctx.eps = convolution, plan, groups, given.eps
        return out.view(batch, length, D).to(zxbcdt_BLE.dtype), final.view(initial_BHPN.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLD: Tensor, dfinal_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        *originals, xbc, dt, decay, y, saved = ctx.saved_tensors
        groups, (spans, runs, N) = ctx.groups, (ctx.plan[name] for name in ("spans", "runs", "N"))
        D, X, heads = y.shape[1], xbc.shape[1], dt.shape[1]
        (zxbcdt,) = _prepare(y.dtype, originals[0].flatten(0, 1))
        z, raw_xbc, _ = zxbcdt.split([D, X, heads], dim=1)
        A, skip, norm_weight = (w.view(1, -1) for w in _prepare(y.dtype, *originals[4:7]))
        dout, dfinal = _prepare(y.dtype, dout_BLD.flatten(0, 1), dfinal_BHPN.flatten(0, 2))
        dzxbcdt = torch.empty_like(zxbcdt)
        dz, draw_xbc, draw_dt = dzxbcdt.split([D, X, heads], dim=1)

        units = -(-len(y) // rowwise.ROWS)
        dxbc, dnorm = torch.empty_like(xbc), y.new_empty(units, D)
        dx = dxbc[:, :D]  # the gradient of y at first, which the scan's backward replaces
        norm = dict(size=D // groups, x=y, z=z, weight=norm_weight, eps=y.new_full((1, 1), ctx.eps))
        _run(rowwise.norm_backward, units, **norm, dy=dout, dx=dx, dz=dz, dweight=dnorm)

        x, B, C = xbc.split([D, groups * N, groups * N], dim=1)
        inputs = dict(x=x, B=B, C=C, dt=dt, decay=decay, D=skip, A=A, y=y, saved=saved, dy=dx, dfinal=dfinal)
        ddt, dinitial = torch.empty_like(dt), torch.zeros_like(dfinal)
        dBC = y.new_empty(len(runs) // groups, len(y), X - D)
        dA, dD = y.new_empty(2, len(spans), heads)
        outputs = dict(dx=dx, dBC=dBC, ddt=ddt, dA=dA, dD=dD, dinitial=dinitial)
        _run(ssd.ssd_backward, len(spans) * len(runs), **ctx.plan, **inputs, **outputs)
        torch.sum(dBC, 0, out=dxbc[:, D:])
        torch.mul(ddt, -torch.expm1(-dt), out=draw_dt)  # softplus'(v) = 1 - exp(-softplus(v))

        dconv = ctx.convolution.backward(raw_xbc, dxbc, draw_xbc)
        gradients = (dzxbcdt, *dconv[:2], draw_dt.sum(0), dA.sum(0), dD.sum(0), dnorm.sum(0), dconv[2], dinitial)
        dtime = draw_dt.unflatten(0, dout_BLD.shape[:2]).clone() if ctx.needs_input_grad[-1] else None
        return None, None, None, *_restore(gradients, originals), dtime


def mamba2(given: Mamba2) -> tuple[Tensor, State]:
    """The inner part of a Mamba-2 mixer; about ``chunk_size`` events lie between two states kept for the backward."""
    heads, D, X = len(given.A_H), len(given.norm_weight_D), len(given.conv_bias_X)
    xbc_BLX = given.zxbcdt_BLE[..., D : D + X]
    past = _past(given.state, xbc_BLX, given.conv_weight_XK.shape[1])
    if given.state is None:
        initial = given.A_H.new_zeros(len(past), heads, D // heads, (X - D) // (2 * given.groups))
    else:
        initial = given.state[1]
    weights = (given.conv_weight_XK, given.conv_bias_X, given.dt_bias_H, given.A_H, given.D_H, given.norm_weight_D)
    chunk, keep = min(-(-given.chunk_size // ssd.TIME) * ssd.TIME, SSD_CHUNK), torch.is_grad_enabled()
    y, final = _Mamba2.apply(given, chunk, keep, given.zxbcdt_BLE, *weights, past, initial, given.time_BLH)
    return y, (_last_inputs(xbc_BLX, past, given.segment_BL, given.reverse), final)


# ----------------------------------------------------------------------------------------------------- Mamba-1


class _Mamba1(torch.autograd.Function):
    """The products with the small projections are here, too: their outputs never leave the dtype of accumulation."""

    @staticmethod
    def forward(ctx: Any, given: Mamba1, keep: bool, *tracked: Any) -> tuple[Tensor, Tensor]:
        """tracked: as of `_Mamba2`."""
        xz_BLE, conv_weight_DK, conv_bias_D, x_weight_SD, dt_weight_DR, dt_bias_D, A_DN, D_D, *_ = tracked
        past_BDK1, initial_BDN, time_BLD = tracked[-3:]
        segment_BL, reverse = given.segment_BL, given.reverse
        batch, length, _ = xz_BLE.shape
        _, D, N = initial_BDN.shape
        (xz,) = _prepare(xz_BLE.dtype, xz_BLE.flatten(0, 1))
        x_weight, dt_weight, bias, A, skip = _prepare(xz.dtype, x_weight_SD, dt_weight_DR, dt_bias_D, A_DN.T, D_D)
        (initial,) = _prepare(xz.dtype, initial_BDN.transpose(1, 2))
        convolution = _Convolution(xz.dtype, conv_weight_DK, conv_bias_D, past_BDK1, segment_BL, length, reverse)
        x = convolution.forward(xz[:, :D])
        with torch.autocast("cpu", enabled=False):
            small = x @ x_weight.T
            raw = _later(small[:, : -2 * N] @ dt_weight.T, time_BLD)
        starts = _starts(segment_BL, (batch, length), reverse)
        spans, slots = _spans(starts, reverse, SELECTIVE_CHUNK)
        blocks = _blocks(D)
        starts = starts.reshape(1, -1).astype(np.int64)
        plan = dict(spans=spans, blocks=blocks, starts=starts, chunk=SELECTIVE_CHUNK, reverse=reverse)
        saved = x.new_empty(slots if keep else 0, N, D)
        y, final = torch.empty_like(x), torch.empty_like(initial)
        B, C = small[:, -2 * N : -N], small[:, -N:]
        inputs = dict(x=x, z=xz[:, D:], raw=raw, bias=bias, A=A, B=B, C=C, D=skip, initial=initial)
        outputs = dict(y=y, saved=saved, final=final)
        _run(selective.selective_forward, len(spans) * len(blocks), **plan, **inputs, **outputs)

        ctx.save_for_backward(*tracked[:-1], x, small, raw, saved)
        ctx.convolution, ctx.plan = convolution, plan
        return y.view(batch, length, D).to(xz_BLE.dtype), final.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor, dfinal_BDN: Tensor) -> tuple[Tensor | None, ...]:
        *originals, x, small, raw, saved = ctx.saved_tensors
        spans, blocks = ctx.plan["spans"], ctx.plan["blocks"]
        N, D = saved.shape[1:]
        (xz,) = _prepare(x.dtype, originals[0].flatten(0, 1))
        x_weight, dt_weight, bias, A, skip = _prepare(x.dtype, *originals[3:6], originals[6].T, originals[7])
        dy, dfinal = _prepare(x.dtype, dy_BLD.flatten(0, 1), dfinal_BDN.transpose(1, 2))
        dxz, dsmall = torch.empty_like(xz), torch.empty_like(small)
        dx, draw, dinitial = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(dfinal)
        dA, (dD, dbias) = x.new_empty(len(spans), N, D), x.new_empty(2, len(spans), D)
        dBC = x.new_empty(len(blocks), len(x), 2 * N)
        B, C = small[:, -2 * N : -N], small[:, -N:]
        inputs = dict(x=x, z=xz[:, D:], raw=raw, bias=bias, A=A, B=B, C=C, D=skip, saved=saved, dy=dy, dfinal=dfinal)
        outputs = dict(dx=dx, dz=dxz[:, D:], draw=draw, dbias=dbias, dA=dA, dBC=dBC, dD=dD, dinitial=dinitial)
        _run(selective.selective_backward, len(spans) * len(blocks), **ctx.plan, **inputs, **outputs)

        torch.sum(dBC, 0, out=dsmall[:, -2 * N :])
        with torch.autocast("cpu", enabled=False):
            torch.mm(draw, dt_weight, out=dsmall[:, : -2 * N])
            ddt_weight, dx_weight = draw.T @ small[:, : -2 * N], dsmall.T @ x
            dx.addmm_(dsmall, x_weight)
        *dconv, dpast = ctx.convolution.backward(xz[:, :D], dx, dxz[:, :D])
        dA = dA.sum(0).T.contiguous()
        scan = (dx_weight, ddt_weight, dbias.sum(0), dA, dD.sum(0), dpast, dinitial.transpose(1, 2).contiguous())
        dtime = draw.view(dy_BLD.shape) if ctx.needs_input_grad[-1] else None
        return None, None, *_restore((dxz, *dconv, *scan), originals), dtime


def mamba1(given: Mamba1) -> tuple[Tensor, State]:
    """The inner part of a Mamba-1 mixer."""
    x_BLD, A_DN = given.xz_BLE[..., : len(given.D_D)], given.A_DN
    past = _past(given.state, x_BLD, given.conv_weight_DK.shape[1])
    initial = A_DN.new_zeros(len(past), *A_DN.shape) if given.state is None else given.state[1]
    convolution, step = (given.conv_weight_DK, given.conv_bias_D), (given.dt_weight_DR, given.dt_bias_D)
    weights = (*convolution, given.x_weight_SD, *step, A_DN, given.D_D)
    keep = torch.is_grad_enabled()
    y, final = _Mamba1.apply(given, keep, given.xz_BLE, *weights, past, initial, given.time_BLD)
    return y, (_last_inputs(x_BLD, past, given.segment_BL, given.reverse), final)
