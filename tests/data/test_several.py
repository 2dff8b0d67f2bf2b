"""Several MEDS datasets as one: ids kept apart, splits and labels carried, units that contradict each other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_meds import ROWS, Row, config, files, read_back, write_raw, write_table

from hymate.command import load
from hymate.data.histories import Histories
from hymate.data.label_files import read_labels
from hymate.data.meds import DataError
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.sources.several import PLACES, original
from hymate.errors import ConfigError
from hymate.runs import absolute

OTHER: dict[str, list[Row]] = {
    "train/0": [(1, None, "GENDER//M", None), (1, 4, "Pulse", 40.0), (7, 9, "K", 4.0)],
    "tuning/a/b": [(2, 3, "Pulse", 45.0)],
}


def several(first: Path, second: Path, out: Path, **changes: Any) -> PrepareConfig:
    return PrepareConfig("meds", str(out), [str(first), str(second)], workers=1, **changes)


def write_labels(raw: Path, subjects: list[int]) -> None:
    times = pa.array([10] * len(subjects), pa.timestamp("us"))
    table = pa.table(
        {"subject_id": subjects, "prediction_time": times, "boolean_value": [s % 2 == 1 for s in subjects]}
    )
    write_table(table, raw / "labels" / "t" / "0.parquet")
    write_table(table.select([0, 1]).append_column("start", times), raw / "labels" / "t" / "0.extra.pq")


def test_two_datasets_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, out = write_raw(tmp_path / "A"), write_raw(tmp_path / "B", OTHER), tmp_path / "out"
    write_labels(first, [1, 4])
    write_labels(second, [1])
    before = files(first), files(second)
    (tmp_path / "map.csv").write_text("code,canonical_code,factor\nPulse,HR,2\nK,nothing,\n")
    monkeypatch.setattr("hymate.data.meds.ROWS", 3)  # subjects lie in several pieces
    prepare(several(first, second, out, codes=[None, str(tmp_path / "map.csv")], origins=["north", "south"]))
    assert (files(first), files(second)) == before
    found = read_back(out)
    assert found == {
        **{
            row[0] * 100: [(row[0] * 100, None, "ORIGIN//north", None)]
            + [(row[0] * 100, *rest) for _, *rest in own if rest[1] != "MEDS_BIRTH"]
            for own in ([r for rows in ROWS.values() for r in rows if r[0] == s] for s in (1, 2, 3, 4, 5))
            for row in own[:1]
        },
        101: [
            (101, None, "ORIGIN//south", None),
            (101, None, "GENDER//M", None),
            (101, 4, "HR", 80.0),
        ],
        701: [(701, None, "ORIGIN//south", None), (701, 9, "nothing", 4.0)],
        201: [(201, None, "ORIGIN//south", None), (201, 3, "HR", 90.0)],
    }
    histories = Histories.open(out)
    splits = {
        s: {histories.index.subject_id_P[p] for p in histories.positions(s)} for s in ("train", "tuning", "held_out")
    }
    assert splits == {"train": {100, 200, 300, 101, 701}, "tuning": {400, 201}, "held_out": {500}}
    labels = read_labels(out / "labels" / "t").sort_by("subject_id").to_pydict()
    assert labels["subject_id"] == [100, 101, 400] and labels["boolean_value"] == [True, True, False]
    assert len(labels["start"]) == 3 and None not in labels["start"]
    metadata = json.loads((out / "histories/metadata.json").read_text())
    assert metadata["datasets"] == ["north", "south"] and metadata["codes"][0] is None
    assert metadata["codes"][1]["name"] == "map.csv"
    assert (out / "metadata/code_map-1.csv").is_file() and not (out / "metadata/code_map-0.csv").exists()
    assert not (out / "histories/.work").exists()
    vocabulary = pq.read_table(out / "histories/vocabulary.parquet").to_pydict()
    counts = dict(zip(vocabulary["code"], vocabulary["count"], strict=True))
    assert counts["HR"] == 4 and counts["ORIGIN//south"] == 2, "statistics are of the training subjects of both"


def test_without_names_there_is_no_static_code_and_splits_are_drawn_where_there_are_none(tmp_path: Path) -> None:
    first, second = write_raw(tmp_path / "A"), write_raw(tmp_path / "B", OTHER, with_splits=False)
    prepare(several(first, second, tmp_path / "out"))
    histories = Histories.open(tmp_path / "out")
    assert not [code for code in histories.codes if code.startswith("ORIGIN")]
    assert len(histories) == 8
    assert json.loads((tmp_path / "out/histories/metadata.json").read_text())["datasets"] == ["A", "B"]


def test_what_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = write_raw(tmp_path / "A"), write_raw(tmp_path / "B", OTHER)
    prepare(several(first, second, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr("hymate.data.prepare.count_shard", lambda *_, **__: os.kill(os.getpid(), 2))
        with pytest.raises(KeyboardInterrupt):
            prepare(several(first, second, tmp_path / "out"))
    prepare(several(first, second, tmp_path / "out"))
    assert read_back(tmp_path / "out") == read_back(tmp_path / "whole")


@given(st.integers(-(2**56), 2**56), st.integers(0, PLACES - 1))
def test_the_rule_of_ids_is_reversible(subject_id: int, place: int) -> None:
    assert original(subject_id * PLACES + place) == (place, subject_id)


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    large = write_raw(tmp_path / "B", {"train/0": [(2**62, 1, "HR", 1.0)]})
    with pytest.raises(DataError, match=r"a subject_id has more than 16 digits[^\n]*number the subjects"):
        prepare(several(write_raw(tmp_path / "A"), large, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["raw=[]"], "raw must be 1 to 100 datasets, each once"),
        (["raw=[A,A]"], "raw must be 1 to 100 datasets, each once"),
        (["raw=[A,B]", "codes=[a.csv]"], r"codes must have an entry for each dataset in raw=\[DIR,DIR\]"),
        (["raw=A", "codes=[a.csv]"], "codes must have an entry for each dataset"),
        (["raw=A", "origins=[north]"], "origins must have an entry for each dataset"),
        (["raw=[A,B]", "origins=[north,north]"], "origins must be different names"),
        (["raw=[A,B]", "origins=[a//b,c]"], "origins must be different names of letters"),
        (["raw=[A,B]", "source=physionet2012"], "source must be meds where raw names several datasets"),
        (["raw=[A,[B]]"], r"raw\[1\] must be text"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{message}"):
        load("prepare", ["source=meds", "out=O", *settings], PrepareConfig)


def test_lists_are_read_from_the_command_line_and_become_absolute() -> None:
    given = ["source=meds", "out=O", "raw=[A,/b/c]", "codes=[m.csv,physionet2012]", "origins=[x,y]"]
    found = absolute(load("prepare", given, PrepareConfig))
    assert found.raw == [str(Path("A").absolute()), "/b/c"]
    assert found.codes == [str(Path("m.csv").absolute()), "physionet2012"]
    assert load("prepare", ["source=meds", "out=O", "raw=[A,B]", "codes=[null,m.csv]"], PrepareConfig).codes == [
        None,
        "m.csv",
    ]


def test_units_that_contradict_each_other_are_pointed_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Glucose in mmol/L and mg/dL, a temperature in Celsius and Fahrenheit; not a base excess about 0."""
    rng = np.random.default_rng(0)
    normal = {
        "glucose": ((7.0, 2.0), (126.0, 36.0)),
        "temperature": ((37.0, 0.6), (98.6, 1.1)),
        "base_excess": ((0.1, 4.0), (-1.0, 4.0)),
        "heart_rate": ((80.0, 15.0), (95.0, 20.0)),
    }
    for place, name in enumerate("AB"):
        rows: list[Row] = []
        for subject in range(40):
            for time, (code, values) in enumerate(normal.items()):
                rows.append((subject, time, code, float(rng.normal(*values[place]))))
            if place and subject < 10:
                rows.append((subject, 9, "rare", 1.0))
            elif not place:
                rows.append((subject, 9, "rare", 1000.0))
        write_raw(tmp_path / name, {"train/0": rows})
    prepare(several(tmp_path / "A", tmp_path / "B", tmp_path / "out", origins=["north", "south"]))
    said = capfd.readouterr().err
    found = {each["code"]: each["medians"] for each in _metadata(tmp_path / "out")["contradictions"]}
    assert found.keys() == {"glucose", "temperature"}
    assert found["glucose"] == [pytest.approx(7, abs=1), pytest.approx(126, abs=20)]
    north, south = found["glucose"]
    assert f"warning: glucose: its median is {north:g} in north and {south:g} in south: are the units the same?" in said
    (tmp_path / "map.csv").write_text(
        "code,canonical_code,factor,offset\nglucose,glucose,0.0555,\ntemperature,temperature,0.55556,-17.7778\n"
    )
    codes = [None, str(tmp_path / "map.csv")]
    prepare(several(tmp_path / "A", tmp_path / "B", tmp_path / "mapped", codes=codes))
    assert _metadata(tmp_path / "mapped")["contradictions"] == []
    prepare(config(tmp_path / "A", tmp_path / "one"))
    assert "contradictions" not in _metadata(tmp_path / "one")


def _metadata(out: Path) -> dict[str, Any]:
    return json.loads((out / "histories/metadata.json").read_text())
