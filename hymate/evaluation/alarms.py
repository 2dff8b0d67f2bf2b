"""The alarm as its users judge it: what alarms are worth by the hours before the onset, how many there are, how early
they come and whom they find.

The worth is the utility of PhysioNet Challenge 2019 (Reyna et al. 2020, Critical Care Medicine 48:210-217), as
`UtilityConfig` has it. An alarm at a label gains what it is worth there less what no alarm is worth there; the
normalised utility is the sum of the gains of all alarms over that of the best possible alarms, so it is 1 for these and
0 where there is never one.

A patient's labels belong to one stay, at equal distances, 0 up to some time and 1 from then on. Intervals are 95 %, of
resampled patients.

Shape legend:
    N  labels, by patient and time
    P  patients
    T  thresholds
    F  patients with an onset who are found
    B  bootstrap samples
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hymate.config import UtilityConfig
from hymate.data.examples import Examples
from hymate.data.meds import US_PER_HOUR
from hymate.evaluation import metrics
from hymate.evaluation.tables import markdown, percent_with_interval, with_interval

Array = NDArray[Any]
CANDIDATES = 200  # thresholds that are tried
SMOOTHED = 0.2  # a threshold's gain is averaged over those with about a fifth more or fewer labels above them
FRACTIONS = np.geomspace(1e-3, 1, 40)  # of the labels with an alarm, where the curve is shown
STATISTICS = ("utility", "alarms_per_day", "starts_per_day", "found", "disturbed", "false_per_true", "lead_hours")
PICTURE_ALT = "utility by alarms per patient-day, patients found by hours from the onset"
EXPLAINED = """\
There is an alarm at a label where the risk is above the threshold, or was in the hours that an alarm is held. Each such
label counts; "begin" counts those with none at the label before. A true alarm is one that is worth more than no alarm
(by default from 12 hours before the onset to 3 hours after it), a false one, such as an earlier one, is worth less. A
patient is found by a true alarm; the lead is the time from the first true one to the onset, so it has an upper limit.
`task.utility` says what alarms are worth."""
DECIMALS = {"utility": 3, "alarms_per_day": 2, "starts_per_day": 3, "false_per_true": 1, "lead_hours": 1}


@dataclass(frozen=True)
class Policy:
    """When there is an alarm: where the probability is above the threshold, or was in the last so many hours."""

    threshold: float
    hold_hours: float


@dataclass(frozen=True)
class Courses:
    """The labels of patients over time, and what an alarm gains there.

    order_N: each label's place among the examples. patient_N: 0 to P - 1, never falling. hour_N: since any time.
    onset_N: hours from the onset to the label, NaN without an onset. gain_N: what an alarm is worth, less what none is.
    weight_N: the labels'. hours: the usual time between a patient's labels, NaN where nobody has two.
    """

    order_N: Array
    patient_N: Array
    hour_N: Array
    onset_N: Array
    gain_N: Array
    weight_N: Array
    hours: float

    @classmethod
    def of(cls, examples: Examples, utility: UtilityConfig) -> Courses:
        order_N = np.lexsort((examples.prediction_time_E, examples.subject_id_E))
        _, patient_N = np.unique(examples.subject_id_E[order_N], return_inverse=True)
        hour_N = (examples.prediction_time_E[order_N] - examples.prediction_time_E.min()) / US_PER_HOUR
        positive_N = np.flatnonzero(examples.label_E[order_N] > 0.5)
        septic, first = np.unique(patient_N[positive_N], return_index=True)
        onset_P = np.full(patient_N[-1] + 1, np.nan)
        onset_P[septic] = hour_N[positive_N[first]] + utility.optimal_hours
        onset_N = hour_N - onset_P[patient_N]
        between = np.diff(hour_N)[np.diff(patient_N) == 0]
        hours = float(np.median(between)) if len(between) else np.nan
        weight_N = examples.weight_E[order_N].astype(np.float64)
        return cls(order_N, patient_N, hour_N, onset_N, gain(onset_N, utility), weight_N, hours)

    def alarms(self, prob_N: Array, policy: Policy) -> Array:
        """Whether there is an alarm at each label (N,); prob_N: in this order."""
        number_N = np.arange(len(prob_N))
        last_N = np.maximum.accumulate(np.where(prob_N > policy.threshold, number_N, -1))  # -1: none yet
        held_N = self.hour_N - self.hour_N[last_N] <= policy.hold_hours
        return (last_N >= 0) & held_N & (self.patient_N == self.patient_N[last_N])


def gain(onset_N: Array, utility: UtilityConfig) -> Array:
    """What an alarm is worth at each label (N,), less what no alarm is worth there; onset_N: see `Courses`."""
    early, optimal, late = utility.early_hours, utility.optimal_hours, utility.late_hours
    rising_N = utility.alarm * (onset_N + early) / (early - optimal)
    passed_N = (onset_N + optimal) / (late + optimal)  # fraction of the time between the optimal and the latest hour
    before_N = np.maximum(rising_N, utility.false_alarm)
    after_N = utility.alarm * (1 - passed_N) - utility.missed * passed_N
    of_onset_N = np.where(onset_N <= -optimal, before_N, np.where(onset_N <= late, after_N, 0.0))
    return np.where(np.isnan(onset_N), utility.false_alarm, of_onset_N)


def choose(courses: Courses, prob_N: Array, utility: UtilityConfig) -> Policy:
    """The policy whose alarms gain most, of each `utility.hold_hours` and of thresholds between probabilities; one
    without alarms where none gains anything.

    What a threshold gains is taken as a mean with its neighbours': the gain of a few hundred patients jumps from one to
    the next, and the highest jump is seldom the best threshold for other patients. For a model that nearly
    separates its labels (a utility above 0.8) it is worse, by up to a hundredth, however many patients there are.
    """
    rising_N = np.sort(prob_N)
    lowest_T = np.unique(rising_N[-np.geomspace(1, len(rising_N), CANDIDATES).astype(int)])[::-1]  # with an alarm
    first_T = np.searchsorted(rising_N, lowest_T)
    threshold_T = (lowest_T + np.append(rising_N, 0)[first_T - 1]) / 2
    log_above_T = np.log(len(rising_N) - first_T)
    near_TT = np.exp(-(((log_above_T[:, None] - log_above_T) / SMOOTHED) ** 2) / 2)
    near_TT /= near_TT.sum(axis=1, keepdims=True)
    worth_N = courses.gain_N * courses.weight_N
    found = [(0.0, Policy(1.0, utility.hold_hours[0]))]
    for hold in utility.hold_hours:
        policies = [Policy(float(threshold), hold) for threshold in threshold_T]
        gain_T = near_TT @ [worth_N @ courses.alarms(prob_N, policy) for policy in policies]
        found.append((gain_T.max(), policies[gain_T.argmax()]))
    return max(found, key=lambda pair: pair[0])[1]


# ------------------------------------------------------------------------------------------------------ what it does


@dataclass(frozen=True)
class Sums:
    """Of alarms, by patient. sum_P: the gain of the alarms, of the best possible alarms; alarms, those that begin (none
    at the label before), false and true ones; days; 1 for an onset, for an onset that is found, for none, and for none
    with an alarm. found_F: those found, the longest lead last; lead_F: hours from their first true alarm to the onset.

    A true alarm gains something, a false one loses something.
    """

    sum_P: dict[str, Array]
    found_F: Array
    lead_F: Array

    @classmethod
    def of(cls, courses: Courses, alarm_N: Array) -> Sums:
        patient_N, gain_N = courses.patient_N, courses.gain_N

        def total(value_N: Array) -> Array:
            return np.bincount(patient_N, value_N * courses.weight_N)

        true = np.flatnonzero(alarm_N & (gain_N > 0))
        found_F, first_F = np.unique(patient_N[true], return_index=True)
        lead_F = -courses.onset_N[true[first_F]]
        order_F = np.argsort(lead_F, kind="stable")
        onset_P = np.bincount(patient_N, ~np.isnan(courses.onset_N)) > 0
        before_N = np.concatenate([[False], alarm_N[:-1] & (np.diff(patient_N) == 0)])
        sum_P = {
            "gain": total(alarm_N * gain_N),
            "best": total(np.maximum(gain_N, 0)),
            "alarms": total(alarm_N),
            "starts": total(alarm_N & ~before_N),
            "false": total(alarm_N & (gain_N < 0)),
            "true": total(alarm_N & (gain_N > 0)),
            "days": total(np.full(len(gain_N), courses.hours / 24)),
            "onset": onset_P.astype(float),
            "found": np.isin(np.arange(len(onset_P)), found_F).astype(float),
            "none": (~onset_P).astype(float),
            "disturbed": (~onset_P & (np.bincount(patient_N, alarm_N) > 0)).astype(float),
        }
        return cls(sum_P, found_F[order_F], lead_F[order_F])

    def utility(self, times_BP: Array) -> Array:
        """(B,): normalised, where each patient is drawn so many times; NaN where nobody has an onset."""
        return _ratio(times_BP @ self.sum_P["gain"], times_BP @ self.sum_P["best"])

    def statistics(self, times_BP: Array) -> Array:
        """(K, B): STATISTICS; NaN where one is undefined."""
        of = {name: times_BP @ value_P for name, value_P in self.sum_P.items()}
        alarms, starts = (_ratio(of[name], of["days"]) for name in ("alarms", "starts"))
        found, disturbed = _ratio(of["found"], of["onset"]), _ratio(of["disturbed"], of["none"])
        false, lead = _ratio(of["false"], of["true"]), self.lead(times_BP, 0.5)
        return np.stack([self.utility(times_BP), alarms, starts, found, disturbed, false, lead])

    def lead(self, times_BP: Array, fraction: float) -> Array:
        """(B,): a quantile of lead_F; NaN where nobody is found."""
        if not len(self.lead_F):
            return np.full(len(times_BP), np.nan)
        below_BF = np.cumsum(times_BP[:, self.found_F], axis=1)
        all_B = below_BF[:, -1]
        lead_B = self.lead_F[(below_BF >= fraction * all_B[:, None]).argmax(axis=1)]
        return np.where(all_B > 0, lead_B, np.nan)


def _ratio(a_B: Array, b_B: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b_B > 0, a_B / b_B, np.nan)


def judge(courses: Courses, prob_N: Array, policy: Policy) -> tuple[dict[str, Any], Sums]:
    """What a policy does, as plain values, and the sums behind it.

    "policy", and of STATISTICS each with its interval: utility, normalised; alarms_per_day, of a patient, every
    label with an alarm; starts_per_day, those without one at the label before; found, the fraction of the patients with
    an onset who have a true alarm; disturbed, of those without an onset who have any alarm; false_per_true, alarms;
    lead_hours, the median of those found, with "lead_quartiles". "curve": utility and alarms per day at other
    thresholds, nothing held. "found_by": the fraction found by an hour from the onset.
    """
    sums = Sums.of(courses, courses.alarms(prob_N, policy))
    number = len(sums.sum_P["gain"])
    onsets = int(sums.sum_P["onset"].sum())
    quartiles = [float(sums.lead(np.ones((1, number)), fraction)[0]) for fraction in (0.25, 0.75)]
    by_lead = [(lead, (sums.lead_F >= lead).sum() / onsets) for lead in np.unique(sums.lead_F)[::-1].tolist()]
    return {
        "policy": asdict(policy),
        "patients": number,
        "onsets": onsets,
        **dict(zip(STATISTICS, metrics.estimates(sums.statistics, len(STATISTICS), np.arange(number)), strict=True)),
        "lead_quartiles": quartiles if len(sums.lead_F) else None,
        "curve": _curve(courses, prob_N),
        "found_by": [{"hour": -lead, "found": float(found)} for lead, found in by_lead],
    }, sums


def _curve(courses: Courses, prob_N: Array) -> list[dict[str, float]]:
    """Rows of threshold, utility and alarms per day, from few alarms to one at every label."""
    order_N = np.argsort(-prob_N, kind="stable")
    gained_N, alarms_N = (np.cumsum(x_N[order_N]) for x_N in (courses.gain_N * courses.weight_N, courses.weight_N))
    best = (np.maximum(courses.gain_N, 0) * courses.weight_N).sum()
    last_N = np.flatnonzero(np.diff(prob_N[order_N], append=-1))  # of equal probabilities
    shown = last_N[np.unique(np.searchsorted(last_N, FRACTIONS * (len(order_N) - 1)))]
    utility_N, per_day_N = gained_N / max(best, 1e-12), alarms_N / (alarms_N[-1] * courses.hours / 24)
    names = ("risk_from", "utility", "alarms_per_day")
    columns = zip(*(x_N[shown].tolist() for x_N in (prob_N[order_N], utility_N, per_day_N)), strict=True)
    return [dict(zip(names, row, strict=True)) for row in columns] if best > 0 and courses.hours > 0 else []


def assess(
    utility: UtilityConfig, tuning: Examples, scored: Examples, probability: Mapping[str, tuple[Array, Array]]
) -> dict[str, dict[str, Any]]:
    """What `judge` finds on `scored` for each model, by its name, with the policy that the tuning split chose for it.

    probability: of each model, those of the tuning and of the scored examples. Models after the first have as
    "difference" the first one's utility less theirs, on the same resampled patients.
    """
    learned, courses = Courses.of(tuning, utility), Courses.of(scored, utility)
    found, of_model = {}, []
    for name, (tuning_E, scored_E) in probability.items():
        policy = choose(learned, tuning_E[learned.order_N], utility)
        found[name], sums = judge(courses, scored_E[courses.order_N], policy)
        of_model.append(sums)
    for name, other in list(zip(found, of_model, strict=True))[1:]:

        def ahead(times_BP: Array, other: Sums = other) -> Array:
            return (of_model[0].utility(times_BP) - other.utility(times_BP))[None]

        (found[name]["difference"],) = metrics.estimates(ahead, 1, np.arange(courses.patient_N[-1] + 1))
    return found


# ------------------------------------------------------------------------------------------------------ what is said


def verdict(found: Mapping[str, Mapping[str, Any]], chosen: str) -> str:
    """What the first model of `assess` does, and boosting's utility; chosen: how the policy was, where it says nothing
    of that itself.
    """
    model, policy = found["model"], found["model"]["policy"]
    chosen = model.get("chosen", chosen)
    if policy["threshold"] == 1:
        return f"No alarm would gain anything ({chosen}), so there is none."
    held = f" now or in the last {policy['hold_hours']:g} hours" if policy["hold_hours"] else ""
    shown = _shown(model)
    text = (
        f"With an alarm at risks above {threshold(policy)}{held} ({chosen}), the normalised utility is "
        f"{shown['utility']}: 1 is the best possible, 0 is never an alarm. There are "
        f"{shown['alarms_per_day']} alarms per patient-day (hours with an alarm, which begins "
        f"{shown['starts_per_day']} times a day), and {shown['false_per_true']} false ones for each true one. Of "
        f"{model['onsets']:,} patients with an onset {percent_with_interval(model['found'])} are found"
    )
    if model["lead_quartiles"]:
        (low, high), median = model["lead_quartiles"], model["lead_hours"]["value"]
        text += f", half of them at least {median:.1f} hours before it (quartiles {low:.1f} and {high:.1f})"
    if model["onsets"] < model["patients"]:
        others = model["patients"] - model["onsets"]
        text += f"; of {others:,} without one {percent_with_interval(model['disturbed'])} have an alarm"
    if other := found.get("gradient boosting"):
        text += (
            f". Boosting's utility is {with_interval(other['utility'])}; this model minus boosting: "
            f"{with_interval(other['difference'])}, with the thresholds as they were chosen"
        )
    return f"{text}."


def _shown(of_model: Mapping[str, Any]) -> dict[str, str]:
    return {key: with_interval(of_model[key], decimals) for key, decimals in DECIMALS.items()}


def threshold(policy: Mapping[str, float]) -> str:
    """With more digits than other percentages: it is what an alarm is set to."""
    return f"{100 * policy['threshold']:.4g} %"


def section(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown parts: a table of all models of `assess`."""
    heads = ["utility", "alarms per patient-day", "begin", "patients found", "without onset, with an alarm"]
    rows = [["alarms of", "risk above", "held, hours", *heads, "false per true one", "median lead, hours"]]
    for name, of_model in found.items():
        *worth, false, lead = _shown(of_model).values()
        policy = [threshold(of_model["policy"]), f"{of_model['policy']['hold_hours']:g}"]
        patients = [percent_with_interval(of_model[key]) for key in ("found", "disturbed")]
        rows.append([name, *policy, *worth, *patients, false, lead])
    return ["## Alarms", EXPLAINED, markdown(rows)]
