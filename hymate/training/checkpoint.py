"""The training state on disk: what a run continues from, on any number of workers and at any ZeRO stage.

A checkpoint is a folder:
    state.json                          step, data cursor, best score, ... (plain JSON)
    model.safetensors                   all weights in float32
    optimizer-RANK-of-WORLD.safetensors Adam's moments of every WORLD-th parameter
    sha256-RANK-of-WORLD.txt            checksums of what worker RANK wrote, as `sha256sum --check` reads them

Each worker writes one part of the optimiser state, and its checksums last: a checkpoint that lacks a worker's part, or
of which a byte has changed, is known by them. The state is keyed by parameter and not by worker, so it carries no trace
of how ZeRO had cut it, and nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hymate.errors import UserError
from hymate.hashing import sha256_of
from hymate.inference.bundle import read_weights, write_weights
from hymate.storage.paths import Location, local_copy

STATE, WEIGHTS = "state.json", "model.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Damaged(UserError):
    """A checkpoint that is not as it was written."""


def save(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write this worker's part of a checkpoint; collective: every rank calls it with a folder of its own."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    moments = {}
    for index, (name, parameter) in enumerate(_trained(engine.module)):
        for key in MOMENTS:
            full = _full_moment(engine, parameter, key)
            if index % world_size == rank:
                moments[f"{key}/{name}"] = full.detach().cpu().contiguous()
    write_weights(moments, folder / _shard_name(rank, world_size))
    weights = full_weights(engine)
    if rank == 0:
        write_weights(weights, folder / WEIGHTS, {"format": "pt"})
        temporary = folder / f".{STATE}"
        temporary.write_text(json.dumps({**state, "world_size": world_size}, indent=1))
        os.replace(temporary, folder / STATE)
    sums = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    (folder / sums_name(rank, world_size)).write_text(_sums_text(sums))


def verify(folder: Path) -> None:
    """Raises Damaged where a file of a checkpoint is not there or not as it was written."""
    for name, sha256 in _read_sums(folder).items():
        _check(folder.name, folder / name, sha256)


def read_verified_weights(folder: Location) -> dict[str, Tensor]:
    """The weights of a checkpoint anywhere. Raises Damaged where they are not as they were written."""
    sums = _read_sums(folder)
    try:
        with local_copy(folder / WEIGHTS) as file:
            _check(folder.name, file, sums[WEIGHTS])
            return read_weights(file)
    except FileNotFoundError as error:
        raise Damaged(f"{folder.name} is damaged: {WEIGHTS} is missing") from error


class Whole(NamedTuple):
    """A checkpoint that is as it was written."""

    folder: Location
    metrics: dict[str, float]
    weights: dict[str, Tensor]


def first_whole(kept: Iterable[tuple[Location, Mapping[str, Any]]]) -> Whole | None:
    """The first of some checkpoints, each with its metrics, that is not damaged; warns of those that are."""
    for folder, metrics in kept:
        try:
            return Whole(folder, dict(metrics), read_verified_weights(folder))
        except UserError as error:
            print(f"{folder.parent.name}: {error}; the next best checkpoint is used", flush=True)
    return None


def _check(checkpoint: str, file: Path, sha256: str) -> None:
    try:
        found = sha256_of(file)
    except OSError as error:
        raise Damaged(f"{checkpoint} is damaged: {file.name} is missing or cannot be read") from error
    if found != sha256:
        raise Damaged(f"{checkpoint} is damaged: {file.name} is not what was written")


def _read_sums(folder: Location) -> dict[str, str]:
    """The checksum of each file that a checkpoint must have."""
    lists = {path.name: path for path in folder.glob("sha256-*.txt")}
    found = re.fullmatch(r"sha256-\d{5}-of-(\d{5})\.txt", min(lists, default=""))
    if not found:
        raise Damaged(f"{folder.name} is damaged: its checksums are missing")
    world_size = int(found[1])
    sums: dict[str, str] = {}
    for rank in range(world_size):
        name = sums_name(rank, world_size)
        if name not in lists:
            raise Damaged(f"{folder.name} is damaged: {name} is missing")
        text = lists[name].read_text(errors="replace")
        listed = {line[66:]: line[:64] for line in text.splitlines()}
        expected = {_shard_name(rank, world_size), *((STATE, WEIGHTS) if rank == 0 else ())}
        if listed.keys() != expected or _sums_text(listed) != text:
            raise Damaged(f"{folder.name} is damaged: {name} is not what was written")
        sums |= listed
    return sums


def _sums_text(sums: dict[str, str]) -> str:
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items())


def read_state(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint. Raises UserError where they are not there or not such values."""
    with _one_clear_line(folder):
        state = json.loads((folder / STATE).read_text())
        counts = [state[name] for name in ("step", "stale", "skipped", "skipped_in_a_row", "world_size")]
        numbers = [*counts, *state["cursor"].values(), state["config"]["max_steps"]]
        scores = [value for scores in state["evaluations"] for value in scores.values()]
        if any(type(number) is not int or number < 0 for number in numbers) or any(
            type(score) not in (int, float) for score in scores
        ):
            raise ValueError(f"{STATE} is malformed")
        return state


