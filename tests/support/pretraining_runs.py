"""The pretraining command on small data: started, looked at from outside, and its files damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from commands import ROOT, points, processes
from safetensors.torch import load_file

from hymate.storage import paths
from hymate.training.checkpoint import verify
from hymate.training.keeper import Kept

STEPS, EVAL_EVERY = 40, 10


def command(data: Path, runs: Path, *overrides: str) -> list[str]:
    settings = {
        "data.path": data,
        "data.context": 512,
        "data.tokens_per_row": 512,
        "data.min_count": 2,
        "model": "debug",
        "objective.time_to_event_weight": 1,  # beside masked events
        "train": "zero2",
        "train.num_workers": 2,
        "train.rows_per_step": 4,
        "train.max_steps": STEPS,
        "train.warmup_steps": 5,
        "train.eval_every": EVAL_EVERY,
        "train.eval_rows": 4,
        "train.log_every": 1,
        "run.dir": runs,
    }
    given = {override.partition("=")[0] for override in overrides}
    kept = [f"{key}={value}" for key, value in settings.items() if key not in given]
    return [sys.executable, str(ROOT / "pretrain" / "run.py"), *kept, *overrides]


def train_workers(folder: str) -> set[int]:
    """The training workers below the raylet whose session is in `folder`."""
    raylets = {pid for pid, (_, line) in processes().items() if "/raylet " in line and f"{folder}/" in line}
    return {pid for pid, (parent, line) in processes().items() if parent in raylets and "RayTrainWorker" in line}


@contextmanager
def started(
    arguments: list[str],
    environment: dict[str, str],
    cwd: Path,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(arguments, env=environment, cwd=cwd, stdout=stdout, stderr=stderr)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def scalars(run_folder: Path, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in points(run_folder, name)]


def saved_steps(run_folder: Path) -> set[int]:
    return {json.loads(path.read_text())["step"] for path in (run_folder / "checkpoints").glob("*/state.json")}


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def assert_same(folder: Path, whole: Path) -> None:
    """Every step once, with the same loss; the same last checkpoint; no checkpoint that is not whole."""
    assert scalars(folder, "train/loss") == scalars(whole, "train/loss"), "steps are missing, doubled or different"
    expected, actual = (last_checkpoint(path) for path in (whole, folder))
    for file in sorted(expected.glob("*.safetensors")):
        ours, theirs = load_file(actual / file.name), load_file(file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        verify(checkpoint)


def last_checkpoint(folder: Path) -> Path:
    kept = Kept(folder / "checkpoints", 1)
    return folder / "checkpoints" / kept.names()[0]


def known_checkpoints(runs: str) -> int:
    """How many checkpoints count."""
    return len(Kept(paths.locate(f"{runs}/pretrain/checkpoints"), 1).names())
