"""The folder of a run: `run.json`, what the run was, and `claim.json`, which command it belongs to now.

run.json has enough to repeat the run; no secret, no host or user name, nothing of a patient:

{
  "format": 2, "command": "pretrain", "config": {...},
  "inputs": {"data.path": "..."},                                           digests of what these settings name
  "outcome": {"state": "running" | "finished" | "failed" | "stopped", ...}, what finished found, or why it failed
  "attempts": [                                                             one for each time the command was given
    {
      "id": "...",
      "started": "2026-01-31T12:00:00+00:00", "ended": null,                null: it is running, or was killed
      "overrides": [...], "code": {...}, "environment": {...},
      "starts": [{"at": "...", "step": 0}]                                  of the workers: more than one if replaced
    }
  ]
}

claim.json has the id of the command that came last: {"id": "...", "stop": false}. Workers outlive a killed command for
a while, and would write checkpoints into a run that the same command, started again, continues: workers of another id
keep nothing more. A command that is asked to end sets "stop". The claim has its own file because run.json is read,
changed and written again by drivers and workers: without a lock, which URLs don't have, one could undo what another has
just written. A claim is written whole, so the last one holds, and it is small: workers look at it all the time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import threading
import time
import typing
import uuid
from collections.abc import Callable, Iterator, Mapping, Set
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import hymate
from hymate import ending
from hymate.config import SHIPPED_NAME, Codes, Init, Place, RunConfig
from hymate.errors import ConfigError, UserError
from hymate.storage.paths import Location, UrlPath, locate, write_text
from hymate.trees import build, flattened, to_tree

RECORD, CLAIM = "run.json", "claim.json"
FORMAT = 2  # of the run folder
COMMAND_LINE: ContextVar[tuple[str, ...]] = ContextVar("what the user gave the command", default=())
SUPERSEDED = "another command has taken this run over"
LOOK_EVERY_S, LOOK_AT_URL_EVERY_S = 0.2, 5.0
ELSEWHERE = {"data.path", "device", "run.dir"}  # keys that move a run to other machines, so it may be continued
T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
# inside the package where that was installed from a wheel, beside it in a checkout
CONFIGS = next((folder for folder in [PACKAGE / "configs"] if folder.is_dir()), ROOT / "configs")
# fmt: off
PACKAGES = (
    "torch", "deepspeed", "ray", "pyarrow", "numpy", "numba", "scipy", "polars", "scikit-learn", "safetensors",
    "tensorboard", "hydra-core", "meds", "es-aces", "mamba-ssm", "causal-conv1d", "lightgbm",
)
# fmt: on


def run_folder(run: RunConfig) -> Location:
    """The absolute folder of a run: workers run in other working directories."""
    return (locate(run.dir) / run.name).absolute()


def absolute(config: T, where: str = "") -> T:
    """The configuration with its paths made absolute, because workers run in other folders.

    Raises UserError for a relative path in a Ray job, which runs in a temporary folder.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    changed = {name: _absolute(hint, getattr(config, name), f"{where}{name}") for name, hint in hints.items()}
    return replace(config, **changed)  # type: ignore[type-var]


def _absolute(hint: Any, value: Any, key: str) -> Any:
    if is_dataclass(value):
        return absolute(value, f"{key}.")
    if isinstance(value, dict):
        return {name: _absolute(None, item, f"{key}.{name}") for name, item in value.items()}
    kinds = (hint, *typing.get_args(hint))
    if isinstance(value, list):
        of_items = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list), None)
        return [_absolute(of_items, item, f"{key}[{place}]") for place, item in enumerate(value)]
    is_name = bool(re.fullmatch(SHIPPED_NAME, str(value)))
    is_place = Place in kinds or (Codes in kinds and not is_name)
    is_place |= Init in kinds and not (is_name and not os.path.exists(value))  # a folder of that name comes first
    return _absolute_path(key, value) if is_place and isinstance(value, str) else value


def _absolute_path(key: str, path: str) -> str:
    found = locate(path)
    in_a_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # Ray sets it for a job's driver
    if in_a_job and isinstance(found, Path) and not found.is_absolute():
        raise UserError(
            f"{key}={path}: a Ray job runs in a temporary folder of the cluster; give an absolute path that every "
            "machine sees, or a URL"
        )
    return str(found) if isinstance(found, UrlPath) else os.path.abspath(found)


