"""A synthetic cohort in MEDS whose 30-day readmission follows a known law.

Every subject goes through hospital stays one after the other. What happens after a discharge is drawn from what
the record shows up to then, so that the best prediction any model can make is known for each discharge:

1. Follow-up is lost with probability LOST, whatever the outcome would have been: nothing is recorded afterwards
   but perhaps one outpatient visit. Such a discharge is censored and gets no label.
2. Otherwise the subject is readmitted within 30 days with probability p, the law: a positive label.
3. Otherwise the subject dies within the window with probability DEATH_IN_WINDOW (a negative label where a death
   counts as one), or is seen again after day 30 (at a later admission, or a last outpatient visit): negative.

Step 1 does not look at the outcome, and steps 2 and 3 end in a label whatever happens, so among labelled
discharges P(label | record) = p exactly. Where deaths in the window are left out instead of counted as negative,
it is p / (p + (1 - p) (1 - DEATH_IN_WINDOW)), which ranks the discharges in the same order.

The law is in synthetic_law.py. With `shuffled_labels` p is the same for every discharge, and nothing in the record
predicts the outcome. With `driver_distance` the law has one driver, which lies hundreds to thousands of events before
the discharge; every stay then has as many events as the next, evenly spread over it.

Death in hospital and length of stay depend on a severity that shows in the lactate and heart rate of the first
24 hours, and on age and the kind of admission.

Shapes: P patients, S stays, A stays drawn at once, M measurements of a stay, E events, C codes. Times are
minutes since 1970.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hymate import __version__
from hymate.config import ConfigError
from hymate.data import synthetic_law as law
from hymate.data.meds import SPLITS, SplitsConfig, codes_table, write_metadata, write_parquet
from hymate.data.synthetic_law import DAY
from hymate.metrics import auprc, auroc, brier
from hymate.storage import Location, write_text

HOUR, US_PER_MINUTE = 60, 60_000_000
ORACLE = "oracle/readmission.parquet"
FIRST_ADMISSION = (20_000_000, 24_000_000)  # 2008 to 2015, in minutes since 1970
WARD_EVENTS = 100  # most other events in a stay's last hours, so that the drivers are among its last few hundred
MAX_STAYS = 60
LOST, DEATH_IN_WINDOW, RETURN, LATE_DEATH = 0.08, 0.06, 0.8, 0.25
MISSING, ERRORS = 0.02, 0.01  # share of measurements with no value, and with a wrong one

LACTATE = "LAB//lactate//mmol/L"
LACTATE_LOG_MEAN, LACTATE_LOG_SD = 0.5, 0.4
HAEMOGLOBIN_MEAN, HAEMOGLOBIN_SD = 11.5, 1.2
LACTATES, CREATININES, HAEMOGLOBINS = 3, 4, 6  # measurements of every stay
DISTRACTORS = {
    "LAB//glucose//mg/dL": "measured most often of all labs, related to nothing",
    "LAB//ferritin//ng/mL": "outside its reference range most of the time, related to nothing",
}

# Events around the drivers. Measurements: mean, standard deviation (of the logarithm where `log`), decimals, weight.
MEASUREMENTS: tuple[tuple[str, float, float, bool, int, float], ...] = (
    ("VITAL//heart_rate//bpm", 84, 14, False, 0, 12),
    ("VITAL//systolic_bp//mmHg", 124, 18, False, 0, 9),
    ("VITAL//diastolic_bp//mmHg", 70, 11, False, 0, 9),
    ("VITAL//respiratory_rate//insp/min", 18, 3.5, False, 0, 9),
    ("VITAL//spo2//%", 95, 1.4, False, 0, 9),
    ("VITAL//temperature//degC", 36.9, 0.5, False, 1, 4),
    ("LAB//glucose//mg/dL", 4.85, 0.3, True, 0, 12),
    ("LAB//ferritin//ng/mL", 6.5, 1.2, True, 0, 3),
    ("LAB//sodium//mmol/L", 139, 4, False, 0, 3),
    ("LAB//potassium//mmol/L", 4.1, 0.5, False, 1, 3),
    ("LAB//chloride//mmol/L", 103, 5, False, 0, 2),
    ("LAB//bicarbonate//mmol/L", 25, 3.5, False, 0, 2),
    ("LAB//white_cells//10^9/L", 2.1, 0.4, True, 1, 2),
    ("LAB//platelets//10^9/L", 5.3, 0.4, True, 0, 2),
    ("LAB//magnesium//mg/dL", 2.0, 0.25, False, 1, 1.5),
    ("LAB//bilirubin//mg/dL", -0.4, 0.7, True, 1, 0.7),
    (LACTATE, LACTATE_LOG_MEAN, LACTATE_LOG_SD, True, 1, 0.5),
    (law.CREATININE, law.CREATININE_LOG_MEAN, law.CREATININE_LOG_SD, True, 2, 1.5),
    (law.HAEMOGLOBIN, HAEMOGLOBIN_MEAN, HAEMOGLOBIN_SD, False, 1, 1.5),
)
_DRUGS = (
    "sodium_chloride acetaminophen heparin insulin furosemide potassium_chloride metoprolol pantoprazole aspirin "
    "atorvastatin vancomycin morphine lisinopril ceftriaxone ondansetron albuterol prednisone warfarin amlodipine "
    "gabapentin levothyroxine metformin apixaban midazolam propofol norepinephrine amiodarone digoxin allopurinol"
)
_PROCEDURES = "chest_x_ray ct_scan echocardiogram transfusion dialysis endoscopy"
_DISEASES = (
    "I10 E78 E11 I25 N17 I48 K21 F32 E87 J18 D64 N39 E03 N18 J96 F41 Z79 R07 M54 A41 I21 G47 E66 K57 I63 C34 L03 K92 "
    "M17 G40 B18 H40 C50 K74 F10 D50 I26 K85 G20 M06"
)
TREATMENTS = (*(f"MEDICATION//{name}" for name in _DRUGS.split()), *(f"PROCEDURE//{n}" for n in _PROCEDURES.split()))
OTHER_DIAGNOSES = tuple(f"DIAGNOSIS//ICD//10//{code}" for code in _DISEASES.split())
ADMISSIONS = {"EMERGENCY": 0.6, "URGENT": 0.15, "ELECTIVE": 0.25}
DISCHARGES = {"HOME": 0.55, "HOME_HEALTH_CARE": 0.2, "SKILLED_NURSING_FACILITY": 0.17, "REHABILITATION": 0.08}
GENDERS = {"F": 0.5, "M": 0.5}
RACES = {"WHITE": 0.62, "BLACK": 0.16, "HISPANIC": 0.09, "ASIAN": 0.06, "OTHER": 0.07}
VISIT = "OUTPATIENT_VISIT//CLINIC"

CODES = (
    *(code for code, *_ in MEASUREMENTS),
    *TREATMENTS,
    *OTHER_DIAGNOSES,
    law.HEART_FAILURE,
    law.COPD,
    *(f"HOSPITAL_ADMISSION//{kind}" for kind in ADMISSIONS),
    *(f"HOSPITAL_DISCHARGE//{place}" for place in (*DISCHARGES, "DIED")),
    *(f"GENDER//{value}" for value in GENDERS),
    *(f"RACE//{value}" for value in RACES),
    VISIT,
    "MEDS_BIRTH",
    "MEDS_DEATH",
)
ID = {code: i for i, code in enumerate(CODES)}
_MEAN, _SD, _LOG, _DECIMALS = (np.array([m[i] for m in MEASUREMENTS]) for i in (1, 2, 3, 4))
_NULL_MINUTE = -(2**31)  # static events: no time, sorted before all others

# What the cohort's size is planned with (means over many subjects).
_STAYS_PER_SUBJECT, _EVENTS_PER_STAY, _MEAN_STAY_DAYS, _LENGTH_SPREAD = 3.6, 21.0, 5.4, 1.15
MIN_MEAN_EVENTS = 150


@dataclass(frozen=True)
class SyntheticConfig:
    """A synthetic cohort.

    subjects: number of subjects. mean_events: mean history length, about; lengths are log-normal (at the default,
        the longest 1 % exceed 20,000 events). seed: the cohort is a function of this configuration alone.
    shard_events: events of one shard, about. shuffled_labels: readmission depends on nothing (negative control).
    driver_distance: 0, or the law's only driver lies up to so many events before the discharge (the distant law of
        synthetic_law.py); mean_events must be four times that, for a stay is about a quarter of a history.
    """

    subjects: int = 500
    mean_events: int = 2000
    seed: int = 0
    shard_events: int = 500_000
    shuffled_labels: bool = False
    driver_distance: int = 0

    def __post_init__(self) -> None:
        for name, least in (("subjects", 1), ("mean_events", MIN_MEAN_EVENTS), ("seed", 0), ("shard_events", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"synthetic.{name} must be at least {least}, got {getattr(self, name)}")
        farthest = self.driver_distance
        if farthest != 0 and farthest <= law.NEAREST:
            raise ConfigError(f"synthetic.driver_distance must be 0 or more than {law.NEAREST}, got {farthest}")
        if self.mean_events < 4 * farthest:
            raise ConfigError(
                f"synthetic.mean_events must be at least four times synthetic.driver_distance={farthest}, "
                f"got {self.mean_events}"
            )

    @property
    def stay_events(self) -> float:
        """Events recorded on an average stay, besides those that every stay has."""
        return self.mean_events / _STAYS_PER_SUBJECT - _EVENTS_PER_STAY


# ------------------------------------------------------------------------------------------- clinical course


@dataclass(frozen=True)
class Patients:
    birth_P: np.ndarray
    gender_P: np.ndarray  # code ids
    race_P: np.ndarray  # code ids
    intensity_P: np.ndarray  # events recorded on an average stay, besides those that every stay has
    death_P: np.ndarray  # minute of death; _NULL_MINUTE if none is known


Stays = dict[str, np.ndarray]  # columns (S,) or (S, M); ordered by patient and time where complete


def _draw(rng: np.random.Generator, shares: Mapping[str, float], prefix: str, size: int) -> np.ndarray:
    """Code ids (size,) of `prefix + name`, by the names' shares."""
    ids = np.array([ID[prefix + name] for name in shares])
    return ids[rng.choice(len(ids), size=size, p=list(shares.values()))]


