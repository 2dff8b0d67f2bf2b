"""Predicted incidence of an event against what came, and when, of subjects of whom some were lost from sight.

At a horizon three things can be known of a label: the event has come, it has not (the subject was seen until then, or a
competing event came first), or nothing, because the record ends before. Those that are known stand for the lost ones by
weights of one over the probability of being followed so far (Graf et al. 1999; Blanche et al. 2013, whose second
definition of a control this is: also who had the competing event). So all that `hymate.evaluation.metrics` says of
labels is said of a horizon: the weighted fraction of events is the Aalen-Johansen estimate, AUROC is the
cumulative/dynamic one. It is right where leaving does not depend on the risk. The weights are estimated once, not again
in each bootstrap sample.

Shape legend: N labels, H horizons, U distinct times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hymate.data.censoring import censoring_weights, is_followed, lost_before
from hymate.data.label_files import COMPETING, EVENT
from hymate.evaluation import calibration, metrics

Array = NDArray[Any]
GROUPS = ("lowest risk", "middle risk", "highest risk")  # thirds of the labels
CURVE_POINTS = 60  # of an observed incidence that is drawn


def aalen_johansen(
    days_N: ArrayLike, cause_N: ArrayLike, at_H: ArrayLike, weight_N: ArrayLike | None = None, cause: int = EVENT
) -> Array:
    """The observed incidence of a cause up to each time (H,) (Aalen & Johansen 1978).

    days_N: until what came first. cause_N: EVENT, COMPETING, or 0 where the record ends before either. At one time
    events come before censoring.
    """
    cause_N, own_N = np.asarray(cause_N), metrics.weights(weight_N, days_N)
    time_U, which_N = np.unique(np.asarray(days_N), return_inverse=True)
    at_risk_U = np.cumsum(np.bincount(which_N, own_N)[::-1])[::-1]
    came_U, own_U = (np.bincount(which_N, own_N * of_N) for of_N in (cause_N > 0, cause_N == cause))
    free_U = np.cumprod(1 - came_U / at_risk_U)
    incidence_U = np.cumsum(np.append(1.0, free_U[:-1]) * own_U / at_risk_U)
    return np.append(0.0, incidence_U)[np.searchsorted(time_U, np.asarray(at_H), side="right")]


def known_at(
    horizon_days: float, days_N: Array, cause_N: Array, weight_N: ArrayLike | None = None, cause: int = EVENT
) -> tuple[Array, Array, Array]:
    """Of which labels it is known whether the cause has come by the horizon (places, n), whether it has (n), and their
    weights (n), which make them stand for all. None are where nobody was followed so far: no weights would do.
    """
    if not is_followed(horizon_days, days_N, cause_N):
        return np.empty(0, np.int64), np.empty(0), np.empty(0)
    horizon = days_N.dtype.type(horizon_days)
    came_N = (cause_N > 0) & (days_N <= horizon)
    lost_N = lost_before(horizon_days, days_N, cause_N)
    own_N = metrics.weights(weight_N, days_N)
    all_N = own_N * censoring_weights(np.minimum(days_N, horizon), lost_N, own_N)
    at_n = np.flatnonzero(~lost_N)
    return at_n, (came_N & (cause_N == cause))[at_n].astype(np.float64), all_N[at_n]


def dynamic_auroc(
    days_N: Array, cause_N: Array, risk_NH: Array, horizons_days: Sequence[float], weight_N: ArrayLike | None = None
) -> list[float | None]:
    """The AUROC at each horizon: the chance that who has had the event by then has a higher risk than who has not; None
    where that is not known of anybody.
    """
    found = []
    for risk_N, horizon in zip(risk_NH.T, horizons_days, strict=True):
        at_n, label_n, weight_n = known_at(horizon, days_N, cause_N, weight_N)
        found.append(metrics.auroc(label_n, risk_N[at_n], weight_n))
    return found


def briers(
    days_N: Array, cause_N: Array, risk_NH: Array, horizons_days: Sequence[float], weight_N: ArrayLike | None = None
) -> list[float | None]:
    """The Brier score at each horizon; None where nobody was followed so far."""
    found = []
    for risk_N, horizon in zip(risk_NH.T, horizons_days, strict=True):
        at_n, label_n, weight_n = known_at(horizon, days_N, cause_N, weight_N)
        found.append(metrics.brier(label_n, risk_N[at_n], weight_n))
    return found


def integrated_brier(brier_H: Sequence[float | None], horizons_days: Sequence[float]) -> float | None:
    """The mean over time of the Brier score up to the last horizon: straight from horizon to horizon, and from 0 at the
    prediction, where nothing has come yet. None where one is missing.
    """
    if None in brier_H:
        return None
    at, brier = np.array([0.0, *horizons_days]), np.array([0.0, *brier_H])
    return float(np.sum(np.diff(at) * (brier[1:] + brier[:-1])) / (2 * at[-1]))


def concordance(
    days_N: Array, cause_N: Array, risk_N: Array, subject_N: Array, weight_N: ArrayLike | None = None
) -> dict[str, Any]:
    """Harrell's C for a cause among others (Wolbers et al. 2009): of two labels, one of whom has the event before the
    other has it or is lost, the chance that it has the higher risk. Who had the competing event never has the event.
    """
    until_N = np.where(cause_N == COMPETING, np.max(days_N, initial=0) + 1, days_N).astype(np.float64)

    def statistics(weight_BN: Array) -> Array:
        return metrics.concordances(until_N, -risk_N, weight_BN, cause_N == EVENT)[None]

    return metrics.estimates(statistics, 1, subject_N, weight_N)[0]


def scores(
    days_N: Array,
    cause_N: Array,
    incidence_NCH: Array,
    horizons_days: Sequence[float],
    subject_N: Array,
    weight_N: ArrayLike | None = None,
) -> dict[str, Any]:
    """All of a task in time, as plain JSON values.

    incidence_NCH: predicted, of the event and, where the task has one, of the competing event.

    "horizons": for each its "days", how many labels are "lost" before, `metrics.scores`, "calibration", and as
    "competing" the predicted and observed incidence of the competing event; None for all that nobody was followed long
    enough for. "groups": thirds of the labels by the risk
    at the last horizon, with predicted and observed incidence at each horizon and the observed curve, [days,
    incidence].
    """
    own_N, horizons = metrics.weights(weight_N, days_N), []
    for number, horizon in enumerate(horizons_days):
        at_n, label_n, weight_n = known_at(horizon, days_N, cause_N, own_N)
        every = label_n, incidence_NCH[at_n, 0, number], subject_N[at_n], weight_n
        lost = int(lost_before(horizon, days_N, cause_N).sum())
        found = {"days": horizon, "lost": lost, **metrics.scores(*every)}
        found["calibration"] = calibration.judged(*every)
        if incidence_NCH.shape[1] > 1:
            observed = _observed(horizon, days_N, cause_N, subject_N, own_N, COMPETING)
            found["competing"] = {
                "predicted": metrics.mean(incidence_NCH[:, 1, number], own_N) if len(at_n) else None,
                "observed": observed,
            }
        horizons.append(found)
    came_N = cause_N == EVENT
    return {
        "num_labels": len(days_N),
        "num_positives": int(came_N.sum()),
        "num_subjects": len(np.unique(subject_N)),
        "num_positive_subjects": len(np.unique(subject_N[came_N])),
        "horizons": horizons,
        "integrated_brier": integrated_brier([found["brier"] for found in horizons], horizons_days),
        "concordance": concordance(days_N, cause_N, incidence_NCH[:, 0, -1], subject_N, own_N),
        "groups": _groups(days_N, cause_N, incidence_NCH[:, 0], horizons_days, subject_N, own_N),
    }


def _groups(
    days_N: Array, cause_N: Array, risk_NH: Array, horizons_days: Sequence[float], subject_N: Array, weight_N: Array
) -> list[dict[str, Any]]:
    day_U, found = np.linspace(0, horizons_days[-1], CURVE_POINTS), []
    parts = np.array_split(np.argsort(risk_NH[:, -1], kind="stable"), len(GROUPS))
    for name, own in zip(GROUPS, parts, strict=True):
        days, cause, subject, weight = days_N[own], cause_N[own], subject_N[own], weight_N[own]
        predicted = [metrics.mean(risk_N, weight) for risk_N in risk_NH[own].T]
        observed = [_observed(horizon, days, cause, subject, weight) for horizon in horizons_days]
        seen_U = day_U[[is_followed(day, days, cause) for day in day_U]]
        curve = np.column_stack([seen_U, aalen_johansen(days, cause, seen_U, weight)]).tolist()
        found.append({"group": name, "labels": len(own), "predicted": predicted, "observed": observed, "curve": curve})
    return found


def _observed(
    horizon_days: float, days_N: Array, cause_N: Array, subject_N: Array, weight_N: Array, cause: int = EVENT
) -> dict[str, Any]:
    """The Aalen-Johansen estimate and its interval; None where nobody was followed so far."""
    at_n, label_n, weight_n = known_at(horizon_days, days_N, cause_N, weight_N, cause)
    return metrics.proportion(label_n, subject_N[at_n], weight_n)
