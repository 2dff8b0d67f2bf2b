"""Loading: the right events in the right row, an order that any number of workers shares, no event from the future."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hymate.config import TaskConfig
from hymate.data import loader
from hymate.data.examples import Examples, labelled_examples, pretraining_examples, require_both_classes, united
from hymate.data.histories import HISTORY_SCHEMA, INDEX_SCHEMA, Histories, History
from hymate.data.loader import Cursor, Rows
from hymate.data.packing import pack
from hymate.data.statistics import NUM_KNOTS, VOCABULARY_SCHEMA
from hymate.data.vocabulary import Vocabulary
from hymate.errors import UserError
from hymate.model.batch import UNKNOWN_ID, Batch

CODES = [f"LAB//{i}" for i in range(12)] + ["SEX//F", "HEIGHT", "RARE"]
COUNTS = [100 - i for i in range(12)] + [50, 40, 1]
HOUR = 3_600_000_000
YEAR = 31_557_600_000_000
CONTEXT, BUDGET = 32, 64


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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 43).tolist()
    lengths[7] = 0
    subjects = [subject(1000 - i, length) for i, length in enumerate(lengths)]
    shards = {"train/0": subjects[:18], "train/1": subjects[18:31], "tuning/0": subjects[31:]}
    return write_prepared(tmp_path_factory.mktemp("prepared"), shards)


@pytest.fixture(scope="module")
def histories(dataset: Path) -> Histories:
    return Histories.open(dataset)


@pytest.fixture(scope="module")
def vocabulary(dataset: Path) -> Vocabulary:
    return Vocabulary.read(dataset / "histories" / "vocabulary.parquet", min_count=10)


def make_rows(
    histories: Histories, vocabulary: Vocabulary, examples: Examples | None = None, **changes: object
) -> Rows:
    settings: dict = {"context": CONTEXT, "tokens_per_row": BUDGET, "seed": 3, "crop": "random"}
    return Rows(histories, vocabulary, examples or pretraining_examples(histories, "train"), **settings | changes)


@pytest.fixture
def rows(histories: Histories, vocabulary: Vocabulary) -> Rows:
    return make_rows(histories, vocabulary)


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


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hymate-loader")]


# --------------------------------------------------------------------------------------------------- a row's content


def test_a_row_holds_what_the_histories_say(histories: Histories, vocabulary: Vocabulary) -> None:
    labels = pa.table(
        {
            "subject_id": histories.index["subject_id"],
            "prediction_time": pa.array(np.full(43, 30 * YEAR + 70 * HOUR), pa.timestamp("us")),
            "boolean_value": [True, False, None] * 14 + [True],
        }
    )
    examples = labelled_examples(histories, labels, "train")
    truth_of = dict(zip(labels["subject_id"].to_pylist(), labels["boolean_value"].to_pylist(), strict=True))
    seen = []
    for batch, counts in make_rows(histories, vocabulary, examples, crop="last").once(rank=0, world_size=1):
        assert counts and batch.num_events == batch.cu_seqlens[-1] <= BUDGET
        for s, example in enumerate(batch.example_S.tolist()):
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
            np.testing.assert_equal(batch.age_years_S[s].item(), np.float32(age))
            np.testing.assert_equal(batch.lag_hours_S[s].item(), np.float32((end - time[-1]) / HOUR))
            np.testing.assert_equal(batch.label_ST[s].item(), np.float32(np.nan if truth is None else truth))
    assert sorted(seen) == list(range(len(examples)))


def test_types_are_those_of_the_batch(rows: Rows) -> None:
    batch, _ = next(rows.once(0, 1))
    for name in ("code_L", "static_code_F", "example_S"):
        assert getattr(batch, name).dtype == torch.int64
    for name in ("segment_L", "static_segment_F"):
        assert getattr(batch, name).dtype == torch.int32
    floats = ("value_L", "quantile_L", "time_hours_L", "gap_hours_L", "static_value_F", "static_quantile_F")
    for name in (*floats, "age_years_S", "lag_hours_S", "label_ST", "days_ST", "label_weight_ST"):
        assert getattr(batch, name).dtype == torch.float32


def test_pretraining_has_no_label_and_ends_with_the_last_event(histories: Histories, rows: Rows) -> None:
    for batch, _ in rows.once(0, 1):
        assert batch.label_ST.shape == (batch.num_segments, 0) and not batch.lag_hours_S.any()
        for s, example in enumerate(batch.example_S.tolist()):
            (history,) = histories.read(rows.examples.position_E[[example]])
            known = history.birth_time is not None
            assert bool(batch.age_years_S[s].isnan()) != known
            assert not known or 70 < batch.age_years_S[s] < 71


def test_gaps_keep_microseconds_over_decades(tmp_path: Path, vocabulary: Vocabulary) -> None:
    one = subject(1, 4) | {"time": np.array([-YEAR, -YEAR + 1, 80 * YEAR, 80 * YEAR + 2])}
    histories = Histories.open(write_prepared(tmp_path, {"train/0": [one]}))
    batch, _ = next(make_rows(histories, vocabulary).once(0, 1))
    assert batch.gap_hours_L[[1, 3]].tolist() == [np.float32(1 / HOUR), np.float32(2 / HOUR)]


def test_rare_codes_become_unknown_and_are_counted(rows: Rows, vocabulary: Vocabulary) -> None:
    assert np.isnan(rows.unknown_share)
    codes = torch.cat([batch.code_L for batch, _ in rows.once(0, 1)])
    assert 0 < rows.unknown_share == (codes == UNKNOWN_ID).double().mean().item() < 0.2
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
        for s, history in enumerate(histories.read(rows.examples.position_E[batch.example_S.numpy()])):
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
    rows = make_rows(histories, vocabulary, examples, early_share=0.5, **settings)

    def epoch(number: int) -> dict[int, tuple[int, bool]]:
        found = {}
        for (row,), _ in rows.steps(Cursor(number), rows_per_step=1, rank=0, world_size=1):
            lengths = np.diff(row.cu_seqlens).tolist()
            for example, length, lag in zip(row.example_S.tolist(), lengths, row.lag_hours_S.tolist(), strict=True):
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
        assert torch.equal(row.code_L, expected.code_L) and torch.equal(row.lag_hours_S, expected.lag_hours_S)


@pytest.mark.parametrize("unit", ["us", "ns", "s"])
def test_no_event_after_the_prediction_time(tmp_path: Path, vocabulary: Vocabulary, unit: str) -> None:
    noon = 30 * YEAR
    one = subject(5, 5) | {"time": np.array([noon - HOUR, noon - 1, noon, noon, noon + 1])}
    histories = Histories.open(write_prepared(tmp_path, {"held_out/0": [one]}))
    time = pa.array([noon], pa.timestamp("us")).cast(pa.timestamp(unit))
    labels = pa.table({"subject_id": [5], "prediction_time": time, "boolean_value": [True]})
    rows = make_rows(histories, vocabulary, labelled_examples(histories, labels, "held_out"), crop="last")
    batch, _ = next(rows.once(0, 1))
    assert batch.num_events == 4 and batch.lag_hours_S.tolist() == [0.0]
    assert batch.time_hours_L.tolist() == [0.0, np.float32((HOUR - 1) / HOUR), 1.0, 1.0]


def label_table(subject_ids: list[int], hours: Sequence[float], truth: Sequence[bool | None] | None = None) -> pa.Table:
    time = pa.array([int(30 * YEAR + hour * HOUR) for hour in hours], pa.timestamp("us"))
    columns = {"subject_id": pa.array(subject_ids, pa.int64()), "prediction_time": time}
    return pa.table(columns if truth is None else columns | {"boolean_value": pa.array(truth, pa.bool_())})


def test_labels_without_events_or_subject_are_dropped_and_counted(histories: Histories) -> None:
    ids = histories.index["subject_id"].tolist()
    labels = label_table([ids[0], 7, ids[0], ids[7], ids[40], ids[2]], [50, 50, -1e5, 50, 50, 60], [True] * 5 + [None])
    examples = labelled_examples(histories, labels, "train")
    assert examples.dropped == {"unknown_subject": 1, "without_events": 2, "positives_without_events": 2}
    assert examples.subject_id_E.tolist() == [ids[0], ids[2]]
    np.testing.assert_array_equal(examples.label_E, [1, np.nan])
    assert labelled_examples(histories, labels, "tuning").subject_id_E.tolist() == [ids[40]]


def test_examples_do_not_depend_on_the_order_of_labels(histories: Histories) -> None:
    ids = histories.index["subject_id"][histories.rows_of("train")].tolist()
    labels = label_table(ids * 2, [40] * len(ids) + [90] * len(ids), [True] * len(ids) + [False] * len(ids))
    shuffled = labels.take(np.random.default_rng(0).permutation(len(labels)))
    expected, got = (dataclasses.asdict(labelled_examples(histories, table, "train")) for table in (labels, shuffled))
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


def test_labels_bring_their_weights(histories: Histories, vocabulary: Vocabulary) -> None:
    ids = histories.index["subject_id"][histories.rows_of("train")][:3].tolist()
    labels = label_table([ids[2], ids[0], ids[1]], [50, 50, 50], [True, False, True])
    assert labelled_examples(histories, labels, "train").weight_E.tolist() == [1, 1, 1]
    labels = labels.append_column("weight", pa.array([2.5, 1.0, 1.25], pa.float32()))
    examples = labelled_examples(histories, labels, "train")
    assert examples.weight_E.tolist() == [1.0, 1.25, 2.5]
    for batch, _ in make_rows(histories, vocabulary, examples, crop="last").once(0, 1):
        assert torch.equal(batch.label_weight_ST[:, 0], torch.from_numpy(examples.weight_E)[batch.example_S])


def test_labels_without_truth_are_scored_too(histories: Histories) -> None:
    examples = labelled_examples(histories, label_table([int(histories.index["subject_id"][0])], [50]), "train")
    assert np.isnan(examples.label_E).all()


def day_table(table: pa.Table, days: Sequence[float | None]) -> pa.Table:
    return table.append_column("float_value", pa.array(days, pa.float32()))


def test_examples_of_several_tasks_are_the_union_of_their_times(histories: Histories) -> None:
    a, b = histories.index["subject_id"][histories.rows_of("train")][:2].tolist()
    readmission = label_table([b, a, a], [60, 90, 50], [False, True, False])
    stay = day_table(label_table([a, b, b], [50, 40, 60], [True, False, True]), [8.5, 2.0, None])
    examples = united([labelled_examples(histories, table, "train") for table in (readmission, stay)])
    nan = np.nan
    expected = {(a, 50): (0, 1, 8.5), (a, 90): (1, nan, nan), (b, 40): (nan, 0, 2.0), (b, 60): (0, 1, nan)}
    hours = ((examples.prediction_time_E - 30 * YEAR) / HOUR).astype(int).tolist()
    assert list(zip(examples.subject_id_E.tolist(), hours, strict=True)) == list(expected)
    found_E3 = np.column_stack([examples.label_ET, examples.days_ET[:, 1]])
    np.testing.assert_array_equal(found_E3, np.array(list(expected.values())))
    assert np.isnan(examples.days_ET[:, 0]).all()
    for example, history in enumerate(histories.read(examples.position_E)):
        assert examples.stop_E[example] == np.sum(history.time <= examples.prediction_time_E[example])


def test_the_union_of_one_task_is_that_task(histories: Histories) -> None:
    ids = histories.index["subject_id"][histories.rows_of("train")].tolist()
    labels = label_table([*ids, ids[0], ids[0]], [50] * (len(ids) + 2), [True] * len(ids) + [False, True])
    one = labelled_examples(histories, labels, "train")
    assert (one.position_E == 0).sum() == 3  # several labels at one time are as many examples
    again = dataclasses.replace(united([one]), dropped=one.dropped)
    for name, values in dataclasses.asdict(again).items():
        np.testing.assert_array_equal(values, getattr(one, name))


def test_rows_carry_the_labels_of_all_tasks(histories: Histories, vocabulary: Vocabulary) -> None:
    ids = histories.index["subject_id"][histories.rows_of("train")].tolist()
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
        np.testing.assert_array_equal(batch.label_ST, examples.label_ET[batch.example_S])
        np.testing.assert_array_equal(batch.days_ST, examples.days_ET[batch.example_S])
        np.testing.assert_array_equal(batch.label_weight_ST, examples.weight_ET[batch.example_S])


@pytest.mark.parametrize("split", ["train", "no_such_split"])
def test_nothing_left_is_one_line_that_names_the_cause(histories: Histories, split: str) -> None:
    of = {name: histories.index["subject_id"][histories.rows_of(name)].tolist() for name in ("train", "tuning")}
    causes = {
        "none of the 2 labels is of a subject of the dataset": label_table([1, 2], [5, 5], [True, False]),
        f"no label is of a subject in split '{split}': of 2 labels 1 in tuning and 1 of unknown": label_table(
            [of["tuning"][0], 7], [50, 50], [True, False]
        ),
    }
    if split == "train":
        early = label_table(of["train"][:2] + of["tuning"][:1], [-1e5] * 3, [True] * 3)
        causes["all 2 labels of split 'train' have prediction times before the first event"] = early
    for message, labels in causes.items():
        with pytest.raises(UserError, match=message) as caught:
            labelled_examples(histories, labels, split)
        assert "\n" not in str(caught.value)
        assert len(labelled_examples(histories, labels, split, required=False)) == 0


def test_labels_that_are_alike_for_want_of_events_are_told_as_that(histories: Histories) -> None:
    ids = histories.index["subject_id"][histories.rows_of("train")][:4].tolist()
    for early in (True, False):  # these lie before the first event
        labels = label_table(ids, [-1e5, -1e5, 50, 50], [early, early, not early, not early])
        examples = {"train": labelled_examples(histories, labels, "train")}
        with pytest.raises(UserError, match=rf"2 more \({2 * early} positive\) were left out, .*prediction times"):
            require_both_classes(TaskConfig("made-up"), examples)


def test_a_split_without_histories_is_one_clear_line(histories: Histories) -> None:
    with pytest.raises(UserError, match="no subject is in the no_such_split split"):
        pretraining_examples(histories, "no_such_split")


def test_a_history_without_events_is_left_out(histories: Histories) -> None:
    examples = pretraining_examples(histories, "train")
    assert len(examples) == 30 and examples.dropped == {"without_events": 1}


# ------------------------------------------------------------------------------------------------------------- order


def test_every_epoch_visits_every_example_once(rows: Rows) -> None:
    orders = []
    for epoch in range(3):
        batches, after = take(rows, Cursor(epoch), rows.rows_per_epoch, 1, 1)
        assert (after.epoch, after.row) == (epoch, rows.rows_per_epoch)
        orders.append([tuple(sorted(batch.example_S.tolist())) for batch in batches])
        assert sorted(example for row in orders[-1] for example in row) == list(range(len(rows.examples)))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("block_events", [1, 300, 4_000_000])
def test_rows_run_on_across_epochs(rows: Rows, monkeypatch: pytest.MonkeyPatch, block_events: int) -> None:
    """With 8 rows a step the epochs' ends fall inside steps; no row is lost there."""
    monkeypatch.setattr(loader, "BLOCK_EVENTS", block_events)
    batches, _ = take(rows, Cursor(), 8, 8, 1)
    visits = np.concatenate([batch.example_S.numpy() for batch in batches])
    counts = np.bincount(visits, minlength=len(rows.examples))
    assert counts.min() >= 2 and counts.max() - counts.min() <= 1
    assert len({batch.seed for batch in batches}) == len(batches)


