"""What it brings to act on a risk model, and for which groups of patients it is wrong.

Every function looks at one task. Labels may have weights and intervals are 95 %, as in `hymate.evaluation.metrics`.

Shape legend:
    N  labels
    M  labels of the tuning split
    P  patients
    B  bootstrap samples
    T  thresholds of the probability
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from hymate.evaluation import calibration, metrics

Array = NDArray[Any]
# Of patients with a positive label, and of all: below these an AUROC's interval is so wide that it says nothing.
ENOUGH_POSITIVES, ENOUGH_SUBJECTS = 100, 200
FEWEST_SUBJECTS = 10  # of a group whose scores are shown: those of fewer would reveal single patients
SPECIFICITIES = (0.8, 0.9, 0.95)
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
GRID = tuple(percent / 100 for percent in range(1, 100))
FEWEST_EFFECTIVE = 20  # effective patients: of fewer the likeness of a patient's labels is not known well enough
FEWEST_EACH = 5  # patients with the outcome, and without it, on whom a verdict may rest
HELPS = float(ndtri(0.7))  # by how many errors a useful model must help at the prevalence


# --------------------------------------------------------------------------------------------------- decisions


def threshold_at(specificity: float, label_N: ArrayLike, prob_N: ArrayLike, weight_N: ArrayLike | None = None) -> float:
    """The lowest threshold above which at most 1 - specificity of the negatives lie; an alert is a higher probability.

    label_N must hold a negative.
    """
    negative_N = np.asarray(label_N) < 0.5
    prob_N = np.asarray(prob_N, dtype=np.float64)[negative_N]
    order_N = np.argsort(prob_N, kind="stable")
    below_N = np.cumsum(metrics.weights(weight_N, label_N)[negative_N][order_N])
    return float(prob_N[order_N][np.searchsorted(below_N, specificity * below_N[-1] * (1 - 1e-12))])


def thresholds(label_M: ArrayLike, prob_M: ArrayLike, weight_M: ArrayLike | None = None) -> dict[float, float]:
    """Aimed specificity -> threshold, for each of SPECIFICITIES, on labels that are not scored."""
    return {aim: threshold_at(aim, label_M, prob_M, weight_M) for aim in SPECIFICITIES}


def operating_point(
    threshold: float, label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> dict[str, Any]:
    """Sensitivity, specificity and positive predictive value of alerts above a threshold, and alerts per 100
    predictions.
    """
    positive_N, subject_N = np.asarray(label_N) > 0.5, np.asarray(subject_N)
    alert_N = np.asarray(prob_N, dtype=np.float64) > threshold
    weight_N = metrics.weights(weight_N, label_N)
    alerts = metrics.mean(alert_N, weight_N)
    return {
        "threshold": threshold,
        "sensitivity": metrics.proportion(alert_N[positive_N], subject_N[positive_N], weight_N[positive_N]),
        "specificity": metrics.proportion(~alert_N[~positive_N], subject_N[~positive_N], weight_N[~positive_N]),
        "ppv": metrics.proportion(positive_N[alert_N], subject_N[alert_N], weight_N[alert_N]),
        "alerts_per_100": None if alerts is None else 100 * alerts,
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


def decision_curve(
    label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> dict[str, Any]:
    """What acting on the probabilities brings, against acting on everyone or on no one, whichever is better.

    "net_benefit": rows of `threshold`, net benefits of `model` and `all`, the model's `gain` on the better one of all
    and none, at those of THRESHOLDS that 1 to 99 % of the probabilities reach. "useful": `useful_range`.
    """
    label_N, prob_N = np.asarray(label_N, dtype=np.float64), np.asarray(prob_N, dtype=np.float64)
    weight_N = metrics.weights(weight_N, label_N)
    reached_T = [t for t in THRESHOLDS if 0.01 <= (metrics.mean(prob_N >= t, weight_N) or 0.0) <= 0.99]

    def gains(weight_BN: Array) -> Array:
        everyone_TB = net_benefit(label_N, np.ones_like(prob_N), reached_T, weight_BN)
        return net_benefit(label_N, prob_N, reached_T, weight_BN) - np.maximum(everyone_TB, 0)

    gain_T = metrics.estimates(gains, len(reached_T), subject_N, weight_N)
    model_T, all_T = (
        net_benefit(label_N, p_N, reached_T, weight_N[None])[:, 0] for p_N in (prob_N, np.ones_like(prob_N))
    )
    columns = zip(reached_T, model_T.tolist(), all_T.tolist(), gain_T, strict=True)
    rows = [dict(zip(("threshold", "model", "all", "gain"), row, strict=True)) for row in columns]
    return {"net_benefit": rows, "useful": useful_range(label_N, prob_N, subject_N, weight_N)}


def useful_range(
    label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> list[float] | None:
    """The thresholds [low, high] between which acting on the model is better than acting on no one and than acting on
    everyone, as far as one-sided tests show; None where there are none.

    - First the AUROC must be above 1/2 (Mann & Whitney's test of ranks, at 2.5 %). So a model whose scores are
      independent of the labels is called useful in at most 2.5 % of cohorts, whatever follows.
    - Then the model must help at the prevalence, where acting on everyone is no better than acting on no one, so that a
      model has most to add: of those whose probability reaches it more are positive, of the others fewer (two tests at
      30 %, which cost a calibrated model no power, as chance is ruled out already). This turns down models that rank
      well and whose probabilities are of no use, such as those which are all above the prevalence. Only the least
      favourable model, which breaks even at every threshold, is called useful in up to a third of cohorts.
    - From there the range grows over GRID, upwards and downwards, as long as of those acted on more than the threshold
      are positive (better than acting on no one) and of the others fewer (better than acting on everyone), each at
      2.5 %. Both must hold (an intersection-union test, Berger 1982); the order is fixed, so the number of thresholds
      does not matter (Maurer, Hothorn & Lehmacher 1995), and each end is too far out in at most 2.5 % of cohorts.

    The labels stand for at least FEWEST_EFFECTIVE patients (`effective_patients`): where one patient has most of them,
    nothing is called useful. FEWEST_EACH patients at least are rightly acted on, and rightly left alone. No error is
    estimated from one side of a threshold, where ten negatives and no positive would look certain: it is that of labels
    of the tested risk, a patient's labels being as much alike as in the whole cohort (the design effect of Rao & Scott
    1992; Rosner, Glynn & Lee 2003 of ranks).
    """
    label_N, prob_N = np.asarray(label_N, dtype=np.float64), np.asarray(prob_N, dtype=np.float64)
    _, patient_N = np.unique(np.asarray(subject_N), return_inverse=True)
    weight_N = metrics.weights(weight_N, label_N)
    prevalence = metrics.mean(label_N, weight_N)
    if prevalence is None or prevalence in (0, 1) or metrics.effective_patients(patient_N, weight_N) < FEWEST_EFFECTIVE:
        return None
    likeness = _likeness(label_N, patient_N, weight_N)

    def surplus(part_N: Array, risk: float) -> float:
        """How many standard errors the sum of part_N * label is above its mean if all labels have this risk."""
        sum_P = np.bincount(patient_N, part_N)
        variance = risk * (1 - risk) * ((1 - likeness) * (part_N @ part_N) + likeness * (sum_P @ sum_P))
        return float(part_N @ (label_N - risk) / np.sqrt(variance)) if variance > 0 else 0.0

    def helps(threshold: float, errors: float = metrics.Z) -> bool:
        act_N = prob_N >= threshold
        right = (patient_N[act_N & (label_N > 0.5)], patient_N[~act_N & (label_N < 0.5)])
        if any(np.count_nonzero(np.bincount(patients)) < FEWEST_EACH for patients in right):
            return False
        return all(surplus(part_N * weight_N, threshold) > errors for part_N in (act_N, act_N - 1.0))

    # the sum of the positives' ranks, less 1/2 each, is but for a factor the AUROC less 1/2
    ranking = surplus((metrics.midranks(prob_N, weight_N) - 0.5) * weight_N, prevalence)
    if ranking <= metrics.Z or not helps(prevalence, HELPS):
        return None
    below = takewhile(helps, (threshold for threshold in reversed(GRID) if threshold < prevalence))
    above = takewhile(helps, (threshold for threshold in GRID if threshold > prevalence))
    return [min([prevalence, *below]), max([prevalence, *above])]


def _likeness(label_N: Array, patient_N: Array, weight_N: Array) -> float:
    """How much alike a patient's labels are, 0 to 1: the correlation of two labels of one patient (the pairwise
    estimator of Ridout, Demetrio & Firth 1999).
    """
    risk = np.average(label_N, weights=weight_N)

    def pairs(value_N: Array) -> float:
        sum_P = np.bincount(patient_N, value_N)
        return float(sum_P @ sum_P - value_N @ value_N)

    expected = risk * (1 - risk) * pairs(weight_N)
    return float(np.clip(pairs(weight_N * (label_N - risk)) / expected, 0, 1)) if expected > 0 else 0.0


# ---------------------------------------------------------------------------------------------------- subgroups


def group_z(groups: int) -> float:
    """How many errors a group must be off to be accused, so that of reports on as many groups that are all right at
    most one in twenty accuses any (Bonferroni's correction).
    """
    return float(ndtri(1 - 0.025 / groups))


def group_scores(
    threshold: float,
    z: float,
    overall: float | None,
    label_N: ArrayLike,
    prob_N: ArrayLike,
    subject_N: ArrayLike,
    weight_N: ArrayLike | None = None,
) -> dict[str, Any]:
    """One group's line; of a group of fewer than FEWEST_SUBJECTS nothing but `hidden`.

    Sensitivity and specificity are those at `threshold`. `judged`: whether it has the patients that a judgement needs.
    `wrong`: "too high" or "too low" where the mean probability is outside the interval of the observed fraction, and
    `ranked_worse` whether the interval of the AUROC lies below `overall`, of groups with FEWEST_EACH patients of both
    kinds: of fewer a bootstrap knows too little. Both intervals reach `z` errors to each side, as many groups ask for.
    """
    label_N, prob_N, subject_N = np.asarray(label_N), np.asarray(prob_N), np.asarray(subject_N)
    weight_N = metrics.weights(weight_N, label_N)
    subjects = len(np.unique(subject_N))
    if subjects < FEWEST_SUBJECTS:
        return {"hidden": True}
    observed, predicted = metrics.proportion(label_N, subject_N, weight_N), metrics.mean(prob_N, weight_N)
    assert predicted is not None, "there are patients"
    low, high = metrics.proportion(label_N, subject_N, weight_N, z)["ci"]
    areas = metrics.areas(label_N, prob_N, subject_N, weight_N)
    auroc, ci = areas["auroc"]["value"], areas["auroc"]["ci"]
    known = min(len(np.unique(subject_N[of_class])) for of_class in (label_N > 0.5, label_N < 0.5)) >= FEWEST_EACH
    point = operating_point(threshold, label_N, prob_N, subject_N, weight_N)
    positives = int((label_N > 0.5).sum())
    return {
        "hidden": False,
        "labels": len(label_N),
        "subjects": subjects,
        "positives": positives,
        "observed": observed,
        "predicted": predicted,
        "wrong": "too high" if predicted > high else "too low" if predicted < low else None,
        "auroc": areas["auroc"],
        "auprc": areas["auprc"]["value"],
        "ranked_worse": bool(known and auroc + z / metrics.Z * (ci[1] - auroc) < overall),
        "sensitivity": point["sensitivity"],
        "specificity": point["specificity"],
        "judged": len(np.unique(subject_N[label_N > 0.5])) >= ENOUGH_POSITIVES and subjects >= ENOUGH_SUBJECTS,
    }


# -------------------------------------------------------------------------------------------------- one task


def assess(
    label_N: ArrayLike,
    prob_N: ArrayLike,
    subject_N: ArrayLike,
    groups: Mapping[str, Mapping[str, Array]],
    threshold_of: Mapping[float, float],
    weight_N: ArrayLike | None = None,
) -> dict[str, Any]:
    """All of the above for one task's labels, as plain JSON values.

    groups: kind of group -> name -> which labels belong to it (N,). threshold_of: `thresholds` of other patients, so
    that their sensitivity and specificity on these labels are no hindsight.
    """
    label_N, prob_N, subject_N = np.asarray(label_N), np.asarray(prob_N), np.asarray(subject_N)
    weight_N = metrics.weights(weight_N, label_N)
    every = label_N, prob_N, subject_N, weight_N
    named = [(kind, name, own) for kind, groups_of in groups.items() for name, own in groups_of.items()]
    judged = sum(len(np.unique(subject_N[own])) >= FEWEST_SUBJECTS for _, _, own in named)
    z, overall = group_z(max(1, judged)), metrics.auroc(label_N, prob_N, weight_N)
    return {
        "calibration": calibration.judged(*every),
        "operating_points": [
            {"aim": aim, **operating_point(threshold, *every)} for aim, threshold in threshold_of.items()
        ],
        **decision_curve(*every),
        "subgroups": [
            {"kind": kind, "group": name, **group_scores(threshold_of[0.9], z, overall, *(x_N[own] for x_N in every))}
            for kind, name, own in named
        ],
    }
