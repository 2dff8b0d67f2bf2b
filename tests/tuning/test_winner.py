"""What a search says of the alarms of the model that it chose, and that its predictions raise the same alarms."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hourly import converted, hour, text, write
from small_models import SMALL

from hymate.command import load
from hymate.config import DataConfig, DataPath, ReportConfig, TaskConfig, TrainConfig
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.meds import SPLITS, SplitsConfig
from hymate.data.tasks import read_or_extract_labels
from hymate.evaluate import EvaluateConfig
from hymate.evaluate import run as evaluate
from hymate.evaluation import alarms, baseline_fits, metrics, report, results
from hymate.inference.bundle import Bundle, read_bundle
from hymate.model.encoder import RiskModel
from hymate.predict import PredictConfig, run
from hymate.tuning.trial import starting_point
from hymate.tuning.winner import LabelledTask, judge_task


def stays(numbers: range, seed: int) -> dict[int, bytes]:
    """Of 12 to 29 hours; every second becomes septic, with a heart rate that rises."""
    rng, files = np.random.default_rng(seed), {}
    for number in numbers:
        hours = int(rng.integers(12, 30))
        first = int(rng.integers(6, hours)) if number % 2 else hours
        rate = 80 + 5 * np.maximum(0, np.arange(hours) - first + 4) + rng.normal(0, 5, hours)
        files[number] = text(hour(h + 1, int(h >= first), HR=round(rate[h], 1)) for h in range(hours))
    return files


def sepsis(*overrides: str) -> TaskConfig:
    given = ["task=sepsis", "bundle=none", "data.path=none", "out=none", *overrides]
    return load("predict", given, PredictConfig).task


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return judge(tmp_path_factory.mktemp("judged"), ReportConfig())


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return judge(tmp_path_factory.mktemp("averaged"), ReportConfig(ensemble=True))


def judge(folder: Path, settings: ReportConfig) -> tuple[Path, dict]:
    """A folder with a bundle of new weights, predictions and picture, and the task's results."""
    data = converted(write(folder / "raw", stays(range(1, 121), 0)), folder / "data", SplitsConfig(0.5, 0.25, 0.25))
    start = starting_point(DataConfig(str(data), context=64, tokens_per_row=512), SMALL, None)
    torch.manual_seed(0)
    state = RiskModel(SMALL, start.vocabulary.size, ["sepsis"]).state_dict()
    bundle = Bundle("risk", SMALL, start.data, start.vocabulary, state, ["sepsis"])
    histories, task = Histories.open(data), sepsis()
    labels = read_or_extract_labels(data, task)
    examples = {split: labelled_examples(histories, labels.table, split) for split in SPLITS}
    labelled = LabelledTask(task, labels, examples, {})
    bundle, part = judge_task(bundle, histories, labelled, folder, settings, TrainConfig(), "cpu")
    extra = {
        "thresholds": results.thresholds_of(part),
        "alarms": results.policies_of(part),
    }
    dataclasses.replace(bundle, extra=extra).write(folder / "bundle")
    return folder, part


def test_the_report_judges_alarms_of_the_model_and_of_boosting(judged: tuple[Path, dict]) -> None:
    folder, part = judged
    assert json.loads(json.dumps(part, allow_nan=False)) == part
    assert (folder / part["alarms_picture"]).read_bytes().startswith(b"\x89PNG")
    model, boosting = part["alarms"]["model"], part["alarms"]["gradient boosting"]
    assert boosting["utility"]["value"] > 0.3
    assert boosting["difference"]["value"] == pytest.approx(model["utility"]["value"] - boosting["utility"]["value"])
    end = results.TrialEnd(0, {}, "finished", 2, {"mean": 0.5, "step": 2}, None, None)
    found = results.collect([part], "mean", [end], end) | {"initial_weights": "new", "bundle": "b"}
    written, threshold = report.report(found), f"{100 * model['policy']['threshold']:.4g} %"
    for text_ in (
        f"- **As an alarm.** With an alarm at risks above {threshold}",
        "Boosting's utility is",
        "## Alarms",
        f"; of {model['patients'] - model['onsets']} without one ",
        "| alarms of | risk above | held, hours | utility |",
        "patients found by hours from the onset](sepsis-alarms.png)",
    ):
        assert text_ in written
    assert threshold in report.card(found)
    assert results.policies_of(found) == {"sepsis": model["policy"]}
    for ci, said in (([0.01, 0.05], "ahead"), ([-0.05, -0.01], "behind"), ([-0.01, 0.05], None)):
        other = copy.deepcopy(found)
        other["alarms"]["gradient boosting"]["difference"] = {"value": sum(ci) / 2, "ci": ci}
        line = next(line for line in report.report(other).splitlines() if "Would gradient boosting do" in line)
        assert ("For alarms: " in line) == bool(said) and (said is None or f"this model is {said}. On" in line)
    quiet = copy.deepcopy(found)
    quiet["alarms"]["model"]["policy"]["threshold"] = 1.0
    assert "- **As an alarm.** No alarm would gain anything (chosen on the tuning split)" in report.report(quiet)


