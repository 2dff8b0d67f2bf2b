"""What a search chose: the best checkpoint as a bundle, recalibrated and scored once for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hymate.config import ReportConfig, TaskConfig, TrainConfig
from hymate.data.examples import Examples
from hymate.data.histories import Histories
from hymate.data.known import KnownConfig
from hymate.data.synthetic.source import ceiling
from hymate.data.tasks import LabelSet
from hymate.errors import UserError
from hymate.evaluation import alarms, baseline_models, calibration, decisions, figures, metrics, results
from hymate.inference.bundle import Bundle, build_model
from hymate.inference.dataset import spread_outputs
from hymate.inference.scoring import Outputs, write_predictions
from hymate.storage.paths import Location
from hymate.training import checkpoint
from hymate.tuning.trial import TrialConfig

SCORING = "scoring"  # in the run's folder while the best model is scored


@dataclass(frozen=True)
class LabelledTask:
    """A task with its labels, the examples of each split that they make, and the groups of the held-out ones.

    There may be no held-out examples: then the tuning split is scored.
    """

    config: TaskConfig
    labels: LabelSet
    examples: Mapping[str, Examples]
    held_out_groups: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def scored_split(self) -> str:
        return "held_out" if len(self.examples["held_out"]) else "tuning"


def best_of(ends: Sequence[results.TrialEnd], metric: str, run_path: Location) -> results.TrialEnd:
    """The trial with the best checkpoint. Raises UserError where every trial failed."""
    scored = [end for end in ends if end.status != "failed" and end.checkpoint is not None]
    if not scored:
        raise UserError(
            f"all {len(ends)} trials failed, the first with {ends[0].error} "
            f"(tracebacks: {run_path}/trials/trial-*/error.txt); if training diverged, lower the learning rates of "
            "search.space and choose another run.name; otherwise the same command tries again"
        )
    return max(scored, key=lambda end: end.best[metric])


def bundle_of(start: Bundle, trial: TrialConfig, best: results.TrialEnd, known: KnownConfig) -> Bundle:
    """The best checkpoint, not yet recalibrated; known: the rules of the dataset that it was trained on."""
    assert best.checkpoint is not None
    state = checkpoint.read_verified_weights(best.checkpoint)
    return Bundle("risk", trial.model, trial.data, start.vocabulary, state, trial.tasks, trial.in_days, known)


def judge_task(
    winner: Bundle,
    histories: Histories,
    task: LabelledTask,
    run_path: Location,
    settings: ReportConfig,
    train: TrainConfig,
    device: str,
) -> tuple[Bundle, dict[str, Any]]:
    """The model with the task's head recalibrated, and the task's part of results.json.

    Its predictions and its picture are in the run's folder.
    """
    name, split, tuning = task.config.name, task.scored_split, task.examples["tuning"]

    def score(bundle: Bundle, examples: Examples) -> Outputs:
        return spread_outputs(bundle.for_task(name), histories, examples, device, run_path / SCORING)

    outputs = score(winner, tuning)
    winner, recalibration, tuning_probability_E = _recalibrated(winner, name, tuning, outputs)
    scored = task.examples[split]
    outputs = score(winner, scored)
    write_predictions(scored, outputs, run_path / results.predictions_file(name, winner.tasks))
    probability_E = outputs.probability_ET[:, 0]
    label_E, subject_id_E, weight_E = scored.label_E, scored.subject_id_E, scored.weight_E
    scores = metrics.scores(label_E, probability_E, subject_id_E, weight_E)
    if name in winner.in_days:
        timed_E = ~np.isnan(scored.days_E)
        days_N, predicted_N = scored.days_E[timed_E], outputs.days_ET[timed_E, 0]
        scores["days"] = metrics.day_scores(days_N, predicted_N, subject_id_E[timed_E], weight_E[timed_E])
    part = results.of_task(task.config, scores, task.labels, task.examples, split)
    part["recalibration"] = recalibration.record(label_E, recalibration.undo(probability_E), weight_E)
    drawn_E = tuning.sample_weights(train.eval_labels, train.seed)
    if (at := np.flatnonzero(drawn_E)).size < len(tuning):
        weight_N = (tuning.weight_E * drawn_E)[at]
        areas = metrics.areas(tuning.label_E[at], tuning_probability_E[at], tuning.subject_id_E[at], weight_N)
        errors = {name: np.ptp(area["ci"]) / (2 * 1.96) for name, area in areas.items() if area["ci"]}
        part["compared_on"] = {"labels": len(at), "of": len(tuning), "standard_error": errors}
    part["boosting"], part["picture"] = None, None
    if split == "held_out":
        part |= decisions.assess(
            label_E,
            probability_E,
            subject_id_E,
            task.held_out_groups,
            decisions.thresholds(tuning.label_E, tuning_probability_E, tuning.weight_E),
            weight_E,
        )
        if scores["auroc"]["value"] is not None:
            part["boosting"], boosting = {"left_out": "report.boosting=false"}, None
            if settings.boosting:
                print(f"fitting gradient boosting for {name} to compare; report.boosting=false skips it", flush=True)
                part["boosting"], boosting = baseline_models.compare(
                    histories, task.examples, probability_E, train.seed, run_path / baseline_models.FEATURES
                )
            part["picture"] = f"{name}.png"
            boosting_E = None if boosting is None else boosting["held_out"]
            figures.plot_task(run_path / part["picture"], label_E, probability_E, weight_E, part, boosting_E)
            if task.config.utility is not None:
                models = {"model": (tuning_probability_E, probability_E)}
                if boosting is not None:
                    models["gradient boosting"] = boosting["tuning"], boosting["held_out"]
                part["alarms"] = alarms.assess(task.config.utility, tuning, scored, models)
                part["alarms_picture"] = f"{name}-alarms.png"
                figures.plot_alarms(run_path / part["alarms_picture"], part["alarms"])
    if (best := ceiling(histories.path, name, split)) is not None:
        part["ceiling"] = best
    return winner, part


def _recalibrated(
    winner: Bundle, task: str, tuning: Examples, outputs: Outputs
) -> tuple[Bundle, calibration.Recalibration, np.ndarray]:
    """The model with probabilities that fit the tuning split best, what that took, and these probabilities."""
    recalibration = calibration.recalibrate(tuning.label_E, outputs.logit_ET[:, 0], tuning.weight_E)
    fitting = dataclasses.replace(outputs, logit_ET=recalibration(outputs.logit_ET).astype(np.float32))
    model = build_model(winner)
    model.recalibrate(task, recalibration.temperature, recalibration.shift)
    return dataclasses.replace(winner, state=model.state_dict()), recalibration, fitting.probability_ET[:, 0]
