"""PhysioNet Challenge 2019's hourly files to MEDS: events, hours, labels, and what is wrong with a file."""

from __future__ import annotations

import datetime
import io
import json
import tarfile
from pathlib import Path
from unittest.mock import Mock

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hourly import converted, hour, text, write
from stays import task

from hymate.data.histories import Histories, read_metadata
from hymate.data.label_files import read_labels
from hymate.data.meds import DataError, SplitsConfig, read_splits
from hymate.data.sources import challenges
from hymate.data.sources.physionet2019 import CODES, COLUMNS, ORIGIN, PhysioNet2019Source
from hymate.data.tasks import read_or_extract_labels


def events(out: Path, subject: int = 1) -> list[tuple]:
    """(hours since the admission, code, value) of a subject."""
    tables = [pq.read_table(path) for path in sorted((out / "data").rglob("*.parquet"))]
    for table in tables:
        meds.DataSchema.validate(table)
    rows = [row for row in pa.concat_tables(tables).to_pylist() if row["subject_id"] == subject]
    return [(_hours(row["time"]), row["code"], row["numeric_value"]) for row in rows]


def labels(out: Path, subject: int = 1) -> dict[float | None, bool]:
    """Hours since the admission -> label."""
    rows = read_labels(out / "labels" / "sepsis").to_pylist()
    return {_hours(row["prediction_time"]): row["boolean_value"] for row in rows if row["subject_id"] == subject}


def counts(out: Path) -> dict[str, int]:
    metadata = read_metadata(out)
    assert metadata is not None
    return metadata["source_counts"]


def _hours(time: datetime.datetime | None) -> float | None:
    return None if time is None else (time - ORIGIN) / datetime.timedelta(hours=1)


def one(tmp_path: Path, content: bytes) -> Path:
    """A dataset of one file, and of a second stay that is always fine."""
    return converted(write(tmp_path / "raw", {1: content, 2: text([hour(1, HR=70)])}), tmp_path / "out")


ADMITTED = [(None, "Age", pytest.approx(83.14)), (None, "HospAdmTime", pytest.approx(-0.03)), (None, "GENDER//F", None)]
ADMITTED += [(0, "ICU_ADMISSION", None)]


# ------------------------------------------------------------------------------------------------------ whole files


def test_every_measurement_is_an_event_at_the_end_of_its_hour(tmp_path: Path) -> None:
    lines = [hour(1), hour(2, HR=97, Temp=36.5), hour(3, 1, pH=735)]
    out = one(tmp_path, text(lines))
    assert events(out) == [*ADMITTED, (2, "HR//bpm", 97), (2, "Temp//degC", 36.5), (3, "pH", 735)]  # an error stays
    assert labels(out) == {1: False, 2: False, 3: True}
    meds.LabelSchema.validate(pq.read_table(next((out / "labels" / "sepsis").rglob("*.parquet"))))
    assert counts(out) == {}


def test_hours_before_an_onset_have_the_time_until_then(tmp_path: Path) -> None:
    """Six hours after the first positive label; others until their end; where the first label is positive, none."""
    files = {
        1: text([hour(1), hour(2), hour(4, 1), hour(5, 1), hour(11, 1)]),
        2: text([hour(1), hour(2), hour(3)]),
        3: text([hour(1, 1), hour(2, 1)]),
        4: text([hour(1, "NaN"), hour(2), hour(3, 1)]),
    }
    out = converted(write(tmp_path / "raw", files), tmp_path / "out")
    table = read_labels(out / "labels" / "time_to_sepsis")
    meds.LabelSchema.validate(pq.read_table(next((out / "labels" / "time_to_sepsis").rglob("*.parquet"))))
    found: dict[int, list[tuple]] = {number: [] for number in files}
    for row in table.to_pylist():
        until = _hours(row["prediction_time"]), row["integer_value"], round(24 * row["float_value"], 3)
        found[row["subject_id"]].append(until)
    assert found[1] == [(1, 1, 9), (2, 1, 8), (4, 1, 6), (5, 1, 5)]
    assert found[2] == [(1, 0, 2), (2, 0, 1)]
    assert found[3] == []
    assert found[4] == [(2, 1, 7), (3, 1, 6)]
    assert read_or_extract_labels(out, task("time_to_sepsis")).table["cause"].to_pylist().count(1) == 6


