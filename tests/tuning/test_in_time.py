"""A task in time from training to report, prediction and evaluation, against the law; what can't do one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from trained import synthetic_cohort, task_of, trained_bundle

import hymate
from hymate import evaluate, explain, predict
from hymate.baselines import BaselinesConfig
from hymate.command import load
from hymate.config import DataPath, ReportConfig, TrainConfig
from hymate.data.examples import examples_by_split
from hymate.data.histories import Histories
from hymate.data.tasks import read_or_extract_labels
from hymate.errors import ConfigError, UserError
from hymate.evaluation import report, results
from hymate.evaluation.survival import aalen_johansen
from hymate.inference.bundle import build_model, read_bundle
from hymate.tuning.protocol import BenchmarkConfig
from hymate.tuning.search import TuneConfig
from hymate.tuning.trial import draw_trials, starting_point
from hymate.tuning.winner import LabelledTask, judge_task

NAME = "time_to_readmission"
COLUMNS = [f"predicted_{kind}_{days}d" for kind in ("incidence", "competing") for days in (7, 30, 90)]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder with data, a trained bundle, predictions and a picture; the task's results."""
    folder = tmp_path_factory.mktemp("in-time")
    data = synthetic_cohort(folder, subjects=600)
    histories, task = Histories.open(data), task_of(data, NAME)
    labels = read_or_extract_labels(data, task)
    examples = examples_by_split(histories, task, labels.table)
    labelled = LabelledTask(task, labels, examples, {})
    bundle = trained_bundle(data, steps=200, name=NAME)
    bundle, part = judge_task(bundle, histories, labelled, folder, ReportConfig(), TrainConfig(), "cpu")
    dataclasses.replace(bundle, extra={"held_out": {NAME: {}}}).write(folder / "bundle")
    return folder, part


def request(folder: Path, out: Path, **settings: object) -> dict:
    return {
        "bundle": str(folder / "bundle"),
        "data": DataPath(str(folder / "data")),
        "task": task_of(folder / "data", NAME),
        "out": str(out),
        "workers": 1,
        "device": "cpu",
        **settings,
    }


def test_the_report_of_a_task_in_time(judged: tuple[Path, dict]) -> None:
    folder, part = judged
    assert json.loads(json.dumps(part, allow_nan=False)) == part
    assert (folder / part["picture"]).read_bytes().startswith(b"\x89PNG")
    assert [row["days"] for row in part["horizons"]] == [7, 30, 90]
    end = results.TrialEnd(0, {}, "finished", 2, {"mean": 0.5, "step": 2}, None, None)
    found = results.collect([part], "mean", [end], end) | {"initial_weights": "new", "bundle": "b"}
    for text in (
        "predicted and observed incidence by risk group, calibration by each horizon](time_to_readmission.png)",
        "there is no gradient boosting for tasks in time",
        "| by | lost | observed incidence | predicted | AUROC [95 % CI] |",
        "| held_out, 30 days |",
        "| by | died first, observed | predicted |",
        "| highest risk |",
        "the competing event came first",
        "the AUROC by each horizon",
    ):
        assert text in report.report(found), text
    assert "Concordance is" in report.card(found)


def test_incidence_rises_with_the_horizon_and_leaves_room_for_the_competing_event(judged: tuple[Path, dict]) -> None:
    folder, _ = judged
    table = pq.read_table(folder / "predictions-incidence.parquet")
    assert table.column_names == ["subject_id", "prediction_time", *COLUMNS]
    incidence = {name: table[name].to_numpy() for name in COLUMNS}
    for kind in ("incidence", "competing"):
        rising = np.stack([incidence[f"predicted_{kind}_{days}d"] for days in (7, 30, 90)])
        assert (np.diff(rising, axis=0) >= 0).all() and (rising >= 0).all()
    assert (incidence["predicted_incidence_90d"] + incidence["predicted_competing_90d"] <= 1).all()


