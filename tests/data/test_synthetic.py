"""The synthetic cohort: is it MEDS, is its law the one it states, and does its oracle say what is in the events?

`Reference` reads the law off the written events again, one subject after the other, and shares nothing with the
simulation but the coefficients.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from hymate.command import load
from hymate.config import TaskConfig
from hymate.data.meds import SplitsConfig
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.synthetic import law as law
from hymate.data.synthetic.codes import DISTRACTORS, LACTATE
from hymate.data.synthetic.course import SyntheticConfig
from hymate.data.synthetic.source import SyntheticSource, ceiling
from hymate.errors import ConfigError
from hymate.evaluation.metrics import auprc, auroc
from hymate.trees import build

DAY_US = 86_400_000_000
ROOT = Path(__file__).resolve().parents[2]


def write(out: Path, config: SyntheticConfig, splits: SplitsConfig | None = None) -> Path:
    source = SyntheticSource(config, splits or SplitsConfig())
    for shard in source.shards():
        source.write_shard(shard, out)
    source.finish(out)
    return out


def read(root: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((root / "data").rglob("*.parquet"))])


def oracle(root: Path) -> tuple[dict[tuple[int, int], float], dict[str, Any]]:
    """(subject, prediction time) -> probability, and the JSON beside it."""
    table = pq.read_table(root / "oracle/readmission.parquet")
    times = table["prediction_time"].cast(pa.int64()).to_pylist()
    keys = zip(table["subject_id"].to_pylist(), times, strict=True)
    found = dict(zip(keys, table["probability"].to_pylist(), strict=True))
    return found, json.loads((root / "oracle/readmission.json").read_text())


@dataclass
class Reference:
    """Labels and drivers of every labelled discharge, from the events alone."""

    label: dict[tuple[int, int], bool] = field(default_factory=dict)
    drivers: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    died: int = 0
    competing: int = 0
    censored: int = 0
    early_lactate: list[tuple[float, bool, bool]] = field(default_factory=list)  # value, died, longer than 7 days

    @classmethod
    def of(cls, root: Path) -> Reference:
        found = cls()
        events = read(root)
        columns = [events["subject_id"], events["time"].cast(pa.int64()), events["code"], events["numeric_value"]]
        subjects: dict[int, list[tuple[int, str, float | None]]] = {}
        for subject, time, code, value in zip(*(c.to_pylist() for c in columns), strict=True):
            if time is not None:
                subjects.setdefault(subject, []).append((time, code, value))
        for subject, history in subjects.items():
            found._add(subject, history)
        return found

    def _add(self, subject: int, history: list[tuple[int, str, float | None]]) -> None:
        admissions = [time for time, code, _ in history if code.startswith("HOSPITAL_ADMISSION//")]
        discharges = [(time, code) for time, code, _ in history if code.startswith("HOSPITAL_DISCHARGE//")]
        death = next((time for time, code, _ in history if code == "MEDS_DEATH"), math.inf)
        last = history[-1][0]
        for i, (time, code) in enumerate(discharges):
            self._add_lactate(history, admissions[i], time, code.endswith("DIED"))
            end = time + 30 * DAY_US
            readmitted = any(time < admission <= end for admission in admissions)
            if code.endswith("DIED"):
                self.died += 1
                continue
            if death > end and last < end:
                self.censored += 1
                continue
            self.competing += not readmitted and death <= end
            self.label[subject, time] = readmitted
            before = [event for event in history if event[0] <= time]
            gap = (admissions[i] - discharges[i - 1][0]) / DAY_US if i else math.inf
            self.drivers[subject, time] = self._drivers(before, max(admissions[i], time - 2 * DAY_US), gap)

    def _drivers(self, before: list[tuple[int, str, float | None]], start: int, gap: float) -> list[float]:
        def series(wanted: str) -> list[tuple[int, float]]:
            return [(t, v) for t, c, v in before if c == wanted and t >= start and v is not None and 0 < v < 100]

        creatinine, haemoglobin = series(law.CREATININE), series(law.HAEMOGLOBIN)
        slope = np.polyfit([t / DAY_US for t, _ in haemoglobin], [v for _, v in haemoglobin], 1)[0]
        codes = {code for _, code, _ in before}
        return [
            (math.log(creatinine[-1][1]) - law.CREATININE_LOG_MEAN) / law.CREATININE_LOG_SD,
            -slope / law.HAEMOGLOBIN_SLOPE_SD,
            law.HEART_FAILURE in codes,
            law.COPD in codes,
            math.exp(-gap / law.RECENCY_DAYS),
        ]

    def _add_lactate(
        self, history: list[tuple[int, str, float | None]], admission: int, discharge: int, died: bool
    ) -> None:
        early = [v for t, c, v in history if c == LACTATE and admission <= t <= admission + DAY_US and v and v < 100]
        if early and discharge > admission + 2 * DAY_US:
            self.early_lactate.append((early[-1], died, discharge - admission > 7 * DAY_US))

    def arrays(self, probability: dict[tuple[int, int], float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """label, probability, drivers of the labelled discharges, in the oracle's order."""
        rows = [(self.label[key], p, self.drivers[key]) for key, p in probability.items()]
        label, p, drivers = zip(*rows, strict=True)
        return np.array(label), np.array(p), np.array(drivers, float)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cohort"), SyntheticConfig(subjects=1500, mean_events=150, seed=3))