def _record(rng: np.random.Generator, value: np.ndarray) -> np.ndarray:
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
        death_P=np.full(num_patients, _NULL_MINUTE),
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
        again_A = next_A != _NULL_MINUTE
        active_A, admission_A, previous_A = active_A[again_A], next_A[again_A], stay["discharge"][again_A]
    stays = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    order_S = np.argsort(stays["patient"], kind="stable")
    return patients, {name: column[order_S] for name, column in stays.items()}


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
        "lactate": _record(rng, lactate_AM),
        "creatinine_level": level_A,
        "creatinine_minute": creatinine_minute_AM,
        "creatinine": _record(rng, creatinine_AM),
        "haemoglobin_level": (base_A - HAEMOGLOBIN_MEAN) / HAEMOGLOBIN_SD,
        "haemoglobin_minute": haemoglobin_minute_AM,
        "haemoglobin": _record(rng, haemoglobin_AM),
    }
    if config.driver_distance:
        stay["heart_failure"] = rng.random(size) < law.DISTANT_SHARE
        stay["distance"] = law.distances(rng, size, config.driver_distance)
    return stay


def _times(rng: np.random.Generator, start_A: np.ndarray, end_A: np.ndarray, slots: int) -> np.ndarray:
    """Irregular increasing times (A, slots) in [start, end), one in each of `slots` equal parts."""
    share_AM = (np.arange(slots) + rng.random((len(start_A), slots))) / slots
    return start_A[:, None] + (share_AM * (end_A - start_A)[:, None]).astype(np.int64)


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

    next_A = np.where(readmitted_A, after(0.5, law.WINDOW_DAYS - 0.5), _NULL_MINUTE)
    more_A = (rng.exponential(180, size) * DAY).astype(np.int64)
    much_later_A = after(law.WINDOW_DAYS + 0.5, law.WINDOW_DAYS + 1) + more_A
    next_A = np.where(returns_A, much_later_A, next_A)
    visit_A = discharge_A + (rng.random(size) * (next_A - discharge_A)).astype(np.int64)
    visit_A = np.where(next_A != _NULL_MINUTE, visit_A, after(0.5, law.WINDOW_DAYS - 0.5))
    visit_A = np.where(leaves_A, much_later_A, visit_A)
    seen_A = leaves_A | (~stay["died"] & ~dies_A & (rng.random(size) < 0.6))

    death_A = np.full(size, _NULL_MINUTE)
    death_A = np.where(stay["died"], after(1 / 24, 20 / 24), death_A)  # registered hours after the discharge
    death_A = np.where(dies_A, after(0.5, law.WINDOW_DAYS - 0.5), death_A)
    late_A = much_later_A + (rng.exponential(180, size) * DAY).astype(np.int64)
    death_A = np.where(leaves_A & (rng.random(size) < LATE_DEATH), late_A, death_A)
    patients.death_P[active_A] = death_A

    place_A = _draw(rng, DISCHARGES, "HOSPITAL_DISCHARGE//", size)
    stay["place"] = np.where(stay["died"], ID["HOSPITAL_DISCHARGE//DIED"], place_A)
    stay["visit"] = np.where(seen_A, visit_A, _NULL_MINUTE)
    stay["probability"], stay["labelled"], stay["label"] = p_A, labelled_A, readmitted_A
    return next_A