def test_it_is_evaluated_on_labels_that_look_less_far_ahead(judged: tuple[Path, dict], tmp_path: Path) -> None:
    folder, part = judged
    labels = read_or_extract_labels(folder / "data", task_of(folder / "data", NAME)).table
    days_N, cause_N = labels["float_value"].to_numpy(), labels["cause"].to_numpy()
    seen = {
        "integer_value": np.where(days_N > 40, 0, cause_N),
        "float_value": np.minimum(days_N, 40).astype(np.float32),
    }
    cut = pa.table({name: labels[name] for name in ("subject_id", "prediction_time")} | seen)
    (tmp_path / "labels").mkdir()
    pq.write_table(cut, tmp_path / "labels" / "0.parquet")
    task = dataclasses.replace(task_of(folder / "data", NAME), labels=str(tmp_path / "labels"))
    given = request(folder, tmp_path / "out", split="held_out", recalibrate=0.0) | {"task": task}
    evaluate.run(evaluate.EvaluateConfig(**given))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for row, whole in zip(found["horizons"][:2], part["horizons"], strict=False):
        assert row["auroc"]["value"] == pytest.approx(whole["auroc"]["value"], abs=1e-6)
    assert found["horizons"][2]["auroc"]["value"] is found["integrated_brier"] is None
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Nobody is followed to 90 days, so what comes by then is not known." in text
    assert "Integrated Brier score -, concordance 0." in text and "None" not in text and "nan" not in text


def test_predicted_incidence_follows_the_law(judged: tuple[Path, dict]) -> None:
    """The law's probability is the incidence of readmission by 30 days: a later one comes after day 30."""
    folder, part = judged
    table = pq.read_table(folder / "predictions-incidence.parquet")
    oracle = pq.read_table(folder / "data" / "oracle" / "readmission.parquet").to_pylist()
    of_law = {(row["subject_id"], row["prediction_time"]): row["probability"] for row in oracle}
    keys = zip(table["subject_id"].to_pylist(), table["prediction_time"].to_pylist(), strict=True)
    law_N = np.array([of_law.get(key, np.nan) for key in keys])
    known_N = ~np.isnan(law_N)
    assert 0.7 < known_N.mean() < 1  # of those that are lost the oracle says nothing
    predicted_N = table["predicted_incidence_30d"].to_numpy()[known_N]
    assert np.corrcoef(predicted_N, law_N[known_N])[0, 1] > 0.35
    assert predicted_N.mean() == pytest.approx(law_N[known_N].mean(), abs=0.08)
    assert part["horizons"][1]["lost"] > 0 and part["horizons"][1]["auroc"]["value"] > 0.6


