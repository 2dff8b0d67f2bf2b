"""Random problems for the two mixer operators, and how outputs and gradients are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from hymate import ops

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
    timed: bool = False
    seed: int = 0

    @property
    def segment_BL(self) -> Tensor:
        index = torch.arange(len(self.lengths), dtype=torch.int32)
        return index.repeat_interleave(torch.tensor(self.lengths)).expand(self.rows, -1).contiguous()


_SMALL = Case(lengths=(9, 1, 30, 1, 17), heads=2, groups=1, headdim=16)
# for what takes too long to be tried on random ones: a GPU compiles again for most of them
FEW = {
    "packed": _SMALL,
    "reversed": replace(_SMALL, reverse=True),
    "carried": replace(_SMALL, carried=True, lengths=(40,)),
    "carried, packed": replace(_SMALL, carried=True),
    "timed": replace(_SMALL, carried=True, timed=True),
    "one event": replace(_SMALL, lengths=(1,)),
    "wide states": replace(_SMALL, carried=True, d_state=200),  # above 128 mamba_ssm's kernels take them in parts
    "groups, rows, odd widths": replace(_SMALL, rows=2, heads=4, groups=2, headdim=5, d_state=9, chunk_size=10),
}


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
        timed=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def problem(name: str, case: Case) -> tuple[list[Tensor], Function]:
    """Inputs in float64, the packed events first, then weights, what the hours add to the steps and the carried states,
    and the operator as a function of them: y, the convolution's last inputs, the scan's last state."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, L, H, N, K, R = case.rows, sum(case.lengths), case.heads, case.d_state, case.width, 2
    D = H * case.headdim
    if name == "mamba2":
        X = D + 2 * case.groups * N
        inputs = [normal(B, L, D + X + H), normal(X, K), normal(X), normal(H), -normal(H).exp(), normal(H), normal(D)]
        states = [normal(B, X, K - 1), normal(B, H, case.headdim, N)]
        steps, options = H, {"groups": case.groups, "chunk_size": case.chunk_size}
    else:
        inputs = [normal(B, L, 2 * D), normal(D, K), normal(D), normal(R + 2 * N, D) / D**0.5, normal(D, R), normal(D)]
        inputs += [-normal(D, N).exp(), normal(D)]
        states = [normal(B, D, K - 1), normal(B, D, N)]
        steps, options = D, {}

    operator, given = {"mamba1": (ops.mamba1, ops.Mamba1), "mamba2": (ops.mamba2, ops.Mamba2)}[name]

    def function(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        rest = list(x)
        state = (rest.pop(-2), rest.pop()) if case.carried else None
        time = {"time_BLH" if name == "mamba2" else "time_BLD": rest.pop()} if case.timed else {}
        segment_BL = case.segment_BL if len(case.lengths) > 1 else None
        settings = {"segment_BL": segment_BL, "state": state, "reverse": case.reverse, **options, **time}
        y, last = operator(given(*rest, **settings))
        return y, *last

    inputs += [normal(B, L, steps)] if case.timed else []
    return inputs + (states if case.carried else []), function


def outputs_and_gradients(
    inputs: Sequence[Tensor], function: Function, implementation: str, left_out: int | None = None
) -> list[Tensor]:
    """The outputs, and the gradients of a sum of them; `left_out`: the number of an output that is not in the sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with ops.forced(implementation):
        outputs = function(leaves)
        weighted = sum(
            (y.double() * torch.linspace(0.5, 1.5, y.numel(), device=y.device).view(y.shape)).sum()
            for number, y in enumerate(outputs)
            if number != left_out
        )
        gradients = torch.autograd.grad(weighted, leaves)
    return [*(y.detach() for y in outputs), *gradients]


def errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Relative to the largest number of each, or to a tenth of the largest of all where one is smaller than that: some
    gradients are what remains of sums that cancel."""

    def largest(x: Tensor) -> float:
        return float(x.detach().double().abs().max()) if x.numel() else 0.0

    least = 0.1 * max(map(largest, expected))
    pairs = zip(actual, expected, strict=True)
    return [largest(a.double() - e.double()) / max(least, largest(e)) for a, e in pairs]


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """By `errors`."""
    for i, error in enumerate(errors(actual, expected)):
        assert error <= tolerance, f"item {i} (outputs first, then gradients): relative error {error:.2e}"
