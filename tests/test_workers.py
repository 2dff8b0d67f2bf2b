"""A slow worker shows: real processes, one of which has more to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import TRAIN, RandomRows, Recorder, pretraining_job, run_workers

from hymate.batch import Batch
from hymate.training.engine import Job, Worker, train

SLOW = 1
STEPS = 4


class SlowRows(RandomRows):
    """Every row is made a thousand times."""

    def _row(self, i: int) -> Batch:
        for _ in range(1000):
            super()._row(i)
        return super()._row(i)


def _slow_model(job: Job) -> None:
    """Every row is computed thirty times more."""
    forward = job.module.forward

    def slow(row: Batch) -> Any:
        for _ in range(30):
            forward(row)
        return forward(row)

    job.module.forward = slow  # type: ignore[method-assign]


def _train(worker: Worker, folder: Path, slow: str, stage: int) -> None:
    config = replace(TRAIN, num_workers=worker.world_size, rows_per_step=3, max_steps=STEPS, log_every=2)
    config = replace(config, eval_every=STEPS, zero_stage=stage)
    job, recorder = pretraining_job(worker, config), Progress()
    if worker.rank == SLOW and slow == "data":
        job.rows = SlowRows()
    if worker.rank == SLOW and slow == "model":
        _slow_model(job)
    train(job, config, worker, report=lambda metrics, part: None, telemetry=recorder, resume=None)
    if worker.rank == 0:
        (folder / "points.json").write_text(json.dumps(recorder.points))
        (folder / "last.json").write_text(json.dumps(recorder.last))


class Progress(Recorder):
    """Keeps the last progress, too."""

    def progress(self, force: bool = False, **values: Any) -> None:
        self.last = values


@pytest.mark.parametrize(("slow", "stage"), [("data", 2), ("model", 0), ("model", 3)])
def test_a_slow_worker_shows(tmp_path: Path, slow: str, stage: int) -> None:
    run_workers(_train, 3, tmp_path, slow, stage)
    points = json.loads((tmp_path / "points.json").read_text())

    def by_rank(name: str) -> list[float]:
        curves = [points[f"worker_{name}/{rank}"] for rank in range(3)]
        assert all(list(curve) == ["2", "4"] for curve in curves)
        return [curve["4"] for curve in curves]

    speed, data, collective = (by_rank(name) for name in ("events_per_second", "data_share", "collective_share"))
    assert min(speed) == speed[SLOW] and min(collective) == collective[SLOW]
    assert all(0 <= share <= 1 for share in data + collective)
    assert all(a + b <= 1 for a, b in zip(data, collective, strict=True))
    assert (max(data) == data[SLOW]) == (slow == "data")
    assert all(0.05 < gib < 100 for gib in by_rank("memory_gib"))
    told = json.loads((tmp_path / "last.json").read_text())["trouble"]
    assert told.startswith(f"worker {SLOW} is ") and told.endswith("it waits for data") == (slow == "data"), told
