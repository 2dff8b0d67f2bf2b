"""What a search chose: the best checkpoint as a bundle, recalibrated and scored once for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hymate.config import InTime, ReportConfig, TaskConfig, TrainConfig
from hymate.data.examples import Examples
from hymate.data.histories import Histories
from hymate.data.known import KnownConfig
from hymate.data.synthetic.source import ceiling
from hymate.data.tasks import LabelSet
from hymate.errors import UserError
from hymate.evaluation import alarms, baseline_fits, calibration, decisions, figures, metrics, results, survival
from hymate.inference.bundle import Bundle, build_model
from hymate.inference.dataset import spread_outputs
from hymate.inference.scoring import Outputs, write_incidences, write_predictions
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

    @property
    def is_compared(self) -> bool:
        """Whether boosting can be compared with a model: there are held-out labels of both classes."""
        return not self.config.in_time and len(np.unique(self.examples["held_out"].label_E > 0.5)) == 2


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
    described = trial.model, trial.data, start.vocabulary, state, trial.tasks, trial.in_days, known
    return Bundle("risk", *described, in_time=trial.in_time)


def judge_task(
    winner: Bundle,
    histories: Histories,
    task: LabelledTask,
    run_path: Location,
    settings: ReportConfig,
    train: TrainConfig,
    device: str,
    boosting: baseline_fits.Boosted | None = None,
) -> tuple[Bundle, dict[str, Any]]:
    """The model with the task's head recalibrated, and the task's part of results.json.

    boosting: where it was fitted before. With settings.ensemble the model is the mean of the network and plain models.
    Its predictions and its picture are in the run's folder.
    """
    if task.config.in_time:
        return winner, _judge_in_time(winner, histories, task, task.config.in_time, run_path, device)
    name, split, tuning = task.config.name, task.scored_split, task.examples["tuning"]

    def score(bundle: Bundle, examples: Examples) -> Outputs:
        return spread_outputs(bundle.for_task(name), histories, examples, device, run_path / SCORING)

    winner, recalibration, of_tuning = _recalibrated(winner, name, tuning, score(winner, tuning))
    scored = task.examples[split]
    network = model = _Outputs(of_tuning, score(winner, scored), recalibration)
    of_boosting, parts = None, {}
    if boosting is None and task.is_compared:
        boosting, of_boosting = _boosted(histories, task, run_path, settings, train.seed)
    if settings.ensemble and boosting is not None:
        assert boosting.plain is not None
        winner, model, plain = _averaged(winner, task, network, boosting.plain)
        parts = {"network": network} | ({"plain": plain} if boosting.plain.models.linear else {})
    outputs, recalibration = model.scored, model.recalibration
    write_predictions(scored, outputs, run_path / results.predictions_file(name, winner.tasks))
    tuning_probability_E, probability_E = model.probabilities
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
        areas = metrics.areas(tuning.label_E[at], network.probabilities[0][at], tuning.subject_id_E[at], weight_N)
        errors = {name: np.ptp(area["ci"]) / (2 * 1.96) for name, area in areas.items() if area["ci"]}
        part["compared_on"] = {"labels": len(at), "of": len(tuning), "standard_error": errors}
    part["boosting"], part["picture"] = of_boosting, None
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
            others = {key: of_part.probabilities for key, of_part in parts.items()}
            part |= {key: _of_part(of_part, scored, probability_E) for key, of_part in parts.items()}
            if boosting and boosting.plain and "plain" in parts:
                part["plain"]["linear_fraction"] = boosting.plain.models.config.linear_weight
            if boosting is not None:
                others["boosting"] = boosting.probability["tuning"], boosting.probability["held_out"]
                part["boosting"] = boosting.compared(probability_E)
            part["picture"] = f"{name}.png"
            others_N = {key: probability for key, (_, probability) in others.items()}
            figures.plot_task(run_path / part["picture"], label_E, probability_E, weight_E, part, others_N)
            if task.config.utility is not None:
                named = {results.OTHERS[key]: probabilities for key, probabilities in others.items()}
                models = {"model": (tuning_probability_E, probability_E), **named}
                part["alarms"] = alarms.assess(task.config.utility, tuning, scored, models)
                part["alarms_picture"] = f"{name}-alarms.png"
                figures.plot_alarms(run_path / part["alarms_picture"], part["alarms"])
    if (best := ceiling(histories.path, name, split)) is not None:
        part["ceiling"] = best
    return winner, part


@dataclass(frozen=True)
class _Outputs:
    """A model's outputs of a task's tuning and scored examples, recalibrated on the former, and what that took."""

    tuning: Outputs
    scored: Outputs
    recalibration: calibration.Recalibration

    @property
    def probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        return self.tuning.probability_ET[:, 0], self.scored.probability_ET[:, 0]


def _judge_in_time(
    winner: Bundle, histories: Histories, task: LabelledTask, asked: InTime, run_path: Location, device: str
) -> dict[str, Any]:
    """A task in time's part of results.json; its hazards stay as they were learned."""
    name, scored = task.config.name, task.examples[task.scored_split]
    outputs = spread_outputs(winner.for_task(name), histories, scored, device, run_path / SCORING)
    write_incidences(scored, outputs, asked, name, run_path / results.predictions_file(name, winner.tasks))
    seen = scored.days_E, scored.label_E, outputs.incidences({name: asked}, name), asked.horizons_days
    scores = survival.scores(*seen, scored.subject_id_E, scored.weight_E)
    part = results.of_task(task.config, scores, task.labels, task.examples, task.scored_split)
    part |= {"boosting": None, "picture": f"{name}.png"}
    figures.plot_in_time(run_path / part["picture"], part)
    return part


