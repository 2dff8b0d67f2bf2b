"""Gradient boosting and other plain models of a table of aggregate features.

Shape legend: E examples, X features (see `hymate.data.features`), M marks of what is missing, Z both, N nodes of trees.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from scipy.special import expit
from threadpoolctl import threadpool_limits

from hymate.data.examples import Examples
from hymate.data.features import Column, FeatureSpec, FeatureTable, Rows, asked_often
from hymate.errors import UserError
from hymate.evaluation import metrics
from hymate.inference.plain import Linear, Trees, logarithmic

if TYPE_CHECKING:  # scikit-learn is imported where it is used: with pandas it takes more than a second
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

Kind = Literal["gradient_boosting", "logistic_regression", "lightgbm"]
LIBRARY: dict[Kind, str] = {
    "gradient_boosting": "scikit-learn",
    "logistic_regression": "scikit-learn",
    "lightgbm": "LightGBM",
}

# Of both kinds of boosting; chosen on the train and tuning splits of PhysioNet 2012, sets b + c.
LEARNING_RATE, NUM_LEAVES, LEAF_LABELS, L2, FEATURE_FRACTION, ROW_FRACTION = 0.02, 15, 20, 1.0, 0.1, 0.8
NUM_TREES = (150, 600)  # 600 where many variables matter; where few do they learn noise
# Of LightGBM alone. Labels of one patient resemble each other: where each has several, a leaf of LEAF_LABELS may be one
# patient. Chosen by cross-validation on the train and tuning splits of PhysioNet 2019, hour by hour; of 128 stays it is
# too much.
ALIKE_FROM = 20_000  # labels
ALIKE_SETTINGS = dict(min_data_in_leaf=200, lambda_l2=50.0, bagging_fraction=0.3, extra_trees=True)
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of logistic regression: 1 / penalty, rising
MOST_ITERATIONS = 2000
CLIP = (0.01, 0.99)  # quantiles of a feature in training: recording errors would otherwise set its scale

IMPORTANCE_LABELS, REPEATS = 2000, 3
DETAILED_VARIABLES = 10
INFINITE = 1e300  # how LightGBM writes a threshold that all numbers are below
BINS_FROM = 50_000  # labels that LightGBM chooses bins from
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
            parts = [self.classifier.predict_proba(part_NX[:, self.known_X])[:, 1] for part_NX in read_rows(value_EX)]
        return np.concatenate(parts)

    def trees(self, spec: FeatureSpec) -> tuple[tuple[Column, ...], Trees]:
        """Of boosting that was fitted to features of `spec`: those that its trees ask about, and the trees."""
        assert isinstance(self.classifier, _FirstTrees | _Booster)
        trees = self.classifier.trees_as_table()
        asked_X, number_N = np.unique(trees.feature_N[trees.feature_N >= 0], return_inverse=True)
        feature_N = trees.feature_N.copy()
        feature_N[feature_N >= 0] = number_N
        columns = tuple(spec.columns[x] for x in np.flatnonzero(self.known_X)[asked_X].tolist())
        return columns, replace(trees, feature_N=feature_N)

    def linear(self) -> tuple[Linear, float]:
        """Of logistic regression: its slopes, and its intercept."""
        assert isinstance(self.classifier, _Linear)
        return self.classifier.linear, self.classifier.intercept


def read_rows(value_EX: np.ndarray | Rows) -> Iterator[np.ndarray]:
    """The rows of a table, some at a time."""
    for start in range(0, len(value_EX), ROWS_AT_ONCE):
        yield value_EX[start : start + ROWS_AT_ONCE]


# ------------------------------------------------------------------------------------------------------- models


def fit(kind: Kind, train: FeatureTable, tuning: FeatureTable, seed: int) -> Baseline:
    """Fit on `train`, choose among the kind's candidates on `tuning`; both need both classes. Labels count by their
    weights.

    The same seed gives the same model. Raises UserError where the model's package is not installed.
    """
    known_X = np.zeros(len(train.spec.columns), bool)
    for part_NX in read_rows(train.value_EX):
        known_X |= ~np.isnan(part_NX).all(axis=0)
    positive_E = train.examples.label_E > 0.5
    weight_E = train.examples.weight_E / train.examples.weight_E.mean()  # a penalty is one for so many labels
    if kind == "lightgbm":
        alike = len(positive_E) >= ALIKE_FROM and asked_often(train.examples)
        fitted = _binned_boosting(train.value_EX, known_X, positive_E, weight_E, seed, alike)
    else:
        columns = tuple(column for column, known in zip(train.spec.columns, known_X, strict=True) if known)
        fitted = _fitted(kind, train.value_EX[:][:, known_X], positive_E, weight_E, columns, seed)
    models = [Baseline(classifier, known_X, chosen) for chosen, classifier in fitted]
    return min(models, key=lambda model: cross_entropy(tuning.examples, model.probability(tuning.value_EX)))


def _one_thread() -> threadpool_limits:
    """Of OpenMP: sums in one order on every machine, and no threads that wait spinning for cores that others use,
    which has made a fit of seconds take minutes. It holds for libraries that are imported by then.
    """
    return threadpool_limits(limits=1, user_api="openmp")


def _fitted(
    kind: Kind,
    value_EX: np.ndarray,
    positive_E: np.ndarray,
    weight_E: np.ndarray,
    columns: tuple[Column, ...],
    seed: int,
) -> list[tuple[dict[str, float], Classifier]]:
    """What is tried, and what it is called by in Baseline.chosen; nothing is random in logistic regression."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    with _one_thread():
        if kind == "gradient_boosting":
            # with weights scikit-learn seeks each bin's edge by itself, which takes longer than all the rest
            equal = weight_E.min() == weight_E.max()
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
            ).fit(value_EX, positive_E, sample_weight=None if equal else weight_E)
            return [({"trees": n}, _FirstTrees(boosting, n)) for n in NUM_TREES]
        design = _Design.of(value_EX, columns)
        given = design(value_EX), positive_E, weight_E
        model = LogisticRegression(max_iter=MOST_ITERATIONS, warm_start=True)  # each fit begins where the last ended
        return [({"C": c}, design.linear(model.set_params(C=c).fit(*given))) for c in STRENGTHS]


