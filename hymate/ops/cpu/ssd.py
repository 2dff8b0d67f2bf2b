"""Compiled loops of Mamba-2's scan on the CPU: chunked state-space duality (arXiv 2405.21060, section 6).

The state passes from one chunk of TIME events to the next; inside a chunk everything is a product of small matrices
that stay in the first-level cache. Legend, beside that of kernels.py: r <= t events of a chunk, a_t the decay of one,

    u_r = dt_r x_r                       L[r, t] = a_{r+1} ... a_t, zero for r > t
    alpha_t = a_0 ... a_t                beta_r = L[r, last]
    y_t = sum_r (C_t . B_r) L[r, t] u_r + alpha_t C_t S + D x_t
    S_next = alpha_last S + sum_r beta_r B_r u_r

A segment starts where a_t = 0. The state S of a head is (N, P), both rounded up to whole vectors. A chunk that is not
full ends with events that change nothing: decay 1, everything else 0.

A unit of work is a span times a *run* of heads: (first head, number of heads, group, its number within the group).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hymate.ops.cpu.kernels import INDEX, OPTIONS, event
from hymate.ops.cpu.simd import LANES, broadcast, fma, load, mul, prefetch, splat, store, total, transpose_tile

TIME = LANES  # events of one chunk: time, too, can fill the lanes of a vector
STEP, ALPHA, BETA, SCALE = range(4)  # rows of factors, one for each event of a chunk: dt, alpha, beta, beta * dt

_inlined = njit(**OPTIONS)


@_inlined
def _padded(n):
    return (n + LANES - 1) // LANES * LANES


@_inlined
def _multiply(out, scale, a, b):
    """out = scale * out + a b, in tiles of 4 rows by one vector that stay in registers."""
    factor = splat(scale)
    for j in range(0, out.shape[1], LANES):
        for i in range(0, out.shape[0], 4):
            sum0, sum1 = mul(factor, load(out, i, j)), mul(factor, load(out, i + 1, j))
            sum2, sum3 = mul(factor, load(out, i + 2, j)), mul(factor, load(out, i + 3, j))
            for k in range(b.shape[0]):
                row = load(b, k, j)
                sum0 = fma(broadcast(a, i, k), row, sum0)
                sum1 = fma(broadcast(a, i + 1, k), row, sum1)
                sum2 = fma(broadcast(a, i + 2, k), row, sum2)
                sum3 = fma(broadcast(a, i + 3, k), row, sum3)
            store(out, i, j, sum0)
            store(out, i + 1, j, sum1)
            store(out, i + 2, j, sum2)
            store(out, i + 3, j, sum3)


@_inlined
def _clear(out):
    nothing = splat(out.dtype.type(0))
    for i in range(out.shape[0]):
        for j in range(0, out.shape[1], LANES):
            store(out, i, j, nothing)


@_inlined
def _copy(source, first, out):
    for i in range(out.shape[0]):
        for j in range(0, out.shape[1], LANES):
            store(out, i, j, load(source, first + i, j))


@_inlined
def _transpose(source, out):
    for i in range(0, source.shape[0], 8):
        for j in range(0, source.shape[1], 8):
            transpose_tile(source, i, j, out, j, i)


@_inlined
def _inner_product(a, b):
    result = splat(a.dtype.type(0))
    for i in range(a.shape[0]):
        for j in range(0, a.shape[1], LANES):
            result = fma(load(a, i, j), load(b, i, j), result)
    return total(result)


@_inlined
def _scale_rows(source, factors, k, out):
    """Each event's row times its factor."""
    for t in range(TIME):
        factor = broadcast(factors, k, t)
        for j in range(0, out.shape[1], LANES):
            store(out, t, j, mul(factor, load(source, t, j)))


@_inlined
def _scale_columns(source, factors, k, out):
    """Each event's column times its factor."""
    factor = load(factors, k, 0)
    for i in range(out.shape[0]):
        store(out, i, 0, mul(factor, load(source, i, 0)))


@_inlined
def _gather(source, column, width, spans, s, i, reverse, out):
    """``width`` columns of the events of the chunk that starts at ``i``."""
    events = spans[s, 2] - spans[s, 1]
    for t in range(TIME):
        if i + t < events:
            m = event(spans, s, i + t, reverse)
            for j in range(width):
                out[t, j] = source[m, (column & INDEX) + j]
        else:
            for j in range(width):
                out[t, j] = 0


