"""Plain models in a bundle: they are the library's, and every way to predict gives the mean with the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.special import expit, logit
from small_models import vocabulary_of, write_risk_bundle

import hymate
from hymate.command import load
from hymate.data.examples import Examples, examples_by_split
from hymate.data.features import Column, FeatureConfig, FeatureSpec, FeatureTable, choose, features
from hymate.data.histories import Histories
from hymate.data.label_files import read_labels
from hymate.data.meds import write_parquet
from hymate.errors import UserError
from hymate.evaluate import EvaluateConfig
from hymate.evaluate import run as evaluate
from hymate.evaluation import baseline_models, metrics
from hymate.evaluation.baseline_models import fit
from hymate.explain import ExplainConfig
from hymate.explain import run as explain
from hymate.hashing import seeded_hash
from hymate.inference import plain as module
from hymate.inference.bundle import read_bundle
from hymate.inference.plain import PlainConfig, PlainModels
from hymate.inference.provenance import provenance
from hymate.predict import PredictConfig
from hymate.predict import run as predict

CONFIG = PlainConfig((), 0.4, 0.7, -0.2)
RISK, LINEAR = "predicted_boolean_probability", "linear.parquet"


def table(seed: int, hole_fraction: float, num_examples: int = 600) -> FeatureTable:
    """Features of every kind: noise, few values, hardly ever there, missing where it matters, constant, never there,
    large, small; the last has no holes."""
    rng = np.random.default_rng(seed)
    label_E = rng.random(num_examples) < 0.4
    value_EX = rng.normal(size=(num_examples, 9)).astype(np.float32)
    value_EX[:, 1] = rng.integers(0, 3, num_examples) + label_E
    value_EX[:, 6] *= 1e30
    value_EX[:, 7] = value_EX[:, 7] * 1e-30 + label_E * 1e-30
    value_EX[:, 8] += label_E
    value_EX[:, :8][rng.random((num_examples, 8)) < hole_fraction] = np.nan
    value_EX[rng.random(num_examples) < 0.95, 2] = np.nan
    value_EX[rng.random(num_examples) < np.where(label_E, 0.8, 0.1), 3] = np.nan
    value_EX[:, 4], value_EX[:, 5] = 1, np.nan
    nobody_E, label_ET = np.zeros(num_examples, np.int64), label_E.astype(np.float32)[:, None]
    weight_ET = rng.uniform(0.5, 2, label_ET.shape).astype(np.float32)
    given = nobody_E, nobody_E, nobody_E, nobody_E, label_ET, label_ET * np.nan, weight_ET, np.arange(num_examples)
    columns = tuple(Column(f"LAB//{x}", "mean") for x in range(9))
    return FeatureTable(FeatureSpec((), columns), Examples(*given), value_EX)


def odd_rows(seed: int) -> np.ndarray:
    """Rows that no training had: holes everywhere, infinities, zeros of both signs, and values of the training."""
    rng = np.random.default_rng(seed)
    value_EX = np.concatenate([table(seed, 0.3).value_EX[:], table(seed, 0.0).value_EX[:]])
    odd = rng.choice(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-38, 3e38], np.float32), value_EX.shape)
    return np.where(rng.random(value_EX.shape) < 0.2, odd, value_EX)


@pytest.mark.parametrize("hole_fraction", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "error"), [("gradient_boosting", 0.0), ("lightgbm", 1e-9)])
def test_our_trees_give_the_librarys_probabilities(
    kind: Any, error: float, hole_fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after they were written and read; scikit-learn's bit for bit."""
    if kind == "lightgbm":
        pytest.importorskip("lightgbm")
    for seed, num_trees in enumerate((1, 40)):
        monkeypatch.setattr(baseline_models, "NUM_TREES", (num_trees,))
        train, tuning = table(seed, hole_fraction), table(100 + seed, hole_fraction)
        fitted = fit(kind, train, tuning, seed)
        columns, trees = fitted.trees(train.spec)
        value_EX = odd_rows(200 + seed)
        expected_E = fitted.probability(value_EX)
        asked_EX = value_EX[:, places(columns)]
        assert np.ptp(expected_E) > 0 and np.abs(expit(trees.logit(asked_EX)) - expected_E).max() <= error
        paths = tmp_path / f"{seed}.parquet", tmp_path / "none"
        module.write_plain({task: PlainModels(CONFIG, columns, trees) for task in "ab"}, *paths)
        for read in module.read_plain(*paths, {"a": CONFIG, "b": CONFIG}).values():
            assert np.abs(expit(read.trees.logit(value_EX[:, places(read.columns)])) - expected_E).max() <= error
            assert read.linear is None and not paths[1].exists()


