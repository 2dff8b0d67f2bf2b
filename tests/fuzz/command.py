"""The command: inputs in a process with bounded memory, which a watchdog follows."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa

from fuzz.inputs import GOOD, READERS, bench

MEMORY_BYTES = 1 << 30  # more than the process had after its first input
PATIENCE_S, SLOW_S = 30.0, 5.0


def work(name: str, first: int, stop: int, out: Connection) -> None:
    """Runs inputs first:stop in this process; tells `out` of each before it starts and after it ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Polars tells of each file that it cannot read
    pa.set_cpu_count(1)
    with bench(name) as made:
        for seed in range(first, stop):
            out.send(("started", seed, ""))
            started = time.monotonic()
            try:
                result, detail = made.run(made.inputs(seed), seed), ""
            except MemoryError as error:
                result, detail = "memory", describe(error)
            except Exception as error:
                result, detail = "error", describe(error)
            if time.monotonic() - started > SLOW_S:
                result, detail = "slow", f"{time.monotonic() - started:.0f} s"
            out.send((result, seed, detail))
            if seed == first:  # what the libraries take for themselves is there by now
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
        out.send(("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""))


def describe(error: Exception) -> str:
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:200]!r} at {' '.join(frames[-4:])}"


def fuzz(name: str, first: int, count: int, findings: Path | None, seconds: float) -> Counter[str]:
    """Inputs first:first+count of a reader, as many as fit into `seconds`; the number of each outcome."""
    outcomes: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    seed, stop, peak, began = first, first + count, 0, math.inf
    while seed < stop and time.monotonic() - began < seconds:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(name, seed, stop, sender))
        process.start()
        sender.close()
        running = False
        while True:
            try:
                if not receiver.poll(PATIENCE_S + 60 * (not running)):
                    result, detail = "hang", f"no answer in {PATIENCE_S:.0f} s"
                else:
                    result, number, detail = receiver.recv()
                    if result == "peak":
                        peak = max(peak, number)
                        break
                    running, seed = result == "started", number
                    if running:
                        began = min(began, time.monotonic())  # not the imports
                        continue
            except EOFError:
                process.join()
                result, detail = "crash", f"exit code {process.exitcode}"
            outcomes[result] += 1
            if result not in GOOD:
                print(f"{name} {seed}: {result}: {detail}", flush=True)
                if findings is not None:
                    keep(name, seed, findings)
            seed += 1
            if result in ("hang", "crash", "memory") or time.monotonic() - began >= seconds:
                break
        process.kill()
        process.join()
    counted = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    took = time.monotonic() - began
    print(
        f"{name}: seeds {first} to {seed - 1}: {outcomes.total()} inputs: {counted}; {took:.0f} s, {peak >> 10} MiB",
        flush=True,
    )
    return outcomes


def keep(name: str, seed: int, findings: Path) -> None:
    """The changed files of an input, for tests/fuzz/corpus."""
    with bench(name) as made:
        for file, data in made.inputs(seed).items():
            target = findings / name / str(seed) / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description="mutated inputs for every reader of files")
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; all by default")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=1000, help="inputs a reader")
    parser.add_argument("--seconds", type=float, default=math.inf, help="most seconds a reader")
    parser.add_argument("--findings", type=Path, help="folder for the inputs that were findings")
    given = parser.parse_args()
    outcomes: Counter[str] = Counter()
    for name in given.readers or READERS:
        outcomes += fuzz(name, given.first, given.count, given.findings, given.seconds)
    sys.exit(1 if outcomes.keys() - set(GOOD) else 0)
