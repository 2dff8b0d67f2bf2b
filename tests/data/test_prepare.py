"""`hymate.data.prepare` on MEDS datasets: round trip, streaming, and continuing."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import tempfile
from pathlib import Path

import meds
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_meds import (
    BIRTH,
    ROWS,
    Row,
    by_subject,
    config,
    data_table,
    files,
    read_back,
    splits_file,
    write_raw,
    write_table,
)

from hymate import work
from hymate.data import prepare as module
from hymate.data.details import SUMMARY
from hymate.data.histories import HISTORY_SCHEMA, Histories
from hymate.data.label_files import read_labels
from hymate.data.meds import SplitsConfig, read_splits
from hymate.data.prepare import prepare
from hymate.errors import UserError

# ----------------------------------------------------------------------------------------------- what it writes


def test_everything_of_the_output_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(config(write_raw(tmp_path / "raw"), out))
    histories = Histories.open(out)
    assert read_back(out) == by_subject(ROWS)
    assert [h.birth_time for h in histories.read([0, 1])] == [None, BIRTH]  # shards go by name: held_out first
    assert histories.index.subject_id_P.tolist() == [5, 1, 2, 3, 4]
    assert histories.index.num_events_P.tolist() == [2, 3, 1, 1, 1]
    assert [histories.index.subject_id_P[p] for p in histories.positions("train")] == [1, 2, 3]
    vocabulary = pq.read_table(out / "histories" / "vocabulary.parquet")
    assert set(vocabulary["code"].to_pylist()) == {row[2] for rows in ROWS.values() for row in rows}
    counts = dict(zip(vocabulary["code"].to_pylist(), vocabulary["count"].to_pylist(), strict=True))
    assert counts["HR"] == 3 and counts["Na"] == 0  # of the train split
    metadata = json.loads((out / "histories" / "metadata.json").read_text())
    assert metadata["splits"]["train"] == {"subjects": 3, "events": 5}
    schema = pq.read_schema(out / "histories" / "train" / "0.parquet")
    assert schema.equals(HISTORY_SCHEMA) and schema.metadata[b"time_unit"] == b"us"
    assert not (out / "histories" / ".work").exists()


def test_the_meds_part_is_valid_meds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(config(write_raw(tmp_path / "raw"), out))
    for shard, rows in ROWS.items():
        table = pq.read_table(out / "data" / f"{shard}.parquet")
        meds.DataSchema.validate(table)
        assert table.equals(data_table(rows))
    meds.SubjectSplitSchema.validate(pq.read_table(splits_file(out)))
    codes = pq.read_table(out / "metadata" / "codes.parquet")
    meds.CodeMetadataSchema.validate(codes)
    assert {"HR", "Na", "GENDER//F"} <= set(codes["code"].to_pylist())
    dataset = json.loads((out / "metadata" / "dataset.json").read_text())
    assert dataset == {"meds_version": "0.4.1", "license": "CC0"}


def test_meds_0_3_3_is_read_and_written_as_0_4(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What meds_etl writes: the version before, and units in a column of their own."""
    old, new = write_raw(tmp_path / "old"), write_raw(tmp_path / "new")
    (old / "metadata" / "dataset.json").write_text(json.dumps({"etl_name": "meds_etl.omop", "meds_version": "0.3.3"}))
    for shard in (old / "data").rglob("*.parquet"):
        table = pq.read_table(shard)
        write_table(table.append_column("unit", pa.nulls(table.num_rows, pa.string())), shard)
    prepare(config(old, tmp_path / "from_old"))
    assert "column `unit`" in capfd.readouterr().out
    prepare(config(new, tmp_path / "from_new"))
    assert "column `unit`" not in capfd.readouterr().out
    dataset = json.loads((tmp_path / "from_old" / "metadata" / "dataset.json").read_text())
    assert dataset == {"etl_name": "meds_etl.omop", "meds_version": meds.__version__}
    for shard in ROWS:
        of_old, of_new = (tmp_path / name / "histories" / f"{shard}.parquet" for name in ("from_old", "from_new"))
        assert repr(pq.read_table(of_old).to_pylist()) == repr(pq.read_table(of_new).to_pylist())


rows_of_subject = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(-(10**15), 10**15)),
        st.sampled_from(["MEDS_BIRTH", "HR", "K", "Na", "DIED"]),
        st.one_of(st.none(), st.floats(-1e6, 1e6, width=32)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=10)
