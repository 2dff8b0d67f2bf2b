"""What packed attention computes: no pads, nothing across segments, with a window a cost linear in length.

That its results equal a dense masked softmax is tested with the other operators.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from hymate.ops import packed_attention


class Count(TorchFunctionMode):
    """Adds up the queries, and the pairs of query and key, that the attention kernels are given."""

    queries = pairs = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            blocks, _, queries = args[0].shape[:3]
            self.queries += blocks * queries
            self.pairs += blocks * queries * args[1].shape[2]
        return function(*args, **(kwargs or {}))


def computed(lengths: list[int], window: int | None, causal: bool = True) -> Count:
    q = torch.zeros(sum(lengths), 1, 2)
    with Count() as count:
        packed_attention(q, q, q, [0, *accumulate(lengths)], window=window, causal=causal)
    return count


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 5, 16]),
    causal=st.booleans(),
)
@settings(max_examples=40)
def test_every_position_computed_is_an_event_and_segments_add_up(
    lengths: list[int], window: int | None, causal: bool
) -> None:
    together = computed(lengths, window, causal)
    assert together.queries == sum(lengths)
    assert together.pairs == sum(computed([n], window, causal).pairs for n in lengths)


@pytest.mark.parametrize("causal", [True, False])
def test_a_windows_cost_is_linear_in_length_and_near_what_the_band_holds(causal: bool) -> None:
    window, n = 64, 4096
    once, twice = computed([n], window, causal).pairs, computed([2 * n], window, causal).pairs
    assert twice < 2.05 * once
    assert once < 1.4 * n * window * (1 if causal else 2)
