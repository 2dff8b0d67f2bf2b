"""`make demo`, small: from nothing to a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import ROOT, run

# what is given as a number of steps goes into a command as it is
SIZES = ["SUBJECTS=60", *(f"{name}_STEPS=2 train.warmup_steps=1" for name in ("PRETRAIN", "TUNE", "WHEN")), "TRIALS=1"]


@pytest.mark.slow
def test_the_demo_ends_in_a_table(environment: dict[str, str], tmp_path: Path) -> None:
    venv = Path(sys.executable).parent.parent
    arguments = ["make", "demo", "-o", f"{venv}/.installed", f"VENV={venv}", f"DEMO={tmp_path}", *SIZES]
    done = run(arguments, environment, ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for expected in ("held_out", "best possible", "AUROC [95 % CI]", "90 days", "bundle ", "tensorboard --logdir"):
        assert expected in done.stdout
    for name in ("readmission", "time_to_readmission"):
        assert (tmp_path / "runs" / name / "bundle" / "model.safetensors").is_file()
        assert "![" in (tmp_path / "runs" / name / "report.md").read_text()
