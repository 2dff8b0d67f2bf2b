"""A CPU and a GPU do the same: training at each ZeRO stage, a checkpoint that goes from one to the other, predictions.

`make test-gpu` runs the parts marked `gpu` (not yet run on one). Without a GPU the same code runs from CPU to CPU at
one stage, so that it has run before its first time on one. A process for each device, because DeepSpeed keeps the one
that it was imported for; no Ray.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import TRAIN, RandomRows, run_training
from random_histories import random_history, random_vocabulary
from rows import in_double, random_row
from safetensors.torch import load_file

from hymate.batch import Batch
from hymate.config import ModelConfig
from hymate.model import RiskModel
from hymate.streaming import StreamingModel
from hymate.training.engine import Worker, single_process

STAGES = (0, 1, 2, 3) if torch.cuda.is_available() else (3,)
STEPS, SAVED = 8, 4
# no dropout, whose random numbers differ between devices
MODEL = ModelConfig(d_model=64, layers="MA", d_state=16, headdim=32, num_heads=4, window=16, dropout=0.0)
MODELS = {"mamba2": MODEL, "mamba1": replace(MODEL, mixer="mamba1")}
EXACT = replace(TRAIN, num_workers=1, max_steps=STEPS, eval_every=SAVED)
GPU = pytest.mark.gpu
TF32 = 2e-2  # Triton's float32 dots round their inputs to 10 bits


class SameRow(RandomRows):
    """One row again and again, so that its loss must fall."""

    def _row(self, i: int) -> Batch:
        return random_row((40, 1, 130, 17), vocab_size=31)


def train_everything(worker: Worker, folder: Path) -> None:
    """In bf16 on one row, and in float32 with a checkpoint halfway: both mixers, every stage."""
    for mixer, model in MODELS.items():
        for stage in STAGES:
            rounded = replace(EXACT, zero_stage=stage, precision="bf16", eval_every=STEPS)
            recorder, _ = run_training(worker, rounded, folder / "bf16", rows=SameRow(), model=model)
            _write(folder / f"bf16-{mixer}-{stage}.json", recorder.points)
            whole = folder / f"{mixer}-{stage}"
            recorder, _ = run_training(worker, replace(EXACT, zero_stage=stage), whole, model=model)
            _write(whole.with_suffix(".json"), recorder.points)


def go_on(worker: Worker, origin: Path, folder: Path) -> None:
    """From every checkpoint in `origin`."""
    for mixer, model in MODELS.items():
        for stage in STAGES:
            name, config = f"{mixer}-{stage}", replace(EXACT, zero_stage=stage)
            resume = origin / name / f"step-{SAVED}"
            recorder, _ = run_training(worker, config, folder / name, resume=resume, model=model)
            _write((folder / name).with_suffix(".json"), recorder.points)


def _write(path: Path, points: dict[str, Any]) -> None:
    path.write_text(json.dumps(points))


def run_alone(function: Callable[..., None], device: str, *args: Any) -> None:
    """`function(worker, *args)` in a new process that is a process group by itself; fails if it does."""
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(function, device, args))
    process.start()
    try:
        process.join(300)
        assert process.exitcode == 0
    finally:
        process.kill()


def _work(function: Callable[..., None], device: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with single_process(torch.device(device)) as worker:
        function(worker, *args)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of what was trained on a device."""
    done: dict[str, Path] = {}

    def on(device: str) -> Path:
        if device not in done:
            folder = tmp_path_factory.mktemp(device)
            run_alone(train_everything, device, folder)
            done[device] = folder
        return done[device]

    return on


def curve(path: Path, name: str) -> dict[int, float]:
    return {int(step): value for step, value in json.loads(path.read_text())[name].items()}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_every_stage_learns_in_bf16(trained: Callable[[str], Path], device: str) -> None:
    for mixer in MODELS:
        for stage in STAGES:
            losses = list(curve(trained(device) / f"bf16-{mixer}-{stage}.json", "train/loss").values())
            assert len(losses) == STEPS and all(map(math.isfinite, losses)), (mixer, stage, losses)
            assert losses[-1] < 0.9 * losses[0], (mixer, stage, losses)


