"""Compile the CPU operators before their first use: python -m hymate.ops.cpu.precompile [float64]

Otherwise every worker that finds none on disk compiles them itself, which takes most of a minute. Models compute in
float32; float64 is for tests.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from hymate import ending
from hymate.ops.cpu import dropout, launch, rowwise, selective, ssd

KERNELS = (
    ssd.ssd_backward,
    ssd.ssd_forward,
    selective.selective_backward,
    selective.selective_forward,
    rowwise.conv_backward,
    rowwise.norm_backward,
    rowwise.norm_forward,
    rowwise.conv_forward,
    dropout.forward,
    dropout.backward,
)  # the slowest to compile first


def _compile(k: int, dtype: str) -> None:
    launch.compiled(KERNELS[k], np.dtype(dtype))


if __name__ == "__main__":
    processes = min(os.cpu_count() or 1, len(KERNELS))
    with ending.command(), ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        with ending.without_ctrl_c():
            compiled = pool.map(_compile, range(len(KERNELS)), (sys.argv[1:] or ["float32"]) * len(KERNELS))
        list(compiled)
