"""The benchmark: contenders trained on the same labels with several seeds, and scored on the same patients.

Gradient boosting and logistic regression (`hymate.evaluation.baseline_fits`), encoders from scratch, HyMaTE from
scratch and pretrained, and the paper's model. They are scored by cross-validation over the train and tuning patients,
or on the held-out ones. A budget counts every patient whose labels a run sees: most are fitted to, the others choose
among the run's candidates and recalibrate it, by the same rule for everyone.

Each (contender, budget, seed, fold) is one call that leaves its predictions in the run's folder; what is there already
is not run again. `hymate.tuning.protocol` says who has which labels, `hymate.tuning.comparison` compares.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from hymate import cluster, device
from hymate.cluster import RemoteCall
from hymate.data.examples import note_dropped
from hymate.data.features import FeatureConfig
from hymate.data.histories import Histories
from hymate.data.tasks import read_or_extract_labels
from hymate.errors import ConfigError
from hymate.evaluation import baseline_fits, calibration
from hymate.evaluation.baseline_models import Kind
from hymate.inference.bundle import Bundle, read_weights, write_weights
from hymate.inference.initial import check_codes, initial_bundle, require_same_model
from hymate.inference.scoring import predict
from hymate.runs import ELSEWHERE, check_same_run, claimed, run_folder
from hymate.storage.paths import Location, atomic_path, local_copy, locate, require_folder, write_text
from hymate.training import loop
from hymate.training.checkpoint import read_verified_weights
from hymate.training.keeper import Kept
from hymate.training.pretraining import PretrainConfig, pretraining_job
from hymate.training.telemetry import Telemetry
from hymate.tuning import comparison
from hymate.tuning.protocol import (
    BASELINES,
    HELD_OUT,
    PLAIN,
    REFERENCE,
    Allotment,
    BenchmarkConfig,
    Contender,
    ContenderRun,
    Labelled,
    runs_of,
)
from hymate.tuning.trial import (
    TrialConfig,
    distilled,
    require_starts,
    require_time_is_learned,
    starting_point,
    trial_config,
    trial_job,
)

CHOSEN_BY = "loss"  # cross-entropy, as in hymate.evaluation.baseline_models: AUROC and AUPRC of few positives jump
PRETRAINED = "pretrained"  # folder in the benchmark's
CHANGEABLE = ELSEWHERE | {"split", "seeds", "budgets", "with_few_labels", "ensemble", "only", "max_concurrent"}


def benchmark(config: BenchmarkConfig) -> Location:
    """Run what is not there yet, then compare all; returns the run's folder."""
    path, runs = run_folder(config.run), runs_of(config)
    if not runs:
        raise ConfigError("only: nothing is left to run; with several budgets, all but the largest run with_few_labels")
    require_folder(path, "run.dir")
    models = [config.model_of(name) for name in {run.name for run in runs} - {*BASELINES}]
    config = device.decide(config, *models, cluster_gpus=cluster.available_gpus(config.train))
    histories = Histories.open(config.data.path)
    label_set = read_or_extract_labels(locate(config.data.path), config.task)
    if any(config.point_of(contender).get("early_fraction") for contender in config.contenders.values()):
        require_starts(config.task, label_set, "point.early_fraction")
    there = Labelled.of(histories, label_set.table, config.split)
    for run in {(run.budget, run.seed, run.fold): run for run in runs}.values():
        there.allotted(config, run).check(config, run)
    left_out = note_dropped(config.task, [there.development, *([there.held_out] if there.held_out else [])])
    inputs = histories.inputs | {"task.labels": label_set.digest()}
    if config.init is not None:
        inputs["init"] = _check_init(config, config.init, histories)
    check_same_run(path, config, inputs, CHANGEABLE)
    with claimed(path, "benchmark", config, inputs) as claim:
        claim.found["left_out"] = left_out
        calls = _calls(config, [run for run in runs if not run.results_path(comparison.folder_of(config)).is_file()])
        if calls:
            with cluster.ray_session(config.train.cpus_per_worker, device=config.device):
                cluster.run_calls(calls, config.train.cpus_per_worker, config.max_concurrent)
        found = comparison.write(config)
        if config.split == HELD_OUT:
            claim.found["looks"] = len(found["looks"])
    comparison.show(found)
    print(f"report: {path / config.split}.md, picture: {path / config.split}.png")
    return path


