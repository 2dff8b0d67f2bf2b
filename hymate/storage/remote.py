"""pyarrow's filesystems of URLs, with patience: what cannot be reached is tried again for a while.

Each operation is, for HYMATE_STORAGE_PATIENCE_S seconds (120); then it ends in a `StorageError`, one clear line.
Files are written whole or not at all. The rest of the code uses `hymate.storage.paths`.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import fs

from hymate.errors import UserError, first_line

PATIENCE = "HYMATE_STORAGE_PATIENCE_S"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
LONGEST_SILENCE_S = 15.0  # of a server that is to answer
TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT|HTTP status 5\d\d"
    r"|[Cc]onnection|[Tt]imed? ?out|[Uu]navailable"
)
WHOLE_UPLOADS = {"s3", "gcs", "abfs"}  # an object is there when its upload is complete, not before
CHUNK_BYTES = 16 << 20
T = TypeVar("T")


class StorageError(UserError):
    """A storage that cannot be reached, or refuses."""


@functools.lru_cache
def connect(root: str, options: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's own filesystem and what `root` is on it."""
    url = f"{root}?{options}" if options else root
    try:
        found, key = _patiently(root, lambda: fs.FileSystem.from_uri(url))
    except pa.ArrowException as error:
        raise UserError(f"{root}: not a storage that can be used: {first_line(error)}") from error
    if isinstance(found, fs.S3FileSystem):  # what a URL cannot say; by default it waits for an answer for ever
        silence_s = min(LONGEST_SILENCE_S, _patience_s() / 4)
        settings = found.__reduce__()[1][0] | {
            "request_timeout": silence_s,
            "connect_timeout": silence_s,
            "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=1),  # `_patiently` is enough
            "allow_delayed_open": True,  # one request for a small file, not three
            "background_writes": False,  # many at once would wait for each other in pyarrow's pool of threads
        }
        found = fs.S3FileSystem(**settings)
    return found, key


def _patience_s() -> float:
    return float(os.environ.get(PATIENCE, "120"))


def _patiently(name: str, operation: Callable[[], T]) -> T:
    """`operation()`, tried again while the storage cannot be reached.

    What is wrong with a path passes as the OSError that it is; all else becomes a StorageError.
    """
    started, wait_s = time.monotonic(), FIRST_WAIT_S
    while True:
        try:
            return operation()
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
            raise
        except OSError as error:
            # shortened by what only the library's makers need, and by words at which Ray would try again
            reason = first_line(error).partition("; Details")[0].replace("AWS Error ", "")
            if not TRANSIENT.search(reason):
                raise StorageError(f"{name}: {reason}: check the address and your rights there") from error
            waited_s = time.monotonic() - started
            if waited_s + wait_s > _patience_s():
                raise StorageError(
                    f"{name}: can't be reached for {waited_s:.0f} s ({reason}): give the same command again once it "
                    "can be; it continues"
                ) from error
            if wait_s == FIRST_WAIT_S:
                logging.getLogger(__name__).warning("%s: can't be reached, trying for %g s", name, _patience_s())
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _patient(name: str) -> Callable[..., Any]:
    """The method of pyarrow's filesystems with this name, done patiently."""

    def method(self: PatientFileSystem, *arguments: Any) -> Any:
        return self._do(lambda at: getattr(at, name)(*arguments))

    return method


class PatientFileSystem(fs.FileSystemHandler):
    """pyarrow's filesystem of a URL, which waits patiently. It pickles as the URL: each process connects for itself."""

    def __init__(self, root: str, options: str) -> None:
        self.root, self.options = root, options

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatientFileSystem) and (self.root, self.options) == (other.root, other.options)

    def __hash__(self) -> int:
        return hash((self.root, self.options))

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return PatientFileSystem, (self.root, self.options)

    def _do(self, operation: Callable[[fs.FileSystem], T]) -> T:
        return _patiently(self.root, lambda: operation(connect(self.root, self.options)[0]))

    def get_type_name(self) -> str:
        return connect(self.root, self.options)[0].type_name

    normalize_path = _patient("normalize_path")
    get_file_info = get_file_info_selector = _patient("get_file_info")
    delete_dir, delete_file = _patient("delete_dir"), _patient("delete_file")
    move, copy_file = _patient("move"), _patient("copy_file")

    def create_dir(self, path: str, recursive: bool) -> None:
        self._do(lambda at: at.create_dir(path, recursive=recursive))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._do(lambda at: at.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise io.UnsupportedOperation("a bucket is never emptied")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Reader(self, path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Writer(self, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise io.UnsupportedOperation("objects are written whole")

    def send(self, file: BinaryIO, key: str) -> None:
        """Write what is in a local file to `key`, whole or not at all."""
        whole = self.get_type_name() in WHOLE_UPLOADS
        first = key if whole else f"{key}.tmp"

        def write(at: fs.FileSystem) -> None:
            file.seek(0)
            with at.open_output_stream(first) as stream:
                while piece := file.read(CHUNK_BYTES):
                    stream.write(piece)

        self._do(write)
        if not whole:
            self.move(first, key)


class _Reader:
    """A file at a URL that reads patiently, as pa.PythonFile wants it."""

    def __init__(self, handler: PatientFileSystem, path: str) -> None:
        self._handler, self._position = handler, 0
        self._file = handler._do(lambda at: at.open_input_file(path))
        self._size = self._file.size()
        self.closed = False

    def read(self, count: int = -1) -> bytes:
        left = max(self._size - self._position, 0)
        wanted = left if count < 0 else min(count, left)
        piece = self._handler._do(lambda _: self._file.read_at(wanted, self._position))
        self._position += len(piece)
        return piece

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._file.close()


class _Writer:
    """A file at a URL that is gathered in a temporary file and sent when it is closed."""

    def __init__(self, handler: PatientFileSystem, path: str) -> None:
        self._handler, self._path = handler, path
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self.closed = False

    def write(self, piece: bytes) -> int:
        return self._file.write(piece)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """It is all sent at the end."""

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with self._file as file:
                self._handler.send(file, self._path)
