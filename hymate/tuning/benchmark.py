"""The benchmark: contenders trained on the same labels with several seeds, and scored on the same patients.

Gradient boosting and logistic regression (`hymate.evaluation.boosting`), encoders from scratch, HyMaTE from scratch and
pretrained, and the paper's model. They are scored by cross-validation over the train and tuning patients, or on the
held-out ones. A budget of labels counts every label that a run sees: most are fitted to, the others choose among the
run's candidates and recalibrate it, by the same rule for everyone.

Each (contender, budget, seed, fold) is one task of Ray's that leaves its predictions in the run's folder; what is there
already is not run again.

Shape legend: P patients, E examples, T tasks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.special import expit
from torch import Tensor

from hymate import cluster, device
from hymate.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TaskConfig, TrainConfig
from hymate.data.examples import Examples, labelled_examples
from hymate.data.histories import Histories
from hymate.data.tasks import labels
from hymate.device import Wanted
from hymate.errors import ConfigError, UserError
from hymate.evaluation import boosting, calibration
from hymate.evaluation.features import FeatureConfig, choose, features
from hymate.inference.bundle import Bundle, read_weights, write_weights
from hymate.inference.scoring import predict
from hymate.runs import absolute, check_same_run, claimed, run_folder
from hymate.storage.paths import Location, atomic_path, local_copy, locate, require_folder, write_text
from hymate.training import loop
from hymate.training.checkpoint import read_verified_weights
from hymate.training.keeper import Kept
from hymate.training.pretraining import PretrainConfig, pretraining_job, read_vocabulary
from hymate.training.telemetry import Telemetry
from hymate.trees import build, to_tree
from hymate.tuning import comparison, space
from hymate.tuning.comparison import Comparison, Run, Split, note_look, write_run
from hymate.tuning.search import require_starts, trial_config
from hymate.tuning.trial import Start, TrialConfig, taught, train_on

BASELINES: tuple[boosting.Kind, ...] = ("gradient_boosting", "logistic_regression")
CHOSEN_BY = "loss"  # cross-entropy, as in hymate.evaluation.boosting: AUROC and AUPRC of few positives jump
RUNS, PRETRAINED = "runs", "pretrained"  # folders in the benchmark's
DEVELOPMENT, HELD_OUT = "train and tuning", "held_out"
CHANGEABLE = {
    "data.path",
    "device",
    "run.dir",
    "split",
    "seeds",
    "budgets",
    "with_few_labels",
    "only",
    "max_concurrent",
}


@dataclass(frozen=True)
class Contender:
    """A model that is fine-tuned. model: what it changes of the configuration's; point: its settings, as of a search's
    space; pretrained: whether it starts from weights that were pretrained with the same seed, once for all contenders
    of the same model.
    """

    point: dict[str, Any]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = False


@dataclass(frozen=True)
class BenchmarkConfig:
    """`finetune/benchmark.py`'s configuration.

    split: "cross_validation" over the train and tuning patients, while choices are made; "held_out" once they are made.
    folds: of cross-validation; each seed draws its own.
    only: names of the contenders to run now; the others can follow. Empty: all of them.
    seeds: how often everything is done, each time with other random numbers.
    budgets: labels that a run sees in all, those that choose and recalibrate included; 0 is all there are.
    with_few_labels: the contenders of all budgets but the largest.
    choosing_fraction: fraction of the labels that choose the candidate (a network's evaluation, boosting's number of
        trees, logistic regression's penalty) by the least cross-entropy, and recalibrate it; the rest is fitted to.
    max_concurrent: runs at the same time; 0 is as many as the machine or cluster holds.
    pretrain: each seed's pretraining, without labels.
    train: each contender's fine-tuning.
    contenders: by name, what each changes in `model` (`model`) and in `point` (`point`), and whether it starts from
        pretrained weights (`pretrained`).
    point: settings of every contender, as of a search's space.
    device: "auto" takes a GPU for each run where all is there that the model needs, else CPUs; or "cpu", "cuda".
    """

    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    pretrain: TrainConfig
    train: TrainConfig
    task: TaskConfig
    run: RunConfig
    contenders: dict[str, Contender]
    point: dict[str, Any]
    with_few_labels: list[str]
    split: Split = "cross_validation"
    folds: int = 4
    seeds: int = 3
    only: list[str] = dataclasses.field(default_factory=list)
    budgets: list[int] = dataclasses.field(default_factory=lambda: [0])
    choosing_fraction: float = 0.2
    max_concurrent: int = 0
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        if not self.budgets or min(self.budgets) < 0 or len(set(self.budgets)) < len(self.budgets):
            raise ConfigError(f"budgets must be different numbers of labels, 0 for all there are; got {self.budgets}")
        if not 0 < self.choosing_fraction < 1:
            raise ConfigError(f"choosing_fraction must be between 0 and 1, got {self.choosing_fraction}")
        for name, least in (("seeds", 1), ("folds", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for key in ("with_few_labels", "only"):
            if unknown := set(getattr(self, key)) - {*BASELINES, *self.contenders}:
                raise ConfigError(f"{key}: {', '.join(sorted(unknown))} is no contender")
        if clash := set(BASELINES) & set(self.contenders):
            raise ConfigError(f"contenders.{sorted(clash)[0]} is a baseline's name: choose another")
        for contender in self.contenders.values():
            point = self.point_of(contender)
            space.check(point)
            if ranges := sorted(name for name, value in point.items() if isinstance(value, Mapping)):
                raise ConfigError(f"point: {ranges[0]} must be one value here, not a distribution")
            space.check_point(point)
            self.model_of(contender)

    def point_of(self, contender: Contender) -> dict[str, Any]:
        """The contender's settings, and where it has none of its own those of all."""
        return {**self.point, **contender.point}

    def model_of(self, contender: Contender) -> ModelConfig:
        """The contender's model. Raises ConfigError where a setting is impossible."""
        return build(ModelConfig, {**to_tree(self.model), **contender.model}, "contenders.model.")

    @property
    def largest_first(self) -> list[int]:
        """The budgets; all labels are the largest."""
        return sorted(self.budgets, key=lambda budget: budget or math.inf, reverse=True)

    def pretraining(self, run: Run) -> Pretraining | None:
        """Of the weights that the run starts from; None where it starts from scratch."""
        pretrained = {name: contender for name, contender in self.contenders.items() if contender.pretrained}
        if run.name not in pretrained:
            return None
        model = self.model_of(pretrained[run.name])
        alike = [name for name, contender in pretrained.items() if self.model_of(contender) == model]
        return Pretraining(alike[0], run.seed)


@dataclass(frozen=True)
class Pretraining:
    """The pretrained weights of all contenders that have the model of this one."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"pretraining of {self.name}, seed {self.seed}"


# -------------------------------------------------------------------------------------------------------- running


def benchmark(config: BenchmarkConfig) -> Location:
    """Run what is not there yet, then compare all; returns the run's folder."""
    config = absolute(config)
    path, runs = run_folder(config.run), _runs(config)
    if not runs:
        raise ConfigError(
            "only leaves nothing to run: of several budgets all but the largest are with_few_labels' alone"
        )
    require_folder(path, "run.dir")
    models = [config.model_of(config.contenders[name]) for name in {run.name for run in runs} - {*BASELINES}]
    config = device.decide(config, *models, cluster_gpus=cluster.check(config.train))
    histories, label_set = Histories.open(config.data.path), labels(locate(config.data.path), config.task)
    if any(config.point_of(contender).get("early_share") for contender in config.contenders.values()):
        require_starts(config.task, label_set, "point.early_share")
    there = Labelled.of(histories, label_set.table, config.split)
    for run in {(run.budget, run.seed, run.fold): run for run in runs}.values():
        there.allotted(config, run).check(config, run)
    inputs = {"data.path": histories.fingerprint, "task.labels": label_set.digest()}
    check_same_run(path, config, inputs, CHANGEABLE)
    with claimed(path, "benchmark", config, inputs) as claim:
        waiting = [run for run in runs if not run.results(path / RUNS).is_file()]
        if waiting:
            with cluster.ray_session(config.train, config.device):
                _run_all(config, waiting)
        names = [*BASELINES, *config.contenders]
        compared = Comparison(
            path / RUNS, names, config.largest_first, config.seeds, config.split, config.folds, config.task.name
        )
        found, looks = comparison.compare(compared), []
        if config.split == HELD_OUT:
            looks = note_look(path, found)
            claim.found["looks"] = len(looks)
        write_text(
            json.dumps({**found, "looks": looks}, indent=1, allow_nan=False) + "\n", path / f"{config.split}.json"
        )
        write_text(comparison.report(compared, found, looks), path / f"{config.split}.md")
        comparison.draw(compared, found, path / f"{config.split}.png")
    comparison.show(found)
    print(f"report: {path / config.split}.md, picture: {path / config.split}.png")
    return path


def _runs(config: BenchmarkConfig) -> list[Run]:
    """In the order in which they are started: every contender once, then the next fold and seed; few labels last."""
    everyone = [*BASELINES, *config.contenders]
    folds = [None] if config.split == HELD_OUT else list(range(config.folds))
    return [
        Run(name, budget, seed, fold)
        for budget in config.largest_first
        for seed in range(config.seeds)
        for fold in folds
        for name in (everyone if budget == config.largest_first[0] else config.with_few_labels)
        if not config.only or name in config.only
    ]


# ------------------------------------------------------------------------------------------------- who has which labels


@dataclass(frozen=True)
class Allotment:
    """A run's labels: those to fit to, those to choose and recalibrate by, those to be scored on; a patient is in one
    of these parts. fraction: of all labels that it might have had, those that its budget allows.
    """

    fitting: Examples
    choosing: Examples
    test: Examples
    fraction: float

    def check(self, config: BenchmarkConfig, run: Run) -> None:
        """Raises UserError where a part is smaller than the budget wants it, or has one class only."""
        there = len(self.fitting) + len(self.choosing)
        if there < run.budget:
            raise UserError(f"budgets={config.budgets}: of {run.labels} there are only {there}")
        for name, examples in (("fit", self.fitting), ("choose by", self.choosing), ("be scored on", self.test)):
            positives = int((examples.label_E > 0.5).sum())
            if positives in (0, len(examples)):
                raise UserError(
                    f"task {config.task.name}: of {run.labels} {positives} positive and {len(examples) - positives} "
                    f"negative ones are there to {name}, and both are needed: take a larger budget or fewer folds"
                )


@dataclass(frozen=True)
class Labelled:
    """Examples with a label: those of the train and tuning patients together and, if asked for, the held-out ones."""

    development: Examples
    held_out: Examples | None

    @classmethod
    def of(cls, histories: Histories, table: pa.Table, split: Split) -> Labelled:
        """table: the task's labels."""
        parts = np.where(histories.index["split"] == HELD_OUT, HELD_OUT, DEVELOPMENT)
        histories = histories.with_splits(parts)
        wanted = [DEVELOPMENT, HELD_OUT] if split == HELD_OUT else [DEVELOPMENT]
        found = [labelled_examples(histories, table, part) for part in wanted]
        development, *held_out = [examples.only(~np.isnan(examples.label_E)) for examples in found]
        return cls(development, held_out[0] if held_out else None)

    def allotted(self, config: BenchmarkConfig, run: Run) -> Allotment:
        """The labels of a run: each seed draws its own folds, and its own patients until the budget is reached.

        Smaller budgets are parts of larger ones. Those to choose by are every so many of the patients in the order of
        outcome and draw, so that both parts have the same prevalence.
        """
        pool, test, rng = self.development, self.held_out, np.random.default_rng(run.seed)
        if run.fold is not None:
            fold_E = _shuffled(pool.subject_id_E, rng) % config.folds
            pool, test = pool.only(fold_E != run.fold), pool.only(fold_E == run.fold)
        assert test is not None, "a run without a fold is scored on the held-out labels"
        rank_E, there = _shuffled(pool.subject_id_E, rng), len(pool)
        drawn = np.zeros(len(pool), dtype=bool)
        drawn[np.argsort(rank_E, kind="stable")[: run.budget or None]] = True
        pool, rank_E = pool.only(drawn), rank_E[drawn]
        subject_P, first_E, subject_E = np.unique(pool.subject_id_E, return_index=True, return_inverse=True)
        positive_P = np.bincount(subject_E, pool.label_E > 0.5) > 0
        order_P = np.lexsort((rank_E[first_E], positive_P))
        chooses_P = np.zeros(len(subject_P), dtype=bool)
        chooses_P[order_P] = np.diff(np.floor(np.arange(len(subject_P) + 1) * config.choosing_fraction + 0.5)) > 0
        chooses_E = chooses_P[subject_E]
        return Allotment(pool.only(~chooses_E), pool.only(chooses_E), test, len(pool) / there)


def _shuffled(subject_id_E: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The place of each example's patient in a random order of all patients."""
    subject_P, subject_E = np.unique(subject_id_E, return_inverse=True)
    return rng.permutation(len(subject_P))[subject_E]


# -------------------------------------------------------------------------------------------------------- Ray's tasks


def _run_all(config: BenchmarkConfig, waiting: Sequence[Run]) -> None:
    """Each in a process of its own. After the first failure what is running ends, nothing else begins."""
    import ray
    from ray.exceptions import RayTaskError

    resources = {"num_cpus": config.train.cpus_per_worker, "num_gpus": float(config.device == "cuda")}
    remote, pretraining = (
        ray.remote(max_calls=1, max_retries=0, **resources)(task) for task in (train_and_score, pretrain)
    )
    started, queue = time.monotonic(), list(waiting)
    running: dict[Any, Run | Pretraining] = {}
    weights: dict[Pretraining | None, Any] = {None: None}
    failure: Exception | None = None

    def begin() -> bool:
        """The first that can; whether there was one."""
        for run in queue:
            needed = config.pretraining(run)
            if needed in weights:
                queue.remove(run)
                task = remote.options(num_gpus=0) if run.name in BASELINES else remote
                running[task.remote(config, run, weights[needed])] = run
                return True
            if needed not in running.values():
                assert needed is not None
                running[pretraining.remote(config, needed)] = needed
                return True
        return False

    while queue or running:
        while len(running) < (config.max_concurrent or _slots(config)) and begin():
            pass
        (done,), _ = ray.wait(list(running), num_returns=1)
        run = running.pop(done)
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        outcome = str(run)
        if isinstance(run, Pretraining):
            weights[run] = done
        try:
            ray.get(done)
        except Exception as error:
            # one line is enough for a user's mistake or a run that diverged; for the rest Ray's traceback helps
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
    return max(1, min(slots, int(there.get("GPU", 0))) if config.device == "cuda" else slots)


def train_and_score(config: BenchmarkConfig, run: Run, pretrained: tuple[dict[str, Tensor], float] | None) -> None:
    torch.set_num_threads(config.train.cpus_per_worker)
    histories, table = Histories.open(config.data.path), labels(locate(config.data.path), config.task).table
    own = Labelled.of(histories, table, config.split).allotted(config, run)
    state, pretraining_seconds = pretrained or (None, 0.0)
    started = time.monotonic()
    if run.name in BASELINES:
        choosing_logit_E, test_logit_E, parameters = _baseline(run, histories, own)
    else:
        choosing_logit_E, test_logit_E, parameters = _contender(config, run, histories, own, state)
    recalibrated = calibration.recalibrate(own.choosing.label_E, choosing_logit_E, own.choosing.weight_E)
    write_run(
        run,
        run_folder(config.run) / RUNS,
        own.test,
        expit(recalibrated(test_logit_E)),
        fitting=len(own.fitting),
        choosing=len(own.choosing),
        parameters=parameters,
        seconds=time.monotonic() - started,
        pretraining_seconds=pretraining_seconds,
    )


def _baseline(run: Run, histories: Histories, own: Allotment) -> tuple[np.ndarray, np.ndarray, None]:
    """Logits of the examples to choose by and of the test examples."""
    kind = next(name for name in BASELINES if name == run.name)
    spec = choose(histories, own.fitting, FeatureConfig())
    fitting, choosing, test = (features(histories, part, spec) for part in (own.fitting, own.choosing, own.test))
    model = boosting.fit(kind, fitting, choosing, run.seed)
    choosing_logit_E, test_logit_E = (calibration.logit(model.probability(part.value_EX)) for part in (choosing, test))
    return choosing_logit_E, test_logit_E, None


def _contender(
    config: BenchmarkConfig, run: Run, histories: Histories, own: Allotment, state: dict[str, Tensor] | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """As `_baseline`, and how many parameters the model has."""
    contender, vocabulary = config.contenders[run.name], read_vocabulary(config.data)
    start = Start(config.model_of(contender), config.data, vocabulary, state)
    trial = trial_of(config, contender, start, run.seed, own.fraction)
    fitting = own.fitting
    if trial.teacher_share:
        teacher_E = boosting.cross_fitted(histories, fitting, own.choosing, run.seed)
        fitting = taught(fitting, teacher_E, trial.teacher_share)
    chosen = device.choose(config.device, start.model)
    with tempfile.TemporaryDirectory() as folder, loop.single_process(chosen) as worker:
        kept = Kept(Path(folder), 1, "min")
        train_on(
            start,
            trial,
            histories,
            fitting,
            own.choosing,
            metric=CHOSEN_BY,
            worker=worker,
            report=kept.report,
            resume=None,
            telemetry=Telemetry(run_folder(config.run) / "tb" / run.stem, enabled=True),
        )
        best = _best_weights(kept)
    bundle = Bundle("risk", trial.model, trial.data, trial.tasks, vocabulary, best, in_days=trial.in_days)
    outputs = [predict(bundle, histories, examples, chosen)[0] for examples in (own.choosing, own.test)]
    choosing_logit_E, test_logit_E = (output.logit_ET[:, 0] for output in outputs)
    return choosing_logit_E, test_logit_E, sum(weight.numel() for weight in best.values())


def trial_of(config: BenchmarkConfig, contender: Contender, start: Start, seed: int, fraction: float) -> TrialConfig:
    """Few labels are soon learned: a fraction of them gets its root's share of the steps, with as many evaluations."""
    candidates = math.ceil(config.train.max_steps / config.train.eval_every)
    steps = max(1, round(fraction**0.5 * config.train.max_steps))
    train = dataclasses.replace(
        config.train,
        seed=seed,
        max_steps=steps,
        warmup_steps=min(round(fraction**0.5 * config.train.warmup_steps), steps - 1),
        eval_every=math.ceil(steps / candidates),
    )
    return trial_config([config.task], train, start, config.point_of(contender))


def pretrain(config: BenchmarkConfig, pretraining: Pretraining) -> tuple[dict[str, Tensor], float]:
    """The weights, and how long they took; trained once for all budgets and folds."""
    torch.set_num_threads(config.train.cpus_per_worker)
    path = run_folder(config.run) / PRETRAINED / f"{pretraining.name}-seed{pretraining.seed}.safetensors"
    if not path.with_suffix(".json").is_file():  # it comes last
        model = config.model_of(config.contenders[pretraining.name])
        train = dataclasses.replace(config.pretrain, seed=pretraining.seed)
        settings = PretrainConfig(config.data, model, config.objective, train, config.run, config.device)
        started = time.monotonic()
        chosen = device.choose(config.device, model)
        with tempfile.TemporaryDirectory() as folder, loop.single_process(chosen) as worker:
            job = pretraining_job(settings, worker)
            kept = Kept(Path(folder), 1, job.mode)
            telemetry = Telemetry(run_folder(config.run) / "tb" / f"{PRETRAINED}-{path.stem}", enabled=True)
            loop.train(job, settings.train, worker, report=kept.report, telemetry=telemetry, resume=None)
            state = _best_weights(kept)
        with atomic_path(path) as temporary:
            write_weights(state, temporary)
        write_text(json.dumps(time.monotonic() - started) + "\n", path.with_suffix(".json"))
    with local_copy(path) as copy:
        return read_weights(copy), json.loads(path.with_suffix(".json").read_text())


def _best_weights(kept: Kept) -> dict[str, Tensor]:
    folder, _ = kept.best_first()[0]
    return read_verified_weights(folder)
