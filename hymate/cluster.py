"""The Ray cluster that a run uses, at RAY_ADDRESS or its own on this machine, and whether it can be used."""

from __future__ import annotations

import gc
import hashlib
import importlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hymate
from hymate import ending
from hymate.config import TrainConfig
from hymate.errors import UserError, first_line
from hymate.machine import GARBAGE_EVERY, available_cpus

if TYPE_CHECKING:
    from hymate.device import Wanted

PACKAGE = Path(hymate.__file__).resolve().parent
MOST_RETRIES = 3  # of a shard whose process or machine was lost
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # how soon a dead worker is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it only logs that it cannot start
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would print everything twice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",  # it asks a dashboard that we do not start
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_prestart_worker_first_driver": "0",  # these workers would lack what ours are given, and so stay idle
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_get_check_signal_interval_milliseconds": "100",  # how soon a waiting driver sees a signal
    "RAY_task_oom_retries": str(MOST_RETRIES),  # Ray would try for ever what a machine's memory can never hold
}
OBJECT_STORE_BYTES = 128 << 20  # Ray's minimum is 75 MB; workers exchange nothing through it
LOOK_EVERY_S, HEADLESS_S = 5.0, 40.0  # Ray ends a process that has lost the head for 60 s
QUIET_S = 8.0  # without a finished shard, until it is looked why
ANSWER_S = 22.0  # of a cluster, the start of a Python included
# Ray itself tries for minutes, deaf to signals: another process asks
ASK = """
import socket, sys
try:
    from ray._private.services import canonicalize_bootstrap_address, extract_ip_port, get_node_to_connect_for_driver
    address = canonicalize_bootstrap_address(sys.argv[1])
    socket.create_connection(extract_ip_port(address), 5).close()
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import GcsClient
    ensure_token_if_auth_enabled(create_token_if_missing=False)
    cluster = GcsClient(address=address)
    cluster.check_alive([], 5.0)
    try:
        get_node_to_connect_for_driver(cluster, timeout_seconds=12)
    except RuntimeError:
        sys.exit("this machine is not part of it")
    alive = [node for node in cluster.get_all_node_info().values() if node.state == node.ALIVE]
    gpus = sum(node.resources_total.get("GPU", 0) for node in alive)
    work = [node.resources_total for node in alive if node.resources_total.get("CPU", 0) >= 1]
    print(int(gpus), int(max((total.get("memory", 0) for total in work), default=0)))
except Exception as error:
    sys.exit(f"{getattr(error, 'strerror', None) or error}")
"""
# what Ray appends to the folder of its files, and the longest path of a socket
SOCKET, LONGEST_SOCKET = "/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store", 107


def named() -> bool:
    """Whether RAY_ADDRESS names a cluster. Raises UserError where none answers there."""
    if address := os.environ.get("RAY_ADDRESS"):
        _ask(address)
    return bool(address)


def most_memory() -> int | None:
    """Bytes that the machine with the most of them, of the cluster at RAY_ADDRESS, has for tasks; None without one."""
    address = os.environ.get("RAY_ADDRESS")
    return _ask(address)[1] if address else None


