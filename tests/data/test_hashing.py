"""Hashes that must be the same on every machine, of arrays and tensors alike."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from hymate.hashing import SPLITMIX_STEP, permuted, seeded_hash, splitmix64

# the first outputs of SplitMix64 that starts at 0 (prng.di.unimi.it/splitmix64.c)
OUTPUTS = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_outputs_are_those_of_splitmix64() -> None:
    state = np.arange(1, 4) * SPLITMIX_STEP
    assert splitmix64(state).view(np.uint64).tolist() == OUTPUTS
    assert seeded_hash(np.zeros(1, np.int64), seed=0).tolist() == OUTPUTS[:1]


def test_arrays_and_tensors_are_hashed_alike() -> None:
    state = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000)
    assert splitmix64(torch.from_numpy(state)).tolist() == splitmix64(state).tolist()


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_computed_order_has_everything_once(size: int, key: int) -> None:
    order_N = permuted(np.arange(size), size, key)
    assert np.array_equal(np.sort(order_N), np.arange(size))
    some_N = np.arange(0, size, 3)
    assert np.array_equal(permuted(some_N, size, key), order_N[some_N])


@pytest.mark.slow
def test_every_order_of_few_things_is_as_likely() -> None:
    for size in (2, 3, 4):
        orders = dict.fromkeys(permutations(range(size)), 0)
        for key in range(1000):
            orders[tuple(permuted(np.arange(size), size, key).tolist())] += 1
        assert chisquare(list(orders.values())).pvalue > 0.001


def test_many_things_are_well_mixed() -> None:
    """Where they go, how far, and what becomes their neighbour; and what one key does says nothing of the next."""
    size = 100_003
    place_N = np.arange(size)
    first_N, second_N = (permuted(place_N, size, key) for key in (7, 8))
    for found_N in (first_N, (first_N - place_N) % size, np.diff(first_N) % size, (second_N - first_N) % size):
        for part_N in (found_N[:3000], found_N[size // 2 :][:3000]):
            assert kstest(part_N / size, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(first_N, place_N)[0, 1]) < 0.02


def test_an_order_of_more_things_than_memory_holds_is_computed_where_it_is_needed() -> None:
    place_N = np.arange(10**15, 10**15 + 1000)
    found_N = permuted(place_N, 2 * 10**15, key=1)
    assert len(np.unique(found_N)) == 1000 and found_N.min() >= 0 and found_N.max() < 2 * 10**15
    assert found_N[0] == 1918299220508385  # the same on every machine