# ------------------------------------------------------------------------------------------------- events


def _code_shares() -> np.ndarray:
    """Cumulative shares (6, C) of the codes recorded in the acute and the ward part of three kinds of patients.

    Row 2 * kind + 1 (ward) leaves out the two driver labs: the law's own measurements are the only ones there.
    """
    rng = np.random.default_rng(0)
    weight_C = np.array([m[5] for m in MEASUREMENTS] + [3 / (1 + i) ** 0.7 for i in range(len(TREATMENTS))])
    weight_KC = np.repeat(weight_C[None] * rng.lognormal(0, 0.8, (3, len(weight_C))), 2, axis=0)
    weight_KC[:, ID["LAB//glucose//mg/dL"]] = 1.3 * weight_C.max()
    weight_KC[1::2, [ID[law.CREATININE], ID[law.HAEMOGLOBIN]]] = 0
    share_KC = weight_KC.cumsum(axis=1)
    return share_KC / share_KC[:, -1:]


_SHARES_KC = _code_shares()
_ICD_SHARES = np.array([1 / (1 + i) for i in range(len(OTHER_DIAGNOSES))])
_ICD_SHARES /= _ICD_SHARES.sum()

Block = tuple[np.ndarray, np.ndarray, np.ndarray | int, np.ndarray | None]  # patient, minute, code id, value


