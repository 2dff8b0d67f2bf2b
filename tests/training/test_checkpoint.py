"""Checkpoints: exact resume, any number of workers, any ZeRO stage, no pickle, and damage that is found."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import TRAIN, RandomRows, run_training, run_workers
from safetensors.torch import load_file

from hymate.model.batch import Batch
from hymate.training import loop
from hymate.training.checkpoint import Damaged, read_verified_weights, verify
from hymate.training.deepspeed import AdamW
from hymate.training.loop import Unrecoverable, Worker

CONFIG = replace(TRAIN, max_steps=4, eval_every=2)
STAGES = (0, 1, 2, 3)
CROSSINGS = ((0, 2), (1, 3), (3, 0))
FILES = [
    "state.json",
    "model.safetensors",
    "optimizer-00000-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors",
    "sha256-00000-of-00002.txt",
    "sha256-00001-of-00002.txt",
]


def _train(worker: Worker, folder: Path, stage: int, resume: Path | None, out: Path) -> None:
    config = replace(CONFIG, num_workers=worker.world_size, zero_stage=stage)
    recorder, _ = run_training(worker, config, folder, resume=resume)
    if worker.rank == 0:
        out.write_text(json.dumps(recorder.points))


def _undisturbed_and_resumed(worker: Worker, root: Path) -> None:
    """Each stage straight through, then again from its own middle; then from the middle of another stage."""
    for stage in STAGES:
        _train(worker, root / f"whole-{stage}", stage, None, root / f"whole-{stage}.json")
        middle = root / f"whole-{stage}" / "step-2"
        _train(worker, root / f"again-{stage}", stage, middle, root / f"again-{stage}.json")
    for before, after in CROSSINGS:
        middle, name = root / f"whole-{before}" / "step-2", f"cross-{before}-{after}"
        _train(worker, root / name, after, middle, root / f"{name}.json")


def _resumed_alone(worker: Worker, root: Path, out: Path) -> None:
    for stage in (2, 3):
        name = f"alone-{stage}"
        _train(worker, out / name, stage, root / f"whole-{stage}" / "step-2", out / f"{name}.json")


def _standing_still(worker: Worker, folder: Path) -> None:
    """Learning too slowly to matter, and continued after its patience has run out."""
    config = replace(CONFIG, num_workers=1, max_steps=9, eval_every=1, patience=2, learning_rate=1e-30)
    first, _ = run_training(worker, config, folder)
    second, _ = run_training(worker, config, folder, resume=folder / "step-3")
    (folder / "steps.json").write_text(json.dumps([list(run.points.get("train/loss", {})) for run in (first, second)]))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_workers(_undisturbed_and_resumed, 2, folder)
    return folder


def points(path: Path, name: str = "train/loss") -> dict[int, float]:
    return {int(step): value for step, value in json.loads(path.read_text())[name].items()}


def final_state(folder: Path, step: int = 4) -> dict[str, torch.Tensor]:
    """Weights and both moments, whatever the number of files they are in."""
    files = sorted((folder / f"step-{step}").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_repeats_the_undisturbed_one_bit_for_bit(root: Path, stage: int) -> None:
    whole, again = points(root / f"whole-{stage}.json"), points(root / f"again-{stage}.json")
    assert again == {step: whole[step] for step in (3, 4)}
    expected, actual = final_state(root / f"whole-{stage}"), final_state(root / f"again-{stage}")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), CROSSINGS)
def test_a_run_goes_on_at_another_zero_stage(root: Path, before: int, after: int) -> None:
    _close(final_state(root / f"cross-{before}-{after}"), final_state(root / f"whole-{before}"))
    whole, crossed = points(root / f"whole-{before}.json"), points(root / f"cross-{before}-{after}.json")
    assert crossed == pytest.approx({step: whole[step] for step in (3, 4)}, rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_workers(root: Path, tmp_path: Path) -> None:
    run_workers(_resumed_alone, 1, root, tmp_path)
    for stage in (2, 3):
        whole, alone = points(root / f"whole-{stage}.json"), points(tmp_path / f"alone-{stage}.json")
        assert alone == pytest.approx({step: whole[step] for step in (3, 4)}, rel=1e-4)
        _close(final_state(tmp_path / f"alone-{stage}"), final_state(root / f"whole-{stage}"))


@pytest.mark.slow
def test_a_checkpoint_says_where_the_run_stands_and_holds_no_pickle(root: Path) -> None:
    folder = root / "whole-2" / "step-4"
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    assert state["step"] == 4 and state["world_size"] == 2
    assert state["cursor"] == {"epoch": 0, "block": 0, "row": 4 * CONFIG.rows_per_step}
    assert {file.name for file in folder.iterdir()} == set(FILES)


# ------------------------------------------------------------------------------------------------------- damage


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@settings(max_examples=20)
@given(data=st.data())
def test_a_file_that_is_gone_cut_short_or_changed_in_one_bit_is_found(
    root: Path, name: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(root / "whole-2" / "step-4", Path(scratch) / "checkpoint_1"))
        verify(folder)
        file = folder / name
        content = bytearray(file.read_bytes())
        damage = data.draw(st.sampled_from(["missing", "cut", "bit"]))
        if damage == "missing":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            file.write_bytes(content)
        with pytest.raises(Damaged, match=r"^checkpoint_1 is damaged: ") as caught:
            verify(folder)
        assert "\n" not in str(caught.value)
        if name == "model.safetensors":
            with pytest.raises(Damaged):
                read_verified_weights(folder)


@pytest.mark.slow
def test_the_checksums_are_those_of_sha256sum(root: Path) -> None:
    folder = root / "whole-2" / "step-4"
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    lines = [line for path in sorted(folder.glob("sha256-*")) for line in path.read_text().splitlines()]
    assert sorted(lines) == sorted(f"{found[name]}  {name}" for name in FILES[:4])


# ---------------------------------------------------------------------------------------------- skipping, stopping


class Poisoned(RandomRows):
    """One row of some steps has an infinite gap; on two workers it is the second one's."""

    def __init__(self, steps: set[int]) -> None:
        self.bad = {(step - 1) * CONFIG.rows_per_step + 1 for step in steps}

    def _row(self, i: int) -> Batch:
        row = super()._row(i)
        if i in self.bad:
            row.gap_hours_L[0] = torch.inf
        return row


