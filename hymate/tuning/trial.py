"""One fine-tuning trial: a pretrained backbone (or none), a new head for each task, trained and scored; no Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml

from hymate.config import DataConfig, InTime, ModelConfig, SearchConfig, TaskConfig, TrainConfig
from hymate.data.examples import Examples
from hymate.data.histories import Histories
from hymate.data.loader import Rows
from hymate.data.tasks import LabelSet
from hymate.data.vocabulary import Vocabulary
from hymate.device import Wanted
from hymate.errors import ConfigError, UserError
from hymate.evaluation import metrics, survival
from hymate.inference import scoring
from hymate.inference.bundle import Bundle
from hymate.inference.initial import initial_bundle, require_same_model
from hymate.model.encoder import RiskModel, decay_groups, load_pretrained
from hymate.storage.paths import Location
from hymate.training import loop
from hymate.trees import build, to_tree
from hymate.tuning import space


@dataclass(frozen=True)
class TrialConfig:
    """One point of the search space.

    in_days: those of the tasks that also predict days.
    in_time: those of the tasks that predict when, in their order.
    frozen: the backbone keeps its pretrained weights; pooling and heads alone are trained.
    early_fraction: fraction of the training examples that are shown as they were earlier (`Rows`).
    teacher_fraction: fraction of each training label that is replaced by the teacher's probability.
    """

    tasks: list[str]
    in_days: list[str]
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    backbone_lr: float
    head_lr: float
    frozen: bool = False
    early_fraction: float = 0.0
    teacher_fraction: float = 0.0
    in_time: dict[str, InTime] = dataclasses.field(default_factory=dict)

    @property
    def description(self) -> str:
        """For TensorBoard."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


@dataclass(frozen=True)
class Study:
    """Shared by all trials, in one copy for the processes of a host.

    training, tuning: the examples of all tasks, found once for all trials.
    metric: one of `tuning_scores`. device: where each trial computes.
    teacher_ET: the teacher's probability of each training example (`baseline_fits.cross_fitted`), NaN where
        a task has no label, or is in time; None where no trial learns from it: knowledge distillation (Hinton et al.
        2015).
    """

    start: Bundle
    training: Examples
    tuning: Examples
    metric: str
    trials: list[TrialConfig]
    run_path: Location
    teacher_ET: np.ndarray | None = None
    device: Wanted = "cpu"

    def examples(self, trial: TrialConfig) -> tuple[Examples, Examples]:
        """Those that a trial trains on, and those that it tunes on."""
        if not trial.teacher_fraction:
            return self.training, self.tuning
        assert self.teacher_ET is not None
        return distilled(self.training, self.teacher_ET, trial.teacher_fraction), self.tuning


def starting_point(data: DataConfig, model: ModelConfig | None, init: str | None) -> Bundle:
    """The model, vocabulary and rare-code rule of every trial, and where `init` names a bundle its weights.

    With a bundle, `model` may be left out, or may differ from the bundle's in OPEN_SETTINGS. With `init` None there
    are no weights: trials train from scratch.
    """
    if init is None:
        if model is None:
            raise ConfigError("init=null trains from scratch and needs a model: add model=small (or another size)")
        vocabulary = Vocabulary.of(Histories.open(data.path), data.min_count)
        return Bundle("pretrained", model, data, vocabulary, state={})
    bundle = initial_bundle(init)
    require_same_model(bundle, model or bundle.model)
    data = dataclasses.replace(data, min_count=bundle.data.min_count)
    return dataclasses.replace(bundle, model=model or bundle.model, data=data)


def draw_trials(
    tasks: Sequence[TaskConfig], search: SearchConfig, train: TrainConfig, start: Bundle
) -> list[TrialConfig]:
    """All trials. Raises ConfigError where the search space has an impossible value."""
    tried = space.for_model(search.space, start.model.pooling)
    if "pooling" in search.space.keys() - tried.keys():
        print(
            f"The trials keep the paper's pooling, {start.model.pooling}; search.space.pooling=NAME changes it",
            flush=True,
        )
    points = space.draw(tried, search.num_trials, train.seed)
    return [trial_config(tasks, train, start, point) for point in points]


def trial_config(
    tasks: Sequence[TaskConfig],
    train: TrainConfig,
    start: Bundle,
    point: Mapping[str, Any],
    where: str = "search.space",
) -> TrialConfig:
    """The trial at a point of the space at the key `where`; what it leaves out comes from the other sections.

    Raises ConfigError where a value is impossible.
    """
    rates = {"backbone_lr": train.learning_rate, "head_lr": train.learning_rate}
    settings = {**rates, "frozen": False, "early_fraction": 0.0, "teacher_fraction": 0.0, **point}
    if not start.state:
        settings["frozen"] = False  # nothing pretrained to keep
    space.check_point(settings, where)
    require_time_is_learned(start, settings["frozen"], where)

    def replaced(section: Any, *names: str) -> Any:
        tree = {**to_tree(section), **{name: settings[name] for name in names if name in settings}}
        return build(type(section), tree, f"{where}: ")

    in_time = {task.name: task.in_time for task in tasks if task.in_time is not None}
    for name, refused in (("early_fraction", bool(in_time)), ("teacher_fraction", len(in_time) == len(tasks))):
        if refused and settings[name]:
            raise ConfigError(
                f"{where}.{name}: task {next(iter(in_time))} is in time, which this can't do: set it to 0"
            )
    return TrialConfig(
        tasks=[task.name for task in tasks],
        in_days=[task.name for task in tasks if task.longer_than_days is not None],
        data=replaced(start.data, "context"),
        model=replaced(start.model, "dropout", "pooling"),
        train=replaced(train, "weight_decay"),
        backbone_lr=float(settings["backbone_lr"]),
        head_lr=float(settings["head_lr"]),
        frozen=settings["frozen"],
        early_fraction=float(settings["early_fraction"]),
        teacher_fraction=float(settings["teacher_fraction"]),
        in_time=in_time,
    )


