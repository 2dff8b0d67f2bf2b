"""What an index of very many patients costs a host and each of its workers.

    python tests/benchmarks/patients.py DIR [--patients 100000000] [--workers 2]

Writes a synthetic index to DIR (its histories' files are not there), has one process make its arrays, and then several
open it at once. Prints the sizes of the files; for making the arrays, seconds and the most memory that is in no file;
and for the worker that needs most of each, in MiB beyond what importing the libraries took, memory of its own (no other
process has it: Private_Clean + Private_Dirty of /proc/self/smaps_rollup) and memory that is in no file (Anonymous),
and seconds: when the dataset is open, when the rows of its training split are there, when the first block of an epoch
is in order, one in the middle of a later epoch, as after a stop, and when the subjects of labels are found. The last
line is the formula's: bytes a patient in no file. Needs Linux (/proc); DIR needs 34 bytes a patient. Delete it
yourself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from synthetic_index import own_mib, write_index, written_mib

from hymate.data.examples import pretraining_examples
from hymate.data.histories import Histories
from hymate.data.loader import Rows

STAGES = (
    "open",
    "rows of the training split",
    "first block in order",
    "a block in the middle of epoch 3",
    "100,000 labels found",
)


class NoVocabulary:
    """Knows no code."""

    def ids_of(self, codes: list[str]) -> np.ndarray:
        return np.zeros(len(codes), np.int64)


def make(results: Connection, root: Path) -> None:
    """Seconds and most MiB in no file of the first to open."""
    Histories.open(root.parent / "few")  # what libraries take at their first use
    before, most, done = written_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            most[0] = max(most[0], written_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    Histories.open(root)
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    results.send((seconds, most[0] - before))


def work(results: Connection, root: Path, barrier: Any) -> None:
    """For each stage seconds, own MiB and MiB in no file, while the other workers are as far."""
    Histories.open(root.parent / "few")
    found, own, written = [], own_mib(), written_mib()
    started = time.perf_counter()

    def reached() -> None:
        nonlocal started
        seconds = time.perf_counter() - started
        barrier.wait()
        found.append((seconds, own_mib() - own, written_mib() - written))
        barrier.wait()
        started = time.perf_counter()

    histories = Histories.open(root)
    reached()
    examples = pretraining_examples(histories, "train")
    vocabulary: Any = NoVocabulary()
    rows = Rows(histories, vocabulary, examples, context=8192, tokens_per_row=16384, seed=0, crop="random")
    reached()
    next(rows._order(0))
    reached()
    next(rows._order(3, len(rows._first_G) // rows._groups_per_block // 2))
    reached()
    asked_N = np.random.default_rng(0).integers(0, len(histories), 100_000)
    labelled_N = histories.index.subject_id_P[asked_N]
    assert np.array_equal(histories.index.find(labelled_N), asked_N)
    reached()
    results.send((found, own, len(examples)))


def answers(function: Any, count: int, *arguments: Any) -> list[Any]:
    """What `function(pipe, *arguments)` sends from so many processes at once."""
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe(duplex=False) for _ in range(count)]
    processes = [spawn.Process(target=function, args=(theirs, *arguments)) for _, theirs in pipes]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()  # a process that fails leaves the end of the pipe
    received = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    return received


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--patients", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    root = options.folder / "many"
    Histories.open(write_index(options.folder / "few", 10_000))
    write_index(root, options.patients)
    ((seconds, most),) = answers(make, 1, root)
    index = root / "histories" / "index.parquet"
    arrays = sum(file.stat().st_size for file in (root / "histories" / ".index").iterdir())
    N = options.patients
    print(f"{N:,} patients: index.parquet {index.stat().st_size / N:.1f} bytes a patient, its arrays {arrays / N:.1f}")
    print(
        f"making the arrays: {seconds:.1f} s, at most {most:.0f} MiB in no file, {most * 2**20 / N:.1f} bytes a patient"
    )
    barrier = multiprocessing.get_context("spawn").Barrier(options.workers)
    found = answers(work, options.workers, root, barrier)
    before = max(own for _, own, _ in found)
    print(f"{options.workers} workers, {before:.0f} MiB of their own before; {found[0][2]:,} histories to train on")
    print("| | seconds | own MiB | of these in no file |\n| --- | --- | --- | --- |")
    for stage, of_workers in zip(STAGES, zip(*(stages for stages, _, _ in found), strict=True), strict=True):
        seconds, own, written = (max(values) for values in zip(*of_workers, strict=True))
        print(f"| {stage} | {seconds:.2f} | {own:.0f} | {written:.1f} |")
    print(f"in no file: {written * 2**20 / N:.2f} bytes a patient")


if __name__ == "__main__":
    main()
