"""What else than a ranking decides whether a risk model can be used: whether its probabilities mean what they say,
what acting on them brings, and for whom they are wrong.

Every function looks at one task. Proportions have Wilson intervals (1927) with the number of patients for the number of
trials, as if all of a patient's labels were one: too wide rather than too narrow, and not empty where nothing happened.
Other intervals are `metrics.bootstrap`'s. All are 95 %.

Shape legend:
    N  labels
    B  bootstrap samples
    T  thresholds of the probability
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy.optimize import minimize
from scipy.special import expit

from hymate import metrics

Array = NDArray[Any]
# Below these an AUROC's interval is so wide that the number says next to nothing.
ENOUGH_POSITIVES, ENOUGH_SUBJECTS = 100, 200
FEWEST_SUBJECTS = 10  # of a group of which anything is told: of fewer it would tell of single patients
SPECIFICITIES = (0.8, 0.9, 0.95)
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
GRID = tuple(percent / 100 for percent in range(1, 100))
CURVE_GROUPS, LABELS_A_GROUP = 10, 20
SIMULATIONS = 200
PRIOR_LABELS = 10  # the precision of the prior of a log temperature and a shift
Z = 1.959964  # 97.5 % of a standard normal
NEWTON_STEPS, CONVERGED = 20, 1e-6
STEEPEST = 50.0  # a slope that grows beyond this has no end: the classes are separated
EPSILON = 1e-7


# ------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Recalibration:
    """Calibrated logit = logit / temperature + shift, which keeps the order of the predictions."""

    temperature: float
    shift: float

    def __call__(self, logit_N: Array) -> Array:
        """Calibrated logits (N,)."""
        return logit_N / self.temperature + self.shift

    def undo(self, prob_N: ArrayLike) -> Array:
        """What calibrated probabilities were before."""
        return np.asarray(expit((logit(prob_N) - self.shift) * self.temperature))


def recalibrate(label_N: ArrayLike, logit_N: ArrayLike) -> Recalibration:
    """The temperature (Guo et al. 2017) and shift (Platt 1999) of least negative log-likelihood on labels that the
    model did not learn from.

    A temperature alone leaves a wrong mean as it is, and the mean of a checkpoint chosen for its ranking often is
    wrong: on 2,080 stays of PhysioNet 2012, after fitting on 800, the expected calibration error of one checkpoint was
    0.050 as trained, 0.032 with a temperature, 0.018 with both. PRIOR_LABELS draw towards no change, which keeps both
    finite and 50 labels from doing more harm than they must.
    """
    label_N, logit_N = np.asarray(label_N, dtype=np.float64), np.asarray(logit_N, dtype=np.float64)

    def loss(parameters: Array) -> float:
        log_temperature, shift = parameters
        calibrated_N = logit_N * np.exp(-log_temperature) + shift
        likelihood = np.logaddexp(0.0, np.where(label_N > 0.5, -calibrated_N, calibrated_N)).sum()
        return float(likelihood + PRIOR_LABELS / 2 * (log_temperature**2 + shift**2))

    log_temperature, shift = minimize(loss, np.zeros(2), method="L-BFGS-B").x
    return Recalibration(float(np.exp(log_temperature)), float(shift))


def calibration_slope(label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike) -> dict[str, Any]:
    """Slope of the logistic regression of the label on the logit (Cox 1958), by maximum likelihood.

    1 is ideal; below it the probabilities are too extreme, above it too timid. None where it has no finite value.
    """
    label_N, logit_N = np.asarray(label_N, dtype=np.float64), logit(prob_N)

    def slopes(weight_BN: Array) -> Array:
        return _slopes(label_N, logit_N, weight_BN)[None]

    value = float(slopes(np.ones((1, len(label_N))))[0, 0])
    (ci,) = metrics.bootstrap(slopes, 1, subject_N)
    return {"value": None if np.isnan(value) else value, "ci": None if ci is None else list(ci)}


def _slopes(label_N: Array, logit_N: Array, weight_BN: Array) -> Array:
    """(B,): Newton's method for slope and intercept, from a flat line; NaN where it does not converge."""
    share_B = weight_BN @ label_N / weight_BN.sum(axis=1)
    slope_B, intercept_B = np.zeros(len(weight_BN)), np.zeros(len(weight_BN))
    change_B = np.full(len(weight_BN), np.inf)
    with np.errstate(all="ignore"):
        for _ in range(NEWTON_STEPS):
            prob_BN = expit(slope_B[:, None] * logit_N + intercept_B[:, None])
            miss_BN, spread_BN = weight_BN * (label_N - prob_BN), weight_BN * prob_BN * (1 - prob_BN)
            a_B, b_B, c_B = spread_BN.sum(axis=1), spread_BN @ logit_N, spread_BN @ logit_N**2
            up_B, along_B = miss_BN.sum(axis=1), miss_BN @ logit_N
            determinant_B = a_B * c_B - b_B**2
            change_B = (a_B * along_B - b_B * up_B) / determinant_B
            slope_B = slope_B + change_B
            intercept_B = intercept_B + (c_B * up_B - b_B * along_B) / determinant_B
            if (np.abs(change_B) < CONVERGED).all():
                break
        found_B = (np.abs(change_B) < CONVERGED) & (np.abs(slope_B) < STEEPEST) & (share_B > 0) & (share_B < 1)
    return np.where(found_B, slope_B, np.nan)


