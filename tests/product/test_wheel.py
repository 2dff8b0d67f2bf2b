"""The wheel where there is no checkout: its commands, from an empty folder, and what they leave behind.

Subjects with conspicuous ids, values and notes are prepared, learned from and predicted. Everything that this leaves is
searched, but for the files that are meant to hold patients: prepared data, predictions and states.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import PATIENCE_S, ROOT, run
from small_cohort import SIZES, write_meds

from hymate.data.prepare import PrepareConfig, prepare
from hymate.errors import UserError
from hymate.inference.bundle import read_bundle
from hymate.inference.initial import SHIPPED, initial_bundle
from hymate.scripts import COMMANDS

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
SHORT = ["data.context=64", "data.tokens_per_row=64", "data.min_count=1", "train.warmup_steps=1"]
SHORT += ["train.rows_per_step=2", "train.max_steps=2", "train.eval_every=2", "train.log_every=1"]
MINE = "d_model: 48\nlayers: MA\nd_state: 16\nheaddim: 16\nnum_heads: 2\n"

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; everything else that it needs is the environment's that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = folder.glob("hymate-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, capture_output=True)
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    for file in (ROOT / "hymate" / "ops").rglob("*.py"):  # compiling takes a minute, and what Numba has is good
        copy = site / file.relative_to(ROOT)
        shutil.copystat(file, copy)
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.nb?"):
            (copy.parent / "__pycache__").mkdir(exist_ok=True)
            shutil.copy(compiled, copy.parent / "__pycache__")
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def environment(environment: dict[str, str]) -> dict[str, str]:
    """As a user has it who has no checkout."""
    of_ours = ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS")
    return {name: value for name, value in environment.items() if name not in of_ours}


@dataclass(frozen=True)
class Left:
    """raw: the MEDS dataset; folder: where the commands worked; ray: Ray's files; said: what each command said, and its
    exit code; names: what was in the folder once the last command had ended well.
    """

    raw: Path
    folder: Path
    ray: Path
    said: dict[str, tuple[str, int]]
    names: set[str]


@pytest.fixture(scope="module")
def left(installed: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Everything that the commands leave, those that fail included; half of them under each umask."""
    raw, folder = write_marked(tmp_path_factory.mktemp("cohort") / "raw"), tmp_path_factory.mktemp("work")
    said: dict[str, tuple[str, int]] = {}

    def command(name: str, umask: int, *settings: str) -> None:
        done = subprocess.run(
            [str(installed / f"hymate-{name.partition(':')[0]}"), *settings],
            env=environment,
            cwd=folder,
            umask=umask,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        said[name] = done.stdout, done.returncode

    (folder / "own" / "model").mkdir(parents=True)
    (folder / "own" / "model" / "mine.yaml").write_text(MINE)
    command("prepare", 0o007, "source=meds", f"raw={raw}", "out=data", "workers=2")
    pretrain = ["--config-dir", "own", "model=mine", "data.path=data", *SHORT, "train.eval_rows=2"]
    pretrain += ["train.num_workers=1"]
    command("pretrain", 0o007, *pretrain)
    lrs = ["~search.space.head_lr", "+search.space.head_lr={choice:[1e-3,1e36]}", "search.space.frozen=false"]
    search = ["task=readmission", "init=runs/pretrain", "data.path=data", "search.max_failures=0"]
    command("tune", 0o077, *search, *SHORT, *lrs, "search.num_trials=2")
    asked = ["bundle=runs/tune-readmission", "data.path=data", "task=readmission", "context=all"]
    command("predict", 0o077, *asked, "out=predictions/predictions.parquet", "states=states")
    names = {path.name for path in folder.iterdir()}
    for number, (name, spoil) in enumerate(SPOILS.items()):
        spoilt = shutil.copytree(raw, raw.with_name(f"raw-{number}"))
        pq.write_table(spoil(pq.read_table(raw / "data/train/0.parquet")), spoilt / "data/train/0.parquet")
        with contextlib.redirect_stderr(io.StringIO()) as shown, pytest.raises(UserError) as caught:
            prepare(PrepareConfig(source="meds", raw=str(spoilt), out=str(folder / f"spoilt-{number}"), workers=1))
        said[f"prepare: {name}"] = f"{shown.getvalue()}error: {caught.value}\n", 2
    shard = folder / "data/histories/train/0.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    command("pretrain: damaged", 0o077, *pretrain, "run.name=damaged", "train.max_failures=0")
    return Left(raw, folder, Path(environment["RAY_TMPDIR"]), said, names)


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


def test_the_wheel_has_every_source_and_configuration(installed: Path) -> None:
    (package,) = installed.parent.glob("lib/python3*/site-packages/hymate")
    sources = {file.relative_to(ROOT / "hymate") for file in (ROOT / "hymate").rglob("*.py")}
    configurations = {file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.*")}
    bundles = {file.relative_to(ROOT / "hymate") for file in SHIPPED.rglob("*.*")}
    kinds = ("py", "yaml", "csv", "safetensors", "parquet", "md")
    files = {file.relative_to(package) for kind in kinds for file in package.rglob(f"*.{kind}")}
    assert files == sources | configurations | bundles
    assert (package / "py.typed").is_file()  # type checkers read the package's types


def test_a_cohort_becomes_predictions_without_a_checkout(left: Left) -> None:
    """With a configuration of one's own; one of two trials fails."""
    for name, (text, code) in left.said.items():
        fails = ":" in name
        assert code == (2 if fails else 0), f"{name}: {text}"
        assert not fails or sum(line.startswith("error: ") for line in text.splitlines()) == 1, text
    assert read_bundle(left.folder / "runs/pretrain", kind="pretrained").model.d_model == 48
    trials = json.loads((left.folder / "runs/tune-readmission/results.json").read_text())["trials"]
    assert sorted(trial["status"] for trial in trials) == ["failed", "finished"]
    written = pq.read_metadata(left.folder / "predictions/predictions.parquet")
    assert written.num_rows == 2 * sum(SIZES.values())
    assert left.names == {"own", "data", "runs", "predictions", "states"}


def marks_in(content: bytes) -> list[str]:
    return [name for name, mark in MARKS.items() if mark.search(content)]


def test_the_marks_are_found_where_patients_are_meant_to_be(left: Left) -> None:
    """Else the search below would prove nothing."""
    table = pq.read_table(left.raw / "data/train/0.parquet")
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
    meant = ("data", "predictions", "states")
    files = [path for path in [*left.folder.rglob("*"), *left.ray.rglob("*")] if path.is_file()]
    logs = [path for path in files if left.ray in path.parents and path.suffix in (".log", ".err", ".out")]
    assert len(logs) > 5, "Ray's logs are searched, too"
    for path in files:
        inside = path.relative_to(left.folder).parts[0] if left.folder in path.parents else ""
        if inside in meant or path.name == "predictions.parquet":
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


def test_the_bundle_that_ships_is_read_from_the_wheel(
    installed: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    code = "from hymate.inference import initial as i; print(i.SHIPPED, i.initial_bundle('icu').fingerprint)"
    done = run([str(installed / "python"), "-c", code], environment, tmp_path)
    folder, fingerprint = done.stdout.split()
    assert (Path(folder).is_relative_to(installed.parent), fingerprint) == (True, initial_bundle("icu").fingerprint)


def test_every_command_is_there_and_starts_in_the_same_way(
    installed: Path, environment: dict[str, str], left: Left
) -> None:
    """So those that run here show that the others would."""
    assert len({(installed / f"hymate-{name}").read_text() for name in COMMANDS}) == 1
    done = run([str(installed / "hymate-plan"), "--config-dir", "own", "--help"], environment, left.folder)
    assert done.returncode == 0 and "debug, large, mine, paper" in done.stdout, done.stderr
