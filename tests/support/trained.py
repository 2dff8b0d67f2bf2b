"""Models of the synthetic cohort, trained in this process: the demo's recipe without pretraining."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file

from hymate.command import load
from hymate.config import DataConfig, ModelConfig, TaskConfig, TrainConfig
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.tasks import read_or_extract_labels
from hymate.inference.bundle import Bundle
from hymate.predict import PredictConfig
from hymate.training import loop
from hymate.training.telemetry import Telemetry
from hymate.tuning.trial import TrialConfig, starting_point, trial_job

# configs/model/debug.yaml
MODEL = ModelConfig(d_model=32, layers="MA", d_state=16, headdim=16, num_heads=2, window=256)
LEARNING_RATE = 3e-3


def synthetic_cohort(folder: Path, subjects: int) -> Path:
    """A prepared synthetic cohort at `folder`/data, with the labels of readmission."""
    overrides = [f"out={folder / 'data'}", f"synthetic.subjects={subjects}", "synthetic.mean_events=250"]
    prepare(load("prepare", ["source=synthetic", "workers=1", *overrides], PrepareConfig))
    return folder / "data"


def task_of(data: Path, name: str) -> TaskConfig:
    return load("predict", [f"task={name}", "bundle=none", f"data.path={data}", "out=none"], PredictConfig).task


def trained_bundle(data: Path, steps: int, name: str = "readmission") -> Bundle:
    """The last checkpoint of a training run on `data`."""
    task = task_of(data, name)
    in_time = {} if task.in_time is None else {name: task.in_time}
    table = read_or_extract_labels(data, task).table
    start = starting_point(DataConfig(str(data), context=256, tokens_per_row=4096), MODEL, None)
    schedule = TrainConfig(rows_per_step=1, max_steps=steps, warmup_steps=30, eval_every=steps, zero_stage=0)
    rates = {"backbone_lr": LEARNING_RATE, "head_lr": LEARNING_RATE}
    trial = TrialConfig([name], [], start.data, MODEL, schedule, **rates, in_time=in_time)
    state = {}

    def report(scores: dict[str, float], checkpoint: Path) -> None:
        state.update(load_file(checkpoint / "model.safetensors"))
        shutil.rmtree(checkpoint)

    with loop.single_process() as worker:
        histories = Histories.open(data)
        examples = (labelled_examples(histories, table, split) for split in ("train", "tuning"))
        job = trial_job(start, trial, histories, *examples, "mean", worker)
        silent = Telemetry(data.parent / "run", enabled=False)
        loop.train(job, trial.train, worker, report=report, telemetry=silent, resume=None)
    return Bundle("risk", trial.model, trial.data, start.vocabulary, state, trial.tasks, in_time=in_time)
