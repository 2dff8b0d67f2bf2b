"""Command: what plain models make of aggregate features of the same histories and labels.

    python -m hymate.baselines data.path=DATA_DIR task=mortality out=DIR

Trains on the train split, chooses on the tuning split (the number of trees, or the strength of logistic regression's
penalty), recalibrates the probabilities there as a search does, and scores the held-out split once (labels without
held-out patients are scored on the tuning split, with a note). `out` then holds results.json (the scores of
`hymate.evaluation.metrics`, what was chosen, the importance of variables and features), predictions.parquet (the MEDS
prediction schema) and run.json (the settings).

Shape legend: E examples, X features (see `hymate.evaluation.features`), M marks of what is missing.
"""

from __future__ import annotations

if __name__ == "__main__":
    from hymate import ending

    ending.watch()  # the imports take seconds

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits

from hymate.command import RECORD, main
from hymate.config import ConfigError, Place, TaskConfig, UserError
from hymate.data.examples import Examples, labelled_examples, require_both_classes
from hymate.data.histories import Histories
from hymate.data.meds import SPLITS, write_parquet
from hymate.data.tasks import LabelSet, labels
from hymate.evaluation import decisions, metrics
from hymate.evaluation.features import FeatureConfig, FeatureTable, choose, features
from hymate.evaluation.report import NO_HELD_OUT, RESULTS, score_rows
from hymate.evaluation.tables import new_console
from hymate.predict import prediction_table
from hymate.runs import recorded
from hymate.storage.paths import Location, locate, require_folder, write_text
from hymate.training.pretraining import available_cpus

Kind = Literal["gradient_boosting", "logistic_regression", "lightgbm"]

# Of both kinds of boosting; chosen on the train and tuning splits of PhysioNet 2012, sets b + c.
LEARNING_RATE, NUM_LEAVES, LEAF_LABELS, L2, FEATURE_SHARE, ROW_SHARE = 0.02, 15, 20, 1.0, 0.1, 0.8
FOLDS = 5  # of cross-fitting
NUM_TREES = (150, 600)  # 600 where many variables matter; where few do they learn noise
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of logistic regression: 1 / penalty
MOST_ITERATIONS = 2000
CLIP = (0.01, 0.99)  # quantiles of a feature in training: recording errors would otherwise set its scale

IMPORTANCE_LABELS, REPEATS, DETAILED_VARIABLES = 2000, 3, 10


@dataclass(frozen=True)
class DataPath:
    """path: a prepared dataset."""

    path: Place


