"""The operators: the fast CPU path equals the plain sequential reference, forward, final states and every gradient."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixer_cases import MIXERS, TOLERANCE, Case, assert_all_close, cases, outputs_and_gradients, problem
from torch import Tensor

from hymate import ops
from hymate.errors import UserError
from hymate.ops.cpu.precompile import KERNELS


@pytest.mark.parametrize("name", MIXERS)
@given(case=cases())
@settings(max_examples=25)
def test_cpu_equals_reference_in_float64(name: str, case: Case) -> None:
    inputs, function = problem(name, case)
    expected = outputs_and_gradients(inputs, function, "reference")
    assert_all_close(outputs_and_gradients(inputs, function, "cpu"), expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", MIXERS)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25)
def test_cpu_in_lower_precision_stays_near_the_reference(name: str, case: Case, dtype: torch.dtype) -> None:
    """As under autocast: events in the lower precision, weights and states in float32."""
    inputs, function = problem(name, case)
    lowered = [inputs[0].to(dtype), *(x.float() for x in inputs[1:])]
    expected = outputs_and_gradients([x.double() for x in lowered], function, "reference")
    actual = outputs_and_gradients(lowered, function, "cpu")
    assert actual[0].dtype == dtype and actual[2].dtype == torch.float32
    assert_all_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_rows_and_wide_heads_equal_the_reference(name: str, reverse: bool, dtype: torch.dtype) -> None:
    """Cut into several units of work along the row and across channels, with more heads than there are runs of them."""
    for heads, headdim in ((2, 96), (10, 8)):
        case = Case(lengths=(530, 1, 95, 40), heads=heads, headdim=headdim, d_state=4, reverse=reverse, carried=True)
        inputs, function = problem(name, replace(case, groups=1, chunk_size=64))
        expected = outputs_and_gradients(inputs, function, "reference")
        actual = outputs_and_gradients([x.to(dtype) for x in inputs], function, "cpu")
        assert_all_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_packed_row_equals_its_segments_alone(name: str, reverse: bool) -> None:
    case = Case(reverse=reverse)
    (events, *weights), function = problem(name, case)
    packed = outputs_and_gradients([events, *weights], lambda x: (function(x)[0] ** 2,), "cpu")
    slope = torch.linspace(0.5, 1.5, packed[0].numel()).view(packed[0].shape)  # of outputs_and_gradients
    start, alone = 0, []
    for n in case.lengths:
        _, own = problem(name, replace(case, lengths=(n,)))
        leaves = [x.clone().requires_grad_() for x in (events[:, start : start + n], *weights)]
        with ops.forced("cpu"):
            y = own(leaves)[0] ** 2
        gradients = torch.autograd.grad((y * slope[:, start : start + n]).sum(), leaves)
        alone.append([y.detach(), *gradients])
        start += n
    y, devents, *dweights = zip(*alone, strict=True)
    together = [torch.cat(y, dim=1), torch.cat(devents, dim=1), *(torch.stack(d).sum(0) for d in dweights)]
    torch.testing.assert_close(packed, together, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_with_the_carried_states_equal_one_pass(name: str, reverse: bool) -> None:
    """Also pieces shorter than the convolution."""
    case = Case(rows=2, lengths=(50,), reverse=reverse, carried=True)
    (events, *weights, conv, scan), function = problem(name, case)
    with ops.forced("cpu"):
        y, *last = function([events, *weights, conv, scan])
        states, pieces = [conv, scan], []
        bounds = list(itertools.pairwise((0, 23, 24, 26, 50)))
        for first, stop in reversed(bounds) if reverse else bounds:
            piece, *states = function([events[:, first:stop], *weights, *states])
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces[:: -1 if reverse else 1], dim=1), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    inputs, function = problem(name, Case(rows=2, lengths=(300, 400), headdim=40, d_state=8))
    threads = torch.get_num_threads()
    two = outputs_and_gradients(inputs, function, "cpu")
    try:
        torch.set_num_threads(1)
        one = outputs_and_gradients(inputs, function, "cpu")
        assert torch.get_num_threads() == 1, "torch's own setting is left alone"
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))


@pytest.mark.parametrize("name", MIXERS)
def test_extreme_gates_stay_finite_and_nan_is_not_swallowed(name: str) -> None:
    (events, *weights), function = problem(name, Case(lengths=(12,)))
    inputs = [events.float() * 300, *(x.float() for x in weights)]  # exp(300) is infinite
    assert all(x.isfinite().all() for x in outputs_and_gradients(inputs, function, "cpu"))
    inputs[0][0, 3] = torch.nan
    y = outputs_and_gradients(inputs, function, "cpu")[0]
    assert y[0, 3:].isnan().all(), "those before it in its chunk may be, too: zero times NaN"


@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 3, 8]),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_packed_attention_equals_a_dense_masked_softmax(
    lengths: list[int], window: int | None, causal: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), 2, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bounds = [0, *itertools.accumulate(lengths)]
    segment_L = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = torch.arange(len(segment_L))[:, None] - torch.arange(len(segment_L))
    seen = segment_L[:, None] == segment_L
    if window is not None:
        seen &= distance.abs() < window
    if causal:
        seen &= distance >= 0
    score = torch.einsum("ihe,jhe->hij", q, k) / 3**0.5
    expected = torch.einsum("hij,jhe->ihe", score.masked_fill(~seen, -torch.inf).softmax(-1), v)
    actual = ops.packed_attention(q, k, v, bounds, window=window, causal=causal)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    gradients = (torch.autograd.grad(y, (q, k, v), upstream) for y in (actual, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def tiny_mamba2() -> Tensor:
    """One call of an operator."""
    one = torch.ones(1)
    given = ops.Mamba2(torch.ones(1, 2, 5), torch.ones(3, 2), torch.ones(3), one, -one, one, one)
    return ops.mamba2(given)[0]


def test_the_implementation_can_be_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setenv("HYMATE_OPS", "reference")
    tiny_mamba2()
    assert ops._chosen["cpu"].__name__ == "hymate.ops.reference"
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setenv("HYMATE_OPS", "quick")
    with pytest.raises(UserError, match="HYMATE_OPS must be one of reference, cpu, fused"):
        tiny_mamba2()


@pytest.mark.slow
def test_the_first_operator_leaves_the_number_of_threads_alone() -> None:
    """Numba's OpenMP layer resets it when it starts, which made trials that run side by side stall each other."""
    program = (
        "import torch; torch.set_num_threads(1); from hymate import ops; one = torch.ones(1); "
        "ops.mamba2(ops.Mamba2(torch.ones(1, 2, 5), torch.ones(3, 2), torch.ones(3), one, -one, one, one)); "
        "assert torch.get_num_threads() == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_precompiling_leaves_nothing_to_compile() -> None:
    """Numba's log names the files it loads and saves. Most kernels are on disk: compiling all takes a minute.

    Processes print a line and its end separately, so two of them can share a line.
    """
    environment = {**os.environ, "NUMBA_DEBUG_CACHE": "1"}
    step = """
import torch
from hymate.model.mixers import Mamba1Mixer, Mamba2Mixer
from hymate.ops import add_dropout
for mixer in (Mamba1Mixer(16, d_state=4), Mamba2Mixer(16, d_state=4, headdim=16)):
    x = torch.randn(1, 40, 16, requires_grad=True)
    add_dropout(x, mixer(x), 0.1).sum().backward()
"""
    compiled = []
    for command in (["-m", "hymate.ops.cpu.precompile"], ["-c", step]):
        done = subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True, text=True)
        compiled.append(set(re.findall(r"data (?:loaded from|saved to) '[^']*/([\w.]+)-", done.stdout)))
    assert len(compiled[0]) == len(KERNELS)
    assert compiled[1] - compiled[0] == {"launch._for_each_unit"}  # its own parallel loop compiles in half a second
