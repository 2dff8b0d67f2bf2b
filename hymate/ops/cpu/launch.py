"""Run a compiled kernel over its units of work, on several threads.

Kernels are compiled at their first use, once for each dtype, and kept on disk (in __pycache__, else in the user's
cache, or where the environment variable NUMBA_CACHE_DIR says). They are called by address from one small parallel
loop: with a parallel loop around each of them, compiling took three times as long.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import cfunc, njit, prange, types

from hymate import machine
from hymate.ops.cpu.kernels import OPTIONS, called_by_address

machine.settle()  # else Numba finds no place for its files in some containers
_launching = threading.Lock()  # Numba's fallback threading layer aborts when two threads launch at once


@njit(parallel=True, cache=True)
def _for_each_unit(kernel, units, table, zero):  # type: ignore[no-untyped-def]
    for unit in prange(units):
        kernel(np.int64(unit), table, zero)


@functools.cache
def compiled(kernel: Callable[..., None], dtype: np.dtype) -> Any:
    """The kernel for floating matrices of one dtype; its address is that of a C function."""
    real = types.float64 if dtype == np.float64 else types.float32
    return cfunc(types.void(types.int64, types.int64, real), cache=True, **OPTIONS)(called_by_address(kernel))


def run(kernel: Callable[..., None], units: int, threads: int, **arguments: np.ndarray | int) -> None:
    """Do all units of work of a kernel; matrices are of int64 or of one floating dtype.

    They are contiguous, but for those that are some columns of wider ones.
    """
    names = list(inspect.signature(kernel).parameters)[1:]
    assert arguments.keys() == set(names)
    values = [arguments[name] for name in names]
    dtype = next(a.dtype for a in values if isinstance(a, np.ndarray) and a.dtype.kind == "f")
    table = np.zeros((len(values), 3), np.int64)
    for row, value in zip(table, values, strict=True):
        if isinstance(value, np.ndarray):
            assert value.dtype in (dtype, np.int64)
            if value.flags.c_contiguous:
                columns = value.shape[-1]
                row[:] = value.ctypes.data, value.size // columns if columns else 0, columns
            else:
                assert value.ndim == 2 and value.strides[1] == value.itemsize
                row[:] = value.ctypes.data, len(value), value.strides[0] // value.itemsize
        else:
            row[0] = value
    entry = compiled(kernel, dtype)
    with _launching:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        _for_each_unit(entry, units, table.ctypes.data, dtype.type(0))