def _check_init(config: BenchmarkConfig, init: str, histories: Histories) -> str:
    """The digest of the bundle that the pretrained contenders start from. Raises UserError where one can't."""
    bundle = initial_bundle(init)
    for name, contender in config.contenders.items():
        if contender.pretrained and name in (config.only or config.names):
            model = config.model_of(name)
            require_same_model(bundle, model)
            frozen = config.point_of(contender).get("frozen", False)
            require_time_is_learned(dataclasses.replace(bundle, model=model), frozen, f"contenders.{name}.point")
    check_codes(bundle, init, histories)
    return bundle.fingerprint


def _calls(config: BenchmarkConfig, waiting: Sequence[ContenderRun]) -> list[RemoteCall]:
    """The runs, each after the pretraining that it needs."""
    gpu = config.device == "cuda"
    calls: dict[str, RemoteCall] = {}
    for run in waiting:
        needs, pretrained = None, config.pretraining(run)
        if pretrained is not None and config.init is None:
            needs = f"pretraining of {pretrained}, seed {run.seed}"
            calls.setdefault(needs, RemoteCall(needs, pretrain, (config, pretrained, run.seed), gpu))
        calls[str(run)] = RemoteCall(str(run), train_and_score, (config, run), gpu and run.name not in BASELINES, needs)
    return list(calls.values())


def train_and_score(
    config: BenchmarkConfig, run: ContenderRun, pretrained: tuple[dict[str, Tensor], float] | None = None
) -> None:
    """One run's training, recalibration and predictions; pretrained: what `pretrain` returned."""
    torch.set_num_threads(config.train.cpus_per_worker)
    histories = Histories.open(config.data.path)
    table = read_or_extract_labels(locate(config.data.path), config.task).table
    own = Labelled.of(histories, table, config.split).allotted(config, run)
    state, pretraining_seconds = pretrained or (None, 0.0)
    started = time.monotonic()
    if run.name in BASELINES:
        choosing_logit_E, test_logit_E, parameters = _baseline(config, run, histories, own)
    else:
        choosing_logit_E, test_logit_E, parameters = _contender(config, run, histories, own, state)
    recalibrated = calibration.recalibrate(own.choosing.label_E, choosing_logit_E, own.choosing.weight_E)
    comparison.write_run(
        run,
        comparison.folder_of(config),
        own.test,
        expit(recalibrated(test_logit_E)),
        fitting=len(own.fitting),
        choosing=len(own.choosing),
        parameters=parameters,
        seconds=time.monotonic() - started,
        pretraining_seconds=pretraining_seconds,
    )


def _baseline(
    config: BenchmarkConfig, run: ContenderRun, histories: Histories, own: Allotment
) -> tuple[np.ndarray, np.ndarray, None]:
    """Logits of the examples to choose by and of the test examples."""
    kind = cast(Kind, REFERENCE if run.name == PLAIN else run.name)
    asked = {"train": own.fitting, "tuning": own.choosing, "test": own.test}
    given = kind, histories, asked, FeatureConfig(), run.seed, _features_folder(config, run)
    fitted = baseline_fits.fitted_to(*given, here=True, plain=run.name == PLAIN)
    if fitted.plain is not None:
        return fitted.plain.logit["tuning"], fitted.plain.logit["test"], None
    choosing_logit_E, test_logit_E = (calibration.logit(fitted.probability[part]) for part in ("tuning", "test"))
    return choosing_logit_E, test_logit_E, None


def _features_folder(config: BenchmarkConfig, run: ContenderRun) -> Location:
    """For the features of boosting, as a baseline or as a teacher, while they are needed."""
    return run_folder(config.run) / baseline_fits.FEATURES / run.stem


