"""Gradient boosting and other plain models of aggregate features, and their comparison with another model.

Gradient boosting is scikit-learn's, which needs the whole table in memory, as long as that is there and the table is
small; else LightGBM's, where it is installed, which is faster, reads the table from disk and holds a byte a cell; else
that of a sample of labels.

Shape legend: E examples, X features (see `hymate.data.features`), M marks of what is missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits

from hymate.data.examples import Examples
from hymate.data.features import Column, FeatureConfig, FeatureSpec, FeatureTable, Rows
from hymate.data.histories import Histories
from hymate.errors import UserError
from hymate.evaluation import calibration, metrics
from hymate.evaluation.stored import chosen_in_parts, stored_tables
from hymate.inference.boosting import Trees
from hymate.machine import available_cpus, available_memory
from hymate.storage.paths import Location, remove_tree

Kind = Literal["gradient_boosting", "logistic_regression", "lightgbm"]
LIBRARY: dict[Kind, str] = {
    "gradient_boosting": "scikit-learn",
    "logistic_regression": "scikit-learn",
    "lightgbm": "LightGBM",
}

# Of both kinds of boosting; chosen on the train and tuning splits of PhysioNet 2012, sets b + c.
LEARNING_RATE, NUM_LEAVES, LEAF_LABELS, L2, FEATURE_FRACTION, ROW_FRACTION = 0.02, 15, 20, 1.0, 0.1, 0.8
FOLDS = 5  # of cross-fitting
FEATURES = ".features"  # in a run's folder, while they are needed
NUM_TREES = (150, 600)  # 600 where many variables matter; where few do they learn noise
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of logistic regression: 1 / penalty
MOST_ITERATIONS = 2000
CLIP = (0.01, 0.99)  # quantiles of a feature in training: recording errors would otherwise set its scale

IMPORTANCE_LABELS, REPEATS = 2000, 3
BYTES_A_CELL = 13  # of a feature table while a model is fitted: float32, scikit-learn's float64 copy, its bins
CELLS_IN_MEMORY = 7_000_000  # of a table that scikit-learn fits in a minute; LightGBM takes a tenth of that
BINNED_BYTES_A_CELL = 1  # LightGBM's bins
INFINITE = 1e300  # how LightGBM writes a threshold that all numbers are below
BINS_FROM, BINS_BYTES_A_CELL = 50_000, 16  # labels that LightGBM chooses bins from, and what it holds of them
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

    def probability(self, value_EX: np.ndarray | Rows) -> np.ndarray:
        """Probability of each row of a feature table, float64 (E,)."""
        with _one_thread():
            parts = [self.classifier.predict_proba(part_NX[:, self.known_X])[:, 1] for part_NX in _read(value_EX)]
        return np.concatenate(parts)

    def plain(self, spec: FeatureSpec) -> tuple[tuple[Column, ...], Trees]:
        """Of boosting that was fitted to features of `spec`: those that its trees ask about, and the trees."""
        assert isinstance(self.classifier, _FirstTrees | _Booster)
        trees = self.classifier.plain()
        asked_X, number_N = np.unique(trees.feature_N[trees.feature_N >= 0], return_inverse=True)
        feature_N = trees.feature_N.copy()
        feature_N[feature_N >= 0] = number_N
        columns = tuple(spec.columns[x] for x in np.flatnonzero(self.known_X)[asked_X].tolist())
        return columns, replace(trees, feature_N=feature_N)


def _read(value_EX: np.ndarray | Rows) -> Iterator[np.ndarray]:
    """The rows of a table, some at a time."""
    for start in range(0, len(value_EX), ROWS_AT_ONCE):
        yield value_EX[start : start + ROWS_AT_ONCE]


# ------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Fitted:
    """A baseline, the features that it was fitted to and is asked about, of each split, and of which library it is."""

    model: Baseline
    tables: Mapping[str, FeatureTable]
    library: str

    @property
    def spec(self) -> FeatureSpec:
        return self.tables["train"].spec

    def summary(self) -> dict[str, Any]:
        """What was chosen, and how many features of how many training labels it was fitted to, as plain values."""
        return {
            "chosen": self.model.chosen,
            "num_features": len(self.spec.columns),
            "num_fitted": len(self.tables["train"].examples),
            "library": self.library,
        }

    def probability(self, split: str) -> np.ndarray:
        """Of each example of a split, float64 (E,); never the whole table at once."""
        return self.model.probability(self.tables[split].value_EX)


def _affordable(kind: Kind, num_labels: int, num_features: int) -> tuple[Kind, int]:
    """How the labels are fitted, in half of the memory that is free, and to how many of them."""
    free = available_memory() // 2
    in_memory = free // (BYTES_A_CELL * num_features)
    soon = min(in_memory, CELLS_IN_MEMORY // num_features)
    if kind == "logistic_regression" or (kind == "gradient_boosting" and num_labels <= soon):
        return kind, in_memory
    try:
        lightgbm()
    except UserError:
        if kind == "lightgbm":
            raise
        return kind, in_memory
    most = (free - _binned_bytes(0, num_features)) // (BINNED_BYTES_A_CELL * num_features)
    return ("lightgbm", most) if kind == "lightgbm" or most > in_memory else (kind, in_memory)


def _binned_bytes(num_labels: int, num_features: int) -> int:
    """What LightGBM holds while it is fitted to labels whose features are on disk."""
    return (BINNED_BYTES_A_CELL * num_labels + BINS_BYTES_A_CELL * BINS_FROM) * num_features


@contextmanager
def fitted_to(
    kind: Kind,
    histories: Histories,
    examples: Mapping[str, Examples],
    config: FeatureConfig,
    seed: int,
    folder: Location,
    here: bool = False,
) -> Iterator[Fitted]:
    """A baseline that chose its features from the train split's examples, was fitted to them and chosen on the tuning
    split's; where there are more labels than memory for them, to a sample that stands for all.

    folder: holds the features of all `examples` while the block runs, and what a kill leaves of them. They are made by
    processes, or on a cluster. here: no cluster makes them.

    Raises UserError where the memory does not suffice for a sample either.
    """
    with _features_in(folder):
        spec = chosen_in_parts(histories, examples["train"], config, folder, here)
        num_labels, num_features = len(examples["train"]), len(spec.columns)
        kind, most = _affordable(kind, num_labels, num_features)
        if most < min(num_labels, FEWEST_SAMPLED):
            raise UserError(
                f"{num_features} features of {FEWEST_SAMPLED} labels need more memory than is free "
                f"({available_memory() >> 20} MiB)"
            )
        train = examples["train"].sampled(most, seed)
        if kind == "lightgbm":
            needed = _binned_bytes(len(train), num_features) >> 20
            print(f"LightGBM: {len(train):,} labels x {num_features:,} features, about {needed:,} MiB of memory")
        examples = {**examples, "train": train}
        with stored_tables(histories, examples, spec, folder, here) as tables:
            yield Fitted(fit(kind, tables["train"], tables["tuning"], seed), tables, LIBRARY[kind])


@contextmanager
def _features_in(folder: Location) -> Iterator[None]:
    """Features are kept in the folder while the block runs; a kill leaves them for the same command."""
    try:
        yield
    except Exception:
        remove_tree(folder)
        raise
    remove_tree(folder)


def fit(kind: Kind, train: FeatureTable, tuning: FeatureTable, seed: int) -> Baseline:
    """Fit on `train`, choose among the kind's candidates on `tuning`; both need both classes. Labels count by their
    weights.

    The same seed gives the same model. Raises UserError where the model's package is not installed.
    """
    known_X = np.zeros(len(train.spec.columns), bool)
    for part_NX in _read(train.value_EX):
        known_X |= ~np.isnan(part_NX).all(axis=0)
    positive_E, weight_E = train.examples.label_E > 0.5, train.examples.weight_E
    with _one_thread():
        if kind == "lightgbm":
            fitted = _binned_boosting(train.value_EX, known_X, positive_E, weight_E, seed)
        else:
            value_EX, is_count_X = train.value_EX[:][:, known_X], train.spec.is_count_X[known_X]
            fitted = _fitted(kind, value_EX, positive_E, weight_E, is_count_X, seed)
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
            max_bins=min(255, max(2, len(positive_E))),  # no feature fills more; empty ones only take time
            learning_rate=LEARNING_RATE,
            max_leaf_nodes=NUM_LEAVES,
            min_samples_leaf=LEAF_LABELS,
            l2_regularization=L2,
            max_features=FEATURE_FRACTION,
            early_stopping=False,
            random_state=seed,
        ).fit(value_EX, positive_E, sample_weight=weight_E)
        return [({"trees": n}, _FirstTrees(boosting, n)) for n in NUM_TREES]
    candidates = [
        ({"C": c}, make_pipeline(_Design(is_count_X), LogisticRegression(C=c, max_iter=MOST_ITERATIONS)))
        for c in STRENGTHS
    ]
    weights = {"logisticregression__sample_weight": weight_E}
    return [(chosen, classifier.fit(value_EX, positive_E, **weights)) for chosen, classifier in candidates]


def _binned_boosting(
    value_EX: np.ndarray | Rows, known_X: np.ndarray, positive_E: np.ndarray, weight_E: np.ndarray, seed: int
) -> list[tuple[dict[str, float], Classifier]]:
    """LightGBM's, which reads the rows twice, to choose bins and to bin them, and never holds more than their bins."""
    package = lightgbm()

    class Known(package.Sequence):  # type: ignore[name-defined]
        batch_size = 4096

        def __len__(self) -> int:
            return len(value_EX)

        def __getitem__(self, at: int | slice) -> np.ndarray:
            if isinstance(at, slice):
                return value_EX[at][:, known_X]
            return value_EX[at : at + 1][0, known_X].astype(np.float64)  # it asks for no less of its sample

    settings = dict(
        objective="binary",
        learning_rate=LEARNING_RATE,
        num_leaves=NUM_LEAVES,
        min_data_in_leaf=LEAF_LABELS,
        lambda_l2=L2,
        feature_fraction=FEATURE_FRACTION,
        bagging_fraction=ROW_FRACTION,
        bagging_freq=1,
        bin_construct_sample_cnt=BINS_FROM,
        num_threads=1,
        deterministic=True,
        force_col_wise=True,  # by rows it holds the bins twice
        seed=seed,
        verbosity=-1,
    )
    data = package.Dataset(Known(), label=positive_E, weight=weight_E, params=settings)
    booster = package.train(settings, data, num_boost_round=max(NUM_TREES))
    return [({"trees": n}, _Booster(booster, n)) for n in NUM_TREES]