def test_sex_and_unit_are_codes(tmp_path: Path) -> None:
    line = hour(1) | {"Gender": "1", "Unit1": "0", "Unit2": "1"}
    assert {code for time, code, _ in events(one(tmp_path, text([line]))) if time is None} == {
        "Age",
        "HospAdmTime",
        "GENDER//M",
        "Unit//SICU",
    }


def test_a_stay_that_begins_late_keeps_its_hours(tmp_path: Path) -> None:
    out = one(tmp_path, text([hour(7, HR=80), hour(8, HR=81)]))
    assert events(out) == [*ADMITTED, (7, "HR//bpm", 80), (8, "HR//bpm", 81)]
    assert list(labels(out)) == [7, 8]


def test_archives_and_folders_give_the_same_and_both_sets_come_together(tmp_path: Path) -> None:
    raw = write(tmp_path / "folders", {1: text([hour(1, HR=80)])})
    write(raw, {100001: text([hour(1, HR=90)])}, "training_setB")
    (tmp_path / "archives").mkdir()
    for letter in "AB":
        with tarfile.open(tmp_path / "archives" / f"training_set{letter}.tar.xz", "w:xz") as tar:
            tar.add(raw / f"training_set{letter}", arcname=f"training_set{letter}")
            tar.addfile(tarfile.TarInfo(f"training_set{letter}/._p000001.psv"), io.BytesIO())  # as a Mac adds it
    outs = [converted(tmp_path / name, tmp_path / f"{name}-out") for name in ("folders", "archives")]
    files = [pq.read_table(out / "data" / "held_out" / "0.parquet") for out in outs]
    assert files[0].equals(files[1]) and set(files[0]["subject_id"].to_pylist()) == {1, 100001}
    beside = write(tmp_path / "archives", {1: text([hour(1, HR=80)])})  # unpacked: not read twice
    assert len(Histories.open(converted(beside, tmp_path / "beside"))) == 2


def test_a_process_unpacks_an_archive_once_for_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenges, "STAYS_PER_SHARD", 2)
    raw = write(tmp_path / "raw", {number: text([hour(1, HR=80)]) for number in range(1, 21)})
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "training_setA.tar.xz", "w:xz") as tar:
        tar.add(raw / "training_setA", arcname="training_setA")
    opened = Mock(wraps=tarfile.open)
    monkeypatch.setattr(tarfile, "open", opened)
    out = converted(tmp_path / "packed", tmp_path / "out", SplitsConfig())
    assert len(list((out / "data").rglob("*.parquet"))) == 10
    assert opened.call_count == 2  # to look at all, and to write the shards


def test_files_may_lie_in_the_folder_itself(tmp_path: Path) -> None:
    raw = write(tmp_path, {1: text([hour(1, HR=80)])}, "raw") / "raw"
    assert events(converted(raw, tmp_path / "out"))[-1] == (1, "HR//bpm", 80)


def test_shards_and_workers_make_no_difference_and_splits_are_stratified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {number: text([hour(1, HR=80), hour(2, int(number % 10 == 0))]) for number in range(1, 101)}
    raw = write(tmp_path / "raw", files)
    whole = converted(raw, tmp_path / "whole", SplitsConfig())
    monkeypatch.setattr(challenges, "STAYS_PER_SHARD", 7)
    parts = converted(raw, tmp_path / "parts", SplitsConfig())
    septic = {number for number in files if number % 10 == 0}
    for out in (whole, parts):
        table = read_splits(out)
        split_of = dict(zip(table["subject_id"].to_pylist(), table["split"].to_pylist(), strict=True))
        for split, stays, septic_stays in (("train", 80, 8), ("tuning", 10, 1), ("held_out", 10, 1)):
            of_split = {number for number, found in split_of.items() if found == split}
            assert (len(of_split), len(of_split & septic)) == (stays, septic_stays)
    assert read_splits(whole).equals(read_splits(parts))
    assert all(events(whole, number) == events(parts, number) for number in (1, 50, 100))
    assert len(list((parts / "data" / "train").iterdir())) == 12
    other = PhysioNet2019Source(raw, SplitsConfig(), seed=1)
    assert (other._split_N != PhysioNet2019Source(raw, SplitsConfig(), seed=0)._split_N).any()


def test_a_finished_preparation_does_nothing_and_a_changed_file_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write(tmp_path / "raw", {1: text([hour(1, HR=80)])})
    converted(raw, tmp_path / "out")
    converted(raw, tmp_path / "out")
    assert "nothing to do" in capsys.readouterr().err
    write(raw, {1: text([hour(1, HR=81)])})
    with pytest.raises(Exception, match="prepared from other data or settings"):
        converted(raw, tmp_path / "out")


