"""Incidence with competing events and censoring: as lifelines has it, and as plain counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import AalenJohansenFitter, KaplanMeierFitter
from lifelines.utils import concordance_index

from hymate.data.label_files import COMPETING, EVENT
from hymate.evaluation import figures, in_time, metrics, survival

HORIZONS = [2.0, 5.0, 9.0]
# few distinct times, so that events, competing events and losses often come together
rows = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2), st.integers(1, 3)), min_size=3, max_size=40)


def cohort(seed: int, size: int = 400, causes: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """days_N, cause_N, and risk_NH that rises with the hazard and the horizon; no two times are alike."""
    rng = np.random.default_rng(seed)
    hazard_N = rng.lognormal(-2.5, 0.7, size)
    until_CN = np.stack([rng.exponential(1 / hazard_N), rng.exponential(12, size), rng.exponential(14, size)])
    if causes == 1:
        until_CN[1] = np.inf
    days_N, cause_N = until_CN.min(axis=0), np.array([EVENT, COMPETING, 0])[until_CN.argmin(axis=0)]
    return days_N, cause_N, 1 - np.exp(-hazard_N[:, None] * np.array(HORIZONS))


@pytest.mark.parametrize("cause", [EVENT, COMPETING])
def test_incidence_equals_lifelines(cause: int) -> None:
    days_N, cause_N, _ = cohort(1)
    fitted = AalenJohansenFitter(calculate_variance=False).fit(days_N, cause_N, event_of_interest=cause)
    expected_H = fitted.predict(HORIZONS).to_numpy()
    np.testing.assert_allclose(survival.aalen_johansen(days_N, cause_N, HORIZONS, cause=cause), expected_H, atol=1e-12)


@settings(max_examples=40)
@given(rows)
def test_incidence_with_ties_and_weights_is_a_sum_over_days(cases: list[tuple[int, int, int]]) -> None:
    days_N, cause_N, times_N = map(np.array, zip(*cases, strict=True))
    until = list(range(1, days_N.max() + 1))
    for cause in (EVENT, COMPETING):
        left, incidence, expected = 1.0, 0.0, []
        for day in until:
            at_risk = times_N[days_N >= day].sum()
            came, any_came = (times_N[(days_N == day) & kind_N].sum() for kind_N in (cause_N == cause, cause_N > 0))
            incidence += left * came / at_risk
            left *= 1 - any_came / at_risk
            expected.append(incidence)
        found = survival.aalen_johansen(days_N, cause_N, until, times_N, cause)
        np.testing.assert_allclose(found, expected, atol=1e-12)


@settings(max_examples=60)
@given(rows, st.sampled_from([EVENT, COMPETING]))
def test_the_weights_of_what_is_known_give_the_incidence(cases: list[tuple[int, int, int]], cause: int) -> None:
    days_N, cause_N, times_N = map(np.array, zip(*cases, strict=True))
    days_N = days_N.astype(np.float32)
    for horizon in np.arange(0.5, days_N.max() + 0.5, 0.5):
        at_n, label_n, weight_n = survival.known_at(horizon, days_N, cause_N, times_N, cause)
        lost_N = (cause_N == 0) & (days_N < horizon)
        if lost_N.any() and days_N[~lost_N].max(initial=0) <= days_N[lost_N].max():
            assert len(at_n) == len(label_n) == len(weight_n) == 0  # the last one in sight was lost
            continue
        assert sorted(at_n) == np.flatnonzero(~lost_N).tolist()
        assert weight_n.sum() == pytest.approx(times_N.sum())
        expected = survival.aalen_johansen(days_N, cause_N, [horizon], times_N, cause)[0]
        assert np.average(label_n, weights=weight_n) == pytest.approx(expected, abs=1e-9)


def test_incidence_by_hand() -> None:
    # of 5 one has the event on day 1; of 4 one dies on day 2, and another is lost; of 2 one has the event on day 3
    days_N, cause_N = np.array([1.0, 2, 2, 3, 4]), np.array([1, 2, 0, 1, 0])
    assert survival.aalen_johansen(days_N, cause_N, [0.5, 1, 2.5, 3, 9]) == pytest.approx([0, 0.2, 0.2, 0.5, 0.5])
    assert survival.aalen_johansen(days_N, cause_N, [1, 2], cause=COMPETING) == pytest.approx([0, 0.2])
    at_n, label_n, weight_n = survival.known_at(3.0, days_N, cause_N)
    assert (at_n.tolist(), label_n.tolist()) == ([0, 1, 3, 4], [1, 0, 1, 0])
    assert weight_n == pytest.approx([1, 1, 1.5, 1.5])


def test_nothing_is_said_of_a_horizon_that_nobody_is_followed_to(tmp_path: Path) -> None:
    """Labels that look 6 days ahead, say: by day 9 more events have come than they hold."""
    days_N, cause_N, risk_NH = cohort(5)
    seen_N, cut_N = np.minimum(days_N, 6), np.where(days_N < 6, cause_N, 0)
    found = survival.scores(seen_N, cut_N, risk_NH[:, None], HORIZONS, np.arange(len(days_N)))
    whole = survival.scores(days_N, cause_N, risk_NH[:, None], HORIZONS, np.arange(len(days_N)))
    for own, same in zip(found["horizons"][:2], whole["horizons"], strict=False):
        assert own["calibration"] == same["calibration"]
    row = found["horizons"][2]
    assert row["lost"] == (cut_N == 0).sum() and row["num_labels"] == 0 and row["calibration"]["curve"] == []
    assert row["brier"] is row["auroc"]["value"] is row["calibration"]["observed"]["value"] is None
    assert found["integrated_brier"] is None and found["concordance"]["value"] is not None
    for group in found["groups"]:
        assert group["observed"][2]["value"] is None and max(day for day, _ in group["curve"]) <= 6
    said = in_time.verdict({**found, "split": "held_out", "competing": None})
    assert "were lost before 5 days" in said and "Nobody is followed to 9 days" in said
    assert in_time.horizon_rows(found)[3][2:4] == ["-", "-"]
    figures.plot_in_time(tmp_path / "when.png", found)
    assert (tmp_path / "when.png").exists()


def test_dynamic_auroc_and_brier_weigh_by_the_censoring_that_lifelines_finds() -> None:
    """Uno et al. 2007 and Graf et al. 1999, with Kaplan and Meier's estimate of not being lost."""
    days_N, cause_N, risk_NH = cohort(2, causes=1)
    not_lost = KaplanMeierFitter().fit(days_N, cause_N == 0)
    auroc_H, brier_H = [], []
    for risk_N, horizon in zip(risk_NH.T, HORIZONS, strict=True):
        case_N, control_N = (days_N <= horizon) & (cause_N == EVENT), days_N > horizon
        weight_N = case_N / not_lost.predict(days_N).to_numpy() + control_N / not_lost.predict(horizon)
        brier_H.append((weight_N * (case_N - risk_N) ** 2).sum() / len(days_N))
        above = risk_N[case_N][:, None] > risk_N[control_N]
        auroc_H.append((weight_N[case_N] @ above.mean(axis=1)) / weight_N[case_N].sum())
    found_H = survival.dynamic_auroc(days_N, cause_N, risk_NH, HORIZONS)
    np.testing.assert_allclose(found_H, auroc_H, atol=1e-9)
    found = survival.scores(days_N, cause_N, risk_NH[:, None], HORIZONS, np.arange(len(days_N)))
    assert [row["brier"] for row in found["horizons"]] == pytest.approx(brier_H, abs=1e-9)
    assert [row["auroc"]["value"] for row in found["horizons"]] == pytest.approx(auroc_H, abs=1e-9)
    areas = 2 * brier_H[0] / 2, 3 * (brier_H[0] + brier_H[1]) / 2, 4 * (brier_H[1] + brier_H[2]) / 2
    assert found["integrated_brier"] == pytest.approx(sum(areas) / 9)


