"""The readers by name, and what happens with one mutated input."""

from __future__ import annotations

import contextlib
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fuzz.bundle import Bundles
from fuzz.challenge import Challenge
from fuzz.histories import Prepared
from fuzz.labels import Labels
from fuzz.meds import Meds
from fuzz.reader import SUBJECT, VALUE, Files, Reader, require
from hymate.errors import UserError

GOOD = ("refused", "accepted", "accepted as PyArrow reads it")
READERS: dict[str, Callable[[Path], Reader]] = {
    reader.name: reader for reader in (Meds, Challenge, Labels, Prepared, Bundles)
}


class Bench:
    """A reader and a folder in which its inputs are laid out one after the other."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.reader = READERS[name](scratch)
        self.folder = scratch / "input"
        for file, data in self.reader.files.items():
            self._write(file, data)
        require(self.run({}) == "accepted", "a sound input is refused")

    def _write(self, file: str, data: bytes) -> None:
        (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / file).write_bytes(data)

    def inputs(self, seed: int) -> Files:
        """The changed files of an input."""
        return self.reader.mutate(self._rng(seed))

    def _rng(self, seed: int) -> random.Random:
        return random.Random(f"{self.reader.name} {seed}")

    def run(self, changed: Files, seed: int = 0) -> str:
        """One of GOOD. Raises Finding, or whatever else the reader let through."""
        for file, data in changed.items():
            self._write(file, data)
        try:
            try:
                self.reader.check(self.folder, self._rng(seed), "polars")
                return "accepted"
            except (UserError, KeyboardInterrupt):
                raise
            except BaseException:  # a panic of Polars is no Exception
                self.reader.check(self.folder, self._rng(seed), "pyarrow")
                return "accepted as PyArrow reads it"
        except UserError as error:
            require_one_clear_line(str(error))
            return "refused"
        finally:
            for file in changed:
                (self.folder / file).unlink()
                if file in self.reader.files:
                    self._write(file, self.reader.files[file])


def require_one_clear_line(text: str) -> None:
    require(text and "\n" not in text and "\r" not in text, "an error of several lines")
    require(len(text) < 1000, "a very long error")
    require(text.isprintable(), "an error with control characters")
    require(str(SUBJECT)[:4] not in re.sub(r"\S*/\S*", "", text), "an error that quotes a subject's id")
    require(str(VALUE)[:4] not in text, "an error that quotes a value")


@contextlib.contextmanager
def bench(name: str) -> Iterator[Bench]:
    memory = Path("/dev/shm")  # files of a moment; preparing waits for the disk a dozen times
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as scratch:
        yield Bench(name, Path(scratch))
