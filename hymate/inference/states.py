"""A folder of patient states, which `hymate.predict` keeps so that the next run reads only new events.

    states.json                the bundle that the states belong to
    <subject_id>.safetensors   one patient's state; counts, times and checksums as JSON in its header

States are patient data: they hold what the model made of a history, with its first and last times, under the subject's
id. Nothing in them is ever unpickled.

Rules. A folder belongs to one bundle and is refused to any other. A state is used only where it is whole and the events
it was made of are still the first ones of the history; otherwise the history is read from its start and the state
replaced. Prediction times before a state are computed from the start and leave it as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hymate.errors import UserError
from hymate.inference.bundle import write_weights
from hymate.inference.streaming import PatientState
from hymate.model.moments import Moments
from hymate.model.variables import VariableSums
from hymate.storage.paths import Location, atomic_path, local_copy, locked, write_text

FORMAT_VERSION = 2  # another one where the same bundle would leave other states
MARKER, HEADER = "states.json", "hymate"
SCALARS = ("num_events", "first_time_us", "last_time_us")


class States(Protocol):
    """Where patients' states are kept."""

    def load(self, subject_id: int, events_L: np.ndarray, device: torch.device | str) -> PatientState | None:
        """A subject's state on `device`; None where there is none that goes with `events_L`, its history by now."""

    def save(self, subject_id: int, state: PatientState, events_L: np.ndarray) -> None:
        """Keep a subject's state, made of the first ones of `events_L`."""


class HeldStates(dict[int, tuple[PatientState, bytes]]):
    """States in memory, on the device that made them, by subject and with the events that they were made of."""

    def load(self, subject_id: int, events_L: np.ndarray, device: torch.device | str) -> PatientState | None:
        state, made_of = self.get(subject_id, (None, b""))
        return state if state and events_L[: state.num_events].tobytes() == made_of else None

    def save(self, subject_id: int, state: PatientState, events_L: np.ndarray) -> None:
        self[subject_id] = state, events_L[: state.num_events].tobytes()


class StateFolder:
    """The states in a folder, made (for its owner only) where there is none; nobody else's inside a `with` block.

    At a URL there are neither owners nor locks: who may read it is the storage's to say, and it is for one program.

    bundle: fingerprint of the bundle that makes the states.
    counts: how many states were found and fit ("known"), and why others did not: "new" (there was none), "damaged",
        "changed" (the events are no longer those that it was made of).
    Raises UserError where the folder holds something else, another bundle's states, or is in use.
    """

    def __init__(self, path: Location, bundle: str) -> None:
        assert bundle, "states belong to a bundle that was read from its folder"
        self.path, self.counts = path, Counter[str]()
        self._lock = contextlib.ExitStack()
        self._owner = {"format_version": FORMAT_VERSION, "bundle": bundle}
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker = path / MARKER
        if not marker.exists():
            if any(path.iterdir()):
                raise UserError(f"{path} holds files that are not patient states: give states=DIR a folder of its own")
            write_text(json.dumps(self._owner) + "\n", marker)
        if _json(marker) != self._owner:
            raise UserError(
                f"{path} holds the states of another bundle, code map or version: give states=DIR another folder"
            )

    def __enter__(self) -> StateFolder:
        taken = f"{self.path} is in use by another program: run again when it has ended"
        self._lock.enter_context(locked(self.path / MARKER, taken))
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def load(self, subject_id: int, events_L: np.ndarray, device: torch.device | str = "cpu") -> PatientState | None:
        """A subject's state on `device`; None where there is none that goes with `events_L`, its history by now."""
        state, outcome = self._load(subject_id, events_L, device)
        self.counts[outcome] += 1
        return state

    def save(self, subject_id: int, state: PatientState, events_L: np.ndarray) -> None:
        """Keep a subject's state, made of the first ones of `events_L`; atomic."""
        tensors = {
            f"block{number:03d}.{part}": tensor
            for number, block in enumerate(state.blocks)
            for part, tensor in enumerate(block)
        }
        tensors |= {f"pooled.{name}": tensor for name, tensor in vars(state.pooled).items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        header = {name: getattr(state, name) for name in SCALARS}
        header["events_sha256"] = _digest(events_L[: state.num_events].tobytes())
        header["sha256"] = self._checksum(subject_id, header, tensors)
        with atomic_path(self._file(subject_id)) as temporary:
            write_weights(tensors, temporary, {HEADER: json.dumps(header)})

    def _load(
        self, subject_id: int, events_L: np.ndarray, device: torch.device | str
    ) -> tuple[PatientState | None, str]:
        try:
            with local_copy(self._file(subject_id)) as found, safe_open(found, "pt") as file:
                header = json.loads(file.metadata()[HEADER])
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if header.pop("sha256") != self._checksum(subject_id, header, tensors):
                return None, "damaged"
        except FileNotFoundError:
            return None, "new"
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None, "damaged"
        known = header["num_events"]
        if known > len(events_L) or header["events_sha256"] != _digest(events_L[:known].tobytes()):
            return None, "changed"
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        blocks = [tensor for name, tensor in tensors.items() if name.startswith("block")]
        pooled = VariableSums if "pooled.key_R" in tensors else Moments
        return PatientState(
            blocks=tuple(zip(blocks[::2], blocks[1::2], strict=True)),
            pooled=pooled(**{name.removeprefix("pooled."): t for name, t in tensors.items() if "pooled" in name}),
            **{name: header[name] for name in SCALARS},
        ), "known"

    def _file(self, subject_id: int) -> Location:
        return self.path / f"{subject_id}.safetensors"

    def _checksum(self, subject_id: int, header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
        """Of all that a file says, and of whom and from which bundle: files moved between subjects do not pass."""
        parts = [json.dumps([self._owner, subject_id, header], sort_keys=True).encode()]
        for name, tensor in sorted(tensors.items()):
            parts += [f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), tensor.numpy().tobytes()]
        return _digest(*parts)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _json(path: Location) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