def read_record(run: Location) -> dict[str, Any] | None:
    """What run.json of a run folder holds, None where there is none. Raises ConfigError where it is something else."""
    path = run / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable: choose another run.name") from error
    kinds = {"command": str, "config": dict, "inputs": dict, "outcome": dict, "attempts": list}
    if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError(f"{path} is not the record of a run: choose another run.name")
    return record


def check_same_run(
    run: Location, config: Any, inputs: Mapping[str, str], changeable: Set[str]
) -> dict[str, Any] | None:
    """Raises ConfigError where the run that a folder holds has another configuration or other inputs.

    inputs: digests of what settings of the configuration name, by the settings' names. changeable: keys that may
    differ. The message names the first key that must not.

    Returns what the run found, if it is finished and had this very configuration, on whatever device.
    """
    record = read_record(run)
    if record is None:
        return None
    remedy = f"choose another run.name, or delete {run}"
    if record.get("format") != FORMAT:
        raise ConfigError(f"{run} was begun by another version of HyMaTE, and only that can continue it; {remedy}")
    old, new = record["config"], flattened(to_tree(config))
    with contextlib.suppress(ConfigError):  # a key that is newer than the record had its default in that run
        old = to_tree(build(type(config), old))
    old = flattened(old)
    differing = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if forbidden := sorted(differing - changeable):
        was = f"{forbidden[0]} was {old.get(forbidden[0])}, now {new.get(forbidden[0])}"
        raise ConfigError(f"{run} holds a run with another configuration: {was}; {remedy}")
    for key in sorted(record["inputs"].keys() | inputs.keys()):
        if record["inputs"].get(key) != inputs.get(key):
            raise ConfigError(f"{run} holds a run in which {key} had other content; {remedy}")
    finished = record["outcome"].get("state") == "finished" and differing <= {"device"}
    return record["outcome"] if finished else None


class Superseded(UserError):
    """Another command has taken the run over."""


@dataclass(frozen=True)
class Run:
    """One command's hold on a run; it goes to the workers.

    id: of the command. found: what the command found, part of the outcome.
    """

    folder: Location
    id: str
    found: dict[str, Any] = field(default_factory=dict)

    def superseded(self) -> bool:
        """Whether the run belongs to another command by now."""
        return self._claim()["id"] != self.id

    def check(self) -> None:
        """Raises Superseded where the run belongs to another command by now."""
        if self.superseded():
            raise Superseded(f"{self.folder}: {SUPERSEDED}")

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[], bool]]:
        """A cheap function that says whether the run is to stop, and raises Superseded as `check` does.

        A thread looks at the claim now and then while the block runs.
        """
        over = threading.Event()
        seen = {"id": self.id, "stop": False}
        interval_s = LOOK_AT_URL_EVERY_S if isinstance(self.folder, UrlPath) else LOOK_EVERY_S

        def look() -> None:
            while not over.wait(interval_s):
                with contextlib.suppress(OSError, ValueError, UserError):  # the run's own use of the storage will fail
                    seen.update(self._claim())

        def stop() -> bool:
            if seen["id"] != self.id:
                raise Superseded(f"{self.folder}: {SUPERSEDED}")
            return bool(seen["stop"])

        threading.Thread(target=look, daemon=True).start()
        try:
            yield stop
        finally:
            over.set()

    def ask_to_stop(self) -> bool:
        """Have the workers save and stop; false where none has begun, or the run belongs to another command by now."""
        attempts = (read_record(self.folder) or {"attempts": []})["attempts"]
        begun = any(attempt["starts"] for attempt in attempts if attempt.get("id") == self.id)
        if not begun or self.superseded():
            return False
        self.claim(stop=True)
        return True

    def claim(self, stop: bool = False) -> None:
        """Take the run over from any command before."""
        write_text(json.dumps({"id": self.id, "stop": stop}), self.folder / CLAIM)

    def workers_started(self, step: int, num_workers: int, num_nodes: int) -> None:
        """Note that the workers begin at `step`; called by the first, whose machine is the run's environment."""
        used = environment() | {"workers": num_workers, "nodes": num_nodes}
        start = {"at": _now(), "step": step}
        self._note(lambda attempt: {"environment": used, "starts": [*attempt["starts"], start]})

    def end(self, outcome: Mapping[str, Any]) -> None:
        """Note how the command ended; where another one has taken the run over, the outcome is that one's to write."""
        self._note(lambda attempt: {"ended": _now()}, outcome)

    def _claim(self) -> dict[str, Any]:
        return json.loads((self.folder / CLAIM).read_text())

    def _note(self, news: Callable[[dict], dict], outcome: Mapping[str, Any] | None = None) -> None:
        """Change this command's attempt, if it is still there: the run may have been deleted and begun again."""
        record = read_record(self.folder) or {"attempts": []}
        for attempt in record["attempts"]:
            if attempt.get("id") == self.id:
                attempt |= news(attempt)
                if outcome is not None and attempt is record["attempts"][-1]:
                    record["outcome"] = outcome
                _write(self.folder, record)