def _binned_boosting(
    value_EX: np.ndarray | Rows,
    known_X: np.ndarray,
    positive_E: np.ndarray,
    weight_E: np.ndarray,
    seed: int,
    alike: bool,
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
    ) | (ALIKE_SETTINGS if alike else {})
    data = package.Dataset(Known(), label=positive_E, weight=weight_E, params=settings)
    with _one_thread():
        booster = package.train(settings, data, num_boost_round=max(NUM_TREES))
    return [({"trees": n}, _Booster(booster, n)) for n in NUM_TREES]


@dataclass(frozen=True)
class _Booster:
    """The first trees of LightGBM's boosting."""

    booster: Any
    trees: int

    def trees_as_table(self) -> Trees:
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

    def trees_as_table(self) -> Trees:
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


@dataclass(frozen=True)
class _Linear:
    """Logistic regression."""

    linear: Linear
    intercept: float

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        positive_E = expit(self.linear.logit(x) + self.intercept)
        return np.stack([1 - positive_E, positive_E], axis=1)


@dataclass(frozen=True)
class _Design:
    """Features for logistic regression: logarithms of counts, clipped, standardised, the mean where missing.

    Beside them one mark for each pattern of missing values: the features of a variable are missing together.
    """

    columns: tuple[Column, ...]
    is_count_X: np.ndarray
    limits_2X: np.ndarray
    mean_X: np.ndarray
    scale_X: np.ndarray
    marked_M: np.ndarray

    @classmethod
    def of(cls, value_EX: np.ndarray, columns: tuple[Column, ...]) -> _Design:
        """From training values; every column has one."""
        missing_EX = np.isnan(value_EX)
        _, pattern_M = np.unique(np.packbits(missing_EX, axis=0), axis=1, return_index=True)
        marked_M = pattern_M[missing_EX[:, pattern_M].any(axis=0)]
        is_count_X = FeatureSpec((), columns).is_count_X
        value_EX = logarithmic(value_EX, is_count_X)
        low_X, high_X = limits_2X = np.nanquantile(value_EX, CLIP, axis=0)
        clipped_EX = value_EX.clip(low_X, high_X)
        mean_X = np.nanmean(clipped_EX, axis=0)
        scale_X = np.where(low_X < high_X, np.nanstd(clipped_EX, axis=0), 1)  # of a constant it is rounding errors
        return cls(columns, is_count_X, limits_2X, mean_X, scale_X, marked_M)

    def __call__(self, value_EX: np.ndarray) -> np.ndarray:
        z_EX = (logarithmic(value_EX, self.is_count_X).clip(*self.limits_2X) - self.mean_X) / self.scale_X
        return np.hstack([np.nan_to_num(z_EX), np.isnan(value_EX[:, self.marked_M])])

    def linear(self, model: LogisticRegression) -> _Linear:
        """A model of the design, as one of the features themselves: the same logits."""
        coefficient_Z = model.coef_[0]
        slope_X = coefficient_Z[: len(self.columns)] / self.scale_X
        missing_X = slope_X * self.mean_X
        intercept = float(model.intercept_[0] - missing_X.sum())
        missing_X[self.marked_M] += coefficient_Z[len(self.columns) :]
        low_X, high_X = self.limits_2X
        return _Linear(Linear(self.columns, low_X, high_X, slope_X, missing_X), intercept)


