"""What DeepSpeed and Ray cost over a bare loop, ZeRO 0 to 3 on one and two workers, and what a second worker brings.

    python tests/benchmarks/training.py DATA_DIR [--model small] [--steps 12] [--quick]

A virtual machine's speed drifts by more than these overheads, so the contestants take turns step by step: at each ZeRO
stage the bare loop, one worker and two workers (each a process of its own with one thread) wait while another computes
the same rows, and ratios are medians over the steps, the first left out. The bare loop is the same model, rows, AdamW
and clipping in plain PyTorch; two of them at once, which share nothing, show how far the machine itself scales. Memory
is the peak resident memory of the largest worker process. Ray's part is the time that its own processes compute while
the command trains with two workers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from prepare_memory import descendants, peak_mib

from hymate.command import load
from hymate.data.feeding import fed
from hymate.data.loader import Cursor
from hymate.model.objectives import mean_loss
from hymate.training import loop
from hymate.training.memory import keep_freed_memory
from hymate.training.pretraining import PretrainConfig, pretraining_job

ROOT = Path(__file__).resolve().parent.parent.parent
TICKS = os.sysconf("SC_CLK_TCK")


def overrides(data: Path, model: str) -> list[str]:
    rows = ["data.context=4096", "data.tokens_per_row=4096", "train.rows_per_step=2"]
    return [f"data.path={data.absolute()}", f"model={model}", *rows, "train.eval_rows=2", "train.warmup_steps=5"]


# ------------------------------------------------------------------------------------------------------ contestants


def serve(orders: Connection, settings: list[str], stage: int | None, rank: int, num_workers: int, store: str) -> None:
    """One worker process (stage None: the bare loop): a step for each order, answered by its peak memory."""
    torch.set_num_threads(1)
    keep_freed_memory()
    worker = loop.Worker(rank, num_workers, rank, torch.device("cpu"))
    if stage is None:
        step = bare_step(load("pretrain", settings, PretrainConfig), worker)
    else:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_workers))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_workers)
        config = load("pretrain", [*settings, f"train=zero{stage}", f"train.num_workers={num_workers}"], PretrainConfig)
        step = engine_step(config, worker)
    orders.send(None)
    while orders.recv():
        step()
        orders.send(peak_mib(os.getpid()))


def bare_step(config: PretrainConfig, worker: loop.Worker) -> Callable[[], None]:
    job = pretraining_job(config, worker)
    optimizer = torch.optim.AdamW(job.groups, betas=(config.train.beta1, config.train.beta2))
    steps = fed(job.rows.steps(Cursor(), config.train.rows_per_step, 0, 1), worker.device, job.module.ask)

    def step() -> None:
        rows, _ = next(steps)
        count_K = loop.count_targets(job.module, rows)
        for row in rows:
            torch.manual_seed(row.seed)
            mean_loss(job.module.terms, job.module(row)["sum_K"], count_K)[0].backward()
        torch.nn.utils.clip_grad_norm_(job.module.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(config: PretrainConfig, worker: loop.Worker) -> Callable[[], None]:
    job = pretraining_job(config, worker)
    wrapped, _ = loop.start(job, config.train, worker, resume=None)
    steps = job.rows.steps(Cursor(), config.train.rows_per_step, worker.rank, worker.world_size)
    ready = fed(steps, worker.device, job.module.ask)

    def step() -> None:
        loop.train_step(wrapped, next(ready)[0], worker.device)

    return step


@contextmanager
def contestant(settings: list[str], stage: int | None, num_workers: int) -> Iterator[Callable[[], tuple[float, float]]]:
    """A function that makes its workers take one step together: seconds, and the largest's peak MiB."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [spawn.Pipe() for _ in range(num_workers)]
        arguments = [
            (theirs, settings, stage, rank, num_workers, f"{folder}/store") for rank, (_, theirs) in enumerate(pipes)
        ]
        workers = [spawn.Process(target=serve, args=each, daemon=True) for each in arguments]
        for worker in workers:
            worker.start()
        for (ours, _), worker in zip(pipes, workers, strict=True):
            while not ours.poll(1):
                assert worker.is_alive(), f"a worker of stage {stage} ended with {worker.exitcode}"
            ours.recv()

        def step() -> tuple[float, float]:
            start = time.perf_counter()
            for ours, _ in pipes:
                ours.send(True)
            peaks = [ours.recv() for ours, _ in pipes]
            return time.perf_counter() - start, max(peaks)

        try:
            yield step
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


