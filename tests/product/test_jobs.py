"""The documented Ray jobs on a cluster of this machine, started and stopped with cluster/local.sh."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from commands import ROOT, listening, points, ray_processes, run, step_of, wait_until
from small_cohort import SIZES

from hymate.command import load
from hymate.data.prepare import PrepareConfig, prepare
from hymate.inference.bundle import read_bundle

EVAL_EVERY = 5
SHORT = ["data.context=64", "data.tokens_per_row=64", "data.min_count=1", "train.warmup_steps=1"]
PRETRAIN = [*SHORT, "model=debug", "train.num_workers=2", "train.rows_per_step=2", "train.eval_rows=2"]
PRETRAIN += [f"train.eval_every={EVAL_EVERY}", "train.log_every=1"]
TUNE = [*SHORT, "train.max_steps=4", "train.eval_every=2", "search.num_trials=1"]
TUNE += ["report.boosting=false", "device=cpu"]
NEVER_ENDING = "train.max_steps=1000000"
NOT_FOR_UPLOAD = (
    "runs/pretrain/weights.bin",
    "data/histories/0.bin",
    "demo/runs/log.txt",
    ".venv/bin/tool",
    "mine.parquet",
)
LOCAL = str(ROOT / "cluster" / "local.sh")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Cluster:
    """folder: where Ray's files are; address: the dashboard's URL; environment: a user's who may submit."""

    folder: Path
    address: str
    environment: dict[str, str]

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(int((self.folder / "pid").read_text()))

    def job(self, submission_id: str, what: str = "") -> dict[str, Any]:
        """What Ray says about a job. what: "/logs" for what it printed."""
        request = urllib.request.Request(f"{self.address}/api/jobs/{submission_id}{what}")
        request.add_header("Authorization", f"Bearer {(self.folder / 'token').read_text()}")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="hy", dir="/tmp"))  # the paths of Ray's sockets are limited
    settings = {
        "HYMATE_CLUSTER": str(folder),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_AUTH_MODE": "token",
        "COLUMNS": "80",  # ps would cut lines there
        "RAY_worker_niceness": "0",  # else whatever runs on this machine goes first
        "HYMATE_OPS": "reference",  # a new upload compiles its kernels, which takes longer than all the rest
        "TORCHDYNAMO_DISABLE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    environment = inherited | settings
    with taken_port(52365):  # the job agent's default, which any other Ray of this machine holds
        started = run(
            [LOCAL, "start", "--num-cpus", "2", "--num-gpus", "1", "--dashboard-port", str(free_port())],
            environment,
            ROOT,
        )
    assert started.returncode == 0, started.stderr
    (address,) = re.findall(r"--address (\S+)", started.stdout)
    cluster = Cluster(folder, address, environment)
    yield cluster
    left = [cluster.process, *cluster.process.children(recursive=True)]
    stopped = run([LOCAL, "stop"], environment, ROOT)
    assert stopped.returncode == 0, stopped.stderr
    wait_until(lambda: not any(alive(process) for process in left), "all of the cluster's processes end")
    shutil.rmtree(folder)


@contextmanager
def taken_port(port: int) -> Iterator[None]:
    try:
        server = socket.create_server(("127.0.0.1", port))
    except OSError:  # somebody else's: as good
        yield
    else:
        with server:
            yield


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which somebody has worked."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pretrain", "finetune", "configs", "hymate"):
        shutil.copytree(ROOT / name, folder / name)
    for name in (".gitignore", ".rayignore", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for name in NOT_FOR_UPLOAD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(1 << 20))
    return folder


def submit(
    cluster: Cluster, checkout: Path, line: str, *options: str, submission_id: str
) -> subprocess.CompletedProcess:
    words = shlex.split(line)
    assert words[:3] == ["ray", "job", "submit"]
    return run([*words[:3], "--submission-id", submission_id, *words[3:], *options], cluster.environment, checkout)


