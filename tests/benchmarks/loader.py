"""What the loader delivers from a prepared dataset, on one core.

    python tests/benchmarks/loader.py DATA_DIR [DATA_DIR ...] [--many]

Prints the time from opening the dataset to the first row, and to the next one of a run that stopped in the middle of an
epoch; events per second of a first epoch (files are decoded) and of a later one (row groups come from the cache where
it holds them), beside what a training step of `small` takes; resident memory over the first epoch; how often
neighbours in the order come from one row group, beside chance; and, per token budget,

    filled    fraction of the rows' budget that holds events: an epoch's last rows are shorter, not padded, so what is
              unfilled is not computed either
    computed  fraction of the positions computed that are events: an epoch's rows go through attention (whole
              histories and a window of 512), and the queries that its kernels are given are counted
    padded    the same fraction for batches of as many histories as a packed row holds on average, in random order,
              padded to their longest

--feed instead asks how many cores feed one H100: CPU seconds an event from Parquet through the row, what the loss asks
of it and a copy of all its tensors (as into pinned memory, which only a machine with a GPU has), against the events a
second that `base` takes at 40 % of the bf16 rate of the card.

--many first makes a synthetic dataset of 1,000 shards and one of 21 million events, and measures these too.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from prepared_rows import events_per_epoch, rows_per_epoch

from hymate.command import load
from hymate.data.examples import pretraining_examples
from hymate.data.histories import Histories
from hymate.data.loader import Cursor, Rows
from hymate.data.vocabulary import Vocabulary
from hymate.model.batch import changed
from hymate.model.pretrain_model import PretrainModel
from hymate.ops import packed_attention
from hymate.training.footprint import Shapes, event_flops
from hymate.training.pretraining import PretrainConfig

ROOT = Path(__file__).resolve().parent.parent.parent
WINDOW = 512
H100_FLOPS, FRACTION = 989e12, 0.4  # dense bf16, operations a second; how much of it is to be reached
BUDGETS = (4096, 8192, 16384, 32768, 65536)


def open_rows(path: Path, split: str, context: int, budget: int) -> Rows:
    histories = Histories.open(path)
    return Rows(
        histories,
        Vocabulary.read(path / "histories" / "vocabulary.parquet", min_count=10),
        pretraining_examples(histories, split),
        context=context,
        tokens_per_row=budget,
        seed=0,
        crop="random",
    )


def epoch_speed(rows: Rows, epoch: int) -> tuple[float, float, list[float]]:
    """One epoch's events per second of wall time and of CPU time (all threads), and resident MiB at its quarters."""
    num_rows, memory = rows_per_epoch(rows), []
    quarters = {max(1, num_rows * k // 4) for k in range(1, 5)}
    wall, cpu, events = time.perf_counter(), time.process_time(), 0
    steps = rows.steps(Cursor(epoch), 1, 0, 1)
    for number, ((batch,), _) in enumerate(islice(steps, num_rows), start=1):
        events += batch.num_events
        if number in quarters:
            memory.append(resident_mib())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    steps.close()
    return events / wall, events / cpu, memory


def cores_for_a_card(path: Path, split: str, context: int, objective: str) -> None:
    """One line of a table, over an epoch in memory's cache or 200 rows of it."""
    rows = open_rows(path, split, context, 16384)
    settings = [f"data.path={path}", "model=base", f"objective={objective}"]
    config = load("pretrain", settings, PretrainConfig)
    history_events = round(events_per_epoch(rows) / len(rows.examples))
    shapes = Shapes(config.model, config.objective, rows.vocabulary.size, 16384, min(history_events, 16384), "bf16")
    flops = sum(part.forward + part.backward for part in event_flops(shapes).values())
    wanted = FRACTION * H100_FLOPS / flops
    with torch.device("meta"):
        model = PretrainModel(config.model, config.objective, rows.vocabulary.size)
    parts = {"row": 0.0, "asked": 0.0, "copied": 0.0}
    events = 0
    for place in islice(rows._order(0), 200):
        started = time.process_time()
        row = rows._batch(place)
        read = time.process_time()
        asked = model.ask(row)
        drawn = time.process_time()
        changed(asked, torch.clone)
        for name, seconds in zip(parts, (read - started, drawn - read, time.process_time() - drawn), strict=True):
            parts[name] += seconds
        events += row.num_events
    rates = [f"{events / seconds / 1e6:.2f}" for seconds in (*parts.values(), sum(parts.values()))]
    cores = wanted / (events / sum(parts.values()))
    print(f"| {path.name} | {objective} | {flops / 1e9:.2f} | {wanted / 1e6:.2f} | {' | '.join(rates)} | {cores:.2f} |")


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def seconds_to_first_row(path: Path, split: str, context: int, cursor: Cursor) -> float:
    """From opening the dataset."""
    start = time.perf_counter()
    steps = open_rows(path, split, context, max(16384, context)).steps(cursor, 1, 0, 1)
    next(steps)
    seconds = time.perf_counter() - start
    steps.close()
    return seconds


def consumption(rows: Rows) -> float:
    """Events per second of forward + backward of `small` on one thread, over three rows."""
    config = load("pretrain", [f"data.path={rows.histories.path}", "model=small"], PretrainConfig)
    model = PretrainModel(config.model, config.objective, rows.vocabulary.size)
    steps = rows.steps(Cursor(), 1, 0, 1)
    batches = [batch for (batch,), _ in islice(steps, 4)]
    steps.close()
    for batch in batches:
        if batch is batches[1]:
            start = time.perf_counter()
        model.loss(batch).backward()
    return sum(batch.num_events for batch in batches[1:]) / (time.perf_counter() - start)


def neighbours(rows: Rows) -> tuple[float, float]:
    """Fraction of consecutive examples of epoch 0 that lie in one row group, and what chance would give."""
    order_E = np.concatenate([place.segments for place in rows._order(0)])
    position_E = rows.examples.position_E[order_E]
    group_E = np.searchsorted(rows.histories.index.start_G, position_E, side="right")
    chance = float(np.square(np.bincount(group_E) / len(group_E)).sum())
    return float((np.diff(group_E) == 0).mean()), chance


def padding_efficiency(length_E: np.ndarray, num_rows: int) -> float:
    """Fraction of real events in batches of len(length_E) / num_rows histories padded to their longest."""
    shuffled = np.random.default_rng(0).permutation(length_E)
    per_batch = max(1, round(len(shuffled) / num_rows))
    batches = [shuffled[at : at + per_batch] for at in range(0, len(shuffled), per_batch)]
    return float(shuffled.sum() / sum(len(batch) * batch.max() for batch in batches))


class CountQueries(TorchFunctionMode):
    """Adds up the queries of every call of PyTorch's attention."""

    total = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.total += args[0].shape[:-1].numel()
        return function(*args, **(kwargs or {}))


def computed_efficiency(rows: Rows) -> float:
    """Fraction of attention's query positions that are events, over epoch 0; the lower of whole and windowed."""
    fractions = []
    for window in (None, WINDOW):
        events, count = 0, CountQueries()
        for place in rows._order(0):
            cu_seqlens = [0, *np.cumsum(rows._windows(place.epoch, place.segments).length_S).tolist()]
            q_LHE = torch.zeros(cu_seqlens[-1], 1, 1)
            with count, torch.no_grad():
                packed_attention(q_LHE, q_LHE, q_LHE, cu_seqlens, window=window, causal=True)
            events += len(q_LHE)
        fractions.append(events / count.total)
    return min(fractions)


def measure(path: Path, split: str, context: int) -> None:
    first = seconds_to_first_row(path, split, context, Cursor())
    rows = open_rows(path, split, context, max(16384, context))
    places = list(rows._order(0))
    middle = places[len(places) // 2]
    resumed = seconds_to_first_row(path, split, context, Cursor(0, middle.block, middle.row))
    lengths = rows.histories.index.num_events_P[rows.examples.position_E]
    print(f"\n{path} {split}: {len(lengths):,} histories of {lengths.mean():,.0f} events (at most {lengths.max():,})")
    print(f"first row after {first:.2f} s; after a stop in the middle of the epoch {resumed:.2f} s")
    for epoch, name in ((0, "first epoch"), (1, "second epoch")):
        wall, cpu, memory = epoch_speed(rows, epoch)
        print(f"{name}: {wall / 1e6:.2f} M events/s, {cpu / 1e6:.2f} M events per CPU second", end="; ")
        print(f"resident MiB at its quarters {', '.join(f'{mib:.0f}' for mib in memory)}")
    taken = consumption(rows)
    print(
        f"a training step of small takes {taken:,.0f} events/s on one thread: the loader gives {wall / taken:.0f} times"
    )
    same, chance = neighbours(rows)
    print(f"neighbours from one row group: {same:.2%} (chance {chance:.2%})")
    print("\n| budget | context | rows | filled | computed | padded |\n|---|---|---|---|---|---|")
    for budget in BUDGETS:
        packed = open_rows(path, split, min(context, budget), budget)
        num_rows = rows_per_epoch(packed)
        filled = events_per_epoch(packed) / (num_rows * budget)
        padded = padding_efficiency(np.minimum(lengths, min(context, budget)), num_rows)
        fractions = f"{filled:.1%} | {computed_efficiency(packed):.1%} | {padded:.1%}"
        print(f"| {budget:,} | {min(context, budget):,} | {num_rows:,} | {fractions} |")


def prepared(out: Path, *overrides: str) -> Path:
    command = [sys.executable, "-m", "hymate.data.prepare", "source=synthetic", f"out={out}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="*", help="prepared datasets")
    parser.add_argument("--split", default="train")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--feed", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.feed:
        heads = "dataset | objective | GFLOP an event | card, M events/s | row | asked | copied | together | cores"
        print(f"M events per CPU second\n\n| {heads} |\n|{'---|' * 9}")
        for folder, objective in product(arguments.data, ("masked_event", "both")):
            cores_for_a_card(folder, arguments.split, arguments.context, objective)
        return
    for folder in arguments.data:
        measure(folder, arguments.split, arguments.context)
    if arguments.many:
        with tempfile.TemporaryDirectory() as folder:
            shards = ("synthetic.subjects=2000", "synthetic.mean_events=250", "synthetic.shard_events=500")
            measure(prepared(Path(folder) / "shards", *shards), arguments.split, arguments.context)
            measure(prepared(Path(folder) / "events", "synthetic.subjects=10500"), arguments.split, arguments.context)


if __name__ == "__main__":
    main()
