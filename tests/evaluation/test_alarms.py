"""Alarms: the challenge's utility as its text defines it, the choice of a policy, and what a policy does."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from hymate.config import UtilityConfig
from hymate.data.examples import Examples
from hymate.data.meds import US_PER_HOUR
from hymate.errors import ConfigError
from hymate.evaluation import alarms
from hymate.evaluation.alarms import Courses, Policy, choose, judge

Array = np.ndarray
DEFAULT = UtilityConfig()
PLAIN = UtilityConfig(hold_hours=[0])


def examples_of(stays: list[list[int]], first_hours: list[int] | None = None) -> Examples:
    """Hourly labels of stays, the first of each at its hour."""
    hours = [np.arange(len(stay)) + first for stay, first in zip(stays, first_hours or [1] * len(stays), strict=True)]
    subject_E = np.repeat(np.arange(len(stays)), [len(stay) for stay in stays])
    column = np.concatenate(stays).astype(np.float32)[:, None]
    return Examples(
        position_E=subject_E,
        stop_E=subject_E,
        earliest_E=subject_E,
        prediction_time_E=np.concatenate(hours) * US_PER_HOUR,
        label_ET=column,
        days_ET=np.full_like(column, np.nan),
        weight_ET=np.ones_like(column),
        subject_id_E=subject_E,
    )


def score_of_text(labels: list[int], predictions: list[bool]) -> float:
    """A stay's utility, hour by hour, in the words of Reyna et al. 2020: the onset is six hours after the first label
    of 1; what counts are the hours from twelve before it to three after it.
    """
    total = 0.0
    onset = labels.index(1) + 6 if 1 in labels else None
    for hour, alarm in enumerate(predictions):
        if onset is None:
            total += -0.05 if alarm else 0.0
            continue
        since = hour - onset
        if since > 3:
            continue
        if alarm and since < -12:
            total += -0.05
        elif alarm and since <= -6:
            total += (since + 12) / 6
        elif alarm:
            total += (3 - since) / 9
        elif since > -6:
            total += -2 * (since + 6) / 9
    return total


def normalised(stays: list[list[int]], predicted: list[list[bool]]) -> float:
    """The challenge's score: 0 is never an alarm, 1 the alarms that are worth most."""
    never = sum(score_of_text(stay, [False] * len(stay)) for stay in stays)
    best = 0.0
    for stay in stays:
        onset = stay.index(1) + 6 if 1 in stay else 10**9
        best += score_of_text(stay, [-12 <= hour - onset <= 3 for hour in range(len(stay))])
    observed = sum(score_of_text(stay, alarm) for stay, alarm in zip(stays, predicted, strict=True))
    return (observed - never) / (best - never)


# stays without sepsis, with it, with it from the first hour on, and long before the alarm counts
STAYS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 12))
    .filter(lambda sizes: sum(sizes) > 0)
    .map(lambda sizes: [0] * sizes[0] + [1] * sizes[1]),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200)
@given(STAYS, st.integers(0, 2**32), st.integers(0, 10**6))
def test_the_utility_is_that_of_the_challenge(stays: list[list[int]], seed: int, late: int) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.choice([0.1, 0.6, 0.9], sum(map(len, stays)))
    examples = examples_of(stays, rng.integers(1, 100, len(stays)).tolist())
    found, _ = judge(Courses.of(examples, DEFAULT), probability, Policy(0.5, 0))
    ends = np.cumsum([len(stay) for stay in stays])[:-1]
    predicted = [(part > 0.5).tolist() for part in np.split(probability, ends)]
    if any(1 in stay for stay in stays):
        assert found["utility"]["value"] == pytest.approx(normalised(stays, predicted), abs=1e-9)
    else:
        assert found["utility"]["value"] is None and found["found"]["value"] is None
    json.dumps(found, allow_nan=False)


def test_the_worth_of_single_hours() -> None:
    hours = np.array([-13.0, -12, -9, -6, -1.5, 3, 4, np.nan])
    without = np.array([0, 0, 0, 0, -1, -2, 0, 0])
    with_alarm = np.array([-0.05, 0, 0.5, 1, 0.5, 0, 0, -0.05])
    assert alarms.gain(hours, DEFAULT) == pytest.approx(with_alarm - without)


def test_examples_may_come_in_any_order() -> None:
    stays = [[0] * 20 + [1] * 8, [0] * 30, [1] * 9]
    examples, rng = examples_of(stays), np.random.default_rng(0)
    probability, order = rng.random(len(examples)), rng.permutation(len(examples))
    mixed = Courses.of(examples.only(order), DEFAULT)
    usual = judge(Courses.of(examples, DEFAULT), probability, Policy(0.4, 6))[0]
    assert judge(mixed, probability[order][mixed.order_N], Policy(0.4, 6))[0] == usual


