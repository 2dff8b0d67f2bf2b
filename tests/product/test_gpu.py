"""A CPU and a GPU do the same: training at each ZeRO stage, a checkpoint that goes from one to the other, predictions.

`make test-gpu` runs the parts marked `gpu` (not yet run on one). Without a GPU the same code runs from CPU to CPU at
one stage, so that it has run before its first time on one. A process for each device, because DeepSpeed keeps the one
that it was imported for, and CUDA allows no forked one; no Ray.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
from commands import PATIENCE_S
from processes import FORKED, TRAIN, RandomRows, pretraining_job, run_training
from random_histories import random_history, random_vocabulary
from rows import in_double, random_row
from safetensors.torch import load_file
from small_models import vocabulary_of, write_risk_bundle

from hymate.command import load
from hymate.config import ModelConfig
from hymate.device import obstacle
from hymate.inference.streaming import StreamingModel
from hymate.model.batch import Batch
from hymate.model.encoder import RiskModel
from hymate.ops import forced
from hymate.training import checkpoint
from hymate.training.loop import Worker, single_process, start

STAGES = (0, 1, 2, 3) if torch.cuda.is_available() else (3,)
STEPS, SAVED = 8, 4
# no dropout, whose random numbers differ between devices
MODEL = ModelConfig(d_model=64, layers="MA", d_state=16, headdim=32, num_heads=4, window=16, dropout=0.0)
MODELS = {"mamba2": MODEL, "mamba1": replace(MODEL, mixer="mamba1")}
EXACT = replace(TRAIN, num_workers=1, max_steps=STEPS, eval_every=SAVED)
GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
TF32 = 2e-2  # Triton's float32 dots round their inputs to 10 bits


class SameRow(RandomRows):
    """One row again and again, so that its loss must fall."""

    def _row(self, i: int) -> Batch:
        return random_row((40, 1, 130, 17), vocab_size=31)


def train_everywhere(worker: Worker, mixers: list[str], folder: Path) -> None:
    """In bf16 on one row, and in float32 with a checkpoint halfway, at every stage; of each mixer in a folder."""
    for mixer, stage in product(mixers, STAGES):
        into = folder / mixer
        rounded = replace(EXACT, zero_stage=stage, precision="bf16", eval_every=STEPS)
        recorder, _ = run_training(worker, rounded, into / "bf16", rows=SameRow(), model=MODELS[mixer])
        _write(into / f"bf16-{stage}.json", recorder.points)
        recorder, _ = run_training(worker, replace(EXACT, zero_stage=stage), into / f"{stage}", model=MODELS[mixer])
        _write(into / f"{stage}.json", recorder.points)


def go_on(worker: Worker, mixers: list[str], origin: Path, folder: Path) -> None:
    """From the checkpoint of every mixer and stage in `origin`; first it is read and written again."""
    for mixer, stage in product(mixers, STAGES):
        into = folder / mixer
        config, resume = replace(EXACT, zero_stage=stage), origin / mixer / f"{stage}" / f"step-{SAVED}"
        job = pretraining_job(worker, config, MODELS[mixer])
        engine, standing = start(job, config, worker, resume)
        again = into / f"again-{stage}"
        again.mkdir(parents=True)
        checkpoint.save(engine, again, asdict(standing))
        engine.destroy()
        recorder, _ = run_training(worker, config, into / f"{stage}", resume=resume, model=MODELS[mixer])
        _write(into / f"{stage}.json", recorder.points)


def _write(path: Path, points: dict[str, Any]) -> None:
    path.write_text(json.dumps(points))


def needs(device: str, model: ModelConfig) -> None:
    """Skip the test where the model cannot run on the device."""
    if device == "cuda" and (reason := obstacle(model)):
        pytest.skip(reason)


def run_alone(function: Callable[..., None], device: str, *args: Any) -> None:
    """`function(worker, *args)` in a new process that is a process group by itself; fails if it does."""
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}):
        start = FORKED if device == "cpu" else multiprocessing.get_context("spawn")
        process = start.Process(target=_work, args=(function, device, args))
        process.start()
    try:
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    finally:
        process.kill()


def _work(function: Callable[..., None], device: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    with single_process(torch.device(device)) as worker:
        function(worker, *args)


Trained = Callable[[str, str], Path]


def possible(*devices: str) -> list[str]:
    """The mixers that run on all of the devices."""
    return [mixer for mixer in MODELS if "cuda" not in devices or obstacle(MODELS[mixer]) is None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The folder of what was trained on a device with a mixer."""

    @functools.cache
    def on(device: str) -> Path:
        folder = tmp_path_factory.mktemp(device)
        run_alone(train_everywhere, device, possible(device), folder)
        return folder

    def of(device: str, mixer: str) -> Path:
        needs(device, MODELS[mixer])
        return on(device) / mixer

    return of


