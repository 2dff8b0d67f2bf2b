"""Loading: an order that any number of workers shares, from any cursor on, read in the background."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_rows import BUDGET, CONTEXT, assert_same, make_rows, rows_per_epoch, take

from hymate.data import loader
from hymate.data.examples import pretraining_examples
from hymate.data.histories import Histories, History
from hymate.data.loader import Cursor, Rows
from hymate.data.packing import pack
from hymate.data.vocabulary import Vocabulary
from hymate.model.batch import Batch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hymate-rows")]


# ------------------------------------------------------------------------------------------------------------- order


def test_every_epoch_visits_every_example_once(rows: Rows) -> None:
    orders = []
    for epoch in range(3):
        batches, after = take(rows, Cursor(epoch), rows_per_epoch(rows), 1, 1)
        assert (after.epoch, after.row) == (epoch, rows_per_epoch(rows))
        orders.append([tuple(sorted(batch.example_A.tolist())) for batch in batches])
        assert sorted(example for row in orders[-1] for example in row) == list(range(len(rows.examples)))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("block_events", [1, 300, 4_000_000])
def test_rows_run_on_across_epochs(rows: Rows, monkeypatch: pytest.MonkeyPatch, block_events: int) -> None:
    """With 8 rows a step the epochs' ends fall inside steps; no row is lost there."""
    monkeypatch.setattr(loader, "BLOCK_EVENTS", block_events)
    batches, _ = take(rows, Cursor(), 8, 8, 1)
    visits = np.concatenate([batch.example_A.numpy() for batch in batches])
    counts = np.bincount(visits, minlength=len(rows.examples))
    assert counts.min() >= 2 and counts.max() - counts.min() <= 1
    assert len({batch.seed for batch in batches}) == len(batches)


@settings(max_examples=15)
@given(
    world_size=st.sampled_from([1, 2, 4]),
    resumed=st.sampled_from([1, 2, 4]),
    cut=st.integers(1, 7),
    block_events=st.sampled_from([1, 300, 4_000_000]),
)
def test_resuming_anywhere_on_any_world_size_goes_on_exactly(
    histories: Histories, vocabulary: Vocabulary, world_size: int, resumed: int, cut: int, block_events: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "BLOCK_EVENTS", block_events)
        expected, end = take(make_rows(histories, vocabulary), Cursor(), 8, 4, 1)
        before, cursor = take(make_rows(histories, vocabulary), Cursor(), cut, 4, world_size)
        cursor = Cursor(**json.loads(json.dumps(dataclasses.asdict(cursor))))
        after, end_resumed = take(make_rows(histories, vocabulary), cursor, 8 - cut, 4, resumed)
    assert_same(before + after, expected)
    assert end == end_resumed


@pytest.mark.parametrize("block_events", [1, 300])
def test_row_groups_come_in_any_order_in_any_block(
    histories: Histories, vocabulary: Vocabulary, block_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many epochs each history is in each place of the order as often."""
    monkeypatch.setattr(loader, "BLOCK_EVENTS", block_events)
    rows = make_rows(histories, vocabulary, tokens_per_row=CONTEXT)  # a history a row, or a few short ones
    orders = [np.concatenate([place.segments for place in rows._order(epoch)]) for epoch in range(300)]
    mean_place_E = np.mean([np.argsort(order) for order in orders], axis=0)
    count = len(rows.examples)
    error = np.sqrt((count**2 - 1) / 12 / len(orders))
    assert abs(mean_place_E - (count - 1) / 2).max() < 5 * error


def test_resuming_packs_no_block_before_the_cursors(
    histories: Histories, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "BLOCK_EVENTS", 1)
    rows = make_rows(histories, vocabulary)
    expected, cursor = take(rows, Cursor(), rows_per_epoch(rows), 1, 1)
    assert cursor.block >= 2
    packed = []
    monkeypatch.setattr(loader, "pack", lambda lengths, budget: packed.append(len(lengths)) or pack(lengths, budget))
    last = dataclasses.replace(cursor, row=cursor.row - 1)
    with contextlib.closing(make_rows(histories, vocabulary).steps(last, 1, 0, 1)) as steps:
        batches, after = next(steps)
    assert_same(batches, expected[-1:])
    assert after == cursor and packed[0] == sum(len(batch.example_A) for batch in expected[-(cursor.row) :])


def test_rows_per_step_changes_no_row(rows: Rows) -> None:
    assert_same(take(rows, Cursor(), 6, 2, 1)[0], take(rows, Cursor(), 2, 6, 2)[0])


def test_what_is_drawn_for_an_example_does_not_depend_on_its_row(histories: Histories, vocabulary: Vocabulary) -> None:
    seeds = []
    for budget in (CONTEXT, BUDGET, 2 * BUDGET):
        rows = make_rows(histories, vocabulary, tokens_per_row=budget)
        batches, _ = take(rows, Cursor(1), rows_per_epoch(rows), 1, 1)
        pairs = [zip(batch.example_A.tolist(), batch.seed_S.tolist(), strict=True) for batch in batches]
        seeds.append(dict(pair for row in pairs for pair in row))
        assert len(set(seeds[-1].values())) == len(rows.examples) and min(seeds[-1].values()) >= 0
    assert seeds[0].keys() >= set(range(len(rows.examples)))
    assert all(seeds[0][e] == other[e] for other in seeds[1:] for e in range(len(rows.examples)) if e in other)


def test_the_order_is_the_same_on_every_machine(rows: Rows) -> None:
    """Values of another process: a change here breaks the resuming of everybody's runs."""
    ((batch,), _) = next(rows.steps(Cursor(epoch=2, row=5), 1, 0, 1))
    assert (batch.seed, batch.example_A.tolist()) == (6544075218902629905, [10, 9])
    assert 0 <= batch.seed < 2**63


def test_another_seed_is_another_order(histories: Histories, vocabulary: Vocabulary) -> None:
    first, second = (take(make_rows(histories, vocabulary, seed=seed), Cursor(), 4, 4, 1)[0] for seed in (0, 1))
    assert [b.example_A.tolist() for b in first] != [b.example_A.tolist() for b in second]
    assert not {b.seed for b in first} & {b.seed for b in second}


def test_reads_stay_in_a_block_of_row_groups(rows: Rows, histories: Histories, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of one row group: rows never mix groups, a group is finished before the next, groups are shuffled."""
    monkeypatch.setattr(loader, "BLOCK_EVENTS", 1)
    orders = []
    for epoch in range(2):
        visited: list[tuple[str, int]] = []
        for batch in take(rows, Cursor(epoch), rows_per_epoch(rows), 1, 1)[0]:
            position = rows.examples.position_E[batch.example_A.numpy()]
            groups = {place[:2] for place in histories.index.places(position)}
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
    assert sorted(e for batch in counted for e in batch.example_A.tolist()) == list(range(len(rows.examples)))


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
    lengths = histories.index.num_events_P[histories.positions("train")]
    num_events = np.minimum(lengths, CONTEXT).sum()
    assert 0.8 * rows_per_epoch(rows) * BUDGET < num_events <= rows_per_epoch(rows) * BUDGET


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
    for shard, group, places in re.findall(r"shard (\S+) row group (\d+) records \[([\d, ]+)\]", rows.place_of(batch)):
        table = pq.ParquetFile(dataset / "histories" / f"{shard}.parquet").read_row_group(int(group))
        found |= {table["subject_id"][int(place)].as_py() for place in places.split(",")}
    assert found == set(rows.examples.subject_id_E[batch.example_A.numpy()].tolist())
    assert not any(str(subject_id) in rows.place_of(batch) for subject_id in found)
