"""PhysioNet Challenge 2012 text to MEDS: what becomes of each row, labels, splits, and malformed files."""

from __future__ import annotations

import csv
import datetime
import io
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from challenge import STAY
from hypothesis import given, settings
from hypothesis import strategies as st

from hymate.data.histories import Histories
from hymate.data.label_files import read_labels
from hymate.data.meds import DataError, SplitsConfig, read_splits
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.sources import challenges, physionet2012
from hymate.data.sources.physionet2012 import CODES, ORIGIN, PhysioNet2012Source

OUTCOMES = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n"
ALL_TRAIN = SplitsConfig(1, 0, 0)


def write_raw(raw: Path, letter: str = "b", records: range = range(101, 105), stay: str = STAY) -> Path:
    """A set of the challenge in its layout; the first record of each ten died, after 2 days more each."""
    folder = raw / f"set-{letter}"
    folder.mkdir(parents=True)
    lines = []
    for record in records:
        (folder / f"{record}.txt").write_text(stay.format(record=record))
        number = record - records[0]
        lines.append(f"{record},6,1,{-1 if number == 3 else 2 + 2 * number},-1,{int(number % 10 == 0)}\n")
    (raw / f"Outcomes-{letter}.txt").write_text(OUTCOMES + "".join(lines))
    return raw


def archive(raw: Path, letter: str = "b") -> None:
    """Pack a set's folder, as the challenge is distributed."""
    folder = raw / f"set-{letter}"
    with tarfile.open(raw / f"set-{letter}.tar.xz", "w:xz") as tar:
        tar.add(folder, arcname=folder.name)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def source(raw: Path, splits: SplitsConfig = ALL_TRAIN, seed: int = 0) -> PhysioNet2012Source:
    return PhysioNet2012Source(raw, splits, seed)


def convert(raw: Path, out: Path, splits: SplitsConfig = ALL_TRAIN) -> pa.Table:
    """All MEDS data of a raw folder, by shard."""
    made = source(raw, splits)
    for shard in made.shards():
        made.write_shard(shard, out)
    made.finish(out)
    return pa.concat_tables([pq.read_table(out / "data" / f"{shard}.parquet") for shard in made.shards()])


def rows_of(table: pa.Table, subject: int) -> list[tuple]:
    """(minutes since admission, code, value) of a subject."""
    return [
        (
            None if row["time"] is None else (row["time"] - ORIGIN) / datetime.timedelta(minutes=1),
            row["code"],
            row["numeric_value"],
        )
        for row in table.to_pylist()
        if row["subject_id"] == subject
    ]


def test_every_row_becomes_what_it_should(tmp_path: Path) -> None:
    table = convert(write_raw(tmp_path / "raw"), tmp_path / "out")
    meds.DataSchema.validate(table)
    assert rows_of(table, 102) == [
        (None, "Age", 54),
        (None, "GENDER//F", None),
        (None, "ICUType//4", None),
        (None, "Weight", 72.5),
        (0, "ICU_ADMISSION", None),
        (7, "GCS", 15),
        (7, "HR//bpm", 73),
        (90, "Weight//kg", 73),
        (2879, "pH", 735),
    ]  # and no pressure of -1 at 48:00


def test_set_c_lacks_its_icu_type_and_repeats_the_age(tmp_path: Path) -> None:
    stay = "Time,Parameter,Value\r\n00:00,RecordID,{record}\r\n00:00,Age,54\r\n00:00,Age,55\r\n00:00,Gender,1"
    table = convert(write_raw(tmp_path / "raw", "c", stay=stay), tmp_path / "out")
    assert rows_of(table, 101) == [(None, "Age", 54), (None, "GENDER//M", None), (0, "ICU_ADMISSION", None)]


def test_labels_at_48_hours(tmp_path: Path) -> None:
    convert(write_raw(tmp_path / "raw"), tmp_path / "out")
    at_48_hours = ORIGIN + datetime.timedelta(hours=48)
    died = read_labels(tmp_path / "out" / "labels" / "mortality")
    meds.LabelSchema.validate(died)
    assert died["boolean_value"].to_pylist() == [True, False, False, False]
    assert set(died["prediction_time"].to_pylist()) == {at_48_hours}
    stayed = read_labels(tmp_path / "out" / "labels" / "length_of_stay")
    meds.LabelSchema.validate(stayed)
    assert stayed["subject_id"].to_pylist() == [101, 102, 103]  # 104 has no known length
    assert stayed["float_value"].to_pylist() == [2, 4, 6]
    assert not any(stayed["boolean_value"].to_pylist())