@pytest.fixture(scope="module")
def went_on(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """The folder of what went on on a device, from where it was on another, with a mixer."""

    @functools.cache
    def on(before: str, after: str) -> Path:
        mixers, folder = possible(before, after), tmp_path_factory.mktemp(f"{before}-{after}")
        run_alone(go_on, after, mixers, trained(before, mixers[0]).parent, folder)
        return folder

    def of(before: str, after: str, mixer: str) -> Path:
        for device in (before, after):
            needs(device, MODELS[mixer])
        return on(before, after) / mixer

    return of


def curve(path: Path, name: str) -> dict[int, float]:
    return {int(step): value for step, value in json.loads(path.read_text())[name].items()}


@GPU
def test_mamba_ssm_is_there() -> None:
    """Without it most of these tests are skipped, which is not to pass for success."""
    assert obstacle(MODEL) is None


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_stage_learns_in_bf16(trained: Trained, device: str, mixer: str) -> None:
    for stage in STAGES:
        losses = list(curve(trained(device, mixer) / f"bf16-{stage}.json", "train/loss").values())
        assert len(losses) == STEPS and all(map(math.isfinite, losses)), (stage, losses)
        assert losses[-1] < 0.9 * losses[0], (stage, losses)


@pytest.mark.slow
@GPU
@pytest.mark.parametrize("mixer", MODELS)
def test_a_gpu_trains_as_a_cpu_does(trained: Trained, mixer: str) -> None:
    for stage in STAGES:
        there, here = (curve(trained(device, mixer) / f"{stage}.json", "train/loss") for device in ("cuda", "cpu"))
        assert there == pytest.approx(here, rel=TF32), stage


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MODELS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cpu", "cpu"),
        *(pytest.param(*pair, marks=GPU) for pair in (("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda"))),
    ],
)
def test_a_checkpoint_goes_on_on_the_other_device(
    trained: Trained, went_on: Callable[[str, str, str], Path], before: str, after: str, mixer: str
) -> None:
    """Weights and Adam's moments arrive bit for bit; the losses that follow and the score after them are the same."""
    again, whole = went_on(before, after, mixer), trained(before, mixer)
    tolerance = 1e-5 if (before, after) == ("cpu", "cpu") else TF32
    for stage in STAGES:
        sent, arrived = tensors(whole / f"{stage}" / f"step-{SAVED}"), tensors(again / f"again-{stage}")
        assert sent.keys() == arrived.keys()
        assert all(torch.equal(arrived[name], tensor) for name, tensor in sent.items())
        expected = curve(whole / f"{stage}.json", "train/loss")
        later = {step: loss for step, loss in expected.items() if step > SAVED}
        assert curve(again / f"{stage}.json", "train/loss") == pytest.approx(later, rel=tolerance), stage
        scores = [curve(folder / f"{stage}.json", "validation/val_loss")[STEPS] for folder in (whole, again)]
        assert scores[1] == pytest.approx(scores[0], rel=tolerance), stage


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# ------------------------------------------------------------------------------------------------------ prediction

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


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_do_not_depend_on_the_device(kind: str, device: str) -> None:
    needs(device, KINDS[kind])
    row = random_row((40, 1, 130, 17), vocab_size=VOCAB)

    def outputs(model: RiskModel, row: Batch) -> torch.Tensor:
        with torch.no_grad():
            logit_AT, log_days_AT = model.outputs(model.patient(row)[0])
        return torch.stack([*logit_AT.T, log_days_AT[:, 1]]).cpu()

    with forced("reference"):
        exact = outputs(risk_model(KINDS[kind]).double(), in_double(row))
    assert_same(outputs(risk_model(KINDS[kind]).to(device), row.to(torch.device(device))), exact, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bidirectional"])
def test_a_history_that_grows_does_not_depend_on_the_device(kind: str, device: str) -> None:
    """In pieces of 100 events, one event among them, beside one pass in float64."""
    needs(device, KINDS[kind])
    vocabulary = random_vocabulary(VOCAB)
    history = random_history(301, vocabulary)
    at = int(history.time[-1]) + 3_600_000_000

    def logits(model: RiskModel, size: int) -> torch.Tensor:
        stream = StreamingModel(model, vocabulary, vocabulary.codes, chunk_events=size)
        state = stream.append(None, stream.events(history))
        return torch.from_numpy(stream.outputs(state, history, at)[0])

    with forced("reference"):
        exact = logits(risk_model(KINDS[kind]).double(), 301)
    assert_same(logits(risk_model(KINDS[kind]).to(device), 100), exact, device)


@pytest.fixture(scope="module")
def cohort(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A prepared dataset and a bundle of its codes."""
    pytest.importorskip("polars", reason="preparing data needs it")
    data = request.getfixturevalue("small_data")
    return data, write_risk_bundle(tmp_path_factory.mktemp("risk") / "bundle", vocabulary_of(data), MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("context", ["bundle", "all"])
def test_the_command_predicts_the_same_on_either_device(
    cohort: tuple[Path, Path], tmp_path: Path, device: str, context: str
) -> None:
    """Packed rows on the device, and there also in pieces, beside packed rows on the CPU."""
    from hymate.predict import PredictConfig, run

    needs(device, MODEL)
    data, bundle = cohort
    logits = []
    for where, how in (("cpu", "bundle"), (device, context)):
        out = tmp_path / f"{where}-{how}.parquet"
        given = ["task=readmission", f"bundle={bundle}", f"data.path={data}", f"out={out}", f"context={how}"]
        run(load("predict", [*given, f"device={where}"], PredictConfig))
        column = pq.read_table(out)["predicted_boolean_probability"]
        logits.append(torch.logit(torch.from_numpy(column.to_numpy().astype("f8"))))
    assert len(logits[0]) > 100
    assert_same(logits[1], logits[0], device)
