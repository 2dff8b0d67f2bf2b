"""When events become known, where that is later than their stamp.

Datasets stamp some events earlier than anybody knew them: billing codes at the midnight of their day or at the
discharge, though coders assign them weeks later; whatever has a date but no time of day at 00:00. A history must hold
each event, in order, at the time at which it became known: then every prefix of it is what was known at its end.

Rules say so, by code. They are applied once, when histories are written. The MEDS data keep their stamps, and labels
are extracted from those.

Shape legend: R rows of whole subjects, K of them those of one rule and subject, A admissions, D discharges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hymate.config import check
from hymate.data.meds import LAST_TIME, STATIC_TIME, US_PER_DAY, US_PER_HOUR, Events, is_code
from hymate.errors import ConfigError

NEVER = np.iinfo(np.int64).max  # the time of an event that does not become known
MAX_DELAY_HOURS = 100 * 8766.0  # a century


@dataclass(frozen=True)
class KnownRule:
    """When the events of some codes become known.

    codes: a regular expression (RE2, so it takes no look-ahead), found anywhere in a code.
    when: "stamp", their own time; "end_of_day", the midnight that ends the day of their stamp; "end_of_stay", the
        discharge that ends the stay of their stamp (see `ends_of_stays`); "never", which leaves them out of histories,
        those without a time too.
    delay_hours: so many hours after that.
    at_midnight: only events stamped at 00:00, which have a date and no time of day.
    """

    codes: str
    when: Literal["stamp", "end_of_day", "end_of_stay", "never"] = "stamp"
    delay_hours: float = 0.0
    at_midnight: bool = False

    def __post_init__(self) -> None:
        _require_pattern("codes", self.codes)
        check(self, delay_hours=(0 <= self.delay_hours <= MAX_DELAY_HOURS, f"must be in [0, {MAX_DELAY_HOURS:g}]"))


@dataclass(frozen=True)
class KnownConfig:
    """When events become known, by rules.

    rules: by name; of those that match an event the first one counts. Births are under no rule, and events without a
        time under "never" alone. Each rule has `codes`, `when`, `delay_hours` and `at_midnight`.
    admission: regular expression of the codes that begin a stay.
    discharge: regular expression of the codes that end a stay.
    """

    rules: dict[str, KnownRule] = field(default_factory=dict)
    admission: str = r"^HOSPITAL_ADMISSION(//|$)"
    discharge: str = r"^HOSPITAL_DISCHARGE(//|$)"

    def __post_init__(self) -> None:
        _require_pattern("admission", self.admission)
        _require_pattern("discharge", self.discharge)

    def treatment(self, codes: Sequence[str]) -> list[Any]:
        """How the events of each code are treated: equal under two configurations that treat them alike."""
        stays = [_matches(pattern, codes) for pattern in (self.admission, self.discharge)]
        bounds = tuple(tuple(np.flatnonzero(matches_C).tolist()) for matches_C in stays)
        matches = {name: _matches(rule.codes, codes) for name, rule in self.rules.items()}
        treatments = []
        for c, code in enumerate(codes):
            steps: list[Any] = []
            for name, rule in self.rules.items():
                if matches[name][c] and not is_code(code, meds.birth_code):
                    stay = bounds if rule.when == "end_of_stay" else ()
                    steps.append((rule.when, rule.delay_hours, rule.at_midnight, stay))
                    if not rule.at_midnight:
                        break
            while steps and steps[-1][:2] == ("stamp", 0):
                steps.pop()
            treatments.append(steps)
        return treatments

    def late(self, codes: Sequence[str]) -> list[str]:
        """Those of the codes whose events become known later than their stamp, whatever their time of day."""
        treatments = zip(codes, self.treatment(codes), strict=True)
        return [code for code, steps in treatments if any(not at_midnight for _, _, at_midnight, _ in steps)]

    def stays(self, codes: Sequence[str]) -> tuple[list[str], list[str]]:
        """Those of the codes that begin a stay, and those that end one."""
        begin, end = (
            [code for code, matches in zip(codes, _matches(pattern, codes), strict=True) if matches]
            for pattern in (self.admission, self.discharge)
        )
        return begin, end


def differing(one: KnownConfig, other: KnownConfig, codes: Sequence[str]) -> list[str]:
    """Those of a dataset's codes whose events become known at other times under the other configuration."""
    pairs = zip(codes, one.treatment(codes), other.treatment(codes), strict=True)
    return [code for code, first, second in pairs if first != second]


