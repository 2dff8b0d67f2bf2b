"""What the loader delivers from a prepared dataset, on one core.

    python tests/benchmarks/loader.py DATA_DIR [DATA_DIR ...]

Prints the time from opening the dataset to the first row; events per second of a first epoch (files are decoded)
and of a later one (row groups come from the cache where it holds them); and, per token budget,

    filled    share of the rows' budget that holds events: an epoch's last rows are shorter, not padded, so what is
              unfilled is not computed either
    computed  share of the positions computed that are events: an epoch's rows go through attention (whole
              histories and a window of 512), and the queries that its kernels are given are counted
    padded    the same share for batches of as many histories as a packed row holds on average, in random order,
              padded to their longest
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hymate.data.histories import Histories
from hymate.data.loader import Cursor, Rows, pretraining_examples
from hymate.data.vocabulary import Vocabulary
from hymate.ops import packed_attention

WINDOW = 512
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
        weight_by="events",
    )


def epoch_speed(rows: Rows, epoch: int) -> tuple[float, float]:
    """Events per second of wall time and of CPU time (all threads), over one epoch."""
    wall, cpu = time.perf_counter(), time.process_time()
    steps = rows.steps(Cursor(epoch), 1, 0, 1)
    events = sum(batch.num_events for (batch,), _ in islice(steps, rows.rows_per_epoch))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    steps.close()
    return events / wall, events / cpu


def padding_efficiency(length_E: np.ndarray, num_rows: int) -> float:
    """Share of real events in batches of len(length_E) / num_rows histories padded to their longest."""
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
    """Share of attention's query positions that are events, over epoch 0; the lower of whole and windowed."""
    shares = []
    for window in (None, WINDOW):
        events, count = 0, CountQueries()
        for row in rows._order(0):
            cu_seqlens = [0, *np.cumsum(rows._length_E[row]).tolist()]
            q_LHE = torch.zeros(cu_seqlens[-1], 1, 1)
            with count, torch.no_grad():
                packed_attention(q_LHE, q_LHE, q_LHE, cu_seqlens, window=window, causal=True)
            events += len(q_LHE)
        shares.append(events / count.total)
    return min(shares)


def measure(path: Path, split: str, context: int) -> None:
    start = time.perf_counter()
    rows = open_rows(path, split, context, max(16384, context))
    steps = rows.steps(Cursor(), 1, 0, 1)
    next(steps)
    first = time.perf_counter() - start
    steps.close()
    lengths = rows.histories.index["num_events"][rows.examples.position_E]
    print(f"\n{path} {split}: {len(lengths):,} histories of {lengths.mean():,.0f} events (at most {lengths.max():,})")
    print(f"first row after {first:.2f} s")
    for epoch, name in ((0, "first epoch"), (1, "second epoch")):
        wall, cpu = epoch_speed(rows, epoch)
        print(f"{name}: {wall / 1e6:.2f} M events/s, {cpu / 1e6:.2f} M events per CPU second")
    print("\n| budget | context | rows | filled | computed | padded |\n|---|---|---|---|---|---|")
    for budget in BUDGETS:
        packed = open_rows(path, split, min(context, budget), budget)
        padded = padding_efficiency(np.minimum(lengths, min(context, budget)), packed.rows_per_epoch)
        shares = f"{packed.packing_efficiency:.1%} | {computed_efficiency(packed):.1%} | {padded:.1%}"
        print(f"| {budget:,} | {min(context, budget):,} | {packed.rows_per_epoch:,} | {shares} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+", help="prepared datasets")
    parser.add_argument("--split", default="train")
    parser.add_argument("--context", type=int, default=8192)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for folder in arguments.data:
        measure(folder, arguments.split, arguments.context)