@settings(max_examples=15, deadline=None)
@given(world_size=st.sampled_from([1, 2, 4]), resumed=st.sampled_from([1, 2, 4]), cut=st.integers(1, 7))
def test_resuming_anywhere_on_any_world_size_goes_on_exactly(
    histories: Histories, vocabulary: Vocabulary, world_size: int, resumed: int, cut: int
) -> None:
    expected, end = take(make_rows(histories, vocabulary), Cursor(), 8, 4, 1)
    before, cursor = take(make_rows(histories, vocabulary), Cursor(), cut, 4, world_size)
    cursor = Cursor(**json.loads(json.dumps(dataclasses.asdict(cursor))))
    after, end_resumed = take(make_rows(histories, vocabulary), cursor, 8 - cut, 4, resumed)
    assert_same(before + after, expected)
    assert end == end_resumed


def test_resuming_packs_no_block_before_the_cursors(
    histories: Histories, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "BLOCK_EVENTS", 1)
    rows = make_rows(histories, vocabulary)
    expected, cursor = take(rows, Cursor(), rows.rows_per_epoch, 1, 1)
    assert cursor.block >= 2
    packed = []
    monkeypatch.setattr(loader, "pack", lambda lengths, budget: packed.append(len(lengths)) or pack(lengths, budget))
    last = dataclasses.replace(cursor, row=cursor.row - 1)
    with contextlib.closing(make_rows(histories, vocabulary).steps(last, 1, 0, 1)) as steps:
        batches, after = next(steps)
    assert_same(batches, expected[-1:])
    assert after == cursor and packed[0] == sum(len(batch.example_S) for batch in expected[-(cursor.row) :])