@contextlib.contextmanager
def claimed(folder: Location, command: str, config: Any, inputs: Mapping[str, str]) -> Iterator[Run]:
    """Take a run over and keep its run.json while the block runs.

    config, inputs: what `check_same_run` compares.
    """
    run = Run(folder, uuid.uuid4().hex)
    run.claim()
    attempt: dict[str, Any] = {
        "id": run.id,
        "started": _now(),
        "ended": None,
        "overrides": list(COMMAND_LINE.get()),
        "code": code(),
        "environment": environment(),
        "starts": [],
    }
    record = {
        "format": FORMAT,
        "command": command,
        "config": to_tree(config),
        "inputs": dict(inputs),
        "outcome": {"state": "running"},
        "attempts": [*(read_record(folder) or {"attempts": []})["attempts"], attempt],
    }
    _write(folder, record)
    try:
        with ending.at_the_latest(lambda: run.end({"state": "stopped"})):
            yield run
    except BaseException as error:
        with contextlib.suppress(OSError, UserError):  # what ended the run is what its user must see
            run.end(_failure(error))
        raise
    run.end({"state": "finished", **run.found})


def code() -> dict[str, Any]:
    """Which code this is: version, digest of the sources and, in a checkout, commit and whether it was changed."""
    found: dict[str, Any] = {"version": hymate.__version__, "sources_sha256": sources_sha256()}
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if commit is not None:
        changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "hymate", "configs")
        found |= {"commit": commit, "changed": changes != ""}
    return found


def sources_sha256() -> str:
    """The digest of the sources and configurations, the same from a wheel as from the checkout that it was built of."""
    digest = hashlib.sha256()
    for folder, kind in ((CONFIGS, "yaml"), (PACKAGE, "py")):
        for path in sorted(folder.rglob(f"*.{kind}")):
            name = f"{folder.name}/{path.relative_to(folder)}"
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What this process computes with."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")  # asking CUDA would take GPU memory
    return {
        "python": platform.python_version(),
        "packages": versions,
        "os": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpus": gpus.splitlines() if gpus else [],
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints; None where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _failure(error: BaseException) -> dict[str, Any]:
    if ending.asked() or isinstance(error, KeyboardInterrupt):
        return {"state": "stopped"}
    cause = error.__cause__ or error if isinstance(error, SystemExit) else error
    # our own messages name no patient and no machine; of others only the kind is kept
    ours = isinstance(cause, (UserError, FloatingPointError))
    return {"state": "failed", "reason": str(cause).splitlines()[0] if ours else type(cause).__name__}


def _write(run: Location, record: Mapping[str, Any]) -> None:
    write_text(json.dumps(record, indent=1) + "\n", run / RECORD)


def keep_time_of(driver_s: float) -> None:
    """From now on this process notes times by the driver's clock, which showed `driver_s` a moment ago."""
    _Clock.ahead_s = driver_s - time.time()


class _Clock:
    """ahead_s: of this machine's is the clock by which a run's times are noted."""

    ahead_s = 0.0


def _now() -> str:
    return datetime.fromtimestamp(time.time() + _Clock.ahead_s, UTC).isoformat(timespec="seconds")
