"""The codes of the synthetic cohort: what is measured, given and done, and how often."""

from __future__ import annotations

from hymate.data.synthetic import law as law

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
