"""A pretraining job: model, rows, evaluation; and what can be checked before a worker starts. Knows nothing of Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from hymate.config import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from hymate.data.examples import Examples, pretraining_examples
from hymate.data.histories import FOLDER, Histories
from hymate.data.loader import Rows
from hymate.data.vocabulary import Vocabulary
from hymate.device import Wanted
from hymate.errors import ConfigError, UserError
from hymate.inference.bundle import write_bundle
from hymate.inference.provenance import provenance
from hymate.model.encoder import PretrainModel, decay_groups
from hymate.runs import run_folder
from hymate.storage.paths import Location, locate
from hymate.training import checkpoint
from hymate.training.loop import Job, Worker, mean_outputs

SCORE = "val_loss"
MODE: Literal["min"] = "min"
TRAIN_SPLIT, TUNING_SPLIT = "train", "tuning"
# Keys that a run may change when it is continued: they move it to other machines or end it sooner or later.
CHANGEABLE = {
    "data.path",
    "device",
    "run.dir",
    *(
        f"train.{key}"
        for key in (
            "num_workers",
            "cpus_per_worker",
            "zero_stage",
            "activation_checkpointing",
            "compile",
            "max_steps",
            "eval_every",
            "log_every",
            "keep",
            "patience",
            "max_failures",
            "max_skipped",
        )
    ),
}


@dataclass(frozen=True)
class PretrainConfig:
    """Everything of a pretraining run.

    device: "auto" takes a GPU for each worker where all is there that the model needs, else CPUs; or "cpu", "cuda".
    """

    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    train: TrainConfig
    run: RunConfig
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        require_learnable(self.model, self.objective)


def require_learnable(model: ModelConfig, objective: ObjectiveConfig) -> None:
    """Raises ConfigError where the model can't learn the objective."""
    if objective.forecast_weight > 0 and model.sees_ahead:
        raise ConfigError(
            "objective.forecast_weight needs model.bidirectional=false and model.causal=true: this model has "
            "already seen the future that it would forecast; set them, or objective=masked_event"
        )


# ------------------------------------------------------------------------------------------------------- checks


def check(config: PretrainConfig) -> Histories:
    """Everything that can be known before a worker starts; UserError in one line. Returns the opened dataset."""
    histories = Histories.open(config.data.path)
    for split in (TRAIN_SPLIT, TUNING_SPLIT):
        if not len(histories.rows_of(split)):
            raise histories.without_subjects(split)
    return histories


# ---------------------------------------------------------------------------------------------------------- job


def pretraining_job(config: PretrainConfig, worker: Worker) -> Job:
    """Model, rows and evaluation of one worker."""
    histories = Histories.open(config.data.path)
    vocabulary = read_vocabulary(config.data)
    torch.manual_seed(config.train.seed)
    module = PretrainModel(config.model, config.objective, vocabulary.size)
    groups = decay_groups(module, config.train.weight_decay)
    training = _rows(config, histories, vocabulary, pretraining_examples(histories, TRAIN_SPLIT))
    tuning_examples = pretraining_examples(histories, TUNING_SPLIT)
    tuning = _rows(config, histories, vocabulary, some(tuning_examples, config.data, config.train))

    def evaluate(engine: Any) -> dict[str, float]:
        outputs = mean_outputs(engine, tuning.once(worker.rank, worker.world_size), worker)
        return {f"val_{name}": value for name, value in outputs.items()}

    return Job(
        module=module,
        groups=[{**group, "lr": config.train.learning_rate} for group in groups],
        rows=training,
        evaluate=evaluate,
        score=SCORE,
        mode=MODE,
    )


def read_vocabulary(data: DataConfig) -> Vocabulary:
    """The model's vocabulary of a prepared dataset."""
    return Vocabulary.read(locate(data.path) / FOLDER / "vocabulary.parquet", data.min_count)


def some(examples: Examples, data: DataConfig, train: TrainConfig) -> Examples:
    """A seeded choice of examples that fills about `eval_rows` rows, in their own order; at least one."""
    order = np.random.default_rng(train.seed).permutation(len(examples))
    events = np.minimum(examples.stop_E, data.context)[order].cumsum()
    count = max(1, int(np.searchsorted(events, train.eval_rows * data.tokens_per_row, side="right")))
    chosen = np.sort(order[:count])
    arrays = {
        field.name: getattr(examples, field.name)[chosen]
        for field in dataclasses.fields(examples)
        if isinstance(getattr(examples, field.name), np.ndarray)
    }
    return dataclasses.replace(examples, **arrays)


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


def export_bundle(
    config: PretrainConfig, kept: Sequence[tuple[Location, Mapping[str, float]]], histories: Histories
) -> tuple[Location, dict[str, float]]:
    """The weights of the first whole one of `kept`, checkpoints and their metrics, as the run's bundle.

    Returns the bundle and the metrics.
    """
    folder = run_folder(config.run) / "bundle"
    best = checkpoint.first_whole(kept)
    if best is None:
        raise UserError(
            f"no checkpoint in {kept[0][0].parent} is whole: put a copy back, or delete the run to begin again"
        )
    weights, numbers = best.weights, {name: float(value) for name, value in best.metrics.items()}
    write_bundle(
        folder,
        weights,
        kind="pretrained",
        model=config.model,
        data=config.data,
        vocabulary=read_vocabulary(config.data),
        known=histories.known,
        card=_card(config, numbers, histories),
        extra={"metrics": numbers, "provenance": provenance(histories)},
    )
    return folder, numbers


def _card(config: PretrainConfig, metrics: Mapping[str, float], histories: Histories) -> str:
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items()))
    splits = {split: len(histories.rows_of(split)) for split in (TRAIN_SPLIT, TUNING_SPLIT)}
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
another site's data check the share of unknown codes and validate locally before any use. Weights trained on patient
data may carry traces of it: share them under the same terms as the data.
"""