# ------------------------------------------------------------------------------------------------------------- Ray


def ray_cores(settings: list[str], steps: int) -> float:
    """Cores that the processes of Ray and the driver use while `pretrain/run.py` trains with two workers."""
    with tempfile.TemporaryDirectory(prefix="hy", dir="/tmp") as folder:
        command = [sys.executable, str(ROOT / "pretrain" / "run.py"), *settings, "train=zero2", "train.num_workers=2"]
        command += [f"train.max_steps={steps}", f"train.eval_every={steps}", f"run.dir={folder}/runs"]
        run = subprocess.Popen(command, env={**os.environ, "RAY_TMPDIR": folder}, stdout=subprocess.DEVNULL)
        fractions = []
        before = cpu_seconds(run.pid)
        while run.poll() is None:
            start = time.perf_counter()
            time.sleep(2)
            now = cpu_seconds(run.pid)
            seconds = time.perf_counter() - start
            spent = {pid: used - before.get(pid, (name, 0.0))[1] for pid, (name, used) in now.items()}
            training = [spent[pid] for pid, (name, _) in now.items() if "RayTrainWorker" in name]
            if len(training) == 2 and min(training) > 0.7 * seconds:
                fractions.append((sum(spent.values()) - sum(training)) / seconds)
            before = now
        assert run.returncode == 0, f"the command ended with {run.returncode}"
    return statistics.median(fractions)


def cpu_seconds(root: int) -> dict[int, tuple[str, float]]:
    """Command line and CPU time of each process below `root`, and of it."""
    found = {}
    for pid in [root, *descendants(root)]:
        try:
            name = Path(f"/proc/{pid}/cmdline").read_text()
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        found[pid] = name, (int(fields[11]) + int(fields[12])) / TICKS
    return found


# ----------------------------------------------------------------------------------------------------------- table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared dataset")
    parser.add_argument("--model", default="small")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="ZeRO 2 alone, 4 steps")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    settings = overrides(options.data, options.model)
    stages, steps = ([2], 4) if options.quick else (range(4), options.steps)
    print(f"model {options.model}, {steps} steps of two rows of 4,096 events, one thread a worker")
    print(
        "| | s a step, bare | one worker | over bare | two workers | scaling (two bare loops) | MiB a worker, 1 and 2 |"
    )
    print("|---|---|---|---|---|---|---|")
    for stage in stages:
        with (
            contestant(settings, None, 1) as bare,
            contestant(settings, stage, 1) as one,
            contestant(settings, stage, 2) as two,
            contestant(settings, None, 2) as pair,
        ):
            turns = [[take() for take in (bare, one, two, pair)] for _ in range(steps + 1)][1:]
        bare_s, one_s, two_s = (statistics.median(turn[k][0] for turn in turns) for k in range(3))
        overhead = statistics.median(one[0] / bare[0] for bare, one, _, _ in turns) - 1
        scaling = statistics.median(one[0] / (2 * two[0]) for _, one, two, _ in turns)
        bound = statistics.median(bare[0] / pair[0] for bare, _, _, pair in turns)
        memory = ", ".join(f"{turns[-1][k][1]:,.0f}" for k in (1, 2))
        times = f"{bare_s:.2f} | {one_s:.2f} | {overhead:+.1%} | {two_s:.2f}"
        print(f"| ZeRO {stage} | {times} | {scaling:.0%} ({bound:.0%}) | {memory} |", flush=True)
    print(f"Ray and the driver compute for {ray_cores(settings, 2 * steps):.1%} of one core while two workers train")


if __name__ == "__main__":
    main()
