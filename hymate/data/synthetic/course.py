"""The synthetic cohort's patients and their stays in hospital, drawn from the law in law.py.

Shapes as in source.py: P patients, S stays, A stays drawn at once, M measurements of a stay. Times are minutes
since 1970.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hymate.config import check
from hymate.data.synthetic import law as law
from hymate.data.synthetic.codes import (
    ADMISSIONS,
    CREATININES,
    DISCHARGES,
    GENDERS,
    HAEMOGLOBIN_MEAN,
    HAEMOGLOBIN_SD,
    HAEMOGLOBINS,
    ID,
    LACTATE_LOG_MEAN,
    LACTATE_LOG_SD,
    LACTATES,
    RACES,
)
from hymate.data.synthetic.law import DAY

HOUR = 60
FIRST_ADMISSION = (20_000_000, 24_000_000)  # 2008 to 2015, in minutes since 1970
MAX_STAYS = 60
LOST, DEATH_IN_WINDOW, RETURN, LATE_DEATH = 0.08, 0.06, 0.8, 0.25
MISSING, ERRORS = 0.02, 0.01  # fractions of the measurements with no value, and with a wrong one
NULL_MINUTE = -(2**31)  # static events: no time, sorted before all others

# What the cohort's size is planned with (means over many subjects).
_STAYS_PER_SUBJECT, _EVENTS_PER_STAY, MEAN_STAY_DAYS, _LENGTH_SPREAD = 3.6, 21.0, 5.4, 1.15
MIN_MEAN_EVENTS = 150


@dataclass(frozen=True)
class SyntheticConfig:
    """A synthetic cohort.

    subjects: number of subjects.
    mean_events: mean length of a history, about; lengths are log-normal (at the default, the longest 1 % exceed 20,000
        events).
    seed: the cohort is a function of this configuration alone.
    shard_events: events of one shard, about.
    shuffled_labels: readmission depends on nothing: a negative control.
    driver_distance: 0, or readmission has one cause alone, which lies up to so many events before the discharge
        (the distant law in law.py); mean_events must be four times that, because a stay is about a quarter of a
        history.
    """

    subjects: int = 500
    mean_events: int = 2000
    seed: int = 0
    shard_events: int = 500_000
    shuffled_labels: bool = False
    driver_distance: int = 0

    def __post_init__(self) -> None:
        for name, least in (("subjects", 1), ("mean_events", MIN_MEAN_EVENTS), ("seed", 0), ("shard_events", 1)):
            check(self, **{name: (getattr(self, name) >= least, f"must be at least {least}")})
        farthest, events = self.driver_distance, f"must be at least four times driver_distance={self.driver_distance}"
        check(
            self,
            driver_distance=(farthest == 0 or farthest > law.NEAREST, f"must be 0 or more than {law.NEAREST}"),
            mean_events=(self.mean_events >= 4 * farthest, events),
        )

    @property
    def stay_events(self) -> float:
        """Events recorded on an average stay, besides those that every stay has."""
        return self.mean_events / _STAYS_PER_SUBJECT - _EVENTS_PER_STAY


@dataclass(frozen=True)
class Patients:
    birth_P: np.ndarray
    gender_P: np.ndarray  # code ids
    race_P: np.ndarray  # code ids
    intensity_P: np.ndarray  # events recorded on an average stay, besides those that every stay has
    death_P: np.ndarray  # minute of death; NULL_MINUTE if none is known


Stays = dict[str, np.ndarray]  # columns (S,) or (S, M); ordered by patient and time where complete


def _draw(rng: np.random.Generator, fractions: Mapping[str, float], prefix: str, size: int) -> np.ndarray:
    """Code ids (size,) of `prefix + name`, by the names' fractions."""
    ids = np.array([ID[prefix + name] for name in fractions])
    return ids[rng.choice(len(ids), size=size, p=list(fractions.values()))]


def record(rng: np.random.Generator, value: np.ndarray) -> np.ndarray:
    """True values as they are recorded: some missing (NaN), some wrong (0 or a thousandfold); any shape."""
    luck = rng.random(value.shape, dtype=np.float32)
    value = value.astype(np.float32)
    value[luck < MISSING + ERRORS] *= 1000
    value[luck < MISSING + ERRORS / 2] = 0
    value[luck < MISSING] = np.nan
    return value


