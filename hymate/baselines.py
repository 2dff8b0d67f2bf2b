"""Command: what plain models make of aggregate features of the same histories and labels.

    python -m hymate.baselines data.path=DATA_DIR task=mortality out=DIR

Trains on the train split, chooses the number of trees or the strength of the penalty by the cross-entropy on the
tuning split, and scores the held-out split once. `out` then holds results.json (the scores of `hymate.metrics`, the
settings, the importance of variables and features) and predictions.parquet (the MEDS prediction schema).

Shape legend: E examples, X features (see `hymate.data.features`), M marks of what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from hymate import metrics
from hymate.config import ConfigError, TaskConfig, UserError, main, to_tree
from hymate.data.features import FeatureConfig, FeatureTable, choose, features
from hymate.data.histories import Histories
from hymate.data.loader import labelled_examples
from hymate.data.meds import SPLITS, write_parquet, write_text
from hymate.data.tasks import labels
from hymate.predict import prediction_table
from hymate.training.results import RESULTS, TABLE_WIDTH, score_rows

Kind = Literal["gradient_boosting", "logistic_regression", "lightgbm"]

# Chosen by cross-validation on the train and tuning splits of PhysioNet 2012, sets b + c.
MOST_TREES, TREES_STEP = 600, 25
LEARNING_RATE, MAX_LEAVES, MIN_LEAF, L2, FEATURE_SHARE, ROW_SHARE = 0.02, 15, 20, 1.0, 0.1, 0.8
MOST_ITERATIONS = 2000
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of the logistic regression: 1 / penalty
CLIP = (0.01, 0.99)  # quantiles of a feature in training: recording errors would otherwise set its scale

IMPORTANCE_LABELS, REPEATS, DETAILED_VARIABLES = 4000, 3, 10


@dataclass(frozen=True)
class DataPath:
    """path: a prepared dataset."""

    path: str


@dataclass(frozen=True)
class BaselinesConfig:
    """out: folder of the results; seed: of the trees' column and row samples and of the importance."""

    data: DataPath
    task: TaskConfig
    out: str
    model: Kind = "gradient_boosting"
    seed: int = 0
    features: FeatureConfig = field(default_factory=FeatureConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True)
class Baseline:
    """A fitted model.

    chosen: what the tuning split decided. probability: values (E, X) -> probability of each example (E,).
    """

    chosen: dict[str, float]
    probability: Callable[[np.ndarray], np.ndarray]


# ------------------------------------------------------------------------------------------------------- models


class _Split(NamedTuple):
    """What a model learns from: columns with a value in the train split, and the labels."""

    value_EX: np.ndarray
    is_positive_E: np.ndarray
    is_count_X: np.ndarray


def fit(kind: Kind, train: FeatureTable, tuning: FeatureTable, seed: int) -> Baseline:
    """Fit on `train`, choose on `tuning`; both need both classes. The same seed gives the same model.

    Raises UserError where the model's package is not installed.
    """
    models = {
        "gradient_boosting": _fit_gradient_boosting,
        "lightgbm": _fit_lightgbm,
        "logistic_regression": _fit_logistic_regression,
    }
    known_X = ~np.isnan(train.value_EX).all(axis=0)
    splits = [
        _Split(table.value_EX[:, known_X], table.examples.label_E > 0.5, table.spec.is_count_X[known_X])
        for table in (train, tuning)
    ]
    model = models[kind](*splits, seed)
    return Baseline(model.chosen, lambda value_EX: model.probability(value_EX[:, known_X]))


def _fit_gradient_boosting(train: _Split, tuning: _Split, seed: int) -> Baseline:
    model = HistGradientBoostingClassifier(
        learning_rate=LEARNING_RATE,
        max_iter=MOST_TREES,
        max_leaf_nodes=MAX_LEAVES,
        min_samples_leaf=MIN_LEAF,
        l2_regularization=L2,
        max_features=FEATURE_SHARE,
        early_stopping=False,
        random_state=seed,
    ).fit(train.value_EX, train.is_positive_E)

    def staged(value_EX: np.ndarray, first: int) -> Iterator[np.ndarray]:
        """Probabilities by the first `first` trees, and so on in steps."""
        stages = model.staged_predict_proba(value_EX)
        return (probability_E2[:, 1] for probability_E2 in islice(stages, first - 1, None, TREES_STEP))

    num_trees = TREES_STEP * (1 + _best(staged(tuning.value_EX, TREES_STEP), tuning))
    return Baseline({"num_trees": num_trees}, lambda value_EX: next(staged(value_EX, num_trees)))


