"""A random vocabulary and histories of its codes, for streaming."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from hymate.data.histories import History
from hymate.data.statistics import NUM_KNOTS, VOCABULARY_SCHEMA
from hymate.data.vocabulary import Vocabulary
from hymate.model.batch import FIRST_CODE_ID


def random_vocabulary(size: int) -> Vocabulary:
    """`size` ids, the special ones included; the codes' values are normally distributed."""
    number = size - FIRST_CODE_ID
    ones, knots = np.ones(number), np.sort(np.random.default_rng(0).normal(size=NUM_KNOTS))
    columns = {
        "code": [f"LAB//{code:05}" for code in range(number)],
        "id": np.arange(number),
        **dict.fromkeys(("count", "subjects", "value_count", "scale"), ones),
        "median": np.zeros(number),
        "quantiles": [knots] * number,
    }
    arrays = [pa.array(columns[field.name]).cast(field.type) for field in VOCABULARY_SCHEMA]
    return Vocabulary(pa.table(arrays, VOCABULARY_SCHEMA))


def random_history(events: int, vocabulary: Vocabulary, seed: int = 0) -> History:
    """Up to ten minutes between events; a third without a value."""
    rng = np.random.default_rng(seed)
    value_L = np.where(rng.random(events) < 1 / 3, np.nan, rng.normal(size=events))
    return History(
        subject_id=1,
        birth_time=None,
        static_code=np.array([1], np.int32),
        static_value=np.array([0.5], np.float32),
        time=10**15 + np.cumsum(rng.integers(0, 600, events)) * 1_000_000,
        code=rng.integers(0, len(vocabulary.codes), events).astype(np.int32),
        value=value_L.astype(np.float32),
    )