def simulate(rng: np.random.Generator, num_patients: int, config: SyntheticConfig) -> tuple[Patients, Stays]:
    """Draw the patients' courses, stay by stay, all patients at once."""
    first_P = rng.integers(*FIRST_ADMISSION, num_patients)
    age_P = np.clip(rng.normal(63, 15, num_patients), 18, 95)
    spread_P = rng.lognormal(-(_LENGTH_SPREAD**2) / 2, _LENGTH_SPREAD, num_patients)
    patients = Patients(
        birth_P=((first_P - age_P * 365.25 * DAY) // DAY * DAY).astype(np.int64),
        gender_P=_draw(rng, GENDERS, "GENDER//", num_patients),
        race_P=_draw(rng, RACES, "RACE//", num_patients),
        intensity_P=config.stay_events * spread_P,
        death_P=np.full(num_patients, NULL_MINUTE),
    )
    chronic = {
        "creatinine": rng.normal(size=num_patients),
        "heart_failure": rng.random(num_patients) < 0.22,
        "copd": rng.random(num_patients) < 0.16,
    }
    active_A, admission_A, previous_A = np.arange(num_patients), first_P, np.full(num_patients, -np.inf)
    batches: list[Stays] = []
    while len(active_A):
        stay = _stay(rng, active_A, admission_A, previous_A, patients, chronic, config)
        next_A = _aftermath(rng, stay, patients, config, last=len(batches) == MAX_STAYS - 1)
        batches.append(stay)
        again_A = next_A != NULL_MINUTE
        active_A, admission_A, previous_A = active_A[again_A], next_A[again_A], stay["discharge"][again_A]
    stays = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    order_S = np.argsort(stays["patient"], kind="stable")
    stays = {name: column[order_S] for name, column in stays.items()}
    stays["labelled"] &= _seen_to_the_end(patients, stays)
    return patients, stays


def _seen_to_the_end(patients: Patients, stays: Stays) -> np.ndarray:
    """Whether the record reaches the end of the 30 days after each stay, or a death in them (S,)."""
    last_P = patients.death_P.copy()
    for name in ("discharge", "visit"):
        np.maximum.at(last_P, stays["patient"], stays[name])
    window_S, death_S = stays["discharge"] + law.WINDOW_DAYS * DAY, patients.death_P[stays["patient"]]
    dies_S = (death_S != NULL_MINUTE) & (death_S <= window_S)
    return dies_S | (last_P[stays["patient"]] >= window_S)


def _stay(
    rng: np.random.Generator,
    active_A: np.ndarray,
    admission_A: np.ndarray,
    previous_A: np.ndarray,
    patients: Patients,
    chronic: dict[str, np.ndarray],
    config: SyntheticConfig,
) -> Stays:
    """One stay of each active patient, with its driver labs; acquired diagnoses are added to `chronic`."""
    size = len(active_A)
    kind_A = _draw(rng, ADMISSIONS, "HOSPITAL_ADMISSION//", size)
    emergency_A = kind_A == ID["HOSPITAL_ADMISSION//EMERGENCY"]
    severity_A = rng.normal(size=size)
    length_A = np.exp(1.25 + 0.55 * severity_A + 0.4 * emergency_A + rng.normal(0, 0.4, size))  # days
    length_A = np.clip(length_A, 0.75, 60)
    age_A = (admission_A - patients.birth_P[active_A]) / (365.25 * DAY)
    death_logit_A = -4.0 + 1.5 * severity_A + 0.6 * (age_A - 63) / 15
    discharge_A = admission_A + (length_A * DAY).astype(np.int64)
    ward_A = np.maximum(admission_A, discharge_A - law.WARD_HOURS * HOUR)
    chronic["heart_failure"][active_A] |= rng.random(size) < 0.04
    chronic["copd"][active_A] |= rng.random(size) < 0.03

    level_A = 0.6 * chronic["creatinine"][active_A] + 0.5 * rng.normal(size=size)
    creatinine_minute_AM = _times(rng, ward_A, discharge_A, CREATININES)
    z_AM = np.clip(level_A[:, None] + 0.6 * rng.normal(size=(size, CREATININES)), -3, 3)
    creatinine_AM = np.round(np.exp(law.CREATININE_LOG_MEAN + law.CREATININE_LOG_SD * z_AM), 2)

    base_A = rng.normal(HAEMOGLOBIN_MEAN, HAEMOGLOBIN_SD, size)
    slope_A = rng.normal(0, law.HAEMOGLOBIN_SLOPE_SD, size)
    haemoglobin_minute_AM = _times(rng, ward_A, discharge_A, HAEMOGLOBINS)
    days_AM = (haemoglobin_minute_AM - ward_A[:, None]) / DAY
    haemoglobin_AM = base_A[:, None] + slope_A[:, None] * days_AM + rng.normal(0, 0.15, days_AM.shape)
    haemoglobin_AM = np.round(np.clip(haemoglobin_AM, 4, 19), 1)

    lactate_minute_AM = _times(rng, admission_A, np.minimum(admission_A + DAY, discharge_A), LACTATES)
    z_AM = 0.8 * severity_A[:, None] + 0.6 * rng.normal(size=(size, LACTATES))
    lactate_AM = np.round(np.exp(LACTATE_LOG_MEAN + LACTATE_LOG_SD * z_AM), 1)

    stay = {
        "patient": active_A,
        "kind": kind_A,
        "admission": admission_A,
        "ward": ward_A,
        "discharge": discharge_A,
        "died": rng.random(size) < 1 / (1 + np.exp(-death_logit_A)),
        "severity": severity_A,
        "recency": law.recency(admission_A, previous_A),
        "heart_failure": chronic["heart_failure"][active_A],
        "copd": chronic["copd"][active_A],
        "lactate_minute": lactate_minute_AM,
        "lactate": record(rng, lactate_AM),
        "creatinine_level": level_A,
        "creatinine_minute": creatinine_minute_AM,
        "creatinine": record(rng, creatinine_AM),
        "haemoglobin_level": (base_A - HAEMOGLOBIN_MEAN) / HAEMOGLOBIN_SD,
        "haemoglobin_minute": haemoglobin_minute_AM,
        "haemoglobin": record(rng, haemoglobin_AM),
    }
    if config.driver_distance:
        stay["heart_failure"] = rng.random(size) < law.DISTANT_FRACTION
        stay["distance"] = law.distances(rng, size, config.driver_distance)
    return stay


def _times(rng: np.random.Generator, start_A: np.ndarray, end_A: np.ndarray, slots: int) -> np.ndarray:
    """Irregular increasing times (A, slots) in [start, end), one in each of `slots` equal parts."""
    fraction_AM = (np.arange(slots) + rng.random((len(start_A), slots))) / slots
    return start_A[:, None] + (fraction_AM * (end_A - start_A)[:, None]).astype(np.int64)


def _aftermath(
    rng: np.random.Generator, stay: Stays, patients: Patients, config: SyntheticConfig, last: bool
) -> np.ndarray:
    """What follows each stay, added to it and to the patients' deaths; returns the next admissions' minutes (A,)."""
    active_A, discharge_A = stay["patient"], stay["discharge"]
    size = len(active_A)
    if config.shuffled_labels:
        p_A = np.full(size, law.PREVALENCE)
    elif config.driver_distance:
        p_A = law.readmission_probability({"heart_failure": stay["heart_failure"]}, law.DISTANT_COEFFICIENTS)
    else:
        p_A = law.readmission_probability(
            {
                "creatinine": law.last_creatinine(stay["creatinine"]),
                "haemoglobin_fall": law.haemoglobin_fall(stay["haemoglobin_minute"], stay["haemoglobin"]),
                "heart_failure": stay["heart_failure"],
                "copd": stay["copd"],
                "recency": stay["recency"],
            }
        )

    def after(low_days: float, high_days: float) -> np.ndarray:
        return discharge_A + (rng.uniform(low_days, high_days, size) * DAY).astype(np.int64)

    lost_A = ~stay["died"] & ((rng.random(size) < LOST) | last)
    labelled_A = ~stay["died"] & ~lost_A
    readmitted_A = labelled_A & (rng.random(size) < p_A)
    dies_A = labelled_A & ~readmitted_A & (rng.random(size) < DEATH_IN_WINDOW)
    survives_A = labelled_A & ~readmitted_A & ~dies_A
    returns_A = survives_A & (rng.random(size) < RETURN)
    leaves_A = survives_A & ~returns_A

    next_A = np.where(readmitted_A, after(0.5, law.WINDOW_DAYS - 0.5), NULL_MINUTE)
    more_A = (rng.exponential(180, size) * DAY).astype(np.int64)
    much_later_A = after(law.WINDOW_DAYS + 0.5, law.WINDOW_DAYS + 1) + more_A
    next_A = np.where(returns_A, much_later_A, next_A)
    visit_A = discharge_A + (rng.random(size) * (next_A - discharge_A)).astype(np.int64)
    visit_A = np.where(next_A != NULL_MINUTE, visit_A, after(0.5, law.WINDOW_DAYS - 0.5))
    visit_A = np.where(leaves_A, much_later_A, visit_A)
    seen_A = leaves_A | (~stay["died"] & ~dies_A & (rng.random(size) < 0.6))

    death_A = np.full(size, NULL_MINUTE)
    death_A = np.where(stay["died"], after(1 / 24, 20 / 24), death_A)  # registered hours after the discharge
    death_A = np.where(dies_A, after(0.5, law.WINDOW_DAYS - 0.5), death_A)
    late_A = much_later_A + (rng.exponential(180, size) * DAY).astype(np.int64)
    death_A = np.where(leaves_A & (rng.random(size) < LATE_DEATH), late_A, death_A)
    patients.death_P[active_A] = death_A

    place_A = _draw(rng, DISCHARGES, "HOSPITAL_DISCHARGE//", size)
    stay["place"] = np.where(stay["died"], ID["HOSPITAL_DISCHARGE//DIED"], place_A)
    stay["visit"] = np.where(seen_A, visit_A, NULL_MINUTE)
    stay["probability"], stay["labelled"], stay["label"] = p_A, labelled_A, readmitted_A
    return next_A
