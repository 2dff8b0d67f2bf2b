"""Task definitions: what their windows mean, against loops over a patient's events, and what is refused."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stays import ADMITTED, DEATH, HOME, LAB, START, History, Labels, days, stay, task, write_histories

from hymate.config import TaskConfig
from hymate.data import definition, tasks
from hymate.data.known import KnownConfig, KnownRule
from hymate.errors import ConfigError, UserError

A, B, X = "A", "B", "X"
PREDICATES: dict[str, Any] = {name: {"code": name} for name in (A, B, X)}


# ---------------------------------------------------------------------------------------------------- by loops


def edge_by_hand(text: str | None, at: float, included: bool, events: History, last: bool) -> float | None:
    """The time of an edge that is given relative to one at `at`; None where the record has none."""
    times = sorted({t for t, _ in events})
    if text is None:
        found = times[-1] if last else times[0]
        return found if (found >= at if last else found <= at) else None
    if "->" in text or "<-" in text:
        forward, code = "->" in text, text.split()[-1]
        near = [t for t, c in events if c == code and ((t > at if forward else t < at) or (included and t == at))]
        return (min if forward else max)(near, default=None)
    match = re.search(r"([+-]) (\d+)h", text)
    return at if match is None else round(at + int(match[1] + match[2]) / 24, 6)


def by_hand(windows: dict[str, dict[str, Any]], events: History) -> dict[float, tuple[float, bool]]:
    """Trigger -> prediction time and label, window by window and event by event."""
    found = {}
    for trigger in sorted({t for t, code in events if code == A}):
        edges, holds, answer, label, until = {"trigger": trigger}, True, math.nan, None, math.nan
        inside_label: list[float] = []
        for name, window in windows.items():
            by_end = window["start"] is None or window["start"].split()[0] == "end"
            root, other = ("end", "start") if by_end else ("start", "end")
            reference = edges[window[root].split()[0]]
            edge = edge_by_hand(window[root], reference, False, events, root == "end")
            if edge is not None:
                edges[f"{name}.{root}"] = edge
                edge = edge_by_hand(window[other], edge, window[f"{root}_inclusive"], events, other == "end")
            if edge is None:
                holds = False
                break
            edges[f"{name}.{other}"] = edge
            start, end = edges[f"{name}.start"], edges[f"{name}.end"]

            def inside(t: float, start: float = start, end: float = end, window: dict[str, Any] = window) -> bool:
                at_start, at_end = window["start_inclusive"], window["end_inclusive"]
                return (start <= t if at_start else start < t) and (t <= end if at_end else t < end)

            counts = {code: sum(c == code and inside(t) for t, c in events) for code in (A, B, X)}
            holds = holds and all(lo <= counts[c] <= hi for c, (lo, hi) in window.get("limits", {}).items())
            if "index_timestamp" in window:
                answer = edges[f"{name}.{window['index_timestamp']}"]
            if "label" in window:
                label, until = counts[window["label"]] > 0, end
                inside_label = [t for t, c in events if c == window["label"] and inside(t)]
        if holds and until >= answer and all(t > answer for t in inside_label):
            assert label is not None
            found[trigger] = (answer, label)
    return found


@st.composite
def random_windows(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Two or three windows, each relative to the trigger or to one before it."""
    windows: dict[str, dict[str, Any]] = {}
    references = ["trigger"]
    for name in ("one", "two", "three")[: draw(st.integers(2, 3))]:
        root, other = draw(st.sampled_from([("start", "end"), ("end", "start")]))
        arrow, sign = ("->", "+") if root == "start" else ("<-", "-")
        reference = draw(st.sampled_from(references))
        window: dict[str, Any] = {
            root: draw(st.sampled_from([reference, f"{reference} + 24h", f"{reference} - 12h", f"{reference} -> B"])),
            other: draw(st.sampled_from([None, f"{root} {sign} 36h", f"{root} {arrow} B", f"{root} {arrow} A"])),
            "start_inclusive": draw(st.booleans()),
            "end_inclusive": draw(st.booleans()),
        }
        if draw(st.booleans()):
            window["limits"] = {X: draw(st.sampled_from([(0, 0), (0, 2), (1, 9)]))}
        windows[name] = window
        references += [f"{name}.start", f"{name}.end"]
    windows["one"]["index_timestamp"] = draw(st.sampled_from(["start", "end"]))
    windows["two"]["label"] = draw(st.sampled_from([B, X]))
    return windows


