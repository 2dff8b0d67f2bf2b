"""Per-code counts and value quantiles of a dataset of any size, gathered shard by shard.

A code's quantiles come from the SAMPLE_SIZE of its values with the smallest hashes. Such samples merge: the result
depends on the data alone, neither on the order of the shards nor on the number of processes or their memory.

Shape legend: R rows of a shard, C codes, K sampled values of all codes, Q quantile knots.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hymate.data.meds import Events
from hymate.hashing import seeded_hash

SAMPLE_SIZE = 2048
NUM_KNOTS = 33
# See `contradictions`. Units with a smaller factor between them (calcium 4, phosphate 3, magnesium 2.4, Fahrenheit) are
# of quantities that vary little, so that nearly all values are apart. Others do differ that much from ward to ward: the
# median of troponin T is 0.16 ng/mL in PhysioNet 2012 and 0.04 in the MIMIC-IV demo.
UNITS_FACTOR, LEAST_VALUES = 5, 20
PROBABILITIES = np.linspace(0, 1, NUM_KNOTS)
VOCABULARY_SCHEMA = pa.schema(
    [
        ("code", pa.string()),
        ("id", pa.int32()),
        ("count", pa.int64()),
        ("subjects", pa.int64()),
        ("value_count", pa.int64()),
        ("median", pa.float32()),
        ("scale", pa.float32()),
        ("quantiles", pa.list_(pa.float32())),
    ]
)
_HASH_BITS = np.uint64(40)  # a sample's key is its code, then its hash
_HASH_MASK = np.uint64((1 << 40) - 1)
_BUFFER = 1 << 20  # values held, at the least, before a sample is thinned out
# Knots whose distance measures the spread, and what it would be in standard deviations of a normal distribution.
# Many codes have half their values tied (a FiO2 of 1.0), so the wider pairs stand in where a narrower is 0.
_SPREADS = ((8, 24, 1.3490), (2, 30, 3.0684), (0, 32, 4.3))


class _Samples:
    """The values with the smallest hashes, SAMPLE_SIZE a code and whatever ties with the last of them."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # keys and values
        self._held = 0
        self._most = _BUFFER
        self._limit_C = np.zeros(0, np.uint64)  # keys above it cannot enter a code's sample any more

    def add(self, code_R: np.ndarray, hash_R: np.ndarray, value_R: np.ndarray, num_codes: int) -> None:
        fresh = np.full(num_codes - len(self._limit_C), np.iinfo(np.uint64).max, np.uint64)
        self._limit_C = np.concatenate([self._limit_C, fresh])
        key_R = (code_R.astype(np.uint64) << _HASH_BITS) | hash_R
        kept = key_R <= self._limit_C[code_R]
        self._parts.append((key_R[kept], value_R[kept]))
        self._held += int(kept.sum())
        if self._held > self._most:
            self._thin()
            self._most = self._held + max(self._held // 2, _BUFFER)  # so that thinning stays a fraction of the work

    def _thin(self) -> None:
        key_K, value_K = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        order = np.argsort(key_K)
        key_K, value_K = key_K[order], value_K[order]
        code_K = (key_K >> _HASH_BITS).astype(np.int64)
        size_C = np.bincount(code_K, minlength=len(self._limit_C))
        start_C = np.cumsum(size_C) - size_C
        full_C = np.flatnonzero(size_C >= SAMPLE_SIZE)
        self._limit_C[full_C] = key_K[start_C[full_C] + SAMPLE_SIZE - 1]
        kept = key_K <= self._limit_C[code_K]
        self._parts = [(key_K[kept], value_K[kept])]
        self._held = int(kept.sum())

    def sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """code_K (ascending), hash_K, value_K."""
        if not self._parts:
            return np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.float32)
        self._thin()
        key_K, value_K = self._parts[0]
        return (key_K >> _HASH_BITS).astype(np.int64), key_K & _HASH_MASK, value_K