@settings(max_examples=100)
@given(STAYS, st.integers(0, 2**32), st.sampled_from([0, 1, 2, 5, 24]))
def test_an_alarm_is_held(stays: list[list[int]], seed: int, hold: int) -> None:
    probability = np.random.default_rng(seed).random(sum(map(len, stays)))
    found = Courses.of(examples_of(stays), DEFAULT).alarms(probability, Policy(0.7, hold))
    expected: list[bool] = []
    for part in np.split(probability, np.cumsum([len(stay) for stay in stays])[:-1]):
        expected += [bool(part[max(0, hour - hold) : hour + 1].max() > 0.7) for hour in range(len(part))]
    assert found.tolist() == expected


@settings(max_examples=50)
@given(STAYS.filter(lambda stays: any(1 in stay for stay in stays)))
def test_the_threshold_between_risks_that_differ_is_found(stays: list[list[int]]) -> None:
    courses = Courses.of(examples_of(stays), PLAIN)
    worth = courses.gain_N >= 0
    chosen = choose(courses, np.where(worth, 0.7, 0.2), PLAIN)
    assert chosen == Policy(pytest.approx(0.35 if worth.all() else 0.45), 0)


def test_there_is_no_alarm_where_none_gains_anything() -> None:
    courses = Courses.of(examples_of([[0] * 20, [0] * 9]), PLAIN)
    probability = np.linspace(0.1, 0.9, 29)
    assert not courses.alarms(probability, choose(courses, probability, PLAIN)).any()


@pytest.mark.parametrize(("weight", "quiet"), [(1.0, True), (9.0, False)])
def test_a_patients_weight_counts_in_the_choice(weight: float, quiet: bool) -> None:
    """All risks are the same: one patient gains by an alarm, forty lose."""
    examples = examples_of([[0] * 6 + [1] * 10, *[[0] * 20] * 40])
    weight_E = np.where(examples.subject_id_E == 0, weight, 1.0)
    courses = Courses.of(replace(examples, weight_ET=weight_E[:, None]), PLAIN)
    probability = np.full(len(weight_E), 0.5)
    assert courses.alarms(probability, choose(courses, probability, PLAIN)).any() != quiet


def test_a_threshold_that_few_patients_choose_suits_others() -> None:
    """More than the one that is best for these few; and for them it is nearly as good."""
    rng = np.random.default_rng(0)

    def drawn(patients: int) -> tuple[Courses, np.ndarray]:
        onset = [rng.integers(5, 25) if rng.random() < 0.1 else 30 for _ in range(patients)]
        stays = [[0] * hour + [1] * (30 - hour) for hour in onset]
        courses = Courses.of(examples_of(stays), PLAIN)
        logit_N = rng.normal(-4, 1, (patients, 1)) + rng.normal(0, 0.5, (patients, 30)) + 3 * np.array(stays)
        return courses, expit(logit_N.ravel())

    def worth(of: tuple[Courses, np.ndarray], policy: Policy) -> float:
        return float(of[0].gain_N @ of[0].alarms(of[1], policy)) / float(np.maximum(of[0].gain_N, 0).sum())

    others, ahead = drawn(4000), []
    for _ in range(100):
        courses, probability = few = drawn(150)
        falling_N = np.argsort(-probability)
        lowest = probability[falling_N[courses.gain_N[falling_N].cumsum().argmax()]]
        best, chosen = Policy(np.nextafter(lowest, 0), 0), choose(*few, PLAIN)
        ahead.append(worth(others, chosen) - worth(others, best))
        assert 0 <= worth(few, best) - worth(few, chosen) < 0.1
    assert np.mean(ahead) > 0.001


def test_alarms_are_held_where_it_is_worth_it() -> None:
    """Risks that are high in every third hour before the onset; and in one hour of a patient without."""
    stays = [[0] * 10 + [1] * 8, [0] * 18]
    courses = Courses.of(examples_of(stays), DEFAULT)
    flickering = np.concatenate([np.where(np.arange(18) % 3 == 1, 0.9, 0.1), np.full(18, 0.1)])
    assert choose(courses, flickering, DEFAULT).hold_hours == 3
    steady = np.concatenate([np.where(np.arange(18) >= 5, 0.9, 0.1), np.where(np.arange(18) == 3, 0.95, 0.1)])
    assert choose(courses, steady, UtilityConfig(hold_hours=[3, 0])).hold_hours == 0


