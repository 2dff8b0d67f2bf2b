"""The training loop: where a run ends, and what a failure leaves."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from itertools import count
from pathlib import Path

from processes import TRAIN, Recorder, pretraining_job, run_training, run_workers

from hymate.training.checkpoint import read_state
from hymate.training.engine import Worker, train

SHORT = replace(TRAIN, num_workers=1, warmup_steps=1)
SOONER = replace(SHORT, max_steps=2)


def told(folder: Path) -> list[tuple[int, list[float]]]:
    """Of each checkpoint its step, and the steps at which the run had been evaluated."""
    states = [read_state(path) for path in sorted(folder.glob("step-*"))]
    return [(state["step"], [scores["step"] for scores in state["evaluations"]]) for state in states]


def stopped_then_ended_there(worker: Worker, folder: Path) -> None:
    asked = count()
    run_training(worker, SHORT, folder / "stopped", stop=lambda: next(asked) >= 2)
    # SIGTERM while it starts changes nothing: where it stands it is finished
    run_training(worker, SOONER, folder / "ended", resume=folder / "stopped" / "step-2", stop=lambda: True)
    run_training(worker, SOONER, folder / "again", resume=folder / "ended" / "step-2")


def test_a_run_that_is_told_to_end_where_it_was_stopped_is_evaluated_there_once(tmp_path: Path) -> None:
    run_workers(stopped_then_ended_there, 1, tmp_path)
    assert told(tmp_path / "stopped") == [(2, [])]
    assert told(tmp_path / "ended") == [(2, [2])]
    assert told(tmp_path / "again") == []


def failing_to_send(worker: Worker, folder: Path) -> None:
    tempfile.tempdir = str(folder)

    def report(metrics: dict[str, float], part: Path) -> None:
        assert part.parent == folder and os.listdir(part)
        raise OSError("the disk is full")

    try:
        train(pretraining_job(worker, SHORT), SHORT, worker, report=report, telemetry=Recorder(), resume=None)
    except OSError as error:
        assert str(error) == "the disk is full"
        return
    raise AssertionError("it went on")


def test_a_checkpoint_that_cannot_be_sent_is_not_left_behind(tmp_path: Path) -> None:
    run_workers(failing_to_send, 1, tmp_path)
    assert not list(tmp_path.glob("hymate-step-*"))
