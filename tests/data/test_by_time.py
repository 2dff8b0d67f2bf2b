"""Splits by calendar time: the past trains, what came later is held out, and dates that aren't real are refused."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_meds import BIRTH, Row, config, read_back, write_raw, write_table

from hymate.data.histories import Histories
from hymate.data.known import KnownConfig, KnownRule
from hymate.data.label_files import read_labels
from hymate.data.meds import US_PER_DAY, DataError, SplitsConfig
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.sources import by_time

START = int(datetime.datetime(2015, 3, 1, 9, tzinfo=datetime.UTC).timestamp()) * 1_000_000
BY_TIME = SplitsConfig(train=0.6, tuning=0.2, held_out=0.2, by="time")


def day(number: float) -> int:
    return START + round(number * US_PER_DAY)


def ten_subjects() -> dict[str, list[Row]]:
    """Subject k enters on day 10 k; the last ones are in the first shard. All have a visit on days 95 and 300."""
    rows: dict[str, list[Row]] = {"held_out/0": [], "train/0": []}
    for subject in range(9, -1, -1):
        own: list[Row] = [
            (subject, None, "GENDER//F", None),
            (subject, BIRTH, "MEDS_BIRTH", None),
            (subject, day(10 * subject), "HR", 80.0),
            (subject, day(95), "HR", 81.0),
            (subject, day(300), "HR", 82.0),
        ]
        rows["train/0" if subject > 4 else "held_out/0"] += own
    return rows


def write(folder: Path, with_splits: bool = True) -> Path:
    raw = write_raw(folder, ten_subjects(), with_splits)
    times = [day(96), day(10.5), day(69), day(200), day(65), day(96)]
    table = {"subject_id": [0, 1, 5, 9, 6, 7], "prediction_time": pa.array(times, pa.timestamp("us"))}
    write_table(pa.table({**table, "boolean_value": [True] * 6}), raw / "labels" / "t" / "a.parquet")
    write_table(pa.table(table).slice(0, 1), raw / "labels" / "u" / "a.parquet")
    return raw


@pytest.mark.parametrize("with_splits", [True, False])
def test_the_past_trains_and_what_came_later_is_held_out(
    tmp_path: Path, with_splits: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    raw, out = write(tmp_path / "raw", with_splits), tmp_path / "out"
    prepare(config(raw, out, splits=BY_TIME))
    said = capfd.readouterr()
    histories = Histories.open(out)
    splits = {s: {histories.index.subject_id_P[p] for p in histories.positions(s)} for s in histories.splits}
    assert splits == {"train": {0, 1, 2, 3, 4, 5}, "tuning": {6, 7}, "held_out": {8, 9}}
    found = read_back(out)
    for subject, rows in found.items():
        last = max(time for _, time, _, _ in rows if time is not None)
        assert last == day({"train": 10 * subject, "tuning": 10 * subject, "held_out": 300}[_split(splits, subject)])
        assert rows[0] == (subject, None, "GENDER//F", None)
    labels = read_labels(out / "labels" / "t")
    assert sorted(labels["subject_id"].to_pylist()) == [1, 6, 9], "labels after their split's date are left out"
    assert not (out / "labels" / "u" / "a.parquet").exists()
    metadata = _metadata(out)
    # subject 6 enters on the first day of the tuning subjects, and 8 on that of those held out
    assert metadata["split_dates"] == {"train": "2015-04-30", "tuning": "2015-05-20"}
    assert list(metadata["left_out"].values()) == [16, 4]
    assert "train: before 2015-04-30" in said.err and "16 events after their split's dates: left out" in said.err
    assert "at random" not in said.out


def test_what_becomes_known_after_a_split_is_left_out_of_histories(tmp_path: Path) -> None:
    """Training ends on day 60, and what is stamped before is known ten days later: of subject 5, on days 60 and 61."""
    rows = {
        shard: sorted(
            [*own, *((k, day(10 * k + n), "DX", None) for k in {row[0] for row in own} for n in (0, 1))], key=_by_time
        )
        for shard, own in ten_subjects().items()
    }
    rules = KnownConfig(rules={"late": KnownRule("^DX$", delay_hours=240.0)})
    raw, out = write_raw(tmp_path / "raw", rows), tmp_path / "out"
    prepare(config(raw, out, splits=BY_TIME, known=rules))
    histories, known = Histories.open(out), {}
    dx = histories.codes.index("DX")
    for history in histories.read(range(len(histories))):
        known[history.subject_id] = int((history.code == dx).sum())
    assert known == {0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 0, 8: 2, 9: 2}
    vocabulary = pq.read_table(out / "histories/vocabulary.parquet").to_pylist()
    assert {row["code"]: row["count"] for row in vocabulary}["DX"] == 10
    assert _metadata(out)["known_events"]["late"] == {"moved": 16, "left_out": 4}


def _by_time(row: Row) -> tuple[int, int]:
    return row[0], START - US_PER_DAY * 99_999 if row[1] is None else row[1]


def _split(splits: dict[str, set[int]], subject: int) -> str:
    return next(split for split, subjects in splits.items() if subject in subjects)


def test_the_seed_and_the_dataset_s_own_splits_change_nothing(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw")
    other = shutil.copytree(raw, tmp_path / "other")
    (other / "metadata/subject_splits.parquet").unlink()
    for name, source, seed in (("a", raw, 0), ("b", other, 1)):
        prepare(config(source, tmp_path / name, splits=BY_TIME, seed=seed))
    assert read_back(tmp_path / "a") == read_back(tmp_path / "b")
    assert _metadata(tmp_path / "a")["splits"] == _metadata(tmp_path / "b")["splits"]


def test_what_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write(tmp_path / "raw")
    prepare(config(raw, tmp_path / "whole", splits=BY_TIME))
    with monkeypatch.context() as patch:

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("hymate.data.prepare.count_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(raw, tmp_path / "out", splits=BY_TIME))
    prepare(config(raw, tmp_path / "out", splits=BY_TIME))
    assert read_back(tmp_path / "out") == read_back(tmp_path / "whole")
    assert _metadata(tmp_path / "out") == _metadata(tmp_path / "whole")


@pytest.mark.parametrize("rewritten", ["rewrite", "write_labels"])
def test_what_was_left_out_is_counted_once_whenever_it_was_interrupted(
    rewritten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here when a file was rewritten, and nothing else was done."""
    raw = write(tmp_path / "raw")
    prepare(config(raw, tmp_path / "whole", splits=BY_TIME))
    whole = getattr(by_time, rewritten)

    def killed(*given: Any) -> None:
        whole(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(by_time, rewritten, killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(raw, tmp_path / "out", splits=BY_TIME))
    prepare(config(raw, tmp_path / "out", splits=BY_TIME))
    assert read_back(tmp_path / "out") == read_back(tmp_path / "whole")
    assert _metadata(tmp_path / "out") == _metadata(tmp_path / "whole")


def test_several_datasets_have_the_same_dates(tmp_path: Path) -> None:
    first, second = write(tmp_path / "A"), write(tmp_path / "B")
    prepare(PrepareConfig("meds", str(tmp_path / "out"), [str(first), str(second)], splits=BY_TIME, workers=1))
    sizes = {split: size["subjects"] for split, size in _metadata(tmp_path / "out")["splits"].items()}
    assert sizes == {"train": 12, "tuning": 4, "held_out": 4}


def _shifted(by: Any) -> dict[str, list[Row]]:
    def moved(row: Row) -> Row:
        return (row[0], None if row[1] is None else row[1] + by(row[0]), row[2], row[3])

    return {shard: [moved(row) for row in rows] for shard, rows in ten_subjects().items()}


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (lambda subject: 150 * 365 * US_PER_DAY, "10 of 10 subjects enter the record in the future"),
        (lambda subject: -subject * 20 * 365 * US_PER_DAY, "the subjects enter the record over more than a century"),
        (lambda subject: -10 * subject * US_PER_DAY, "10 of 10 subjects enter the record on one day, 2015-03-01"),
    ],
)
def test_dates_that_are_not_real_are_refused_with_the_reason(tmp_path: Path, by: Any, message: str) -> None:
    raw = write_raw(tmp_path / "raw", _shifted(by))
    with pytest.raises(DataError, match=rf"^splits\.by=time: {message}, so dates are not real here[^\n]*$"):
        prepare(config(raw, tmp_path / "out", splits=BY_TIME))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_datasets_have_no_real_dates(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(DataError, match="enter the record in the future"):
        prepare(config(shared_data / "mimic_iv_demo_meds", tmp_path / "out", splits=BY_TIME))
    (tmp_path / "2012").mkdir()
    for name in ("set-b.tar.xz", "Outcomes-b.txt"):
        shutil.copy(shared_data / "physionet2012" / name, tmp_path / "2012" / name)
    with pytest.raises(DataError, match="4,000 of 4,000 subjects enter the record on one day, 2012-01-01"):
        prepare(
            PrepareConfig("physionet2012", str(tmp_path / "out"), str(tmp_path / "2012"), splits=BY_TIME, workers=1)
        )


def _metadata(out: Path) -> dict[str, Any]:
    return json.loads((out / "histories/metadata.json").read_text())
