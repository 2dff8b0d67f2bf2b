"""Metrics: agreement with scikit-learn, undefined cases, and intervals that resample patients."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from hymate import metrics

# few distinct scores, so that ties within and across classes are common
cases = st.lists(st.tuples(st.booleans(), st.integers(0, 6).map(lambda k: k / 6)), min_size=2, max_size=40)
two_classes = cases.filter(lambda rows: len({label for label, _ in rows}) == 2)


@settings(deadline=None, max_examples=50)
@given(two_classes)
def test_metrics_equal_scikit_learn_with_ties(rows: list[tuple[bool, float]]) -> None:
    label, score = map(np.array, zip(*rows, strict=True))
    assert metrics.auroc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert metrics.auprc(label, score) == pytest.approx(average_precision_score(label, score), abs=1e-12)
    assert metrics.brier(label, score) == pytest.approx(brier_score_loss(label, score), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(two_classes, st.integers(0, 5))
def test_a_sample_weighs_like_repeated_labels(rows: list[tuple[bool, float]], seed: int) -> None:
    label, score = map(np.array, zip(*rows, strict=True))
    times = np.random.default_rng(seed).integers(0, 3, len(label))
    roc, pr = metrics._areas(label, score, times[None].astype(float))[:, 0]
    repeated = np.repeat(np.arange(len(label)), times)
    if len(set(label[repeated])) < 2:
        assert np.isnan(roc) and np.isnan(pr)
    else:
        assert roc == pytest.approx(roc_auc_score(label[repeated], score[repeated]), abs=1e-12)
        assert pr == pytest.approx(average_precision_score(label[repeated], score[repeated]), abs=1e-12)


def test_ece_by_hand() -> None:
    # bin [0, 0.1): two labels, mean probability 0.05, none positive; bin [0.9, 1]: one label, 1.0, positive
    assert metrics.ece([0, 0, 1], [0.04, 0.06, 1.0]) == pytest.approx((2 * 0.05 + 0) / 3)
    assert metrics.ece([0, 1], [1.0, 0.0]) == pytest.approx(1.0)


@pytest.mark.parametrize("label", [[0, 0, 0], [1, 1, 1]])
def test_one_class_is_undefined_not_half(label: list[int]) -> None:
    result = metrics.scores(label, [0.2, 0.4, 0.9], [1, 2, 3])
    assert result["auroc"] == {"value": None, "ci": None}
    assert result["auprc"] == {"value": None, "ci": None}
    assert result["brier"] is not None and result["prevalence"] == label[0]


def test_no_labels_is_undefined() -> None:
    result = metrics.scores([], [], [])
    assert result["num_labels"] == 0
    assert result["prevalence"] is result["brier"] is result["ece"] is result["auroc"]["value"] is None


def test_nan_scores_are_refused() -> None:
    with pytest.raises(AssertionError, match="NaN"):
        metrics.auroc([0, 1], [0.1, float("nan")])


def cohort(num_subjects: int, labels_each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and probabilities that are the same for all of a subject's rows."""
    rng = np.random.default_rng(seed)
    prob = rng.uniform(size=num_subjects)
    label = rng.uniform(size=num_subjects) < prob
    return np.repeat(label, labels_each), np.repeat(prob, labels_each), np.repeat(np.arange(num_subjects), labels_each)


def test_intervals_resample_patients_not_labels() -> None:
    one = metrics.intervals(*cohort(80, 1))
    ten = metrics.intervals(*cohort(80, 10))
    for name in ("auroc", "auprc"):
        assert ten[name] == pytest.approx(one[name], abs=1e-9)  # ten equal labels of a patient tell no more than one
    label, prob, _ = cohort(80, 10)
    alone = metrics.intervals(label, prob, np.arange(len(label)))
    for name, interval in ten.items():
        assert interval is not None and alone[name] is not None
        assert interval[1] - interval[0] > 2 * (alone[name][1] - alone[name][0])


def test_interval_of_the_auroc_agrees_with_its_standard_error() -> None:
    label, prob, subject = cohort(2000, 1)
    auc = metrics.auroc(label, prob)
    low, high = metrics.intervals(label, prob, subject)["auroc"]
    # Hanley & McNeil 1982
    positives, negatives = label.sum(), (~label).sum()
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    error = np.sqrt(variance / (positives * negatives))
    assert low < auc < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)


def test_the_difference_of_two_scores_agrees_with_delong() -> None:
    rng = np.random.default_rng(0)
    label = rng.uniform(size=1500) < 0.3
    a = label + rng.normal(size=1500)
    b = label + rng.normal(size=1500) + 0.3 * a
    found = metrics.paired_difference(label, a, b, np.arange(1500))
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(label, a) - roc_auc_score(label, b))
    assert found["auprc"]["value"] == pytest.approx(
        average_precision_score(label, a) - average_precision_score(label, b)
    )
    # DeLong et al. 1988: variance of the difference from each label's placement among the other class
    above = [score[label][:, None] > score[~label] for score in (a, b)]
    positives, negatives = ((above[0] * 1.0 - above[1]).mean(axis) for axis in (1, 0))
    error = np.sqrt(positives.var(ddof=1) / len(positives) + negatives.var(ddof=1) / len(negatives))
    low, high = found["auroc"]["ci"]
    assert low < found["auroc"]["value"] < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_a_difference_is_paired_clustered_and_antisymmetric() -> None:
    label, prob, subject = cohort(80, 5)
    other = np.repeat(np.random.default_rng(1).normal(size=80), 5)
    same = metrics.paired_difference(label, prob, 3 * prob - 7, subject, num_samples=20)
    assert same == {name: {"value": 0.0, "ci": [0.0, 0.0]} for name in ("auroc", "auprc")}
    forth, back = (metrics.paired_difference(label, *pair, subject) for pair in ((prob, other), (other, prob)))
    alone = metrics.paired_difference(label, prob, other, np.arange(len(label)))
    for name in ("auroc", "auprc"):
        assert back[name]["value"] == pytest.approx(-forth[name]["value"])
        assert back[name]["ci"] == pytest.approx([-end for end in reversed(forth[name]["ci"])])
        # five equal labels of a patient tell no more than one: sqrt(5) times the width
        assert np.diff(forth[name]["ci"]) > 1.8 * np.diff(alone[name]["ci"])
    undefined = metrics.paired_difference([1, 1], [0.1, 0.2], [0.2, 0.1], [1, 2])
    assert undefined["auroc"] == undefined["auprc"] == {"value": None, "ci": None}


