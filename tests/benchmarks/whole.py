"""From raw MEDS to predictions over two hosts, one of which dies in every step: seconds, and peak memory.

    python tests/benchmarks/whole.py DIR [--subjects 100000] [key=value ...]

As root. The hosts are network, process and mount namespaces of this machine with one CPU each; DIR, which must not lie
below /tmp, is the folder that they share. Each step is one command on the first host, on a Ray cluster of both: prepare
a synthetic cohort's MEDS, pretrain some steps, tune (which finds the labels first; without boosting to compare),
predict the held-out labels. Once a step is under way its second host is killed and another one joins. Prints a Markdown
row for each step: its seconds, and the peak resident memory of the command, of the largest worker, and of the largest
of Ray's own processes. DIR keeps the data, and a step that is finished is not done again: delete it yourself. key=value
are further settings of pretraining and tuning. 100,000 subjects are 200 million events and 5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from commands import ROOT
from hosts import PORT, Host, Network, network, start_ray
from prepare_memory import peak_mib

LOOK_EVERY_S = 0.25
KINDS = ("command", "worker", "Ray")
NO_BOOSTING = "report.boosting=false"  # of 200 million events one thread had not fitted it after 17 minutes


class Peaks:
    """Highest resident MiB of the processes on some hosts, by kind."""

    def __init__(self) -> None:
        self.of = dict.fromkeys(KINDS, 0.0)

    def look(self, hosts: list[Host], command: int) -> None:
        spaces = {space for host in hosts if (space := _space(host.init))}
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            if _space(pid) not in spaces:
                continue
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            kind = "worker" if line.startswith("ray::") and "Agent" not in line else "Ray"
            kind = "command" if command in (pid, _parent(pid)) else kind  # a child has its memory until it is another
            self.of[kind] = max(self.of[kind], peak_mib(pid))


def _space(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


class Machines:
    """Two hosts with a Ray cluster; `settings` are the environment of what runs there."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64, "OMP_NUM_THREADS": "1"}
        self.head = net.add()
        start_ray(self.head, None, self.settings, "--include-dashboard", "false")
        self.other = self.join()

    def join(self) -> Host:
        host = self.net.add()
        start_ray(host, self.head, self.settings)
        return host

    def step(self, name: str, arguments: list[str], log: Path, under_way: Callable[[], object]) -> None:
        """A command that loses a host once it is under way; prints its row."""
        peaks, began, killed = Peaks(), time.monotonic(), None
        environment = {**self.settings, "RAY_ADDRESS": f"{self.head.address}:{PORT}"}
        with log.open("w") as file:
            process = self.head.start(*arguments, env=environment, stdout=file, stderr=file)
        while process.poll() is None:
            inner = _child(process.pid)
            peaks.look([self.head, self.other], inner or process.pid)
            if killed is None and under_way():
                killed = time.monotonic() - began
                self.other.kill()
                self.other = self.join()
            time.sleep(LOOK_EVERY_S)
        if process.returncode:
            sys.exit(f"{name} failed: {log.read_text()[-2000:]}")
        died = "-" if killed is None else f"{killed:.0f}"
        memory = " | ".join(f"{peaks.of[kind]:,.0f}" for kind in KINDS)
        print(f"| {name} | {time.monotonic() - began:,.0f} | {died} | {memory} |", flush=True)


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _child(pid: int) -> int | None:
    """nsenter waits for the command."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--subjects", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=60, help="of pretraining, and of each trial")
    options, more = parser.parse_known_args()
    folder = options.dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    python, task = [sys.executable, "-m"], "task=readmission"
    raw, data, runs, risks = (folder / name for name in ("raw", "data", "runs", "risks"))
    made = f"source=synthetic synthetic.subjects={options.subjects} out={raw}".split()
    subprocess.run([*python, "hymate.data.prepare", *made], check=True, cwd=ROOT)
    short = ["data.context=256", "data.tokens_per_row=4096", f"train.max_steps={options.steps}", "train.warmup_steps=5"]
    short += ["model=debug", f"train.eval_every={options.steps // 4}", f"data.path={data}", f"run.dir={runs}", *more]
    num_shards = len(list((raw / "data").rglob("*.parquet")))
    with tempfile.TemporaryDirectory() as temporary, network(Path(temporary)) as net:
        machines = Machines(net)
        print("| step | s | s until a host was killed | the command, MiB | largest worker | largest of Ray |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        machines.step(
            f"prepare {num_shards:,} shards",
            [*python, "hymate.data.prepare", "source=meds", f"raw={raw}", f"out={data}"],
            folder / "prepare.log",
            lambda: len(list(data.glob("histories/**/*.parquet"))) > num_shards / 4,
        )
        machines.step(
            "pretrain",
            [sys.executable, str(ROOT / "pretrain" / "run.py"), "train=zero2", "train.num_workers=2", *short],
            folder / "pretrain.log",
            lambda: any((runs / "pretrain" / "checkpoints").glob("*")),
        )
        tune = [sys.executable, str(ROOT / "finetune" / "tune.py"), task, f"init={runs / 'pretrain'}", *short]
        machines.step(
            "tune",
            [*tune, "run.name=tune", "search.num_trials=2", f"search.grace_steps={options.steps}", NO_BOOSTING],
            folder / "tune.log",
            lambda: any((runs / "tune" / "trials").glob("*/*")),
        )
        asked = [f"bundle={runs / 'tune'}", f"data.path={data}", task, f"out={risks}", "split=held_out"]
        machines.step(
            "predict",
            [*python, "hymate.predict", *asked],
            folder / "predict.log",
            lambda: any(risks.glob("*.parquet")),
        )
    splits = json.loads((data / "histories" / "metadata.json").read_text())["splits"].values()
    print(f"{sum(s['subjects'] for s in splits):,} subjects, {sum(s['events'] for s in splits):,} events")


if __name__ == "__main__":
    main()
