"""Kept states: predictions equal those of reading the whole history, and a state that does not fit is never used."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from small_cohort import SIZES
from small_models import SMALL, vocabulary_of, write_risk_bundle

from hymate.command import load
from hymate.data.meds import write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.errors import ConfigError, UserError
from hymate.inference.bundle import read_bundle
from hymate.inference.states import StateFolder
from hymate.predict import PredictConfig, run

pytestmark = pytest.mark.usefixtures("one_thread")
SUBJECTS = SIZES["held_out"]
LAST = sum(SIZES.values())  # the held-out subjects have the highest ids
NEW_EVENTS = 4  # of each subject from its first label to its second
PROBABILITY = "predicted_boolean_probability"


@pytest.fixture(scope="module")
def raw(small_data: Path) -> Path:
    return small_data.parent / "raw"


@pytest.fixture(scope="module")
def yesterday(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset up to each subject's first label: another vocabulary file, and fewer events."""
    first = pa.concat_tables(pq.read_table(path) for path in (raw / "labels").rglob("*.parquet"))
    first = first.group_by("subject_id").aggregate([("prediction_time", "min")])

    def earlier(table: pa.Table) -> pa.Table:
        until = pc.take(first["prediction_time_min"], pc.index_in(table["subject_id"], first["subject_id"]))
        time = table["time" if "time" in table.column_names else "prediction_time"]
        return table.filter(pc.less_equal(time, until))

    return changed(raw, tmp_path_factory.mktemp("yesterday"), earlier)


def prepared(raw: Path, out: Path) -> Path:
    prepare(PrepareConfig(source="meds", raw=str(raw), out=str(out), workers=1))
    return out


