"""The fused operators: what is done around the kernels of mamba_ssm and causal_conv1d, over stand-ins with their rules;
over mamba_ssm's own Triton kernels in Triton's interpreter, where those are installed (`make kernels`); and over the
kernels themselves where there is a GPU (`make test-gpu`, not yet run on one).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from unittest import mock

import kernel_standins
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_standins import standing_in
from mixer_cases import FEW, MIXERS, TOLERANCE, Case, assert_all_close, cases, errors, outputs_and_gradients, problem
from processes import MODEL, VOCAB
from rows import random_row, segment_of
from small_models import timed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hymate import ops
from hymate.config import ModelConfig, ObjectiveConfig
from hymate.device import obstacle
from hymate.errors import ConfigError
from hymate.model.mixers import Mamba1Mixer, Mamba2Mixer
from hymate.model.pretrain_model import PretrainModel
from hymate.ops import attention, fused

TF32 = 2e-2  # a GPU's Triton reads 10 bits of what float32 dots multiply; see the interpreter's test
ALIGNED = Case(lengths=(9, 1, 30, 17), heads=2, groups=1, headdim=8, d_state=8)  # widths that causal_conv1d takes
PACKED = torch.tensor([0, 9, 10, 40, 57], dtype=torch.int32)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
@given(case=cases(), has_causal_conv1d=st.booleans(), width=st.integers(1, 5))
@settings(max_examples=40)
def test_what_surrounds_the_kernels_equals_the_reference(
    name: str, case: Case, has_causal_conv1d: bool, width: int
) -> None:
    """Segments, states and reversed rows; also widths that a kernel refuses, and rows of one event."""
    inputs, function = problem(name, dataclasses.replace(case, width=width))
    expected = outputs_and_gradients(inputs, function, "reference", left_out=_without_gradient(name))
    with standing_in(), mock.patch.object(fused, "HAS_CAUSAL_CONV1D", has_causal_conv1d):
        actual = outputs_and_gradients(inputs, function, "fused", left_out=_without_gradient(name))
    assert_all_close(actual, expected, TOLERANCE[torch.float64])


def _without_gradient(name: str) -> int | None:
    """Which output: Mamba-1's last state."""
    return 2 if name == "mamba1" else None


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("carried", [False, True])
def test_in_bf16_the_fused_operators_err_as_the_reference_does(name: str, carried: bool) -> None:
    """Also at the first event of a segment, where Mamba-1's kernel is given another x and dt."""
    case = dataclasses.replace(ALIGNED, carried=carried)
    with standing_in():
        _assert_errs_as_the_reference(name, case, torch.bfloat16, torch.device("cpu"))


