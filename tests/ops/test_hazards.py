"""The likelihood of hazards in pieces equals the plain one: loss and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymate import ops
from hymate.model.hazards import bin_of, edges_of, hours_in_bins
from hymate.ops import hazards

RANK = 3


def problem(anchors: int, bins: int, codes: int, seed: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Vectors, weights and biases; edges, the hours until each anchor's record ends, and when each code comes (A, V),
    infinity where it does not."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((anchors, bins, RANK), (codes, RANK), (codes,))
    inputs = [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    until_A = 10 * torch.rand(anchors, generator=g, dtype=torch.float64)
    hours_AV = 20 * torch.rand(anchors, codes, generator=g, dtype=torch.float64)
    hours_AV = torch.where(hours_AV <= until_A[:, None], hours_AV, torch.inf)
    edges = torch.arange(1, bins, dtype=torch.float64) * 8 / bins
    return inputs, [edges.to(dtype), until_A.to(dtype), hours_AV.to(dtype)]


def in_pieces(inputs: list[Tensor], known: list[Tensor]) -> Tensor:
    edges, until_A, hours_AV = known
    anchor_N, code_N = torch.nonzero(hours_AV.isfinite()).unbind(1)
    hours_N, at_risk_AJ = hours_AV[anchor_N, code_N], hours_in_bins(until_A, edges)
    spared_NJ = at_risk_AJ[anchor_N] - hours_in_bins(hours_N, edges)
    lengths = torch.bincount(anchor_N, minlength=len(until_A)).tolist()
    return ops.linear_hazard_loss(*inputs, at_risk_AJ, anchor_N, code_N, bin_of(hours_N, edges), spared_NJ, lengths)


def plain(inputs: list[Tensor], known: list[Tensor]) -> Tensor:
    """Of one anchor, code and bin after the other."""
    (x_AJR, weight_VR, bias_V), (edges, until_A, hours_AV) = inputs, known
    bounds = [0.0, *edges.tolist(), torch.inf]
    loss = bias_V.new_zeros(())
    for a, until in enumerate(until_A.tolist()):
        for v, hours in enumerate(hours_AV[a].tolist()):
            for j, (start, end) in enumerate(itertools.pairwise(bounds)):
                log_hazard = x_AJR[a, j] @ weight_VR[v] + bias_V[v]
                loss = loss + log_hazard.exp() * max(0.0, min(until, hours, end) - start)
                if start < hours <= end and hours <= until:
                    loss = loss - log_hazard
    return loss


@given(
    anchors=st.integers(1, 7),
    bins=st.integers(1, 4),
    codes=st.integers(1, 9),
    piece=st.sampled_from([1, 30, 80, 10**6]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_pieces_equal_the_plain_likelihood(anchors: int, bins: int, codes: int, piece: int, seed: int) -> None:
    inputs, known = problem(anchors, bins, codes, seed, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hazards, "PIECE", piece)
        loss = in_pieces(inputs, known)
        gradients = torch.autograd.grad(3 * loss, inputs)
        with torch.no_grad():
            torch.testing.assert_close(in_pieces(inputs, known), loss)
    expected = plain(inputs, known)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, inputs))


def test_under_autocast_only_the_products_are_rounded() -> None:
    inputs, known = problem(40, 4, 60, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = in_pieces(inputs, known)
    gradients = torch.autograd.grad(loss, inputs)
    expected = in_pieces(inputs, known)
    assert loss.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients)
    assert loss.item() != expected.item(), "nothing ran in bf16"
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.03


def test_no_array_as_large_as_all_hazards_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hazards, "PIECE", 1000)  # five anchors at once
    inputs, known = problem(100, 2, 100, 0, torch.float64)
    known[2][:, 2:] = torch.inf  # few codes come
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in [result] if isinstance(t, Tensor)), 0)
            return result

    with Watch():
        in_pieces(inputs, known).backward()
    assert largest <= known[2].numel() < 100 * 2 * 100, "the test's own table of hours"


@given(hours=st.lists(st.floats(0.01, 100), min_size=1, max_size=50, unique=True), bins=st.integers(1, 6))
@settings(max_examples=40)
def test_learned_bins_hold_as_many_times_each(hours: list[float], bins: int) -> None:
    hours_N = torch.tensor(hours, dtype=torch.float64)
    edges = edges_of(hours_N, bins)
    count_J = torch.bincount(bin_of(hours_N, edges), minlength=bins)
    if len(hours) >= bins:
        assert count_J.max() - count_J.min() <= 1
    torch.testing.assert_close(hours_in_bins(hours_N, edges).sum(1), hours_N)
