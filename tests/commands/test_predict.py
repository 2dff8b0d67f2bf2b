"""Prediction: any MEDS folder, the bundle's own vocabulary, the MEDS prediction schema, and clear refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from meds_evaluation.schema import PredictionSchema
from small_cohort import SIZES, write_meds
from small_models import SMALL, write_risk_bundle

from hymate import work
from hymate.command import load
from hymate.data.label_files import read_labels
from hymate.data.meds import write_parquet
from hymate.data.vocabulary import Vocabulary
from hymate.errors import UserError
from hymate.inference import dataset
from hymate.inference.bundle import Bundle, read_bundle
from hymate.inference.dataset import predict_part
from hymate.model.encoder import RiskModel
from hymate.predict import PredictConfig, run


@pytest.fixture(scope="module")
def bundle(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not know the code LAB//glucose."""
    vocabulary = pq.read_table(small_data / "histories" / "vocabulary.parquet")
    known = tmp_path_factory.mktemp("known") / "vocabulary.parquet"
    pq.write_table(vocabulary.filter(pa.compute.field("code") != "LAB//glucose"), known)
    return write_risk_bundle(tmp_path_factory.mktemp("risk") / "bundle", Vocabulary.read(known), context=24, seed=1)


def predicted(bundle: Path, data: Path, out: Path, *overrides: str) -> pa.Table:
    given = ["task=readmission", f"bundle={bundle}", f"data.path={data}", f"out={out}", *overrides]
    run(load("predict", given, PredictConfig))
    return pq.read_table(out)


@pytest.mark.slow
def test_every_label_gets_a_prediction_in_the_meds_schema(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    table = predicted(bundle, small_data, tmp_path / "new" / "p.parquet")
    PredictionSchema.validate(table)
    assert table.num_rows == 2 * sum(SIZES.values())
    labels = read_labels(small_data / "labels" / "readmission").sort_by(
        [("subject_id", "ascending"), ("prediction_time", "ascending")]
    )
    assert table.select(labels.column_names).equals(labels)
    probability = table["predicted_boolean_probability"].to_numpy()
    assert np.array_equal(table["predicted_boolean_value"].to_numpy(), probability >= 0.5)
    assert len(np.unique(probability)) > 100


@pytest.mark.slow
def test_an_unprepared_meds_folder_gives_the_same(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    raw = write_meds(tmp_path / "raw")
    before = sorted(tmp_path.rglob("*"))
    prepared = predicted(bundle, small_data, tmp_path / "a.parquet")
    assert_alike(predicted(bundle, raw, tmp_path / "b.parquet"), prepared)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "a.parquet", tmp_path / "b.parquet"])