def _contender(
    config: BenchmarkConfig, run: ContenderRun, histories: Histories, own: Allotment, state: dict[str, Tensor] | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """As `_baseline`, and how many parameters the model has."""
    contender = config.contenders[run.name]
    init = config.init if contender.pretrained else None
    start = starting_point(config.data, config.model_of(run.name), init)
    if state is not None:
        start = dataclasses.replace(start, state=state)
    trial = trial_of(config, contender, start, run.seed, own.fraction)
    fitting = own.fitting
    if trial.teacher_fraction:
        folder = _features_folder(config, run)
        teacher_E = baseline_fits.cross_fitted(histories, fitting, own.choosing, run.seed, folder, here=True)
        fitting = distilled(fitting, teacher_E[:, None], trial.teacher_fraction)
    chosen = device.choose(config.device, start.model)
    telemetry = Telemetry(run_folder(config.run) / "tb" / run.stem, enabled=True)

    def train(worker: loop.Worker, report: loop.Report) -> None:
        job = trial_job(start, trial, histories, fitting, own.choosing, CHOSEN_BY, worker)
        settings, text = trial.train, trial.description
        loop.train(job, settings, worker, report=report, telemetry=telemetry, resume=None, description=text)

    best = _best_weights(chosen, train)
    bundle = Bundle("risk", trial.model, trial.data, start.vocabulary, best, trial.tasks, trial.in_days)
    outputs = [predict(bundle, histories, examples, chosen) for examples in (own.choosing, own.test)]
    choosing_logit_E, test_logit_E = (output.logit_ET[:, 0] for output in outputs)
    return choosing_logit_E, test_logit_E, sum(weight.numel() for weight in best.values())


def trial_of(config: BenchmarkConfig, contender: Contender, start: Bundle, seed: int, fraction: float) -> TrialConfig:
    """Few labels are soon learned: a fraction of them gets the root of it of the steps, with as many evaluations."""
    candidates = math.ceil(config.train.max_steps / config.train.eval_every)
    steps = max(1, round(fraction**0.5 * config.train.max_steps))
    train = dataclasses.replace(
        config.train,
        seed=seed,
        max_steps=steps,
        warmup_steps=min(round(fraction**0.5 * config.train.warmup_steps), steps - 1),
        eval_every=math.ceil(steps / candidates),
    )
    return trial_config([config.task], train, start, config.point_of(contender), "point")


def pretrain(config: BenchmarkConfig, name: str, seed: int) -> tuple[dict[str, Tensor], float]:
    """A contender's weights and the seconds that they took; trained once for all budgets and folds."""
    torch.set_num_threads(config.train.cpus_per_worker)
    path = run_folder(config.run) / PRETRAINED / f"{name}-seed{seed}.safetensors"
    if not path.with_suffix(".json").is_file():  # it comes last
        model, own = config.model_of(name), dataclasses.replace(config.pretrain, seed=seed)
        settings = PretrainConfig(config.data, model, config.objective, own, config.run, device=config.device)
        started = time.monotonic()
        chosen = device.choose(config.device, model)
        telemetry = Telemetry(run_folder(config.run) / "tb" / f"{PRETRAINED}-{path.stem}", enabled=True)

        def train(worker: loop.Worker, report: loop.Report) -> None:
            job = pretraining_job(settings, worker)
            loop.train(job, settings.train, worker, report=report, telemetry=telemetry, resume=None)

        state = _best_weights(chosen, train)
        with atomic_path(path) as temporary:
            write_weights(state, temporary)
        write_text(json.dumps(time.monotonic() - started) + "\n", path.with_suffix(".json"))
    with local_copy(path) as copy:
        return read_weights(copy), json.loads(path.with_suffix(".json").read_text())


def _best_weights(chosen: torch.device, train: Callable[[loop.Worker, loop.Report], None]) -> dict[str, Tensor]:
    """Train in this process; the weights with the least loss."""
    with tempfile.TemporaryDirectory() as folder, loop.single_process(chosen) as worker:
        kept = Kept(Path(folder), 1, "min")
        train(worker, kept.report)
        return read_verified_weights(kept.best_first()[0][0])
