"""What a run goes on from: Ray's list of its checkpoints, mended where it is no use, and the newest that is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileType

from hymate.config import UserError
from hymate.storage import Location, write_text
from hymate.telemetry import Telemetry
from hymate.training import checkpoint
from hymate.training.checkpoint import Damaged
from hymate.training.engine import Unrecoverable, Worker, agreed, anyone

LIST = "checkpoint_manager_snapshot.json"


def mend_list(folder: Location, score: str, mode: str) -> None:
    """Write Ray Train's list of a run's checkpoints anew where Ray could not go on from it; says so in a line.

    Ray overwrites its list in place, so that a crash or a full disk can leave half of it; a checkpoint that it names
    may have been deleted; another version of Ray may not read it. All that it says is in the checkpoints, too.
    Raises UserError where there is none.
    """
    import ray

    file = folder / LIST
    if not file.is_file():
        return
    names = sorted(path.name for path in folder.glob("checkpoint_*") if path.is_dir())  # in the order of time
    try:
        found = json.loads(file.read_text())
        listed = {kept["checkpoint_dir_name"] for kept in found["checkpoint_results"]}
        if found["ray_version"] == ray.__version__ and listed <= set(names):
            return
    except (ValueError, KeyError, TypeError):
        pass  # no JSON, or not what Ray writes
    kept, scores = [], []
    for name in names:
        with suppress(OSError, ValueError, KeyError, TypeError):  # what is damaged is no use
            state = json.loads((folder / name / checkpoint.STATE).read_text())
            scored = {} if state["score"] is None else {score: state["score"]}
            metrics = {**scored, "step": state["step"], "epoch": state["cursor"].get("epoch", 0)}
            kept.append({"checkpoint_dir_name": name, "metrics": metrics})
            scores.append(-math.inf if state["score"] is None else state["score"] * (1 if mode == "max" else -1))
    if not kept:
        raise UserError(f"no checkpoint is left in {folder}: put a copy back, or delete the run to begin again")
    worst_first = sorted(range(len(kept)), key=scores.__getitem__)
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
    print(f"{folder}: Ray's list of the checkpoints was no use; it was written anew from what is there", flush=True)


@contextmanager
def newest_whole(latest: Any, worker: Worker, telemetry: Telemetry) -> Iterator[Path | None]:
    """Local folder of Ray's latest checkpoint, or where that is damaged of the newest one beside it that is not.

    Collective. None where Ray has none; raises Unrecoverable where none is whole.
    """
    if latest is None:
        yield None
        return
    damages = []
    for candidate in _newest_first(latest, worker):
        with candidate.as_directory() as folder:
            damage = ""
            try:
                checkpoint.verify(Path(folder))
            except Damaged as error:
                damage = str(error)
            if not anyone(bool(damage), worker):
                yield Path(folder)
                return
            damages.append(damage or f"{Path(candidate.path).name} is damaged on another worker")
            telemetry.note(f"{damages[-1]}; the checkpoint before is used")
    raise Unrecoverable(
        f"no checkpoint in {Path(latest.path).parent} is whole ({damages[0]}): put a copy back, or delete the run to "
        "begin again"
    )


def _newest_first(latest: Any, worker: Worker) -> Iterator[Any]:
    """Ray's latest checkpoint and then the others in its folder; their names are in the order of time."""
    parent, _, newest = latest.path.rpartition("/")
    yield latest
    names = [
        info.base_name
        for info in latest.filesystem.get_file_info(FileSelector(parent))
        if info.type == FileType.Directory and info.base_name.startswith("checkpoint_") and info.base_name != newest
    ]
    for name in agreed(sorted(names, reverse=True), worker):
        yield type(latest)(f"{parent}/{name}", latest.filesystem)
