"""Compiled loops of the CPU operators (Numba); launch.py runs them, cpu.py wraps them in autograd functions.

Legend: M events of all rows, B batch rows, H heads, P headdim, G groups, N d_state, D channels,
K conv width, W = BLOCK. Every array is a matrix; all floating arrays of a call share one dtype.

A scan is cut into independent units of work, a span times a block of channels. A *span* is a run of whole
segments of one row: (batch row, first event, one past the last event, index of its first saved state,
whether it is processed first in its row, whether last). A *block* is at most W channels of one group:
(first channel, number of channels, group, its number within the group). The cut does not depend on the
number of threads, so neither do the results.

The inner loops always run over W channels (unused ones hold zeros) and take their operands from one scratch
row at constant offsets: that lets the compiler vectorise them with next to no run-time alias checks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from hymate.ops.exponential import exp

# Reductions may be reordered and multiply-adds contracted; NaN and infinity keep their meaning.
OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
BLOCK = 64
ROWS = 64  # events in one unit of work of the convolution and the norm
INDEX = 0xFFFFFFFF  # as a mask, tells the compiler that an index is not negative and needs no wrap-around

_inlined = njit(**OPTIONS)


# ----------------------------------------------------------------------------------------------- arguments
# launch.py calls kernel(unit, table, zero): the table holds (address, rows, columns) of every matrix and
# (value, 0, 0) of every integer; zero has the dtype of the floating matrices.


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), codegen


@_inlined
def _number(table, k):
    return carray(_pointer(table, 0), 3 * (k + 1))[3 * k]


@_inlined
def _matrix(table, k, like):
    row = carray(_pointer(table, 0), 3 * (k + 1))
    return carray(_pointer(row[3 * k], like), (row[3 * k + 1], row[3 * k + 2]))


# -------------------------------------------------------------------------------------- both scans: states


@_inlined
def _event(spans, s, i, reverse):
    return spans[s, 2] - 1 - i if reverse else spans[s, 1] + i


@_inlined
def _read(states, index, N, c0, width, target, offset):
    for n in range(N):
        for j in range(width):
            target[n, offset + j] = states[index * N + n, (c0 & INDEX) + j]


@_inlined
def _write(source, offset, N, c0, width, states, index):
    for n in range(N):
        for j in range(width):
            states[index * N + n, (c0 & INDEX) + j] = source[n, offset + j]


# ------------------------------------------------------------------------------------------ Mamba-2 scan
# Two events pass over the state together, so that it is read and written half as often. An odd last event
# is paired with one that changes nothing (decay 1, inflow 0), whose results are overwritten.

# Scratch row of two events: decay, inflow, sum over the state, gradient of y, time step, x, y without skip.
A0, U0, Y0, G0, T0, X0, R0, A1, U1, Y1, G1, T1, X1, R1 = (BLOCK * k for k in range(14))
EVENT = A1


@_inlined
def _ssd_load(m, c0, width, P, x, dt, decay, row, offset):
    offset &= INDEX
    h = c0 // P
    left = (h + 1) * P - c0
    for j in range(width):
        if left == 0:
            h += 1
            left = P
        left -= 1
        row[offset + A0 + j] = decay[m, h]
        row[offset + T0 + j] = dt[m, h]
    for j in range(width):
        row[offset + X0 + j] = x[m, (c0 & INDEX) + j]
    for j in range(BLOCK):
        row[offset + U0 + j] = row[offset + T0 + j] * row[offset + X0 + j]
        row[offset + Y0 + j] = 0


@_inlined
def _ssd_pad(row):
    """Make the second event of the scratch row one that changes nothing."""
    for j in range(BLOCK):
        row[A1 + j] = 1
        row[U1 + j] = 0


def ssd_forward(unit, table, zero):
    """y, the state before every chunk of events (``chunk`` is even) and the state after each row.

    ``decay`` (M, H) is exp(dt A), zero where a segment starts; D comes per channel.
    """
    spans, blocks = _matrix(table, 0, 0), _matrix(table, 1, 0)
    N, P, chunk, reverse = _number(table, 2), _number(table, 3), _number(table, 4), _number(table, 5)
    x, dt, decay = _matrix(table, 6, zero), _matrix(table, 7, zero), _matrix(table, 8, zero)
    B, C, D = _matrix(table, 9, zero), _matrix(table, 10, zero), _matrix(table, 11, zero)
    initial, y = _matrix(table, 12, zero), _matrix(table, 13, zero)
    saved, final = _matrix(table, 14, zero), _matrix(table, 15, zero)

    s, k = unit // len(blocks), unit % len(blocks)
    c0, width = blocks[k, 0], blocks[k, 1]
    state = np.zeros((N, BLOCK), x.dtype)
    if spans[s, 4]:
        _read(initial, spans[s, 0], N, c0, width, state, 0)
    row = np.zeros(2 * EVENT, x.dtype)
    events = spans[s, 2] - spans[s, 1]
    for i in range(0, events, 2):
        if len(saved) > 0 and i % chunk == 0:
            _write(state, 0, N, c0, width, saved, spans[s, 3] + i // chunk)
        m0 = _event(spans, s, i, reverse)
        m1 = _event(spans, s, min(i + 1, events - 1), reverse)
        _ssd_load(m0, c0, width, P, x, dt, decay, row, 0)
        if m1 != m0:
            _ssd_load(m1, c0, width, P, x, dt, decay, row, EVENT)
        else:
            _ssd_pad(row)
        for n in range(N):
            h = state[n]
            g = blocks[k, 2] * N + n
            B0, C0, B1, C1 = B[m0, g], C[m0, g], B[m1, g], C[m1, g]
            for j in range(BLOCK):
                v = row[A0 + j] * h[j] + row[U0 + j] * B0
                row[Y0 + j] += v * C0
                v = row[A1 + j] * v + row[U1 + j] * B1
                row[Y1 + j] += v * C1
                h[j] = v
        for j in range(width):
            y[m1, (c0 & INDEX) + j] = row[Y1 + j] + D[0, (c0 & INDEX) + j] * row[X1 + j]
        for j in range(width):
            y[m0, (c0 & INDEX) + j] = row[Y0 + j] + D[0, (c0 & INDEX) + j] * row[X0 + j]
    if spans[s, 5]:
        _write(state, 0, N, c0, width, final, spans[s, 0])


@_inlined
def _ssd_load_gradient(m, c0, width, y, D, dy, row, offset):
    offset &= INDEX
    for j in range(width):
        row[offset + G0 + j] = dy[m, (c0 & INDEX) + j]
    for j in range(width):
        row[offset + R0 + j] = y[m, (c0 & INDEX) + j] - D[0, (c0 & INDEX) + j] * row[offset + X0 + j]


# Sums of one unit of work: the gradient of log(decay), which adds up over later events, those of A and of D; then A
# and D themselves.
SUM_LOG, SUM_A, SUM_D, AS, DS = (BLOCK * k for k in range(5))


@_inlined
def _ssd_finish(m, c0, width, row, offset, sums, dx, ddt, zero):
    """The gradients of one event that take no further pass over the state."""
    offset &= INDEX
    for j in range(BLOCK):
        dy, du, xj, t = row[offset + G0 + j], row[offset + Y0 + j], row[offset + X0 + j], row[offset + T0 + j]
        v = sums[SUM_LOG + j] + dy * row[offset + R0 + j] - row[offset + U0 + j] * du
        if row[offset + A0 + j] == 0:  # where a segment starts
            v = zero
        sums[SUM_LOG + j] = v
        sums[SUM_A + j] += t * v
        sums[SUM_D + j] += xj * dy
        row[offset + T0 + j] = t * du + sums[DS + j] * dy
        row[offset + X0 + j] = sums[AS + j] * v + xj * du
    for j in range(width):
        dx[m, (c0 & INDEX) + j] = row[offset + T0 + j]
    for j in range(width):
        ddt[m, (c0 & INDEX) + j] = row[offset + X0 + j]


def ssd_backward(unit, table, zero):
    """Gradients for the caller to add up: ddt, dA and dD per channel, dA and dD also per span, dB and dC per
    block of a group. A and D come per channel."""
    spans, blocks = _matrix(table, 0, 0), _matrix(table, 1, 0)
    N, P, chunk, reverse = _number(table, 2), _number(table, 3), _number(table, 4), _number(table, 5)
    x, dt, decay = _matrix(table, 6, zero), _matrix(table, 7, zero), _matrix(table, 8, zero)
    A, B, C, D = _matrix(table, 9, zero), _matrix(table, 10, zero), _matrix(table, 11, zero), _matrix(table, 12, zero)
    y, saved = _matrix(table, 13, zero), _matrix(table, 14, zero)
    dy, dfinal = _matrix(table, 15, zero), _matrix(table, 16, zero)
    dx, ddt, dA = _matrix(table, 17, zero), _matrix(table, 18, zero), _matrix(table, 19, zero)
    dB, dC, dD = _matrix(table, 20, zero), _matrix(table, 21, zero), _matrix(table, 22, zero)
    dinitial = _matrix(table, 23, zero)

    s, k = unit // len(blocks), unit % len(blocks)
    c0, width, part = blocks[k, 0], blocks[k, 1], blocks[k, 3] * len(x)
    state = np.zeros((N, BLOCK), x.dtype)
    grad = np.zeros((N, BLOCK), x.dtype)
    if spans[s, 5]:
        _read(dfinal, spans[s, 0], N, c0, width, grad, 0)
    rows = np.zeros((chunk // 2, 2 * EVENT), x.dtype)
    sums = np.zeros(5 * BLOCK, x.dtype)
    for j in range(width):
        sums[AS + j] = A[0, c0 + j]
        sums[DS + j] = D[0, c0 + j]
    events = spans[s, 2] - spans[s, 1]
    for first in range((events - 1) // chunk * chunk, -1, -chunk):
        last = min(first + chunk, events) - 1
        _read(saved, spans[s, 3] + first // chunk, N, c0, width, state, 0)
        for i in range(first, last + 1, 2):
            m0 = _event(spans, s, i, reverse)
            m1 = _event(spans, s, min(i + 1, last), reverse)
            row = rows[(i - first) // 2]
            _ssd_load(m0, c0, width, P, x, dt, decay, row, 0)
            _ssd_load_gradient(m0, c0, width, y, D, dy, row, 0)
            if m1 != m0:
                _ssd_load(m1, c0, width, P, x, dt, decay, row, EVENT)
                _ssd_load_gradient(m1, c0, width, y, D, dy, row, EVENT)
            else:
                _ssd_pad(row)
            for n in range(N):
                h = state[n]
                g = blocks[k, 2] * N + n
                B0, B1 = B[m0, g], B[m1, g]
                sum0 = sum1 = zero
                for j in range(BLOCK):
                    v = row[A0 + j] * h[j] + row[U0 + j] * B0
                    sum0 += v * row[G0 + j]
                    v = row[A1 + j] * v + row[U1 + j] * B1
                    sum1 += v * row[G1 + j]
                    h[j] = v
                dC[part + m1, g] = sum1
                dC[part + m0, g] = sum0
        # Added up over a long row, the gradient of log(decay) would gather rounding errors: start it anew.
        for j in range(BLOCK):
            sums[SUM_LOG + j] = 0
        for n in range(N):
            for j in range(BLOCK):
                sums[SUM_LOG + j] += state[n, j] * grad[n, j]
        for i in range((last - first) // 2 * 2 + first, first - 1, -2):
            m0 = _event(spans, s, i, reverse)
            m1 = _event(spans, s, min(i + 1, last), reverse)
            row = rows[(i - first) // 2]
            for n in range(N):
                h = grad[n]
                g = blocks[k, 2] * N + n
                B0, C0, B1, C1 = B[m0, g], C[m0, g], B[m1, g], C[m1, g]
                sum0 = sum1 = zero
                for j in range(BLOCK):
                    v = h[j] + row[G1 + j] * C1
                    row[Y1 + j] += v * B1
                    sum1 += v * row[U1 + j]
                    v = row[A1 + j] * v + row[G0 + j] * C0
                    row[Y0 + j] += v * B0
                    sum0 += v * row[U0 + j]
                    h[j] = row[A0 + j] * v
                dB[part + m1, g] = sum1
                dB[part + m0, g] = sum0
            for e in range(1 if m1 != m0 else 0, -1, -1):
                _ssd_finish(m1 if e else m0, c0, width, row, e * EVENT, sums, dx, ddt, zero)
    for j in range(width):
        dA[s, c0 + j] = sums[SUM_A + j]
        dD[s, c0 + j] = sums[SUM_D + j]
    if spans[s, 4]:
        _write(grad, 0, N, c0, width, dinitial, spans[s, 0])


# ------------------------------------------------------------------------------------------ Mamba-1 scan

# Scratch row of one event: time step, inflow, sum over the state, gradient of y, x, gradient of the time step.
T, U, Y, G, X, R = (BLOCK * k for k in range(6))


@_inlined
def _selective_load(m, c0, width, x, dt, row):
    for j in range(width):
        row[T + j] = dt[m, (c0 & INDEX) + j]
    for j in range(width):
        row[X + j] = x[m, (c0 & INDEX) + j]
    for j in range(BLOCK):
        row[U + j] = row[T + j] * row[X + j]
        row[Y + j] = 0
        row[R + j] = 0


def selective_forward(unit, table, zero):
    """y, the state before every chunk of events and the state after each row. A is (N, D)."""
    spans, blocks, starts = _matrix(table, 0, 0), _matrix(table, 1, 0), _matrix(table, 2, 0)
    chunk, reverse = _number(table, 3), _number(table, 4)
    x, dt, A = _matrix(table, 5, zero), _matrix(table, 6, zero), _matrix(table, 7, zero)
    B, C, D = _matrix(table, 8, zero), _matrix(table, 9, zero), _matrix(table, 10, zero)
    initial, y = _matrix(table, 11, zero), _matrix(table, 12, zero)
    saved, final = _matrix(table, 13, zero), _matrix(table, 14, zero)

    s, k = unit // len(blocks), unit % len(blocks)
    c0, width, N = blocks[k, 0], blocks[k, 1], len(A)
    state = np.zeros((N, 2 * BLOCK), x.dtype)  # the state, then A
    if spans[s, 4]:
        _read(initial, spans[s, 0], N, c0, width, state, 0)
    _read(A, 0, N, c0, width, state, BLOCK)
    row = np.zeros(6 * BLOCK, x.dtype)
    for i in range(spans[s, 2] - spans[s, 1]):
        if len(saved) > 0 and i % chunk == 0:
            _write(state, 0, N, c0, width, saved, spans[s, 3] + i // chunk)
        m = _event(spans, s, i, reverse)
        live = x.dtype.type(0 if starts[0, m] else 1)
        _selective_load(m, c0, width, x, dt, row)
        for n in range(N):
            h = state[n]
            Bn, Cn = B[m, n], C[m, n]
            for j in range(BLOCK):
                v = live * exp(row[T + j] * h[BLOCK + j]) * h[j] + row[U + j] * Bn
                row[Y + j] += v * Cn
                h[j] = v
        for j in range(width):
            y[m, (c0 & INDEX) + j] = row[Y + j] + D[0, (c0 & INDEX) + j] * row[X + j]
    if spans[s, 5]:
        _write(state, 0, N, c0, width, final, spans[s, 0])


def selective_backward(unit, table, zero):
    """Gradients for the caller to add up: dA and dD per span, dB and dC per block."""
    spans, blocks, starts = _matrix(table, 0, 0), _matrix(table, 1, 0), _matrix(table, 2, 0)
    chunk, reverse = _number(table, 3), _number(table, 4)
    x, dt, A = _matrix(table, 5, zero), _matrix(table, 6, zero), _matrix(table, 7, zero)
    B, C, D = _matrix(table, 8, zero), _matrix(table, 9, zero), _matrix(table, 10, zero)
    saved, dy, dfinal = _matrix(table, 11, zero), _matrix(table, 12, zero), _matrix(table, 13, zero)
    dx, ddt, dA = _matrix(table, 14, zero), _matrix(table, 15, zero), _matrix(table, 16, zero)
    dB, dC, dD = _matrix(table, 17, zero), _matrix(table, 18, zero), _matrix(table, 19, zero)
    dinitial = _matrix(table, 20, zero)

    s, k = unit // len(blocks), unit % len(blocks)
    c0, width, part, N = blocks[k, 0], blocks[k, 1], blocks[k, 3] * len(x), len(A)
    grad = np.zeros((N, 3 * BLOCK), x.dtype)  # the gradients of the state and of A, then A
    if spans[s, 5]:
        _read(dfinal, spans[s, 0], N, c0, width, grad, 0)
    _read(A, 0, N, c0, width, grad, 2 * BLOCK)
    states = np.zeros((chunk + 1, N, 2 * BLOCK), x.dtype)  # before each event of the chunk: the state, its decay
    row = np.zeros(6 * BLOCK, x.dtype)
    sums = np.zeros(2 * BLOCK, x.dtype)  # the gradient of D, then D
    for j in range(width):
        sums[BLOCK + j] = D[0, c0 + j]
    events = spans[s, 2] - spans[s, 1]
    for first in range((events - 1) // chunk * chunk, -1, -chunk):
        last = min(first + chunk, events) - 1
        _read(saved, spans[s, 3] + first // chunk, N, c0, width, states[0], 0)
        for i in range(first, last + 1):
            m = _event(spans, s, i, reverse)
            live = x.dtype.type(0 if starts[0, m] else 1)
            _selective_load(m, c0, width, x, dt, row)
            for j in range(width):
                row[G + j] = dy[m, (c0 & INDEX) + j]
            for n in range(N):
                h, after, g = states[i - first, n], states[i - first + 1, n], grad[n]
                Bn = B[m, n]
                total = zero
                for j in range(BLOCK):
                    h[BLOCK + j] = live * exp(row[T + j] * g[2 * BLOCK + j])
                for j in range(BLOCK):
                    v = h[BLOCK + j] * h[j] + row[U + j] * Bn
                    after[j] = v
                    total += v * row[G + j]
                dC[part + m, n] = total
        for i in range(last, first - 1, -1):
            m = _event(spans, s, i, reverse)
            _selective_load(m, c0, width, x, dt, row)
            for j in range(width):
                row[G + j] = dy[m, (c0 & INDEX) + j]
            for n in range(N):
                h, g = states[i - first, n], grad[n]
                Bn, Cn = B[m, n], C[m, n]
                total = zero
                for j in range(BLOCK):
                    v = g[j] + row[G + j] * Cn
                    total += v * row[U + j]
                    row[Y + j] += v * Bn
                    v *= h[BLOCK + j]
                    g[j] = v
                    v *= h[j]
                    g[BLOCK + j] += v * row[T + j]
                    row[R + j] += v * g[2 * BLOCK + j]
                dB[part + m, n] = total
            for j in range(BLOCK):
                row[R + j] += row[X + j] * row[Y + j]
                row[Y + j] = row[T + j] * row[Y + j] + sums[BLOCK + j] * row[G + j]
                sums[j] += row[X + j] * row[G + j]
            for j in range(width):
                dx[m, (c0 & INDEX) + j] = row[Y + j]
            for j in range(width):
                ddt[m, (c0 & INDEX) + j] = row[R + j]
    _write(grad, BLOCK, N, c0, width, dA, s)
    for j in range(width):
        dD[s, c0 + j] = sums[j]
    if spans[s, 4]:
        _write(grad, 0, N, c0, width, dinitial, spans[s, 0])


# ------------------------------------------------------------------- convolution with SiLU, gated RMS norm


@_inlined
def _convolve(x, r, weight, bias, first, out):
    """Sum over the taps before SiLU, for the window that starts at row r; taps before ``first`` are left out."""
    for j in range(out.size):
        out[j] = bias[0, j]
    for k in range(first, len(weight)):
        tap, source = weight[k], x[r + k]
        for j in range(out.size):
            out[j] += tap[j] * source[j]


def conv_forward(unit, table, zero):
    """``x`` has K-1 past events before each row of L; an event reads a window of K, from tap ``first`` on."""
    L = _number(table, 0)
    x, weight, bias = _matrix(table, 1, zero), _matrix(table, 2, zero), _matrix(table, 3, zero)
    first, y = _matrix(table, 4, 0), _matrix(table, 5, zero)

    one = x.dtype.type(1)
    blocks = (L + ROWS - 1) // ROWS
    b, lo = unit // blocks, unit % blocks * ROWS
    for t in range(lo, min(L, lo + ROWS)):
        out = y[b * L + t]
        _convolve(x, b * (L + len(weight) - 1) + t, weight, bias, first[b, t], out)
        for j in range(out.size):
            out[j] = out[j] / (one + exp(-out[j]))


def conv_backward(unit, table, zero):
    """Gradients; those of weight and bias come one per unit of work, for the caller to add up."""
    L = _number(table, 0)
    x, weight, bias = _matrix(table, 1, zero), _matrix(table, 2, zero), _matrix(table, 3, zero)
    first, dy, dx = _matrix(table, 4, 0), _matrix(table, 5, zero), _matrix(table, 6, zero)
    dweight, dbias = _matrix(table, 7, zero), _matrix(table, 8, zero)

    one = x.dtype.type(1)
    K = len(weight)
    padded = L + K - 1
    blocks = (padded + ROWS - 1) // ROWS
    b, lo = unit // blocks, unit % blocks * ROWS
    pre = np.empty(x.shape[1], x.dtype)
    # The unit owns ROWS inputs, and the weights' gradients that come through them.
    for t in range(max(0, lo - K + 1), min(L, lo + ROWS)):
        _convolve(x, b * padded + t, weight, bias, first[b, t], pre)
        dyt = dy[b * L + t]
        for j in range(pre.size):
            gate = one / (one + exp(-pre[j]))
            pre[j] = dyt[j] * gate * (one + pre[j] * (one - gate))
        if t >= lo:
            total = dbias[unit]
            for j in range(pre.size):
                total[j] += pre[j]
        for k in range(max(first[b, t], lo - t), min(K, lo + ROWS - t)):
            tap, source = weight[k], x[b * padded + t + k]
            dsource, total = dx[b * padded + t + k], dweight[unit * K + k]
            for j in range(pre.size):
                dsource[j] += tap[j] * pre[j]
            for j in range(pre.size):
                total[j] += source[j] * pre[j]


def norm_forward(unit, table, zero):
    """Rows are groups of channels, ``groups`` of them an event; ``eps`` and ``weight`` share the dtype of x."""
    x, z, weight = _matrix(table, 0, zero), _matrix(table, 1, zero), _matrix(table, 2, zero)
    eps, y = _matrix(table, 3, zero), _matrix(table, 4, zero)

    one = x.dtype.type(1)
    for m in range(unit * ROWS, min(len(x), (unit + 1) * ROWS)):
        xm, zm, out, w = x[m], z[m], y[m], weight[m % len(weight)]
        total = zero
        for j in range(xm.size):
            v = xm[j] * zm[j] / (one + exp(-zm[j]))
            out[j] = v
            total += v * v
        scale = one / math.sqrt(total / x.dtype.type(xm.size) + eps[0, 0])
        for j in range(xm.size):
            out[j] *= scale * w[j]


def norm_backward(unit, table, zero):
    """Gradients; that of the weight comes one per unit of work, for the caller to add up."""
    x, z, weight = _matrix(table, 0, zero), _matrix(table, 1, zero), _matrix(table, 2, zero)
    eps, dy = _matrix(table, 3, zero), _matrix(table, 4, zero)
    dx, dz, dweight = _matrix(table, 5, zero), _matrix(table, 6, zero), _matrix(table, 7, zero)

    one = x.dtype.type(1)
    size = x.shape[1] & INDEX
    row = np.empty(2 * size, x.dtype)  # the gate sigmoid(z), then x * silu(z)
    for m in range(unit * ROWS, min(len(x), (unit + 1) * ROWS)):
        group = m % len(weight)
        xm, zm, dym, w = x[m], z[m], dy[m], weight[group]
        dxm, dzm, dw = dx[m], dz[m], dweight[unit * len(weight) + group]
        total = inner = zero
        for j in range(size):
            gate = one / (one + exp(-zm[j]))
            v = xm[j] * zm[j] * gate
            row[j] = gate
            row[size + j] = v
            total += v * v
            inner += v * dym[j] * w[j]
        scale = one / math.sqrt(total / x.dtype.type(size) + eps[0, 0])
        shrink = inner * scale * scale / x.dtype.type(size)
        for j in range(size):
            dw[j] += dym[j] * row[size + j] * scale
        for j in range(size):
            row[size + j] = scale * (dym[j] * w[j] - row[size + j] * shrink)
        for j in range(size):
            dxm[j] = row[size + j] * zm[j] * row[j]
        for j in range(size):
            dzm[j] = row[size + j] * xm[j] * row[j] * (one + zm[j] * (one - row[j]))
