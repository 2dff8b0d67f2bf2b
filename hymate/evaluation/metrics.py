"""Metrics of predicted risks and days, with intervals over patients rather than labels.

Every number is None, not a made-up value, where it is undefined: AUROC and AUPRC need both classes, concordance two
different lengths. Labels may have weights (`weight_N`, above 0, 1 each where it is left out), such as the inverse
probability of not being censored: a label of weight 2 counts as two equal labels of its patient do.

Proportions have Wilson intervals (1927) with an effective number of patients for the number of trials (Kish 1965), as
if all of a patient's labels were one: too wide rather than too narrow, and not empty where nothing happened. Other
intervals are those of `estimates`. All are 95 %.

Shape legend:
    N  labels
    M  labels that have a score, the highest first
    G  groups of labels with equal scores (ties), best first
    P  patients
    B  bootstrap samples
    K  statistics
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtrit  # scipy.stats takes half a second to import

Array = NDArray[Any]
AREAS = ("auroc", "auprc")
# what tables show of `scores`, and their headings; estimates have intervals
SHOWN = {"auroc": "AUROC [95 % CI]", "auprc": "AUPRC [95 % CI]", "brier": "Brier", "ece": "ECE"}
Z = float(ndtri(0.975))
BINS = 10  # of the calibration error
LEVEL_OF_BOTH = 0.975  # of each area's interval, where a verdict asks whether either differs
ELEMENTS_AT_ONCE = 2_000_000  # of the (B, N) weights: bounds the bootstrap's memory to some 100 MB


def auroc(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> float | None:
    """Area under the ROC curve: the chance that a positive is scored above a negative, ties counting half."""
    return _defined(_Ranked.of(label_N, score_N).areas(weights(weight_N, label_N)[None])[0])


def auprc(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> float | None:
    """Average precision: precision at each distinct score, weighted by the recall gained there (no interpolation)."""
    return _defined(_Ranked.of(label_N, score_N).areas(weights(weight_N, label_N)[None])[1])


def curves(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> tuple[Array, Array, Array]:
    """False positive rate, recall and precision (G,) at each distinct score as the threshold, the highest first; both
    classes must be there. `auroc` and `auprc` are the areas under them.
    """
    ranked, weight_N = _Ranked.of(label_N, score_N), weights(weight_N, label_N)
    # each class is summed by itself: taken from the sum of all, a heavy label would swallow the light ones
    weight_M, positive_M = weight_N[ranked.place_M], ranked.positive_M
    positive_G, negative_G = (np.cumsum(weight_M * of_M)[ranked.last_M] for of_M in (positive_M, ~positive_M))
    return negative_G / negative_G[-1], positive_G / positive_G[-1], positive_G / (positive_G + negative_G)


def brier(label_N: ArrayLike, prob_N: ArrayLike, weight_N: ArrayLike | None = None) -> float | None:
    """Mean squared difference of probability and label (Brier 1950); 0 is best."""
    label_N, prob_N = _checked(label_N, prob_N)
    return mean((prob_N - label_N) ** 2, weight_N)


def ece(label_N: ArrayLike, prob_N: ArrayLike, weight_N: ArrayLike | None = None) -> float | None:
    """Expected calibration error (Naeini et al. 2015): |mean probability - fraction of positives| in equally wide
    bins of the probability, averaged over the labels; 0 is best.
    """
    label_N, prob_N = _checked(label_N, prob_N)
    if not len(label_N):
        return None
    weight_N = weights(weight_N, label_N)
    return float(np.abs(np.bincount(ece_bin(prob_N), weight_N * (prob_N - label_N), BINS)).sum() / weight_N.sum())


def ece_bin(prob_N: Array) -> Array:
    """The number of each probability's bin."""
    return np.minimum((prob_N * BINS).astype(int), BINS - 1)


def mean(value_N: ArrayLike, weight_N: ArrayLike | None = None) -> float | None:
    """Weighted mean, None of nothing."""
    value_N = np.asarray(value_N, dtype=np.float64)
    return float(np.average(value_N, weights=weights(weight_N, value_N))) if len(value_N) else None