@settings(max_examples=150)
@given(
    windows=random_windows(),
    histories=st.lists(
        st.lists(st.tuples(st.integers(0, 12), st.sampled_from([A, B, X])), min_size=1, max_size=10),
        min_size=1,
        max_size=4,
    ),
)
def test_windows_are_what_the_definition_says(windows: dict[str, dict[str, Any]], histories: list[Any]) -> None:
    records: list[History] = [sorted((t / 2, code) for t, code in history) for history in histories]
    specs = {}
    for name, window in windows.items():
        has = {code: f"({lo}, {hi})" for code, (lo, hi) in window.get("limits", {}).items()}
        specs[name] = {**{key: value for key, value in window.items() if key != "limits"}, "has": has}
    config = definition.parse(
        TaskConfig(name="made-up", definition={"predicates": PREDICATES, "trigger": A, "windows": specs})
    )
    rows = [
        {"subject_id": s, "time": START + timedelta(days=t), **{c: sum(e == (t, c) for e in record) for c in (A, B, X)}}
        for s, record in enumerate(records)
        for t in sorted({t for t, _ in record})
    ]
    events = pl.DataFrame(rows, schema_overrides={"time": pl.Datetime("us")})
    found = definition.find(config, events.with_columns(pl.col(windows["two"]["label"]).alias(definition.SEEN)))
    got = {
        (row["subject_id"], days(row["trigger"])): (days(row["prediction_time"]), row["event"])
        for row in found.rows.to_dicts()
    }
    expected = {(s, t): answer for s, record in enumerate(records) for t, answer in by_hand(windows, record).items()}
    assert got == expected
    assert found.num_triggers == len(got) + sum(found.excluded.values())


# ----------------------------------------------------------------------------- shapes that aces-cli gets wrong


def labelled(root: Path, history: History, config: TaskConfig) -> Labels:
    write_histories(root, [history, [*stay(0, 2), *stay(10, 12), (200, DEATH)]])
    rows = [row for row in tasks.read_or_extract_labels(root, config).table.to_pylist() if row["subject_id"] == 1]
    return {days(row["prediction_time"]): row["boolean_value"] for row in rows}


@pytest.mark.parametrize(("edge", "expected"), [("end", 3.0), ("start", 2.0)])
def test_an_input_window_may_start_relative_to_its_end(edge: str, expected: float, tmp_path: Path) -> None:
    window = "task.definition.windows.input"
    config = task("readmission", f'{window}.start="end - 24h"', f"{window}.index_timestamp={edge}")
    assert labelled(tmp_path, [*stay(0, 3), (20, ADMITTED), (80, LAB)], config) == {expected: True}


def test_a_window_that_runs_to_the_next_discharge_does_not_end_at_the_one_that_it_starts_at(tmp_path: Path) -> None:
    config = task("readmission", "task.definition.windows.target.end='start -> hospital_discharge'")
    assert labelled(tmp_path, [*stay(0, 3), *stay(20, 25), (80, LAB)], config) == {3: True}


def test_a_label_whose_window_is_over_at_the_prediction_is_none(tmp_path: Path) -> None:
    late = "task.definition.windows.{}"
    added = "{start: target.end, end: start + 7d, start_inclusive: true, end_inclusive: true, index_timestamp: end}"
    config = task("readmission", f"+{late.format('later')}={added}", f"~{late.format('input.index_timestamp')}")
    excluded = r"excluded: 3 because of window target \(over before the prediction time\)"
    with pytest.raises(UserError, match=rf"no trigger gets a label \(.*; {excluded};"):
        labelled(tmp_path, [*stay(0, 3), (20, ADMITTED), (80, LAB)], config)


