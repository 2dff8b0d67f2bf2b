"""Curves that go on across attempts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hymate.training.telemetry import Telemetry


@pytest.mark.parametrize("stood_at", [0, 2])
def test_another_attempt_replaces_the_points_after_its_start(stood_at: int, tmp_path: Path) -> None:
    for attempt, start in ((1, 0), (2, stood_at)):
        telemetry = Telemetry(tmp_path, enabled=True)
        telemetry.start(start)
        for step in range(start + 1, 5):
            telemetry.scalars("train", {"loss": 10 * attempt + step}, step)
        telemetry.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    found = [(point.step, point.value) for point in events.Scalars("train/loss")]
    assert found == [(step, (10 if step <= stood_at else 20) + step) for step in range(1, 5)]