@pytest.mark.slow
@pytest.mark.parametrize("given", ["prepared", "MEDS"])
def test_predicting_in_parts_goes_on_after_a_kill(
    given: str, small_data: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several processes, into a folder; and gives what one process gives into one file."""
    data = small_data if given == "prepared" else write_meds(tmp_path / "raw")
    together = predicted(bundle, data, tmp_path / "together.parquet")
    monkeypatch.setattr(dataset, "PART", 50)
    monkeypatch.setattr(work, "WORTH_BYTES", 1)
    calls = []

    def dies_at_the_third(part: str, **given: Any) -> None:
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        predict_part(part, **given)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "predict_part", dies_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            predicted(bundle, data, tmp_path / "parts", "workers=1")
    done = list((tmp_path / "parts").rglob("*.parquet"))
    written = {file: file.stat().st_mtime_ns for file in done if ".work" not in file.parts}
    assert len(written) == 2
    in_parts = predicted(bundle, data, tmp_path / "parts", "workers=2")
    assert_alike(in_parts.sort_by([("subject_id", "ascending"), ("prediction_time", "ascending")]), together)
    assert {file: file.stat().st_mtime_ns for file in written} == written, "what was done is done again"
    assert not (tmp_path / "parts" / ".work").exists()
    with pytest.raises(UserError, match="parts: holds files already: choose a new folder for out=, or delete it"):
        predicted(bundle, data, tmp_path / "parts")


def assert_alike(one: pa.Table, other: pa.Table) -> None:
    """The same predictions, up to the rounding that the company in a row makes."""
    name = "predicted_boolean_probability"
    assert one.drop_columns([name]).equals(other.drop_columns([name]))
    np.testing.assert_allclose(one[name].to_numpy(), other[name].to_numpy(), atol=1e-6)


def test_a_split_can_be_chosen(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    everyone = (
        predicted(bundle, small_data, tmp_path / "a.parquet").to_pandas().set_index(["subject_id", "prediction_time"])
    )
    part = predicted(bundle, small_data, tmp_path / "b.parquet", "split=held_out").to_pandas()
    part = part.set_index(["subject_id", "prediction_time"])
    assert len(part) == 2 * SIZES["held_out"]
    same = everyone.loc[part.index]
    name = "predicted_boolean_probability"
    assert np.allclose(part[name], same[name], atol=1e-6)


def test_labels_without_outcomes_give_the_prediction_columns_alone(
    small_data: Path, bundle: Path, tmp_path: Path
) -> None:
    times = read_labels(small_data / "labels" / "readmission").drop_columns(["boolean_value"])
    write_parquet(times, tmp_path / "times" / "0.parquet")
    table = predicted(bundle, small_data, tmp_path / "p.parquet", f"task.labels={tmp_path / 'times'}")
    assert table.column_names[2:] == ["predicted_boolean_value", "predicted_boolean_probability"]
    assert table.num_rows == times.num_rows


@pytest.mark.parametrize("given", ["prepared", "MEDS"])
def test_labels_that_contradict_each_other_are_refused(
    given: str, small_data: Path, bundle: Path, tmp_path: Path
) -> None:
    data = small_data if given == "prepared" else write_meds(tmp_path / "raw")
    labels = read_labels(small_data / "labels" / "readmission")
    turned = labels.set_column(2, "boolean_value", pa.compute.invert(labels["boolean_value"])).slice(0, 3)
    write_parquet(pa.concat_tables([labels, turned]), tmp_path / "labels" / "0.parquet")
    with pytest.raises(UserError, match=r"^task\.labels: 3 labels in [^\n]*labels contradict another one[^\n]*$"):
        predicted(bundle, data, tmp_path / "p.parquet", f"task.labels={tmp_path / 'labels'}")
    assert not list(tmp_path.glob("p.*"))


def test_the_fraction_of_unknown_codes_is_named(
    small_data: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted(bundle, small_data, tmp_path / "p.parquet")
    fraction = float(capsys.readouterr().out.split("%")[0])
    assert 28 < fraction < 38  # one of three equally frequent codes


@pytest.mark.slow
def test_the_task_names_the_head_and_days_have_a_file_of_their_own(
    small_data: Path, bundle: Path, tmp_path: Path
) -> None:
    one = read_bundle(bundle)
    torch.manual_seed(1)
    tasks, in_days = ["readmission", "length_of_stay"], ["length_of_stay"]
    model = RiskModel(SMALL, one.vocabulary.size, tasks, in_days)
    model.load_state_dict(one.state, strict=False)  # all but the second head
    two = Bundle("risk", SMALL, one.data, one.vocabulary, model.state_dict(), tasks, in_days)
    two.write(tmp_path / "two")
    same = predicted(tmp_path / "two", small_data, tmp_path / "a.parquet")
    assert same.equals(predicted(bundle, small_data, tmp_path / "b.parquet"))
    assert not (tmp_path / "a-days.parquet").exists()

    labels = read_labels(small_data / "labels" / "readmission")
    days = pa.array(np.linspace(0, 20, len(labels)), pa.float32())
    write_parquet(labels.append_column("float_value", days), tmp_path / "labels" / "0.parquet")
    given = ["task=length_of_stay", f"task.labels={tmp_path / 'labels'}"]
    for context in ("bundle", "all"):
        stay = predicted(tmp_path / "two", small_data, tmp_path / f"{context}.parquet", *given, f"context={context}")
        PredictionSchema.validate(stay)
        table = pq.read_table(tmp_path / f"{context}-days.parquet")
        assert table.column_names == ["subject_id", "prediction_time", "float_value", "predicted_float_value"]
        assert table.select(["subject_id", "prediction_time"]).equals(stay.select(["subject_id", "prediction_time"]))
        assert sorted(table["float_value"].to_pylist()) == pytest.approx(days.to_pylist())
        predicted_days = table["predicted_float_value"].to_numpy()
        assert (predicted_days >= 0).all() and len(np.unique(predicted_days)) > 100
        assert not np.allclose(stay["predicted_boolean_probability"], same["predicted_boolean_probability"])


def test_a_meds_folder_whose_events_no_definition_matches_is_refused(bundle: Path, tmp_path: Path) -> None:
    raw = write_meds(tmp_path / "raw")
    shutil.rmtree(raw / "labels")
    with pytest.raises(UserError, match=r"no event matches task\.definition: set its predicates to the codes of this"):
        predicted(bundle, raw, tmp_path / "p.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_what_another_call_finds_in_the_same_place_is_read_again(bundle: Path, tmp_path: Path) -> None:
    raw = write_meds(tmp_path / "raw")
    before = predicted(bundle, raw, tmp_path / "p.parquet")
    shutil.rmtree(raw)
    after = predicted(bundle, write_meds(raw, seed=1), tmp_path / "p.parquet")
    name = "predicted_boolean_probability"
    assert not np.allclose(before[name].to_numpy(), after[name].to_numpy())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=mortality"], "the bundle predicts readmission, not task=mortality"),
        (["bundle=/nowhere"], "does not exist"),
        (["data.path=/nowhere"], "not a prepared dataset"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    small_data: Path, bundle: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        predicted(bundle, small_data, tmp_path / "p.parquet", *overrides)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "p.parquet").exists()


@pytest.mark.slow
def test_a_dataset_coded_differently_is_refused(bundle: Path, tmp_path: Path) -> None:
    raw = write_meds(tmp_path / "raw", prefix="OTHER//")
    with pytest.raises(UserError, match="none of the codes"):
        predicted(bundle, raw, tmp_path / "p.parquet")


def test_a_pretrained_model_is_refused(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    config = bundle / "config.yaml"
    other = tmp_path / "other"
    other.mkdir()
    for path in bundle.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.yaml").write_text(config.read_text().replace("kind: risk", "kind: pretrained"))
    with pytest.raises(UserError, match="pretrained"):
        predicted(other, small_data, tmp_path / "p.parquet")