def _assert_errs_as_the_reference(name: str, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    inputs, function = problem(name, case)
    lowered = [inputs[0].to(dtype), *(x.float() for x in inputs[1:])]
    out = _without_gradient(name)
    exact = outputs_and_gradients([x.double() for x in lowered], function, "reference", left_out=out)
    own = errors(outputs_and_gradients(lowered, function, "reference", left_out=out), exact)
    actual = outputs_and_gradients([x.to(device) for x in lowered], function, "fused", left_out=out)
    least = {torch.float32: TF32, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}[dtype]
    found = errors([x.cpu() for x in actual], exact)
    for i, (error, reference_error) in enumerate(zip(found, own, strict=True)):
        assert error <= max(least, 3 * reference_error), (
            f"item {i}: {error:.1e}, the reference's is {reference_error:.1e}"
        )


def test_a_packed_row_is_one_call_of_mamba1s_kernel() -> None:
    inputs, function = problem("mamba1", ALIGNED)
    with standing_in(), ops.forced("fused"):
        module = sys.modules["mamba_ssm.ops.selective_scan_interface"]
        with mock.patch.object(module, "selective_scan_fn", wraps=kernel_standins.selective_scan_fn) as kernel:
            function(inputs)
    assert kernel.call_count == 1


def test_a_gradient_of_mamba1s_last_state_is_refused() -> None:
    """The kernel would leave it out without a word."""
    inputs, function = problem("mamba1", ALIGNED)
    with standing_in(), ops.forced("fused"):
        *_, state = function([x.requires_grad_() for x in inputs])
        with pytest.raises(AssertionError, match="no gradient of its last state"):
            state.sum().backward()


@pytest.mark.parametrize("mixer", [Mamba1Mixer, Mamba2Mixer])
def test_a_history_in_parts_equals_the_history_in_one(mixer: type[Mamba1Mixer] | type[Mamba2Mixer]) -> None:
    """Also where a part is one event, and where one is shorter than the convolution."""
    torch.manual_seed(0)
    module, u_BLD, hours_BL = timed(mixer(32, d_state=8, time_aware=True)), torch.randn(1, 40, 32), torch.rand(1, 40)
    with torch.no_grad():
        whole = module(u_BLD, hours_BL)
        with standing_in(), ops.forced("fused"):
            state, parts = None, []
            for part in zip(*(x.split([20, 1, 2, 17], dim=1) for x in (u_BLD, hours_BL)), strict=True):
                y, state = module.carry(*part, state)
                parts.append(y)
                assert all(each.untyped_storage().nbytes() == each.nbytes for each in state), "a state keeps no row"
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_nothing_looks_at_numbers(name: str) -> None:
    """What Python asks a GPU for it must wait for."""
    inputs, function = problem(name, ALIGNED)
    mode = FakeTensorMode()
    segment_BL = mode.from_tensor(ALIGNED.segment_BL)
    leaves = [mode.from_tensor(x.float()).requires_grad_() for x in inputs]
    with mode, standing_in(), mock.patch.object(Case, "segment_BL", segment_BL), ops.forced("fused"):
        function(leaves)[0].sum().backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_a_causal_conv1d_that_does_not_import_is_not_used(tmp_path: Path) -> None:
    """As one that was built for another PyTorch."""
    (tmp_path / "causal_conv1d.py").write_text('raise ImportError("undefined symbol")')
    asked = "import sys; sys.path.insert(0, sys.argv[1]); from hymate.ops import fused; print(fused.HAS_CAUSAL_CONV1D)"
    done = subprocess.run([sys.executable, "-c", asked, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------------- the stand-ins


def test_the_stand_ins_refuse_what_the_kernels_refuse() -> None:
    def convolve(x: Tensor, width: int = 4, segment: Tensor | None = None) -> Tensor:
        weight = torch.ones(x.shape[1], width)
        return kernel_standins.causal_conv1d_fn(x, weight, None, seq_idx=segment, activation="silu")

    x_BLD, wide = torch.ones(1, 6, 16), torch.ones(1, 6, 20)
    convolve(x_BLD.mT)
    for x, options, rule in [
        (torch.ones(1, 6, 12).mT, {}, "divisible by 8"),
        (wide[:, :, :16].mT, {}, "strides of x"),
        (x_BLD.mT, {"width": 5}, "width"),
        (x_BLD.mT, {"segment": torch.zeros(1, 6, dtype=torch.int64)}, "int32"),
        (x_BLD.mT.contiguous(), {"segment": torch.zeros(1, 6, dtype=torch.int32)}, "channel last"),
    ]:
        with pytest.raises(RuntimeError, match=rule):
            convolve(x, **options)
    y = convolve(x_BLD.mT.requires_grad_())
    with pytest.raises(RuntimeError, match="strides of dout"):
        y.backward(wide[:, :, :16].mT)

    u, B, A, one = torch.ones(1, 16, 6), torch.ones(1, 4, 6), -torch.ones(16, 4), torch.ones(16)
    scan = {"delta_softplus": True, "return_last_state": True}
    with pytest.raises(RuntimeError, match="have u's type"):
        kernel_standins.selective_scan_fn(u.bfloat16(), u, A, B, B, one, delta_bias=one, **scan)
    u.requires_grad_()
    with pytest.raises(AssertionError, match="last state"):
        kernel_standins.selective_scan_fn(u, u, A, B, B, one, delta_bias=one, **scan)[1].sum().backward()

    q, bounds = torch.ones(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    for query in (q, q.bfloat16()[:, :, :4], torch.ones(6, 1, 264).bfloat16()):
        with pytest.raises(RuntimeError):
            kernel_standins.varlen_attn(query, query, query, bounds, bounds, 6, 6)


# -------------------------------------------------------------------------------------------------- attention


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 5, 16]),
    causal=st.booleans(),
    width=st.sampled_from([8, 16, 12]),
    torch_has_it=st.booleans(),
)
@settings(max_examples=40)
def test_attention_on_a_gpu_equals_plain_attention(
    lengths: list[int], window: int | None, causal: bool, width: int, torch_has_it: bool
) -> None:
    """By torch's kernel; without it where torch is older than 2.11 or the kernel refuses the width."""
    cu_seqlens = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q, k, v = torch.randn(3, sum(lengths), 2, width, generator=torch.Generator().manual_seed(0)).bfloat16()

    def outputs() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = ops.packed_attention(*leaves, cu_seqlens, window=window, causal=causal)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    expected = outputs()
    with standing_in(), mock.patch.object(attention, "HAS_KERNEL", torch_has_it):
        module = sys.modules["torch.nn.attention.varlen"]
        with (
            mock.patch.object(module, "varlen_attn", wraps=kernel_standins.varlen_attn) as kernel,
            mock.patch.object(Tensor, "is_cuda", True),
        ):
            actual = outputs()
    assert kernel.called == (torch_has_it and width != 12)
    assert_all_close(actual, expected, 3e-2)


def test_which_torch_has_windowed_attention() -> None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        parameters: Collection[str] = ()
    else:
        parameters = inspect.signature(varlen_attn).parameters
    assert ("window_size" in parameters) == attention.HAS_KERNEL


def test_states_that_mamba1s_kernel_refuses_are_refused() -> None:
    """Mamba-2's takes any, in parts: its source has no bound, and 300 was right in Triton's interpreter."""
    assert ModelConfig(d_state=512).d_state == 512
    with pytest.raises(ConfigError, match=r"d_state must be at most 256 with mixer=mamba1"):
        ModelConfig(d_state=512, mixer="mamba1")


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_on_another_device_needs_no_mamba_ssm(p: float) -> None:
    x = torch.empty(3, 4, device="meta")
    assert ops.add_dropout(x, x, p).shape == x.shape


# ------------------------------------------------------------------------------------------- the real kernels


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("triton", "mamba_ssm"))),
    reason="no Triton kernels to interpret: make kernels installs them",
)
@pytest.mark.parametrize(("options", "tolerance"), [([], 1e-5), (["--tf32"], TF32)])
def test_triton_kernels_in_the_interpreter_equal_the_reference(options: list[str], tolerance: float) -> None:
    """mamba_ssm's own, in float32 on a CPU: Mamba-2's scan and the gated norm, forward and every gradient."""
    script = Path(__file__).parents[1] / "support" / "triton_on_cpu.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1"}
    done = subprocess.run([sys.executable, script, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    assert found and all(error < tolerance for each in found.values() for error in each), found


@pytest.mark.gpu
@pytest.mark.parametrize("case", FEW.values(), ids=FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_the_kernels_equal_the_reference(name: str, dtype: torch.dtype, case: Case) -> None:
    _need_kernels(name)
    _assert_errs_as_the_reference(name, case, dtype, torch.device("cuda"))


def _need_kernels(mixer: str) -> None:
    reason = obstacle(dataclasses.replace(MODEL, mixer=mixer))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [8, 64, 12])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_a_gpu_equals_a_cpus(width: int, window: int | None, causal: bool) -> None:
    cu_seqlens = PACKED.tolist()
    q, k, v = torch.randn(3, cu_seqlens[-1], 2, width, generator=torch.Generator().manual_seed(0)).bfloat16()

    def outputs(device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        y = ops.packed_attention(*leaves, cu_seqlens, window=window, causal=causal)
        return [each.cpu() for each in (y, *torch.autograd.grad(y.double().square().sum(), leaves))]

    exact = outputs("cpu", torch.float64)
    own = errors(outputs("cpu", torch.bfloat16), exact)
    for error, on_cpu in zip(errors(outputs("cuda", torch.bfloat16), exact), own, strict=True):
        assert error <= 3 * max(on_cpu, torch.finfo(torch.bfloat16).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_on_a_gpu_packed_patients_equal_patients_alone(mixer: str) -> None:
    _need_kernels(mixer)
    model = _model(mixer).cuda()
    row = random_row((40, 1, 300, 17), vocab_size=VOCAB)
    with torch.no_grad():
        packed_LD = model.backbone(row.to(torch.device("cuda")))
        alone = [model.backbone(segment_of(row, s).to(torch.device("cuda"))) for s in range(4)]
    assert_all_close([packed_LD.cpu()], [torch.cat(alone).cpu()], TF32)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_pass_between_cpu_and_gpu(mixer: str) -> None:
    """Losses and every gradient, with weights that went to the GPU and came back."""
    _need_kernels(mixer)
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
    assert_all_close(results[1], results[0], TF32)


def _model(mixer: str) -> PretrainModel:
    torch.manual_seed(0)
    return PretrainModel(dataclasses.replace(MODEL, mixer=mixer, dropout=0.0), ObjectiveConfig(), VOCAB).eval()
