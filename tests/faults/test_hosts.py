"""Pretraining and a search over hosts that share nothing but a network and a storage, and lose them.

Each run must end in the result of one host alone, bit by bit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import PATIENCE_S, ROOT, wait_until
from hosts import PORT, Host, Network, joined, network, start_ray
from pretraining_runs import assert_same, command, known_checkpoints, scalars
from s3 import BUCKET, Server, serving
from s3 import environment as s3_environment
from small_models import vocabulary_of, write_risk_bundle

from hymate.storage import paths

DATA = f"s3://{BUCKET}/data"
STEPS, EVAL_EVERY = 150, 25
SHORT = ["data.context=64", "data.tokens_per_row=64", "data.min_count=1", "train=zero3", "train.num_workers=3"]
SHORT += ["train.rows_per_step=6", "train.eval_rows=3", f"train.max_steps={STEPS}", f"train.eval_every={EVAL_EVERY}"]
NAMES = ("127.0.1.1", None, "10.99.0.1")
NO_DASHBOARD = ("--include-dashboard", "false")
ORDER = [("subject_id", "ascending"), ("prediction_time", "ascending")]
RISK = "predicted_boolean_probability"
RAYS_OWN = re.compile(r"Traceback|\*\*\* SIG|ray::|core_worker|\.cc:\d+|\(raylet")


@dataclass
class Machines:
    """Hosts of one network and the storage that they reach."""

    net: Network
    server: Server
    logs: Path
    begun: list[Path] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, str]:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64, "RAY_JOB_STOP_WAIT_TIME_S": "120"}
        quick = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HYMATE_OPS": "reference"}
        return {**self.server.environment, **token, **quick, "HYMATE_STORAGE_PATIENCE_S": "120"}

    def cluster(self, count: int, *options: str, **cable: Any) -> list[Host]:
        """New hosts with one CPU each for workers; the first is the head. Their names are no use to others."""
        hosts = [self.net.add(NAMES[number % len(NAMES)], **cable) for number in range(count)]
        start_ray(hosts[0], None, self.settings, *(options or NO_DASHBOARD))
        for host in hosts[1:]:
            start_ray(host, hosts[0], self.settings)
        return hosts

    @contextmanager
    def running(self, arguments: list[str], on: Host, head: Host) -> Iterator[Command]:
        """A command on one of the hosts."""
        log = self.logs / f"log-{len(self.begun)}.txt"
        self.begun.append(log)
        with log.open("w") as file:
            environment = {**self.settings, "RAY_ADDRESS": f"{head.address}:{PORT}"}
            process = on.start(*arguments, env=environment, stdout=file, stderr=file)
        try:
            yield Command(process, log)
        finally:
            process.kill()


@dataclass
class Command:
    """A command that runs on a host."""

    process: subprocess.Popen[str]
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], object], what: str) -> None:
        wait_until(lambda: condition() or self.process.poll() is not None, what, 0.5)
        assert self.process.poll() is None, self.said()

    def finish(self) -> str:
        """Runs to a good end, without a word that only Ray's makers understand."""
        assert self.process.wait(PATIENCE_S) == 0, self.said()
        assert not RAYS_OWN.search(self.said()), self.said()
        return self.said()


