"""When events become known: every prefix of a history is what was known then, in every command and every bundle."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_meds import Row, config, data_table, files, read_back, write_raw
from small_models import SMALL, vocabulary_of, write_risk_bundle

from hymate.command import load
from hymate.config import DataConfig
from hymate.data import known as module
from hymate.data import meds as meds_module
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.known import KnownConfig, KnownRule, differing, ends_of_stays, sentences
from hymate.data.meds import US_PER_DAY, US_PER_HOUR
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.synthetic.course import SyntheticConfig
from hymate.data.tasks import read_or_extract_labels
from hymate.errors import ConfigError, UserError
from hymate.inference.bundle import read_bundle
from hymate.predict import PredictConfig, run
from hymate.trees import build
from hymate.tuning.search import _other_rules
from hymate.tuning.trial import starting_point

HOUR, DAY = US_PER_HOUR, US_PER_DAY
IN, OUT = "HOSPITAL_ADMISSION//X", "HOSPITAL_DISCHARGE//HOME"
NEVER = module.NEVER
MIMIC = PrepareConfig("meds", "O", "R").known

# ------------------------------------------------------------------------------------------------------- rules


def test_the_rules_out_of_the_box_are_those_of_the_file() -> None:
    assert list(MIMIC.rules) == ["billing", "death_dates", "clinic_dates"]
    given = ["source=meds", "raw=R", "out=O"]
    assert load("prepare", given, PrepareConfig).known == MIMIC
    assert load("prepare", [*given, "known=none"], PrepareConfig).known == KnownConfig()
    changed = [*given, "known.rules.billing.delay_hours=120", '+known.rules.labs={codes: "^LAB//5", delay_hours: 2}']
    rules = load("prepare", changed, PrepareConfig).known.rules
    assert rules["billing"].delay_hours == 120 and rules["labs"] == KnownRule("^LAB//5", delay_hours=2.0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"codes": "("}, r"known\.rules\.r\.codes must be a regular expression \(RE2\), got '\('"),
        ({"codes": "(?=a)"}, "must be a regular expression"),
        ({"codes": "a", "when": "tomorrow"}, r"known\.rules\.r\.when must be one of stamp, end_of_day"),
        ({"codes": "a", "delay_hours": -1}, r"known\.rules\.r\.delay_hours must be in"),
        ({"codes": "a", "delay_hours": float("nan")}, "delay_hours must be a finite number, got nan"),
        ({"codes": "a", "delay": 1}, r"known\.rules\.r\.delay is not a known key"),
    ],
)
def test_a_mistake_in_a_rule_is_one_line(rule: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^[^\n]*{message}[^\n]*$"):
        build(KnownConfig, {"rules": {"r": rule}}, "known.")


def test_stays() -> None:
    admission, discharge = np.array([2.5, 9.5, 20]) * DAY, np.array([5.5, 9.25, 12.5]) * DAY
    expected = {
        0: 1,  # before everything: the end of its day
        2: 5.5,  # 00:00 of the day of the admission
        2.25: 5.5,  # some hours before it, on its day
        3: 5.5,
        5: 5.5,  # 00:00 of the day of the discharge
        5.5: 5.5,  # at the discharge
        5.75: 6,  # after it: outside
        7: 8,
        9: 9.25,  # a discharge on its day, whose admission the record lacks, comes before the next stay
        9.375: 12.5,  # on the day of the next admission
        9.5: 12.5,
        12.5: 12.5,
        20: NEVER / DAY,  # the record does not see that stay end
        500: NEVER / DAY,
    }
    stamps = (np.array(list(expected)) * DAY).astype(np.int64)
    ends = ends_of_stays(stamps, admission.astype(np.int64), discharge.astype(np.int64))
    assert dict(zip(expected, (ends / DAY).tolist(), strict=True)) == expected


CODES = ["A", "B", "C//1", IN, OUT, "MEDS_BIRTH//X"]
rule_of = st.builds(
    KnownRule,
    codes=st.sampled_from(["A", "^B$", "^C//", "A|B", "nothing", "."]),
    when=st.sampled_from(["stamp", "end_of_day", "end_of_stay", "never"]),
    delay_hours=st.sampled_from([0.0, 0.5, 30.0]),
    at_midnight=st.booleans(),
)
rules_of = st.lists(rule_of, max_size=4).map(lambda rules: KnownConfig({f"r{i}": r for i, r in enumerate(rules)}))
moments = st.one_of(st.none(), st.integers(-4, 12).map(lambda quarter: quarter * DAY // 4), st.integers(-DAY, 3 * DAY))
subject_rows = st.lists(
    st.tuples(moments, st.sampled_from(CODES), st.sampled_from([None, 1.5])), min_size=1, max_size=12
).map(lambda rows: sorted(rows, key=lambda row: (row[0] is not None, row[0] or 0)))


def plain(rows: list[Row], known: KnownConfig) -> list[Row]:
    """What a history holds of one subject's rows, event by event, as configs/known/mimic.yaml says it."""
    found = []
    stays = [(t, code == OUT) for _, t, code, _ in rows if t is not None and code in (IN, OUT)]
    for place, (subject, stamp, code, value) in enumerate(rows):
        if code.startswith("MEDS_BIRTH") and stamp is not None:
            continue
        matching = [
            rule
            for rule in known.rules.values()
            if re.search(rule.codes, code) and (not rule.at_midnight or (stamp is not None and stamp % DAY == 0))
        ]
        rule = KnownRule(".") if code.startswith("MEDS_BIRTH") or not matching else matching[0]
        if rule.when == "never":
            continue
        time = stamp
        if stamp is not None:
            day = (stamp // DAY + 1) * DAY
            time = day if rule.when != "stamp" else stamp
            if rule.when == "end_of_stay":
                before = [(t, not out) for t, out in stays if t < stamp or (t == stamp and not out)]
                inside = bool(before) and max(before)[1]
                ends = [t for t, out in stays if out and t >= stamp]
                if stamp in ends or inside or any(stamp < t <= day for t, _ in stays):
                    time = min(ends, default=None)
                if time is None:
                    continue
                if value is None and time > stamp:
                    value = float(np.float32((time - stamp) / DAY))
            time += round(rule.delay_hours * HOUR)
        found.append((time is not None, time, place, (subject, time, code, value)))
    return [row for *_, row in sorted(found, key=lambda event: (event[0], event[1] or 0, event[2]))]


@pytest.mark.slow
@settings(max_examples=30)
@given(subjects=st.lists(subject_rows, min_size=1, max_size=3), known=rules_of, now=st.integers(-DAY, 5 * DAY))
def test_every_prefix_of_a_history_is_what_was_known_then(
    subjects: list[list[tuple]], known: KnownConfig, now: int
) -> None:
    """A record that ends now gives, up to now, the same history as the whole record: nothing later is in it."""
    shards = {"train/0": [(i, *row) for i, rows in enumerate(subjects) for row in rows]}
    until_now = {"train/0": [row for row in shards["train/0"] if row[1] is None or row[1] <= now]}
    histories = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("whole", shards), ("now", until_now)):
            if not rows["train/0"]:
                continue
            raw, out = Path(folder) / f"raw-{name}", Path(folder) / name
            with patch.object(meds_module, "ROWS", 5):  # chunks that hold a subject or two
                prepare(config(write_raw(raw, rows), out, known=known))
            histories[name] = read_back(out)
            events = json.loads((out / "histories/metadata.json").read_text()).get("known_events", {})
            kept = [row for row in rows["train/0"] if row[1] is None or not row[2].startswith("MEDS_BIRTH")]
            held = sum(map(len, histories[name].values()))
            assert held == len(kept) - sum(of["left_out"] for of in events.values())
    for i in range(len(subjects)):
        whole = plain([(i, *row) for row in subjects[i]], known)
        assert histories["whole"][i] == whole
        seen = [row for row in whole if row[1] is None or row[1] <= now]
        then = histories.get("now", {}).get(i, [])
        assert [row for row in then if row[1] is None or row[1] <= now] == seen


