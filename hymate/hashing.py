"""Hashes: of numbers, where a random draw must not depend on what was drawn before it, and of files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Integers = TypeVar("Integers", np.ndarray, "Tensor")

FEISTEL_ROUNDS = 12  # of few numbers, fewer rounds leave some orders rarer than others
SPLITMIX_STEP = 0x9E3779B97F4A7C15 - 2**64  # between the states of SplitMix64


def splitmix64(state: Integers) -> Integers:
    """SplitMix64's output at each state (Steele, Lea and Flood 2014): 64 well mixed bits, the same on every machine.

    state: an array or a tensor of int64, whose bits are taken as unsigned; so are those of the result.
    """
    x = state
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ shifted_right(x, shift)) * factor
    return x ^ shifted_right(x, 31)


def seeded_hash(key_N: np.ndarray, seed: int) -> np.ndarray:
    """Hashes (uint64) of integer keys, others for each seed."""
    start = np.uint64((seed + 1) * SPLITMIX_STEP % 2**64).astype(np.int64)
    return splitmix64(key_N.astype(np.int64) + start).view(np.uint64)


def permuted(place_N: np.ndarray, size: int, key: int) -> np.ndarray:
    """What a random order of range(size) has at some places, int64 (N,): computed for these, never held as a whole.

    Each key (0 to 2^64 - 1) gives another order. A Feistel network permutes the 4^h numbers that `size` fits into; what
    it sends outside goes through it again (cycle walking, Black and Rogaway 2002).
    """
    half, bits = max(1, ((size - 1).bit_length() + 1) // 2), np.array([key], np.uint64).view(np.int64)
    is_odd = splitmix64(bits) & 1  # the network's own permutations are even, half of all
    found_N = place_N.astype(np.int64)
    outside_N = np.ones(len(found_N), dtype=bool)
    while outside_N.any():
        x = found_N[outside_N]
        x = np.where(x < 2, x ^ is_odd, x)
        left, right = x >> half, x & ((1 << half) - 1)
        for number in range(FEISTEL_ROUNDS):
            mixed = splitmix64(seeded_hash(right, number).view(np.int64) ^ bits)
            left, right = right, left ^ shifted_right(mixed, 64 - half)
        found_N[outside_N] = (left << half) | right
        outside_N = found_N >= size
    return found_N


def shifted_right(x: Integers, bits: int) -> Integers:
    """int64 shifted as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
