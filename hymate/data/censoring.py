"""Weights by which those who were followed stand for those who were lost."""

from __future__ import annotations

import numpy as np


def lost_before(horizon_days: float, days_N: np.ndarray, cause_N: np.ndarray) -> np.ndarray:
    """Which records of a task in time end before the horizon (N,), with neither event.

    days_N: until what came first. cause_N: 0 where the record ends before an event.
    """
    horizon = days_N.dtype.type(horizon_days)  # an end at the horizon is of this precision, too
    return (cause_N == 0) & (days_N < horizon)


def is_followed(horizon_days: float, days_N: np.ndarray, cause_N: np.ndarray) -> bool:
    """Whether what comes by the horizon is known: after the last one that was lost, somebody else was still seen."""
    lost_N = lost_before(horizon_days, days_N, cause_N)
    return bool(days_N[~lost_N].max(initial=0) > days_N[lost_N].max(initial=0)) or not lost_N.any()


def censoring_weights(followed_N: np.ndarray, censored_N: np.ndarray, weight_N: np.ndarray | None = None) -> np.ndarray:
    """One over the Kaplan-Meier probability of being followed up to just before each time (Robins & Finkelstein 2000).

    followed_N: time to the event or the end of the window, or, where censored_N, to the end of the record. At one time
    events come before censoring. Those that are followed thus stand for those that were lost before. weight_N: how much
    each counts already.
    """
    order_N = np.lexsort((censored_N, followed_N))
    own_N = np.ones(len(order_N)) if weight_N is None else weight_N[order_N]
    at_risk_N = np.cumsum(own_N[::-1])[::-1]
    followed = np.cumprod(np.where(censored_N[order_N], 1 - own_N / at_risk_N, 1.0))
    weight_N = np.empty(len(order_N))
    weight_N[order_N] = 1 / np.concatenate([[1.0], followed[:-1]])[: len(order_N)]
    return weight_N