# ------------------------------------------------------------------------------------------ what may be wrong with one


def test_a_damaged_stay_costs_no_more_than_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = text([hour(1, HR=80), hour(2, HR=81), hour(3, HR=82)]).replace(b"81|NaN", b"81", 1) + b"\n1|2\n"
    out = one(tmp_path, content)
    assert events(out) == [*ADMITTED, (1, "HR//bpm", 80), (3, "HR//bpm", 82)]
    assert counts(out) == {"lines left out: not as many fields as the header": 2}
    assert "2 lines left out: not as many fields as the header\n" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["x", "", "NaN", "1.5", "-1", "inf", "1e9"])
def test_a_line_without_an_hour_is_left_out(tmp_path: Path, bad: str) -> None:
    out = one(tmp_path, text([hour(1, HR=80), hour(2, HR=81) | {"ICULOS": bad}]))
    assert events(out) == [*ADMITTED, (1, "HR//bpm", 80)] and labels(out) == {1: False}
    assert counts(out)["lines left out: ICULOS is no whole number of hours"] == 1


def test_columns_may_be_missing(tmp_path: Path) -> None:
    columns = [name for name in COLUMNS if name not in ("EtCO2", "Age", "SepsisLabel")]
    out = one(tmp_path, text([hour(1, HR=80, EtCO2=30)], columns))
    assert events(out) == [*ADMITTED[1:], (1, "HR//bpm", 80)] and labels(out) == {}
    expected = {f"files without the column {name}: nothing of it": 1 for name in ("Age", "EtCO2", "SepsisLabel")}
    assert counts(out) == expected


def test_columns_may_be_in_another_order_with_others_among_them(tmp_path: Path) -> None:
    lines = [hour(1, HR=80, pH=7.4, Extra="x"), hour(2, 1, HR=81)]
    orders = {"usual": COLUMNS, "other": [*COLUMNS[::-1], "Extra"]}
    usual, other = (one(tmp_path / name, text(lines, columns)) for name, columns in orders.items())
    assert events(other) == events(usual) and labels(other) == labels(usual) == {1: False, 2: True}
    assert counts(other)["columns that the challenge does not have: ignored"] == 1


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n\n"])
def test_line_ends_do_not_matter(tmp_path: Path, end: str) -> None:
    out = one(tmp_path, text([hour(1, HR=80), hour(2, 1, HR=81)], end=end))
    assert events(out) == [*ADMITTED, (1, "HR//bpm", 80), (2, "HR//bpm", 81)]
    assert labels(out) == {1: False, 2: True} and counts(out) == {}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "files left out: no header with ICULOS, or with a column twice"),
        (b"\x00\xff\n\xfe|1\n", "files left out: no header with ICULOS, or with a column twice"),
        (text([hour(1)], [*COLUMNS, "HR"]), "files left out: no header with ICULOS, or with a column twice"),
        (text([hour(1)], COLUMNS[:-2]), "files left out: no header with ICULOS, or with a column twice"),
        (text([]), "files left out: no line with an hour"),
        (text([hour(1) | {"ICULOS": "NaN"}]), "files left out: no line with an hour"),
    ],
)
def test_a_file_without_an_hour_is_left_out(tmp_path: Path, content: bytes, why: str) -> None:
    out = one(tmp_path, content)
    assert read_splits(out)["subject_id"].to_pylist() == [2] and events(out) == []
    assert counts(out)[why] == 1


def test_hours_may_be_out_of_order_or_twice(tmp_path: Path) -> None:
    lines = [hour(3, 1, HR=83), hour(1, HR=81), hour(2, HR=82), hour(2, 1, HR=99)]
    out = one(tmp_path, text(lines))
    assert events(out) == [*ADMITTED, (1, "HR//bpm", 81), (2, "HR//bpm", 82), (3, "HR//bpm", 83)]
    assert labels(out) == {1: False, 2: False, 3: True}
    assert counts(out) == {
        "files whose lines were out of order: sorted by hour": 1,
        "lines left out: an earlier line has their hour": 1,
    }


def test_a_stay_labelled_from_its_first_line_is_kept_and_counted(tmp_path: Path) -> None:
    out = one(tmp_path, text([hour(3, 1, HR=80), hour(4, 1)]))
    assert labels(out) == {3: True, 4: True}
    assert counts(out) == {"stays labelled from the first line on, so with an unknown onset: kept": 1}