def documented(file: str, script: str, address: str, **shared: Path) -> str:
    """The documentation's job that runs `script`, with what its placeholders stand for; shared: folders in /shared."""
    (line,) = re.findall(rf"^ray job submit .* python {re.escape(script)} .*$", (ROOT / file).read_text(), flags=re.M)
    for placeholder, actual in {"http://HEAD:8265": address, **{f"/shared/{k}": v for k, v in shared.items()}}.items():
        assert placeholder in line
        line = line.replace(placeholder, str(actual))
    return line


# ------------------------------------------------------------------------------------------------------ cluster


def test_the_cluster_is_closed_to_others(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.address}/api/jobs/")
    assert (cluster.folder / "token").stat().st_mode & 0o777 == 0o600
    assert cluster.folder.stat().st_mode & 0o777 == 0o700
    hosts = listening(cluster.process)
    assert hosts and all(host.is_loopback for host in hosts), hosts


def test_a_running_cluster_says_so_and_is_not_started_twice(cluster: Cluster) -> None:
    again = run([LOCAL, "start"], cluster.environment, ROOT)
    assert again.returncode == 1 and "is running" in again.stderr and len(again.stderr.splitlines()) == 1
    wait_until(lambda: "/2.0 CPU" in run([LOCAL, "status"], cluster.environment, ROOT).stdout, "it knows its CPUs")
    elsewhere = run([LOCAL, "status"], {**cluster.environment, "HYMATE_CLUSTER": f"{cluster.folder}/other"}, ROOT)
    assert elsewhere.returncode == 1 and "no cluster is running" in elsewhere.stderr


# --------------------------------------------------------------------------------------------------------- jobs


@pytest.fixture(scope="module")
def stopped(
    cluster: Cluster, checkout: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[Any]]:
    """The documented job, stopped in the middle: its command line, its run and the losses it had recorded."""
    runs = tmp_path_factory.mktemp("runs")
    line = documented("docs/cluster.md", "pretrain/run.py", cluster.address, data=small_data, runs=runs)
    line = f"{line.replace(' -- ', ' --no-wait -- ')} {shlex.join(PRETRAIN)}"
    submitted = submit(cluster, checkout, line, NEVER_ENDING, submission_id="first")
    assert submitted.returncode == 0, submitted.stderr
    wait_until(
        lambda: step_of(runs / "pretrain") > 2 * EVAL_EVERY or cluster.job("first")["status"] == "FAILED",
        "the second checkpoint is there",
    )
    assert cluster.job("first")["status"] == "RUNNING", cluster.job("first")
    stop = run(["ray", "job", "stop", "--address", cluster.address, "first"], cluster.environment, checkout)
    assert stop.returncode == 0, stop.stderr
    assert cluster.job("first")["status"] == "STOPPED"
    # the cluster says that it has one, which is not there
    said = cluster.job("first", "/logs")["logs"]
    assert "computing on cpu: train.num_workers=2 needs 2 GPUs, and the cluster has 1; device=cuda wai" in said
    return line.replace(" --no-wait", ""), runs / "pretrain", points(runs / "pretrain", "train/loss")


@pytest.fixture(scope="module")
def pretrained(cluster: Cluster, checkout: Path, stopped: tuple[str, Path, list[Any]]) -> Path:
    """The stopped run, submitted once more, with one worker of two, and finished."""
    line, folder, before = stopped
    changes = [f"train.max_steps={len(before) + EVAL_EVERY}", "train.num_workers=1", "device=cpu"]
    again = submit(cluster, checkout, line, *changes, submission_id="second")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"bundle: {folder}/bundle" in again.stdout
    return folder


def test_a_stopped_job_goes_on_when_it_is_submitted_again(
    stopped: tuple[str, Path, list[Any]], pretrained: Path
) -> None:
    before, after = stopped[2], points(pretrained, "train/loss")
    assert [point.step for point in after] == [*range(1, len(before) + EVAL_EVERY + 1)]
    assert after[: len(before)] == before, "the job was not saved where it stood"
    assert read_bundle(pretrained, kind="pretrained").model.d_model == 32


