"""Shared fixtures: where real data is, and a clean process-wide state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real datasets (PhysioNet 2012, MIMIC-IV demo); the test is skipped where there is none."""
    folder = Path(os.environ.get("HYMATE_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set HYMATE_SHARED_DATA to a folder with physionet2012/ and mimic_iv_demo_meds/")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Arrays this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
