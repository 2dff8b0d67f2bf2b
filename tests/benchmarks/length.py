"""How a training step's memory and time grow with the length of one history: forward, backward, AdamW.

    python tests/benchmarks/length.py [--quick] [--model small] [--vocabulary 7000]

Every step of the memory table runs in a process of its own; the peak is the resident memory of all of it, Python and
PyTorch included, and the slope the least-squares line through the peaks. A length that would take more than three
quarters of the memory available is left out. Cost ratios compare one long history with as many events in histories of
1,024, each in a row of its own with gradients accumulated, by turns in one process; the optimiser steps once in
either case.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from rows import random_row

from hymate.command import load
from hymate.config import ModelConfig, ObjectiveConfig
from hymate.model.batch import Batch
from hymate.model.encoder import decay_groups
from hymate.model.pretrain_model import PretrainModel
from hymate.training.memory import keep_freed_memory
from hymate.training.pretraining import PretrainConfig

SHORT = 1024
LENGTHS = (1024, 4096, 16384, 65536, 131072)
QUICK = (1024, 8192)


class Trainer:
    """A model and its optimiser."""

    def __init__(self, options: argparse.Namespace) -> None:
        composed = load("pretrain", ["data.path=none", f"model={options.model}", "objective=both"], PretrainConfig)
        model: ModelConfig = composed.model
        objective: ObjectiveConfig = composed.objective
        if options.layers:
            model = dataclasses.replace(model, layers=options.layers)
        keep_freed_memory()
        torch.manual_seed(0)
        self.model = PretrainModel(model, objective, options.vocabulary)
        self.model.backbone.activation_checkpointing = options.checkpointing
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, 0.05), lr=1e-4)

    def step(self, rows: list[Batch]) -> float:
        """Seconds of one optimiser step."""
        start = time.perf_counter()
        for row in rows:
            torch.manual_seed(row.seed)
            (self.model.loss(row) / len(rows)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def memory(options: argparse.Namespace) -> dict[str, float]:
    """Peak resident memory of this process over one step, and the step's time."""
    trainer, row = Trainer(options), random_row([options.events], vocab_size=options.vocabulary)
    trainer.step([random_row([64], vocab_size=options.vocabulary)])  # compiles the kernels
    seconds = trainer.step([row])
    return {"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "seconds": seconds}


def ratio(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step over one long history and over its events in short ones."""
    trainer, size = Trainer(options), options.vocabulary
    long = [random_row([options.events], vocab_size=size)]
    short = [random_row([SHORT], vocab_size=size, seed=seed) for seed in range(options.events // SHORT)]
    trainer.step(short[:1])
    times = [(trainer.step(short), trainer.step(long)) for _ in range(options.repeats)]
    return {"short": min(s for s, _ in times), "long": min(s for _, s in times)}


def free_bytes() -> int:
    """What a case may take: three quarters of the memory available."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 768 * int(lines["MemAvailable"].split()[0])


def _in_process(what: str, options: argparse.Namespace, **changes: Any) -> dict[str, float]:
    arguments = json.dumps({**vars(options), **changes, "what": what})
    output = subprocess.run([sys.executable, __file__, "--case", arguments], check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def memory_table(options: argparse.Namespace, lengths: tuple[int, ...]) -> None:
    print("| activations | events | peak, MiB | us/event |\n|---|---|---|---|")
    for checkpointing, name in ((True, "recomputed"), (False, "kept")):
        peaks: dict[int, float] = {}
        for events in lengths:
            if peaks and peaks[max(peaks)] * events / max(peaks) > free_bytes():
                print(f"| {name} | {events:,} | not run: more than {free_bytes() / 2**30:.0f} GiB | |")
                continue
            case = _in_process("memory", options, layers="", checkpointing=checkpointing, events=events)
            peaks[events] = case["peak"]
            print(f"| {name} | {events:,} | {case['peak'] / 2**20:,.0f} | {1e6 * case['seconds'] / events:.0f} |")
            sys.stdout.flush()
        slope, base = np.polyfit(list(peaks), list(peaks.values()), 1)
        print(f"| {name} | slope | {slope / 1024:.1f} KiB an event above {base / 2**20:,.0f} MiB | |")


def ratio_table(options: argparse.Namespace, events: int) -> None:
    print(f"\n| layers | {events:,} events in one history, cost against histories of {SHORT:,} |\n|---|---|")
    for layers, name in (("MMMM", "MMMM"), ("", f"{options.model} (hybrid, windowed attention)")):
        case = _in_process("ratio", options, layers=layers, checkpointing=False, events=events)
        print(f"| {name} | {case['long'] / case['short']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="histories of at most 8,192 events")
    parser.add_argument("--model", default="small")
    parser.add_argument("--vocabulary", type=int, default=7000)
    parser.add_argument("--repeats", type=int, default=3, help="of the cost ratios; the fastest counts")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = argparse.Namespace(**json.loads(options.case))
        print(json.dumps({"memory": memory, "ratio": ratio}[case.what](case)))
        return
    print(f"model {options.model}, vocabulary {options.vocabulary:,}, masked events and forecasting, float32; ", end="")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n", flush=True)
    memory_table(options, QUICK if options.quick else LENGTHS)
    ratio_table(options, QUICK[-1] if options.quick else 65536)


if __name__ == "__main__":
    main()
