"""The Python interface predicts what the commands predict, from tables in memory; mistakes get one line."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from small_models import SMALL, write_risk_bundle

import hymate
from hymate import predict
from hymate.command import load
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.known import KnownConfig, KnownRule
from hymate.data.meds import write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.tables import events_of, histories_of
from hymate.data.tasks import read_or_extract_labels
from hymate.data.vocabulary import Vocabulary
from hymate.errors import UserError
from hymate.evaluation.attribution import Explainer, event_table
from hymate.inference.bundle import read_bundle
from hymate.model.encoder import RiskModel

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = ["readmission", "mortality", "length_of_stay"]
KNOWN = KnownConfig(
    {
        "billing": KnownRule(r"^DIAGNOSIS//", "end_of_stay", delay_hours=48.0),
        "late": KnownRule(r"^LAB//sodium", "stamp", delay_hours=5.0),
        "hidden": KnownRule(r"^LAB//chloride|^RACE//OTHER", "never"),
    }
)
PREDICTED = "predicted_boolean_probability"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic cohort with some of its rows twice, prepared under the rules KNOWN."""
    folder = tmp_path_factory.mktemp("cohort")
    overrides = [f"out={folder / 'raw'}", "synthetic.subjects=24", "synthetic.mean_events=150", "workers=1"]
    prepare(load("prepare", ["source=synthetic", *overrides], PrepareConfig))
    for shard in (folder / "raw" / "data").rglob("*.parquet"):
        table = pq.read_table(shard)
        rows = np.sort(np.append(np.arange(len(table)), np.arange(0, len(table), 7)))
        write_parquet(table.take(rows), shard)
    prepare(PrepareConfig("meds", out=str(folder / "data"), raw=str(folder / "raw"), known=KNOWN, workers=1))
    return folder / "data"


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search's folder with a bundle of three tasks, which does not know codes of medication."""
    table = pq.read_table(data / "histories" / "vocabulary.parquet")
    folder = tmp_path_factory.mktemp("run")
    pq.write_table(table.filter(pc.invert(pc.starts_with(table["code"], "MEDICATION//"))), folder / "known.parquet")
    vocabulary = Vocabulary.read(folder / "known.parquet")
    torch.manual_seed(1)
    in_days = ["length_of_stay"]
    model = RiskModel(SMALL, vocabulary.size, TASKS, in_days)
    for head in model.heads.values():
        head.out.weight.data.mul_(10)  # patients differ
    settings = {"state": model.state_dict(), "tasks": TASKS, "in_days": in_days, "known": KNOWN, "context": 48}
    write_risk_bundle(folder / "bundle", vocabulary, **settings)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> hymate.Model:
    return hymate.load(run, device="cpu")


@pytest.fixture(scope="module")
def events(data: Path) -> pa.Table:
    """All events of the cohort, shuffled; those of a subject at one time stay in their order."""
    table = pa.concat_tables([pq.read_table(shard) for shard in sorted((data / "data").rglob("*.parquet"))])
    rng = np.random.default_rng(0)
    subject, time = table["subject_id"].to_numpy(), table["time"].cast(pa.int64()).fill_null(0).to_numpy()
    _, group = np.unique(np.stack([subject, time]), axis=1, return_inverse=True)
    return table.take(np.argsort(rng.permutation(group.max() + 1)[group.ravel()], kind="stable"))


def of_one(events: pa.Table) -> tuple[pa.Table, datetime]:
    """The events of a subject, and a time in the middle of them."""
    own = events.filter(pc.field("subject_id") == 7)
    return own, np.sort(own["time"].drop_null().to_numpy())[len(own) // 2].item()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_those_of_the_command(
    task: str, data: Path, run: Path, model: hymate.Model, events: pa.Table, tmp_path: Path
) -> None:
    overrides = [f"task={task}", f"bundle={run}", f"data.path={data}"]
    given = load("predict", [*overrides, f"out={tmp_path / 'bundle.parquet'}"], predict.PredictConfig)
    predict.run(given)
    predict.run(load("predict", [*overrides, "context=all", f"out={tmp_path / 'all.parquet'}"], predict.PredictConfig))
    at = read_or_extract_labels(data, given.task).table
    patients = model.append(None, events)
    for context, asked in (("bundle", events), ("all", patients)):
        table, expected = model.predict(asked, at, task), pq.read_table(tmp_path / f"{context}.parquet")
        assert table.num_rows > 20 and len(np.unique(table[PREDICTED].to_numpy().round(4))) > 10
        assert_equal(table, expected)
        if task == "length_of_stay":
            days = pq.read_table(tmp_path / f"{context}-days.parquet")
            assert_equal(model.predict(asked, at, task, days=True), days)
    early = with_column("prediction_time", datetime(1900, 1, 1))(at.slice(0, 1))
    with pytest.warns(UserWarning, match="^1 of .* are left out"):
        assert_equal(
            model.predict(events, pa.concat_tables([early, at]), task), pq.read_table(tmp_path / "bundle.parquet")
        )