# -------------------------------------------------------------------------------------------- what is prepared

ROWS: dict[str, list[Row]] = {
    "train/0": [
        (1, None, "OUTCOME//DIED", None),
        (1, int(0.5 * DAY), IN, None),
        (1, DAY, "PROCEDURE//ICD//10//X", None),
        (1, int(1.2 * DAY), "LAB//1", 5.0),
        (1, int(2.5 * DAY), "DIAGNOSIS//ICD//10//I50", None),
        (1, int(2.5 * DAY), OUT, None),
        (1, int(2.5 * DAY), "DRG//HCFA//1", None),
        (1, 3 * DAY, "MEDS_DEATH", None),
    ],
    "tuning/0": [(2, int(0.5 * DAY), IN, None), (2, DAY, "HCPCS//Y", None), (2, int(2.2 * DAY), "MEDS_DEATH", None)],
}
BEYOND = replace(MIMIC, rules={**MIMIC.rules, "outcome": KnownRule("^OUTCOME//", "never")})


def test_codes_of_mimic_style_data_enter_when_they_become_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_raw(tmp_path / "raw", ROWS), tmp_path / "out"
    prepare(config(raw, out, known=BEYOND))
    coded = int(2.5 * DAY) + 30 * DAY
    assert read_back(out) == {
        1: [
            (1, int(0.5 * DAY), IN, None),
            (1, int(1.2 * DAY), "LAB//1", 5.0),
            (1, int(2.5 * DAY), OUT, None),
            (1, 4 * DAY, "MEDS_DEATH", None),
            (1, coded, "PROCEDURE//ICD//10//X", 1.5),  # days before the end of the stay
            (1, coded, "DIAGNOSIS//ICD//10//I50", None),
            (1, coded, "DRG//HCFA//1", None),
        ],
        2: [(2, int(0.5 * DAY), IN, None), (2, int(2.2 * DAY), "MEDS_DEATH", None)],
    }
    histories = Histories.open(out)
    assert histories.known == BEYOND
    assert histories.known_events == {
        "billing": {"moved": 3, "left_out": 1},  # a stay that the record does not see end
        "death_dates": {"moved": 1, "left_out": 0},
        "clinic_dates": {"moved": 0, "left_out": 0},
        "outcome": {"moved": 0, "left_out": 1},
    }
    found = sentences(histories.known, histories.known_events)
    assert found == [
        "billing: 3 events moved to 720 hours after the end of their stay, 1 events left out "
        "(not known within the record)",
        "death_dates: 1 events moved to the end of their day",
        "outcome: 1 events left out",
    ]
    assert all(sentence in capsys.readouterr().err.replace("\n", " ") for sentence in found[:1])
    vocabulary = pq.read_table(out / "histories/vocabulary.parquet").to_pylist()
    count = {row["code"]: (row["count"], row["value_count"], row["median"]) for row in vocabulary}
    assert count["PROCEDURE//ICD//10//X"] == (1, 1, 1.5) and count["OUTCOME//DIED"] == (0, 0, 0)
    # labels are extracted from the true stamps
    assert pq.read_table(out / "data/train/0.parquet").equals(data_table(ROWS["train/0"]))