@_inlined
def _prefetch(source, column, width, spans, s, i, reverse):
    """Ask for what ``_gather`` will want: the hardware does not foresee a walk over a few columns of every row."""
    events = spans[s, 2] - spans[s, 1]
    for t in range(TIME):
        m = event(spans, s, min(max(i + t, 0), events - 1), reverse)
        for j in range(0, width, LANES):
            prefetch(source, m, column + j)


@_inlined
def _scatter(source, width, spans, s, i, reverse, out, row, column):
    """The inverse of ``_gather``, for matrices whose first event is ``row``."""
    for t in range(min(TIME, spans[s, 2] - spans[s, 1] - i)):
        m = row + event(spans, s, i + t, reverse)
        for j in range(width):
            out[m, (column & INDEX) + j] = source[t, j]


@_inlined
def _decays(dt, decay, h, spans, s, i, reverse, factors, L):
    events = spans[s, 2] - spans[s, 1]
    zero, one = factors.dtype.type(0), factors.dtype.type(1)
    product = one
    for t in range(TIME):
        a, step = one, zero
        if i + t < events:
            m = event(spans, s, i + t, reverse)
            a, step = decay[m, h], dt[m, h]
        product *= a
        factors[STEP, t], factors[ALPHA, t], factors[BETA, t] = step, product, a
    row = splat(zero)
    for r in range(TIME - 1, -1, -1):
        store(L, r, 0, row)
        L[r, r] = one
        a = factors[BETA, r]
        factors[BETA, r] = L[r, TIME - 1]
        factors[SCALE, r] = factors[STEP, r] * L[r, TIME - 1]
        row = mul(splat(a), load(L, r, 0))


@_inlined
def _read(states, index, N, P, out):
    for p in range(P):
        for n in range(N):
            out[n, p] = states[index * P + p, n]


@_inlined
def _write(state, N, P, states, index):
    for p in range(P):
        for n in range(N):
            states[index * P + p, n] = state[n, p]