def assert_equal(table: pa.Table, expected: pa.Table) -> None:
    numbers = [name for name in table.column_names if name.startswith("predicted_")]
    assert table.column_names == expected.column_names
    assert table.drop_columns(numbers).equals(expected.drop_columns(numbers))
    for name in numbers:  # other batches: on some CPUs other roundings
        np.testing.assert_allclose(table[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5, atol=1e-6)


def test_histories_are_those_that_are_prepared(data: Path, events: pa.Table) -> None:
    prepared, own = Histories.open(data), histories_of(events_of(events), KNOWN)
    order = np.argsort(prepared.index.subject_id_P)
    assert prepared.known_events["billing"]["moved"] > 20 and prepared.known_events["hidden"]["left_out"] > 10
    for one, other in zip(prepared.read(order), own.read(np.arange(len(own))), strict=True):
        assert (one.subject_id, one.birth_time) == (other.subject_id, other.birth_time)
        assert one.birth_time is not None and len(one.static_code)
        for name in ("static_code", "code"):
            codes = [
                of.codes[code] for of, history in ((prepared, one), (own, other)) for code in getattr(history, name)
            ]
            assert codes[: len(codes) // 2] == codes[len(codes) // 2 :]
        for name in ("static_value", "time", "value"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


FORMS: dict[str, Callable[[pa.Table], Any]] = {
    "polars": pl.from_arrow,
    "polars categories": lambda t: pl.from_arrow(t).with_columns(pl.col("code").cast(pl.Categorical)),  # type: ignore[union-attr]
    "pandas": lambda t: t.to_pandas(),
    "pandas categories": lambda t: t.to_pandas().astype({"code": "category"}).set_index(pd.Index(range(9, 9 + len(t)))),
    "pandas with a note of mixed types": lambda t: t.to_pandas().assign(
        note=[1, "x"] * (len(t) // 2) + [0] * (len(t) % 2)
    ),
    "record batch": lambda t: t.combine_chunks().to_batches()[0],
    "large strings": lambda t: t.set_column(2, "code", t["code"].cast(pa.large_string())),
    "dictionary": lambda t: t.set_column(2, "code", t["code"].dictionary_encode()),
    "float64 and int32": lambda t: t.set_column(3, "numeric_value", t["numeric_value"].cast(pa.float64())).set_column(
        0, "subject_id", t["subject_id"].cast(pa.int32())
    ),
    "times in UTC, in nanoseconds": lambda t: t.set_column(1, "time", t["time"].cast(pa.timestamp("ns", "UTC"))),
    "another order of columns": lambda t: t.select(t.column_names[::-1]),
}


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_all_kinds_give_the_same(form: str, model: hymate.Model, events: pa.Table) -> None:
    own, at = of_one(events)
    own = own.set_column(3, "numeric_value", pc.round(own["numeric_value"]))
    expected = model.predict(own, at, "mortality")
    assert isinstance(expected, float) and 0 < expected < 1
    assert model.predict(FORMS[form](own), at, "mortality") == expected


def test_whole_numbers_are_values_too(model: hymate.Model, events: pa.Table) -> None:
    own, at = of_one(events)
    rounded = pc.round(own["numeric_value"])
    tables = [own.set_column(3, "numeric_value", rounded.cast(kind)) for kind in (pa.float32(), pa.int16())]
    first, second = (model.predict(table, at, "mortality") for table in tables)
    assert first == second != model.predict(own.drop_columns(["numeric_value"]), at, "mortality")


def test_times_of_all_kinds_give_the_same(model: hymate.Model, events: pa.Table) -> None:
    own, at = of_one(events)
    expected = model.predict(own, at, "mortality")
    same = [at.isoformat(), f"{at.isoformat()}Z", at.replace(tzinfo=UTC), at.replace(tzinfo=ZoneInfo("UTC"))]
    for time in (*same, pd.Timestamp(at), pd.Timestamp(at, tz="UTC")):
        assert model.predict(own, time, "mortality") == expected
    times = {"subject_id": [7], "prediction_time": [at]}
    for table in (pa.table(times), pl.DataFrame(times), pd.DataFrame(times)):
        found = model.predict(own, table, "mortality")
        assert isinstance(found, pa.Table) and found[PREDICTED].to_pylist() == [expected]


def test_nothing_after_the_prediction_time_counts(model: hymate.Model, events: pa.Table) -> None:
    own, at = of_one(events)
    until = own.filter(pc.is_null(own["time"], nan_is_null=False))
    until = pa.concat_tables([until, own.filter(pc.less_equal(own["time"], pa.scalar(at, pa.timestamp("us"))))])
    assert len(until) < len(own)
    assert model.predict(until, at, "mortality") == model.predict(own, at, "mortality")


def test_patient_vectors_are_what_the_heads_see(model: hymate.Model, events: pa.Table) -> None:
    own, at = of_one(events)
    vector_X = model.embed(own, at)
    assert vector_X.dtype == np.float32 and vector_X.ndim == 1
    with torch.no_grad():
        logit_AT, _ = model._model.outputs(torch.from_numpy(vector_X)[None, None])
    expected = [model.predict(own, at, task) for task in TASKS]
    np.testing.assert_allclose(torch.sigmoid(logit_AT[0]), expected, atol=1e-6)
    later = at + timedelta(days=30)
    table = model.embed(events, pa.table({"subject_id": [7, 7], "prediction_time": [later, at]}))
    assert table.column_names == ["subject_id", "prediction_time", "vector"]
    assert table["prediction_time"].to_pylist() == [at, later]
    np.testing.assert_allclose(table["vector"].to_pylist()[0], vector_X, atol=1e-5)


@pytest.mark.slow
def test_explanations_are_those_of_the_command(data: Path, run: Path, model: hymate.Model, events: pa.Table) -> None:
    own, at = of_one(events)
    table = model.explain(own, at, "readmission")
    prepared = Histories.open(data)
    times = pa.table({"subject_id": [7], "prediction_time": [at]})
    examples = labelled_examples(prepared.with_splits(dict.fromkeys(prepared.splits, "all")), times, "all")
    explainer = Explainer(read_bundle(run).for_task("readmission"), prepared, torch.device("cpu"))
    (case,) = explainer.cases(examples, np.array([0]))
    (attribution,) = explainer.attributions([case])
    assert table.drop_columns("attribution").equals(
        event_table(prepared.codes, case, attribution).drop_columns("attribution")
    )
    np.testing.assert_allclose(table["attribution"], [*attribution.static_F, *attribution.event_L], atol=1e-6)
    assert np.abs(table["attribution"]).max() > 0.01
    risk = model.predict(own, at, "readmission")
    assert np.log(risk / (1 - risk)) == pytest.approx(attribution.logit, abs=1e-4)
    later = pc.max(events["time"]).as_py()
    both = model.explain(events, pa.table({"subject_id": [8, 7], "prediction_time": [later, at]}), "readmission")
    assert both["subject_id"].unique().to_pylist() == [7, 8]
    np.testing.assert_allclose(both["attribution"][: len(table)], table["attribution"], atol=1e-5)


def test_patients_grow_as_their_events_come(model: hymate.Model, events: pa.Table) -> None:
    """In any pieces, also those that come late, the predictions are those of all events in one piece."""
    some = events.filter(pc.field("subject_id") < 6)
    by_time = some.sort_by([("time", "ascending")])
    size = len(by_time) // 4
    pieces = [by_time.slice(0, size), by_time.slice(2 * size), by_time.slice(size, size)]  # the last comes late
    at = pc.max(some["time"]).as_py() + timedelta(days=3)
    expected = model.predict(model.append(None, pa.concat_tables(pieces)), at, "readmission")
    patients, before = None, None
    for piece in pieces:
        before, patients = patients, model.append(patients, piece)
    assert patients is not None and before is not None
    np.testing.assert_allclose(model.predict(patients, at, "readmission")[PREDICTED], expected[PREDICTED], atol=1e-5)
    assert len(before.events) == 3 * size + len(by_time) % 4  # and is as it was
    assert not np.allclose(model.predict(before, at, "readmission")[PREDICTED], expected[PREDICTED], atol=1e-5)
    assert "7" not in repr(patients)


def test_only_new_events_are_read(model: hymate.Model, events: pa.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = of_one(events)
    own = own.filter(pc.invert(pc.match_substring_regex(own["code"], "^(DIAGNOSIS|LAB)//"))).sort_by("time")
    own = own.filter(own["time"].is_valid())
    patients = model.append(None, own.slice(0, len(own) - 2))
    read = []
    carry = model._model.backbone.carry
    monkeypatch.setattr(
        model._model.backbone, "carry", lambda batch, past: read.append(batch.num_events) or carry(batch, past)
    )
    patients = model.append(patients, own.slice(len(own) - 2))
    assert isinstance(model.predict(patients, pc.max(own["time"]).as_py(), "mortality"), float)
    assert read == [2]


def with_column(name: str, column: Any) -> Callable[[pa.Table], pa.Table]:
    """A table with another column in the place of one: an array, a type to cast to, or a value for all rows."""

    def change(table: pa.Table) -> pa.Table:
        if isinstance(column, pa.DataType):
            new = table[name].cast(column)
        else:
            new = pa.array([column] * len(table), table[name].type)
        return table.set_column(table.column_names.index(name), name, new)

    return change


def of_mixed_types(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas()
    frame["code"] = frame["code"].astype(object)
    frame.loc[0, "code"] = 8317
    return frame


BAD_EVENTS: dict[str, Callable[[pa.Table], Any]] = {
    "a table of pyarrow, polars or pandas .* not builtins.int": lambda table: 8317,
    "holds no rows": lambda table: table.slice(0, 0),
    "column time is missing": lambda table: table.drop_columns(["time"]),
    "column time is string": with_column("time", pa.string()),
    "column time is .*Asia/Tokyo": with_column("time", pa.timestamp("us", "Asia/Tokyo")),
    "one type in each column": of_mixed_types,
    "row 0: code is null": with_column("code", None),
    "row 0: numeric_value is infinite": with_column("numeric_value", np.inf),
    "coded differently": with_column("code", "LAB//8317"),
}
BAD_TIMES: list[tuple[Any, str]] = [
    ("8317-tomorrow", "at: not a time"),
    (pd.NaT, "at: not a time"),
    (8317, "ISO text, a datetime, or a table"),
    ("8317-01-01T08:00+02:00", "another zone than UTC"),
    (datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/London")), "another zone than UTC"),
    (pd.DataFrame({"subject_id": [7], "prediction_time": [pd.Timestamp("2026", tz="Asia/Tokyo")]}), "Asia/Tokyo"),
    (pa.table({"prediction_time": pa.array([0], pa.timestamp("us"))}), "at: column subject_id is missing"),
    ("1900-01-01", "nothing is known by then"),
]
BAD_TASKS: list[tuple[dict[str, Any], str]] = [
    ({}, "give task=, one of readmission, mortality, length_of_stay"),
    ({"task": "sepsis"}, "no task sepsis"),
    ({"task": "mortality", "days": True}, "task mortality has no days"),
]


@pytest.mark.parametrize("said", BAD_EVENTS)
def test_bad_events_are_refused(said: str, model: hymate.Model, events: pa.Table) -> None:
    own, at = of_one(events)
    refused(said, lambda: model.embed(BAD_EVENTS[said](own), at))
    if said != "coded differently":  # the patients' other events may be known
        patients = model.append(None, own)
        refused(said, lambda: model.append(patients, BAD_EVENTS[said](own)))


@pytest.mark.parametrize(("at", "said"), BAD_TIMES)
def test_bad_times_are_refused(at: Any, said: str, model: hymate.Model, events: pa.Table) -> None:
    refused(said, lambda: model.embed(of_one(events)[0], at))


@pytest.mark.parametrize(("asked", "said"), BAD_TASKS)
def test_tasks_that_the_model_lacks_are_refused(
    asked: dict[str, Any], said: str, model: hymate.Model, events: pa.Table
) -> None:
    refused(said, lambda: model.predict(*of_one(events), **asked))


def test_patients_of_another_model_are_refused(model: hymate.Model, events: pa.Table) -> None:
    own, at = of_one(events)
    refused("another model has read", lambda: model.predict(hymate.Patients(own), at, "mortality"))
    refused("another model has read", lambda: model.append(hymate.Patients(own), own))
    refused("what append returned is needed", lambda: model.append(own, own))  # type: ignore[arg-type]
    refused("not hymate.Patients", lambda: model.explain(model.append(None, own), at, "mortality"))


def refused(said: str, do: Callable[[], object]) -> None:
    """It raises UserError, in one line without the values that were given, also in what Python shows as the cause."""
    with pytest.raises(UserError, match=said) as error:
        do()
    shown = "".join(traceback.format_exception_only(error.value))
    assert error.value.__cause__ is None and (error.value.__context__ is None or error.value.__suppress_context__)
    assert len(shown.splitlines()) == 1 and "8317" not in shown


def test_places_of_all_kinds_are_loaded_or_refused(run: Path, tmp_path: Path) -> None:
    assert hymate.load(run.as_uri(), device="cpu").tasks == hymate.load(str(run / "bundle"), device="cpu").tasks
    with pytest.raises(UserError, match="does not exist"):
        hymate.load(tmp_path / "nowhere")


def test_importing_hymate_is_cheap() -> None:
    code = (
        "import sys, hymate; print(hymate.__version__, [n for n in ('torch', 'numpy', 'pyarrow') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "[]"
    with pytest.raises(AttributeError, match="no attribute 'predictor'"):
        hymate.predictor  # noqa: B018
