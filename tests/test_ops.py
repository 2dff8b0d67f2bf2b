"""The operators: the fast CPU path equals the plain sequential reference, forward, final states and every gradient."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymate import ops
from hymate.config import UserError

# bfloat16 rounds to 1 part in 256
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 4e-2}
MIXERS = ("mamba1", "mamba2")

Function = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One random problem; Mamba-1 has heads * headdim channels."""

    rows: int = 1
    lengths: tuple[int, ...] = (9, 1, 30, 17)
    heads: int = 4
    groups: int = 2
    headdim: int = 8
    d_state: int = 16
    width: int = 4
    chunk_size: int = 16
    reverse: bool = False
    carried: bool = False
    seed: int = 0

    @property
    def segment_BL(self) -> Tensor:
        index = torch.arange(len(self.lengths), dtype=torch.int32)
        return index.repeat_interleave(torch.tensor(self.lengths)).expand(self.rows, -1).contiguous()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.integers(1, 2))
    return Case(
        rows=draw(st.integers(1, 2)),
        lengths=tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))),
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        headdim=draw(st.sampled_from([1, 4, 8, 17])),
        d_state=draw(st.sampled_from([1, 4, 16, 33])),
        width=draw(st.integers(2, 4)),
        chunk_size=draw(st.sampled_from([2, 16, 40, 256])),
        reverse=draw(st.booleans()),
        carried=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def problem(name: str, case: Case) -> tuple[list[Tensor], Function]:
    """Inputs in float64, the packed events first and the carried states last, and the operator as a function of them:
    y, the convolution's last inputs, the scan's last state."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, L, H, N, K, R = case.rows, sum(case.lengths), case.heads, case.d_state, case.width, 2
    D = H * case.headdim
    if name == "mamba2":
        X = D + 2 * case.groups * N
        inputs = [normal(B, L, D + X + H), normal(X, K), normal(X), normal(H), -normal(H).exp(), normal(H), normal(D)]
        states = [normal(B, X, K - 1), normal(B, H, case.headdim, N)]
        options = {"groups": case.groups, "chunk_size": case.chunk_size}
    else:
        inputs = [normal(B, L, 2 * D), normal(D, K), normal(D), normal(R + 2 * N, D) / D**0.5, normal(D, R), normal(D)]
        inputs += [-normal(D, N).exp(), normal(D)]
        states = [normal(B, D, K - 1), normal(B, D, N)]
        options = {}

    def function(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        *weights, conv, scan = x if case.carried else (*x, None, None)
        state = None if conv is None else (conv, scan)
        segment_BL = case.segment_BL if len(case.lengths) > 1 else None
        y, last = getattr(ops, name)(*weights, segment_BL=segment_BL, state=state, reverse=case.reverse, **options)
        return y, *last

    return inputs + (states if case.carried else []), function


def outputs_and_gradients(inputs: Sequence[Tensor], function: Function, implementation: str) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with ops.forced(implementation):
        outputs = function(leaves)
        weighted = sum((y.double() * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in outputs)
        gradients = torch.autograd.grad(weighted, leaves)
    return [*(y.detach() for y in outputs), *gradients]


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Relative to the largest number of each, or to a tenth of the largest of all where one is smaller than that: some
    gradients are what remains of sums that cancel."""
    least = 0.1 * max(float(e.double().abs().max()) for e in expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        scale = max(least, float(e.double().abs().max()))
        error = float((a.double() - e.double()).abs().max()) / scale
        assert error <= tolerance, f"item {i} (outputs first, then gradients): relative error {error:.2e}"


@pytest.mark.parametrize("name", MIXERS)
@given(case=cases())
@settings(max_examples=25, deadline=None)
def test_cpu_equals_reference_in_float64(name: str, case: Case) -> None:
    inputs, function = problem(name, case)
    expected = outputs_and_gradients(inputs, function, "reference")
    assert_all_close(outputs_and_gradients(inputs, function, "cpu"), expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", MIXERS)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25, deadline=None)
def test_cpu_in_lower_precision_stays_near_the_reference(name: str, case: Case, dtype: torch.dtype) -> None:
    """As under autocast: events in the lower precision, weights and states in float32."""
    inputs, function = problem(name, case)
    lowered = [inputs[0].to(dtype), *(x.float() for x in inputs[1:])]
    expected = outputs_and_gradients([x.double() for x in lowered], function, "reference")
    actual = outputs_and_gradients(lowered, function, "cpu")
    assert actual[0].dtype == dtype and actual[2].dtype == torch.float32
    assert_all_close(actual, expected, TOLERANCE[dtype])


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


def tiny_mamba2() -> Tensor:
    """One call of an operator."""
    one = torch.ones(1)
    return ops.mamba2(torch.ones(1, 2, 5), torch.ones(3, 2), torch.ones(3), one, -one, one, one)[0]


def test_the_implementation_can_be_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setenv("HYMATE_OPS", "reference")
    tiny_mamba2()
    assert ops._chosen["cpu"].__name__ == "hymate.ops.reference"
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setenv("HYMATE_OPS", "quick")
    with pytest.raises(UserError, match="HYMATE_OPS must be one of reference, cpu, fused"):
        tiny_mamba2()


def test_the_first_operator_leaves_the_number_of_threads_alone() -> None:
    """Numba's OpenMP layer resets it when it starts, which made trials that run side by side stall each other."""
    program = (
        "import torch; torch.set_num_threads(1); from hymate import ops; one = torch.ones(1); "
        "ops.mamba2(torch.ones(1, 2, 5), torch.ones(3, 2), torch.ones(3), one, -one, one, one); "
        "assert torch.get_num_threads() == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