def test_predict_and_evaluate_say_what_the_search_said(judged: tuple[Path, dict], tmp_path: Path) -> None:
    folder, part = judged
    predict.run(predict.PredictConfig(**request(folder, tmp_path / "p.parquet", split="held_out")))
    for suffix in ("", "-incidence"):
        found, expected = (
            pq.read_table(path) for path in (tmp_path / f"p{suffix}.parquet", folder / f"predictions{suffix}.parquet")
        )
        assert found.column_names == expected.column_names and "boolean_value" not in found.column_names
        for name in found.column_names[2:]:
            np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), atol=1e-6)
    risk = pq.read_table(tmp_path / "p.parquet")["predicted_boolean_probability"].to_numpy()
    last = pq.read_table(tmp_path / "p-incidence.parquet")["predicted_incidence_90d"].to_numpy()
    np.testing.assert_allclose(risk, last, atol=1e-6)
    evaluate.run(evaluate.EvaluateConfig(**request(folder, tmp_path / "e", split="held_out")))
    said = json.loads((tmp_path / "e" / "results.json").read_text())
    for row, expected_row in zip(said["horizons"], part["horizons"], strict=True):
        assert row["brier"] == pytest.approx(expected_row["brier"], abs=1e-6)
        assert row["auroc"]["value"] == pytest.approx(expected_row["auroc"]["value"], abs=1e-6)
    assert said["concordance"]["value"] == pytest.approx(part["concordance"]["value"], abs=1e-6)
    table = read_or_extract_labels(folder / "data", task_of(folder / "data", NAME)).table
    histories = Histories.open(folder / "data")
    held_out = examples_by_split(histories, task_of(folder / "data", NAME), table)["held_out"]
    (observed,) = aalen_johansen(held_out.days_E, held_out.label_E, [30])
    assert said["horizons"][1]["calibration"]["observed"]["value"] == pytest.approx(observed, abs=1e-6)
    written = (tmp_path / "e" / "report.md").read_text()
    assert "**What changed.**" in written and "| by | lost |" in written
    assert (tmp_path / "e" / "as-it-is.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_do_a_task_in_time_says_so_before_any_work(judged: tuple[Path, dict], tmp_path: Path) -> None:
    folder, _ = judged
    given, tune = request(folder, tmp_path / "out"), [f"task={NAME}", "data.path=D", "init=null", "model=debug"]
    with pytest.raises(UserError, match=r"^context=all: task time_to_readmission is in time[^\n]*$"):
        predict.run(predict.PredictConfig(**given, context="all"))
    with pytest.raises(UserError, match=r"^explain: task time_to_readmission is in time[^\n]*$"):
        explain.run(explain.ExplainConfig(**given))
    with pytest.raises(UserError, match=r"^hymate.load: task time_to_readmission is in time[^\n]*$"):
        hymate.load(folder / "bundle")
    for override in ("task.horizons_days=[7,30]", "task.competing=null"):
        other = load("predict", [f"task={NAME}", override, "bundle=b", "data.path=d", "out=o"], predict.PredictConfig)
        with pytest.raises(UserError, match=r"has learned when: give [^\n]*horizons_days=\[7,30,90\][^\n]*=died$"):
            predict.run(predict.PredictConfig(**{**given, "task": other.task}))
    for command, schema, what in (
        ("baselines", BaselinesConfig, "a baseline"),
        ("benchmark", BenchmarkConfig, "the benchmark"),
    ):
        out = ["out=o"] if command == "baselines" else []
        with pytest.raises(ConfigError, match=f"{what} can't do a task in time"):
            load(command, [f"task={NAME}", "data.path=D", *out], schema)
    with pytest.raises(ConfigError, match=r"search.metric=auprc: task time_to_readmission is in time"):
        load("tune", [*tune, "search.metric=auprc"], TuneConfig)
    with pytest.raises(ConfigError, match=r"report.ensemble: task time_to_readmission is in time"):
        load("tune", [*tune, "report.ensemble=true"], TuneConfig)
    for key in ("early_fraction", "teacher_fraction"):
        config = load("tune", [*tune, f"data.path={folder / 'data'}", f"search.space.{key}=0.5"], TuneConfig)
        start = starting_point(config.data, config.model, None)
        with pytest.raises(ConfigError, match=rf"search.space.{key}: task time_to_readmission is in time"):
            draw_trials(config.tasks, config.search, config.train, start)
    both = [f"task=[readmission,{NAME}]", *tune[1:]]
    beside = load("tune", [*both, "report.ensemble=true", "search.space.teacher_fraction=0.5"], TuneConfig)
    assert [task.name for task in beside.tasks] == ["readmission", NAME]  # the other task has boosting and a teacher
    config = load("tune", [*both, f"data.path={folder / 'data'}", "search.space.early_fraction=0.5"], TuneConfig)
    with pytest.raises(ConfigError, match=rf"search.space.early_fraction: task {NAME} is in time"):
        draw_trials(config.tasks, config.search, config.train, starting_point(config.data, config.model, None))
    assert not (tmp_path / "out").exists()


def test_a_bundle_keeps_what_it_predicts_in_time(judged: tuple[Path, dict], tmp_path: Path) -> None:
    folder, _ = judged
    bundle = read_bundle(folder / "bundle")
    assert bundle.in_time == {NAME: task_of(folder / "data", NAME).in_time}
    assert "heads.time_to_readmission.edges" in bundle.state
    dataclasses.replace(bundle, in_time={NAME: dataclasses.replace(bundle.in_time[NAME], horizons_days=[7.0])}).write(
        tmp_path / "other"
    )
    assert read_bundle(tmp_path / "other").fingerprint != bundle.fingerprint


def test_an_older_head_says_each_bins_hazard_by_itself(judged: tuple[Path, dict]) -> None:
    bundle = read_bundle(judged[0] / "bundle")
    state = {name: weight for name, weight in bundle.state.items() if not name.endswith("basis_JJ")}
    assert len(state) == len(bundle.state) - 1
    head, own = (build_model(dataclasses.replace(bundle, state=of)).heads[NAME] for of in (state, bundle.state))
    patient_AME = torch.randn(3, bundle.model.members, head.hidden.weight.shape[1])
    torch.testing.assert_close(head.log_hazards(patient_AME).flatten(2), head(patient_AME))
    assert not torch.allclose(own.log_hazards(patient_AME), head.log_hazards(patient_AME))
