"""How a step computes: blocks again in the backward, and in which precision what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from rows import random_row
from small_models import KINDS
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hymate import ops
from hymate.config import TrainConfig
from hymate.errors import ConfigError
from hymate.model.encoder import ResidualDropout, RiskModel
from hymate.model.pooling import MemberLinear
from hymate.training.footprint import LiveBytes
from hymate.training.loop import compute_as

VOCAB = 30
LENGTHS = (7, 1, 23, 40)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")  # with several, torch adds some gradients up in any order
@pytest.mark.parametrize("name", KINDS)
def test_activation_checkpointing_changes_no_bit_and_holds_less(name: str) -> None:
    """With dropout, whose masks are drawn again."""
    config = replace(KINDS[name], dropout=0.2, layers=4 * KINDS[name].layers)
    row = random_row([20 * length for length in LENGTHS], vocab_size=VOCAB)
    gradients, peaks = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = RiskModel(config, VOCAB, ["mortality"])
        model.backbone.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        with LiveBytes() as live:
            model.loss(row).backward()
        gradients.append([p.grad for p in model.parameters()])
        peaks.append(live.peak)
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_compiling_changes_no_result_and_the_first_graphs_serve_all_rows() -> None:
    """Losses and gradients, also with checkpointing, by the backend that needs no compiler."""
    rows = [random_row(lengths, vocab_size=VOCAB) for lengths in ([9, 30], [41, 3, 5], [7, 11, 60, 2])]
    results, graphs = [], []
    torch.compiler.reset()
    counters.clear()
    for compiled, checkpointing in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = RiskModel(replace(KINDS["mamba2"], dropout=0.0, layers="MA"), VOCAB, ["mortality"])
        with mock.patch.object(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager")):
            compute_as(model, TrainConfig(compile=compiled, activation_checkpointing=checkpointing))
        losses = []
        for row in rows:
            losses.append(model.loss(row))
            losses[-1].backward()
            graphs.append(counters["stats"]["unique_graphs"])
        results.append([*losses, *(p.grad for p in model.parameters())])
    assert graphs[2] == 0 < graphs[3] == graphs[5]
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-7)
    with pytest.raises(ConfigError, match=r"^compile needs zero_stage=0, 1 or 2"):
        TrainConfig(compile=True, zero_stage=3)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_bf16_is_for_the_products_alone(mixer: Literal["mamba1", "mamba2"]) -> None:
    """Under autocast: projections and MLPs in bf16; the residual stream, norms, the scan's own weights, sums over
    histories and losses in float32.
    """
    config = replace(KINDS[mixer], layers="MA", pooling="fusion", time_aware_scan=True)
    model = RiskModel(config, VOCAB, ["mortality"])
    dtypes: dict[str, set[torch.dtype]] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            dtypes.setdefault(name, set()).update(o.dtype for o in outputs if isinstance(o, Tensor))

        return look

    kinds = {nn.RMSNorm: "norm", nn.Linear: "product", MemberLinear: "head", ResidualDropout: "residual"}
    for module in model.modules():
        if type(module) in kinds:
            module.register_forward_hook(watch(kinds[type(module)]))
    model.pooling.register_forward_hook(watch("patient"))
    scans: list[torch.dtype] = []
    real = getattr(ops, mixer)

    def scan(given: Any) -> Any:
        A, time = (given.A_DN, given.time_BLD) if mixer == "mamba1" else (given.A_H, given.time_BLH)
        scans.extend([A.dtype, time.dtype])
        y, state = real(given)
        scans.append(state[1].dtype)
        return y, state

    with mock.patch.object(ops, mixer, scan), torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(random_row(LENGTHS, vocab_size=VOCAB))
    loss.backward()
    assert dtypes["product"] == {torch.bfloat16}
    assert dtypes["norm"] == dtypes["residual"] == dtypes["patient"] == {torch.float32}
    assert scans == 3 * [torch.float32] and loss.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is None or parameter.grad.dtype == torch.float32, name
