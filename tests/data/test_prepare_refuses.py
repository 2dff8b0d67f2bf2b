"""Everything that a user can get wrong when preparing data is refused in one line and leaves nothing."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_meds import (
    ROWS,
    Row,
    by_subject,
    config,
    data_table,
    read_back,
    write_raw,
    write_table,
)

from hymate.data.examples import labelled_examples, pretraining_examples
from hymate.data.histories import Histories
from hymate.data.meds import DataError, SplitsConfig
from hymate.data.prepare import PrepareConfig, prepare
from hymate.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]


def edit(path: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda raw: write_table(change(pq.read_table(raw / path)), raw / path)


def retype(name: str, values: list) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values))


def rows(*shard_rows: Row) -> Callable[[Path], None]:
    return lambda raw: write_table(data_table(list(shard_rows)), raw / "data/train/1.parquet")


def truncate(raw: Path) -> None:
    path = raw / "data/train/1.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def without_shards(raw: Path) -> None:
    for path in raw.rglob("*.parquet"):
        path.unlink()


def damage(raw: Path) -> None:
    path = raw / "data/train/1.parquet"
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)  # pages, not the footer
    path.write_bytes(content)


VALUES = [1.0, np.inf, 3.5e38]  # infinity is a float32, too


def relink(name: str) -> Callable[[Path], None]:
    """Put a link that leads nowhere in the place of a file or folder."""

    def spoil(raw: Path) -> None:
        if (raw / name).is_dir():
            shutil.rmtree(raw / name)
        (raw / name).unlink(missing_ok=True)
        (raw / name).symlink_to(raw / "gone")

    return spoil


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda raw: raw.rename(raw.with_name("gone")), r"raw: no such folder: raw=DIR must be"),
    "empty folder": (without_shards, r"raw/data: no \*.parquet shards"),
    "truncated": (truncate, r"train/1\.parquet: not a readable Parquet file .* fetch"),
    "damaged": (damage, r"train/1\.parquet: not a readable Parquet file .* fetch"),
    "no code": (
        edit("data/train/1.parquet", lambda t: t.drop_columns("code")),
        r"train/1\.parquet: column code is missing",
    ),
    "integer code": (
        edit("data/train/1.parquet", retype("code", [1, 2])),
        r"train/1\.parquet: column code is int64, MEDS 0\.4 has string: write it as that",
    ),
    "text subject": (
        edit("data/train/1.parquet", retype("subject_id", ["3", "3"])),
        r"train/1\.parquet: column subject_id is string, MEDS 0\.4 has int64",
    ),
    "times of a zone": (
        edit("data/train/1.parquet", retype("time", pa.array([None, 1], pa.timestamp("us", "Europe/Berlin")))),
        r"column time is timestamp\[us, tz=Europe/Berlin\], .*: write the times of all files in one zone, without its",
    ),
    "times in nanoseconds that do not fit": (
        edit("data/train/1.parquet", retype("time", pa.array([None, 1], pa.timestamp("ns")))),
        r"train/1\.parquet: row 1: time does not fit timestamp\[us\] or would lose digits: mend",
    ),
    "a number beyond float32": (
        edit("data/train/1.parquet", retype("numeric_value", [1e38, -1e39])),
        r"train/1\.parquet: row 1: numeric_value does not fit float .*: mend the value or drop",
    ),
    "an integer that float32 cannot hold": (
        edit("data/train/1.parquet", retype("numeric_value", [1, 2**24 + 1])),
        r"train/1\.parquet: row 1: numeric_value does not fit float or would lose digits",
    ),
    "a subject beyond int64": (
        edit("data/train/1.parquet", retype("subject_id", pa.array([3, 2**64 - 1], pa.uint64()))),
        r"train/1\.parquet: row 1: subject_id does not fit int64",
    ),
    "a label beyond float32": (
        lambda raw: write_table(
            pa.table(
                {"subject_id": [1] * 3, "prediction_time": pa.array([0] * 3, pa.timestamp("us")), "float_value": VALUES}
            ),
            raw / "labels/t/0.parquet",
        ),
        r"labels/t/0\.parquet: row 2: float_value does not fit float",
    ),
    "a link to nothing": (
        lambda raw: (raw / "data/held_out/1.parquet").symlink_to(raw / "gone.parquet"),
        r"held_out/1\.parquet: a symbolic link that leads nowhere: mend it or remove it",
    ),
    "splits that are a link to nothing": (
        relink("metadata/subject_splits.parquet"),
        r"subject_splits\.parquet: a symbolic link that leads nowhere",
    ),
    "labels that are a link to nothing": (relink("labels"), r"labels: a symbolic link that leads nowhere"),
    "unsorted": (
        rows((3, 7, "K", 1.0), (3, 6, "K", 1.0)),
        r"train/1\.parquet: row 1: earlier than the row before: sort the shard",
    ),
    "unsorted around a static row": (
        rows((3, 7, "K", 1.0), (3, None, "A", None), (3, 6, "K", 1.0)),
        r"train/1\.parquet: row 2: earlier than the row before",
    ),
    "not contiguous": (
        rows((3, 7, "K", 1.0), (2, 7, "K", 1.0), (3, 8, "K", 1.0)),
        r"train/1\.parquet: 1 subject\(s\) not contiguous: sort the shard",
    ),
    "two shards": (
        rows((3, 7, "K", 1.0), (4, 7, "K", 1.0)),
        r"train/1\.parquet and .*tuning/0\.parquet: share 1 subject\(s\): write each subject into one shard",
    ),
    "two splits": (
        edit("metadata/subject_splits.parquet", lambda t: pa.concat_tables([t, t.slice(0, 1)])),
        r"subject_splits\.parquet: rows 0 and 5 are the same subject: a subject has one split",
    ),
    "no split": (
        edit("metadata/subject_splits.parquet", lambda t: t.slice(1)),
        r"subject_splits\.parquet: 1 of 5 subjects have no split: add them",
    ),
    "splits without a column": (
        edit("metadata/subject_splits.parquet", lambda t: t.drop_columns("split")),
        r"subject_splits\.parquet: Missing required columns: split",
    ),
    "empty shard": (rows(), r"train/1\.parquet: holds no rows: delete the shard"),
    "infinite": (
        rows((3, 7, "K", 1.0), (3, 7, "K", -np.inf)),
        r"train/1\.parquet: row 1: numeric_value is infinite: write null",
    ),
    "null subject": (rows((None, 7, "K", 1.0)), r"train/1\.parquet: row 0: subject_id is null"),  # type: ignore[arg-type]
    "null code": (rows((3, 7, "K", 1.0), (3, 8, None, 1.0)), r"train/1\.parquet: row 1: code is null"),  # type: ignore[arg-type]
    "other version": (
        lambda raw: (raw / "metadata/dataset.json").write_text('{"meds_version": "0.2.1"}'),
        r"dataset\.json: MEDS version 0\.2\.1 is not supported: convert",
    ),
    "no version": (
        lambda raw: (raw / "metadata/dataset.json").unlink(),
        r'dataset\.json: missing or without "meds_version"',
    ),
    "labels without a time": (
        lambda raw: write_table(pa.table({"subject_id": [1], "boolean_value": [True]}), raw / "labels/t/0.parquet"),
        r"labels/t/0\.parquet: column prediction_time is missing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    spoil, message = BAD[name]
    raw = write_raw(tmp_path / "raw")
    spoil(raw)
    with pytest.raises(UserError, match=message) as raised:
        prepare(config(raw, tmp_path / "out"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_input_found_by_a_worker_process(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    BAD["unsorted"][0](raw)
    with pytest.raises(DataError, match=BAD["unsorted"][1]):
        prepare(config(raw, tmp_path / "out", workers=2))
    assert not (tmp_path / "out").exists()


def test_splits_with_other_names_are_named_and_refused_where_they_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {shard.replace("tuning", "val").replace("held_out", "test"): own for shard, own in ROWS.items()}
    prepare(config(write_raw(tmp_path / "raw", rows), tmp_path / "out"))
    remedy = "rename them in metadata/subject_splits.parquet (validation is tuning, test is held_out)"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "the splits 'test', 'val': MEDS calls the splits train, tuning, held_out" in line and remedy in line
    labels = pa.table(
        {"subject_id": [4], "prediction_time": pa.array([9], pa.timestamp("us")), "boolean_value": [True]}
    )
    histories = Histories.open(tmp_path / "out")
    for use in (pretraining_examples, lambda histories, split: labelled_examples(histories, labels, split)):
        with pytest.raises(
            UserError, match=r"^[^\n]*no subject is in the tuning split: there are subjects in 'test', 'val'"
        ) as error:
            use(histories, "tuning")
        assert remedy in str(error.value)


def test_a_full_disk_is_one_line_and_the_command_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, out = write_raw(tmp_path / "raw"), tmp_path / "out"
    original = pq.write_table

    def full(table: pa.Table, path: Path, **kwargs: object) -> None:
        original(table, path, **kwargs)
        if "statistics" in str(path) and "held_out" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match="no space left to write it: free some and give the same command again"):
        prepare(config(raw, out))
    assert not list(out.rglob("*.tmp"))
    monkeypatch.undo()
    prepare(config(raw, out))
    assert read_back(out) == by_subject(ROWS)


@pytest.mark.slow
def test_the_command_exits_2_with_one_line_when_files_cannot_grow(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise: list[Row] = [(1, t, f"C{t % 7}", float(v)) for t, v in enumerate(rng.normal(size=5000))]
    raw = write_raw(tmp_path / "raw", {"train/0": noise})
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    command = [sys.executable, "-m", "hymate.data.prepare", "source=meds", f"raw={raw}", f"out={tmp_path / 'out'}"]
    run = subprocess.run([*command, "workers=1"], cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert run.returncode == 2, run.stderr
    assert "error: " in run.stderr.splitlines()[-1] and "no space left" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr and not list((tmp_path / "out").rglob("*.tmp"))


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="held_out must be fractions that add up to 1"):
        SplitsConfig(train=1)
    with pytest.raises(ConfigError, match="workers must be at least 1"):
        config(tmp_path, tmp_path, workers=0)
    with pytest.raises(ConfigError, match="raw is not for source=synthetic"):
        PrepareConfig("synthetic", str(tmp_path / "out"), str(tmp_path))
    with pytest.raises(ConfigError, match="raw is required with source=meds"):
        PrepareConfig(source="meds", out="x")
    with pytest.raises(UserError, match="not a prepared dataset: run python -m hymate"):
        Histories.open(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(config(write_raw(tmp_path / "raw"), out))
    path = out / "histories" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(UserError, match="format version 2, this version reads 1"):
        Histories.open(out)
