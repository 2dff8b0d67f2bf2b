"""Command: what a pretraining takes, before a GPU is there: parameters, operations, memory, steps and days.

    python -m hymate.plan model=base gpus=8 [train=zero2] [data.path=DATA_DIR] [events=1e9] [key=value ...]

Everything is counted from shapes (`hymate.training.footprint` says how) and nothing is measured: not yet run on a GPU.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from hymate import scripts

    scripts.command("plan")

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from hymate.config import DataConfig, ModelConfig, ObjectiveConfig, Place, TrainConfig, check, not_negative, positive
from hymate.data.examples import pretraining_examples
from hymate.data.histories import Histories
from hymate.data.vocabulary import Vocabulary
from hymate.errors import ConfigError
from hymate.evaluation.tables import markdown
from hymate.training.footprint import Flops, Shapes, event_flops, num_parameters, row_bytes, worker_bytes
from hymate.training.pretraining import TRAIN_SPLIT, require_learnable

GIB = 2**30
STAGES = (0, 1, 2, 3)
GPUS = (1, 2, 4, 8, 16, 32, 64)
STEP_EVENTS = 1024  # the largest row is a multiple of it
RECOMPUTED = ("Mamba", "attention", "MLP")  # parts of the blocks


@dataclass(frozen=True)
class PlanData(DataConfig):
    """As `DataConfig`, but that there need be no dataset.

    path: a prepared dataset, or null.
    """

    path: Place | None = None  # type: ignore[assignment]


@dataclass(frozen=True)
class PlanConfig:
    """`python -m hymate.plan`'s configuration: a pretraining to be.

    gpus: how many there are; one worker each.
    events: of the dataset, where data.path names none.
    history_events: events of a history on average, where data.path names none.
    vocabulary: ids, where data.path names none.
    epochs: passes over the dataset.
    gpu_tflops: a GPU's rate in 10**12 operations a second.
    gpu_fraction: fraction of that rate that is reached.
    memory_gib: memories of the GPUs to look at.
    reserved_gib: what is not for tensors on each.
    """

    data: PlanData
    model: ModelConfig
    objective: ObjectiveConfig
    train: TrainConfig
    gpus: int = 8
    events: float = 1e9
    history_events: int = 1000
    vocabulary: int = 30000
    epochs: float = 1.0
    gpu_tflops: float = 989.0
    gpu_fraction: float = 0.4
    memory_gib: tuple[float, ...] = (24.0, 40.0, 80.0, 141.0)
    reserved_gib: float = 2.0

    def __post_init__(self) -> None:
        positive(self, "gpus", "events", "history_events", "vocabulary", "epochs", "gpu_tflops", "gpu_fraction")
        not_negative(self, "reserved_gib")
        check(
            self,
            events=(self.events >= 1, "must be at least 1"),
            gpu_fraction=(self.gpu_fraction <= 1, "must be at most 1"),
            memory_gib=(all(gib > 0 for gib in self.memory_gib), "must be positive"),
        )
        for name in ("events", "history_events", "vocabulary"):
            if self.data.path is not None and getattr(self, name) != getattr(PlanConfig, name):
                raise ConfigError(f"{name} is the dataset's own where data.path names one: leave out either")
        if self.train.num_workers != self.gpus:
            raise ConfigError(f"train.num_workers={self.train.num_workers}, but gpus={self.gpus}: give gpus alone")
        require_learnable(self.model, self.objective)
        if "G" in self.model.layers:
            raise ConfigError("model.layers: a plan counts M and A blocks; G is a baseline for comparisons on CPUs")


def plan(config: PlanConfig) -> None:
    """Print what it takes."""
    shapes, events = _shapes(config)
    print("\n".join(_lines(config, shapes, events)), flush=True)


def _shapes(config: PlanConfig) -> tuple[Shapes, float]:
    """What a row is, and the events of an epoch."""
    data, history_events, vocab_size, events = config.data, config.history_events, config.vocabulary, config.events
    if data.path is not None:
        histories = Histories.open(data.path)
        seen_P = np.minimum(pretraining_examples(histories, TRAIN_SPLIT).stop_E, data.context)
        vocab_size, events = Vocabulary.of(histories, data.min_count).size, float(seen_P.sum())
        history_events = max(1, round(float(seen_P.mean())))
    length = min(history_events, data.context, data.tokens_per_row)
    return Shapes(
        config.model, config.objective, vocab_size, data.tokens_per_row, length, config.train.precision
    ), events


def _lines(config: PlanConfig, shapes: Shapes, events: float) -> Iterator[str]:
    train, parameters, flops = config.train, num_parameters(shapes), event_flops(shapes)
    memory = _Memory(config, shapes, parameters)
    again = train.activation_checkpointing
    yield "Counted from shapes, not measured: not yet run on a GPU."
    yield ""
    yield (
        f"{parameters / 1e6:,.1f} M parameters with a vocabulary of {shapes.vocab_size:,}; {train.precision}, ZeRO "
        f"{train.zero_stage}, {_count(config.gpus, 'GPU')}; rows of {_count(shapes.num_events, 'event')} in "
        f"histories of {shapes.history_events:,}, activations {'computed again' if again else 'kept'}"
    )
    yield ""
    yield markdown([["MFLOP an event", "forward", "backward"], *_flops_rows(flops, again)], aligned=True)
    yield ""
    yield markdown([["memory of a GPU", "GiB"], *memory.parts()], aligned=True)
    yield ""
    fits = map(memory.fit, config.memory_gib)
    yield markdown([["GPU", "fits", "largest row, events"], *fits], aligned=True)
    yield ""
    numbers = sorted({*GPUS, config.gpus})
    header = ["GiB by ZeRO and number of GPUs", *map(str, numbers)]
    by_stage = ([f"ZeRO {stage}", *(f"{memory.total(stage, n) / GIB:.1f}" for n in numbers)] for stage in STAGES)
    yield markdown([header, *by_stage], aligned=True)
    yield ""
    total = config.epochs * events
    rate = config.gpu_fraction * config.gpu_tflops * 1e12 / _total(flops, again)
    hours = total / rate / config.gpus / 3600
    steps = math.ceil(total / (train.rows_per_step * shapes.num_events))
    yield (
        f"{_count(math.ceil(total), 'event')} in {_count(steps, 'step')} of {_count(train.rows_per_step, 'row')}: "
        f"{_duration(hours)} on {_count(config.gpus, 'GPU')}, at {config.gpu_fraction:.0%} of {config.gpu_tflops:,.0f} "
        f"TFLOP/s each, {rate:,.0f} events a second."
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _duration(hours: float) -> str:
    return f"{60 * hours:.2g} minutes" if hours < 1 else f"{hours:,.1f} hours ({hours / 24:,.2f} days)"


def _flops_rows(flops: Mapping[str, Flops], again: bool) -> Iterator[list[str]]:
    for part, of_part in flops.items():
        yield [part, f"{of_part.forward / 1e6:,.2f}", f"{of_part.backward / 1e6:,.2f}"]
    if again:
        yield ["the blocks' forward, again", "", f"{_again(flops) / 1e6:,.2f}"]
    forward = sum(of_part.forward for of_part in flops.values())
    yield ["all", f"{forward / 1e6:,.2f}", f"{(_total(flops, again) - forward) / 1e6:,.2f}"]


def _again(flops: Mapping[str, Flops]) -> float:
    """Of an event, with activation checkpointing."""
    return sum(of_part.forward for part, of_part in flops.items() if part.startswith(RECOMPUTED))


def _total(flops: Mapping[str, Flops], again: bool) -> float:
    return sum(each.forward + each.backward for each in flops.values()) + (_again(flops) if again else 0.0)


class _Memory:
    """Bytes of one GPU."""

    def __init__(self, config: PlanConfig, shapes: Shapes, parameters: int) -> None:
        self.config, self.shapes, self.parameters = config, shapes, parameters
        self.reserved = GIB * config.reserved_gib
        self._rows: dict[tuple[bool, int], float] = {}

    def row(self, stage: int, num_events: int) -> float:
        key = stage == 3, num_events  # the other stages compute alike
        if key not in self._rows:
            shapes = replace(self.shapes, num_events=num_events)
            self._rows[key] = row_bytes(shapes, stage, self.config.train.activation_checkpointing).most
        return self._rows[key]

    def total(self, stage: int, gpus: int) -> float:
        return worker_bytes(self.parameters, stage, gpus).most(self.row(stage, self.shapes.num_events)) + self.reserved

    def parts(self) -> Iterator[list[str]]:
        stage, gpus = self.config.train.zero_stage, self.config.gpus
        held, row = worker_bytes(self.parameters, stage, gpus), self.row(stage, self.shapes.num_events)
        a_row = f"a row ({row / self.shapes.num_events / 1e3:,.0f} kB an event)"
        parts = {**held.always, "DeepSpeed's buffers, beside a row": held.computing, a_row: row}
        parts |= {"DeepSpeed's and AdamW's buffers, after the rows": held.stepping, "reserved": self.reserved}
        for name, size in parts.items():
            yield [name, f"{size / GIB:.2f}"]
        yield ["at most at once", f"{self.total(stage, gpus) / GIB:.2f}"]

    def fit(self, gib: float) -> list[str]:
        """A GPU of so much memory: whether the row fits, and the largest that does, by two rows and less 2 %."""
        stage, gpus, L = self.config.train.zero_stage, self.config.gpus, self.shapes.num_events
        held, room = worker_bytes(self.parameters, stage, gpus), gib * GIB - self.reserved
        half = max(1, L // 2)
        less, whole = self.row(stage, half), self.row(stage, L)
        slope = (whole - less) / max(1, L - half)
        largest = 0.98 * (room - held.most(whole - slope * L)) / slope // STEP_EVENTS * STEP_EVENTS
        fits = self.total(stage, gpus) <= gib * GIB
        return [f"{gib:g} GiB", "yes" if fits else "no", f"{largest:,.0f}" if largest > 0 else "none"]
