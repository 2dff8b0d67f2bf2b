"""The trials of a fine-tuning search under Ray Tune: ASHA, a trial's workers, progress lines, restarts."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler

from hymate import cluster, machine
from hymate.config import ModelConfig, SearchConfig, TrainConfig
from hymate.data.histories import Histories
from hymate.device import choose, obstacle
from hymate.errors import UserError
from hymate.evaluation.results import Status, TrialEnd
from hymate.runs import Run
from hymate.storage.paths import Location, remove_tree, require_room, write_text
from hymate.training import checkpoint, loop
from hymate.training.keeper import Kept, Sender, newest_whole
from hymate.training.ray_train import ray_storage
from hymate.training.telemetry import PROGRESS, Telemetry, read_progress
from hymate.tuning import space
from hymate.tuning.trial import Study, TrialConfig, trial_job

TRIALS, TUNE, ENDED, TRACEBACK = "trials", "tune", "ended", "error.txt"
SETTINGS = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own record of the search, pickles among it, is of no use to us
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end the search early and go on to the held-out split
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # we do
    "RAY_AIR_NEW_OUTPUT": "0",  # its reporter prints even when it should be silent
}
SILENCED = (
    "ray.tune.tune",  # it repeats that a trial failed, not why
    "ray.tune.execution.experiment_state",  # prints a traceback for Tune's own record where the disk is full
)
SCORES = ("step", "mean", "auroc", "auprc", "concordance", "brier", "loss")
SECONDS_BETWEEN_LINES = 10.0


def run_trials(study: Study, search: SearchConfig, train: TrainConfig, run: Run) -> list[TrialEnd]:
    """All trials of the study, as many at once as the machine or cluster holds, or what a killed search left of them.

    Tune starts trials and stops them, and knows nothing of a killed search: each trial continues from its own
    checkpoints and reports again what it had reported, so that the scheduler sees what it had seen before.
    Ray must be running.
    """
    os.environ.update(SETTINGS)
    for name in SILENCED:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    remove_tree(study.run_path / TUNE)
    try:
        grid = _tuner(study, search, train, run).fit()
    except Exception:
        require_room(study.run_path)  # on a full disk Tune ends in one error or another
        raise
    finally:
        if not run.superseded():
            remove_tree(study.run_path / TUNE)
    return sorted((_trial_end(result, study) for result in grid), key=lambda end: end.index)


def _tuner(study: Study, search: SearchConfig, train: TrainConfig, run: Run) -> tune.Tuner:
    asha = ASHAScheduler(
        time_attr="step",
        max_t=train.max_steps,
        grace_period=min(search.grace_steps, train.max_steps),
        reduction_factor=search.reduction_factor,
    )
    worker = {"CPU": train.cpus_per_worker, "GPU": int(study.device == "cuda")}
    trial = tune.with_parameters(_trial, shared=[ray.put(study)], run=run)  # in a list it stays where it was put
    return tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory([worker] * train.num_workers)),
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
            name=TUNE,
            **ray_storage(study.run_path),
            verbose=0,
            callbacks=[Progress(study.metric, study.run_path, run, partial(cluster.hindrance, train, study.device))],
            failure_config=tune.FailureConfig(max_failures=search.max_failures),
        ),
    )


def _trial_name(trial: Trial) -> str:
    return f"trial-{trial.config['index']}"


def _trial(parameters: dict[str, Any], shared: list[ray.ObjectRef], run: Run) -> None:
    """One trial, whose first worker is this process. One that diverges returns, as Tune would try again what ends the
    same way.

    shared: the study, once for all processes of a host.
    """
    study: Study = ray.get(shared[0])
    index, run_path = parameters["index"], study.run_path
    failed = run_path / TRIALS / f"trial-{index}" / TRACEBACK
    run.check()
    failed.unlink(missing_ok=True)
    settings, model = study.trials[index].train, study.trials[index].model
    try:
        with machine.own_temporary_files():
            device = _device(study, model)
            if settings.num_workers > 1:
                from hymate.training.meeting import run_together

                run_together(_work, (shared[0], index, run), settings.num_workers, device)
            else:
                with loop.single_process(device) as worker:
                    _work(worker, study, index, run)
    except (loop.Unrecoverable, FloatingPointError):
        run.check()
        write_text(traceback.format_exc(), failed)


def _device(study: Study, model: ModelConfig) -> torch.device:
    try:
        return choose(study.device, model)  # this may be another machine than the driver's
    except UserError as error:
        raise loop.Unrecoverable(str(error)) from error


def _work(worker: loop.Worker, study: Study, index: int, run: Run) -> None:
    """What each worker of a trial runs; the first one is heard by Tune."""
    trial = study.trials[index]
    name = f"trial-{index}"
    torch.set_num_threads(trial.train.cpus_per_worker)
    first, kept, ended = worker.rank == 0, _kept(study, index), study.run_path / TRIALS / name / ENDED
    sender = Sender(kept, worker, run.check)

    def report(scores: dict[str, float], folder: Path) -> None:
        """The others wait for the first, and so for Tune, at their next step."""
        sender.report(scores, folder)
        sender.wait()
        if first:
            tune.report(scores)

    telemetry = Telemetry(study.run_path / "tb" / name, enabled=first)
    with newest_whole(kept, worker, telemetry) as (resume, damages):
        if resume is None:
            if first:
                ended.unlink(missing_ok=True)
            if damages:
                telemetry.note(f"{damages[0]}; no checkpoint is whole, the trial begins again")
        else:
            if first:
                for scores in checkpoint.read_state(resume)["evaluations"]:
                    tune.report(scores)
            if loop.anyone(first and ended.is_file(), worker):
                return
        reason = obstacle(trial.model) if worker.device.type == "cuda" else None
        if loop.anyone(reason is not None, worker):
            raise loop.Unrecoverable(f"device=cuda: {reason or 'another worker cannot use its GPU'}")
        histories = Histories.open(trial.data.path)
        job = trial_job(study.start, trial, histories, *study.examples(trial), study.metric, worker)
        settings, text = trial.train, trial.description
        loop.train(job, settings, worker, report=report, telemetry=telemetry, resume=resume, description=text)
    if first:
        write_text("", ended)


def _kept(study: Study, index: int) -> Kept:
    return Kept(study.run_path / TRIALS / f"trial-{index}", study.trials[index].train.keep)


def _trial_end(result: tune.Result, study: Study) -> TrialEnd:
    index = result.config["index"]
    kept = _kept(study, index)
    best, step = checkpoint.first_whole(kept.best_first()), kept.last_step()
    ended: Status = "finished" if step == study.trials[index].train.max_steps else "stopped early"
    failed = study.run_path / TRIALS / f"trial-{index}" / TRACEBACK
    error = str(result.error or "") or (failed.read_text() if failed.is_file() else None)
    return TrialEnd(
        index=index,
        parameters=_parameters(study.trials[index]),
        status=ended if error is None else "failed",
        step=step,
        best={key: value for key, value in best.metrics.items() if key.rsplit("/")[-1] in SCORES} if best else {},
        checkpoint=best.folder if best else None,
        error=None if error is None else _recorded(_cause(error)),
    )


def _parameters(trial: TrialConfig) -> dict[str, Any]:
    """The point of the search space."""
    settings = vars(trial.data) | vars(trial.model) | vars(trial.train) | vars(trial)
    return {name: settings[name] for name in space.PARAMETERS}


def _cause(traceback: str) -> str:
    """The last line of a remote traceback, which names the exception."""
    return next((line.strip() for line in reversed(traceback.splitlines()) if line.strip()), "unknown cause")


def _recorded(cause: str) -> str:
    """Without the names of hosts, which are for the console."""
    kind = cause.partition(": ")[0]
    return kind if kind.endswith(loop.NotTogether.__name__) else cause


class Progress(tune.Callback):
    """A line on the console at each evaluation, and every few seconds where something has changed."""

    def __init__(
        self, metric: str, run_path: Location, run: Run, hindrance: Callable[[], str | None] = lambda: None
    ) -> None:
        """hindrance: says what keeps trials from going on, where it knows; asked while nothing changes."""
        self.metric, self.run_path, self.run, self.hindrance = metric, run_path, run, hindrance
        self.started = self.printed = time.monotonic()
        self.line = ""
        self.news: str | None = None
        self.shown: set[str] = set()
        self.failed: set[str] = set()

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict, **info: Any) -> None:
        """A trial was evaluated; "done" says that the scheduler has stopped it."""
        if result.get("done"):
            self._note(trial, ENDED, "")
        self._print(trials)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        text = Path(trial.error_file).read_text()
        self._note(trial, TRACEBACK, text)
        self._fail(trial, text)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial ended well, or has diverged."""
        diverged = self.run_path / TRIALS / _trial_name(trial) / TRACEBACK
        if diverged.is_file():
            self._fail(trial, diverged.read_text())
        self._print(trials)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tune's own heartbeat."""
        if time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self._print(trials)

    def _fail(self, trial: Trial, text: str) -> None:
        self.failed.add(_trial_name(trial))
        print(f"{_trial_name(trial)} failed: {_cause(text)}", flush=True)

    def _note(self, trial: Trial, name: str, text: str) -> None:
        """Where the disk is full the trials say so; without this file nothing is lost but some time."""
        with suppress(OSError, UserError):
            self.run.check()
            write_text(text, self.run_path / TRIALS / _trial_name(trial) / name)

    def _print(self, trials: list[Trial]) -> None:
        line = self._describe(trials)
        news = line if line != self.line else self.hindrance()
        if news and news != self.news:
            minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
            print(f"{minutes}:{seconds:02d}  {news}", flush=True)
        self.line, self.news, self.printed = line, news, time.monotonic()

    def _describe(self, trials: list[Trial]) -> str:
        named = {Trial.TERMINATED: "done", Trial.RUNNING: "running", Trial.PENDING: "waiting"}
        states = ["failed" if _trial_name(trial) in self.failed else named.get(trial.status) for trial in trials]
        counts = (f"{states.count(state)} {state}" for state in ("done", "running", "failed", "waiting"))
        parts = ["trials " + ", ".join(counts)]
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
            if note not in self.shown:
                print(f"{_trial_name(trial)}: {note}", flush=True)
                self.shown.add(note)
        return f"{_trial_name(trial)} step {state['step']}/{state['max_steps']}"
