"""Calibration, decisions and groups: closed forms, scikit-learn, and cohorts whose risks are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from benchmarks import verdicts
from comparing import assert_alike
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, roc_curve

from hymate.evaluation import calibration, decisions, metrics

Array = np.ndarray


def cohort(num_labels: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Labels, the logits of the risks that they were drawn with, and a subject for each."""
    rng = np.random.default_rng(seed)
    logit_N = rng.normal(-1.5, 1.5, num_labels)
    return (rng.uniform(size=num_labels) < expit(logit_N)).astype(float), logit_N, np.arange(num_labels)


# ------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(("temperature", "shift"), [(1.0, 0.0), (2.0, -0.7), (0.5, 0.4)])
def test_recalibration_finds_what_distorted_the_logits(temperature: float, shift: float) -> None:
    label, true, _ = cohort(20_000)
    found = calibration.recalibrate(label, (true - shift) * temperature)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.shift == pytest.approx(shift, abs=0.05)
    logits = np.array([-3.0, 0.1, 2.0])
    assert found.undo(expit(found(logits))) == pytest.approx(expit(logits))
    peer = LogisticRegression(C=np.inf).fit(((true - shift) * temperature)[:, None], label)
    assert 1 / found.temperature == pytest.approx(peer.coef_[0, 0], rel=0.01)
    assert found.shift == pytest.approx(peer.intercept_[0], abs=0.01)


