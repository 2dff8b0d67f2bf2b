"""One training run of one worker: build, step, loop, evaluate. Knows DeepSpeed, knows nothing of Ray.

Every worker runs `train` with its own rank. The learning rate, the data order and the random numbers of each row
are pure functions of the step, so a run resumed from a checkpoint repeats exactly what an undisturbed one does.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hymate.config import TrainConfig
from hymate.data.feeding import Delayed, fed
from hymate.data.loader import Cursor
from hymate.device import CPU
from hymate.errors import UserError
from hymate.model.batch import Batch
from hymate.model.embedding import EventEmbedding
from hymate.model.encoder import GatedMLP, HyMaTE
from hymate.model.objectives import LossModel, mean_loss
from hymate.training import checkpoint
from hymate.training.deepspeed import AdamW, deepspeed_config, nothing_compiled
from hymate.training.memory import keep_freed_memory
from hymate.training.stragglers import Clock, WorkerTimes, curves, trouble
from hymate.training.telemetry import Telemetry


@dataclass(frozen=True)
class Worker:
    """Which process of the run this is."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


class TrainingRows(Protocol):
    """What the engine needs of `hymate.data.loader.Rows`."""

    tokens_per_row: int

    def steps(
        self, cursor: Cursor, rows_per_step: int, rank: int, world_size: int
    ) -> Iterator[tuple[list[Batch], Cursor]]: ...

    def place_of(self, row: Batch) -> str: ...


@dataclass
class Job:
    """What is trained on what.

    groups: AdamW parameter groups, each with its own "lr" (the schedule multiplies it).
    evaluate: takes the DeepSpeed engine, returns metrics; collective, every rank gets the same values.
    metric, mode: which of these metrics picks the best checkpoint, and whether small or large is good.
    """

    module: LossModel
    groups: list[dict[str, Any]]
    rows: TrainingRows
    evaluate: Callable[[Any], dict[str, float]]
    metric: str
    mode: Literal["min", "max"]


@dataclass
class Standing:
    """Where a run stands; kept in every checkpoint.

    stale: evaluations since the score last improved.
    skipped: steps whose loss or gradient was not finite, which changed nothing; skipped_in_a_row: those up to here.
    evaluations: the metrics of each evaluation so far, with its step and epoch.
    """

    step: int = 0
    cursor: dict[str, int] = field(default_factory=dict)
    best: float | None = None
    stale: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)

    def judge(self, score: float, mode: str) -> None:
        if self.best is None or (score < self.best if mode == "min" else score > self.best):
            self.best, self.stale = score, 0
        else:
            self.stale += 1

    def place(self) -> dict[str, float]:
        """Of a checkpoint, in the order of training."""
        return {"step": self.step, "epoch": self.cursor.get("epoch", 0)}

    def evaluated(self) -> bool:
        """Whether it was evaluated where it stands."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] == self.step

    def finished(self, config: TrainConfig) -> bool:
        """Whether the last step is taken or patience has run out."""
        return self.step >= config.max_steps or 0 < config.patience <= self.stale


Report = Callable[[dict[str, float], Path], None]


class Unrecoverable(UserError):
    """What ends a run for good: every rank raises it alike, and new workers would come to the same end."""


class NotTogether(Exception):
    """Workers that don't reach each other. Its text, which names hosts, is for the console, not for records."""


# --------------------------------------------------------------------------------------------------------- loop