def test_rows_per_step_changes_no_row(rows: Rows) -> None:
    assert_same(take(rows, Cursor(), 6, 2, 1)[0], take(rows, Cursor(), 2, 6, 2)[0])


def test_what_is_drawn_for_an_example_does_not_depend_on_its_row(histories: Histories, vocabulary: Vocabulary) -> None:
    seeds = []
    for budget in (CONTEXT, BUDGET, 2 * BUDGET):
        rows = make_rows(histories, vocabulary, tokens_per_row=budget)
        batches, _ = take(rows, Cursor(1), rows.rows_per_epoch, 1, 1)
        pairs = [zip(batch.example_S.tolist(), batch.seed_S.tolist(), strict=True) for batch in batches]
        seeds.append(dict(pair for row in pairs for pair in row))
        assert len(set(seeds[-1].values())) == len(rows.examples) and min(seeds[-1].values()) >= 0
    assert seeds[0].keys() >= set(range(len(rows.examples)))
    assert all(seeds[0][e] == other[e] for other in seeds[1:] for e in range(len(rows.examples)) if e in other)


def test_the_order_is_the_same_on_every_machine(rows: Rows) -> None:
    """Values of another process: a change here breaks the resuming of everybody's runs."""
    ((batch,), _) = next(rows.steps(Cursor(epoch=2, row=5), 1, 0, 1))
    assert (batch.seed, batch.example_S.tolist()) == (6544075218902629905, [10, 9])
    assert 0 <= batch.seed < 2**63


