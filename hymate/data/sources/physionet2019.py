"""PhysioNet/Computing in Cardiology Challenge 2019, early sepsis (Reyna et al. 2020) -> MEDS.

A stay is a subject (subject_id = the number in pNNNNNN.psv), a line of its file an hour in the ICU. The challenge gives
no dates, so every stay is placed at ORIGIN, with an ICU_ADMISSION event there. The line of hour h (ICULOS) holds what
was measured up to the end of that hour: its events are at ORIGIN + h hours, and so is its prediction time, at which
they may be used. A stay whose lines begin after hour 1 keeps its hours. NaN was not measured: no event. Recording
errors are left as they are.

Age, sex, unit and the hours since the hospital admission are static events, from the first line that has them.

What cannot be used is left out and counted, so that one bad line does not cost a dataset: see `_Reading`.

Shape legend: L lines of a file, C columns of a file, P those of them in COLUMNS, O all COLUMNS, H hours of a stay,
V VARIABLES, E events, N stays.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from hymate.data.meds import STATIC_TIME, US_PER_HOUR, DataError, write_parquet
from hymate.data.sources.challenges import ChallengeSource, StayFiles, Stays, events_table
from hymate.storage.paths import Location

ORIGIN = datetime.datetime(2019, 1, 1)  # ICU admission of every stay; only differences mean anything
CONVERSION = 2  # what is made of the files; another number has them prepared again
LAST_HOUR = 100_000  # an ICULOS above is none: eleven years
EARLY_HOURS = 6  # before the onset the label turns to 1

ADMISSION = "ICU_ADMISSION"
HOUR, LABEL = "ICULOS", "SepsisLabel"
VARIABLES = {  # column -> (unit, description). Units are those of the values: the challenge lists others for lactate,
    # magnesium and FiO2
    "HR": ("bpm", "Heart rate"),
    "O2Sat": ("%", "Pulse oximetry"),
    "Temp": ("degC", "Temperature"),
    "SBP": ("mmHg", "Systolic blood pressure"),
    "MAP": ("mmHg", "Mean arterial pressure"),
    "DBP": ("mmHg", "Diastolic blood pressure"),
    "Resp": ("bpm", "Respiration rate"),
    "EtCO2": ("mmHg", "End-tidal carbon dioxide"),
    "BaseExcess": ("mmol/L", "Base excess"),
    "HCO3": ("mmol/L", "Bicarbonate"),
    "FiO2": ("", "Fraction of inspired oxygen, 0 to 1"),
    "pH": ("", "pH"),
    "PaCO2": ("mmHg", "Partial pressure of arterial carbon dioxide"),
    "SaO2": ("%", "Oxygen saturation of arterial blood"),
    "AST": ("IU/L", "Aspartate transaminase"),
    "BUN": ("mg/dL", "Blood urea nitrogen"),
    "Alkalinephos": ("IU/L", "Alkaline phosphatase"),
    "Calcium": ("mg/dL", "Calcium"),
    "Chloride": ("mmol/L", "Chloride"),
    "Creatinine": ("mg/dL", "Creatinine"),
    "Bilirubin_direct": ("mg/dL", "Direct bilirubin"),
    "Glucose": ("mg/dL", "Serum glucose"),
    "Lactate": ("mmol/L", "Lactate"),
    "Magnesium": ("mg/dL", "Magnesium"),
    "Phosphate": ("mg/dL", "Phosphate"),
    "Potassium": ("mmol/L", "Potassium"),
    "Bilirubin_total": ("mg/dL", "Total bilirubin"),
    "TroponinI": ("ng/mL", "Troponin I"),
    "Hct": ("%", "Haematocrit"),
    "Hgb": ("g/dL", "Haemoglobin"),
    "PTT": ("s", "Partial thromboplastin time"),
    "WBC": ("cells/nL", "Leukocyte count"),
    "Fibrinogen": ("mg/dL", "Fibrinogen"),
    "Platelets": ("cells/nL", "Platelets"),
}
NUMBERS = {"Age": "Age, years", "HospAdmTime": "Hospital admission, hours after the ICU admission (before: negative)"}
CATEGORIES = {  # column -> value -> code
    "Gender": {0: "GENDER//F", 1: "GENDER//M"},
    "Unit1": {1: "Unit//MICU"},
    "Unit2": {1: "Unit//SICU"},
}
CODES = {
    **{f"{name}//{unit}" if unit else name: text for name, (unit, text) in VARIABLES.items()},
    ADMISSION: "Admission to the ICU",
    **NUMBERS,
    "GENDER//F": "Female",
    "GENDER//M": "Male",
    "Unit//MICU": "Medical ICU",
    "Unit//SICU": "Surgical ICU",
}
COLUMNS = (*VARIABLES, *NUMBERS, *CATEGORIES, HOUR, LABEL)  # values are found by this order
_HOUR, _LABEL = COLUMNS.index(HOUR), COLUMNS.index(LABEL)
_CODE_ID = {code: id for id, code in enumerate(CODES)}
_ADMITTED_US = int(ORIGIN.replace(tzinfo=datetime.UTC).timestamp()) * 1_000_000


@dataclass(frozen=True)
class _Stay:
    """A file that could be read. hour_H: increasing; value_HV: NaN where not measured; label_H: 0, 1 or NaN for none;
    static: code ids and values, NaN for none.
    """

    hour_H: np.ndarray
    value_HV: np.ndarray
    label_H: np.ndarray
    static: list[tuple[int, float]]


@dataclass(frozen=True)
class _Header:
    """A file's first line. num_columns: its columns; own_P, place_P: which of COLUMNS they are, and where they stand;
    absent: the COLUMNS it lacks; num_others: columns that are none of them; is_usable: whether lines can be read by it.
    """

    num_columns: int
    own_P: list[int]
    place_P: list[int]
    absent: list[str]
    num_others: int
    is_usable: bool


@functools.lru_cache(maxsize=8)  # the files of a set share one
def _header(line: bytes) -> _Header:
    names = [name.strip().decode(errors="replace") for name in line.split(b"|")]
    own = [name for name in COLUMNS if name in names]
    own_P, place_P = [COLUMNS.index(name) for name in own], [names.index(name) for name in own]
    absent = [name for name in COLUMNS if name not in names]
    is_usable = HOUR in own and sum(map(names.count, own)) == len(own)
    return _Header(len(names), own_P, place_P, absent, len(set(names)) - len(own), is_usable)


@dataclass
class _Reading:
    """Reads files. counts: how often what was found, in words that also say what becomes of it."""

    counts: Counter[str] = field(default_factory=Counter)

    def stay(self, text: bytes) -> _Stay | None:
        """A file's stay; None where it has no hour."""
        first, *lines = text.splitlines() or [b""]
        header = _header(first)
        if not header.is_usable:
            self.counts[f"files left out: no header with {HOUR}, or with a column twice"] += 1
            return None
        for name in header.absent:
            self.counts[f"files without the column {name}: nothing of it"] += 1
        self._found(header.num_others, "columns that the challenge does not have: ignored")
        given_LC = self._values([line for line in lines if line.strip()], header.num_columns)
        value_LO = np.full((len(given_LC), len(COLUMNS)), np.nan)
        value_LO[:, header.own_P] = given_LC[:, header.place_P]
        hour_L = value_LO[:, _HOUR]
        whole_L = (hour_L >= 0) & (hour_L <= LAST_HOUR) & (hour_L == np.floor(hour_L))
        self._found((~whole_L).sum(), f"lines left out: {HOUR} is no whole number of hours")
        value_HO, hour_H = value_LO[whole_L], hour_L[whole_L].astype(np.int64)
        if not len(hour_H):
            self.counts["files left out: no line with an hour"] += 1
            return None
        later_H = np.diff(hour_H)
        if (later_H <= 0).any():
            self._found((later_H < 0).any(), "files whose lines were out of order: sorted by hour")
            num_lines = len(hour_H)
            hour_H, first_H = np.unique(hour_H, return_index=True)
            self._found(num_lines - len(hour_H), "lines left out: an earlier line has their hour")
            value_HO = value_HO[first_H]
        label_H = value_HO[:, _LABEL] if LABEL in header.absent else self._labels(value_HO[:, _LABEL])
        return _Stay(hour_H, value_HO[:, : len(VARIABLES)], label_H, self._static(value_HO))

    def _values(self, lines: list[bytes], width: int) -> np.ndarray:
        """(L, C) float64 of the lines with as many fields as the header; NaN where there is no finite float32."""
        whole = [line for line in lines if line.count(b"|") == width - 1]
        self._found(len(lines) - len(whole), "lines left out: not as many fields as the header")
        fields = b"|".join(whole)
        flat = np.empty(0)
        if not fields.translate(None, b"0123456789.-|Na"):  # with others NumPy takes text for numbers
            with contextlib.suppress(ValueError, DeprecationWarning), warnings.catch_warnings(action="error"):
                flat = np.fromstring(fields, sep="|")
        if len(flat) != len(whole) * width:
            flat = np.array([self._number(text) for line in whole for text in line.split(b"|")], dtype=np.float64)
        value_LC = flat.reshape(len(whole), width)
        with np.errstate(over="ignore"):
            infinite_LC = np.isinf(value_LC.astype(np.float32))
        if infinite_LC.any():
            self._found(infinite_LC.sum(), "values too large for float32: no event")
            value_LC[infinite_LC] = np.nan
        return value_LC

    def _number(self, text: bytes) -> float:
        try:
            return float(text)
        except ValueError:
            self._found(bool(text.strip()), "values that are no number: no event")
            return math.nan

    def _labels(self, given_H: np.ndarray) -> np.ndarray:
        """1 from the first 1 on, as the challenge defines its label; NaN where none was given."""
        label_H = np.where((given_H == 0) | (given_H == 1), given_H, np.nan)
        self._found(np.isnan(label_H).sum(), "lines whose label is neither 0 nor 1: no label, their events stay")
        kept_H = np.where(np.isnan(label_H), np.nan, np.fmax.accumulate(label_H))
        self._found((kept_H > label_H).sum(), "labels that went back from 1 to 0: kept at 1")
        at_first = label_H[~np.isnan(label_H)][:1]
        self._found(at_first.sum(), "stays labelled from the first line on, so with an unknown onset: kept")
        return kept_H

    def _static(self, value_HO: np.ndarray) -> list[tuple[int, float]]:
        found = []
        for own, name in enumerate((*NUMBERS, *CATEGORIES), start=len(VARIABLES)):
            value_H = value_HO[:, own]
            for value in value_H[~np.isnan(value_H)][:1].tolist():
                if name in NUMBERS:
                    found.append((_CODE_ID[name], value))
                elif value in CATEGORIES[name]:
                    found.append((_CODE_ID[CATEGORIES[name][value]], math.nan))
                else:
                    self._found(value not in (0, 1), f"stays whose {name} is neither 0 nor 1: nothing of it")
        return found

    def _found(self, times: int, what: str) -> None:
        if times:
            self.counts[what] += int(times)


