"""The fine-tuning search: Ray Tune over trials, the best of all their checkpoints, one look at the held-out split."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hymate import cluster
from hymate.config import DataConfig, ModelConfig, Place, ReportConfig, RunConfig, SearchConfig, TaskConfig, TrainConfig
from hymate.data.examples import Examples, labelled_examples, require_both_classes
from hymate.data.histories import Histories
from hymate.data.known import differing, sentences
from hymate.data.meds import SPLITS
from hymate.data.synthetic.source import ceiling
from hymate.data.tasks import LabelSet, labels
from hymate.device import CPU, Wanted, choose, decide
from hymate.errors import ConfigError, UserError
from hymate.evaluation import calibration, decisions, figures, metrics, report, results
from hymate.evaluation.boosting import compare, cross_fitted
from hymate.evaluation.results import Outcome
from hymate.evaluation.subgroups import subgroups
from hymate.inference.bundle import Bundle, build_model, write_bundle
from hymate.inference.provenance import SENTENCES, Seen, provenance, seen
from hymate.inference.scoring import predict, write_predictions
from hymate.runs import absolute, check_same_run, claimed, run_folder
from hymate.storage.paths import Location, filling, locate, require_folder, write_text
from hymate.training import checkpoint
from hymate.trees import build, to_tree
from hymate.tuning import space
from hymate.tuning.trial import Start, Study, TrialConfig, starting_point

# keys that a search may change when it is continued: they move it to other machines or spare these what is too large
CHANGEABLE = {
    "data.path",
    "device",
    "run.dir",
    "search.max_concurrent",
    "train.cpus_per_worker",
    "report.boosting",
}


@dataclass(frozen=True)
class TuneConfig:
    """`finetune/tune.py`'s configuration.

    task: one task, or several by their names: one model with a head for each.
    init: run folder or bundle of a pretrained model; null trains from scratch.
    model: needed when init is null; with init it may be left out.
    device: "auto" takes a GPU for each trial where all is there that the model needs, else CPUs; or "cpu", "cuda".
    """

    data: DataConfig
    train: TrainConfig
    task: TaskConfig | dict[str, TaskConfig]
    search: SearchConfig
    run: RunConfig
    init: Place | None
    model: ModelConfig | None = None
    report: ReportConfig = field(default_factory=ReportConfig)
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        if self.train.num_workers != 1:
            raise ConfigError(
                f"train.num_workers={self.train.num_workers}: a trial trains on one worker and trials run side by "
                "side; leave it at 1 (train.cpus_per_worker gives a trial more CPUs)"
            )
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ConfigError(f"task: {', '.join(names)} must have different names")
        space.check(self.search.space)

    @property
    def tasks(self) -> list[TaskConfig]:
        return list(self.task.values()) if isinstance(self.task, dict) else [self.task]


@dataclass(frozen=True)
class LabelledTask:
    """A task with its labels, the examples of each split that they make, and whose the held-out ones are.

    There may be no held-out examples: then the search does all but score them.
    """

    config: TaskConfig
    labels: LabelSet
    examples: Mapping[str, Examples]
    held_out_groups: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def scored_split(self) -> str:
        return "held_out" if len(self.examples["held_out"]) else "tuning"


# ------------------------------------------------------------------------------------------------------- search


def search(config: TuneConfig) -> Location:
    """Search, keep the best model, score it on the held-out split once; returns the run's folder.

    The same command continues a search that was killed, and shows the results of one that is finished.
    """
    config = absolute(config)
    run_path = run_folder(config.run)
    finished, cluster_gpus = results.read(run_path), None
    if finished is None:
        require_folder(run_path, "run.dir")
        cluster_gpus = cluster.check(config.train)
    histories = Histories.open(config.data.path)
    start = starting_point(config.data, config.model, config.init)
    if finished is None:
        config = decide(config, start.model, cluster_gpus=cluster_gpus)
    tried = space.for_model(config.search.space, start.model.pooling)
    if "pooling" in config.search.space.keys() - tried.keys():
        print(
            f"The trials keep the paper's pooling, {start.model.pooling}; search.space.pooling=NAME changes it",
            flush=True,
        )
    points = space.draw(tried, config.search.num_trials, config.train.seed)
    trials = [trial_config(config.tasks, config.train, start, point) for point in points]
    labelled = [_labelled(task, config, histories) for task in config.tasks]
    if any(trial.early_share for trial in trials):
        for task in labelled:
            require_starts(task.config, task.labels, "search.space.early_share")
    inputs = {"data.path": histories.fingerprint, "init": start.fingerprint}
    for task in labelled:
        key = f"task.{task.config.name}" if isinstance(config.task, dict) else "task"
        inputs[f"{key}.labels"] = task.labels.digest()
    check_same_run(run_path, config, inputs, CHANGEABLE)
    for sentence in _other_rules(start, histories):
        print(f"warning: {sentence}", flush=True)
    if finished is not None:
        report.show(finished, run_path)
        return run_path
    initial_weights: Seen = "new" if start.state is None else seen(start.extra, histories)
    if initial_weights not in ("new", "same split"):
        print(f"Note: {SENTENCES[initial_weights]}", flush=True)
    tables = [task.labels.table for task in labelled]
    with claimed(run_path, "tune", config, inputs) as run:
        taught = any(trial.teacher_share for trial in trials)
        teacher = [_teacher(task, config, histories) for task in labelled] if taught else []
        study = Study(start, tables, config.search.metric, trials, run_path, teacher, config.device)
        with cluster.ray_session(config.train, config.device):
            from hymate.tuning.ray_tune import run_trials  # late: Ray takes its settings when it is imported

            outcomes = run_trials(study, config.search, config.train, run)
        best = _best(outcomes, config.search.metric, run_path)
        winner = _winner(start, trials[best.index], best)
        known = sentences(histories.known, histories.known_events) + _other_rules(start, histories)
        found = _score_winner(config, winner, initial_weights, histories, labelled, outcomes, best, known)
        _write_hyperparameters(run_path, trials, outcomes)
        write_text(report.report(found), run_path / report.REPORT)
        results.write(found, run_path)
        run.found[f"best_{config.search.metric}"] = best.best[config.search.metric]
        run.found.update(step=best.best["step"], trial=best.index, bundle=found["bundle"])
    report.show(found, run_path)
    return run_path


def _labelled(task: TaskConfig, config: TuneConfig, histories: Histories) -> LabelledTask:
    label_set = labels(locate(config.data.path), task)
    examples = {
        split: labelled_examples(histories, label_set.table, split, required=split != "held_out") for split in SPLITS
    }
    # trials learn from the one and are compared on the other
    require_both_classes(task, {split: examples[split] for split in ("train", "tuning")})
    groups = {}
    if len(examples["held_out"]):
        groups = subgroups(histories, examples["held_out"], config.report.subgroups, config.report.age_bands)
    else:
        print(f"{task.name} has no held-out labels: scores will be of the tuning split", flush=True)
    return LabelledTask(task, label_set, examples, groups)


def require_starts(task: TaskConfig, label_set: LabelSet, key: str) -> None:
    """Raises UserError that names the setting `key` where labels have no start, which earlier views need."""
    if "start" not in label_set.table.column_names:
        raise UserError(
            f"{key}: the labels of {task.name} have no start, so an earlier view may have another label: set it "
            "to 0, or task.start to the trigger or a predicate of task.definition, or give each label a "
            "start (<stem>.extra.pq beside <stem>.parquet)"
        )


def _other_rules(start: Start, histories: Histories) -> list[str]:
    """A warning where the pretrained model's histories held events at other times than the dataset's."""
    codes = differing(start.known or histories.known, histories.known, histories.codes)
    if not codes:
        return []
    return [
        f"in pretraining the events of {len(codes)} codes became known at other times ({codes[0]!r} for one): "
        "fine-tuning and the new bundle go by this dataset's rules"
    ]


def _teacher(task: LabelledTask, config: TuneConfig, histories: Histories) -> np.ndarray:
    name, examples = task.config.name, task.examples
    print(f"fitting gradient boosting for {name} to learn from; search.space.teacher_share=0 leaves it out", flush=True)
    try:
        return cross_fitted(histories, examples["train"], examples["tuning"], config.train.seed)
    except (UserError, MemoryError) as error:
        raise UserError(
            f"search.space.teacher_share: no gradient boosting for {name} ({error}); set it to 0"
        ) from error


def trial_config(
    tasks: Sequence[TaskConfig], train: TrainConfig, start: Start, point: Mapping[str, Any]
) -> TrialConfig:
    """The trial at a point of the space; what the point leaves out comes from the other sections.

    Raises ConfigError where a value is impossible.
    """
    rates = {"backbone_lr": train.learning_rate, "head_lr": train.learning_rate}
    settings = {**rates, "frozen": False, "early_share": 0.0, "teacher_share": 0.0, **point}
    if start.state is None:
        settings["frozen"] = False  # nothing pretrained to keep
    space.check_point(settings)

    def replaced(section: Any, *names: str) -> Any:
        tree = {**to_tree(section), **{name: settings[name] for name in names if name in settings}}
        return build(type(section), tree, "search.space: ")

    return TrialConfig(
        tasks=[task.name for task in tasks],
        in_days=[task.name for task in tasks if task.longer_than_days is not None],
        data=replaced(start.data, "context"),
        model=replaced(start.model, "dropout", "pooling"),
        train=replaced(train, "weight_decay"),
        backbone_lr=float(settings["backbone_lr"]),
        head_lr=float(settings["head_lr"]),
        frozen=settings["frozen"],
        early_share=float(settings["early_share"]),
        teacher_share=float(settings["teacher_share"]),
    )


# ------------------------------------------------------------------------------------------------------- winner


def _best(outcomes: list[Outcome], metric: str, run_path: Location) -> Outcome:
    """The trial with the best checkpoint. Raises UserError where every trial failed."""
    scored = [outcome for outcome in outcomes if outcome.status != "failed" and outcome.checkpoint is not None]
    if not scored:
        raise UserError(
            f"all {len(outcomes)} trials failed, the first with {outcomes[0].error} "
            f"(tracebacks: {run_path}/trials/trial-*/error.txt); where they diverged lower the learning rates of "
            "search.space under another run.name, else the same command tries them again"
        )
    return max(scored, key=lambda outcome: outcome.best[metric])


def _winner(start: Start, trial: TrialConfig, best: Outcome) -> Bundle:
    assert best.checkpoint is not None
    state = checkpoint.read_verified_weights(best.checkpoint)
    in_days = trial.in_days
    return Bundle("risk", trial.model, trial.data, trial.tasks, start.vocabulary, state, in_days=in_days)


def _calibrated(
    winner: Bundle, histories: Histories, task: str, tuning: Examples, device: torch.device
) -> tuple[Bundle, calibration.Recalibration, np.ndarray]:
    """The model whose probabilities fit the task's tuning split best, what was changed, and its probabilities there."""
    outputs, _ = predict(winner.for_task(task), histories, tuning, device)
    recalibration = calibration.recalibrate(tuning.label_E, outputs.logit_ET[:, 0], tuning.weight_E)
    outputs.logit_ET[:, 0] = recalibration(outputs.logit_ET[:, 0])
    model = build_model(winner)
    model.recalibrate(task, recalibration.temperature, recalibration.shift)
    return dataclasses.replace(winner, state=model.state_dict()), recalibration, outputs.probability_ET[:, 0]


