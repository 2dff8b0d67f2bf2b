"""What workers on several hosts send, what that costs, and what follows for many more of them.

    python tests/benchmarks/scaling.py DATA_DIR [--rate 20mbit] [--steps 12] [key=value ...]

As root. Each worker is on a host of its own (a network namespace of this machine) with one CPU; data and runs are on an
S3 server. Measured, for one to three workers, each ZeRO stage, and rows accumulated in a step: bytes that a worker
sends in a step (of its network interface) against those of the parameters (float32), seconds of a step, and the
fraction of them outside collectives; then the same over cables of `--rate`. The formula's seconds stand beside it:

    seconds of a step = rows of a worker x seconds of a row + bytes of a worker / bandwidth
    efficiency        = rows of a worker x seconds of a row / seconds of a step

The last table is the formula's efficiency of 8 to 512 workers: bytes as measured, scaled by the part (N - 1) / N that a
worker of N sends of what all hold; the network does nothing else, nothing overlaps, and messages take no time by
themselves.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from commands import points
from hosts import PORT, Host, network, start_ray
from pretraining_runs import command
from s3 import BUCKET, environment, serving

from hymate.evaluation.tables import markdown
from hymate.storage import paths

DATA, FIRST_STEP = f"s3://{BUCKET}/data", 3  # steps before are warm-up
WORKERS, STAGES, ACCUMULATED = (1, 2, 3), (0, 1, 2, 3), (1, 4)
MANY = (8, 512)
GIGABITS = (1, 10, 100)
CASES = (  # parameters, and seconds of a row: measured on a CPU core, and what `python -m hymate.plan` counts
    ("`base`, a CPU core each, rows of 4,096 events", 101.8e6, 28.6),
    ("`base`, a GPU each at 396 TFLOP/s, rows of 16,384", 147.7e6, 0.225),
)


@dataclass(frozen=True)
class Setting:
    """workers: one a host. accumulated: rows of each in a step."""

    workers: int
    stage: int
    accumulated: int

    def overrides(self) -> list[str]:
        rows = self.workers * self.accumulated
        numbers = [
            f"train.num_workers={self.workers}",
            f"train.rows_per_step={rows}",
            f"train.eval_rows={self.workers}",
        ]
        return [f"train=zero{self.stage}", *numbers, f"train.eval_rows={self.workers}"]


@dataclass
class Cost:
    """Of one step, means: seconds; seconds outside collectives; what the worker that sends most sends, in the bytes of
    all parameters.
    """

    step_s: float
    own_s: float
    sent: float
    model_bytes: int


@dataclass
class Counter:
    """Bytes that hosts have sent, read again and again."""

    hosts: Sequence[Host]
    times: list[float] = field(default_factory=list)
    sent: list[list[int]] = field(default_factory=list)

    @contextmanager
    def counting(self) -> Iterator[None]:
        done = threading.Event()
        reader = threading.Thread(target=self._read, args=(done,))
        reader.start()
        try:
            yield
        finally:
            done.set()
            reader.join()

    def _read(self, done: threading.Event) -> None:
        while not done.wait(0.05):
            self.times.append(time.time())
            self.sent.append([self._bytes(host) for host in self.hosts])

    def _bytes(self, host: Host) -> int:
        lines = Path(f"/proc/{host.init}/net/dev").read_text().splitlines()
        (line,) = (line for line in lines if line.strip().startswith("eth0:"))
        return int(line.split(":")[1].split()[8])

    def between(self, began: float, ended: float) -> float:
        """Bytes of the host that sent most between two times."""
        at = [np.interp([began, ended], self.times, sent) for sent in np.array(self.sent, float).T]
        return max(float(last - first) for first, last in at)


def measure(hosts: Sequence[Host], setting: Setting, steps: int, settings: dict[str, str], more: list[str]) -> Cost:
    """A pretraining's steps; the run is removed."""
    runs = f"s3://{BUCKET}/run-{time.monotonic_ns()}"
    lengths = [f"train.max_steps={steps}", f"train.eval_every={steps}", "train.warmup_steps=1", "train.log_every=1"]
    arguments = command(Path("unused"), Path("unused"), f"data.path={DATA}", f"run.dir={runs}", *lengths)
    arguments = [
        part for part in arguments if not part.startswith(("model=", "objective.", "train=", "train.num", "train.rows"))
    ]
    arguments = [part for part in arguments if not part.startswith("train.eval_rows")]
    counter = Counter(hosts)
    with counter.counting():
        done = hosts[0].run(*arguments, *setting.overrides(), *more, env=settings)
    assert done.returncode == 0, done.stderr
    with paths.local_copy(paths.locate(f"{runs}/pretrain/tb")) as events:
        losses = points(events.parent, "train/loss")
        waits = [points(events.parent, f"worker_collective_fraction/{n}") for n in range(setting.workers)]
    began, ended = (losses[at].wall_time for at in (FIRST_STEP - 1, -1))
    step_s = (ended - began) / (len(losses) - FIRST_STEP)
    waiting = min(np.mean([point.value for point in worker[FIRST_STEP:]]) for worker in waits)
    sent = counter.between(began, ended) / (len(losses) - FIRST_STEP)
    model_bytes = len(paths.locate(f"{runs}/pretrain/bundle/model.safetensors").read_bytes())
    return Cost(step_s, step_s * float(1 - waiting), sent / model_bytes, model_bytes)