@pytest.fixture(scope="module")
def reference(cohort: Path) -> Reference:
    return Reference.of(cohort)


# --------------------------------------------------------------------------------------------------- the data


def test_output_is_meds(cohort: Path) -> None:
    splits = pq.read_table(cohort / "metadata/subject_splits.parquet")
    meds.SubjectSplitSchema.validate(splits)
    split_of = dict(zip(splits["subject_id"].to_pylist(), splits["split"].to_pylist(), strict=True))
    codes = pq.read_table(cohort / "metadata/codes.parquet")
    meds.CodeMetadataSchema.validate(codes)
    assert json.loads((cohort / "metadata/dataset.json").read_text())["meds_version"].startswith("0.4")
    seen: set[int] = set()
    for path in sorted((cohort / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        meds.DataSchema.validate(table)
        subject, time = table["subject_id"].to_numpy(), table["time"].cast(pa.int64()).fill_null(-(2**62)).to_numpy()
        assert (np.lexsort((time, subject)) == np.arange(len(subject))).all()
        ids = set(subject.tolist())
        assert not ids & seen
        assert {split_of[i] for i in ids} == {path.parent.name}
        assert set(table["code"].unique().to_pylist()) <= set(codes["code"].to_pylist())
        seen |= ids
    assert seen == set(split_of) == set(range(1, 1501))
    assert splits["split"].to_pylist().count("held_out") == 150


def test_first_events_are_static_then_birth(cohort: Path) -> None:
    table = pq.read_table(cohort / "data/train/0.parquet").slice(0, 3)
    kinds = [code.split("//")[0] for code in table["code"].to_pylist()]
    assert kinds == ["GENDER", "RACE", "MEDS_BIRTH"]
    assert [time is None for time in table["time"].to_pylist()] == [True, True, False]


def test_measurements_have_gaps_and_errors(cohort: Path) -> None:
    events = read(cohort)
    code, value = np.array(events["code"].to_pylist()), events["numeric_value"].to_numpy()
    for lab in (law.CREATININE, law.HAEMOGLOBIN):
        value_N = value[code == lab]
        assert 0.01 < np.isnan(value_N).mean() < 0.03
        assert 0.005 < ((value_N == 0) | (value_N > 100)).mean() < 0.02
        clean_N = value_N[(value_N > 0) & (value_N < 100)]
        assert clean_N.min() > 0.1 and clean_N.max() < 25
    labs = [c for c in code if c.startswith("LAB//") and c not in (law.CREATININE, law.HAEMOGLOBIN, LACTATE)]
    assert max(set(labs), key=labs.count) == next(iter(DISTRACTORS))


def test_default_size_and_tail(tmp_path: Path) -> None:
    events = read(write(tmp_path, SyntheticConfig()))
    _, num_events = np.unique(events["subject_id"].to_numpy(), return_counts=True)
    assert len(num_events) == 500
    assert 1600 < num_events.mean() < 2400
    assert num_events.max() > 20_000


def test_shards_do_not_depend_on_who_writes_them(tmp_path: Path) -> None:
    config = SyntheticConfig(subjects=60, mean_events=150, seed=1, shard_events=3000)
    source = SyntheticSource(config)
    assert len(source.shards()) > 3
    write(tmp_path / "a", config)
    for shard in reversed(source.shards()):
        SyntheticSource(config).write_shard(shard, tmp_path / "b")
        one, other = (pq.read_table(tmp_path / d / f"data/{shard}.parquet") for d in "ab")
        assert one.equals(other)
    source.finish(tmp_path / "b")
    assert oracle(tmp_path / "a") == oracle(tmp_path / "b")


def test_seed_makes_another_cohort() -> None:
    one, other = (SyntheticSource(SyntheticConfig(subjects=20, seed=seed)) for seed in (1, 2))
    assert one.fingerprint() == SyntheticSource(SyntheticConfig(subjects=20, seed=1)).fingerprint()
    assert one.fingerprint() != other.fingerprint()


def test_seed_changes_events(tmp_path: Path) -> None:
    one, other = (read(write(tmp_path / str(s), SyntheticConfig(20, 150, seed=s))) for s in (1, 2))
    assert not one.equals(other)


def test_splits_may_be_empty(tmp_path: Path) -> None:
    config = SyntheticConfig(subjects=30, mean_events=150)
    out = write(tmp_path, config, SplitsConfig(train=0, tuning=0, held_out=1))
    assert [p.name for p in (out / "data").iterdir()] == ["held_out"]
    ceiling = oracle(out)[1]["ceiling"]
    assert ceiling["train"]["num_labels"] == 0 and ceiling["train"]["auroc"] is None
    assert ceiling["held_out"] == ceiling["all"]


def test_of_patients_split_by_time_no_best_score_is_known(tmp_path: Path) -> None:
    for by in ("subject", "time"):
        sizes = ["synthetic.subjects=60", "synthetic.mean_events=150", "workers=1"]
        prepare(load("prepare", ["source=synthetic", f"out={tmp_path / by}", f"splits.by={by}", *sizes], PrepareConfig))
    assert ceiling(tmp_path / "subject", "readmission", "held_out") is not None
    assert ceiling(tmp_path / "time", "readmission", "held_out") is None


@pytest.mark.parametrize("wrong", [{"subjects": 0}, {"mean_events": 10}, {"seed": -1}])
def test_impossible_configuration_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))} must be at least"):
        SyntheticConfig(**wrong)


