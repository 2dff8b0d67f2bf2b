"""How often a report's verdicts and intervals are wrong, on made-up cohorts whose truth is known; before and after.

    python tests/benchmarks/verdicts.py [--cohorts 500] [--sizes 300 800 3000]

Prints Markdown tables. "Before" is what reports did until 2026-11-26: a bootstrap interval of each threshold's gain,
Wilson's intervals with as many trials as patients, groups each judged at 95 %. Cohorts have one label a patient, or a
geometric number of them (mean 4, correlated); their prevalences are 3, 10 and 40 %.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm

from hymate import metrics, trust

Array = np.ndarray
Cohort = tuple[Array, Array, Array]  # labels, probabilities, subjects
PREVALENCES = (0.03, 0.1, 0.4)
CORRELATED = 0.7  # share of a risk's variance that a patient's labels have in common
# probabilities that know nothing of the labels: as a recalibrated model has them, a confident one, any
USELESS: dict[str, Callable[[float, Array], Array]] = {
    "narrow": lambda middle, noise_N: expit(middle + 0.25 * noise_N),
    "wide": lambda middle, noise_N: expit(middle + 1.5 * noise_N),
    "uniform": lambda middle, noise_N: norm.cdf(noise_N),
}
# what is wrong with the logits of a model that ranks well; the first is calibrated
DISTORTED: dict[str, Callable[[float, Array], Array]] = {
    "calibrated": lambda middle, logit_N: logit_N,
    "too extreme": lambda middle, logit_N: middle + 2 * (logit_N - middle),
    "too high": lambda middle, logit_N: logit_N + 1,
    "too low": lambda middle, logit_N: logit_N - 1,
}
SPREADS = (1.5, 0.8)  # of the risks' logits: a good model (AUROC 0.8 to 0.9) and a fair one (0.7)


def subjects(num_labels: int, many: bool, rng: np.random.Generator) -> Array:
    """Of each label."""
    count_P = rng.geometric(0.25, num_labels) if many else np.ones(num_labels, int)
    return np.repeat(np.arange(num_labels), count_P)[:num_labels]


def noise(subject_N: Array, rng: np.random.Generator) -> Array:
    """Standard normal, CORRELATED within a subject."""
    shared_N = rng.normal(size=subject_N.max() + 1)[subject_N]
    return np.sqrt(CORRELATED) * shared_N + np.sqrt(1 - CORRELATED) * rng.normal(size=len(subject_N))


def useless(number: int, num_labels: int, many: bool) -> Cohort:
    """Labels, and probabilities that are independent of them; `number` chooses the kind and seeds."""
    rng = np.random.default_rng([number, num_labels, many])
    prevalence, family = list(itertools.product(PREVALENCES, USELESS.values()))[number % 9]
    subject_N = subjects(num_labels, many, rng)
    label_N = rng.random(num_labels) < expit(logit(prevalence) + 1.5 * noise(subject_N, rng))
    return label_N, family(logit(prevalence), noise(subject_N, rng)), subject_N


def informed(number: int, num_labels: int, many: bool, kind: str) -> tuple[Cohort, Array]:
    """Labels drawn from known risks, and these risks distorted; and at which of the thresholds they truly help."""
    prevalence, spread = list(itertools.product(PREVALENCES, SPREADS))[number % 6]
    middle = logit(prevalence)
    rng = np.random.default_rng([number, num_labels, many])
    subject_N = subjects(num_labels, many, rng)
    true_N = middle + spread * noise(subject_N, rng)
    label_N = rng.random(num_labels) < expit(true_N)
    everyone_M = middle + spread * norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    risk_M, told_M = expit(everyone_M), expit(DISTORTED[kind](middle, everyone_M))
    gain_T = [np.mean((told_M >= t) * (risk_M - t)) - max(0, np.mean(risk_M - t)) for t in trust.GRID]
    return (label_N, expit(DISTORTED[kind](middle, true_N)), subject_N), np.array(gain_T) > 0


def useful_before(cohort: Cohort) -> list[float] | None:
    """The longest run of thresholds at which the gain's percentile interval lies above 0."""
    label_N, prob_N, subject_N = cohort
    patient_N = np.unique(subject_N, return_inverse=True)[1]
    excess_NT = (label_N[:, None] - np.array(trust.GRID)) / (1 - np.array(trust.GRID))
    act_NT = prob_N[:, None] >= trust.GRID
    sums = []
    for part_NT in (act_NT * excess_NT, (act_NT - 1.0) * excess_NT):
        sum_PT = np.zeros((patient_N.max() + 1, len(trust.GRID)))
        np.add.at(sum_PT, patient_N, part_NT)
        sums.append(sum_PT)
    num_patients = len(sums[0])
    times_BP = np.random.default_rng(0).multinomial(num_patients, np.full(num_patients, 1 / num_patients), 300)
    low_T = np.percentile(np.minimum(*(times_BP.astype(float) @ sum_PT for sum_PT in sums)), 2.5, axis=0)
    runs = (list(run) for better, run in itertools.groupby(range(len(low_T)), lambda t: low_T[t] > 0) if better)
    longest = max(runs, key=len, default=None)
    return None if longest is None else [trust.GRID[longest[0]], trust.GRID[longest[-1]]]


def claims(found: list[float] | None, helps_T: Array) -> tuple[bool, bool]:
    """Whether the model is called useful, and whether that includes a threshold at which it is not."""
    if found is None:
        return False, False
    low, high = (trust.GRID.index(end) for end in found)
    return True, not helps_T[low : high + 1].all()


