"""Pretraining in real processes that are killed, stopped, starved of disk or cut off: always the same end.

Each run must end in the undisturbed run's losses, step by step and bit by bit, and in its last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import PATIENCE_S, ROOT, processes, ray_processes, run, starts, step_of, wait_until
from pretraining_runs import (
    EVAL_EVERY,
    STEPS,
    assert_same,
    command,
    flip_a_bit,
    known_checkpoints,
    last_checkpoint,
    saved_steps,
    scalars,
    started,
    train_workers,
)
from s3 import BUCKET, Server, serving
from s3 import environment as s3_environment
from small_disk import fill, small_disk
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from hymate.storage import paths, remote
from hymate.training.checkpoint import verify

LONG_EVALUATION = "train.eval_rows=200"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "data"
    arguments = ["source=synthetic", f"out={out}", "synthetic.subjects=200", "synthetic.mean_events=300"]
    arguments += ["splits.train=0.3", "splits.tuning=0.6", "splits.held_out=0.1"]  # evaluations that take a while
    subprocess.run([sys.executable, "-m", "hymate.data.prepare", *arguments], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def undisturbed(data: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    done = run(command(data, runs), environment, runs)
    assert done.returncode == 0, done.stderr
    return runs / "pretrain"


@dataclass
class Disturbed:
    """A run to disturb. It meets its fault at step `at`; `since` is when, and `begun` where workers had begun."""

    folder: Path
    arguments: list[str]
    environment: dict[str, str]
    at: int = 0
    since: float = 0.0
    begun: list[int] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        with started(self.arguments, self.environment, self.folder.parent) as driver:
            yield driver

    def until(
        self, condition: Callable[[], object], driver: subprocess.Popen[bytes], look_every_s: float = 0.05
    ) -> None:
        wait_until(lambda: condition() or driver.poll() is not None, "the run gets there", look_every_s)
        assert driver.poll() is None, "the run ended before"

    def meets(self, fault: Callable[[], object]) -> None:
        self.at, self.since = step_of(self.folder), time.monotonic()
        fault()
        self.begun = starts(self.folder)

    def seconds_to_recover(self, driver: subprocess.Popen[bytes]) -> float:
        """From the fault until the run is again where it was."""
        self.until(lambda: len(starts(self.folder)) > len(self.begun) and step_of(self.folder) > self.at, driver)
        return time.monotonic() - self.since

    @property
    def redone(self) -> int:
        """Steps between where the run went on and where it met its fault."""
        return self.at - starts(self.folder)[len(self.begun)]


@pytest.fixture
def disturbed(data: Path, environment: dict[str, str], tmp_path: Path) -> Disturbed:
    temporary = tempfile.mkdtemp(dir=environment["RAY_TMPDIR"])  # killed workers leave what they were about to send
    return Disturbed(tmp_path / "pretrain", command(data, tmp_path), {**environment, "TMPDIR": temporary})


def finish(driver: subprocess.Popen[bytes]) -> None:
    assert driver.wait(PATIENCE_S) == 0


# ------------------------------------------------------------------------------------------------------ workers


@pytest.mark.parametrize("when", ["at a random step", "during an evaluation", "while saving a checkpoint"])
def test_a_worker_is_killed(when: str, disturbed: Disturbed, undisturbed: Path, table: list) -> None:
    temporary, evaluation = Path(disturbed.environment["TMPDIR"]), 2 * EVAL_EVERY
    moment = random.randrange(EVAL_EVERY + 1, STEPS - EVAL_EVERY)
    print(f"to be killed at step {moment}")
    if when == "during an evaluation":
        disturbed.arguments = [
            LONG_EVALUATION if word.startswith("train.eval_rows") else word for word in disturbed.arguments
        ]
    moments: dict[str, Callable[[], object]] = {
        "at a random step": lambda: step_of(disturbed.folder) >= moment,
        "during an evaluation": lambda: step_of(disturbed.folder) == evaluation,
        "while saving a checkpoint": lambda: any(temporary.glob(f"hymate-*/hymate-step-{evaluation}-*")),
    }
    with disturbed.running() as driver:
        disturbed.until(moments[when], driver, 0.002)
        victim = random.choice(sorted(train_workers(disturbed.environment["RAY_TMPDIR"])))
        disturbed.meets(lambda: os.kill(victim, signal.SIGKILL))
        seconds = disturbed.seconds_to_recover(driver)
        finish(driver)
    assert_same(disturbed.folder, undisturbed)
    table.append((f"`kill -9` of a worker {when}", "all workers start again", disturbed.redone, seconds))


# ------------------------------------------------------------------------------------------------------- driver


def test_the_driver_is_killed_and_started_again_at_once(disturbed: Disturbed, undisturbed: Path, table: list) -> None:
    with disturbed.running() as driver:
        disturbed.until(lambda: step_of(disturbed.folder) > EVAL_EVERY + 5, driver)
        disturbed.meets(driver.kill)
    with disturbed.running() as driver:
        seconds = disturbed.seconds_to_recover(driver)
        finish(driver)
    assert_same(disturbed.folder, undisturbed)
    redone = max(0, disturbed.redone)  # the workers may have outlived it to a checkpoint beyond
    table.append(("`kill -9` of the driver", "the same command, at once, continues", redone, seconds))


def test_the_driver_is_asked_to_end(disturbed: Disturbed, undisturbed: Path, table: list) -> None:
    with disturbed.running() as driver:
        disturbed.until(lambda: step_of(disturbed.folder) > EVAL_EVERY + 5, driver)
        driver.terminate()
        assert driver.wait(PATIENCE_S) == 143
    disturbed.meets(lambda: None)
    assert disturbed.at in saved_steps(disturbed.folder)
    with disturbed.running() as driver:
        seconds = disturbed.seconds_to_recover(driver)
        finish(driver)
    assert_same(disturbed.folder, undisturbed)
    assert disturbed.redone == 0
    table.append(("SIGTERM to the driver", "it saves and ends with 143; the same command continues", 0, seconds))


@pytest.mark.parametrize("damage", ["a flipped bit", "a file cut short", "a missing rank"])
def test_the_newest_checkpoint_is_damaged(damage: str, disturbed: Disturbed, undisturbed: Path, table: list) -> None:
    with disturbed.running() as driver:
        disturbed.until(lambda: step_of(disturbed.folder) > 2 * EVAL_EVERY + 2, driver)
        disturbed.meets(driver.kill)
    wait_until(lambda: not ray_processes(disturbed.environment["RAY_TMPDIR"]), "no worker writes any more")
    disturbed.at = step_of(disturbed.folder)  # workers outlive their driver for some steps
    file = last_checkpoint(disturbed.folder) / "optimizer-00001-of-00002.safetensors"
    if damage == "a flipped bit":
        flip_a_bit(file)
    elif damage == "a file cut short":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
        (file.parent / "sha256-00001-of-00002.txt").unlink()
    before = disturbed.since
    done = run(disturbed.arguments, disturbed.environment, disturbed.folder.parent)
    seconds = time.monotonic() - before
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "damaged" in line]
    assert re.fullmatch(rf"{file.parent.name} is damaged: \S+ is .*; the checkpoint before is used", line)
    assert scalars(disturbed.folder, "train/loss") == scalars(undisturbed, "train/loss")
    table.append(
        (f"the newest checkpoint has {damage}", "one line; the checkpoint before is used", disturbed.redone, seconds)
    )


# --------------------------------------------------------------------------------------------------------- node


def test_a_node_is_killed_and_another_joins(disturbed: Disturbed, undisturbed: Path, table: list) -> None:
    ray, port, folder = str(Path(sys.executable).with_name("ray")), "26479", disturbed.environment["RAY_TMPDIR"]
    settings = {**disturbed.environment, "RAY_AUTH_MODE": "disabled"}
    options = ["--num-cpus", "1", "--disable-usage-stats"]

    def start(*arguments: str) -> None:
        subprocess.run([ray, "start", *arguments, *options], env=settings, check=True, capture_output=True, cwd=ROOT)

    def raylets() -> set[int]:
        return {pid for pid, (_, line) in processes().items() if "/raylet " in line and f"{folder}/" in line}

    head = ["--head", "--port", port, "--temp-dir", folder, "--include-dashboard", "false"]
    try:
        start(*head)
        first = raylets()
        start("--address", f"127.0.0.1:{port}")
        (second,) = raylets() - first
        disturbed.environment = {**settings, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        with disturbed.running() as driver:
            disturbed.until(lambda: step_of(disturbed.folder) > EVAL_EVERY + 5, driver)
            disturbed.meets(lambda: os.kill(second, signal.SIGKILL))
            start("--address", f"127.0.0.1:{port}")
            seconds = disturbed.seconds_to_recover(driver)
            finish(driver)
    finally:
        for pid in ray_processes(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert_same(disturbed.folder, undisturbed)
    table.append(("a node is killed", "the run waits for another node, and goes on", disturbed.redone, seconds))


# ------------------------------------------------------------------------------------------------------ storage


def test_the_disk_is_full_while_saving(
    disturbed: Disturbed, undisturbed: Path, data: Path, tmp_path: Path, table: list
) -> None:
    with small_disk(tmp_path / "small") as small:
        disturbed.folder = small / "pretrain"
        disturbed.arguments = command(data, small, "train.max_failures=1")
        with disturbed.running() as driver:
            disturbed.until(lambda: step_of(disturbed.folder) > EVAL_EVERY + 2, driver)
            disturbed.meets(lambda: fill(small))
            driver.wait(PATIENCE_S)
        assert driver.returncode in (1, 2)
        verify(last_checkpoint(disturbed.folder))
        again = run(disturbed.arguments, disturbed.environment, tmp_path)
        assert again.returncode == 2 and "no space left" in again.stderr and len(again.stderr.splitlines()) == 1, (
            again.stderr
        )
        verify(last_checkpoint(disturbed.folder))
        (small / "filling").unlink()
        disturbed.begun = starts(disturbed.folder)
        disturbed.since = time.monotonic()
        with disturbed.running() as driver:
            seconds = disturbed.seconds_to_recover(driver)
            finish(driver)
        assert_same(disturbed.folder, undisturbed)
        table.append(
            ("the disk is full", "one line; after making room the same command continues", disturbed.redone, seconds)
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server, s3_environment(server.environment):
        yield server


def test_the_driver_of_a_run_at_a_url_is_killed(
    server: Server, disturbed: Disturbed, undisturbed: Path, data: Path, tmp_path: Path, table: list
) -> None:
    """Its curves are there while it runs; once all of its processes have ended, the same command continues."""
    environment, runs = {**disturbed.environment, **server.environment}, f"s3://{BUCKET}/killed"
    arguments, folder = command(data, tmp_path, f"run.dir={runs}"), paths.locate(f"{runs}/pretrain")
    with started(arguments, environment, tmp_path) as driver:
        disturbed.until(lambda: known_checkpoints(runs) >= 1, driver)
        with paths.local_copy(folder / "tb") as events:
            seen = [step for step, _ in scalars(events.parent, "train/loss")]
        assert len(seen) >= EVAL_EVERY and seen == [*range(1, len(seen) + 1)]
        driver.kill()
    wait_until(lambda: not ray_processes(environment["RAY_TMPDIR"]), "the killed driver's cluster has ended")
    with paths.local_copy(folder) as copy:
        resumed = max(saved_steps(copy))
        assert resumed < STEPS and not (copy / "bundle").exists()
    since = time.monotonic()
    done = run(arguments, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    with paths.local_copy(folder) as copy:
        assert_same(copy, undisturbed)
        stalls = [step for step, _ in scalars(copy, "checkpoint/stall_fraction")]
    # how long the last checkpoint before the kill took was known, and to be stored, only after it
    due = [*range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)]
    assert stalls in (due, [step for step in due if step != resumed])
    attempts = json.loads((folder / "run.json").read_text())["attempts"]
    assert [attempt["ended"] is None for attempt in attempts] == [True, False]
    happens = "the same command, once its cluster has ended, continues"
    seconds = time.monotonic() - since
    table.append(("`kill -9` of the driver of a run at a URL", happens, f"below {2 * EVAL_EVERY}", seconds))


def test_the_storage_is_out_of_reach_for_a_while(
    server: Server, disturbed: Disturbed, undisturbed: Path, data: Path, tmp_path: Path, table: list
) -> None:
    environment = {**disturbed.environment, **server.environment, remote.PATIENCE: "120"}
    temporary, runs = Path(environment["TMPDIR"]), f"s3://{BUCKET}/a-while"
    arguments, said = command(data, tmp_path, f"run.dir={runs}"), tmp_path / "said.txt"
    with said.open("wb") as file, started(arguments, environment, tmp_path, stdout=file) as driver:
        disturbed.until(lambda: known_checkpoints(runs) >= 1, driver)
        due = (last_point(temporary) // EVAL_EVERY + 1) * EVAL_EVERY
        with server.silent():  # until the next checkpoint is to be sent
            disturbed.until(lambda: last_point(temporary) >= due, driver)
            disturbed.until(lambda: f"no answer from {runs}/pretrain" in said.read_text(), driver)
            began = time.monotonic()
        disturbed.until(lambda: known_checkpoints(runs) >= 2, driver)
        seconds = time.monotonic() - began
        finish(driver)
    with paths.local_copy(paths.locate(f"{runs}/pretrain")) as copy:
        assert_same(copy, undisturbed)
    table.append(("the storage is out of reach for a while", "training waits and goes on", 0, seconds))


def test_the_storage_is_out_of_reach_for_too_long(
    server: Server, disturbed: Disturbed, undisturbed: Path, data: Path, tmp_path: Path, table: list
) -> None:
    environment = {**disturbed.environment, **server.environment, remote.PATIENCE: "8"}
    runs = f"s3://{BUCKET}/for-long"
    arguments = command(data, tmp_path, f"run.dir={runs}", "train.max_failures=1")
    with started(arguments, environment, tmp_path, stderr=subprocess.PIPE) as driver:
        disturbed.until(lambda: known_checkpoints(runs) >= 1, driver)
        began = time.monotonic()
        with server.silent():
            _, said = driver.communicate(timeout=PATIENCE_S)
            ended = time.monotonic()
    assert driver.returncode in (1, 2) and b"can't be reached" in said, said
    with paths.local_copy(paths.locate(f"{runs}/pretrain")) as copy:
        verify(last_checkpoint(copy))
    done = run(arguments, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    with paths.local_copy(paths.locate(f"{runs}/pretrain")) as copy:
        assert_same(copy, undisturbed)
    happens = f"with a patience of 8 s the command ends in one line after {ended - began:.0f} s; later it continues"
    table.append(("the storage is out of reach for long", happens, 0, time.monotonic() - ended))


def last_point(temporary: Path) -> int:
    """The last step of the curves that wait in a temporary folder; they are sent with each checkpoint."""
    files = temporary.glob("hymate-*/hymate-*/events.*")
    return max((event.step for file in files for event in EventFileLoader(str(file)).Load()), default=0)
