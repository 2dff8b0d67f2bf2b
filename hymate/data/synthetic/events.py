"""The events that the synthetic cohort's stays leave in the record.

Shapes as in source.py: P patients, S stays, E events, C codes. Times are minutes since 1970.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from hymate.data.synthetic import law as law
from hymate.data.synthetic.codes import CODES, ID, LACTATE, MEASUREMENTS, OTHER_DIAGNOSES, TREATMENTS, VISIT
from hymate.data.synthetic.course import MEAN_STAY_DAYS, NULL_MINUTE, Patients, Stays, SyntheticConfig, record
from hymate.data.synthetic.law import DAY

US_PER_MINUTE = 60_000_000
WARD_EVENTS = 100  # most other events in a stay's last hours, so that the drivers are among its last few hundred
_MEAN, _SD, _LOG, _DECIMALS = (np.array([m[i] for m in MEASUREMENTS]) for i in (1, 2, 3, 4))


def _code_fractions() -> np.ndarray:
    """Cumulative fractions (6, C) of the codes recorded in the acute and the ward part of three kinds of patients.

    Row 2 * kind + 1 (ward) leaves out the two driver labs: the law's own measurements are the only ones there.
    """
    rng = np.random.default_rng(0)
    weight_C = np.array([m[5] for m in MEASUREMENTS] + [3 / (1 + i) ** 0.7 for i in range(len(TREATMENTS))])
    weight_KC = np.repeat(weight_C[None] * rng.lognormal(0, 0.8, (3, len(weight_C))), 2, axis=0)
    weight_KC[:, ID["LAB//glucose//mg/dL"]] = 1.3 * weight_C.max()
    weight_KC[1::2, [ID[law.CREATININE], ID[law.HAEMOGLOBIN]]] = 0
    fraction_KC = weight_KC.cumsum(axis=1)
    return fraction_KC / fraction_KC[:, -1:]


_FRACTIONS_KC = _code_fractions()
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
        total_S = patients.intensity_P[stays["patient"]] * days_S / MEAN_STAY_DAYS
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
    flat_KC = (_FRACTIONS_KC + np.arange(6)[:, None]).ravel()
    code_E = np.searchsorted(flat_KC, row_E + rng.random(len(stay_E)), side="right") - row_E * _FRACTIONS_KC.shape[1]
    code_E = np.minimum(code_E, _FRACTIONS_KC.shape[1] - 1)
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
    value_E[index] = record(rng, np.rint(value * scale) / scale)
    return value_E


def blocks_of(rng: np.random.Generator, patients: Patients, stays: Stays, config: SyntheticConfig) -> list[Block]:
    """All events, in blocks; of events at the same minute, those of an earlier block come first."""
    everyone_P = np.arange(len(patients.birth_P))
    static_P = np.full(len(everyone_P), NULL_MINUTE)
    at_S, discharge_S = stays["patient"], stays["discharge"]
    icd_S = rng.poisson(4, len(at_S))
    icd_E = rng.choice([ID[code] for code in OTHER_DIAGNOSES], size=icd_S.sum(), p=_ICD_SHARES)
    failure_S, copd_S = stays["heart_failure"] & (config.driver_distance == 0), stays["copd"]
    seen_S, dead_P = stays["visit"] != NULL_MINUTE, patients.death_P != NULL_MINUTE
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


def table_of(blocks: list[Block], stays: Stays, first_subject: int) -> pa.Table:
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
            "time": pa.array(minute_E * US_PER_MINUTE, pa.timestamp("us"), mask=minute_E == NULL_MINUTE),
            "code": code.cast(pa.string()),
            "numeric_value": pa.array(value_E, pa.float32(), mask=np.isnan(value_E)),
        }
    )


def _key(patient: np.ndarray, minute: np.ndarray) -> np.ndarray:
    """What events are sorted by."""
    return patient * 2**33 + (minute - NULL_MINUTE)
