"""The trials of a fine-tuning search under Ray Tune: ASHA, one process a trial, progress lines, restarts."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler

from hymate.config import SearchConfig, TrainConfig
from hymate.storage import Location, remove_tree
from hymate.telemetry import PROGRESS, Telemetry, read_progress
from hymate.training import checkpoint, engine
from hymate.training.attempt import Attempt
from hymate.training.finetune import Study, TrialConfig, run_trial
from hymate.training.launch import ray_storage
from hymate.training.results import Outcome, Status
from hymate.training.resume import newest_whole

# Tune's record of the search is written about once a second and names each trial's latest checkpoint: with fewer
# checkpoints kept, or faster reports, a killed search can find one that is already deleted
KEPT_CHECKPOINTS = 3
TRIALS = "trials"
SETTINGS = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # we name the loggers we want
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end the search early and go on to the held-out split
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # we do
    "RAY_AIR_NEW_OUTPUT": "0",  # its reporter prints even when told to be silent
}
SCORES = ("step", "mean", "auroc", "auprc", "concordance", "loss")
SECONDS_BETWEEN_REPORTS = 1.0
SECONDS_BETWEEN_LINES = 15.0


def run_trials(study: Study, search: SearchConfig, train: TrainConfig, attempt: Attempt) -> list[Outcome]:
    """All trials of the study, as many at once as the machine or cluster holds, or what a killed search left of them.

    Ray must be running.
    """
    os.environ.update(SETTINGS)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it repeats that a trial failed, not why
    folder = study.run_path / TRIALS
    resources = {"cpu": train.cpus_per_worker, "gpu": int(train.use_gpu)}
    trainable = tune.with_resources(tune.with_parameters(_trial, study=study, attempt=attempt), resources)
    if any(folder.glob("experiment_state-*.json")):
        where = ray_storage(folder)
        tuner = tune.Tuner.restore(
            where["storage_path"],
            trainable,
            resume_unfinished=True,
            restart_errored=True,
            storage_filesystem=where.get("storage_filesystem"),
        )
    else:
        remove_tree(folder)  # killed before the first record
        tuner = _tuner(study, search, train, trainable)
    grid = tuner.fit()
    return sorted((_outcome(result, study) for result in grid), key=lambda outcome: outcome.index)


def _tuner(study: Study, search: SearchConfig, train: TrainConfig, trainable: Any) -> tune.Tuner:
    asha = ASHAScheduler(
        time_attr="step",
        max_t=train.max_steps,
        grace_period=min(search.grace_steps, train.max_steps),
        reduction_factor=search.reduction_factor,
    )
    return tune.Tuner(
        trainable,
        param_space={"index": tune.grid_search(list(range(len(study.trials))))},
        tune_config=tune.TuneConfig(
            metric=study.metric,
            mode="max",
            scheduler=asha,
            max_concurrent_trials=search.max_concurrent or None,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=TRIALS,
            **ray_storage(study.run_path),
            verbose=0,
            callbacks=[JsonLoggerCallback(), Progress(study.metric, study.run_path)],
            failure_config=tune.FailureConfig(max_failures=search.max_failures),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=max(KEPT_CHECKPOINTS, train.keep),
                checkpoint_score_attribute=study.metric,
                checkpoint_score_order="max",
            ),
        ),
    )


def _trial_name(trial: Trial) -> str:
    return f"trial-{trial.config['index']}"


def _trial(parameters: dict[str, Any], study: Study, attempt: Attempt) -> None:
    """One trial, in a process of its own."""
    trial = study.trials[parameters["index"]]
    name = f"trial-{parameters['index']}"
    torch.set_num_threads(trial.train.cpus_per_worker)
    last_report = -math.inf

    def report(scores: dict[str, float], folder: Path) -> None:
        nonlocal last_report
        time.sleep(max(0.0, last_report + SECONDS_BETWEEN_REPORTS - time.monotonic()))
        last_report = time.monotonic()
        try:
            attempt.check()  # the checkpoint would get another one's name
            tune.report(scores, checkpoint=tune.Checkpoint.from_directory(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    telemetry = Telemetry(study.run_path / "tb" / name, enabled=True)
    with (
        engine.single_process(trial.train.use_gpu) as worker,
        newest_whole(tune.get_checkpoint(), worker, telemetry) as resume,
    ):
        run_trial(
            study,
            trial,
            worker=worker,
            report=report,
            resume=resume,
            telemetry=telemetry,
        )


def _outcome(result: tune.Result, study: Study) -> Outcome:
    index = result.config["index"]
    folder = study.run_path / TRIALS / f"trial-{index}"
    kept = sorted(result.best_checkpoints, key=lambda scored: scored[1][study.metric], reverse=True)
    best = checkpoint.first_whole((folder / Path(candidate.path).name, scores) for candidate, scores in kept)
    step = (result.metrics or {}).get("step")
    ended: Status = "finished" if step == study.trials[index].train.max_steps else "stopped early"
    return Outcome(
        index=index,
        parameters=_parameters(study.trials[index]),
        status=ended if result.error is None else "failed",
        step=step,
        best={key: value for key, value in best.metrics.items() if key.rsplit("/")[-1] in SCORES} if best else {},
        checkpoint=best.folder if best else None,
        error=None if result.error is None else _cause(str(result.error)),
    )


def _parameters(trial: TrialConfig) -> dict[str, Any]:
    return {
        "backbone_lr": trial.backbone_lr,
        "head_lr": trial.head_lr,
        "dropout": trial.model.dropout,
        "frozen": trial.frozen,
        "context": trial.data.context,
        "pooling": trial.model.pooling,
        "weight_decay": trial.train.weight_decay,
        "early_share": trial.early_share,
        "teacher_share": trial.teacher_share,
    }


def _cause(traceback: str) -> str:
    """The last line of a remote traceback, which names the exception."""
    return next((line.strip() for line in reversed(traceback.splitlines()) if line.strip()), "unknown cause")


class Progress(tune.Callback):
    """A line on the console at each evaluation and at least every few seconds."""

    def __init__(self, metric: str, run_path: Location) -> None:
        self.metric, self.run_path = metric, run_path
        self.started = self.printed = time.monotonic()
        self.line = ""
        self.told: set[str] = set()

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any) -> None:
        """A trial was evaluated."""
        self._print(trials)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        print(f"{_trial_name(trial)} failed: {_cause(Path(trial.error_file).read_text())}", flush=True)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial ended well."""
        self._print(trials)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tune's own heartbeat."""
        if time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self._print(trials)

    def _print(self, trials: list[Trial]) -> None:
        line = self._describe(trials)
        if line != self.line:
            minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
            print(f"{minutes}:{seconds:02d}  {line}", flush=True)
        self.line, self.printed = line, time.monotonic()

    def _describe(self, trials: list[Trial]) -> str:
        counts = {"done": Trial.TERMINATED, "running": Trial.RUNNING, "failed": Trial.ERROR, "waiting": Trial.PENDING}
        parts = ["trials " + ", ".join(f"{sum(t.status == s for t in trials)} {n}" for n, s in counts.items())]
        scored = [(t.metric_analysis[self.metric]["max"], t) for t in trials if self.metric in t.metric_analysis]
        if scored:
            best, trial = max(scored, key=lambda pair: pair[0])
            parts.append(f"best {self.metric} {best:.4f} ({_trial_name(trial)})")
        running = [t for t in trials if t.status == Trial.RUNNING]
        if running:
            parts.append(", ".join(self._where(trial) for trial in running))
        return "  |  ".join(parts)

    def _where(self, trial: Trial) -> str:
        state = read_progress(self.run_path / "tb" / _trial_name(trial) / PROGRESS)
        if not state:
            return f"{_trial_name(trial)} starting"
        for note in state.get("notes", []):
            if note not in self.told:
                print(f"{_trial_name(trial)}: {note}", flush=True)
                self.told.add(note)
        return f"{_trial_name(trial)} step {state['step']}/{state['max_steps']}"