@given(st.lists(st.lists(rows_of_subject, min_size=1, max_size=4), min_size=1, max_size=3), st.integers(1, 9))
def test_any_dataset_comes_back_whatever_the_chunk(shards: list[list[list[tuple]]], chunk: int) -> None:
    rows: dict[str, list[Row]] = {}
    subject = 0
    for number, subjects in enumerate(shards):
        rows[f"train/{number}"] = []
        for events in subjects:
            subject += 1
            ordered = sorted(events, key=lambda e: -(10**16) if e[0] is None else e[0])
            rows[f"train/{number}"] += [(subject, *event) for event in ordered]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("hymate.data.meds.ROWS", chunk)
        prepare(config(write_raw(Path(folder) / "raw", rows), Path(folder) / "out"))
        assert read_back(Path(folder) / "out") == by_subject(rows)
        born: dict[int, int] = {}
        for s, time, code, _ in (row for shard_rows in rows.values() for row in shard_rows):
            if code == "MEDS_BIRTH" and time is not None:
                born.setdefault(s, time)
        histories = Histories.open(Path(folder) / "out")
        for history in histories.read(range(len(histories))):
            assert history.birth_time == born.get(history.subject_id)


@pytest.mark.slow
def test_chunks_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_raw(tmp_path / "raw")
    prepare(config(raw, tmp_path / "one"))
    prepare(config(raw, tmp_path / "two", workers=2))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.setattr("hymate.data.meds.ROWS", 2)
    prepare(config(raw, tmp_path / "small"))
    one, small = (pq.read_table(tmp_path / name / "histories" / "vocabulary.parquet") for name in ("one", "small"))
    assert one.equals(small)
    assert Histories.open(tmp_path / "small").index.row_group_G.max() > 0
    assert read_back(tmp_path / "small") == read_back(tmp_path / "one")


def test_reading_needs_few_decoded_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hymate.data.meds.ROWS", 1)
    prepare(config(write_raw(tmp_path / "raw"), tmp_path / "out"))
    monkeypatch.setattr("hymate.data.histories._CACHE_BYTES", 1)
    monkeypatch.setattr("hymate.data.histories._OPEN_FILES", 1)
    histories = Histories.open(tmp_path / "out")
    order = [4, 0, 2, 0, 1, 3]
    assert [h.subject_id for h in histories.read(order)] == histories.index.subject_id_P[order].tolist()


