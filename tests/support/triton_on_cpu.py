"""Prints how far the fused Mamba-2 over mamba_ssm's own Triton kernels is from the float64 reference, as JSON.

Run by test_fused.py in a process of its own with TRITON_INTERPRET=1, which runs the kernels on a CPU, slowly, and
MAMBA_DETERMINISTIC=1, which leaves one configuration of each kernel, so that none must be timed. `--tf32` leaves those
bits of float32 matrices that a GPU multiplies by default.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from mixer_cases import FEW, errors, outputs_and_gradients, problem


def load_kernels() -> None:
    """Import what fused.py imports of mamba_ssm, without the rest of it and without a GPU."""
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None and spec.submodule_search_locations is not None
    package = ModuleType("mamba_ssm")  # its own __init__ imports transformers and a CUDA extension
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["mamba_ssm"] = package
    torch.cuda.device = lambda _: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=1)  # type: ignore[assignment]
    from mamba_ssm.ops.triton import ssd_combined  # noqa: F401
    from mamba_ssm.utils.determinism import set_deterministic_mode

    set_deterministic_mode(False)  # the sums that a GPU takes


def multiply_as_tf32() -> None:
    """10 of the 23 bits after the point."""
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def create(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        for each in (a, b):
            each.data = (each.data.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return create_dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = create


def main() -> None:
    torch.set_num_threads(1)
    load_kernels()
    if "--tf32" in sys.argv:
        multiply_as_tf32()
    found = {}
    for name, case in FEW.items():
        inputs, function = problem("mamba2", case)
        expected = outputs_and_gradients(inputs, function, "reference")
        found[name] = errors(outputs_and_gradients([x.float() for x in inputs], function, "fused"), expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