def weights(weight_N: ArrayLike | None, label_N: ArrayLike) -> Array:
    """The labels' weights as float64 (N,), 1 each where there are none."""
    size = len(np.asarray(label_N))
    weight_N = np.ones(size) if weight_N is None else np.asarray(weight_N, dtype=np.float64)
    assert weight_N.shape == (size,), f"{size} labels, weights of shape {weight_N.shape}"
    assert (np.isfinite(weight_N) & (weight_N > 0)).all(), "weights must be finite and above 0"
    return weight_N


def proportion(
    flag_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None, z: float = Z
) -> dict[str, Any]:
    """`value`, the fraction of labels with the flag (None without labels), and `ci`; z: its half width, in errors."""
    value = mean(flag_N, weight_N)
    if value is None:
        return {"value": None, "ci": None}
    return {"value": value, "ci": wilson(value, effective_patients(subject_N, weight_N), z)}


def wilson(value: float, n: float, z: float = Z) -> list[float]:
    """Interval [low, high] of a proportion `value` of `n` trials (Wilson 1927), 95 % unless z says otherwise."""
    middle = (value + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(value * (1 - value) / n + z**2 / (4 * n**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    # of a proportion of 0 or 1 the bounds touch it but for rounding, which must not leave it outside
    return [float(min(low, value)), float(max(high, value))]


def effective_patients(subject_N: ArrayLike, weight_N: ArrayLike | None = None) -> float:
    """How many patients with equally many labels carry as much information as these (Kish 1965): (sum m)^2 / sum
    m^2, where m is the weight of all labels of a patient.
    """
    _, patient_N = np.unique(np.asarray(subject_N), return_inverse=True)
    weight_P = np.bincount(patient_N, weights(weight_N, patient_N))
    return float(weight_P.sum() ** 2 / (weight_P**2).sum())


def midranks(score_N: ArrayLike, weight_N: ArrayLike | None = None) -> Array:
    """(N,): which fraction of all labels has a lower score, of equal scores half; their mean is 1/2."""
    _, group_N = np.unique(np.asarray(score_N), return_inverse=True)
    weight_G = np.bincount(group_N, weights(weight_N, group_N))
    below_G = np.cumsum(weight_G) - weight_G / 2
    return np.asarray((below_G / weight_G.sum())[group_N])


def areas(
    label_N: ArrayLike, score_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> dict[str, dict[str, Any]]:
    """ "auroc" and "auprc", each as `estimates` gives it, at `widened` level."""
    ranked, level = _Ranked.of(label_N, score_N), widened(0.95, label_N, subject_N)
    return dict(zip(AREAS, estimates(ranked.areas, len(AREAS), subject_N, weight_N, level), strict=True))


def paired_difference(
    label_N: ArrayLike,
    a_N: ArrayLike,
    b_N: ArrayLike,
    subject_N: ArrayLike,
    weight_N: ArrayLike | None = None,
    level: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """How much better scores `a_N` are than `b_N` on the same labels, in "auroc" and "auprc": a's minus b's.

    Each is as `estimates` gives it, at `widened` level: both scores are computed on the same resampled patients, which
    cancels what the two have in common. Scores are any finite numbers; each vector has its own scale.
    """
    a, b = _Ranked.of(label_N, a_N), _Ranked.of(label_N, b_N)

    def differences(weight_BN: Array) -> Array:
        return a.areas(weight_BN) - b.areas(weight_BN)

    level = widened(level, label_N, subject_N)
    return dict(zip(AREAS, estimates(differences, len(AREAS), subject_N, weight_N, level), strict=True))


def mean_difference(
    label_N: ArrayLike, a_RN: Array, b_RN: Array, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> dict[str, dict[str, Any]]:
    """As `paired_difference`, of the means over several models' scores: of each area the "ci" of a's mean (95 %), and
    as "difference" how much better it is than b's mean.

    A score is NaN where a model has none, as in cross-validation outside its fold.
    """
    label_N = np.asarray(label_N)
    a_R, b_R = ([_Ranked.of(label_N, score_N, ~np.isnan(score_N)) for score_N in score_RN] for score_RN in (a_RN, b_RN))

    def means(weight_BN: Array) -> Array:
        a_KB, b_KB = (np.mean([ranked.areas(weight_BN) for ranked in of_R], axis=0) for of_R in (a_R, b_R))
        return np.concatenate([a_KB, a_KB - b_KB])

    found = estimates(means, 2 * len(AREAS), subject_N, weight_N, widened(0.95, label_N, subject_N))
    own, differences = found[: len(AREAS)], found[len(AREAS) :]
    return {
        name: {"ci": mine["ci"], "difference": difference}
        for name, mine, difference in zip(AREAS, own, differences, strict=True)
    }


def widened(level: float, label_N: ArrayLike, subject_N: ArrayLike) -> float:
    """The level at which a percentile interval of an area is about as wide as Student's t asks for `level`.

    The bootstrap is too sure of few patients, as a normal interval with n in place of n - 1 is (Hesterberg 2015). The
    degrees of freedom are those of the class with fewer patients, which an area depends on most.
    """
    label_N, subject_N = np.asarray(label_N), np.asarray(subject_N)
    patients = min(len(np.unique(subject_N[of_class])) for of_class in (label_N > 0.5, label_N < 0.5))
    if patients < 2:
        return 1.0
    quantile = stdtrit(patients - 1, (1 + level) / 2) * np.sqrt(patients / (patients - 1))
    return float(2 * ndtr(quantile) - 1)


def estimates(
    statistics: Callable[[Array], Array],
    num_statistics: int,
    subject_N: ArrayLike,
    weight_N: ArrayLike | None = None,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """Each statistic's `value`, None where it is undefined, and its interval `ci` [low, high] by `resampled`.

    The interval is a percentile one (Efron & Tibshirani 1993). Samples where a statistic is undefined are skipped; `ci`
    is None where none is left or there is one patient only.
    """
    if not len(np.asarray(subject_N)):
        return [{"value": None, "ci": None} for _ in range(num_statistics)]
    value_K1 = statistics(weights(weight_N, subject_N)[None])
    value_KB = resampled(statistics, num_statistics, subject_N, weight_N)
    return [
        {"value": _defined(value_1), "ci": _percentiles(value_B, level)}
        for value_1, value_B in zip(value_K1, value_KB, strict=True)
    ]


def resampled(
    statistics: Callable[[Array], Array],
    num_statistics: int,
    subject_N: ArrayLike,
    weight_N: ArrayLike | None = None,
    num_samples: int = 1000,
    seed: int = 0,
) -> Array:
    """The statistics (K, B) of bootstrap samples of patients, each with all their labels; no samples of one patient.

    statistics: weights of the labels (B, N), how often each was drawn times its own -> values (K, B), NaN where
    undefined.
    """
    subject_P, patient_N = np.unique(np.asarray(subject_N), return_inverse=True)
    weight_N = weights(weight_N, patient_N)
    values = [np.empty((num_statistics, 0))]
    if len(subject_P) > 1:
        rng = np.random.default_rng(seed)
        fraction_P = np.full(len(subject_P), 1 / len(subject_P))
        at_once = max(1, ELEMENTS_AT_ONCE // len(patient_N))
        for start in range(0, num_samples, at_once):
            times_BP = rng.multinomial(len(subject_P), fraction_P, size=min(at_once, num_samples - start))
            values.append(statistics(np.take(times_BP, patient_N, axis=1) * weight_N))  # each sample in one piece
    return np.concatenate(values, axis=1)


def scores(
    label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> dict[str, Any]:
    """Everything a results table needs, as plain JSON values; counts are without weights."""
    label_N, prob_N = _checked(label_N, prob_N)
    subject_N = np.asarray(subject_N)
    return {
        "num_labels": len(label_N),
        "num_positives": int(label_N.sum()),
        "num_subjects": len(np.unique(subject_N)),
        "num_positive_subjects": len(np.unique(subject_N[label_N > 0.5])),
        "prevalence": mean(label_N, weight_N),
        **areas(label_N, prob_N, subject_N, weight_N),
        "brier": brier(label_N, prob_N, weight_N),
        "ece": ece(label_N, prob_N, weight_N),
    }


def concordance(days_N: ArrayLike, predicted_N: ArrayLike, weight_N: ArrayLike | None = None) -> float | None:
    """Harrell's C (Harrell et al. 1982) without censoring: the chance that of two different lengths the longer one is
    predicted to be longer, equal predictions counting half; a pair weighs the product of its labels' weights.
    """
    return _defined(concordances(*_checked_days(days_N, predicted_N), weights(weight_N, days_N)[None]))


def day_scores(
    days_N: ArrayLike, predicted_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> dict[str, Any]:
    """The row of a results table for predicted days, as plain JSON values with 95 % intervals over patients.

    "mae" is the mean absolute error in days; "mae_of_median" that of the best constant, the (weighted) median of
    days_N, which a model must beat to be of use.
    """
    days_N, predicted_N = _checked_days(days_N, predicted_N)
    error_N = np.abs(predicted_N - days_N)

    def statistics(weight_BN: Array) -> Array:
        mae_B = weight_BN @ error_N / weight_BN.sum(axis=1)
        return np.stack([mae_B, concordances(days_N, predicted_N, weight_BN)])

    mae, concordance = estimates(statistics, 2, subject_N, weight_N)
    best_constant = mean(np.abs(days_N - _median(days_N, weights(weight_N, days_N))), weight_N) if len(days_N) else None
    return {"num_labels": len(days_N), "mae": mae, "mae_of_median": best_constant, "concordance": concordance}


def _median(value_N: Array, weight_N: Array) -> float:
    """A value that half of the weight lies at or below."""
    order_N = np.argsort(value_N, kind="stable")
    below_N = np.cumsum(weight_N[order_N])
    return float(value_N[order_N][np.searchsorted(below_N, below_N[-1] / 2)])


class _Ranked(NamedTuple):
    """Labels by falling score, sorted once for all samples of patients.

    place_M: each one's place among all N labels. positive_M: bool. last_M: whether the next one's score is lower.
    """

    place_M: Array
    positive_M: Array
    last_M: Array

    @classmethod
    def of(cls, label_N: ArrayLike, score_N: ArrayLike, scored_N: ArrayLike | None = None) -> _Ranked:
        """scored_N: bool, the labels that have a score; all where it is left out."""
        label_N, score_N = np.asarray(label_N), np.asarray(score_N)
        assert label_N.ndim == 1 and label_N.shape == score_N.shape, f"{label_N.shape} labels, {score_N.shape} scores"
        at_M = np.arange(len(label_N)) if scored_N is None else np.flatnonzero(scored_N)
        label_M, score_M = _checked(label_N[at_M], score_N[at_M], low=-np.inf, high=np.inf)
        order_M = np.argsort(-score_M, kind="stable")
        falling_M = score_M[order_M]
        last_M = np.append(falling_M[1:] != falling_M[:-1], True)[: len(order_M)]
        return cls(at_M[order_M], label_M[order_M] > 0.5, last_M)

    def areas(self, weight_BN: Array) -> Array:
        """(2, B): AUROC and average precision under each row of label weights; NaN where a class has no weight."""
        area_KB = np.full((len(AREAS), len(weight_BN)), np.nan)
        _write_areas(self.place_M, self.positive_M, self.last_M, weight_BN, area_KB)
        return area_KB


@njit(cache=True)
def _write_areas(place_M, positive_M, last_M, weight_BN, area_KB):  # type: ignore[no-untyped-def]
    for b in range(len(weight_BN)):
        weight_N = weight_BN[b]
        positives, negatives = 0.0, 0.0
        for m in range(len(place_M)):
            if positive_M[m]:
                positives += weight_N[place_M[m]]
            else:
                negatives += weight_N[place_M[m]]
        if positives == 0.0 or negatives == 0.0:
            continue
        # passed: scored at least as high; gained, added: those of the scores that are equal to this one
        positive_passed, negative_passed, gained, added, roc, pr = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for m in range(len(place_M)):
            weight = weight_N[place_M[m]]
            if positive_M[m]:
                positive_passed += weight
                gained += weight
            else:
                negative_passed += weight
                added += weight
            if last_M[m]:
                if gained > 0.0:
                    roc += gained * (negatives - negative_passed + added / 2)
                    pr += gained * positive_passed / (positive_passed + negative_passed)
                gained, added = 0.0, 0.0
        area_KB[0, b] = roc / (positives * negatives)
        area_KB[1, b] = pr / positives


def concordances(days_N: Array, predicted_N: Array, weight_BN: Array, ended_N: Array | None = None) -> Array:
    """(B,): concordance under each row of label weights, in O(N log N); NaN where no two lengths differ.

    ended_N: bool; where false, it lasted longer than these days, nobody knows how much, and is never the shorter one.

    Two labels whose lengths have different ranks differ first in one bit of them: there the pair is counted, among
    labels with the same higher bits, sorted by prediction, by running sums of the weights whose bit is 0.
    """
    ended_N = np.ones(len(days_N), dtype=bool) if ended_N is None else ended_N
    concordant_B, pairs_B = np.zeros(len(weight_BN)), np.zeros(len(weight_BN))
    _, length_N = np.unique(days_N, return_inverse=True)
    _, rank_N = np.unique(2 * length_N + ~ended_N, return_inverse=True)
    for bit in range(int(rank_N.max(initial=0)).bit_length()):
        group_N = rank_N >> (bit + 1)
        order_N = np.lexsort((predicted_N, group_N))
        sorted_BN, longer_N = weight_BN[:, order_N], (rank_N[order_N] >> bit & 1).astype(bool)
        new_group_N = np.diff(group_N[order_N], prepend=-1) != 0
        new_tie_N = new_group_N | (np.diff(predicted_N[order_N], prepend=np.nan) != 0)
        shorter_BN = np.cumsum(np.where(longer_N | ~ended_N[order_N], 0.0, sorted_BN), axis=1)
        shorter_BN = np.concatenate([np.zeros((len(weight_BN), 1)), shorter_BN], axis=1)  # weight before each place
        (group_start, group_end), (tie_start, tie_end) = _runs(new_group_N, longer_N), _runs(new_tie_N, longer_N)
        below_BM = (shorter_BN[:, tie_start] + shorter_BN[:, tie_end]) / 2 - shorter_BN[:, group_start]
        all_BM = shorter_BN[:, group_end] - shorter_BN[:, group_start]
        concordant_B += (sorted_BN[:, longer_N] * below_BM).sum(axis=1)
        pairs_B += (sorted_BN[:, longer_N] * all_BM).sum(axis=1)
    with np.errstate(invalid="ignore"):
        return concordant_B / np.where(pairs_B > 0, pairs_B, np.nan)


def _runs(new_N: Array, asked_N: Array) -> tuple[Array, Array]:
    """Start and end (exclusive) of the runs that the places `asked_N` lie in; a run begins wherever `new_N` is true."""
    start = np.flatnonzero(new_N)
    run_M = np.cumsum(new_N)[asked_N] - 1
    return start[run_M], np.append(start, len(new_N))[run_M + 1]


def _checked(label_N: ArrayLike, score_N: ArrayLike, low: float = 0.0, high: float = 1.0) -> tuple[Array, Array]:
    label_N, score_N = np.asarray(label_N, dtype=np.float64), np.asarray(score_N, dtype=np.float64)
    assert label_N.ndim == 1 and label_N.shape == score_N.shape, f"{label_N.shape} labels, {score_N.shape} scores"
    assert np.isin(label_N, (0, 1)).all(), "labels must be 0 or 1"
    assert ((score_N >= low) & (score_N <= high)).all(), f"scores must be in [{low}, {high}] and not NaN"
    return label_N, score_N


def _checked_days(days_N: ArrayLike, predicted_N: ArrayLike) -> tuple[Array, Array]:
    days_N, predicted_N = np.asarray(days_N, dtype=np.float64), np.asarray(predicted_N, dtype=np.float64)
    assert days_N.ndim == 1 and days_N.shape == predicted_N.shape, f"{days_N.shape} days, {predicted_N.shape} predicted"
    assert np.isfinite(days_N).all() and np.isfinite(predicted_N).all(), "days must be finite numbers"
    return days_N, predicted_N


def _percentiles(value_B: Array, level: float) -> list[float] | None:
    value_B = value_B[~np.isnan(value_B)]
    return np.percentile(value_B, [50 * (1 - level), 50 * (1 + level)]).tolist() if len(value_B) else None


def _defined(value_1: Array) -> float | None:
    return None if np.isnan(value_1[0]) else float(value_1[0])
