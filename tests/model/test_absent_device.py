"""The whole step on a device that isn't there: nothing stays on the CPU, nothing waits, and the numbers are the CPU's.

`absent_device` has the device and what counts as a wait. The fused operators run there, with stand-ins for the kernels;
so does everything else but DeepSpeed, whose part a small engine plays.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_standins import standing_in
from processes import MODEL, OBJECTIVES, TASKS, TRAIN, VOCAB, RandomRows, Recorder
from rows import answered_at, random_row, repacked
from small_cohort import CODES, a_history
from small_models import PAPER
from torch import Tensor, nn

from hymate import ops
from hymate.data.feeding import fed
from hymate.data.vocabulary import Vocabulary
from hymate.evaluation.attribution import integrated_gradients
from hymate.inference.scoring import score
from hymate.inference.streaming import StreamingModel
from hymate.model.batch import Batch
from hymate.model.encoder import RiskModel
from hymate.model.objectives import LossModel
from hymate.model.pretrain_model import PretrainModel
from hymate.training import loop, stragglers
from hymate.training.deepspeed import AdamW

pytestmark = pytest.mark.slow

EXACT = replace(MODEL, dropout=0.0, num_queries=2, num_heads=3)
MODELS = {
    "mamba2": EXACT,
    "mamba1": replace(EXACT, mixer="mamba1"),
    "both directions": replace(EXACT, bidirectional=True),
    "recurrent": replace(EXACT, layers="G"),
    "transformer": replace(EXACT, layers="AA", window=0),
    "paper": replace(PAPER, d_model=24, layers="MMA", d_state=4, dropout=0.0),
    **{f"pooling {kind}": replace(EXACT, pooling=kind) for kind in ("attention", "variables", "last", "mean")},
    "members": replace(EXACT, pooling="variables", members=3),
    "members of fusion": replace(EXACT, members=2),
}
SEES_AHEAD = ("paper", "both directions")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Calls a function of this module in a process that has the device."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare) as process:
        yield lambda function, *args: process.submit(function, *args).result()


def _prepare() -> None:
    torch.set_num_threads(1)
    import absent_device  # noqa: F401

    from hymate.data import feeding
    from hymate.model import pooling

    pooling.STATES_DROPPED = 0.0  # which patients go without states is drawn, and the generators differ

    alone = {"get_world_size": lambda: 1, "all_reduce": lambda values: None}
    sys.modules["deepspeed"] = ModuleType("deepspeed")
    sys.modules["deepspeed"].comm = SimpleNamespace(**alone)  # type: ignore[attr-defined]
    backend = type("Backend", (), dict.fromkeys(stragglers.COLLECTIVES))()
    loop.dist = SimpleNamespace(**alone)  # type: ignore[assignment]
    stragglers._backend = lambda: backend  # type: ignore[assignment]
    feeding.ThreadPoolExecutor = AtOnce  # type: ignore[misc,assignment]


class AtOnce:
    """An executor without a thread: the device is only there in this one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


