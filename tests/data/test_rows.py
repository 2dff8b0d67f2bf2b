"""Rows: the right events in the right row, and none after the prediction time."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from prepared_rows import BUDGET, CODES, CONTEXT, HOUR, YEAR, day_table, label_table, make_rows, subject, write_prepared

from hymate.data.examples import labelled_examples, united
from hymate.data.histories import Histories
from hymate.data.loader import Cursor, Rows
from hymate.data.vocabulary import Vocabulary
from hymate.model.batch import UNKNOWN_ID

# --------------------------------------------------------------------------------------------------- a row's content


def test_a_row_holds_what_the_histories_say(histories: Histories, vocabulary: Vocabulary) -> None:
    labels = pa.table(
        {
            "subject_id": histories.index.subject_id_P,
            "prediction_time": pa.array(np.full(43, 30 * YEAR + 70 * HOUR), pa.timestamp("us")),
            "boolean_value": [True, False, None] * 14 + [True],
        }
    )
    examples = labelled_examples(histories, labels, "train")
    truth_of = dict(zip(labels["subject_id"].to_pylist(), labels["boolean_value"].to_pylist(), strict=True))
    seen = []
    for batch, counts in make_rows(histories, vocabulary, examples, crop="last").once(rank=0, world_size=1):
        assert counts and batch.num_events == batch.cu_seqlens[-1] <= BUDGET
        for s, example in enumerate(batch.example_A.tolist()):
            seen.append(example)
            (history,) = histories.read(examples.position_E[[example]])
            assert history.subject_id == examples.subject_id_E[example]
            stop = int(np.sum(history.time <= 30 * YEAR + 70 * HOUR))
            start = max(0, stop - CONTEXT)
            time = history.time[start:stop]
            here = slice(batch.cu_seqlens[s], batch.cu_seqlens[s + 1])
            code = vocabulary.ids_of([CODES[c] for c in history.code[start:stop]])
            z, quantile = vocabulary.normalise(code, history.value[start:stop])
            expected = {
                "code_L": code,
                "value_L": z,
                "quantile_L": quantile,
                "time_hours_L": ((time - time[0]) / HOUR).astype(np.float32),
                "gap_hours_L": (np.diff(time, prepend=time[0]) / HOUR).astype(np.float32),
                "segment_L": np.full(len(time), s),
            }
            for name, values in expected.items():
                np.testing.assert_array_equal(getattr(batch, name)[here].numpy(), values)

            own = batch.static_segment_F == s
            static_id = vocabulary.ids_of([CODES[c] for c in history.static_code])
            static_z, static_quantile = vocabulary.normalise(static_id, history.static_value)
            assert batch.static_code_F[own].tolist() == static_id.tolist()
            np.testing.assert_array_equal(batch.static_value_F[own].numpy(), static_z)
            np.testing.assert_array_equal(batch.static_quantile_F[own].numpy(), static_quantile)

            end = 30 * YEAR + 70 * HOUR
            age = np.nan if history.birth_time is None else (end - history.birth_time) / YEAR
            truth = truth_of[history.subject_id]
            np.testing.assert_equal(batch.age_years_A[s].item(), np.float32(age))
            np.testing.assert_equal(batch.lag_hours_A[s].item(), np.float32((end - time[-1]) / HOUR))
            np.testing.assert_equal(batch.label_AT[s].item(), np.float32(np.nan if truth is None else truth))
    assert sorted(seen) == list(range(len(examples)))


def test_types_are_those_of_the_batch(rows: Rows) -> None:
    batch, _ = next(rows.once(0, 1))
    for name in ("code_L", "static_code_F", "example_A"):
        assert getattr(batch, name).dtype == torch.int64
    for name in ("segment_L", "static_segment_F"):
        assert getattr(batch, name).dtype == torch.int32
    floats = ("value_L", "quantile_L", "time_hours_L", "gap_hours_L", "static_value_F", "static_quantile_F")
    for name in (*floats, "age_years_A", "lag_hours_A", "label_AT", "days_AT", "label_weight_AT"):
        assert getattr(batch, name).dtype == torch.float32


def test_pretraining_has_no_label_and_ends_with_the_last_event(histories: Histories, rows: Rows) -> None:
    for batch, _ in rows.once(0, 1):
        assert batch.label_AT.shape == (batch.num_segments, 0) and not batch.lag_hours_A.any()
        for s, example in enumerate(batch.example_A.tolist()):
            (history,) = histories.read(rows.examples.position_E[[example]])
            known = history.birth_time is not None
            assert bool(batch.age_years_A[s].isnan()) != known
            assert not known or 70 < batch.age_years_A[s] < 71


def test_gaps_keep_microseconds_over_decades(tmp_path: Path, vocabulary: Vocabulary) -> None:
    one = subject(1, 4) | {"time": np.array([-YEAR, -YEAR + 1, 80 * YEAR, 80 * YEAR + 2])}
    histories = Histories.open(write_prepared(tmp_path, {"train/0": [one]}))
    batch, _ = next(make_rows(histories, vocabulary).once(0, 1))
    assert batch.gap_hours_L[[1, 3]].tolist() == [np.float32(1 / HOUR), np.float32(2 / HOUR)]


def test_rare_codes_become_unknown_and_are_counted(rows: Rows, vocabulary: Vocabulary) -> None:
    assert rows.events_read == 0
    codes = torch.cat([batch.code_L for batch, _ in rows.once(0, 1)])
    assert (rows.events_read, rows.events_unknown) == (len(codes), (codes == UNKNOWN_ID).sum())
    assert 0 < rows.events_unknown < 0.2 * rows.events_read
    assert codes.max() < vocabulary.size


# ------------------------------------------------------------------------------------------------ windows and labels


def test_every_window_start_is_equally_likely(tmp_path: Path, vocabulary: Vocabulary) -> None:
    one = subject(1, 12) | {"time": 30 * YEAR + HOUR * np.arange(12) ** 2}
    rows = make_rows(Histories.open(write_prepared(tmp_path, {"train/0": [one]})), vocabulary, context=8)
    gap_of_start = {float(2 * start + 1): start for start in range(5)}
    steps = islice(rows.steps(Cursor(), 1, 0, 1), 500)
    starts = [gap_of_start[batch.gap_hours_L[1].item()] for (batch,), _ in steps]
    counts = np.bincount(starts, minlength=5)
    assert ((counts - 100) ** 2 / 100).sum() < 13.3  # chi-squared with 4 degrees of freedom, 1 %
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 0.1


def test_crop_last_takes_the_end(histories: Histories, vocabulary: Vocabulary) -> None:
    rows = make_rows(histories, vocabulary, crop="last", context=8)
    for batch, _ in rows.once(0, 1):
        for s, history in enumerate(histories.read(rows.examples.position_E[batch.example_A.numpy()])):
            code = batch.code_L[batch.cu_seqlens[s] : batch.cu_seqlens[s + 1]]
            assert code.tolist() == vocabulary.ids_of([CODES[c] for c in history.code[-8:]]).tolist()


def test_early_views_end_between_start_and_prediction_and_change_by_epoch(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """A third of the labels start at an event, a third between two events, and of a third the start isn't known."""
    histories = Histories.open(write_prepared(tmp_path, {"train/0": [subject(i, 25) for i in range(90)]}))
    times = [history.time for history in histories.read(np.arange(90))]
    start = [None if i % 3 == 2 else int(time[10] - (i % 3)) for i, time in enumerate(times)]
    labels = pa.table(
        {
            "subject_id": list(range(90)),
            "prediction_time": pa.array([60 * YEAR] * 90, pa.timestamp("us")),
            "boolean_value": [True, False] * 45,
            "start": pa.array(start, pa.timestamp("us")),
        }
    )
    examples = labelled_examples(histories, labels, "train")
    earliest = [25 if start[i] is None else sum(time <= times[i][10]) for i, time in enumerate(times)]
    assert examples.earliest_E.tolist() == earliest
    settings: dict = {"crop": "last"}
    rows = make_rows(histories, vocabulary, examples, early_fraction=0.5, **settings)

    def epoch(number: int) -> dict[int, tuple[int, bool]]:
        found = {}
        for (row,), _ in rows.steps(Cursor(number), rows_per_step=1, rank=0, world_size=1):
            lengths = np.diff(row.cu_seqlens).tolist()
            for example, length, lag in zip(row.example_A.tolist(), lengths, row.lag_hours_A.tolist(), strict=True):
                if example in found:
                    return found
                found[example] = (length, lag == 0)
        raise AssertionError

    first, second = epoch(0), epoch(1)
    for views in (first, second):
        early = {example: length for example, (length, is_early) in views.items() if is_early}
        assert 15 <= len(early) <= 45 and min(early.values()) < 21
        for example, length in early.items():
            begun = start[example]
            assert begun is not None and times[example][length - 1] >= begun
            assert 25 - length <= (25 - earliest[example]) / 2
        assert {length for length, is_early in views.values() if not is_early} == {25}
    assert first != second and first == epoch(0)
    plain = make_rows(histories, vocabulary, examples, **settings)
    once, all_once = ([row for row, _ in each.once(rank=0, world_size=1)] for each in (rows, plain))
    for row, expected in zip(once, all_once, strict=True):
        assert torch.equal(row.code_L, expected.code_L) and torch.equal(row.lag_hours_A, expected.lag_hours_A)


