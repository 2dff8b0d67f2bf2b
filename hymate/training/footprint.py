"""What one worker's step costs: floating-point operations an event, and bytes on its GPU.

The model itself runs on tensors without numbers (torch's FakeTensorMode) over the shapes of the GPU's kernels
(`hymate.ops.shapes`), forward and backward, while every storage that is alive is counted. What DeepSpeed holds beside
it follows from its source (0.19) and the number of workers. Nothing here needs a GPU or was measured on one.

Shape legend: as in `hymate.batch`; P parameters, N workers.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hymate.batch import Batch
from hymate.config import ModelConfig, ObjectiveConfig
from hymate.model import PretrainModel
from hymate.ops.shapes import as_on_gpu
from hymate.training.zero import reduce_bucket_size

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
        """So many of them."""
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
        """The model."""
        return PretrainModel(self.model, self.objective, self.vocab_size)

    def loss(self, module: PretrainModel) -> Tensor:
        """The model's, of a row."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            return _loss(module, _row(self.num_events, self.history_events))


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
    """Of float32 parameters under AdamW and DeepSpeed, as `hymate.training.zero` sets it up."""
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
    """Of one row, forward and backward."""
    with FakeTensorMode(), LiveBytes() as live, as_on_gpu(_linear(zero_stage)):
        module = shapes.module()
        module.backbone.gradient_checkpointing = activation_checkpointing
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)  # of the rows before it in the step
        before = live.now
        loss = shapes.loss(module)
        kept = live.now - before
        loss.backward()
        return RowBytes(kept, live.peak - before)


def event_flops(shapes: Shapes) -> dict[str, Flops]:
    """Of each part of the model."""
    with FakeTensorMode(), as_on_gpu():
        module = shapes.module()
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            shapes.loss(module)
        with FlopCounterMode(display=False) as both:
            shapes.loss(module).backward()
    return _flops(shapes, forward.get_flop_counts(), both.get_flop_counts())


def num_parameters(shapes: Shapes) -> int:
    """P."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in shapes.module().parameters())


def _linear(zero_stage: int) -> Callable[..., Tensor] | None:
    """ZeRO 3 puts its own linear layer in the place of torch's; it keeps its inputs as they are."""
    if zero_stage < 3:
        return None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    return zero3_linear_wrap


def _flops(shapes: Shapes, *counted: Mapping[str, Mapping[Any, int]]) -> dict[str, Flops]:
    """counted: of the forward, and of forward and backward, by module and operator."""
    model = shapes.model
    kinds = {"M": "Mamba, projections", "A": "attention, projections"}
    modules = {"HyMaTE.embedding": "embedding"}
    for number, kind in enumerate(model.layers):
        modules |= {f"HyMaTE.blocks.{number}.mixer": kinds[kind], f"HyMaTE.blocks.{number}.mlp": "MLP"}
    sums: dict[str, list[float]] = {}
    for index, by_module in enumerate(counted):
        products = {name: sum(n for op, n in ops.items() if op in PRODUCTS) for name, ops in by_module.items()}
        heads = products.get("Global", 0) - products.get("HyMaTE", 0)
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


def _row(num_events: int, history_events: int) -> Batch:
    """A row of fake tensors."""
    bounds = _bounds(num_events, history_events)
    S, F = len(bounds) - 1, STATICS * (len(bounds) - 1)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape)

    def ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    return Batch(
        code_L=ids(num_events),
        value_L=floats(num_events),
        quantile_L=floats(num_events),
        time_hours_L=floats(num_events),
        gap_hours_L=floats(num_events),
        segment_L=ids(num_events, dtype=torch.int32),
        cu_seqlens=bounds,
        bounds=torch.tensor(bounds),
        static_code_F=ids(F),
        static_value_F=floats(F),
        static_quantile_F=floats(F),
        static_segment_F=ids(F, dtype=torch.int32),
        age_years_S=floats(S),
        lag_hours_S=floats(S),
        example_S=ids(S),
        label_ST=floats(S, 0),
        days_ST=floats(S, 0),
        label_weight_ST=floats(S, 0),
        seed_S=ids(S),
    )


def _bounds(num_events: int, history_events: int) -> list[int]:
    return [*range(0, num_events, history_events), num_events]


def _loss(module: PretrainModel, row: Batch) -> Tensor:
    """`PretrainModel.forward` with as many targets as there are on average: which events they are is no shape."""
    objective, L, S = module.objective, row.num_events, row.num_segments
    h_LD = module.backbone(row, torch.empty(L, dtype=torch.bool))
    losses = []
    if module.code_head is not None:
        at = torch.empty(round(L * objective.mask_share), dtype=torch.int64)
        losses.append(module.code_head(h_LD[at], row.code_L[at])[0])
    if module.value_head is not None:
        at = torch.empty(round(L * objective.mask_share * 2 / 3), dtype=torch.int64)
        losses.append((module.value_head(h_LD[at])[:, 0].float() - row.value_L[at]).square().sum())
    if module.pooling is not None and module.forecast_head is not None:
        past = _row(L * objective.forecast_points // 2, max(1, L // S // 2))  # of an anchor half of its history
        seen_LD = h_LD[torch.empty(past.num_events, dtype=torch.int64)]
        patient_AME, _ = module.pooling(seen_LD, past, module.backbone.embedding)
        losses.append(module.forecast_head(patient_AME).float().sum())
    return torch.stack(losses).sum()