def test_a_label_that_goes_back_stays_positive(tmp_path: Path) -> None:
    out = one(tmp_path, text([hour(1), hour(2, 1), hour(3, 0), hour(4, "NaN"), hour(5, 1)]))
    assert labels(out) == {1: False, 2: True, 3: True, 5: True}
    assert counts(out) == {
        "labels that went back from 1 to 0: kept at 1": 1,
        "lines whose label is neither 0 nor 1: no label, their events stay": 1,
    }


@pytest.mark.parametrize("bad", ["2", "yes", "0.5", ""])
def test_a_line_with_another_label_keeps_its_events(tmp_path: Path, bad: str) -> None:
    out = one(tmp_path, text([hour(1, HR=80), hour(2, bad, HR=81)]))
    assert events(out)[-1] == (2, "HR//bpm", 81) and labels(out) == {1: False}
    assert counts(out)["lines whose label is neither 0 nor 1: no label, their events stay"] == 1


def test_values_that_are_no_numbers_are_no_events(tmp_path: Path) -> None:
    line = hour(1, HR="fast", Temp="", pH="inf", SBP="1e39", DBP=58.5) | {"Gender": "2", "Age": "old"}
    out = one(tmp_path, text([line]))
    assert events(out) == [ADMITTED[1], ADMITTED[3], (1, "DBP//mmHg", 58.5)]
    assert counts(out) == {
        "values that are no number: no event": 2,
        "values too large for float32: no event": 2,
        "stays whose Gender is neither 0 nor 1: nothing of it": 1,
    }


BAD = {
    "no folder": ({}, r"raw: no such folder: raw=DIR must hold the challenge's \*\.psv files"),
    "no stays": ({"notes.txt": b""}, r"raw: 0 files \*\.psv, and no stay in them: put the challenge's training_setA"),
    "no readable stay": ({"p000001.psv": b""}, r"raw: 1 files \*\.psv, and no stay in them"),
    "another name": ({"summary.psv": text([hour(1)])}, r"summary\.psv: not the name of a stay \(pNNNNNN\.psv\)"),
    "twice": ({"p000001.psv": text([hour(1)]), "p1.psv": text([hour(1)])}, r"raw: two files are of stay 1: remove"),
    "a damaged archive": ({"training_setA.tar.xz": b"no archive"}, r"setA\.tar\.xz: not readable \(truncated or"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_dataset_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    files, message = BAD[name]
    for file, content in files.items():
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        converted(tmp_path / "raw", tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_codes_are_described(tmp_path: Path) -> None:
    codes = pq.read_table(one(tmp_path, text([hour(1)])) / "metadata" / "codes.parquet")
    meds.CodeMetadataSchema.validate(codes)
    assert dict(zip(codes["code"].to_pylist(), codes["description"].to_pylist(), strict=True)) == CODES


# --------------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
def test_real_stays_match_a_plain_reading(shared_data: Path, tmp_path: Path) -> None:
    archive = shared_data / "physionet2019" / "training_setA.tar.xz"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    plain: dict[int, list[dict[str, str]]] = {}
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            if len(plain) == 300:
                break
            file = tar.extractfile(member)
            if file is not None:
                (tmp_path / "raw").mkdir(exist_ok=True)
                content = file.read()
                (tmp_path / "raw" / Path(member.name).name).write_bytes(content)
                header, *rows = content.decode().split()
                of_hours = [dict(zip(header.split("|"), row.split("|"), strict=True)) for row in rows]
                plain[int(Path(member.name).stem[1:])] = of_hours
    out = converted(tmp_path / "raw", tmp_path / "out")
    units = {code.split("//")[0]: code for code in list(CODES)[:34]}
    for subject, lines in list(plain.items())[::10]:
        measured = [
            (int(line["ICULOS"]), units[name], np.float32(value))
            for line in lines
            for name, value in line.items()
            if name in units and value != "NaN"
        ]
        assert [event for event in events(out, subject) if event[0]] == measured
        assert labels(out, subject) == {int(line["ICULOS"]): line["SepsisLabel"] == "1" for line in lines}
    first = sum(lines[0]["SepsisLabel"] == "1" for lines in plain.values())
    assert counts(out) == {"stays labelled from the first line on, so with an unknown onset: kept": first}
    assert json.loads((out / "metadata" / "dataset.json").read_text())["license"] == "CC-BY-4.0"