@pytest.mark.parametrize("unit", ["us", "ns", "s"])
def test_no_event_after_the_prediction_time(tmp_path: Path, vocabulary: Vocabulary, unit: str) -> None:
    noon = 30 * YEAR
    one = subject(5, 5) | {"time": np.array([noon - HOUR, noon - 1, noon, noon, noon + 1])}
    histories = Histories.open(write_prepared(tmp_path, {"held_out/0": [one]}))
    time = pa.array([noon], pa.timestamp("us")).cast(pa.timestamp(unit))
    labels = pa.table({"subject_id": [5], "prediction_time": time, "boolean_value": [True]})
    rows = make_rows(histories, vocabulary, labelled_examples(histories, labels, "held_out"), crop="last")
    batch, _ = next(rows.once(0, 1))
    assert batch.num_events == 4 and batch.lag_hours_A.tolist() == [0.0]
    assert batch.time_hours_L.tolist() == [0.0, np.float32((HOUR - 1) / HOUR), 1.0, 1.0]


def test_labels_bring_their_weights(histories: Histories, vocabulary: Vocabulary) -> None:
    ids = histories.index.subject_id_P[histories.positions("train")][:3].tolist()
    labels = label_table([ids[2], ids[0], ids[1]], [50, 50, 50], [True, False, True])
    assert labelled_examples(histories, labels, "train").weight_E.tolist() == [1, 1, 1]
    labels = labels.append_column("weight", pa.array([2.5, 1.0, 1.25], pa.float32()))
    examples = labelled_examples(histories, labels, "train")
    assert examples.weight_E.tolist() == [1.0, 1.25, 2.5]
    for batch, _ in make_rows(histories, vocabulary, examples, crop="last").once(0, 1):
        assert torch.equal(batch.label_weight_AT[:, 0], torch.from_numpy(examples.weight_E)[batch.example_A])


