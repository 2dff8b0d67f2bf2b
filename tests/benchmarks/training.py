"""What DeepSpeed and Ray cost over a bare loop, ZeRO 0 to 3 on one and two workers, and what a second worker brings.

    python tests/benchmarks/training.py DATA_DIR [--model small] [--steps 40] [--repeats 2] [--quick]

Every worker has one CPU and one thread; a step is the same rows for any number of workers. A run's speed is the median
over its windows of WINDOW steps, the first left out. The bare loop is the same model, rows, AdamW and clipping in plain
PyTorch; it and the runs of the command take turns, so that what else the machine does touches all of them. Memory is
the peak resident memory of the largest worker process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from prepare_memory import descendants, peak_mib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hymate.config import load
from hymate.data.loader import Cursor
from hymate.training.engine import Worker, schedule
from hymate.training.pretraining import PretrainConfig, pretraining_job

ROOT = Path(__file__).resolve().parent.parent.parent
WINDOW = 5
CASES = [(stage, workers) for workers in (1, 2) for stage in range(4)]


def overrides(options: argparse.Namespace) -> list[str]:
    return [
        f"data.path={options.data.absolute()}",
        f"model={options.model}",
        "data.context=4096",
        "data.tokens_per_row=4096",
        "train.rows_per_step=2",
        f"train.max_steps={options.steps}",
        f"train.eval_every={options.steps}",
        "train.eval_rows=2",
        "train.warmup_steps=5",
        f"train.log_every={WINDOW}",
    ]


def bare_loop(options: argparse.Namespace) -> None:
    """Print the speed of the plain loop; runs in a process of its own."""
    torch.set_num_threads(1)
    config = load("pretrain", overrides(options), PretrainConfig)
    job = pretraining_job(config, Worker(0, 1, 0, torch.device("cpu")))
    optimizer = torch.optim.AdamW(job.groups, betas=(config.train.beta1, config.train.beta2))
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    speeds, events, start = [], 0, time.perf_counter()
    for step, (rows, _) in enumerate(job.rows.steps(Cursor(), config.train.rows_per_step, 0, 1)):
        if step == options.steps:
            break
        for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = lr * schedule(step, config.train)
        for row in rows:
            torch.manual_seed(row.seed)
            (job.module(row)["loss"] * row.weight / len(rows)).backward()
            events += row.num_events
        torch.nn.utils.clip_grad_norm_(job.module.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % WINDOW == 0:
            speeds.append(events / (time.perf_counter() - start))
            events, start = 0, time.perf_counter()
    print(json.dumps({"speed": statistics.median(speeds[1:]), "peak_mib": peak_mib(os.getpid())}))


def measured_bare(options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--bare"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured_run(options: argparse.Namespace, stage: int, workers: int) -> dict[str, float]:
    """The same steps by the command, under Ray Train and DeepSpeed."""
    with tempfile.TemporaryDirectory(prefix="hy", dir="/tmp") as folder:
        command = [sys.executable, str(ROOT / "pretrain" / "run.py"), *overrides(options)]
        command += [f"train=zero{stage}", f"train.num_workers={workers}", f"run.dir={folder}/runs"]
        process = subprocess.Popen(command, env={**os.environ, "RAY_TMPDIR": folder}, stdout=subprocess.DEVNULL)
        peaks: dict[int, float] = {}
        while process.poll() is None:
            for pid in descendants(process.pid):
                if "RayTrainWorker" in _command_line(pid):
                    peaks[pid] = max(peaks.get(pid, 0), peak_mib(pid) or 0)
            time.sleep(0.2)
        if process.returncode:
            sys.exit(process.returncode)
        events = EventAccumulator(f"{folder}/runs/pretrain/tb")
        events.Reload()
        speeds = [point.value for point in events.Scalars("train/events_per_second")]
    return {"speed": statistics.median(speeds[1:]), "peak_mib": max(peaks.values())}


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared dataset")
    parser.add_argument("--model", default="small")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="ZeRO 2 alone, 20 steps, once")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = CASES
    if options.quick:
        options.steps, options.repeats, cases = 20, 1, [(2, 1), (2, 2)]
    if options.bare:
        bare_loop(options)
        return
    found: dict[tuple[int, int] | str, list[dict[str, float]]] = {"bare": [], **{case: [] for case in cases}}
    for _ in range(options.repeats):
        for case in cases:
            if case[0] in (0, 2):
                found["bare"].append(measured_bare(options))
            found[case].append(measured_run(options, *case))
    speed = {case: statistics.median(run["speed"] for run in runs) for case, runs in found.items()}
    memory = {case: max(run["peak_mib"] for run in runs) for case, runs in found.items()}
    print(f"model {options.model}, {options.steps} steps; medians of {options.repeats} runs")
    print("| | events/s | of the bare loop | scaling from one worker | MiB a worker |\n|---|---|---|---|---|")
    print(f"| bare loop, 1 thread | {speed['bare']:,.0f} | 1.00 | | {memory['bare']:,.0f} |")
    for stage, workers in cases:
        case = (stage, workers)
        scaling = f"{speed[case] / (workers * speed[stage, 1]):.0%}" if workers > 1 else ""
        line = f"| ZeRO {stage}, {workers} worker{'s' * (workers > 1)} | {speed[case]:,.0f} "
        print(line + f"| {speed[case] / speed['bare']:.2f} | {scaling} | {memory[case]:,.0f} |")


if __name__ == "__main__":
    main()
