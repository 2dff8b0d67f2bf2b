"""A trial on several workers: what it learns is what one worker learns, and it goes on when one of them is killed.

The search that shows it has no held-out labels.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import PATIENCE_S, ROOT, processes, starts, wait_until
from processes import run_workers
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from small_cohort import SIZES
from small_models import SMALL, vocabulary_of

from hymate.command import load
from hymate.config import DataConfig, ObjectiveConfig, TrainConfig
from hymate.data.examples import Examples, labelled_examples
from hymate.data.histories import Histories
from hymate.data.label_files import read_labels
from hymate.device import CPU
from hymate.inference import scoring
from hymate.inference.bundle import Bundle, read_bundle
from hymate.inference.provenance import SENTENCES
from hymate.model.pretrain_model import PretrainModel
from hymate.training import loop
from hymate.training.telemetry import Telemetry
from hymate.tuning.search import TuneConfig
from hymate.tuning.trial import (
    TrialConfig,
    draw_trials,
    labelled_rows,
    risk_model,
    starting_point,
    trial_job,
)

STEPS, EVAL_EVERY = 8, 2
STAGES = (0, 1, 2, 3)
SETTINGS = [
    *("task=readmission", "data.context=64", "data.tokens_per_row=64", "search.space.teacher_fraction=0"),
    *(f"train.max_steps={STEPS}", f"train.eval_every={EVAL_EVERY}", "train.warmup_steps=1", "train.log_every=1"),
    *("train.rows_per_step=2", "train.zero_stage=3", "train.keep=9", "search.num_trials=1", "report.boosting=false"),
]


def examples_of(histories: Histories, split: str, labels: Path | None = None) -> Examples:
    table = read_labels(labels or Path(histories.path) / "labels" / "readmission")
    return labelled_examples(histories, table, split)


def learn(
    worker: loop.Worker, trial: TrialConfig, folder: Path, labels: Path | None = None, init: str | None = None
) -> None:
    """Train the trial without Ray; the evaluations and the last weights are then in `folder`."""
    histories = Histories.open(trial.data.path)
    examples = (examples_of(histories, split, labels) for split in ("train", "tuning"))
    start = starting_point(trial.data, None if init else trial.model, init)
    job = trial_job(start, trial, histories, *examples, "mean", worker)
    found = []

    def report(scores: dict[str, float], part: Path) -> None:
        found.append(scores)
        if worker.rank == 0:
            shutil.copy(part / "model.safetensors", folder)
        shutil.rmtree(part)

    silent = Telemetry(folder, enabled=False)
    loop.train(job, trial.train, worker, report=report, telemetry=silent, resume=None)
    (folder / f"evaluations-{worker.rank}.json").write_text(json.dumps(found))


def trial_on(data: Path, num_workers: int = 1, stage: int = 0) -> TrialConfig:
    settings = DataConfig(str(data), context=32, tokens_per_row=64, min_count=1)
    steps = {"max_steps": 6, "warmup_steps": 1, "eval_every": 3}
    train = TrainConfig(num_workers=num_workers, zero_stage=stage, rows_per_step=2, **steps)
    return TrialConfig(["readmission"], [], settings, SMALL, train, 1e-3, 3e-3)


def learn_at_each_stage(worker: loop.Worker, data: Path, folder: Path) -> None:
    for stage in STAGES:
        learn(worker, trial_on(data, worker.world_size, stage), folder / str(stage))


@pytest.mark.slow
def test_two_workers_learn_what_one_does(small_data: Path, tmp_path: Path) -> None:
    """But for the order in which their gradients are summed."""
    for name in ("alone", *map(str, STAGES)):
        (tmp_path / name).mkdir()
    run_workers(learn, 1, trial_on(small_data), tmp_path / "alone")
    run_workers(learn_at_each_stage, 2, small_data, tmp_path)
    one = json.loads((tmp_path / "alone" / "evaluations-0.json").read_text())
    weights = load_file(tmp_path / "alone" / "model.safetensors")
    for stage in STAGES:
        own = tmp_path / str(stage)
        first, second = (json.loads((own / f"evaluations-{rank}.json").read_text()) for rank in (0, 1))
        assert first == second and len(first) == 2
        for ours, theirs in zip(first, one, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        for name, weight in load_file(own / "model.safetensors").items():
            np.testing.assert_allclose(weight, weights[name], rtol=1e-3, atol=1e-5, err_msg=f"ZeRO {stage}: {name}")


def scored(data: Path, rank: int, world_size: int) -> np.ndarray:
    trial = trial_on(data)
    histories, start = Histories.open(data), starting_point(trial.data, SMALL, None)
    rows = labelled_rows(start, trial, histories, examples_of(histories, "tuning"))
    return scoring.score(risk_model(start, trial).eval(), rows, CPU, rank, world_size).logit_ET


def write_scored(worker: loop.Worker, data: Path, folder: Path) -> None:
    np.save(folder / f"{worker.rank}.npy", scored(data, worker.rank, worker.world_size))


@pytest.mark.slow
def test_each_of_several_workers_gets_the_predictions_of_one(
    small_data: Path, tmp_path: Path, one_thread: None
) -> None:
    run_workers(write_scored, 3, small_data, tmp_path)
    alone = scored(small_data, 0, 1)
    for rank in range(3):
        np.testing.assert_array_equal(np.load(tmp_path / f"{rank}.npy"), alone)


def peers(ray_folder: str) -> list[int]:
    """A trial's workers but the first, below the raylet whose session is in `ray_folder`."""
    found = processes()
    raylets = {pid for pid, (_, line) in found.items() if "/raylet " in line and f"{ray_folder}/" in line}
    return [pid for pid, (parent, line) in found.items() if parent in raylets and "ray::Peer.run" in line]


