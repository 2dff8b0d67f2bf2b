"""What libraries assume and a machine may lack: a home for caches, a user's name, temporary files."""

from __future__ import annotations

import fcntl
import getpass
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from hymate.errors import UserError

LOCK = ".lock"  # beside a held folder
# new objects between two garbage collections: with 700, as Python has it, they take a seventh of the time of imports,
# which make half a million objects that stay
GARBAGE_EVERY = 10_000


def settle() -> None:
    """Set HOME, XDG_CACHE_HOME or USER where libraries would fail without; processes started later inherit them.

    Containers often have a home that is read-only or missing, and a user id without a name. Raises UserError where
    there is no place for temporary files or no current folder, or where OMP_NUM_THREADS, which libraries read when they
    are imported, is not a number.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError("no temporary file can be written: set TMPDIR to a folder that can") from error
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current folder has been deleted: change to another one") from error
    if not re.fullmatch(r"[\d\s,]*", threads := os.environ.get("OMP_NUM_THREADS", "")):
        raise UserError(f"OMP_NUM_THREADS={threads} is not a number: unset it, or set it to how many threads to use")
    home = Path(os.path.expanduser("~"))  # it stays ~ where there is none
    if not home.is_absolute() or not home.is_dir():
        os.environ["HOME"] = str(own_folder())
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
        existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
        if not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
            os.environ["XDG_CACHE_HOME"] = str(own_folder())
    if not _name():
        os.environ["USER"] = f"uid-{os.geteuid()}"


def own_folder() -> Path:
    """A folder of temporary files that only this user can write to; the same one every time, where possible.

    What others can write to must not hold caches: Numba unpickles its own.
    """
    folder = Path(tempfile.gettempdir()) / f"hymate-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="hymate-"))


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """A new folder for temporary files. It goes with the block; after a kill, when another process of ours begins."""
    lock = folder.with_suffix(LOCK)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        folder.mkdir(mode=0o700)
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextmanager
def own_temporary_files() -> Iterator[None]:
    """While the block runs, all of this process's temporary files are in a held folder; those of killed ones go."""
    common = shared_temporary_folder()
    for lock in common.glob(f"hymate-*{LOCK}"):
        with suppress(OSError), lock.open() as file:  # not another user's, nor one that somebody holds
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
    folder = common / f"hymate-{uuid.uuid4().hex}"
    with held_folder(folder):
        tempfile.tempdir = str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = str(common)


def shared_temporary_folder() -> Path:
    """Where processes of this machine find each other's temporary files."""
    folder = Path(tempfile.gettempdir())
    return folder.parent if folder.with_suffix(LOCK).exists() else folder


def _name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""


def available_memory() -> int:
    """Bytes of memory that this process may still take: what the machine has free, or the container it is in."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # "max" where there is no limit
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, free)


def available_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
