"""The operators: the fast CPU path equals the plain sequential reference, forward, final state and every gradient."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymate import ops
from hymate.config import UserError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """One random problem."""

    rows: int
    lengths: tuple[int, ...]
    heads: int
    groups: int
    headdim: int
    d_state: int
    chunk_size: int
    reverse: bool
    carried: bool
    seed: int

    @property
    def length(self) -> int:
        return sum(self.lengths)

    @property
    def segment_BL(self) -> Tensor:
        index = torch.arange(len(self.lengths), dtype=torch.int32)
        return index.repeat_interleave(torch.tensor(self.lengths)).expand(self.rows, -1).contiguous()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.integers(1, 2))
    return Case(
        rows=draw(st.integers(1, 2)),
        lengths=tuple(draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))),
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        headdim=draw(st.sampled_from([1, 4, 8])),
        d_state=draw(st.sampled_from([4, 8, 16, 64])),
        chunk_size=draw(st.sampled_from([2, 7, 16])),
        reverse=draw(st.booleans()),
        carried=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def ssd_problem(case: Case) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Tensor, ...]]]:
    """Inputs in float64, and the scan as a function of them."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, L, H = case.rows, case.length, case.heads
    inputs = [normal(B, L, H, case.headdim), normal(B, L, H).exp() * 0.3, -normal(H).exp()]
    inputs += [normal(B, L, case.groups, case.d_state), normal(B, L, case.groups, case.d_state), normal(H)]
    inputs += [normal(B, H, case.headdim, case.d_state)] if case.carried else []

    def scan(x: list[Tensor]) -> tuple[Tensor, ...]:
        state = x[6] if case.carried else None
        return ops.ssd_scan(
            *x[:6],
            chunk_size=case.chunk_size,
            segment_BL=case.segment_BL,
            initial_state_BHPN=state,
            reverse=case.reverse,
        )

    return inputs, scan


def selective_problem(case: Case) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Tensor, ...]]]:
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, L, D, N = case.rows, case.length, case.heads * case.headdim, case.d_state
    inputs = [normal(B, L, D), normal(B, L, D).exp() * 0.3, -normal(D, N).exp()]
    inputs += [normal(B, L, N), normal(B, L, N), normal(D)]
    inputs += [normal(B, D, N)] if case.carried else []

    def scan(x: list[Tensor]) -> tuple[Tensor, ...]:
        state = x[6] if case.carried else None
        return ops.selective_scan(*x[:6], segment_BL=case.segment_BL, initial_state_BDN=state, reverse=case.reverse)

    return inputs, scan


def conv_problem(case: Case) -> tuple[list[Tensor], Callable[[list[Tensor]], tuple[Tensor, ...]]]:
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, L, D, K = case.rows, case.length, case.heads * case.headdim, 4
    inputs = [normal(B, L, D), normal(D, K), normal(D)]
    inputs += [normal(B, D, K - 1)] if case.carried else []

    def conv(x: list[Tensor]) -> tuple[Tensor, ...]:
        state = x[3] if case.carried else None
        return ops.causal_conv1d(*x[:3], segment_BL=case.segment_BL, initial_state_BDK1=state)

    return inputs, conv


PROBLEMS = {"ssd": ssd_problem, "selective": selective_problem, "conv": conv_problem}


