"""Aggregate features: against a loop that knows nothing of blocks and groups, and blind to what comes later."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymate.data import features as module
from hymate.data.examples import labelled_examples
from hymate.data.features import (
    AGE,
    EVENTS,
    VALUE_STATISTICS,
    Column,
    FeatureConfig,
    FeatureSpec,
    choose,
    features,
)
from hymate.data.histories import HISTORY_SCHEMA, Histories
from hymate.data.index import INDEX_SCHEMA, Index
from hymate.errors import ConfigError, UserError

CODES = ["LAB//a", "LAB//b", "VISIT", "GENDER//F"]
EDGES = (24.0, 48.0, 96.5)
QUARTER_US, YEAR_US = 900_000_000, 31_557_600_000_000
START = 40 * YEAR_US
EVERYTHING = FeatureSpec(
    EDGES,
    (
        Column(AGE, "years"),
        *(Column(EVENTS, "count", w) for w in range(4)),
        *(Column(code, statistic) for code in CODES for statistic in ("hours_since", "static", "static_value")),
        *(Column(code, s, w) for code in CODES for w in range(4) for s in ("count", *VALUE_STATISTICS)),
    ),
)
Subject = dict[str, Any]  # birth, statics [(code, value)], events [(quarter hour, code, value)], labels [quarter hour]


def write(root: Path, subjects: list[Subject]) -> tuple[Histories, pa.Table]:
    """Prepared histories in row groups of two, and the labels at their subjects' quarter hours."""
    rows = [
        {
            "subject_id": 100 - i,
            "birth_time": subject["birth"],
            "static_code": [code for code, _ in subject["statics"]],
            "static_value": [value for _, value in subject["statics"]],
            "time": [START + quarter * QUARTER_US for quarter, _, _ in subject["events"]],
            "code": [code for _, code, _ in subject["events"]],
            "value": [value for _, _, value in subject["events"]],
        }
        for i, subject in enumerate(subjects)
    ]
    (root / "histories").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, HISTORY_SCHEMA), root / "histories" / "0.parquet", row_group_size=2)
    row_P = np.arange(len(rows))
    index = {
        "subject_id": [row["subject_id"] for row in rows],
        "split": ["train"] * len(rows),
        "shard": ["0"] * len(rows),
        "row_group": row_P // 2,
        "row": row_P % 2,
        "num_events": [len(row["time"]) for row in rows],
    }
    labels = [(100 - i, START + quarter * QUARTER_US) for i, one in enumerate(subjects) for quarter in one["labels"]]
    ids, times = zip(*labels, strict=True)
    table = pa.table({"subject_id": ids, "prediction_time": pa.array(times, pa.timestamp("us"))})
    return Histories(root, CODES, Index.of_table(pa.table(index, INDEX_SCHEMA)), ""), table


def expected(subject: Subject, quarter: int, column: Column) -> float:
    """One feature by the words of its definition."""
    variable, statistic, window = column
    if statistic == "years":
        birth = subject["birth"]
        return math.nan if birth is None else (START + quarter * QUARTER_US - birth) / YEAR_US
    if statistic.startswith("static"):
        own = [value for code, value in subject["statics"] if CODES[code] == variable]
        if statistic == "static":
            return float(bool(own))
        return own[-1] if own and math.isfinite(own[-1]) else math.nan
    low, high = [(-1.0, math.inf), (-1.0, 24.0), (24.0, 48.0), (48.0, 96.5)][window]
    chosen = [
        (at / 4, value)
        for at, code, value in subject["events"]
        if at <= quarter and low < (quarter - at) / 4 <= high and variable in (CODES[code], EVENTS)
    ]
    if statistic == "count":
        return len(chosen)
    if statistic == "hours_since":
        return quarter / 4 - chosen[-1][0] if chosen else math.nan
    measured = [(hour, value) for hour, value in chosen if math.isfinite(value)]
    values = [value for _, value in measured]
    if not values:
        return math.nan
    if statistic == "slope":
        hours = [hour for hour, _ in measured]
        return np.polyfit(hours, values, 1)[0] if len(set(hours)) > 1 else math.nan
    plain = {"minimum": min, "maximum": max, "mean": np.mean, "deviation": np.std}
    return plain[statistic](values) if statistic in plain else values[0 if statistic == "first" else -1]


numbers = st.one_of(st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3), st.just(math.nan))
codes = st.integers(0, len(CODES) - 1)
subjects = st.fixed_dictionaries(
    {
        "birth": st.none() | st.integers(-30, 30).map(lambda years: years * YEAR_US),
        "statics": st.lists(st.tuples(codes, numbers), max_size=3),
        "events": st.lists(st.tuples(st.integers(0, 600), codes, numbers), min_size=1, max_size=25).map(
            lambda events: sorted(events, key=lambda event: event[0])
        ),
        "labels": st.lists(st.sampled_from([0, 96, 192, 300, 600]) | st.integers(600, 700), max_size=3, unique=True),
    }
)
cohorts = st.lists(subjects, min_size=1, max_size=5).map(
    lambda cohort: [{**cohort[0], "labels": [*cohort[0]["labels"], 1000]}, *cohort[1:]]  # at least one label
)


