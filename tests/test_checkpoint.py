"""Checkpoints: exact resume, any number of workers, any ZeRO stage, no pickle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import TRAIN, run_training, run_workers
from safetensors.torch import load_file

from hymate.training.engine import Worker

CONFIG = replace(TRAIN, max_steps=4, eval_every=2)
STAGES = (0, 1, 2, 3)
CROSSINGS = ((0, 2), (1, 3), (3, 0))


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


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and both moments, whatever the number of files they are in."""
    files = sorted((folder / "step-4").glob("*.safetensors"))
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
    assert {file.name for file in folder.iterdir()} == {
        "state.json",
        "model.safetensors",
        "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
    }


@pytest.mark.slow
def test_a_run_stops_early_and_stays_stopped(tmp_path: Path) -> None:
    run_workers(_standing_still, 1, tmp_path)
    assert json.loads((tmp_path / "steps.json").read_text()) == [[1, 2, 3], []]


def _close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
