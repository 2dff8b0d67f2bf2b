"""Many prediction times of a history: which share a segment, and what each of them reads there."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_rows import (
    BUDGET,
    HOUR,
    YEAR,
    assert_same,
    events_per_epoch,
    label_table,
    make_rows,
    rows_per_epoch,
    subject,
    take,
    write_prepared,
)
from small_models import KINDS

from hymate.data.examples import Examples, labelled_examples
from hymate.data.histories import Histories
from hymate.data.loader import Cursor, Rows
from hymate.data.packing import answered_together
from hymate.data.vocabulary import Vocabulary
from hymate.inference.scoring import score
from hymate.model.encoder import RiskModel

CONTEXT = 16


@pytest.fixture(scope="module")
def stays(tmp_path_factory: pytest.TempPathFactory) -> Histories:
    """Histories of 1 to 59 events, in row groups of five."""
    lengths = np.random.default_rng(1).integers(1, 60, 40).tolist()
    subjects = [subject(number, length) for number, length in enumerate(lengths)]
    return Histories.open(write_prepared(tmp_path_factory.mktemp("stays"), {"train/0": subjects}))


def hourly(stays: Histories, every: int = 3) -> Examples:
    """A label every few hours, from before the first event on; most are at no event, many after the same one."""
    ids = stays.index.subject_id_P
    hours = [hour for _ in ids for hour in range(-6, 100, every)]
    table = label_table(np.repeat(ids, len(hours) // len(ids)).tolist(), hours, [i % 5 == 0 for i in range(len(hours))])
    return labelled_examples(stays, table, "train")


@settings(max_examples=200)
@given(
    stops=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=30).map(sorted), min_size=1, max_size=6),
    context=st.integers(1, 40),
)
def test_a_segment_answers_what_has_half_of_the_context_in_it(stops: list[list[int]], context: int) -> None:
    position_E = np.repeat(np.arange(len(stops)) * 3, [len(of_one) for of_one in stops])
    expected, before = [], 0
    for of_one in stops:
        hi = len(of_one)
        while hi:
            start = max(0, of_one[hi - 1] - context)
            lo = hi - 1
            while lo and hi - lo < context and (start == 0 or 2 * (of_one[lo - 1] - start) >= context):
                lo -= 1
            expected.append(before + lo)
            hi = lo
        before += len(of_one)
    found = answered_together(position_E, np.concatenate(stops), context)
    assert found.tolist() == sorted(expected)


def test_every_answer_reads_its_prefix_and_has_its_own_label(stays: Histories, vocabulary: Vocabulary) -> None:
    examples = hourly(stays)
    assert examples.dropped["without_events"] > 0
    rows = make_rows(stays, vocabulary, examples, crop="last", together=True, context=CONTEXT)
    seen, whole, cut = [], 0, 0
    for row, _ in rows.once(0, 1):
        last_A = row.last_of_answers
        assert len(row.example_A) <= BUDGET and row.num_events <= BUDGET
        assert (last_A.diff() >= 0).all() and set(row.segment_L[last_A].tolist()) == set(range(row.num_segments))
        assert set((row.bounds[1:] - 1).tolist()) <= set(last_A.tolist())
        for a, example in enumerate(row.example_A.tolist()):
            seen.append(example)
            (history,) = stays.read(examples.position_E[[example]])
            first = row.cu_seqlens[row.segment_L[last_A[a]]]
            read = row.code_L[first : last_A[a] + 1].tolist()
            stop, time = int(examples.stop_E[example]), int(examples.prediction_time_E[example])
            known = vocabulary.ids_of([stays.codes[c] for c in history.code[:stop]]).tolist()
            assert read == known[-len(read) :]
            assert len(read) == stop or CONTEXT / 2 <= len(read) <= CONTEXT
            whole, cut = whole + (len(read) == stop), cut + (len(read) < stop)
            age = np.nan if history.birth_time is None else (time - history.birth_time) / YEAR
            np.testing.assert_equal(row.age_years_A[a].item(), np.float32(age))
            assert row.lag_hours_A[a].item() == np.float32((time - history.time[stop - 1]) / HOUR)
            assert row.label_AT[a] == examples.label_ET[example]
    assert sorted(seen) == list(range(len(examples))) and whole > 100 and cut > 100
    assert events_per_epoch(rows) == sum(row.num_events for row, _ in rows.once(0, 1))


def test_one_label_a_history_is_the_same_either_way(stays: Histories, vocabulary: Vocabulary) -> None:
    ids = stays.index.subject_id_P.tolist()
    start = pa.array([30 * YEAR + 20 * HOUR] * len(ids), pa.timestamp("us"))
    labels = label_table(ids, [90] * len(ids), [True] * len(ids)).append_column("start", start)
    examples = labelled_examples(stays, labels, "train")
    either = [
        make_rows(stays, vocabulary, examples, crop="last", context=CONTEXT, early_fraction=0.5, together=together)
        for together in (False, True)
    ]
    assert_same(*([row for row, _ in rows.once(0, 1)] for rows in either))
    assert_same(*(take(rows, Cursor(), num_steps=12, rows_per_step=2, world_size=1)[0] for rows in either))
    assert all(row.last_A is None for row, _ in either[1].once(0, 1))


@pytest.mark.parametrize("world_size", [1, 2])
def test_many_labels_resume_anywhere_on_any_number_of_workers(
    world_size: int, stays: Histories, vocabulary: Vocabulary
) -> None:
    def rows() -> Rows:
        return make_rows(stays, vocabulary, hourly(stays), crop="last", context=CONTEXT, together=True)

    sequence, _ = take(rows(), Cursor(), num_steps=30, rows_per_step=2, world_size=1)
    _, cursor = take(rows(), Cursor(), num_steps=11, rows_per_step=2, world_size=2)
    rest, _ = take(rows(), cursor, num_steps=19, rows_per_step=2, world_size=world_size)
    assert_same(rest, sequence[22:])
    epoch = [example for row in sequence for example in row.example_A.tolist()]
    number = len(hourly(stays))
    assert sorted(epoch[:number]) == list(range(number)) and epoch[:number] != sorted(epoch[:number])


@pytest.mark.parametrize("name", ["mamba2", "mamba1", "three of variables"])
def test_scores_of_many_labels_are_those_of_each_by_itself(name: str, stays: Histories, vocabulary: Vocabulary) -> None:
    torch.manual_seed(0)
    model = RiskModel(KINDS[name], vocabulary.size, ["sepsis"]).eval()
    examples, device = hourly(stays, every=7), torch.device("cpu")
    together, alone = (
        make_rows(stays, vocabulary, examples, crop="last", context=64, together=together) for together in (True, False)
    )
    assert rows_per_epoch(together) < rows_per_epoch(alone) / 3
    np.testing.assert_allclose(
        score(model, together, device).logit_ET, score(model, alone, device).logit_ET, rtol=1e-4, atol=1e-5
    )
    assert together.events_read < alone.events_read / 3