def places(columns: tuple[Column, ...]) -> list[int]:
    return [table(0, 0.0).spec.columns.index(column) for column in columns]


@pytest.mark.parametrize("hole_fraction", [0.0, 0.3])
def test_our_slopes_give_scikit_learns_probabilities(hole_fraction: float, tmp_path: Path) -> None:
    """Of the features as they are, where scikit-learn was fitted to a design of them; also after they were read."""
    train, tuning = table(0, hole_fraction), table(1, hole_fraction)
    is_count = train.spec.columns[1]._replace(statistic="count")
    columns = (train.spec.columns[0], is_count, *train.spec.columns[2:])
    train, tuning = (replace(of, spec=replace(of.spec, columns=columns)) for of in (train, tuning))
    train.value_EX[:, 1], tuning.value_EX[:, 1] = (np.nan_to_num(of.value_EX[:, 1]) for of in (train, tuning))
    fitted = fit("logistic_regression", train, tuning, 0)
    linear, intercept = fitted.linear()
    value_EX = np.where(np.isinf(odd := odd_rows(2)), 1e9, odd)
    value_EX[:, 1] = np.nan_to_num(value_EX[:, 1]).clip(0)
    expected_E = by_scikit_learn(train, float(fitted.chosen["C"]), value_EX)
    assert np.ptp(expected_E) > 0.5
    np.testing.assert_allclose(fitted.probability(value_EX), expected_E, atol=5e-3)  # as far as its solver goes
    paths = tmp_path / "boosting.parquet", tmp_path / "linear.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline_models, "NUM_TREES", (1,))
        trees = fit("gradient_boosting", train, tuning, 0).trees(train.spec)
    config = replace(CONFIG, linear_weight=0.1)
    module.write_plain({"a": PlainModels(config, *trees, linear), "b": PlainModels(CONFIG, *trees)}, *paths)
    read = module.read_plain(*paths, {"a": config, "b": CONFIG})
    assert read["b"].linear is None and read["a"].linear is not None
    place = [columns.index(column) for column in read["a"].linear.columns]
    logit_E = read["a"].linear.logit(value_EX[:, place]) + intercept
    np.testing.assert_allclose(expit(logit_E), fitted.probability(value_EX), atol=1e-12)