def useful_rates(num_labels: int, many: bool, kind: str, cohorts: int) -> Array:
    """(before and after, called useful and wrongly so): rates over cohorts; kind: "useless" or one of DISTORTED."""
    told = []
    for number in range(cohorts):
        if kind == "useless":
            cohort, helps_T = useless(number, num_labels, many), np.zeros(len(trust.GRID), bool)
        else:
            cohort, helps_T = informed(number, num_labels, many, kind)
        told.append([claims(found, helps_T) for found in (useful_before(cohort), trust.useful_range(*cohort))])
    return np.mean(np.array(told), axis=0)


def share_coverage(num_labels: int, spread: float, cohorts: int) -> tuple[float, float]:
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
        ends = trust.wilson(flag_N.mean(), len(np.unique(subject_N))), trust.share(flag_N, subject_N)["ci"]
        within.append([low <= risk <= high for low, high in ends])
    before, after = np.mean(within, axis=0)
    return float(before), float(after)


def group_accusations(num_labels: int, many: bool, groups: int, cohorts: int) -> Array:
    """(before and after, "too high" or "too low" and "ranked worse"): how often at least one of a calibrated model's
    random groups is accused.
    """
    accused = []
    for number in range(cohorts):
        (label_N, prob_N, subject_N), _ = informed(number, num_labels, many, "calibrated")
        of_P = np.random.default_rng(number).geometric(0.2, subject_N.max() + 1) % groups
        own = [of_P[subject_N] == group for group in range(groups)]
        overall = metrics.auroc(label_N, prob_N)
        pairs = []
        for z in (trust.Z, trust.group_z(groups)):
            told = [trust.group_scores(0.1, z, overall, label_N[at], prob_N[at], subject_N[at]) for at in own]
            pairs.append([any(not g["few"] and g[flag] for g in told) for flag in ("wrong", "ranked_worse")])
        accused.append(pairs)
    return np.mean(np.array(accused), axis=0)


def boosting_differences(num_labels: int, many: bool, cohorts: int) -> Array:
    """How often two models that are equally good are called apart: in AUROC, AUPRC, either by 95 % intervals as before,
    either by those that reports have now.
    """
    told = []
    for number in range(cohorts):
        (label_N, prob_N, subject_N), _ = informed(number, num_labels, many, "calibrated")
        rng = np.random.default_rng(number)
        a_N, b_N = (logit(prob_N) + 0.7 * rng.normal(size=len(prob_N)) for _ in range(2))
        apart = []
        for level in (0.95, metrics.LEVEL_OF_BOTH):
            found = metrics.paired_difference(label_N, a_N, b_N, subject_N, level=level)
            ends = [found[name]["ci"] or [0.0, 0.0] for name in metrics.AREAS]
            apart.append([not low <= 0 <= high for low, high in ends])
        told.append([*apart[0], any(apart[0]), any(apart[1])])
    return np.mean(told, axis=0)


def chance_errors(num_labels: int, many: bool, cohorts: int) -> tuple[float, float, float]:
    """A calibrated model's calibration error, how much of it was called chance before, and how much is now: means."""
    told = []
    for number in range(cohorts):
        (label_N, prob_N, subject_N), _ = informed(number, num_labels, many, "calibrated")
        rng = np.random.default_rng(number)
        drawn = [metrics.ece(rng.binomial(1, prob_N), prob_N) for _ in range(50)]
        found = trust.calibration_error(label_N, prob_N, subject_N)
        told.append([found["ece"], np.mean(np.array(drawn, float)), found["by_chance"]])
    error, before, after = np.mean(np.array(told, float), axis=0)
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
        "--cohorts", type=int, default=500, help="of useless and calibrated models; at most 200 of others"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 800, 3000])
    options = parser.parse_args()
    few = min(options.cohorts, 200)
    kinds = {False: "one", True: "several"}
    cells = [(size, many) for size in options.sizes for many in kinds]
    for kind in ("useless", *DISTORTED):
        head = ["labels", "a patient", "called useful before", "after", "wrongly in part before", "after"]
        cohorts = options.cohorts if kind in ("useless", "calibrated") else few
        rates = [(cell, useful_rates(*cell, kind, cohorts).T.ravel()) for cell in cells]
        print(f"Model: {kind}\n")
        table(head, *([f"{size:,}", kinds[many], *percent(*rate)] for (size, many), rate in rates))
    print("Wilson's intervals: how many hold the truth\n")
    spreads = {0.0: "one", 0.7: "1 to 10", 1.2: "1 to 40"}
    covered = [(s, name, share_coverage(s, x, options.cohorts)) for s in options.sizes for x, name in spreads.items()]
    table(["labels", "a patient", "before", "after"], *([f"{s:,}", name, *percent(*c)] for s, name, c in covered))
    print("A calibrated model: reports that accuse one of 20 groups\n")
    head = ["labels", "a patient", "risks wrong before", "after", "ranked worse before", "after"]
    table(head, *([f"{s:,}", kinds[m], *percent(*group_accusations(s, m, 20, few).T.ravel())] for s, m in cells))
    print("Two models that are equally good: called apart\n")
    rows = [[f"{s:,}", kinds[m], *percent(*boosting_differences(s, m, few))] for s, m in cells]
    table(["labels", "a patient", "in AUROC before", "in AUPRC before", "in either before", "after"], *rows)
    print("A calibrated model's expected calibration error\n")
    errors = [(cell, chance_errors(*cell, few)) for cell in cells]
    rows = [[f"{size:,}", kinds[many], *(f"{e:.4f}" for e in found)] for (size, many), found in errors]
    table(["labels", "a patient", "error", "by chance before", "after"], *rows)


if __name__ == "__main__":
    main()