@pytest.mark.parametrize(("distance", "wrong"), [(law.NEAREST, "driver_distance"), (2048, "mean_events")])
def test_impossible_distance_is_refused(distance: int, wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{wrong} must be"):
        SyntheticConfig(mean_events=2000, driver_distance=distance)


# ---------------------------------------------------------------------------------------------------- the law


def test_oracle_is_the_law_of_the_events(cohort: Path, reference: Reference) -> None:
    probability, _ = oracle(cohort)
    assert set(probability) == set(reference.label)
    _, p, drivers = reference.arrays(probability)
    names = [name for name in law.COEFFICIENTS if name != "intercept"]
    logit = law.COEFFICIENTS["intercept"] + drivers @ [law.COEFFICIENTS[name] for name in names]
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-logit)), atol=1e-6)


def test_outcomes_follow_the_probabilities(cohort: Path, reference: Reference) -> None:
    label, p, _ = reference.arrays(oracle(cohort)[0])
    for decile in np.array_split(np.argsort(p), 10):
        spread = math.sqrt((p[decile] * (1 - p[decile])).sum())
        assert abs(label[decile].sum() - p[decile].sum()) < 3.5 * spread
    assert 0.24 < label.mean() < 0.31


def test_ceiling_is_what_the_law_scores(cohort: Path, reference: Reference) -> None:
    probability, summary = oracle(cohort)
    label, p, _ = reference.arrays(probability)
    ceiling = summary["ceiling"]
    assert ceiling["all"]["auroc"] == pytest.approx(auroc(label, p))
    assert ceiling["all"]["auprc"] == pytest.approx(auprc(label, p))
    assert 0.85 < ceiling["all"]["auroc"] < 0.91
    splits = pq.read_table(cohort / "metadata/subject_splits.parquet").to_pydict()
    split_of = dict(zip(splits["subject_id"], splits["split"], strict=True))
    held_out = np.array([split_of[subject] == "held_out" for subject, _ in probability])
    assert ceiling["held_out"]["num_labels"] == held_out.sum()
    assert ceiling["held_out"]["auroc"] == pytest.approx(auroc(label[held_out], p[held_out]))


