"""A prepared dataset of random histories in tiny row groups, rows of it, and labels for it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hymate.data.examples import Examples, pretraining_examples
from hymate.data.histories import HISTORY_SCHEMA, Histories
from hymate.data.index import INDEX_SCHEMA
from hymate.data.loader import Cursor, Rows
from hymate.data.statistics import NUM_KNOTS, VOCABULARY_SCHEMA
from hymate.data.vocabulary import Vocabulary
from hymate.model.batch import Batch

CODES = [f"LAB//{i}" for i in range(12)] + ["SEX//F", "HEIGHT", "RARE"]

COUNTS = [100 - i for i in range(12)] + [50, 40, 1]

HOUR = 3_600_000_000

YEAR = 31_557_600_000_000

CONTEXT, BUDGET = 32, 64


def events_per_epoch(rows: Rows) -> int:
    """After cutting to the context."""
    return int(np.minimum(rows.examples.stop_E[np.asarray(rows._last_N)], rows.context).sum())


def rows_per_epoch(rows: Rows) -> int:
    """Of epoch 0; later epochs differ by a few where the data fills several shuffle blocks."""
    return sum(1 for _ in rows._order(0))


def subject(subject_id: int, length: int) -> dict:
    rng = np.random.default_rng(subject_id)
    value = rng.normal(size=length).astype(np.float32)
    value[rng.random(length) < 0.3] = np.nan
    statics = subject_id % 3
    return {
        "subject_id": subject_id,
        "birth_time": None if subject_id % 4 == 0 else -40 * YEAR - subject_id,
        "static_code": [12, 13][:statics],
        "static_value": [np.nan, 1.7][:statics],
        "time": np.cumsum(rng.integers(0, 5 * HOUR, length)) + 30 * YEAR,
        "code": rng.integers(0, len(CODES), length).astype(np.int32),
        "value": value,
    }


def write_prepared(root: Path, shards: dict[str, list[dict]], per_group: int = 5) -> Path:
    """A prepared dataset with tiny row groups; a shard's name starts with its split."""
    index = []
    for shard, subjects in shards.items():
        path = root / "histories" / f"{shard}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(subjects, schema=HISTORY_SCHEMA), path, row_group_size=per_group)
        index += [
            {
                "subject_id": one["subject_id"],
                "split": shard.split("/")[0],
                "shard": shard,
                "row_group": i // per_group,
                "row": i % per_group,
                "num_events": len(one["time"]),
            }
            for i, one in enumerate(subjects)
        ]
    pq.write_table(pa.Table.from_pylist(index, schema=INDEX_SCHEMA), root / "histories" / "index.parquet")
    quantiles = np.linspace(-2, 2, NUM_KNOTS).tolist()
    vocabulary = [
        {"code": code, "id": i, "count": count, "subjects": count, "value_count": count, "median": 0.5, "scale": 2.0}
        | {"quantiles": quantiles}
        for i, (code, count) in enumerate(zip(CODES, COUNTS, strict=True))
    ]
    table = pa.Table.from_pylist(vocabulary, schema=VOCABULARY_SCHEMA)
    pq.write_table(table, root / "histories" / "vocabulary.parquet")
    sizes = {split: {"subjects": count} for split, count in Counter(row["split"] for row in index).items()}
    metadata = {"format_version": 1, "source": "test", "fingerprint": "0", "splits": sizes}
    (root / "histories" / "metadata.json").write_text(json.dumps(metadata))
    return root


def make_rows(
    histories: Histories, vocabulary: Vocabulary, examples: Examples | None = None, **changes: object
) -> Rows:
    settings: dict = {"context": CONTEXT, "tokens_per_row": BUDGET, "seed": 3, "crop": "random"}
    return Rows(histories, vocabulary, examples or pretraining_examples(histories, "train"), **settings | changes)


def label_table(subject_ids: list[int], hours: Sequence[float], truth: Sequence[bool | None] | None = None) -> pa.Table:
    time = pa.array([int(30 * YEAR + hour * HOUR) for hour in hours], pa.timestamp("us"))
    columns = {"subject_id": pa.array(subject_ids, pa.int64()), "prediction_time": time}
    return pa.table(columns if truth is None else columns | {"boolean_value": pa.array(truth, pa.bool_())})


def day_table(table: pa.Table, days: Sequence[float | None]) -> pa.Table:
    return table.append_column("float_value", pa.array(days, pa.float32()))


def take(rows: Rows, cursor: Cursor, num_steps: int, rows_per_step: int, world_size: int) -> tuple[list[Batch], Cursor]:
    """The global sequence of rows that `world_size` ranks see together, and the cursor behind it."""
    ranks = [list(islice(rows.steps(cursor, rows_per_step, rank, world_size), num_steps)) for rank in range(world_size)]
    sequence = []
    for steps in zip(*ranks, strict=True):
        assert len({after for _, after in steps}) == 1
        assert all(len(batches) == rows_per_step // world_size for batches, _ in steps)
        sequence += [batches[i] for i in range(rows_per_step // world_size) for batches, _ in steps]
    return sequence, ranks[0][-1][1]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name, expected in dataclasses.asdict(a).items():
            got = getattr(b, name)
            if isinstance(expected, torch.Tensor):
                assert got.dtype == expected.dtype
                np.testing.assert_array_equal(got, expected)
            else:
                assert got == expected, name
