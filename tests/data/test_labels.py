"""Where labels come from: extracted once, or given as a folder; what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from meds import LabelSchema
from stays import (
    ADMITTED,
    DIED,
    LAB,
    START,
    days,
    stay,
    task,
    write_histories,
)

from hymate.config import TaskConfig
from hymate.data import extraction, tasks
from hymate.data.meds import FIRST_TIME
from hymate.errors import UserError


def test_shards_are_labelled_alike_and_written_as_meds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    histories = [[*stay(0, 3), *stay(9, 12, DIED)], [*stay(5, 8), (90, LAB)]]
    write_histories(tmp_path, histories, "train/0", 1)
    write_histories(tmp_path, histories, "held_out/0", 11)
    write_histories(tmp_path, [[(0, LAB)]], "train/1", 21)  # a shard without a trigger
    caplog.set_level(logging.WARNING)
    result = tasks.read_or_extract_labels(tmp_path, task("mortality"))
    assert not caplog.records
    one, other = (pq.read_table(tmp_path / "labels/mortality" / f"{s}.parquet") for s in ("train/0", "held_out/0"))
    assert one.drop_columns("subject_id").equals(other.drop_columns("subject_id"))
    assert one.num_rows == 3
    for path in (tmp_path / "labels/mortality").rglob("*.parquet"):
        LabelSchema.validate(pq.read_table(path))
    summary = json.loads((tmp_path / "labels/mortality/counts.json").read_text())
    assert summary["counts"] == result.counts
    assert summary["shards"]["train/0"] == summary["shards"]["held_out/0"]
    assert summary["shards"]["train/1"]["triggers"] == 0
    assert result.counts["labels"] == result.table.num_rows == 6


def test_extraction_happens_once_and_again_when_definition_or_data_change(tmp_path: Path) -> None:
    write_histories(tmp_path, [[*stay(0, 3), (20, ADMITTED), (80, LAB)]])
    first = tasks.read_or_extract_labels(tmp_path, task("readmission"))
    written = tmp_path / "labels/readmission/train/0.parquet"
    stamp = written.stat().st_mtime_ns
    assert tasks.read_or_extract_labels(tmp_path, task("readmission")) == first
    assert written.stat().st_mtime_ns == stamp
    shorter = task("readmission", "task.definition.windows.target.end='start + 10d'")
    assert tasks.read_or_extract_labels(tmp_path, shorter).counts["positives"] == 0
    assert tasks.read_or_extract_labels(tmp_path, task("readmission")) == first
    write_histories(tmp_path, [[*stay(0, 3), (80, LAB)], [*stay(0, 3), (80, LAB)]])
    assert tasks.read_or_extract_labels(tmp_path, task("readmission")).counts["labels"] == 2
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["readmission"]


def test_an_interrupted_extraction_leaves_nothing(tmp_path: Path) -> None:
    write_histories(tmp_path, [[*stay(0, 3), (80, LAB)]], "train/0")
    (tmp_path / "data/train/1.parquet").write_bytes(b"PAR1 not a table")
    with pytest.raises(UserError, match=r"train/1\.parquet"):
        tasks.read_or_extract_labels(tmp_path, task("readmission"))
    assert list((tmp_path / "labels").iterdir()) == []


def test_an_extraction_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in ("train/0", "train/1", "tuning/0"):
        write_histories(tmp_path, [[*stay(0, 3), (80, LAB)]], shard)
    extracted, read = [], extraction._extract_shard

    def dies_at_the_third(path: Path, *given: Any) -> Any:
        extracted.append(path.relative_to(tmp_path / "data").as_posix())
        if len(extracted) == 3:
            raise KeyboardInterrupt
        return read(path, *given)

    monkeypatch.setattr(extraction, "_extract_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tasks.read_or_extract_labels(tmp_path, task("readmission"))
    assert tasks.read_or_extract_labels(tmp_path, task("readmission")).counts["labels"] == 3
    assert extracted == ["train/0.parquet", "train/1.parquet", "tuning/0.parquet", "tuning/0.parquet"]
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["readmission"]


def test_predicates_are_overridden_from_the_command_line(tmp_path: Path) -> None:
    write_histories(tmp_path, [[(0, "ADM-1"), (3, "DIS-1"), (9, "ADM-2"), (80, LAB)]])
    with pytest.raises(UserError, match=r"matches its trigger hospital_discharge: .*predicates\.hospital_discharge"):
        tasks.read_or_extract_labels(tmp_path, task("readmission"))
    config = task(
        "readmission",
        "task.definition.predicates.hospital_admission.code.regex='^ADM.*'",
        "task.definition.predicates.hospital_discharge.code=DIS-1",
    )
    assert tasks.read_or_extract_labels(tmp_path, config).table["boolean_value"].to_pylist() == [True]


def test_label_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    """A folder as aces-cli writes it, with columns that are null throughout."""
    columns = {
        "subject_id": pa.array([1, 1, 2], pa.int64()),
        "prediction_time": pa.array([START, START + timedelta(days=1), START], pa.timestamp("us")),
        "boolean_value": pa.array([True, False, False]),
        "integer_value": pa.nulls(3, pa.int64()),
        "float_value": pa.nulls(3, pa.float32()),
        "categorical_value": pa.nulls(3, pa.string()),
    }
    counts = {"labels": 3, "positives": 1, "subjects": 2}
    for folder in (tmp_path / "mine", tmp_path / "labels" / "readmission"):
        (folder / "train").mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "train" / "0.parquet")
    given = tasks.read_or_extract_labels(tmp_path, task("readmission", f"task.labels={tmp_path / 'mine'}"))
    assert given.counts == counts
    assert given.table.column_names == ["subject_id", "prediction_time", "boolean_value"]
    # labels that came with the dataset go before the definition, and are never overwritten
    assert tasks.read_or_extract_labels(tmp_path, task("readmission")) == given


def test_times_of_labels_in_utc_stand_as_they_are_with_a_note_and_other_zones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def given(zone: str | None) -> pa.Table:
        time = pa.array([START, START + timedelta(hours=1)], pa.timestamp("us", zone))
        columns = {"subject_id": pa.array([1, 2], pa.int64()), "prediction_time": time, "boolean_value": [True, False]}
        (tmp_path / "mine").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "mine" / "0.parquet")
        return tasks.read_or_extract_labels(tmp_path, task("readmission", f"task.labels={tmp_path / 'mine'}")).table

    plain = given(None)
    assert capsys.readouterr().out == ""
    assert given("UTC").equals(plain) and given("+00:00").equals(plain)
    assert capsys.readouterr().out.count("times are in UTC") == 1
    with pytest.raises(
        UserError, match=r"^[^\n]*0\.parquet: column prediction_time is timestamp\[us, tz=Europe/Berlin\]"
    ):
        given("Europe/Berlin")
    given("UTC")
    start = pa.array([START, START], pa.timestamp("us", "America/New_York"))
    keys = pq.read_table(tmp_path / "mine" / "0.parquet").drop_columns("boolean_value")
    pq.write_table(keys.append_column("start", start), tmp_path / "mine" / "0.extra.pq")
    with pytest.raises(UserError, match=r"^[^\n]*0\.extra\.pq: column start is timestamp\[us, tz=America/New_York\]"):
        given("UTC")


def test_days_of_given_labels_are_kept_where_the_task_has_them(tmp_path: Path) -> None:
    def given(days: list[float | None] | None, *overrides: str) -> pa.Table:
        columns = {
            "subject_id": pa.array([1, 2], pa.int64()),
            "prediction_time": pa.array([START, START], pa.timestamp("us")),
            "boolean_value": pa.array([True, False]),
        }
        if days is not None:
            columns["float_value"] = pa.array(days, pa.float32())
        (tmp_path / "mine").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), tmp_path / "mine" / "0.parquet")
        return tasks.read_or_extract_labels(
            tmp_path, task("length_of_stay", f"task.labels={tmp_path / 'mine'}", *overrides)
        ).table

    assert given([8.5, None])["float_value"].to_pylist() == [8.5, None]
    assert "float_value" not in given([8.5, 2.0], "task.longer_than_days=null").column_names
    assert "float_value" not in given(None, "task.longer_than_days=null").column_names
    for stayed in (None, [8.5, -1.0]):
        with pytest.raises(UserError, match=r"^[^\n]*need a float_value, the days[^\n]*longer_than_days[^\n]*$"):
            given(stayed)


def test_labels_know_when_what_they_are_about_began(tmp_path: Path) -> None:
    """The admission for death in hospital, a predicate that the task names, and nothing for readmission."""
    write_histories(tmp_path, [[*stay(0, 3), (19.5, LAB), *stay(20, 25, DIED)], [*stay(0, 3), (80, LAB)]])

    def starts(config: TaskConfig) -> list[float | None] | None:
        table = tasks.read_or_extract_labels(tmp_path, config).table
        if "start" not in table.column_names:
            return None
        return [None if start is None else days(start) for start in table["start"].to_pylist()]

    assert starts(task("mortality")) == [0, 20, 0]
    assert starts(task("readmission")) is None
    lab = "+task.definition.predicates.lab={code: LAB//50912//mg/dL}"
    assert starts(task("mortality", lab, "task.start=lab")) == [None, 19.5, None]
    # asked before it began, nothing of the stay can be shown
    before = "task.definition.windows.input.end=trigger - 12h"
    assert starts(task("mortality", before)) is None
    assert starts(task("mortality", before, lab, "task.start=lab")) == [19.5]
    extra = pq.read_table(tmp_path / "labels/mortality/train/0.extra.pq")
    labels = pq.read_table(tmp_path / "labels/mortality/train/0.parquet")
    assert extra.select(["subject_id", "prediction_time"]).equals(labels.select(["subject_id", "prediction_time"]))
    assert labels.column_names == ["subject_id", "prediction_time", "boolean_value"]


def given_labels(folder: Path, subjects: list[int], **extra: pa.Array) -> Path:
    keys = {
        "subject_id": pa.array(subjects, pa.int64()),
        "prediction_time": pa.array([START] * len(subjects), pa.timestamp("us")),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**keys, "boolean_value": [True] * len(subjects)}), folder / "0.parquet")
    if extra:
        pq.write_table(pa.table({**keys, **extra}), folder / "0.extra.pq")
    return folder


def test_label_folders_may_bring_start_and_weight(tmp_path: Path) -> None:
    def given(subjects: list[int], **extra: pa.Array) -> tasks.LabelSet:
        (tmp_path / "mine" / "0.extra.pq").unlink(missing_ok=True)
        given_labels(tmp_path / "mine", subjects, **extra)
        return tasks.read_or_extract_labels(tmp_path, task("readmission", f"task.labels={tmp_path / 'mine'}"))

    before = pa.array([START - timedelta(days=1), None], pa.timestamp("us"))
    found = given([1, 1], start=before, weight=pa.array([1.5, 1.0], pa.float64()))
    assert [None if start is None else days(start) for start in found.table["start"].to_pylist()] == [-1, None]
    assert found.table["weight"].to_pylist() == [1.5, 1.0]
    assert found.digest() != given([1, 1], start=before).digest() != given([1, 1]).digest()
    assert "start" not in given([1, 1]).table.column_names
    # a subject's only label is about all that is known of it, unless the definition says that it has no start
    assert "start" not in given([1, 2]).table.column_names
    for other in (
        task("mortality"),
        task("readmission", "task.definition=null"),
        task("readmission", "task.start=trigger"),
    ):
        found = tasks.read_or_extract_labels(tmp_path, replace(other, labels=str(tmp_path / "mine")))
        assert set(found.table["start"].cast(pa.int64()).to_pylist()) == {FIRST_TIME}
    given_labels(tmp_path / "mine" / "more", [3, 3])
    assert given([1, 1], weight=pa.array([2.0, 2.0])).table["weight"].to_pylist() == [2, 2, 1, 1]

    wrong = {
        "a start lies after its prediction_time": {"start": pa.array([START, START + timedelta(days=1)])},
        "a weight is null or not between 1e-06 and 1e\\+06": {"weight": pa.array([1.0, 0.0])},
        "column start is int64, .extra.pq files have timestamp": {"start": pa.array([1, 2])},
        "column 'wieght' is none of subject_id, prediction_time, start, weight": {"wieght": pa.array([1.0, 2.0])},
        "subject_id is not that of the labels, line by line": {"subject_id": pa.array([2, 1])},
        "row 1: subject_id does not fit": {"subject_id": pa.array([1, 2**63], pa.uint64())},
        "row 1: start does not fit timestamp.us. or would lose digits": {"start": pa.array([0, 1], pa.timestamp("ns"))},
    }
    for message, columns in wrong.items():
        with pytest.raises(UserError, match=rf"^[^\n]*0\.extra\.pq: {message}[^\n]*$"):
            given([1, 2], **columns)
    (tmp_path / "mine" / "0.parquet").unlink()
    with pytest.raises(UserError, match=r"0\.extra\.pq: there are no labels 0\.parquet beside it"):
        tasks.read_or_extract_labels(tmp_path, task("readmission", f"task.labels={tmp_path / 'mine'}"))


def test_labels_of_one_time_must_not_contradict_each_other(tmp_path: Path) -> None:
    def given(second: bool) -> tasks.LabelSet:
        folder = given_labels(tmp_path / "mine", [1, 2])
        table = pq.read_table(folder / "0.parquet")
        other = table.set_column(2, "boolean_value", pa.array([True, second]))
        pq.write_table(pa.concat_tables([table, other]), folder / "0.parquet")
        return tasks.read_or_extract_labels(tmp_path, task("mortality", f"task.labels={folder}"))

    assert given(True).counts["labels"] == 4  # said twice is no contradiction
    with pytest.raises(UserError, match=r"^task\.labels: 1 labels in [^\n]*mine contradict another one[^\n]*$"):
        given(False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+task.kinds.day_case=false"], "task.kinds.day_case is not a predicate"),
        (
            ["task.start=admission"],
            "task.start=admission is not a predicate .*: choose one of null, trigger, ",
        ),
        (["task.labels=nowhere"], "task.labels: nowhere is not a folder"),
        (["task.definition=null"], "give task.labels=FOLDER or a task.definition"),
        (["task.competing=dead"], "task.competing=dead is not a predicate"),
        (["task.definition.windows.target.label=null"], "a window with a label"),
        (["task.definition.trigger=discharge"], "not an ACES task: .*discharge"),
        (["task.definition.predicates.died.code.regex='(['"], "not an ACES task: .*regex"),
        (["+task.definition.windoes=1"], "not an ACES task: .*windoes"),
        (["task.definition.predicates.died.code.regex='.'"], "no trigger gets a label .*1 died_before"),
    ],
)
def test_mistakes_are_one_clear_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    write_histories(tmp_path, [[*stay(0, 3), (80, LAB)]])
    with pytest.raises(UserError, match=message) as error:
        tasks.read_or_extract_labels(tmp_path, task("readmission", *overrides))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "labels" / "readmission").exists()


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no MEDS shards: .*hymate\.data\.prepare"):
        tasks.read_or_extract_labels(tmp_path, task("mortality"))
