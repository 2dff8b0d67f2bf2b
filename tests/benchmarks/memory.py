"""What a training worker needs, for each size of the model and ZeRO stage: memory, checkpoints, time.

    python tests/benchmarks/memory.py DATA_DIR [--models debug small] [--stages 0 1 2 3] [--workers 1 2] [--tokens N]
    python tests/benchmarks/memory.py DATA_DIR --ray

Prints a Markdown table, a row for each model, stage and number of workers. The workers are processes of one thread;
each computes --steps steps of one row at the configured context (data.tokens_per_row=16384) or at --tokens events, then
all save a checkpoint. Peak memory is that of the largest worker, while training and while saving; the speed is a
worker's, in events per second of processor time, the first step left out. --ray prints instead what the processes of
Ray and of the driver take beside the workers, while a job trains `debug` with two workers on a cluster of one machine.
Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from prepare_memory import descendants, peak_mib

from hymate.command import load
from hymate.data.loader import Cursor
from hymate.training import checkpoint, loop
from hymate.training.memory import keep_freed_memory
from hymate.training.pretraining import PretrainConfig, pretraining_job

ROOT = Path(__file__).resolve().parent.parent.parent


class Measured(NamedTuple):
    """One worker's; training_cpu_s: processor time, which other work on the machine changes least; training_mib and
    saving_mib are peaks of the process's whole life until then.
    """

    num_parameters: int
    num_events: int
    training_cpu_s: float
    training_mib: float
    saving_s: float
    saving_mib: float


def work(results: Connection, settings: Sequence[str], rank: int, num_workers: int, steps: int, folder: str) -> None:
    """One worker process: the steps, then a checkpoint below `folder`."""
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_workers))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_workers)
    config = load("pretrain", settings, PretrainConfig)
    worker = loop.Worker(rank, num_workers, rank, torch.device("cpu"))
    job = pretraining_job(config, worker)
    num_parameters = sum(parameter.numel() for parameter in job.module.parameters())
    wrapped, _ = loop.start(job, config.train, worker, resume=None)
    batches = job.rows.steps(Cursor(), config.train.rows_per_step, rank, num_workers)
    num_events = 0
    for step in range(steps + 1):
        if step == 1:
            start = time.process_time()
        rows, _ = next(batches)
        loop.train_step(wrapped, rows, worker.device)
        num_events += sum(row.num_events for row in rows) if step else 0
    training_cpu_s, training_mib = time.process_time() - start, peak_mib(os.getpid())
    dist.barrier()  # waiting for another worker's steps is no saving
    start = time.perf_counter()
    checkpoint.save(wrapped, Path(tempfile.mkdtemp(dir=folder)), {"step": steps})
    saving_s = time.perf_counter() - start
    results.send(Measured(num_parameters, num_events, training_cpu_s, training_mib, saving_s, peak_mib(os.getpid())))
    os._exit(0)


def row(data: Path, model: str, stage: int, num_workers: int, steps: int, tokens: int | None) -> str:
    settings = [f"data.path={data.absolute()}", f"model={model}", f"train=zero{stage}"]
    settings += [f"train.num_workers={num_workers}", f"train.rows_per_step={num_workers}"]
    if tokens is not None:
        settings += [f"data.context={min(tokens, 8192)}", f"data.tokens_per_row={tokens}"]
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [spawn.Pipe(duplex=False) for _ in range(num_workers)]
        for rank, (_, theirs) in enumerate(pipes):
            arguments = (theirs, settings, rank, num_workers, steps, folder)
            spawn.Process(target=work, args=arguments, daemon=True).start()
            theirs.close()  # a worker that fails leaves the end of the pipe
        measured = [ours.recv() for ours, _ in pipes]
        saved = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    speed = sum(each.num_events for each in measured) / sum(each.training_cpu_s for each in measured)
    training_mib, saving_mib, saving_s = (
        max(getattr(each, name) for each in measured) for name in ("training_mib", "saving_mib", "saving_s")
    )
    tokens = load("pretrain", settings, PretrainConfig).data.tokens_per_row
    return (
        f"| {model} | {measured[0].num_parameters:,} | {tokens:,} | {stage} | {num_workers} | {training_mib:,.0f} | "
        f"{saving_mib:,.0f} | {saved / 1e6:,.1f} | {saving_s:.2f} | {speed:,.0f} |"
    )


def print_ray(data: Path) -> None:
    """Memory of what runs beside the workers of a job on a cluster of one machine, when it is most."""
    settings = [f"data.path={data.absolute()}", "model=debug", "train.num_workers=2", "train.max_steps=20"]
    settings += [
        "train.warmup_steps=1",
        "train.eval_every=10",
        "train.eval_rows=2",
        "data.context=1024",
        "data.tokens_per_row=1024",
    ]
    local, ray = str(ROOT / "cluster" / "local.sh"), str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory(prefix="hy", dir="/tmp") as folder:
        own = {"HYMATE_CLUSTER": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folder}/token"}
        environment = {**os.environ, **own}
        started = subprocess.run(
            [local, "start", "--num-cpus", "2"], env=environment, check=True, stdout=subprocess.PIPE
        )
        address = started.stdout.split(b"--address ")[1].split()[0].decode()
        command = [ray, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
        command += ["python", "pretrain/run.py", *settings, f"run.dir={folder}/runs"]
        head = int(Path(folder, "pid").read_text())
        samples: list[dict[int, tuple[str, float]]] = []
        try:
            with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as job:
                while job.poll() is None:
                    samples.append({pid: memory_of(pid) for pid in descendants(head)})
                    time.sleep(0.2)
            assert job.returncode == 0, f"the job ended with {job.returncode}"
        finally:
            subprocess.run([local, "stop"], env=environment, check=True)
    # a process of Ray's is called after what it is doing
    workers = {pid for sample in samples for pid, (name, _) in sample.items() if "RayTrainWorker" in name}
    beside = [[each for pid, each in sample.items() if pid not in workers] for sample in samples]
    most = max(beside, key=lambda sample: sum(mib for _, mib in sample))
    print("| process | MiB |\n|---|---|")
    for name, mib in sorted(most, key=lambda each: -each[1]):
        print(f"| {name} | {mib:,.0f} |")
    print(f"| all | {sum(mib for _, mib in most):,.0f} |")


def memory_of(pid: int) -> tuple[str, float]:
    """A process's name and MiB, its share of pages that several use (PSS); zero where it has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split(" (")[0].split("\0")
        (pss,) = re.findall(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), flags=re.MULTILINE)
    except (OSError, ValueError):
        return "ended", 0.0
    name = next((Path(word).name for word in words if word and not word.endswith(("python", "python3", "-u"))), "?")
    return name, int(pss) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared dataset")
    parser.add_argument("--models", nargs="+", default=["debug", "paper", "physionet", "small"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="events of a row; default: the configured ones")
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    if options.ray:
        print_ray(options.data)
        return
    columns = ["model", "parameters", "events a row", "ZeRO", "workers", "MiB training", "MiB saving"]
    columns += ["checkpoint MB", "s", "events a CPU second"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for model in options.models:
        for stage in options.stages:
            for num_workers in options.workers:
                line = row(options.data, model, stage, num_workers, options.steps, options.tokens)
                print(line, flush=True)


if __name__ == "__main__":
    main()