@pytest.fixture(scope="module")
def machines(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("hosts")
    with (
        network(folder) as net,
        serving(folder, net.outside) as server,
        s3_environment(server.environment | {"HYMATE_STORAGE_PATIENCE_S": "120"}),
    ):
        paths.upload_files(small_data, paths.locate(DATA))
        yield Machines(net, server, folder)


@pytest.fixture
def runs(machines: Machines, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test's runs are; its hosts end with it."""
    yield f"s3://{BUCKET}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"
    for host in machines.net.hosts:
        host.kill()


def pretraining(runs: str, *overrides: str) -> list[str]:
    return command(DATA, runs, *SHORT, *overrides)


@pytest.fixture(scope="module")
def alone(machines: Machines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single host."""
    runs, host = f"s3://{BUCKET}/alone", machines.net.add()
    start_ray(host, None, machines.settings, *NO_DASHBOARD, "--num-cpus", "3")
    with machines.running(pretraining(runs), host, host) as driver:
        driver.finish()
    host.kill()
    folder = tmp_path_factory.mktemp("alone") / "pretrain"
    paths.download(paths.locate(f"{runs}/pretrain"), folder)
    return folder


def assert_like(runs: str, alone: Path) -> None:
    with paths.local_copy(paths.locate(f"{runs}/pretrain")) as copy:
        assert_same(copy, alone)


def record(runs: str) -> dict[str, Any]:
    return json.loads(paths.locate(f"{runs}/pretrain/run.json").read_text())


def begun(runs: str) -> list[int]:
    """The steps at which workers began."""
    return [start["step"] for attempt in record(runs)["attempts"] for start in attempt["starts"]]


def states(folder: str) -> list[dict[str, Any]]:
    """Of all checkpoints below a folder."""
    files = paths.locate(folder).files()
    return [json.loads(file.read_text()) for file in files if file.name == "state.json"]


def step_of(said: str) -> int:
    return max((int(step) for step in re.findall(r"^step (\d+)/", said, flags=re.M)), default=0)


def passes(seconds: float, since: float) -> None:
    wait_until(lambda: time.monotonic() - since > seconds, f"{seconds} s pass")


# ------------------------------------------------------------------------------------------------------- a host


def test_a_host_is_cut_off_for_20_s(machines: Machines, runs: str, alone: Path, table: list) -> None:
    head, _, last = machines.cluster(3)
    with machines.running(pretraining(runs), head, head) as driver:
        driver.until(lambda: known_checkpoints(runs) >= 1, "the first checkpoint is there")
        last.cut()
        cut = time.monotonic()
        driver.until(lambda: f"no answer from {last.name} ({last.address})" in driver.said(), "it is said")
        seen = time.monotonic() - cut
        passes(20, cut)
        last.mend()
        mended, step = time.monotonic(), driver.said().rfind("step ")
        driver.until(lambda: driver.said().rfind("step ") > step, "it goes on")
        seconds = time.monotonic() - mended
        driver.finish()
    assert begun(runs) == [0]
    assert_like(runs, alone)
    table.append(("a host is cut off for 20 s", f"said after {seen:.0f} s; the run goes on by itself", 0, seconds))


@pytest.mark.parametrize("spare", [True, False])
def test_a_host_is_cut_off_for_90_s(spare: bool, machines: Machines, runs: str, alone: Path, table: list) -> None:
    head, _, last = machines.cluster(3)
    with machines.running(pretraining(runs), head, head) as driver:
        driver.until(lambda: known_checkpoints(runs) >= 1, "the first checkpoint is there")
        if spare:  # it joins now, so the host that is cut off is one that trains
            start_ray(machines.net.add(), head, machines.settings)
        last.cut()
        cut = time.monotonic()
        if spare:
            driver.until(lambda: len(begun(runs)) == 2, "the spare takes its place")
            seconds = time.monotonic() - cut
            happens = "the run goes on with the spare"
            passes(90, cut)
            last.mend()
        else:
            driver.until(lambda: f"Ray has given up {last.name} ({last.address})" in driver.said(), "it is said")
            passes(90, cut)
            last.mend()
            mended = time.monotonic()
            driver.until(lambda: len(begun(runs)) == 2, "the host has joined again and the run goes on")
            seconds = time.monotonic() - mended
            happens = "the host joins again by itself, and the run goes on"
            assert joined(last) == 2
            assert not RAYS_OWN.search((last.folder / "ray.log").read_text())
        driver.finish()
    first, second = begun(runs)
    assert (first, second % EVAL_EVERY) == (0, 0) and second > 0
    assert_like(runs, alone)
    table.append(
        (f"a host is cut off for 90 s, {'a' if spare else 'no'} spare", happens, f"below {EVAL_EVERY}", seconds)
    )


def test_the_heads_host_is_lost(machines: Machines, runs: str, alone: Path, table: list) -> None:
    """The command runs on another host, and ends in a line; on a new cluster it continues."""
    head, other, _ = machines.cluster(3)
    with machines.running(pretraining(runs), other, head) as driver:
        driver.until(lambda: known_checkpoints(runs) >= 1, "the first checkpoint is there")
        head.kill()
        killed = time.monotonic()
        assert driver.process.wait(PATIENCE_S) != 0
        ended = time.monotonic() - killed
        said = driver.said()
    assert re.search(rf"^no answer from the cluster's head \({head.address}:{PORT}\): ", said, flags=re.M), said
    assert not RAYS_OWN.search(said), said
    assert said.splitlines()[-1].startswith("error: "), said
    new = machines.cluster(3)
    began = time.monotonic()
    with machines.running(pretraining(runs), new[0], new[0]) as driver:
        driver.until(lambda: len(begun(runs)) == 2, "it continues")
        seconds = time.monotonic() - began
        driver.finish()
    assert_like(runs, alone)
    happens = f"the command ends in a line after {ended:.0f} s; on another cluster it continues"
    table.append(("the head's host is lost", happens, f"below {EVAL_EVERY}", seconds))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_host_of_a_search_is_killed(num_workers: int, machines: Machines, runs: str, table: list) -> None:
    """A host holds one worker: trials of one go on on the other host, those of two when another one has joined."""
    settings = ["task=readmission", "init=null", "model=debug", "run.name=r", f"data.path={DATA}", "data.context=64"]
    settings += ["data.tokens_per_row=64", "data.min_count=1", "train.max_steps=40", "train.eval_every=4"]
    settings += ["train.warmup_steps=1", "train.log_every=1", f"search.num_trials={3 if num_workers == 1 else 1}"]
    settings += ["search.grace_steps=40", "report.boosting=false"]
    settings += [f"train.num_workers={num_workers}", f"train.zero_stage={0 if num_workers == 1 else 3}"]
    (python, _), found = pretraining(runs)[:2], {}
    script = str(ROOT / "finetune" / "tune.py")
    for name in ("undisturbed", "disturbed"):
        head, other = machines.cluster(2)
        folder = f"{runs}/{name}"
        with machines.running([python, script, f"run.dir={folder}", *settings], head, head) as driver:
            if name == "disturbed":
                driver.until(lambda at=folder: len(states(f"{at}/r")) >= 3 - num_workers, "trials are under way")
                other.kill()
                if num_workers == 2:
                    driver.until(lambda: "waiting for machines" in driver.said(), "it says what it waits for")
                    start_ray(machines.net.add(None), head, machines.settings)
                killed, lines = time.monotonic(), driver.said().count("\n")
                driver.until(lambda so_far=lines: driver.said().count("\n") > so_far + 2, "the search goes on")
                seconds = time.monotonic() - killed
            driver.finish()
        results = json.loads(paths.locate(f"{folder}/r/results.json").read_text())
        trials = [{key: trial[key] for key in ("index", "status", "step", "best")} for trial in results["trials"]]
        found[name] = trials, [results[key] for key in ("best_trial", "auroc", "auprc", "brier")]
    assert found["disturbed"] == found["undisturbed"]
    workers = "" if num_workers == 1 else f", {num_workers} workers each"
    happens = "they go on elsewhere" if num_workers == 1 else "they wait for another host and go on"
    table.append((f"a host on which trials run is killed{workers}", happens, "below 4 a trial", seconds))


# ------------------------------------------------------------------------------------------------------ network


def test_slow_cables(machines: Machines, runs: str, alone: Path, table: list) -> None:
    """20 Mbit/s, and 100 ms there and back. It is stopped early, for a step takes seconds."""
    hosts = machines.cluster(3, delay_s=0.025)
    for host in hosts:
        host.narrow("20mbit")
    with machines.running(pretraining(runs), hosts[0], hosts[0]) as driver:
        driver.until(lambda: step_of(driver.said()) >= 20, "twenty steps are done")
        hosts[0].run("pkill", "-TERM", "-f", "pretrain/run.py")
        assert driver.process.wait(PATIENCE_S) == 143, driver.said()
    with paths.local_copy(paths.locate(f"{runs}/pretrain")) as copy:
        done = scalars(copy, "train/loss")
    assert len(done) >= 20 and done == scalars(alone, "train/loss")[: len(done)]
    *_, speed = re.findall(r"([\d,]+) events/s", driver.said())
    table.append(("20 Mbit/s and 100 ms", f"{speed} events/s", 0, 0.0))


def test_hosts_that_do_not_reach_each_other(machines: Machines, runs: str) -> None:
    hosts = [machines.net.add() for _ in range(2)]
    wrong = {**machines.settings, "GLOO_SOCKET_IFNAME": "lo"}
    start_ray(hosts[0], None, wrong, *NO_DASHBOARD)
    start_ray(hosts[1], hosts[0], wrong)
    with machines.running(pretraining(runs, "train.num_workers=2"), hosts[0], hosts[0]) as driver:
        assert driver.process.wait(PATIENCE_S) == 1
    line = driver.said().splitlines()[-1]
    assert line.startswith("error: the workers don't reach each other") and "Set GLOO_SOCKET_IFNAME" in line
    assert all(f"{host.name} is {host.address} on lo" in line for host in hosts)
    assert record(runs)["outcome"] == {"state": "failed", "reason": "NotTogether"}, "a run folder names no host"
    assert not RAYS_OWN.search(driver.said())


# -------------------------------------------------------------------------------------------------------- a job


def test_a_stopped_job_on_a_storage_loses_nothing(machines: Machines, runs: str, table: list) -> None:
    head, _ = machines.cluster(2, "--include-dashboard", "true")
    ray, address = ["ray", "job"], ["--address", "http://127.0.0.1:8265"]
    line = pretraining(runs, "train.num_workers=2", "train.max_steps=1000000")
    submitted = head.run(
        *ray, "submit", *address, "--no-wait", "--submission-id", "it", "--", *line, env=machines.settings
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_until(lambda: known_checkpoints(runs) >= 1, "the first checkpoint is there", 0.5)
    began = time.monotonic()
    stopped = head.run(*ray, "stop", *address, "it", env=machines.settings)
    seconds = time.monotonic() - began
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    said = head.run(*ray, "logs", *address, "it", env=machines.settings).stdout
    (step,) = re.findall(r"stopped and saved at step (\d+)", said)
    assert int(step) in {state["step"] for state in states(f"{runs}/pretrain")}
    assert int(step) % EVAL_EVERY, "it would have been saved then in any case"
    table.append(("`ray job stop`, runs on a storage", "saved where it stands", 0, seconds))


# -------------------------------------------------------------------------------------------- from raw data to risks


def test_a_host_is_killed_in_each_step_from_raw_data_to_predictions(
    machines: Machines, runs: str, tmp_path: Path, table: list
) -> None:
    """Data, runs and predictions are what they are on one host."""
    made = "source=synthetic synthetic.subjects=240 synthetic.mean_events=300 synthetic.shard_events=2000"
    subprocess.run([*module("hymate.data.prepare"), *made.split(), f"out={tmp_path}/raw"], check=True)
    here = ["source=meds", f"raw={tmp_path}/raw", f"out={tmp_path}/data", "known=none"]
    subprocess.run([*module("hymate.data.prepare"), *here], check=True)
    raw, data, risks = f"{runs}/raw", f"{runs}/data", f"{runs}/risks"
    paths.upload_files(tmp_path / "raw", paths.locate(raw))
    shards = len(list((tmp_path / "raw" / "data").rglob("*.parquet")))
    assert shards > 20

    prepare = [*module("hymate.data.prepare"), "source=meds", f"raw={raw}", f"out={data}", "known=none"]
    seconds = loses_a_host(machines, prepare, lambda: len(parquets(f"{data}/data")) >= 3)
    files = parquets(str(tmp_path / "data"))
    assert len(files) > shards
    for name in files:
        assert (paths.locate(data) / name).read_bytes() == (tmp_path / "data" / name).read_bytes(), name
    table.append(("a host is killed during a preparation", "its shards are prepared elsewhere", "its tasks", seconds))

    settings = ["task=readmission", "init=null", "model=debug", "run.name=r", "data.context=64"]
    settings += ["data.tokens_per_row=64", "data.min_count=1", "train.max_steps=4", "train.eval_every=2"]
    settings += ["train.warmup_steps=1", "search.num_trials=2", "search.grace_steps=2", "report.boosting=false"]
    tune = [pretraining(runs)[0], str(ROOT / "finetune" / "tune.py"), f"run.dir={tmp_path}/runs", *settings]
    subprocess.run([*tune, f"data.path={tmp_path}/data"], check=True)
    paths.upload_files(tmp_path / "runs" / "r" / "bundle", paths.locate(f"{runs}/bundle"))

    task = "task=readmission"
    predict = [*module("hymate.predict"), f"bundle={runs}/bundle", f"data.path={raw}", task, f"out={risks}"]
    seconds = loses_a_host(machines, predict, lambda: parquets(risks))
    alone = [*module("hymate.predict"), f"bundle={tmp_path}/runs/r", f"data.path={tmp_path}/raw", task]
    subprocess.run([*alone, f"out={tmp_path}/risks", "workers=1"], check=True)
    with paths.local_copy(paths.locate(risks)) as copy:
        one, other = (pq.read_table(folder).sort_by(ORDER) for folder in (copy, tmp_path / "risks"))
    assert one.num_rows == other.num_rows > 0
    assert one.drop_columns([RISK]).equals(other.drop_columns([RISK]))
    assert abs(one[RISK].to_numpy() - other[RISK].to_numpy()).max() < 1e-6
    table.append(("a host is killed during a prediction", "its parts are predicted elsewhere", "its tasks", seconds))


def test_a_host_on_which_data_are_prepared_is_cut_off(
    machines: Machines, runs: str, tmp_path: Path, table: list
) -> None:
    made = "source=synthetic synthetic.subjects=240 synthetic.mean_events=300 synthetic.shard_events=2000"
    subprocess.run([*module("hymate.data.prepare"), *made.split(), f"out={tmp_path}/raw"], check=True)
    raw, data = f"{runs}/raw", f"{runs}/data"
    paths.upload_files(tmp_path / "raw", paths.locate(raw))
    head, other = machines.cluster(2, *NO_DASHBOARD, "--num-cpus", "0")
    with machines.running(
        [*module("hymate.data.prepare"), "source=meds", f"raw={raw}", f"out={data}"], head, head
    ) as driver:
        driver.until(lambda: len(parquets(f"{data}/data")) >= 3, "it is under way")
        other.cut()
        cut = time.monotonic()
        driver.until(lambda: f"no answer from {other.name} ({other.address})" in driver.said(), "it is said")
        seen = time.monotonic() - cut
        other.mend()
        mended = time.monotonic()
        driver.finish()
    happens = f"said after {seen:.0f} s; it goes on once the network is whole"
    table.append(("a host on which data are prepared is cut off", happens, 0, time.monotonic() - mended))


def test_a_host_is_killed_while_boosting_is_fitted(
    machines: Machines, runs: str, small_data: Path, tmp_path: Path, table: list
) -> None:
    command_ = [*module("hymate.baselines"), "task=readmission", "features.max_features=40"]
    subprocess.run([*command_, f"data.path={small_data}", f"out={tmp_path}/out"], check=True)
    seconds = loses_a_tasks_host(
        machines, [*command_, f"data.path={DATA}", f"out={runs}/out"], f"{runs}/out/.features/fit"
    )
    with paths.local_copy(paths.locate(f"{runs}/out")) as copy:
        one, other = (json.loads((folder / "results.json").read_text()) for folder in (copy, tmp_path / "out"))
        assert one | {"seconds": 0} == other | {"seconds": 0}
        one, other = (pq.read_table(folder / "predictions.parquet") for folder in (copy, tmp_path / "out"))
        assert one.equals(other)
    table.append(("a host is killed while boosting is fitted", "it is fitted elsewhere", "the fit", seconds))


def test_a_host_is_killed_while_risks_are_explained(
    machines: Machines, runs: str, small_data: Path, tmp_path: Path, table: list
) -> None:
    bundle = write_risk_bundle(tmp_path / "bundle", vocabulary_of(small_data), context=24, seed=1)
    paths.upload_files(bundle, paths.locate(f"{runs}/bundle"))
    command_ = [*module("hymate.explain"), "task=readmission", "num_subjects=1", "num_predictions=100"]
    here = [f"data.path={small_data}", f"bundle={bundle}", f"out={tmp_path}/out", "workers=1"]
    subprocess.run([*command_, *here], check=True, env={**os.environ, "HYMATE_OPS": "reference"})
    there = [f"data.path={DATA}", f"bundle={runs}/bundle", f"out={runs}/out"]
    seconds = loses_a_tasks_host(machines, [*command_, *there], f"{runs}/.out.parts/attributions")
    with paths.local_copy(paths.locate(f"{runs}/out")) as copy:
        one, other = (pq.read_table(folder / "variables.parquet").to_pydict() for folder in (copy, tmp_path / "out"))
    assert one["code"] == other["code"] and one["predictions"] == other["predictions"]
    for name in list(one)[2:]:
        np.testing.assert_allclose(np.array(one[name], float), np.array(other[name], float), atol=1e-5)
    table.append(
        ("a host is killed while risks are explained", "its parts are explained elsewhere", "its tasks", seconds)
    )


def loses_a_tasks_host(machines: Machines, arguments: list[str], work: str) -> float:
    """A command on a head without a CPU for tasks and on two hosts, of which one dies that has a task, once `work` is
    there; seconds from then to the end.
    """
    head, *others = machines.cluster(3, *NO_DASHBOARD, "--num-cpus", "0")
    with machines.running(arguments, head, head) as driver:
        driver.until(lambda: paths.locate(f"{work}/journal.jsonl").is_file(), "it is under way")
        busy: list[Host] = []
        driver.until(lambda: busy.extend(filter(has_a_task, others)) or busy, "a task runs")
        busy[0].kill()
        killed = time.monotonic()
        driver.finish()
    return time.monotonic() - killed


def has_a_task(host: Host) -> bool:
    """Whether one of Ray's processes of the host works."""
    return host.run("pgrep", "-f", "^ray::_call").returncode == 0


def module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def parquets(folder: str) -> list[str]:
    """Names of the finished files below a folder."""
    place = paths.locate(folder)
    names = paths.files_below(place, ".parquet") if place.is_dir() else []
    return [name for name in names if not name.startswith(".") and "/." not in name]


def loses_a_host(machines: Machines, arguments: list[str], under_way: Callable[[], object]) -> float:
    """A command on two hosts, one of which dies once its work is `under_way`; seconds from then to the end."""
    head, other = machines.cluster(2)
    with machines.running(arguments, head, head) as driver:
        driver.until(under_way, "it is under way")
        other.kill()
        killed = time.monotonic()
        driver.finish()
    head.kill()
    return time.monotonic() - killed
