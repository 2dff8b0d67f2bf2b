"""What a search's trial keeps of its checkpoints; at a URL in test_storage.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymate.storage import Location
from hymate.training.resume import Kept


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