def available_gpus(train: TrainConfig) -> int | None:
    """How many GPUs the cluster at RAY_ADDRESS has; None where the run has this machine alone.

    Raises UserError, before anything is computed, where the run's workers find no place.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        return _ask(address)[0]
    cpus, wanted = available_cpus(), train.num_workers * train.cpus_per_worker
    if wanted > cpus:
        raise UserError(
            f"train.num_workers={train.num_workers} x train.cpus_per_worker={train.cpus_per_worker} needs {wanted} "
            f"CPUs, this machine has {cpus}: lower either, or set RAY_ADDRESS to a cluster"
        )
    with ray_folder():
        return None


@contextmanager
def ray_session(cpus_per_worker: int, num_workers: int = 1, device: Wanted = "cpu") -> Iterator[None]:
    """The cluster at RAY_ADDRESS, or one of our own on this machine for the time of the run.

    device: where the workers compute; a cluster of our own has GPUs only where they are used.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # other users of this machine stay out
        if not (os.environ.get("RAY_AUTH_TOKEN_PATH") or os.environ.get("RAY_AUTH_TOKEN")):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray would keep one in the home
        # and other machines: Ray listens on loopback only
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    ray._private.utils.set_sigterm_handler = lambda handler: None  # Ray's would take the place of `ending`'s
    ray._private.worker.listen_error_messages = lambda *_: None  # it prints the stack traces of hosts that are lost
    # Ray sets the number of threads for some kinds of processes only; more threads than CPUs stall each other
    workers: dict[str, Any] = {"env_vars": {"OMP_NUM_THREADS": str(cpus_per_worker)}}
    workers |= {"py_modules": [str(PACKAGE)], "excludes": ["**/__pycache__"], "worker_process_setup_hook": _take_code()}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": workers}
    with ExitStack() as stack:
        folder = "" if address else stack.enter_context(ray_folder())
        try:
            if address:
                _connect(address, quiet)
                stack.enter_context(_watched_head(ray.get_runtime_context().gcs_address))
                if missing := _missing(_needed(cpus_per_worker, num_workers, device), ray.cluster_resources()):
                    print(f"waiting for machines: {missing}")  # Ray waits for them to join
            else:
                from hymate.device import num_gpus  # late: PyTorch takes a second, and preparing needs none of it

                _leave_out_what_only_clusters_need()
                ray.init(
                    address="local",
                    num_cpus=available_cpus(),
                    num_gpus=num_gpus() if device == "cuda" else 0,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                    **quiet,
                )
            ending.take_back()
            yield
        finally:
            ray.shutdown()
            ending.take_back()


def _leave_out_what_only_clusters_need() -> None:
    """Of what Ray starts on this machine: the dashboard's server, which starts even where no dashboard is wanted, the
    monitors of the autoscaler and of logs that we do not print, the dashboard's part in each machine's agent, and an
    import of Ray before each worker's own.
    """
    from ray._private import ray_constants, utils
    from ray._private.node import Node

    Node.start_api_server = Node.start_monitor = Node.start_log_monitor = lambda *_, **__: None
    utils.get_dashboard_dependency_error = lambda: ImportError("not wanted here")
    ray_constants.SETUP_WORKER_FILENAME = str(PACKAGE / "start_worker.py")


