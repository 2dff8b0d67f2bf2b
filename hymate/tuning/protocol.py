"""The benchmark's protocol: who is compared, in which runs, and which labels each run has.

Shape legend: P patients, E examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from hymate.config import DataConfig, Init, ModelConfig, ObjectiveConfig, RunConfig, TaskConfig, TrainConfig, check
from hymate.data.examples import Examples, labelled_examples
from hymate.data.histories import Histories
from hymate.device import Wanted
from hymate.errors import ConfigError, UserError
from hymate.evaluation.baseline_models import Kind
from hymate.storage.paths import Location
from hymate.trees import build, to_tree
from hymate.tuning import space

REFERENCE: Kind = "gradient_boosting"  # every contender is compared with it
PLAIN = "plain_models"  # boosting and logistic regression averaged, as in a bundle
BASELINES = (REFERENCE, "logistic_regression", PLAIN)
DEVELOPMENT, HELD_OUT = "train and tuning", "held_out"
Split = Literal["cross_validation", "held_out"]


# --------------------------------------------------------------------------------------------------- who is compared


@dataclass(frozen=True)
class Contender:
    """A model that is fine-tuned. model: what it changes of the configuration's; point: its settings, by the names that
    `search.space` has; pretrained: whether it starts from weights that were pretrained with the same seed, once
    for all contenders of the same model, or from the bundle of `init`.
    """

    point: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False


@dataclass(frozen=True)
class BenchmarkConfig:
    """`finetune/benchmark.py`'s configuration.

    split: "cross_validation" over the train and tuning patients, while choices are made; "held_out" once they are made.
    folds: of cross-validation; each seed draws its own.
    only: names of the contenders to run now; the others can follow. Empty: all of them.
    seeds: how often everything is done, each time with other random numbers.
    budgets: patients whose labels a run sees, those that choose and recalibrate included; 0 is all there are.
    with_few_labels: the contenders of all budgets but the largest.
    ensemble: contenders that are also compared as their mean with the plain models (`report.ensemble`), seed by seed,
        where the contender plain_models has run, too.
    choosing_fraction: fraction of the patients whose labels choose the candidate (a network's evaluation, boosting's
        number of trees, logistic regression's penalty) by the least cross-entropy, and recalibrate it; the rest is
        fitted to.
    max_concurrent: runs at the same time; 0 is as many as the machine or cluster holds.
    init: run folder or bundle of a pretrained model, or the name of one that ships: where the pretrained contenders
        start; null pretrains them first, for each seed.
    pretrain: each seed's pretraining, without labels.
    train: each contender's fine-tuning.
    contenders: by name, what each changes in `model` (`model`) and in `point` (`point`), and whether it starts from
        pretrained weights (`pretrained`).
    point: settings of every contender, by the names that `search.space` has.
    device: "auto" takes a GPU for each run if what the model needs for it is installed, else CPUs; or "cpu", "cuda".
    """

    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    pretrain: TrainConfig
    train: TrainConfig
    task: TaskConfig
    run: RunConfig
    contenders: dict[str, Contender]
    point: dict[str, Any]
    with_few_labels: list[str]
    split: Split = "cross_validation"
    folds: int = 4
    seeds: int = 3
    only: list[str] = field(default_factory=list)
    budgets: list[int] = field(default_factory=lambda: [0])
    ensemble: list[str] = field(default_factory=list)
    choosing_fraction: float = 0.2
    max_concurrent: int = 0
    init: Init | None = None
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        self.task.require_whether("the benchmark")
        if not self.budgets or min(self.budgets) < 0 or len(set(self.budgets)) < len(self.budgets):
            raise ConfigError(f"budgets must be different numbers of patients, 0 for all there are; got {self.budgets}")
        check(
            self,
            choosing_fraction=(0 < self.choosing_fraction < 1, "must be between 0 and 1"),
            seeds=(self.seeds >= 1, "must be at least 1"),
            folds=(self.folds >= 2, "must be at least 2"),
        )
        for key in ("with_few_labels", "only", "ensemble"):
            if unknown := set(getattr(self, key)) - {*self.names}:
                raise ConfigError(f"{key}: {', '.join(sorted(unknown))} is not a contender")
        if clash := set(BASELINES) & set(self.contenders):
            raise ConfigError(f"contenders.{sorted(clash)[0]} is a baseline's name: choose another")
        points = {f"contenders.{name}.point": contender.point for name, contender in self.contenders.items()}
        for where, point in {"point": self.point, **points}.items():
            space.check(point, where)
            if ranges := sorted(name for name, value in point.items() if isinstance(value, Mapping)):
                raise ConfigError(f"{where}.{ranges[0]} must be one value here, not a distribution")
            space.check_point(point, where)
        for name in self.contenders:
            self.model_of(name)
        if self.train.num_workers != 1:
            raise ConfigError(
                f"train.num_workers={self.train.num_workers}: the runs of a benchmark train on one worker each, side "
                "by side: leave it at 1 (train.cpus_per_worker gives a run more CPUs)"
            )

    def point_of(self, contender: Contender) -> dict[str, Any]:
        """The contender's settings, and where it has none of its own those of all."""
        return {**self.point, **contender.point}

    def model_of(self, name: str) -> ModelConfig:
        """A contender's model. Raises ConfigError where a setting is impossible."""
        tree = {**to_tree(self.model), **self.contenders[name].model}
        return build(ModelConfig, tree, f"contenders.{name}.model.")

    @property
    def names(self) -> list[str]:
        """All that are compared."""
        return [*BASELINES, *self.contenders]

    @property
    def folds_of_split(self) -> list[int] | list[None]:
        """One run each; None is the held-out split."""
        return [None] if self.split == HELD_OUT else list(range(self.folds))

    @property
    def largest_first(self) -> list[int]:
        """The budgets; all labels are the largest."""
        return sorted(self.budgets, key=lambda budget: budget or math.inf, reverse=True)

    def pretraining(self, run: ContenderRun) -> str | None:
        """Whose pretrained weights the run starts from: the first contender's of the same model. None: from scratch."""
        pretrained = {name: self.model_of(name) for name, each in self.contenders.items() if each.pretrained}
        model = pretrained.get(run.name)
        return None if model is None else next(name for name, other in pretrained.items() if other == model)


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class ContenderRun:
    """One training: a contender, the labels of `budget` patients (0: of all), a seed and the fold that it is scored on.

    name: a baseline's or a contender's. fold: None for the held-out split.
    """

    name: str
    budget: int
    seed: int
    fold: int | None

    @property
    def stem(self) -> str:
        """What its files' names begin with."""
        scored_on = "held_out" if self.fold is None else f"fold{self.fold}"
        return f"{self.name}-{self.budget or 'all'}-seed{self.seed}-{scored_on}"

    @property
    def patients_in_words(self) -> str:
        """In words, whose labels it has: the same for every contender."""
        scored_on = "" if self.fold is None else f", fold {self.fold}"
        return f"{self.budget or 'all'} patients, seed {self.seed}{scored_on}"

    def __str__(self) -> str:
        return f"{self.name} on {self.patients_in_words}"

    def results_path(self, folder: Location) -> Location:
        """Of the run's results; this file is written last, so where it is the run is complete."""
        return folder / f"{self.stem}.json"

    def predictions_path(self, folder: Location) -> Location:
        """Of the run's subjects, prediction times, labels, their weights and recalibrated probabilities."""
        return folder / f"{self.stem}.parquet"


def runs_of(config: BenchmarkConfig) -> list[ContenderRun]:
    """In the order in which they are started: every contender once, then the next fold and seed; few labels last."""
    return [
        ContenderRun(name, budget, seed, fold)
        for budget in config.largest_first
        for seed in range(config.seeds)
        for fold in config.folds_of_split
        for name in (config.names if budget == config.largest_first[0] else config.with_few_labels)
        if not config.only or name in config.only
    ]


# ------------------------------------------------------------------------------------------- which labels a run has


@dataclass(frozen=True)
class Allotment:
    """A run's labels: those to fit to, those to choose and recalibrate by, those to be scored on; a patient is in one
    of these parts. fraction: of all labels that it might have had, those that its budget allows.
    """

    fitting: Examples
    choosing: Examples
    test: Examples
    fraction: float

    def check(self, config: BenchmarkConfig, run: ContenderRun) -> None:
        """Raises UserError where a part is smaller than the budget wants it, or has one class only."""
        there = sum(len(np.unique(part.subject_id_E)) for part in (self.fitting, self.choosing))
        if there < run.budget:
            raise UserError(f"budgets={config.budgets}: {run.patients_in_words}: only {there} patients have labels")
        for purpose, examples in (("fit", self.fitting), ("choose by", self.choosing), ("score on", self.test)):
            positives = int((examples.label_E > 0.5).sum())
            if positives in (0, len(examples)):
                raise UserError(
                    f"task {config.task.name}: {run.patients_in_words}: {positives} positive and "
                    f"{len(examples) - positives} negative labels to {purpose}, but both are needed: take a larger "
                    "budget or fewer folds"
                )


@dataclass(frozen=True)
class Labelled:
    """Examples with a label: those of the train and tuning patients together and, if asked for, the held-out ones."""

    development: Examples
    held_out: Examples | None

    @classmethod
    def of(cls, histories: Histories, table: pa.Table, split: Split) -> Labelled:
        """table: the task's labels."""
        parts = {split: HELD_OUT if split == HELD_OUT else DEVELOPMENT for split in histories.splits}
        histories = histories.with_splits(parts)
        wanted = [DEVELOPMENT, HELD_OUT] if split == HELD_OUT else [DEVELOPMENT]
        found = [labelled_examples(histories, table, part) for part in wanted]
        development, *held_out = [examples.only(~np.isnan(examples.label_E)) for examples in found]
        return cls(development, held_out[0] if held_out else None)

    def allotted(self, config: BenchmarkConfig, run: ContenderRun) -> Allotment:
        """The labels of a run: each seed draws its own folds, and its own patients, with all of their labels.

        Smaller budgets are parts of larger ones. Those to choose by are every so many of the patients in the order of
        outcome and draw, so that both parts have the same prevalence.
        """
        pool, test, rng = self.development, self.held_out, np.random.default_rng(run.seed)
        if run.fold is not None:
            fold_E = _shuffled(pool.subject_id_E, rng) % config.folds
            pool, test = pool.only(fold_E != run.fold), pool.only(fold_E == run.fold)
        assert test is not None, "a run without a fold is scored on the held-out labels"
        rank_E, there = _shuffled(pool.subject_id_E, rng), len(pool)
        if run.budget:
            drawn_E = rank_E < run.budget
            pool, rank_E = pool.only(drawn_E), rank_E[drawn_E]
        subject_P, first_E, subject_E = np.unique(pool.subject_id_E, return_index=True, return_inverse=True)
        positive_P = np.bincount(subject_E, pool.label_E > 0.5) > 0
        order_P = np.lexsort((rank_E[first_E], positive_P))
        chooses_P = np.zeros(len(subject_P), dtype=bool)
        chooses_P[order_P] = np.diff(np.floor(np.arange(len(subject_P) + 1) * config.choosing_fraction + 0.5)) > 0
        chooses_E = chooses_P[subject_E]
        return Allotment(pool.only(~chooses_E), pool.only(chooses_E), test, len(pool) / there)


def _shuffled(subject_id_E: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The place of each example's patient in a random order of all patients."""
    subject_P, subject_E = np.unique(subject_id_E, return_inverse=True)
    return rng.permutation(len(subject_P))[subject_E]
