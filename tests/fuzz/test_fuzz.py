"""The readers on mutated inputs: what once were findings, and some hundred new ones; `python tests/fuzz` does many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import command
from fuzz.inputs import GOOD, READERS, bench
from fuzz.reader import files_of

CORPUS = Path(__file__).parent / "corpus"
MUTATIONS = 100


@pytest.mark.parametrize("name", READERS)
def test_what_once_was_a_finding_is_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    cases = sorted((CORPUS / name).iterdir())
    with bench(name) as made:
        outcomes = {case.name: made.run(files_of(case)) for case in cases}
    assert outcomes == dict.fromkeys(outcomes, "refused") and outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_mutated_inputs_are_refused_or_read_as_others_read_them(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with bench(name) as made:
        outcomes = {made.run(made.inputs(seed), seed) for seed in range(MUTATIONS)}
    assert {"refused", "accepted"} <= outcomes <= set(GOOD)


def test_a_finding_is_counted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog, in its own process: a limit of no time at all makes every input a finding."""
    monkeypatch.setattr(command, "PATIENCE_S", -1000.0)
    outcomes = command.fuzz("labels", 5, 2, tmp_path, seconds=60)
    assert outcomes == {"hang": 2} and {path.name for path in (tmp_path / "labels").iterdir()} == {"5", "6"}


@pytest.mark.slow
def test_the_command_runs_from_anywhere_and_counts_outcomes(tmp_path: Path) -> None:
    words = [sys.executable, str(Path(__file__).parent), "labels", "--count", "3"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("labels: seeds 0 to 2: 3 inputs: "), done.stderr