@dataclass(frozen=True)
class Searched:
    """A search that has ended: its folder and overrides, what it said, its labels and their weights."""

    run: Path
    given: list[str]
    said: str
    labels: Path
    weight_N: np.ndarray


@pytest.fixture(scope="module")
def searched(small_data: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """One of whose trial's two workers is killed. Its labels have weights, and none is held out; its first weights are
    of before there was a record of what they have seen.
    """
    folder = tmp_path_factory.mktemp("searched")
    for split in ("train", "tuning"):
        (folder / "mine" / split).mkdir(parents=True)
        labels = pq.read_table(small_data / "labels/readmission" / split / "0.parquet")
        pq.write_table(labels, folder / "mine" / split / "0.parquet")
        weight = pa.array(np.linspace(0.5, 3, len(labels)), pa.float32())
        weights = labels.select(["subject_id", "prediction_time"]).append_column("weight", weight)
        pq.write_table(weights, folder / "mine" / split / "0.extra.pq")
    vocabulary = vocabulary_of(small_data)
    torch.manual_seed(1)
    state = PretrainModel(SMALL, ObjectiveConfig(), vocabulary.size).state_dict()
    settings = DataConfig(str(small_data), context=64, tokens_per_row=256, min_count=1)
    Bundle("pretrained", SMALL, settings, vocabulary, state).write(folder / "bundle")

    run = folder / "runs" / "r"
    given = [*SETTINGS, f"data.path={small_data}", f"init={folder / 'bundle'}", f"task.labels={folder / 'mine'}"]
    given += [f"run.dir={run.parent}", "run.name=r"]
    line = [sys.executable, str(ROOT / "finetune" / "tune.py"), *given, "train.num_workers=2", "search.max_failures=1"]
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as search:
        saved = run / "trials" / "trial-0"
        wait_until(lambda: len(list(saved.glob("step-*/sha256-00000*"))) >= 2 or search.poll() is not None, "it saves")
        (peer,) = peers(environment["RAY_TMPDIR"])
        os.kill(peer, signal.SIGKILL)
        said, complained = search.communicate(timeout=PATIENCE_S)
    assert search.returncode == 0, said + complained
    return Searched(run, given, said, folder / "mine", weight.to_numpy())


@pytest.mark.slow
def test_a_search_of_trials_on_two_workers_goes_on_when_one_is_killed(searched: Searched, tmp_path: Path) -> None:
    first, second = starts(searched.run / "tb" / "trial-0")
    assert first == 0 and second >= EVAL_EVERY, "the trial began again from scratch"
    config = load("tune", searched.given, TuneConfig)
    start = starting_point(config.data, config.model, config.init)
    (trial,) = draw_trials(config.tasks, config.search, config.train, start)
    run_workers(learn, 1, trial, tmp_path, searched.labels, config.init)
    alone = json.loads((tmp_path / "evaluations-0.json").read_text())
    newest = max((searched.run / "trials" / "trial-0").glob("step-*/state.json"))
    together = json.loads(newest.read_text())["evaluations"]
    assert len(list(newest.parent.glob("optimizer-*-of-00002.safetensors"))) == 2
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    found = json.loads((searched.run / "results.json").read_text())
    assert found["trials"][0]["status"] == "finished" and (searched.run / "bundle" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_search_without_held_out_labels_makes_all_but_their_scores(searched: Searched) -> None:
    run = searched.run
    found = json.loads((run / "results.json").read_text())
    assert found["split"] == "tuning" and found["num_labels"] == 2 * SIZES["tuning"]
    assert found["splits"]["held_out"]["labels"] == 0
    bundle = read_bundle(run, kind="risk")
    assert "held_out" not in bundle.extra and bundle.extra["tuning"]["auroc"] == found["auroc"]
    for text in ((run / "report.md").read_text(), (run / "bundle" / "README.md").read_text(), searched.said):
        assert "there are no held-out labels" in " ".join(text.split())
        assert "held-out predictions for" not in text
    assert "no held-out labels" in found["note"] and "(200 are needed)" in found["note"]
    # labels count by their weights, and it is not known what the first weights have seen
    assert found["weights"] == {"lowest": 0.5, "highest": 3.0} and found["initial_weights"] == "not known"
    written = pq.read_table(run / "predictions.parquet")
    label, prob = (written[name].to_numpy() for name in ("boolean_value", "predicted_boolean_probability"))
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(label, prob, sample_weight=searched.weight_N))
    assert found["brier"] == pytest.approx(np.average((prob - label) ** 2, weights=searched.weight_N), abs=1e-6)
    best = found["trials"][0]["best"]
    assert best["auroc"] == pytest.approx(found["auroc"]["value"])
    for text in ((run / "report.md").read_text(), searched.said):
        assert "0.50 to 3.00, in training and in every score" in " ".join(text.split())
        assert SENTENCES["not known"] in " ".join(text.split())