def expected(setting: Setting, row_s: float, sent: float, bytes_per_s: float) -> float:
    """The formula's seconds of a step."""
    return setting.accumulated * row_s + sent / bytes_per_s


def efficiency(setting: Setting, row_s: float, sent: float, bytes_per_s: float) -> float:
    """Of the time, the fraction that computes."""
    return setting.accumulated * row_s / expected(setting, row_s, sent, bytes_per_s)


def compared(costs: dict[tuple[Setting, bool], Cost], rate: str) -> Iterator[list[str]]:
    """What was measured, and the formula's seconds on narrow cables, with what the same setting sent on wide ones."""
    yield ["workers", "ZeRO", "rows", "sent, of parameters' bytes", "step, s", "outside collectives, s"]
    for (setting, is_narrow), cost in costs.items():
        if not is_narrow:
            row = [setting.workers, setting.stage, setting.accumulated, f"{cost.sent:.2f}"]
            yield [*map(str, row), f"{cost.step_s:.2f}", f"{cost.own_s:.2f}"]
    yield ["", "", "", "", f"at {rate}, s", "the formula's, s"]
    for (setting, is_narrow), cost in costs.items():
        if is_narrow:
            row_s, sent = cost.own_s / setting.accumulated, costs[setting, False].sent * cost.model_bytes
            formula_s = expected(setting, row_s, sent, megabits(rate) * 1e6 / 8)
            row = [setting.workers, setting.stage, setting.accumulated, f"{cost.sent:.2f}"]
            yield [*map(str, row), f"{cost.step_s:.2f}", f"{formula_s:.2f}"]


def forecast(costs: dict[tuple[Setting, bool], Cost]) -> Iterator[list[str]]:
    """Expected efficiency of 8 to 512 workers by model, ZeRO stage, accumulated rows and bandwidth."""
    yield ["", "ZeRO", "rows", *(f"{gigabits} Gbit/s" for gigabits in GIGABITS)]
    most = max(setting.workers for setting, _ in costs)
    for name, parameters, row_s in CASES:
        for (setting, is_narrow), cost in costs.items():
            if is_narrow or setting.workers < most:
                continue
            part = cost.sent / (1 - 1 / most) * 4 * parameters
            cells = []
            for gigabits in GIGABITS:
                found = [efficiency(setting, row_s, part * (1 - 1 / N), gigabits * 1e9 / 8) for N in MANY]
                cells.append(" to ".join(f"{100 * each:.0f}" for each in found) + " %")
            yield [name, str(setting.stage), str(setting.accumulated), *cells]


def megabits(rate: str) -> float:
    assert rate.endswith("mbit"), "a rate such as 20mbit"
    return float(rate.removesuffix("mbit"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared dataset")
    parser.add_argument("--rate", default="20mbit", help="of the narrow cables, as tc writes it")
    parser.add_argument("--steps", type=int, default=8)
    options, more = parser.parse_known_args()
    more = more or ["model=small", "data.context=1024", "data.tokens_per_row=1024"]
    costs: dict[tuple[Setting, bool], Cost] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        network(Path(folder)) as net,
        serving(Path(folder), net.outside) as server,
        environment(server.environment),
    ):
        place = paths.locate(DATA)
        assert isinstance(place, paths.UrlPath)
        paths.upload_files(options.data, place)
        for workers in WORKERS:
            settings = {**server.environment, "OMP_NUM_THREADS": "1"}
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}
            hosts = [net.add() for _ in range(workers)]
            start_ray(hosts[0], None, settings, "--include-dashboard", "false")
            for host in hosts[1:]:
                start_ray(host, hosts[0], settings)
            settings["RAY_ADDRESS"] = f"{hosts[0].address}:{PORT}"
            for is_narrow in (False, True) if workers == max(WORKERS) else (False,):
                for host in hosts if is_narrow else ():
                    host.narrow(options.rate)
                for stage, accumulated in itertools.product(STAGES, ACCUMULATED):
                    setting = Setting(workers, stage, accumulated)
                    costs[setting, is_narrow] = measure(hosts, setting, options.steps, settings, more)
                    print(setting, is_narrow, costs[setting, is_narrow], file=sys.stderr, flush=True)
            for host in hosts:
                host.kill()
    print(markdown(list(compared(costs, options.rate)), aligned=True))
    print(markdown(list(forecast(costs)), aligned=True))


if __name__ == "__main__":
    main()