@dataclass(frozen=True)
class _Booster:
    """The first trees of LightGBM's boosting."""

    booster: Any
    trees: int

    def plain(self) -> Trees:
        """As a bundle has them; features are numbered as in fitting."""
        nodes: list[tuple[int, float, bool, int, int, float]] = []

        def add(node: Mapping[str, Any]) -> int:
            at = len(nodes)
            nodes.append((-1, 0.0, False, -1, -1, node.get("leaf_value", 0.0)))
            if "split_feature" in node:
                threshold = node["threshold"] if node["threshold"] < INFINITE else np.inf
                missing_left = node["default_left"] if node["missing_type"] == "NaN" else threshold >= 0  # NaN is 0
                children = add(node["left_child"]), add(node["right_child"])
                nodes[at] = node["split_feature"], threshold, missing_left, *children, 0.0
            return at

        trees = self.booster.dump_model(num_iteration=self.trees)["tree_info"]
        root_T = np.array([add(tree["tree_structure"]) for tree in trees])
        return Trees(root_T, *_columns(zip(*nodes, strict=True)))

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        positive_N = self.booster.predict(x, num_iteration=self.trees, num_threads=1)
        return np.stack([1 - positive_N, positive_N], axis=1)


@dataclass(frozen=True)
class _FirstTrees:
    """The first trees of a fitted boosting: what it would be if it had been fitted with only so many."""

    boosting: HistGradientBoostingClassifier
    trees: int

    def plain(self) -> Trees:
        """As a bundle has them; features are numbered as in fitting. The first tree is the logit before all others."""
        of_trees = [predictor.nodes for (predictor,) in self.boosting._predictors[: self.trees]]
        node_N = np.concatenate(of_trees)
        root_T = 1 + np.cumsum([0, *map(len, of_trees)])[:-1]
        is_leaf_N, offset_N = node_N["is_leaf"].astype(bool), np.repeat(root_T, [len(nodes) for nodes in of_trees])
        start = -1, 0.0, False, -1, -1, float(self.boosting._baseline_prediction[0, 0])
        nodes = (
            np.where(is_leaf_N, -1, node_N["feature_idx"]),
            np.where(is_leaf_N, 0.0, node_N["num_threshold"]),
            node_N["missing_go_to_left"].astype(bool),
            *(np.where(is_leaf_N, -1, offset_N + node_N[side]) for side in ("left", "right")),
            np.where(is_leaf_N, node_N["value"], 0.0),
        )
        columns = [np.append(first, rest) for first, rest in zip(start, nodes, strict=True)]
        return Trees(np.append(0, root_T), *_columns(columns))

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return next(islice(self.boosting.staged_predict_proba(x), self.trees - 1, None))


