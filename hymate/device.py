"""The device that a command computes on: chosen once, before anything expensive, and logged with the reason.

Nothing else asks PyTorch whether there is a GPU: whoever computes is given its device.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch

from hymate.config import ModelConfig
from hymate.errors import UserError, first_line

Wanted = Literal["auto", "cpu", "cuda"]
Config = TypeVar("Config", bound=Any)
CPU = torch.device("cpu")
NO_CUDA = "this PyTorch was built without CUDA"
INSTALL = "docs/gpu.md says how to install it"


def choose(wanted: Wanted, *models: ModelConfig, workers: int = 1, cluster_gpus: int | None = None) -> torch.device:
    """The device for `models`; one GPU for each of the `workers` that train at the same time, or none at all.

    wanted: "auto" takes GPUs where all of that is there, else the CPU; a warning names GPUs that are not used.
    cluster_gpus: how many GPUs the Ray cluster has that computes; None: this machine computes.

    Raises UserError where "cuda" is asked for and missing. For a cluster the driver can't say: machines may still join
    it, and have other packages. Its workers look for themselves, with `obstacle`.
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
    needed = "a GPU is needed" if workers == 1 else f"train.num_workers={workers} needs {workers} GPUs"
    if cluster_gpus is None:
        if there == 0:
            return _why_none()
        if there < workers:
            return f"{needed}, and this machine has {there}"
        return _lacks(models, elsewhere=False)
    if there < workers:
        return f"{needed}, and the cluster has {there}; device=cuda waits until enough have joined"
    reason = _lacks(models, elsewhere=True)
    return reason and f"{reason}; device=cuda goes by what the workers have, not the driver"


def num_gpus() -> int:
    """How many GPUs PyTorch finds in this process."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _why_none() -> str:
    if not _built_for_gpus():
        return NO_CUDA
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "PyTorch finds no GPU" + ("" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})")


def _built_for_gpus() -> bool:
    return (torch.version.cuda or torch.version.hip) is not None


def _lacks(models: Iterable[ModelConfig], elsewhere: bool) -> str | None:
    """What the models need beside a GPU and don't have; elsewhere: the GPUs are other machines'."""
    if elsewhere and not _built_for_gpus():
        return NO_CUDA
    operators = os.environ.get("HYMATE_OPS")
    if operators == "cpu":
        return "HYMATE_OPS=cpu asks for operators that run on the CPU alone"
    if operators == "reference":  # it runs everywhere
        return None
    mixers = {model.mixer for model in models if "M" in model.layers}
    if mixers and (problem := _problem("mamba_ssm", elsewhere)):
        return f"a GPU is there, but mamba-ssm {problem}, and Mamba blocks need it there: {INSTALL}"
    if "mamba1" in mixers and (problem := _problem("selective_scan_cuda", elsewhere)):
        return f"a GPU is there, but mamba-ssm's kernel for mixer=mamba1 {problem}: {INSTALL}"
    return None


def _problem(module: str, elsewhere: bool) -> str | None:
    """What is wrong with a module; None where it can be used. Kernels built for another PyTorch do not import, nor do
    any where there is no GPU.
    """
    if find_spec(module) is None:
        return "is not installed"
    if not elsewhere:
        try:
            import_module(module)
        except Exception as error:
            return f"cannot be imported ({first_line(error)})"
    return None
