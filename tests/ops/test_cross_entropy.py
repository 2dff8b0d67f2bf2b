"""The cross-entropy in pieces equals the plain one: loss, accuracy and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hymate import ops
from hymate.ops import cross_entropy


def problem(events: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(events)
    shapes = ((events, 8), (vocabulary, 8), (vocabulary,))
    inputs = [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return inputs, torch.randint(vocabulary, (events,), generator=g)


def plain(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits, target, reduction="sum"), (logits.argmax(-1) == target).double().sum()


@given(events=st.integers(1, 40), vocabulary=st.integers(2, 30), piece=st.sampled_from([1, 50, 200, 10**6]))
@settings(max_examples=40)
def test_pieces_equal_the_whole(events: int, vocabulary: int, piece: int) -> None:
    inputs, target = problem(events, vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "PIECE", piece)
        loss, hits = ops.linear_cross_entropy(*inputs, target)
        gradients = torch.autograd.grad(3 * loss, inputs)
        with torch.no_grad():
            unrecorded, _ = ops.linear_cross_entropy(*inputs, target)
    expected, expected_hits = plain(*inputs, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(unrecorded, expected)
    torch.testing.assert_close(hits, expected_hits)
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, inputs))


def test_under_autocast_only_the_products_are_rounded() -> None:
    inputs, target = problem(300, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, hits = ops.linear_cross_entropy(*inputs, target)
    gradients = torch.autograd.grad(loss, inputs)
    expected, expected_hits = plain(*inputs, target)
    assert loss.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients)
    assert loss.item() != expected.item(), "nothing ran in bf16"
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    torch.testing.assert_close(hits, expected_hits.float(), rtol=0, atol=6)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.02


def test_no_array_as_large_as_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE", 1000)  # ten events at once
    inputs, target = problem(400, 100)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in [result] if isinstance(t, Tensor)), 0)
            return result

    with Watch():
        loss, _ = ops.linear_cross_entropy(*inputs, target)
        loss.backward()
    assert largest <= 400 * 8
