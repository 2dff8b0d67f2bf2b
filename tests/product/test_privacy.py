"""What commands leave behind says nothing of a patient, and is for those whom the umask lets read it.

Subjects with conspicuous ids, values and notes are prepared, learned from and predicted, and everything that this
leaves is searched, but for the files that are meant to hold patients: prepared data, predictions and states.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import PATIENCE_S, ROOT
from small_cohort import write_meds

from hymate.data.prepare import PrepareConfig, prepare
from hymate.errors import UserError

SUBJECT = 0x5A17C3E94B000000  # the ids begin here
VALUE = 8317.0  # values of one lab lie above it, by less than 1
NOTE = "MRS ZYXWVUTS OF ELM STREET"
MARKS = {
    "an id": re.compile(re.escape(str(SUBJECT)[:11]).encode()),
    "an id in hexadecimal": re.compile(b"5a17c3e94b", re.IGNORECASE),
    "an id in binary": re.compile(re.escape((SUBJECT >> 24).to_bytes(5, "little"))),
    "an id in binary, big end first": re.compile(re.escape((SUBJECT >> 24).to_bytes(5, "big"))),
    "a value": re.compile(rb"\b8317\.\d"),
    "values in binary": re.compile(rb"(.[\xf4-\xf7]\x01\x46){2}|\x00{4}.\x3e\xc0\x40", re.DOTALL),
    "a note": re.compile(NOTE.encode()),
}
SHORT = ["model=debug", "data.context=64", "data.tokens_per_row=64", "data.min_count=1", "train.warmup_steps=1"]
SHORT += ["train.rows_per_step=1", "train.max_steps=2", "train.eval_every=2", "train.log_every=1"]

Spoil = Callable[[pa.Table], pa.Table]

pytestmark = pytest.mark.slow


def write_marked(raw: Path) -> Path:
    """The small cohort with conspicuous subjects."""
    write_meds(raw)
    for path in raw.rglob("*.parquet"):
        table = pq.read_table(path)
        if "subject_id" in table.column_names:
            table = table.set_column(0, "subject_id", pa.array(table["subject_id"].to_numpy() + SUBJECT))
        if "code" in table.column_names and "time" in table.column_names:
            value = table["numeric_value"].to_numpy().copy()
            sodium = np.array(table["code"].to_pylist()) == "LAB//sodium"
            value[sodium] = VALUE + (np.arange(sodium.sum()) % 63 + 1) / 64
            table = table.set_column(3, "numeric_value", pa.array(value))
            table = table.append_column("text_value", pa.array([NOTE] * len(table), pa.large_string()))
        pq.write_table(table, path)
    return raw


@dataclass(frozen=True)
class Left:
    """folder: where the commands worked; ray: Ray's files; said: what each command said, and its exit code."""

    folder: Path
    ray: Path
    said: dict[str, tuple[str, int]]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    """Everything that the commands leave, those that fail included; half of them under each umask."""
    folder = tmp_path_factory.mktemp("work")
    ray = Path(tempfile.mkdtemp(prefix="hy", dir="/tmp"))  # the paths of Ray's sockets are limited
    environment = {**os.environ, "RAY_TMPDIR": str(ray), "TORCHDYNAMO_DISABLE": "1", "HYMATE_OPS": "reference"}
    environment.pop("RAY_ADDRESS", None)
    said: dict[str, tuple[str, int]] = {}

    def command(name: str, umask: int, *arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=folder,
            umask=umask,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        said[name] = done.stdout, done.returncode

    raw, data = write_marked(folder / "raw"), folder / "data"
    pretrain, tune = str(ROOT / "pretrain/run.py"), str(ROOT / "finetune/tune.py")
    command("prepare", 0o007, "-m", "hymate.data.prepare", "source=meds", f"raw={raw}", f"out={data}", "workers=2")
    places = [f"data.path={data}", f"run.dir={folder / 'runs'}"]
    command("pretrain", 0o007, pretrain, *places, *SHORT, "train.eval_rows=1")
    lrs = ["~search.space.head_lr", "+search.space.head_lr={choice:[1e-3,1e36]}", "search.space.frozen=false"]
    search = ["task=readmission", f"init={folder / 'runs/pretrain'}", "search.num_trials=2", "search.max_failures=0"]
    command("tune", 0o077, tune, *places, *SHORT, *search, *lrs)
    asked = [f"bundle={folder / 'runs/tune-readmission'}", f"data.path={data}", "task=readmission", "context=all"]
    written = [f"out={folder / 'predictions/predictions.parquet'}", f"states={folder / 'states'}"]
    command("predict", 0o077, "-m", "hymate.predict", *asked, *written)
    for number, (name, spoil) in enumerate(SPOILS.items()):
        spoilt = shutil.copytree(raw, folder / f"raw-{number}")
        pq.write_table(spoil(pq.read_table(raw / "data/train/0.parquet")), spoilt / "data/train/0.parquet")
        with contextlib.redirect_stderr(io.StringIO()) as shown, pytest.raises(UserError) as caught:
            prepare(PrepareConfig(source="meds", raw=str(spoilt), out=str(folder / f"spoilt-{number}"), workers=1))
        said[f"prepare: {name}"] = f"{shown.getvalue()}error: {caught.value}\n", 2
    shard = data / "histories/train/0.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    damaged = ["run.name=damaged", "train.max_failures=0"]
    command("pretrain: damaged", 0o077, pretrain, *places, *SHORT, *damaged)
    yield Left(folder, ray, said)
    shutil.rmtree(ray, ignore_errors=True)


def changed(name: str, change: Callable[[np.ndarray], np.ndarray], kind: pa.DataType | None = None) -> Spoil:
    """Numbers of a column put through `change`, as another type."""

    def spoil(table: pa.Table) -> pa.Table:
        numbers = table[name].cast(pa.int64()) if name == "time" else table[name]
        return table.set_column(table.column_names.index(name), name, pa.array(change(numbers.to_numpy()), kind))

    return spoil


SPOILS: dict[str, Spoil] = {
    "unsorted": lambda table: table.take(list(range(len(table)))[::-1]),
    "scattered": lambda table: pa.concat_tables([table, table.slice(0, 1)]),
    "ids that are no integers": changed("subject_id", lambda id_R: id_R.astype(np.float64)),
    "ids that are too large": changed("subject_id", lambda id_R: id_R.astype(np.uint64) + 2**63),
    "times that are too fine": changed("time", lambda time_R: time_R * 1000 + 1, pa.timestamp("ns")),
    "values that are infinite": changed("numeric_value", lambda value_R: value_R * np.inf),
    "values of many digits": changed("numeric_value", lambda value_R: value_R.astype(np.int64) + 2**40),
}


def test_the_commands_did_what_they_should(left: Left) -> None:
    for name, (text, code) in left.said.items():
        fails = ":" in name
        assert code == (2 if fails else 0), f"{name}: {text}"
        assert not fails or sum(line.startswith("error: ") for line in text.splitlines()) == 1, text
    trials = json.loads((left.folder / "runs/tune-readmission/results.json").read_text())["trials"]
    assert sorted(trial["status"] for trial in trials) == ["failed", "finished"]


def marks_in(content: bytes) -> list[str]:
    return [name for name, mark in MARKS.items() if mark.search(content)]


def test_the_marks_are_found_where_patients_are_meant_to_be(left: Left) -> None:
    """Else the search below would prove nothing."""
    table = pq.read_table(left.folder / "raw/data/train/0.parquet")
    found = marks_in(str(table.to_pylist()).encode())
    found += marks_in(table["subject_id"].to_numpy().tobytes())
    assert {"an id", "a value", "a note", "an id in binary"} <= set(found)
    prepared = pq.read_table(left.folder / "data/histories/tuning/0.parquet")
    sodium = np.array([value for row in prepared["value"].to_pylist() for value in row if value > VALUE], np.float32)
    for kind in (np.float32, np.float64):
        assert "values in binary" in marks_in(sodium.astype(kind).tobytes())


def test_what_was_said_names_no_patient(left: Left) -> None:
    for name, (text, _) in left.said.items():
        assert not marks_in(text.encode()), f"{name}: {text}"


def test_what_is_left_names_no_patient(left: Left) -> None:
    """Bundles hold, of each code, quantiles of its values in training, which is said in the README; nothing else."""
    meant = ("raw", "data", "predictions", "states")
    files = [path for path in [*left.folder.rglob("*"), *left.ray.rglob("*")] if path.is_file()]
    logs = [path for path in files if left.ray in path.parents and path.suffix in (".log", ".err", ".out")]
    assert len(logs) > 5, "Ray's logs are searched, too"
    for path in files:
        inside = path.relative_to(left.folder).parts[0] if left.folder in path.parents else ""
        if inside in meant or inside.startswith("raw-") or path.name == "predictions.parquet":
            continue
        if path.suffix == ".parquet":
            assert path.name == "vocabulary.parquet", path
            table = pq.read_table(path)
            assert not marks_in(str(table.drop_columns(["median", "quantiles"]).to_pylist()).encode()), path
        else:
            assert not marks_in(path.read_bytes()), path


def test_files_are_for_those_whom_the_umask_lets_read_them(left: Left) -> None:
    """Under 007 the group reads and writes everything; under 077 nobody else does anything. Shards of raw data that are
    linked into prepared data are the raw files."""
    umasks = {
        "data": 0o007,
        "runs/pretrain": 0o007,
        "runs/tune-readmission": 0o077,
        "predictions": 0o077,
        "states": 0o077,
    }
    for name, umask in umasks.items():
        for path in [left.folder / name, *(left.folder / name).rglob("*")]:
            if path.is_file() and path.stat().st_nlink > 1:
                continue
            mode = stat.S_IMODE(path.stat().st_mode)
            full = 0o777 if path.is_dir() else 0o666
            assert mode == full & ~umask, f"{path}: {mode:o}"
