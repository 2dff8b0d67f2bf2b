"""Commands run as a user runs them, and what can be seen of their runs from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0  # for what hangs: on a busy machine a run of two workers takes minutes


@dataclass(frozen=True)
class Command:
    """A command of a page, in one line; untested: why no test runs it, in the page's words."""

    line: str
    untested: str | None = None


def pages() -> list[str]:
    """All pages with commands, from the root, in the order in which a reader meets them."""

    def files(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            (inner,) = entry.values()
            yield from [inner] if isinstance(inner, str) else files(inner)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return ["README.md", "CONTRIBUTING.md", *(f"docs/{file}" for file in files(nav))]


def documented(page: str) -> list[Command]:
    """The commands in a page's blocks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        reason = re.match(r"# not tested: (.*)\n", block)
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                found.append(Command(line.partition(" # ")[0].rstrip(), reason and reason[1]))
    return found


def run(arguments: list[str], environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S)


PRETENDED = """
import sys
from importlib.machinery import PathFinder

class PretendedGPU:
    @staticmethod
    def find_spec(name, path, target=None):
        spec = PathFinder.find_spec(name, path) if name == "torch.cuda" else None
        if spec is not None:
            load = spec.loader.exec_module
            def pretend(module):
                load(module)
                module.is_available, module.device_count = lambda: True, lambda: 1
            spec.loader.exec_module = pretend
        return spec

sys.meta_path.insert(0, PretendedGPU)
"""


def with_pretended_gpu(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """An environment in which PyTorch finds one GPU in every process; what computes on it fails."""
    (folder / "sitecustomize.py").write_text(PRETENDED)  # Python imports it when it starts
    path = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path}


def wait_until(condition: Callable[[], object], what: str, look_every_s: float = 0.05) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(look_every_s)


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent's pid, command line) of what runs on this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = (parent, (folder / "cmdline").read_text().replace("\0", " "))
        except (OSError, ValueError):
            continue  # it ended meanwhile
    return found


def ray_processes(folder: str, name: str = "") -> set[int]:
    """Those of a Ray whose files are in `folder`: named on their command line, or, for workers, which change theirs and
    live a little longer than what started them, written to. name: how their command line begins.
    """
    named = {pid: line for pid, (_, line) in processes().items() if line.startswith(name)}
    return {pid for pid, line in named.items() if f"{folder}/" in line or f"{folder}/" in _output(pid)}


def listening(process: psutil.Process) -> set[IPv4Address | IPv6Address]:
    """The addresses at which a process and those that it started listen."""
    sockets = []
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile
            sockets += [held for held in each.net_connections("tcp") if held.status == psutil.CONN_LISTEN]
    return {ip_address(held.laddr.ip.removeprefix("::ffff:")) for held in sockets}


def _output(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return ""  # it ended meanwhile


def points(run_folder: Path, name: str) -> list[Any]:
    """The curve `name` of a run: `wall_time`, `step` and `value` of each point."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return events.Scalars(name)


def starts(run_folder: Path) -> list[int]:
    """The steps at which workers began, from each event file's first records."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    steps = []
    for file in sorted((run_folder / "tb").glob("events.*")):
        for event in EventFileLoader(str(file)).Load():
            if event.HasField("session_log"):
                steps.append(event.step - 1)
                break
    return steps


def step_of(run_folder: Path) -> int:
    """How far a pretraining run is that may be running: its checkpoints up to the last but one certainly count."""
    try:
        return json.loads((run_folder / "progress.json").read_text())["step"]
    except (OSError, ValueError):
        return 0
