"""Metrics: agreement with scikit-learn, undefined cases, and intervals that resample patients."""

from __future__ import annotations

import json

import numpy as np
import pytest
from comparing import assert_alike
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from hymate.evaluation import metrics

# few distinct scores, so that ties within and across classes are common
cases = st.lists(st.tuples(st.booleans(), st.integers(0, 6).map(lambda k: k / 6)), min_size=2, max_size=40)
two_classes = cases.filter(lambda rows: len({label for label, _ in rows}) == 2)


@settings(max_examples=50)
@given(two_classes)
def test_metrics_equal_scikit_learn_with_ties(rows: list[tuple[bool, float]]) -> None:
    label, score = map(np.array, zip(*rows, strict=True))
    assert metrics.auroc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert metrics.auprc(label, score) == pytest.approx(average_precision_score(label, score), abs=1e-12)
    assert metrics.brier(label, score) == pytest.approx(brier_score_loss(label, score), abs=1e-12)


@settings(max_examples=50)
@given(two_classes, st.integers(0, 5))
def test_a_sample_weighs_like_repeated_labels(rows: list[tuple[bool, float]], seed: int) -> None:
    label, score = map(np.array, zip(*rows, strict=True))
    times = np.random.default_rng(seed).integers(0, 3, len(label))
    roc, pr = metrics._Ranked.of(label, score).areas(times[None].astype(float))[:, 0]
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
    one = metrics.areas(*cohort(80, 1))
    ten = metrics.areas(*cohort(80, 10))
    label, prob, _ = cohort(80, 10)
    alone = metrics.areas(label, prob, np.arange(len(label)))
    for name in ("auroc", "auprc"):
        # ten equal labels of a patient tell no more than one
        assert ten[name]["ci"] == pytest.approx(one[name]["ci"], abs=1e-9)
        assert np.diff(ten[name]["ci"]) > 2 * np.diff(alone[name]["ci"])


def test_interval_of_the_auroc_agrees_with_its_standard_error() -> None:
    label, prob, subject = cohort(2000, 1)
    auc = metrics.auroc(label, prob)
    low, high = metrics.areas(label, prob, subject)["auroc"]["ci"]
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
    same = metrics.paired_difference(label, prob, 3 * prob - 7, subject)
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


def test_intervals_of_areas_are_wider_where_patients_are_few() -> None:
    few, many = (np.repeat([1, 0], [positives, 1000]) for positives in (9, 900))
    # Student's t with 8 degrees of freedom, and 9 in place of 8: 2.31 * sqrt(9 / 8) = 2.45 errors; with 899: 1.96
    assert metrics.widened(0.95, few, np.arange(1009)) == pytest.approx(0.9856, abs=1e-4)
    assert metrics.widened(0.95, many, np.arange(1900)) == pytest.approx(0.95, abs=1e-3)
    # five labels of a patient are one patient
    assert metrics.widened(0.95, np.repeat(few, 5), np.repeat(np.arange(1009), 5)) == pytest.approx(0.9856, abs=1e-4)


def test_the_difference_of_means_is_the_mean_of_differences() -> None:
    label, a, subject = cohort(80, 2)
    b = np.random.default_rng(1).random((3, len(label)))
    alone = metrics.mean_difference(label, a[None], b[:1], subject)
    expected = metrics.paired_difference(label, a, b[0], subject)
    assert {name: alone[name]["difference"] for name in alone} == expected
    assert alone["auroc"]["ci"] == pytest.approx(metrics.areas(label, a, subject)["auroc"]["ci"])
    differences = [metrics.paired_difference(label, a, each, subject)["auprc"]["value"] for each in b]
    found = metrics.mean_difference(label, np.stack([a] * 3), b, subject)["auprc"]["difference"]["value"]
    assert found == pytest.approx(np.mean(differences))


def test_undefined_samples_are_skipped_and_one_patient_has_no_interval() -> None:
    # two patients, one positive: half of the samples hold one of them twice
    assert metrics.areas([0, 1], [0.1, 0.9], [1, 2])["auroc"] == {"value": 1.0, "ci": [1.0, 1.0]}
    assert metrics.areas([0, 1], [0.1, 0.9], [7, 7])["auprc"] == {"value": 1.0, "ci": None}


def test_samples_depend_on_the_seed_alone_and_not_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    label, prob, subject = cohort(30, 2)

    def samples(seed: int = 0) -> np.ndarray:
        return metrics.resampled(metrics._Ranked.of(label, prob).areas, 2, subject, None, 50, seed)

    whole = samples()
    assert not np.array_equal(samples(1), whole)
    monkeypatch.setattr(metrics, "ELEMENTS_AT_ONCE", 7 * 60)
    np.testing.assert_allclose(samples(), whole, rtol=1e-12)


# ------------------------------------------------------------------------------------------------------- weights

