"""Work over shards, stage by stage, in this machine's processes or as tasks of a Ray cluster.

What was interrupted goes on where it was.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hymate import cluster
from hymate.ending import without_ctrl_c
from hymate.errors import UserError
from hymate.machine import available_cpus, available_memory
from hymate.storage.paths import Location, UrlPath, remove_tree, write_text
from hymate.storage.remote import StorageError

# calls a task, which pickles, for every shard; yields shards as they are done, in any order
Pool = Callable[[Callable[[str], None], Sequence[str]], Iterator[str]]
WORTH_BYTES = 32 << 20  # take longer to read than another process takes to start
JOURNAL_S = 10.0  # between two journals at a URL
SAY_EVERY_S = 30.0  # how far the work is, where a bar would fill a log


@dataclass(frozen=True)
class Stages:
    """Runs stages over shards, but for what the journal has as done; `stages` makes one."""

    shards: Sequence[str]
    _journal: Journal
    _pool: Pool
    _bar: Progress

    def each(self, stage: str, task: Callable[[str], None]) -> None:
        """Run `task(shard)`, which pickles, for every shard."""
        todo = [shard for shard in self.shards if not self._journal.is_done(stage, shard)]
        before, said = len(self.shards) - len(todo), time.monotonic()
        line = self._bar.add_task(stage, total=len(self.shards), completed=before)
        for done, shard in enumerate(self._pool(task, todo), start=before + 1):
            self._journal.record(stage, shard)
            self._bar.advance(line)
            if self._bar.console.quiet and time.monotonic() - said > SAY_EVERY_S:
                print(f"{stage}: {done:,} of {len(self.shards):,} done", file=sys.stderr, flush=True)
                said = time.monotonic()

    def once(self, stage: str, task: Callable[[], None]) -> None:
        line = self._bar.add_task(stage, total=1)
        if not self._journal.is_done(stage, ""):
            task()
            self._journal.record(stage, "")
        self._bar.advance(line)


def worth(num_bytes: int) -> int:
    """How many processes have enough to do with so many bytes of MEDS files."""
    return min(available_cpus(), 1 + num_bytes // WORTH_BYTES)


def free_memory(here: bool = False) -> int:
    """Bytes that one shard's work may take: what the cluster's largest machine has for tasks, or this one has free."""
    of_cluster = None if here else cluster.most_memory()
    return available_memory() if of_cluster is None else of_cluster


@contextlib.contextmanager
def stages(
    shards: Sequence[str],
    journal: Journal,
    workers: int,
    here: bool = False,
    gpus: bool = False,
    num_bytes: int = 0,
) -> Iterator[Stages]:
    """Stages over `shards`, with a progress bar or, in a log, a line now and then: on the cluster at RAY_ADDRESS,
    unless all is to stay `here`; else in so many processes, in this one where `workers` is 1. gpus: each has a GPU of
    its own. num_bytes: of memory that is kept for each shard on a cluster, see `free_memory`.
    """
    columns = (TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.ExitStack() as stack:
        pool: Pool = _in_this_process
        if not here and cluster.named():
            pool = stack.enter_context(_on_cluster(gpus, num_bytes))
        elif workers > 1:
            pool = stack.enter_context(_processes(workers, gpus))
        bar = stack.enter_context(Progress(*columns, console=Console(stderr=True, quiet=not sys.stderr.isatty())))
        yield Stages(shards, stack.enter_context(journal), pool, bar)


def _in_this_process(task: Callable[[str], None], todo: Sequence[str]) -> Iterator[str]:
    for shard in todo:
        task(shard)
        yield shard


@contextlib.contextmanager
def _on_cluster(gpus: bool, num_bytes: int) -> Iterator[Pool]:
    with cluster.ray_session(cpus_per_worker=1, device="cuda" if gpus else "cpu"):
        yield lambda task, todo: cluster.each(functools.partial(_with_one_thread, task), todo, gpus, num_bytes)


@contextlib.contextmanager
def _processes(workers: int, gpus: bool) -> Iterator[Pool]:
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (numbers if gpus else None,))

    def finished(task: Callable[[str], None], todo: Sequence[str]) -> Iterator[str]:
        with without_ctrl_c():
            futures = {pool.submit(task, shard): shard for shard in todo}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures.pop(future)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out: run the same command with fewer "
                "workers=; it continues"
            ) from error

    try:
        yield finished
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.kill()  # a shard may take minutes
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _with_one_thread(task: Callable[[str], None], shard: str) -> None:
    pa.set_cpu_count(1)
    task(shard)


def _start_worker(gpu_numbers: SimpleQueue | None) -> None:
    pa.set_cpu_count(1)
    if gpu_numbers is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu_numbers.get())
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # a killed command leaves no process behind that still writes

    threading.Thread(target=follow, daemon=True).start()


class Journal:
    """The finished (stage, shard) pairs of unfinished work: a JSON line each, after one with the work's fingerprint.

    At a URL, where nothing can be appended, the whole journal is written now and then and when a `with` block ends:
    what a kill loses of it is done again. Where the journal is that of other work: UserError(`refusal`), or without a
    refusal its folder goes, which holds what that work left.
    """

    def __init__(self, path: Location, fingerprint: str = "", refusal: str | None = None) -> None:
        header = json.dumps({"fingerprint": fingerprint})
        # what a kill cut short is no line that ends: it does not count, and is written over
        lines = path.read_text().split("\n")[:-1] if path.is_file() else [header]
        if json.loads(lines[0]) != json.loads(header):
            if refusal is not None:
                raise UserError(refusal)
            remove_tree(path.parent)
            lines = [header]
        self._done = {tuple(json.loads(line)) for line in lines[1:]}
        self._path, self._lines = path, lines
        self._write()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if isinstance(self._path, UrlPath) and kind is not StorageError:
            self._write()

    def is_done(self, stage: str, shard: str) -> bool:
        return (stage, shard) in self._done

    def record(self, stage: str, shard: str) -> None:
        self._lines.append(json.dumps([stage, shard]))
        if isinstance(self._path, Path):
            with self._path.open("a") as file:
                file.write(self._lines[-1] + "\n")
        elif time.monotonic() - self._written > JOURNAL_S:
            self._write()

    def _write(self) -> None:
        write_text("\n".join(self._lines) + "\n", self._path)
        self._written = time.monotonic()
