"""One fine-tuning trial: a pretrained backbone (or none), a new head for each task, trained and scored; no Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from torch import Tensor

from hymate.config import DataConfig, ModelConfig, TrainConfig
from hymate.data.examples import Examples, labelled_examples, united
from hymate.data.histories import Histories
from hymate.data.known import KnownConfig
from hymate.data.loader import Rows
from hymate.data.vocabulary import Vocabulary
from hymate.device import Wanted
from hymate.errors import ConfigError
from hymate.evaluation import metrics
from hymate.inference import scoring
from hymate.inference.bundle import read_bundle
from hymate.model.encoder import RiskModel, decay_groups, load_pretrained
from hymate.storage.paths import Location, locate
from hymate.training import loop
from hymate.training.telemetry import Telemetry

# model settings that a pretrained backbone leaves open: they change no shape of it and not what it computes
OPEN_SETTINGS = ("dropout", "pooling", "num_queries", "members", "chunk_size")


@dataclass(frozen=True)
class Start:
    """What every trial starts from; state is None when training from scratch, else fingerprint, extra and known (when
    events become known) are the bundle's.
    """

    model: ModelConfig
    data: DataConfig
    vocabulary: Vocabulary
    state: Mapping[str, Tensor] | None
    fingerprint: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    known: KnownConfig | None = None


@dataclass(frozen=True)
class TrialConfig:
    """One point of the search space.

    in_days: those of the tasks that also predict days.
    frozen: the backbone keeps its pretrained weights; pooling and heads alone are trained.
    early_share: share of the training examples that are shown as they were earlier (`Rows`).
    teacher_share: of a training label, how much of it is not what happened but what a teacher says (`Study.teacher`).
    """

    tasks: list[str]
    in_days: list[str]
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    backbone_lr: float
    head_lr: float
    frozen: bool = False
    early_share: float = 0.0
    teacher_share: float = 0.0


@dataclass(frozen=True)
class Study:
    """Shared by all trials; labels: a table for each task; metric: one of `tuning_scores`; device: where
    each trial computes.

    teacher: for each task a probability of each of its training examples (`boosting.cross_fitted`), where a trial
    learns from it, too: knowledge distillation (Hinton et al. 2015).
    """

    start: Start
    labels: list[pa.Table]
    metric: str
    trials: list[TrialConfig]
    run_path: Location
    teacher: list[np.ndarray] = dataclasses.field(default_factory=list)
    device: Wanted = "cpu"


def starting_point(data: DataConfig, model: ModelConfig | None, init: str | None) -> Start:
    """The bundle's model, vocabulary and rare-code rule, or with `init` None the configuration's own.

    With a bundle, `model` may be left out, or may differ from the bundle's in OPEN_SETTINGS.
    """
    if init is None:
        if model is None:
            raise ConfigError("init=null trains from scratch and needs a model: add model=small (or another size)")
        vocabulary = Vocabulary.read(locate(data.path) / "histories" / "vocabulary.parquet", data.min_count)
        return Start(model, data, vocabulary, None)
    bundle = read_bundle(locate(init))
    for field in dataclasses.fields(ModelConfig):
        own = getattr(bundle.model, field.name)
        given = own if model is None else getattr(model, field.name)
        if given != own and field.name not in OPEN_SETTINGS:
            raise ConfigError(
                f"model.{field.name}={given} does not fit the bundle, which has {own}: leave model out, or init=null"
            )
    data = dataclasses.replace(data, min_count=bundle.data.min_count)
    own = bundle.vocabulary, bundle.state, bundle.fingerprint, bundle.extra, bundle.known
    return Start(model or bundle.model, data, *own)


def risk_model(start: Start, trial: TrialConfig) -> RiskModel:
    """The trial's model: new weights from the run's seed, then the pretrained ones over them, where they fit."""
    torch.manual_seed(trial.train.seed)
    model = RiskModel(trial.model, start.vocabulary.size, trial.tasks, trial.in_days)
    if start.state is not None:
        load_pretrained(model, start.state)
    model.backbone.requires_grad_(not trial.frozen)
    return model


def parameter_groups(model: RiskModel, trial: TrialConfig) -> list[dict[str, Any]]:
    """AdamW groups: the backbone at its learning rate, pooling and heads at theirs."""
    groups = []
    for part, lr in ((model.backbone, trial.backbone_lr), (model.pooling, trial.head_lr), (model.heads, trial.head_lr)):
        groups += [{**group, "lr": lr} for group in decay_groups(part, trial.train.weight_decay)]
    return groups


def taught(examples: Examples, probability_E: np.ndarray, share: float) -> Examples:
    """With labels that are what happened and, for a share of them, what a teacher says."""
    label_E = (1 - share) * examples.label_E + share * probability_E
    return dataclasses.replace(examples, label_ET=label_E[:, None].astype(np.float32))


def labelled_rows(start: Start, trial: TrialConfig, histories: Histories, examples: Examples) -> Rows:
    """The last events up to each prediction time."""
    return Rows(
        histories,
        start.vocabulary,
        examples,
        context=trial.data.context,
        tokens_per_row=trial.data.tokens_per_row,
        seed=trial.train.seed,
        crop="last",
        early_share=trial.early_share,
    )


def tuning_scores(examples: Examples, outputs: scoring.Outputs, tasks: Sequence[str]) -> dict[str, float]:
    """What a checkpoint is chosen by: AUROC, AUPRC, concordance where a task has days, and their mean; the
    cross-entropy is for the record. Of several tasks the mean of each, and each task's own as "<task>/auroc".

    Days count by their concordance, not by their error: like AUROC it is the chance that a pair is ranked rightly, so
    that the mean is one of like quantities.
    """
    by_task = {task: _task_scores(examples, outputs, number) for number, task in enumerate(tasks)}
    names = dict.fromkeys(name for scores in by_task.values() for name in scores)
    overall = {name: float(np.mean([scores[name] for scores in by_task.values() if name in scores])) for name in names}
    if len(tasks) > 1:
        overall |= {f"{task}/{name}": value for task, scores in by_task.items() for name, value in scores.items()}
    return overall


def _task_scores(examples: Examples, outputs: scoring.Outputs, task: int) -> dict[str, float]:
    label_E, days_E = examples.label_ET[:, task], examples.days_ET[:, task]
    at, timed = ~np.isnan(label_E), ~np.isnan(days_E)
    weight_E = examples.weight_ET[:, task]
    label_N, logit_N, weight_N = label_E[at], outputs.logit_ET[at, task], weight_E[at]
    scores = {"auroc": metrics.auroc(label_N, logit_N, weight_N), "auprc": metrics.auprc(label_N, logit_N, weight_N)}
    if timed.any():
        predicted_N = outputs.log_days_ET[timed, task]
        scores["concordance"] = metrics.concordance(days_E[timed], predicted_N, weight_E[timed])
    known = {name: value for name, value in scores.items() if value is not None}
    assert known.keys() == scores.keys(), "the tuning split has both classes and several lengths"
    loss_N = np.logaddexp(0.0, np.where(label_N > 0.5, -logit_N, logit_N))
    loss = float(np.average(loss_N, weights=weight_N))
    return {**known, "mean": sum(known.values()) / len(known), "loss": loss}


def run_trial(
    study: Study,
    trial: TrialConfig,
    *,
    worker: loop.Worker,
    report: loop.Report,
    resume: Path | None,
    telemetry: Telemetry,
) -> None:
    """Train one trial to its end, or until the caller's `report` stops it."""
    histories = Histories.open(trial.data.path)
    parts, tuning_parts = (
        [labelled_examples(histories, table, split) for table in study.labels] for split in ("train", "tuning")
    )
    if trial.teacher_share:
        parts = [taught(part, told_E, trial.teacher_share) for part, told_E in zip(parts, study.teacher, strict=True)]
    train_on(
        study.start,
        trial,
        histories,
        united(parts),
        united(tuning_parts),
        metric=study.metric,
        worker=worker,
        report=report,
        resume=resume,
        telemetry=telemetry,
    )


def train_on(
    start: Start,
    trial: TrialConfig,
    histories: Histories,
    training: Examples,
    tuning: Examples,
    *,
    metric: str,
    worker: loop.Worker,
    report: loop.Report,
    resume: Path | None,
    telemetry: Telemetry,
) -> None:
    """Train on the one, evaluate on the other examples; metric: one of `tuning_scores`."""
    tuning_rows = labelled_rows(start, trial, histories, tuning)

    def evaluate(model: Any) -> dict[str, float]:
        return tuning_scores(tuning, scoring.score(model, tuning_rows, worker.device), trial.tasks)

    model = risk_model(start, trial)
    job = loop.Job(
        module=model,
        groups=parameter_groups(model, trial),
        rows=labelled_rows(start, trial, histories, training),
        evaluate=evaluate,
        score=metric,
        mode="min" if metric == "loss" else "max",
    )
    description = yaml.safe_dump(dataclasses.asdict(trial), sort_keys=False)
    loop.train(
        job,
        trial.train,
        worker,
        report=report,
        telemetry=telemetry,
        resume=resume,
        description=description,
    )