def _recalibrated(
    winner: Bundle, task: str, tuning: Examples, outputs: Outputs
) -> tuple[Bundle, calibration.Recalibration, Outputs]:
    """The model with probabilities that fit the tuning split best, what that took, and its outputs there."""
    recalibration = calibration.recalibrate(tuning.label_E, outputs.logit_ET[:, 0], tuning.weight_E)
    fitting = dataclasses.replace(outputs, logit_ET=recalibration(outputs.logit_ET).astype(np.float32))
    model = build_model(winner)
    model.recalibrate(task, recalibration.temperature, recalibration.shift)
    return dataclasses.replace(winner, state=model.state_dict()), recalibration, fitting


def _boosted(
    histories: Histories, task: LabelledTask, run_path: Location, settings: ReportConfig, seed: int
) -> tuple[baseline_fits.Boosted | None, dict[str, Any] | None]:
    """Gradient boosting of the task; or None, and why it is left out: what it is compared with has cost hours."""
    if not settings.boosting:
        return None, {"left_out": "report.boosting=false"}
    print(f"fitting gradient boosting for {task.config.name} to compare; report.boosting=false skips it", flush=True)
    folder = run_path / baseline_fits.FEATURES
    try:
        return baseline_fits.boosted(histories, task.examples, seed, folder, plain=settings.ensemble), None
    except (UserError, MemoryError) as error:
        alone = "; so the model is the network alone, in spite of report.ensemble=true" if settings.ensemble else ""
        return None, {"left_out": f"{error}{alone}"}


def _averaged(
    winner: Bundle, task: LabelledTask, network: _Outputs, plain: baseline_fits.Plain
) -> tuple[Bundle, _Outputs, _Outputs]:
    """The model with the task's plain models beside it, the mean's outputs, and those of the plain models alone.

    Both logits are recalibrated, weigh the same, and their mean is recalibrated: it is more timid than either.
    """
    tuning = task.examples["tuning"]

    def recalibrated(logits: Mapping[str, np.ndarray]) -> _Outputs:
        fitted = calibration.recalibrate(tuning.label_E, logits["tuning"], tuning.weight_E)
        tuned, scored = (
            dataclasses.replace(outputs, logit_ET=fitted(logits[split]).astype(np.float32)[:, None])
            for split, outputs in (("tuning", network.tuning), ("held_out", network.scored))
        )
        return _Outputs(tuned, scored, fitted)

    alone = recalibrated(plain.logit)
    means = {
        split: (of_network.logit_ET[:, 0].astype(np.float64) + alone.recalibration(plain.logit[split])) / 2
        for split, of_network in (("tuning", network.tuning), ("held_out", network.scored))
    }
    mean = recalibrated(means)
    half, own = 0.5 / mean.recalibration.temperature, plain.models.config
    scale = half / alone.recalibration.temperature
    config = dataclasses.replace(
        own,
        network_weight=half,
        boosting_weight=scale * own.boosting_weight,
        linear_weight=scale * own.linear_weight,
        shift=scale * own.shift + half * alone.recalibration.shift + mean.recalibration.shift,
    )
    beside = {**winner.plain, task.config.name: dataclasses.replace(plain.models, config=config)}
    return dataclasses.replace(winner, plain=beside), mean, alone


def _of_part(model: _Outputs, scored: Examples, mean_E: np.ndarray) -> dict[str, Any]:
    """The held-out scores of a part of the mean, and as "difference" the mean's AUROC and AUPRC less its own."""
    own_E, recalibration = model.probabilities[1], model.recalibration
    scores = metrics.scores(scored.label_E, own_E, scored.subject_id_E, scored.weight_E)
    return {name: scores[name] for name in metrics.SHOWN} | {
        "difference": baseline_fits.difference(scored, mean_E, own_E),
        "recalibration": recalibration.record(scored.label_E, recalibration.undo(own_E), scored.weight_E),
    }