@pytest.mark.slow
@GPU
def test_a_gpu_trains_as_a_cpu_does(trained: Callable[[str], Path]) -> None:
    for mixer in MODELS:
        for stage in STAGES:
            here, there = (curve(trained(device) / f"{mixer}-{stage}.json", "train/loss") for device in ("cpu", "cuda"))
            assert there == pytest.approx(here, rel=TF32), (mixer, stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cpu", "cpu"),
        *(pytest.param(*pair, marks=GPU) for pair in (("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda"))),
    ],
)
def test_a_checkpoint_goes_on_on_the_other_device(
    trained: Callable[[str], Path], tmp_path: Path, before: str, after: str
) -> None:
    """Losses of the steps that follow, the score after them, weights and Adam's moments."""
    whole = trained(before)
    run_alone(go_on, after, whole, tmp_path)
    tolerance = 1e-5 if before == after else TF32
    for mixer in MODELS:
        for stage in STAGES:
            name = f"{mixer}-{stage}"
            expected = curve(whole / f"{name}.json", "train/loss")
            later = {step: loss for step, loss in expected.items() if step > SAVED}
            assert curve(tmp_path / f"{name}.json", "train/loss") == pytest.approx(later, rel=tolerance), name
            scores = [curve(folder / f"{name}.json", "validation/val_loss")[STEPS] for folder in (whole, tmp_path)]
            assert scores[1] == pytest.approx(scores[0], rel=tolerance), name
            ended = [_final(folder / name) for folder in (whole, tmp_path)]
            assert ended[0].keys() == ended[1].keys()
            for key, tensor in ended[0].items():
                error = float((ended[1][key] - tensor).norm() / tensor.norm().clamp(min=1e-12))
                assert error <= 5 * tolerance, f"{name}: {key} is off by {error:.1e}"


def _final(folder: Path) -> dict[str, torch.Tensor]:
    """Weights and moments at the end."""
    files = sorted((folder / f"step-{STEPS}").glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


# ------------------------------------------------------------------------------------------------------ prediction

DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
VOCAB = 31
KINDS = {
    **MODELS,
    "recurrent": replace(MODEL, layers="GA"),
    "variables": replace(MODEL, pooling="variables", num_queries=2, members=2),
    "bidirectional": replace(MODEL, bidirectional=True, window=0, pooling="attention", num_queries=1),
}


def risk_model(config: ModelConfig) -> RiskModel:
    torch.manual_seed(0)
    return RiskModel(config, VOCAB, ["mortality", "length_of_stay"], ["length_of_stay"]).eval()


def assert_same(actual: torch.Tensor, exact: torch.Tensor, device: str) -> None:
    """float32 there beside float64 here."""
    error = float((actual.double() - exact).norm() / exact.norm())
    assert error < (1e-4 if device == "cpu" else TF32), f"relative error {error:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_the_device(kind: str, device: str) -> None:
    row = random_row((40, 1, 130, 17), vocab_size=VOCAB)

    def outputs(model: RiskModel, row: Batch) -> torch.Tensor:
        with torch.no_grad():
            logit_ST, log_days_ST = model.outputs(model.patient(row)[0])
        return torch.stack([*logit_ST.T, log_days_ST[:, 1]]).cpu()

    exact = outputs(risk_model(KINDS[kind]).double(), in_double(row))
    assert_same(outputs(risk_model(KINDS[kind]).to(device), row.to(torch.device(device))), exact, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bidirectional"])
def test_a_history_that_grows_does_not_depend_on_the_device(kind: str, device: str) -> None:
    """In pieces of 100 events, one event among them, beside one pass in float64."""
    vocabulary = random_vocabulary(VOCAB)
    history = random_history(301, vocabulary)
    at = int(history.time[-1]) + 3_600_000_000
    logits = []
    for model, size in ((risk_model(KINDS[kind]).double(), 301), (risk_model(KINDS[kind]).to(device), 100)):
        stream = StreamingModel(model, vocabulary, vocabulary.codes, chunk_events=size)
        state = stream.append(None, stream.events(history))
        logits.append(torch.from_numpy(stream.outputs(state, history, at)[0]))
    assert_same(logits[1], logits[0], device)
