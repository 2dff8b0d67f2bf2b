"""exp for compiled loops: without branches in float32, so that the loops around it vectorise.

Numba keeps compiled kernels by the date of kernels.py: after a change here, touch that file.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

LOG2E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds a float32 to an integer


@intrinsic
def _power_of_two(typingctx: Any, shifted: Any) -> Any:
    """2**k from k + ROUND, whose last bits hold k."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        int32 = ir.IntType(32)
        exponent = builder.shl(builder.bitcast(args[0], int32), ir.Constant(int32, 23))
        return builder.bitcast(builder.add(exponent, ir.Constant(int32, 0x3F800000)), ir.FloatType())

    return types.float32(types.float32), codegen


@njit(fastmath={"contract"})
def _exp32(x: Any) -> Any:
    """Cephes' polynomial, good to about one ulp; beyond -87 and 88 the value there."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    shifted = x * LOG2E + ROUND
    k = shifted - ROUND
    r = x - k * LN2_HIGH
    r = r - k * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * _power_of_two(shifted)


def exp(x: float) -> float:
    """For compiled code only."""
    raise NotImplementedError


@overload(exp)
def _exp(x):  # type: ignore[no-untyped-def]
    scalar = _exp32 if x == types.float32 else math.exp

    def compiled(x):  # type: ignore[no-untyped-def]
        return scalar(x)

    return compiled
