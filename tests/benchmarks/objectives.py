"""What each objective costs per event beside the encoder alone: forward and backward, on one thread.

    python tests/benchmarks/objectives.py [--model small] [--vocabulary 20000] [--histories 40] [--repeats 5]

The histories are random, each of 400 events, in one row, with codes as frequent as 1 / rank. Times are CPU seconds of
this process, the contestants by turns, the fastest turn of each; finding what is asked of a row is timed by itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from rows import random_row

from hymate.command import load
from hymate.evaluation.tables import markdown
from hymate.model.batch import FIRST_CODE_ID, Batch
from hymate.model.pretrain_model import PretrainModel
from hymate.training.memory import keep_freed_memory
from hymate.training.pretraining import PretrainConfig

EVENTS = 400  # of a history
OBJECTIVES = ("masked_event", "forecast", "time_to_event")


def a_row(histories: int, vocabulary: int) -> Batch:
    row = random_row([EVENTS] * histories, vocab_size=vocabulary)
    rank_V = torch.arange(1, vocabulary - FIRST_CODE_ID + 1)
    generator = torch.Generator().manual_seed(0)
    code_L = FIRST_CODE_ID + torch.multinomial(1 / rank_V, row.num_events, replacement=True, generator=generator)
    return replace(row, code_L=code_L)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--vocabulary", type=int, default=20000)
    parser.add_argument("--histories", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    row = a_row(options.histories, options.vocabulary)
    contestants: dict[str, Callable[[], None]] = {}
    for objective in OBJECTIVES:
        config = load("pretrain", ["data.path=-", f"model={options.model}", f"objective={objective}"], PretrainConfig)
        torch.manual_seed(0)
        model = PretrainModel(config.model, config.objective, options.vocabulary)
        model.learn_times([row])
        asked = model.ask(row)
        contestants |= {
            "encoder": lambda model=model: model.backbone(row).square().mean().backward(),  # type: ignore[misc]
            objective: lambda model=model, asked=asked: model.loss(asked).backward(),  # type: ignore[misc]
            f"{objective}: what is asked": lambda model=model: model.ask(row) and None,  # type: ignore[misc]
        }
    fastest = dict.fromkeys(contestants, float("inf"))
    for turn in range(1 + options.repeats):  # the first compiles
        for name, step in contestants.items():
            start = time.process_time()
            step()
            if turn:
                fastest[name] = min(fastest[name], time.process_time() - start)
    print(f"model {options.model}, vocabulary {options.vocabulary:,}, {row.num_events:,} events, float32; ", end="")
    print(f"torch {torch.__version__}, one thread\n", flush=True)
    lines = [
        [name, f"{1e6 * seconds / row.num_events:.0f}", f"{seconds / fastest['encoder']:.2f}"]
        for name, seconds in fastest.items()
    ]
    print(markdown([["", "us an event", "over the encoder"], *lines], aligned=True))


if __name__ == "__main__":
    main()
