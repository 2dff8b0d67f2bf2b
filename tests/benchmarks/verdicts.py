"""How often a report's verdicts and intervals are wrong, on made-up cohorts whose truth is known.

    python tests/benchmarks/verdicts.py [--cohorts 500] [--sizes 300 800 3000]

Prints Markdown tables. Rates of "useful" are those of the worst kind of cohort beside the mean over all kinds: a mean
hides the kind that a rule fails on. A patient has one label, or a geometric number of correlated ones (mean 4), or five
that are all alike. "Before" is what reports did until 2026-11-26: Wilson's intervals with as many trials as patients,
groups each judged at 95 %, chance of labels rather than of patients.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm

from hymate.evaluation import calibration, decisions, metrics

Array = np.ndarray
Cohort = tuple[Array, Array, Array]  # labels, probabilities, subjects
Kind = tuple[float, float]  # prevalence of the middle patient, spread of the logits
PATIENTS = ("one", "several", "alike")  # labels a patient
PREVALENCES = (0.03, 0.1, 0.4)
CORRELATED = 0.7  # fraction of a risk's variance that a patient's labels have in common, where it has several
# Probabilities that know nothing of the labels. Those of a recalibrated model are close around the prevalence.
UNIFORM = np.inf
USELESS: list[Kind] = list(itertools.product((0.03, 0.1, 0.2, 0.4, 0.5), (0.05, 0.1, 0.25, 1.5, UNIFORM)))
# what is wrong with the logits of a model that ranks well; the first is calibrated
DISTORTED: dict[str, Callable[[float, Array], Array]] = {
    "calibrated": lambda middle, logit_N: logit_N,
    "too extreme": lambda middle, logit_N: middle + 2 * (logit_N - middle),
    "too timid": lambda middle, logit_N: middle + 0.4 * (logit_N - middle),
    "too high": lambda middle, logit_N: logit_N + 1,
    "too low": lambda middle, logit_N: logit_N - 1,
    # these two help at no threshold: all are acted on at the prevalence, or no one is
    "far too high": lambda middle, logit_N: middle + 3 + 0.2 * (logit_N - middle),
    "far too low": lambda middle, logit_N: middle - 3 + 0.2 * (logit_N - middle),
}
SPREADS = (1.5, 0.8)  # of the risks' logits: a good model (AUROC 0.8 to 0.9) and a fair one (0.7)
INFORMED: list[Kind] = list(itertools.product(PREVALENCES, SPREADS))
# The least favourable model that ranks well and helps nowhere: at each threshold the mean risk of those acted on is
# just the threshold, and below the prevalence all are acted on.
BREAK_EVEN = "breaks even"


def subjects(num_labels: int, patients: str, rng: np.random.Generator) -> Array:
    """Of each label."""
    if patients == "alike":
        return np.arange(num_labels) // 5
    count_P = rng.geometric(0.25, num_labels) if patients == "several" else np.ones(num_labels, int)
    return np.repeat(np.arange(num_labels), count_P)[:num_labels]


def noise(subject_N: Array, patients: str, rng: np.random.Generator) -> Array:
    """Standard normal, CORRELATED within a subject, or the same for all of a subject's labels."""
    shared_N = rng.normal(size=subject_N.max() + 1)[subject_N]
    if patients == "alike":
        return shared_N
    return np.sqrt(CORRELATED) * shared_N + np.sqrt(1 - CORRELATED) * rng.normal(size=len(subject_N))


def labels(risk_N: Array, subject_N: Array, patients: str, rng: np.random.Generator) -> Array:
    """Drawn from the risks, once for a label, or once for a subject whose labels are alike."""
    drawn_N = rng.random(subject_N.max() + 1)[subject_N] if patients == "alike" else rng.random(len(risk_N))
    return drawn_N < risk_N


def useless(seed: int, num_labels: int, patients: str, kind: Kind) -> Cohort:
    """Labels, and probabilities that are independent of them."""
    rng = np.random.default_rng([seed, num_labels, PATIENTS.index(patients), USELESS.index(kind)])
    (prevalence, spread), subject_N = kind, subjects(num_labels, patients, rng)
    risk_N = expit(logit(prevalence) + 1.5 * noise(subject_N, patients, rng))
    label_N, noise_N = labels(risk_N, subject_N, patients, rng), noise(subject_N, patients, rng)
    prob_N = norm.cdf(noise_N) if spread == UNIFORM else expit(logit(prevalence) + spread * noise_N)
    return label_N, prob_N, subject_N


