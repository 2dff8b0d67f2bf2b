"""Boosting in a bundle: our trees are the library's, and every way to predict gives the mean of both."""

from __future__ import annotations

import hashlib
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
from hymate.evaluation import baseline_models
from hymate.evaluation.baseline_models import fit
from hymate.explain import ExplainConfig
from hymate.explain import run as explain
from hymate.inference import boosting as module
from hymate.inference.boosting import Boosting, BoostingConfig
from hymate.inference.bundle import read_bundle
from hymate.predict import PredictConfig
from hymate.predict import run as predict

CONFIG = BoostingConfig((), 0.4, 0.7, -0.2)
RISK = "predicted_boolean_probability"


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
        columns, trees = fitted.plain(train.spec)
        value_EX = odd_rows(200 + seed)
        expected_E = fitted.probability(value_EX)
        asked_EX = value_EX[:, [train.spec.columns.index(column) for column in columns]]
        assert np.ptp(expected_E) > 0 and np.abs(expit(trees.logit(asked_EX)) - expected_E).max() <= error
        path = tmp_path / f"{seed}.parquet"
        module.write_boosting({"a": Boosting(CONFIG, columns, trees), "b": Boosting(CONFIG, columns, trees)}, path)
        for read in module.read_boosting(path, {"a": CONFIG, "b": CONFIG}).values():
            asked_EX = value_EX[:, [train.spec.columns.index(column) for column in read.columns]]
            assert np.abs(expit(read.trees.logit(asked_EX)) - expected_E).max() <= error


def test_rows_that_do_not_split_are_one_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline_models, "NUM_TREES", (3,))
    monkeypatch.setattr(baseline_models, "LEAF_LABELS", 1000)
    train = table(0, 0.1)
    fitted = fit("gradient_boosting", train, train, 0)
    columns, trees = fitted.plain(train.spec)
    assert columns == () and len(trees.root_T) == len(trees.value_N) == 4
    np.testing.assert_array_equal(expit(trees.logit(train.value_EX[:, []])), fitted.probability(train.value_EX))


# ------------------------------------------------------------------------------------------------------- in a bundle


@pytest.fixture(scope="module")
def both(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles of the same network, `network` and `mean`, and boosting's own probabilities of all labels."""
    folder = tmp_path_factory.mktemp("both")
    histories, labels = Histories.open(small_data), read_labels(small_data / "labels" / "readmission")
    task = load("predict", ["task=readmission", "bundle=B", "data.path=D", "out=O"], PredictConfig).task
    examples = examples_by_split(histories, task, labels)
    spec = choose(histories, examples["train"], FeatureConfig((12.0, 48.0), min_labels=5))
    train, tuning = (features(histories, examples[split], spec) for split in ("train", "tuning"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline_models, "NUM_TREES", (40,))
        fitted = fit("gradient_boosting", train, tuning, 0)
    columns, trees = fitted.plain(spec)
    assert 5 < len(columns) < len(spec.columns)
    config = replace(CONFIG, windows_hours=spec.windows_hours)
    write_risk_bundle(folder / "network", vocabulary_of(small_data), context=16)
    network = read_bundle(folder / "network")
    replace(network, boosting={"readmission": Boosting(config, columns, trees)}).write(folder / "mean")
    held_out = features(histories, examples["held_out"], spec)
    own = {
        "subject_id": held_out.examples.subject_id_E,
        "prediction_time": pa.array(held_out.examples.prediction_time_E, pa.timestamp("us")),
        "probability": fitted.probability(held_out.value_EX),
    }
    by = [("subject_id", "ascending"), ("prediction_time", "ascending")]
    write_parquet(pa.table(own).sort_by(by), folder / "boosting.parquet")
    return folder


def predicted(folder: Path, bundle: str, data: Path, *more: str) -> pa.Table:
    out = folder / f"{bundle}-{len(list(folder.iterdir()))}.parquet"
    given = ["task=readmission", f"bundle={folder / bundle}", f"data.path={data}", f"out={out}", "workers=1", *more]
    predict(load("predict", given, PredictConfig))
    return pq.read_table(out)


def mean_of(folder: Path, network: pa.Table) -> np.ndarray:
    """By hand, of the network's and the library's probabilities."""
    trees_logit_E = logit(pq.read_table(folder / "boosting.parquet")["probability"].to_numpy())
    return expit(0.4 * logit(network[RISK].to_numpy().astype(float)) + 0.7 * trees_logit_E - 0.2)


@pytest.mark.parametrize("context", ["bundle", "all"])
def test_every_way_to_predict_gives_the_mean(both: Path, small_data: Path, context: str) -> None:
    """Of a prepared dataset, of the MEDS folder that it was made from, and of tables in memory."""
    asked = ["split=held_out", f"context={context}"]
    network = predicted(both, "network", small_data, *asked)
    expected_E = mean_of(both, network)
    assert np.abs(expected_E - network[RISK].to_numpy()).max() > 0.05
    raw = small_data.parent / "raw"
    for data in (small_data, raw):
        table = predicted(both, "mean", data, *asked)
        np.testing.assert_allclose(table[RISK].to_numpy(), expected_E, atol=1e-6)
    model = hymate.load(both / "mean", device="cpu")
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


def test_many_features_are_computed_part_by_part(both: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected_E = mean_of(both, predicted(both, "network", small_data, "split=held_out"))
    monkeypatch.setattr(module, "CELLS", 1)
    table = predicted(both, "mean", small_data, "split=held_out")
    np.testing.assert_allclose(table[RISK].to_numpy(), expected_E, atol=1e-6)


def test_a_mean_is_not_explained(both: Path, small_data: Path, tmp_path: Path) -> None:
    given = ["task=readmission", f"bundle={both / 'mean'}", f"data.path={small_data}", f"out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="mean of a network and boosting, and only a network can be explained"):
        explain(load("explain", given, ExplainConfig))
    assert not (tmp_path / "out").exists()
    events = pl.read_parquet(small_data.parent / "raw" / "data" / "held_out" / "*.parquet")
    with pytest.raises(UserError, match="only a network can be explained"):
        hymate.load(both / "mean", device="cpu").explain(events, at="2018-01-01")


def test_a_bundle_without_boosting_is_as_it_was(both: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in (both / "network").iterdir()}
    assert sorted(files) == ["README.md", "config.yaml", "model.safetensors", "vocabulary.parquet"]
    tree = yaml.safe_load(files["config.yaml"])
    assert tree["format_version"] == 2 and "boosting" not in tree
    network, mean = read_bundle(both / "network"), read_bundle(both / "mean")
    assert network.fingerprint != mean.fingerprint
    replace(mean, boosting={}).write(tmp_path / "bundle")
    assert {path.name: path.read_bytes() for path in (tmp_path / "bundle").iterdir()} == files


def edited(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """boosting.parquet with another table; whoever means harm writes a checksum that agrees."""

    def edit(folder: Path) -> None:
        path = folder / "boosting.parquet"
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
        tree["boosting"]["readmission"] |= changes
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
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_boosting_is_refused_in_a_line(both: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    read_bundle(both / "mean").write(tmp_path / "bundle")
    damage(tmp_path / "bundle")
    with pytest.raises(UserError) as error:
        read_bundle(tmp_path / "bundle")
    assert str(error.value).isprintable()
