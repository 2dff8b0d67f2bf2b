"""The device that a command computes on: chosen once, before anything expensive, and logged with the reason.

Nothing else asks PyTorch whether there is a GPU: whoever computes is given its device.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from importlib import import_module
from typing import Any, Literal, TypeVar

import torch

from hymate.config import ModelConfig, UserError
from hymate.errors import first_line

Wanted = Literal["auto", "cpu", "cuda"]
Config = TypeVar("Config", bound=Any)
CPU = torch.device("cpu")
INSTALL = 'README, section "GPUs", says how to install it'


def choose(wanted: Wanted, *models: ModelConfig, workers: int = 1, cluster_gpus: int | None = None) -> torch.device:
    """The device for `models`; one GPU for each of the `workers` that train at the same time, or none at all.

    wanted: "auto" takes GPUs where all of that is there, else the CPU; a warning tells of GPUs that are not used.
    cluster_gpus: how many GPUs the Ray cluster has that computes; None: this machine computes.

    Raises UserError where "cuda" can't be had. A cluster is not judged: machines may still join it, and its workers may
    have packages that the driver lacks; they look again with `obstacle`.
    """
    reason = None
    if wanted == "auto" or (wanted == "cuda" and cluster_gpus is None):
        reason = obstacle(*models, workers=workers, cluster_gpus=cluster_gpus)
    if wanted == "cuda" and reason is not None:
        raise UserError(f"device=cuda: {reason}; device=cpu computes without a GPU")
    device = CPU if wanted == "cpu" or reason is not None else torch.device("cuda", 0)
    passed_over = reason is not None and (num_gpus() if cluster_gpus is None else cluster_gpus) > 0
    level = logging.WARNING if passed_over else logging.INFO
    logging.getLogger("hymate").log(level, "computing on %s: %s", device.type, reason or f"device={wanted}")
    return device


def decide(config: Config, *models: ModelConfig, workers: int = 1, cluster_gpus: int | None = None) -> Config:
    """A command's configuration with `device` as `choose` has it: "cpu" or "cuda", for its workers and its record."""
    device = choose(config.device, *models, workers=workers, cluster_gpus=cluster_gpus)
    return dataclasses.replace(config, device=device.type)


def obstacle(*models: ModelConfig, workers: int = 1, cluster_gpus: int | None = None) -> str | None:
    """Why the models can't run on GPUs, as `choose` counts them; None where they can."""
    there = num_gpus() if cluster_gpus is None else cluster_gpus
    if there < workers:
        return _too_few(there, workers, in_cluster=cluster_gpus is not None)
    operators = os.environ.get("HYMATE_OPS")
    if operators == "cpu":
        return "HYMATE_OPS=cpu asks for operators that run on the CPU alone"
    if operators == "reference":  # it runs everywhere
        return None
    mixers = {model.mixer for model in models if "M" in model.layers}
    if mixers and (problem := _problem("mamba_ssm")):
        return f"a GPU is there, but mamba-ssm {problem}, and Mamba blocks need it there: {INSTALL}"
    if "mamba1" in mixers and (problem := _problem("selective_scan_cuda")):
        return f"a GPU is there, but mamba-ssm's kernel for mixer=mamba1 {problem}: {INSTALL}"
    return None


def _problem(module: str) -> str | None:
    """What is wrong with a module; None where it can be used. Kernels built for another PyTorch do not import."""
    try:
        import_module(module)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        return "is not installed" if missing else f"cannot be imported ({first_line(error)})"
    return None


def num_gpus() -> int:
    """How many GPUs PyTorch finds in this process."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _too_few(there: int, workers: int, in_cluster: bool) -> str:
    wanted = "a GPU is needed" if workers == 1 else f"train.num_workers={workers} needs {workers} GPUs"
    if in_cluster:
        return f"{wanted}, and the cluster has {there} (device=cuda waits until enough have joined)"
    if there:
        return f"{wanted}, and this machine has {there}"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "PyTorch finds no GPU" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})")