def _background(rng: np.random.Generator, patients: Patients, stays: Stays, config: SyntheticConfig) -> Block:
    """The many events that the law does not read."""
    size = len(stays["patient"])
    days_S = (stays["discharge"] - stays["admission"]) / DAY
    if config.driver_distance:
        total_S = np.full(size, int(config.stay_events))
        ward_S = (total_S * (stays["discharge"] - stays["ward"]) / (days_S * DAY)).astype(np.int64)
        count_2S = np.stack([total_S - ward_S, ward_S])
    else:
        total_S = patients.intensity_P[stays["patient"]] * days_S / _MEAN_STAY_DAYS
        ward_S = np.minimum(0.4 * total_S, WARD_EVENTS)
        acute_S = np.where(stays["ward"] > stays["admission"], total_S - ward_S, 0)
        count_2S = rng.poisson(np.stack([acute_S, ward_S]))
    stay_E = np.concatenate([np.repeat(np.arange(size, dtype=np.int32), count_S) for count_S in count_2S])
    in_ward_E = np.arange(len(stay_E)) >= count_2S[0].sum()

    start_S, end_S = np.stack([stays["admission"], stays["ward"]]), np.stack([stays["ward"], stays["discharge"]])
    part_E = in_ward_E.astype(np.int8)
    span_E = (end_S - start_S)[part_E, stay_E]
    minute_E = start_S[part_E, stay_E] + (rng.random(len(stay_E), dtype=np.float32) * span_E).astype(np.int64)

    kind_S = rng.integers(0, 3, size)
    row_E = 2 * kind_S[stay_E] + part_E
    flat_KC = (_SHARES_KC + np.arange(6)[:, None]).ravel()
    code_E = np.searchsorted(flat_KC, row_E + rng.random(len(stay_E)), side="right") - row_E * _SHARES_KC.shape[1]
    code_E = np.minimum(code_E, _SHARES_KC.shape[1] - 1)
    return stays["patient"][stay_E], minute_E, code_E, _values(rng, stays, stay_E, code_E)


