"""A search whose trial or driver is killed: the same trials, the same scores."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, ROOT, processes, run, wait_until
from small_disk import fill, small_disk

EVAL_EVERY = 4
SETTINGS = [
    "task=readmission",
    "init=null",
    "model=debug",
    "run.name=r",
    "data.context=64",
    "data.tokens_per_row=64",
    "data.min_count=1",
    "train.max_steps=24",
    f"train.eval_every={EVAL_EVERY}",
    "train.warmup_steps=1",
    "train.log_every=1",
    "search.num_trials=2",
    "search.grace_steps=24",
    "report.boosting=false",
]


@pytest.fixture(scope="module")
def environment(environment: dict[str, str]) -> dict[str, str]:
    return {**environment, "HYMATE_OPS": "reference"}


def command(data: Path, runs: Path) -> list[str]:
    return [sys.executable, str(ROOT / "finetune" / "tune.py"), f"data.path={data}", f"run.dir={runs}", *SETTINGS]


@pytest.fixture(scope="module")
def undisturbed(
    small_data: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    runs = tmp_path_factory.mktemp("undisturbed")
    done = run(command(small_data, runs), environment, runs)
    assert done.returncode == 0, done.stderr
    return what_was_found(runs / "r")


def what_was_found(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "results.json").read_text())
    trials = [{key: trial[key] for key in ("index", "status", "step", "best")} for trial in found["trials"]]
    return {"trials": trials, **{key: found[key] for key in ("best_trial", "auroc", "auprc", "brier")}}


def reported(folder: Path) -> list[int]:
    """Steps that the trials have reported."""
    newest = (max(trial.glob("step-*/state.json"), default=None) for trial in (folder / "trials").glob("trial-*"))
    return [scores["step"] for file in newest if file for scores in json.loads(file.read_text())["evaluations"]]


def trials(ray_folder: str) -> set[int]:
    """The trials' processes below the raylet whose session is in `ray_folder`."""
    raylets = {pid for pid, (_, line) in processes().items() if "/raylet " in line and f"{ray_folder}/" in line}
    return {
        pid
        for pid, (parent, line) in processes().items()
        if parent in raylets and re.search(r"ray::(ImplicitFunc|_trial)", line)
    }


@pytest.mark.parametrize("victim", ["a trial", "the driver"])
def test_a_search_is_killed(
    victim: str, small_data: Path, environment: dict[str, str], undisturbed: dict[str, Any], tmp_path: Path, table: list
) -> None:
    folder, arguments = tmp_path / "r", command(small_data, tmp_path)
    with subprocess.Popen(arguments, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as driver:
        try:
            wait_until(
                lambda: max(reported(folder), default=0) >= 8 or driver.poll() is not None, "a trial is under way"
            )
            before, since = len(reported(folder)), time.monotonic()
            if victim == "a trial":
                os.kill(min(trials(environment["RAY_TMPDIR"])), signal.SIGKILL)
            else:
                driver.kill()
                driver.wait()
                driver = subprocess.Popen(arguments, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
            wait_until(lambda: len(reported(folder)) > before + 2 or driver.poll() is not None, "the search goes on")
            seconds = time.monotonic() - since
            assert driver.wait(PATIENCE_S) == 0
        finally:
            driver.kill()
    assert what_was_found(folder) == undisturbed
    happens = "it goes on from the trials' last evaluations"
    table.append((f"`kill -9` of {victim} of a search", happens, f"below {EVAL_EVERY} a trial", seconds))


def test_the_disk_is_full_while_a_search_saves(
    small_data: Path, environment: dict[str, str], undisturbed: dict[str, Any], tmp_path: Path, table: list
) -> None:
    with small_disk(tmp_path / "small") as small:
        folder, arguments = small / "r", [*command(small_data, small), "search.max_failures=1"]
        with subprocess.Popen(
            arguments, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as driver:
            wait_until(
                lambda: max(reported(folder), default=0) >= 8 or driver.poll() is not None, "a trial is under way"
            )
            before = len(reported(folder))
            fill(small)
            _, said = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode in (1, 2) and re.search(r"\berror: .*no space left", said.splitlines()[-1]), said
        assert "Traceback" not in said, said
        (small / "filling").unlink()
        since = time.monotonic()
        with subprocess.Popen(arguments, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as driver:
            wait_until(lambda: len(reported(folder)) > before + 2 or driver.poll() is not None, "the search goes on")
            seconds = time.monotonic() - since
            assert driver.wait(PATIENCE_S) == 0
        assert what_was_found(folder) == undisturbed
    happens = "it ends; after making room the same command continues"
    table.append(("the disk of a search is full", happens, f"below {EVAL_EVERY} a trial", seconds))
