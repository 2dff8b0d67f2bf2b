"""Compiled loops of Mamba-1's scan on the CPU: the recurrence itself, one block of channels at a time.

The state of a block stays in the first-level cache. The backward computes the states again from those saved every
few events. Softplus of the time step and the gate silu(z) are part of the loops, which saves passes over memory.

A unit of work is a span times a *block* of at most BLOCK channels: (first channel, number of channels). The loops
always run over whole vectors; unused lanes hold zeros. A comes as (N, D).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from hymate.ops.cpu.kernels import OPTIONS, event, get, put
from hymate.ops.cpu.simd import LANES, broadcast, exp2, fma, load, mul, sigmoid, softplus, splat, store, total

BLOCK = 64
# Scratch rows of one event: inputs (raw is dt before its bias and softplus), then what is computed from them.
X, Z, RAW, DY, STEP, U, GY, OUT, DSTEP = range(9)
ROWS = 9
BIAS, SKIP, SUM_D, SUM_BIAS = range(4)  # scratch rows of a unit: the bias of dt, D and their gradients

_inlined = njit(**OPTIONS)


@_inlined
def _get_all(source, index, N, c0, width, scratch, row):
    for n in range(N):
        get(source, index * N + n, c0, width, scratch, row + n)


@_inlined
def _put_all(scratch, N, width, target, index, c0):
    for n in range(N):
        put(scratch, n, width, target, index * N + n, c0)


@_inlined
def _log_decays(A, N, c0, width, scratch):
    """A in units of log(2), so that a decay is 2**(dt A)."""
    _get_all(A, 0, N, c0, width, scratch, 0)
    for n in range(N):
        for j in range(0, BLOCK, LANES):
            store(scratch, n, j, mul(splat(scratch.dtype.type(1 / math.log(2))), load(scratch, n, j)))


@_inlined
def _get_event(x, raw, m, c0, width, unit_rows, rows, r):
    get(x, m, c0, width, rows, r + X)
    get(raw, m, c0, width, rows, r + RAW)
    one = splat(rows.dtype.type(1))
    for j in range(0, BLOCK, LANES):
        step = softplus(fma(one, load(rows, r + RAW, j), load(unit_rows, BIAS, j)))
        store(rows, r + STEP, j, step)
        store(rows, r + U, j, mul(step, load(rows, r + X, j)))


def selective_forward(
    unit, spans, blocks, starts, chunk, reverse, x, z, raw, bias, A, B, C, D, initial,
    y, saved, final,
):  # fmt: skip
    """silu(z) y, the state before every chunk of events and the state after each row."""
    s, k = unit // len(blocks), unit % len(blocks)
    c0, width, N = blocks[k, 0], blocks[k, 1], len(A)
    scratch = np.zeros((2 * N + ROWS + 4, BLOCK), x.dtype)
    log_decay, state, rows, unit_rows = scratch[:N], scratch[N : 2 * N], scratch[2 * N :], scratch[2 * N + ROWS :]
    _log_decays(A, N, c0, width, log_decay)
    get(bias, 0, c0, width, unit_rows, BIAS)
    get(D, 0, c0, width, unit_rows, SKIP)
    if spans[s, 4]:
        _get_all(initial, spans[s, 0], N, c0, width, state, 0)
    for i in range(spans[s, 2] - spans[s, 1]):
        if len(saved) > 0 and i % chunk == 0:
            _put_all(state, N, width, saved, spans[s, 3] + i // chunk, c0)
        m = event(spans, s, i, reverse)
        live = splat(x.dtype.type(0 if starts[0, m] else 1))
        _get_event(x, raw, m, c0, width, unit_rows, rows, 0)
        get(z, m, c0, width, rows, Z)
        for j in range(0, BLOCK, LANES):
            step, u, out = load(rows, STEP, j), load(rows, U, j), mul(load(unit_rows, SKIP, j), load(rows, X, j))
            for n in range(N):
                decay = mul(live, exp2(mul(step, load(log_decay, n, j))))
                h = fma(decay, load(state, n, j), mul(u, broadcast(B, m, n)))
                store(state, n, j, h)
                out = fma(h, broadcast(C, m, n), out)
            gate = load(rows, Z, j)
            store(rows, OUT, j, mul(out, mul(gate, sigmoid(gate))))
        put(rows, OUT, width, y, m, c0)
    if spans[s, 5]:
        _put_all(state, N, width, final, spans[s, 0], c0)


def selective_backward(
    unit, spans, blocks, starts, chunk, reverse, x, z, raw, bias, A, B, C, D, saved, dy, dfinal,
    dx, dz, draw, dbias, dA, dBC, dD, dinitial,
):  # fmt: skip
    """Gradients for the caller to add up: those of A, D and the bias of dt one for each span, those of B and C side by
    side and one for each block."""
    s, k = unit // len(blocks), unit % len(blocks)
    c0, width, N, part = blocks[k, 0], blocks[k, 1], len(A), k * len(x)
    nothing, one, minus = splat(x.dtype.type(0)), splat(x.dtype.type(1)), splat(x.dtype.type(-1))
    log_2 = splat(x.dtype.type(math.log(2)))
    scratch = np.zeros((4 * N + 4 + chunk * ROWS, BLOCK), x.dtype)
    log_decay, dstate, dlog, before = scratch[:N], scratch[N : 2 * N], scratch[2 * N : 3 * N], scratch[3 * N : 4 * N]
    unit_rows, rows = scratch[4 * N :], scratch[4 * N + 4 :]
    # one vector of channels at a time: the state before an event, then the decay at it
    states = np.zeros((chunk * N + N, 2 * LANES), x.dtype)
    sums = np.zeros((chunk * 2 * N, LANES), x.dtype)  # over the channels, of what is the gradient of B, then of C
    _log_decays(A, N, c0, width, log_decay)
    get(bias, 0, c0, width, unit_rows, BIAS)
    get(D, 0, c0, width, unit_rows, SKIP)
    if spans[s, 5]:
        _get_all(dfinal, spans[s, 0], N, c0, width, dstate, 0)
    events = spans[s, 2] - spans[s, 1]
    for first in range((events - 1) // chunk * chunk, -1, -chunk):
        last = min(first + chunk, events) - 1
        _get_all(saved, spans[s, 3] + first // chunk, N, c0, width, before, 0)
        sums[:] = 0
        for i in range(first, last + 1):
            m, r = event(spans, s, i, reverse), (i - first) * ROWS
            _get_event(x, raw, m, c0, width, unit_rows, rows, r)
            get(z, m, c0, width, rows, r + Z)
            get(dy, m, c0, width, rows, r + DY)
        for j in range(0, BLOCK, LANES):
            for n in range(N):
                store(states, n, 0, load(before, n, j))
            for i in range(first, last + 1):
                m, at, r = event(spans, s, i, reverse), (i - first) * N, (i - first) * ROWS
                live = splat(x.dtype.type(0 if starts[0, m] else 1))
                z_j = load(rows, r + Z, j)
                gate = sigmoid(z_j)
                silu, dout = mul(z_j, gate), load(rows, r + DY, j)
                step, u, g = load(rows, r + STEP, j), load(rows, r + U, j), mul(dout, silu)
                out = mul(load(unit_rows, SKIP, j), load(rows, r + X, j))
                store(rows, r + GY, j, g)
                for n in range(N):
                    decay = mul(live, exp2(mul(step, load(log_decay, n, j))))
                    h = fma(decay, load(states, at + n, 0), mul(u, broadcast(B, m, n)))
                    store(states, at + n, LANES, decay)
                    store(states, at + N + n, 0, h)
                    out = fma(h, broadcast(C, m, n), out)
                    store(sums, 2 * at + N + n, 0, fma(h, g, load(sums, 2 * at + N + n, 0)))
                slope = fma(silu, fma(gate, minus, one), gate)
                store(rows, r + Z, j, mul(mul(dout, slope), out))
            for i in range(last, first - 1, -1):
                m, at, r = event(spans, s, i, reverse), (i - first) * N, (i - first) * ROWS
                step, u, g = load(rows, r + STEP, j), load(rows, r + U, j), load(rows, r + GY, j)
                du, dstep = nothing, nothing
                for n in range(N):
                    dh = fma(g, broadcast(C, m, n), load(dstate, n, j))
                    store(sums, 2 * at + n, 0, fma(dh, u, load(sums, 2 * at + n, 0)))
                    du = fma(dh, broadcast(B, m, n), du)
                    dh = mul(dh, load(states, at + n, LANES))
                    store(dstate, n, j, dh)
                    dh = mul(dh, load(states, at + n, 0))
                    store(dlog, n, j, fma(dh, step, load(dlog, n, j)))
                    dstep = fma(dh, load(log_decay, n, j), dstep)
                x_j = load(rows, r + X, j)
                dstep = fma(dstep, log_2, mul(x_j, du))
                # softplus'(v) = 1 - exp(-softplus(v))
                dstep = mul(dstep, fma(exp2(mul(step, splat(x.dtype.type(-1 / math.log(2))))), minus, one))
                store(rows, r + DSTEP, j, dstep)
                store(rows, r + OUT, j, fma(step, du, mul(load(unit_rows, SKIP, j), g)))
                store(unit_rows, SUM_D, j, fma(x_j, g, load(unit_rows, SUM_D, j)))
                store(unit_rows, SUM_BIAS, j, fma(one, dstep, load(unit_rows, SUM_BIAS, j)))
        for i in range(first, last + 1):
            m, at, r = event(spans, s, i, reverse), (i - first) * N, (i - first) * ROWS
            put(rows, r + Z, width, dz, m, c0)
            put(rows, r + OUT, width, dx, m, c0)
            put(rows, r + DSTEP, width, draw, m, c0)
            for n in range(2 * N):
                dBC[part + m, n] = total(load(sums, 2 * at + n, 0))
    _put_all(dlog, N, width, dA, s, c0)
    put(unit_rows, SUM_D, width, dD, s, c0)
    put(unit_rows, SUM_BIAS, width, dbias, s, c0)
    if spans[s, 4]:
        _put_all(dstate, N, width, dinitial, spans[s, 0], c0)