def informed(seed: int, num_labels: int, patients: str, kind: Kind, distortion: str) -> Cohort:
    """Labels drawn from known risks, and these risks distorted."""
    rng = np.random.default_rng([seed, num_labels, PATIENTS.index(patients), INFORMED.index(kind)])
    (prevalence, spread), subject_N = kind, subjects(num_labels, patients, rng)
    noise_N = noise(subject_N, patients, rng)
    if distortion == BREAK_EVEN:
        scale = prevalence * spread / 2
        prob_N = np.minimum(prevalence - scale * np.log(norm.sf(noise_N)), 1.0)
        risk_N = prob_N - scale
    else:
        true_N = logit(prevalence) + spread * noise_N
        prob_N, risk_N = expit(DISTORTED[distortion](logit(prevalence), true_N)), expit(true_N)
    return labels(risk_N, subject_N, patients, rng), prob_N, subject_N


@cache
def helps(kind: Kind, distortion: str) -> Array:
    """(T,): at which of GRID's thresholds such a model truly helps."""
    if distortion == BREAK_EVEN:
        return np.zeros(len(decisions.GRID), bool)
    middle, spread = logit(kind[0]), kind[1]
    true_M = middle + spread * norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    risk_M, stated_M = expit(true_M), expit(DISTORTED[distortion](middle, true_M))
    gain_T = [np.mean((stated_M >= t) * (risk_M - t)) - max(0, np.mean(risk_M - t)) for t in decisions.GRID]
    return np.array(gain_T) > 1e-9


def useless_rates(num_labels: int, patients: str, cohorts: int, kinds: list[Kind] = USELESS) -> Array:
    """Of each kind: how many of the models that know nothing are called useful."""
    every = range(cohorts)
    return np.array(
        [
            np.mean([decisions.useful_range(*useless(n, num_labels, patients, kind)) is not None for n in every])
            for kind in kinds
        ]
    )


def informed_rates(num_labels: int, patients: str, distortion: str, cohorts: int) -> Array:
    """(kinds, 2): how many models are called useful, and how many of all at thresholds where they are not."""
    rates = []
    for kind in INFORMED:
        helps_T, called, wrongly = helps(kind, distortion), 0, 0
        for number in range(cohorts):
            found = decisions.useful_range(*informed(number, num_labels, patients, kind, distortion))
            if found is not None:
                called += 1
                inside_T = (np.array(decisions.GRID) >= found[0]) & (np.array(decisions.GRID) <= found[1])
                wrongly += not helps_T[inside_T].all() or not helps_T.any()
        rates.append((called / cohorts, wrongly / cohorts))
    return np.array(rates)


def proportion_coverage(num_labels: int, spread: float, cohorts: int) -> tuple[float, float]:
    """How often Wilson's 95 % interval holds the truth, before and after; spread: of the logarithm of the number of
    labels a patient has; a patient's labels are mostly alike.
    """
    rng, within = np.random.default_rng(0), []
    for number in range(cohorts):
        risk = PREVALENCES[number % 3]
        count_P = np.ceil(np.exp(spread * rng.normal(size=num_labels))).astype(int)
        subject_N = np.repeat(np.arange(num_labels), count_P)[:num_labels]
        own_P = norm.cdf((norm.ppf(risk) + np.sqrt(0.9) * rng.normal(size=num_labels)) / np.sqrt(0.1))
        flag_N = rng.random(num_labels) < own_P[subject_N]
        ends = metrics.wilson(flag_N.mean(), len(np.unique(subject_N))), metrics.proportion(flag_N, subject_N)["ci"]
        within.append([low <= risk <= high for low, high in ends])
    before, after = np.mean(within, axis=0)
    return float(before), float(after)


def calibrated(number: int, num_labels: int, patients: str) -> Cohort:
    """The kinds of INFORMED in turn."""
    return informed(number, num_labels, patients, INFORMED[number % len(INFORMED)], "calibrated")


def group_accusations(num_labels: int, patients: str, groups: int, cohorts: int) -> Array:
    """(before and after, "too high" or "too low" and "ranked worse"): how often at least one of a calibrated model's
    random groups is accused.
    """
    accused = []
    for number in range(cohorts):
        label_N, prob_N, subject_N = calibrated(number, num_labels, patients)
        of_P = np.random.default_rng(number).geometric(0.2, subject_N.max() + 1) % groups
        own = [of_P[subject_N] == group for group in range(groups)]
        overall = metrics.auroc(label_N, prob_N)
        pairs = []
        for z in (metrics.Z, decisions.group_z(groups)):
            scored = [decisions.group_scores(0.1, z, overall, label_N[at], prob_N[at], subject_N[at]) for at in own]
            pairs.append([any(not g["hidden"] and g[flag] for g in scored) for flag in ("wrong", "ranked_worse")])
        accused.append(pairs)
    return np.mean(np.array(accused), axis=0)


