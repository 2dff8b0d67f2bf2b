"""Rows are made ready one item ahead, in order, by a thread that ends; here on a device without numbers.

What the copies do to a step, `test_absent_device.py` has; threads and that device do not go together.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from rows import random_row
from torch import Tensor

from hymate.data.feeding import Delayed, fed
from hymate.model.batch import Batch

META = torch.device("meta")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of torch.cuda as feeding uses."""
    stream = SimpleNamespace(record_event=lambda: None, wait_event=lambda event: None)
    names = {"Stream": lambda device: stream, "current_stream": lambda device: stream}
    names |= {name: lambda _: contextlib.nullcontext() for name in ("device", "stream")}
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**names))
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: None)


class Source:
    """Items of two rows and a number; knows how many were asked for, and whether it was closed."""

    def __init__(self, fails_at: int = 5) -> None:
        self.asked, self.closed, self.fails_at = 0, threading.Event(), fails_at

    def items(self) -> Iterator[tuple[list[Batch], int]]:
        try:
            for number in range(5):
                self.asked += 1
                if number == self.fails_at:
                    raise ValueError("a bad record")
                yield [random_row((3, 2), seed=2 * number + i) for i in range(2)], number
        finally:
            self.closed.set()


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hymate-rows")]


def test_items_come_in_order_on_the_device_one_ahead(backend: None) -> None:
    source, ready = Source(), threading.Semaphore(0)

    def ask(row: Batch) -> Batch:
        ready.release()
        return row

    for number, (rows, noted) in enumerate(fed(source.items(), META, ask)):
        assert noted == number and [row.seed for row in rows] == [2 * number, 2 * number + 1]
        assert all(x.device == META for row in rows for x in vars(row).values() if isinstance(x, Tensor))
        for _ in range(4 if number == 0 else 2 if number < 4 else 0):  # this item's rows and the next one's
            assert ready.acquire(timeout=60)
        assert source.asked == min(number + 2, 5)
    assert source.closed.is_set() and not own_threads()


class Named(NamedTuple):
    row: Batch
    counted: bool


@pytest.mark.parametrize("device", [torch.device("cpu"), META], ids=str)
def test_named_tuples_stay_what_they_are(backend: None, device: torch.device) -> None:
    ((row, counted),) = items = list(fed([Named(random_row((3, 2)), True)], device, lambda row: row))
    assert isinstance(items[0], Named) and counted and row.code_L.device == device


def test_what_is_made_ahead_needs_no_gradient(backend: None) -> None:
    weight = torch.ones((), requires_grad=True)
    ((row,),) = fed([(random_row((3, 2)),)], META, lambda row: replace(row, value_L=weight * row.value_L))
    assert not row.value_L.requires_grad


def test_who_stops_early_ends_the_thread_and_the_source(backend: None) -> None:
    source = Source()
    with contextlib.closing(fed(source.items(), META, lambda row: row)) as items:
        next(items)
    assert source.closed.is_set() and not own_threads()


def test_an_error_comes_in_its_turn(backend: None) -> None:
    found = []
    with pytest.raises(ValueError, match="a bad record"):
        for _, number in fed(Source(fails_at=2).items(), META, lambda row: row):
            found.append(number)
    assert found == [0, 1] and not own_threads()


def test_on_a_cpu_numbers_are_read_at_once_in_order() -> None:
    numbers: Delayed[str] = Delayed(torch.device("cpu"))
    numbers.put(torch.tensor([1.0, 2.0]), "first")
    numbers.put(torch.tensor([3.0, 4.0]), "second")
    assert list(numbers.ready()) == [([1.0, 2.0], "first"), ([3.0, 4.0], "second")]
    assert list(numbers.ready(every=True)) == []
