"""Hashes that must be the same on every machine, of arrays and tensors alike."""

from __future__ import annotations

import numpy as np
import torch

from hymate.hashing import SPLITMIX_STEP, seeded_hash, splitmix64

# the first outputs of SplitMix64 that starts at 0 (prng.di.unimi.it/splitmix64.c)
OUTPUTS = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_outputs_are_those_of_splitmix64() -> None:
    state = np.arange(1, 4) * SPLITMIX_STEP
    assert splitmix64(state).view(np.uint64).tolist() == OUTPUTS
    assert seeded_hash(np.zeros(1, np.int64), seed=0).tolist() == OUTPUTS[:1]


def test_arrays_and_tensors_are_hashed_alike() -> None:
    state = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000)
    assert splitmix64(torch.from_numpy(state)).tolist() == splitmix64(state).tolist()
