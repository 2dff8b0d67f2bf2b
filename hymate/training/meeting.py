"""How workers on several hosts meet: over the network by which Ray knows the hosts, or a line that says what to set."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.train.torch import TorchConfig, get_device
from ray.train.torch.config import _TorchBackend

from hymate import runs
from hymate.errors import first_line

TOGETHER_S, ANSWER_S = 120.0, 5.0  # from when all workers have their places; of a worker that is alive
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"  # the interface that each of the libraries takes
MOST_NAMED = 8


class NotTogether(Exception):
    """Workers that don't reach each other. Its text is for the console: it names hosts, which no run folder does."""


class Meeting(TorchConfig):
    """Ray's process group, whose workers find each other as Ray's own processes do."""

    @property
    def backend_cls(self) -> type:
        return _Meeting


class _Meeting(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Raises NotTogether; where a worker has died, Ray's error, at which it tries again."""
        hosts, began = worker_group.execute(_take_interface), time.monotonic()

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
            raise NotTogether(
                f"the workers don't reach each other ({cause}). {_named(hosts)}. Set {GLOO} and {NCCL}, "
                "where Ray is started on each host, to the interface that the others reach"
            ) from error


def _plain(reason: str) -> str:
    """Without places in C++ sources.

    >>> _plain("Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:144] timed out")
    'Gloo connectFullMesh failed with timed out'
    """
    return re.sub(r"\[?/\S+\.\w+:\d+\]?\s*", "", reason)[:100]


def _named(hosts: list[tuple[str, str, str]]) -> str:
    different = list(dict.fromkeys(f"{name} is {address} on {interface}" for name, address, interface in hosts))
    more = [f"and {len(different) - MOST_NAMED} more"] if len(different) > MOST_NAMED else []
    return ", ".join([*different[:MOST_NAMED], *more])


def _take_interface() -> tuple[str, str, str]:
    """A worker's host, address and interface: the one with the address by which Ray knows the host.

    PyTorch would take the one to which the host's name resolves, which is often 127.0.1.1.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            os.environ.setdefault(GLOO, name)
            os.environ.setdefault(NCCL, f"={name}")  # without = also those whose names begin so
    ask_dns(patiently=False)
    return socket.gethostname(), address, os.environ.get(GLOO, "no interface that it has")


def _meet(now_s: float) -> None:
    """Each worker hears from all, NCCL's in their first collective. now_s: by the clock of the driver's host."""
    runs.keep_time_of(now_s)
    dist.all_reduce(torch.zeros(1, device=get_device()))
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