def _score_winner(
    config: TuneConfig,
    winner: Bundle,
    initial_weights: Seen,
    histories: Histories,
    labelled: list[LabelledTask],
    outcomes: list[Outcome],
    best: Outcome,
    known: list[str],
) -> dict[str, Any]:
    """Predictions, pictures and bundle into the run's folder, and the content of results.json.

    known: sentences on when events become known.
    """
    run_path, parts = run_folder(config.run), []
    device = CPU
    if config.device == "cuda":  # the trials ran on a cluster's GPUs, say, and the driver's machine may have none
        device = choose("auto", winner.model)
        if device == CPU:
            print("this machine cannot use a GPU: the best model is scored on its CPU", flush=True)
    for task in labelled:
        winner, part = _score_task(config, winner, histories, task, device)
        parts.append(part)
    found = results.collect(parts, config.search.metric, outcomes, best)
    found |= {"bundle": str(run_path / "bundle"), "init": config.init, "initial_weights": initial_weights}
    found["known"] = known
    write_bundle(
        run_path / "bundle",
        winner.state,
        kind="risk",
        model=winner.model,
        data=winner.data,
        vocabulary=winner.vocabulary,
        known=histories.known,
        tasks=winner.tasks,
        in_days=winner.in_days,
        card=report.card(found),
        extra={
            **{split: scores for split in ("held_out", "tuning") if (scores := results.scores_of(found, split))},
            "recalibration": {part["task"]: part["recalibration"] for part in parts},
            "provenance": provenance(histories, initial_weights),
        },
    )
    return found