def test_longer_than_seven_days_is_strict(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    (raw / "Outcomes-b.txt").write_text(OUTCOMES + "101,1,1,7,-1,0\n102,1,1,8,-1,0\n103,1,1,7,-1,1\n104,1,1,9,-1,0\n")
    convert(raw, tmp_path / "out")
    assert read_labels(tmp_path / "out/labels/length_of_stay")["boolean_value"].to_pylist() == [
        False,
        True,
        False,
        True,
    ]


def test_archives_and_folders_give_the_same(tmp_path: Path) -> None:
    for name in ("folders", "archives"):
        write_raw(tmp_path / name)
        write_raw(tmp_path / name, "a", range(11, 14))
    archive(tmp_path / "archives")
    archive(tmp_path / "archives", "a")
    tables = [convert(tmp_path / name, tmp_path / f"{name}-out") for name in ("folders", "archives")]
    assert tables[0].equals(tables[1])
    assert sorted(set(tables[0]["subject_id"].to_pylist())) == [11, 12, 13, 101, 102, 103, 104]


def test_codes_are_described(tmp_path: Path) -> None:
    convert(write_raw(tmp_path / "raw"), tmp_path / "out")
    codes = pq.read_table(tmp_path / "out" / "metadata" / "codes.parquet")
    meds.CodeMetadataSchema.validate(codes)
    assert dict(zip(codes["code"].to_pylist(), codes["description"].to_pylist(), strict=True)) == CODES


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (1, 0, 0), (0, 0, 1), (0, 1, 0)]))
def test_splits_are_stratified_and_seeded(seed: int, fractions: tuple[float, float, float]) -> None:
    made = source(Path(), SplitsConfig(*fractions), seed)
    death = np.arange(400) % 10 == 0
    stays = physionet2012._Stays(np.arange(1000, 1400), death, np.full(400, "b"), np.zeros(400, np.float32))
    made.__dict__["stays"] = stays  # cached_property: no files
    for split, fraction in zip(("train", "tuning", "held_out"), fractions, strict=True):
        chosen = made._split_N == split
        assert abs(chosen[death].sum() - fraction * 40) <= 1
        assert abs(chosen[~death].sum() - fraction * 360) <= 1
    other = source(Path(), SplitsConfig(*fractions), seed + 1)
    other.__dict__["stays"] = stays
    assert 1 in fractions or (other._split_N != made._split_N).any()


def test_shards_hold_one_split_and_at_most_so_many_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenges, "STAYS_PER_SHARD", 7)
    raw, out = write_raw(tmp_path / "raw", records=range(200, 250)), tmp_path / "out"
    splits = SplitsConfig(0.6, 0.2, 0.2)
    settings = {"source": "physionet2012", "raw": str(raw), "out": str(out), "workers": 1, "splits": splits}
    prepare(PrepareConfig(**settings))  # type: ignore[arg-type]
    histories = Histories.open(out)
    assert len(histories) == 50
    for split in histories.splits:
        positions = np.array(histories.positions(split))
        shard_N = [place.shard for place in histories.index.places(positions)]
        assert max(Counter(shard_N).values()) <= 7 and {shard.split("/")[0] for shard in shard_N} == {split}
        labels = read_labels(out / "labels" / "mortality" / split)
        assert set(histories.index.subject_id_P[positions]) <= set(labels["subject_id"].to_pylist())
    found = dict(zip(read_splits(out)["split"].to_pylist(), read_splits(out)["subject_id"].to_pylist(), strict=True))
    assert set(found) == {"train", "tuning", "held_out"}


def test_real_stays_match_a_plain_reading(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenges, "STAYS_PER_SHARD", 200)
    made = source(shared_data / "physionet2012")
    assert len(made.stays.number_N) == 8000
    assert round(float(made.stays.outcome_N.mean()), 3) == 0.144
    shard = made.shards()[-1]
    made.write_shard(shard, tmp_path)
    table = pq.read_table(tmp_path / "data" / f"{shard}.parquet")
    subjects = np.array(table["subject_id"])
    units = {code.split("//")[0]: code for code in list(CODES)[:37]}
    with tarfile.open(shared_data / "physionet2012" / "set-c.tar.xz") as tar:
        for record in np.unique(subjects)[::40]:
            member = tar.extractfile(f"set-c/{record}.txt")
            assert member is not None
            expected = []
            for row in csv.DictReader(io.StringIO(member.read().decode())):
                minute = int(row["Time"][:2]) * 60 + int(row["Time"][3:])
                if minute > 0 and row["Parameter"] and row["Value"] != "-1":
                    expected.append((minute, units[row["Parameter"]], np.float32(row["Value"])))
            events = rows_of(table.filter(pa.array(subjects == record)), int(record))
            assert [event for event in events if event[0]] == expected


# ------------------------------------------------------------------------------------------------- bad input


def replaced(old: str, new: str) -> Callable[[Path], object]:
    def spoil(raw: Path) -> None:
        path = raw / "set-b" / "103.txt"
        path.write_text(path.read_text().replace(old, new))

    return spoil


def outcomes(text: str) -> Callable[[Path], object]:
    return lambda raw: (raw / "Outcomes-b.txt").write_text(text)