def by_scikit_learn(train: FeatureTable, strength: float, value_EX: np.ndarray) -> np.ndarray:
    """Probabilities of logistic regression on a design that scikit-learn makes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    def limited(of_EX: np.ndarray) -> np.ndarray:
        of_EX = of_EX[:, known_X].astype(float)
        of_EX[:, 1] = np.log1p(of_EX[:, 1])
        return of_EX

    known_X = ~np.isnan(train.value_EX[:]).all(axis=0)
    own_EX, other_EX = limited(train.value_EX[:]), limited(value_EX)
    low_X, high_X = np.nanquantile(own_EX, (0.01, 0.99), axis=0)
    scaler = StandardScaler().fit(own_EX.clip(low_X, high_X))
    _, first_X = np.unique(np.isnan(own_EX), axis=1, return_index=True)
    marked_X = first_X[np.isnan(own_EX[:, first_X]).any(axis=0)]

    def design(of_EX: np.ndarray) -> np.ndarray:
        known_EX = np.nan_to_num(scaler.transform(of_EX.clip(low_X, high_X)))
        return np.hstack([known_EX, np.isnan(of_EX[:, marked_X])])

    model = LogisticRegression(C=strength, max_iter=5000, tol=1e-8)
    weight_E = train.examples.weight_E / train.examples.weight_E.mean()
    model.fit(design(own_EX), train.examples.label_E > 0.5, sample_weight=weight_E)
    return model.predict_proba(design(other_EX))[:, 1]


def test_rows_that_do_not_split_are_one_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline_models, "NUM_TREES", (3,))
    monkeypatch.setattr(baseline_models, "LEAF_LABELS", 1000)
    train = table(0, 0.1)
    fitted = fit("gradient_boosting", train, train, 0)
    columns, trees = fitted.trees(train.spec)
    assert columns == () and len(trees.root_T) == len(trees.value_N) == 4
    np.testing.assert_array_equal(expit(trees.logit(train.value_EX[:, []])), fitted.probability(train.value_EX))


# ------------------------------------------------------------------------------------------------------- in a bundle


@pytest.fixture(scope="module")
def both(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three bundles of the same network, alone, in a mean with boosting, and with logistic regression, too; and the
    plain models' own probabilities of all labels.
    """
    folder = tmp_path_factory.mktemp("both")
    histories, labels = Histories.open(small_data), read_labels(small_data / "labels" / "readmission")
    task = load("predict", ["task=readmission", "bundle=B", "data.path=D", "out=O"], PredictConfig).task
    examples = examples_by_split(histories, task, labels)
    spec = choose(histories, examples["train"], FeatureConfig((12.0, 48.0), min_labels=5))
    train, tuning = (features(histories, examples[split], spec) for split in ("train", "tuning"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline_models, "NUM_TREES", (40,))
        fitted = fit("gradient_boosting", train, tuning, 0)
    regression = fit("logistic_regression", train, tuning, 0)
    columns, trees = fitted.trees(spec)
    linear, intercept = regression.linear()
    assert 5 < len(columns) < len(spec.columns)
    config = replace(CONFIG, windows_hours=spec.windows_hours)
    write_risk_bundle(folder / "network", vocabulary_of(small_data), context=16)
    network = read_bundle(folder / "network")
    replace(network, plain={"readmission": PlainModels(config, columns, trees)}).write(folder / "mean")
    of_three = replace(config, boosting_weight=0.4, linear_weight=0.3, shift=config.shift + 0.3 * intercept)
    replace(network, plain={"readmission": PlainModels(of_three, columns, trees, linear)}).write(folder / "three")
    held_out = features(histories, examples["held_out"], spec)
    own = {
        "subject_id": held_out.examples.subject_id_E,
        "prediction_time": pa.array(held_out.examples.prediction_time_E, pa.timestamp("us")),
        "probability": fitted.probability(held_out.value_EX),
        "linear": regression.probability(held_out.value_EX),
    }
    by = [("subject_id", "ascending"), ("prediction_time", "ascending")]
    write_parquet(pa.table(own).sort_by(by), folder / "plain.parquet")
    return folder


def predicted(folder: Path, bundle: str, data: Path, *more: str) -> pa.Table:
    out = folder / f"{bundle}-{len(list(folder.iterdir()))}.parquet"
    given = ["task=readmission", f"bundle={folder / bundle}", f"data.path={data}", f"out={out}", "workers=1", *more]
    predict(load("predict", given, PredictConfig))
    return pq.read_table(out)


def mean_of(folder: Path, network: pa.Table, bundle: str = "mean") -> np.ndarray:
    """By hand, of the network's and the library's probabilities."""
    table = pq.read_table(folder / "plain.parquet")
    trees_logit_E, linear_logit_E = (logit(table[name].to_numpy()) for name in ("probability", "linear"))
    plain_E = 0.4 * trees_logit_E + 0.3 * linear_logit_E if bundle == "three" else 0.7 * trees_logit_E
    return expit(0.4 * logit(network[RISK].to_numpy().astype(float)) + plain_E - 0.2)


@pytest.mark.parametrize(("bundle", "context"), [("mean", "bundle"), ("mean", "all"), ("three", "bundle")])
def test_every_way_to_predict_gives_the_mean(both: Path, small_data: Path, bundle: str, context: str) -> None:
    """Of a prepared dataset, of the MEDS folder that it was made from, and of tables in memory."""
    asked = ["split=held_out", f"context={context}"]
    network = predicted(both, "network", small_data, *asked)
    expected_E = mean_of(both, network, bundle)
    assert np.abs(expected_E - network[RISK].to_numpy()).max() > 0.05
    raw = small_data.parent / "raw"
    for data in (small_data, raw):
        table = predicted(both, bundle, data, *asked)
        np.testing.assert_allclose(table[RISK].to_numpy(), expected_E, atol=1e-6)
    model = hymate.load(both / bundle, device="cpu")
    events = pl.read_parquet(raw / "data" / "held_out" / "*.parquet")
    at = network.select(["subject_id", "prediction_time"])
    patients = events if context == "bundle" else model.append(model.append(None, events[:300]), events[300:])
    np.testing.assert_allclose(model.predict(patients, at)[RISK].to_numpy(), expected_E, atol=1e-6)


def test_states_go_on_under_the_mean(both: Path, small_data: Path, tmp_path: Path) -> None:
    asked = ["split=held_out", "context=all"]
    expected_E = mean_of(both, predicted(both, "network", small_data, *asked))
    for _ in range(2):
        table = predicted(both, "mean", small_data, *asked, f"states={tmp_path}")
        np.testing.assert_allclose(table[RISK].to_numpy(), expected_E, atol=1e-6)


@pytest.mark.parametrize("bundle", ["mean", "three"])
def test_an_evaluation_says_whether_a_part_would_do(both: Path, small_data: Path, bundle: str, tmp_path: Path) -> None:
    given = ["task=readmission", f"bundle={both / bundle}", f"data.path={small_data}", f"out={tmp_path}", "workers=1"]
    evaluate(load("evaluate", [*given, "split=held_out", "recalibrate=0.3"], EvaluateConfig))
    found = json.loads((tmp_path / "results.json").read_text())
    network, own = predicted(both, "network", small_data, "split=held_out"), pq.read_table(both / "plain.parquet")
    label_E, subject_E = network["boolean_value"].to_numpy(zero_copy_only=False), network["subject_id"].to_numpy()
    at = seeded_hash(subject_E.view(np.uint64), 0) / 2.0**64 >= 0.3
    plain_E = 0.4 * logit(own["probability"].to_numpy()) + 0.3 * logit(own["linear"].to_numpy())
    plain_E = plain_E if bundle == "three" else own["probability"].to_numpy()
    asked = label_E[at], subject_E[at]
    for key, score_E in (("network", network[RISK].to_numpy()), ("plain", plain_E)):
        expected = metrics.areas(asked[0], score_E[at], asked[1])
        for name in metrics.AREAS:
            less = found["models"]["as it is"][name]["value"] - expected[name]["value"]
            assert found["parts"][key][name]["value"] == pytest.approx(expected[name]["value"], abs=1e-6)
            assert found["parts"][key]["difference"][name]["value"] == pytest.approx(less, abs=1e-6)
    report = (tmp_path / "report.md").read_text()
    assert "| network alone | " in report and "| plain models alone | " in report

    learned = {"provenance": provenance(Histories.open(small_data), "new")}  # trees know these patients by heart
    replace(read_bundle(both / bundle), extra=learned).write(tmp_path / "bundle")
    given = ["task=readmission", f"bundle={tmp_path / 'bundle'}", f"data.path={small_data}", "workers=1"]
    evaluate(load("evaluate", [*given, "split=all", f"out={tmp_path / 'all'}"], EvaluateConfig))
    assert "parts" not in json.loads((tmp_path / "all" / "results.json").read_text())


def test_many_features_are_computed_part_by_part(both: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected_E = mean_of(both, predicted(both, "network", small_data, "split=held_out"))
    monkeypatch.setattr(module, "CELLS", 1)
    table = predicted(both, "mean", small_data, "split=held_out")
    np.testing.assert_allclose(table[RISK].to_numpy(), expected_E, atol=1e-6)


def test_a_mean_is_not_explained(both: Path, small_data: Path, tmp_path: Path) -> None:
    given = ["task=readmission", f"bundle={both / 'mean'}", f"data.path={small_data}", f"out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="mean of a network and plain models, and only a network can be explained"):
        explain(load("explain", given, ExplainConfig))
    assert not (tmp_path / "out").exists()
    events = pl.read_parquet(small_data.parent / "raw" / "data" / "held_out" / "*.parquet")
    with pytest.raises(UserError, match="only a network can be explained"):
        hymate.load(both / "mean", device="cpu").explain(events, at="2018-01-01")


def test_a_bundle_without_plain_models_is_as_it_was(both: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (both / "network").iterdir()}
    assert sorted(files) == ["README.md", "config.yaml", "model.safetensors", "vocabulary.parquet"]
    tree = yaml.safe_load(files["config.yaml"])
    assert tree["format_version"] == 2 and "plain" not in tree
    network, mean = read_bundle(both / "network"), read_bundle(both / "mean")
    assert network.fingerprint != mean.fingerprint
    replace(mean, plain={}).write(tmp_path / "bundle")
    assert {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()} == files


def test_a_bundle_of_before_is_read(both: Path, tmp_path: Path) -> None:
    """Of the version that had boosting alone."""
    mean = read_bundle(both / "mean")
    mean.write(tmp_path / "bundle")
    path = tmp_path / "bundle" / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["plain"]["readmission"]["linear_weight"]
    path.write_text(yaml.safe_dump(tree | {"format_version": 3, "boosting": tree.pop("plain")}))
    assert read_bundle(tmp_path / "bundle").plain["readmission"].config == mean.plain["readmission"].config


def edited(change: Callable[[pa.Table], pa.Table], name: str = "boosting.parquet") -> Callable[[Path], None]:
    """The file with another table; whoever means harm writes a checksum that agrees."""

    def edit(folder: Path) -> None:
        path = folder / name
        write_parquet(change(pq.read_table(path)), path)
        tree = yaml.safe_load((folder / "config.yaml").read_text())
        tree["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))

    return edit


def with_column(name: str, of: Callable[[pa.ChunkedArray], Any]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        number = table.column_names.index(name)
        field = table.schema.field(number)
        return table.set_column(number, field, pa.array(of(table[name]), field.type))

    return change


def configured(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tree = yaml.safe_load((folder / "config.yaml").read_text())
        tree["plain"]["readmission"] |= changes
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))

    return edit


def to_itself(child_N: pa.ChunkedArray) -> list[int]:
    return [min(child, n) for n, child in enumerate(child_N.to_pylist())]


DAMAGED = {
    "a loop": edited(with_column("left", to_itself)),
    "a child of another tree": edited(
        with_column("right", lambda x: [len(x) - 1 if c >= 0 else c for c in x.to_pylist()])
    ),
    "a child beyond": edited(with_column("right", lambda x: [c + 10**6 for c in x.to_pylist()])),
    "no number": edited(with_column("value", lambda x: [float("nan")] * len(x))),
    "no threshold": edited(with_column("threshold", lambda x: [None] * len(x))),
    "another statistic": edited(with_column("statistic", lambda x: [s and "median" for s in x.to_pylist()])),
    "another window": edited(with_column("window", lambda x: [None if w is None else 7 for w in x.to_pylist()])),
    "half a feature": edited(with_column("statistic", lambda x: [None] * len(x))),
    "another task": edited(with_column("task", lambda x: ["mortality"] * len(x))),
    "no column": edited(lambda table: table.drop_columns(["missing_left"])),
    "other types": edited(lambda table: table.set_column(1, "tree", pc.cast(table["tree"], pa.float64()))),
    "no tree": edited(lambda table: table.slice(0, 0)),
    "another checksum": lambda folder: write_parquet(pa.table({"a": [1]}), folder / "boosting.parquet"),
    "no file": lambda folder: (folder / "boosting.parquet").unlink(),
    "windows that fall": configured(windows_hours=[48.0, 12.0]),
    "no weight": configured(network_weight=None),
    "a key too many": configured(**{"pickle\a": "x"}),
    "no slope": edited(with_column("slope", lambda x: [None] * len(x)), LINEAR),
    "endless": edited(with_column("missing", lambda x: [float("inf")] * len(x)), LINEAR),
    "no limit": edited(with_column("high", lambda x: [float("nan")] * len(x)), LINEAR),
    "a feature twice": edited(lambda table: pa.concat_tables([table, table]), LINEAR),
    "no feature": edited(with_column("variable", lambda x: [None] * len(x)), LINEAR),
    "another task's slopes": edited(with_column("task", lambda x: ["mortality"] * len(x)), LINEAR),
    "no slopes": lambda folder: (folder / LINEAR).unlink(),
    "slopes without a weight": configured(linear_weight=0.0),
    "a weight that is none": configured(linear_weight="much"),
    "a weight below 0": configured(linear_weight=-0.1),
}


def test_risks_that_are_no_numbers_are_refused(both: Path, small_data: Path, tmp_path: Path) -> None:
    """Each slope is a finite number, and their sum is none."""
    read_bundle(both / "three").write(tmp_path / "bundle")
    edited(with_column("missing", lambda x: [(-1) ** n * 1e308 for n in range(len(x))]), LINEAR)(tmp_path / "bundle")
    edited(with_column("slope", lambda x: [(-1) ** n * 1e308 for n in range(len(x))]), LINEAR)(tmp_path / "bundle")
    with pytest.raises(UserError, match="not finite numbers"):
        predicted(tmp_path, "bundle", small_data, "split=held_out")


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_plain_models_are_refused_in_a_line(both: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    read_bundle(both / "three").write(tmp_path / "bundle")
    damage(tmp_path / "bundle")
    with pytest.raises(UserError) as error:
        read_bundle(tmp_path / "bundle")
    assert str(error.value).isprintable()
