"""The protocol: contenders trained on the same labels with several seeds, and scored on the same patients.

Gradient boosting and logistic regression (`hymate.baselines`), encoders from scratch, HyMaTE from scratch and
pretrained, and the average of a pretrained model's best checkpoints. Each (contender, share of the training patients,
seed) is one task of Ray's that leaves its predictions in the run's folder; what is there already is not run again.

Shape legend: P training patients, E examples, X features, T tasks.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from hymate import baselines
from hymate.bundle import Bundle, read_weights, write_weights
from hymate.command import build, check_same_run, to_tree
from hymate.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    UserError,
)
from hymate.data.examples import Examples, labelled_examples, require_both_classes
from hymate.data.features import FeatureConfig, choose, features
from hymate.data.histories import Histories
from hymate.data.tasks import labels
from hymate.predict import predict
from hymate.record import recorded
from hymate.storage import Location, atomic_path, local_copy, locate, require_folder, write_text
from hymate.telemetry import Telemetry
from hymate.training import cluster, comparison, engine, space
from hymate.training.checkpoint import read_verified_weights
from hymate.training.comparison import COMPARED, Comparison, Run, Split, write_run
from hymate.training.finetune import Start, Study, TrialConfig, run_trial
from hymate.training.launch import absolute
from hymate.training.pretraining import PretrainConfig, pretraining_job, read_vocabulary
from hymate.training.resume import Kept
from hymate.training.search import trial_config

BASELINES: tuple[baselines.Kind, ...] = ("gradient_boosting", "logistic_regression")
AVERAGED = "_averaged"  # the name of a pretrained contender with the mean of its best checkpoints' weights
METRIC = "mean"
RUNS = "runs"  # their folder in the benchmark's
CHANGEABLE = {"data.path", "run.dir", "split", "seeds", "shares", "only", "max_concurrent"}


@dataclass(frozen=True)
class Contender:
    """A model that is fine-tuned. model: what it changes of the configuration's; point: its settings, as of a search's
    space; pretrained: whether it starts from weights that were pretrained with the same seed.
    """

    point: dict[str, Any]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False


@dataclass(frozen=True)
class BenchmarkConfig:
    """`finetune/benchmark.py`'s configuration; see configs/benchmark.yaml."""

    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    pretrain: TrainConfig
    train: TrainConfig
    task: TaskConfig
    split: Split
    only: list[str]
    seeds: int
    shares: list[float]
    shared: list[str]
    averaged: int
    max_concurrent: int
    contenders: dict[str, Contender]
    point: dict[str, Any]
    run: RunConfig

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"shares must be above 0 and at most 1, got {self.shares}")
        for name in ("seeds", "averaged"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for key in ("shared", "only"):
            if unknown := set(getattr(self, key)) - {*BASELINES, *self.contenders}:
                raise ConfigError(f"{key}: {', '.join(sorted(unknown))} is no contender")
        if clash := set(BASELINES) & set(self.contenders):
            raise ConfigError(f"contenders.{sorted(clash)[0]} is a baseline's name: choose another")
        for contender in self.contenders.values():
            point = {**self.point, **contender.point}
            space.check(point)
            if ranges := sorted(name for name, value in point.items() if isinstance(value, Mapping)):
                raise ConfigError(f"point: {ranges[0]} must be one value here, not a distribution")
            space.check_point(point)
            self.model_of(contender)

    def model_of(self, contender: Contender) -> ModelConfig:
        """The contender's model. Raises ConfigError where a setting is impossible."""
        return build(ModelConfig, {**to_tree(self.model), **contender.model}, "contenders.model.")


# -------------------------------------------------------------------------------------------------------- running


def benchmark(config: BenchmarkConfig) -> Location:
    """Run what is not there yet, then compare all; returns the run's folder."""
    config = _absolute(config)
    path, runs = config.run.path, _runs(config)
    if not runs:
        raise ConfigError("only, shared and shares leave nothing to run: shares below 1 are of those in shared alone")
    require_folder(path, "run.dir")
    cluster.check(config.train)
    histories, label_set = Histories.open(config.data.path), labels(locate(config.data.path), config.task)
    require_both_classes(
        config.task, {split: labelled_examples(histories, label_set.table, split) for split in COMPARED}
    )
    for share, seed in {(run.share, run.seed) for run in runs}:
        table = _share_of(label_set.table, histories, share, seed)
        require_both_classes(config.task, {"train": labelled_examples(histories, table, "train")})
    inputs = {"data.path": histories.fingerprint, "task.labels": label_set.digest()}
    check_same_run(path, config, inputs, CHANGEABLE)
    with recorded(path, "benchmark", config, inputs):
        waiting = [run for run in runs if not run.results(path / RUNS).is_file()]
        if waiting:
            with cluster.ray_session(config.train):
                _run_all(config, waiting)
        averaged = [name + AVERAGED for name, contender in config.contenders.items() if contender.pretrained]
        names = [*BASELINES, *config.contenders, *averaged]
        compared = Comparison(path / RUNS, names, config.shares, config.seeds, config.split, config.task.name)
        found = comparison.compare(compared)
        write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", path / "benchmark.json")
        write_text(comparison.report(compared, found), path / "benchmark.md")
        comparison.draw(compared, found, path / "benchmark.png")
    comparison.show(found)
    print(f"report: {path / 'benchmark.md'}, picture: {path / 'benchmark.png'}")
    return path


def _absolute(config: BenchmarkConfig) -> BenchmarkConfig:
    data = dataclasses.replace(config.data, path=absolute("data.path", config.data.path))
    run = dataclasses.replace(config.run, dir=absolute("run.dir", config.run.dir))
    task = config.task
    if task.labels is not None:
        task = dataclasses.replace(task, labels=absolute("task.labels", task.labels))
    return dataclasses.replace(config, data=data, run=run, task=task)


def _runs(config: BenchmarkConfig) -> list[Run]:
    """In the order in which they are started: every contender once, then with the next seed; small shares last."""
    everyone = [*BASELINES, *config.contenders]
    return [
        Run(name, share, seed)
        for share in sorted(config.shares, reverse=True)
        for seed in range(config.seeds)
        for name in (everyone if share == 1 else config.shared)
        if not config.only or name in config.only
    ]


def _run_all(config: BenchmarkConfig, waiting: Sequence[Run]) -> None:
    """Each in a process of its own. After the first failure what is running ends, nothing else begins."""
    import ray
    from ray.exceptions import RayTaskError

    resources = {"num_cpus": config.train.cpus_per_worker, "num_gpus": float(config.train.use_gpu)}
    remote, pretraining = (ray.remote(max_calls=1, max_retries=0, **resources)(task) for task in (_run, pretrain))
    started, queue = time.monotonic(), list(waiting)
    running: dict[Any, Run | int] = {}  # a seed is pretrained for all its runs
    weights: dict[int, Any] = {}
    failure: Exception | None = None

    def begin() -> bool:
        """The first that can; whether there was one."""
        for run in queue:
            needs_weights = run.name in config.contenders and config.contenders[run.name].pretrained
            if not needs_weights or run.seed in weights:
                queue.remove(run)
                running[remote.remote(config, run, weights[run.seed] if needs_weights else None)] = run
                return True
            if run.seed not in running.values():
                running[pretraining.remote(config, run.seed)] = run.seed
                return True
        return False

    while queue or running:
        while len(running) < (config.max_concurrent or _slots(config)) and begin():
            pass
        (done,), _ = ray.wait(list(running), num_returns=1)
        run = running.pop(done)
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        if isinstance(run, int):
            weights[run], outcome = done, f"pretraining of seed {run}"
        else:
            outcome = f"{run.name} of seed {run.seed} on {run.share:.0%}"
        try:
            ray.get(done)
        except Exception as error:
            # of a user's mistake or of what diverged a line is enough; of the rest Ray's traceback tells more
            cause = error.cause if isinstance(error, RayTaskError) else None
            known = isinstance(cause, UserError | FloatingPointError)
            failure = failure or (UserError(str(cause)) if known else error)
            queue.clear()
            outcome += " failed"
        left = len(queue) + sum(isinstance(one, Run) for one in running.values())
        print(f"{minutes}:{seconds:02d}  {outcome}; {left} left", flush=True)
    if failure is not None:
        raise failure


def _slots(config: BenchmarkConfig) -> int:
    """How many runs the machine or cluster holds at once."""
    import ray

    there = ray.cluster_resources()
    slots = int(there.get("CPU", 0)) // config.train.cpus_per_worker
    return max(1, min(slots, int(there.get("GPU", 0))) if config.train.use_gpu else slots)


def _run(config: BenchmarkConfig, run: Run, pretrained: tuple[dict[str, Tensor], float] | None) -> None:
    torch.set_num_threads(config.train.cpus_per_worker)
    histories, table = Histories.open(config.data.path), labels(locate(config.data.path), config.task).table
    table = _share_of(table, histories, run.share, run.seed)
    if run.name in BASELINES:
        _run_baseline(config, run, histories, table)
    else:
        _run_contender(config, run, histories, table, *(pretrained or (None, 0.0)))


def _share_of(table: pa.Table, histories: Histories, share: float, seed: int) -> pa.Table:
    """The labels without those of the training patients that the run does not learn from; each seed draws its own."""
    train_id_P = np.sort(histories.index["subject_id"][histories.rows_of("train")])
    order_P = np.random.default_rng(seed).permutation(len(train_id_P))
    left_out_P = train_id_P[order_P[max(1, round(share * len(order_P))) :]]
    return table.filter(pc.invert(pc.is_in(table["subject_id"], pa.array(left_out_P))))


def _run_baseline(config: BenchmarkConfig, run: Run, histories: Histories, table: pa.Table) -> None:
    started = time.monotonic()
    examples = {split: labelled_examples(histories, table, split) for split in ("train", *COMPARED)}
    spec = choose(histories, examples["train"], FeatureConfig())
    told = {split: features(histories, examples[split], spec) for split in examples}
    kind = next(name for name in BASELINES if name == run.name)
    model = baselines.fit(kind, told["train"], told["tuning"], run.seed)
    seconds = time.monotonic() - started
    probabilities: dict[Split, np.ndarray] = {split: model.probability(told[split].value_EX) for split in COMPARED}
    write_run(run, config.run.path / RUNS, examples, probabilities, seconds=seconds, parameters=None)


def _run_contender(
    config: BenchmarkConfig,
    run: Run,
    histories: Histories,
    table: pa.Table,
    state: dict[str, Tensor] | None,
    pretraining_seconds: float,
) -> None:
    contender = config.contenders[run.name]
    vocabulary = read_vocabulary(config.data)
    start = Start(config.model_of(contender), config.data, vocabulary, state)
    trial = trial_of(config, contender, start, run)
    started = time.monotonic()
    teacher = []
    if trial.teacher_share:
        train, tuning = (labelled_examples(histories, table, split) for split in ("train", "tuning"))
        teacher = [baselines.cross_fitted(histories, train, tuning, run.seed)]
    study = Study(start, [table], METRIC, [trial], config.run.path, teacher)
    with tempfile.TemporaryDirectory() as folder, engine.single_process(config.train.use_gpu) as worker:
        kept = Kept(Path(folder), config.averaged)
        telemetry = Telemetry(config.run.path / "tb" / run.stem, enabled=True)
        run_trial(study, trial, worker=worker, report=_keeping(kept), resume=None, telemetry=telemetry)
        states = _best_weights(kept)
    seconds = time.monotonic() - started
    examples: dict[str, Examples] = {split: labelled_examples(histories, table, split) for split in COMPARED}
    average = {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}
    named = {run.name + AVERAGED: average} if contender.pretrained else {}
    for name, state in {**named, run.name: states[0]}.items():  # the run's own comes last: then the run is there
        bundle = Bundle("risk", trial.model, trial.data, trial.tasks, vocabulary, state, in_days=trial.in_days)
        probabilities = {
            split: predict(bundle, histories, examples[split])[0].probability_ET[:, 0] for split in COMPARED
        }
        parameters = sum(weight.numel() for weight in state.values())
        more = {"seconds": seconds, "pretraining_seconds": pretraining_seconds, "parameters": parameters}
        write_run(dataclasses.replace(run, name=name), config.run.path / RUNS, examples, probabilities, **more)


def trial_of(config: BenchmarkConfig, contender: Contender, start: Start, run: Run) -> TrialConfig:
    """As few labels are soon learned, a share of them gets its root's share of the steps."""
    steps = max(config.train.eval_every, round(config.train.max_steps * run.share**0.5))
    warmup = min(config.train.warmup_steps, steps // 4)
    train = dataclasses.replace(config.train, seed=run.seed, max_steps=steps, warmup_steps=warmup)
    return trial_config([config.task], train, start, {**config.point, **contender.point})


def pretrain(config: BenchmarkConfig, seed: int) -> tuple[dict[str, Tensor], float]:
    """Weights that were pretrained with this seed, and how long that took; trained once for all shares."""
    torch.set_num_threads(config.train.cpus_per_worker)
    path = config.run.path / "pretrained" / f"{seed}.safetensors"
    if not path.with_suffix(".json").is_file():  # it comes last
        settings = PretrainConfig(
            config.data, config.model, config.objective, dataclasses.replace(config.pretrain, seed=seed), config.run
        )
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, engine.single_process(config.train.use_gpu) as worker:
            job = pretraining_job(settings, worker)
            kept = Kept(Path(folder), 1, job.mode)
            telemetry = Telemetry(config.run.path / "tb" / f"pretrained-{seed}", enabled=True)
            engine.train(job, settings.train, worker, report=_keeping(kept), telemetry=telemetry, resume=None)
            (state,) = _best_weights(kept)
        with atomic_path(path) as temporary:
            write_weights(state, temporary)
        write_text(json.dumps(time.monotonic() - started) + "\n", path.with_suffix(".json"))
    with local_copy(path) as copy:
        return read_weights(copy), json.loads(path.with_suffix(".json").read_text())


def _keeping(kept: Kept) -> engine.Report:
    def report(metrics: dict[str, float], checkpoint: Path) -> None:
        kept.add(checkpoint, int(metrics["step"]))
        shutil.rmtree(checkpoint)

    return report


def _best_weights(kept: Kept) -> list[dict[str, Tensor]]:
    """Best first."""
    return [read_verified_weights(folder) for folder, _ in kept.best_first()[: kept.num_best]]