def test_predictions_of_unseen_stays_raise_the_alarms_that_the_report_counts(
    judged: tuple[Path, dict], tmp_path: Path
) -> None:
    """A dataset of held-out stays alone gets a probability at every label; above the threshold are the alarms."""
    folder, part = judged
    unseen = converted(write(tmp_path / "raw", stays(range(1001, 1041), 1)), tmp_path / "data")
    out = tmp_path / "predictions.parquet"
    run(PredictConfig(str(folder / "bundle"), DataPath(str(unseen)), sepsis(), str(out)))
    labels, table = read_or_extract_labels(unseen, sepsis()).table, pq.read_table(out)
    keys = [("subject_id", "ascending"), ("prediction_time", "ascending")]
    given, expected = (found.select(["subject_id", "prediction_time"]).sort_by(keys) for found in (table, labels))
    assert given.equals(expected)
    own = pq.read_table(folder / "predictions.parquet")
    examples = labelled_examples(
        Histories.open(folder / "data"), read_or_extract_labels(folder / "data", sepsis()).table, "held_out"
    )
    utility = sepsis().utility
    assert utility is not None and part["split"] == "held_out"
    courses = alarms.Courses.of(examples, utility)
    probability = own["predicted_boolean_probability"].to_numpy()[courses.order_N]
    again, _ = alarms.judge(courses, probability, alarms.Policy(**part["alarms"]["model"]["policy"]))
    assert again["utility"]["value"] == pytest.approx(part["alarms"]["model"]["utility"]["value"])


def test_another_hospital_is_scored_with_the_policy_of_the_bundle(judged: tuple[Path, dict], tmp_path: Path) -> None:
    folder, part = judged
    unseen = converted(write(tmp_path / "raw", stays(range(1001, 1041), 1)), tmp_path / "data")
    bundle = str(folder / "bundle")
    for name, fraction in (("whole", 0), ("part", 0.5)):
        settings = dict(out=str(tmp_path / name), recalibrate=fraction, workers=1)
        evaluate(EvaluateConfig(bundle, DataPath(str(unseen)), sepsis(), **settings))  # type: ignore[arg-type]
    models = {name: json.loads((tmp_path / name / "results.json").read_text())["models"] for name in ("whole", "part")}
    for found in models.values():
        assert found["as it is"]["alarms"]["model"]["policy"] == part["alarms"]["model"]["policy"]
    assert models["whole"]["as it is"]["alarms"]["model"]["patients"] == 40
    assert models["part"]["recalibrated"]["alarms"]["model"]["utility"]["value"] > 0
    written = (tmp_path / "part" / "report.md").read_text()
    policy = part["alarms"]["model"]["policy"]
    held = f" now or in the last {policy['hold_hours']:g} hours" if policy["hold_hours"] else ""
    alarm = f"{100 * policy['threshold']:.4g} %{held} (of the bundle, chosen in its training), the normalised utility"
    for text_ in (alarm, "](recalibrated-alarms.png)"):
        assert text_ in written


