"""Compiled loops of the CPU operators that look at few events at a time: convolution with SiLU, gated RMS norm.

They copy what they need to scratch rows of whole vectors, work there, and copy the results back.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from hymate.ops.cpu.kernels import OPTIONS, get, put
from hymate.ops.cpu.simd import LANES, fma, load, mul, sigmoid, splat, store, total

ROWS = 64  # events in one unit of work
TILE = 256  # channels that the convolution has in scratch at a time

_inlined = njit(**OPTIONS)


# ------------------------------------------------------------------------------------------------- convolution


@_inlined
def _row(b, t, L, reverse):
    """Where the t-th event that is processed in batch row b lies."""
    return b * L + (L - 1 - t if reverse else t)


@_inlined
def _get_inputs(x, past, b, lo, stop, L, K, reverse, c0, width, scratch):
    """The inputs from the K-1 before event ``lo`` to the one before ``stop``; those before the first are ``past``."""
    for t in range(lo - K + 1, stop):
        if t >= 0:
            get(x, _row(b, t, L, reverse), c0, width, scratch, t - lo + K - 1)
        else:
            get(past, b * (K - 1) + K - 1 + t, c0, width, scratch, t - lo + K - 1)


@_inlined
def _convolve(scratch, i, j, weights, first, K):
    """The sum before SiLU of the event whose window starts in row ``i``; taps before ``first`` lie in another segment.

    The last row of weights is the bias.
    """
    result = load(weights, K, j)
    for k in range(first, K):
        result = fma(load(weights, k, j), load(scratch, i + k, j), result)
    return result


def conv_forward(unit, L, reverse, x, past, weight, first, y):
    """silu(bias + sum over K taps); ``first`` (B, L) is the first tap of each event, as processed, in its segment."""
    K = len(weight) - 1
    blocks = (L + ROWS - 1) // ROWS
    b, lo = unit // blocks, unit % blocks * ROWS
    stop = min(L, lo + ROWS)
    inputs, weights = np.zeros((ROWS + K, TILE), x.dtype), np.zeros((K + 1, TILE), x.dtype)
    out = np.zeros((1, TILE), x.dtype)
    for c0 in range(0, weight.shape[1], TILE):
        width = min(TILE, weight.shape[1] - c0)
        for k in range(K + 1):
            get(weight, k, c0, width, weights, k)
        _get_inputs(x, past, b, lo, stop, L, K, reverse, c0, width, inputs)
        for t in range(lo, stop):
            for j in range(0, width, LANES):
                pre = _convolve(inputs, t - lo, j, weights, first[b, t], K)
                store(out, 0, j, mul(pre, sigmoid(pre)))
            put(out, 0, width, y, _row(b, t, L, reverse), c0)


def conv_backward(unit, L, reverse, x, past, weight, first, dy, dx, dpast, dweight):
    """Gradients; those of the weights come one per unit of work, for the caller to add up.

    The unit owns the inputs from ``lo`` (the first one also those before the row) to ``stop``, and what reaches the
    weights through its events.
    """
    K, one = len(weight) - 1, splat(x.dtype.type(1))
    blocks = (L + ROWS - 1) // ROWS
    b, lo = unit // blocks, unit % blocks * ROWS
    stop = min(L, lo + ROWS)
    later = min(L, stop + K - 1)  # events before it see inputs of the unit
    inputs, dpre = np.zeros((ROWS + 2 * K, TILE), x.dtype), np.zeros((ROWS + K, TILE), x.dtype)
    weights, dweights = np.zeros((K + 1, TILE), x.dtype), np.zeros((K + 1, TILE), x.dtype)
    out, nothing = np.zeros((1, TILE), x.dtype), splat(x.dtype.type(0))
    for c0 in range(0, weight.shape[1], TILE):
        width = min(TILE, weight.shape[1] - c0)
        for k in range(K + 1):
            get(weight, k, c0, width, weights, k)
        _get_inputs(x, past, b, lo, later, L, K, reverse, c0, width, inputs)
        for t in range(lo, later):
            get(dy, _row(b, t, L, reverse), c0, width, dpre, t - lo)
            for j in range(0, width, LANES):
                pre = _convolve(inputs, t - lo, j, weights, first[b, t], K)
                gate = sigmoid(pre)
                slope = fma(mul(pre, gate), fma(gate, splat(-x.dtype.type(1)), one), gate)
                store(dpre, t - lo, j, mul(load(dpre, t - lo, j), slope))
        for j in range(0, width, LANES):
            for k in range(K):
                result = nothing
                for t in range(lo, stop):
                    if k >= first[b, t]:
                        result = fma(load(inputs, t - lo + k, j), load(dpre, t - lo, j), result)
                store(dweights, k, j, result)
            result = nothing
            for t in range(lo, stop):
                result = fma(one, load(dpre, t - lo, j), result)
            store(dweights, K, j, result)
        for k in range(K + 1):
            put(dweights, k, width, dweight, unit * (K + 1) + k, c0)
        for s in range(lo - K + 1 if lo == 0 else lo, stop):
            for j in range(0, width, LANES):
                store(out, 0, j, nothing)
            for k in range(K):
                t = s + K - 1 - k
                if lo <= t and t < later and k >= first[b, t]:
                    for j in range(0, width, LANES):
                        store(out, 0, j, fma(load(weights, k, j), load(dpre, t - lo, j), load(out, 0, j)))
            if s >= 0:
                put(out, 0, width, dx, _row(b, s, L, reverse), c0)
            else:
                put(out, 0, width, dpast, b * (K - 1) + K - 1 + s, c0)


# -------------------------------------------------------------------------------------------------- gated norm


def norm_forward(unit, size, x, z, weight, eps, y):
    """Groups of ``size`` channels of each event; ``eps`` and ``weight`` (1, D) share the dtype of x."""
    padded, one = (size + LANES - 1) // LANES * LANES, x.dtype.type(1)
    rows = np.zeros((3, padded), x.dtype)
    for m in range(unit * ROWS, min(len(x), (unit + 1) * ROWS)):
        for c0 in range(0, weight.shape[1], size):
            get(x, m, c0, size, rows, 0)
            get(z, m, c0, size, rows, 1)
            get(weight, 0, c0, size, rows, 2)
            squares = splat(x.dtype.type(0))
            for j in range(0, padded, LANES):
                z_j = load(rows, 1, j)
                v = mul(load(rows, 0, j), mul(z_j, sigmoid(z_j)))
                store(rows, 0, j, v)
                squares = fma(v, v, squares)
            scale = splat(one / math.sqrt(total(squares) / x.dtype.type(size) + eps[0, 0]))
            for j in range(0, padded, LANES):
                store(rows, 0, j, mul(scale, mul(load(rows, 0, j), load(rows, 2, j))))
            put(rows, 0, size, y, m, c0)


def norm_backward(unit, size, x, z, weight, eps, dy, dx, dz, dweight):
    """Gradients; that of the weight comes one per unit of work, for the caller to add up."""
    padded, one = (size + LANES - 1) // LANES * LANES, x.dtype.type(1)
    rows = np.zeros((6, padded), x.dtype)  # x, z, dy then dy * weight, weight, sigmoid(z), gradient of the weight
    for c0 in range(0, weight.shape[1], size):
        get(weight, 0, c0, size, rows, 3)
        for j in range(padded):
            rows[5, j] = 0
        for m in range(unit * ROWS, min(len(x), (unit + 1) * ROWS)):
            get(x, m, c0, size, rows, 0)
            get(z, m, c0, size, rows, 1)
            get(dy, m, c0, size, rows, 2)
            squares, inner = splat(x.dtype.type(0)), splat(x.dtype.type(0))
            for j in range(0, padded, LANES):
                gate = sigmoid(load(rows, 1, j))
                v = mul(load(rows, 0, j), mul(load(rows, 1, j), gate))
                store(rows, 4, j, gate)
                squares = fma(v, v, squares)
                inner = fma(v, mul(load(rows, 2, j), load(rows, 3, j)), inner)
            scale = one / math.sqrt(total(squares) / x.dtype.type(size) + eps[0, 0])
            shrink, factor = splat(-total(inner) * scale * scale / x.dtype.type(size)), splat(scale)
            for j in range(0, padded, LANES):
                x_j, z_j, dy_j, gate = load(rows, 0, j), load(rows, 1, j), load(rows, 2, j), load(rows, 4, j)
                silu = mul(z_j, gate)
                v = mul(x_j, silu)
                store(rows, 5, j, fma(dy_j, mul(v, factor), load(rows, 5, j)))
                dv = mul(factor, fma(v, shrink, mul(dy_j, load(rows, 3, j))))
                slope = fma(silu, fma(gate, splat(-one), splat(one)), gate)
                store(rows, 0, j, mul(dv, silu))
                store(rows, 1, j, mul(mul(dv, x_j), slope))
            put(rows, 0, size, dx, m, c0)
            put(rows, 1, size, dz, m, c0)
        put(rows, 5, size, dweight, unit, c0)