def test_every_way_out_happens(reference: Reference) -> None:
    count = len(reference.label)
    assert 0.02 < reference.died / count < 0.10
    assert 0.02 < reference.competing / count < 0.08
    assert 0.04 < reference.censored / count < 0.13


def test_drivers_reach_the_ceiling(cohort: Path, reference: Reference) -> None:
    label, p, drivers = reference.arrays(oracle(cohort)[0])
    fit, score = slice(0, 3000), slice(3000, None)
    predicted = LogisticRegression(C=100).fit(drivers[fit], label[fit]).predict_proba(drivers[score])[:, 1]
    reached, best = auroc(label[score], predicted), auroc(label[score], p[score])
    assert reached is not None and best is not None
    assert reached - 0.5 > 0.95 * (best - 0.5)


def test_shuffled_labels_depend_on_nothing(tmp_path: Path) -> None:
    config = SyntheticConfig(subjects=600, mean_events=150, seed=5, shuffled_labels=True)
    out = write(tmp_path, config)
    probability, summary = oracle(out)
    label, p, drivers = Reference.of(out).arrays(probability)
    assert set(p) == {law.PREVALENCE}
    assert summary["ceiling"]["all"]["auroc"] == 0.5
    assert abs(label.mean() - law.PREVALENCE) < 4 * math.sqrt(0.2 / len(label))
    for driver in drivers.T:
        area = auroc(label, driver)
        assert area is not None and abs(area - 0.5) < 4 * 0.65 / math.sqrt(len(label))


def test_early_lactate_tells_death_and_long_stays(reference: Reference) -> None:
    value, died, long = (np.array(column) for column in zip(*reference.early_lactate, strict=True))
    for label in (died, long):
        area = auroc(label, value)
        assert area is not None and area > 0.65


def test_task_extraction_finds_the_oracle_s_discharges(tmp_path: Path) -> None:
    tasks = pytest.importorskip("hymate.data.tasks")
    out = write(tmp_path, SyntheticConfig(subjects=80, mean_events=150, seed=2))
    task = build(TaskConfig, yaml.safe_load((ROOT / "configs/task/readmission.yaml").read_text()))
    found = tasks.read_or_extract_labels(out, task)
    expected = Reference.of(out)
    times = found.table["prediction_time"].cast(pa.int64()).to_pylist()
    keys = zip(found.table["subject_id"].to_pylist(), times, strict=True)
    labels = dict(zip(keys, found.table["boolean_value"].to_pylist(), strict=True))
    assert labels == expected.label
    assert set(labels) == set(oracle(out)[0])
    assert found.counts["died_before"] == expected.died
    assert found.counts["competing_deaths"] == expected.competing
    assert found.counts["censored"] == expected.censored


# ------------------------------------------------------------------------------------------- the distant law

FARTHEST = 1024


@dataclass
class Distant:
    """A cohort of the distant law and, of its labelled discharges in the oracle's order, what is in the events."""

    root: Path
    label_N: np.ndarray
    distance_N: np.ndarray  # as the oracle has it; NaN without a driver
    since_admission: list[list[str]]  # the stay's codes up to the prediction, the last one last


@pytest.fixture(scope="module")
def distant(tmp_path_factory: pytest.TempPathFactory) -> Distant:
    config = SyntheticConfig(subjects=150, mean_events=4 * FARTHEST, seed=4, driver_distance=FARTHEST)
    root = write(tmp_path_factory.mktemp("distant"), config)
    table = pq.read_table(root / "oracle/readmission.parquet")
    events = read(root)
    subject, time = events["subject_id"].to_numpy(), events["time"].cast(pa.int64()).fill_null(-(2**62)).to_numpy()
    code = np.array(events["code"].to_pylist())
    admitted = np.char.startswith(code, "HOSPITAL_ADMISSION//")
    labels, stays = [], []
    keys = zip(table["subject_id"].to_pylist(), table["prediction_time"].cast(pa.int64()).to_pylist(), strict=True)
    for who, when in keys:
        own = subject == who
        until = own & (time <= when)
        labels.append((own & admitted & (time > when) & (time <= when + 30 * DAY_US)).any())
        stays.append(code[np.flatnonzero(until & admitted)[-1] : np.flatnonzero(until)[-1] + 1].tolist())
    distance_N = table["driver_distance"].to_numpy(zero_copy_only=False).astype(float)
    return Distant(root, np.array(labels), distance_N, stays)