@pytest.mark.parametrize("zone", [None, "UTC"])
def test_types_that_a_cast_mends_are_mended(zone: str | None, tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", {"train/0": ROWS["train/0"]})
    loose = [("subject_id", pa.int32()), ("time", pa.timestamp("ns", zone)), ("code", pa.large_string())]
    table = data_table(ROWS["train/0"]).cast(pa.schema([*loose, ("numeric_value", pa.float64())]))
    write_table(
        table.append_column("text_value", pa.nulls(table.num_rows, pa.string())), raw / "data" / "train" / "0.parquet"
    )
    prepare(config(raw, tmp_path / "out"))
    assert pq.read_table(tmp_path / "out" / "data" / "train" / "0.parquet").equals(data_table(ROWS["train/0"]))
    assert read_back(tmp_path / "out") == by_subject({"train/0": ROWS["train/0"]})


def test_numeric_value_may_be_absent(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", {"train/0": [(1, 1, "A", None)]})
    path = raw / "data" / "train" / "0.parquet"
    write_table(pq.read_table(path).drop_columns("numeric_value"), path)
    prepare(config(raw, tmp_path / "out"))
    assert read_back(tmp_path / "out") == {1: [(1, 1, "A", None)]}


def test_subjects_without_splits_are_split_by_hash(tmp_path: Path) -> None:
    rows: dict[str, list[Row]] = {"0": [(s, 1, "A", None) for s in range(2000)]}
    raw = write_raw(tmp_path / "raw", rows, with_splits=False)
    prepare(config(raw, tmp_path / "a", splits=SplitsConfig(0.5, 0.3, 0.2)))
    splits = read_splits(tmp_path / "a")
    fractions = {s: pc.sum(pc.equal(splits["split"], s)).as_py() / 2000 for s in ("train", "tuning", "held_out")}
    assert fractions == pytest.approx({"train": 0.5, "tuning": 0.3, "held_out": 0.2}, abs=0.04)
    prepare(config(raw, tmp_path / "b", splits=SplitsConfig(0, 0, 1)))
    assert set(read_splits(tmp_path / "b")["split"].to_pylist()) == {"held_out"}
    prepare(config(raw, tmp_path / "c", splits=SplitsConfig(0.5, 0.3, 0.2), seed=1))
    assert read_splits(tmp_path / "c")["split"] != splits["split"]


def test_labels_that_were_extracted_stay_where_they_are(tmp_path: Path) -> None:
    """They would be taken for labels that came with the data: of some of its patients alone, or made after a split."""
    raw = write_raw(tmp_path / "raw")
    labels = pa.table(
        {"subject_id": [1], "prediction_time": pa.array([10], pa.timestamp("us")), "boolean_value": [True]}
    )
    for task in ("given", "extracted"):
        write_table(labels, raw / "labels" / task / "train" / "0.parquet")
    (raw / "labels/extracted" / SUMMARY).write_text("{}")
    prepare(config(raw, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out/labels").iterdir()] == ["given"]


def test_labels_come_along_without_null_columns(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    when = datetime.datetime(2020, 1, 1)
    labels = {"subject_id": [1, 3], "prediction_time": pa.array([when, when], pa.timestamp("us"))}
    nulls = pa.nulls(2, pa.float64())
    write_table(
        pa.table({**labels, "boolean_value": [True, False], "float_value": nulls}), raw / "labels/died/train/0.parquet"
    )
    write_table(pa.table({**labels, "weight": [1.0, 2.5]}), raw / "labels/died/train/0.extra.pq")
    prepare(config(raw, tmp_path / "out"))
    assert read_labels(tmp_path / "out" / "labels" / "died")["weight"].to_pylist() == [1.0, 2.5]
    table = pq.read_table(tmp_path / "out" / "labels" / "died" / "train" / "0.parquet")
    (raw / "labels/died/train/0.extra.pq").unlink()
    with pytest.raises(UserError, match="prepared from other data"):
        prepare(config(raw, tmp_path / "out"))
    meds.LabelSchema.validate(table)
    assert table.column_names == ["subject_id", "prediction_time", "boolean_value"]
    assert table["boolean_value"].to_pylist() == [True, False]


def test_mimic_demo(tmp_path: Path, shared_data: Path) -> None:
    raw = shared_data / "mimic_iv_demo_meds"
    prepare(config(raw, tmp_path))
    histories = Histories.open(tmp_path)
    shards = {path.stem: pq.read_table(path) for path in (raw / "data" / "train").glob("*.parquet")}
    rows = pa.concat_tables([pq.read_table(path) for path in (raw / "data").rglob("*.parquet")])
    assert len(histories) == 80 and shards
    births = pc.sum(pc.equal(rows["code"], "MEDS_BIRTH")).as_py()
    assert histories.index.num_events_P.sum() == rows.num_rows - rows["time"].null_count - births
    sizes = pa.concat_tables(shards.values()).group_by("code").aggregate([("code", "count")])
    expected = dict(zip(sizes["code"].to_pylist(), sizes["code_count"].to_pylist(), strict=True))
    vocabulary = pq.read_table(tmp_path / "histories" / "vocabulary.parquet")
    counts = dict(zip(vocabulary["code"].to_pylist(), vocabulary["count"].to_pylist(), strict=True))
    assert {code: count for code, count in counts.items() if count} == expected


# --------------------------------------------------------------------------------------- finished, and interrupted


def test_a_log_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(work, "SAY_EVERY_S", -1.0)
    prepare(config(write_raw(tmp_path / "raw"), tmp_path / "out"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("count codes")]
    assert said == [f"count codes: {done} of {len(ROWS)} done" for done in range(1, len(ROWS) + 1)]


def test_finished_it_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(write_raw(tmp_path / "raw"), tmp_path / "out")
    prepare(settings)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    prepare(settings)
    assert "nothing to do" in capsys.readouterr().err.replace("\n", " ")
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["count_shard", "encode_shard", "_write_vocabulary", "_write_index"])
def test_interrupted_it_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    raw, out = write_raw(tmp_path / "raw"), tmp_path / "out"
    prepare(config(raw, tmp_path / "undisturbed"))
    original = getattr(module, stage)
    calls: list[tuple] = []

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return original(*args, **kwargs)

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == (3 if "shard" in stage else 1):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(raw, out))
    with pytest.raises(UserError, match="not a prepared dataset"):
        Histories.open(out)
    with (out / "histories" / ".work" / "journal.jsonl").open("a") as journal:
        journal.write('["write hist')  # the kill came while a line was written
    calls.clear()
    monkeypatch.setattr(module, stage, counted)
    prepare(config(raw, out))
    assert len(calls) == (2 if "shard" in stage else 1)  # of four shards, two were done
    assert files(out) == files(tmp_path / "undisturbed")


def test_a_folder_with_anything_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, out = write_raw(tmp_path / "raw"), tmp_path / "out"
    write_raw(tmp_path / "other", {"train/0": [(9, 1, "A", None)]})
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty: out=DIR must be"):
        prepare(config(raw, out))
    (out / "thesis.txt").unlink()
    monkeypatch.setattr(module, "count_shard", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(config(raw, out))
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished preparation of other data or settings"):
        prepare(config(tmp_path / "other", out))
    prepare(config(raw, out))
    before = files(out)
    with pytest.raises(UserError, match="prepared from other data or settings"):
        prepare(config(tmp_path / "other", out))
    assert files(out) == before


def test_two_preparations_do_not_write_at_once(tmp_path: Path) -> None:
    raw, out = write_raw(tmp_path / "raw"), tmp_path / "out"
    (out / "histories" / ".work").mkdir(parents=True)
    with (out / "histories" / ".work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another preparation is writing there"):
            prepare(config(raw, out))
    prepare(config(raw, out))


def test_the_source_moved_is_the_same_source(tmp_path: Path) -> None:
    prepare(config(write_raw(tmp_path / "raw"), tmp_path / "out"))
    (tmp_path / "raw").rename(tmp_path / "moved")
    before = files(tmp_path / "out")
    prepare(config(tmp_path / "moved", tmp_path / "out"))
    assert files(tmp_path / "out") == before


def test_the_linked_raw_data_stay_as_they_are(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    before = files(raw)
    prepare(config(raw, tmp_path / "out"))
    assert files(raw) == before
    assert os.stat(raw / "data/train/0.parquet").st_ino == os.stat(tmp_path / "out/data/train/0.parquet").st_ino


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    prepare(config(raw, tmp_path / "plain"))
    disk = tmp_path / "disk"
    disk.mkdir()
    (raw / "data/train").rename(disk / "train")
    (raw / "data/train").symlink_to(disk / "train")
    (disk / "train/0.parquet").rename(disk / "shard")
    (disk / "train/0.parquet").symlink_to("../shard")
    prepare(config(raw, tmp_path / "linked"))
    assert files(tmp_path / "linked") == files(tmp_path / "plain")
    assert not (tmp_path / "linked/data/train/0.parquet").is_symlink()


def test_a_birth_may_have_a_suffix(tmp_path: Path) -> None:
    rows: dict[str, list[Row]] = {
        "train/0": [
            (1, BIRTH, "MEDS_BIRTH//HOME", None),
            (1, BIRTH, "MEDS_BIRTH//HOME//TWIN", None),
            (1, 7, "A", None),
        ],
        "train/1": [(2, 5, "MEDS_BIRTHDAY", None), (2, 7, "A", None), (3, BIRTH, "MEDS_BIRTH", None)],
    }
    prepare(config(write_raw(tmp_path / "raw", rows), tmp_path / "out"))
    histories = Histories.open(tmp_path / "out")
    assert [h.birth_time for h in histories.read([0, 1, 2])] == [BIRTH, None, BIRTH]
    assert histories.index.num_events_P.tolist() == [1, 2, 0]


def test_subjects_without_a_shard_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_raw(tmp_path / "raw")
    prepare(config(raw, tmp_path / "whole"))
    assert "have no events" not in capsys.readouterr().err
    (raw / "data/train/0.parquet").rename(raw / "data/train/0.pq")
    prepare(config(raw, tmp_path / "part"))
    missing = len({row[0] for row in ROWS["train/0"]})
    assert f"warning: {missing} subjects of metadata/subject_splits.parquet have no events" in capsys.readouterr().err
