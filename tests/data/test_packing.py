"""Packing: every history in exactly one row, no row above the budget, rows as full as theory promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymate.data.packing import pack


@st.composite
def packable(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    budget = draw(st.integers(1, 500))
    lengths = draw(st.lists(st.integers(1, budget), max_size=200))
    return np.array(lengths, dtype=np.int64), budget


def first_fit(lengths: np.ndarray, budget: int) -> int:
    """Number of rows that first fit, in the given order, needs."""
    rooms: list[int] = []
    for length in lengths.tolist():
        for row, room in enumerate(rooms):
            if room >= length:
                rooms[row] -= length
                break
        else:
            rooms.append(budget - length)
    return len(rooms)


def histories(num: int, budget: int, seed: int) -> np.ndarray:
    """Long-tailed lengths, as patient histories have."""
    lengths = np.random.default_rng(seed).lognormal(math.log(budget / 20), 1.2, num)
    return np.clip(lengths, 1, budget).astype(np.int64)


@given(packable())
def test_every_index_once_and_no_row_above_budget(case: tuple[np.ndarray, int]) -> None:
    lengths, budget = case
    rows = pack(lengths, budget)
    assert sorted(index for row in rows for index in row.tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= budget for row in rows)


@given(packable())
def test_no_two_rows_would_fit_into_one(case: tuple[np.ndarray, int]) -> None:
    lengths, budget = case
    sums = sorted(int(lengths[row].sum()) for row in pack(lengths, budget))
    assert len(sums) < 2 or sums[0] + sums[1] > budget


@given(st.integers(1, 60), st.integers(2, 300), st.integers(0, 2**32 - 1))
def test_within_the_bound_of_the_optimum(num_rows: int, budget: int, seed: int) -> None:
    """Full rows cut at random: `num_rows` is the optimum, 11/9 of it + 4 the bound of Johnson (1973)."""
    rng = np.random.default_rng(seed)
    cuts = [np.unique(rng.integers(1, budget, rng.integers(0, 8))) for _ in range(num_rows)]
    lengths = rng.permutation(np.concatenate([np.diff(np.r_[0, cut, budget]) for cut in cuts]))
    assert num_rows <= len(pack(lengths, budget)) <= 11 / 9 * num_rows + 4


@pytest.mark.parametrize("budget", [512, 4096, 65536])
def test_at_least_as_good_as_first_fit(budget: int) -> None:
    for seed in range(5):
        lengths = histories(1000, budget, seed)
        assert len(pack(lengths, budget)) <= first_fit(lengths, budget)


@pytest.mark.parametrize("budget", [4096, 16384, 65536])
def test_long_tailed_histories_fill_the_rows(budget: int) -> None:
    lengths = histories(5000, budget, seed=1)
    assert lengths.sum() / (len(pack(lengths, budget)) * budget) > 0.99


def test_order_of_equal_lengths_is_kept() -> None:
    assert [row.tolist() for row in pack(np.array([5, 5, 5, 5]), budget=10)] == [[0, 1], [2, 3]]


def test_nothing_to_pack() -> None:
    assert pack(np.array([], dtype=np.int64), budget=8) == []


@pytest.mark.parametrize("lengths", [[0, 3], [3, 9]])
def test_a_length_outside_the_budget_is_refused(lengths: list[int]) -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        pack(np.array(lengths), budget=8)
