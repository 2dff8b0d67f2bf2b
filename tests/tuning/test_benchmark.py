"""finetune/benchmark.py: real runs under Ray on a small cohort, killed and continued, and what it reports."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT, run
from processes import FORKED
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, roc_auc_score
from small_cohort import SIZES

from hymate.command import load
from hymate.data.features import FeatureConfig, choose, features
from hymate.data.histories import Histories
from hymate.data.label_files import LABEL_SCHEMA, read_labels
from hymate.data.meds import write_parquet
from hymate.data.vocabulary import Vocabulary
from hymate.errors import ConfigError, UserError
from hymate.evaluation import baseline_models, calibration
from hymate.inference.bundle import Bundle
from hymate.runs import run_folder
from hymate.training.pretraining import PretrainConfig
from hymate.tuning import comparison
from hymate.tuning.benchmark import benchmark, train_and_score, trial_of
from hymate.tuning.comparison import compare, write_run
from hymate.tuning.protocol import BenchmarkConfig, ContenderRun, Labelled

pytestmark = pytest.mark.slow

TINY = [
    *("model=debug", "model.d_model=16", "model.headdim=8", "model.num_heads=2", "data.context=32"),
    *("data.tokens_per_row=256", "data.min_count=1", "pretrain.max_steps=2", "pretrain.eval_every=2"),
    *("pretrain.warmup_steps=1", "pretrain.eval_rows=1", "train.max_steps=4", "train.eval_every=2"),
    *("train.warmup_steps=1", "train.rows_per_step=1", "folds=2", "seeds=1"),
]
ONLY = "only=[gradient_boosting,pretrained]"
DEVELOPMENT = SIZES["train"] + SIZES["tuning"]  # patients, who have two labels each


def command(data: Path, folder: Path, *overrides: str) -> list[str]:
    script = str(ROOT / "finetune" / "benchmark.py")
    return [sys.executable, script, "task=readmission", f"data.path={data}", f"run.dir={folder}", *TINY, *overrides]


def configured(data: Path | str, folder: Path | str, *overrides: str) -> BenchmarkConfig:
    given = ["task=readmission", f"data.path={data}", f"run.dir={folder}", *TINY, *overrides]
    return load("benchmark", given, BenchmarkConfig)


@pytest.mark.usefixtures("one_thread")  # a run sets the number of threads
def test_a_benchmark_compares_and_goes_on_with_what_is_not_there_and_after_a_mistake(
    small_data: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """That it goes on when it is killed is in tests/faults."""
    folder, half = tmp_path / "benchmark-readmission", "choosing_fraction=0.5"

    def boosted(budget: int, fold: int | None, *overrides: str) -> dict[Path, int]:
        """Boosting's files, made here, and when."""
        one = ContenderRun("gradient_boosting", budget, 0, fold)
        train_and_score(configured(small_data, tmp_path, half, *overrides), one, None)
        return {path: path.stat().st_mtime_ns for path in (folder / "runs").glob(f"{one.stem}.*")}

    there = boosted(0, 0) | boosted(0, 1)
    one = run(command(small_data, tmp_path, ONLY, half), environment, tmp_path)
    assert one.returncode == 0, one.stderr
    assert len(there) == 4 and {path: path.stat().st_mtime_ns for path in there} == there
    reference, model = check_cross_validation(folder)
    difference = model["auroc"]["difference"]["value"]
    assert difference == pytest.approx(model["auroc"]["mean"] - reference["auroc"]["mean"])

    # the held-out labels, with fewer and more of the others to learn from; 7 patients have too few for boosting's
    # features, which shows when these are chosen: one line, and the runs beside it end well
    few = [half, "split=held_out", "only=[gradient_boosting,scratch]", "with_few_labels=[gradient_boosting]"]
    for budget in (30, 70):
        boosted(budget, None, "split=held_out")
    failed = run(command(small_data, tmp_path, *few, "budgets=[7,30,70]", "max_concurrent=2"), environment, tmp_path)
    assert failed.returncode == 2, failed.stderr
    assert re.search("gradient_boosting on 7 patients, seed 0 failed; [01] left", failed.stdout), failed.stdout
    assert len(failed.stderr.strip().splitlines()) == 1 and "leave no feature of 6 training labels" in failed.stderr
    record = json.loads((folder / "run.json").read_text())
    assert record["outcome"]["state"] == "failed" and "no feature" in record["outcome"]["reason"]
    assert not (folder / "held_out.json").exists()

    # without it: nothing is run again, and one look
    there = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    benchmark(configured(small_data, tmp_path, *few, "budgets=[30,70]"))
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == there
    found = json.loads((folder / "held_out.json").read_text())
    assert [(row["name"], row["budget"]) for row in found["rows"]] == [
        ("gradient_boosting", 70),
        ("scratch", 70),
        ("gradient_boosting", 30),
    ]
    assert all(row["fitting"] + row["choosing"] == 2 * row["budget"] for row in found["rows"])
    report = (folder / "held_out.md").read_text()
    assert "## 70 patients: 70 labels to fit, 70 to choose" in report and "## 30 patients: 30 labels" in report
    assert len(found["looks"]) == 1 and "Look 1 of this benchmark" in (folder / "held_out.md").read_text()
    assert (folder / "held_out.png").stat().st_size > 10_000
    left_out = {"unknown_subject": 0, "without_events": 0, "positives_without_events": 0}
    outcome = json.loads((folder / "run.json").read_text())["outcome"]
    assert outcome == {"state": "finished", "looks": 1, "left_out": left_out}

    # what is shown again is no new look; another comparison is one
    benchmark(configured(small_data, tmp_path, *few, "budgets=[30,70]"))
    assert len(json.loads((folder / "looks.json").read_text())) == 1
    benchmark(configured(small_data, tmp_path, *few[:-2], "only=[gradient_boosting]", "budgets=[30]"))
    looks = json.loads((folder / "looks.json").read_text())
    assert [[row["budget"] for row in look["seen"]] for look in looks] == [[70, 70, 30], [30]]
    assert f"Look 2 of this benchmark at these labels**, after {looks[0]['at']}" in (folder / "held_out.md").read_text()
    check_cross_validation(folder)


