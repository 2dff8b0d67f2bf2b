"""The baselines' command on a cohort with a known law, and what their models make of a feature table."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from meds_evaluation.schema import PredictionSchema
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from hymate.baselines import BaselinesConfig, run
from hymate.command import load
from hymate.data.examples import Examples, labelled_examples
from hymate.data.features import Column, FeatureConfig, FeatureSpec, FeatureTable, choose, features
from hymate.data.histories import Histories
from hymate.data.label_files import LABEL_SCHEMA
from hymate.data.meds import SPLITS, read_splits, write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.synthetic import law as law
from hymate.data.synthetic.codes import DISTRACTORS
from hymate.data.synthetic.course import SyntheticConfig
from hymate.data.tasks import read_or_extract_labels
from hymate.errors import UserError
from hymate.evaluation import baseline_fits, baseline_models, calibration, metrics, stored
from hymate.evaluation.baseline_fits import boosted, cross_fitted
from hymate.evaluation.baseline_models import fit, importance

pytestmark = pytest.mark.slow

KINDS = ["gradient_boosting", "logistic_regression", "lightgbm"]
SETTINGS = ["features.max_features=400", "features.windows_hours=[48]"]


def readmissions(data: Path) -> pa.Table:
    """The cohort's labels."""
    config = load("baselines", ["task=readmission", f"data.path={data}", "out=OUT"], BaselinesConfig)
    return read_or_extract_labels(data, config.task).table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort")
    cohort = SyntheticConfig(subjects=700, mean_events=250)
    prepare(PrepareConfig(source="synthetic", out=str(out), synthetic=cohort, workers=1))
    return out


@pytest.fixture(autouse=True, scope="module")
def few_trees() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline_models, "NUM_TREES", (30, 120))
        patch.setattr(baseline_models, "LEARNING_RATE", 0.1)
        patch.setattr(baseline_models, "STRENGTHS", (1e-3, 1e-2))
        patch.setattr(baseline_models, "DETAILED_VARIABLES", 2)
        patch.setattr(baseline_fits, "available_cpus", lambda: 1)  # other processes know nothing of this
        patch.setattr(baseline_models, "REPEATS", 1)
        yield


def scored(data: Path, out: Path, *overrides: str) -> tuple[dict[str, Any], pa.Table]:
    run(
        load(
            "baselines", ["task=readmission", f"data.path={data}", f"out={out}", *SETTINGS, *overrides], BaselinesConfig
        )
    )
    return json.loads((out / "results.json").read_text()), pq.read_table(out / "predictions.parquet")


@dataclass(frozen=True)
class Finished:
    """What a run of the command said and left; out: its folder."""

    out: Path
    said: str
    found: dict[str, Any]
    predictions: pa.Table


@pytest.fixture(scope="module")
def finished(data: Path, few_trees: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """The run of each baseline with the settings that most tests have, once."""

    @cache
    def of(kind: str) -> Finished:
        out = tmp_path_factory.mktemp(kind) / "new"
        with contextlib.redirect_stdout(io.StringIO()) as said:
            found, predictions = scored(data, out, f"baseline={kind}")
        return Finished(out, said.getvalue(), found, predictions)

    return of


@pytest.mark.parametrize("kind", ["gradient_boosting", "logistic_regression"])
def test_a_known_law_is_learned_and_not_beaten(finished: Callable[[str], Finished], kind: str) -> None:
    once = finished(kind)
    found, predictions = once.found, once.predictions
    PredictionSchema.validate(predictions)
    label, probability = (predictions[c].to_numpy() for c in ("boolean_value", "predicted_boolean_probability"))
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(label, probability), abs=1e-5)
    assert found["auprc"]["value"] == pytest.approx(average_precision_score(label, probability), abs=1e-4)
    assert 0.62 < found["auroc"]["value"] < found["ceiling"]["auroc"] + 0.01
    assert found["num_labels"] == predictions.num_rows
    variables = list(found["importance"]["variables"])
    assert variables[0] == law.CREATININE
    assert max(found["importance"]["variables"][name] for name in DISTRACTORS) < 0.03
    assert all(name.startswith(tuple(variables[:2])) for name in found["importance"]["features"])
    for expected in ("tuning", "held_out", "best possible", str(once.out / "results.json")):
        assert expected in once.said


