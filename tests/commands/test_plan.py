"""What a pretraining takes, as `hymate.plan` counts it: against formulas, real tensors, DeepSpeed and this machine."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import documented
from kernel_standins import standing_in
from processes import TRAIN, RandomRows, run_workers
from rows import random_row
from small_models import vocabulary_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hymate import ops
from hymate.command import load
from hymate.config import ModelConfig, ObjectiveConfig
from hymate.data.histories import Histories
from hymate.data.loader import Cursor
from hymate.errors import ConfigError
from hymate.model.encoder import decay_groups
from hymate.model.pretrain_model import PretrainModel
from hymate.ops import fused
from hymate.ops.shapes import as_on_gpu
from hymate.plan import GIB, PlanConfig, plan
from hymate.training import loop
from hymate.training.footprint import LiveBytes, Shapes, event_flops, num_parameters, row_bytes, worker_bytes
from hymate.training.loop import Job, Worker, train_step

pytestmark = pytest.mark.slow

MODEL = ModelConfig(d_model=64, layers="MA", d_state=16, headdim=16, num_heads=4, window=100, dropout=0.1)


def shapes(model: ModelConfig = MODEL, num_events: int = 2048, **changes: int) -> Shapes:
    given = {"vocab_size": 200, "num_events": num_events, "history_events": 500, **changes}
    return Shapes(model, ObjectiveConfig(), precision="bf16", **given)


def table(output: str, first: str) -> list[list[str]]:
    """The rows of the printed table whose header begins so."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first}"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# ------------------------------------------------------------------------------------------------------ command


def test_the_command_prints_what_fits_and_claims_no_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "model=debug",
        "gpus=4",
        "events=1e6",
        "data.context=512",
        "data.tokens_per_row=2048",
        "reserved_gib=1",
    ]
    plan(load("plan", [*overrides, "memory_gib=[0.5, 2]"], PlanConfig))
    output = capsys.readouterr().out
    assert output.startswith("Counted from shapes, not measured: not yet run on a GPU.")
    assert "1,000,000 events in 123 steps of 4 rows: " in output and " minutes on 4 GPUs" in output
    small, large = table(output, "GPU")
    assert small[1:] == ["no", "none"] and large[1] == "yes"
    parts = {name: float(size) for name, size in table(output, "memory of a GPU")}
    assert parts["at most at once"] == pytest.approx(1.0, abs=0.2)
    by_stage = table(output, "GiB by ZeRO")
    assert [row[0] for row in by_stage] == ["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"]


def test_the_largest_row_fits_and_a_much_longer_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["data.context=1000", "data.tokens_per_row=2048", "memory_gib=[2.3]"]
    config = load("plan", ["model=debug", "gpus=1", *sizes], PlanConfig)
    plan(config)
    ((_, _, largest),) = table(capsys.readouterr().out, "GPU")
    room = 2.3 * GIB - 2 * GIB

    def needed(num_events: int) -> float:
        row = replace(shapes(config.model, num_events, vocab_size=30000, history_events=1000))
        return worker_bytes(num_parameters(row), 2, 1).most(row_bytes(row, 2, False).most)

    count = int(largest.replace(",", ""))
    assert needed(count) <= room < needed(round(1.1 * count))


