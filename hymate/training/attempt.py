"""Which command owns a run, and whether that command wants it to stop: a small file in the run's folder.

Workers outlive a killed command for some seconds, on a running cluster for longer, and would write checkpoints into the
run while the same command, started again, continues it. The file therefore holds the id of the command that came last,
and workers of any other report nothing more. It works wherever runs are, for it needs no lock. A command that is
asked to end says so in the file, too.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from hymate.errors import UserError
from hymate.storage.paths import Location, UrlPath, write_text

FILE = "attempt.json"
SUPERSEDED = "another command has taken this run over"
LOOK_EVERY_S, LOOK_AT_URL_EVERY_S = 0.2, 5.0


class Superseded(UserError):
    """Another command has taken the run over."""


@dataclass(frozen=True)
class Attempt:
    """One command's hold on a run; it goes to the workers."""

    run_path: Location
    id: str

    @classmethod
    def begin(cls, run_path: Location) -> Attempt:
        """Take the run over from any command before."""
        attempt = cls(run_path, uuid.uuid4().hex)
        attempt._write(stop=False)
        return attempt

    def superseded(self) -> bool:
        """Whether the run belongs to another command by now."""
        return self._read()["id"] != self.id

    def check(self) -> None:
        """Raises Superseded where the run belongs to another command by now."""
        if self.superseded():
            raise Superseded(f"{self.run_path}: {SUPERSEDED}")

    @contextmanager
    def watched(self) -> Iterator[Callable[[], bool]]:
        """A cheap function that says whether the run is to stop, and raises Superseded as `check` does.

        A thread looks at the file now and then while the block runs.
        """
        ending = threading.Event()
        seen = {"id": self.id, "stop": False}

        def look() -> None:
            while not ending.wait(_interval_s(self.run_path)):
                with suppress(OSError, ValueError, UserError):  # what the run needs of the storage fails by itself
                    seen.update(self._read())

        def stop() -> bool:
            if seen["id"] != self.id:
                raise Superseded(f"{self.run_path}: {SUPERSEDED}")
            return bool(seen["stop"])

        threading.Thread(target=look, daemon=True).start()
        try:
            yield stop
        finally:
            ending.set()

    def ask_to_stop(self) -> bool:
        """Have the workers save and stop; false where the run belongs to another command by now."""
        if self.superseded():
            return False
        self._write(stop=True)
        return True

    def _read(self) -> dict[str, Any]:
        return json.loads((self.run_path / FILE).read_text())

    def _write(self, stop: bool) -> None:
        write_text(json.dumps({"id": self.id, "stop": stop}), self.run_path / FILE)


def _interval_s(path: Location) -> float:
    return LOOK_AT_URL_EVERY_S if isinstance(path, UrlPath) else LOOK_EVERY_S