def outputs_and_gradients(
    inputs: Sequence[Tensor], function: Callable[[list[Tensor]], tuple[Tensor, ...]], implementation: str
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with ops.forced(implementation):
        outputs = function(leaves)
        weighted = sum((y.double() * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in outputs)
        gradients = torch.autograd.grad(weighted, leaves)
    return [*(y.detach() for y in outputs), *gradients]


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        scale = float(e.double().abs().max()) + 1e-12
        error = float((a.double() - e.double()).abs().max()) / scale
        assert error <= tolerance, f"item {i} (outputs first, then gradients): relative error {error:.2e}"


@pytest.mark.parametrize("name", PROBLEMS)
@given(case=cases())
@settings(max_examples=25, deadline=None)
def test_cpu_equals_reference_in_float64(name: str, case: Case) -> None:
    inputs, function = PROBLEMS[name](case)
    expected = outputs_and_gradients(inputs, function, "reference")
    assert_all_close(outputs_and_gradients(inputs, function, "cpu"), expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_cpu_in_lower_precision_stays_near_the_reference(name: str, dtype: torch.dtype) -> None:
    case = Case(2, (40, 1, 30), 4, 1, 16, 16, 16, False, False, 0)
    inputs, function = PROBLEMS[name](case)
    expected = outputs_and_gradients(inputs, function, "reference")
    lowered = [x.to(dtype) for x in inputs]
    if name != "conv":  # steps and decay are float32 in every precision
        lowered[1:3] = [x.float() for x in inputs[1:3]]
    actual = outputs_and_gradients(lowered, function, "cpu")
    assert actual[0].dtype == dtype
    assert_all_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_packed_row_equals_its_segments_alone(name: str, reverse: bool) -> None:
    case = Case(1, (9, 1, 30, 17), 4, 2, 8, 16, 8, reverse and name != "conv", False, 1)
    inputs, function = PROBLEMS[name](case)
    packed, *_ = outputs_and_gradients(inputs, lambda x: function(x)[:1], "cpu")
    events = {"ssd": (0, 1, 3, 4), "selective": (0, 1, 3, 4), "conv": (0,)}[name]
    start = 0
    for n in case.lengths:
        alone = Case(1, (n,), 4, 2, 8, 16, 8, case.reverse, False, 1)
        pieces = [x[:, start : start + n] if i in events else x for i, x in enumerate(inputs)]
        _, own = PROBLEMS[name](alone)
        torch.testing.assert_close(own_output(pieces, own), packed[:, start : start + n], rtol=1e-12, atol=1e-12)
        start += n


def own_output(inputs: list[Tensor], function: Callable[[list[Tensor]], tuple[Tensor, ...]]) -> Tensor:
    with ops.forced("cpu"):
        return function(inputs)[0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_two_pieces_with_the_carried_state_equal_one_pass(name: str) -> None:
    whole = Case(2, (50,), 4, 1, 8, 16, 8, False, True, 2)
    inputs, function = PROBLEMS[name](whole)
    events = {"ssd": (0, 1, 3, 4), "selective": (0, 1, 3, 4), "conv": (0,)}[name]
    with ops.forced("cpu"):
        y, final = function(inputs)
        state, pieces = inputs[-1], []
        for first, stop in ((0, 23), (23, 50)):
            case = Case(2, (stop - first,), 4, 1, 8, 16, 8, False, True, 2)
            part = [x[:, first:stop] if i in events else x for i, x in enumerate(inputs[:-1])]
            piece, state = PROBLEMS[name](case)[1]([*part, state])
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, final, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ssd", "selective"])
@pytest.mark.parametrize("reverse", [False, True])
def test_long_rows_and_wide_heads_equal_the_reference(name: str, reverse: bool) -> None:
    """Long enough to be cut into several units of work along the row, wide enough to be cut across channels."""
    case = Case(1, (520, 1, 90, 40), 4, 2, 96, 4, 64, reverse, True, 3)
    inputs, function = PROBLEMS[name](case)
    expected = outputs_and_gradients(inputs, function, "reference")
    assert_all_close(outputs_and_gradients(inputs, function, "cpu"), expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_a_packed_row_equal_those_of_its_segments_alone(name: str) -> None:
    case = Case(1, (9, 1, 30, 17), 4, 2, 8, 16, 8, False, False, 4)
    inputs, function = PROBLEMS[name](case)
    events = {"ssd": (0, 1, 3, 4), "selective": (0, 1, 3, 4), "conv": (0,)}[name]
    packed = outputs_and_gradients(inputs, lambda x: (function(x)[0] ** 2,), "cpu")[1:]
    start, alone = 0, []
    for n in case.lengths:
        _, own = PROBLEMS[name](Case(1, (n,), 4, 2, 8, 16, 8, False, False, 4))
        pieces = [x[:, start : start + n].clone() if i in events else x.clone() for i, x in enumerate(inputs)]
        leaves = [x.requires_grad_() for x in pieces]
        weight = torch.linspace(0.5, 1.5, packed[0].numel()).view(packed[0].shape)[:, start : start + n]
        with ops.forced("cpu"):
            alone.append(torch.autograd.grad((own(leaves)[0] ** 2 * weight).sum(), leaves))
        start += n
    for i, gradient in enumerate(packed):
        parts = [gradients[i] for gradients in alone]
        together = torch.cat(parts, dim=1) if i in events else torch.stack(parts).sum(0)
        torch.testing.assert_close(gradient, together, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    inputs, function = PROBLEMS[name](Case(2, (300, 400), 4, 2, 40, 8, 16, False, False, 5))
    threads = torch.get_num_threads()
    two = outputs_and_gradients(inputs, function, "cpu")
    try:
        torch.set_num_threads(1)
        one = outputs_and_gradients(inputs, function, "cpu")
        assert torch.get_num_threads() == 1, "torch's own setting is left alone"
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one[:2], two[:2], strict=True))


def test_extreme_gates_stay_finite_and_nan_is_not_swallowed() -> None:
    x, z = torch.ones(1, 7), torch.tensor([[-1e4, -89.0, -1.0, 0.0, 1.0, 89.0, 1e4]])
    with ops.forced("cpu"):
        y = ops.gated_rms_norm(x, z, torch.ones(7), 1e-5, 7)
        diverged = ops.gated_rms_norm(x * torch.nan, z, torch.ones(7), 1e-5, 7)
    with ops.forced("reference"):
        torch.testing.assert_close(y, ops.gated_rms_norm(x, z, torch.ones(7), 1e-5, 7))
    assert diverged.isnan().all()


def test_gated_rms_norm_equals_reference() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(3, 5, 12, dtype=torch.float64)]
    inputs.append(torch.randn(12, dtype=torch.float64))
    for group_size in (12, 4):

        def norm(x: list[Tensor], group_size: int = group_size) -> tuple[Tensor]:
            return (ops.gated_rms_norm(*x, 1e-5, group_size),)

        expected = outputs_and_gradients(inputs, norm, "reference")
        assert_all_close(outputs_and_gradients(inputs, norm, "cpu"), expected, 1e-9)


@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 3, 8]),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
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


def test_the_implementation_can_be_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setenv("HYMATE_OPS", "reference")
    ops.gated_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 1e-5, 2)
    assert ops._chosen["cpu"].__name__ == "hymate.ops.reference"
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setenv("HYMATE_OPS", "quick")
    with pytest.raises(UserError, match="HYMATE_OPS must be one of reference, cpu, fused"):
        ops.gated_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 1e-5, 2)


def test_the_first_operator_leaves_the_number_of_threads_alone() -> None:
    """Numba's OpenMP layer resets it when it starts, which made trials that run side by side stall each other."""
    program = (
        "import torch; torch.set_num_threads(1); from hymate import ops; x = torch.ones(1, 7); "
        "ops.gated_rms_norm(x, x, torch.ones(7), 1e-5, 7); assert torch.get_num_threads() == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