# labels, scores, days, weights; a subject has two of them
weighted = st.lists(
    st.tuples(st.booleans(), st.integers(0, 6).map(lambda k: k / 6), st.integers(0, 9), st.integers(1, 4)),
    min_size=2,
    max_size=24,
)


@settings(max_examples=30)
@given(weighted)
def test_integer_weights_equal_repeated_labels(rows: list[tuple[bool, float, int, int]]) -> None:
    label, score, days, weight = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    subject, other = np.arange(len(rows)) // 2, 1 - score**2
    again = np.repeat(np.arange(len(rows)), weight.astype(int))
    for found, repeated in (
        (metrics.scores(label, score, subject, weight), metrics.scores(label[again], score[again], subject[again])),
        (
            metrics.day_scores(days, 9 * score, subject, weight),
            metrics.day_scores(days[again], 9 * score[again], subject[again]),
        ),
        (
            metrics.paired_difference(label, score, other, subject, weight),
            metrics.paired_difference(label[again], score[again], other[again], subject[again]),
        ),
        (
            metrics.mean_difference(label, np.stack([score, other]), other[None], subject, weight),
            metrics.mean_difference(
                label[again], np.stack([score, other])[:, again], other[None, again], subject[again]
            ),
        ),
    ):
        for name in ("num_labels", "num_positives"):  # counts are of labels, whatever they weigh
            assert found.pop(name, None) is None or repeated.pop(name) >= len(label) * (name == "num_labels")
        assert_alike(found, repeated)


@settings(max_examples=20)
@given(weighted, st.sampled_from([1.0, 0.25, 3.0]))
def test_equal_weights_change_nothing(rows: list[tuple[bool, float, int, int]], each: float) -> None:
    label, score, days, _ = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    subject, weight = np.arange(len(rows)) // 2, np.full(len(rows), each, np.float32)
    assert_alike(metrics.scores(label, score, subject, weight), metrics.scores(label, score, subject))
    assert_alike(metrics.day_scores(days, score, subject, weight), metrics.day_scores(days, score, subject))
    if each == 1:
        assert metrics.scores(label, score, subject, weight) == metrics.scores(label, score, subject)


def test_weighted_areas_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    label, prob, weight = rng.random(200) < 0.3, rng.random(200).round(1), rng.exponential(size=200) + 0.1
    assert metrics.auroc(label, prob, weight) == pytest.approx(roc_auc_score(label, prob, sample_weight=weight))
    assert metrics.auprc(label, prob, weight) == pytest.approx(
        average_precision_score(label, prob, sample_weight=weight)
    )
    assert metrics.brier(label, prob, weight) == pytest.approx(brier_score_loss(label, prob, sample_weight=weight))
    false_positive, recall, precision = metrics.curves(label, prob, weight)
    theirs = roc_curve(label, prob, sample_weight=weight, drop_intermediate=False)
    np.testing.assert_allclose([false_positive, recall], np.array(theirs[:2])[:, 1:])  # they begin at (0, 0)
    theirs = precision_recall_curve(label, prob, sample_weight=weight)
    np.testing.assert_allclose([precision, recall], np.array(theirs[:2])[:, -2::-1])  # they end at (0, 1)


@pytest.mark.parametrize("heavy", range(4))
def test_one_label_of_enormous_weight_decides_the_areas_and_breaks_nothing(heavy: int) -> None:
    label, prob, weight = np.array([1, 0, 1, 0]), np.array([0.9, 0.6, 0.4, 0.2]), np.ones(4)
    weight[heavy] = 1e30
    # in the end only the pairs that the heavy label belongs to count
    assert metrics.auroc(label, prob, weight) == pytest.approx([1.0, 0.5, 0.5, 1.0][heavy])
    assert metrics.auprc(label, prob, weight) == pytest.approx([1.0, 0.5, 1.0, 5 / 6][heavy])


@pytest.mark.parametrize("weight", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0]])
def test_impossible_weights_are_refused(weight: list[float]) -> None:
    with pytest.raises(AssertionError, match="weights"):
        metrics.auroc([0, 1], [0.1, 0.9], weight)


@pytest.mark.parametrize("score", [[0.1], [0.1, 0.9, 0.5]])
def test_another_number_of_scores_is_refused(score: list[float]) -> None:
    with pytest.raises(AssertionError, match="labels, "):
        metrics.auroc([0, 1], score)


def test_scores_without_bounds_may_tie() -> None:
    assert metrics.auroc([0, 1, 1], [np.inf, -np.inf, np.inf]) == 0.25


# ---------------------------------------------------------------------------------------------------------- days

# few distinct lengths and predictions, so that ties are common; the third is how often a label counts
lengths = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=25)


@settings(max_examples=100)
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
    found = metrics.concordances(days_N, predicted_N, times_N[None])[0]
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
    assert result["num_positives"] == 3 * result["num_positive_subjects"] == label.sum()
    assert result["auroc"]["ci"][0] <= result["auroc"]["value"] <= result["auroc"]["ci"][1]