def test_distant_driver_lies_where_the_oracle_says(distant: Distant) -> None:
    for codes, distance in zip(distant.since_admission, distant.distance_N, strict=True):
        assert len(codes) > FARTHEST
        places = [len(codes) - i for i, code in enumerate(codes) if code == law.HEART_FAILURE]
        assert places == ([] if math.isnan(distance) else [distance])


def test_each_doubling_brings_as_many_drivers_into_view(distant: Distant) -> None:
    has_driver = ~np.isnan(distant.distance_N)
    size = len(has_driver)
    assert abs(has_driver.mean() - law.DISTANT_FRACTION) < 4 * math.sqrt(0.25 / size)
    first, second = np.histogram(distant.distance_N[has_driver], bins=[law.NEAREST, 512, FARTHEST])[0]
    assert first + second == has_driver.sum()
    assert abs(first - second) < 4 * math.sqrt(first + second)


def test_distant_outcomes_follow_the_law(distant: Distant) -> None:
    probability, summary = oracle(distant.root)
    p_N = np.array(list(probability.values()))
    has_driver = ~np.isnan(distant.distance_N)
    logit = summary["coefficients"]["intercept"] + summary["coefficients"]["heart_failure"] * has_driver
    np.testing.assert_allclose(p_N, 1 / (1 + np.exp(-logit)))
    for group in (has_driver, ~has_driver):
        spread = math.sqrt((p_N[group] * (1 - p_N[group])).sum())
        assert abs(distant.label_N[group].sum() - p_N[group].sum()) < 4 * spread


def test_ceiling_rises_with_the_context(distant: Distant) -> None:
    ceiling = oracle(distant.root)[1]["ceiling"]["all"]
    by_context = {int(context): value for context, value in ceiling["auroc_by_context"].items()}
    assert list(by_context) == [512, FARTHEST]
    for context, value in by_context.items():
        assert value == pytest.approx(auroc(distant.label_N, distant.distance_N <= context))
    assert 0.5 < by_context[512] < by_context[FARTHEST] == pytest.approx(ceiling["auroc"])


def test_shuffled_labels_have_no_distant_driver(tmp_path: Path) -> None:
    config = SyntheticConfig(subjects=30, mean_events=2048, shuffled_labels=True, driver_distance=512)
    summary = oracle(write(tmp_path, config))[1]
    assert summary["ceiling"]["all"]["auroc_by_context"] == {"512": 0.5}


values = st.lists(st.sampled_from([0.0, 11_500.0, math.nan, 8.0, 9.5, 11.0, 13.5]), min_size=2, max_size=6)


@given(values, st.data())
def test_slope_reads_over_errors(value: list[float], data: st.DataObject) -> None:
    minute = np.cumsum(data.draw(st.lists(st.integers(1, 900), min_size=len(value), max_size=len(value))))
    ok = [0 < v < 100 for v in value]
    expected = 0.0
    if sum(ok) > 1:
        expected = -np.polyfit(minute[ok] / law.DAY, np.array(value)[ok], 1)[0] / law.HAEMOGLOBIN_SLOPE_SD
    found = law.haemoglobin_fall(minute[None], np.array([value]))
    np.testing.assert_allclose(found, [expected], rtol=1e-6, atol=1e-6)


def test_last_creatinine_reads_over_errors() -> None:
    value = np.array([[1.0, 2.0, 2000.0, math.nan], [0.0, math.nan, 1000.0, 0.0]])
    expected = [(math.log(2.0) - law.CREATININE_LOG_MEAN) / law.CREATININE_LOG_SD, 0.0]
    np.testing.assert_allclose(law.last_creatinine(value), expected, atol=1e-12)