def _fit_lightgbm(train: _Split, tuning: _Split, seed: int) -> Baseline:
    lightgbm = _lightgbm()
    settings = {
        "objective": "binary",
        "learning_rate": LEARNING_RATE,
        "num_leaves": MAX_LEAVES,
        "min_data_in_leaf": MIN_LEAF,
        "lambda_l2": L2,
        "feature_fraction": FEATURE_SHARE,
        "bagging_fraction": ROW_SHARE,
        "bagging_freq": 1,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    booster = lightgbm.train(
        settings, lightgbm.Dataset(train.value_EX, train.is_positive_E), num_boost_round=MOST_TREES
    )
    steps = range(TREES_STEP, MOST_TREES + 1, TREES_STEP)
    num_trees = steps[_best((booster.predict(tuning.value_EX, num_iteration=n) for n in steps), tuning)]
    return Baseline({"num_trees": num_trees}, lambda value_EX: booster.predict(value_EX, num_iteration=num_trees))


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise UserError(
            'model=lightgbm needs LightGBM: pip install "hymate[baselines]", or take model=gradient_boosting'
        ) from error
    return lightgbm


def _fit_logistic_regression(train: _Split, tuning: _Split, seed: int) -> Baseline:
    """Nothing in it is random."""
    design = _Design(train.value_EX, train.is_count_X)
    train_ED, tuning_ED = design(train.value_EX), design(tuning.value_EX)
    models = [LogisticRegression(C=c, max_iter=MOST_ITERATIONS).fit(train_ED, train.is_positive_E) for c in STRENGTHS]
    best = _best((model.predict_proba(tuning_ED)[:, 1] for model in models), tuning)
    return Baseline({"strength": STRENGTHS[best]}, lambda value_EX: models[best].predict_proba(design(value_EX))[:, 1])


class _Design:
    """Features for a linear model: logarithms of counts, clipped, standardised, the mean where missing.

    Beside them one mark for each pattern of missing values: the features of a variable are missing together.
    """

    def __init__(self, value_EX: np.ndarray, is_count_X: np.ndarray) -> None:
        """From the train split, where every column has a value."""
        self._is_count_X = is_count_X
        missing_EX = np.isnan(value_EX)
        _, pattern_M = np.unique(np.packbits(missing_EX, axis=0), axis=1, return_index=True)
        self._marked_M = pattern_M[missing_EX[:, pattern_M].any(axis=0)]
        value_EX = self._logarithmic(value_EX)
        self._limits_2X = np.nanquantile(value_EX, CLIP, axis=0)
        clipped_EX = value_EX.clip(*self._limits_2X)
        self._mean_X, deviation_X = np.nanmean(clipped_EX, axis=0), np.nanstd(clipped_EX, axis=0)
        self._scale_X = np.where(deviation_X > 0, deviation_X, 1)

    def __call__(self, value_EX: np.ndarray) -> np.ndarray:
        z_EX = (self._logarithmic(value_EX).clip(*self._limits_2X) - self._mean_X) / self._scale_X
        return np.hstack([np.nan_to_num(z_EX), np.isnan(value_EX[:, self._marked_M])])

    def _logarithmic(self, value_EX: np.ndarray) -> np.ndarray:
        value_EX = value_EX.astype(np.float64)
        value_EX[:, self._is_count_X] = np.log1p(value_EX[:, self._is_count_X])
        return value_EX


def _best(candidates: Iterable[np.ndarray], tuning: _Split) -> int:
    """Which probabilities have the least cross-entropy on the tuning split; AUROC and AUPRC of few positives jump."""
    losses = [-np.log(np.where(tuning.is_positive_E, p_E, 1 - p_E).clip(1e-12)).mean() for p_E in candidates]
    return int(np.argmin(losses))


def importance(model: Baseline, table: FeatureTable, group_X: Sequence[str], seed: int) -> dict[str, float]:
    """How much AUROC falls when the columns of a group are permuted together among the examples (Breiman 2001).

    group_X: the group of each column, "" for none. Mean over REPEATS permutations, the largest first, on at most
    IMPORTANCE_LABELS examples.
    """
    rng = np.random.default_rng(seed)
    chosen_E = np.sort(rng.permutation(len(table.examples))[:IMPORTANCE_LABELS])
    value_EX, label_E = table.value_EX[chosen_E], table.examples.label_E[chosen_E]
    whole = metrics.auroc(label_E, model.probability(value_EX))
    groups = np.array(group_X)
    falls = {}
    for group in sorted(set(group_X) - {""}):
        own_X = groups == group
        kept = value_EX[:, own_X]
        falls[group] = 0.0
        for _ in range(REPEATS):
            value_EX[:, own_X] = kept[rng.permutation(len(kept))]
            falls[group] += (whole - metrics.auroc(label_E, model.probability(value_EX))) / REPEATS
        value_EX[:, own_X] = kept
    return dict(sorted(falls.items(), key=lambda item: -item[1]))


# ------------------------------------------------------------------------------------------------------ command


def run(config: BaselinesConfig) -> None:
    """The command."""
    if config.model == "lightgbm":
        _lightgbm()
    root, out = Path(config.data.path), Path(config.out)
    histories = Histories.open(root)
    label_set = labels(root, config.task)
    examples = {split: labelled_examples(histories, label_set.table, split) for split in SPLITS}
    for split in ("train", "tuning"):
        positives = int((examples[split].label_E > 0.5).sum())
        if positives in (0, len(examples[split])):
            raise UserError(f"all {len(examples[split])} labels of the {split} split are alike: a model needs both")

    started = time.monotonic()
    spec = choose(histories, examples["train"], config.features)
    table = {split: features(histories, examples[split], spec) for split in SPLITS}
    computed = time.monotonic()
    model = fit(config.model, table["train"], table["tuning"], config.seed)
    fitted = time.monotonic()
    probability = {split: model.probability(table[split].value_EX) for split in ("tuning", "held_out")}
    scores = {
        split: metrics.scores(examples[split].label_E, p_E, examples[split].subject_id_E)
        for split, p_E in probability.items()
    }
    write_parquet(prediction_table(examples["held_out"], probability["held_out"]), out / "predictions.parquet")
    found = {
        "task": config.task.name,
        "model": config.model,
        "split": "held_out",
        **scores["held_out"],
        "tuning": {"split": "tuning", **scores["tuning"]},
        "chosen": model.chosen,
        "num_features": len(spec.columns),
        "seconds": {"features": computed - started, "fit": fitted - computed},
        "importance": _importances(model, table["tuning"], config.seed),
        "labels": label_set.counts,
        "data_fingerprint": histories.fingerprint,
        "config": to_tree(config),
    }
    oracle = root / "oracle" / f"{config.task.name}.json"
    if oracle.is_file():  # a synthetic cohort, whose law says how well anything can predict
        found["ceiling"] = json.loads(oracle.read_text())["ceiling"]["held_out"]
    write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", out / RESULTS)
    _show(found, out)


def _importances(model: Baseline, tuning: FeatureTable, seed: int) -> dict[str, dict[str, float]]:
    """Of all variables, and of the features of the most important ones."""
    variable_X = [column.variable for column in tuning.spec.columns]
    variables = importance(model, tuning, variable_X, seed)
    detailed = set(list(variables)[:DETAILED_VARIABLES])
    named = zip(tuning.spec.names, variable_X, strict=True)
    return {
        "variables": variables,
        "features": importance(model, tuning, [name if v in detailed else "" for name, v in named], seed),
    }


def _show(found: dict[str, Any], out: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    title = f"Task {found['task']}: {found['model'].replace('_', ' ')} on {found['num_features']} aggregate features"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    (header, tuning), (_, *rows) = score_rows(found["tuning"]), score_rows(found)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in (tuning, *rows):
        table.add_row(*row)
    console.print(table)
    chosen = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in found["chosen"].items())
    console.print(f"chosen on the tuning split: {chosen}", highlight=False)
    top = ", ".join(f"{name} {fall:.3f}" for name, fall in list(found["importance"]["variables"].items())[:5])
    console.print(f"fall of AUROC without a variable: {top}", highlight=False, soft_wrap=True)
    for name, file in (("results", RESULTS), ("predictions", "predictions.parquet")):
        console.print(f"{name:<12} {out / file}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main("baselines", BaselinesConfig, run)
