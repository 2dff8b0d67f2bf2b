"""ZeRO 0 to 3 in real processes: the same training, whatever the stage, precision and number of workers."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from processes import MODEL, TRAIN, VOCAB, RandomRows, run_training, run_workers
from torch import nn

from hymate.config import ObjectiveConfig, TrainConfig
from hymate.data.loader import Cursor
from hymate.model.encoder import decay_groups
from hymate.model.objectives import mean_loss
from hymate.model.pretrain_model import PretrainModel
from hymate.training.deepspeed import deepspeed_config
from hymate.training.loop import Worker, count_targets, schedule

CONFIG = replace(TRAIN, max_steps=4, eval_every=2)
STAGES = (0, 1, 2, 3)
CASES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in STAGES},
    **{f"zero{stage}_bf16": {"zero_stage": stage, "precision": "bf16"} for stage in STAGES},
    **{f"zero{stage}_recomputed": {"zero_stage": stage, "activation_checkpointing": True} for stage in STAGES},
    "zero2_compiled": {"zero_stage": 2, "compile": True},
}


def _train_cases(worker: Worker, folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    for name, changes in cases.items():
        config = replace(CONFIG, num_workers=worker.world_size, **changes)
        dtypes: set[torch.dtype] = set()
        scan_was_rounded: list[bool] = []

        def watch(module: nn.Module, dtypes: set = dtypes, rounded: list = scan_was_rounded) -> None:
            def look(mixer: nn.Module, inputs: Any) -> None:
                for parameter in (mixer.A_log, mixer.dt_bias):
                    dtypes.add(parameter.dtype)
                    rounded.append(bool((parameter == parameter.bfloat16().float()).all()))

            for mixer in module.modules():
                if hasattr(mixer, "A_log"):
                    mixer.register_forward_pre_hook(look)

        with mock.patch.object(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager")):
            recorder, job = run_training(worker, config, folder / name, module_hook=watch)
        # what compiles takes seconds to import, and is for the case that compiles, the last
        assert config.compile or "torch._inductor.compile_fx" not in sys.modules
        if worker.rank == 0:
            stored = {str(parameter.dtype) for parameter in job.module.parameters()}
            result = {
                "points": recorder.points,
                "scan_dtypes": sorted(map(str, dtypes)),
                "scan_rounded": any(scan_was_rounded),
                "stored_dtypes": sorted(stored),
            }
            (folder / f"{name}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case on two workers, in one pair of processes."""
    folder = tmp_path_factory.mktemp("zero")
    run_workers(_train_cases, 2, folder, CASES)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in CASES}


def curve(result: dict[str, Any], name: str) -> torch.Tensor:
    return torch.tensor(list(result["points"][name].values()), dtype=torch.float64)


@pytest.fixture(scope="module")
def plain() -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradient norms of the same training in plain PyTorch, in this process."""
    torch.manual_seed(0)
    module = PretrainModel(MODEL, ObjectiveConfig(), VOCAB)
    optimizer = torch.optim.AdamW(
        decay_groups(module, CONFIG.weight_decay), lr=CONFIG.learning_rate, betas=(CONFIG.beta1, CONFIG.beta2)
    )
    losses, norms = [], []
    steps = RandomRows().steps(Cursor(), CONFIG.rows_per_step, 0, 1)
    for step in range(CONFIG.max_steps):
        rows, _ = next(steps)
        count_K, loss = count_targets(module, rows), torch.zeros(())
        for row in rows:
            torch.manual_seed(row.seed)
            loss = loss + mean_loss(module.terms, module(row)["sum_K"], count_K)[0]
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), CONFIG.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate * schedule(step, CONFIG)
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "bf16" not in name])
def test_every_stage_trains_as_plain_pytorch_does(
    results: dict[str, Any], plain: tuple[torch.Tensor, torch.Tensor], name: str
) -> None:
    losses, norms = plain
    torch.testing.assert_close(curve(results[name], "train/loss"), losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curve(results[name], "train/gradient_norm"), norms, rtol=1e-3, atol=1e-4)
    validation = curve(results[name], "validation/val_loss")
    torch.testing.assert_close(validation, curve(results["zero0"], "validation/val_loss"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_float32_and_keeps_the_parameters_in_float32(results: dict[str, Any], stage: int) -> None:
    result, exact = results[f"zero{stage}_bf16"], results[f"zero{stage}"]
    loss, exact_loss = curve(result, "train/loss"), curve(exact, "train/loss")
    torch.testing.assert_close(loss, exact_loss, rtol=0.03, atol=0.0)
    assert not torch.equal(loss, exact_loss), "nothing ran in bf16"
    assert result["stored_dtypes"] == ["torch.float32"]
    assert result["scan_dtypes"] == ["torch.float32"]
    assert not result["scan_rounded"], "A_log or dt_bias passed through bf16"


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_the_training(results: dict[str, Any], tmp_path: Path) -> None:
    run_workers(_train_cases, 1, tmp_path, {"alone": {"zero_stage": 2}})
    alone = json.loads((tmp_path / "alone.json").read_text())
    for name in ("train/loss", "validation/val_loss", "train/code_accuracy"):
        torch.testing.assert_close(curve(alone, name), curve(results["zero2"], name), rtol=1e-4, atol=1e-5)


def test_gradients_are_accumulated_over_each_workers_share_of_the_rows() -> None:
    config = deepspeed_config(TrainConfig(num_workers=4, rows_per_step=8, zero_stage=3, precision="bf16"), 4, 1000)
    assert config["train_batch_size"] == 8 and config["gradient_accumulation_steps"] == 2
    assert config["torch_autocast"]["enabled"] and config["zero_optimization"]["stage"] == 3