def test_the_mean_of_network_and_plain_models_is_a_model_of_its_own(
    judged: tuple[Path, dict], averaged: tuple[Path, dict], tmp_path: Path
) -> None:
    """The bundle predicts what was scored; the network and boosting are what they are without the option. On these
    stays logistic regression helps boosting.
    """
    (alone, of_network), (folder, part) = judged, averaged
    assert json.loads(json.dumps(part, allow_nan=False)) == part
    assert "network" not in of_network
    for score in metrics.SHOWN:
        assert part["network"][score] == of_network[score] and part["boosting"][score] == of_network["boosting"][score]
    assert part["network"]["recalibration"] == of_network["recalibration"]
    for other in ("network", "plain", "boosting"):
        for area in metrics.AREAS:
            ahead = part[area]["value"] - part[other][area]["value"]
            assert part[other]["difference"][area]["value"] == pytest.approx(ahead)
    assert set(part["alarms"]) == {"model", *results.OTHERS.values()}
    tables = [pq.read_table(at / "predictions.parquet") for at in (folder, alone)]
    mean_E, network_E = (table["predicted_boolean_probability"].to_numpy() for table in tables)
    assert np.abs(mean_E - network_E).max() > 0.01
    # their logits and boosting's lie on a plane: weights of both alike, up to what recalibrated them
    request = ["task=sepsis", f"data.path={folder / 'data'}", "split=held_out", "workers=1"]
    for bundle, expected_E in ((folder, mean_E), (alone, network_E)):
        out = tmp_path / f"{bundle.name}.parquet"
        run(load("predict", [*request, f"bundle={bundle / 'bundle'}", f"out={out}"], PredictConfig))
        found_E = pq.read_table(out)["predicted_boolean_probability"].to_numpy()
        np.testing.assert_allclose(found_E, expected_E, atol=1e-6)
    plain, fraction = read_bundle(folder / "bundle").plain["sepsis"].config, part["plain"]["linear_fraction"]
    assert plain.network_weight == pytest.approx(0.5 / part["recalibration"]["temperature"])
    whole = plain.network_weight / part["plain"]["recalibration"]["temperature"]
    assert 0 < fraction < 1 and plain.linear_weight == pytest.approx(fraction * whole)
    assert plain.boosting_weight == pytest.approx((1 - fraction) * whole)


def found_of(part: dict) -> dict[str, Any]:
    end = results.TrialEnd(0, {}, "finished", 2, {"mean": 0.5, "step": 2}, None, None)
    return results.collect([part], "mean", [end], end) | {"initial_weights": "new", "bundle": "b"}


def test_the_report_has_a_row_for_each_of_mean_and_parts(averaged: tuple[Path, dict]) -> None:
    folder, part = averaged
    found = found_of(part)
    rows = [row[0] for row in report.score_rows(found)[1:]]
    difference = "difference [97.5 % CI]"
    parts = [name for other in results.OTHERS.values() for name in (other, difference)]
    assert rows == ["held_out, mean of three", *parts]
    for text_ in (report.report(found), report.card(found)):
        assert "- **A mean.** The model is the mean of the network" in text_
        assert "| network alone |" in text_ and "| plain models alone |" in text_
        assert "minus the network alone: AUROC" in text_ and "of plain models: boosting (" in text_
    assert results.thresholds_of(found)["sepsis"] and (folder / part["picture"]).read_bytes().startswith(b"\x89PNG")


def test_where_logistic_regression_adds_nothing_boosting_is_the_plain_model(
    averaged: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline_fits, "LINEAR_FRACTIONS", (0.0,))
    folder, part = judge(tmp_path, ReportConfig(ensemble=True))
    assert "plain" not in part and part["boosting"]["auroc"] == averaged[1]["boosting"]["auroc"]
    assert report.score_rows(found_of(part))[1][0] == "held_out, mean of both"
    plain = read_bundle(folder / "bundle").plain["sepsis"]
    assert plain.linear is None and not (folder / "bundle" / "linear.parquet").exists()
    temperature = part["boosting"]["recalibration"]["temperature"]
    assert plain.config.network_weight == pytest.approx(plain.config.boosting_weight * temperature)


def test_where_boosting_cannot_be_fitted_the_network_is_kept_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **more: object) -> None:
        raise MemoryError("too much")

    monkeypatch.setattr(baseline_fits, "fit", refuse)
    folder, part = judge(tmp_path, ReportConfig(ensemble=True))
    assert part["boosting"] == {
        "left_out": "too much; so the model is the network alone, in spite of report.ensemble=true"
    }
    assert "network" not in part and not read_bundle(folder / "bundle").plain


def test_a_task_without_utility_has_no_alarms() -> None:
    assert sepsis("task.utility=null").utility is None and sepsis("task.utility.late_hours=4").utility is not None