def changed(raw: Path, folder: Path, change) -> Path:
    """The dataset prepared after `change` was made to the events and labels of every shard."""
    for path in raw.rglob("*"):
        target = folder / "raw" / path.relative_to(raw)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.suffix == ".parquet" and path.relative_to(raw).parts[0] in ("data", "labels"):
            write_parquet(change(pq.read_table(path)), target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return prepared(folder / "raw", folder / "data")


@pytest.fixture(scope="module")
def bundle(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_risk_bundle(tmp_path_factory.mktemp("risk") / "bundle", vocabulary_of(small_data), context=8)


def predicted(bundle: Path, data: Path, out: Path, *overrides: str) -> pa.Table:
    given = ["task=readmission", f"bundle={bundle}", f"data.path={data}", f"out={out / 'p.parquet'}"]
    given += ["split=held_out", *overrides]
    run(load("predict", given, PredictConfig))
    return pq.read_table(out / "p.parquet")


@pytest.fixture(scope="module")
def whole(small_data: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The predictions without states."""
    return predicted(bundle, small_data, tmp_path_factory.mktemp("whole"), "context=all")


@pytest.fixture(scope="module")
def of_yesterday(yesterday: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The states of yesterday. To be read: what goes on with them takes a copy."""
    folder = tmp_path_factory.mktemp("of-yesterday")
    predicted(bundle, yesterday, folder, "context=all", f"states={folder / 'states'}")
    return folder / "states"


def kept(states: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in states.glob("*.safetensors")}


def same(a: pa.Table, b: pa.Table) -> bool:
    return a.drop_columns(PROBABILITY).equals(b.drop_columns(PROBABILITY)) and np.allclose(
        a[PROBABILITY], b[PROBABILITY], atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "pooling"),
    [("mamba1", "fusion"), *(("mamba2", pooling) for pooling in ("fusion", "variables", "mean", "last"))],
)
def test_whole_histories_score_as_in_one_packed_pass(
    mixer: str, pooling: str, small_data: Path, tmp_path: Path
) -> None:
    """A context longer than every history crops nothing, so the two ways of reading must agree; a short one crops."""
    config = replace(SMALL, mixer=mixer, pooling=pooling)
    uncropped = write_risk_bundle(tmp_path / "uncropped", vocabulary_of(small_data), config, context=64)
    cropped = write_risk_bundle(tmp_path / "cropped", vocabulary_of(small_data), config, context=8)
    whole = predicted(cropped, small_data, tmp_path, "context=all")
    assert same(whole, predicted(uncropped, small_data, tmp_path))
    assert not same(whole, predicted(cropped, small_data, tmp_path))


@pytest.mark.parametrize("pooling", ["fusion", "variables", "mean", "last"])
def test_kept_states_go_on_with_the_new_events_alone(
    pooling: str, small_data: Path, yesterday: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, pooling=pooling)
    bundle = write_risk_bundle(tmp_path / "bundle", vocabulary_of(small_data), config, context=8)
    states = tmp_path / "states"
    overrides = ("context=all", f"states={states}")
    before = predicted(bundle, yesterday, tmp_path, *overrides)
    assert before.num_rows == SUBJECTS and len(kept(states)) == SUBJECTS
    assert f"{SUBJECTS} new" in capsys.readouterr().out

    table = predicted(bundle, small_data, tmp_path, *overrides)
    said = capsys.readouterr().out
    assert f"{SUBJECTS} known" in said
    assert f"{NEW_EVENTS * SUBJECTS} events read" in said
    assert same(table, predicted(bundle, small_data, tmp_path, "context=all"))


@pytest.mark.slow
def test_earlier_prediction_times_leave_a_state_as_it_is(
    small_data: Path, yesterday: Path, bundle: Path, tmp_path: Path
) -> None:
    overrides = ("context=all", f"states={tmp_path / 'states'}")
    table = predicted(bundle, small_data, tmp_path, *overrides)
    last = kept(tmp_path / "states")
    assert same(predicted(bundle, small_data, tmp_path, *overrides), table)
    times = f"task.labels={yesterday / 'labels' / 'readmission'}"
    early = predicted(bundle, small_data, tmp_path, *overrides, times)
    assert early.num_rows == SUBJECTS
    assert same(early, predicted(bundle, small_data, tmp_path, "context=all", times))
    assert kept(tmp_path / "states") == last


@pytest.mark.slow
def test_a_state_ahead_of_the_dataset_is_not_used(
    small_data: Path, yesterday: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("context=all", f"states={tmp_path / 'states'}")
    predicted(bundle, small_data, tmp_path, *overrides)
    capsys.readouterr()
    table = predicted(bundle, yesterday, tmp_path, *overrides)
    assert f"{SUBJECTS} changed" in capsys.readouterr().out
    assert same(table, predicted(bundle, yesterday, tmp_path, "context=all"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut short", "bit", "header", "of another subject", "empty"])
def test_a_damaged_state_is_not_used(
    damage: str,
    small_data: Path,
    bundle: Path,
    whole: pa.Table,
    of_yesterday: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    states = Path(shutil.copytree(of_yesterday, tmp_path / "states"))
    overrides = ("context=all", f"states={states}")
    victim, other = sorted(states.glob("*.safetensors"))[:2]
    content = bytearray(victim.read_bytes())
    if damage == "cut short":
        content = content[: len(content) // 2]
    elif damage == "bit":
        content[-5] ^= 1
    elif damage == "header":
        content = content.replace(b"num_events", b"mum_events")
    elif damage == "of another subject":
        content = bytearray(other.read_bytes())
    else:
        content = bytearray()
    victim.write_bytes(content)
    capsys.readouterr()
    table = predicted(bundle, small_data, tmp_path, *overrides)
    said = capsys.readouterr().out
    assert "1 damaged" in said and f"{SUBJECTS - 1} known" in said
    assert same(table, whole)
    predicted(bundle, small_data, tmp_path, *overrides)
    assert f"{SUBJECTS} known" in capsys.readouterr().out


@pytest.mark.slow
def test_a_state_of_events_that_have_changed_is_not_used(
    raw: Path, bundle: Path, of_yesterday: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One subject's first value is corrected, another's first event is taken back, as late corrections do."""

    def corrected(table: pa.Table) -> pa.Table:
        if "numeric_value" not in table.column_names:
            return table
        rows = table.to_pylist()
        firsts = {row["subject_id"]: at for at, row in reversed(list(enumerate(rows)))}
        if LAST in firsts:
            rows[firsts[LAST]]["numeric_value"] += 1.0
            del rows[firsts[LAST - 1]]
        return pa.Table.from_pylist(rows, table.schema)

    states = shutil.copytree(of_yesterday, tmp_path / "states")
    overrides = ("context=all", f"states={states}")
    today = changed(raw, tmp_path / "today", corrected)
    capsys.readouterr()
    table = predicted(bundle, today, tmp_path, *overrides)
    said = capsys.readouterr().out
    assert "2 changed" in said and f"{SUBJECTS - 2} known" in said
    assert same(table, predicted(bundle, today, tmp_path, "context=all"))


@pytest.mark.slow
def test_states_are_for_their_owner_and_hold_no_pickle(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    states = tmp_path / "new" / "states"
    predicted(bundle, small_data, tmp_path, "context=all", f"states={states}")
    assert stat.S_IMODE(states.stat().st_mode) == 0o700
    assert {path.suffix for path in states.iterdir()} == {".json", ".safetensors"}
    assert len(kept(states)) == SUBJECTS
    assert set(json.loads((states / "states.json").read_text())) == {"format_version", "bundle"}


@pytest.mark.slow
def test_a_folder_belongs_to_one_bundle(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    states = tmp_path / "states"
    predicted(bundle, small_data, tmp_path, "context=all", f"states={states}")
    before = kept(states)
    other = write_risk_bundle(tmp_path / "other", vocabulary_of(small_data), context=8, seed=2)
    with pytest.raises(UserError, match="another bundle"):
        predicted(other, small_data, tmp_path, "context=all", f"states={states}")
    assert kept(states) == before


def test_a_folder_in_use_is_refused(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    states = tmp_path / "states"
    with StateFolder(states, read_bundle(bundle).fingerprint), pytest.raises(UserError, match="in use"):
        predicted(bundle, small_data, tmp_path, "context=all", f"states={states}")
    predicted(bundle, small_data, tmp_path, "context=all", f"states={states}")


def test_a_folder_of_other_things_is_left_alone(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not patient states"):
        predicted(bundle, small_data, tmp_path, "context=all", f"states={tmp_path / 'home'}")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_states_without_whole_histories_are_refused(small_data: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="states=DIR needs context=all"):
        predicted(bundle, small_data, tmp_path, f"states={tmp_path / 'states'}")


@pytest.mark.parametrize("setting", [{"window": 0}, {"bidirectional": True}, {"causal": False}])
def test_a_model_that_cannot_stream_is_refused_before_any_data_is_read(
    setting: dict, small_data: Path, tmp_path: Path
) -> None:
    cannot = write_risk_bundle(tmp_path / "bundle", vocabulary_of(small_data), replace(SMALL, **setting), context=8)
    with pytest.raises(UserError, match="context=bundle") as refused:
        predicted(cannot, tmp_path / "nowhere", tmp_path, "context=all")
    assert "\n" not in str(refused.value)