def _columns(arrays: Iterable[Any]) -> Iterator[np.ndarray]:
    """The arrays of `Trees` but for the roots, in their types."""
    types = np.int32, np.float64, bool, np.int32, np.int32, np.float64
    return (np.array(array, of) for array, of in zip(arrays, types, strict=True))


def lightgbm() -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import lightgbm
    except ImportError as error:
        raise UserError(
            'baseline=lightgbm needs LightGBM: pip install "hymate[baselines]", or take baseline=gradient_boosting'
        ) from error
    log = logging.getLogger("lightgbm")
    log.setLevel(logging.ERROR)  # its parameter for this is not handed to the making of bins
    lightgbm.register_logger(log)
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
    falls: dict[str, float] = {}
    for group in sorted(set(group_X) - {""}):
        own_X = groups == group
        kept = value_EX[:, own_X]
        for _ in range(REPEATS):
            value_EX[:, own_X] = kept[rng.permutation(len(kept))]
            falls[group] = falls.get(group, 0.0) + (whole - auroc()) / REPEATS
        value_EX[:, own_X] = kept
    return dict(sorted(falls.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class PlainTrees:
    """Boosting as a bundle holds it; logit: of the tuning and held-out examples, before recalibration."""

    windows_hours: tuple[float, ...]
    columns: tuple[Column, ...]
    trees: Trees
    logit: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Boosted:
    """Gradient boosting of a task, recalibrated on its tuning split.

    asked: the held-out examples. probability: of the tuning and held-out ones. found: its held-out scores and how it
    was fitted, as plain values. plain: where it was asked for.
    """

    asked: Examples
    probability: Mapping[str, np.ndarray]
    found: Mapping[str, Any]
    plain: PlainTrees | None

    @property
    def recalibration(self) -> calibration.Recalibration:
        return calibration.Recalibration(*(self.found["recalibration"][key] for key in ("temperature", "shift")))

    def compared(self, probability_E: np.ndarray) -> dict[str, Any]:
        """`found`, and as "difference" another model's held-out AUROC and AUPRC less its own."""
        return {**self.found, "difference": difference(self.asked, probability_E, self.probability["held_out"])}


def difference(asked: Examples, probability_E: np.ndarray, other_E: np.ndarray) -> dict[str, Any]:
    """A model's AUROC and AUPRC less another's, with intervals that hold together."""
    labels = asked.label_E, probability_E, other_E, asked.subject_id_E, asked.weight_E
    return metrics.paired_difference(*labels, metrics.LEVEL_OF_BOTH)


def boosted(
    histories: Histories, examples: Mapping[str, Examples], seed: int, folder: Location, plain: bool = False
) -> Boosted:
    """Gradient boosting of the examples of each split; train and tuning have both classes.

    folder: as in `fitted_to`. plain: whether a bundle will hold it. Raises UserError and MemoryError where it could not
    be fitted.
    """
    started = time.monotonic()
    with fitted_to("gradient_boosting", histories, examples, FeatureConfig(), seed, folder) as fitted:
        probability, recalibration = recalibrated(fitted, "held_out")
        seconds = time.monotonic() - started
        trees = _plain(fitted) if plain else None
    asked = examples["held_out"]
    scores = metrics.scores(asked.label_E, probability["held_out"], asked.subject_id_E, asked.weight_E)
    found = {name: scores[name] for name in metrics.SHOWN} | {
        "recalibration": recalibration,
        **fitted.summary(),
        "seconds": seconds,
    }
    return Boosted(asked, probability, found, trees)


def _plain(fitted: Fitted) -> PlainTrees:
    columns, trees = fitted.model.plain(fitted.spec)
    at_X = [fitted.spec.columns.index(column) for column in columns]
    logit = {
        split: np.concatenate([trees.logit(part_NX[:, at_X]) for part_NX in _read(fitted.tables[split].value_EX)])
        for split in ("tuning", "held_out")
    }
    return PlainTrees(fitted.spec.windows_hours, columns, trees, logit)


def recalibrated(fitted: Fitted, scored: str) -> tuple[dict[str, np.ndarray], dict[str, float | None]]:
    """Probabilities of the tuning and `scored` examples, recalibrated on the tuning split; `Recalibration.record`."""
    raw = {split: fitted.probability(split) for split in {"tuning", scored}}
    tuning, asked = fitted.tables["tuning"].examples, fitted.tables[scored].examples
    recalibration = calibration.recalibrate(tuning.label_E, calibration.logit(raw["tuning"]), tuning.weight_E)
    probability = {split: recalibration.probability(raw_E) for split, raw_E in raw.items()}
    return probability, recalibration.record(asked.label_E, raw[scored], asked.weight_E)


def cross_fitted(
    histories: Histories, train: Examples, tuning: Examples, seed: int, folder: Location, here: bool = False
) -> np.ndarray:
    """Gradient boosting's probability of each training example (E,), by a model that learned from no example of the
    same subject: the folds are of subjects. The tuning split chooses each model's number of trees.

    folder: as in `fitted_to`. here: no cluster makes the features. Raises UserError where there are too few labels to
    do without a fold, and where the memory does not suffice.
    """
    subject_S, subject_E = np.unique(train.subject_id_E, return_inverse=True)
    fold_E = (np.random.default_rng(seed).permutation(len(subject_S)) % FOLDS)[subject_E]
    known_E = ~np.isnan(train.label_E)
    for fold in range(FOLDS):
        if len(np.unique(train.label_E[known_E & (fold_E != fold)])) < 2:
            raise UserError(f"too few labels for {FOLDS} folds: without one of them there is only one class")

    with _features_in(folder):
        spec = chosen_in_parts(histories, train, FeatureConfig(), folder, here)
        kind, most = _affordable("gradient_boosting", len(train), len(spec.columns))
        if most < len(train):
            shape = len(train), len(spec.columns)
            needed = 2 * (_binned_bytes(*shape) if kind == "lightgbm" else BYTES_A_CELL * shape[0] * shape[1])
            raise UserError(f"it needs {needed >> 20} MiB of free memory, and {available_memory() >> 20} MiB are free")
        with stored_tables(histories, {"train": train, "tuning": tuning}, spec, folder, here) as tables:

            def left_out(fold: int) -> np.ndarray:
                model = fit(kind, tables["train"].only(known_E & (fold_E != fold)), tables["tuning"], seed)
                return model.probability(tables["train"].only(fold_E == fold).value_EX)

            probability_E = np.empty(len(train))
            with ThreadPoolExecutor(available_cpus()) as pool:
                # a model of a table on disk has the memory to itself; and LightGBM is silent in this thread alone
                folds = pool.map if kind == "gradient_boosting" else map
                for fold, probability in enumerate(folds(left_out, range(FOLDS))):
                    probability_E[fold_E == fold] = probability
    return probability_E
