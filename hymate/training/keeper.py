"""The checkpoints of a training: what is kept, how it gets there, and what a run goes on from.

Each checkpoint is a folder `step-STEP-ID`, whose ID is new each time, so that no two processes ever write into the same
one. Each worker writes its part, and its checksums last; the first worker writes its own when those of all others are
there. A folder without them is unfinished and does not count.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from hymate import machine
from hymate.errors import UserError
from hymate.storage.paths import Location, UrlPath, download, hand_over, naming_a_full_disk, remove_tree, write_text
from hymate.training import checkpoint
from hymate.training.checkpoint import Damaged
from hymate.training.loop import Worker, agreed, anyone
from hymate.training.telemetry import Telemetry

STEP, SAVED = "step-", "saved"
SUMS, LAST = "sha256-*-of-*.txt", "sha256-00000-of-*.txt"
LOOK_EVERY_S, LOOK_AT_URL_EVERY_S = 0.1, 1.0


class _State(NamedTuple):
    """What a checkpoint says about itself; score and metrics are missing where the run was only stopped there."""

    folder: Location
    step: int
    score: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Kept:
    """The checkpoints of a training in `folder`: the last one, and the `num_best` with the best scores."""

    folder: Location
    num_best: int
    mode: Literal["min", "max"] = "max"

    def folders(self, finished: bool) -> list[Location]:
        """Those that were, or were not, written to their end."""
        return [path for path in self.folder.glob(f"{STEP}*") if any(path.glob(LAST)) is finished]

    def names(self) -> list[str]:
        """Those that were written to their end, the newest first."""
        return sorted((path.name for path in self.folders(finished=True)), reverse=True)

    def best_first(self) -> list[tuple[Location, dict[str, float]]]:
        """Checkpoints with the metrics of their evaluations; those whose state cannot be read are left out."""
        return [(state.folder, state.metrics) for state in self._ranked(self._states())]

    def last_step(self) -> int | None:
        """The step of the newest."""
        return max((state.step for state in self._states()), default=None)

    def require_any_left(self) -> None:
        """Raises UserError where there have been checkpoints and none is left: the run would begin again."""
        if (self.folder / SAVED).is_file() and not self.names():
            raise UserError(
                f"no checkpoint is left in {self.folder}: put a copy back, or delete the run to begin again"
            )

    def add(self, part: Path, name: str, check: Callable[[], None] = lambda: None) -> None:
        """Take over one worker's part of a checkpoint, a local folder, which goes.

        name: from `new_name`, the same on all workers. The first worker's part waits for the others' and for `check`,
        which raises where the checkpoint is not to count. Then it is whole, and those that are not kept go.
        """
        target, files = self.folder / name, sorted(part.iterdir())
        (sums,) = part.glob(SUMS)
        first = sums.match(LAST)
        try:
            with naming_a_full_disk(target):
                for file in files:
                    if file != sums:
                        hand_over(file, target / file.name)
                if first:
                    self._wait_for_others(target, int(sums.stem.rpartition("-")[2]) - 1)
                    check()
                write_text(sums.read_text(), target / sums.name)
        except BaseException:
            with suppress(OSError, UserError):  # the disk may be full of them
                for file in files:
                    (target / file.name).unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        if first:
            self._keep(target)

    def _wait_for_others(self, target: Location, num_others: int) -> None:
        """For as long as it takes: whatever ends one of the workers ends all of them."""
        while num_others and len(list(target.glob(SUMS))) < num_others:
            time.sleep(LOOK_AT_URL_EVERY_S if isinstance(target, UrlPath) else LOOK_EVERY_S)

    def report(self, metrics: dict[str, float], part: Path) -> None:
        """`loop.Report` of a training of one process, which waits until the checkpoint is whole."""
        self.add(part, new_name(int(metrics["step"])))

    def _keep(self, newest: Location) -> None:
        if not (self.folder / SAVED).is_file():
            write_text("", self.folder / SAVED)
        found = self._states()  # one that cannot be read is left alone: the storage may be at fault
        step = int(newest.name.split("-")[1])
        best = self._ranked([state for state in found if state.step != step or state.folder == newest])
        kept = {newest, *(state.folder for state in best[: self.num_best])}
        for state in found:
            if state.folder not in kept:
                for file in state.folder.glob(LAST):  # first, for this may be killed half-way
                    file.unlink()
                remove_tree(state.folder)

    def _ranked(self, states: list[_State]) -> list[_State]:
        """Those with a score, the best first; of equals the later one."""
        sign = 1 if self.mode == "max" else -1
        scored = [(sign * state.score, state.step, state) for state in states if state.score is not None]
        return [state for *_, state in sorted(scored, key=lambda each: each[:2], reverse=True)]

    def _states(self) -> list[_State]:
        found = []
        for path in self.folders(finished=True):
            with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
                state = json.loads((path / checkpoint.STATE).read_text())
                step, score = int(state["step"]), state["score"]
                metrics = {"step": step} if score is None else state["evaluations"][-1]
                found.append(_State(path, step, score if score is None else float(score), metrics))
        return found


def new_name(step: int) -> str:
    """The name of a checkpoint to be written; names sort by step."""
    return f"{STEP}{step:09d}-{uuid.uuid4().hex[:8]}"


class Sender:
    """Sends the checkpoints of several workers to where they are kept, while training goes on.

    check: raises where the run belongs to others by now. One checkpoint at a time is under way, for a slow storage must
    not fill the local disk.
    """

    def __init__(self, kept: Kept, worker: Worker, check: Callable[[], None]) -> None:
        self.kept, self.worker, self.check = kept, worker, check
        self._sent = Future[None]()
        self._sent.set_result(None)

    def report(self, metrics: dict[str, float], part: Path) -> None:
        """Take over this worker's part of a checkpoint, once the one before is sent (`loop.Report`); collective."""
        self.wait()
        self._sent = sent = Future[None]()
        name = agreed(new_name(int(metrics["step"])), self.worker)

        def send() -> None:
            try:
                self.kept.add(part, name, self.check)
                sent.set_result(None)
            except BaseException as error:
                sent.set_exception(error)

        threading.Thread(target=send, daemon=True).start()

    def wait(self) -> None:
        """Until this worker's part of the last checkpoint is sent, the first's when it is whole. Raises what failed."""
        self._sent.result()

    def look(self) -> None:
        """Raises what failed by now."""
        if self._sent.done():
            self._sent.result()


