"""How workers on several hosts meet: over the network by which Ray knows the hosts, or a line that says what to set.

Those of a pretraining are Ray Train's (`Meeting`). Those of a trial have the bundles of Ray Tune's placement group, and
the trial's own process is the first of them (`run_together`): Ray Train's would take another group, of which Tune knows
nothing, would outlive a trial that Tune stops, and would train on while Tune decides.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.train.torch import TorchConfig, get_device
from ray.train.torch.config import _TorchBackend
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hymate import machine, runs
from hymate.errors import first_line
from hymate.training.loop import NotTogether, Worker, leave_group

TOGETHER_S, ANSWER_S = 120.0, 5.0  # from when all workers have their places; of a worker that is alive
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"  # the interface that each of the libraries takes
MOST_NAMED = 8
# what a worker says whose connection to another one was cut
FOLLOWED = ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "Broken pipe")

Host = tuple[str, str, str]  # name, address, interface


def first_causes(errors: Iterable[BaseException]) -> list[BaseException]:
    """Errors of workers without those that only followed from another worker's end; all, where all did."""
    errors = list(errors)
    return [error for error in errors if not any(text in str(error) for text in FOLLOWED)] or errors


# ------------------------------------------------------------------------------------------------- of Ray Train


class Meeting(TorchConfig):
    """Ray's process group, whose workers find each other as Ray's own processes do."""

    @property
    def backend_cls(self) -> type:
        return _Meeting


class _Meeting(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Raises NotTogether; where a worker has died, Ray's error, at which it tries again."""
        hosts, began = worker_group.execute(_prepare), time.monotonic()

        def start() -> None:
            super(_Meeting, self).on_start(worker_group, backend_config)
            worker_group.execute(_meet, time.time())

        try:  # PyTorch's own timeouts don't end every wait
            ThreadPoolExecutor(1).submit(start).result(TOGETHER_S)
        except (TimeoutError, RayTaskError) as error:
            left_s = TOGETHER_S - (time.monotonic() - began)
            with suppress(GetTimeoutError):  # of those that still wait; Ray needs a minute to see that a host is gone
                ray.get(worker_group.execute_async(socket.gethostname), timeout=max(left_s, ANSWER_S))
            cause = _plain(first_line(error.cause)) if isinstance(error, RayTaskError) else "they don't get an answer"
            raise _not_together(hosts, cause) from error


def _prepare() -> Host:
    host = _take_interface()
    ask_dns(patiently=False)
    return host


def _meet(now_s: float) -> None:
    """Each worker hears from all. now_s: by the clock of the driver's host."""
    runs.keep_time_of(now_s)
    _hear_from_all(get_device())


# ------------------------------------------------------------------------------------------------------ of a trial


@dataclass(frozen=True)
class Seat:
    """A worker's place in a trial. store: address and port where its workers find each other."""

    worker: Worker
    store: tuple[str, int]


class Peer:
    """A worker besides the first, in a process of its own."""

    def host(self) -> tuple[Host, str]:
        """And the id of its machine."""
        return _take_interface(), ray.get_runtime_context().get_node_id()

    def run(self, seat: Seat, work: Callable[..., object], arguments: Sequence[Any]) -> None:
        with machine.own_temporary_files(), _joined(seat) as worker:
            work(worker, *(_value(each) for each in arguments))


def run_together(work: Callable[..., object], arguments: Sequence[Any], num_workers: int, device: torch.device) -> None:
    """Run `work(worker, *arguments)` on all workers of this process's placement group, which has a bundle for each.

    This process is the first of them. Arguments that lie in Ray's store are taken from there.
    Raises what ended one of the workers, and NotTogether; what the others do then ends with their placement group.
    """
    group = ray.util.get_current_placement_group()
    peers = []
    for bundle in range(1, num_workers):
        wanted = group.bundle_specs[bundle]
        place = PlacementGroupSchedulingStrategy(group, bundle)
        options = {"num_cpus": wanted.get("CPU", 0), "num_gpus": wanted.get("GPU", 0), "scheduling_strategy": place}
        peers.append(ray.remote(**options)(Peer).remote())
    here = _take_interface(), ray.get_runtime_context().get_node_id()
    hosts, nodes = zip(here, *ray.get([peer.host.remote() for peer in peers]), strict=True)
    store = dist.TCPStore(here[0][1], 0, is_master=True, wait_for_workers=False)
    local_ranks = [nodes[:rank].count(node) for rank, node in enumerate(nodes)]
    workers = [Worker(rank, num_workers, local, device) for rank, local in enumerate(local_ranks)]
    seats = [Seat(worker, (here[0][1], store.port)) for worker in workers]
    ends = [peer.run.remote(seat, work, list(arguments)) for peer, seat in zip(peers, seats[1:], strict=True)]
    met, own = Future[None](), Future[None]()

    def run() -> None:
        try:
            with _joined(seats[0]) as worker:
                met.set_result(None)
                work(worker, *(_value(each) for each in arguments))
            own.set_result(None)
        except BaseException as error:
            own.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # it would wait for ever for one that has ended
    everyone = [own, *(end.future() for end in ends)]
    if not wait([met, *everyone], TOGETHER_S, FIRST_COMPLETED).done:
        raise _not_together(hosts, "they don't get an answer")
    wait(everyone, return_when=FIRST_EXCEPTION)
    wait(everyone, ANSWER_S)  # what ended one of them may only follow from what ended another
    errors = [error for end in everyone if end.done() and (error := end.exception()) is not None]
    if not errors:
        return
    cause = first_causes(errors)[0]
    if isinstance(cause, RayActorError):  # its text is for Ray's makers
        raise RuntimeError("a worker of the trial was killed, perhaps for want of memory, or its host lost") from cause
    if not met.done():
        raise _not_together(hosts, _plain(first_line(getattr(cause, "cause", cause)))) from cause
    raise cause


@contextmanager
def _joined(seat: Seat) -> Iterator[Worker]:
    """The process group of a trial's workers."""
    worker = seat.worker
    os.environ.update(RANK=str(worker.rank), LOCAL_RANK=str(worker.local_rank), WORLD_SIZE=str(worker.world_size))
    ask_dns(patiently=False)
    store = dist.TCPStore(*seat.store, is_master=False)
    backend = "nccl" if worker.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=worker.rank, world_size=worker.world_size)
    try:
        _hear_from_all(worker.device)
        yield worker
    finally:
        leave_group()


