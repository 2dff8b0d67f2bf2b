"""Dropout on the residual stream: fraction and scale, one mask forward and backward, torch's generator governs it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hymate import ops
from hymate.model.encoder import ResidualDropout

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def kept(shape: tuple[int, ...], p: float, seed: int = 0) -> Tensor:
    """Which elements of a branch of ones are kept."""
    torch.manual_seed(seed)
    return ops.add_dropout(torch.zeros(shape), torch.ones(shape), p) != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_of_p_is_dropped_and_the_rest_scaled(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x, branch = torch.rand(400, 100, dtype=dtype), 1 + torch.rand(400, 100, dtype=dtype)
    y = ops.add_dropout(x, branch, p)
    dropped = y == x
    assert y.dtype == dtype
    assert abs(float(dropped.double().mean()) - p) < 5 * (p * (1 - p) / y.numel()) ** 0.5
    expected = torch.where(dropped, x.double(), x.double() + branch.double() / (1 - p))
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@given(shape=st.tuples(st.integers(1, 300), st.integers(1, 70)), p=st.floats(0.05, 0.95), seed=st.integers(0, 2**40))
@settings(max_examples=30)
def test_gradients_pass_where_the_forward_let_through(shape: tuple[int, int], p: float, seed: int) -> None:
    x, branch = torch.zeros(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
    torch.manual_seed(seed)
    y = ops.add_dropout(x, branch, p)
    upstream = torch.randn(shape)
    dx, dbranch = torch.autograd.grad(y, (x, branch), upstream)
    torch.testing.assert_close(dx, upstream)
    torch.testing.assert_close(dbranch, upstream * y.detach())


def test_one_seed_one_mask_and_another_seed_another() -> None:
    shape = (300, 128)
    assert torch.equal(kept(shape, 0.5), kept(shape, 0.5))
    agreement = (kept(shape, 0.5) == kept(shape, 0.5, seed=1)).double().mean()
    assert abs(float(agreement) - 0.5) < 5 * 0.5 / (300 * 128) ** 0.5
    torch.manual_seed(0)
    first, second = (ops.add_dropout(torch.zeros(shape), torch.ones(shape), 0.5) for _ in range(2))
    assert not torch.equal(first, second)


def test_the_mask_does_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    several = kept((700, 128), 0.3)
    try:
        torch.set_num_threads(1)
        assert torch.equal(kept((700, 128), 0.3), several)
    finally:
        torch.set_num_threads(threads)


def test_places_and_calls_are_independent_of_each_other() -> None:
    """The correlation of the mask with itself some places on, and of the masks of successive seeds."""
    bound = 5 / (1 << 18) ** 0.5
    mask = kept((1 << 11, 128), 0.5).double().flatten() * 2 - 1
    for shift in (1, 2, 3, 4, 8, 64, 128, 1 << 14, 3 << 14):
        assert abs(float((mask * mask.roll(shift)).mean())) < bound, shift
    calls = [kept((1 << 11, 128), 0.5, seed).double().flatten() * 2 - 1 for seed in range(4)]
    for a, b in pairwise(calls):
        assert abs(float((a * b).mean())) < bound


def test_the_sum_has_the_wider_dtype_and_gradients_their_inputs() -> None:
    x = torch.zeros(50, 8, requires_grad=True)
    branch = torch.ones(50, 8, dtype=torch.bfloat16, requires_grad=True)
    y = ops.add_dropout(x, branch, 0.5)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    assert branch.grad.dtype == torch.bfloat16
    torch.testing.assert_close(branch.grad.float(), y.detach())


def test_without_dropout_and_in_evaluation_it_is_a_plain_sum() -> None:
    x, branch = torch.randn(40, 8), torch.randn(40, 8)
    assert torch.equal(ResidualDropout(0.0)(x, branch), x + branch)
    assert torch.equal(ResidualDropout(0.4).eval()(x, branch), x + branch)
    assert not torch.equal(ResidualDropout(0.4)(x, branch), x + branch)


def test_activation_checkpointing_recomputes_the_same_mask() -> None:
    x, branch = torch.zeros(60, 8), torch.ones(60, 8, requires_grad=True)
    layer = ResidualDropout(0.5)
    y = checkpoint(lambda b: layer(x, b).square(), branch, use_reentrant=False)
    torch.rand(3)  # what else draws from the generator before the backward
    (gradient,) = torch.autograd.grad(y.sum(), branch)
    torch.testing.assert_close(gradient, 2 * y.detach())  # y = (2 kept)^2, its gradient 2 * 2 * 2 kept


def test_other_implementations_drop_the_same_fraction() -> None:
    torch.manual_seed(0)
    with ops.forced("reference"):
        y = ops.add_dropout(torch.zeros(400, 100), torch.ones(400, 100), 0.25)
    assert abs(float((y == 0).double().mean()) - 0.25) < 0.02
