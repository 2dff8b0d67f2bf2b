"""Several real worker processes for tests: gloo, no launcher."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rows import random_row

from hymate.config import ModelConfig, ObjectiveConfig, TrainConfig
from hymate.data.loader import Cursor
from hymate.model.batch import Batch
from hymate.model.encoder import decay_groups
from hymate.model.pretrain_model import PretrainModel
from hymate.training.loop import Job, Worker, mean_outputs, train
from hymate.training.telemetry import Telemetry

VOCAB = 31
MODEL = ModelConfig(d_model=24, layers="MA", d_state=8, headdim=12, num_heads=2, window=6, dropout=0.1)
TRAIN = TrainConfig(
    num_workers=2, rows_per_step=4, max_steps=6, warmup_steps=2, eval_every=3, log_every=1, learning_rate=1e-2
)

TASKS = ("readmission", "mortality", "length_of_stay")
OBJECTIVES = {
    "masked_event": ObjectiveConfig(),
    "forecast": ObjectiveConfig(code_weight=0.0, value_weight=0.0, forecast_weight=1.0, forecast_variables=8),
    "time_to_event": ObjectiveConfig(
        code_weight=0.0, value_weight=0.0, time_to_event_weight=1.0, time_to_event_bins=3, time_to_event_fraction=0.3
    ),
    "both": ObjectiveConfig(value_weight=0.5, forecast_weight=2.0, forecast_variables=8, horizon_hours=6.0),
}


# new processes in which what takes seconds is imported already
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["deepspeed", "torch._dynamo", "hymate.tuning.trial", "hymate.ops.cpu"])


def run_workers(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Run `function(worker, *args)` in `world_size` processes of one group; fails if any of them does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        FORKED.Process(target=_work, args=(function, rank, world_size, store.port, args)) for rank in range(world_size)
    ]
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # read when deepspeed is imported
        for process in processes:
            process.start()
    try:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()


def _work(function: Callable[..., None], rank: int, world_size: int, port: int, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    function(Worker(rank, world_size, rank, torch.device("cpu")), *args)
    dist.destroy_process_group()
    os._exit(0)  # at the interpreter's end threads of torch's that still run abort the process now and then


class RandomRows:
    """An endless order of random rows, as `hymate.data.loader.Rows` gives them: row i of epoch 0 has seed i."""

    tokens_per_row = 40

    def steps(
        self, cursor: Cursor, rows_per_step: int, rank: int, world_size: int
    ) -> Iterator[tuple[list[Batch], Cursor]]:
        first = cursor.row
        while True:
            indices = range(first + rank, first + rows_per_step, world_size)
            first += rows_per_step
            yield [self._row(i) for i in indices], Cursor(row=first)

    def place_of(self, row: Batch) -> str:
        return f"row {row.seed}"

    def once(self, rank: int, world_size: int) -> Iterator[tuple[Batch, bool]]:
        """Three rows: with two ranks, the second repeats one that does not count."""
        turns = 3 + (-3) % world_size
        return ((self._row(1000 + min(i, 2)), i < 3) for i in range(rank, turns, world_size))

    def _row(self, i: int) -> Batch:
        return random_row((5 + i % 7, 1, 9 + i % 5), vocab_size=VOCAB, seed=i)


def pretraining_job(worker: Worker, config: TrainConfig, model: ModelConfig = MODEL) -> Job:
    """A small pretraining job on random rows."""
    torch.manual_seed(0)
    module = PretrainModel(model, ObjectiveConfig(), VOCAB)
    groups = [{**group, "lr": config.learning_rate} for group in decay_groups(module, config.weight_decay)]
    rows = RandomRows()

    def evaluate(engine: Any) -> dict[str, float]:
        outputs = mean_outputs(engine, rows.once(worker.rank, worker.world_size), worker)
        return {f"val_{name}": value for name, value in outputs.items()}

    return Job(module, groups, rows, evaluate, "val_loss", "min")


class Recorder(Telemetry):
    """Keeps every scalar in memory instead of TensorBoard."""

    def __init__(self) -> None:
        super().__init__(Path("unused"), enabled=False)
        self.points: dict[str, dict[int, float]] = {}

    def scalars(self, group: str, values: Any, step: int) -> None:
        for name, value in values.items():
            self.points.setdefault(f"{group}/{name}", {})[step] = value


def run_training(
    worker: Worker,
    config: TrainConfig,
    folder: Path,
    resume: Path | None = None,
    module_hook: Any = None,
    rows: RandomRows | None = None,
    stop: Callable[[], bool] = lambda: False,
    model: ModelConfig = MODEL,
) -> tuple[Recorder, Job]:
    """Train; checkpoints of all ranks meet in `folder/step-N`, as a launcher would merge them."""
    recorder = Recorder()
    job = pretraining_job(worker, config, model)
    if rows is not None:
        job.rows = rows
    if module_hook is not None:
        module_hook(job.module)

    def report(metrics: dict[str, float], part: Path) -> None:
        target = folder / f"step-{metrics['step']}"
        shutil.copytree(part, target, dirs_exist_ok=True)
        shutil.rmtree(part)
        dist.barrier()  # a worker that resumes from the checkpoint at once needs the others' parts of it

    train(job, config, worker, report=report, telemetry=recorder, resume=resume, stop=stop)
    return recorder, job
