"""Labels of tasks in time: what came first, when, how long the others were seen; a known law; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from prepared_rows import label_table
from stays import ADMITTED, DEATH, DIED, HOME, LAB, History, days, stay, task, write_histories

from hymate.config import TaskConfig
from hymate.data import tasks
from hymate.data.examples import Examples, require_both_classes
from hymate.data.label_files import COMPETING, EVENT, read_labels
from hymate.data.meds import write_parquet
from hymate.data.synthetic.course import DEATH_IN_WINDOW, LOST, SyntheticConfig
from hymate.data.synthetic.source import SyntheticSource
from hymate.errors import ConfigError, UserError
from hymate.evaluation.survival import aalen_johansen

Labels = dict[float, tuple[int, float]]  # prediction time in days since START -> what came first, after how many days
READMISSION: dict[str, tuple[History, Labels, dict[str, int]]] = {
    "readmitted": ([*stay(0, 3), *stay(20, 24), (200, LAB)], {3: (EVENT, 17), 24: (0, 90)}, {"triggers": 2}),
    "readmitted, then lost": ([*stay(0, 3), (20, ADMITTED), (21, LAB)], {3: (EVENT, 17)}, {}),
    "dead before a readmission": ([*stay(0, 3), (10, DEATH)], {3: (COMPETING, 7)}, {"competing_deaths": 1}),
    "dead after one": ([*stay(0, 3), *stay(20, 24, DIED)], {3: (EVENT, 17)}, {"triggers": 2, "died_before": 1}),
    "lost": ([*stay(0, 3), (13, LAB)], {3: (0, 10)}, {"censored": 1}),
    "lost at once": (stay(0, 3), {3: (0, 0)}, {"censored": 1}),
    "readmitted after the last horizon": ([*stay(0, 3), (94, ADMITTED)], {3: (0, 90)}, {}),
    "readmitted at the last horizon": ([*stay(0, 3), (93, ADMITTED)], {3: (EVENT, 90)}, {}),
    "dead at the discharge": ([*stay(0, 3, DIED), (3.5, DEATH)], {}, {"died_before": 1}),
    "transferred": (
        [*stay(0, 3), *stay(3.1, 9), (80, LAB)],
        {9: (0, 71)},
        {"triggers": 2, "excluded": 1, "censored": 1},
    ),
}


def found_in(root: Path, history: History, config: TaskConfig) -> tuple[Labels, dict[str, int]]:
    """Labels and counts of one history beside another one."""
    write_histories(root, [history, [*stay(0, 2), (200, DEATH)]])
    found = tasks.read_or_extract_labels(root, config)
    rows = [row for row in found.table.to_pylist() if row["subject_id"] == 1]
    assert all(row["boolean_value"] == (row["cause"] == EVENT) for row in rows)
    return {days(row["prediction_time"]): (row["cause"], round(row["float_value"], 4)) for row in rows}, found.counts


@pytest.mark.parametrize("case", READMISSION)
def test_readmission_with_death(case: str, tmp_path: Path) -> None:
    history, expected, added = READMISSION[case]
    found, counts = found_in(tmp_path, history, task("time_to_readmission"))
    assert found == expected
    base = {"triggers": 1, "excluded": 0, "died_before": 0, "competing_deaths": 0, "censored": 0} | added
    base["triggers"] += 1  # the other history's
    assert {name: counts[name] for name in base} == base
    assert counts["triggers"] == counts["excluded"] + counts["died_before"] + counts["labels"]
    assert "positives_unseen" not in counts and counts["positives"] == sum(
        cause == EVENT for cause, _ in found.values()
    )


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([*stay(0, 3), (200, LAB)], (COMPETING, 2)),
        ([*stay(0, 3, DIED), (3.5, DEATH)], (EVENT, 2)),
        ([(0, ADMITTED), (6, LAB)], (0, 5)),
        ([*stay(0, 3), (3.5, DEATH)], (COMPETING, 2)),  # alive when discharged
        ([*stay(-9, -8, HOME), *stay(0, 3, DIED)], (EVENT, 2)),  # an earlier discharge is over
        ([(0, ADMITTED), (31, HOME)], (0, 28)),
    ],
)
def test_death_in_hospital_with_discharge_alive(history: History, expected: tuple, tmp_path: Path) -> None:
    config = task(
        "mortality",
        "task.kind=time_to_event",
        "task.horizons_days=[7,28]",
        "task.competing=hospital_discharge",
        "task.definition.windows.target.end=null",
    )
    found, _ = found_in(tmp_path, history, config)
    assert found[1] == expected


def test_incidence_of_the_synthetic_cohort_is_that_of_its_law(tmp_path: Path) -> None:
    source = SyntheticSource(SyntheticConfig(subjects=1500, mean_events=150))
    for shard in source.shards():
        source.write_shard(shard, tmp_path)
    table = tasks.read_or_extract_labels(tmp_path, task("time_to_readmission")).table
    courses = [source._course(number, ids) for number, ids in source._shards().values()]
    of_law = np.concatenate([stays["probability"][stays["place"] != 0][~stays["died"]] for _, stays in courses])
    cause_N, days_N = table["cause"].to_numpy(), table["float_value"].to_numpy()
    assert len(of_law) == len(cause_N)
    lost = np.mean((cause_N == 0) & (days_N < 30))
    assert lost == pytest.approx(LOST, abs=0.03)
    # both events come at any time from half a day after the discharge to 29.5 days after it
    for horizon in (7, 15, 30):
        over = np.clip((horizon - 0.5) / 29, 0, 1)
        incidence = {EVENT: of_law.mean() * over, COMPETING: (1 - of_law).mean() * DEATH_IN_WINDOW * over}
        for cause, expected in incidence.items():
            error = 3 * (expected * (1 - expected) / len(cause_N)) ** 0.5
            (found,) = aalen_johansen(days_N, cause_N, [horizon], cause=cause)
            assert found == pytest.approx(expected, abs=error), (horizon, cause)
    naive = np.mean((cause_N == EVENT) & (days_N <= 30))
    assert naive < of_law.mean() - 0.01  # as if nobody were lost


def given(tmp_path: Path, cause: list[int | None] | None, when: list[float | None] | None, *overrides: str) -> pa.Table:
    rows = label_table([1, 2, 3], [50, 50, 50])
    columns = {"subject_id": rows["subject_id"], "prediction_time": rows["prediction_time"]}
    if cause is not None:
        columns["integer_value"] = pa.array(cause, pa.int64())
    if when is not None:
        columns["float_value"] = pa.array(when, pa.float32())
    write_parquet(pa.table(columns), tmp_path / "labels" / "0.parquet")
    config = task("time_to_readmission", f"task.labels={tmp_path / 'labels'}", *overrides)
    return tasks.read_or_extract_labels(tmp_path, config).table


def test_given_labels_are_seen_up_to_the_last_horizon(tmp_path: Path) -> None:
    table = given(tmp_path, [1, 2, 0], [91.0, 90.0, 400.0])
    assert (table["cause"].to_pylist(), table["float_value"].to_pylist()) == ([0, 2, 0], [90, 90, 90])
    assert table["boolean_value"].to_pylist() == [False, False, False]
    assert read_labels(tmp_path / "labels").column_names[2:] == ["integer_value", "float_value"]


@pytest.mark.parametrize(
    ("cause", "when", "overrides", "message"),
    [
        (None, [1, 2, 3], [], "need integer_value, what came first"),
        ([0, 1, None], [1, 2, 3], [], "need integer_value, what came first"),
        ([0, 1, 2], None, [], "need float_value, the days until then"),
        ([0, 1, 2], [1, 2, -3], [], "float_value of finite days"),
        ([0, 1, 2], [0, 0, 0], [], "of 2 labels the event comes 0 days after .* add half a day"),
        ([0, 1, 3], [1, 2, 3], [], r"of 0 \(nothing came\), 1 \(the event\) or 2 \(died\)"),
        ([0, 1, 2], [1, 2, 3], ["task.competing=null"], "unless task.competing names another"),
    ],
)
def test_labels_that_are_not_in_time_are_refused(
    cause: list | None, when: list | None, overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        given(tmp_path, cause, when, *overrides)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("time_to_readmission", "task.horizons_days=[]", "horizons_days must be days that rise"),
        ("time_to_readmission", "task.horizons_days=[30,7]", "horizons_days must be days that rise"),
        ("time_to_readmission", "task.horizons_days=[0,7]", "horizons_days must be days that rise"),
        ("time_to_readmission", "task.competing_rule=exclude", "competing_rule must be left out"),
        ("time_to_readmission", "task.censoring_rule=weights", "censoring_rule must be left out"),
        ("time_to_readmission", "task.longer_than_days=3", "longer_than_days must be left out"),
        ("readmission", "task.horizons_days=[7]", "horizons_days need kind=time_to_event"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(name: str, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(name, override)


def test_a_horizon_that_cannot_be_judged_is_refused() -> None:
    def examples(cause: list[int], when: list[float]) -> Examples:
        column = np.ones((len(cause), 1), np.float32)
        numbers = np.arange(len(cause))
        label, until = (np.array(values, np.float32)[:, None] for values in (cause, when))
        return Examples(numbers, numbers, numbers, numbers, label, until, column, numbers)

    config = task("time_to_readmission")
    require_both_classes(config, {"train": examples([1, 0, 2], [7, 90, 1])})
    with pytest.raises(UserError, match="nobody of the train split has the event within 7 days"):
        require_both_classes(config, {"train": examples([1, 0], [8, 90])})
    with pytest.raises(UserError, match="nobody of the tuning split is followed, without the event, for 90 days"):
        require_both_classes(config, {"tuning": examples([1, 0], [7, 89])})
    require_both_classes(config, {"tuning": examples([1, 2], [7, 10])})  # who died cannot come back
    with pytest.raises(UserError, match="labels that look further ahead"):  # as where the window ends on day 30
        require_both_classes(config, {"tuning": examples([1, 2, 0], [7, 10, 30])})
    require_both_classes(config, {"held_out": examples([1, 2, 0], [20, 10, 50])}, any_horizon=True)  # by 30 days
    with pytest.raises(UserError, match="held_out split has the event within 7 days: give labels"):
        require_both_classes(config, {"held_out": examples([2, 0], [10, 50])}, any_horizon=True)
