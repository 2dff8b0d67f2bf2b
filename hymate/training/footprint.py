"""What one worker's step costs: floating-point operations an event, and bytes on its GPU.

The model itself runs on tensors without numbers (torch's FakeTensorMode) over the shapes of the GPU's kernels
(`hymate.ops.shapes`), forward and backward, while every storage that is alive is counted. What DeepSpeed holds beside
it follows from its source (0.19) and the number of workers. Nothing here needs a GPU or was measured on one.

Shape legend: as in `hymate.model.batch`; P parameters, N workers.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hymate.config import ModelConfig, ObjectiveConfig
from hymate.model.batch import Batch, changed
from hymate.model.pretrain_model import PretrainModel
from hymate.ops.shapes import as_on_gpu
from hymate.training.deepspeed import reduce_bucket_size

# ZeRO 3, in parameters: what DeepSpeed leaves gathered from the forward to the backward (half of its
# stage3_max_reuse_distance), and what it fetches ahead
LEFT_GATHERED, FETCHED_AHEAD = 500_000_000, 50_000_000
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
STATICS = 4  # static events of a history


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside the block and still alive.

    now, peak: at this moment and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self._storages.pop(key)


@dataclass(frozen=True)
class Flops:
    """Of one event: a multiplication and an addition are two. backward: without what is computed again."""

    forward: float
    backward: float

    def times(self, factor: float) -> Flops:
        return Flops(factor * self.forward, factor * self.backward)


@dataclass(frozen=True)
class Shapes:
    """What is trained on rows of which shape: all that a step's cost depends on.

    history_events: events of each history, of which there are as many in a row as fit.
    """

    model: ModelConfig
    objective: ObjectiveConfig
    vocab_size: int
    num_events: int
    history_events: int
    precision: str

    def module(self) -> PretrainModel:
        return PretrainModel(self.model, self.objective, self.vocab_size)

    def loss(self, module: PretrainModel, row: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            return module.loss(row)


@dataclass(frozen=True)
class RowBytes:
    """What a row takes beside the parameters and their gradients.

    kept: from the forward to the backward; most: at any moment.
    """

    kept: int
    most: int


@dataclass(frozen=True)
class WorkerBytes:
    """What a worker holds of the model, and for how long.

    always: weights, gradients and optimiser, by name. computing, stepping: what comes to it while a row is computed,
    and while the optimiser steps, when no row is there.
    """

    always: dict[str, float]
    computing: float
    stepping: float

    def most(self, row_bytes: float) -> float:
        """At most, with a row's."""
        return sum(self.always.values()) + max(self.computing + row_bytes, self.stepping)


def worker_bytes(num_parameters: int, zero_stage: int, num_workers: int) -> WorkerBytes:
    """Of float32 parameters under AdamW and DeepSpeed, as `hymate.training.deepspeed` sets it up."""
    whole, bucket = 4.0 * num_parameters, 4.0 * reduce_bucket_size(num_parameters)
    part = whole / num_workers
    if zero_stage == 0:
        # AdamW's roots of the second moments; before them as large a copy of the gradients, to reduce
        return WorkerBytes({"weights": whole, "gradients": whole, "optimiser": 2 * whole}, 0.0, whole)
    optimiser = 3 * part  # two moments, and ZeRO's own copy of the weights that it updates
    if zero_stage == 1:
        return WorkerBytes({"weights": whole, "gradients": whole, "optimiser": optimiser}, bucket, bucket + part)
    if zero_stage == 2:
        always = {"weights": whole, "gradients": part, "optimiser": optimiser}
        return WorkerBytes(always, bucket, bucket + max(bucket, part))
    gathered = 4.0 * min(num_parameters, LEFT_GATHERED + FETCHED_AHEAD)
    always = {"weights": part, "gradients": part + bucket, "optimiser": optimiser}
    return WorkerBytes(always, gathered, 2 * bucket + part)


def row_bytes(shapes: Shapes, zero_stage: int, activation_checkpointing: bool) -> RowBytes:
    mode, linear = FakeTensorMode(), _linear(zero_stage)
    row = changed(_row(shapes), mode.from_tensor)
    with mode, LiveBytes() as live, as_on_gpu(linear):
        module = shapes.module()
        module.backbone.activation_checkpointing = activation_checkpointing
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)  # of the rows before it in the step
        before = live.now
        loss = shapes.loss(module, row)
        kept = live.now - before
        loss.backward()
        return RowBytes(kept, live.peak - before)


def event_flops(shapes: Shapes) -> dict[str, Flops]:
    mode = FakeTensorMode()
    row = changed(_row(shapes), mode.from_tensor)
    with mode, as_on_gpu():
        module = shapes.module()
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            shapes.loss(module, row)
        with FlopCounterMode(display=False) as both:
            shapes.loss(module, row).backward()
    return _flops(shapes, forward.get_flop_counts(), both.get_flop_counts())


