"""Pretraining, top-down: check, claim the run's folder, train, write the bundle; and the job of each worker."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import yaml

from hymate import cluster
from hymate.config import DataConfig, Init, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from hymate.data.examples import Examples, pretraining_examples
from hymate.data.histories import Histories
from hymate.data.loader import Rows
from hymate.data.vocabulary import Vocabulary
from hymate.device import Wanted, decide
from hymate.errors import ConfigError, UserError
from hymate.hashing import permuted
from hymate.inference.bundle import Bundle
from hymate.inference.initial import check_codes, initial_bundle, require_same_model
from hymate.inference.provenance import Seen, provenance, seen
from hymate.model.encoder import decay_groups, load_pretrained
from hymate.model.pretrain_model import PretrainModel
from hymate.runs import ELSEWHERE, check_same_run, claimed, run_folder
from hymate.storage.paths import Location, require_folder
from hymate.training import checkpoint
from hymate.training.keeper import Kept
from hymate.training.loop import Job, Worker, mean_outputs
from hymate.training.ray_train import Training, fit
from hymate.trees import to_tree

CHECKPOINTS, BUNDLE = "checkpoints", "bundle"
SCORE = "val_loss"
MODE: Literal["min"] = "min"
TRAIN_SPLIT, TUNING_SPLIT = "train", "tuning"
TIMES_ROWS = 64  # of which the bins of time and their first hazards are learned
# Keys that a run may change when it is continued: they move it to other machines or end it sooner or later.
CHANGEABLE = ELSEWHERE | {
    "train.num_workers",
    "train.cpus_per_worker",
    "train.zero_stage",
    "train.activation_checkpointing",
    "train.compile",
    "train.max_steps",
    "train.eval_every",
    "train.log_every",
    "train.keep",
    "train.patience",
    "train.max_failures",
    "train.max_skipped",
}


@dataclass(frozen=True)
class PretrainConfig:
    """Everything of a pretraining run.

    init: run folder or bundle of a pretrained model, or the name of one that ships: its weights, vocabulary and
        data.min_count are where this run begins; null begins with new weights.
    device: "auto" takes a GPU for each worker if what the model needs for it is installed, else CPUs; or "cpu", "cuda".
    """

    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    train: TrainConfig
    run: RunConfig
    init: Init | None = None
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        require_learnable(self.model, self.objective)


def require_learnable(model: ModelConfig, objective: ObjectiveConfig) -> None:
    """Raises ConfigError where the model can't learn the objective."""
    for name in ("forecast_weight", "time_to_event_weight"):
        if getattr(objective, name) > 0 and model.sees_ahead:
            raise ConfigError(
                f"objective.{name} needs model.bidirectional=false and model.causal=true: this model has already seen "
                "the future that it would forecast; set them, or objective=masked_event"
            )


# ---------------------------------------------------------------------------------------------------------- run


def pretrain(config: PretrainConfig) -> Location:
    """Run, continue or repeat a pretraining run; returns the path of its bundle.

    Raises UserError before any worker starts where the configuration, data or machine cannot do it, and later as `fit`
    does where training ends before its time.
    """
    histories = open_checked(config.data)
    cluster_gpus = cluster.available_gpus(config.train)
    folder, inputs, start = run_folder(config.run), histories.inputs, None
    if config.init is not None:
        start = initial_bundle(config.init)
        require_same_model(start, config.model)
        config = replace(config, data=replace(config.data, min_count=start.data.min_count))
        inputs = inputs | {"init": start.fingerprint}
    found = check_same_run(folder, config, inputs, CHANGEABLE)
    if found is None or not (folder / BUNDLE).is_dir():
        kept = Kept(folder / CHECKPOINTS, config.train.keep, MODE)
        kept.require_any_left()
        if start is not None and config.init is not None:
            check_codes(start, config.init, histories)
        config = decide(config, config.model, workers=config.train.num_workers, cluster_gpus=cluster_gpus)
        require_folder(folder, "run.dir")
        with claimed(folder, "pretrain", config, inputs) as run:
            job, text = functools.partial(pretraining_job, config), yaml.safe_dump(to_tree(config), sort_keys=False)
            ended = fit(Training(job, config.train, config.model, config.device, run, kept, text))
            metrics = _export(config, start, kept, histories, folder / BUNDLE)
            found = run.found
            found |= {SCORE: metrics[SCORE], "step": metrics["step"], "bundle": str(folder / BUNDLE)}
            found["skipped_steps"] = ended.skipped
    print(f"best {SCORE} {found[SCORE]:.4f} at step {int(found['step'])}")
    print(f"bundle: {folder / BUNDLE}")
    print(f"curves: tensorboard --logdir {folder.parent}")
    return folder / BUNDLE


