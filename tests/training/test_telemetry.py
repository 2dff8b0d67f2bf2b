"""Curves that go on across attempts; what the console says while a run waits."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from commands import wait_until
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hymate.training import telemetry
from hymate.training.telemetry import PROGRESS, Telemetry, progress_line, write_json


@pytest.mark.parametrize("stood_at", [0, 2])
def test_another_attempt_replaces_the_points_after_its_start(stood_at: int, tmp_path: Path) -> None:
    for attempt, start in ((1, 0), (2, stood_at)):
        written = Telemetry(tmp_path, enabled=True)
        written.start(start)
        for step in range(start + 1, 5):
            written.scalars("train", {"loss": 10 * attempt + step}, step)
        written.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    found = [(point.step, point.value) for point in events.Scalars("train/loss")]
    assert found == [(step, (10 if step <= stood_at else 20) + step) for step in range(1, 5)]


def test_what_a_run_waits_for_is_said_once_until_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "ASK_AFTER_S", 0.0)
    monkeypatch.setattr(telemetry, "PRINT_EVERY_S", 0.0)
    reasons, said = ["waiting for machines: one more"], io.StringIO()
    with progress_line(tmp_path, lambda: reasons[0] if reasons else None, Console(file=said, width=200)):
        wait_until(lambda: "one more" in said.getvalue(), "it is said")
        write_json(tmp_path / PROGRESS, {"step": 1, "max_steps": 9})
        wait_until(lambda: "step 1/9" in said.getvalue(), "it goes on")
        wait_until(lambda: said.getvalue().count("one more") == 2, "it is said again")
        reasons.clear()
        monkeypatch.setattr(telemetry, "SILENT_S", 0.0)
        wait_until(lambda: "a step takes long: every host answers" in said.getvalue(), "all that can be said")
        write_json(tmp_path / PROGRESS, {"step": 2, "max_steps": 9, "evaluating": True})
        wait_until(lambda: "evaluating and saving takes long" in said.getvalue(), "what it does")
    assert said.getvalue().count("one more") == 2
