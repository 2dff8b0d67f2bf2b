"""Where data and runs live: a local path, or a URL of any filesystem that pyarrow knows (s3://, gs://, abfs://, hdfs://).

`locate` makes a `pathlib.Path` of the one and a `UrlPath`, which has as much of pathlib's interface as is needed here,
of the other; what is written here differs for the two in nothing else but these:

- A file appears whole or not at all: locally by a rename, at a URL by one upload of a finished temporary file.
- A folder that takes another one's place does so by a rename; at a URL, which has none, a marker file comes last.
- A storage that cannot be reached is tried again for a while (HYMATE_STORAGE_PATIENCE_S, 120), then the command ends in
  one line. pyarrow's and Ray's own reads and writes of a `UrlPath.filesystem` are tried again in the same way.

Credentials come from the environment (for s3:// as the AWS tools read it) and never from a URL: URLs are kept in
configurations.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from hymate.errors import UserError
from hymate.places import Url, parse_place
from hymate.storage.remote import CHUNK_BYTES, PatientFileSystem, StorageError, connect


class Stat(NamedTuple):
    """As os.stat_result names them."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class UrlPath:
    """A path below a URL, such as s3://bucket/runs; `options` is what follows its question mark."""

    root: str
    options: str
    relative: PurePosixPath

    def __str__(self) -> str:
        path = f"{self.root}/{self.relative}" if self.relative.parts else self.root
        return f"{path}?{self.options}" if self.options else path

    @property
    def filesystem(self) -> fs.FileSystem:
        """pyarrow's filesystem, on which this path is `key`."""
        return fs.PyFileSystem(PatientFileSystem(self.root, self.options))

    @property
    def key(self) -> str:
        root = connect(self.root, self.options)[1].rstrip("/")
        return f"{root}/{self.relative}" if self.relative.parts else root

    # pathlib's own names from here on

    def __truediv__(self, other: str | PurePosixPath) -> UrlPath:
        return replace(self, relative=self.relative / other)

    @property
    def name(self) -> str:
        return self.relative.name

    @property
    def stem(self) -> str:
        return self.relative.stem

    @property
    def parent(self) -> UrlPath:
        return replace(self, relative=self.relative.parent)

    def with_suffix(self, suffix: str) -> UrlPath:
        return replace(self, relative=self.relative.with_suffix(suffix))

    def with_stem(self, stem: str) -> UrlPath:
        return replace(self, relative=self.relative.with_stem(stem))

    def relative_to(self, other: UrlPath) -> PurePosixPath:
        return self.relative.relative_to(other.relative)

    def absolute(self) -> UrlPath:
        return self

    def exists(self) -> bool:
        return self._info().type != fs.FileType.NotFound

    def is_file(self) -> bool:
        return self._info().is_file

    def is_dir(self) -> bool:
        return self._info().type == fs.FileType.Directory

    def stat(self) -> Stat:
        info = self._info()
        if not info.is_file:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return Stat(info.size, info.mtime_ns)

    def iterdir(self) -> Iterator[UrlPath]:
        return (self / name for name in self._list(recursive=False))

    def glob(self, pattern: str) -> Iterator[UrlPath]:
        """What is in the folder and has a name as `pattern`."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def files(self) -> Iterator[UrlPath]:
        """The files anywhere below."""
        return (self / name for name, info in self._list(recursive=True).items() if info.is_file)

    def open(self, mode: str = "rb") -> pa.NativeFile:
        assert mode == "rb", "files at a URL are written whole: atomic_path"
        return self.filesystem.open_input_file(self.key)

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()

    def read_text(self, errors: str = "strict") -> str:
        return self.read_bytes().decode(errors=errors)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Folders come into being with their files."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.filesystem.delete_file(self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _info(self) -> fs.FileInfo:
        return self.filesystem.get_file_info(self.key)

    def _list(self, recursive: bool) -> dict[PurePosixPath, fs.FileInfo]:
        selector = fs.FileSelector(self.key, recursive=recursive, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        found = {PurePosixPath(info.path).relative_to(self.key): info for info in infos}
        if any(".." in name.parts for name in found):
            raise StorageError(f"{self}: holds names with .., which would lead out of a folder: remove them")
        return found


Location = Path | UrlPath


def locate(text: str | Path) -> Location:
    """The place that a user names. Raises UserError where it is none, or a URL of a storage that cannot be used."""
    place = parse_place(text) if isinstance(text, str) else text
    if isinstance(place, Url):
        connect(place.root, place.options)
        return UrlPath(place.root, place.options, place.relative)
    return place


# ------------------------------------------------------------------------------------------------------ writing


def present(path: Location) -> bool:
    """Whether there is anything. Raises UserError for a symbolic link that leads nowhere: something was meant to be."""
    if isinstance(path, Path) and path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a symbolic link that leads nowhere: mend it or remove it")
    return path.exists()


@contextlib.contextmanager
def atomic_path(path: Location) -> Iterator[Path]:
    """A local path to write to: it takes the place of `path` when the block ends well, else it vanishes.

    A symbolic link stays, and what it leads to is replaced. Raises UserError where the disk is full.
    """
    if isinstance(path, Path) and path.is_symlink():
        path = path.resolve()
    with contextlib.ExitStack() as stack:
        if isinstance(path, UrlPath):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hymate-"))
            temporary = Path(folder) / path.name
        else:
            temporary = path.with_name(f".{path.name}.tmp")
            stack.callback(temporary.unlink, missing_ok=True)
        with naming_a_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            yield temporary
            if isinstance(path, UrlPath):
                upload(temporary, path)
                return
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)


@contextlib.contextmanager
def naming_a_full_disk(path: Location) -> Iterator[None]:
    """UserError in place of the OSError that a full disk raises in the block, which writes `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{path}: no space left to write it: free some and give the same command again; it continues"
            ) from error
        raise


def require_room(folder: Location) -> None:
    """Raises UserError where the disk of a folder is full."""
    probe = folder / ".probe"
    with naming_a_full_disk(folder):
        write_text(" " * (1 << 20), probe)
    probe.unlink()


def require_folder(folder: Location, key: str) -> None:
    """Raises UserError that names the setting `key` where no file can be written into a folder, there or not."""
    _require_writable(folder, folder / ".try", key)


def require_file(file: Location, key: str) -> None:
    """Raises UserError that names the setting `key` where no file can be written to `file`."""
    if isinstance(file, Path) and os.path.exists(file) and not os.path.isfile(file):  # unlike Path's, these never raise
        kind = "a folder" if os.path.isdir(file) else "a device or a pipe"
        raise UserError(f"{key}={file} cannot be written to ({file}: is {kind}): give {key}= another place")
    _require_writable(
        file, file.with_name(f".{file.name}.try") if isinstance(file, Path) else file.parent / ".try", key
    )


def _require_writable(place: Location, probe: Location, key: str) -> None:
    """Leaves nothing behind."""
    made: list[Path] = []
    try:
        if isinstance(probe, UrlPath):
            write_text("", probe)
            with contextlib.suppress(OSError, UserError):  # who may not delete can still write
                probe.unlink()
            return
        for folder in reversed([probe.parent, *probe.parent.parents]):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        if isinstance(place, Path) and place.is_file():
            around, user = probe.parent.stat(), os.geteuid()
            if around.st_mode & stat.S_ISVTX and user not in (0, around.st_uid, place.stat().st_uid):  # as /tmp is
                raise PermissionError(errno.EPERM, "belongs to another user", str(place))
        with probe.open("a"):
            probe.unlink(missing_ok=True)
    except (OSError, UserError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        if isinstance(error, FileExistsError):
            dangling = Path(error.filename).is_symlink()
            reason = f"{error.filename} is a {'link to what is not there' if dangling else 'file, not a folder'}"
        raise UserError(f"{key}={place} cannot be written to ({reason}): give {key}= another place") from error
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another command uses it by now
                folder.rmdir()


@contextlib.contextmanager
def locked(file: Location, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock of a file, made where it is missing. Where another process holds it: UserError(`refusal`), or
    without a refusal wait for it.

    A URL has no locks: there nothing is held.
    """
    if isinstance(file, UrlPath):
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except OSError as error:
            if refusal is None:
                raise
            raise UserError(refusal) from error
        yield


def write_text(text: str, path: Location) -> None:
    """Write a text file atomically, making its folder."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def new_folder(target: Location, marker: str) -> Iterator[Path]:
    """A local folder to fill: it takes the place of `target` when the block ends well, else it vanishes.

    At a URL, `marker` is the last of its files to be written, and empty while the others are.
    """
    beside = None if isinstance(target, UrlPath) else target.parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{target.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        if isinstance(target, UrlPath):
            _upload_folder(new, target, marker)
            return
        if target.exists():
            os.replace(target, Path(scratch) / "old")
        os.replace(new, target)


def _upload_folder(new: Path, target: UrlPath, marker: str) -> None:
    write_text("", target / marker)
    for path in target.files():
        if path != target / marker:
            path.unlink()
    upload_files(new, target, last=marker)


@contextlib.contextmanager
def filling(folder: Location) -> Iterator[Path]:
    """A local folder whose files are in `folder` when the block ends: itself, or of a URL a temporary one."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="hymate-") as scratch:
        yield Path(scratch)
        upload_files(Path(scratch), folder)


def upload_files(source: Path, target: UrlPath, last: str = "") -> None:
    """Write all files of a local folder to the same places below `target`, the one named `last` after the others."""
    files = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    for file in sorted(files, key=lambda file: file == Path(last)):
        upload(source / file, target / file.as_posix())


def upload(source: Path, target: UrlPath) -> None:
    """Write a local file's content to `target`, which changes at once."""
    with source.open("rb") as file:
        PatientFileSystem(target.root, target.options).send(file, target.key)


def hand_over(source: Path, target: Location) -> None:
    """Move or send a local file to `target`, making its folder. On another disk it grows there, so mark its end."""
    if isinstance(target, UrlPath):
        upload(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, target)


def remove_tree(path: Location) -> None:
    """Remove a folder and all below it, if it is there."""
    if isinstance(path, UrlPath):
        with contextlib.suppress(FileNotFoundError):
            path.filesystem.delete_dir(path.key)
    else:
        shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------ reading


def readable(path: Location) -> Path | pa.NativeFile:
    """What pyarrow's readers take."""
    return path.open() if isinstance(path, UrlPath) else path


def files_below(folder: Location, suffix: str) -> dict[str, Location]:
    """Files anywhere below a folder whose names end in `suffix` and do not begin with a dot, by their path in it.

    Symbolic links are followed. Raises UserError where one leads nowhere, and where a folder cannot be read: what lies
    behind it would be missing without a word.
    """
    if isinstance(folder, UrlPath):
        found: dict[str, Location] = {path.relative_to(folder).as_posix(): path for path in folder.files()}
    else:
        found = {path.relative_to(folder).as_posix(): path for path in _files(folder, ())}
    kept = (name for name in sorted(found) if name.endswith(suffix) and not found[name].name.startswith("."))
    return {name: found[name] for name in kept}


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files below a local folder; a link back to one of the folders `above` it is left out."""
    if not folder.is_dir() or (real := folder.resolve()) in above:  # resolve raises at a link to itself
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}): make it readable") from error
    for path in entries:
        if path.is_dir():
            yield from _files(path, (*above, real))
        elif path.is_file():
            yield path
        elif not path.name.startswith("."):
            present(path)


@contextlib.contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """Where a library that reads local files only finds a file or folder: a URL's in a temporary copy.

    Raises FileNotFoundError where there is none.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hymate-") as scratch:
        copy = Path(scratch) / path.name
        download(path, copy)
        yield copy


def download(source: UrlPath, target: Path) -> None:
    """Copy a file or folder to a local path that is not there yet. Raises FileNotFoundError where there is none."""
    if source.is_dir():
        for file in source.files():
            _download(file, target / file.relative_to(source))
    else:
        _download(source, target)


def _download(source: UrlPath, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open() as file, target.open("wb") as copy:
        while piece := file.read(CHUNK_BYTES):
            copy.write(piece)
