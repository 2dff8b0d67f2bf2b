"""Whether predicted risks agree with observed ones: recalibration, calibration error and curve.

Labels may have weights, as in `hymate.evaluation.metrics`, whose intervals these are.

Shape legend:
    N  labels
    P  patients
    B  bootstrap samples
    K  bins of the probability
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy.special import expit

from hymate.evaluation import metrics

Array = NDArray[Any]
CURVE_GROUPS, LABELS_A_GROUP = 10, 20
SIMULATIONS = 200
PRIOR_LABELS = 10  # the precision of the prior of a log temperature and a shift
NEWTON_STEPS, CONVERGED = 20, 1e-6
STEEPEST = 50.0  # a slope that grows beyond this has no end: the classes are separated
EPSILON = 1e-7


@dataclass(frozen=True)
class Recalibration:
    """Calibrated logit = logit / temperature + shift, which keeps the order of the predictions."""

    temperature: float
    shift: float

    def __call__(self, logit_N: Array) -> Array:
        """Calibrated logits (N,)."""
        return logit_N / self.temperature + self.shift

    def probability(self, prob_N: ArrayLike) -> Array:
        """Calibrated probabilities (N,) of probabilities."""
        return np.asarray(expit(self(logit(prob_N))))

    def undo(self, prob_N: ArrayLike) -> Array:
        """What calibrated probabilities were before."""
        return np.asarray(expit((logit(prob_N) - self.shift) * self.temperature))

    def record(self, label_N: ArrayLike, before_N: ArrayLike, weight_N: ArrayLike | None = None) -> dict[str, Any]:
        """Itself and the calibration error that it mends, of probabilities before it, as plain values."""
        return {**asdict(self), "ece_before": metrics.ece(label_N, before_N, weight_N)}


def recalibrate(label_N: ArrayLike, logit_N: ArrayLike, weight_N: ArrayLike | None = None) -> Recalibration:
    """The temperature (Guo et al. 2017) and shift (Platt 1999) of least negative log-likelihood on labels that the
    model did not learn from.

    A temperature alone leaves a wrong mean as it is, and the mean of a checkpoint chosen for its ranking often is
    wrong: on 2,080 stays of PhysioNet 2012, after fitting on 800, the expected calibration error of one checkpoint was
    0.050 as trained, 0.032 with a temperature, 0.018 with both. PRIOR_LABELS draw towards no change, which keeps both
    finite and 50 labels from doing more harm than they must.
    """
    from scipy.optimize import minimize  # late: most processes never recalibrate

    label_N, logit_N = np.asarray(label_N, dtype=np.float64), np.asarray(logit_N, dtype=np.float64)
    weight_N = metrics.weights(weight_N, label_N)

    def loss(parameters: Array) -> float:
        log_temperature, shift = parameters
        calibrated_N = logit_N * np.exp(-log_temperature) + shift
        likelihood = (weight_N * np.logaddexp(0.0, np.where(label_N > 0.5, -calibrated_N, calibrated_N))).sum()
        return float(likelihood + PRIOR_LABELS / 2 * (log_temperature**2 + shift**2))

    log_temperature, shift = minimize(loss, np.zeros(2), method="L-BFGS-B").x
    return Recalibration(float(np.exp(log_temperature)), float(shift))


def calibration_slope(
    label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> dict[str, Any]:
    """Slope of the logistic regression of the label on the logit (Cox 1958), by maximum likelihood.

    1 is ideal; below it the probabilities are too extreme, above it too timid. None where it has no finite value.
    """
    label_N, logit_N = np.asarray(label_N, dtype=np.float64), logit(prob_N)
    return metrics.estimates(lambda weight_BN: _slopes(label_N, logit_N, weight_BN)[None], 1, subject_N, weight_N)[0]


def _slopes(label_N: Array, logit_N: Array, weight_BN: Array) -> Array:
    """(B,): Newton's method for slope and intercept, from a flat line; NaN where it does not converge."""
    fraction_B = weight_BN @ label_N / weight_BN.sum(axis=1)
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
        found_B = (np.abs(change_B) < CONVERGED) & (np.abs(slope_B) < STEEPEST) & (fraction_B > 0) & (fraction_B < 1)
    return np.where(found_B, slope_B, np.nan)


def calibration_error(
    label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None, seed: int = 0
) -> dict[str, float | None]:
    """`metrics.ece` and how much of it is chance.

    With few labels the fraction of positives in a bin differs from the mean probability of even a perfect model: 0.024
    is usual with 800 labels. "by_chance" is the mean error where the residuals of each patient, all together, have a
    random sign, as those of a perfect model might have (a wild bootstrap, Wu 1986, of clusters); "beyond_chance" is
    what remains, errors of the two kinds adding in squares (Broecker & Smith 2007), 0 where nothing does.
    """
    label_N, prob_N = np.asarray(label_N, dtype=np.float64), np.asarray(prob_N, dtype=np.float64)
    found = metrics.ece(label_N, prob_N, weight_N)
    if found is None:
        return {"ece": None, "by_chance": None, "beyond_chance": None}
    weight_N = metrics.weights(weight_N, label_N)
    subject_P, patient_N = np.unique(np.asarray(subject_N), return_inverse=True)
    bin_N, rng = metrics.ece_bin(prob_N), np.random.default_rng(seed)
    residual_N = weight_N * (prob_N - label_N)
    flipped = (
        np.bincount(bin_N, residual_N * rng.choice((-1.0, 1.0), len(subject_P))[patient_N]) for _ in range(SIMULATIONS)
    )
    chance = np.array([np.abs(sum_K).sum() for sum_K in flipped]) / weight_N.sum()
    beyond = max(0.0, found**2 - float(np.mean(chance**2))) ** 0.5
    return {"ece": found, "by_chance": float(chance.mean()), "beyond_chance": beyond}


def calibration_curve(
    label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> list[dict[str, Any]]:
    """Mean probability and observed fraction in groups of as many labels each, from the lowest probabilities on."""
    label_N, prob_N, subject_N = np.asarray(label_N), np.asarray(prob_N), np.asarray(subject_N)
    weight_N = metrics.weights(weight_N, label_N)
    groups = np.clip(len(label_N) // LABELS_A_GROUP, 1, CURVE_GROUPS)
    return [
        {
            "predicted": metrics.mean(prob_N[own], weight_N[own]),
            "observed": metrics.proportion(label_N[own], subject_N[own], weight_N[own]),
            "labels": len(own),
        }
        for own in np.array_split(np.argsort(prob_N, kind="stable"), groups)
        if len(own)
    ]


def judged(
    label_N: ArrayLike, prob_N: ArrayLike, subject_N: ArrayLike, weight_N: ArrayLike | None = None
) -> dict[str, Any]:
    """All of the above, and predicted and observed means, as plain JSON values."""
    return {
        **calibration_error(label_N, prob_N, subject_N, weight_N),
        "predicted": metrics.mean(prob_N, weight_N),
        "observed": metrics.proportion(label_N, subject_N, weight_N),
        "slope": calibration_slope(label_N, prob_N, subject_N, weight_N),
        "curve": calibration_curve(label_N, prob_N, subject_N, weight_N),
    }


def logit(prob_N: ArrayLike) -> Array:
    """Logits of probabilities, finite also for 0 and 1."""
    clipped: Array = np.clip(np.asarray(prob_N, dtype=np.float64), EPSILON, 1 - EPSILON)
    return np.asarray(special.logit(clipped))