def test_other_rules_are_another_preparation(tmp_path: Path) -> None:
    raw, out = write_raw(tmp_path / "raw", ROWS), tmp_path / "out"
    prepare(config(raw, out))
    before = files(out)
    prepare(config(raw, out, known=replace(MIMIC)))
    assert files(out) == before
    for known in (KnownConfig(), BEYOND, replace(MIMIC, discharge="^LEFT")):
        with pytest.raises(UserError, match="prepared from other data or settings"):
            prepare(config(raw, out, known=known))


def test_a_dataset_of_before_has_no_rules(tmp_path: Path) -> None:
    prepare(config(write_raw(tmp_path / "raw", ROWS), tmp_path / "out", known=KnownConfig()))
    metadata = json.loads((tmp_path / "out/histories/metadata.json").read_text())
    assert "known" not in metadata and Histories.open(tmp_path / "out").known == KnownConfig()
    for damage in ({"known": {"rules": {"a": {}}}}, {"known_events": {"a": {"moved": 1}}}, {"known": 1}):
        (tmp_path / "out/histories/metadata.json").write_text(json.dumps({**metadata, **damage}))
        with pytest.raises(UserError, match=r"^[^\n]*metadata\.json: damaged"):
            Histories.open(tmp_path / "out")


def test_other_sources_know_their_events_at_their_stamps(tmp_path: Path) -> None:
    made = PrepareConfig("synthetic", str(tmp_path), workers=1, synthetic=SyntheticConfig(subjects=20, mean_events=200))
    prepare(made)
    histories = Histories.open(tmp_path)
    rows = pa.concat_tables([pq.read_table(path) for path in (tmp_path / "data").rglob("*.parquet")]).to_pylist()
    stamps = sorted((row["subject_id"], row["code"], row["time"].isoformat()) for row in rows if row["time"])
    held = [
        (history.subject_id, histories.codes[code], str(np.datetime64(int(time), "s")))
        for history in histories.read(np.arange(20))
        for code, time in zip(history.code, history.time // 10**6, strict=True)
    ]
    assert sorted(held) == [row for row in stamps if row[1] != "MEDS_BIRTH"] and histories.known == KnownConfig()
    with pytest.raises(ConfigError, match="known is for source=meds, not for source=synthetic"):
        replace(made, known=BEYOND)


@pytest.mark.slow
def test_no_prediction_on_the_mimic_demo_sees_codes_before_they_are_known(tmp_path: Path, shared_data: Path) -> None:
    raw = shared_data / "mimic_iv_demo_meds"
    counts: dict[str, list[int]] = {"mortality": [], "readmission": []}
    for name in ("none", "mimic"):
        given = ["source=meds", f"raw={raw}", f"out={tmp_path / name}", "workers=1", f"known={name}"]
        prepare(load("prepare", given, PrepareConfig))
        histories = Histories.open(tmp_path / name)
        for task, codes in (("mortality", "^PROCEDURE//ICD"), ("readmission", "^(DIAGNOSIS//ICD|DRG)//")):
            chosen = np.array([bool(re.search(codes, code)) for code in histories.codes])
            given = [f"task={task}", "bundle=B", "data.path=D", "out=O"]
            table = read_or_extract_labels(tmp_path / name, load("predict", given, PredictConfig).task).table
            early = 0
            for split in ("train", "tuning", "held_out"):
                examples = labelled_examples(histories, table, split)
                columns = (examples.position_E, examples.stop_E, examples.prediction_time_E)
                for position, stop, now in zip(*columns, strict=True):
                    (history,) = histories.read([position])
                    own = history.time[:stop][chosen[history.code[:stop]]]
                    early += bool((own >= (now // DAY * DAY if task == "mortality" else now)).any())
            counts[task].append(early)
    assert counts["mortality"] == [48, 0] and counts["readmission"][1] == 0 < counts["readmission"][0]
    assert histories.known_events["billing"] == {"moved": 4440, "left_out": 0}


# ---------------------------------------------------------------------------------------------- what is trained


def test_configurations_differ_where_they_do_another_thing() -> None:
    codes = ["A", "B", IN, OUT, "MEDS_BIRTH"]
    one = KnownConfig({"a": KnownRule("^A$", "end_of_day"), "rest": KnownRule(".")})
    same = KnownConfig({"z": KnownRule("^A", "end_of_day"), "no": KnownRule("^Q", "never")})
    assert differing(one, same, codes) == []
    assert differing(one, KnownConfig(), codes) == ["A"]
    stay = KnownConfig({"a": KnownRule("B", "end_of_stay")})
    assert differing(stay, replace(stay, discharge=f"^{OUT}"), codes) == []
    assert differing(stay, replace(stay, discharge="^LEFT"), codes) == ["B"]
    assert differing(stay, KnownConfig({"m": KnownRule("B", "never", at_midnight=True), **stay.rules}), codes) == ["B"]


def test_fine_tuning_says_where_pretraining_went_by_other_rules(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", ROWS)
    for name in ("mimic", "none"):
        prepare(config(raw, tmp_path / name, known=MIMIC if name == "mimic" else KnownConfig()))
    bundle = write_risk_bundle(tmp_path / "bundle", vocabulary_of(tmp_path / "mimic"), known=KnownConfig())
    start = starting_point(DataConfig(str(tmp_path / "mimic")), None, str(bundle))
    assert _other_rules(start, Histories.open(tmp_path / "none")) == []
    (sentence,) = _other_rules(start, Histories.open(tmp_path / "mimic"))
    assert "the events of 5 codes became known at other times" in sentence
    new = starting_point(DataConfig(str(tmp_path / "mimic")), SMALL, None)
    assert _other_rules(new, Histories.open(tmp_path / "mimic")) == []


def test_a_bundle_brings_its_rules_along(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", ROWS)
    when = pa.array([int(2.6 * DAY), 40 * DAY], pa.timestamp("us"))
    (raw / "labels/t").mkdir(parents=True)
    table = pa.table({"subject_id": [1, 1], "prediction_time": when, "boolean_value": [True, False]})
    pq.write_table(table, raw / "labels/t/0.parquet")
    outs = {"mimic": MIMIC, "none": KnownConfig()}
    for name, known in outs.items():
        prepare(config(raw, tmp_path / name, known=known))
    data = tmp_path / "mimic"
    bundles = {
        name: write_risk_bundle(tmp_path / f"bundle-{name}", vocabulary_of(data), tasks=["t"], known=known)
        for name, known in outs.items()
    }
    old = yaml.safe_load((bundles["none"] / "config.yaml").read_text())
    del old["known"]
    (bundles["none"] / "config.yaml").write_text(yaml.safe_dump({**old, "format_version": 1}))  # a bundle of before
    read = {name: read_bundle(bundle) for name, bundle in bundles.items()}
    assert {name: bundle.known for name, bundle in read.items()} == outs

    def predicted(bundle: str, data: Path) -> list[float]:
        overrides = ["task=mortality", "task.name=t", f"bundle={bundles[bundle]}", f"data.path={data}"]
        run(load("predict", [*overrides, f"out={tmp_path / 'p.parquet'}", "task.definition=null"], PredictConfig))
        return pq.read_table(tmp_path / "p.parquet")["predicted_boolean_probability"].to_pylist()

    own = {name: predicted(name, tmp_path / name) for name in outs}
    for name in outs:
        assert predicted(name, raw) == own[name]
    for name, data in (("mimic", "none"), ("none", "mimic")):
        with pytest.raises(UserError, match=r"^[^\n]*prepared under other rules .*give data\.path the MEDS folder"):
            predicted(name, tmp_path / data)


@pytest.mark.slow
def test_kept_states_go_on_where_events_of_before_become_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each day's MEDS folder holds what the hospital knew by then: coders stamp a stay's codes when it is long over."""
    rows = [*ROWS["train/0"][:-1], (1, 20 * DAY, "LAB//1", 7.0), (1, 50 * DAY, "LAB//1", 6.0)]
    coded = int(2.5 * DAY) + 30 * DAY
    extracts = {}
    for day in (2, 21, 51):
        own = [row for row in rows if row[1] is None or row[1] <= day * DAY]
        own = [row for row in own if coded <= day * DAY or ("ICD" not in row[2] and "DRG" not in row[2])]
        raw = extracts[day] = write_raw(tmp_path / f"raw-{day}", {"train/0": own, "tuning/0": ROWS["tuning/0"]})
        (raw / "labels/t").mkdir(parents=True)
        when = pa.array([day * DAY], pa.timestamp("us"))
        pq.write_table(pa.table({"subject_id": [1], "prediction_time": when}), raw / "labels/t/0.parquet")
    prepare(config(extracts[51], tmp_path / "data"))
    bundle = write_risk_bundle(tmp_path / "bundle", vocabulary_of(tmp_path / "data"), tasks=["t"], known=MIMIC)

    def predicted(day: int, *more: str) -> list[float]:
        raw = extracts[day]
        given = ["task=mortality", "task.name=t", f"task.labels={raw / 'labels/t'}", f"bundle={bundle}", *more]
        given += [f"data.path={raw}", f"out={tmp_path / 'p.parquet'}", "context=all"]
        run(load("predict", given, PredictConfig))
        return pq.read_table(tmp_path / "p.parquet")["predicted_boolean_probability"].to_pylist()

    for day, read, state in ((2, 2, "new"), (21, 2, "known"), (51, 4, "known")):
        one_pass = predicted(day)
        capsys.readouterr()
        assert predicted(day, f"states={tmp_path / 'states'}") == pytest.approx(one_pass, abs=1e-6)
        said = capsys.readouterr().out
        assert f"{read} events read" in said and f"1 {state}" in said
