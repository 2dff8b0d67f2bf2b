"""Plain models, as baselines, in a mean with the network and as its teacher: of more labels than a command's own
machine may hold, for features are on disk, and each fit is a task.

Gradient boosting is scikit-learn's, which needs the whole table in memory, as long as that is there and the table is
small; else LightGBM's, where it is installed, which is faster, reads the table from disk and holds a byte a cell; else
that of a sample of labels. On a cluster a fit asks for the memory, on whatever machine has it.

Shape legend: E examples, X features (see `hymate.data.features`).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy.special import expit

from hymate.data.examples import Examples
from hymate.data.features import Column, FeatureConfig, FeatureSpec, FeatureTable, Rows
from hymate.data.histories import Histories
from hymate.data.parts import load_arrays, run_parts, save_arrays
from hymate.errors import UserError
from hymate.evaluation import calibration, metrics
from hymate.evaluation.baseline_models import (
    BINS_FROM,
    LIBRARY,
    Baseline,
    Kind,
    cross_entropy,
    fit,
    importances,
    lightgbm,
    read_rows,
)
from hymate.evaluation.stored import chosen_in_parts, store_tables, stored_tables
from hymate.inference.plain import Linear, PlainConfig, PlainModels, Trees
from hymate.machine import available_cpus
from hymate.storage.paths import Location, remove_tree
from hymate.work import free_memory

WHOLE, FOLDS = "whole", [str(fold) for fold in range(5)]  # what is fitted to: all training labels; all but a fold's
LINEAR_FRACTIONS = np.linspace(0, 1, 11).tolist()  # of logistic regression in a mean with boosting
FEATURES = ".features"  # in a run's folder, while they are needed
FEWEST_SAMPLED = 2_000  # labels that are worth fitting to, where there are more
BYTES_A_CELL: dict[Kind, int] = {  # of a feature table while a model is fitted
    "gradient_boosting": 13,  # float32, scikit-learn's float64 copy, its bins
    "logistic_regression": 45,  # measured
}
CELLS_IN_MEMORY = 7_000_000  # of a table that scikit-learn fits in a minute; LightGBM takes a tenth of that
WORTH_CELLS = 500_000  # take longer to fit to than another process takes to start
BINNED_BYTES_A_CELL = 1  # LightGBM's bins
BINS_BYTES_A_CELL = 16  # of the labels that it chooses bins from
SPARE = 2  # times what a fit holds must be free: its task holds other things, too


@dataclass(frozen=True)
class Plain:
    """Boosting as a bundle holds it, and where the tuning split gives it a weight, logistic regression.

    models: with weights that sum to 1, none of them a network's. logit: by split, the mean of both models' logits,
    before recalibration.
    """

    models: PlainModels
    logit: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Fitted:
    """What is known of a baseline once it was fitted.

    probability: of each example of all splits but the training one, float64 (E,). num_fitted: training labels. library:
    whose it is. seconds: of making features and fitting. importance: `importances`, plain, and teacher_E: what
    `cross_fitted` gives, where they were asked for.
    """

    probability: Mapping[str, np.ndarray]
    spec: FeatureSpec
    chosen: dict[str, float]
    num_fitted: int
    library: str
    seconds: float
    importance: dict[str, dict[str, float]]
    plain: Plain | None
    teacher_E: np.ndarray | None

    def summary(self) -> dict[str, Any]:
        """What was chosen, and how many features of how many training labels it was fitted to, as plain values."""
        return {
            "chosen": self.chosen,
            "num_features": len(self.spec.columns),
            "num_fitted": self.num_fitted,
            "library": self.library,
            "seconds": self.seconds,
        }


def fitted_to(
    kind: Kind,
    histories: Histories,
    examples: Mapping[str, Examples],
    config: FeatureConfig,
    seed: int,
    folder: Location,
    here: bool = False,
    important: bool = False,
    plain: bool = False,
    teacher: bool = False,
) -> Fitted:
    """A baseline that chose its features from the train split's examples, was fitted to them and chosen on the tuning
    split's; where there are more labels than memory for them, to a sample that stands for all.

    folder: holds the features of all `examples` until then, and what a kill leaves. All is done in processes, or on a
    cluster; here: not there. important: importances, too. plain: what a bundle holds, too, in which logistic regression
    takes part where the table is small. teacher: what `cross_fitted` gives, too, of the same features and at the same
    time.

    Raises UserError where the memory does not suffice for a sample either; for a teacher as `cross_fitted`.
    """
    parts = [WHOLE, *(FOLDS if teacher else [])]
    given = parts, kind, histories, examples, config, seed, folder, here, important, plain
    arrays, about = _fit_parts(*given)
    return _fitted(arrays[WHOLE], _teacher(arrays, examples["train"], seed) if teacher else None, **about)


def _fit_parts(
    parts: Sequence[str],
    kind: Kind,
    histories: Histories,
    examples: Mapping[str, Examples],
    config: FeatureConfig,
    seed: int,
    folder: Location,
    here: bool,
    important: bool = False,
    plain: bool = False,
) -> tuple[Mapping[str, Mapping[str, np.ndarray]], dict[str, Any]]:
    """What `_fit` left of each part; and for `_fitted` the specification, labels, library and the features' seconds."""
    started, train, teaches = time.monotonic(), examples["train"], FOLDS[0] in parts
    if teaches:
        fold_E = _folds(train, seed)
        if any(len(np.unique(train.label_E[fold_E != fold])) < 2 for fold in FOLDS):
            raise UserError(f"too few labels for {len(FOLDS)} folds: without one of them there is only one class")
    with _features_in(folder):
        spec = chosen_in_parts(histories, train, config, folder, here)
        num_features, free = len(spec.columns), free_memory(here)
        kind, most = _affordable(kind, len(train), num_features, free // SPARE)
        if most < min(len(train), FEWEST_SAMPLED):
            raise UserError(
                f"{num_features} features of {FEWEST_SAMPLED} labels need more memory than is free ({free >> 20} MiB)"
            )
        if teaches and most < len(train):
            raise UserError(f"{len(train):,} labels need more memory than is free ({free >> 20} MiB)")
        train = train.sampled(most, seed)
        kinds = _kinds(kind, len(train), num_features, free // SPARE) if plain or teaches else [kind]
        needed = SPARE * max(_needed(each, len(train), num_features) for each in kinds)
        if kind == "lightgbm":
            size = f"{len(train):,} labels x {num_features:,} features"
            print(f"LightGBM: {size}, about {needed // SPARE >> 20:,} MiB of memory a fit")
        made_of = store_tables(histories, {**examples, "train": train}, spec, folder, here)
        made_of += f" {kinds} {seed} {important} {plain}"
        call = functools.partial(
            _fit, kinds=kinds, spec=spec, seed=seed, folder=folder, important=important, plain=plain
        )
        large = not here and len(train) * num_features >= WORTH_CELLS
        workers = min(len(parts), available_cpus(), max(1, free // needed)) if large else 1
        featured_s = time.monotonic() - started
        run_parts("fit", call, parts, folder / "fit", made_of, workers, here=here, num_bytes=needed)
        arrays = {part: load_arrays(folder / "fit" / f"{part}.npz") for part in parts}
    return arrays, {"spec": spec, "num_fitted": len(train), "library": LIBRARY[kind], "featured_s": featured_s}


def _affordable(kind: Kind, num_labels: int, num_features: int, num_bytes: int) -> tuple[Kind, int]:
    """How the labels are fitted, in so much memory, and to how many of them."""
    in_memory = num_bytes // _needed(kind, 1, num_features)
    soon = min(in_memory, CELLS_IN_MEMORY // num_features)
    if kind == "logistic_regression" or (kind == "gradient_boosting" and num_labels <= soon):
        return kind, in_memory
    try:
        lightgbm()
    except UserError:
        if kind == "lightgbm":
            raise
        return kind, in_memory
    most = (num_bytes - _needed("lightgbm", 0, num_features)) // (BINNED_BYTES_A_CELL * num_features)
    return ("lightgbm", most) if kind == "lightgbm" or most > in_memory else (kind, in_memory)


def _kinds(boosting: Kind, num_labels: int, num_features: int, num_bytes: int) -> list[Kind]:
    """Boosting of a table, and logistic regression where it is fitted as fast, and in so much memory."""
    small = boosting == "gradient_boosting" and num_labels * num_features <= CELLS_IN_MEMORY
    fits = _needed("logistic_regression", num_labels, num_features) <= num_bytes
    return [boosting, "logistic_regression"] if small and fits else [boosting]


def _needed(kind: Kind, num_labels: int, num_features: int) -> int:
    """Bytes that a fit holds, of LightGBM's besides the features, which are on disk."""
    if kind == "lightgbm":
        return (BINNED_BYTES_A_CELL * num_labels + BINS_BYTES_A_CELL * BINS_FROM) * num_features
    return BYTES_A_CELL[kind] * num_labels * num_features


@contextmanager
def _features_in(folder: Location) -> Iterator[None]:
    """Features are kept in the folder while the block runs; a kill leaves them for the same command."""
    try:
        yield
    except Exception:
        remove_tree(folder)
        raise
    remove_tree(folder)


def _fit(
    part: str, kinds: Sequence[Kind], spec: FeatureSpec, seed: int, folder: Location, important: bool, plain: bool
) -> None:
    """Fit the kinds to the tables in the folder, and write what `_fitted` or `_teacher` reads."""
    started = time.monotonic()
    with stored_tables(spec, folder) as tables:
        train, tuning = tables["train"], tables["tuning"]
        if part in FOLDS:
            own_E = _folds(train.examples, seed) == part
            others, own = train.only(~own_E), train.only(own_E)
            models, fraction = _fit_all(kinds, others, tuning, seed)
            logits_N = [calibration.logit(model.probability(own.value_EX)) for model in models]
            arrays = {"probability_N": expit((1 - fraction) * logits_N[0] + fraction * logits_N[-1])}
        else:
            models, fraction = _fit_all(kinds if plain else kinds[:1], train, tuning, seed)
            asked = {split: table.value_EX for split, table in tables.items() if split != "train"}
            arrays = {f"probability {split}": models[0].probability(value_EX) for split, value_EX in asked.items()}
            arrays |= _plain_arrays(models, fraction, spec, asked) if plain else {}
            found = {"chosen": models[0].chosen, "importance": {}, "seconds": time.monotonic() - started}
            if important:
                found["importance"] = importances(models[0], tuning, seed)
            arrays["found"] = np.array(json.dumps(found))
    save_arrays(folder / "fit" / f"{part}.npz", **arrays)


def _plain_arrays(
    models: Sequence[Baseline], fraction: float, spec: FeatureSpec, asked: Mapping[str, np.ndarray | Rows]
) -> dict[str, np.ndarray]:
    """What `_plain` reads: the models as a bundle has them, and the mean of their logits of the rows of each split."""
    columns, trees = models[0].trees(spec)
    column_Y, shift = np.array([spec.columns.index(column) for column in columns], np.int64), 0.0
    arrays = {**vars(trees), "column_Y": column_Y}
    logits = {split: _logit(trees, value_EX, column_Y) for split, value_EX in asked.items()}
    if fraction:
        linear, intercept = models[1].linear()
        linear_Y, shift = np.flatnonzero(models[1].known_X), fraction * intercept
        arrays |= {name: of_X for name, of_X in vars(linear).items() if name != "columns"} | {"linear_Y": linear_Y}
        for split, value_EX in asked.items():
            linear_E = _logit(linear, value_EX, linear_Y) + intercept
            logits[split] = (1 - fraction) * logits[split] + fraction * linear_E
    return {
        **arrays,
        **{f"logit {split}": logit_E for split, logit_E in logits.items()},
        "weights": np.array([0.0, 1 - fraction, shift, fraction]),
    }


def _logit(model: Trees | Linear, value_EX: np.ndarray | Rows, column_Y: np.ndarray) -> np.ndarray:
    return np.concatenate([model.logit(part_NX.take(column_Y, axis=1)) for part_NX in read_rows(value_EX)])


def _fit_all(
    kinds: Sequence[Kind], train: FeatureTable, tuning: FeatureTable, seed: int
) -> tuple[list[Baseline], float]:
    """Each kind, and the weight of the second one in the mean of both logits that predicts the tuning examples best; 0
    where there is one kind.
    """
    models = [fit(kind, train, tuning, seed) for kind in kinds]
    if len(models) == 1:
        return models, 0.0
    boosting_E, linear_E = (calibration.logit(model.probability(tuning.value_EX)) for model in models)

    def error(fraction: float) -> float:
        return cross_entropy(tuning.examples, expit((1 - fraction) * boosting_E + fraction * linear_E))

    return models, min(LINEAR_FRACTIONS, key=error)


def _fitted(arrays: Mapping[str, np.ndarray], teacher_E: np.ndarray | None, featured_s: float, **about: Any) -> Fitted:
    found = json.loads(str(arrays["found"]))
    seconds = featured_s + found["seconds"]
    plain = _plain(arrays, about["spec"]) if "column_Y" in arrays else None
    probability, chosen, importance = _by_split(arrays, "probability "), found["chosen"], found["importance"]
    return Fitted(
        probability, chosen=chosen, seconds=seconds, importance=importance, plain=plain, teacher_E=teacher_E, **about
    )


def _plain(arrays: Mapping[str, np.ndarray], spec: FeatureSpec) -> Plain:
    def of_spec(name: str) -> tuple[Column, ...]:
        return tuple(spec.columns[x] for x in arrays[name].tolist())

    trees, linear = Trees(*(arrays[field.name] for field in fields(Trees))), None
    if "linear_Y" in arrays:
        linear = Linear(of_spec("linear_Y"), *(arrays[field.name] for field in fields(Linear)[1:]))
    config = PlainConfig(spec.windows_hours, *arrays["weights"].tolist())
    return Plain(PlainModels(config, of_spec("column_Y"), trees, linear), _by_split(arrays, "logit "))


def _by_split(arrays: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(name): array for key, array in arrays.items() if key.startswith(name)}


def recalibrated(
    fitted: Fitted, examples: Mapping[str, Examples], scored: str
) -> tuple[dict[str, np.ndarray], dict[str, float | None]]:
    """Probabilities of the tuning and `scored` examples, recalibrated on the tuning split; `Recalibration.record`."""
    raw, tuning, asked = fitted.probability, examples["tuning"], examples[scored]
    recalibration = calibration.recalibrate(tuning.label_E, calibration.logit(raw["tuning"]), tuning.weight_E)
    probability = {split: recalibration.probability(raw[split]) for split in {"tuning", scored}}
    return probability, recalibration.record(asked.label_E, raw[scored], asked.weight_E)


@dataclass(frozen=True)
class Boosted:
    """Gradient boosting of a task, recalibrated on its tuning split.

    asked: the held-out examples. probability: of the tuning and held-out ones. found: its held-out scores and how it
    was fitted, as plain values. plain, teacher_E: where they were asked for.
    """

    asked: Examples
    probability: Mapping[str, np.ndarray]
    found: Mapping[str, Any]
    plain: Plain | None
    teacher_E: np.ndarray | None

    def compared(self, probability_E: np.ndarray) -> dict[str, Any]:
        """`found`, and as "difference" another model's held-out AUROC and AUPRC less its own."""
        return {**self.found, "difference": difference(self.asked, probability_E, self.probability["held_out"])}


def difference(asked: Examples, probability_E: np.ndarray, other_E: np.ndarray) -> dict[str, Any]:
    """A model's AUROC and AUPRC less another's, with intervals that hold together."""
    labels = asked.label_E, probability_E, other_E, asked.subject_id_E, asked.weight_E
    return metrics.paired_difference(*labels, metrics.LEVEL_OF_BOTH)


def boosted(
    histories: Histories,
    examples: Mapping[str, Examples],
    seed: int,
    folder: Location,
    plain: bool = False,
    teacher: bool = False,
) -> Boosted:
    """Gradient boosting of the examples of each split; train and tuning have both classes.

    folder, plain, teacher: as in `fitted_to`. Raises UserError and MemoryError where it could not be fitted.
    """
    asked_for = {"plain": plain, "teacher": teacher}
    fitted = fitted_to("gradient_boosting", histories, examples, FeatureConfig(), seed, folder, **asked_for)
    probability, recalibration = recalibrated(fitted, examples, "held_out")
    asked = examples["held_out"]
    scores = metrics.scores(asked.label_E, probability["held_out"], asked.subject_id_E, asked.weight_E)
    found = {name: scores[name] for name in metrics.SHOWN} | {
        "recalibration": recalibration,
        **fitted.summary(),
    }
    return Boosted(asked, probability, found, fitted.plain, fitted.teacher_E)


def cross_fitted(
    histories: Histories, train: Examples, tuning: Examples, seed: int, folder: Location, here: bool = False
) -> np.ndarray:
    """The probability of each training example (E,) by plain models that learned from no example of the same subject:
    the folds are of subjects. Gradient boosting, and where the table is small a mean of its logits and logistic
    regression's (stacking; Wolpert 1992). The tuning split chooses each model's settings, and the mean's weights.

    folder: as in `fitted_to`. here: a task of a cluster does it, alone. Raises UserError where there are too few labels
    to do without a fold, and where the memory does not suffice.
    """
    examples = {"train": train, "tuning": tuning}
    arrays, _ = _fit_parts(FOLDS, "gradient_boosting", histories, examples, FeatureConfig(), seed, folder, here)
    return _teacher(arrays, train, seed)


def _teacher(arrays: Mapping[str, Mapping[str, np.ndarray]], train: Examples, seed: int) -> np.ndarray:
    fold_E, probability_E = _folds(train, seed), np.empty(len(train))
    for fold in FOLDS:
        probability_E[fold_E == fold] = arrays[fold]["probability_N"]
    return probability_E


def _folds(train: Examples, seed: int) -> np.ndarray:
    """Each example's fold (E,), that of its subject."""
    subject_S, subject_E = np.unique(train.subject_id_E, return_inverse=True)
    return np.array(FOLDS)[np.random.default_rng(seed).permutation(len(subject_S)) % len(FOLDS)][subject_E]
