"""What the compiled loops of the CPU operators (Numba) share; launch.py runs them, __init__.py calls them.

    ssd.py        Mamba-2's scan
    selective.py  Mamba-1's scan
    rowwise.py    convolution with SiLU, gated norm

Legend: M events of all rows, B batch rows, H heads, P headdim, G groups, N d_state, D channels, K conv width. Every
array is a matrix, maybe some columns of a wider one; all floating arrays of a call share one dtype.

A kernel does one of many independent units of work. Those of a scan are made of spans; a *span* is a run of whole
segments of one row: (batch row, first event, one past the last event, index of its first saved state, whether it is
processed first in its row, whether last). The cut does not depend on the number of threads, so neither do the results.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numba import carray, njit, types
from numba.extending import intrinsic

# Reductions may be reordered and multiply-adds contracted; NaN and infinity keep their meaning.
# Wrappers that make a loop callable from Python take a fifth of the time to compile, and nothing calls them.
OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
INTEGERS = {"N", "P", "L", "chunk", "size", "reverse", "seed", "threshold"}  # parameters of kernels that are no matrix
INDICES = {"spans", "runs", "blocks", "starts", "first"}  # and matrices of int64
INDEX = 0xFFFFFFFF  # as a mask: the compiler then knows that an index is not negative and needs no wrap-around

_inlined = njit(**OPTIONS)


# ----------------------------------------------------------------------------------------------- arguments
# Kernels are called by address as kernel(unit, table, zero), which Numba does not do with arrays: the table holds
# (address, rows, numbers from one row to the next) of every matrix and (value, 0, 0) of every integer; zero has the
# dtype of the floating matrices.


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), codegen


@_inlined
def _integer(table, k):
    return carray(_pointer(table, 0), 3 * (k + 1))[3 * k]


@_inlined
def _matrix(table, k, like):
    row = carray(_pointer(table, 0), 3 * (k + 1))
    return carray(_pointer(row[3 * k], like), (row[3 * k + 1], row[3 * k + 2]))


def called_by_address(kernel: Callable[..., None]) -> Callable[..., None]:
    """kernel(unit, ...) as a function of (unit, table, zero). The names of its parameters say what they are."""
    reads = [
        f"_integer(table, {k})" if name in INTEGERS else f"_matrix(table, {k}, {0 if name in INDICES else 'zero'})"
        for k, name in enumerate(inspect.signature(kernel).parameters, -1)
        if name != "unit"
    ]
    source = f"def {kernel.__name__}(unit, table, zero): kernel(unit, {', '.join(reads)})"
    names = {"__name__": kernel.__module__, "kernel": _inlined(kernel), "_integer": _integer, "_matrix": _matrix}
    exec(compile(source, kernel.__code__.co_filename, "exec"), names)  # Numba keeps it by the date of that file
    return names[kernel.__name__]


# ----------------------------------------------------------------------------------------------- scans


@_inlined
def event(spans, s, i, reverse):
    return spans[s, 2] - 1 - i if reverse else spans[s, 1] + i


# ------------------------------------------------------------------------------------------------- scratch rows


@_inlined
def get(source, m, c0, width, scratch, row):
    for j in range(width):
        scratch[row, j] = source[m, (c0 & INDEX) + j]


@_inlined
def put(scratch, row, width, target, m, c0):
    for j in range(width):
        target[m, (c0 & INDEX) + j] = scratch[row, j]