@pytest.mark.parametrize("logits", [[-1.0, -2.0, 1.0, 2.0], [1.0, 2.0, -1.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
def test_a_few_labels_never_turn_the_order_round_or_make_risks_certain(logits: list[float]) -> None:
    """Separated classes, a ranking that is wrong throughout, and no ranking."""
    found = calibration.recalibrate([0, 0, 1, 1], logits)
    assert 0.1 < found.temperature < 10 and abs(found.shift) < 1


def test_the_calibration_slope_is_that_of_a_logistic_regression() -> None:
    label, true, subject = cohort(1500)
    found = calibration.calibration_slope(label, expit(1.7 * true + 0.3), subject)
    peer = LogisticRegression(C=np.inf, tol=1e-8).fit((1.7 * true + 0.3)[:, None], label)
    assert found["value"] == pytest.approx(peer.coef_[0, 0], rel=1e-3)
    # Fisher information of slope and intercept
    x = np.stack([1.7 * true + 0.3, np.ones_like(true)])
    p = peer.predict_proba(x[0][:, None])[:, 1]
    error = np.sqrt(np.linalg.inv((x * p * (1 - p)) @ x.T)[0, 0])
    low, high = found["ci"]
    assert low < 1 / 1.7 < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("label", [[0, 0, 1, 1], [0, 0, 0, 0]])
def test_a_slope_without_a_finite_value_is_none(label: list[int]) -> None:
    assert calibration.calibration_slope(label, [0.1, 0.2, 0.8, 0.9], [1, 2, 3, 4])["value"] is None


def test_a_perfect_models_error_is_chance_and_a_wrong_models_is_not() -> None:
    beyond, usual = [], []
    for seed in range(10):
        label, true, subject = cohort(800, seed)
        perfect = calibration.calibration_error(label, expit(true), subject)
        assert perfect["ece"] == metrics.ece(label, expit(true))
        beyond.append(perfect["beyond_chance"])
        usual.append(perfect["by_chance"])
    assert 0.02 < np.mean(usual) < 0.04 and np.mean(beyond) < 0.5 * np.mean(usual)
    label, true, subject = cohort(50_000)
    for distorted in (1.5 * true, true + 0.5):
        wrong = calibration.calibration_error(label, expit(distorted), subject)
        assert wrong["beyond_chance"] == pytest.approx(np.mean(np.abs(expit(distorted) - expit(true))), rel=0.1)
    assert calibration.calibration_error([], [], [])["ece"] is None


def test_chance_is_as_large_as_patients_are_few() -> None:
    label, true, subject = cohort(400)
    one, five = (
        calibration.calibration_error(*(np.repeat(column, times) for column in (label, expit(true), subject)))
        for times in (1, 5)
    )
    assert five["ece"] == pytest.approx(one["ece"])
    assert five["by_chance"] == pytest.approx(one["by_chance"])  # five equal labels of a patient tell no more than one


def test_the_calibration_curve_holds_every_label_once_in_order() -> None:
    label, true, subject = cohort(205)
    curve = calibration.calibration_curve(label, expit(true), subject)
    assert len(curve) == 10 and sum(group["labels"] for group in curve) == 205
    predicted = [group["predicted"] for group in curve]
    assert predicted == sorted(predicted)
    total = sum(group["observed"]["value"] * group["labels"] for group in curve)
    assert total == pytest.approx(label.sum())


@given(st.integers(1, 3000), st.data())
def test_proportions_have_wilsons_interval(num: int, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([0, num]) | st.integers(0, num))
    found = metrics.proportion(np.arange(num) < count, np.arange(num))
    peer = binomtest(count, num).proportion_ci(method="wilson")
    assert found["value"] == count / num
    assert found["ci"] == pytest.approx([peer.low, peer.high], abs=1e-6)
    assert 0 <= found["ci"][0] <= found["value"] <= found["ci"][1] <= 1  # a picture's bars have no negative length
    repeated = metrics.proportion(np.repeat(np.arange(num) < count, 3), np.repeat(np.arange(num), 3))
    assert repeated["ci"] == pytest.approx(found["ci"])  # three equal labels of a patient tell no more than one
    tripled = metrics.proportion(np.arange(num) < count, np.arange(num), np.full(num, 3.0))
    assert tripled["ci"] == pytest.approx(found["ci"])


def test_patients_with_unequal_numbers_of_labels_tell_less() -> None:
    subject = np.repeat([1, 2, 3, 4], [1, 1, 1, 7])
    assert metrics.effective_patients(subject) == pytest.approx(100 / 52)  # Kish 1965: (1 + 1 + 1 + 7)^2 / (3 + 49)
    assert metrics.effective_patients([1, 2, 3, 4], [1, 1, 1, 7]) == pytest.approx(100 / 52)
    before, after = verdicts.proportion_coverage(800, spread=1.2, cohorts=400)
    assert before < 0.9 and 0.94 < after < 0.99


# --------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("specificity", decisions.SPECIFICITIES)
def test_a_threshold_is_the_lowest_that_reaches_its_specificity(specificity: float) -> None:
    label, true, _ = cohort(400)
    prob = np.round(expit(true), 2)  # ties
    threshold = decisions.threshold_at(specificity, label, prob)
    false_positive, _, _ = roc_curve(label, prob, drop_intermediate=False)
    reached = np.mean(prob[label == 0] <= threshold)
    assert 1 - reached == pytest.approx(max(f for f in false_positive if f <= 1 - specificity + 1e-9))


def test_an_operating_point_is_its_confusion_matrix() -> None:
    label, true, subject = cohort(500)
    point = decisions.operating_point(0.3, label, expit(true), subject)
    tn, fp, fn, tp = confusion_matrix(label, expit(true) > 0.3).ravel()
    assert point["sensitivity"]["value"] == pytest.approx(tp / (tp + fn))
    assert point["specificity"]["value"] == pytest.approx(tn / (tn + fp))
    assert point["ppv"]["value"] == pytest.approx(tp / (tp + fp))
    assert point["alerts_per_100"] == pytest.approx(100 * (tp + fp) / 500)
    nobody = decisions.operating_point(1.0, label, expit(true), subject)
    assert nobody["ppv"] == {"value": None, "ci": None} and nobody["alerts_per_100"] == 0


def test_net_benefit_by_hand() -> None:
    # at 0.2 a false positive weighs a quarter: (2 - 2 / 4) / 5; at 0.5 as much as a true one: (1 - 1) / 5
    label, prob = [1, 1, 0, 0, 0], [0.9, 0.3, 0.6, 0.2, 0.1]
    found = decisions.net_benefit(label, prob, [0.2, 0.5])
    assert found[:, 0] == pytest.approx([(2 - 2 / 4) / 5, 0.0])
    assert decisions.net_benefit(label, np.ones(5), [0.2])[0, 0] == pytest.approx(0.4 - 0.6 / 4)
    weight = np.array([[2.0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    weighted = decisions.net_benefit(label, prob, [0.2], weight)[0]
    assert weighted == pytest.approx([(2 - 2 / 4) / 5, (2 - 2 / 4) / 5])


def test_a_good_model_is_worth_it_in_the_middle_and_a_useless_one_nowhere() -> None:
    label, true, subject = cohort(2000)
    good = decisions.decision_curve(label, expit(true), subject)
    low, high = good["useful"]
    assert low < label.mean() < high and 0 < low < high < 1
    for row in good["net_benefit"]:
        assert row["gain"]["value"] == pytest.approx(row["model"] - max(row["all"], 0))
        assert row["gain"]["ci"][0] <= row["gain"]["value"] <= row["gain"]["ci"][1]
    useless = decisions.decision_curve(label, np.full(2000, label.mean()), subject)
    assert useless["useful"] is None


# A small run of tests/benchmarks/verdicts.py, which is seeded.
@pytest.mark.parametrize("patients", verdicts.PATIENTS)
@pytest.mark.parametrize("num_labels", [300, 800])
def test_a_model_that_knows_nothing_is_rarely_called_useful(num_labels: int, patients: str) -> None:
    assert verdicts.useless_rates(num_labels, patients, cohorts=20).mean() <= 0.03
    # the worst kinds of this rule and of those before it, in 500 cohorts
    worst = [(0.2, 0.25), (0.2, verdicts.UNIFORM), (0.4, 1.5), (0.5, 0.1), (0.5, 1.5)]
    assert verdicts.useless_rates(num_labels, patients, 200, worst).max() <= 0.05


@pytest.mark.parametrize("patients", ["one", "several"])
@pytest.mark.parametrize(("num_labels", "mean", "least"), [(300, 0.9, 0.5), (800, 0.98, 0.9), (3000, 1.0, 1.0)])
def test_a_calibrated_model_is_called_useful(num_labels: int, mean: float, least: float, patients: str) -> None:
    called_K, _ = verdicts.informed_rates(num_labels, patients, "calibrated", cohorts=20).T
    assert called_K.mean() >= mean
    assert called_K.min() >= least  # of the kind with nine positives among 300, the hardest


@pytest.mark.parametrize("distortion", ["too extreme", "too high", "too low"])
def test_the_range_ends_where_the_model_does_harm(distortion: str) -> None:
    called_K, wrongly_K = verdicts.informed_rates(800, "one", distortion, cohorts=20).T
    assert called_K.mean() >= 0.75 and wrongly_K.mean() <= 0.05


@pytest.mark.parametrize("distortion", ["far too high", "far too low"])
def test_a_model_that_ranks_well_and_helps_nowhere_is_not_called_useful(distortion: str) -> None:
    called_K, _ = verdicts.informed_rates(800, "several", distortion, cohorts=20).T
    assert called_K.max() == 0


def test_a_range_is_around_the_prevalence_and_may_be_one_threshold() -> None:
    label = np.repeat([1.0, 0.0, 1.0, 0.0], [15, 25, 10, 50])
    prob = np.repeat([0.3, 0.2], [40, 60])  # 15 of 40 and 10 of 60 are positive, 25 % of all
    subject = np.arange(100)
    # 2.4 errors apart, but only 1.7 errors more than 26 % of those acted on, and 1.5 fewer than 24 % of the others
    assert decisions.useful_range(label, prob, subject) == [0.25, 0.25]
    label, prob, again = (np.repeat(column, 20) for column in (label, prob, subject))
    assert decisions.useful_range(label, prob, again) == [0.25, 0.25]  # twenty equal labels of a patient are one
    alone = np.arange(2000)
    assert decisions.useful_range(label, prob, alone) == [0.21, 0.3]  # all the thresholds that part the two risks
    assert decisions.useful_range(label, 1 - prob, alone) is None
    assert decisions.useful_range(label, prob + 0.3, alone) is None


def test_nothing_is_called_useful_where_one_patient_has_most_labels() -> None:
    """200 of 299 labels are one patient's, whose risk nobody can tell from its own labels."""
    rng = np.random.default_rng(0)
    subject = np.concatenate([np.zeros(200, int), np.arange(1, 100)])
    for _ in range(50):
        risk = rng.uniform(0.2, 0.8, 100)[subject]
        label = (rng.random(299) < risk).astype(float)
        prob = np.clip(rng.uniform(0.2, 0.8, 100)[subject] + rng.normal(0, 0.05, 299), 0.01, 0.99)
        assert decisions.useful_range(label, prob, subject) is None
        assert decisions.useful_range(label, risk, subject) is None
    assert decisions.useful_range(label, risk, np.arange(299)) is not None


@pytest.mark.parametrize(("label", "prob"), [([], []), ([1] * 9, [0.5] * 9), ([0, 1] * 9, [0.5] * 18)])
def test_nothing_is_useful_where_risks_are_no_better_than_chance(label: list[int], prob: list[float]) -> None:
    assert decisions.useful_range(label, prob, np.arange(len(label))) is None


# ---------------------------------------------------------------------------------------------------- one task


def test_a_group_whose_risks_are_wrong_is_named_and_a_tiny_one_is_not_shown() -> None:
    label, true, subject = cohort(3000)
    prob = expit(true)
    off = np.arange(3000) % 3 == 0
    prob[off] = expit(true[off] + 1)
    groups = {"kind": {"off": off, "fine": ~off, "tiny": np.arange(3000) < decisions.FEWEST_SUBJECTS - 1}}
    found = decisions.assess(label, prob, subject, groups, decisions.thresholds(label, prob))
    assert json.loads(json.dumps(found)) == found
    wrong, fine, tiny = found["subgroups"]
    assert (wrong["group"], wrong["wrong"], fine["wrong"]) == ("off", "too high", None)
    assert tiny == {"kind": "kind", "group": "tiny", "hidden": True}
    assert wrong["auroc"]["value"] == metrics.auroc(label[off], prob[off]) and wrong["judged"]
    assert wrong["observed"]["value"] == pytest.approx(label[off].mean())
    # the same threshold catches more, and alarms more, where risks are too high
    assert wrong["sensitivity"]["value"] > fine["sensitivity"]["value"]
    assert wrong["specificity"]["value"] < fine["specificity"]["value"]
    for point in found["operating_points"]:
        assert point["specificity"]["value"] == pytest.approx(point["aim"], abs=1e-3)


def test_many_labels_of_few_patients_are_not_enough() -> None:
    label, subject = np.repeat([1.0, 0.0], [5 * 40, 260]), np.r_[np.repeat(np.arange(40), 5), np.arange(40, 300)]
    few = decisions.group_scores(0.5, metrics.Z, 0.5, label, np.full(460, 0.4), subject)
    assert few["positives"] == 200 and few["subjects"] == 300 and not few["judged"]
    assert decisions.group_scores(0.5, metrics.Z, 0.5, label, np.full(460, 0.4), np.arange(460))["judged"]


def test_groups_are_rarely_accused_by_chance() -> None:
    (_, _), (wrong, ranked_worse) = verdicts.group_accusations(800, "one", groups=20, cohorts=20)
    assert wrong <= 0.1 and ranked_worse <= 0.1


def test_weights_count_as_repeated_labels() -> None:
    label, true, subject = cohort(400)
    weight = np.random.default_rng(1).integers(1, 4, len(label))
    again = np.repeat(np.arange(len(label)), weight)
    groups = {"kind": {"odd": subject % 2 == 1}}
    repeated = {"kind": {"odd": groups["kind"]["odd"][again]}}
    prob = expit(true + 0.3)
    found = decisions.assess(label, prob, subject, groups, decisions.thresholds(label, prob, weight), weight)
    expected = decisions.assess(
        label[again], prob[again], subject[again], repeated, decisions.thresholds(label[again], prob[again])
    )
    for assessed in (found, expected):
        assessed["calibration"].pop("curve")  # of as many labels each, whatever they weigh
        for count in ("labels", "positives", "judged"):
            assessed["subgroups"][0].pop(count)
    # repeated labels pass for independent ones in the binomial error, a weighted one does not
    assert found.pop("useful") == pytest.approx(expected.pop("useful"), abs=0.03)
    assert_alike(found, expected)
    curve = calibration.calibration_curve(label, prob, subject, weight)
    assert sum(group["labels"] for group in curve) == len(label)
    lowest = np.argsort(prob, kind="stable")[: curve[0]["labels"]]
    assert curve[0]["predicted"] == pytest.approx(np.average(prob[lowest], weights=weight[lowest]))
    logits = true * 1.5 - 0.2
    fitted, of_repeated = (
        calibration.recalibrate(label, logits, weight),
        calibration.recalibrate(label[again], logits[again]),
    )
    assert (fitted.temperature, fitted.shift) == pytest.approx((of_repeated.temperature, of_repeated.shift), rel=1e-4)
    every = label, prob, subject, groups, decisions.thresholds(label, prob)
    assert decisions.assess(*every, np.ones(400)) == decisions.assess(*every)


def test_labels_of_one_class_are_no_error() -> None:
    everyone, chosen = {"kind": {"all": np.ones(30, bool)}}, decisions.thresholds([0, 1], [0.4, 0.6])
    found = decisions.assess(np.zeros(30), np.linspace(0.1, 0.9, 30), np.arange(30), everyone, chosen)
    assert found["calibration"]["slope"]["value"] is None and found["subgroups"][0]["auroc"]["value"] is None
    assert found["operating_points"][0]["sensitivity"] == {"value": None, "ci": None}
