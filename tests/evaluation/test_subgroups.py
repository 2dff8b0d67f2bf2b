"""Who belongs to which group: ages at the prediction, sexes, named static codes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hymate.config import ReportConfig
from hymate.data.examples import Examples, labelled_examples
from hymate.data.histories import Histories
from hymate.data.meds import DATA_SCHEMA, codes_table, write_metadata, write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.errors import ConfigError
from hymate.evaluation.subgroups import subgroups

YEAR_US = 31_557_600_000_000
BIRTHS = {1: 1950, 2: 1980, 3: 2015}
STATIC = {
    1: [("GENDER//F", None), ("RACE//A", None), ("RACE//B", None)],
    2: [("GENDER//M", None), ("RACE//B", None)],
    3: [],
    4: [("GENDER//F", None), ("Age//years", 50.0)],  # no birth, but an age
    5: [("GENDERLESS//X", None)],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Histories, Examples]:
    """Five patients with a visit in 2020 each; the first has a prediction before and one after turning 65 (2015)."""
    folder = tmp_path_factory.mktemp("groups")
    rows, labels = [], []
    for subject in range(1, 6):
        rows += [{"subject_id": subject, "time": None, "code": code, "numeric_value": v} for code, v in STATIC[subject]]
        years = ([BIRTHS[subject]] if subject in BIRTHS else []) + ([2010, 2020] if subject == 1 else [2020])
        codes = ["MEDS_BIRTH//HOME" if subject == 2 else "MEDS_BIRTH"] * (subject in BIRTHS) + ["VISIT"] * 2
        events = list(zip(years, codes, strict=False))
        rows += [{"subject_id": subject, "time": (y - 1970) * YEAR_US, "code": code} for y, code in events]
        labels += [(subject, (y - 1970) * YEAR_US) for y, code in events if code == "VISIT"]
    write_parquet(pa.Table.from_pylist(rows, DATA_SCHEMA), folder / "raw" / "data" / "held_out" / "0.parquet")
    splits = [{"subject_id": subject, "split": "held_out"} for subject in range(1, 6)]
    codes = sorted({row["code"] for row in rows})
    write_metadata(
        folder / "raw", {"dataset_name": "groups"}, pa.Table.from_pylist(splits), codes_table(dict.fromkeys(codes))
    )
    prepare(PrepareConfig(source="meds", raw=str(folder / "raw"), out=str(folder / "data"), workers=1))
    histories = Histories.open(folder / "data")
    subject_id, time = zip(*labels, strict=True)
    table = pa.table({"subject_id": subject_id, "prediction_time": pa.array(time, pa.timestamp("us"))})
    return histories, labelled_examples(histories, table, "held_out")


def members(groups: dict[str, np.ndarray], examples: Examples) -> dict[str, list[int]]:
    return {name: examples.subject_id_E[own].tolist() for name, own in groups.items()}


def test_ages_are_those_at_the_prediction(data: tuple[Histories, Examples]) -> None:
    found = subgroups(*data, [], [18, 65])
    assert members(found["age"], data[1]) == {
        "under 18": [3],
        "18 to 64": [1, 2, 4],
        "65 and over": [1],
        "not recorded": [5],
    }


def test_sexes_and_named_codes(data: tuple[Histories, Examples]) -> None:
    found = subgroups(*data, ["^RACE//"], [65])
    assert list(found) == ["age", "sex", "^RACE//"]
    assert members(found["sex"], data[1]) == {"GENDER//F": [1, 1, 4], "GENDER//M": [2], "not recorded": [3, 5]}
    assert members(found["^RACE//"], data[1]) == {
        "RACE//A": [1, 1],
        "RACE//B": [1, 1, 2],  # who has both is in both
        "not recorded": [3, 4, 5],
    }


def test_a_pattern_that_matches_nothing_is_refused(data: tuple[Histories, Examples]) -> None:
    with pytest.raises(ConfigError, match=r"report\.subgroups: no static code matches '\^WARD' .*GENDER//F") as refused:
        subgroups(*data, ["^WARD"], [65])
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"report\.subgroups"):
        subgroups(*data, ["VISIT"], [65])  # a code, but no static one
    with pytest.raises(ConfigError, match=r"^subgroups: '\(' is not a regular expression"):
        ReportConfig(subgroups=["("])
    with pytest.raises(ConfigError, match=r"^age_bands"):
        ReportConfig(age_bands=[65, 18])