def test_another_seed_is_another_order(histories: Histories, vocabulary: Vocabulary) -> None:
    first, second = (take(make_rows(histories, vocabulary, seed=seed), Cursor(), 4, 4, 1)[0] for seed in (0, 1))
    assert [b.example_S.tolist() for b in first] != [b.example_S.tolist() for b in second]
    assert not {b.seed for b in first} & {b.seed for b in second}


def test_reads_stay_in_a_block_of_row_groups(rows: Rows, histories: Histories, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of one row group: rows never mix groups, a group is finished before the next, groups are shuffled."""
    monkeypatch.setattr(loader, "BLOCK_EVENTS", 1)
    orders = []
    for epoch in range(2):
        visited: list[tuple[str, int]] = []
        for batch in take(rows, Cursor(epoch), rows.rows_per_epoch, 1, 1)[0]:
            position = rows.examples.position_E[batch.example_S.numpy()]
            groups = {(str(histories.index["shard"][p]), int(histories.index["row_group"][p])) for p in position}
            assert len(groups) == 1
            visited += [group for group in groups if visited[-1:] != [group]]
        assert len(visited) == len(set(visited)) == 7
        orders.append(visited)
    assert orders[0] != orders[1]


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 50])
def test_one_pass_is_even_over_ranks_and_counts_every_example_once(rows: Rows, world_size: int) -> None:
    per_rank = [list(rows.once(rank, world_size)) for rank in range(world_size)]
    assert len({len(items) for items in per_rank}) == 1
    counted = [batch for items in per_rank for batch, counts in items if counts]
    assert sorted(e for batch in counted for e in batch.example_S.tolist()) == list(range(len(rows.examples)))


def test_one_pass_is_the_same_every_time(rows: Rows) -> None:
    first, second = ([batch for batch, _ in rows.once(0, 1)] for _ in range(2))
    assert_same(first, second)


def test_statistics_need_no_values(
    histories: Histories, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Histories, positions: object) -> list[History]:
        raise AssertionError("histories were read")

    monkeypatch.setattr(Histories, "read", refuse)
    rows = make_rows(histories, vocabulary)
    lengths = histories.index["num_events"][histories.rows_of("train")]
    assert rows.num_events == np.minimum(lengths, CONTEXT).sum()
    assert rows.packing_efficiency == rows.num_events / (rows.rows_per_epoch * BUDGET) > 0.8


# ----------------------------------------------------------------------------------------------------- the background


def test_closing_ends_the_thread(rows: Rows) -> None:
    passes: list[Generator] = [rows.steps(Cursor(), 2, 0, 1), rows.once(0, 1)]
    for running in passes:
        next(running)
        assert threads()
        running.close()
        assert not threads()


def test_a_finished_pass_leaves_no_thread(rows: Rows) -> None:
    assert list(rows.once(0, 1)) and not threads()


def test_a_failed_read_is_raised_in_its_turn(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = Histories.read, iter(range(100))

    def failing(self: Histories, positions: np.ndarray) -> list[History]:
        if next(calls) == 2:
            raise OSError("disk gone")
        return read(self, positions)

    monkeypatch.setattr(Histories, "read", failing)
    steps = rows.steps(Cursor(), 1, 0, 1)
    assert len(list(islice(steps, 2))) == 2
    with pytest.raises(OSError, match="disk gone"):
        next(steps)
    assert not threads()


def test_training_and_evaluation_may_read_at_once(histories: Histories, vocabulary: Vocabulary) -> None:
    def tuning() -> Iterator[Batch]:
        examples = pretraining_examples(histories, "tuning")
        return (batch for batch, _ in make_rows(histories, vocabulary, examples).once(0, 1))

    expected = list(tuning())
    steps = make_rows(histories, vocabulary).steps(Cursor(), 1, 0, 1)
    for _ in range(5):
        next(steps)
        assert_same(list(tuning()), expected)
    steps.close()


def test_a_rows_place_leads_to_its_histories_and_names_no_subject(
    dataset: Path, histories: Histories, vocabulary: Vocabulary
) -> None:
    rows = make_rows(histories, vocabulary)
    (batch, *_), _ = next(rows.steps(Cursor(), 1, 0, 1))
    found = set()
    for shard, group, places in re.findall(r"shard (\S+) row group (\d+) rows \[([\d, ]+)\]", rows.place_of(batch)):
        table = pq.ParquetFile(dataset / "histories" / f"{shard}.parquet").read_row_group(int(group))
        found |= {table["subject_id"][int(place)].as_py() for place in places.split(",")}
    assert found == set(rows.examples.subject_id_E[batch.example_S.numpy()].tolist())
    assert not any(str(subject_id) in rows.place_of(batch) for subject_id in found)