@contextmanager
def newest_whole(kept: Kept, worker: Worker, telemetry: Telemetry) -> Iterator[tuple[Path | None, list[str]]]:
    """Local folder of the newest checkpoint that is not damaged, and what is wrong with those after it; None where none
    is whole.

    Collective; notes which are passed over.
    """
    if worker.rank == 0:
        for half_written in kept.folders(finished=False):  # by processes that were killed
            remove_tree(half_written)
    damages: list[str] = []
    for name in agreed(kept.names() if worker.rank == 0 else None, worker):
        with _on_this_machine(kept.folder / name, worker) as folder:
            damage = ""
            try:
                checkpoint.verify(folder)
            except Damaged as error:
                damage = str(error)
            if not anyone(bool(damage), worker):
                for passed_over in damages:
                    telemetry.note(f"{passed_over}; the checkpoint before is used")
                yield folder, damages
                return
            damages.append(damage or f"{name} is damaged on another worker")
    yield None, damages


@contextmanager
def _on_this_machine(place: Location, worker: Worker) -> Iterator[Path]:
    """A checkpoint as a local folder: at a URL, one copy for all workers of a machine; collective."""
    if isinstance(place, Path):
        yield place
        return
    scratch = machine.shared_temporary_folder() / f"hymate-{agreed(uuid.uuid4().hex, worker)}"
    with machine.held_folder(scratch) if worker.local_rank == 0 else nullcontext():
        if worker.local_rank == 0:
            download(place, scratch / place.name)
        anyone(False, worker)  # all are there
        yield scratch / place.name