class Engine:
    """DeepSpeed's part of a step without ZeRO, in one process."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, rows_per_step: int, bf16: bool) -> None:
        self.module, self.optimizer, self.rows_per_step, self.bf16 = module, optimizer, rows_per_step, bf16
        self.rows = 0

    def __call__(self, row: Batch) -> Any:
        with torch.autocast(row.code_L.device.type, torch.bfloat16, enabled=self.bf16):
            return self.module(row)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def zero_optimization(self) -> bool:
        return False

    def get_global_grad_norm(self) -> None:
        return None

    def destroy(self) -> None: ...

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.rows % self.rows_per_step == self.rows_per_step - 1

    def backward(self, loss: Tensor) -> None:
        (loss / self.rows_per_step).backward()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.rows += 1


@dataclass(frozen=True)
class Case:
    """What trains: of MODELS, one of OBJECTIVES or "fine-tuning"; several_answers: of a segment.

    steps: of two rows each. What a second one finds (an optimiser's state, rows that were fed ahead) is no model's.
    """

    model: str
    objective: str
    bf16: bool = False
    checkpointing: bool = False
    several_answers: bool = False
    steps: int = 1


CASES = [
    *(Case(model, "both") for model in MODELS if model not in SEES_AHEAD and model != "mamba2"),
    *(Case(model, "fine-tuning") for model in MODELS if model != "members"),
    *(Case(model, "masked_event") for model in SEES_AHEAD),
    *(Case(model, "fine-tuning", several_answers=True) for model in MODELS if model not in SEES_AHEAD),
    Case("mamba2", "both", steps=2),
    Case("members", "fine-tuning", steps=2),
    Case("mamba2", "forecast"),
    Case("mamba2", "time_to_event"),
    Case("members", "time_to_event", bf16=True),
    Case("mamba2", "both", checkpointing=True),
    Case("mamba2", "both", bf16=True),
    Case("members", "fine-tuning", bf16=True),
    Case("transformer", "fine-tuning", bf16=True),
]


def _model(case: Case, vocabulary: Vocabulary | None = None) -> LossModel:
    torch.manual_seed(0)
    config = MODELS[case.model]
    if case.objective == "fine-tuning":
        vocab_size = vocabulary.size if vocabulary else VOCAB
        model: Any = RiskModel(config, vocab_size, TASKS, in_days=["length_of_stay"])
    else:
        model = PretrainModel(config, OBJECTIVES[case.objective], VOCAB)
    model.backbone.activation_checkpointing = case.checkpointing
    return model


def _patients() -> Batch:
    """Labels missing at random, with days."""
    row = random_row((7, 1, 16, 2, 5, 9), vocab_size=VOCAB, seed=5)
    g = torch.Generator().manual_seed(5)
    label_AT = (torch.rand(6, 3, generator=g) < 0.5).float()
    label_AT[torch.rand(6, 3, generator=g) < 0.4] = torch.nan
    days_AT = torch.full((6, 3), torch.nan)
    days_AT[:, 2] = torch.where(label_AT[:, 2].isnan(), torch.nan, 20 * torch.rand(6, generator=g))
    return replace(row, label_AT=label_AT, days_AT=days_AT, label_weight_AT=0.2 + torch.rand(6, 3, generator=g))


def _answered(row: Batch) -> Batch:
    return answered_at(row, [[*range(0, length - 1, 2), length - 1, length - 1] for length in row.lengths])


def _steps(built: Engine, device: str, case: Case) -> list[Tensor]:
    """The sums of each step."""
    results = []
    steps = (
        [_answered(row) if case.several_answers else row for row in repacked(_patients(), 2, seed=n)]
        for n in range(case.steps)
    )
    for rows in fed(steps, torch.device(device), built.ask):
        sums = loop.train_step(built, rows, torch.device(device))
        results.append(torch.stack([sums[name] for name in sorted(sums)]))
    return results


def _engine(case: Case, device: str) -> Engine:
    model = _model(case).to(device)
    return Engine(model, AdamW(model.parameters(), lr=1e-2, fused=device != "cpu"), 2, case.bf16)


def steps_there(case: Case) -> dict[str, int]:
    """The waits of the steps, whose results are those of a CPU's."""
    from absent_device import NAME, watch

    here = _engine(case, "cpu")
    expected = _steps(here, "cpu", case)
    with watch() as seen, ops.forced("fused"), standing_in():
        there = _engine(case, NAME)
        seen.waits.clear()
        results = _steps(there, NAME, case)
        waits = dict(seen.waits)
        tolerance = {"rtol": 0.1, "atol": 0.1} if case.bf16 else {"rtol": 2e-3, "atol": 1e-5}
        torch.testing.assert_close([each.cpu() for each in results], expected, **tolerance)
        if not case.bf16:
            for own, other in zip(there.module.parameters(), here.module.parameters(), strict=True):
                torch.testing.assert_close(own.detach().cpu(), other.detach(), rtol=1e-2, atol=2e-3)
    return waits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step(elsewhere: Callable[..., Any], case: Case) -> None:
    assert elsewhere(steps_there, case) == {}


# ------------------------------------------------------------------------------------------------------- the loop

LOG_EVERY, MAX_STEPS = 3, 8
UNHEALTHY = (2, 5)  # counted from 0: steps whose loss is not finite


class Rows(RandomRows):
    """Two rows a step; some steps have an infinite gap."""

    def _row(self, i: int) -> Batch:
        row = super()._row(i)
        if i // 2 in UNHEALTHY:
            row.gap_hours_L[0] = torch.inf
        return row


def _train(device: str, recorder: Recorder, stop: Callable[[], bool] = lambda: False) -> loop.Standing:
    """The loop around the engine here, which neither evaluates nor saves."""
    config = replace(
        TRAIN, num_workers=1, rows_per_step=2, max_steps=MAX_STEPS, warmup_steps=1, eval_every=100, log_every=LOG_EVERY
    )
    built = _engine(Case("transformer", "masked_event"), device)
    job = loop.Job(built.module, built.optimizer.param_groups, Rows(), lambda _: {}, "val_loss", "min")
    worker = loop.Worker(0, 1, 0, torch.device(device))
    loop.start = lambda *_: (built, loop.Standing())  # type: ignore[assignment]
    loop.evaluate = lambda *_: {}  # type: ignore[assignment,return-value]
    loop.save = lambda *_, **__: 0.0  # type: ignore[assignment]
    return loop.train(job, config, worker, report=lambda *_: None, telemetry=recorder, resume=None, stop=stop)


def loop_there() -> tuple[dict[str, int], dict[str, Any], dict[str, Any]]:
    """The waits, and what was recorded there and on a CPU."""
    from absent_device import NAME, watch

    results: list[dict[str, Any]] = []
    waits: dict[str, int] = {}
    for device in ("cpu", NAME):
        recorder, asked = Recorder(), count()
        with contextlib.ExitStack() as stack:
            if device == NAME:
                seen = stack.enter_context(watch())
                stack.enter_context(ops.forced("fused"))
                stack.enter_context(standing_in())
            standing = _train(device, recorder)
            stopped = _train(device, Recorder(), stop=lambda a=asked: next(a) >= 3)  # type: ignore[misc]
            if device == NAME:
                waits = {place: number for place, number in seen.waits.items() if "loop.py" in place}
        points = {name: curve for name, curve in recorder.points.items() if name.startswith("train/")}
        results.append({"points": points, "skipped": standing.skipped, "stopped": stopped.step})
    return waits, results[0], results[1]


def test_a_run_waits_where_it_logs_and_skips_what_a_cpu_skips(elsewhere: Callable[..., Any]) -> None:
    waits, here, there = elsewhere(loop_there)
    assert here["skipped"] == there["skipped"] == len(UNHEALTHY)
    assert (here["stopped"], there["stopped"]) == (3, 4)  # there the flag is known a step later
    for name, curve in here["points"].items():
        if name.split("/")[1] not in ("events_per_second",):
            assert there["points"][name] == pytest.approx(curve, rel=1e-3), name
    logs = MAX_STEPS // LOG_EVERY + 4 // LOG_EVERY
    assert sum(waits.values()) == 3 * logs, waits  # the sums come, and the workers' times go and come


# ------------------------------------------------------------------------------ evaluation, prediction, explanation


def inference_there(case: Case) -> dict[str, dict[str, int]]:
    """What an evaluation, a prediction and an explanation wait for; each gives what a CPU gives."""
    from absent_device import NAME, watch

    rows = repacked(_patients(), 3, seed=1)
    source = SimpleNamespace(
        examples=SimpleNamespace(label_ET=np.empty((6, len(TASKS)))),
        once=lambda *_, **__: ((row, True) for row in rows),
    )

    def evaluated(built: Engine, device: torch.device) -> list[float]:
        with torch.no_grad():
            means = loop.mean_outputs(built, ((row, True) for row in rows), loop.Worker(0, 1, 0, device))
        return list(means.values())

    def scored(built: Engine, device: torch.device) -> list[float]:
        return score(built, source, device).logit_ET.flatten().tolist()  # type: ignore[arg-type]

    def explained(built: Engine, device: torch.device) -> list[float]:
        row = built.ask(_patients())
        return [x for part in integrated_gradients(built.module, row.to(device), 2) for x in part.event_L.tolist()]

    waits: dict[str, dict[str, int]] = {}
    here = _engine(case, "cpu")
    here.module.eval()
    parts = (evaluated, scored, explained)
    expected = [what(here, torch.device("cpu")) for what in parts]
    with watch() as seen, ops.forced("fused"), standing_in():
        there = _engine(case, NAME)
        there.module.eval()
        for what, values in zip(parts, expected, strict=True):
            seen.waits.clear()
            found = what(there, torch.device(NAME))
            waits[what.__name__] = dict(seen.waits)
            assert found == pytest.approx(values, rel=1e-2, abs=1e-4)
    return waits


@pytest.mark.parametrize("model", ["mamba2", "pooling variables"])
def test_inference_waits_for_its_results(elsewhere: Callable[..., Any], model: str) -> None:
    waits = elsewhere(inference_there, Case(model, "fine-tuning"))
    assert sum(waits["evaluated"].values()) == 1, waits
    assert sum(waits["scored"].values()) == 4, waits  # of all rows: the examples, their logits, days and incidences
    inputs = {place: number for place, number in waits["explained"].items() if place.startswith("batch.py")}
    assert sum(waits["explained"].values()) - sum(inputs.values()) <= 7, waits  # the parts of each row


def streamed(case: Case, vocabulary: Path, device: str) -> list[float]:
    """A history in pieces, with a prediction after each."""
    model = _model(case, Vocabulary.read(vocabulary)).to(device).eval()
    assert isinstance(model, RiskModel)
    streaming = StreamingModel(model, Vocabulary.read(vocabulary), CODES, chunk_events=4)
    history, state, found = a_history(11), None, []
    for start, stop in ((0, 3), (3, 9), (9, 11)):
        state = streaming.append(state, streaming.events(history)[start:stop])
        logit_T, log_days_T = streaming.outputs(state, history, int(history.time[stop - 1]))
        found += [*logit_T.tolist(), log_days_T[2].item()]
    return found


def streamed_there(case: Case, vocabulary: Path) -> dict[str, int]:
    """The waits; the outputs are a CPU's."""
    from absent_device import NAME, watch

    expected = streamed(case, vocabulary, "cpu")
    with watch() as seen, ops.forced("fused"), standing_in():
        assert streamed(case, vocabulary, NAME) == pytest.approx(expected, rel=1e-2, abs=1e-4)
        return {place: number for place, number in seen.waits.items() if not place.startswith("none")}


@pytest.mark.parametrize("model", ["mamba2", "recurrent", "pooling variables", "pooling attention", "pooling last"])
def test_streaming_waits_for_its_inputs_and_results(
    elsewhere: Callable[..., Any], small_data: Path, model: str
) -> None:
    vocabulary = small_data / "histories" / "vocabulary.parquet"
    waits = elsewhere(streamed_there, Case(model, "fine-tuning"), vocabulary)
    copied = {place: number for place, number in waits.items() if "copy" in place}
    others = sum(waits.values()) - sum(copied.values())
    assert others == (3 if model == "pooling variables" else 0), waits  # of 4 pieces: variables join those before them