def require_starts(task: TaskConfig, label_set: LabelSet, key: str) -> None:
    """Raises UserError that names the setting `key` where labels have no start, which earlier views need."""
    if "start" not in label_set.table.column_names:
        raise UserError(
            f"{key}: the labels of {task.name} have no start, so an earlier view may have another label: set it "
            "to 0, or task.start to the trigger or a predicate of task.definition, or give each label a "
            "start (<stem>.extra.pq beside <stem>.parquet)"
        )


def risk_model(start: Bundle, trial: TrialConfig) -> RiskModel:
    """The trial's model: new weights from the run's seed, then the pretrained ones over them, where they fit."""
    torch.manual_seed(trial.train.seed)
    model = RiskModel(trial.model, start.vocabulary.size, trial.tasks, trial.in_days, trial.in_time)
    if start.state:
        load_pretrained(model, start.state)
    model.backbone.requires_grad_(not trial.frozen)
    return model


def require_time_is_learned(start: Bundle, frozen: bool, where: str) -> None:
    """Raises ConfigError where the scan is newly aware of time and part of a frozen encoder: its weights for time would
    stay at 0. where: the key of `frozen`'s section.
    """
    learned = not start.state or any(name.endswith(".time_weight") for name in start.state)
    if frozen and start.model.time_aware_scan and "M" in start.model.layers and not learned:
        raise ConfigError(
            f"{where}.frozen: model.time_aware_scan is new to the pretrained encoder, which learns nothing of time "
            f"where it is frozen: give {where}.frozen=false"
        )


def parameter_groups(model: RiskModel, trial: TrialConfig) -> list[dict[str, Any]]:
    """AdamW groups: the backbone at its learning rate, pooling and heads at theirs."""
    groups = []
    for part, lr in ((model.backbone, trial.backbone_lr), (model.pooling, trial.head_lr), (model.heads, trial.head_lr)):
        groups += [{**group, "lr": lr} for group in decay_groups(part, trial.train.weight_decay)]
    return groups


def distilled(examples: Examples, teacher_ET: np.ndarray, fraction: float) -> Examples:
    """With this fraction of each label replaced by the teacher's probability, where there is one."""
    own_ET = examples.label_ET
    label_ET = np.where(np.isnan(teacher_ET), own_ET, (1 - fraction) * own_ET + fraction * teacher_ET)
    return dataclasses.replace(examples, label_ET=label_ET.astype(np.float32))


def labelled_rows(start: Bundle, trial: TrialConfig, histories: Histories, examples: Examples) -> Rows:
    own = dataclasses.replace(start, model=trial.model, data=trial.data)
    return scoring.last_rows(own, histories, examples, trial.train.seed, trial.early_fraction)


def tuning_scores(
    examples: Examples, outputs: scoring.Outputs, tasks: Sequence[str], in_time: Mapping[str, InTime] | None = None
) -> dict[str, float]:
    """What a checkpoint is chosen by: AUROC, AUPRC, concordance where a task has days, and their mean; the
    cross-entropy is for the record. Of several tasks the mean of each, and each task's own as "<task>/auroc".

    Days count by their concordance, not by their error: like AUROC it is the chance that a pair is ranked rightly, so
    that the mean is one of like quantities. Of a task in time AUROC is the mean of the dynamic ones by each horizon,
    and the only score; the integrated Brier score is for the record.
    """
    in_time = in_time or {}
    by_task = {
        task: _scores_in_time(examples, number, outputs.incidences(in_time, task)[:, 0], in_time[task])
        if task in in_time
        else _task_scores(examples, outputs, number)
        for number, task in enumerate(tasks)
    }
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


def _scores_in_time(examples: Examples, task: int, risk_EH: np.ndarray, asked: InTime) -> dict[str, float]:
    at = ~np.isnan(examples.label_ET[:, task])
    days_N, cause_N, weight_N = (x[at, task] for x in (examples.days_ET, examples.label_ET, examples.weight_ET))
    known = days_N, cause_N, risk_EH[at], asked.horizons_days, weight_N
    # a sample of the tuning split may have nobody with the event by the first horizon
    areas = [area for area in survival.dynamic_auroc(*known) if area is not None]
    assert areas, "the tuning split has the event and who did not have it"
    brier = survival.integrated_brier(survival.briers(*known), asked.horizons_days)
    scores = {"auroc": float(np.mean(areas)), "mean": float(np.mean(areas))}
    return scores if brier is None else {**scores, "brier": brier}


def trial_job(
    start: Bundle,
    trial: TrialConfig,
    histories: Histories,
    training: Examples,
    tuning: Examples,
    metric: str,
    worker: loop.Worker,
) -> loop.Job:
    """Train on the one, evaluate on `train.eval_labels` of the other examples; metric: one of `tuning_scores`."""
    tuning = tuning.sampled(trial.train.eval_labels, trial.train.seed)
    tuning_rows = labelled_rows(start, trial, histories, tuning)

    def evaluate(model: Any) -> dict[str, float]:
        outputs = scoring.score(model, tuning_rows, worker.device, worker.rank, worker.world_size)
        return tuning_scores(tuning, outputs, trial.tasks, trial.in_time)

    model = risk_model(start, trial)
    model.learn_times(torch.from_numpy(training.label_ET), torch.from_numpy(training.days_ET))
    return loop.Job(
        module=model,
        groups=parameter_groups(model, trial),
        rows=labelled_rows(start, trial, histories, training),
        evaluate=evaluate,
        metric=metric,
        mode="min" if metric == "loss" else "max",
    )