@dataclass(frozen=True)
class BaselinesConfig:
    """`python -m hymate.baselines`'s configuration.

    out: folder of the results.
    baseline: the classifier of the features.
    seed: of the trees' column and row samples and of the importance.
    features: aggregates of each variable before the prediction time.
    """

    data: DataPath
    task: TaskConfig
    out: Place
    baseline: Kind = "gradient_boosting"
    seed: int = 0
    features: FeatureConfig = field(default_factory=FeatureConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")


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
            max_features=FEATURE_SHARE,
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
            colsample_bytree=FEATURE_SHARE,
            subsample=ROW_SHARE,
            subsample_freq=1,
            n_jobs=1,
            deterministic=True,
            force_row_wise=True,
            random_state=seed,
            verbosity=-1,
        )
        candidates: list[tuple[dict[str, float], Any]] = [
            ({"trees": n}, _lightgbm().LGBMClassifier(n_estimators=n, **settings)) for n in NUM_TREES
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


def _lightgbm() -> Any:
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
        spec = choose(histories, examples["train"], FeatureConfig())
        train, tuning = (features(histories, examples[split], spec) for split in ("train", "tuning"))
        model = fit("gradient_boosting", train, tuning, seed)
        held_out = features(histories, examples["held_out"], spec)
        boosting, recalibration = _recalibrated(model, {"tuning": tuning, "held_out": held_out})
    except (UserError, MemoryError) as error:
        return {"left_out": str(error)}, None
    seconds = time.monotonic() - started
    asked, boosting_E = examples["held_out"], boosting["held_out"]
    label_E, subject_id_E, weight_E = asked.label_E, asked.subject_id_E, asked.weight_E
    scores = metrics.scores(label_E, boosting_E, subject_id_E, weight_E)
    found = {name: scores[name] for name in ("auroc", "auprc", "brier", "ece")} | {
        "difference": metrics.paired_difference(
            label_E, probability_E, boosting_E, subject_id_E, weight_E, metrics.LEVEL_OF_BOTH
        ),
        "recalibration": recalibration,
        "chosen": model.chosen,
        "num_features": len(spec.columns),
        "seconds": seconds,
    }
    return found, boosting_E


def _recalibrated(
    model: Baseline, tables: Mapping[str, FeatureTable], scored: str = "held_out"
) -> tuple[dict[str, np.ndarray], dict[str, float | None]]:
    """Probabilities of the tuning and `scored` examples, recalibrated on the tuning split, and what that changed."""
    raw = {split: model.probability(tables[split].value_EX) for split in {"tuning", scored}}
    tuning, asked = (tables[split].examples for split in ("tuning", scored))
    recalibration = decisions.recalibrate(tuning.label_E, decisions.logit(raw["tuning"]), tuning.weight_E)
    before = metrics.ece(asked.label_E, raw[scored], asked.weight_E)
    probability = {split: recalibration.probability(raw_E) for split, raw_E in raw.items()}
    return probability, {**asdict(recalibration), "ece_before": before}


def cross_fitted(histories: Histories, train: Examples, tuning: Examples, seed: int) -> np.ndarray:
    """Gradient boosting's probability of each training example (E,), by a model that learned from no example of the
    same subject: the folds are of subjects. The tuning split chooses each model's number of trees.

    Raises UserError where there are too few labels to do without a fold.
    """
    spec = choose(histories, train, FeatureConfig())
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


# ------------------------------------------------------------------------------------------------------ command


def run(config: BaselinesConfig) -> None:
    """The command."""
    if config.baseline == "lightgbm":
        _lightgbm()
    root, out = locate(config.data.path), locate(config.out)
    require_folder(out, "out")
    histories = Histories.open(root)
    label_set = labels(root, config.task)
    examples = {
        split: labelled_examples(histories, label_set.table, split, required=split != "held_out") for split in SPLITS
    }
    if not len(examples["held_out"]):
        del examples["held_out"]
    require_both_classes(config.task, {split: examples[split] for split in ("train", "tuning")})
    (out / RECORD).unlink(missing_ok=True)  # each run is a new one
    inputs = {"data.path": histories.fingerprint, "task.labels": label_set.digest()}
    with recorded(out, "baselines", config, inputs) as outcome:
        found = _scored(config, histories, label_set, examples)
        write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", out / RESULTS)
        outcome |= {name: found[name]["value"] for name in ("auroc", "auprc")}
    _show(found, out)


def _scored(
    config: BaselinesConfig, histories: Histories, label_set: LabelSet, examples: Mapping[str, Examples]
) -> dict[str, Any]:
    """The content of results.json; the predictions are in the folder."""
    root, out = locate(config.data.path), locate(config.out)
    started = time.monotonic()
    spec = choose(histories, examples["train"], config.features)
    scored = "held_out" if "held_out" in examples else "tuning"
    table = {split: features(histories, part, spec) for split, part in examples.items()}
    computed = time.monotonic()
    model = fit(config.baseline, table["train"], table["tuning"], config.seed)
    fitted = time.monotonic()
    probability, recalibration = _recalibrated(model, table, scored)
    scores = {
        split: metrics.scores(examples[split].label_E, p_E, examples[split].subject_id_E, examples[split].weight_E)
        for split, p_E in probability.items()
    }
    write_parquet(prediction_table(examples[scored], probability[scored]), out / "predictions.parquet")
    found = {
        "task": config.task.name,
        "baseline": config.baseline,
        "split": scored,
        "note": NO_HELD_OUT if scored == "tuning" else None,
        **scores[scored],
        # of the labels that it was recalibrated on a calibration error would say nothing
        "tuning": {"task": config.task.name, "split": "tuning", **scores["tuning"], "ece": None},
        "recalibration": recalibration,
        "chosen": model.chosen,
        "num_features": len(spec.columns),
        "seconds": {"features": computed - started, "fit": fitted - computed},
        "importance": _importances(model, table["tuning"], config.seed),
        "labels": label_set.counts,
        "label_details": label_set.details,
    }
    oracle = root / "oracle" / f"{config.task.name}.json"
    if oracle.is_file():  # a synthetic cohort, whose law says how well anything can predict
        found["ceiling"] = json.loads(oracle.read_text())["ceiling"][scored]
    return found


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


def _show(found: dict[str, Any], out: Location) -> None:
    console = new_console()
    title = f"Task {found['task']}: {found['baseline'].replace('_', ' ')} on {found['num_features']} aggregate features"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    (header, tuning), (_, *rows) = score_rows(found["tuning"]), score_rows(found)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in ([] if found["split"] == "tuning" else [tuning]) + rows:
        table.add_row(*row)
    console.print(table)
    if found["note"]:
        console.print(f"Note: {found['note']}", highlight=False)
    for name, value in found["chosen"].items():
        console.print(f"chosen on the tuning split: {name} {value:g}", highlight=False)
    top = ", ".join(f"{name} {fall:.3f}" for name, fall in list(found["importance"]["variables"].items())[:5])
    console.print(f"fall of AUROC without a variable: {top}", highlight=False, soft_wrap=True)
    for name, file in (("results", RESULTS), ("predictions", "predictions.parquet")):
        console.print(f"{name:<12} {out / file}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main("baselines", BaselinesConfig, run)