@dataclass(frozen=True)
class _Stays(Stays):
    """Those that can be used; whether a label is 1."""

    counts: dict[str, int]
    digest: str


@dataclass(frozen=True)
class PhysioNet2019Source(ChallengeSource):
    """The challenge's `*.psv` files below a folder, `training_setA/` or `training_setA.tar.xz` there, for instance.

    Splits are stratified on sepsis. Labels, at the end of each hour: `sepsis` (boolean), as the challenge
    has them, so 1 from EARLY_HOURS before the onset on; and before the onset `time_to_sepsis`, until the onset or the
    last hour. Where the onset isn't known there are none of the latter.
    """

    codes = CODES
    name: str = "physionet2019"

    def fingerprint(self) -> str:
        made_of = CONVERSION, self.splits, self.seed, CODES, self.stays.digest
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        return self.stays.counts

    def dataset(self) -> dict[str, Any]:
        return {"dataset_name": "PhysioNet Challenge 2019", "dataset_version": "1.0.0", "license": "CC-BY-4.0"}

    def write_shard(self, shard: str, out: Location) -> None:
        wanted = set(self.stays.number_N[self.places[shard]].tolist())
        stays = {number: stay for number, text in self._texts(wanted) if (stay := _Reading().stay(text)) is not None}
        if set(stays) != wanted:
            raise DataError(f"{self.raw}: the files changed meanwhile: give the command again")
        stays = dict(sorted(stays.items()))
        write_parquet(_events(stays), out / "data" / f"{shard}.parquet")
        for task, table in _labels(stays).items():
            write_parquet(table, out / "labels" / task / f"{shard}.parquet")

    def _texts(self, wanted: set[int] | None = None) -> Iterator[tuple[int, bytes]]:
        """(number, text) of the stays in `wanted`, or of all: of the folder, and of archives not unpacked there."""
        if not self.raw.is_dir():
            raise DataError(f"{self.raw}: no such folder: raw=DIR must hold the challenge's *.psv files")
        there: list[Location] = list(self.raw.iterdir())
        archives = [path for path in sorted(there, key=str) if ".tar" in path.name and not path.name.startswith(".")]
        packed = [path for path in archives if not (self.raw / path.name.split(".tar")[0]).is_dir()]
        for place in (self.raw, *packed):
            for _, number, text in StayFiles(place, ".psv", "p?([0-9]{1,18})", "pNNNNNN", nested=True).texts(wanted):
                yield number, text

    @functools.cached_property
    def stays(self) -> _Stays:
        reading, digest, septic = _Reading(), hashlib.sha256(), {}
        seen: set[int] = set()
        for number, text in self._texts():
            if number in seen:
                raise DataError(f"{self.raw}: two files are of stay {number}: remove one")
            seen.add(number)
            digest.update(f"{number} {len(text)}\n".encode() + text)
            stay = reading.stay(text)
            if stay is not None:
                septic[number] = bool((stay.label_H == 1).any())
        if not septic:
            raise DataError(
                f"{self.raw}: {len(seen)} files *.psv, and no stay in them: put the challenge's training_setA or "
                "training_setA.tar.xz there"
            )
        number_N = np.array(sorted(septic))
        septic_N = np.array([septic[number] for number in number_N.tolist()])
        return _Stays(number_N, septic_N, dict(sorted(reading.counts.items())), digest.hexdigest())


