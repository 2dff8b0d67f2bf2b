"""Tasks: each labelling rule on a hand-written history, and all of them against a plain count on real data."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, time, timedelta
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from stays import (
    ADMITTED,
    DEATH,
    DIED,
    HOME,
    LAB,
    History,
    Labels,
    extract,
    stay,
    task,
    write_histories,
    write_splits,
)

from hymate.data import tasks

UNKNOWN = "HOSPITAL_DISCHARGE//UNKNOWN"

# ------------------------------------------------------------------------------------------------- readmission

# history, its labels, and what it adds to the counts
READMISSION: dict[str, tuple[History, Labels, dict[str, int]]] = {
    "readmitted": ([*stay(0, 3), (20, ADMITTED), (80, LAB)], {3: True}, {}),
    "on day 30 exactly": ([*stay(0, 3), (33, ADMITTED), (80, LAB)], {3: True}, {}),
    "a minute too late": ([*stay(0, 3), (33 + 1 / 1440, ADMITTED), (80, LAB)], {3: False}, {}),
    "never readmitted": ([*stay(0, 3), (80, LAB)], {3: False}, {}),
    "followed up to the window's end": ([*stay(0, 3), (33, LAB)], {3: False}, {}),
    "record ends early": ([*stay(0, 3), (32.9, LAB)], {}, {"censored": 1}),
    "record ends at the discharge": (stay(0, 3), {}, {"censored": 1}),
    "record ends early after a readmission": ([*stay(0, 3), (20, ADMITTED), (21, LAB)], {}, {"censored": 1}),
    "positive although death follows": ([*stay(0, 3), (20, ADMITTED), (25, DEATH)], {3: True}, {}),
    "discharge coded as death": ([*stay(0, 3, DIED), (3.5, LAB)], {}, {"died_before": 1}),
    "death stamped after the discharge": ([*stay(0, 3, DIED), (3.3, DEATH)], {}, {"died_before": 1}),
    "death stamped at the discharge": ([(0, ADMITTED), (3, HOME), (3, DEATH)], {}, {"died_before": 1}),
    "death stamped before the discharge": ([(0, ADMITTED), (2.9, DEATH), (3, HOME)], {}, {"died_before": 1}),
    "dead, yet admitted again": ([*stay(0, 3, DIED), (9, ADMITTED), (80, LAB)], {}, {"died_before": 1}),
    "death at home": ([*stay(0, 3), (3.3, DEATH)], {3: False}, {"competing_deaths": 1}),
    "death on day 30": ([*stay(0, 3), (33, DEATH), (33, LAB)], {3: False}, {"competing_deaths": 1}),
    "death after the window": ([*stay(0, 3), (34, DEATH)], {3: False}, {}),
    "transfer at the same instant": (
        [*stay(0, 3), *stay(3, 9), (80, LAB)],
        {9: False},
        {"triggers": 1, "excluded": 1},
    ),
    "transfers within hours, then a readmission": (
        [*stay(0, 3), *stay(3.2, 9), *stay(9.25, 12), (20, ADMITTED), (80, LAB)],
        {12: True},
        {"triggers": 2, "excluded": 2},
    ),
    "seven hours later is no transfer": (
        [*stay(0, 3), *stay(3.3, 9), (80, LAB)],
        {3: True, 9: False},
        {"triggers": 1},
    ),
    "two discharges at one time": ([(0, ADMITTED), (3, HOME), (3, HOME), (80, LAB)], {3: False}, {}),
    "every discharge": ([*stay(0, 3), *stay(9, 12), (80, LAB)], {3: True, 12: False}, {"triggers": 1}),
    # a registry's date of death, stamped at 00:00 (0.625 is 15 hours after nine o'clock): it comes at the day's end
    "dated death on the day of a discharge alive": (
        [*stay(0, 3), (2.625, DEATH), (80, LAB)],
        {3: False},
        {"competing_deaths": 1},
    ),
    "dated death on the day of a discharge coded as death": (
        [*stay(0, 3, DIED), (2.625, DEATH)],
        {},
        {"died_before": 1},
    ),
    "dated death before the day of the discharge": (
        [*stay(0, 3), (1.625, DEATH)],
        {},
        {"died_before": 1},
    ),
    "dated death at a discharge at midnight": (
        [(0, ADMITTED), (2.625, HOME), (2.625, DEATH)],
        {2.625: False},
        {"competing_deaths": 1},
    ),
    "dated death on the day of a discharge that says nothing": (
        [*stay(0, 3, UNKNOWN), (2.625, DEATH)],
        {},
        {"died_before": 1},
    ),
    # times may be dates: an admission and a discharge at one time are one stay, unless the patient stays on
    "a stay of one day": ([(2.625, ADMITTED), (2.625, HOME), (80, LAB)], {2.625: False}, {}),
    "readmitted for one day": (
        [*stay(0, 3), (20.625, HOME), (20.625, ADMITTED), (80, LAB)],
        {3: True, 20.625: False},
        {"triggers": 1},
    ),
    "transferred for one day": (
        [*stay(0.625, 3.625), (3.625, ADMITTED), (3.625, HOME), (20.625, ADMITTED), (80, LAB)],
        {3.625: True},
        {},
    ),
    "a stay of one day, then a transfer": (
        [(3.625, ADMITTED), (3.625, HOME), *stay(3.625, 9.625), (80, LAB)],
        {9.625: False},
        {"triggers": 1, "excluded": 1},
    ),
    "no admission seen": ([(3, HOME), (80, LAB)], {3: False}, {}),
}


@pytest.mark.parametrize("case", READMISSION)
def test_readmission_rules(case: str, tmp_path: Path) -> None:
    history, expected, added = READMISSION[case]
    found, counts = extract(tmp_path, history, task("readmission"))
    assert found == expected
    base = {"triggers": 3, "excluded": 0, "died_before": 0, "competing_deaths": 0, "censored": 0}
    base["triggers"] += added.get("triggers", 0)
    assert {name: counts[name] for name in base} == {**base, **added, "triggers": base["triggers"]}
    assert counts["labels"] == 2 + len(expected)
    assert counts["positives"] == 1 + sum(expected.values())
    assert counts["subjects"] == 1 + bool(expected)


def test_the_censoring_rule_is_a_choice(tmp_path: Path) -> None:
    """Lost on day 21, after a readmission or without one."""
    history = [*stay(0, 3), (20, ADMITTED), (21, LAB)]
    write_splits(tmp_path, dict.fromkeys([1, 2], "train"))
    for rule, expected, censored in (
        ("exclude", {}, 1),
        ("exclude_negatives", {3: True}, 0),
        ("weights", {3: True}, 0),
    ):
        found, counts = extract(tmp_path, history, task("readmission", f"task.censoring_rule={rule}"))
        assert (found, counts["censored"], counts["positives_unseen"]) == (expected, censored, 1)
    lost = [*stay(0, 3), (21, LAB)]
    for rule in ("exclude", "exclude_negatives", "weights"):
        found, counts = extract(tmp_path, lost, task("readmission", f"task.censoring_rule={rule}"))
        assert (found, counts["censored"], counts["positives_unseen"]) == ({}, 1, 0)


def test_weights_are_one_over_the_probability_of_being_followed(tmp_path: Path) -> None:
    """Two of eight are lost on day 10, one of the remaining five on 20; one dies on day 15, one comes back on 25."""
    histories = [
        *[[*stay(0, 3), (13, LAB)]] * 2,
        [*stay(0, 3), (18, DEATH)],
        [*stay(0, 3), (23, LAB)],
        [*stay(0, 3), (28, ADMITTED), (29, LAB)],
        *[[*stay(0, 3), (80, LAB)]] * 3,
    ]

    def weights() -> dict[int, float]:
        table = tasks.read_or_extract_labels(tmp_path, task("readmission", "task.censoring_rule=weights")).table
        return dict(zip(table["subject_id"].to_pylist(), table["weight"].to_pylist(), strict=True))

    # MEDS names shards as it likes: a split is in several, and one shard holds several, or no label at all
    write_histories(tmp_path, histories[:4], "0")
    write_histories(tmp_path, histories[4:], "1", first_subject=5)
    write_histories(tmp_path, [*histories[2:3], *histories[4:]], "2", first_subject=11)
    write_histories(tmp_path, [[(0, LAB)]], "3", first_subject=21)
    splits = {**dict.fromkeys(range(1, 9), "train"), **dict.fromkeys(range(11, 16), "held_out"), 21: "train"}
    write_splits(tmp_path, splits)
    weight = weights()
    first, later = 8 / 6, 8 / 6 * 5 / 4
    expected = {3: first, 5: later, 6: later, 7: later, 8: later}
    assert weight == pytest.approx({**expected, 11: 1, 12: 1, 13: 1, 14: 1, 15: 1})  # each split by itself
    write_splits(tmp_path, {**splits, 2: "tuning"})
    assert weights()[3] == pytest.approx(7 / 6)
    assert sum(w for subject, w in weight.items() if subject < 10) == pytest.approx(8)
    assert "weight" not in tasks.read_or_extract_labels(tmp_path, task("readmission")).table.column_names


def test_of_a_risk_of_20_percent_two_rules_say_20_and_one_23(tmp_path: Path) -> None:
    """30 % are lost, whatever would have happened: what was seen of them until then is in the record."""
    rng = np.random.default_rng(0)
    size = 4000
    back, lost = rng.random(size) < 0.2, rng.random(size) < 0.3
    when, until = rng.uniform(0.5, 30, size), np.where(lost, rng.uniform(0.5, 30, size), 60)
    histories = [
        [*stay(0, 1), *([(1 + when[i], ADMITTED)] if back[i] and when[i] < until[i] else []), (1 + until[i], LAB)]
        for i in range(size)
    ]
    write_histories(tmp_path, histories)
    write_splits(tmp_path, dict.fromkeys(range(1, size + 1), "train"))
    risk = {}
    for rule in ("exclude", "exclude_negatives", "weights"):
        table = tasks.read_or_extract_labels(tmp_path, task("readmission", f"task.censoring_rule={rule}")).table
        weight = table["weight"].to_numpy() if rule == "weights" else None
        risk[rule] = np.average(table["boolean_value"].to_numpy(), weights=weight)
    truth, error = back.mean(), np.sqrt(0.16 / size)
    assert abs(risk["exclude"] - truth) < 2 * error and abs(risk["weights"] - truth) < 2 * error
    assert abs(risk["exclude_negatives"] - 0.17 / 0.73) < 3 * error and risk["exclude_negatives"] > truth + 3 * error


def test_kinds_of_admissions_are_counted_and_can_be_left_out(tmp_path: Path) -> None:
    observed, planned = "HOSPITAL_ADMISSION//EU OBSERVATION", "HOSPITAL_ADMISSION//ELECTIVE"
    histories = [
        [*stay(0, 3), (9, observed), (20, ADMITTED), (80, LAB)],
        [*stay(0, 3), (9, observed), (80, LAB)],
        [*stay(0, 3), (9, planned), (80, LAB)],
        [*stay(0, 3), (9, ADMITTED), (10, planned), (80, LAB)],
        [*stay(0, 3), (80, LAB)],
    ]
    write_histories(tmp_path, histories)

    def values(*overrides: str) -> list[bool]:
        found = tasks.read_or_extract_labels(tmp_path, task("readmission", *overrides))
        assert found.details.kinds == {"observation": 2, "planned": 1}
        return found.table["boolean_value"].to_pylist()

    assert values() == [True, True, True, True, False]
    assert values("task.kinds.observation=false") == [True, False, True, True, False]
    assert values("task.kinds.observation=false", "task.kinds.planned=false") == [True, False, False, True, False]


def test_competing_deaths_can_be_excluded(tmp_path: Path) -> None:
    config = task("readmission", "task.competing_rule=exclude")
    found, counts = extract(tmp_path, [*stay(0, 3), *stay(20, 22), (30, DEATH)], config)
    assert found == {3: True}  # a readmission before the death stays positive; the second discharge goes
    assert (counts["triggers"], counts["competing_deaths"], counts["labels"]) == (4, 1, 3)


def test_without_a_competing_event_death_is_the_end_of_the_record(tmp_path: Path) -> None:
    found, counts = extract(tmp_path, [*stay(0, 3), (10, DEATH)], task("readmission", "task.competing=null"))
    assert found == {}
    assert (counts["censored"], counts["competing_deaths"]) == (1, 0)


# --------------------------------------------------------------------------------- mortality and length of stay

MORTALITY: dict[str, tuple[History, Labels]] = {
    "discharged": (stay(0, 5), {1: False}),
    "died": (stay(0, 5, DIED), {1: True}),
    "death stamped after the discharge coded as death": ([*stay(0, 5, DIED), (5.4, DEATH)], {1: True}),
    "death stamped without a discharge": ([(0, ADMITTED), (5, DEATH)], {1: True}),
    "death at the discharge time": ([*stay(0, 5), (5, DEATH)], {1: True}),
    "died at home": ([*stay(0, 5), (5.4, DEATH)], {1: False}),
    "dated death on the day of a discharge alive": ([*stay(0, 5), (4.625, DEATH)], {1: False}),
    "dated death on the day of a discharge coded as death": ([*stay(0, 5, DIED), (4.625, DEATH)], {1: True}),
    "dated death on the day of a discharge that says nothing": ([*stay(0, 5, UNKNOWN), (4.625, DEATH)], {1: True}),
    "dated death on the day of a discharge without a suffix": (
        [*stay(0, 5, "HOSPITAL_DISCHARGE"), (4.625, DEATH)],
        {1: True},
    ),
    "dated death at a discharge of a date": ([(0, ADMITTED), (4.625, UNKNOWN), (4.625, DEATH)], {1: True}),
    "dated death on the day of a discharge by another word": (
        [*stay(0, 5, "HOSPITAL_DISCHARGE//Expired"), (4.625, DEATH)],
        {1: True},
    ),
    "dated death on the day of a transfer to nobody knows where": (
        [*stay(0, 5, UNKNOWN), *stay(5.1, 9), (4.625, DEATH)],
        {1: False},
    ),
    "dated death without a discharge": ([(0, ADMITTED), (4.625, DEATH)], {1: True}),
    "dated death on the second day, with its discharge": ([*stay(0, 1.2, DIED), (0.625, DEATH)], {1: True}),
    "died in the second day": (stay(0, 1.5, DIED), {1: True}),
    "discharged within 24 hours": (stay(0, 0.9), {}),
    "discharged at 24 hours": (stay(0, 1), {}),
    "died within 24 hours": (stay(0, 0.9, DIED), {}),
    "stay not seen to end": ([(0, ADMITTED), (9, LAB)], {}),
    "admitted again within 24 hours": ([(0, ADMITTED), *stay(0.5, 5)], {1.5: False}),
    "transfer at the same instant": ([*stay(0, 3), *stay(3, 9, DIED)], {1: False, 4: True}),
}


def test_dated_deaths_are_counted_by_where_they_were_put(tmp_path: Path) -> None:
    dead = (4.625, DEATH)
    stays = [[*stay(0, 5), dead], [*stay(0, 5, UNKNOWN), dead], [*stay(0, 5, DIED), dead], [(0, ADMITTED), dead]]
    write_histories(tmp_path, [*stays, [*stay(0, 5), (4.7, DEATH)]])  # the last has a time of day
    found = tasks.read_or_extract_labels(tmp_path, task("mortality"))
    assert found.details.deaths == {"after a discharge alive": 1, "at a discharge": 2, "without a discharge": 1}
    assert found.counts["positives"] == 4  # the last died before the discharge


@pytest.mark.parametrize("case", MORTALITY)
def test_mortality_rules(case: str, tmp_path: Path) -> None:
    history, expected = MORTALITY[case]
    found, counts = extract(tmp_path, history, task("mortality"))
    assert found == expected
    assert counts["labels"] == 2 + len(expected)
    admissions = sum(code == ADMITTED for _, code in history)
    assert (counts["triggers"], counts["excluded"]) == (2 + admissions, admissions - len(expected))


def test_the_gap_before_the_target_can_be_widened(tmp_path: Path) -> None:
    config = task("mortality", "task.definition.windows.gap.end='start + 48h'")
    found, _ = extract(tmp_path, [*stay(0, 1.5, DIED), *stay(10, 15, DIED)], config)
    assert found == {11: True}


@pytest.mark.parametrize(
    ("history", "expected", "stayed"),
    [
        (stay(0, 7), {1: False}, 7),
        (stay(0, 7.01), {1: True}, 7.01),
        (stay(2, 12.5, DIED), {3: True}, 10.5),
        ([*stay(2, 12.5), (11.625, DEATH)], {3: True}, 10.5),  # a dated death on the day of a discharge alive
        (stay(0, 0.9), {}, None),
    ],
)
def test_length_of_stay_rules(history: History, expected: Labels, stayed: float | None, tmp_path: Path) -> None:
    found, _ = extract(tmp_path, history, task("length_of_stay"))
    assert found == expected
    rows = [
        row
        for row in tasks.read_or_extract_labels(tmp_path, task("length_of_stay")).table.to_pylist()
        if row["subject_id"] == 1
    ]
    assert [row["float_value"] for row in rows] == ([] if stayed is None else [pytest.approx(stayed)])


TRANSFER = (
    '+task.definition.windows.transfer={start: target.end, end: "start + 6h", start_inclusive: true, '
    'end_inclusive: true, has: {hospital_admission: "(None, 0)"}}'
)
ARRIVAL = (
    '+task.definition.windows.arrival={start: "end - 6h", end: trigger, start_inclusive: true, '
    'end_inclusive: true, has: {hospital_discharge: "(None, 0)"}}'
)


@pytest.mark.parametrize(
    ("name", "history", "expected", "overrides", "without"),
    [
        ("mortality", [*stay(0, 3), *stay(3.01, 4.5, DIED)], {1: False, 4.01: True}, [TRANSFER], {4.01: True}),
        ("length_of_stay", [*stay(0, 5), *stay(5.01, 10)], {1: False, 6.01: False}, [TRANSFER, ARRIVAL], {}),
    ],
)
def test_labels_of_stays_that_a_transfer_cuts_are_counted_and_can_be_left_out(
    name: str, history: History, expected: Labels, overrides: list[str], without: Labels, tmp_path: Path
) -> None:
    found, counts = extract(tmp_path, history, task(name))
    assert (found, counts["transfers"]) == (expected, 1)
    found, counts = extract(tmp_path, history, task(name, *overrides))
    assert (found, "transfers" in counts) == (without, False)
    assert counts["excluded"] == len(overrides)
    later = [(day if day < 4 else day + 0.3, code) for day, code in stay(0, 3) + stay(4, 6)]
    assert "transfers" not in extract(tmp_path, later, task(name))[1]


# ----------------------------------------------------------------------------------------------------- real data


def counted_by_hand(path: Path) -> dict[str, Counter[str]]:
    """The counts of each task in a MIMIC-style shard, by loops over a patient's events and nothing else."""
    table = pq.read_table(path, columns=["subject_id", "time", "code"])
    ends = table.group_by("subject_id").aggregate([("time", "max")]).to_pydict()
    patients: dict[int, list[tuple[datetime, str]]] = {subject: [] for subject in ends["subject_id"]}
    for row in table.filter(pc.match_substring_regex(table["code"], "^(HOSPITAL_|MEDS_DEATH)")).to_pylist():
        patients[row["subject_id"]].append((row["time"], row["code"]))
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("readmission", "mortality", "length_of_stay")}
    for events, last in zip(patients.values(), ends["time_max"], strict=True):
        admissions = [t for t, code in events if code.startswith("HOSPITAL_ADMISSION//")]
        discharges = [t for t, code in events if code.startswith("HOSPITAL_DISCHARGE//")]
        deaths = [t for t, code in events if code == DIED]
        deaths += [t if t.time() != time() else t + timedelta(days=1, microseconds=-1) for t in dated(events)]
        last = max([last, *deaths])
        labelled: Counter[str] = Counter()
        for t in sorted(set(discharges)):
            outcome = readmission_by_hand(t, admissions, deaths, last)
            counts["readmission"].update(["triggers", outcome])
            labelled["readmission"] += outcome in ("positives", "negatives", "competing_deaths")
        for t in sorted(set(admissions)):
            ends = [e for e in (*discharges, *deaths) if e > t]
            again = any(t < a <= t + timedelta(days=1) for a in admissions)
            if again or not ends or min(ends) <= t + timedelta(days=1):
                continue
            counts["mortality"].update(["labels", *(["positives"] if min(ends) in deaths else [])])
            counts["length_of_stay"].update(["labels", *(["positives"] if min(ends) - t > timedelta(days=7) else [])])
        counts["readmission"]["subjects"] += labelled["readmission"] > 0
    readmission = counts["readmission"]
    readmission["labels"] = readmission["positives"] + readmission["negatives"] + readmission["competing_deaths"]
    return counts