@pytest.mark.parametrize(
    ("line", "overrides"),
    [
        ("base | 16,384 | kept", None),
        ("base | 16,384 | computed again", ["train.activation_checkpointing=true"]),
        ("base | 131,072 | kept", ["data.tokens_per_row=131072"]),
        ("large | 16,384 | computed again", ["model=large", "train.activation_checkpointing=true"]),
    ],
)
def test_the_page_has_what_the_command_prints(
    line: str, overrides: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """None: the command on the page, which says that it prints this line."""
    if overrides is None:
        (command,) = (each for each in documented("docs/gpu.md") if "hymate.plan" in each.line)
        overrides = shlex.split(command.line)[3:]
    plan(load("plan", ["memory_gib=[]", *overrides], PlanConfig))
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text().splitlines()
    for stage, row in enumerate(table(capsys.readouterr().out, "GiB by ZeRO")):
        (found,) = (each for each in page if each.startswith(f"| {line} | {stage} |"))
        written = [float(cell) for cell in found.strip("|").split("|")[4:]]
        assert written == pytest.approx([float(cell) for cell in row[1:]], abs=0.11)


def test_a_dataset_brings_its_events_histories_and_codes(small_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    histories = Histories.open(str(small_data))
    seen = [min(int(histories.index.num_events_P[place]), 64) for place in histories.positions("train")]
    overrides = [f"data.path={small_data}", "data.context=64", "data.tokens_per_row=512", "data.min_count=1"]
    config = load("plan", ["model=debug", "gpus=1", "train.rows_per_step=2", *overrides], PlanConfig)
    plan(config)
    output = capsys.readouterr().out
    assert f"{sum(seen):,} events in {math.ceil(sum(seen) / 1024)} steps of 2 rows: " in output
    assert "on 1 GPU," in output
    size = vocabulary_of(small_data).size
    assert f"vocabulary of {size:,}" in output
    assert f"histories of {round(sum(seen) / len(seen))}," in output


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["events=0"], "events must be positive, got 0.0"),
        (["events=0.5"], "events must be at least 1, got 0.5"),
        (["epochs=inf"], "epochs must be a finite number, got inf"),
        (["gpu_fraction=40"], "gpu_fraction must be at most 1, got 40.0"),
        (["memory_gib=[80,0]"], r"memory_gib must be positive, got \[80.0, 0.0\]"),
        (["reserved_gib=-5"], "reserved_gib must not be negative, got -5.0"),
        (["reserved_gib=nan"], "reserved_gib must be a finite number, got nan"),
        (["data.path=x", "vocabulary=5"], "vocabulary is the dataset's own where data.path names one"),
        (["model.layers=MG"], "model.layers: .* G is a baseline"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        load("plan", ["model=debug", *overrides], PlanConfig)


# ------------------------------------------------------------------------------------------------------- counts


def test_operations_are_those_of_the_matrices() -> None:
    flops = event_flops(shapes())
    D, hidden, inner = 64, 128, 128
    in_proj, out_proj = D * (2 * inner + 2 * 16 + 8), inner * D
    assert flops["MLP"].forward == 2 * 2 * 3 * D * hidden  # two blocks
    assert flops["Mamba, projections"].forward == 2 * (in_proj + out_proj)
    assert flops["attention, projections"].forward == 2 * 4 * D * D
    for part in ("MLP", "Mamba, projections", "attention, projections"):
        assert flops[part].backward == 2 * flops[part].forward


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 30, 1000])
def test_attention_counts_the_pairs_that_see_each_other(causal: bool, window: int) -> None:
    model = replace(MODEL, layers="A", causal=causal, window=window)
    L, history = 200, 90
    place = torch.arange(L)
    distance = place[:, None] - place
    seen = (place[:, None] // history == place // history) & (distance.abs() < (window or L))
    pairs = int((seen & (distance >= 0) if causal else seen).sum())
    flops = event_flops(shapes(model, L, history_events=history))["attention, within histories"]
    assert flops.forward == pytest.approx(2 * 2 * model.d_model * pairs / L)


def test_tensors_without_numbers_hold_as_much_as_real_ones() -> None:
    """The same operators, those of a CPU, on both."""
    model = replace(MODEL, layers="A", dropout=0.0)
    row = random_row([300, 400], vocab_size=200)
    held = []
    for fake in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device("cpu"), LiveBytes() as live:
            module = PretrainModel(model, ObjectiveConfig(), 200)
            loss = module.backbone(row).square().sum()
            kept = live.now
            loss.backward()
            held.append((kept, live.peak))
    assert held[0] == pytest.approx(held[1], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_kernels_in_shapes_keep_what_the_stand_ins_keep(mixer: str, reverse: bool, dtype: torch.dtype) -> None:
    """With the copies that our own code makes around them."""

    def kept(make: Callable[..., Tensor]) -> int:
        held: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage()._cdata] = tensor
            return tensor

        L, D, N, H, R = 300, 32, 8, 4, 8
        inner: list[tuple[int, ...]] = [(D, 4), (D,), (R + 2 * N, D), (D, R), (D,), (D, N), (D,)]
        if mixer == "mamba2":
            inner = [(D + 2 * N, 4), (D + 2 * N,), (H,), (H,), (H,), (D,)]
        row = make((1, L, 2 * D if mixer == "mamba1" else 2 * D + 2 * N + H)).to(dtype)
        inputs = [tensor.requires_grad_() for tensor in (row, *map(make, inner))]
        given = {"mamba1": ops.Mamba1, "mamba2": ops.Mamba2}[mixer]
        segment_BL = torch.zeros(1, L, dtype=torch.int32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, _ = getattr(fused, mixer)(given(*inputs, segment_BL=segment_BL, reverse=reverse))
        y.sum().backward()
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    with standing_in():
        real = kept(lambda shape: -torch.rand(shape))
    with FakeTensorMode(), as_on_gpu():
        assert kept(torch.empty) == real


@pytest.mark.parametrize(
    ("name", "objective"),
    [("paper", "masked_event"), ("physionet", "both"), ("small", "both"), ("physionet", "time_to_event")],
)
def test_the_other_models_can_be_counted(name: str, objective: str) -> None:
    """With forecasts, whose pooling they have in several kinds; of the paper's, which sees ahead, without."""
    config = load("plan", [f"model={name}", f"objective={objective}", "gpus=1"], PlanConfig)
    row = replace(shapes(config.model, 600), objective=config.objective)
    counted, flops = row_bytes(row, 2, False), event_flops(row)
    assert counted.most > counted.kept > 600 * config.model.d_model
    assert all(part.backward > part.forward > 0 for name, part in flops.items() if name != "MLP")


def test_computing_blocks_again_holds_less() -> None:
    model = replace(MODEL, layers="MMMMMM")
    kept, again = (row_bytes(shapes(model), 2, checkpointing).most for checkpointing in (False, True))
    assert again < 0.5 * kept


PROGRAM = """
import resource, sys
import torch
from rows import random_row
from hymate.config import ModelConfig, ObjectiveConfig
from hymate.model.pretrain_model import PretrainModel
from hymate.training.footprint import LiveBytes

def step(events, live):
    loss = module.loss(random_row([events // 4] * 4, vocab_size=200))
    loss.backward()

torch.set_num_threads(1)
module = PretrainModel(ModelConfig(d_model=64, layers="MMAM", d_state=16, headdim=16), ObjectiveConfig(), 200)
step(512, None)  # compiles the kernels
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()  # of now: compiling may have needed more
with LiveBytes() as live:
    step(40_000, live)
print(live.peak, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_what_is_counted_is_what_this_machine_needs() -> None:
    """With the CPU's own operators, against the memory of a process whose allocator leaves no holes: within 10 %."""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
    )
    counted, measured = map(int, output.stdout.split())
    assert counted > 300e6
    assert measured == pytest.approx(counted, rel=0.1)


# ---------------------------------------------------------------------------------------------------- DeepSpeed


def _held(worker: Worker, folder: Path, stages: tuple[int, ...]) -> None:
    for stage in stages:
        torch.manual_seed(0)
        with LiveBytes() as live:
            module = PretrainModel(replace(MODEL, d_model=256), ObjectiveConfig(), 3000)
            groups = [{**group, "lr": 1e-3} for group in decay_groups(module, 0.05)]
            job = Job(module, groups, RandomRows(), lambda _: {}, "", "min")
            config = replace(TRAIN, zero_stage=stage, num_workers=worker.world_size)
            wrapped, _ = loop.start(job, config, worker, None)
            steps = job.rows.steps(Cursor(), config.rows_per_step, worker.rank, worker.world_size)
            for _ in range(2):
                live.peak = live.now
                train_step(wrapped, next(steps)[0], worker.device)
        if worker.rank == 0:
            (folder / str(stage)).write_text(str(live.peak))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_deepspeed_holds_what_the_formula_says(num_workers: int, tmp_path: Path) -> None:
    stages = (0, 1, 2, 3)
    run_workers(_held, num_workers, tmp_path, stages)
    P = num_parameters(shapes(replace(MODEL, d_model=256), vocab_size=3000))
    for stage in stages:
        measured, stated = int((tmp_path / str(stage)).read_text()), worker_bytes(P, stage, num_workers).most(0.0)
        assert 0.8 * stated < measured < 1.2 * stated, (stage, measured / 4 / P, stated / 4 / P)