def boosting_differences(num_labels: int, patients: str, cohorts: int) -> Array:
    """How often two models that are equally good are called apart: in AUROC, in AUPRC, in either."""
    found_by_cohort = []
    for number in range(cohorts):
        label_N, prob_N, subject_N = calibrated(number, num_labels, patients)
        rng = np.random.default_rng(number)
        a_N, b_N = (logit(prob_N) + 0.7 * rng.normal(size=len(prob_N)) for _ in range(2))
        found = metrics.paired_difference(label_N, a_N, b_N, subject_N, level=metrics.LEVEL_OF_BOTH)
        ends = [found[name]["ci"] or [0.0, 0.0] for name in metrics.AREAS]
        apart = [not low <= 0 <= high for low, high in ends]
        found_by_cohort.append([*apart, any(apart)])
    return np.mean(found_by_cohort, axis=0)


def chance_errors(num_labels: int, patients: str, cohorts: int) -> tuple[float, float, float]:
    """A calibrated model's calibration error, how much of it was called chance before, and how much is now: means."""
    found_by_cohort = []
    for number in range(cohorts):
        label_N, prob_N, subject_N = calibrated(number, num_labels, patients)
        rng = np.random.default_rng(number)
        drawn = [metrics.ece(rng.binomial(1, prob_N), prob_N) for _ in range(50)]
        found = calibration.calibration_error(label_N, prob_N, subject_N)
        found_by_cohort.append([found["ece"], np.mean(np.array(drawn, float)), found["by_chance"]])
    error, before, after = np.mean(np.array(found_by_cohort, float), axis=0)
    return float(error), float(before), float(after)


def table(*rows: list[str]) -> None:
    head, *others = rows
    print(
        "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *others)), end="\n\n", flush=True
    )


def percent(*rates: float) -> list[str]:
    return [f"{100 * rate:.1f} %" for rate in rates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cohorts", type=int, default=500, help="of each kind of useless and calibrated models; at most 200 of others"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 800, 3000])
    options = parser.parse_args()
    few = min(options.cohorts, 200)
    cells = list(itertools.product(options.sizes, PATIENTS))
    print(f"Models that know nothing, {len(USELESS)} kinds: called useful\n")
    rows = []
    for size, patients in cells:
        rate_K = useless_rates(size, patients, options.cohorts)
        prevalence, spread = USELESS[rate_K.argmax()]
        rows.append([f"{size:,}", patients, *percent(rate_K.mean(), rate_K.max()), f"{prevalence:g}, {spread:g}"])
    table(["labels", "a patient", "mean", "worst kind", "its prevalence, spread"], *rows)
    for distortion in (*DISTORTED, BREAK_EVEN):
        cohorts = options.cohorts if distortion == "calibrated" else few
        print(f"Models that rank well, {distortion}, {len(INFORMED)} kinds\n")
        rows = []
        for size, patients in cells:
            called_K, wrongly_K = informed_rates(size, patients, distortion, cohorts).T
            ends = percent(called_K.mean(), called_K.min(), called_K.max(), wrongly_K.mean(), wrongly_K.max())
            rows.append([f"{size:,}", patients, *ends])
        head = ["called useful", "least", "most", "wrongly, at least in part", "most"]
        table(["labels", "a patient", *head], *rows)
    print("Wilson's intervals: how many hold the truth\n")
    spreads = {0.0: "one", 0.7: "1 to 10", 1.2: "1 to 40"}
    covered = [
        (s, name, proportion_coverage(s, x, options.cohorts)) for s in options.sizes for x, name in spreads.items()
    ]
    table(
        ["labels", "a patient", "n = patients", "Kish's n"], *([f"{s:,}", name, *percent(*c)] for s, name, c in covered)
    )
    cells = list(itertools.product(options.sizes, PATIENTS[:2]))
    print("Two models that are equally good: called apart\n")
    rows = [[f"{s:,}", p, *percent(*boosting_differences(s, p, few))] for s, p in cells]
    table(["labels", "a patient", "in AUROC", "in AUPRC", "in either"], *rows)
    print("A calibrated model: reports that accuse one of 20 groups\n")
    head = ["labels", "a patient", "risks wrong before", "after", "ranked worse before", "after"]
    table(head, *([f"{s:,}", p, *percent(*group_accusations(s, p, 20, few).T.ravel())] for s, p in cells))
    print("A calibrated model's expected calibration error\n")
    errors = [(cell, chance_errors(*cell, few)) for cell in cells]
    rows = [[f"{size:,}", patients, *(f"{e:.4f}" for e in found)] for (size, patients), found in errors]
    table(["labels", "a patient", "error", "by chance before", "after"], *rows)


if __name__ == "__main__":
    main()
