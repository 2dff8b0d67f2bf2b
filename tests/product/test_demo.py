"""`make demo`, small: from nothing to a table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import ROOT, run

SIZES = ["SUBJECTS=80", "PRETRAIN_STEPS=51", "TUNE_STEPS=31", "TRIALS=2"]  # a step beyond the warm-up's 50 and 30


@pytest.mark.slow
def test_the_demo_ends_in_a_table(environment: dict[str, str], tmp_path: Path) -> None:
    venv = Path(sys.executable).parent.parent
    arguments = ["make", "demo", "-o", f"{venv}/.installed", f"VENV={venv}", f"DEMO={tmp_path}", *SIZES]
    done = run(arguments, environment, ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for expected in ("held_out", "best possible", "AUROC [95 % CI]", "bundle ", "tensorboard --logdir"):
        assert expected in done.stdout
    assert (tmp_path / "runs" / "readmission" / "bundle" / "model.safetensors").is_file()