def test_rows_carry_the_labels_of_all_tasks(histories: Histories, vocabulary: Vocabulary) -> None:
    ids = histories.index.subject_id_P[histories.positions("train")].tolist()
    always = label_table(ids, [90] * len(ids), [True] * len(ids))
    often = day_table(label_table(ids[::3], [90] * len(ids[::3]), [False] * len(ids[::3])), list(range(len(ids[::3]))))
    parts = [labelled_examples(histories, table, "train") for table in (always, often)]
    assert all((part.weight_E == 1).all() for part in parts)
    weight_E = np.linspace(0.5, 2, len(parts[1]), dtype=np.float32)
    parts[1] = dataclasses.replace(parts[1], weight_ET=weight_E[:, None])
    examples = united(parts)
    np.testing.assert_array_equal(
        examples.weight_ET[~np.isnan(examples.label_ET[:, 1])], np.stack([weight_E**0, weight_E], 1)
    )
    for batch, _ in make_rows(histories, vocabulary, examples, crop="last").once(0, 1):
        np.testing.assert_array_equal(batch.label_AT, examples.label_ET[batch.example_A])
        np.testing.assert_array_equal(batch.days_AT, examples.days_ET[batch.example_A])
        np.testing.assert_array_equal(batch.label_weight_AT, examples.weight_ET[batch.example_A])