def _take_code() -> Callable[[], None]:
    """What each of Ray's workers does first: import the HyMaTE that the driver has.

    By themselves they would take what is in the driver's current folder or installed. They take it from the place that
    the driver has it in where that holds the same code, as Numba's compiled loops are there too, and otherwise from
    what Ray has sent them. Both functions are local to this one because Ray sends such functions by value.
    """

    def digest() -> str:
        files = sorted(PACKAGE.rglob("*.py"))
        parts = [f"{file} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    the_drivers = digest()

    def take() -> None:
        gc.set_threshold(GARBAGE_EVERY)
        first = [str(PACKAGE.parent)] if digest() == the_drivers else []
        sys.path[:0] = first
        importlib.import_module("hymate")
        del sys.path[: len(first)]

    return take


@dataclass(frozen=True, eq=False)
class RemoteCall:
    """A call in a process of its own. needs: the name of an earlier one, whose result is the call's last argument."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    gpu: bool = False
    needs: str | None = None


def run_calls(calls: Sequence[RemoteCall], cpus: int, max_concurrent: int = 0) -> None:
    """Each on so many CPUs, in their order; `max_concurrent` at once, or as many as the machine or cluster holds.

    After the first failure what is running ends, nothing else begins, and the failure is raised. Ray must be running.
    """
    import ray

    if not max_concurrent:
        there = ray.cluster_resources()
        slots = [int(there.get("CPU", 0)) // cpus] + [int(there.get("GPU", 0))] * any(call.gpu for call in calls)
        max_concurrent = max(1, min(slots))
    started, queue = time.monotonic(), list(calls)
    running: dict[Any, RemoteCall] = {}
    results: dict[str | None, Any] = {None: None}
    failure: Exception | None = None
    while queue or running:
        ready = (call for call in tuple(queue) if call.needs in results)
        while len(running) < max_concurrent and (call := next(ready, None)):
            queue.remove(call)
            remote = ray.remote(max_calls=1, max_retries=0, num_cpus=cpus, num_gpus=float(call.gpu))(call.function)
            needed = [] if call.needs is None else [results[call.needs]]
            running[remote.remote(*call.arguments, *needed)] = call
        (done,), _ = ray.wait(list(running), num_returns=1)
        call = running.pop(done)
        results[call.name], outcome = done, call.name
        try:
            ray.get(done)
        except Exception as error:
            mistake = _mistake(error)  # for the rest Ray's traceback helps
            failure = failure or (UserError(str(mistake)) if mistake else error)
            queue.clear()
            outcome += " failed"
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        print(f"{minutes}:{seconds:02d}  {outcome}; {len(queue) + len(running)} left", flush=True)
    if failure is not None:
        raise failure


def each(call: Callable[[str], object], shards: Sequence[str], gpu: bool = False, num_bytes: int = 0) -> Iterator[str]:
    """Call it for every shard, each call a Ray task of one CPU, or GPU, and so much memory; yields shards as they are
    done, in any order.

    What a lost machine or a killed process was doing is done again. What keeps the tasks waiting is printed. Ray must
    be running.
    """
    import ray

    needed = {"CPU": 1, "GPU": int(gpu), "memory": num_bytes}
    needs = {"num_cpus": 1, "num_gpus": float(gpu), "memory": num_bytes or None}
    remote = ray.remote(**needs, max_retries=MOST_RETRIES, scheduling_strategy="SPREAD")(_call)
    sent, todo = ray.put(call), iter(shards)
    running: dict[Any, str] = {}
    said: str | None = None
    try:
        while True:
            slots = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
            at_once = 2 * slots  # so that none waits for its next shard
            running |= {remote.remote(sent, shard): shard for shard in islice(todo, max(0, at_once - len(running)))}
            if not running:
                return
            ready, _ = ray.wait(list(running), timeout=QUIET_S)
            if not ready:
                if (known := _hindrance(needed, "is done again elsewhere")) and known != said:
                    print(known, flush=True)
                    said = known
                continue
            (done,), said = ready, None
            shard = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise _mistake(error) or error from None
            except ray.exceptions.OutOfMemoryError as error:
                raise UserError(
                    f"{shard}: {MOST_RETRIES + 1} times its process was killed because its machine ran out of memory: "
                    "give the cluster machines with more memory for each CPU; the same command continues"
                ) from error
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"{shard}: its process was killed {MOST_RETRIES + 1} times, perhaps for want of memory "
                    f"({first_line(error)}): the same command continues"
                ) from error
            yield shard
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _call(call: Callable[[str], object], shard: str) -> None:
    call(shard)


def _mistake(error: Exception) -> Exception | None:
    """What went wrong inside a task where one line is enough: a user's mistake, a run that diverged, no memory."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, UserError | FloatingPointError | MemoryError) else None


def has_workers() -> bool:
    """Whether any worker of this command's Ray Train runs."""
    import ray

    alive = ray._private.state.actors(actor_state_name="ALIVE").values()
    job = ray.get_runtime_context().get_job_id()
    return any("TrainWorker" in actor["ActorClassName"] and actor["JobID"] == job for actor in alive)


def _ask(address: str) -> tuple[int, int]:
    """How many GPUs the cluster at RAY_ADDRESS has, and `most_memory`. Raises UserError where none answers there."""
    if "://" in address or address == "local":
        raise UserError(
            f"RAY_ADDRESS={address} is not the address of a cluster: give HOST:PORT of its head (ray start prints it), "
            "or unset it to use this machine alone"
        )
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK, address], capture_output=True, text=True, timeout=ANSWER_S, errors="replace"
        )
    except subprocess.TimeoutExpired:
        _refuse(address, f"no answer for {ANSWER_S:.0f} s")
    if asked.returncode:
        lines = asked.stderr.strip().splitlines()
        _refuse(address, lines[-1] if lines else "no answer")
    gpus, memory = asked.stdout.split()[-2:]
    return int(gpus), int(memory)


def _connect(address: str, settings: Mapping[str, Any]) -> None:
    import ray

    try:
        ray.init(**settings)
    except Exception as error:  # another version of Ray or Python, no raylet on this machine, ...
        _refuse(address, ending.describe(error))


def _refuse(address: str, reason: str) -> NoReturn:
    remedy = "start it, set RAY_ADDRESS to HOST:PORT of its head, or unset it to use this machine alone"
    if "not part of it" in reason:
        remedy = f"run ray start --address={address} here, or submit the command as a job"
    elif "token" in reason.lower():
        remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
    raise UserError(f"RAY_ADDRESS={address}: no Ray cluster that can be used ({reason.split('. ')[0][:200]}): {remedy}")