def train(
    job: Job,
    config: TrainConfig,
    worker: Worker,
    *,
    report: Report,
    telemetry: Telemetry,
    resume: Path | None,
    description: str = "",
    stop: Callable[[], bool] = lambda: False,
) -> Standing:
    """Train to the last step, or until patience runs out; continues from the checkpoint `resume` where given.

    After each evaluation every rank calls `report(metrics, folder)` with its part of a checkpoint, a temporary folder
    that report takes over and removes. `description` is the configuration's text for TensorBoard. When `stop()` is true
    on any rank, the run is saved where it stands and left there.
    Raises Unrecoverable where more than `max_skipped` steps in a row, or a validation score, are not finite.
    """
    if worker.device.type == "cpu":
        keep_freed_memory()
    engine, standing = start(job, config, worker, resume)
    if resume is not None and (line := changed_rate(checkpoint.read_state(resume), config)):
        telemetry.note(line)
    base_lrs = [group["lr"] for group in job.groups]
    telemetry.start(standing.step)
    telemetry.text("config", description)
    meter = Meter(worker, job.rows.tokens_per_row)
    saved_step, saved_at = standing.step, time.monotonic()
    flags: Delayed[None] = Delayed(worker.device)
    outcomes: Delayed[tuple[int, list[Batch]]] = Delayed(worker.device)

    def take_in(every: bool) -> None:
        for (finite, loss), (step, rows) in outcomes.ready(every):
            if finite:
                meter.count(rows, loss)
                standing.skipped_in_a_row = 0
            else:
                _count_skipped(standing, step, rows, job.rows, config)

    def evaluate_and_save() -> None:
        nonlocal saved_step, saved_at
        metrics = evaluate(engine, job, standing, telemetry)
        stalled_s = save(engine, standing, config, metrics, job.metric, report=report, telemetry=telemetry)
        stalls = {"stall_s": stalled_s, "stall_fraction": stalled_s / (time.monotonic() - saved_at)}
        telemetry.scalars("checkpoint", stalls, standing.step)
        saved_step, saved_at = standing.step, time.monotonic()

    steps = fed(
        job.rows.steps(Cursor(**standing.cursor), config.rows_per_step, worker.rank, worker.world_size),
        worker.device,
        engine.module.ask,
    )
    timed_steps = meter.clock.rows(steps)
    meter.clock.start()
    try:
        while not (stopping := anyone_by_now(stop(), worker, flags)) and not standing.finished(config):
            rows, cursor = next(timed_steps)
            fraction = schedule(standing.step, config)
            for group, lr in zip(engine.optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = lr * fraction
            sums = train_step(engine, rows, worker.device)
            standing.step, standing.cursor = standing.step + 1, asdict(cursor)
            outcomes.put(meter.add(sums), (standing.step, rows))
            logged = standing.step % config.log_every == 0
            due = standing.step % config.eval_every == 0 or standing.step == config.max_steps
            take_in(every=logged or due)
            if logged:
                values = {"learning_rate": base_lrs[0] * fraction, "skipped_steps": standing.skipped}
                telemetry.scalars("train", {**meter.mean(), **values}, standing.step)
                for name, by_rank in curves(meter.times).items():
                    telemetry.scalars(name, by_rank, standing.step)
            telemetry.progress(force=due, evaluating=due, **_progress(meter, standing, job, config))
            if due:
                evaluate_and_save()
        take_in(every=True)
        if standing.finished(config) and not standing.evaluated():
            evaluate_and_save()  # it was stopped between two evaluations, and max_steps then lowered to where it stood
        elif stopping and standing.step > saved_step:
            save(engine, standing, config, standing.place(), job.metric, report=report, telemetry=telemetry)
        telemetry.progress(force=True, **_progress(meter, standing, job, config))
    finally:
        steps.close()  # stops the loader's threads
        telemetry.close()
        meter.clock.stop()
        engine.destroy()
    return standing


def train_step(engine: Any, rows: list[Batch], device: torch.device) -> dict[str, Tensor]:
    """One optimiser step over this worker's rows; their parts of the step's loss and of each term's mean, summed, and
    the norm of the gradient: on the device, which is not waited for.

    The gradient is that of the loss over all targets of the step, on all workers; their number is known before the
    model runs. DeepSpeed divides each row's part by the number of accumulated rows and averages over workers, which a
    factor undoes; it clips and updates at the last row.

    Where a loss or the gradient of any worker is not finite nothing changes, and the norm is not finite on all of them.
    """
    from deepspeed import comm

    terms, rows = engine.module.terms, [row.to(device) for row in rows]
    count_K = count_targets(engine.module, rows)
    comm.all_reduce(count_K)  # DeepSpeed's, whose collectives are timed: here the others wait for a slow worker
    num_rows = len(rows) * dist.get_world_size()
    sum_X = torch.zeros(len(terms) + 1, device=device)
    for row in rows:
        torch.manual_seed(row.seed)
        loss, mean_K = mean_loss(terms, engine(row)["sum_K"], count_K)
        # the gradient of a loss that is not finite could be finite; made NaN, all workers see it in the norm
        engine.backward(loss * torch.where(torch.isfinite(loss.detach()), num_rows, math.nan))
        norm = _unclipped_norm(engine)
        _step_where_finite(engine, norm)
        sum_X = sum_X + torch.cat([mean_K, loss[None]]).detach().float()
    norm = engine.get_global_grad_norm() if norm is None else norm
    norm = norm.float() if isinstance(norm, Tensor) else torch.full((), norm, device=device)
    return dict(zip([*terms, "loss"], sum_X, strict=True)) | {"gradient_norm": norm}


def count_targets(module: LossModel, rows: Iterable[Batch]) -> Tensor:
    """How many targets each of the module's terms has in these rows (K,)."""
    return torch.stack([module.count_targets(row) for row in rows]).sum(dim=0)


def _step_where_finite(engine: Any, norm: Tensor | None) -> None:
    """DeepSpeed's step, which updates nothing where the norm is not finite; under ZeRO (None) it looks for itself."""
    if norm is not None and engine.optimizer.defaults["fused"]:
        engine.optimizer.found_inf = (~torch.isfinite(norm)).float()  # its kernel looks at it, on the device
        engine.step()
    elif norm is None or torch.isfinite(norm):
        engine.step()
    else:  # AdamW passes over parameters that have no gradient
        hook = engine.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
        engine.step()
        hook.remove()


def _count_skipped(standing: Standing, step: int, rows: list[Batch], source: TrainingRows, config: TrainConfig) -> None:
    standing.skipped, standing.skipped_in_a_row = standing.skipped + 1, standing.skipped_in_a_row + 1
    if standing.skipped_in_a_row > config.max_skipped:
        places: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(places, "; ".join(source.place_of(row) for row in rows))
        raise Unrecoverable(
            f"{standing.skipped_in_a_row} steps in a row, up to step {step}, had a loss or gradient that is "
            f"not finite (train.max_skipped={config.max_skipped}). The last one's rows: {'; '.join(places)}. Lower "
            "train.learning_rate or look at these rows, and start again under another run.name"
        )


def evaluate(engine: Any, job: Job, standing: Standing, telemetry: Telemetry) -> dict[str, float]:
    """The metrics, with step and epoch; collective. Raises Unrecoverable where a metric is not finite."""
    engine.eval()
    with torch.no_grad():
        metrics = job.evaluate(engine)
    engine.train()
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Unrecoverable(
                f"{name} at step {standing.step} is {value}, so the model has diverged: lower its learning rate and "
                "start again under another run.name"
            )
    standing.judge(metrics[job.metric], job.mode)
    telemetry.scalars("validation", metrics, standing.step)
    standing.evaluations.append({**metrics, **standing.place()})
    return dict(standing.evaluations[-1])


def save(
    engine: Any,
    standing: Standing,
    config: TrainConfig,
    metrics: dict[str, float],
    metric: str,
    *,
    report: Report,
    telemetry: Telemetry,
) -> float:
    """Write a checkpoint and report it with its metrics; collective. Returns the seconds it took."""
    started = time.monotonic()
    telemetry.flush()
    folder = Path(tempfile.mkdtemp(prefix=f"hymate-step-{standing.step}-"))
    try:
        checkpoint.save(engine, folder, {**asdict(standing), "score": metrics.get(metric), "config": asdict(config)})
        report(metrics, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # the disk may be full of them
        raise
    return time.monotonic() - started


def mean_outputs(engine: Any, rows: Iterable[tuple[Batch, bool]], worker: Worker) -> dict[str, float]:
    """The loss and the mean of each term over all targets in evaluation rows of all ranks; collective.

    rows: `Rows.once` of this rank; a row with False only keeps the ranks in step and is not counted.
    """
    terms = engine.module.terms
    total_2K = torch.zeros(2, len(terms), dtype=torch.float64, device=worker.device)
    with contextlib.closing(fed(rows, worker.device, engine.module.ask)) as ready:
        for row, counted in ready:
            torch.manual_seed(row.seed)
            sum_K = engine(row)["sum_K"].double()
            if counted:
                total_2K += torch.stack([sum_K, engine.module.count_targets(row)])
    loss, mean_K = mean_loss(terms, *_all_reduced(total_2K, worker.device))
    return {"loss": float(loss), **dict(zip(terms, mean_K.tolist(), strict=True))}


# -------------------------------------------------------------------------------------------------------- build


def start(job: Job, config: TrainConfig, worker: Worker, resume: Path | None) -> tuple[Any, Standing]:
    """A DeepSpeed engine around the job's module, fresh or as it was in a checkpoint."""
    compute_as(job.module, config)
    if resume is not None:
        checkpoint.load_weights(job.module, resume)
    betas, on_gpu = (config.beta1, config.beta2), worker.device.type != "cpu"
    optimizer = AdamW(job.groups, betas=betas, weight_decay=config.weight_decay, fused=on_gpu)
    engine = build_engine(job.module, optimizer, config, worker)
    if resume is None:
        checkpoint.create_adam_state(engine, steps=0)  # the first step may be skipped, and then saved
        return engine, Standing()
    checkpoint.load_optimizer(engine, resume)
    state = checkpoint.read_state(resume)
    return engine, Standing(**{item.name: state[item.name] for item in fields(Standing)})


def compute_as(module: nn.Module, config: TrainConfig) -> None:
    """Activation checkpointing and compilation, as configured; graphs serve rows of any length and any histories."""
    for part in module.modules():
        if isinstance(part, HyMaTE):
            part.activation_checkpointing = config.activation_checkpointing
        elif config.compile and isinstance(part, (EventEmbedding, GatedMLP)):
            part.compile(dynamic=True)


def build_engine(module: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, worker: Worker) -> Any:
    """deepspeed.initialize, without its noise."""
    if worker.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # a shared-memory kernel for inference only; DeepSpeed would compile it with the machine's C++ compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    with contextlib.redirect_stdout(io.StringIO()), nothing_compiled():
        engine, *_ = deepspeed.initialize(
            model=module.to(worker.device),
            optimizer=optimizer,
            config=deepspeed_config(config, worker.world_size, num_parameters),
            dist_init_required=False,
        )
    return engine


@contextmanager
def single_process(device: torch.device = CPU) -> Iterator[Worker]:
    """A process group of this process alone, for a run that needs no launcher."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield Worker(0, 1, 0, device)
        finally:
            leave_group()


def leave_group() -> None:
    """End the process group, and those DeepSpeed keeps, which would stand in the way of training again here."""
    if "deepspeed" in sys.modules:
        import deepspeed

        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
            return
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------- schedule and measures


def schedule(step: int, config: TrainConfig) -> float:
    """Fraction of the base learning rate at the step after `step` steps: linear warm-up, then cosine decay.

    >>> config = TrainConfig(max_steps=10, warmup_steps=2, eval_every=1, min_lr_fraction=0.1)
    >>> [round(schedule(step, config), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / (config.max_steps - config.warmup_steps))
    return config.min_lr_fraction + (1 - config.min_lr_fraction) * 0.5 * (1 + math.cos(math.pi * done))


def changed_rate(state: Mapping[str, Any], config: TrainConfig) -> str | None:
    """One line where another train.max_steps changes the learning rate of a run that goes on from this state."""
    step, before = state["step"], replace(config, max_steps=state["config"]["max_steps"])
    old, new = (config.learning_rate * schedule(step, each) for each in (before, config))
    if math.isclose(old, new):
        return None
    return (
        f"train.max_steps={config.max_steps} instead of {before.max_steps}: from step {step} on the learning rate is "
        f"{new:.3g}, not {old:.3g}, and decays until step {config.max_steps}"
    )


class Meter:
    """Sums the outputs of steps until they are read, and the time they took.

    times: of each worker, in the steps before the last reading.
    """

    def __init__(self, worker: Worker, tokens_per_row: int) -> None:
        self.worker, self.tokens_per_row = worker, tokens_per_row
        self.loss: float | None = None
        self.events_per_second = 0.0
        self.steps_per_second = 0.0
        self.times: list[WorkerTimes] = []
        self.clock = Clock(worker.device)
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._rows = self._events = 0
        self._started = time.monotonic()

    def add(self, sums: dict[str, Tensor]) -> Tensor:
        """Take in a step of this worker where it was finite; whether it was, and the sum of the losses (2,)."""
        self.clock.step_done()
        finite = torch.isfinite(sums["gradient_norm"])
        sum_X = torch.where(finite, torch.stack(list(sums.values())), 0.0)
        if self._sums:
            sum_X = sum_X + torch.stack(list(self._sums.values()))
        self._sums = dict(zip(sums, sum_X, strict=True))
        return torch.stack([finite.float(), self._sums["loss"]])

    def count(self, rows: Sequence[Batch], loss: float) -> None:
        """Count a finite step over `rows`; loss: the sum of all steps' so far, as `add` returned it."""
        self._steps, self._rows = self._steps + 1, self._rows + len(rows)
        self._events += sum(row.num_events for row in rows)
        elapsed = time.monotonic() - self._started
        self.loss = loss * self.worker.world_size / self._steps  # of all ranks, about
        self.steps_per_second = self._steps / elapsed
        self.events_per_second = self._events * self.worker.world_size / elapsed

    def mean(self) -> dict[str, float]:
        """Means over the steps since the last call, of all ranks' rows; none if all were skipped; collective."""
        if not self._steps:
            return {}
        times = torch.zeros(self.worker.world_size, len(WorkerTimes._fields))  # one row a rank: their sum has them all
        times[self.worker.rank] = torch.tensor(self.clock.read(self._events))
        own = torch.cat([torch.stack(list(self._sums.values())).cpu(), times.flatten()])
        total = _all_reduced(torch.cat([torch.tensor([self._rows, self._events]), own.double()]), self.worker.device)
        (num_rows, num_events), numbers = total[:2].tolist(), total[2:].tolist()
        values = dict(zip(self._sums, numbers, strict=False))
        self.times = [WorkerTimes(*row) for row in total[2 + len(values) :].view_as(times).tolist()]
        elapsed = time.monotonic() - self._started
        norm = values.pop("gradient_norm") / (self._steps * self.worker.world_size)
        means = {name: value / self._steps for name, value in values.items()}
        self._reset()
        efficiency = num_events / (num_rows * self.tokens_per_row)
        rate = num_events / elapsed
        return {**means, "gradient_norm": norm, "events_per_second": rate, "packing_efficiency": efficiency}


def _unclipped_norm(engine: Any) -> Tensor | None:
    """Gradient norm without ZeRO, which DeepSpeed clips by but does not return; None under ZeRO."""
    if engine.zero_optimization() or not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def anyone(flag: bool, worker: Worker) -> bool:
    """Whether the flag is true on any rank; collective."""
    return bool(_all_reduced(torch.tensor([float(flag)]), worker.device))


def anyone_by_now(flag: bool, worker: Worker, flags: Delayed[None]) -> bool:
    """`anyone`, as far as `flags` have come: without a wait, on a GPU it is known a call later; collective."""
    raised = torch.full((1,), float(flag), device=worker.device)
    dist.all_reduce(raised)
    flags.put(raised, None)
    return any(number for (number,), _ in flags.ready())


def agreed(value: Any, worker: Worker) -> Any:
    """Rank 0's plain value on every rank; collective."""
    held = [value]
    dist.broadcast_object_list(held, src=0, device=worker.device)
    return held[0]


def _all_reduced(values: Tensor, device: torch.device) -> Tensor:
    moved = values.double().to(device)
    dist.all_reduce(moved)
    return moved.cpu()


def _progress(meter: Meter, standing: Standing, job: Job, config: TrainConfig) -> dict[str, Any]:
    left = config.max_steps - standing.step
    return {
        "step": standing.step,
        "max_steps": config.max_steps,
        "loss": meter.loss,
        "score_name": job.metric,
        "score": standing.best,
        "skipped": standing.skipped,
        "events_per_second": meter.events_per_second,
        "step_s": 1 / meter.steps_per_second if meter.steps_per_second else None,
        "eta_s": left / meter.steps_per_second if meter.steps_per_second else None,
        "trouble": trouble(meter.times) if meter.times else None,
    }
