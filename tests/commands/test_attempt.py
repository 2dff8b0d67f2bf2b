"""Which command a run belongs to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import wait_until

from hymate.training.attempt import Attempt, Superseded


def test_a_command_takes_a_run_over_from_the_one_before(tmp_path: Path) -> None:
    first = Attempt.begin(tmp_path / "run")
    with first.watched() as stop:
        first.check()
        assert not stop()
        second = Attempt.begin(tmp_path / "run")
        with pytest.raises(Superseded, match="another command has taken this run over"):
            first.check()
        with pytest.raises(Superseded):
            wait_until(stop, "the first command sees that it is superseded")
    second.check()


def test_the_workers_are_asked_to_stop(tmp_path: Path) -> None:
    attempt = Attempt.begin(tmp_path / "run")
    with attempt.watched() as stop:
        assert not stop()
        assert attempt.ask_to_stop()
        wait_until(stop, "the workers see it")
    with Attempt.begin(tmp_path / "run").watched() as stop:
        assert not stop(), "the next command would stop at once"


def test_a_command_does_not_stop_the_one_that_took_the_run_over(tmp_path: Path) -> None:
    first, second = Attempt.begin(tmp_path / "run"), Attempt.begin(tmp_path / "run")
    assert not first.ask_to_stop()
    with second.watched() as stop:
        second.check()
        assert not stop()


def test_a_search_that_is_taken_over_writes_nothing_into_the_other_ones_trials(tmp_path: Path) -> None:
    from hymate.tuning.ray_tune import Progress  # imports Ray

    (tmp_path / "traceback.txt").write_text("Traceback\nKeyError: 3")
    trial = SimpleNamespace(config={"index": 0}, error_file=str(tmp_path / "traceback.txt"))
    progress = Progress("mean", tmp_path / "run", Attempt.begin(tmp_path / "run"))
    for taken_over in (False, True):
        if taken_over:
            Attempt.begin(tmp_path / "run")
        progress.on_trial_error(1, [], trial)
        told = tmp_path / "run" / "trials" / "trial-0" / "error.txt"
        assert told.is_file() is not taken_over
        told.unlink(missing_ok=True)
