"""Machines that lack what libraries take for granted, or have other code than the command's."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import PATIENCE_S, ROOT

from hymate import machine
from hymate.errors import UserError
from hymate.inference.bundle import read_bundle


@pytest.fixture
def temporary(nobody: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        for name in ("XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
            monkeypatch.delenv(name, raising=False)
        before = dict(os.environ)
        yield Path(folder)
        os.environ.clear()
        os.environ.update(before)


def test_a_home_that_can_be_written_to_is_left_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(temporary))
    monkeypatch.setenv("USER", "somebody")
    before = dict(os.environ)
    machine.settle()
    assert dict(os.environ) == before and not list(temporary.iterdir())


def test_a_home_that_is_missing_gets_another_place(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere/at/all")
    machine.settle()
    home = Path(os.environ["HOME"])
    assert home.parent == temporary and stat.S_IMODE(home.stat().st_mode) == 0o700


@pytest.mark.parametrize("closed", ["home", "cache"])
def test_caches_get_another_place_where_the_home_is_closed(
    closed: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = temporary / "home"
    (home / ".cache" if closed == "cache" else home).mkdir(parents=True)
    (home / ".cache" if closed == "cache" else home).chmod(0o500)
    monkeypatch.setenv("HOME", str(home))
    machine.settle()
    assert os.environ["HOME"] == str(home), "it may hold credentials"
    assert Path(os.environ["XDG_CACHE_HOME"]).parent == temporary
    home.chmod(0o700)


def test_a_user_id_without_a_name_gets_one(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError
    monkeypatch.delenv("HOME")
    machine.settle()
    assert os.environ["USER"] == f"uid-{os.geteuid()}" and Path(os.environ["HOME"]).parent == temporary


def test_a_machine_without_a_place_for_temporary_files_is_refused(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere/at/all"])
    with pytest.raises(UserError, match="set TMPDIR"):
        machine.settle()


def test_a_current_folder_that_is_gone_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "gone").mkdir()
    monkeypatch.chdir(temporary / "gone")
    (temporary / "gone").rmdir()
    with pytest.raises(UserError, match="current folder has been deleted"):
        machine.settle()


def test_a_folder_that_others_can_write_to_holds_no_caches(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.own_folder() == machine.own_folder() == temporary / f"hymate-{os.geteuid()}"
    machine.own_folder().chmod(0o777)
    other = machine.own_folder()
    assert other != machine.own_folder() and stat.S_IMODE(other.stat().st_mode) == 0o700


# ------------------------------------------------------------------------------------- a container as they often are

MAY_READ = "-all,+dac_read_search"  # the interpreter, whoever it belongs to
LEAVES_A_FILE = """
_train = train

def train(*args, **kwargs):
    import os, pathlib, sys
    standing = _train(*args, **kwargs)
    pathlib.Path({folder!r}, str(os.getpid())).write_text("\\n".join(sys.modules))
    return standing
"""


@pytest.fixture
def stranger() -> Iterator[tuple[list[str], dict[str, str], Path]]:
    """What makes a command one of a user without a name or a home, its environment, and a folder for all users.

    Who is not root stays who they are: nothing makes a command another user's.
    """
    words: list[str] = []
    if os.geteuid() == 0 and shutil.which("setpriv"):
        words = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
        words += ["--inh-caps", MAY_READ, "--ambient-caps", MAY_READ]
    with tempfile.TemporaryDirectory(prefix="hy", dir="/tmp", ignore_cleanup_errors=True) as folder:
        temporary = Path(folder) / ("x" * 200)
        temporary.mkdir()
        for path in (Path(folder), temporary):
            path.chmod(0o777)
        unset = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "RAY_TMPDIR", "RAY_ADDRESS", "NUMBA_CACHE_DIR")
        environment = {key: value for key, value in os.environ.items() if key not in unset}
        settings = {"TMPDIR": str(temporary), "TORCHDYNAMO_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        yield words, environment | settings, Path(folder)


def test_kernels_find_a_place_where_the_code_is_read_only(stranger: tuple[list[str], dict[str, str], Path]) -> None:
    words, environment, folder = stranger
    if not words:
        pytest.skip("needs root and setpriv, to become another user")
    shutil.copytree(ROOT / "hymate", folder / "hymate", ignore=shutil.ignore_patterns("__pycache__"))
    line = [*words, sys.executable, "-c", "import hymate.ops.cpu"]
    environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(line, env=environment, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_trains_without_a_home_or_a_name_and_with_a_long_path_to_temporary_files_by_the_code_beside_it(
    stranger: tuple[list[str], dict[str, str], Path], small_data: Path
) -> None:
    """The command is a checkout's that is not installed, and given in a folder that has another hymate."""
    words, environment, folder = stranger
    checkout, ran, here = folder / "checkout", folder / "ran", folder / "here"
    for name in ("pretrain", "configs", "hymate"):
        shutil.copytree(ROOT / name, checkout / name)
    ran.mkdir()
    ran.chmod(0o777)
    with (checkout / "hymate" / "training" / "loop.py").open("a") as file:
        file.write(LEAVES_A_FILE.format(folder=str(ran)))
    (here / "hymate").mkdir(parents=True)
    (here / "hymate" / "__init__.py").write_text("raise SystemError('this is not the one')")
    line = [*words, sys.executable, str(checkout / "pretrain" / "run.py"), f"data.path={small_data}"]
    line += [f"run.dir={folder}/runs", "model=debug", "data.context=64", "data.tokens_per_row=64", "data.min_count=1"]
    line += ["train.max_steps=1", "train.eval_every=1", "train.eval_rows=1", "train.warmup_steps=0"]
    line += ["train.rows_per_step=1", "train.num_workers=1"]
    environment["HYMATE_OPS"] = "reference"  # compiling takes longer than all the rest
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(line, env=environment, cwd=here, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert read_bundle(folder / "runs" / "pretrain", kind="pretrained").model.d_model == 32
    workers = list(ran.iterdir())
    assert len(workers) == 1, "the worker has run other code"
    assert "torch._dynamo" not in workers[0].read_text().splitlines(), "it takes two seconds to import"


def test_temporary_files_of_a_killed_process_go_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hold = "import sys, tempfile, time\nfrom hymate import machine\nwith machine.own_temporary_files():\n"
    hold += "    print(tempfile.mkdtemp(), flush=True)\n    time.sleep(600)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", hold], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        with machine.own_temporary_files():
            assert folder.is_dir(), "its process is alive"
            assert machine.shared_temporary_folder() == tmp_path == Path(tempfile.gettempdir()).parent
        other.kill()
        other.wait()
    assert folder.is_dir()
    with machine.own_temporary_files():
        assert not folder.parent.exists()
    assert not list(tmp_path.iterdir())