def dated(events: list[tuple[datetime, str]]) -> list[datetime]:
    return [t for t, code in events if code == DEATH]


def readmission_by_hand(t: datetime, admissions: list[datetime], deaths: list[datetime], last: datetime) -> str:
    end = t + timedelta(days=30)
    if any(t <= a <= t + timedelta(hours=6) for a in admissions):
        return "excluded"
    if any(d <= t for d in deaths):
        return "died_before"
    dies, readmitted = any(d <= end for d in deaths), any(t < a <= end for a in admissions)
    if last < end and not dies:
        return "censored"
    return "positives" if readmitted else "competing_deaths" if dies else "negatives"


def test_mimic_counts_equal_a_count_by_hand(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "mimic_iv_demo_meds" / "data"
    (tmp_path / "data").symlink_to(data.resolve())
    by_hand: dict[str, Counter[str]] = {}
    for path in sorted(data.rglob("*.parquet")):
        for name, counts in counted_by_hand(path).items():
            by_hand.setdefault(name, Counter()).update(counts)
    for name, expected in by_hand.items():
        result = tasks.read_or_extract_labels(tmp_path, task(name))
        counted = [key for key in expected if key != "negatives"]
        assert {key: result.counts[key] for key in counted} == {key: expected[key] for key in counted}, name
        assert result.counts["labels"] == len(result.table)
    assert by_hand["readmission"] == {
        "triggers": 214,
        "excluded": 3,
        "died_before": 11,
        "positives": 39,
        "negatives": 128,
        "competing_deaths": 5,
        "censored": 28,
        "labels": 172,
        "subjects": 56,
    }
    assert tasks.read_or_extract_labels(tmp_path, task("readmission")).details.kinds == {
        "observation": 16,
        "planned": 3,
    }
    assert by_hand["mortality"] == {"labels": 188, "positives": 10}
    assert by_hand["length_of_stay"] == {"labels": 188, "positives": 70}