def _values(rng: np.random.Generator, stays: Stays, stay_E: np.ndarray, code_E: np.ndarray) -> np.ndarray:
    """Recorded values (E,): half a level of the stay, half chance; NaN for codes without one."""
    level_SC = rng.standard_normal((len(stays["patient"]), len(MEASUREMENTS)), dtype=np.float32)
    level_SC[:, ID["VITAL//heart_rate//bpm"]] += stays["severity"]
    level_SC[:, ID[law.CREATININE]] = stays["creatinine_level"]
    level_SC[:, ID[law.HAEMOGLOBIN]] = stays["haemoglobin_level"]
    value_E = np.full(len(code_E), np.nan, np.float32)
    index = np.flatnonzero(code_E < len(MEASUREMENTS))
    code = code_E[index]
    z = np.float32(0.7) * (level_SC[stay_E[index], code] + rng.standard_normal(len(index), dtype=np.float32))
    value = _MEAN.astype(np.float32)[code] + _SD.astype(np.float32)[code] * z
    value = np.where(_LOG[code], np.exp(np.minimum(value, 12)), value)
    scale = (10.0**_DECIMALS).astype(np.float32)[code]
    value_E[index] = _record(rng, np.rint(value * scale) / scale)
    return value_E


def _blocks(rng: np.random.Generator, patients: Patients, stays: Stays, config: SyntheticConfig) -> list[Block]:
    """All events, in blocks; of events at the same minute, those of an earlier block come first."""
    everyone_P = np.arange(len(patients.birth_P))
    static_P = np.full(len(everyone_P), _NULL_MINUTE)
    at_S, discharge_S = stays["patient"], stays["discharge"]
    icd_S = rng.poisson(4, len(at_S))
    icd_E = rng.choice([ID[code] for code in OTHER_DIAGNOSES], size=icd_S.sum(), p=_ICD_SHARES)
    failure_S, copd_S = stays["heart_failure"] & (config.driver_distance == 0), stays["copd"]
    seen_S, dead_P = stays["visit"] != _NULL_MINUTE, patients.death_P != _NULL_MINUTE
    labs: list[Block] = [
        (np.repeat(at_S, stays[lab].shape[1]), stays[f"{lab}_minute"].ravel(), ID[code], stays[lab].ravel())
        for lab, code in (("lactate", LACTATE), ("creatinine", law.CREATININE), ("haemoglobin", law.HAEMOGLOBIN))
    ]
    return [
        (everyone_P, static_P, patients.gender_P, None),
        (everyone_P, static_P, patients.race_P, None),
        (everyone_P, patients.birth_P, ID["MEDS_BIRTH"], None),
        (at_S, stays["admission"], stays["kind"], None),
        *labs,
        _background(rng, patients, stays, config),
        (np.repeat(at_S, icd_S), np.repeat(discharge_S, icd_S), icd_E, None),
        (at_S[failure_S], discharge_S[failure_S], ID[law.HEART_FAILURE], None),
        (at_S[copd_S], discharge_S[copd_S], ID[law.COPD], None),
        (at_S, discharge_S, stays["place"], None),
        (at_S[seen_S], stays["visit"][seen_S], ID[VISIT], None),
        (everyone_P[dead_P], patients.death_P[dead_P], ID["MEDS_DEATH"], None),
    ]