def cross_entropy(examples: Examples, probability_E: np.ndarray) -> float:
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

    def auroc(probability_E: np.ndarray) -> float:
        area = metrics.auroc(examples.label_E, probability_E, examples.weight_E)
        assert area is not None, "the examples have both classes"
        return area

    whole = auroc(model.probability(value_EX))
    groups = np.array(group_X)
    permuted = [group for group in sorted(set(group_X) - {""}) for _ in range(REPEATS)]
    falls = dict.fromkeys(permuted, 0.0)
    at_once = max(1, ROWS_AT_ONCE // len(value_EX))  # a call costs more than predicting a few rows
    for start in range(0, len(permuted), at_once):
        names = permuted[start : start + at_once]
        value_GEX = np.repeat(value_EX[None], len(names), axis=0)
        for own_EX, group in zip(value_GEX, names, strict=True):
            own_X = groups == group
            own_EX[:, own_X] = value_EX[:, own_X][rng.permutation(len(value_EX))]
        probability_GE = model.probability(value_GEX.reshape(-1, value_EX.shape[1])).reshape(len(names), -1)
        for group, probability_E in zip(names, probability_GE, strict=True):
            falls[group] += (whole - auroc(probability_E)) / REPEATS
    return dict(sorted(falls.items(), key=lambda item: -item[1]))


def importances(model: Baseline, table: FeatureTable, seed: int) -> dict[str, dict[str, float]]:
    """Of all variables, and of the features of the most important ones, among a sample of the examples."""
    about = 2 * IMPORTANCE_LABELS
    drawn_E = table.examples.sample_weights(about, seed) > 0
    sample = FeatureTable(table.spec, table.examples.sampled(about, seed), table.value_EX[drawn_E])
    variable_X = [column.variable for column in sample.spec.columns]
    variables = importance(model, sample, variable_X, seed)
    detailed = set(list(variables)[:DETAILED_VARIABLES])
    named = zip(sample.spec.names, variable_X, strict=True)
    return {
        "variables": variables,
        "features": importance(model, sample, [name if v in detailed else "" for name, v in named], seed),
    }