@contextmanager
def ray_folder() -> Iterator[str]:
    """Where a cluster of our own keeps its files: where Ray would, else in a temporary folder."""
    given = os.environ.get("RAY_TMPDIR")
    usual = Path(given or os.environ.get("TMPDIR") or "/tmp").absolute() / "ray"
    reason = _unfit(usual)
    if reason is None:
        yield str(usual)
        return
    others = [] if given else [folder for folder in map(Path, ("/tmp", "/var/tmp", "/dev/shm")) if not _unfit(folder)]
    if not others:
        raise UserError(
            f"{usual}: no place for Ray's files ({reason}): set RAY_TMPDIR to a folder with a short path that you can "
            "write to"
        )
    with tempfile.TemporaryDirectory(prefix="hy", dir=others[0], ignore_cleanup_errors=True) as folder:
        yield folder


def _unfit(folder: Path) -> str | None:
    """Why Ray cannot keep its files in a folder, which need not be there yet."""
    if len(str(folder) + SOCKET) > LONGEST_SOCKET:
        return f"its path is longer than {LONGEST_SOCKET - len(SOCKET)} characters"
    try:
        existing = next(part for part in (folder, *folder.parents) if part.exists())
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


def hindrance(train: TrainConfig, device: Wanted) -> str | None:
    """What keeps workers from beginning or going on, and what would help, in a line.

    None where all hosts are there; empty where it is said already.
    """
    needed = _needed(train.cpus_per_worker, train.num_workers, device)
    return _hindrance(needed, "goes on from its last checkpoint, once there are hosts enough")


def _hindrance(needed: Mapping[str, int], then: str) -> str | None:
    """then: what becomes of what ran on a host that is given up."""
    import ray

    if not _answers(ray.get_runtime_context().gcs_address):
        return ""  # by `_watched_head`
    nodes = ray.nodes()
    alive = [node for node in nodes if node["Alive"]]
    there = {node["NodeManagerAddress"] for node in alive}
    lost = {_named(node) for node in nodes if not node["Alive"] and node["NodeManagerAddress"] not in there}
    total = {kind: sum(node["Resources"].get(kind, 0) for node in alive) for kind in ("CPU", "GPU")}
    total["memory"] = max((node["Resources"].get("memory", 0) for node in alive), default=0)  # a task is on one host
    if missing := _missing(needed, total):
        gone = f". Ray has given up {' and '.join(sorted(lost))}" if lost else ""
        return f"waiting for machines: {missing}{gone}. Start Ray there again or on another host (cluster/join.sh)"
    with ThreadPoolExecutor(16) as pool:
        addresses = [f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in alive]
        silent = [_named(node) for node, heard in zip(alive, pool.map(_answers, addresses), strict=True) if not heard]
    if silent:
        return (
            f"no answer from {' and '.join(sorted(silent))}: is its network cut, or is it overloaded? After a "
            f"minute Ray gives it up; what ran there {then}"
        )
    return None


@contextmanager
def _watched_head(address: str) -> Iterator[None]:
    """While the block runs, it is said when the cluster's head does not answer; the command ends in a line where it
    goes on not to, before Ray would end it without one.
    """
    over = threading.Event()

    def watch() -> None:
        answered_at, said = time.monotonic(), False
        while not over.wait(LOOK_EVERY_S):
            if _answers(address):
                answered_at, said = time.monotonic(), False
                continue
            silent_s = time.monotonic() - answered_at
            if silent_s > HEADLESS_S:
                ending.give_up(
                    f"no answer from the cluster's head ({address}) for {silent_s:.0f} s: give the same command again "
                    "once there is a cluster; it continues"
                )
            if not said:
                print(
                    f"no answer from the cluster's head ({address}): is its network cut, or has it ended?", flush=True
                )
            said = True

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _named(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 3).close()
    except OSError:
        return False
    return True


def _needed(cpus_per_worker: int, num_workers: int, device: Wanted) -> dict[str, int]:
    return {"CPU": num_workers * cpus_per_worker, "GPU": num_workers if device == "cuda" else 0}


def _missing(needed: Mapping[str, int], resources: Mapping[str, float]) -> str | None:
    """What the cluster lacks for all workers to have a place."""
    for kind, number in needed.items():
        if number > (has := resources.get(kind, 0)):
            if kind == "memory":
                return f"a task needs {number / 2**30:.1f} GiB of memory, the largest machine has {has / 2**30:.1f}"
            return f"the run needs {number} {kind}{'s' * (number > 1)}, the cluster has {int(has)}"
    return None