def _score_task(
    config: TuneConfig, winner: Bundle, histories: Histories, task: LabelledTask, device: torch.device
) -> tuple[Bundle, dict[str, Any]]:
    """The model with the task's head recalibrated, and the task's part of results.json.

    Its predictions and its picture are in the run's folder.
    """
    name, split, tuning = task.config.name, task.scored_split, task.examples["tuning"]
    winner, recalibration, tuning_probability_E = _calibrated(winner, histories, name, tuning, device)
    scored = task.examples[split]
    outputs, _ = predict(winner.for_task(name), histories, scored, device)
    write_predictions(scored, outputs, run_folder(config.run) / results.predictions_file(name, winner.tasks))
    label_E, probability_E, subject_id_E = scored.label_E, outputs.probability_ET[:, 0], scored.subject_id_E
    weight_E = scored.weight_E
    scores = metrics.scores(label_E, probability_E, subject_id_E, weight_E)
    if name in winner.in_days:
        timed_E = ~np.isnan(scored.days_E)
        days_N, predicted_N = scored.days_E[timed_E], outputs.days_ET[timed_E, 0]
        scores["days"] = metrics.day_scores(days_N, predicted_N, subject_id_E[timed_E], weight_E[timed_E])
    part = results.of_task(task.config, scores, task.labels, task.examples, split)
    before = metrics.ece(label_E, recalibration.undo(probability_E), weight_E)
    part["recalibration"] = {**dataclasses.asdict(recalibration), "ece_before": before}
    part["boosting"], part["picture"] = None, None
    if split == "held_out":
        part |= decisions.assess(
            label_E,
            probability_E,
            subject_id_E,
            task.held_out_groups,
            tuning.label_E,
            tuning_probability_E,
            weight_E,
            tuning.weight_E,
        )
        if scores["auroc"]["value"] is not None:
            part["boosting"], boosting_E = {"left_out": "report.boosting=false"}, None
            if config.report.boosting:
                print(
                    f"fitting gradient boosting for {name} to compare with; report.boosting=false leaves it out",
                    flush=True,
                )
                part["boosting"], boosting_E = compare(histories, task.examples, probability_E, config.train.seed)
            part["picture"] = f"{name}.png"
            figures.draw_task(
                run_folder(config.run) / part["picture"], label_E, probability_E, weight_E, part, boosting_E
            )
    if (best := ceiling(locate(config.data.path), name, split)) is not None:
        part["ceiling"] = best
    return winner, part


def _write_hyperparameters(run_path: Location, trials: list[TrialConfig], outcomes: list[Outcome]) -> None:
    """TensorBoard's HPARAMS tab: each trial's point of the space and best scores."""
    from torch.utils.tensorboard import SummaryWriter

    for outcome in outcomes:
        scores = {f"best/{name}": value for name, value in outcome.best.items()}
        folder = run_path / "tb" / f"trial-{outcome.index}" / "tb"
        with filling(folder) as events, SummaryWriter(str(events)) as writer:
            writer.add_hparams(outcome.parameters, scores, run_name=".")
