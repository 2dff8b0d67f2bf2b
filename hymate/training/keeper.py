"""The checkpoint that a run continues from: the newest whole one.

Ray Train keeps the checkpoints of pretraining and a list of them, which is rebuilt where it can't be used. `Kept` keeps
those of a search's trials.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pyarrow.fs import FileSelector, FileType

from hymate.errors import UserError
from hymate.storage.paths import Location, local_copy, naming_a_full_disk, new_folder, remove_tree, write_text
from hymate.training import checkpoint
from hymate.training.checkpoint import Damaged
from hymate.training.loop import Worker, agreed, anyone
from hymate.training.telemetry import Telemetry

LIST = "checkpoint_manager_snapshot.json"
STEP = "step-"


def mend_list(folder: Location, mode: str) -> None:
    """Rebuild Ray Train's list of a run's checkpoints where Ray could not continue from it; prints a line.

    Ray overwrites its list in place, so that a crash or a full disk can leave half of it; a checkpoint that it names
    may have been deleted; another version of Ray may not read it. All that it says is in the checkpoints, too.
    Raises UserError where there is none.
    """
    import ray

    file = folder / LIST
    if not file.is_file():
        return
    there = {path.name for path in folder.glob("checkpoint_*") if path.is_dir()}
    try:
        found = json.loads(file.read_text())
        listed = {kept["checkpoint_dir_name"] for kept in found["checkpoint_results"]}
        if found["ray_version"] == ray.__version__ and listed <= there:
            return
    except (ValueError, KeyError, TypeError):
        pass  # no JSON, or not what Ray writes
    stored = list(_states(folder, "checkpoint_"))
    if not stored:
        raise UserError(f"no checkpoint is left in {folder}: put a copy back, or delete the run to begin again")
    kept = [{"checkpoint_dir_name": each.folder.name, "metrics": each.metrics} for each in stored]
    worst_first = sorted(range(len(kept)), key=lambda i: stored[i].rank(mode))
    mended = {
        "ray_version": ray.__version__,
        "checkpoint_results": [kept[i] for i in worst_first],
        "checkpoint_report_indices": worst_first,
        "latest_checkpoint_result": kept[-1],
        "current_report_index": len(kept),
        "pending_training_results": [],
        "pending_validation_specs": [],
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    write_text(json.dumps(mended), file)
    print(f"{folder}: Ray's list of checkpoints could not be used; it was rebuilt from what is there", flush=True)


class _State(NamedTuple):
    """The state that a checkpoint holds; score and evaluation are missing where a run was only stopped."""

    folder: Location
    step: int
    score: float | None
    metrics: dict[str, float]

    def rank(self, mode: str) -> tuple[float, int]:
        """Greater is better; of equals the later one."""
        sign = 1 if mode == "max" else -1
        return (-math.inf if self.score is None else sign * self.score), self.step


def _states(folder: Location, prefix: str) -> Iterator[_State]:
    """Of the checkpoints of a folder, in the order of time; those that cannot be read are left out."""
    for name in sorted(path.name for path in folder.glob(f"{prefix}*")):
        path = folder / name
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
            state = json.loads((path / checkpoint.STATE).read_text())
            step, score = int(state["step"]), state["score"]
            metrics = {"step": step} if score is None else state["evaluations"][-1]
            yield _State(path, step, score if score is None else float(score), metrics)


@contextmanager
def newest_whole(
    stored: Iterable[tuple[str, AbstractContextManager[str | Path]]], worker: Worker, telemetry: Telemetry
) -> Iterator[tuple[Path | None, list[str]]]:
    """Local folder of the first of some checkpoints, the newest first, that is not damaged, and what is wrong with
    those before it; None where none is whole.

    stored: names, and what makes each a local folder. Collective; prints which are passed over.
    """
    damages: list[str] = []
    for name, opened in stored:
        with opened as folder:
            damage = ""
            try:
                checkpoint.verify(Path(folder))
            except Damaged as error:
                damage = str(error)
            if not anyone(bool(damage), worker):
                for passed_over in damages:
                    telemetry.note(f"{passed_over}; the checkpoint before is used")
                yield Path(folder), damages
                return
            damages.append(damage or f"{name} is damaged on another worker")
    yield None, damages


def newest_first(latest: Any, worker: Worker) -> Iterator[tuple[str, AbstractContextManager[str]]]:
    """Ray's latest checkpoint and then the others in its folder, for `newest_whole`; collective."""
    parent, _, newest = latest.path.rpartition("/")
    yield newest, latest.as_directory()
    names = [
        info.base_name
        for info in latest.filesystem.get_file_info(FileSelector(parent))
        if info.type == FileType.Directory and info.base_name.startswith("checkpoint_") and info.base_name != newest
    ]
    for name in agreed(sorted(names, reverse=True), worker):  # in the order of time
        yield name, type(latest)(f"{parent}/{name}", latest.filesystem).as_directory()


@dataclass(frozen=True)
class Kept:
    """The checkpoints of one process's training in `folder`: the last one, and the `num_best` with the best scores.

    A search's trial is continued from them alone, for what it has reported is in each (`engine.Standing.evaluations`).
    """

    folder: Location
    num_best: int
    mode: Literal["min", "max"] = "max"

    def newest_first(self) -> Iterator[tuple[str, AbstractContextManager[Path]]]:
        """For `newest_whole`."""
        names = sorted((path.name for path in self.folder.glob(f"{STEP}*")), reverse=True)
        return ((name, local_copy(self.folder / name)) for name in names)

    def add(self, checkpoint_folder: Path, step: int) -> None:
        """Take a checkpoint over, whole or not at all, and remove those that are not kept any more."""
        target = self.folder / f"{STEP}{step:09d}"
        with naming_a_full_disk(target), new_folder(target, checkpoint.sums_name(0, 1)) as new:
            for file in checkpoint_folder.iterdir():
                shutil.move(file, new)
        for path, _ in self.best_first()[self.num_best :]:
            if path != target:
                remove_tree(path)
        for path in self.folder.glob(f".{STEP}*"):  # of a process that was killed here
            remove_tree(path)

    def best_first(self) -> list[tuple[Location, dict[str, float]]]:
        """Checkpoints with the metrics of their evaluations; those whose state cannot be read are left out."""
        scored = [state for state in _states(self.folder, STEP) if state.score is not None]
        return [(s.folder, s.metrics) for s in sorted(scored, key=lambda s: s.rank(self.mode), reverse=True)]

    def last_step(self) -> int | None:
        """That of the last evaluation."""
        return max((state.step for state in _states(self.folder, STEP)), default=None)
