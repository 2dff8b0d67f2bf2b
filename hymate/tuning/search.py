"""The fine-tuning search: Ray Tune over trials, the best of all their checkpoints, one look at the held-out split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hymate import cluster
from hymate.config import DataConfig, Init, ModelConfig, ReportConfig, RunConfig, SearchConfig, TaskConfig, TrainConfig
from hymate.data.examples import Examples, examples_by_split, united
from hymate.data.histories import Histories
from hymate.data.known import differing, sentences
from hymate.data.tasks import read_or_extract_labels
from hymate.device import Wanted, decide
from hymate.errors import ConfigError, UserError
from hymate.evaluation import report, results
from hymate.evaluation.baseline_fits import FEATURES, Boosted, boosted, cross_fitted
from hymate.evaluation.subgroups import subgroups
from hymate.inference.bundle import Bundle
from hymate.inference.initial import check_codes
from hymate.inference.provenance import SENTENCES, Seen, provenance, seen
from hymate.runs import ELSEWHERE, Run, check_same_run, claimed, run_folder
from hymate.storage.paths import Location, filling, locate, remove_tree, require_folder, write_text
from hymate.tuning import space, winner
from hymate.tuning.trial import Study, TrialConfig, draw_trials, require_starts, starting_point
from hymate.tuning.winner import LabelledTask

# keys that a search may change when it is continued: they move it to other machines or spare these what is too large
CHANGEABLE = ELSEWHERE | {
    "search.max_concurrent",
    "train.num_workers",
    "train.cpus_per_worker",
    "train.zero_stage",
    "train.activation_checkpointing",
    "report.boosting",
}


@dataclass(frozen=True)
class TuneConfig:
    """`finetune/tune.py`'s configuration.

    task: one task, or several by their names: one model with a head for each.
    init: run folder or bundle of a pretrained model, or the name of one that ships; null trains from scratch.
    model: needed when init is null; with init it may be left out.
    device: "auto" takes a GPU for each worker of a trial if what the model needs for it is installed, else CPUs; or
        "cpu", "cuda".
    """

    data: DataConfig
    train: TrainConfig
    task: TaskConfig | dict[str, TaskConfig]
    search: SearchConfig
    run: RunConfig
    init: Init | None
    model: ModelConfig | None = None
    report: ReportConfig = field(default_factory=ReportConfig)
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ConfigError(f"task: {', '.join(names)} must have different names")
        space.check(self.search.space, "search.space")
        in_time = [task.name for task in self.tasks if task.in_time]
        if self.search.metric == "auprc" and in_time:
            raise ConfigError(f"search.metric=auprc: task {in_time[0]} is in time and has none: give mean or auroc")
        if self.report.ensemble and len(in_time) == len(self.tasks):
            raise ConfigError(
                f"report.ensemble: task {in_time[0]} is in time, for which there is no boosting: set it to false"
            )

    @property
    def tasks(self) -> list[TaskConfig]:
        return list(self.task.values()) if isinstance(self.task, dict) else [self.task]


# ------------------------------------------------------------------------------------------------------- search


def search(config: TuneConfig) -> Location:
    """Search, keep the best model, score it on the held-out split once; returns the run's folder.

    The same command continues a search that was killed, and shows the results of one that is finished.
    """
    run_path = run_folder(config.run)
    found, cluster_gpus = results.read(run_path), None
    if found is None:
        require_folder(run_path, "run.dir")
        cluster_gpus = cluster.available_gpus(config.train)
    histories = Histories.open(config.data.path)
    start = starting_point(config.data, config.model, config.init)
    if found is None and config.init is not None:
        check_codes(start, config.init, histories)
    if found is None:
        config = decide(config, start.model, workers=config.train.num_workers, cluster_gpus=cluster_gpus)
    trials = draw_trials(config.tasks, config.search, config.train, start)
    tasks = [_labelled(task, config, histories) for task in config.tasks]
    if any(trial.early_fraction for trial in trials):
        for task in tasks:
            require_starts(task.config, task.labels, "search.space.early_fraction")
    inputs = histories.inputs | {"init": start.fingerprint}
    for task in tasks:
        key = f"task.{task.config.name}" if isinstance(config.task, dict) else "task"
        inputs[f"{key}.labels"] = task.labels.digest()
    check_same_run(run_path, config, inputs, CHANGEABLE)
    for sentence in _other_rules(start, histories):
        print(f"warning: {sentence}", flush=True)
    if found is None:
        with claimed(run_path, "tune", config, inputs) as run:
            found = _searched(config, histories, start, trials, tasks, run)
            best = found["trials"][found["best_trial"]]["best"]
            run.found[f"best_{config.search.metric}"] = best[config.search.metric]
            run.found.update(step=best["step"], trial=found["best_trial"], bundle=found["bundle"])
    report.show(found, run_path)
    return run_path


def _labelled(task: TaskConfig, config: TuneConfig, histories: Histories) -> LabelledTask:
    label_set = read_or_extract_labels(locate(config.data.path), task)
    examples = examples_by_split(histories, task, label_set.table)
    groups = {}
    if len(examples["held_out"]):
        groups = subgroups(histories, examples["held_out"], config.report.subgroups, config.report.age_bands)
    else:
        print(f"{task.name} has no held-out labels: the tuning split will be scored instead", flush=True)
    labelled = LabelledTask(task, label_set, examples, groups)
    if config.report.ensemble and not task.in_time and not labelled.is_compared:
        raise UserError(
            f"report.ensemble: task {task.name} has no held-out labels of both classes, so nothing would show whether "
            "the mean is better: set it to false"
        )
    return labelled


def _other_rules(start: Bundle, histories: Histories) -> list[str]:
    """A warning where the pretrained model's histories held events at other times than the dataset's."""
    codes = differing(start.known, histories.known, histories.codes) if start.state else []
    if not codes:
        return []
    return [
        f"in pretraining the events of {len(codes)} codes became known at other times ({codes[0]!r} for one): "
        "fine-tuning and the new bundle follow this dataset's rules"
    ]


def _searched(
    config: TuneConfig,
    histories: Histories,
    start: Bundle,
    trials: list[TrialConfig],
    tasks: Sequence[LabelledTask],
    run: Run,
) -> dict[str, Any]:
    """Run the trials, score the best one; the content of results.json, which is written last of all in the folder."""
    run_path, metric = run_folder(config.run), config.search.metric
    initial_weights: Seen = seen(start.extra, histories) if start.state else "new"
    if initial_weights not in ("new", "same split"):
        print(f"Note: {SENTENCES[initial_weights]}", flush=True)
    training, tuning = (united([task.examples[split] for task in tasks]) for split in ("train", "tuning"))
    teacher_ET: np.ndarray | None = None
    boosting: dict[str, Boosted] = {}
    if any(trial.teacher_fraction for trial in trials):
        teacher_ET, boosting = _teacher(tasks, histories, config, run_path)
    study = Study(start, training, tuning, metric, trials, run_path, teacher_ET, config.device)
    read_apart = _read_apart(trials, training)
    if read_apart:
        print(f"Note: {read_apart}", flush=True)
    train = config.train
    with cluster.ray_session(train.cpus_per_worker, train.num_workers, config.device):
        from hymate.tuning.ray_tune import run_trials  # late: Ray takes its settings when it is imported

        ends = run_trials(study, config.search, train, run)
    best = winner.best_of(ends, metric, run_path)
    bundle, parts = winner.bundle_of(start, trials[best.index], best, histories.known), []
    for task in tasks:
        given = histories, task, run_path, config.report, train, config.device
        bundle, part = winner.judge_task(bundle, *given, boosting.get(task.config.name))
        parts.append(part)
    found = results.collect(parts, metric, ends, best)
    found |= {"bundle": str(run_path / "bundle"), "init": config.init, "initial_weights": initial_weights}
    if read_apart:
        found["read_apart"] = read_apart
    found["known"] = sentences(histories.known, histories.known_events) + _other_rules(start, histories)
    _export(bundle, histories, found, run_path)
    _write_hyperparameters(run_path, ends)
    write_text(report.report(found), run_path / report.REPORT)
    remove_tree(run_path / winner.SCORING)
    results.write(found, run_path)
    return found


def _read_apart(trials: Sequence[TrialConfig], training: Examples) -> str | None:
    """A note where labels of one history cannot share a window."""
    shared = len(training) - len(np.unique(training.position_E))
    if not shared or not any(trial.model.sees_ahead for trial in trials):
        return None
    return (
        f"the model sees ahead (model.bidirectional or model.causal=false), so the {len(training)} training labels are "
        "read one by one; one that does not would read the labels of a history together"
    )


def _teacher(
    tasks: Sequence[LabelledTask], histories: Histories, config: TuneConfig, run_path: Location
) -> tuple[np.ndarray, dict[str, Boosted]]:
    """`Study.teacher_ET`, and of each task that is compared with boosting what is fitted at the same time for it."""
    parts, boosting, seed = [], {}, config.train.seed
    for task in tasks:
        name, examples, compares = task.config.name, task.examples, config.report.boosting and task.is_compared
        if task.config.in_time:
            parts.append(_taught(examples["train"], np.full(len(examples["train"]), np.nan)))
            continue
        beside = ", and gradient boosting to compare" if compares else ""
        print(f"fitting a teacher for {name} (search.space.teacher_fraction=0 skips it){beside}", flush=True)
        try:
            if compares:
                plain = config.report.ensemble
                boosting[name] = boosted(histories, examples, seed, run_path / FEATURES, plain, teacher=True)
                teacher_E = boosting[name].teacher_E
            else:
                teacher_E = cross_fitted(histories, examples["train"], examples["tuning"], seed, run_path / FEATURES)
        except (UserError, MemoryError) as error:
            without = ", or report.boosting to false" if compares else ""
            raise UserError(
                f"search.space.teacher_fraction: no teacher for {name} ({error}); set it to 0{without}"
            ) from error
        assert teacher_E is not None
        parts.append(_taught(examples["train"], teacher_E))
    return united(parts).label_ET, boosting


def _taught(examples: Examples, teacher_E: np.ndarray) -> Examples:
    return replace(examples, label_ET=teacher_E[:, None].astype(np.float32))


def _export(bundle: Bundle, histories: Histories, found: dict[str, Any], run_path: Location) -> None:
    extra = {
        **{split: scores for split in ("held_out", "tuning") if (scores := results.scores_of(found, split))},
        "recalibration": {
            part["task"]: part["recalibration"] for part in results.parts_of(found) if "recalibration" in part
        },
        "thresholds": results.thresholds_of(found),
        "alarms": results.policies_of(found),
        "provenance": provenance(histories, found["initial_weights"]),
    }
    replace(bundle, extra=extra).write(run_path / "bundle", report.card(found))


def _write_hyperparameters(run_path: Location, ends: Sequence[results.TrialEnd]) -> None:
    """TensorBoard's HPARAMS tab: each trial's point of the space and best scores."""
    from torch.utils.tensorboard import SummaryWriter

    for end in ends:
        scores = {f"best/{name}": value for name, value in end.best.items()}
        folder = run_path / "tb" / f"trial-{end.index}" / "tb"
        with filling(folder) as events, SummaryWriter(str(events)) as writer:
            writer.add_hparams(end.parameters, scores, run_name=".")
