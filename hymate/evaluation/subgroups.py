"""Groups of patients: by age at the prediction, sex, and any static codes that a user names.

A patient with several codes of a kind belongs to each of their groups.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from hymate.data.examples import Examples
from hymate.data.histories import Histories
from hymate.data.meds import US_PER_YEAR
from hymate.errors import ConfigError

SEX = r"(?i)^(gender|sex)(?![a-z])"
AGE = re.compile(r"(?i)^age(//|$)")  # a static event with the age in years, where a dataset has no births
UNKNOWN = "not recorded"


def subgroups(
    histories: Histories, examples: Examples, patterns: Sequence[str], age_bands: Sequence[int]
) -> dict[str, dict[str, np.ndarray]]:
    """Kind of group -> name -> which examples belong to it, bool (E,); kinds of which nothing is recorded are left out.

    patterns: regular expressions of static codes, one kind each. age_bands: where a new band of ages begins, in years.
    Raises ConfigError where a pattern matches no static code of these patients.
    """
    kinds = {"sex": SEX, **{pattern: pattern for pattern in patterns}}
    wanted = {kind: {i for i, code in enumerate(histories.codes) if re.search(p, code)} for kind, p in kinds.items()}
    age_codes = {i for i, code in enumerate(histories.codes) if AGE.search(code)}
    position_P, patient_E = np.unique(examples.position_E, return_inverse=True)
    codes_P, born_P, age_P = [], np.full(len(position_P), np.nan), np.full(len(position_P), np.nan)
    for p, position in enumerate(position_P):  # one by one: histories are cached, not all held at once
        (history,) = histories.read([position])
        codes_P.append(set(history.static_code.tolist()))
        born_P[p] = np.nan if history.birth_time is None else history.birth_time
        stated = zip(history.static_code.tolist(), history.static_value.tolist(), strict=True)
        age_P[p] = next((value for code, value in stated if code in age_codes), np.nan)

    age_E = (examples.prediction_time_E - born_P[patient_E]) / US_PER_YEAR
    age_E = np.where(np.isnan(age_E), age_P[patient_E], age_E)
    groups = {"age": _bands(age_E, age_bands)}
    for kind, wanted_codes in wanted.items():
        present = sorted(set().union(*codes_P) & wanted_codes, key=lambda code: histories.codes[code])
        members = {histories.codes[code]: np.array([code in own for own in codes_P])[patient_E] for code in present}
        groups[kind] = _with_unknown(members, len(examples))
    for pattern in patterns:
        if not groups[pattern]:
            known = sorted({histories.codes[code] for code in set().union(*codes_P)})
            codes = f"among them are {', '.join(known[:5])}" if known else "there are none"
            raise ConfigError(f"report.subgroups: no static code matches {pattern!r} (of held-out patients {codes})")
    return {kind: members for kind, members in groups.items() if members}


def _bands(age_E: np.ndarray, starts: Sequence[int]) -> dict[str, np.ndarray]:
    names = [f"under {starts[0]}"]
    names += [f"{low} to {high - 1}" for low, high in itertools.pairwise(starts)]
    names.append(f"{starts[-1]} and over")
    known_E = ~np.isnan(age_E)
    band_E = np.digitize(age_E, starts)
    bands = {name: known_E & (band_E == band) for band, name in enumerate(names)}
    return _with_unknown({name: own_E for name, own_E in bands.items() if own_E.any()}, len(age_E))


def _with_unknown(members: Mapping[str, np.ndarray], num_examples: int) -> dict[str, np.ndarray]:
    """With a group of those who are in none, if anyone is in one."""
    if not members:
        return {}
    rest_E = ~np.any(list(members.values()), axis=0)
    return {**members, UNKNOWN: rest_E} if rest_E.any() else dict(members)
