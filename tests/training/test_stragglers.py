"""A slow worker shows: real processes, one of which has more to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import TRAIN, RandomRows, Recorder, pretraining_job, run_workers

from hymate.model.batch import Batch
from hymate.training.loop import Worker, train

SLOW, STEPS = 1, 4
CASES = [("data", 2), ("model", 0), ("model", 3)]  # what is slow, and the ZeRO stage


class SlowRows(RandomRows):
    """Every row is made a thousand times."""

    def _row(self, i: int) -> Batch:
        for _ in range(1000):
            super()._row(i)
        return super()._row(i)


def _work(*_: Any) -> None:
    """Many times as much as the small model computes."""
    square = torch.ones(256, 256)
    for _ in range(300):
        square @ square


def _train_cases(worker: Worker, folder: Path) -> None:
    for slow, stage in CASES:
        config = replace(TRAIN, num_workers=worker.world_size, rows_per_step=3, max_steps=STEPS, log_every=2)
        config = replace(config, eval_every=STEPS, zero_stage=stage)
        job, recorder = pretraining_job(worker, config), Progress()
        if worker.rank == SLOW and slow == "data":
            job.rows = SlowRows()
        if worker.rank == SLOW and slow == "model":
            job.module.register_forward_pre_hook(_work)
        train(job, config, worker, report=lambda metrics, part: None, telemetry=recorder, resume=None)
        if worker.rank == 0:
            recorded = {"points": recorder.points, "last": recorder.last}
            (folder / f"{slow}-{stage}.json").write_text(json.dumps(recorded))


class Progress(Recorder):
    """Keeps the last progress, too."""

    def progress(self, force: bool = False, **values: Any) -> None:
        self.last = values


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first of three workers recorded of each case."""
    folder = tmp_path_factory.mktemp("workers")
    run_workers(_train_cases, 3, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("slow", "stage"), CASES)
def test_a_slow_worker_shows(trained: Path, slow: str, stage: int) -> None:
    recorded = json.loads((trained / f"{slow}-{stage}.json").read_text())

    def by_rank(name: str) -> list[float]:
        curves = [recorded["points"][f"worker_{name}/{rank}"] for rank in range(3)]
        assert all(list(curve) == ["2", "4"] for curve in curves)
        return [curve["4"] for curve in curves]

    speed, data, collective = (by_rank(name) for name in ("events_per_second", "data_fraction", "collective_fraction"))
    assert min(speed) == speed[SLOW] and min(collective) == collective[SLOW]
    assert all(0 <= fraction <= 1 for fraction in data + collective)
    assert all(a + b <= 1 for a, b in zip(data, collective, strict=True))
    assert (data[SLOW] > 0.5) == (slow == "data")
    assert all(0.05 < gib < 100 for gib in by_rank("memory_gib"))
    assert "trouble" in recorded["last"]  # its sentence is in the doctest: a busy machine slows all
