"""The fused operators: what is done around the kernels of mamba_ssm and causal_conv1d, here with slow stand-ins of
the same signature and rules; with the kernels themselves where there is a GPU (`-m gpu`, not yet run on one)."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixer_cases import MIXERS, TOLERANCE, Case, assert_all_close, cases, outputs_and_gradients, problem
from processes import MODEL, VOCAB
from rows import random_row, segment_of
from torch import Tensor

from hymate.config import ObjectiveConfig
from hymate.model import PretrainModel
from hymate.ops import fused, reference

needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() and importlib.util.find_spec("mamba_ssm")), reason="no GPU with mamba_ssm"
)


def _selective_scan_fn(
    u_BDL: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, return_last_state: bool
) -> tuple[Tensor, Tensor]:
    y_BLD, state = reference.selective_scan(u_BDL.mT, delta.mT, A, B.mT, C.mT, D)
    return y_BLD.mT, state


def _mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    return_final_states: bool,
) -> tuple[Tensor, Tensor]:
    assert x.dtype == B.dtype == C.dtype
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and (seq_idx[:, 0] == 0).all(), "an initial state only enters segment 0"
    return reference.ssd_scan(x, dt, A, B, C, D, segment_BL=seq_idx, initial_state_BHPN=initial_states)


def _causal_conv1d_fn(x_BDL: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, activation: str) -> Tensor:
    assert activation == "silu" and x_BDL.stride(1) == 1
    return reference.causal_conv1d(x_BDL.mT, weight, bias, segment_BL=seq_idx)[0].mT


@pytest.fixture(scope="module")
def kernels() -> None:
    """Stand-ins under the names of the real modules."""
    functions = {
        "mamba_ssm.ops.triton.ssd_combined": _mamba_chunk_scan_combined,
        "mamba_ssm.ops.selective_scan_interface": _selective_scan_fn,
        "causal_conv1d": _causal_conv1d_fn,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            parts = name.split(".")
            for k in range(1, len(parts)):
                patch.setitem(sys.modules, ".".join(parts[:k]), ModuleType(parts[k - 1]))
            module = ModuleType(name)
            setattr(module, function.__name__[1:], function)
            patch.setitem(sys.modules, name, module)
        yield


@pytest.mark.parametrize("name", MIXERS)
@given(case=cases(), has_causal_conv1d=st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_surrounds_the_kernels_equals_the_reference(
    kernels: None, name: str, case: Case, has_causal_conv1d: bool
) -> None:
    """Segments, states and reversed rows; also segments that do not count from zero."""
    if name == "mamba1" and case.carried:
        return  # refused: the kernel takes no initial state
    inputs, function = problem(name, case)
    expected = outputs_and_gradients(inputs, function, "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "HAS_CAUSAL_CONV1D", has_causal_conv1d)
        actual = outputs_and_gradients(inputs, function, "fused")
    assert_all_close(actual, expected, TOLERANCE[torch.float64])


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("name", MIXERS)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25, deadline=None)
def test_the_kernels_equal_the_reference(name: str, case: Case, dtype: torch.dtype) -> None:
    if name == "mamba1" and case.carried:
        return
    inputs, function = problem(name, case)
    lowered = [inputs[0].to(dtype), *(x.float() for x in inputs[1:])]
    expected = outputs_and_gradients([x.double() for x in lowered], function, "reference")
    actual = outputs_and_gradients([x.cuda() for x in lowered], function, "fused")
    assert_all_close([x.cpu() for x in actual], expected, TOLERANCE[dtype])


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("mixer", MIXERS)
def test_on_a_gpu_packed_patients_equal_patients_alone(mixer: str) -> None:
    model = _model(mixer).cuda()
    row = random_row((40, 1, 300, 17), vocab_size=VOCAB)
    with torch.no_grad():
        packed_LD = model.backbone(row.to(torch.device("cuda")))
        alone = [model.backbone(segment_of(row, s).to(torch.device("cuda"))) for s in range(4)]
    torch.testing.assert_close(packed_LD, torch.cat(alone), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_pass_between_cpu_and_gpu(mixer: str) -> None:
    """Losses and every gradient, with weights that went to the GPU and came back."""
    model = _model(mixer)
    there = copy.deepcopy(model).cuda()
    row = random_row((40, 1, 300, 17), vocab_size=VOCAB)
    back = _model(mixer)
    back.load_state_dict({name: tensor.cpu() for name, tensor in there.state_dict().items()})
    results = []
    for each, device in ((model, "cpu"), (there, "cuda"), (back, "cpu")):
        torch.manual_seed(0)
        each.loss(row.to(torch.device(device))).backward()
        results.append([parameter.grad.cpu() for parameter in each.parameters() if parameter.grad is not None])
    assert_all_close(results[2], results[0], 1e-6)
    assert_all_close(results[1], results[0], TOLERANCE[torch.float32])


def _model(mixer: str) -> PretrainModel:
    torch.manual_seed(0)
    return PretrainModel(dataclasses.replace(MODEL, mixer=mixer, dropout=0.0), ObjectiveConfig(), VOCAB).eval()