def _table(blocks: list[Block], stays: Stays, first_subject: int) -> pa.Table:
    """MEDS data: the blocks' events by subject and time; the n-th last up to a discharge is its distant driver."""
    patient_E = np.concatenate([block[0] for block in blocks])
    minute_E = np.concatenate([block[1] for block in blocks])
    code_E = np.concatenate([np.broadcast_to(np.asarray(b[2], np.int32), b[0].shape) for b in blocks])
    value_E = np.concatenate([np.full(len(b[0]), np.nan, np.float32) if b[3] is None else b[3] for b in blocks])
    key_E = _key(patient_E, minute_E)
    order_E = np.argsort(key_E, kind="stable")
    minute_E, code_E, value_E = minute_E[order_E], code_E[order_E], value_E[order_E]
    if "distance" in stays:
        end_S = np.searchsorted(key_E[order_E], _key(stays["patient"], stays["discharge"]), side="right")
        driver = (end_S - stays["distance"])[stays["heart_failure"]]
        code_E[driver], value_E[driver] = ID[law.HEART_FAILURE], np.nan
    code = pa.DictionaryArray.from_arrays(pa.array(code_E), pa.array(CODES))
    return pa.table(
        {
            "subject_id": pa.array(patient_E[order_E] + first_subject, pa.int64()),
            "time": pa.array(minute_E * US_PER_MINUTE, pa.timestamp("us"), mask=minute_E == _NULL_MINUTE),
            "code": code.cast(pa.string()),
            "numeric_value": pa.array(value_E, pa.float32(), mask=np.isnan(value_E)),
        }
    )


def _key(patient: np.ndarray, minute: np.ndarray) -> np.ndarray:
    """What events are sorted by."""
    return patient * 2**33 + (minute - _NULL_MINUTE)


# ------------------------------------------------------------------------------------------------- source