def test_a_label_whose_event_has_been_seen_at_the_prediction_is_none(tmp_path: Path) -> None:
    """Each discharge's own admission lies in the label window. Coded later than stamped, it could not be seen."""
    target = "task.definition.windows.target"
    config = task("readmission", f"{target}.start='trigger - 30d'", f"{target}.end='start + 60d'")
    history: History = [*stay(0, 3), *stay(80, 83), (120, LAB)]
    with pytest.raises(
        UserError, match=r"excluded: 4 because of window target \(its event is at or before the prediction time\)"
    ):
        labelled(tmp_path, history, config)
    late = KnownConfig({"coded": KnownRule("^HOSPITAL_ADMISSION", delay_hours=24.0 * 60)})
    parsed = definition.parse(config)
    events = definition.read_predicates(tmp_path / "data" / "train" / "0.parquet", parsed, late).events
    assert definition.find(parsed, events).rows["event"].to_list() == [True] * 4


@pytest.mark.parametrize("name", ["mortality", "length_of_stay"])
def test_a_stay_that_begins_and_ends_at_one_time_is_over(name: str, tmp_path: Path) -> None:
    """Where times are dates, a stay of a day does not run to the discharge of the next stay."""
    history: History = [(5, ADMITTED), (5, HOME), *stay(20, 30, "HOSPITAL_DISCHARGE//DIED")]
    assert labelled(tmp_path, history, task(name)) == {21: True}


@pytest.mark.parametrize("name", ["readmission", "mortality", "length_of_stay"])
def test_the_tasks_that_come_along_mean_the_same_to_aces(name: str, shared_data: Path) -> None:
    query = pytest.importorskip("aces.query").query
    for path in sorted((shared_data / "mimic_iv_demo_meds" / "data").rglob("*.parquet")):
        config = definition.parse(task(name))
        events = definition.read_predicates(path, config, KnownConfig()).events
        ours = definition.find(config, events).rows.select("subject_id", "trigger", "prediction_time", "event")
        theirs = query(config, events.rename({"time": "timestamp"})).select(
            "subject_id", "trigger", prediction_time="index_timestamp", event=pl.col("label") > 0
        )
        assert len(ours) and ours.equals(theirs.sort("subject_id", "trigger"))


# ------------------------------------------------------------------------------------------------- predicates


def with_values(root: Path, rows: list[tuple[float | None, str, float | None]], **more: list[str]) -> None:
    times = [None if day is None else START + timedelta(days=day) for day, _, _ in rows]
    columns = {
        "subject_id": pa.array([1] * len(rows), pa.int64()),
        "time": pa.array(times, pa.timestamp("us")),
        "code": pa.array([code for _, code, _ in rows]),
        "numeric_value": pa.array([value for _, _, value in rows], pa.float32()),
        **{name: pa.array(values) for name, values in more.items()},
    }
    (root / "data" / "train").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), root / "data" / "train" / "0.parquet")


STAY: list[tuple[float | None, str, float | None]] = [
    (None, "GENDER//F", None),
    (0, ADMITTED, None),
    (0.5, LAB, 7.0),
    (3, HOME, None),
    (9, ADMITTED, None),
    (80, LAB, None),
]


