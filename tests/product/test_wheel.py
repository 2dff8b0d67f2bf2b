"""The wheel where there is no checkout: its commands from an empty folder, with configurations of one's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import ROOT, run

from hymate.inference.bundle import read_bundle
from hymate.inference.initial import SHIPPED, initial_bundle
from hymate.scripts import COMMANDS

SMALL = ["data.context=64", "data.tokens_per_row=128", "data.min_count=1", "train.rows_per_step=2", "train.max_steps=2"]
SMALL += ["train.warmup_steps=1", "train.eval_every=2"]

pytestmark = pytest.mark.slow


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
    return {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_the_wheel_has_every_source_and_configuration(installed: Path) -> None:
    (package,) = installed.parent.glob("lib/python3*/site-packages/hymate")
    sources = {file.relative_to(ROOT / "hymate") for file in (ROOT / "hymate").rglob("*.py")}
    configurations = {file.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.*")}
    bundles = {file.relative_to(ROOT / "hymate") for file in SHIPPED.rglob("*.*")}
    kinds = ("py", "yaml", "csv", "safetensors", "parquet", "md")
    files = {file.relative_to(package) for kind in kinds for file in package.rglob(f"*.{kind}")}
    assert files == sources | configurations | bundles
    assert (package / "py.typed").is_file()  # type checkers read the package's types


def test_a_cohort_becomes_predictions_without_a_checkout(
    installed: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    def command(name: str, *settings: str) -> str:
        done = run([str(installed / f"hymate-{name}"), *settings], environment, tmp_path)
        assert done.returncode == 0, f"{name}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    (tmp_path / "own" / "model").mkdir(parents=True)
    mine = "d_model: 48\nlayers: MA\nd_state: 16\nheaddim: 16\nnum_heads: 2\n"
    (tmp_path / "own" / "model" / "mine.yaml").write_text(mine)
    assert "debug, large, mine, paper" in command("pretrain", "--config-dir", "own", "--help")
    command("prepare", "source=synthetic", "out=data", "synthetic.subjects=120", "synthetic.mean_events=150")
    own = ["--config-dir", "own", "model=mine", "data.path=data"]
    command("pretrain", *own, *SMALL, "train.eval_rows=2", "train.num_workers=2")
    assert read_bundle(tmp_path / "runs" / "pretrain", kind="pretrained").model.d_model == 48
    tuned = ["init=runs/pretrain", "task=readmission", "data.path=data", "search.num_trials=1", "report.boosting=false"]
    command("tune", *tuned, *SMALL)
    command("predict", "bundle=runs/tune-readmission", "task=readmission", "data.path=data", "out=predictions.parquet")
    assert pq.read_metadata(tmp_path / "predictions.parquet").num_rows > 0
    assert {path.name for path in tmp_path.iterdir()} == {"own", "data", "runs", "predictions.parquet"}


def test_the_bundle_that_ships_is_read_from_the_wheel(
    installed: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    code = "from hymate.inference import initial as i; print(i.SHIPPED, i.initial_bundle('icu').fingerprint)"
    done = run([str(installed / "python"), "-c", code], environment, tmp_path)
    folder, fingerprint = done.stdout.split()
    assert (Path(folder).is_relative_to(installed.parent), fingerprint) == (True, initial_bundle("icu").fingerprint)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"prepare", "pretrain", "tune", "predict"}))
def test_the_other_commands_say_what_is_wrong_in_one_line(
    name: str, installed: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    done = run([str(installed / f"hymate-{name}"), "--colour"], environment, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --colour is not an option") and done.stderr.count("\n") == 1
