"""The vocabulary: ids, streamed statistics, normalisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hymate.data.meds import Events
from hymate.data.statistics import NUM_KNOTS, PROBABILITIES, SAMPLE_SIZE, CodeStatistics
from hymate.data.vocabulary import Z_LIMIT, Vocabulary
from hymate.errors import UserError
from hymate.model.batch import FIRST_CODE_ID, UNKNOWN_ID

CODES = {"HR": 0, "K": 1, "DIED": 2}


def events(code_R: np.ndarray, value_R: np.ndarray, subject_R: np.ndarray | None = None, first_row: int = 0) -> Events:
    subject_R = np.zeros(len(code_R), np.int64) if subject_R is None else subject_R
    columns = (subject_R, np.zeros(len(code_R), np.int64), code_R.astype(np.int32), value_R.astype(np.float32))
    return Events(*columns, first_row=first_row)


def statistics(rows: Events, is_train_R: np.ndarray | None = None, shard: str = "0") -> CodeStatistics:
    gathered = CodeStatistics()
    gathered.code_ids.update(CODES)
    gathered.add(rows, np.ones(len(rows), bool) if is_train_R is None else is_train_R, shard)
    return gathered


def vocabulary(values: dict[str, list[float]]) -> Vocabulary:
    """One event a value; codes by name."""
    code_R = np.repeat(np.arange(len(values)), [len(v) for v in values.values()])
    gathered = CodeStatistics()
    gathered.code_ids.update({code: id for id, code in enumerate(values)})
    gathered.add(events(code_R, np.concatenate(list(values.values()))), np.ones(len(code_R), bool), "0")
    return Vocabulary(gathered.vocabulary())


def test_counts_are_of_training_events_and_subjects() -> None:
    code_R = np.array([0, 0, 1, 0, 2, 1])
    value_R = np.array([80, np.nan, 4.0, 90, np.nan, 4.4])
    subject_R = np.array([7, 7, 7, 8, 8, 9])
    rows = statistics(events(code_R, value_R, subject_R), is_train_R=subject_R != 9).vocabulary().to_pylist()
    assert [(r["code"], r["id"], r["count"], r["subjects"], r["value_count"]) for r in rows] == [
        ("HR", 0, 3, 2, 2),
        ("DIED", 1, 1, 1, 0),
        ("K", 2, 1, 1, 1),
    ]


def test_quantiles_of_a_small_code_are_exact() -> None:
    values = np.random.default_rng(0).normal(size=SAMPLE_SIZE).astype(np.float32)
    row = statistics(events(np.zeros(SAMPLE_SIZE), values)).vocabulary().to_pylist()[0]
    np.testing.assert_allclose(row["quantiles"], np.quantile(values, PROBABILITIES), rtol=1e-5)
    assert row["median"] == pytest.approx(np.median(values))
    q25, q75 = np.quantile(values, [0.25, 0.75])
    assert row["scale"] == pytest.approx((q75 - q25) / 1.349, rel=1e-4)


def test_quantiles_of_a_large_code_come_from_a_fair_sample() -> None:
    values = np.arange(300_000.0)  # sorted, so that a sample that favours a part of the data shows
    row = statistics(events(np.zeros(len(values)), values)).vocabulary().to_pylist()[0]
    ranks = np.array(row["quantiles"]) / len(values)
    assert np.abs(ranks - PROBABILITIES).max() < 0.04  # 3.6 standard errors of a rank in a sample of 2,048


@settings(max_examples=30)
@given(order=st.permutations(range(4)), pieces=st.integers(1, 5))
def test_merging_depends_on_neither_order_nor_chunks(order: list[int], pieces: int) -> None:
    rng = np.random.default_rng(1)
    shards = [(rng.integers(0, 3, 4000), rng.normal(size=4000)) for _ in range(4)]

    def merged(order: list[int], pieces: int) -> pa.Table:
        total = CodeStatistics()
        for shard in order:
            part = CodeStatistics()
            part.code_ids.update(CODES)
            for rows in np.array_split(np.arange(4000), pieces):
                code_R, value_R = shards[shard]
                chunk = events(code_R[rows], value_R[rows], first_row=int(rows[0]))
                part.add(chunk, np.ones(len(rows), bool), str(shard))
            total.merge(part.table())
        return total.vocabulary().drop_columns("subjects")  # every chunk is a new subject here

    assert merged(list(order), pieces).equals(merged(list(range(4)), 1))


def test_ids_are_by_count_then_code_and_rare_codes_unknown(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.parquet"
    vocabulary({"K": [4.0] * 3, "HR": [80.0] * 5, "Na": [140.0] * 3, "pH": [7.4]}).write(path)
    known = Vocabulary.read(path, min_count=2)
    assert known.codes == ["HR", "K", "Na"] and known.size == 3 + FIRST_CODE_ID
    np.testing.assert_array_equal(known.ids_of(["Na", "pH", "HR", "?"]), [4, UNKNOWN_ID, 2, UNKNOWN_ID])
    np.testing.assert_array_equal(known.count_V, [0, 0, 5, 3, 3])


def test_codes_without_training_events_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.parquet"
    rows = events(np.array([0, 1]), np.array([80.0, 4.0]))
    table = statistics(rows, is_train_R=np.array([True, False])).vocabulary()
    assert table["code"].to_pylist() == ["HR", "DIED", "K"]
    pq.write_table(table, path)
    assert Vocabulary.read(path).codes == ["HR"]


def test_write_and_read_give_the_same_vocabulary(tmp_path: Path) -> None:
    first = vocabulary({"HR": [60.0, 80.0, 90.0], "DIED": [np.nan], "K": [4.0, 4.1]})
    first.write(tmp_path / "v.parquet")
    second = Vocabulary.read(tmp_path / "v.parquet")
    assert second.codes == first.codes
    for name in ("count_V", "median_V", "scale_V", "quantiles_VQ"):
        np.testing.assert_array_equal(getattr(second, name), getattr(first, name))


def test_a_missing_or_foreign_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.parquet"
    with pytest.raises(UserError, match=r"vocabulary\.parquet: missing or not a vocabulary"):
        Vocabulary.read(path)
    pq.write_table(pa.table({"code": ["HR"]}), path)
    with pytest.raises(UserError, match="prepare the dataset again"):
        Vocabulary.read(path)


def test_normalise_survives_recording_errors_and_missing_values() -> None:
    known = vocabulary({"pH": [*np.linspace(7.2, 7.5, 99), 735.0], "DIED": [np.nan], "MechVent": [1.0] * 10})
    ids = known.ids_of(["pH", "pH", "pH", "DIED", "MechVent", "?"])
    z, quantile = known.normalise(ids, np.array([7.35, 735, np.nan, 1.0, 1.0, 3.0], np.float32))
    assert z.dtype == quantile.dtype == np.float32
    assert abs(z[0]) < 0.1 and abs(quantile[0]) < 0.1
    assert z[1] == Z_LIMIT and quantile[1] == 1
    assert np.isnan(z[[2, 3, 5]]).all() and np.isnan(quantile[[2, 3, 5]]).all()
    assert z[4] == 0 and quantile[4] == 0  # in the middle of its ties


@settings(max_examples=30)
@given(hnp.arrays(np.float32, 50, elements=st.floats(-100, 100, width=32)))
def test_quantiles_rise_with_the_value_and_match_ranks(values: np.ndarray) -> None:
    known = vocabulary({"K": values.tolist()})
    probe = np.sort(np.concatenate([values, np.linspace(-150, 150, 31, dtype=np.float32)]))
    z, quantile = known.normalise(np.full(len(probe), 2), probe)
    assert (np.diff(z) >= 0).all() and (np.diff(quantile) >= -1e-6).all()
    assert (np.abs(quantile) <= 1).all() and (np.abs(z) <= Z_LIMIT).all()
    knots = known.quantiles_VQ[2]
    inside = (probe >= knots[0]) & (probe <= knots[-1]) & (knots[-1] > knots[0])
    below, upto = (knots < probe[:, None]).sum(1), (knots <= probe[:, None]).sum(1)
    rank = (quantile[inside] + 1) / 2 * (NUM_KNOTS - 1)
    assert (rank >= below[inside] - 1 - 1e-4).all() and (rank <= upto[inside] + 1e-4).all()