def test_without_a_held_out_split_the_tuning_split_is_scored(data: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "data"
    shutil.copytree(data, path)
    index = pq.read_table(path / "histories" / "index.parquet")
    split = pc.if_else(pc.equal(index["split"], "held_out"), "tuning", index["split"])
    index = index.set_column(index.column_names.index("split"), "split", split)
    pq.write_table(index, path / "histories" / "index.parquet")
    found, predictions = scored(path, tmp_path / "out", "baseline=logistic_regression")
    assert (found["split"], found["num_labels"]) == ("tuning", predictions.num_rows)
    assert found["auroc"] == found["tuning"]["auroc"]
    shown = capsys.readouterr().out
    assert "Note: there are no held-out labels" in shown
    assert "held_out" not in shown.replace(str(tmp_path), "")


def labels_of(data: Path) -> pa.Table:
    task = load("baselines", ["task=readmission", "data.path=D", "out=O"], BaselinesConfig).task
    return read_or_extract_labels(data, task).table.select(LABEL_SCHEMA.names[:3])


def test_labels_of_no_held_out_patient_are_refused(data: Path, tmp_path: Path) -> None:
    splits, table = read_splits(data), labels_of(data)
    held_out = splits.filter(pc.equal(splits["split"], "held_out"))["subject_id"]
    write_parquet(table.filter(pc.invert(pc.is_in(table["subject_id"], held_out))), tmp_path / "labels" / "0.parquet")
    with pytest.raises(UserError, match=r"^no label is of .* split 'held_out': of .* in train, .* in tuning"):
        scored(data, tmp_path / "out", "baseline=logistic_regression", f"task.labels={tmp_path / 'labels'}")


def test_labels_that_cannot_be_used_are_said_and_recorded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = labels_of(data)
    early = pa.array([datetime(1800, 1, 1)], table.schema.field("prediction_time").type)
    unknown = table.slice(0, 2).set_column(0, "subject_id", pa.array([10**9, 10**9 + 1]))
    too_early = table.slice(0, 1).set_column(1, "prediction_time", early)
    write_parquet(pa.concat_tables([table, unknown, too_early]), tmp_path / "labels" / "0.parquet")
    found, _ = scored(data, tmp_path / "out", "baseline=logistic_regression", f"task.labels={tmp_path / 'labels'}")
    assert "Note: task readmission: 3 labels are left out: 2 of subjects who are not in" in capsys.readouterr().out
    splits = found["splits"].values()
    assert {part["unknown_subject"] for part in splits} == {2} and sum(p["without_events"] for p in splits) == 1
    assert sum(part["labels"] for part in splits) == len(table)


def test_a_seed_gives_the_same_predictions(data: Path, finished: Callable[[str], Finished], tmp_path: Path) -> None:
    first = finished("gradient_boosting").predictions  # by seed 0
    second, other = (scored(data, tmp_path / f"{seed}", f"seed={seed}")[1] for seed in (0, 4))
    assert first.equals(second)
    assert not first.equals(other)


def test_the_held_out_labels_are_only_scored(data: Path, finished: Callable[[str], Finished], tmp_path: Path) -> None:
    labels = readmissions(data)
    index = pq.read_table(data / "histories" / "index.parquet")
    held_out = index.filter(pc.field("split") == "held_out")["subject_id"]
    turned = pc.xor(labels["boolean_value"], pc.is_in(labels["subject_id"], held_out.combine_chunks()))
    column = labels.column_names.index("boolean_value")
    write_parquet(labels.set_column(column, "boolean_value", turned), tmp_path / "turned" / "0.parquet")
    once = finished("logistic_regression")
    found, predictions = once.found, once.predictions
    other, predictions_of_other = scored(
        data, tmp_path / "b", "baseline=logistic_regression", f"task.labels={tmp_path / 'turned'}"
    )
    probability = "predicted_boolean_probability"
    assert predictions[probability].equals(predictions_of_other[probability])
    for same in ("tuning", "chosen", "importance", "num_features"):
        assert found[same] == other[same]
    assert other["auroc"]["value"] == pytest.approx(1 - found["auroc"]["value"])


def test_a_model_is_compared_with_what_the_command_says(
    data: Path, finished: Callable[[str], Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, predictions = finished("gradient_boosting").found, finished("gradient_boosting").predictions
    monkeypatch.setattr(baseline_fits, "FeatureConfig", lambda: FeatureConfig((48.0,), max_features=400))
    histories, labels = Histories.open(data), readmissions(data)
    examples = {split: labelled_examples(histories, labels, split) for split in SPLITS}
    model = np.random.default_rng(0).random(len(examples["held_out"]))
    boosting = boosted(histories, examples, 0, tmp_path / "features")
    found, boosting_E = boosting.compared(model), boosting.probability["held_out"]
    assert not (tmp_path / "features").exists()
    assert json.loads(json.dumps(found)) == found
    assert boosting_E == pytest.approx(predictions["predicted_boolean_probability"].to_numpy(), abs=1e-6)
    for same in ("auroc", "auprc", "brier", "ece", "recalibration", "chosen", "num_features"):
        assert found[same] == scores[same]
    # its calibration is that of a model recalibrated on the tuning labels, as a search's is
    spec = choose(histories, examples["train"], baseline_fits.FeatureConfig())
    table = {split: features(histories, examples[split], spec) for split in SPLITS}
    raw = fit("gradient_boosting", table["train"], table["tuning"], seed=0)
    fitted = calibration.recalibrate(examples["tuning"].label_E, logit(raw.probability(table["tuning"].value_EX)))
    assert boosting_E == pytest.approx(expit(fitted(logit(raw.probability(table["held_out"].value_EX)))))
    before = metrics.ece(examples["held_out"].label_E, raw.probability(table["held_out"].value_EX))
    assert found["recalibration"] == pytest.approx(
        {"temperature": fitted.temperature, "shift": fitted.shift, "ece_before": before}
    )
    expected = roc_auc_score(examples["held_out"].label_E, model) - scores["auroc"]["value"]
    assert found["difference"]["auroc"]["value"] == pytest.approx(expected)
    held_out = examples["held_out"]
    for name, pair in metrics.paired_difference(held_out.label_E, model, boosting_E, held_out.subject_id_E).items():
        low, high = found["difference"][name]["ci"]  # 95 % for both areas together
        assert low < pair["ci"][0] < pair["ci"][1] < high


def test_boosting_takes_a_sample_where_memory_is_short(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is left out in a line; the held-out labels are all scored."""
    histories, made = Histories.open(data), readmissions(data)
    examples = {split: labelled_examples(histories, made, split) for split in SPLITS}
    monkeypatch.setattr(baseline_fits, "FeatureConfig", lambda: FeatureConfig((48.0,), max_features=100))
    monkeypatch.setattr(baseline_fits, "FEWEST_SAMPLED", 100)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    model = np.full(len(examples["held_out"]), 0.5)
    monkeypatch.setattr(
        baseline_fits, "free_memory", lambda *_: 300 * 100 * 2 * baseline_fits.BYTES_A_CELL["gradient_boosting"]
    )
    boosting = boosted(histories, examples, 0, tmp_path)
    found, boosting_E = boosting.compared(model), boosting.probability["held_out"]
    assert len(boosting_E) == len(examples["held_out"])
    assert 200 < found["num_fitted"] < 400 < len(examples["train"]) and found["auroc"]["value"] > 0.6
    monkeypatch.setattr(baseline_fits, "free_memory", lambda *_: 1 << 20)
    monkeypatch.setattr(baseline_fits, "FEWEST_SAMPLED", 1000)
    with pytest.raises(UserError, match=r"need more memory than is free \(1 MiB\)"):
        boosted(histories, examples, 0, tmp_path)
    with pytest.raises(UserError, match=r"need more memory than is free \(1 MiB\)"):
        cross_fitted(histories, examples["train"], examples["tuning"], 0, tmp_path)


@pytest.mark.parametrize(
    ("shortage", "value"),
    [
        ("BYTES_A_CELL", {"gradient_boosting": 1 << 20, "logistic_regression": 1 << 20}),
        ("CELLS_IN_MEMORY", 1_000),
    ],
)
def test_boosting_is_fitted_from_disk_where_memory_or_time_is_short(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortage: str, value: int
) -> None:
    """To all labels, and as well as LightGBM does it in memory."""
    package = pytest.importorskip("lightgbm")
    histories, made = Histories.open(data), readmissions(data)
    examples = {split: labelled_examples(histories, made, split) for split in SPLITS}
    config = FeatureConfig((48.0,), max_features=100)
    monkeypatch.setattr(baseline_fits, "FeatureConfig", lambda: config)
    for module in (baseline_models, baseline_fits):
        monkeypatch.setattr(module, "BINS_FROM", 10_000)
    binned = baseline_fits._needed("lightgbm", len(examples["train"]), 100)
    monkeypatch.setattr(baseline_fits, "free_memory", lambda *_: 2 * binned)
    monkeypatch.setattr(baseline_fits, shortage, value)
    monkeypatch.setattr(baseline_models, "NUM_TREES", (30,))
    monkeypatch.setattr(stored, "PART_CELLS", 10_000)
    boosting = boosted(histories, examples, 0, tmp_path)
    found, boosting_E = boosting.found, boosting.probability["held_out"]
    assert (found["library"], found["num_fitted"]) == ("LightGBM", len(examples["train"]))
    spec = choose(histories, examples["train"], config)
    table = {split: features(histories, examples[split], spec) for split in SPLITS}
    trees = dict(n_estimators=30, learning_rate=0.1, num_leaves=15, min_child_samples=20, reg_lambda=1.0)
    drawn = dict(colsample_bytree=0.1, subsample=0.8, subsample_freq=1, random_state=0)
    alone = package.LGBMClassifier(
        **trees, **drawn, n_jobs=1, deterministic=True, force_row_wise=True, verbosity=-1
    ).fit(table["train"].value_EX, examples["train"].label_E > 0.5)
    expected_E = alone.predict_proba(table["held_out"].value_EX)[:, 1]
    assert np.array_equal(np.argsort(boosting_E, kind="stable"), np.argsort(expected_E, kind="stable"))
    teacher_E = cross_fitted(histories, examples["train"], examples["tuning"], 0, tmp_path)
    assert roc_auc_score(examples["train"].label_E, teacher_E) > 0.6


def test_a_comparison_counts_labels_by_their_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline_fits, "FeatureConfig", lambda: FeatureConfig((48.0,), max_features=100))
    histories, made = Histories.open(data), readmissions(data)
    examples = {split: labelled_examples(histories, made, split) for split in SPLITS}
    rng = np.random.default_rng(0)
    examples = {
        split: replace(part, weight_ET=rng.uniform(0.5, 3, (len(part), 1)).astype(np.float32))
        for split, part in examples.items()
    }
    held_out = examples["held_out"]
    model = rng.random(len(held_out))
    boosting = boosted(histories, examples, 0, tmp_path)
    found, boosting_E = boosting.compared(model), boosting.probability["held_out"]
    area, of_model = (roc_auc_score(held_out.label_E, p, sample_weight=held_out.weight_E) for p in (boosting_E, model))
    assert found["auroc"]["value"] == pytest.approx(area)
    assert found["difference"]["auroc"]["value"] == pytest.approx(of_model - area)
    assert found["ece"] == metrics.ece(held_out.label_E, boosting_E, held_out.weight_E)


def test_a_cross_fitted_probability_knows_nothing_of_the_subjects_own_labels(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline_fits, "FeatureConfig", lambda: FeatureConfig((48.0,), max_features=100))
    histories, labels = Histories.open(data), readmissions(data)
    train, tuning = (labelled_examples(histories, labels, split) for split in ("train", "tuning"))
    subject_id, count = np.unique(train.subject_id_E, return_counts=True)
    own_E = train.subject_id_E == subject_id[count.argmax()]
    assert own_E.sum() > 1
    turned = replace(train, label_ET=np.where(own_E[:, None], 1 - train.label_ET, train.label_ET))
    given_E, other_E = (cross_fitted(histories, examples, tuning, 0, tmp_path) for examples in (train, turned))
    assert np.array_equal(given_E[own_E], other_E[own_E])
    assert not np.array_equal(given_E, other_E)
    assert roc_auc_score(train.label_E, given_E) > 0.6
    single = replace(train, label_ET=np.where(own_E[:, None], 1.0, 0.0))
    with pytest.raises(UserError, match="too few labels for 5 folds"):
        cross_fitted(histories, single, tuning, 0, tmp_path)


def test_a_teacher_is_the_mean_of_boosting_and_logistic_regression_that_the_tuning_split_chooses(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline_fits, "FeatureConfig", lambda: FeatureConfig((48.0,), max_features=40))
    histories, labels = Histories.open(data), readmissions(data)
    train, tuning = (labelled_examples(histories, labels, split) for split in ("train", "tuning"))

    def teacher(*fractions: float) -> np.ndarray:
        monkeypatch.setattr(baseline_fits, "LINEAR_FRACTIONS", fractions)
        return calibration.logit(cross_fitted(histories, train, tuning, 0, tmp_path))

    boosting_E, linear_E = teacher(0.0), teacher(1.0)
    np.testing.assert_allclose(teacher(0.3), 0.7 * boosting_E + 0.3 * linear_E, rtol=0, atol=1e-6)
    # each fold's models choose by themselves, and what they choose has the smaller loss on others, too
    chosen_E = teacher(1.0, 0.0)
    assert np.all((chosen_E == boosting_E) | (chosen_E == linear_E))
    losses = [log_loss(train.label_E, expit(logit_E)) for logit_E in (chosen_E, boosting_E, linear_E)]
    assert losses[0] < sum(losses[1:]) / 2


def test_boosting_and_a_teacher_are_the_same_fitted_together(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline_fits, "FeatureConfig", lambda: FeatureConfig((48.0,), max_features=40))
    histories, labels = Histories.open(data), readmissions(data)
    examples = {split: labelled_examples(histories, labels, split) for split in SPLITS}
    both = boosted(histories, examples, 0, tmp_path, plain=True, teacher=True)
    alone = boosted(histories, examples, 0, tmp_path, plain=True)
    teacher_E = cross_fitted(histories, examples["train"], examples["tuning"], 0, tmp_path)
    assert both.found | {"seconds": 0} == alone.found | {"seconds": 0}
    assert both.plain is not None and alone.plain is not None and both.plain.models.config == alone.plain.models.config
    assert np.array_equal(both.plain.logit["held_out"], alone.plain.logit["held_out"])
    assert alone.teacher_E is None and np.array_equal(both.teacher_E, teacher_E)


def test_too_few_labels_for_features_are_refused(data: Path, tmp_path: Path) -> None:
    histories, labels = Histories.open(data), readmissions(data)
    train = labelled_examples(histories, labels, "train")
    arrays = {name: value[:5] for name, value in vars(train).items() if name != "dropped"}
    few = Examples(**arrays)
    with pytest.raises(UserError, match=r"^features\.min_labels=10"):
        boosted(histories, {"train": few, "tuning": few}, 0, tmp_path)


# ------------------------------------------------------------------------------------------------------- models


def table(seed: int, num_examples: int = 400) -> FeatureTable:
    """A lab is missing in most positives, and its level says nothing; one value is a recording error."""
    rng = np.random.default_rng(seed)
    label_E = rng.random(num_examples) < 0.5
    missing_E = rng.random(num_examples) < np.where(label_E, 0.8, 0.2)
    level_E = rng.normal(size=num_examples)
    level_E[5] = 1e9
    columns = (Column("lab", "mean"), Column("lab", "maximum"), Column("noise", "count"), Column("never", "slope"))
    noise_E, never_E = rng.poisson(3, num_examples), np.full(num_examples, np.nan)
    value_EX = np.stack([level_E, level_E + 1, noise_E, never_E], axis=1).astype(np.float32)
    value_EX[missing_E, :2] = np.nan
    nobody_E, label_ET = np.zeros(num_examples, np.int64), label_E.astype(np.float32)[:, None]
    examples = Examples(
        position_E=nobody_E,
        stop_E=nobody_E,
        earliest_E=nobody_E,
        prediction_time_E=nobody_E,
        label_ET=label_ET,
        days_ET=np.full_like(label_ET, np.nan),
        weight_ET=np.ones_like(label_ET),
        subject_id_E=np.arange(num_examples),
    )
    return FeatureTable(FeatureSpec((), columns), examples, value_EX)


def weighed(part: FeatureTable, weight_E: np.ndarray) -> FeatureTable:
    return replace(part, examples=replace(part.examples, weight_ET=weight_E.astype(np.float32)[:, None]))


def test_labels_count_by_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    train, tuning, held_out = table(0), table(1), table(2)
    times_E = np.random.default_rng(3).integers(1, 4, 400)
    again_E = np.repeat(np.arange(400), times_E)
    repeated = FeatureTable(train.spec, train.examples.only(again_E), train.value_EX[again_E])
    # the scale of a linear model's features is that of the rows, which repeating changes a little
    monkeypatch.setattr(baseline_models, "STRENGTHS", (0.01,))
    expected, plain = (
        fit("logistic_regression", part, tuning, 0).probability(held_out.value_EX) for part in (repeated, train)
    )
    monkeypatch.setattr(baseline_models, "STRENGTHS", (0.01 * times_E.mean(),))  # for fewer rows
    found = fit("logistic_regression", weighed(train, times_E), tuning, 0).probability(held_out.value_EX)
    assert np.abs(found - expected).max() < 0.3 * np.abs(plain - expected).max()
    # boosting is drawn towards what weighs more, and chosen on the tuning split by the weights there
    heavy_E = np.where(train.examples.label_E > 0.5, 9.0, 1.0)
    for kind in ("gradient_boosting", "logistic_regression"):
        assert fit(kind, weighed(train, heavy_E), tuning, 0).probability(held_out.value_EX).mean() > 0.6
        one, same, small = (fit(kind, weighed(train, np.full(400, x)), tuning, 0) for x in (1, 1, 1 / 1024))
        for other in (same, small):  # what all weights are multiplied by says nothing
            np.testing.assert_array_equal(other.probability(held_out.value_EX), one.probability(held_out.value_EX))
    monkeypatch.setattr(baseline_models, "NUM_TREES", (1, 30))
    misleading = tuning.examples.label_E.copy()
    misleading[::2] = 1 - misleading[::2]
    mixed = replace(tuning, examples=replace(tuning.examples, label_ET=misleading[:, None]))
    only = [np.where(np.arange(400) % 2 == odd, 1.0, 1e-3) for odd in (0, 1)]
    chosen = [fit("gradient_boosting", train, weighed(mixed, weight_E), 0).chosen["trees"] for weight_E in only]
    assert chosen[0] < chosen[1]  # where labels are turned round every tree makes it worse


@pytest.mark.parametrize("kind", KINDS)
def test_absence_is_information(kind: Any) -> None:
    if kind == "lightgbm":
        pytest.importorskip("lightgbm")
    model = fit(kind, table(0), table(1), seed=0)
    held_out = table(2)
    falls = importance(model, held_out, [column.variable for column in held_out.spec.columns], seed=0)
    assert next(iter(falls)) == "lab"
    assert falls["lab"] > 0.2
    assert falls["never"] == 0
    auroc = roc_auc_score(held_out.examples.label_E, model.probability(held_out.value_EX))
    assert 0.72 < auroc < 0.88  # 0.8 by the law


def test_a_patients_labels_that_resemble_each_other_are_not_learned_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred patients with thirty labels each; nothing that is measured says anything of the outcome."""
    pytest.importorskip("lightgbm")
    number = 3_000

    def patients(seed: int) -> FeatureTable:
        rng, patient_E = np.random.default_rng(seed), np.arange(number) // 30
        part = table(seed, number)
        part.examples.label_ET[:, 0] = (rng.random(100) < 0.5)[patient_E]
        part.value_EX[:] = (rng.normal(size=(100, 4))[patient_E] + 0.1 * rng.normal(size=(number, 4))).astype(
            np.float32
        )
        return part

    train, tuning, others = patients(0), patients(1), patients(2)
    losses = []
    for many in (number, number + 1):
        monkeypatch.setattr(baseline_models, "ALIKE_FROM", many)
        probability_E = fit("lightgbm", train, tuning, seed=0).probability(others.value_EX)
        losses.append(log_loss(others.examples.label_E, probability_E))
    assert np.log(2) - 0.01 < losses[0] < losses[1] - 0.05


def test_few_trees_are_the_first_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, misleading = table(2), table(1)
    misleading.examples.label_ET[:] = 1 - misleading.examples.label_ET  # every tree makes it worse
    chosen = fit("gradient_boosting", table(0), misleading, seed=0)
    monkeypatch.setattr(baseline_models, "NUM_TREES", (30,))
    alone = fit("gradient_boosting", table(0), misleading, seed=0)
    assert chosen.chosen == alone.chosen == {"trees": 30}
    np.testing.assert_array_equal(chosen.probability(held_out.value_EX), alone.probability(held_out.value_EX))


def test_importance_leaves_the_table_as_it_was() -> None:
    model = fit("logistic_regression", table(0), table(1), seed=0)
    held_out = table(2)
    before = held_out.value_EX.copy()
    importance(model, held_out, ["a", "a", "", "b"], seed=0)
    np.testing.assert_array_equal(held_out.value_EX, before)


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=/nowhere"], "not a prepared dataset"),
        (["baseline=forest"], "baseline must be one of gradient_boosting, logistic_regression, lightgbm"),
        (["features.max_feature=3"], "features.max_feature is not a known key: did you mean features.max_features"),
        (["features.windows_hours=[48,24]"], "features.windows_hours must be positive and rise"),
        (["seed=-1"], "seed must not be negative"),
    ],
)
def test_what_cannot_be_run_is_refused(data: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        scored(data, tmp_path / "out", *overrides)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_lightgbm_has_to_be_installed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(UserError, match="baseline=lightgbm needs LightGBM: pip install"):
        scored(data, tmp_path / "out", "baseline=lightgbm")


@pytest.mark.parametrize("split", ["train", "tuning"])
def test_labels_that_are_all_alike_are_refused(data: Path, tmp_path: Path, split: str) -> None:
    labels = readmissions(data)
    index = pq.read_table(data / "histories" / "index.parquet")
    of_split = index.filter(pc.field("split") == split)["subject_id"].combine_chunks()
    kept = pc.or_(pc.invert(pc.is_in(labels["subject_id"], of_split)), labels["boolean_value"])
    write_parquet(labels.filter(kept), tmp_path / "labels" / "0.parquet")
    with pytest.raises(UserError, match=f"the {split} split has [1-9]\\d* positive and 0 negative labels"):
        scored(data, tmp_path / "out", f"task.labels={tmp_path / 'labels'}")