def test_the_difference_of_means_is_the_mean_of_differences() -> None:
    label, a, subject = cohort(80, 2)
    b = np.random.default_rng(1).random((3, len(label)))
    alone = metrics.mean_difference(label, a[None], b[:1], subject)
    expected = metrics.paired_difference(label, a, b[0], subject)
    assert {name: alone[name]["difference"] for name in alone} == expected
    assert alone["auroc"]["ci"] == pytest.approx(metrics.intervals(label, a, subject)["auroc"])
    differences = [metrics.paired_difference(label, a, each, subject)["auprc"]["value"] for each in b]
    found = metrics.mean_difference(label, np.stack([a] * 3), b, subject)["auprc"]["difference"]["value"]
    assert found == pytest.approx(np.mean(differences))


def test_undefined_samples_are_skipped_and_one_patient_has_no_interval() -> None:
    # two patients, one positive: half of the samples hold one of them twice
    assert metrics.intervals([0, 1], [0.1, 0.9], [1, 2])["auroc"] == (1.0, 1.0)
    assert metrics.intervals([0, 1], [0.1, 0.9], [7, 7]) == {"auroc": None, "auprc": None}


def test_intervals_depend_on_the_seed_alone_and_not_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = cohort(30, 2)
    whole = metrics.intervals(*data, num_samples=50)
    assert metrics.intervals(*data, num_samples=50, seed=1) != whole
    monkeypatch.setattr(metrics, "ELEMENTS_AT_ONCE", 7 * 60)
    assert metrics.intervals(*data, num_samples=50) == whole


# ---------------------------------------------------------------------------------------------------------- days

# few distinct lengths and predictions, so that ties are common; the third is how often a label counts
lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=100)
@given(lengths)
def test_concordance_equals_a_count_of_all_pairs(rows: list[tuple[int, int, int]]) -> None:
    concordant = pairs = 0.0
    for days, predicted, times in rows:
        for other_days, other_predicted, other_times in rows:
            if days < other_days:
                pairs += times * other_times
                concordant += (
                    times * other_times * (1.0 if predicted < other_predicted else 0.5 * (predicted == other_predicted))
                )
    days_N, predicted_N, times_N = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    found = metrics._concordance(days_N, predicted_N, times_N[None])[0]
    np.testing.assert_allclose(found, concordant / pairs if pairs else np.nan, atol=1e-12)
    repeated = np.repeat(np.arange(len(rows)), times_N.astype(int))
    of_repeated = metrics.concordance(days_N[repeated], predicted_N[repeated])
    assert of_repeated is None if not pairs else of_repeated == pytest.approx(concordant / pairs, abs=1e-12)


def test_concordance_with_two_lengths_is_the_auroc() -> None:
    label, prob, _ = cohort(300, 1)
    assert metrics.concordance(label, prob) == pytest.approx(roc_auc_score(label, prob))


def test_scores_of_days_by_hand() -> None:
    found = metrics.day_scores([1, 2, 9], [2, 2, 5], [1, 2, 3])
    assert found["mae"]["value"] == pytest.approx(5 / 3)
    assert found["mae_of_median"] == pytest.approx(8 / 3)
    assert found["concordance"]["value"] == pytest.approx(2.5 / 3)
    assert json.loads(json.dumps(found)) == found
    same = metrics.day_scores([3, 3], [1, 2], [1, 2])
    assert same["concordance"] == {"value": None, "ci": None} and same["mae"]["value"] == 1.5
    nothing = metrics.day_scores([], [], [])
    assert nothing["mae"]["value"] is nothing["mae_of_median"] is nothing["concordance"]["value"] is None


def test_intervals_of_days_resample_patients_not_labels() -> None:
    rng = np.random.default_rng(0)
    days = rng.lognormal(1, 1, size=100)
    predicted = days * rng.lognormal(0, 0.5, size=100)
    one = metrics.day_scores(days, predicted, np.arange(100))
    ten = metrics.day_scores(*(np.repeat(column, 10) for column in (days, predicted, np.arange(100))))
    for name in ("mae", "concordance"):
        assert ten[name]["ci"] == pytest.approx(one[name]["ci"])
        assert one[name]["ci"][0] < one[name]["value"] < one[name]["ci"][1]
    # the standard error of a mean
    error = np.abs(days - predicted).std() / 10
    assert (one["mae"]["ci"][1] - one["mae"]["ci"][0]) / (2 * 1.96 * error) == pytest.approx(1, abs=0.15)


def test_scores_are_plain_json() -> None:
    label, prob, subject = cohort(20, 3)
    result = metrics.scores(label, prob.astype(np.float32), subject)
    assert json.loads(json.dumps(result)) == result
    assert (result["num_labels"], result["num_subjects"]) == (60, 20)
    assert result["auroc"]["ci"][0] <= result["auroc"]["value"] <= result["auroc"]["ci"][1]
