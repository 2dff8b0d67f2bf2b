"""Run a compiled kernel over its units of work, on several threads.

Kernels are compiled at their first use, once for each dtype, and kept on disk (in __pycache__, else in the user's
cache, or where the environment variable NUMBA_CACHE_DIR says). They are called by address from one small parallel
loop: with a parallel loop around each of them, compiling took three times as long.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import cfunc, njit, prange, types

from hymate import machine
from hymate.ops.cpu.kernels import OPTIONS

machine.settle()  # else Numba finds no place for its files in some containers
_launching = threading.Lock()  # Numba's fallback threading layer aborts when two threads launch at once


@njit(parallel=True, cache=True)
def _for_each_unit(kernel, units, table, zero):  # type: ignore[no-untyped-def]
    for unit in prange(units):
        kernel(np.int64(unit), table, zero)


@functools.cache
def compiled(kernel: Callable[..., None], dtype: np.dtype) -> Any:
    real = types.float64 if dtype == np.float64 else types.float32
    return cfunc(types.void(types.int64, types.int64, real), cache=True, **OPTIONS)(kernel)


def run(kernel: Callable[..., None], units: int, threads: int, *args: np.ndarray | int) -> None:
    """Do all units of work of a kernel; arrays are of int64 or of one floating dtype.

    They are contiguous, but for matrices, which may be some columns of wider ones.
    """
    dtype = next(a.dtype for a in args if isinstance(a, np.ndarray) and a.dtype.kind == "f")
    table = np.zeros((len(args), 3), np.int64)
    for row, arg in zip(table, args, strict=True):
        if isinstance(arg, np.ndarray):
            assert arg.dtype in (dtype, np.int64)
            if arg.flags.c_contiguous:
                columns = arg.shape[-1]
                row[:] = arg.ctypes.data, arg.size // columns if columns else 0, columns
            else:
                assert arg.ndim == 2 and arg.strides[1] == arg.itemsize
                row[:] = arg.ctypes.data, len(arg), arg.strides[0] // arg.itemsize
        else:
            row[0] = arg
    entry = compiled(kernel, dtype)
    with _launching:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        _for_each_unit(entry, units, table.ctypes.data, dtype.type(0))