def sentences(known: KnownConfig, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A sentence for each rule that moved events of a dataset or left some out."""
    return [
        f"{name}: {', '.join(done)}"
        for name, of in counts.items()
        if (done := _done(known.rules[name], of["moved"], of["left_out"]))
    ]


def _done(rule: KnownRule, moved: int, left_out: int) -> list[str]:
    delay = f"{rule.delay_hours:g} hours after " if rule.delay_hours else ""
    base = f"{'the end of ' if rule.when.startswith('end') else ''}their {rule.when.removeprefix('end_of_')}"
    why = "" if rule.when == "never" else " (not known within the record)"
    done = [f"{moved:,} events moved to {delay}{base}"] if moved else []
    return done + ([f"{left_out:,} events left out{why}"] if left_out else [])


class KnownTimes:
    """Gives events the times at which they become known.

    limit: of subject ids (R,) the times at which their records are cut (R,); what would become known from then on does
        not. None where none is.
    counts: by rule, how many events were "moved" and how many "left_out" so far.
    """

    def __init__(self, known: KnownConfig, limit: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        self.counts = {name: Counter(moved=0, left_out=0) for name in known.rules}
        self._known, self._limit = known, limit
        patterns = [*(rule.codes for rule in known.rules.values()), known.admission, known.discharge]
        self._matches_C: dict[str, np.ndarray] = {pattern: np.zeros(0, bool) for pattern in patterns}
        self._num_codes = 0

    def apply(self, events: Events, code_ids: Mapping[str, int]) -> Events:
        """Whole subjects' events, sorted by the time at which they become known, NEVER (and last) where they don't; of
        those at one time, the order stays. code_ids: numbers the codes, in its order.

        An event without a value that "end_of_stay" moves gets as value the days from its stamp to that end: its new
        time alone would not show when it was.
        """
        self._classify(list(code_ids)[self._num_codes :])
        time_R, value_R = events.time_R.copy(), events.value_R.copy()
        midnight_R = events.time_R % US_PER_DAY == 0
        free_R = np.ones(len(events), bool)
        for name, rule in self._known.rules.items():
            chosen_R = free_R & self._matches_C[rule.codes][events.code_R] & (midnight_R | (not rule.at_midnight))
            free_R &= ~chosen_R
            if rule.when != "never":
                chosen_R &= events.time_R != STATIC_TIME
            rows = np.flatnonzero(chosen_R)
            stamp_R = events.time_R[rows]
            base_R = self._base(rule, events, rows)
            if rule.when == "end_of_stay":
                lasts_R = np.isnan(value_R[rows]) & (base_R > stamp_R) & (base_R < LAST_TIME)
                value_R[rows[lasts_R]] = (base_R[lasts_R] - stamp_R[lasts_R]) / US_PER_DAY
            known_R = np.minimum(base_R, LAST_TIME) + round(rule.delay_hours * US_PER_HOUR)
            left_out_R = known_R >= (self._limit(events.subject_id_R[rows]) if self._limit else LAST_TIME)
            time_R[rows] = np.where(left_out_R, NEVER, known_R)
            self.counts[name]["moved"] += int((~left_out_R & (known_R != stamp_R)).sum())
            self.counts[name]["left_out"] += int(left_out_R.sum())
        if np.array_equal(time_R, events.time_R):
            return events
        starts = events.starts
        subject_R = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(events)))
        order = np.lexsort((time_R, subject_R))
        columns = (events.subject_id_R, time_R, events.code_R, value_R)
        return Events(*(column_R[order] for column_R in columns), first_row=events.first_row)

    def _classify(self, codes: list[str]) -> None:
        """Take in codes that were not seen before."""
        if codes:
            births = np.array([is_code(code, meds.birth_code) for code in codes])
            for pattern, known_C in self._matches_C.items():
                self._matches_C[pattern] = np.concatenate([known_C, _matches(pattern, codes) & ~births])
            self._num_codes += len(codes)

    def _base(self, rule: KnownRule, events: Events, rows: np.ndarray) -> np.ndarray:
        """When the events of `rows` become known by a rule without its delay."""
        stamp_R = events.time_R[rows]
        if rule.when == "stamp":
            return stamp_R
        if rule.when == "end_of_day":
            return _end_of_day(stamp_R)
        base_R = np.full(len(rows), NEVER)
        if rule.when == "never" or not len(rows):
            return base_R
        starts = np.append(events.starts, len(events))
        timed_R = events.time_R != STATIC_TIME
        bounds = [
            np.flatnonzero(self._matches_C[pattern][events.code_R] & timed_R)
            for pattern in (self._known.admission, self._known.discharge)
        ]
        first = np.searchsorted(starts, rows, side="right") - 1
        for own in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(first)) + 1):
            low, high = starts[first[own[0]]], starts[first[own[0]] + 1]
            times = [events.time_R[found[slice(*np.searchsorted(found, (low, high)))]] for found in bounds]
            base_R[own] = ends_of_stays(stamp_R[own], *times)
        return base_R


def ends_of_stays(stamp_K: np.ndarray, admission_A: np.ndarray, discharge_D: np.ndarray) -> np.ndarray:
    """When the stay of each stamp ends (int64, microseconds), from one subject's sorted admissions and discharges.

    A stamp is in a stay if it is that of a discharge, if the last admission up to it is not followed by a discharge
    before it, or if a stay begins or ends later on its day (a stamp at 00:00 is that of a whole day). The stay ends at
    the first discharge at or after the stamp; NEVER where the record has none, for then it is not known. A stamp
    outside of all stays ends with its day.

    None of this depends on what the record holds after the time that is returned.
    """
    none_before = np.iinfo(np.int64).min
    admitted = np.concatenate([[none_before], admission_A, [NEVER]])
    discharged = np.concatenate([[none_before + 1], discharge_D, [NEVER]])
    at_A = np.searchsorted(admission_A, stamp_K, side="right")
    at_D = np.searchsorted(discharge_D, stamp_K, side="left")
    next_discharge_K, day_K = discharged[at_D + 1], _end_of_day(stamp_K)
    in_stay_K = (next_discharge_K == stamp_K) | (admitted[at_A] >= discharged[at_D])
    in_stay_K |= np.minimum(admitted[at_A + 1], next_discharge_K) <= day_K
    return np.where(in_stay_K, next_discharge_K, day_K)


def _end_of_day(stamp_R: np.ndarray) -> np.ndarray:
    return (stamp_R // US_PER_DAY + 1) * US_PER_DAY


def _matches(pattern: str, codes: Sequence[str]) -> np.ndarray:
    """Which codes a regular expression is found in; RE2 takes linear time, and bundles from anywhere bring theirs."""
    return np.asarray(pc.match_substring_regex(pa.array(codes, pa.string()), pattern), dtype=bool)


def _require_pattern(key: str, pattern: str) -> None:
    try:
        _matches(pattern, [""])
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{key} must be a regular expression (RE2), got {pattern!r}") from error