def cut_archive(raw: Path) -> None:
    archive(raw)
    path = raw / "set-b.tar.xz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda raw: raw.rename(raw.with_name("gone")), r"raw: no such folder: raw=DIR must hold set-a"),
    "empty folder": (
        lambda raw: raw.rename(raw.with_name("gone")) and raw.mkdir(),  # type: ignore[func-returns-value]
        r"raw: holds no set of the challenge: put set-b\.tar\.xz and Outcomes-b\.txt there",
    ),
    "four fields": (replaced("00:07,HR,73", "00:07,HR,73,1"), r"103\.txt: line 9: not three fields"),
    "two fields": (replaced("00:07,HR,73", "00:07,HR"), r"103\.txt: line 9: not three fields"),
    "no number": (replaced("HR,73", "HR,fast"), r"103\.txt: line 9: the value is not a number: mend the line"),
    "empty value": (replaced("HR,73", "HR,"), r"103\.txt: line 9: the value is not a number"),
    "not finite": (replaced("HR,73", "HR,inf"), r"103\.txt: line 9: the value is not finite"),
    "too large": (replaced("HR,73", "HR,1e39"), r"103\.txt: line 9: the value is too large for float32: mend"),
    "time": (replaced("00:07,HR", "0:07,HR"), r"103\.txt: line 9: the time is not HH:MM"),
    "minute": (replaced("00:07,HR", "00:77,HR"), r"103\.txt: line 9: the time is not HH:MM"),
    "parameter": (replaced("HR", "Heart"), r"103\.txt: line 9: not a parameter of the challenge"),
    "gender": (replaced("Gender,0", "Gender,2"), r"103\.txt: line 4: not a value of Gender"),
    "record": (replaced("RecordID,103", "RecordID,104"), r"103\.txt: line 2: the RecordID is not that of the file"),
    "blank line": (replaced("00:07,HR", "\n00:07,HR"), r"103\.txt: line 9: not three fields"),
    "header": (replaced("Time,Parameter", "Time,Param"), r"103\.txt: line 1 must be Time,Parameter,Value"),
    "empty file": (lambda raw: (raw / "set-b/103.txt").write_text(""), r"103\.txt: line 1 must be Time,"),
    "other file": (lambda raw: (raw / "set-b/notes.txt").write_text(""), r"notes\.txt: not the name of a stay"),
    "unknown set": (lambda raw: (raw / "set-d").mkdir(), r"set-d: unknown set 'd', the challenge has a, b and c"),
    "unknown outcomes": (
        lambda raw: (raw / "Outcomes-x.txt").write_text(""),
        r"Outcomes-x\.txt: unknown set 'x', the challenge has a, b and c",
    ),
    "no outcomes": (
        lambda raw: (raw / "Outcomes-b.txt").unlink(),
        r"set-b: stays without outcomes: put Outcomes-b\.txt beside it",
    ),
    "no stays": (
        lambda raw: (raw / "set-b").rename(raw / "elsewhere"),
        r"Outcomes-b\.txt: outcomes without stays: put set-b\.tar\.xz beside it",
    ),
    "a stay without an outcome": (
        lambda raw: (raw / "set-b/999.txt").write_text(STAY.format(record=999)),
        r"Outcomes-b\.txt: 1 of 5 records have no outcome: fetch",
    ),
    "an outcome without a stay": (
        lambda raw: (raw / "set-b/103.txt").unlink(),
        r"Outcomes-b\.txt: 1 of 4 records have an outcome but no stay: fetch",
    ),
    "outcome fields": (outcomes(OUTCOMES + "101,1,1,5,0\n"), r"Outcomes-b\.txt: line 2 is not six whole numbers"),
    "outcome value": (outcomes(OUTCOMES + "101,1,1,5,-1,2\n"), r"Outcomes-b\.txt: line 2 is not six whole numbers"),
    "outcome header": (outcomes("RecordID\n101\n"), r"Outcomes-b\.txt: line 1 must be RecordID,SAPS-I"),
    "outcome twice": (
        outcomes(OUTCOMES + "101,1,1,5,-1,0\n" * 2),
        r"Outcomes-b\.txt: line 3 repeats a RecordID",
    ),
    # A cut between two members looks like the archive's end.
    "truncated archive": (
        cut_archive,
        r"set-b\.tar\.xz: not readable \(truncated or damaged\): fetch|no stay, .* fetch set-b\.tar\.xz",
    ),
    "a record in two sets": (
        lambda raw: write_raw(raw, "a", range(104, 106)),
        r"raw: two sets share a RecordID",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    spoil, message = BAD[name]
    raw = write_raw(tmp_path / "raw")
    spoil(raw)
    settings = PrepareConfig(source="physionet2012", raw=str(raw), out=str(tmp_path / "out"), workers=1)
    with pytest.raises(DataError, match=message) as raised:
        prepare(settings)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