@dataclass(frozen=True)
class SyntheticSource:
    """The cohort as MEDS, and beside it `oracle/`: the best prediction of readmission that there is.

    oracle/readmission.parquet: one row a labelled discharge: subject_id, prediction_time, probability (the law's);
    with config.driver_distance also driver_distance, how many events a context must hold to see the driver (null
    where there is none).
    oracle/readmission.json: the law and its coefficients, and what the law's probability scores against the
    labels, overall and in each split: the ceiling of any model; with config.driver_distance also the ceiling of a
    model that sees the last so many events (auroc_by_context).
    """

    config: SyntheticConfig
    splits: SplitsConfig = SplitsConfig()  # noqa: RUF009 (it is frozen)
    name: str = "synthetic"

    def fingerprint(self) -> str:
        laws = law.LAW, law.COEFFICIENTS, law.DISTANT_LAW, law.DISTANT_COEFFICIENTS
        return hashlib.sha256(repr((self.config, self.splits, *laws, CODES)).encode()).hexdigest()

    def shards(self) -> list[str]:
        return list(self._shards())

    def _shards(self) -> dict[str, tuple[int, range]]:
        """Shard name -> (its number, its subject ids). Subjects are alike, so each split is a run of ids."""
        size = max(1, self.config.shard_events // self.config.mean_events)
        split_P = self._split_of_subjects()
        shards: dict[str, tuple[int, range]] = {}
        for split in SPLITS:
            id_P = 1 + np.flatnonzero(split_P == split)
            for i in range(0, len(id_P), size):
                ids = range(int(id_P[i]), int(id_P[min(i + size, len(id_P)) - 1]) + 1)
                shards[f"{split}/{i // size}"] = (len(shards), ids)
        return shards

    def _split_of_subjects(self) -> np.ndarray:
        return self.splits.assign((np.arange(self.config.subjects) + 0.5) / self.config.subjects)

    def _course(self, number: int, ids: range) -> tuple[Patients, Stays]:
        # A stream for the course and one for the rest of the events: `finish` draws the courses alone, again.
        return simulate(self._rng(number, 0), len(ids), self.config)

    def _rng(self, number: int, stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.config.seed, spawn_key=(number, stream)))

    def write_shard(self, shard: str, out: Location) -> None:
        number, ids = self._shards()[shard]
        patients, stays = self._course(number, ids)
        blocks = _blocks(self._rng(number, 1), patients, stays, self.config)
        write_parquet(_table(blocks, stays, ids.start), out / "data" / f"{shard}.parquet")

    def finish(self, out: Location) -> None:
        subject_ids = np.arange(1, self.config.subjects + 1)
        splits = pa.table({"subject_id": subject_ids, "split": self._split_of_subjects().tolist()})
        dataset = {"dataset_name": "synthetic", "etl_name": "hymate", "etl_version": __version__}
        write_metadata(out, dataset, splits, codes_table({code: None for code in CODES}))

        discharges = pa.concat_tables([self._labelled(shard) for shard in self.shards()])
        write_parquet(discharges.drop_columns(["label", "split"]), out / ORACLE)
        write_text(json.dumps(self._ceiling(discharges), indent=1) + "\n", (out / ORACLE).with_suffix(".json"))

    def _labelled(self, shard: str) -> pa.Table:
        number, ids = self._shards()[shard]
        _, stays = self._course(number, ids)
        rows = np.flatnonzero(stays["labelled"])
        columns = {
            "subject_id": pa.array(stays["patient"][rows] + ids.start, pa.int64()),
            "prediction_time": pa.array(stays["discharge"][rows] * US_PER_MINUTE, pa.timestamp("us")),
            "probability": pa.array(stays["probability"][rows], pa.float64()),
            "label": pa.array(stays["label"][rows]),
            "split": pa.array([shard.split("/")[0]] * len(rows), pa.string()),
        }
        if self.config.driver_distance:
            absent = ~stays["heart_failure"][rows]
            columns["driver_distance"] = pa.array(stays["distance"][rows], pa.int64(), mask=absent)
        return pa.table(columns)

    def _ceiling(self, discharges: pa.Table) -> dict[str, Any]:
        label_N, probability_N = discharges["label"].to_numpy(), discharges["probability"].to_numpy()
        subject_N, split_N = discharges["subject_id"].to_numpy(), discharges["split"].to_numpy()
        farthest = self.config.driver_distance

        def scores(chosen_N: np.ndarray) -> dict[str, Any]:
            label, probability = label_N[chosen_N], probability_N[chosen_N]
            found: dict[str, Any] = {
                "num_labels": len(label),
                "num_subjects": len(np.unique(subject_N[chosen_N])),
                "prevalence": float(label.mean()) if len(label) else None,
                "auroc": auroc(label, probability),
                "auprc": auprc(label, probability),
                "brier": brier(label, probability),
            }
            if farthest:
                distance = discharges["driver_distance"].fill_null(farthest + 1).to_numpy()[chosen_N]
                tells = not self.config.shuffled_labels
                found["auroc_by_context"] = {c: auroc(label, tells & (distance <= c)) for c in _contexts(farthest)}
            return found

        return {
            "task": "readmission",
            "config": asdict(self.config),
            "shuffled_labels": self.config.shuffled_labels,
            "law": law.DISTANT_LAW if farthest else law.LAW,
            "coefficients": law.DISTANT_COEFFICIENTS if farthest else law.COEFFICIENTS,
            "distractors": DISTRACTORS,
            "lost_to_follow_up": LOST,
            "death_in_window_if_not_readmitted": DEATH_IN_WINDOW,
            "ceiling": {"all": scores(np.full(len(label_N), True)), **{s: scores(split_N == s) for s in SPLITS}},
        }


def _contexts(farthest: int) -> list[int]:
    """Twice NEAREST, doubled until the farthest driver is in view."""
    return [law.NEAREST << i for i in range(1, math.ceil(math.log2(farthest / law.NEAREST)) + 1)]