def test_concordance_equals_lifelines_with_ties() -> None:
    rng = np.random.default_rng(3)
    days_N, cause_N, risk_N = rng.integers(1, 9, 150), rng.integers(0, 2, 150), rng.integers(0, 5, 150) / 5
    expected = concordance_index(days_N, -risk_N, cause_N == EVENT)
    assert survival.concordance(days_N, cause_N, risk_N, np.arange(150))["value"] == pytest.approx(expected)


@settings(max_examples=40)
@given(rows, st.integers(0, 9))
def test_concordance_of_competing_events_equals_a_count_of_all_pairs(cases: list[tuple], seed: int) -> None:
    days_N, cause_N, times_N = map(np.array, zip(*cases, strict=True))
    risk_N = np.random.default_rng(seed).integers(0, 4, len(days_N)) / 4
    right = pairs = 0.0
    for i in np.flatnonzero(cause_N == EVENT):
        for j in range(len(days_N)):
            later = days_N[j] > days_N[i] or (days_N[j] == days_N[i] and cause_N[j] == 0) or cause_N[j] == COMPETING
            if i != j and later:
                pairs += times_N[i] * times_N[j]
                right += times_N[i] * times_N[j] * (float(risk_N[i] > risk_N[j]) + 0.5 * float(risk_N[i] == risk_N[j]))
    found = survival.concordance(days_N, cause_N, risk_N, np.arange(len(days_N)), times_N)["value"]
    assert found is None if not pairs else found == pytest.approx(right / pairs)


