"""The training loop: what a step's gradient is, where a run ends, and what a failure leaves."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest
import torch
from processes import MODEL, OBJECTIVES, TASKS, TRAIN, VOCAB, Recorder, pretraining_job, run_training, run_workers
from rows import random_row, repacked
from torch import Tensor, nn

from hymate.model.batch import Batch
from hymate.model.encoder import RiskModel
from hymate.model.objectives import LossModel, mean_loss
from hymate.model.pretrain_model import PretrainModel
from hymate.training.checkpoint import read_state
from hymate.training.loop import Worker, build_engine, changed_rate, mean_outputs, single_process, train, train_step

SHORT = replace(TRAIN, num_workers=1, warmup_steps=1)
SOONER = replace(SHORT, max_steps=2)


def evaluated(folder: Path) -> list[tuple[int, list[float]]]:
    """Of each checkpoint its step, and the steps at which the run had been evaluated."""
    states = [read_state(path) for path in sorted(folder.glob("step-*"))]
    return [(state["step"], [scores["step"] for scores in state["evaluations"]]) for state in states]


def stopped_then_ended_there(worker: Worker, folder: Path) -> None:
    asked = count()
    run_training(worker, SHORT, folder / "stopped", stop=lambda: next(asked) >= 2)
    # SIGTERM while it starts changes nothing: where it stands it is finished
    run_training(worker, SOONER, folder / "ended", resume=folder / "stopped" / "step-2", stop=lambda: True)
    run_training(worker, SOONER, folder / "again", resume=folder / "ended" / "step-2")


@pytest.mark.slow
def test_a_run_whose_last_step_is_where_it_was_stopped_is_evaluated_there_once(tmp_path: Path) -> None:
    run_workers(stopped_then_ended_there, 1, tmp_path)
    assert evaluated(tmp_path / "stopped") == [(2, [])]
    assert evaluated(tmp_path / "ended") == [(2, [2])]
    assert evaluated(tmp_path / "again") == []


def failing_to_send(worker: Worker, folder: Path) -> None:
    tempfile.tempdir = str(folder)

    def report(metrics: dict[str, float], part: Path) -> None:
        assert part.parent == folder and os.listdir(part)
        raise OSError("the disk is full")

    try:
        train(pretraining_job(worker, SHORT), SHORT, worker, report=report, telemetry=Recorder(), resume=None)
    except OSError as error:
        assert str(error) == "the disk is full"
        return
    raise AssertionError("it went on")


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_sent_is_not_left_behind(tmp_path: Path) -> None:
    run_workers(failing_to_send, 1, tmp_path)
    assert not list(tmp_path.glob("hymate-step-*"))


def test_a_process_can_train_again() -> None:
    for _ in range(2):
        module = nn.Linear(2, 1)
        with single_process() as worker:
            engine = build_engine(module, torch.optim.AdamW(module.parameters()), TRAIN, worker)
            assert engine(torch.ones(1, 2)).shape == (1, 1)


def test_another_length_says_what_it_does_to_the_learning_rate() -> None:
    config = replace(SHORT, max_steps=100, warmup_steps=10, learning_rate=1e-3, min_lr_fraction=0.1)
    state = {"step": 55, "config": asdict(config)}
    assert changed_rate(state, config) is None
    line = changed_rate(state, replace(config, max_steps=190))
    assert (
        line is not None
        and "max_steps=190 instead of 100: from step 55 on the learning rate is 0.000868, not 0.00055" in line
    )


# --------------------------------------------------------------------------------------------- a step's gradient


def patients() -> Batch:
    """Of very unequal lengths, labels missing at random, with days and weights."""
    row = random_row((7, 1, 60, 23, 2, 40, 9, 12, 5, 30, 1, 3), vocab_size=VOCAB, seed=5)
    g = torch.Generator().manual_seed(5)
    label_AT = (torch.rand(12, 3, generator=g) < 0.5).float()
    label_AT[torch.rand(12, 3, generator=g) < 0.4] = torch.nan
    days_AT = torch.full((12, 3), torch.nan)
    days_AT[:, 2] = torch.where(label_AT[:, 2].isnan(), torch.nan, 20 * torch.rand(12, generator=g))
    weight_ST = 0.2 + 3 * torch.rand(12, 3, generator=g)
    return replace(row, label_AT=label_AT, days_AT=days_AT, label_weight_AT=weight_ST)


def model_of(name: str) -> LossModel:
    torch.manual_seed(0)
    config = replace(MODEL, dropout=0.0)
    if name == "fine-tuning":
        return RiskModel(config, VOCAB, TASKS, in_days=["length_of_stay"])
    return PretrainModel(config, OBJECTIVES[name], VOCAB)


def gradients(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def step_in_every_packing(worker: Worker, folder: Path) -> None:
    for name in (*OBJECTIVES, "fine-tuning"):
        for num_rows in (2, 4, 8):
            config = replace(SHORT, num_workers=worker.world_size, rows_per_step=num_rows, zero_stage=0, clip_norm=1e9)
            module = model_of(name)
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
            built = build_engine(module, optimizer, config, worker)
            found: list[list[Tensor]] = []
            optimizer.register_step_pre_hook(lambda *_, m=module, f=found: f.append(gradients(m)))
            rows = repacked(patients(), num_rows, seed=num_rows)
            own = rows[worker.rank :: worker.world_size]
            parts = train_step(built, own, worker.device)
            built.eval()
            turns = [(row, True) for row in own] + [(rows[0], False)]
            means = mean_outputs(built, turns, worker)
            built.destroy()
            torch.save((found, parts, means), folder / f"{name}-{num_rows}-{worker.rank}")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gradient_is_that_of_one_mean_over_all_targets(tmp_path: Path, world_size: int) -> None:
    """However the patients are packed, accumulated and given to workers; and so are the losses."""
    run_workers(step_in_every_packing, world_size, tmp_path)
    for name in (*OBJECTIVES, "fine-tuning"):
        model, row = model_of(name), patients()
        loss, mean_K = mean_loss(model.terms, model(row)["sum_K"], model.count_targets(row))
        loss.backward()
        expected = {"loss": float(loss.detach()), **dict(zip(model.terms, mean_K.tolist(), strict=True))}
        for num_rows in (2, 4, 8):
            of_ranks = [torch.load(tmp_path / f"{name}-{num_rows}-{rank}") for rank in range(world_size)]
            for (found,), _, means in of_ranks:
                torch.testing.assert_close(found, gradients(model), rtol=1e-3, atol=1e-5)
                assert means == pytest.approx(expected, rel=1e-4)
            for term, value in expected.items():
                assert sum(float(parts[term]) for _, parts, _ in of_ranks) == pytest.approx(value, rel=1e-4)