def check_cross_validation(folder: Path) -> list[dict]:
    """The rows of the report, which are what the predictions of the runs say."""
    found = json.loads((folder / "cross_validation.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["gradient_boosting", "pretrained"] and found["looks"] == []
    for row in found["rows"]:
        stem = f"{row['name']}-all-seed0-fold"
        tables = [pq.read_table(folder / "runs" / f"{stem}{fold}.parquet").to_pandas() for fold in (0, 1)]
        for name, area in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
            areas = [area(table["label"], table["probability"]) for table in tables]
            assert row[name]["mean"] == pytest.approx(np.mean(areas)) and row[name]["sd"] is None
        scored = np.concatenate([table["subject_id"] for table in tables])
        assert sorted(scored) == sorted([*range(1, DEVELOPMENT + 1)] * 2)  # held-out patients have higher numbers
    assert "The vocabulary and pretraining have seen the inputs" in (folder / "cross_validation.md").read_text()
    assert (folder / "cross_validation.png").stat().st_size > 10_000
    return found["rows"]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["folds=60"], "all patients, seed 0, fold 0: . positive and . negative labels to score on"),
        (["budgets=[50]"], "50 patients, seed 0, fold 0: only 42 patients have labels"),
        (["budgets=[2]", "split=held_out"], "2 patients, seed 0: . positive and . negative labels to"),
        (["point.early_fraction=0.5"], "point.early_fraction: the labels of readmission have no start"),
        (["train.cpus_per_worker=1000"], "needs 1000 CPUs"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_trained(
    small_data: Path, tmp_path: Path, wrong: list[str], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        benchmark(configured(small_data, tmp_path, *wrong))
    assert not list(tmp_path.iterdir())


def test_labels_that_cannot_be_used_are_counted(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_labels(small_data / "labels" / "readmission").select(LABEL_SCHEMA.names[:3])
    unknown = table.slice(0, 2).set_column(0, "subject_id", pa.array([10**9, 10**9 + 1]))
    write_parquet(pa.concat_tables([table, unknown]), tmp_path / "mine" / "0.parquet")
    with pytest.raises(UserError, match="nowhere"):  # before anything is trained
        benchmark(configured(small_data, tmp_path, f"task.labels={tmp_path / 'mine'}", f"init={tmp_path}/nowhere"))
    assert "Note: task readmission: 2 labels are left out: 2 of subjects who are not in" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- what is fair


def labelled(data: Path, split: str = "cross_validation") -> tuple[Histories, Labelled]:
    histories = Histories.open(data)
    return histories, Labelled.of(histories, read_labels(data / "labels" / "readmission"), split)


def test_folds_hold_every_development_patient_once_and_no_held_out_one(small_data: Path) -> None:
    config, (_, there) = configured(small_data, "runs", "folds=3"), labelled(small_data)
    by_seed = []
    for seed in (0, 1):
        folds = [there.allotted(config, ContenderRun("any", 0, seed, fold)) for fold in range(3)]
        for own in folds:
            patients = [set(part.subject_id_E) for part in (own.fitting, own.choosing, own.test)]
            assert sum(map(len, patients)) == len(set.union(*patients)) == DEVELOPMENT
            assert len(patients[1]) / len(patients[0] | patients[1]) == pytest.approx(0.2, abs=0.02)
        tested = np.concatenate([own.test.subject_id_E for own in folds])
        assert sorted(tested) == sorted([*range(1, DEVELOPMENT + 1)] * 2)
        by_seed.append(set(folds[0].test.subject_id_E))
    assert by_seed[0] != by_seed[1]
    _, with_held_out = labelled(small_data, "held_out")
    own = with_held_out.allotted(config, ContenderRun("any", 0, 0, None))
    assert own.test.subject_id_E.min() > DEVELOPMENT >= own.fitting.subject_id_E.max()


def test_a_budget_counts_every_patient_and_both_parts_have_the_same_prevalence(small_data: Path) -> None:
    """A patient comes with all labels, here two."""
    config, (_, there) = configured(small_data, "runs", "budgets=[20,21,40]"), labelled(small_data, "held_out")
    for seed in range(5):
        allotted = {budget: there.allotted(config, ContenderRun("any", budget, seed, None)) for budget in (20, 21, 40)}
        seen = {}
        for budget, own in allotted.items():
            assert len(own.fitting) + len(own.choosing) == 2 * budget
            seen[budget] = {*own.fitting.subject_id_E, *own.choosing.subject_id_E}
            assert own.choosing.label_E.mean() == pytest.approx(own.fitting.label_E.mean(), abs=0.2)
            assert len(seen[budget]) == budget
            assert own.fraction == budget / DEVELOPMENT  # and so its steps do not depend on the other budgets
        assert seen[20] <= seen[21] <= seen[40]


@pytest.mark.parametrize("name", ["plain_models", "distilled"])
def test_a_run_learns_nothing_from_labels_beyond_its_budget(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = configured(small_data, tmp_path, "budgets=[30,0]", "split=held_out")
    one = ContenderRun(name, 30, 0, None)
    own = labelled(small_data, "held_out")[1].allotted(config, one)
    seen = {*own.fitting.subject_id_E, *own.choosing.subject_id_E}
    table = read_labels(small_data / "labels" / "readmission")
    flipped = [
        bool(label) if subject in seen else not label
        for subject, label in zip(table["subject_id"].to_pylist(), table["boolean_value"].to_pylist(), strict=True)
    ]
    write_parquet(
        table.set_column(table.column_names.index("boolean_value"), "boolean_value", [flipped]),
        tmp_path / "flipped" / "0.parquet",
    )
    other = dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, labels=str(tmp_path / "flipped")),
        run=dataclasses.replace(config.run, name="other"),
    )
    with FORKED.Pool(1, maxtasksperchild=1) as processes:  # DeepSpeed trains once in one
        processes.starmap(train_and_score, [(each, one, None) for each in (config, other)], chunksize=1)
    as_labelled, as_flipped = (
        pq.read_table(one.predictions_path(run_folder(each.run) / "runs")).to_pandas() for each in (config, other)
    )
    assert (as_labelled["label"] != as_flipped["label"]).all()
    assert as_labelled["probability"].tolist() == as_flipped["probability"].tolist()


@pytest.mark.usefixtures("one_thread")  # a run sets the number of threads
def test_boosting_is_recalibrated_by_the_labels_that_it_chose_by(small_data: Path, tmp_path: Path) -> None:
    config, one = configured(small_data, tmp_path), ContenderRun("gradient_boosting", 0, 0, 1)
    train_and_score(config, one, None)
    histories, there = labelled(small_data)
    own = there.allotted(config, one)
    spec = choose(histories, own.fitting, FeatureConfig())
    fitting, choosing, test = (features(histories, part, spec) for part in (own.fitting, own.choosing, own.test))
    model = baseline_models.fit("gradient_boosting", fitting, choosing, seed=0)
    logit, test_logit = (calibration.logit(model.probability(part.value_EX)) for part in (choosing, test))
    expected = expit(calibration.recalibrate(own.choosing.label_E, logit)(test_logit))
    written = pq.read_table(one.predictions_path(run_folder(config.run) / "runs")).to_pandas()
    assert written["probability"].to_numpy() == pytest.approx(expected)
    assert np.abs(expected - expit(test_logit)).max() > 0.01


def test_encoders_have_the_same_pooling_views_and_candidates_and_the_papers_model_is_the_papers(
    small_data: Path,
) -> None:
    for pooling in ("variables", "attention"):
        settings = ["task=mortality", f"data.path={small_data}", f"model.pooling={pooling}", "point.early_fraction=0.5"]
        config = load("benchmark", [*settings, "data.min_count=1"], BenchmarkConfig)
        models = {name: config.model_of(name) for name in config.contenders}
        vocabulary = Vocabulary.of(Histories.open(small_data), config.data.min_count)
        trials = {
            name: trial_of(
                config,
                contender,
                Bundle("pretrained", models[name], config.data, vocabulary, state={}),
                0,
                0.05,
            )
            for name, contender in config.contenders.items()
        }
        own = trials["scratch"]
        for name, layers in (("gru", "GG"), ("transformer", "AA"), ("mamba", "MM")):
            assert trials[name] == dataclasses.replace(own, model=dataclasses.replace(own.model, layers=layers))
        assert own.model.pooling == pooling
        assert all(trial.train == own.train and trial.early_fraction == 0.5 for trial in trials.values())
        # few labels have fewer steps, but choose among as many evaluations
        assert own.train.max_steps == round(0.05**0.5 * config.train.max_steps)
        assert math.ceil(own.train.max_steps / own.train.eval_every) == 4
        published = load("pretrain", [*settings[1:2], "model=paper"], PretrainConfig).model
        assert models["paper"] == trials["paper"].model == published


def test_contenders_of_one_model_are_pretrained_once() -> None:
    config = configured("DATA", "runs", "+contenders.other={pretrained: true, model: {layers: MM}, point: {}}")
    needed = [
        config.pretraining(ContenderRun(name, 0, 1, 0))
        for name in ("pretrained", "distilled", "other", "scratch", "gru")
    ]
    assert needed[0] == needed[1] != needed[2] and needed[2] is not None and needed[3:] == [None, None]


# ----------------------------------------------------------------------------------------------- what is compared


def written(folder: Path, name: str, label: np.ndarray, probability: np.ndarray, seed: int, fold_N: np.ndarray) -> None:
    """A seed's runs as if they had been trained."""
    for fold in np.unique(fold_N):
        at = fold_N == fold
        test = SimpleNamespace(
            subject_id_E=np.flatnonzero(at),
            prediction_time_E=np.zeros(at.sum(), dtype=int),
            label_E=label[at],
            weight_E=weight_of(label)[at],
        )
        known = {"fitting": 8, "choosing": 2, "parameters": None, "seconds": 1.0, "pretraining_seconds": 0.0}
        write_run(ContenderRun(name, 0, seed, int(fold)), folder, test, probability[at], **known)


def weight_of(label: np.ndarray) -> np.ndarray:
    return 1 + np.arange(len(label)) % 3


def compared(folder: Path) -> list[dict[str, Any]]:
    """The rows of two seeds in two folds."""
    return compare(configured("DATA", folder, "seeds=2", "run.name=b"))["rows"]


def test_areas_are_means_over_the_folds_of_each_seed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label, fold_SN = rng.integers(0, 2, 200).astype(float), rng.integers(0, 2, (2, 200))
    probability_SN = rng.random((2, 200)) / 2
    probability_SN += fold_SN / 2  # of the second fold all are higher: a rank over both would be no model's
    for seed in range(2):
        written(tmp_path / "b/runs", "scratch", label, probability_SN[seed], seed, fold_SN[seed])
    (row,) = compared(tmp_path)
    assert row["auroc"]["difference"] == row["auroc"]["ensemble_difference"] == {"value": None, "ci": None}
    for seed in range(2):
        written(tmp_path / "b/runs", "gradient_boosting", label, rng.random(200), seed, fold_SN[seed])
    _, row = compared(tmp_path)
    for name, area in (("auroc", roc_auc_score), ("auprc", average_precision_score)):

        def weighted(probability_N: np.ndarray, at: np.ndarray, area: Any = area) -> float:
            return area(label[at], probability_N[at], sample_weight=weight_of(label)[at])

        of_seed = [
            np.mean([weighted(probability_N, fold_N == fold) for fold in range(2)])
            for probability_N, fold_N in zip(probability_SN, fold_SN, strict=True)
        ]
        assert row[name]["mean"] == pytest.approx(np.mean(of_seed))
        assert row[name]["sd"] == pytest.approx(np.std(of_seed, ddof=1))
        low, high = row[name]["ci"]
        assert low < row[name]["mean"] < high < low + 0.3
        everyone = np.ones(200, dtype=bool)
        assert row[name]["ensemble"] == pytest.approx(weighted(probability_SN.mean(axis=0), everyone))
        assert row[name]["difference"]["ci"][0] < row[name]["difference"]["value"] < row[name]["difference"]["ci"][1]

    # a seed that lacks a fold does not count
    ContenderRun("scratch", 0, 1, 1).results_path(tmp_path / "b/runs").unlink()
    _, row = compared(tmp_path)
    assert row["seeds"] == 1 and row["auroc"]["sd"] is None


def test_a_contender_is_compared_as_its_mean_with_the_plain_models(tmp_path: Path) -> None:
    """Of each seed that both have, by the mean of the logits; the plain models' part in it is that of the same fold."""
    rng = np.random.default_rng(0)
    label, fold_SN = rng.integers(0, 2, 200).astype(float), rng.integers(0, 2, (2, 200))
    own_SN, plain_SN = rng.uniform(0.01, 0.99, (2, 2, 200))
    for seed in range(2):
        written(tmp_path / "b/runs", "scratch", label, own_SN[seed], seed, fold_SN[seed])
    given = configured("DATA", tmp_path, "seeds=2", "run.name=b", "ensemble=[scratch]")
    assert [row["name"] for row in compare(given)["rows"]] == ["scratch"]
    written(tmp_path / "b/runs", "plain_models", label, plain_SN[1], 1, fold_SN[1])
    *_, row = compare(given)["rows"]
    assert (row["name"], row["seeds"], row["seconds"]) == ("scratch and plain models", 1, 2.0)
    mean_N = expit((logit(own_SN[1]) + logit(plain_SN[1])) / 2)
    for name, area in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
        of_folds = [
            area(label[at], mean_N[at], sample_weight=weight_of(label)[at]) for at in (fold_SN[1] == 0, fold_SN[1] == 1)
        ]
        assert row[name]["mean"] == pytest.approx(np.mean(of_folds))
    comparison.write(given)
    assert "And plain models" in (tmp_path / "b/cross_validation.md").read_text()
    with pytest.raises(ConfigError, match="ensemble: nobody is not a contender"):
        configured("DATA", tmp_path, "ensemble=[nobody]")


def test_runs_of_other_labels_are_not_compared(tmp_path: Path) -> None:
    label = np.arange(20) % 2.0
    for seed in range(2):
        written(
            tmp_path / "b/runs", "scratch", (label + seed) % 2, np.linspace(0.1, 0.9, 20), seed, np.arange(20) // 10
        )
    with pytest.raises(UserError, match="runs of scratch have different labels"):
        compared(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("only=[boosting]", "only: boosting is not a contender"),
        ("budgets=[-1]", "budgets must be different numbers of patients, 0 for all there are; got [-1]"),
        ("choosing_fraction=1", "choosing_fraction must be between 0 and 1"),
        ("train.num_workers=2", "the runs of a benchmark train on one worker each"),
        ("folds=1", "folds must be at least 2"),
        ("+contenders.gru.point.depth=3", "contenders.gru.point.depth is not a known key: known keys are backbone_lr,"),
        ("+contenders.gru.model.heads=3", "contenders.gru.model.heads is not a known key"),
        ("contenders.gru.model.layers=Z", "contenders.gru.model.layers takes the letters"),
        ("pretrain.warmup_steps=9999", "pretrain.warmup_steps must be at least 0 and below max_steps=300"),
        ("point.head_lr={choice: [1e-3]}", "point.head_lr must be one value here, not a distribution"),
        ("point.head_lr=fast", "point.head_lr must be a finite positive number, got 'fast'"),
    ],
)
def test_a_mistake_is_one_line(wrong: str, line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        load("benchmark", ["task=readmission", "data.path=DATA", wrong], BenchmarkConfig)