class Fused(AdamW):
    """A GPU's, whose kernel looks by itself whether a gradient was not finite."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "fused": True})


SKIPPING = {**{str(stage): stage for stage in STAGES}, "fused": 0}


def _skipping(worker: Worker, root: Path) -> None:
    for case, stage in SKIPPING.items():
        config = replace(CONFIG, num_workers=worker.world_size, zero_stage=stage, max_steps=5, eval_every=1)
        whole, again = (f"skipping-{case}", f"skipping-again-{case}")
        with mock.patch.object(loop, "AdamW", Fused if case == "fused" else AdamW):
            for name, resume in ((whole, None), (again, root / whole / "step-3")):
                recorder, _ = run_training(worker, config, root / name, resume=resume, rows=Poisoned({1, 3}))
                if worker.rank == 0:
                    (root / f"{name}.json").write_text(json.dumps(recorder.points))
            try:
                run_training(worker, replace(config, max_skipped=1), root / "never", rows=Poisoned({3, 4, 5}))
            except Unrecoverable as error:
                (root / f"said-{case}-{worker.rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipping")
    run_workers(_skipping, 2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", SKIPPING)
def test_a_step_that_is_not_finite_changes_nothing_on_any_worker(skipping: Path, case: str) -> None:
    folder = skipping / f"skipping-{case}"
    first, second, third, fourth = (final_state(folder, step) for step in (1, 2, 3, 4))
    assert all(not tensor.any() for name, tensor in first.items() if name.startswith("exp_avg"))
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(third[name], fourth[name]) for name in third)
    states = [json.loads((folder / f"step-{step}" / "state.json").read_text()) for step in range(1, 6)]
    assert [(state["skipped"], state["skipped_in_a_row"]) for state in states] == [
        (1, 1),
        (1, 0),
        (2, 1),
        (2, 0),
        (2, 0),
    ]
    points_of = json.loads((skipping / f"skipping-{case}.json").read_text())
    assert list(points_of["train/loss"]) == ["2", "4", "5"]
    assert list(points_of["train/skipped_steps"].values()) == [1, 1, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("case", SKIPPING)
def test_a_run_that_has_skipped_steps_goes_on_bit_for_bit(skipping: Path, case: str) -> None:
    whole, again = (final_state(skipping / f"skipping{name}-{case}", 5) for name in ("", "-again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", SKIPPING)
def test_too_many_such_steps_in_a_row_end_the_run_on_every_worker_and_name_the_rows(skipping: Path, case: str) -> None:
    said, other = ((skipping / f"said-{case}-{rank}.txt").read_text() for rank in (0, 1))
    assert said == other and said.startswith(
        "2 steps in a row, up to step 4, had a loss or gradient that is not finite"
    )
    assert "The last one's rows: row 12; row 14; row 13; row 15." in said


def _stopping(worker: Worker, root: Path) -> None:
    """Asked to stop before the fourth step, by one worker alone."""
    config = replace(CONFIG, num_workers=worker.world_size, max_steps=4, eval_every=10)
    asked = iter([False] * 3 + [worker.rank == 1])
    run_training(worker, config, root / "stopped", stop=lambda: next(asked))
    run_training(worker, config, root / "stopped", resume=root / "stopped" / "step-3")
    run_training(worker, config, root / "not-stopped")


@pytest.mark.slow
def test_a_run_that_is_stopped_is_saved_where_it_stands_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run_workers(_stopping, 2, tmp_path)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["step-3", "step-4"]
    stopped, whole = (final_state(tmp_path / name) for name in ("stopped", "not-stopped"))
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_run_stops_early_and_stays_stopped(tmp_path: Path) -> None:
    run_workers(_standing_still, 1, tmp_path)
    assert json.loads((tmp_path / "steps.json").read_text()) == [[1, 2, 3], []]


def _close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
