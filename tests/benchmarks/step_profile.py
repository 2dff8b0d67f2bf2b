"""Where a pretraining step spends its time on the CPU: the fraction of each operator, forward + backward of some rows.

python tests/benchmarks/step_profile.py DATA_DIR [--model physionet] [--rows 4] [--tokens-per-row 8192]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch.profiler import profile

from hymate.command import load
from hymate.data.examples import pretraining_examples
from hymate.data.histories import Histories
from hymate.data.loader import Cursor, Rows
from hymate.data.vocabulary import Vocabulary
from hymate.model.pretrain_model import PretrainModel
from hymate.training.pretraining import PretrainConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--model", default="physionet")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens-per-row", type=int, default=8192)
    options = parser.parse_args()
    overrides = [f"data.path={options.data}", f"model={options.model}", "objective=both"]
    config = load("pretrain", [*overrides, f"data.tokens_per_row={options.tokens_per_row}"], PretrainConfig)
    histories = Histories.open(options.data)
    vocabulary = Vocabulary.read(Path(options.data) / "histories" / "vocabulary.parquet", config.data.min_count)
    rows = Rows(
        histories,
        vocabulary,
        pretraining_examples(histories, "train"),
        context=config.data.context,
        tokens_per_row=config.data.tokens_per_row,
        seed=0,
        crop="random",
    )
    torch.manual_seed(0)
    model = PretrainModel(config.model, config.objective, vocabulary.size)
    steps = rows.steps(Cursor(), options.rows, 0, 1)
    warm, _ = next(steps)
    model.loss(warm[0]).backward()
    batches, _ = next(steps)
    start = time.perf_counter()
    for batch in batches:
        model.loss(batch).backward()
    seconds = time.perf_counter() - start
    with profile() as measured:
        for batch in batches:
            model.loss(batch).backward()
    events = sum(batch.num_events for batch in batches)
    print(f"{events / seconds:,.0f} events/s with {torch.get_num_threads()} threads, {options.model}, {events} events")
    averages = sorted(measured.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in averages)
    print("| operator | fraction of the time |\n|---|---|")
    for row in averages[:12]:
        print(f"| `{row.key}` | {row.self_cpu_time_total / total:.1%} |")


if __name__ == "__main__":
    main()
