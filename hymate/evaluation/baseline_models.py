"""Gradient boosting and other plain models of aggregate features, and their comparison with another model.

Shape legend: E examples, X features (see `hymate.evaluation.features`), M marks of what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits

from hymate.data.examples import Examples
from hymate.data.histories import Histories
from hymate.errors import UserError
from hymate.evaluation import calibration, metrics
from hymate.evaluation.features import FeatureConfig, FeatureSpec, FeatureTable, choose, features
from hymate.machine import available_cpus, available_memory

Kind = Literal["gradient_boosting", "logistic_regression", "lightgbm"]

# Of both kinds of boosting; chosen on the train and tuning splits of PhysioNet 2012, sets b + c.
LEARNING_RATE, NUM_LEAVES, LEAF_LABELS, L2, FEATURE_FRACTION, ROW_FRACTION = 0.02, 15, 20, 1.0, 0.1, 0.8
FOLDS = 5  # of cross-fitting
NUM_TREES = (150, 600)  # 600 where many variables matter; where few do they learn noise
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of logistic regression: 1 / penalty
MOST_ITERATIONS = 2000
CLIP = (0.01, 0.99)  # quantiles of a feature in training: recording errors would otherwise set its scale

IMPORTANCE_LABELS, REPEATS = 2000, 3
BYTES_A_CELL = 13  # of a feature table while a model is fitted: float32, scikit-learn's float64 copy, its bins
FEWEST_SAMPLED = 2_000  # labels that are worth fitting to, where there are more
ROWS_AT_ONCE = 20_000  # of a feature table that is only predicted for


class Classifier(Protocol):
    """A fitted one, as scikit-learn has them."""

    def predict_proba(self, x: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Baseline:
    """A fitted classifier of the features that had a value in training, and what the tuning split chose."""

    classifier: Classifier
    known_X: np.ndarray
    chosen: dict[str, float]

    def probability(self, value_EX: np.ndarray) -> np.ndarray:
        """Probability of each row of a feature table, float64 (E,)."""
        with _one_thread():
            return self.classifier.predict_proba(value_EX[:, self.known_X])[:, 1]


# ------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Fitted:
    """A baseline, the columns that it reads, and how many training labels it was fitted to."""

    model: Baseline
    spec: FeatureSpec
    num_labels: int

    def probability(self, histories: Histories, examples: Examples) -> np.ndarray:
        """Of each example, float64 (E,); never the whole table at once."""
        starts = range(0, len(examples), ROWS_AT_ONCE)
        parts = [examples.only(np.arange(start, min(start + ROWS_AT_ONCE, len(examples)))) for start in starts]
        return np.concatenate([self.model.probability(features(histories, p, self.spec).value_EX) for p in parts])


def _most_labels(spec: FeatureSpec) -> int:
    """To how many labels a model can be fitted in half of the memory that is free."""
    return available_memory() // (2 * BYTES_A_CELL * len(spec.columns))


def fit_to(
    kind: Kind, histories: Histories, train: Examples, tuning: Examples, config: FeatureConfig, seed: int
) -> Fitted:
    """Choose features and fit; where there are more labels than memory for them, on a sample that stands for all.

    Raises UserError where the memory does not suffice for a sample either.
    """
    spec = choose(histories, train, config)
    most = _most_labels(spec)
    if most < min(len(train), FEWEST_SAMPLED):
        raise UserError(
            f"{len(spec.columns)} features of {FEWEST_SAMPLED} labels need more memory than is free "
            f"({available_memory() >> 20} MiB)"
        )
    train, tuning = train.sampled(most, seed), tuning.sampled(most // 4, seed)
    model = fit(kind, features(histories, train, spec), features(histories, tuning, spec), seed)
    return Fitted(model, spec, len(train))


def fit(kind: Kind, train: FeatureTable, tuning: FeatureTable, seed: int) -> Baseline:
    """Fit on `train`, choose among the kind's candidates on `tuning`; both need both classes. Labels count by their
    weights.

    The same seed gives the same model. Raises UserError where the model's package is not installed.
    """
    known_X = ~np.isnan(train.value_EX).all(axis=0)
    with _one_thread():
        value_EX, positive_E = train.value_EX[:, known_X], train.examples.label_E > 0.5
        fitted = _fitted(kind, value_EX, positive_E, train.examples.weight_E, train.spec.is_count_X[known_X], seed)
    models = [Baseline(classifier, known_X, chosen) for chosen, classifier in fitted]
    return min(models, key=lambda model: _cross_entropy(tuning.examples, model.probability(tuning.value_EX)))


def _one_thread() -> threadpool_limits:
    """Of OpenMP: sums in one order on every machine, and no threads that wait spinning for cores that others use,
    which has made a fit of seconds take minutes.
    """
    return threadpool_limits(limits=1, user_api="openmp")


def _fitted(
    kind: Kind,
    value_EX: np.ndarray,
    positive_E: np.ndarray,
    weight_E: np.ndarray,
    is_count_X: np.ndarray,
    seed: int,
) -> list[tuple[dict[str, float], Classifier]]:
    """What is tried, and what it is called by in Baseline.chosen; nothing is random in logistic regression."""
    if kind == "gradient_boosting":
        boosting = HistGradientBoostingClassifier(
            max_iter=max(NUM_TREES),
            learning_rate=LEARNING_RATE,
            max_leaf_nodes=NUM_LEAVES,
            min_samples_leaf=LEAF_LABELS,
            l2_regularization=L2,
            max_features=FEATURE_FRACTION,
            early_stopping=False,
            random_state=seed,
        ).fit(value_EX, positive_E, sample_weight=weight_E)
        return [({"trees": n}, _FirstTrees(boosting, n)) for n in NUM_TREES]
    if kind == "lightgbm":
        settings = dict(
            learning_rate=LEARNING_RATE,
            num_leaves=NUM_LEAVES,
            min_child_samples=LEAF_LABELS,
            reg_lambda=L2,
            colsample_bytree=FEATURE_FRACTION,
            subsample=ROW_FRACTION,
            subsample_freq=1,
            n_jobs=1,
            deterministic=True,
            force_row_wise=True,
            random_state=seed,
            verbosity=-1,
        )
        candidates: list[tuple[dict[str, float], Any]] = [
            ({"trees": n}, lightgbm().LGBMClassifier(n_estimators=n, **settings)) for n in NUM_TREES
        ]
    else:
        candidates = [
            ({"C": c}, make_pipeline(_Design(is_count_X), LogisticRegression(C=c, max_iter=MOST_ITERATIONS)))
            for c in STRENGTHS
        ]
    weights = {("sample_weight" if kind == "lightgbm" else "logisticregression__sample_weight"): weight_E}
    return [(chosen, classifier.fit(value_EX, positive_E, **weights)) for chosen, classifier in candidates]


@dataclass(frozen=True)
class _FirstTrees:
    """The first trees of a fitted boosting: what it would be if it had been fitted with only so many."""

    boosting: HistGradientBoostingClassifier
    trees: int

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return next(islice(self.boosting.staged_predict_proba(x), self.trees - 1, None))


def lightgbm() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import lightgbm
    except ImportError as error:
        raise UserError(
            'baseline=lightgbm needs LightGBM: pip install "hymate[baselines]", or take baseline=gradient_boosting'
        ) from error
    return lightgbm


class _Design(BaseEstimator, TransformerMixin):
    """Features for a linear model: logarithms of counts, clipped, standardised, the mean where missing.

    Beside them one mark for each pattern of missing values: the features of a variable are missing together.
    """

    def __init__(self, is_count_X: np.ndarray) -> None:
        self.is_count_X = is_count_X

    def fit(self, value_EX: np.ndarray, y: object = None) -> _Design:
        """From training values; every column has one."""
        missing_EX = np.isnan(value_EX)
        _, pattern_M = np.unique(np.packbits(missing_EX, axis=0), axis=1, return_index=True)
        self.marked_M_ = pattern_M[missing_EX[:, pattern_M].any(axis=0)]
        value_EX = self._logarithmic(value_EX)
        self.limits_2X_ = np.nanquantile(value_EX, CLIP, axis=0)
        clipped_EX = value_EX.clip(*self.limits_2X_)
        self.mean_X_, deviation_X = np.nanmean(clipped_EX, axis=0), np.nanstd(clipped_EX, axis=0)
        self.scale_X_ = np.where(deviation_X > 0, deviation_X, 1)
        return self

    def transform(self, value_EX: np.ndarray) -> np.ndarray:
        z_EX = (self._logarithmic(value_EX).clip(*self.limits_2X_) - self.mean_X_) / self.scale_X_
        return np.hstack([np.nan_to_num(z_EX), np.isnan(value_EX[:, self.marked_M_])])

    def _logarithmic(self, value_EX: np.ndarray) -> np.ndarray:
        value_EX = value_EX.astype(np.float64)
        value_EX[:, self.is_count_X] = np.log1p(value_EX[:, self.is_count_X])
        return value_EX


def _cross_entropy(examples: Examples, probability_E: np.ndarray) -> float:
    """What settings are chosen by: AUROC and AUPRC of few positives jump."""
    right_E = np.where(examples.label_E > 0.5, probability_E, 1 - probability_E)
    return float(np.average(-np.log(right_E.clip(1e-12)), weights=examples.weight_E))


def importance(model: Baseline, table: FeatureTable, group_X: Sequence[str], seed: int) -> dict[str, float]:
    """How much AUROC falls when the columns of a group are permuted together among the examples (Breiman 2001).

    group_X: the group of each column, "" for none. Mean over REPEATS permutations, the largest first, on at most
    IMPORTANCE_LABELS examples of each class.
    """
    rng = np.random.default_rng(seed)
    shuffled_E = rng.permutation(len(table.examples))
    classes = [shuffled_E[table.examples.label_E[shuffled_E] == label][:IMPORTANCE_LABELS] for label in (0, 1)]
    chosen_E = np.concatenate(classes)
    value_EX, examples = table.value_EX[chosen_E], table.examples.only(chosen_E)

    def auroc() -> float:
        area = metrics.auroc(examples.label_E, model.probability(value_EX), examples.weight_E)
        assert area is not None, "the examples have both classes"
        return area

    whole = auroc()
    groups = np.array(group_X)
    falls = {}
    for group in sorted(set(group_X) - {""}):
        own_X = groups == group
        kept = value_EX[:, own_X]
        falls[group] = 0.0
        for _ in range(REPEATS):
            value_EX[:, own_X] = kept[rng.permutation(len(kept))]
            falls[group] += (whole - auroc()) / REPEATS
        value_EX[:, own_X] = kept
    return dict(sorted(falls.items(), key=lambda item: -item[1]))


def compare(
    histories: Histories, examples: Mapping[str, Examples], probability_E: np.ndarray, seed: int
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Gradient boosting beside another model, whose probabilities of the held-out examples are `probability_E`.

    examples: of each split; train and tuning have both classes. Returns boosting's held-out scores, recalibrated on the
    tuning split as the other model is, and how they were come by, with the other model's AUROC and AUPRC less its own
    as "difference", and its held-out probabilities; or why it could not be fitted as "left_out", and None: what is
    compared with it has cost hours and must not be lost.
    """
    started = time.monotonic()
    try:
        parts = (examples["train"], examples["tuning"])
        fitted = fit_to("gradient_boosting", histories, *parts, FeatureConfig(), seed)
        boosting, recalibration = recalibrated(fitted, histories, examples, "held_out")
    except (UserError, MemoryError) as error:
        return {"left_out": str(error)}, None
    seconds = time.monotonic() - started
    asked, boosting_E = examples["held_out"], boosting["held_out"]
    label_E, subject_id_E, weight_E = asked.label_E, asked.subject_id_E, asked.weight_E
    scores = metrics.scores(label_E, boosting_E, subject_id_E, weight_E)
    found = {name: scores[name] for name in metrics.SHOWN} | {
        "difference": metrics.paired_difference(
            label_E, probability_E, boosting_E, subject_id_E, weight_E, metrics.LEVEL_OF_BOTH
        ),
        "recalibration": recalibration,
        "chosen": fitted.model.chosen,
        "num_features": len(fitted.spec.columns),
        "num_fitted": fitted.num_labels,
        "seconds": seconds,
    }
    return found, boosting_E


