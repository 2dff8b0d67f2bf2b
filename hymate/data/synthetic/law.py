"""The law of readmission in the synthetic cohort: what happens after a discharge, as a function of the record.

p = P(readmitted within 30 days) is logistic in five drivers. Each is computed from the values as they stand in the
record, after rounding. Recording errors (zeros, or a factor of 1000) and missing values are read over: an error is
far from any value a patient can have, so a model can see it, too.

The distant law, for cohorts whose driver lies thousands of events before the prediction, is logistic in one driver: a
diagnosis recorded once in the stay or not at all. How many events back it lies is spread log-uniformly, so each
doubling of a model's context brings the same fraction of the drivers into view. Nothing else in the record shows
whether there is one: the best score at a context is that of "the driver is in view".

Shapes: A stays, M measurements of one lab during a stay, in time order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

DAY = 24 * 60  # times are in minutes
WINDOW_DAYS = 30
WARD_HOURS = 48  # the end of a stay, which the drivers are read from
PLAUSIBLE = (0.0, 100.0)  # of both driver labs, exclusive; errors lie outside

CREATININE = "LAB//creatinine//mg/dL"
HAEMOGLOBIN = "LAB//haemoglobin//g/dL"
HEART_FAILURE, COPD = "DIAGNOSIS//ICD//10//I50", "DIAGNOSIS//ICD//10//J44"
CREATININE_LOG_MEAN, CREATININE_LOG_SD = 0.1, 0.45
HAEMOGLOBIN_SLOPE_SD = 0.7  # g/dL per day
RECENCY_DAYS = 45.0

COEFFICIENTS = {
    "intercept": -2.9,
    "creatinine": 1.4,
    "haemoglobin_fall": 1.3,
    "heart_failure": 1.5,
    "copd": 1.1,
    "recency": 1.6,
}
PREVALENCE = 0.28  # of the label under the law; every discharge's probability when labels are shuffled
LAW = {
    "outcome": "readmitted within 30 days ~ Bernoulli(p), logit p = intercept + sum of coefficient * driver",
    "labels": "of discharges whose 30 days, or a death in them, the record shows",
    "creatinine": f"(ln(last value, mg/dL) - {CREATININE_LOG_MEAN}) / {CREATININE_LOG_SD}",
    "haemoglobin_fall": f"-(least-squares slope, g/dL per day) / {HAEMOGLOBIN_SLOPE_SD}",
    "heart_failure": f"1 if {HEART_FAILURE} is recorded (at this discharge or any before)",
    "copd": f"1 if {COPD} is recorded (at this discharge or any before)",
    "recency": f"exp(-days from the previous discharge to this admission / {RECENCY_DAYS:g}); 0 at the first stay",
    "values": f"labs of the last {WARD_HOURS} hours of the stay, strictly between {PLAUSIBLE[0]:g} and "
    f"{PLAUSIBLE[1]:g}; a driver without values (slope: two) is 0",
}

# p is 0.80 with the driver and 0.06 without it, PREVALENCE on average
DISTANT_COEFFICIENTS = {"intercept": -2.75, "heart_failure": 4.15}
DISTANT_FRACTION = 0.3  # of the stays have the driver
NEAREST = 256  # events before the prediction, at least
DISTANT_LAW = {
    "outcome": LAW["outcome"],
    "heart_failure": f"1 if {HEART_FAILURE} is recorded in this stay: with probability {DISTANT_FRACTION:g}, as the "
    f"n-th last event up to the discharge, log n uniform from log {NEAREST} to log driver_distance",
}


def readmission_probability(
    drivers: Mapping[str, np.ndarray], coefficients: Mapping[str, float] = COEFFICIENTS
) -> np.ndarray:
    """p (A,) from the drivers named in `coefficients`, each (A,)."""
    terms = [coefficients[name] * driver_A for name, driver_A in drivers.items()]
    logit_A = coefficients["intercept"] + np.sum(terms, axis=0)
    return 1.0 / (1.0 + np.exp(-logit_A))


def distances(rng: np.random.Generator, size: int, farthest: int) -> np.ndarray:
    """Events from the distant driver to the prediction, both included (size,): NEAREST to `farthest`."""
    return np.exp(rng.uniform(np.log(NEAREST), np.log(farthest), size)).astype(np.int64)


def _plausible(value_AM: np.ndarray) -> np.ndarray:
    return (value_AM > PLAUSIBLE[0]) & (value_AM < PLAUSIBLE[1])


def last_creatinine(value_AM: np.ndarray) -> np.ndarray:
    """Driver `creatinine` (A,) from recorded values in time order, NaN where not measured."""
    ok_AM = _plausible(value_AM)
    last_A = value_AM.shape[1] - 1 - ok_AM[:, ::-1].argmax(axis=1)
    value_A = np.where(ok_AM.any(axis=1), value_AM[np.arange(len(value_AM)), last_A], np.exp(CREATININE_LOG_MEAN))
    return (np.log(value_A.astype(np.float64)) - CREATININE_LOG_MEAN) / CREATININE_LOG_SD


def haemoglobin_fall(minute_AM: np.ndarray, value_AM: np.ndarray) -> np.ndarray:
    """Driver `haemoglobin_fall` (A,): the least-squares slope of the recorded values, NaN where not measured."""
    ok_AM = _plausible(value_AM)
    count_A = np.maximum(ok_AM.sum(axis=1), 1)[:, None]
    day_AM = (minute_AM - minute_AM[:, :1]) / DAY
    day_AM = np.where(ok_AM, day_AM - np.where(ok_AM, day_AM, 0).sum(axis=1, keepdims=True) / count_A, 0)
    spread_A = (day_AM**2).sum(axis=1)
    slope_A = (day_AM * np.where(ok_AM, value_AM, 0)).sum(axis=1) / np.where(spread_A > 0, spread_A, 1)
    return -slope_A / HAEMOGLOBIN_SLOPE_SD


def recency(admission_A: np.ndarray, previous_A: np.ndarray) -> np.ndarray:
    """Driver `recency` (A,) from the minutes of this admission and of the discharge before (-inf: none)."""
    return np.exp((previous_A - admission_A) / DAY / RECENCY_DAYS)
