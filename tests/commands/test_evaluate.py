"""The report of a finished model on other data: who is scored, by what, and what is said to have changed."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from small_cohort import SIZES, write_meds
from small_models import write_risk_bundle

from hymate.command import load
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.meds import DATA_SCHEMA, write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.tasks import read_or_extract_labels
from hymate.data.vocabulary import Vocabulary
from hymate.errors import ConfigError, UserError
from hymate.evaluate import EvaluateConfig, run
from hymate.evaluation import metrics
from hymate.evaluation.transport import transport
from hymate.inference.bundle import build_model, read_bundle
from hymate.inference.provenance import Seen, provenance
from hymate.predict import PredictConfig
from hymate.predict import run as predict

pytestmark = pytest.mark.slow

LEARNED, WEIGHTS = "model learned from patients of this dataset", "initial weights come from training on"
CHOSEN = [[0.8, 0.3], [0.9, 0.4], [0.95, 0.5]]


@pytest.fixture(scope="module")
def bundle(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = Vocabulary.read(small_data / "histories" / "vocabulary.parquet")
    folder = tmp_path_factory.mktemp("risk")
    before = {"num_labels": 48, "num_subjects": 24, "prevalence": 0.25, "auroc": {"value": 0.7, "ci": [0.6, 0.8]}}
    write_risk_bundle(folder / "new", vocabulary, seed=1)
    model = build_model(read_bundle(folder / "new"))
    model.recalibrate("readmission", 0.2, 1.5)  # risks that are too extreme and too high
    extra = {"thresholds": {"readmission": CHOSEN}, "held_out": before}
    return write_risk_bundle(folder / "off", vocabulary, state=model.state_dict(), extra=extra)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another hospital's: one lab value in other units, one code of its own, and another that is not measured."""
    raw, changed = write_meds(tmp_path_factory.mktemp("elsewhere") / "raw", seed=3), {}
    for file in (raw / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        code, value = table["code"], table["numeric_value"]
        changed["value"] = pc.if_else(pc.equal(code, "LAB//sodium"), pc.add(value, 100.0), value)
        changed["code"] = pc.if_else(pc.equal(code, "LAB//glucose"), "LAB//sugar", code)
        for name, column in (("numeric_value", changed["value"]), ("code", changed["code"])):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(name), column.cast(table.schema.field(name).type))
        write_parquet(table, file)
    prepare(PrepareConfig(source="meds", raw=str(raw), out=str(raw.parent / "data"), workers=1))
    return raw.parent / "data"


def evaluated(bundle: Path, data: Path, out: Path, *overrides: str) -> dict[str, Any]:
    given = ["task=readmission", f"bundle={bundle}", f"data.path={data}", f"out={out}", "workers=1", *overrides]
    run(load("evaluate", given, EvaluateConfig))
    return json.loads((out / "results.json").read_text())


def test_a_part_recalibrates_and_the_others_are_scored_both_ways(bundle: Path, elsewhere: Path, tmp_path: Path) -> None:
    found = evaluated(bundle, elsewhere, tmp_path / "out", "recalibrate=0.4")
    given = ["task=readmission", f"bundle={bundle}", f"data.path={elsewhere}", f"out={tmp_path / 'p.parquet'}"]
    predict(load("predict", [*given, "workers=1"], PredictConfig))
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table.equals(pq.read_table(tmp_path / "p.parquet"))
    on, raw, fitted = found["recalibrated_on"], found["models"]["as it is"], found["models"]["recalibrated"]
    assert on["subjects"] + raw["num_subjects"] == sum(SIZES.values()) and 0 < on["subjects"] < raw["num_subjects"]
    assert raw["num_labels"] == fitted["num_labels"] == table.num_rows - on["labels"]
    assert raw["auroc"] == fitted["auroc"] and raw["brier"] > fitted["brier"]
    assert on["temperature"] > 1 and on["shift"] < 0
    assert abs(fitted["calibration"]["predicted"] - fitted["prevalence"]) < 0.15
    assert [[p["aim"], p["threshold"]] for p in raw["operating_points"]] == CHOSEN
    assert [p["threshold"] for p in fitted["operating_points"]] != [threshold for _, threshold in CHOSEN]

    label, probability = table["boolean_value"].to_numpy(zero_copy_only=False), table["predicted_boolean_probability"]
    subject, probability = table["subject_id"].to_numpy(), probability.to_numpy().astype(float)
    everyone = evaluated(bundle, elsewhere, tmp_path / "all", "recalibrate=0")
    assert everyone["models"].keys() == {"as it is"} and everyone["recalibrated_on"] is None
    assert everyone["models"]["as it is"]["brier"] == pytest.approx(metrics.brier(label, probability))
    assert everyone["models"]["as it is"]["num_subjects"] == len(np.unique(subject))
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"40 % of the patients, drawn at random: {on['subjects']} patients, {on['labels']} labels" in report
    assert "## The model as it is" in report and "## The model recalibrated" in report
    assert "Thresholds of the bundle, chosen in its training; everything else is measured on other patients." in report
    for picture in ("as-it-is.png", "recalibrated.png"):
        assert picture in report and (tmp_path / "out" / picture).read_bytes()[1:4] == b"PNG"
    assert "| on its own held-out data | 48 | 24 | 0.250 | 0.700 [0.600, 0.800]" in report


