"""Rows reach the device before a step needs them, and a step's numbers are read once they have arrived.

A GPU works through a queue of operations. Waiting for a result empties the queue, and then the GPU waits, too. So a
step's inputs are copied while the step before runs, and its results are read one step later. On a CPU there is no
queue: rows stay where they are, and numbers are read at once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hymate.model.batch import Batch, changed

T = TypeVar("T")


def prefetched(items: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """`items`, made by a background thread up to `ahead` before they are asked for.

    An exception in the making is raised here, in its turn. Closing the generator ends the thread.
    """
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="hymate-rows") as thread:
        pending = deque(thread.submit(next, items, end) for _ in range(ahead))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(thread.submit(next, items, end))
                yield item
        finally:
            for future in pending:
                future.cancel()


def fed(items: Iterable[T], device: torch.device, ask: Callable[[Batch], Batch]) -> Generator[T, None, None]:
    """`items`, tuples and lists that hold rows, with each row as `ask` gives it and on `device`.

    Off the CPU a thread makes one item ready ahead: it asks, pins and copies, in a stream of its own. Closing the
    generator, once it has begun, ends the thread and closes `items`.
    """
    own = iter(items)
    try:
        here = (tree_map_only(Batch, ask, item) for item in own)
        yield from here if device.type == "cpu" else _ahead(own, device, ask)
    finally:
        if isinstance(own, Generator):
            own.close()


def _ahead(items: Iterator[T], device: torch.device, ask: Callable[[Batch], Batch]) -> Iterator[T]:
    backend = torch.get_device_module(device)
    stream = backend.Stream(device)

    def copied(row: Batch) -> Batch:
        return changed(ask(row), lambda x: x.pin_memory().to(device, non_blocking=True))

    def ready(item: T) -> tuple[T, Any]:
        with torch.no_grad(), backend.device(device), backend.stream(stream):
            return tree_map_only(Batch, copied, item), stream.record_event()

    with contextlib.closing(prefetched(map(ready, items), 1)) as coming:
        for item, copied_at in coming:
            current = backend.current_stream(device)
            current.wait_event(copied_at)
            tree_map_only(Batch, lambda row: changed(row, lambda x: _used_in(current, x)), item)  # noqa: B023 (called at once)
            yield item


def _used_in(stream: Any, x: Tensor) -> Tensor:
    """Its memory was taken in the copying stream, and is not free before this one is done with it."""
    x.record_stream(stream)
    return x


class Delayed(Generic[T]):
    """Numbers on a device, each with a note, read in the order in which they were put: on a GPU all but the newest."""

    def __init__(self, device: torch.device) -> None:
        self._event = None if device.type == "cpu" else torch.get_device_module(device).Event
        self._under_way: deque[tuple[Tensor, Any, T]] = deque()

    def put(self, numbers: Tensor, note: T) -> None:
        """Have the numbers (N,) copied."""
        here = numbers.to("cpu", non_blocking=True)
        copied_at = None
        if self._event is not None:
            copied_at = self._event()
            copied_at.record()
        self._under_way.append((here, copied_at, note))

    def ready(self, every: bool = False) -> Iterator[tuple[list[float], T]]:
        """Those that have come, and with `every` also the newest, for which a GPU is waited for."""
        while len(self._under_way) > (0 if every or self._event is None else 1):
            here, copied_at, note = self._under_way.popleft()
            if copied_at is not None:
                copied_at.synchronize()
            yield here.tolist(), note
