"""Machines that lack what libraries take for granted."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hymate import machine
from hymate.errors import UserError


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