def test_the_upload_is_the_code_and_nothing_else(cluster: Cluster, checkout: Path, pretrained: Path) -> None:
    (package,) = (cluster.folder / "ray" / "session_latest" / "runtime_resources").glob("working_dir_files/_ray_pkg_*/")
    files = [file for file in package.rglob("*") if file.is_file() and file.parent.name != "__pycache__"]
    uploaded = {str(file.relative_to(package)): file.stat().st_size for file in files}
    code = {str(file.relative_to(checkout)) for file in checkout.rglob("*.py")}
    assert code - set(NOT_FOR_UPLOAD) <= uploaded.keys()
    assert not uploaded.keys() & set(NOT_FOR_UPLOAD)
    assert sum(size for file, size in uploaded.items() if not file.startswith("hymate/bundles/")) < 2 << 20


def test_a_search_runs_as_a_job(cluster: Cluster, checkout: Path, small_data: Path, pretrained: Path) -> None:
    runs = pretrained.parent
    line = documented("docs/cluster.md", "finetune/tune.py", cluster.address, data=small_data, runs=runs)
    line = f"{line} {shlex.join(TUNE)}"
    tuned = submit(cluster, checkout, line, submission_id="search")
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    found = json.loads((runs / "tune-readmission" / "results.json").read_text())
    assert len(found["trials"]) == 1 and found["init"] == str(pretrained)
    assert found["boosting"] == {"left_out": "report.boosting=false"}
    assert read_bundle(runs / "tune-readmission", kind="risk").tasks == ["readmission"]
    shared = {"data": small_data, "runs": runs, "predictions": runs / "predictions"}
    line = documented("docs/cluster.md", "-m hymate.predict", cluster.address, **shared)
    done = submit(cluster, checkout, line, submission_id="predict")
    assert done.returncode == 0, done.stdout + done.stderr
    probability = pq.read_table(runs / "predictions")["predicted_boolean_probability"].to_numpy()
    assert len(probability) == 2 * sum(SIZES.values()) and np.isfinite(probability).all()


def test_preparing_as_a_job_survives_a_killed_process(cluster: Cluster, checkout: Path, tmp_path: Path) -> None:
    """And writes what it writes in processes of this machine."""
    sizes = ["synthetic.subjects=400", "synthetic.mean_events=200", "synthetic.shard_events=2000"]
    prepare(load("prepare", ["source=synthetic", "workers=1", *sizes, f"out={tmp_path}/raw"], PrepareConfig))
    settings = ["known=none"]
    here = [sys.executable, "-m", "hymate.data.prepare", "source=meds", f"raw={tmp_path}/raw", f"out={tmp_path}/here"]
    made = run([*here, *settings], dict(os.environ), ROOT)
    assert made.returncode == 0, made.stderr
    line = documented(
        "docs/cluster.md", "-m hymate.data.prepare", cluster.address, meds=tmp_path / "raw", data=tmp_path / "data"
    )
    line = f"{line.replace(' -- ', ' --no-wait -- ')} {shlex.join(settings)}"
    submitted = submit(cluster, checkout, line, submission_id="prepare")
    assert submitted.returncode == 0, submitted.stderr

    def kill_tasks() -> set[int]:
        tasks = ray_processes(str(cluster.folder), "ray::_call")
        for task in tasks:
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(task, signal.SIGKILL)
        return tasks

    wait_until(lambda: kill_tasks() or cluster.job("prepare")["status"] == "FAILED", "a task runs")
    wait_until(lambda: cluster.job("prepare")["status"] not in ("PENDING", "RUNNING"), "the job ends")
    assert cluster.job("prepare")["status"] == "SUCCEEDED", cluster.job("prepare")
    files = {file.relative_to(tmp_path / "here") for file in (tmp_path / "here").rglob("*.parquet")}
    assert len(files) > 40
    for file in files:
        assert (tmp_path / "data" / file).read_bytes() == (tmp_path / "here" / file).read_bytes(), file


def test_a_job_whose_results_would_be_lost_is_refused(cluster: Cluster, checkout: Path, small_data: Path) -> None:
    line = (
        f"ray job submit --address {cluster.address} --working-dir . -- python pretrain/run.py data.path={small_data}"
    )
    refused = submit(cluster, checkout, line, submission_id="lost")
    assert refused.returncode != 0 and cluster.job("lost")["status"] == "FAILED"
    assert "error: run.dir=runs: a Ray job runs in a temporary folder" in refused.stdout