def test_every_predicate_s_events_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_values(tmp_path, STAY, ward=["a"] * 5 + ["b"])
    config = task(
        "readmission",
        "+task.definition.predicates.high={code: LAB//50912//mg/dL, value_min: 5}",
        "+task.definition.predicates.at_b={code: LAB//50912//mg/dL, ward: b}",
        "+task.definition.patient_demographics={female: {code: GENDER//F}}",
    )
    found = tasks.read_or_extract_labels(tmp_path, config)
    assert found.counts["labels"] == 1
    counted = {"hospital_admission": 2, "hospital_discharge": 1, "died": 0, "high": 1, "at_b": 1, "female": 1}
    assert {name: found.details.predicates[name] for name in counted} == counted
    assert set(found.details.unmatched()) == {"died", "observation", "planned"}
    assert "no event matches died: check the codes" in capsys.readouterr().err  # kinds have counts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.definition.predicates.hospital_discharge.code.regex='^DIS'", "its trigger hospital_discharge: set"),
        (
            "task.definition.predicates.hospital_admission.code.regex='^ADM'",
            "label's predicate hospital_admission: set",
        ),
        (
            "+task.definition.predicates.hospital_admission.value_min=1",
            "hospital_admission (2 events have the code of hospital_admission, but no value in its range): set",
        ),
        (
            "+task.definition.patient_demographics={male: {code: GENDER//M}}",
            "static predicate male: set task.definition.patient_demographics.male",
        ),
        # a code without a time counts in no window
        ("task.definition.predicates.hospital_admission.code.regex='^GENDER'", "label's predicate hospital_admission"),
        ("+task.definition.predicates.hospital_admission.ward=b", "lacks a column that task.definition names"),
    ],
)
def test_a_predicate_that_never_holds_is_named(override: str, message: str, tmp_path: Path) -> None:
    with_values(tmp_path, STAY)
    with pytest.raises(UserError) as error:
        tasks.read_or_extract_labels(tmp_path, task("readmission", override))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "role"),
    [("task.definition.trigger=never", "trigger"), ("task.definition.windows.target.label=never", "label's predicate")],
)
def test_a_derived_predicate_that_never_holds_is_named(override: str, role: str, tmp_path: Path) -> None:
    derived = '{expr: "and(hospital_admission, hospital_discharge)"}'
    config = task("readmission", f"+task.definition.predicates.never={derived}", override)
    with pytest.raises(UserError, match=rf"no event matches its {role} never: set task.definition.predicates.never"):
        labelled(tmp_path, [*stay(0, 3), (20, ADMITTED), (80, LAB)], config)


def test_prediction_needs_no_event_that_a_label_could_come_of(tmp_path: Path) -> None:
    with_values(tmp_path, STAY)
    mortality = task("mortality")
    with pytest.raises(UserError, match="label's predicate died: set"):
        tasks.read_or_extract_labels(tmp_path, mortality)
    assert tasks.read_or_extract_labels(tmp_path, mortality, times_only=True).counts["labels"] == 1


def test_a_derived_predicate_may_read_a_static_one(tmp_path: Path) -> None:
    with_values(tmp_path, STAY)
    for code, labels in (("GENDER//F", 1), ("GENDER//M", 0)):
        config = task(
            "readmission",
            f"+task.definition.predicates.her={{code: {code}, static: true}}",
            "+task.definition.predicates.her_discharge={expr: 'and(hospital_discharge, her)'}",
            "task.definition.trigger=her_discharge",
        )
        if labels:
            assert tasks.read_or_extract_labels(tmp_path, config).counts["triggers"] == 1
        else:
            with pytest.raises(UserError, match="its trigger her: set"):
                tasks.read_or_extract_labels(tmp_path, config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.definition.windows.input.end=target.end task.definition.windows.target.start=input.end", "LoopError"),
        ("+task.definition.windows.target.has={her: '(1, None)'}", "counts her, which is static"),
        ("+task.definition.windows.target.has={died: '(3, 1)'}", "is no range"),
        ("task.definition.windows.target.end='start + 99999999d'", "longer than the years"),
        ("+task.definition.predicates.time={code: A}", "cannot be named time"),
        ("task.definition.trigger=her", "trigger her is static"),
    ],
)
def test_a_definition_that_cannot_be_meant_is_refused(override: str, message: str) -> None:
    overrides = re.split(r" (?=\+?task\.)", override)
    static = "+task.definition.patient_demographics={her: {code: GENDER//F}}"
    with pytest.raises(ConfigError, match=message) as error:
        definition.parse(task("readmission", static, *overrides))
    assert "\n" not in str(error.value)
