"""Examples: which labels become one, what of them is known, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from prepared_rows import HOUR, YEAR, day_table, label_table

from hymate.config import TaskConfig
from hymate.data import positions
from hymate.data.examples import Examples, labelled_examples, pretraining_examples, require_both_classes, united
from hymate.data.histories import Histories
from hymate.errors import UserError


def test_labels_without_events_or_subject_are_dropped_and_counted(histories: Histories) -> None:
    ids = histories.index.subject_id_P.tolist()
    (empty,) = histories.index.subject_id_P[histories.index.num_events_P == 0].tolist()
    labels = label_table([ids[0], 7, ids[0], empty, ids[40], ids[2]], [50, 50, -1e5, 50, 50, 60], [True] * 5 + [None])
    examples = labelled_examples(histories, labels, "train")
    assert examples.dropped == {"unknown_subject": 1, "without_events": 2, "positives_without_events": 2}
    assert examples.subject_id_E.tolist() == [ids[0], ids[2]]
    np.testing.assert_array_equal(examples.label_E, [1, np.nan])
    assert labelled_examples(histories, labels, "tuning").subject_id_E.tolist() == [ids[40]]


def test_examples_do_not_depend_on_the_order_of_labels(histories: Histories) -> None:
    ids = histories.index.subject_id_P[histories.positions("train")].tolist()
    labels = label_table(ids * 2, [40] * len(ids) + [90] * len(ids), [True] * len(ids) + [False] * len(ids))
    shuffled = labels.take(np.random.default_rng(0).permutation(len(labels)))
    expected, got = (dataclasses.asdict(labelled_examples(histories, table, "train")) for table in (labels, shuffled))
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


def test_processes_find_the_events_of_many_labels(histories: Histories, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = histories.index.subject_id_P[histories.positions("train")].tolist()
    labels = label_table(ids * 2, [40] * len(ids) + [90] * len(ids), [True] * len(ids) + [False] * len(ids))
    alone = labelled_examples(histories, labels, "train")
    monkeypatch.setattr(positions, "WORTH_EVENTS", 1)
    monkeypatch.setattr(positions, "available_cpus", lambda: 2)
    monkeypatch.delattr(positions, "_count")  # in this process
    together = labelled_examples(histories, labels, "train")
    for name in ("stop_E", "earliest_E", "position_E"):
        np.testing.assert_array_equal(getattr(together, name), getattr(alone, name))


def test_labels_without_truth_are_scored_too(histories: Histories) -> None:
    examples = labelled_examples(histories, label_table([int(histories.index.subject_id_P[0])], [50]), "train")
    assert np.isnan(examples.label_E).all()


def test_examples_of_several_tasks_are_the_union_of_their_times(histories: Histories) -> None:
    a, b = histories.index.subject_id_P[histories.positions("train")][:2].tolist()
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
    ids = histories.index.subject_id_P[histories.positions("train")].tolist()
    labels = label_table([*ids, ids[0], ids[0]], [50] * (len(ids) + 2), [True] * len(ids) + [False, True])
    one = labelled_examples(histories, labels, "train")
    assert (one.position_E == 0).sum() == 3  # several labels at one time are as many examples
    again = dataclasses.replace(united([one]), dropped=one.dropped)
    for name, values in dataclasses.asdict(again).items():
        np.testing.assert_array_equal(values, getattr(one, name))


@pytest.mark.parametrize("split", ["train", "no_such_split"])
def test_nothing_left_is_one_line_that_names_the_cause(histories: Histories, split: str) -> None:
    of = {name: histories.index.subject_id_P[histories.positions(name)].tolist() for name in ("train", "tuning")}
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


def test_labels_that_are_alike_for_want_of_events_are_reported_as_that(histories: Histories) -> None:
    ids = histories.index.subject_id_P[histories.positions("train")][:4].tolist()
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


def test_a_sample_stands_for_all() -> None:
    """Of two tasks, one with a rare outcome and one that half of the examples have."""
    rng, E = np.random.default_rng(0), 40_000
    label_ET = (rng.random((E, 2)) < [0.005, 0.4]).astype(np.float32)
    label_ET[rng.random(E) < 0.5, 1] = np.nan
    nothing = np.zeros(E, np.int64)
    examples = Examples(
        np.arange(E), nothing, nothing, nothing, label_ET, np.full((E, 2), np.nan), np.ones((E, 2), np.float32), nothing
    )
    sample = examples.sampled(4000, seed=1)
    assert len(sample) <= 4400 and np.all(np.diff(sample.position_E) > 0)
    assert (sample.label_ET[:, 0] == 1).sum() == (label_ET[:, 0] == 1).sum()  # the rare ones are all there
    for task in range(2):
        has, had = ~np.isnan(sample.label_ET[:, task]), ~np.isnan(label_ET[:, task])
        estimate = np.average(sample.label_ET[has, task], weights=sample.weight_ET[has, task])
        assert estimate == pytest.approx(label_ET[had, task].mean(), rel=0.08)
        assert sample.weight_ET[has, task].sum() == pytest.approx(had.sum(), rel=0.05)
    assert examples.sampled(4000, seed=1).position_E.tolist() == sample.position_E.tolist()
    assert examples.sampled(E, seed=1).position_E.tolist() == examples.position_E.tolist()