def calibration_error(label_N: ArrayLike, prob_N: ArrayLike, seed: int = 0) -> dict[str, float | None]:
    """`metrics.ece` and how much of it is chance.

    With few labels the share of positives in a bin differs from the mean probability of even a perfect model: 0.024 is
    usual with 800 labels. "by_chance" is the mean error of labels drawn from the probabilities themselves (Broecker &
    Smith 2007); "beyond_chance" is what remains, errors of the two kinds adding in squares, 0 where nothing does. The
    labels are drawn one by one: where a patient's hang together more than their probabilities do, chance is larger.
    """
    label_N, prob_N = np.asarray(label_N, dtype=np.float64), np.asarray(prob_N, dtype=np.float64)
    found = metrics.ece(label_N, prob_N)
    if found is None:
        return {"ece": None, "by_chance": None, "beyond_chance": None}
    rng = np.random.default_rng(seed)
    drawn = np.array([metrics.ece(rng.binomial(1, prob_N), prob_N) for _ in range(SIMULATIONS)], dtype=np.float64)
    beyond = max(0.0, found**2 - float(np.mean(drawn**2))) ** 0.5
    return {"ece": found, "by_chance": float(drawn.mean()), "beyond_chance": beyond}


def calibration_curve(label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike) -> list[dict[str, Any]]:
    """Mean probability and observed share in groups of as many labels each, from the lowest probabilities on."""
    label_N, prob_N, subject_N = np.asarray(label_N), np.asarray(prob_N), np.asarray(subject_N)
    groups = np.clip(len(label_N) // LABELS_A_GROUP, 1, CURVE_GROUPS)
    return [
        {"predicted": float(prob_N[own].mean()), "observed": share(label_N[own], subject_N[own]), "labels": len(own)}
        for own in np.array_split(np.argsort(prob_N, kind="stable"), groups)
        if len(own)
    ]


def share(flag_N: ArrayLike, subject_N: ArrayLike) -> dict[str, Any]:
    """`value`, the share of labels with the flag (None without labels), and its `ci`."""
    flag_N = np.asarray(flag_N, dtype=np.float64)
    n = len(np.unique(np.asarray(subject_N)))
    if not n:
        return {"value": None, "ci": None}
    value = float(flag_N.mean())
    middle = (value + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(value * (1 - value) / n + Z**2 / (4 * n**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    # of a share of 0 or 1 the bounds touch it but for rounding, which must not leave it outside
    return {"value": value, "ci": [float(min(low, value)), float(max(high, value))]}


# --------------------------------------------------------------------------------------------------- decisions


def threshold_at(specificity: float, label_N: ArrayLike, prob_N: ArrayLike) -> float:
    """The lowest threshold above which at most 1 - specificity of the negatives lie; an alert is a higher probability.

    label_N must hold a negative.
    """
    negative_M = np.sort(np.asarray(prob_N, dtype=np.float64)[np.asarray(label_N) < 0.5])
    return float(negative_M[max(0, int(np.ceil(specificity * len(negative_M) - 1e-9)) - 1)])


def operating_point(threshold: float, label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike) -> dict[str, Any]:
    """Sensitivity, specificity and positive predictive value of alerts above a threshold, and alerts per 100
    predictions.
    """
    positive_N, subject_N = np.asarray(label_N) > 0.5, np.asarray(subject_N)
    alert_N = np.asarray(prob_N, dtype=np.float64) > threshold
    return {
        "threshold": threshold,
        "sensitivity": share(alert_N[positive_N], subject_N[positive_N]),
        "specificity": share(~alert_N[~positive_N], subject_N[~positive_N]),
        "ppv": share(positive_N[alert_N], subject_N[alert_N]),
        "alerts_per_100": float(100 * alert_N.mean()) if len(alert_N) else None,
    }


def net_benefit(label_N: ArrayLike, prob_N: ArrayLike, threshold_T: ArrayLike, weight_BN: Array | None = None) -> Array:
    """(T, B): net benefit of acting where the probability is at least a threshold (Vickers & Elkin 2006).

    True positives less false positives, a false one weighing threshold / (1 - threshold), over all labels. Acting on
    everyone is prob_N = 1; acting on no one is 0.
    """
    label_N, threshold_T = np.asarray(label_N, dtype=np.float64), np.asarray(threshold_T, dtype=np.float64)
    weight_BN = np.ones((1, len(label_N))) if weight_BN is None else weight_BN
    worth_NT = np.where(label_N[:, None] > 0.5, 1.0, -threshold_T / (1 - threshold_T))
    act_NT = np.asarray(prob_N, dtype=np.float64)[:, None] >= threshold_T
    return ((weight_BN @ (act_NT * worth_NT)) / weight_BN.sum(axis=1, keepdims=True)).T


def decision_curve(label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike) -> dict[str, Any]:
    """What acting on the probabilities brings, against acting on everyone or on no one, whichever is better.

    "net_benefit": rows of `threshold`, net benefits of `model` and `all`, the model's `gain` on the better one of all
    and none, at those of THRESHOLDS that 1 to 99 % of the probabilities reach. "useful": the longest run of GRID's
    thresholds at each of which the gain's interval lies above 0, [low, high], or None.
    """
    label_N, prob_N = np.asarray(label_N, dtype=np.float64), np.asarray(prob_N, dtype=np.float64)

    def gains(weight_BN: Array) -> Array:
        everyone_TB = net_benefit(label_N, np.ones_like(prob_N), GRID, weight_BN)
        return net_benefit(label_N, prob_N, GRID, weight_BN) - np.maximum(everyone_TB, 0)

    gain_T = gains(np.ones((1, len(label_N))))[:, 0]
    ci_T = metrics.bootstrap(gains, len(GRID), subject_N)
    model_T = net_benefit(label_N, prob_N, GRID)[:, 0]
    all_T = net_benefit(label_N, np.ones_like(prob_N), GRID)[:, 0]
    rows = [
        {
            "threshold": GRID[t],
            "model": float(model_T[t]),
            "all": float(all_T[t]),
            "gain": {"value": float(gain_T[t]), "ci": None if ci_T[t] is None else list(ci_T[t] or ())},
        }
        for t in map(GRID.index, THRESHOLDS)
        if 0.01 <= np.mean(prob_N >= GRID[t]) <= 0.99
    ]
    runs = itertools.groupby(range(len(GRID)), key=lambda t: (ci := ci_T[t]) is not None and ci[0] > 0)
    useful = max((list(run) for better, run in runs if better), key=len, default=None)
    return {"net_benefit": rows, "useful": None if useful is None else [GRID[useful[0]], GRID[useful[-1]]]}


# ---------------------------------------------------------------------------------------------------- subgroups


def group_scores(threshold: float, label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike) -> dict[str, Any]:
    """One group's line; of a group of fewer than FEWEST_SUBJECTS nothing but that (`few`).

    Sensitivity and specificity are those at `threshold`. `enough`: whether the group alone could bear a judgement.
    `wrong`: "too high" or "too low" where the mean probability is outside the interval of the observed share.
    """
    label_N, prob_N, subject_N = np.asarray(label_N), np.asarray(prob_N), np.asarray(subject_N)
    subjects = len(np.unique(subject_N))
    if subjects < FEWEST_SUBJECTS:
        return {"few": True}
    ci = metrics.intervals(label_N, prob_N, subject_N)["auroc"]
    observed, predicted = share(label_N, subject_N), float(prob_N.mean())
    point = operating_point(threshold, label_N, prob_N, subject_N)
    low, high = observed["ci"]
    positives = int((label_N > 0.5).sum())
    return {
        "few": False,
        "labels": len(label_N),
        "subjects": subjects,
        "positives": positives,
        "observed": observed,
        "predicted": predicted,
        "wrong": "too high" if predicted > high else "too low" if predicted < low else None,
        "auroc": {"value": metrics.auroc(label_N, prob_N), "ci": None if ci is None else list(ci)},
        "auprc": metrics.auprc(label_N, prob_N),
        "sensitivity": point["sensitivity"],
        "specificity": point["specificity"],
        "enough": positives >= ENOUGH_POSITIVES and subjects >= ENOUGH_SUBJECTS,
    }


# -------------------------------------------------------------------------------------------------- one task


def assess(
    label_N: ArrayLike,
    prob_N: ArrayLike,
    subject_N: ArrayLike,
    groups: Mapping[str, Mapping[str, Array]],
    tuning_label_M: ArrayLike,
    tuning_prob_M: ArrayLike,
) -> dict[str, Any]:
    """All of the above for one task's held-out labels, as plain JSON values.

    groups: kind of group -> name -> which labels belong to it (N,). The thresholds come from the tuning split (M
    labels), so that their sensitivity and specificity on held-out labels are no hindsight.
    """
    label_N, prob_N, subject_N = np.asarray(label_N), np.asarray(prob_N), np.asarray(subject_N)
    threshold_of = {aim: threshold_at(aim, tuning_label_M, tuning_prob_M) for aim in SPECIFICITIES}
    return {
        "calibration": {
            **calibration_error(label_N, prob_N),
            "predicted": float(prob_N.mean()),
            "observed": share(label_N, subject_N),
            "slope": calibration_slope(label_N, prob_N, subject_N),
            "curve": calibration_curve(label_N, prob_N, subject_N),
        },
        "operating_points": [
            {"aim": aim, **operating_point(threshold, label_N, prob_N, subject_N)}
            for aim, threshold in threshold_of.items()
        ],
        **decision_curve(label_N, prob_N, subject_N),
        "subgroups": [
            {"kind": kind, "group": name, **group_scores(threshold_of[0.9], label_N[own], prob_N[own], subject_N[own])}
            for kind, named in groups.items()
            for name, own in named.items()
        ],
    }


def logit(prob_N: ArrayLike) -> Array:
    """Logits of probabilities, finite also for 0 and 1."""
    clipped: Array = np.clip(np.asarray(prob_N, dtype=np.float64), EPSILON, 1 - EPSILON)
    return np.asarray(special.logit(clipped))
