"""PhysioNet/Computing in Cardiology Challenge 2012 (Silva et al. 2012) -> MEDS.

A stay is a subject (subject_id = RecordID). The challenge gives times as minutes since ICU admission only, so every
stay is placed at ORIGIN, with an ICU_ADMISSION event there, and predictions are made 48 hours later. Descriptors at
admission become static events. Of a repeated descriptor the first row counts (set c repeats Age, and has no ICUType);
later Weight rows are measurements. -1 means missing, in the series too: none of their quantities can be -1, and in
sets b and c it occurs only as a diastolic pressure. Recording errors (a pH of 735) are left as they are.

Shape legend: R rows of a shard's text files, E events made of them, N stays.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from hymate.data.meds import STATIC_TIME, DataError, write_parquet
from hymate.data.sources.challenges import ChallengeSource, StayFiles, Stays, events_table
from hymate.storage.paths import Location

ORIGIN = datetime.datetime(2012, 1, 1)  # admission time of every stay; only differences mean anything
PREDICTION_TIME = ORIGIN + datetime.timedelta(hours=48)
LONG_STAY_DAYS = 7
SETS = ("a", "b", "c")
CONVERSION = 2  # what is made of the files; another number has them prepared again

ADMISSION = "ICU_ADMISSION"
VARIABLES = {  # parameter -> (unit, description), as the challenge lists them
    "ALP": ("IU/L", "Alkaline phosphatase"),
    "ALT": ("IU/L", "Alanine transaminase"),
    "AST": ("IU/L", "Aspartate transaminase"),
    "Albumin": ("g/dL", "Albumin"),
    "BUN": ("mg/dL", "Blood urea nitrogen"),
    "Bilirubin": ("mg/dL", "Bilirubin"),
    "Cholesterol": ("mg/dL", "Cholesterol"),
    "Creatinine": ("mg/dL", "Serum creatinine"),
    "DiasABP": ("mmHg", "Invasive diastolic arterial blood pressure"),
    "FiO2": ("", "Fractional inspired oxygen, 0 to 1"),
    "GCS": ("", "Glasgow Coma Score, 3 to 15"),
    "Glucose": ("mg/dL", "Serum glucose"),
    "HCO3": ("mmol/L", "Serum bicarbonate"),
    "HCT": ("%", "Haematocrit"),
    "HR": ("bpm", "Heart rate"),
    "K": ("mEq/L", "Serum potassium"),
    "Lactate": ("mmol/L", "Lactate"),
    "MAP": ("mmHg", "Invasive mean arterial blood pressure"),
    "MechVent": ("", "Mechanical ventilation"),
    "Mg": ("mmol/L", "Serum magnesium"),
    "NIDiasABP": ("mmHg", "Non-invasive diastolic arterial blood pressure"),
    "NIMAP": ("mmHg", "Non-invasive mean arterial blood pressure"),
    "NISysABP": ("mmHg", "Non-invasive systolic arterial blood pressure"),
    "Na": ("mEq/L", "Serum sodium"),
    "PaCO2": ("mmHg", "Partial pressure of arterial carbon dioxide"),
    "PaO2": ("mmHg", "Partial pressure of arterial oxygen"),
    "Platelets": ("cells/nL", "Platelets"),
    "RespRate": ("bpm", "Respiration rate"),
    "SaO2": ("%", "Oxygen saturation of haemoglobin"),
    "SysABP": ("mmHg", "Invasive systolic arterial blood pressure"),
    "Temp": ("degC", "Temperature"),
    "TroponinI": ("ug/L", "Troponin I"),
    "TroponinT": ("ug/L", "Troponin T"),
    "Urine": ("mL", "Urine output"),
    "WBC": ("cells/nL", "White blood cell count"),
    "Weight": ("kg", "Weight"),
    "pH": ("", "Arterial pH"),
}
DESCRIPTORS = {  # parameter -> the values it can take, None for any number
    "RecordID": None,
    "Age": None,
    "Gender": (-1, 0, 1),
    "Height": None,
    "ICUType": (-1, 1, 2, 3, 4),
    "Weight": None,
}
STATIC_CODES = {
    "Age": "Age at admission, years",
    "Height": "Height, cm",
    "Weight": "Weight at admission, kg",
    "GENDER//F": "Female",
    "GENDER//M": "Male",
    "ICUType//1": "Coronary care unit",
    "ICUType//2": "Cardiac surgery recovery unit",
    "ICUType//3": "Medical ICU",
    "ICUType//4": "Surgical ICU",
}
CODES = {
    **{f"{name}//{unit}" if unit else name: text for name, (unit, text) in VARIABLES.items()},
    ADMISSION: "Admission to the ICU",
    **STATIC_CODES,
}
# Those of VARIABLES stand where their codes stand in CODES. A few rows of set c name no parameter: they are dropped.
_PARAMETERS = [*VARIABLES, *(name for name in DESCRIPTORS if name not in VARIABLES), ""]
_CODE_ID = {code: id for id, code in enumerate(CODES)}
_HEADER = b"Time,Parameter,Value"
_OUTCOMES_HEADER = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"
_TIME = r"^[0-9]{2}:[0-5][0-9]$"
_MINUTE_US = 60_000_000


@dataclass(frozen=True)
class _Set:
    """One set of the challenge: its stays and its outcomes."""

    stays: StayFiles
    outcomes: Location


@dataclass(frozen=True)
class _Stays(Stays):
    """Whether each ends in death; days_N float32, length of stay, NaN where missing; set_N letters."""

    set_N: np.ndarray
    days_N: np.ndarray


@dataclass(frozen=True)
class PhysioNet2012Source(ChallengeSource):
    """The challenge's text files: `set-b/` or `set-b.tar.xz`, with `Outcomes-b.txt`, for any of the sets a, b, c.

    Splits are stratified on in-hospital death. Labels, at 48 hours: `mortality` (boolean: died in
    hospital) and `length_of_stay` (boolean: longer than 7 days; float: days; none where it is missing).
    """

    codes = CODES
    name: str = "physionet2012"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((CONVERSION, self.splits, self.seed, CODES)).encode())
        for letter, files in self._sets.items():
            digest.update(f"set {letter}\n".encode() + files.outcomes.read_bytes())
            if files.stays.place.is_dir():
                for path, _, text in files.stays.texts():
                    digest.update(path.name.encode() + text)
            else:
                digest.update(files.stays.place.read_bytes())
        return digest.hexdigest()

    def dataset(self) -> dict[str, Any]:
        name = "PhysioNet Challenge 2012, set " + ", ".join(self._sets)
        return {"dataset_name": name, "dataset_version": "1.0.0", "license": "ODC-By-1.0"}

    def write_shard(self, shard: str, out: Location) -> None:
        rows_N, stays = self.places[shard], self.stays
        wanted = dict.fromkeys(stays.number_N[rows_N].tolist())
        texts: list[tuple[Location, int, bytes]] = []
        for letter in np.unique(stays.set_N[rows_N]):
            texts += self._sets[letter].stays.texts(wanted)
        if len(texts) != len(wanted):
            raise DataError(f"{self.raw}: a stay has several texts, or they changed meanwhile: fetch the sets again")
        write_parquet(_events(sorted(texts, key=lambda text: text[1])), out / "data" / f"{shard}.parquet")
        death, days = stays.outcome_N[rows_N], stays.days_N[rows_N]
        known = ~np.isnan(days)
        long_stay = {"boolean_value": days[known] > LONG_STAY_DAYS, "float_value": days[known]}
        for task, kept, values in (
            ("mortality", slice(None), {"boolean_value": death}),
            ("length_of_stay", known, long_stay),
        ):
            record = stays.number_N[rows_N][kept]
            times = pa.array([PREDICTION_TIME] * len(record), pa.timestamp("us"))
            table = pa.table({"subject_id": record, "prediction_time": times, **values})
            write_parquet(table, out / "labels" / task / f"{shard}.parquet")

    @functools.cached_property
    def _sets(self) -> dict[str, _Set]:
        if not self.raw.is_dir():
            raise DataError(f"{self.raw}: no such folder: raw=DIR must hold set-a, set-b or set-c with its outcomes")
        stays: dict[str, Location] = {}
        outcomes: dict[str, Location] = {}
        files: list[Location] = list(self.raw.iterdir())
        for path in sorted(files, key=str):  # "set-b" comes before "set-b.tar.xz" and wins
            for pattern, found in ((r"set-([^.]+)(\.tar(\.\w+)?)?", stays), (r"Outcomes-([^.]+)\.txt", outcomes)):
                match = re.fullmatch(pattern, path.name)
                if match and match[1] not in SETS:
                    raise DataError(f"{path}: unknown set {match[1]!r}, the challenge has a, b and c: rename or remove")
                if match:
                    found.setdefault(match[1], path)
        if not stays and not outcomes:
            raise DataError(f"{self.raw}: holds no set of the challenge: put set-b.tar.xz and Outcomes-b.txt there")
        for letter in sorted({*stays, *outcomes}):
            if letter not in outcomes:
                raise DataError(f"{stays[letter]}: stays without outcomes: put Outcomes-{letter}.txt beside it")
            if letter not in stays:
                raise DataError(f"{outcomes[letter]}: outcomes without stays: put set-{letter}.tar.xz beside it")
        return {
            letter: _Set(StayFiles(stays[letter], ".txt", "(0|[1-9][0-9]{0,17})", "<RecordID>"), outcomes[letter])
            for letter in sorted(stays)
        }

    @functools.cached_property
    def stays(self) -> _Stays:
        columns: list[tuple[int, str, bool, float]] = []
        for letter, files in self._sets.items():
            outcomes = _read_outcomes(files.outcomes)
            records = set(files.stays.numbers())
            for first, second, lack in (
                (records, outcomes, "no outcome"),
                (outcomes, records, "an outcome but no stay"),
            ):
                odd = set(first) - set(second)
                if odd:
                    raise DataError(
                        f"{files.outcomes}: {len(odd)} of {len(first)} records have {lack}: "
                        f"fetch {files.stays.place.name} and {files.outcomes.name} again"
                    )
            columns += [(record, letter, *outcome) for record, outcome in outcomes.items()]
        columns.sort()
        record, set_, death, days = zip(*columns, strict=True)
        if len(set(record)) < len(record):
            raise DataError(f"{self.raw}: two sets share a RecordID: fetch the sets again")
        return _Stays(np.array(record), np.array(death), np.array(set_), np.array(days, np.float32))


def _read_outcomes(path: Location) -> dict[int, tuple[bool, float]]:
    """RecordID -> (died in hospital, length of stay in days or NaN)."""
    lines = path.read_text(errors="replace").removesuffix("\n").split("\n")
    if not lines or lines[0].strip() != _OUTCOMES_HEADER:
        raise DataError(f"{path}: line 1 must be {_OUTCOMES_HEADER}: fetch the file again")
    outcomes: dict[int, tuple[bool, float]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not re.fullmatch(r"(0|[1-9][0-9]{0,17})(,-?[0-9]{1,9}){4},[01]", line.strip()):
            raise DataError(f"{path}: line {number} is not six whole numbers ending in 0 or 1: mend or fetch it again")
        record, _, _, days, _, death = map(int, line.split(","))
        if record in outcomes:
            raise DataError(f"{path}: line {number} repeats a RecordID: remove it")
        outcomes[record] = (bool(death), days if days >= 0 else float("nan"))
    return outcomes


# ------------------------------------------------------------------------------------------------ one shard's text


def _events(texts: list[tuple[Location, int, bytes]]) -> pa.Table:
    """MEDS data of stays, in their order."""
    rows = _parse(texts)
    if rows is None:
        raise _first_malformed_error(texts)
    stay_R, minute_R, parameter_R, value_R = rows

    is_descriptor_R = np.isin(parameter_R, [_PARAMETERS.index(name) for name in DESCRIPTORS]) & (minute_R == 0)
    first_R = np.zeros(len(stay_R), bool)
    candidates = np.flatnonzero(is_descriptor_R)
    key = stay_R[candidates] * len(_PARAMETERS) + parameter_R[candidates]
    first_R[candidates[np.unique(key, return_index=True)[1]]] = True

    present_R = value_R != -1
    code_R, has_value_R = parameter_R.copy(), np.ones(len(stay_R), bool)
    for name in ("Age", "Height", "Weight"):
        code_R[first_R & (parameter_R == _PARAMETERS.index(name))] = _CODE_ID[name]
    categories = [("Gender", number, f"GENDER//{letter}") for number, letter in enumerate("FM")]
    categories += [("ICUType", number, f"ICUType//{number}") for number in (1, 2, 3, 4)]
    for name, number, code in categories:
        chosen_R = first_R & (parameter_R == _PARAMETERS.index(name)) & (value_R == number)
        code_R[chosen_R], has_value_R[chosen_R] = _CODE_ID[code], False
    is_static_R = first_R & present_R & (parameter_R != _PARAMETERS.index("RecordID"))
    is_measured_R = ~first_R & (parameter_R < len(VARIABLES)) & present_R

    num_stays = len(texts)
    origin_us = int(ORIGIN.replace(tzinfo=datetime.UTC).timestamp()) * 1_000_000
    kept = np.flatnonzero(is_static_R | is_measured_R)
    time_R = np.where(is_static_R, STATIC_TIME, origin_us + minute_R * _MINUTE_US)
    # One admission a stay comes before its measurements: the sort is stable and keeps rows of one minute in order.
    stay_E = np.concatenate([np.arange(num_stays), stay_R[kept]])
    time_E = np.concatenate([np.full(num_stays, origin_us), time_R[kept]])
    code_E = np.concatenate([np.full(num_stays, _CODE_ID[ADMISSION]), code_R[kept]])
    value_E = np.concatenate([np.full(num_stays, np.nan), np.where(has_value_R, value_R, np.nan)[kept]])
    record_N = np.array([record for _, record, _ in texts])
    return events_table(record_N[stay_E], time_E, code_E, value_E, CODES)


def _parse(texts: list[tuple[Location, int, bytes]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """stay_R (position in `texts`), minute_R, parameter_R (position in _PARAMETERS) and value_R; None where any
    line is malformed."""
    bodies = []
    for _, _, text in texts:
        header, _, body = text.partition(b"\n")
        if header.rstrip(b"\r") != _HEADER:
            return None
        bodies.append(body if body.endswith(b"\n") or not body else body + b"\n")
    sizes = [body.count(b"\n") for body in bodies]
    names = ["time", "parameter", "value"]
    try:
        table = csv.read_csv(
            io.BytesIO(b"".join(bodies)),
            csv.ReadOptions(column_names=names, use_threads=False),
            parse_options=csv.ParseOptions(quote_char=False, double_quote=False),
            convert_options=csv.ConvertOptions(
                column_types=dict(zip(names, (pa.string(), pa.string(), pa.float64()), strict=True)), null_values=[]
            ),
        )
    except pa.ArrowInvalid:
        return None
    parameter = pc.index_in(table["parameter"], pa.array(_PARAMETERS))
    value_R = table["value"].to_numpy()
    valid_times = pc.all(pc.match_substring_regex(table["time"], _TIME)).as_py()
    if table.num_rows != sum(sizes) or parameter.null_count or not _are_float32(value_R).all() or not valid_times:
        return None
    minute_R = sum(
        unit * pc.utf8_slice_codeunits(table["time"], start, start + 2).cast(pa.int64()).to_numpy()
        for unit, start in ((60, 0), (1, 3))
    )
    parameter_R = parameter.to_numpy()
    stay_R = np.repeat(np.arange(len(texts)), sizes)
    record_N = np.array([record for _, record, _ in texts])
    for name, allowed in DESCRIPTORS.items():
        values = value_R[parameter_R == _PARAMETERS.index(name)]
        if allowed and not np.isin(values, allowed).all():
            return None
    is_record_R = parameter_R == _PARAMETERS.index("RecordID")
    if not np.array_equal(value_R[is_record_R], record_N[stay_R[is_record_R]]):
        return None
    return stay_R, minute_R, parameter_R, value_R


def _are_float32(value_R: np.ndarray) -> np.ndarray:
    """Which values are finite, also as the float32 that MEDS holds."""
    with np.errstate(over="ignore"):
        return np.isfinite(value_R.astype(np.float32))


def _first_malformed_error(texts: list[tuple[Location, int, bytes]]) -> DataError:
    """The error for the first malformed line, by the rules of `_parse`."""
    for path, record, text in texts:
        header, *lines = text.decode(errors="replace").removesuffix("\n").split("\n")
        if header.rstrip("\r") != _HEADER.decode():
            return DataError(f"{path}: line 1 must be {_HEADER.decode()}: fetch the file again")
        for number, line in enumerate(lines, start=2):
            fault = _fault(line.removesuffix("\r"), record)
            if fault:
                return DataError(f"{path}: line {number}: {fault}: mend the line or fetch the file again")
    return DataError(f"{texts[0][0].parent}: malformed text: fetch the set again")


def _fault(line: str, record: int) -> str | None:
    fields = line.split(",")
    if len(fields) != 3:
        return "not three fields Time,Parameter,Value"
    time, parameter, value = fields
    if not re.match(_TIME, time):
        return "the time is not HH:MM"
    if parameter not in _PARAMETERS:
        return "not a parameter of the challenge"
    try:
        number = float(value)
    except ValueError:
        return "the value is not a number"
    if not _are_float32(np.array(number)):
        return "the value is not finite" if not np.isfinite(number) else "the value is too large for float32"
    if number not in (DESCRIPTORS.get(parameter) or (number,)):
        return f"not a value of {parameter}"
    if parameter == "RecordID" and number != record:
        return "the RecordID is not that of the file's name"
    return None