def recalibrated(
    fitted: Fitted, histories: Histories, examples: Mapping[str, Examples], scored: str
) -> tuple[dict[str, np.ndarray], dict[str, float | None]]:
    """Probabilities of the tuning and `scored` examples, recalibrated on the tuning split; `Recalibration.record`."""
    raw = {split: fitted.probability(histories, examples[split]) for split in {"tuning", scored}}
    tuning, asked = examples["tuning"], examples[scored]
    recalibration = calibration.recalibrate(tuning.label_E, calibration.logit(raw["tuning"]), tuning.weight_E)
    probability = {split: recalibration.probability(raw_E) for split, raw_E in raw.items()}
    return probability, recalibration.record(asked.label_E, raw[scored], asked.weight_E)


def cross_fitted(histories: Histories, train: Examples, tuning: Examples, seed: int) -> np.ndarray:
    """Gradient boosting's probability of each training example (E,), by a model that learned from no example of the
    same subject: the folds are of subjects. The tuning split chooses each model's number of trees.

    Raises UserError where there are too few labels to do without a fold, and where the memory does not suffice.
    """
    spec = choose(histories, train, FeatureConfig())
    if _most_labels(spec) < len(train):
        needed = 2 * BYTES_A_CELL * len(spec.columns) * len(train)
        raise UserError(f"it needs {needed >> 20} MiB of free memory, and {available_memory() >> 20} MiB are free")
    table, tuning_table = (features(histories, examples, spec) for examples in (train, tuning))
    subject_S, subject_E = np.unique(train.subject_id_E, return_inverse=True)
    fold_E = (np.random.default_rng(seed).permutation(len(subject_S)) % FOLDS)[subject_E]
    known_E = ~np.isnan(train.label_E)

    def left_out(fold: int) -> np.ndarray:
        model = fit("gradient_boosting", table.only(known_E & (fold_E != fold)), tuning_table, seed)
        return model.probability(table.value_EX[fold_E == fold])

    for fold in range(FOLDS):
        if len(np.unique(train.label_E[known_E & (fold_E != fold)])) < 2:
            raise UserError(f"too few labels for {FOLDS} folds: without one of them there is only one class")
    probability_E = np.empty(len(train))
    with ThreadPoolExecutor(available_cpus()) as pool:
        for fold, probability in enumerate(pool.map(left_out, range(FOLDS))):
            probability_E[fold_E == fold] = probability
    return probability_E