@contextmanager
def _one_clear_line(folder: Path) -> Iterator[None]:
    """UserError for all that a damaged or foreign checkpoint can raise in the block."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:200].encode("unicode_escape").decode()
        raise UserError(f"{folder} is damaged, or is not a checkpoint of this model ({detail})") from error


def load_weights(module: nn.Module, folder: Path) -> None:
    """Fill a module that no engine has taken yet. Raises UserError where the weights are not the module's."""
    with _one_clear_line(folder):
        module.load_state_dict(read_weights(folder / WEIGHTS))


def load_optimizer(engine: Any, folder: Path) -> None:
    """Give a fresh engine the optimiser state of a checkpoint, whatever its world size and ZeRO stage."""
    state = read_state(folder)
    create_adam_state(engine, steps=state["step"] - state["skipped"])
    trained = dict(_trained(engine.module))
    restored = set()
    with _one_clear_line(folder):
        for rank in range(state["world_size"]):
            with safe_open(folder / _shard_name(rank, state["world_size"]), framework="pt") as shard:
                for entry in shard.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    key, name = entry.split("/", 1)
                    moment, parameter = shard.get_tensor(entry), trained[name]
                    if moment.shape != getattr(parameter, "ds_shape", parameter.shape):  # ZeRO 3 has cut the parameter
                        raise ValueError(f"{name} has another shape")
                    _set_moment(engine, parameter, key, moment)
                    restored.add((key, name))
        if restored != {(key, name) for key in MOMENTS for name in trained}:
            raise ValueError("checkpoint and model hold different parameters")


def full_weights(engine: Any) -> dict[str, Tensor]:
    """float32 weights and buffers of an engine on the CPU, on rank 0 (elsewhere empty); collective."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
    if dist.get_rank() == 0:
        kept = engine.module.state_dict().keys()
        buffers = engine.module.named_buffers(remove_duplicate=False)
        weights.update({name: buffer.detach().cpu().clone() for name, buffer in buffers if name in kept})
    return weights


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _shard_name(rank: int, world_size: int) -> str:
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def sums_name(rank: int, world_size: int) -> str:
    return f"sha256-{rank:05d}-of-{world_size:05d}.txt"


def _full_moment(engine: Any, parameter: nn.Parameter, key: str) -> Tensor:
    """One of Adam's moments of a whole parameter; collective under ZeRO 1 to 3."""
    if engine.zero_optimization_stage() == 3:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)
    if not engine.zero_optimization():
        return engine.optimizer.state[parameter][key]
    full = torch.zeros(parameter.numel(), device=parameter.device)
    part = _own_part(engine, parameter, key)
    if part is not None:
        values, start = part
        full.narrow(0, start, values.numel()).copy_(values)
    dist.all_reduce(full)
    return full.view_as(parameter)


def create_adam_state(engine: Any, steps: int) -> None:
    """Zero moments after `steps` updates, where torch would create them at its first one; DeepSpeed keeps them in flat
    partitions.
    """
    if engine.zero_optimization_stage() == 3:
        adam, flat = engine.optimizer.optimizer, engine.optimizer.fp32_partitioned_groups_flat
    else:
        adam = engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer
        flat = [parameter for group in adam.param_groups for parameter in group["params"]]
    for parameter in flat:
        adam.state[parameter] = {
            "step": torch.full((), float(steps), device=parameter.device),
            **{key: torch.zeros_like(parameter) for key in MOMENTS},
        }


def _set_moment(engine: Any, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Copy this rank's part of a whole moment to where the engine keeps it."""
    flat = value.flatten()
    if engine.zero_optimization_stage() == 3:
        from deepspeed.utils import safe_set_local_optimizer_state

        size = math.ceil(flat.numel() / dist.get_world_size())
        padded = F.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
        safe_set_local_optimizer_state(parameter, padded.narrow(0, size * dist.get_rank(), size), key)
    elif engine.zero_optimization():
        part = _own_part(engine, parameter, key)
        if part is not None:
            values, start = part
            values.copy_(flat.narrow(0, start, values.numel()))
    else:
        engine.optimizer.state[parameter][key].copy_(value)


def _own_part(engine: Any, parameter: nn.Parameter, key: str) -> tuple[Tensor, int] | None:
    """ZeRO 1 and 2: this rank's part of a flattened moment and where it starts; None if it has no part.

    deepspeed.utils.safe_get_full_optimizer_state does the same, but in 0.19 it misses every parameter group but
    the first until the second step.
    """
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    adam, of, at = engine.optimizer.optimizer, mapping.lp_fragment_address, mapping.hp_fragment_address
    partition = adam.param_groups[mapping.param_group_index]["params"][0]
    return adam.state[partition][key].narrow(0, at.start, at.numel), of.start
