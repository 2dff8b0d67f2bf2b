"""Where each worker's time goes, so that a straggler shows.

Workers step together: a slow one makes all of them slow, the others by waiting for it in a collective. They differ in
the time that each needs by itself: its steps' time less that in collectives.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "barrier",
)
SLOW = 1.5  # times the median
HUNGRY = 0.2  # of the time


class WorkerTimes(NamedTuple):
    """A worker's part in some steps: events computed; seconds in all, waiting for data, in collectives; peak memory."""

    events: float = 0.0
    step_s: float = 0.0
    data_s: float = 0.0
    collective_s: float = 0.0
    memory_gib: float = 0.0

    @property
    def own_s(self) -> float:
        """Seconds that the worker would have needed without the others."""
        return max(self.step_s - self.collective_s, 1e-9)


class _Step(NamedTuple):
    began: float
    data_s: float
    spans: list[tuple[Any, Any]]


class Clock:
    """Times this worker's waiting for rows, its collectives and its steps.

    On a GPU a collective is timed there, by events, since the CPU does not wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._step_s = self._data_s = 0.0
        self._spans: list[tuple[Any, Any]] = []
        self._step: _Step | None = None
        self._in_collective = False

    def start(self) -> None:
        """Time DeepSpeed's collectives until `stop`."""
        for name in COLLECTIVES:
            setattr(_backend(), name, self._timed(getattr(_backend(), name)))

    def stop(self) -> None:
        for name in COLLECTIVES:
            vars(_backend()).pop(name, None)  # the class has the original

    def rows(self, steps: Iterator[T]) -> Iterator[T]:
        """`steps`, with a clock running from when a step's rows are asked for."""
        while True:
            began = time.monotonic()
            rows = next(steps)
            self._step = _Step(began, time.monotonic() - began, [])
            yield rows

    def step_done(self) -> None:
        """Take in the step whose rows came last."""
        assert self._step is not None
        self._step_s += time.monotonic() - self._step.began
        self._data_s += self._step.data_s
        self._spans += self._step.spans
        self._step = None

    def read(self, events: float) -> WorkerTimes:
        """This worker's times since the last call."""
        own = WorkerTimes(events, self._step_s, self._data_s, self._collective_s(), peak_memory_gib(self.device))
        self._step_s = self._data_s = 0.0
        self._spans.clear()
        return own

    def _collective_s(self) -> float:
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in self._spans)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._span():
                work = collective(*args, **kwargs)
            return _Work(work, self._span) if hasattr(work, "wait") else work

        return timed

    @contextmanager
    def _span(self) -> Iterator[None]:
        step = self._step
        if self._in_collective or step is None:  # part of another one, or an evaluation's
            yield
            return
        self._in_collective, begin = True, self._mark()
        try:
            yield
        finally:
            step.spans.append((begin, self._mark()))
            self._in_collective = False

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Work:
    """A collective under way whose `wait` is timed."""

    def __init__(self, work: Any, span: Callable[[], Any]) -> None:
        self._work, self._span = work, span

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._span():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _backend() -> Any:
    from deepspeed.comm import comm

    return comm.cdb


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held on its device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def curves(times: Sequence[WorkerTimes]) -> dict[str, dict[str, float]]:
    """What TensorBoard shows of each worker, by its rank: one chart for each measure."""
    measures: dict[str, Callable[[WorkerTimes], float]] = {
        "worker_events_per_second": lambda own: own.events / own.own_s,
        "worker_data_fraction": lambda own: own.data_s / own.step_s,
        "worker_collective_fraction": lambda own: own.collective_s / own.step_s,
        "worker_memory_gib": lambda own: own.memory_gib,
    }
    return {name: {str(rank): measure(own) for rank, own in enumerate(times)} for name, measure in measures.items()}


def trouble(times: Sequence[WorkerTimes]) -> str | None:
    """What keeps the workers from going faster, where it is one of them or the data.

    >>> trouble([WorkerTimes(step_s=9, collective_s=6)] * 2 + [WorkerTimes(step_s=9, collective_s=2)])
    'worker 2 is 2.3x slower than the median'
    >>> trouble([WorkerTimes(step_s=9, collective_s=6)] * 2 + [WorkerTimes(step_s=9, data_s=5)])
    'worker 2 is 3.0x slower than the median: it waits for data'
    >>> trouble([WorkerTimes(step_s=9, data_s=3)] * 2)
    'waiting for data 33 % of the time'
    >>> trouble([WorkerTimes(step_s=9, data_s=1)] * 2)
    """
    usual = statistics.median_low(own.own_s for own in times)
    usual_data_s = statistics.median_low(own.data_s for own in times)
    rank = max(range(len(times)), key=lambda rank: times[rank].own_s)
    slowest = times[rank]
    if slowest.own_s >= SLOW * usual:
        hungry = slowest.data_s - usual_data_s > (slowest.own_s - usual) / 2
        why = ": it waits for data" if hungry else ""
        return f"worker {rank} is {slowest.own_s / usual:.1f}x slower than the median{why}"
    waiting = sum(own.data_s for own in times) / sum(own.step_s for own in times)
    return f"waiting for data {100 * waiting:.0f} % of the time" if waiting >= HUNGRY else None