class CodeStatistics:
    """Counts of the training events of each code, and samples of their values."""

    def __init__(self) -> None:
        self.code_ids: dict[str, int] = {}
        self._counts = np.zeros((3, 0), np.int64)  # events, subjects, values; one column a code
        self._samples = _Samples()

    def add(self, events: Events, is_train_R: np.ndarray, shard: str) -> None:
        """Count whole subjects' events, whose codes are numbered by `code_ids`."""
        num_codes = self._grow()
        code_R = events.code_R[is_train_R]
        subject_R = np.cumsum(np.diff(events.subject_id_R, prepend=events.subject_id_R[:1]) != 0)[is_train_R]
        pair_R = np.sort(subject_R * num_codes + code_R)
        first = np.diff(pair_R, prepend=-1) != 0
        value_R = events.value_R[is_train_R]
        has_value = ~np.isnan(value_R)
        row_R = np.flatnonzero(is_train_R)[has_value] + events.first_row
        for counts_C, codes in zip(self._counts, (code_R, pair_R[first] % num_codes, code_R[has_value]), strict=True):
            counts_C += np.bincount(codes, minlength=num_codes)
        seed = int.from_bytes(hashlib.blake2b(shard.encode(), digest_size=7).digest(), "big")
        self._samples.add(code_R[has_value], seeded_hash(row_R, seed) & _HASH_MASK, value_R[has_value], num_codes)

    def merge(self, other: pa.Table) -> None:
        """Add what `table` gave elsewhere."""
        id_C = np.array([self.code_ids.setdefault(c, len(self.code_ids)) for c in other["code"].to_pylist()], np.int32)
        num_codes = self._grow()
        for counts_C, name in zip(self._counts, ("count", "subjects", "value_count"), strict=True):
            counts_C[id_C] += other[name].to_numpy()
        hashes = other["hash"].combine_chunks()
        size_C = hashes.value_lengths().to_numpy()
        values = other["value"].combine_chunks()
        self._samples.add(np.repeat(id_C, size_C), hashes.flatten().to_numpy(), values.flatten().to_numpy(), num_codes)

    def _grow(self) -> int:
        fresh = len(self.code_ids) - self._counts.shape[1]
        self._counts = np.pad(self._counts, ((0, 0), (0, fresh)))
        return len(self.code_ids)

    def table(self) -> pa.Table:
        """What was gathered, one row a code, for `merge`."""
        num_codes = self._grow()
        code_K, hash_K, value_K = self._samples.sorted()
        offsets = _offsets(code_K, num_codes)
        return pa.table(
            {
                "code": pa.array(list(self.code_ids), pa.string()),
                "count": self._counts[0],
                "subjects": self._counts[1],
                "value_count": self._counts[2],
                "hash": pa.ListArray.from_arrays(offsets, hash_K),
                "value": pa.ListArray.from_arrays(offsets, value_K),
            }
        )

    def vocabulary(self) -> pa.Table:
        """vocabulary.parquet: one row a code, by (count descending, code), with its value statistics."""
        num_codes = self._grow()
        quantiles_CQ = _quantiles(*self._samples.sorted()[::2], num_codes)
        has_values = self._counts[2] > 0
        median_C = np.where(has_values, quantiles_CQ[:, NUM_KNOTS // 2], 0)
        table = pa.table(
            [
                pa.array(list(self.code_ids), pa.string()),
                pa.nulls(num_codes, pa.int32()),
                *(pa.array(counts_C) for counts_C in self._counts),
                pa.array(median_C.astype(np.float32)),
                pa.array(_scale(quantiles_CQ)),
                pa.ListArray.from_arrays(
                    np.concatenate([[0], np.cumsum(has_values * NUM_KNOTS)]).astype(np.int32),
                    quantiles_CQ[has_values].astype(np.float32).ravel(),
                ),
            ],
            schema=VOCABULARY_SCHEMA,
        )
        table = table.sort_by([("count", "descending"), ("code", "ascending")])
        ids = pa.array(np.arange(num_codes, dtype=np.int32))
        return table.set_column(1, VOCABULARY_SCHEMA.field("id"), ids)


def contradictions(vocabularies: Sequence[pa.Table]) -> list[dict[str, Any]]:
    """The codes whose values seem to have different units in two datasets, each given by its vocabulary.

    Each median lies outside of nearly all values (the middle seven eighths) of the other dataset; or outside of the
    middle half, and the medians differ by a factor above UNITS_FACTOR. Of each code its `medians`, None where a dataset
    has fewer than LEAST_VALUES.
    """
    values_of: dict[str, list[dict[str, Any] | None]] = {}
    for place, vocabulary in enumerate(vocabularies):
        for row in vocabulary.filter(pc.field("value_count") >= LEAST_VALUES).to_pylist():
            values_of.setdefault(row["code"], [None] * len(vocabularies))[place] = row
    return [
        {"code": code, "medians": [row and row["median"] for row in rows]}
        for code, rows in sorted(values_of.items())
        if any(_contradict(one, other) for one, other in itertools.combinations(filter(None, rows), 2))
    ]


def contradictions_within(vocabulary: pa.Table, variables: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The variables of which several codes are made whose values, by the rule of `contradictions`, seem to have
    different units; of each the medians by code.

    vocabulary: of these codes. variables: the variable of each code.
    """
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row in vocabulary.filter(pc.field("value_count") >= LEAST_VALUES).to_pylist():
        rows_of.setdefault(variables[row["code"]], []).append(row)
    return {
        variable: {row["code"]: row["median"] for row in rows}
        for variable, rows in sorted(rows_of.items())
        if any(_contradict(one, other) for one, other in itertools.combinations(rows, 2))
    }


def _contradict(one: dict[str, Any], other: dict[str, Any]) -> bool:
    low, high = sorted((abs(one["median"]), abs(other["median"])))
    pairs = (one["quantiles"], other["median"]), (other["quantiles"], one["median"])
    of_nearly_all, of_half = (all(not q[k] <= median <= q[-1 - k] for q, median in pairs) for k in (2, 8))
    return of_nearly_all or (of_half and high > UNITS_FACTOR * low)


def _offsets(code_K: np.ndarray, num_codes: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(code_K, minlength=num_codes))]).astype(np.int32)


def _quantiles(code_K: np.ndarray, value_K: np.ndarray, num_codes: int) -> np.ndarray:
    """Quantiles (C, Q) of each code's sampled values, linear between neighbours; NaN where there are none."""
    value_K = value_K[np.lexsort((value_K, code_K))].astype(np.float64)
    bound = _offsets(code_K, num_codes)
    start_C, size_C = bound[:-1, None], np.diff(bound)[:, None]
    position_CQ = PROBABILITIES * (size_C - 1).clip(0)
    low_CQ = np.floor(position_CQ).astype(np.int64)
    high_CQ = np.minimum(low_CQ + 1, (size_C - 1).clip(0))
    value_K = np.append(value_K, np.nan)
    low, high = value_K[start_C + low_CQ], value_K[start_C + high_CQ]
    return np.where(size_C > 0, low + (high - low) * (position_CQ - low_CQ), np.nan)


def _scale(quantiles_CQ: np.ndarray) -> np.ndarray:
    """Robust standard deviations (float32), 1 where all values are equal or there are none."""
    scale_C = np.zeros(len(quantiles_CQ))
    for low, high, deviations in _SPREADS:
        spread_C = (quantiles_CQ[:, high] - quantiles_CQ[:, low]) / deviations
        scale_C = np.where(scale_C > 0, scale_C, np.nan_to_num(spread_C))
    scale_C = np.minimum(scale_C, np.finfo(np.float32).max).astype(np.float32)
    return np.where(scale_C > 0, scale_C, np.float32(1))