def _value(argument: Any) -> Any:
    return ray.get(argument) if isinstance(argument, ray.ObjectRef) else argument


# ----------------------------------------------------------------------------------------------------------- both


def _not_together(hosts: Sequence[Host], cause: str) -> NotTogether:
    return NotTogether(
        f"the workers don't reach each other ({cause}). {_named(hosts)}. Set {GLOO} and {NCCL}, "
        "where Ray is started on each host, to the interface that the others reach"
    )


def _plain(reason: str) -> str:
    """Without places in C++ sources.

    >>> _plain("Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:144] timed out")
    'Gloo connectFullMesh failed with timed out'
    """
    return re.sub(r"\[?/\S+\.\w+:\d+\]?\s*", "", reason)[:100]


def _named(hosts: Sequence[Host]) -> str:
    different = list(dict.fromkeys(f"{name} is {address} on {interface}" for name, address, interface in hosts))
    more = [f"and {len(different) - MOST_NAMED} more"] if len(different) > MOST_NAMED else []
    return ", ".join([*different[:MOST_NAMED], *more])


def _take_interface() -> Host:
    """A worker's host, address and interface: the one with the address by which Ray knows the host.

    PyTorch would take the one to which the host's name resolves, which is often 127.0.1.1.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            os.environ.setdefault(GLOO, name)
            os.environ.setdefault(NCCL, f"={name}")  # without = also those whose names begin so
    return socket.gethostname(), address, os.environ.get(GLOO, "no interface that it has")


def _hear_from_all(device: torch.device) -> None:
    """NCCL's workers meet in their first collective."""
    dist.all_reduce(torch.zeros(1, device=device))
    ask_dns(patiently=True)


def ask_dns(patiently: bool) -> None:
    """PyTorch asks DNS for the name of each address that it connects to, for its log only.

    Patiently is as the host is set up: where no server answers, a start would take 10 to 20 s more.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "__res_state"):  # glibc's, of this thread
        libc.__res_init()
        if not patiently:
            libc.__res_state.restype = ctypes.POINTER(ctypes.c_int * 2)
            libc.__res_state().contents[:] = 1, 1  # seconds, times