def num_parameters(shapes: Shapes) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in shapes.module().parameters())


def _linear(zero_stage: int) -> Callable[..., Tensor] | None:
    """ZeRO 3 puts its own linear layer in the place of torch's; it keeps its inputs as they are."""
    if zero_stage < 3:
        return None
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}):
        from deepspeed.runtime.zero.linear import zero3_linear_wrap
    return zero3_linear_wrap


def _flops(shapes: Shapes, *counted: Mapping[str, Mapping[Any, int]]) -> dict[str, Flops]:
    """counted: of the forward, and of forward and backward, by module and operator."""
    model = shapes.model
    kinds = {"M": "Mamba, projections", "A": "attention, projections"}
    modules = {"PretrainModel.backbone.embedding": "embedding"}
    for number, kind in enumerate(model.layers):
        modules |= {
            f"PretrainModel.backbone.blocks.{number}.{name}": part
            for name, part in (("mixer", kinds[kind]), ("mlp", "MLP"))
        }
    sums: dict[str, list[float]] = {}
    for index, by_module in enumerate(counted):
        products = {name: sum(n for op, n in ops.items() if op in PRODUCTS) for name, ops in by_module.items()}
        heads = products.get("Global", 0) - products.get("PretrainModel.backbone", 0)
        for part, number in [*((part, products.get(name, 0)) for name, part in modules.items()), ("heads", heads)]:
            sums.setdefault(part, [0.0, 0.0])[index] += number / shapes.num_events
    flops = {part: Flops(forward, both - forward) for part, (forward, both) in sums.items()}
    if "A" in model.layers:
        flops["attention, within histories"] = _attention_flops(shapes).times(model.layers.count("A"))
    if "M" in model.layers:
        scans = model.layers.count("M") * (2 if model.bidirectional else 1)
        flops["Mamba, scan"] = _scan_flops(model).times(scans)
    return flops


def _attention_flops(shapes: Shapes) -> Flops:
    """Of the pairs of events that see each other alone; the backward computes the scores again."""
    model = shapes.model
    causal, pairs = model.causal and not model.bidirectional, 0
    for start, stop in itertools.pairwise(_bounds(shapes.num_events, shapes.history_events)):
        n = stop - start
        window = min(model.window or n, n)
        behind = window * n - window * (window - 1) // 2  # each event, itself included, and those before it
        pairs += behind if causal else 2 * behind - n
    product = 2.0 * model.d_model * pairs / shapes.num_events
    return Flops(2 * product, 5 * product)


def _scan_flops(model: ModelConfig) -> Flops:
    """One scan's. Mamba-2's chunks are products of matrices (section 7 of its paper; the backward computes states and
    C B^T again); of Mamba-1's recurrence and its gradient each multiplication, addition and exponential counts as one.
    """
    inner, N = model.expand * model.d_model, model.d_state
    if model.mixer == "mamba1":
        return Flops(9.0 * inner * N, 18.0 * inner * N)
    chunk, state = float(model.chunk_size), 2.0 * inner * N
    return Flops(2 * chunk * N + inner * chunk + 2 * state, 6 * chunk * N + 2 * inner * chunk + 5 * state)


def _row(shapes: Shapes) -> Batch:
    """A row with numbers, and what the model asks of it: how many events are hidden depends on them."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor(_bounds(shapes.num_events, shapes.history_events))
    L, S = shapes.num_events, len(bounds) - 1
    segment_L = torch.arange(S, dtype=torch.int32).repeat_interleave(bounds.diff())
    static_segment_F = torch.arange(S, dtype=torch.int32).repeat_interleave(STATICS)
    value_L = torch.randn(L, generator=generator)
    value_L[::2] = torch.nan
    row = Batch(
        code_L=torch.randint(shapes.vocab_size, (L,), generator=generator),
        value_L=value_L,
        quantile_L=value_L,
        time_hours_L=torch.arange(L).float() - bounds[segment_L.long()],
        gap_hours_L=torch.ones(L),
        segment_L=segment_L,
        cu_seqlens=bounds.tolist(),
        bounds=bounds,
        static_code_F=torch.zeros(S * STATICS, dtype=torch.int64),
        static_value_F=torch.zeros(S * STATICS),
        static_quantile_F=torch.zeros(S * STATICS),
        static_segment_F=static_segment_F,
        age_years_A=torch.ones(S),
        lag_hours_A=torch.zeros(S),
        example_A=torch.arange(S),
        label_AT=torch.zeros(S, 0),
        days_AT=torch.zeros(S, 0),
        label_weight_AT=torch.zeros(S, 0),
        seed_S=torch.arange(S),
    )
    with torch.device("meta"):
        module = shapes.module()
    return module.ask(row)


def _bounds(num_events: int, history_events: int) -> list[int]:
    return [*range(0, num_events, history_events), num_events]
