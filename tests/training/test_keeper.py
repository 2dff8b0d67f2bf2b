"""What a search's trial keeps of its checkpoints; at a URL in test_storage.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymate.storage.paths import Location
from hymate.training.keeper import Kept, newest_whole
from hymate.training.loop import single_process
from hymate.training.telemetry import Telemetry


class Notes(Telemetry):
    """Keeps what is told."""

    def __init__(self) -> None:
        super().__init__(Path("unused"), enabled=False)
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def whole(folder: Path) -> None:
    """A checkpoint as it was written."""
    names = ("optimizer-00000-of-00001.safetensors", "model.safetensors", "state.json")
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
    sums = [f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in sorted(names)]
    (folder / "sha256-00000-of-00001.txt").write_text("".join(sums))


@pytest.mark.parametrize("num_damaged", [0, 1, 2, 3])
def test_the_newest_whole_checkpoint_is_found_and_what_is_passed_over_is_told(tmp_path: Path, num_damaged: int) -> None:
    kept, notes = Kept(tmp_path, 3), Notes()
    for step in (1, 2, 3):
        whole(tmp_path / f"step-{step:09d}")
    for step in range(3, 3 - num_damaged, -1):
        (tmp_path / f"step-{step:09d}" / "model.safetensors").write_text("damaged")
    with single_process() as worker, newest_whole(kept.newest_first(), worker, notes) as (found, damages):
        assert found == (tmp_path / f"step-{3 - num_damaged:09d}" if num_damaged < 3 else None)
    assert len(damages) == num_damaged and all("model.safetensors is not what was written" in each for each in damages)
    assert notes.told == ([f"{each}; the checkpoint before is used" for each in damages] if num_damaged < 3 else [])


def add(kept: Kept, scratch: Path, step: int, score: float) -> None:
    folder = scratch / str(step)
    folder.mkdir(parents=True)
    state = {"step": step, "score": score, "evaluations": [{"mean": score, "step": step}]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "sha256-00000-of-00001.txt").write_text("the sums come last")
    kept.add(folder, step)


def steps(folder: Location) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in folder.glob("step-*")}


@settings(max_examples=50, deadline=None)
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
    assert [name for name, _ in kept.newest_first()] == sorted(
        (path.name for path in kept.folder.iterdir()), reverse=True
    )


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", 1)
    assert kept.best_first() == [] and kept.last_step() is None and not list(kept.newest_first())
    half = tmp_path / "kept" / ".step-000000001-x" / "new"
    half.mkdir(parents=True)
    assert kept.last_step() is None and not list(kept.newest_first())
    add(kept, tmp_path, 2, 0.5)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step-000000002"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"score": null, "step": 1, "evaluations": []}'])
def test_a_state_that_cannot_be_read_is_not_the_best(tmp_path: Path, text: str) -> None:
    kept = Kept(tmp_path / "kept", 2)
    add(kept, tmp_path, 1, 0.5)
    add(kept, tmp_path, 2, 0.9)
    (tmp_path / "kept" / "step-000000002" / "state.json").write_text(text)
    assert [metrics["step"] for _, metrics in kept.best_first()] == [1]
