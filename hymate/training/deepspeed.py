"""TrainConfig -> DeepSpeed configuration, and DeepSpeed and AdamW without PyTorch's compiler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hymate.config import TrainConfig

NEVER = 10**9
LARGEST_BUCKET = 500_000_000  # DeepSpeed's own


def reduce_bucket_size(num_parameters: int) -> int:
    """Gradients that ZeRO reduces at once. It holds a buffer of as many, also for a model of fewer parameters."""
    return min(num_parameters, LARGEST_BUCKET)


def deepspeed_config(train: TrainConfig, world_size: int, num_parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration of one run; the optimiser itself (`AdamW`) is passed to the engine.

    A worker computes one packed row at a time and accumulates the gradients of its part of `rows_per_step`.
    bf16 is autocast around float32 parameters: weights, A_log, dt_bias, gradients and what ZeRO moves between
    workers stay float32, and only the arithmetic inside a step is bf16.

    >>> config = deepspeed_config(TrainConfig(rows_per_step=8, zero_stage=1), world_size=2, num_parameters=10)
    >>> config["gradient_accumulation_steps"], config["zero_optimization"]["stage"]
    (4, 1)
    """
    assert train.rows_per_step % world_size == 0, "TrainConfig checks this"
    return {
        "train_batch_size": train.rows_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.rows_per_step // world_size,
        "gradient_clipping": train.clip_norm,
        "zero_optimization": {"stage": train.zero_stage, "reduce_bucket_size": reduce_bucket_size(num_parameters)},
        "torch_autocast": {
            "enabled": train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": NEVER,
        "zero_allow_untested_optimizer": True,  # it has tested PyTorch's AdamW, and takes a subclass for another
    }


class AdamW(torch.optim.AdamW):
    """PyTorch's, with the same numbers. PyTorch's methods import its compiler when first called, for two seconds."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Leave functions as they are where DeepSpeed would have them compiled.

    To see whether the optimiser is Muon it imports that one, and with it all that compiles: two seconds a worker.
    """
    compile_function = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function