def open_checked(data: DataConfig) -> Histories:
    """The dataset. Raises UserError where it can't be read, or has no subjects to train on or to evaluate on."""
    histories = Histories.open(data.path)
    for split in (TRAIN_SPLIT, TUNING_SPLIT):
        if split not in histories.splits:
            raise histories.without_subjects_error(split)
    return histories


# ---------------------------------------------------------------------------------------------------------- job


def pretraining_job(config: PretrainConfig, worker: Worker) -> Job:
    """Model, rows and evaluation of one worker."""
    histories = Histories.open(config.data.path)
    start = None if config.init is None else initial_bundle(config.init)
    vocabulary = _vocabulary(config, start, histories)
    torch.manual_seed(config.train.seed)
    module = PretrainModel(config.model, config.objective, vocabulary.size)
    groups = decay_groups(module, config.train.weight_decay)
    examples = pretraining_examples(histories, TRAIN_SPLIT)
    training = _rows(config, histories, vocabulary, examples)
    if config.objective.time_to_event_weight:
        sample = _rows(config, histories, vocabulary, some(examples, config.data, TIMES_ROWS, config.train.seed))
        module.learn_times(row for row, _ in sample.once(0, 1))
    if start is not None:
        load_pretrained(module, start.state, [name for name, _ in module.named_children() if name != "backbone"])
    tuning_examples = pretraining_examples(histories, TUNING_SPLIT)
    tuning_examples = some(tuning_examples, config.data, config.train.eval_rows, config.train.seed)
    tuning = _rows(config, histories, vocabulary, tuning_examples)

    def evaluate(engine: Any) -> dict[str, float]:
        outputs = mean_outputs(engine, tuning.once(worker.rank, worker.world_size), worker)
        return {f"val_{name}": value for name, value in outputs.items()}

    return Job(
        module=module,
        groups=[{**group, "lr": config.train.learning_rate} for group in groups],
        rows=training,
        evaluate=evaluate,
        metric=SCORE,
        mode=MODE,
    )


def _vocabulary(config: PretrainConfig, start: Bundle | None, histories: Histories) -> Vocabulary:
    return Vocabulary.of(histories, config.data.min_count) if start is None else start.vocabulary


def some(examples: Examples, data: DataConfig, num_rows: int, seed: int) -> Examples:
    """A seeded choice of examples that fills about so many rows, in their own order; at least one."""
    most = num_rows * data.tokens_per_row
    order = permuted(np.arange(min(most, len(examples))), len(examples), seed)  # each has an event at least
    events = np.minimum(examples.stop_E[order], data.context).cumsum()
    count = max(1, int(np.searchsorted(events, most, side="right")))
    return examples.only(np.sort(order[:count]))


def _rows(config: PretrainConfig, histories: Histories, vocabulary: Vocabulary, examples: Examples) -> Rows:
    return Rows(
        histories,
        vocabulary,
        examples,
        context=config.data.context,
        tokens_per_row=config.data.tokens_per_row,
        seed=config.train.seed,
        crop="random",
    )


# ------------------------------------------------------------------------------------------------------- bundle


def _export(
    config: PretrainConfig, start: Bundle | None, kept: Kept, histories: Histories, folder: Location
) -> dict[str, float]:
    """Write the weights of the best whole checkpoint as the run's bundle; returns that one's metrics."""
    best = checkpoint.first_whole(kept.best_first())
    if best is None:
        raise UserError(f"no checkpoint in {kept.folder} is whole: put a copy back, or delete the run to begin again")
    numbers = {name: float(value) for name, value in best.metrics.items()}
    card, vocabulary = _card(config, numbers, histories), _vocabulary(config, start, histories)
    before: Seen = "new" if start is None else seen(start.extra, histories)
    known, extra = histories.known, {"metrics": numbers, "provenance": provenance(histories, before)}
    bundle = Bundle("pretrained", config.model, config.data, vocabulary, best.weights, known=known, extra=extra)
    bundle.write(folder, card)
    return numbers


def _card(config: PretrainConfig, metrics: Mapping[str, float], histories: Histories) -> str:
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items()))
    splits = {split: len(histories.positions(split)) for split in (TRAIN_SPLIT, TUNING_SPLIT)}
    return f"""\
A hybrid Mamba + Transformer encoder of patient histories, pretrained without labels. Fine-tune it before use
(`python finetune/tune.py init=THIS_FOLDER ...`): it predicts no outcome by itself.

## Data

Dataset fingerprint `{histories.fingerprint}`: {splits[TRAIN_SPLIT]} histories for training, {splits[TUNING_SPLIT]}
for validation. Histories are cut to {config.data.context} events.

## Metrics on the tuning split (best checkpoint)

| metric | value |
| --- | --- |
{rows}

## Limits

Not a medical device. The model knows only the codes, units and practices of the dataset it was trained on; on
another site's data check the fraction of unknown codes and validate locally before any use. Weights trained on patient
data may carry traces of it: share them under the same terms as the data.
"""
