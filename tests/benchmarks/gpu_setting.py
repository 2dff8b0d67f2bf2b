"""What the parts of gpu.py share: sizes and device, a report that survives errors, and how a step is timed."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from rows import random_row

from hymate.config import ModelConfig
from hymate.data.packing import pack
from hymate.errors import UserError
from hymate.model.batch import Batch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VOCABULARY = 10_000
# of the synthetic cohort's histories (hymate.data.synthetic.course): the mean here, and the spread of the logarithm
MEAN_EVENTS, LENGTH_SPREAD = 1500, 1.15

Measures = dict[str, Any]


class LeftOut(Exception):
    """Something that a measurement needs is not there."""


class Report:
    """What a part has measured so far, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._measured: list[Measures] = []

    def attempt(self, what: str, measure: Callable[[], Measures]) -> Measures:
        """Add what `measure()` returns, or why it returned nothing, and return that."""
        try:
            measures = measure()
        except (LeftOut, UserError, ModuleNotFoundError) as error:
            measures = {"left_out": _line(error)}
        except Exception as error:
            measures = {"error": f"{type(error).__name__}: {_line(error)}", "traceback": traceback.format_exc()}
        self._measured.append({"what": what, **measures})
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._measured))
        os.replace(temporary, self._path)
        gc.collect()  # a failed step's tensors hang on its traceback
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return measures


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@dataclass(frozen=True)
class Setting:
    """Sizes and the device. tflops: the measured rate of bf16 matrix products, 0 where unknown."""

    device: torch.device
    tflops: float
    data: Path | None
    row_events: int = 16384
    long_events: int = 131072
    blocks: int = 12  # of the encoders in `peers`
    matrices: tuple[int, ...] = (4096, 8192, 16384)
    copied_mib: int = 2048
    measured_s: float = 1.5

    @property
    def rehearsal(self) -> bool:
        return self.device.type == "cpu"

    def model(self, name: str, **changes: Any) -> ModelConfig:
        """The model of a file in configs/model; in a rehearsal one as small as can be."""
        import yaml

        config = ModelConfig(**yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text()))
        if self.rehearsal:
            config = replace(
                config, d_model=32, layers="MA", d_state=8, headdim=16, num_heads=2, chunk_size=16, window=16
            )
        return replace(config, **changes)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16)

    def peak_gib(self) -> float:
        """The most device memory since the last call of `forget_peak`; in a rehearsal the process's."""
        from hymate.training.stragglers import peak_memory_gib

        return peak_memory_gib(self.device)

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def lengths(self, events: int) -> list[int]:
        """Lengths of histories, at most a row long, of so many events together or a few more."""
        if self.data is not None:
            from hymate.data.histories import Histories

            drawn = np.random.default_rng(0).permutation(Histories.open(self.data).index.num_events_P)
        else:
            drawn = np.random.default_rng(0).lognormal(-(LENGTH_SPREAD**2) / 2, LENGTH_SPREAD, events)
            drawn = drawn * (self.row_events / 16384 * MEAN_EVENTS)
        lengths = np.clip(drawn, 1, self.row_events // 2).astype(int)
        return lengths[: 1 + int(np.searchsorted(lengths.cumsum(), events))].tolist()

    def rows(self, number: int) -> list[Batch]:
        """Full packed rows of histories with such lengths."""
        lengths = self.lengths((number + 1) * self.row_events)
        packed = [[lengths[i] for i in row] for row in pack(np.array(lengths), self.row_events)]
        packed = sorted(packed, key=sum, reverse=True)[:number]
        return [random_row(row, vocab_size=VOCABULARY, seed=seed) for seed, row in enumerate(packed)]


def timed(setting: Setting, step: Callable[[], object]) -> Measures:
    """Milliseconds of a step: of the first, and the median and fastest of three series."""
    setting.forget_peak()

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        setting.wait()
        return time.perf_counter() - began

    first = seconds(1)
    one = seconds(2) / 2
    steps = 1 if setting.rehearsal else max(1, min(50, round(setting.measured_s / one)))
    series = [1000 * seconds(steps) / steps for _ in range(1 if setting.rehearsal else 3)]
    return {
        "ms": statistics.median(series),
        "fastest_ms": min(series),
        "first_ms": 1000 * first,
        "peak_gib": setting.peak_gib(),
    }


def rate(setting: Setting, step: Callable[[], object], events: float, plan: Measures) -> Measures:
    """As `timed`, with events a second and, where `plan` has the operations an event takes, their rate beside that of
    matrix products."""
    measured = timed(setting, step)
    per_second = 1000 * events / measured["ms"]
    tflops = per_second * plan.get("flops_per_event", 0.0) / 1e12
    rates = {"tflops": tflops} if tflops else {}
    if tflops and setting.tflops:
        rates["fraction_of_matrix_rate"] = tflops / setting.tflops
    return {"events_per_second": per_second, **rates, **measured}