def _events(stays: dict[int, _Stay]) -> pa.Table:
    """MEDS data of stays; of one hour in the order of VARIABLES."""
    numbers, times, codes, values = [], [], [], []  # of each stay, static events first
    for number, stay in stays.items():
        row_E, variable_E = np.nonzero(~np.isnan(stay.value_HV))
        static = len(stay.static)
        codes += [*(code for code, _ in stay.static), _CODE_ID[ADMISSION], *variable_E.tolist()]
        values += [*(value for _, value in stay.static), math.nan, *stay.value_HV[row_E, variable_E].tolist()]
        hours = (stay.hour_H[row_E] * US_PER_HOUR + _ADMITTED_US).tolist()
        times += [*[STATIC_TIME] * static, _ADMITTED_US, *hours]
        numbers += [number] * (static + 1 + len(hours))
    return events_table(np.array(numbers), np.array(times), np.array(codes), np.array(values), CODES)


def _labels(stays: dict[int, _Stay]) -> dict[str, pa.Table]:
    """MEDS labels of each task: one at each hour that has one."""
    now, later = [], []  # of each stay: hours, and what follows
    for stay in stays.values():
        known_H = ~np.isnan(stay.label_H)
        hour_H, label_H = stay.hour_H[known_H], stay.label_H[known_H] > 0.5
        now.append((hour_H, label_H))
        onset = label_H.argmax() if label_H.any() else None
        end = stay.hour_H[-1] if onset is None else hour_H[onset] + EARLY_HOURS
        asked_H = hour_H[(hour_H < end) & (onset != 0)]
        later.append((asked_H, np.full(len(asked_H), onset is not None), (end - asked_H) / 24))
    boolean_L, (cause_L, days_L) = _joined(now)[0], _joined(later)
    return {
        "sepsis": _at_hours(stays, now).append_column("boolean_value", pa.array(boolean_L)),
        "time_to_sepsis": _at_hours(stays, later)
        .append_column("integer_value", pa.array(cause_L.astype(np.int64)))
        .append_column("float_value", pa.array(days_L.astype(np.float32))),
    }


def _joined(columns: Sequence[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """The columns of all stays but the hours."""
    return [np.concatenate(parts) for parts in list(zip(*columns, strict=True))[1:]]


def _at_hours(stays: dict[int, _Stay], columns: Sequence[tuple[np.ndarray, ...]]) -> pa.Table:
    """Subjects and prediction times."""
    hours = [hour_H for hour_H, *_ in columns]
    return pa.table(
        {
            "subject_id": np.repeat(np.array(list(stays)), [len(hour_H) for hour_H in hours]),
            "prediction_time": pa.array(_ADMITTED_US + np.concatenate(hours) * US_PER_HOUR, pa.timestamp("us")),
        }
    )
