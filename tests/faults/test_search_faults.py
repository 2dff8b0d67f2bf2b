"""A search whose trial or driver is killed: the same trials, the same scores; a benchmark that is killed."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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


def command(data: Path, runs: Path, num_workers: int = 1) -> list[str]:
    """num_workers: of each trial."""
    line = [sys.executable, str(ROOT / "finetune" / "tune.py"), f"data.path={data}", f"run.dir={runs}", *SETTINGS]
    return [*line, f"train.num_workers={num_workers}", f"train.zero_stage={0 if num_workers == 1 else 3}"]


@pytest.fixture(scope="module")
def undisturbed(
    small_data: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, Any]]:
    """What a search finds whose trials have so many workers."""

    @functools.cache
    def search(num_workers: int) -> dict[str, Any]:
        runs = tmp_path_factory.mktemp("undisturbed")
        done = run(command(small_data, runs, num_workers), environment, runs)
        assert done.returncode == 0, done.stderr
        return what_was_found(runs / "r")

    return search


def what_was_found(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "results.json").read_text())
    trials = [{key: trial[key] for key in ("index", "status", "step", "best")} for trial in found["trials"]]
    return {"trials": trials, **{key: found[key] for key in ("best_trial", "auroc", "auprc", "brier")}}


def reported(folder: Path) -> list[int]:
    """Steps that the trials have reported."""
    newest = (max(trial.glob("step-*/state.json"), default=None) for trial in (folder / "trials").glob("trial-*"))
    return [scores["step"] for file in newest if file for scores in json.loads(file.read_text())["evaluations"]]


def trials(ray_folder: str, kind: str = "ImplicitFunc|_trial") -> set[int]:
    """The trials' processes below the raylet whose session is in `ray_folder`: their first workers."""
    raylets = {pid for pid, (_, line) in processes().items() if "/raylet " in line and f"{ray_folder}/" in line}
    return {
        pid for pid, (parent, line) in processes().items() if parent in raylets and re.search(f"ray::({kind})", line)
    }


@pytest.mark.parametrize(
    ("victim", "num_workers"), [("a trial", 1), ("the driver", 1), ("a worker of a trial", 2), ("the driver", 2)]
)
def test_a_search_is_killed(
    victim: str,
    num_workers: int,
    small_data: Path,
    environment: dict[str, str],
    undisturbed: Callable[[int], dict[str, Any]],
    tmp_path: Path,
    table: list,
) -> None:
    expected = undisturbed(num_workers)
    folder, arguments = tmp_path / "r", command(small_data, tmp_path, num_workers)
    with subprocess.Popen(arguments, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as driver:
        try:
            wait_until(
                lambda: max(reported(folder), default=0) >= 8 or driver.poll() is not None, "a trial is under way"
            )
            before, since = len(reported(folder)), time.monotonic()
            if victim == "a trial":
                os.kill(min(trials(environment["RAY_TMPDIR"])), signal.SIGKILL)
            elif victim == "a worker of a trial":
                os.kill(min(trials(environment["RAY_TMPDIR"], "Peer")), signal.SIGKILL)
            else:
                driver.kill()
                driver.wait()
                driver = subprocess.Popen(arguments, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
            wait_until(lambda: len(reported(folder)) > before + 2 or driver.poll() is not None, "the search goes on")
            seconds = time.monotonic() - since
            assert driver.wait(PATIENCE_S) == 0
        finally:
            driver.kill()
    assert what_was_found(folder) == expected
    happens = "it goes on from the trials' last evaluations"
    workers = "" if num_workers == 1 else f", {num_workers} workers a trial"
    table.append((f"`kill -9` of {victim} while trials run{workers}", happens, f"below {EVAL_EVERY} a trial", seconds))


def test_workers_of_a_trial_do_not_reach_each_other(
    small_data: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The console names hosts and what to set; the record of the run names no host."""
    wrong = {**environment, "GLOO_SOCKET_IFNAME": "nowhere0"}
    done = run([*command(small_data, tmp_path, 2), "search.max_failures=0", "search.num_trials=1"], wrong, tmp_path)
    line = next(line for line in done.stdout.splitlines() if line.startswith("trial-0 failed: "))
    host = f"{socket.gethostname()} is 127.0.0.1 on nowhere0"
    assert done.returncode == 2, done.stderr
    assert host in line and "Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in line
    assert "trials failed, the first with hymate.training.loop.NotTogether (" in done.stderr
    assert "nowhere0" not in (tmp_path / "r" / "run.json").read_text()


def test_the_disk_is_full_while_a_search_saves(
    small_data: Path,
    environment: dict[str, str],
    undisturbed: Callable[[int], dict[str, Any]],
    tmp_path: Path,
    table: list,
) -> None:
    expected = undisturbed(1)
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
        assert what_was_found(folder) == expected
    happens = "it ends; after making room the same command continues"
    table.append(("the disk is full while a search saves", happens, f"below {EVAL_EVERY} a trial", seconds))


def test_a_benchmark_is_killed(small_data: Path, environment: dict[str, str], tmp_path: Path, table: list) -> None:
    folder = tmp_path / "benchmark-readmission"
    settings = ["task=readmission", f"data.path={small_data}", f"run.dir={tmp_path}", "model=debug", "data.context=32"]
    settings += ["data.tokens_per_row=256", "data.min_count=1", "train.max_steps=4", "train.eval_every=2"]
    settings += ["train.warmup_steps=1", "folds=2", "seeds=1", "only=[gradient_boosting,scratch]", "max_concurrent=1"]
    arguments = [sys.executable, str(ROOT / "finetune" / "benchmark.py"), *settings]
    first = folder / "runs" / "gradient_boosting-all-seed0-fold0.json"
    with subprocess.Popen(arguments, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as driver:
        wait_until(lambda: first.is_file() or driver.poll() is not None, "the first run is there")
        driver.kill()
    assert driver.returncode == -signal.SIGKILL and not (folder / "cross_validation.json").exists()
    there = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir() if path.stem == first.stem}
    since = time.monotonic()
    done = run(arguments, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert there and {path: path.stat().st_mtime_ns for path in there} == there
    assert len(json.loads((folder / "cross_validation.json").read_text())["rows"]) == 2
    happens = "it goes on with the runs that are not there"
    table.append(("`kill -9` of a benchmark", happens, "at most one run", time.monotonic() - since))