def ssd_forward(
    unit, spans, runs, N, P, chunk, reverse, x, B, C, dt, decay, D, initial,
    y, saved, final,
):  # fmt: skip
    """y, the state before every ``chunk`` events (a multiple of TIME) and the state after each row.

    ``decay`` (M, H) is exp(dt A), zero where a segment starts.
    """
    s, k = unit // len(runs), unit % len(runs)
    h0, heads, g = runs[k, 0], runs[k, 1], runs[k, 2]
    H, NN, PP, one = D.shape[1], _padded(N), _padded(P), x.dtype.type(1)
    states = np.zeros((heads * NN, PP), x.dtype)
    if spans[s, 4]:
        for j in range(heads):
            _read(initial, spans[s, 0] * H + h0 + j, N, P, states[j * NN :])
    b, c, cT = np.zeros((TIME, NN), x.dtype), np.zeros((TIME, NN), x.dtype), np.zeros((NN, TIME), x.dtype)
    score, L, wT, w = np.zeros((4 * TIME, TIME), x.dtype).reshape((4, TIME, TIME))
    factors, xs = np.zeros((4, TIME), x.dtype), np.zeros((TIME, PP), x.dtype)
    u, out = np.zeros((TIME, PP), x.dtype), np.zeros((TIME, PP), x.dtype)
    carried = np.zeros((TIME, NN), x.dtype)
    for i in range(0, spans[s, 2] - spans[s, 1], TIME):
        _gather(B, g * N, N, spans, s, i, reverse, b)
        _gather(C, g * N, N, spans, s, i, reverse, c)
        _transpose(c, cT)
        _clear(score)
        _multiply(score, one, b, cT)
        for j in range(heads):
            h, state = h0 + j, states[j * NN : (j + 1) * NN]
            if len(saved) > 0 and i % chunk == 0:
                slot = (spans[s, 3] + i // chunk) * H + h
                _copy(state, 0, saved[slot * NN : (slot + 1) * NN])
            _decays(dt, decay, h, spans, s, i, reverse, factors, L)
            _gather(x, h * P, P, spans, s, i, reverse, xs)
            _prefetch(x, h * P, P, spans, s, i + TIME, reverse)
            _scale_rows(xs, factors, STEP, u)
            for r in range(TIME):
                store(wT, r, 0, mul(load(score, r, 0), load(L, r, 0)))
            _transpose(wT, w)
            _scale_rows(c, factors, ALPHA, carried)
            _copy(xs, 0, out)
            _multiply(out, D[0, h], w, u)
            _multiply(out, one, carried, state)
            _scatter(out, P, spans, s, i, reverse, y, 0, h * P)
            _scale_rows(u, factors, BETA, u)
            _multiply(state, factors[ALPHA, TIME - 1], b.T, u)
    if spans[s, 5]:
        for j in range(heads):
            _write(states[j * NN :], N, P, final, spans[s, 0] * H + h0 + j)


def ssd_backward(
    unit, spans, runs, N, P, chunk, reverse, x, B, C, dt, decay, D, A, y, saved, dy, dfinal,
    dx, dBC, ddt, dA, dD, dinitial,
):  # fmt: skip
    """Gradients; those of A and D come one for each span, those of B and C side by side and one for each run of a
    group, for the caller to add up.

    With v the gradient of u, that of log(a_t) is the sum of dy y - u v over this and all later events: what leaves
    the state from t on, less what enters it from t on. The sum starts again from <S, dS> at the end of every chunk, for
    over a long row it would gather rounding errors.
    """
    s, k = unit // len(runs), unit % len(runs)
    h0, heads, g, part = runs[k, 0], runs[k, 1], runs[k, 2], runs[k, 3] * len(dt)
    H, NN, PP, zero, one = D.shape[1], _padded(N), _padded(P), x.dtype.type(0), x.dtype.type(1)
    gradients = np.zeros((heads * NN, PP), x.dtype)
    if spans[s, 5]:
        for j in range(heads):
            _read(dfinal, spans[s, 0] * H + h0 + j, N, P, gradients[j * NN :])
    parts = chunk // TIME
    states = np.zeros(((parts + 1) * NN, PP), x.dtype)
    b, c = np.zeros((parts * TIME, NN), x.dtype), np.zeros((parts * TIME, NN), x.dtype)
    score, dscore = np.zeros((parts * TIME, TIME), x.dtype), np.zeros((parts * TIME, TIME), x.dtype)
    dbT, dcT = np.zeros((parts * NN, TIME), x.dtype), np.zeros((parts * NN, TIME), x.dtype)
    dbc, scaled, cT = np.zeros((TIME, NN), x.dtype), np.zeros((TIME, NN), x.dtype), np.zeros((NN, TIME), x.dtype)
    xs, ys, u, v, dys = np.zeros((5 * TIME, PP), x.dtype).reshape((5, TIME, PP))
    uT, dyT = np.zeros((PP, TIME), x.dtype), np.zeros((PP, TIME), x.dtype)
    L, w = np.zeros((TIME, TIME), x.dtype), np.zeros((TIME, TIME), x.dtype)
    factors, sums = np.zeros((4, TIME), x.dtype), np.zeros((2, heads), x.dtype)
    events = spans[s, 2] - spans[s, 1]
    for first in range((events - 1) // chunk * chunk, -1, -chunk):
        parts = (min(chunk, events - first) + TIME - 1) // TIME
        for q in range(parts):
            bq, cq = b[q * TIME : (q + 1) * TIME], c[q * TIME : (q + 1) * TIME]
            _gather(B, g * N, N, spans, s, first + q * TIME, reverse, bq)
            _gather(C, g * N, N, spans, s, first + q * TIME, reverse, cq)
            _transpose(cq, cT)
            _clear(score[q * TIME : (q + 1) * TIME])
            _multiply(score[q * TIME : (q + 1) * TIME], one, bq, cT)
        _clear(dscore)
        _clear(dbT)
        _clear(dcT)
        for j in range(heads):
            h, dstate = h0 + j, gradients[j * NN : (j + 1) * NN]
            _copy(saved, ((spans[s, 3] + first // chunk) * H + h) * NN, states[:NN])
            for q in range(parts):
                state = states[(q + 1) * NN : (q + 2) * NN]
                _decays(dt, decay, h, spans, s, first + q * TIME, reverse, factors, L)
                _gather(x, h * P, P, spans, s, first + q * TIME, reverse, u)
                _prefetch(y, h * P, P, spans, s, first + q * TIME, reverse)
                _prefetch(dy, h * P, P, spans, s, first + q * TIME, reverse)
                _prefetch(x, h * P, P, spans, s, first - chunk + q * TIME, reverse)
                _scale_rows(u, factors, SCALE, u)
                _copy(states, q * NN, state)
                _multiply(state, factors[ALPHA, TIME - 1], b[q * TIME : (q + 1) * TIME].T, u)
            for q in range(parts - 1, -1, -1):
                i = first + q * TIME
                _decays(dt, decay, h, spans, s, i, reverse, factors, L)
                _gather(x, h * P, P, spans, s, i, reverse, xs)
                _gather(y, h * P, P, spans, s, i, reverse, ys)
                _gather(dy, h * P, P, spans, s, i, reverse, dys)
                _scale_rows(xs, factors, STEP, u)
                _transpose(u, uT)
                _transpose(dys, dyT)

                _scale_rows(b[q * TIME : (q + 1) * TIME], factors, BETA, scaled)
                _clear(v)
                _multiply(v, one, scaled, dstate)
                for r in range(TIME):
                    store(w, r, 0, mul(load(score, q * TIME + r, 0), load(L, r, 0)))
                _multiply(v, one, w, dys)
                _clear(w)
                _multiply(w, one, u, dyT)
                for r in range(TIME):
                    d = load(dscore, q * TIME + r, 0)
                    store(dscore, q * TIME + r, 0, fma(load(w, r, 0), load(L, r, 0), d))

                log = _inner_product(states[(q + 1) * NN : (q + 2) * NN], dstate)
                for t in range(min(TIME, events - i) - 1, -1, -1):
                    m, step, skip = event(spans, s, i + t, reverse), factors[STEP, t], D[0, h]
                    dyy, dyx, vx = splat(zero), splat(zero), splat(zero)
                    for p in range(0, PP, LANES):
                        dyp, xp, vp = load(dys, t, p), load(xs, t, p), load(v, t, p)
                        dyy, dyx, vx = fma(dyp, load(ys, t, p), dyy), fma(dyp, xp, dyx), fma(vp, xp, vx)
                        store(v, t, p, fma(splat(step), vp, mul(splat(skip), dyp)))
                    dyx_sum, vx_sum = total(dyx), total(vx)
                    log += total(dyy) - skip * dyx_sum - step * vx_sum
                    if decay[m, h] == 0:
                        log = zero
                    ddt[m, h] = A[0, h] * log + vx_sum
                    sums[0, j] += step * log
                    sums[1, j] += dyx_sum
                _scatter(v, P, spans, s, i, reverse, dx, 0, h * P)

                _scale_columns(dyT, factors, ALPHA, dyT)
                _multiply(dcT[q * NN : (q + 1) * NN], one, states[q * NN : (q + 1) * NN], dyT)
                _scale_columns(uT, factors, BETA, uT)
                _multiply(dbT[q * NN : (q + 1) * NN], one, dstate, uT)
                _scale_rows(dys, factors, ALPHA, dys)
                _multiply(dstate, factors[ALPHA, TIME - 1], c[q * TIME : (q + 1) * TIME].T, dys)
        for q in range(parts):
            i, dq = first + q * TIME, dscore[q * TIME : (q + 1) * TIME]
            _transpose(dbT[q * NN : (q + 1) * NN], dbc)
            _multiply(dbc, one, dq, c[q * TIME : (q + 1) * TIME])
            _scatter(dbc, N, spans, s, i, reverse, dBC, part, g * N)
            _transpose(dcT[q * NN : (q + 1) * NN], dbc)
            _multiply(dbc, one, dq.T, b[q * TIME : (q + 1) * TIME])
            _scatter(dbc, N, spans, s, i, reverse, dBC, part, dBC.shape[1] // 2 + g * N)
    for j in range(heads):
        dA[s, h0 + j] = sums[0, j]
        dD[s, h0 + j] = sums[1, j]
        if spans[s, 4]:
            _write(gradients[j * NN :], N, P, dinitial, spans[s, 0] * H + h0 + j)
