"""What a training keeps of its checkpoints, and what it goes on from; at a URL in test_storage.py."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest
from commands import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from hymate.errors import UserError
from hymate.storage.paths import Location
from hymate.training import keeper
from hymate.training.keeper import SAVED, Kept, Sender, new_name, newest_whole
from hymate.training.loop import single_process
from hymate.training.telemetry import Telemetry


class Notes(Telemetry):
    """Keeps its notes."""

    def __init__(self) -> None:
        super().__init__(Path("unused"), enabled=False)
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def whole(folder: Path) -> None:
    """A checkpoint as it was written."""
    names = ("optimizer-00000-of-00001.safetensors", "model.safetensors", "state.json")
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
    sums = [f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in sorted(names)]
    (folder / "sha256-00000-of-00001.txt").write_text("".join(sums))


@pytest.mark.parametrize("num_damaged", [0, 1, 2, 3])
def test_the_newest_whole_checkpoint_is_found_and_what_is_passed_over_is_named(
    tmp_path: Path, num_damaged: int
) -> None:
    kept, notes = Kept(tmp_path, 3), Notes()
    for step in (1, 2, 3):
        whole(tmp_path / f"step-{step:09d}")
    for step in range(3, 3 - num_damaged, -1):
        (tmp_path / f"step-{step:09d}" / "model.safetensors").write_text("damaged")
    with single_process() as worker, newest_whole(kept, worker, notes) as (found, damages):
        assert found == (tmp_path / f"step-{3 - num_damaged:09d}" if num_damaged < 3 else None)
    assert len(damages) == num_damaged and all("model.safetensors is not what was written" in each for each in damages)
    assert notes.texts == ([f"{each}; the checkpoint before is used" for each in damages] if num_damaged < 3 else [])


def add(kept: Kept, scratch: Path, step: int, score: float | None) -> None:
    folder = scratch / str(step)
    folder.mkdir(parents=True)
    evaluations = [] if score is None else [{"mean": score, "step": step}]
    state = {"step": step, "score": score, "evaluations": evaluations}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "sha256-00000-of-00001.txt").write_text("the sums come last")
    kept.report({"step": step}, folder)
    assert not folder.exists(), "it is left on the local disk"


def steps(folder: Location) -> set[int]:
    return {int(path.name.split("-")[1]) for path in folder.glob("step-*")}


@settings(max_examples=50)
@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=12), num_best=st.integers(1, 4))
def test_the_best_and_the_last_are_kept(
    tmp_path_factory: pytest.TempPathFactory, scores: list[float], num_best: int
) -> None:
    scratch = tmp_path_factory.mktemp("trial")
    kept = Kept(scratch / "kept", num_best)
    for step, score in enumerate(scores, start=1):
        add(kept, scratch, step, score)
        best = sorted(range(1, step + 1), key=lambda s: (scores[s - 1], s), reverse=True)[:num_best]
        assert steps(kept.folder) >= {*best, step} and len(steps(kept.folder)) <= num_best + 1
        assert [metrics["step"] for _, metrics in kept.best_first()][:num_best] == best
        assert kept.last_step() == step
    assert kept.names() == sorted((path.name for path in kept.folder.iterdir() if path.name != SAVED), reverse=True)


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", 1)
    assert kept.best_first() == [] and kept.last_step() is None and not kept.names()
    half = kept.folder / new_name(1)
    half.mkdir(parents=True)
    (half / "state.json").write_text('{"step": 1, "score": 0.5, "evaluations": [{"mean": 0.5, "step": 1}]}')
    assert kept.best_first() == [] and kept.last_step() is None and not kept.names()
    with single_process() as worker, newest_whole(kept, worker, Notes()) as (found, damages):
        assert found is None and not damages
    add(kept, tmp_path, 2, 0.5)
    assert {path.name for path in kept.folder.iterdir()} == {*kept.names(), SAVED} and steps(kept.folder) == {2}


def parts(scratch: Path, step: int) -> list[Path]:
    """What two workers have written of a checkpoint."""
    folders = [scratch / f"{step}-of-{rank}" for rank in range(2)]
    for rank, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / f"sha256-0000{rank}-of-00002.txt").write_text("the sums come last")
    state = {"step": step, "score": 0.5, "evaluations": [{"mean": 0.5, "step": step}]}
    (folders[0] / "state.json").write_text(json.dumps(state))
    return folders


def test_a_checkpoint_counts_once_all_workers_have_written_their_parts(tmp_path: Path) -> None:
    kept, name = Kept(tmp_path / "kept", 2), new_name(1)
    first, second = parts(tmp_path, 1)
    there: list[str] = []

    def check() -> None:
        there.extend(path.name for path in (kept.folder / name).iterdir())
        assert not kept.names()

    adding = threading.Thread(target=kept.add, args=(first, name, check))
    adding.start()
    wait_until((kept.folder / name / "state.json").exists, "the first worker's files are there")
    assert not kept.names() and not there
    kept.add(second, name)
    adding.join()
    assert kept.names() == [name] and sorted(there) == ["sha256-00001-of-00002.txt", "state.json"]
    assert not first.exists() and not second.exists()


def test_a_checkpoint_that_does_not_get_whole_costs_none_that_is(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", 1)
    add(kept, tmp_path, 1, 0.5)
    before = kept.names()

    def taken_over() -> None:
        assert kept.names() == before
        raise UserError("another command has taken this run over")

    folder = tmp_path / "part"
    whole(folder)
    with pytest.raises(UserError, match="taken this run over"):
        kept.add(folder, new_name(2), taken_over)
    assert kept.names() == before and kept.last_step() == 1
    assert [path.name for path in kept.folder.glob("step-*") if any(path.iterdir())] == before, "its files are left"


def test_a_run_that_cannot_send_its_checkpoint_ends_and_leaves_none_on_the_local_disk(tmp_path: Path) -> None:
    def taken_over() -> None:
        raise UserError("another command has taken this run over")

    with single_process() as worker:
        sender = Sender(Kept(tmp_path / "kept", 1), worker, taken_over)
        sender.look()  # nothing is wrong yet
        whole(tmp_path / "part")
        sender.report({"step": 1}, tmp_path / "part")
        for raises in (sender.wait, sender.look, lambda: sender.report({"step": 2}, tmp_path / "next")):
            with pytest.raises(UserError, match="taken this run over"):
                raises()
    assert not (tmp_path / "part").exists()


def test_where_a_run_was_only_stopped_is_kept_until_it_has_gone_on(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", 1, "min")
    add(kept, tmp_path, 1, 0.5)
    add(kept, tmp_path, 2, None)
    assert steps(kept.folder) == {1, 2} and [metrics["step"] for _, metrics in kept.best_first()] == [1]
    add(kept, tmp_path, 3, 0.7)
    assert steps(kept.folder) == {1, 3}


def test_one_that_is_removed_only_half_is_none_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(tmp_path / "kept", 1)
    monkeypatch.setattr(keeper, "remove_tree", lambda folder: None)  # as if the process were killed
    for step, score in enumerate((0.5, 0.7, 0.6), start=1):
        add(kept, tmp_path, step, score)
    assert [int(name.split("-")[1]) for name in kept.names()] == [3, 2]


def test_a_checkpoint_is_replaced_by_the_same_step_done_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", 2)
    for scratch in ("first", "again"):
        add(kept, tmp_path / scratch, 1, 0.5)
    assert len(kept.names()) == 1


def test_a_run_without_any_checkpoint_left_says_so(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", 2)
    kept.require_any_left()  # nothing was there yet
    add(kept, tmp_path, 1, 0.5)
    kept.require_any_left()
    for name in kept.names():
        shutil.rmtree(kept.folder / name)
    with pytest.raises(UserError, match="no checkpoint is left in "):
        kept.require_any_left()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"score": null, "step": 1, "evaluations": []}'])
def test_a_state_that_cannot_be_read_is_not_the_best(tmp_path: Path, text: str) -> None:
    kept = Kept(tmp_path / "kept", 2)
    add(kept, tmp_path, 1, 0.5)
    add(kept, tmp_path, 2, 0.9)
    (kept.folder / kept.names()[0] / "state.json").write_text(text)
    assert [metrics["step"] for _, metrics in kept.best_first()] == [1]