@pytest.mark.slow
def test_scores_of_the_right_incidence_are_calibrated_and_those_of_a_wrong_one_are_not() -> None:
    rng = np.random.default_rng(4)
    event_N, competing_N = rng.choice([0.02, 0.05, 0.2], 2500), np.full(2500, 0.05)
    both_N = event_N + competing_N
    until_N, lost_N = rng.exponential(1 / both_N), rng.exponential(20, 2500)
    cause_N = np.where(rng.random(2500) < event_N / both_N, EVENT, COMPETING)
    days_N, cause_N = np.minimum(until_N, lost_N).astype(np.float32), np.where(until_N <= lost_N, cause_N, 0)
    came_NH = 1 - np.exp(-both_N[:, None] * np.array(HORIZONS))
    right_NCH = np.stack([event_N / both_N, competing_N / both_N], axis=1)[:, :, None] * came_NH[:, None]
    found, wrong = (
        survival.scores(days_N, cause_N, p_NCH, HORIZONS, np.arange(2500)) for p_NCH in (right_NCH, right_NCH / 2)
    )
    for row, off in zip(found["horizons"], wrong["horizons"], strict=True):
        low, high = row["calibration"]["observed"]["ci"]
        assert low < row["calibration"]["predicted"] < high and not low < off["calibration"]["predicted"] < high
        low, high = row["competing"]["observed"]["ci"]
        assert low < row["competing"]["predicted"] < high
        assert row["brier"] < off["brier"] and row["auroc"] == off["auroc"]
    for group in found["groups"]:
        for predicted, observed in zip(group["predicted"], group["observed"], strict=True):
            assert observed["value"] == pytest.approx(predicted, abs=0.04)
        assert group["curve"][-1][1] == pytest.approx(group["observed"][-1]["value"])
    assert found["concordance"] == wrong["concordance"] and found["concordance"]["value"] > 0.65


def test_a_horizon_that_nobody_reaches_has_no_observed_incidence() -> None:
    days_N, cause_N = np.array([1.0, 2, 3, 3], np.float32), np.array([1, 0, 1, 0])
    assert survival._observed(3.0, days_N, cause_N, np.arange(4), np.ones(4))["value"] is not None
    assert survival._observed(4.0, days_N, cause_N, np.arange(4), np.ones(4)) == {"value": None, "ci": None}


def test_weights_count_as_repeated_labels() -> None:
    days_N, cause_N, risk_NH = cohort(5, 60)
    times_N = np.random.default_rng(5).integers(1, 4, 60)
    repeated = np.repeat(np.arange(60), times_N)
    weighed = survival.dynamic_auroc(days_N, cause_N, risk_NH, HORIZONS, times_N)
    assert weighed == pytest.approx(
        survival.dynamic_auroc(days_N[repeated], cause_N[repeated], risk_NH[repeated], HORIZONS)
    )
    assert metrics.concordances(days_N, -risk_NH[:, 0], times_N[None] * 1.0, cause_N == EVENT)[0] > 0.5