def test_what_changed_is_said(bundle: Path, elsewhere: Path, small_data: Path, tmp_path: Path) -> None:
    found = evaluated(bundle, elsewhere, tmp_path / "out")
    changed, report = found["transport"], (tmp_path / "out" / "report.md").read_text()
    assert [code for code, _ in changed["unknown_codes"]] == ["LAB//sugar"]
    assert [code for code, *_ in changed["rarer"]] == ["LAB//glucose"]
    ((code, there, here),) = changed["values"]
    assert code == "LAB//sodium" and here - there == pytest.approx(100, abs=1)
    assert changed["unknown"] == pytest.approx(1 / 3, abs=0.05)
    assert "It does not know `LAB//sugar`" in report
    assert "**Values lie elsewhere, perhaps in another unit:** `LAB//sodium`" in report
    assert " % of the labels are positive; in its own held-out data 25 % were." in report

    same = evaluated(bundle, small_data, tmp_path / "same")["transport"]
    assert same["rarer"] == same["values"] == same["unknown_codes"] == [] and same["unknown"] == 0


@pytest.mark.parametrize(("min_count", "notes"), [(1, 0), (100, 300)])
def test_nothing_changed_in_the_data_that_a_vocabulary_comes_from(min_count: int, notes: int, tmp_path: Path) -> None:
    raw = write_meds(tmp_path / "raw")
    born, noted, dead = (datetime(year, 1, 1) for year in (1950, 2000, 2030))  # deaths follow all predictions
    added = [("MEDS_BIRTH", born), ("SEX//F", None), ("MEDS_DEATH", dead)]
    added += [(f"NOTE//{k}//", noted) for k in range(notes)]
    for file in (raw / "data").rglob("*.parquet"):
        events = pq.read_table(file).to_pylist()
        for id in {event["subject_id"] for event in events}:
            own: dict[str, Any] = {"subject_id": id, "numeric_value": None}
            # each note has a code of its own, yet most events are notes
            events += [own | {"code": f"{code}{id if code[-1] == '/' else ''}", "time": time} for code, time in added]
        events.sort(key=lambda event: (event["subject_id"], event["time"] or datetime.min))
        write_parquet(pa.Table.from_pylist(events, DATA_SCHEMA), file)
    prepare(PrepareConfig(source="meds", raw=str(raw), out=str(tmp_path / "data"), workers=1))
    config = load("evaluate", ["task=readmission", "bundle=b", "data.path=d", "out=o"], EvaluateConfig)
    histories = Histories.open(tmp_path / "data")
    histories = histories.with_splits(dict.fromkeys(histories.splits, "all"))
    labels = read_or_extract_labels(histories.path, config.task).table
    examples, vocabulary = labelled_examples(histories, labels, "all"), Vocabulary.of(histories, min_count)
    found = transport(histories, examples, vocabulary, 0)
    assert found["rarer"] == found["values"] == [] and (found["unknown"] == 0) == (min_count == 1)


@pytest.mark.parametrize(
    ("trained_on", "initial", "of_held_out"),
    [
        ("same split", "new", ""),
        ("same split", "other data", WEIGHTS),
        ("same split", "another split", WEIGHTS),
        ("another split", "new", LEARNED),
    ],
)
def test_patients_that_the_model_learned_from_are_pointed_out(
    trained_on: str, initial: Seen, of_held_out: str, bundle: Path, small_data: Path, tmp_path: Path
) -> None:
    own, recorded = read_bundle(bundle), provenance(Histories.open(small_data), initial)
    recorded |= {"learned_from": "others"} if trained_on == "another split" else {}
    extra = own.extra | {"provenance": recorded}
    trained = write_risk_bundle(tmp_path / "trained", own.vocabulary, state=own.state, extra=extra)
    for split, noted in (("all", LEARNED), ("held_out", of_held_out)):
        found = evaluated(trained, small_data, tmp_path / split, f"split={split}", "recalibrate=0")
        assert (found["trained_on"], found["initial_weights"]) == (trained_on, initial)
        report = (tmp_path / split / "report.md").read_text()
        assert [note for note in (LEARNED, WEIGHTS) if f"**Note:** The {note}" in report] == [noted] * bool(noted)


def test_what_cannot_be_evaluated_is_refused(bundle: Path, small_data: Path, tmp_path: Path) -> None:
    old = write_risk_bundle(tmp_path / "old", read_bundle(bundle).vocabulary, seed=1)
    with pytest.raises(UserError, match=r"names no thresholds .* give recalibrate=0\.2"):
        evaluated(old, small_data, tmp_path / "out", "recalibrate=0")
    assert evaluated(old, small_data, tmp_path / "out")["models"].keys() == {"as it is", "recalibrated"}
    with pytest.raises(ConfigError, match=r"recalibrate must be at least 0 and below 1, got 1\.0"):
        evaluated(bundle, small_data, tmp_path / "out", "recalibrate=1.0")
    with pytest.raises(UserError, match="the patients that are scored have no positive or no negative label"):
        evaluated(bundle, small_data, tmp_path / "out", "recalibrate=0.999")
    labels = pq.read_table(small_data / "labels" / "readmission")
    at, alike = labels.column_names.index("boolean_value"), pa.array([True] * len(labels))
    alike = labels.set_column(at, "boolean_value", alike)
    write_parquet(alike, tmp_path / "labels" / "0.parquet")
    with pytest.raises(UserError, match=r"the all split has .* positive and 0 negative labels"):
        evaluated(bundle, small_data, tmp_path / "out", f"task.labels={tmp_path / 'labels'}")