@settings(max_examples=60)
@given(cohorts, st.sampled_from([1, 20, 500_000]))
def test_every_feature_is_what_a_plain_loop_computes(cohort: list[Subject], block_events: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_EVENTS", block_events)
        histories, labels = write(Path(folder), cohort)
        examples = labelled_examples(histories, labels, "train")
        found = features(histories, examples, EVERYTHING).value_EX
    for e in range(len(examples)):
        subject = cohort[examples.position_E[e]]
        quarter = (examples.prediction_time_E[e] - START) // QUARTER_US
        wanted = [expected(subject, int(quarter), column) for column in EVERYTHING.columns]
        np.testing.assert_allclose(found[e], np.array(wanted, np.float32), rtol=1e-4, atol=1e-3)


@settings(max_examples=40)
@given(cohorts, st.lists(st.tuples(st.integers(1, 50), codes, numbers), max_size=10))
def test_what_comes_after_the_prediction_time_changes_nothing(
    cohort: list[Subject], later: list[tuple[int, int, float]]
) -> None:
    """Neither the features nor which of them are chosen."""
    cohort = [{**subject, "labels": subject["labels"][-1:]} for subject in cohort]
    config = FeatureConfig(EDGES, min_labels=1)
    found = []
    for extra in ([], sorted(later)):
        changed = []
        for subject in cohort:
            end = max(subject["labels"], default=0)
            known = [event for event in subject["events"] if event[0] <= end]
            changed.append({**subject, "events": known + [(end + at, code, value) for at, code, value in extra]})
        with tempfile.TemporaryDirectory() as folder:
            histories, labels = write(Path(folder), changed)
            examples = labelled_examples(histories, labels, "train")
            spec = choose(histories, examples, config)
            found.append((spec, features(histories, examples, spec).value_EX))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])


def visits(num_events: int, code: int = 2, value: float = math.nan) -> list[tuple[int, int, float]]:
    return [(quarter, code, value) for quarter in range(num_events)]


def chosen(folder: Path, cohort: list[dict[str, Any]], **config: Any) -> list[Column]:
    subjects = [{"birth": None, "statics": [], "labels": [50], **subject} for subject in cohort]
    histories, labels = write(folder, subjects)
    config = {"windows_hours": (24.0, 48.0), "min_labels": 2, **config}
    return list(choose(histories, labelled_examples(histories, labels, "train"), FeatureConfig(**config)).columns)


def test_columns_that_too_few_labels_fill_are_left_out(tmp_path: Path) -> None:
    cohort = [
        {"events": [*visits(3), (3, 0, 5.0)], "statics": [(3, math.nan)]},
        {"events": [*visits(1), (3, 0, 6.0)], "statics": [(3, math.nan), (1, 4.0)]},
        {"events": [(3, 0, math.nan), (3, 1, math.nan)], "birth": 0},
    ]
    lab = [Column("LAB//a", name, w) for w in (0, 1) for name in ("count", *VALUE_STATISTICS)]
    assert sorted(chosen(tmp_path, cohort)) == sorted(
        [
            *(Column(EVENTS, "count", w) for w in (0, 1)),
            Column("GENDER//F", "static"),
            Column("VISIT", "hours_since"),
            *(Column("VISIT", "count", w) for w in (0, 1)),
            Column("LAB//a", "hours_since"),
            *lab,
        ]
    )


def test_the_budget_goes_to_the_codes_that_most_labels_have(tmp_path: Path) -> None:
    """Not to those with most events."""
    cohort = [
        {"events": [*visits(20), (20, 0, 1.0)]},
        {"events": [*visits(20), (20, 0, 1.0)]},
        {"events": [(0, 0, 1.0)]},
    ]
    everything = chosen(tmp_path / "a", cohort)
    assert {column.variable for column in everything} == {EVENTS, "LAB//a", "VISIT"}
    fewer = chosen(tmp_path / "b", cohort, max_features=len(everything) - 1)
    assert fewer == [column for column in everything if column.variable != "VISIT"]


def test_who_is_asked_often_has_a_window_of_six_hours(tmp_path: Path) -> None:
    """Unless windows were chosen."""
    for labels, windows_hours, first in ((3, None, 24.0), (4, None, 6.0), (4, (48.0,), 48.0)):
        cohort = [{"birth": None, "statics": [], "events": visits(40), "labels": list(range(10, 10 + labels))}]
        histories, table = write(tmp_path / f"{labels}{windows_hours}", cohort)
        config = FeatureConfig(windows_hours, min_labels=1)
        spec = choose(histories, labelled_examples(histories, table, "train"), config)
        assert spec.windows_hours[0] == first


def test_a_choice_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave no feature of 1 training labels"):
        chosen(tmp_path, [{"events": visits(3)}], min_labels=2)


def test_a_dataset_with_other_codes_is_described_with_the_same_columns(tmp_path: Path) -> None:
    subject = {"birth": None, "statics": [], "events": [(0, 0, 3.0), (1, 2, math.nan)], "labels": [4]}
    histories, labels = write(tmp_path, [subject])
    other = Histories(tmp_path, ["NEW", "LAB//b", "LAB//a", "GENDER//F"], histories.index, "")
    spec = FeatureSpec((24.0,), (Column("LAB//a", "count"), Column("VISIT", "count"), Column("VISIT", "hours_since")))
    found = features(other, labelled_examples(other, labels, "train"), spec).value_EX
    np.testing.assert_array_equal(found, [[1, 0, math.nan]])


def test_names_are_for_reading() -> None:
    spec = FeatureSpec(
        (24.0, 48.0), (Column("HR//bpm", "mean", 2), Column("HR//bpm", "mean"), Column("HR//bpm", "last", 1))
    )
    assert spec.names == ["HR//bpm mean 24-48 h", "HR//bpm mean", "HR//bpm last 0-24 h"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"windows_hours": (48.0, 24.0)}, "windows_hours must be positive and rise"),
        ({"windows_hours": (0.0,)}, "windows_hours must be positive and rise"),
        ({"max_features": 0}, "max_features must be positive"),
        ({"min_labels": 0}, "min_labels must be positive"),
    ],
)
def test_impossible_settings_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        FeatureConfig(**config)