def test_what_a_policy_does_is_counted() -> None:
    stays = [[0] * 20 + [1] * 10, [0] * 30, [0] * 20 + [1] * 10, [0] * 30]
    probability = np.full((4, 30), 0.1)
    probability[0, [5, 24, 25, 29]] = 0.9  # the onset is at 26: too early, two hours before, one before, after
    probability[1, [3, 4]] = 0.9
    probability[2, 0] = 0.9  # too early: not found
    found, _ = judge(Courses.of(examples_of(stays), DEFAULT), probability.ravel(), Policy(0.5, 0))
    assert found["alarms_per_day"]["value"] == pytest.approx(7 / (4 * 30 / 24))
    assert found["starts_per_day"]["value"] == pytest.approx(5 / (4 * 30 / 24))
    assert found["found"]["value"] == 0.5 and (found["patients"], found["onsets"]) == (4, 2)
    assert found["false_per_true"]["value"] == pytest.approx(4 / 3)
    assert found["disturbed"]["value"] == 0.5
    assert found["lead_hours"]["value"] == 2 and found["lead_quartiles"] == [2, 2]
    assert found["found_by"] == [{"hour": -2, "found": 0.5}]
    nobody, _ = judge(Courses.of(examples_of(stays), DEFAULT), probability.ravel(), Policy(1, 0))
    assert nobody["utility"]["value"] == 0 and nobody["lead_quartiles"] is None
    assert nobody["lead_hours"] == {"value": None, "ci": None} and nobody["false_per_true"]["value"] is None


def cohort(stays: int, seed: int) -> tuple[Examples, Array]:
    """A tenth are septic, at some hour; risks that know something of it."""
    rng = np.random.default_rng(seed)
    labels = []
    for stay in range(stays):
        hours = int(rng.integers(8, 70))
        onset = int(rng.integers(0, hours)) if stay % 10 == 0 else hours
        labels.append([0] * onset + [1] * (hours - onset))
    examples = examples_of(labels)
    logit = 1.5 * examples.label_E + rng.normal(-3, 1, len(examples))
    return examples, 1 / (1 + np.exp(-logit))


def test_intervals_are_over_patients_and_models_are_compared_on_the_same_ones() -> None:
    tuning, tuning_p = cohort(600, 0)
    scored, scored_p = cohort(600, 1)
    blurred = [np.random.default_rng(9).permutation(p) for p in (tuning_p, scored_p)]
    found = alarms.assess(
        DEFAULT, tuning, scored, {"model": (tuning_p, scored_p), "boosting": (blurred[0], blurred[1])}
    )
    assert set(found) == {"model", "boosting"} and "difference" not in found["model"]
    for name in alarms.STATISTICS:
        low, high = found["model"][name]["ci"]
        assert low <= found["model"][name]["value"] <= high and low < high
    value = {name: found[name]["utility"]["value"] for name in found}
    assert found["boosting"]["difference"]["value"] == pytest.approx(value["model"] - value["boosting"])
    assert found["boosting"]["difference"]["ci"][0] > 0
    # the same patients twice are twice as many patients, so the interval is narrower by the root of two
    twice = Courses.of(_doubled(scored), DEFAULT)
    policy = Policy(**found["model"]["policy"])
    wide = np.ptp(found["model"]["utility"]["ci"])
    narrow = np.ptp(judge(twice, np.tile(scored_p, 2)[twice.order_N], policy)[0]["utility"]["ci"])
    assert wide / narrow == pytest.approx(2**0.5, rel=0.15)
    curve = found["model"]["curve"]
    assert [row["alarms_per_day"] for row in curve] == sorted(row["alarms_per_day"] for row in curve)
    assert curve[-1]["alarms_per_day"] == pytest.approx(24)
    for row in curve:  # each point is what a threshold just below it gives
        at = judge(Courses.of(scored, DEFAULT), scored_p, Policy(row["risk_from"] * (1 - 1e-12), 0))[0]
        assert at["utility"]["value"] == pytest.approx(row["utility"])


def _doubled(examples: Examples) -> Examples:
    columns: dict[str, Any] = {
        name: np.concatenate([value, value]) for name, value in vars(examples).items() if name != "dropped"
    }
    columns["subject_id_E"][len(examples) :] += 10**6
    return Examples(**columns)


def test_a_hundred_thousand_labels_take_a_second() -> None:
    scored, probability = cohort(2_700, 2)
    started = time.process_time()
    found = alarms.assess(DEFAULT, scored, scored, {"model": (probability, probability)})
    assert len(scored) > 100_000 and found["model"]["utility"]["ci"]
    print(f"{len(scored):,} labels: {time.process_time() - started:.1f} s")


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"early_hours": 6}, "early_hours must be more than optimal_hours"),
        ({"late_hours": -6}, "late_hours must be after the optimal hour"),
        ({"alarm": 0}, "alarm must be positive"),
        ({"missed": 1}, "missed must not be positive"),
        ({"false_alarm": 0}, "false_alarm must be negative"),
        ({"hold_hours": []}, r"hold_hours must be a list of hours"),
        ({"hold_hours": [-1]}, r"hold_hours must be a list of hours"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UtilityConfig(**settings_)
