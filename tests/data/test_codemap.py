"""Code maps: one name and one unit for what another hospital calls and measures differently."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_meds import BIRTH, Row, config, files, read_back, write_raw, write_table
from small_cohort import write_meds
from small_models import vocabulary_of, write_risk_bundle

import hymate
from hymate.command import load
from hymate.data.codemap import FOLDER, CodeMap
from hymate.data.histories import Histories
from hymate.data.meds import DataError
from hymate.data.prepare import PrepareConfig, prepare
from hymate.errors import UserError
from hymate.evaluate import EvaluateConfig
from hymate.evaluate import run as evaluate
from hymate.explain import ExplainConfig
from hymate.explain import run as explain
from hymate.inference.initial import initial_bundle
from hymate.inference.provenance import provenance, seen
from hymate.predict import PredictConfig
from hymate.predict import run as predict
from hymate.trees import dump_yaml

HEADER = "code,canonical_code,factor,offset,description"
MAP = f"""# a note, with a comma
{HEADER}
Temp F,temperature,0.5,-16,"Temperature, degrees"

TEMP,temperature,,,
HR,heart_rate,,,Beats a minute
HR old,heart_rate,2,,
Nowhere,nowhere,,,
"""
ROWS: dict[str, list[Row]] = {
    "train/0": [
        (1, None, "GENDER//F", None),
        (1, BIRTH, "MEDS_BIRTH", None),
        (1, 10, "Temp F", 106.0),
        (1, 10, "HR old", 40.0),
        (1, 20, "Temp F", None),
        (2, 5, "HR", 90.0),
        (2, 6, "K", 4.0),
    ],
    "held_out/0": [(3, 2, "TEMP", 36.5), (3, 3, "HR", 70.0)],
}
MAPPED = {
    1: [
        (1, None, "GENDER//F", None),
        (1, 10, "temperature", 37.0),
        (1, 10, "heart_rate", 80.0),
        (1, 20, "temperature", None),
    ],
    2: [(2, 5, "heart_rate", 90.0), (2, 6, "K", 4.0)],
    3: [(3, 2, "temperature", 36.5), (3, 3, "heart_rate", 70.0)],
}


def write_map(path: Path, text: str = MAP) -> str:
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------------------------------------------ preparing


def test_codes_become_one_variable_in_one_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = write_raw(tmp_path / "raw", ROWS), tmp_path / "out"
    write_table(pa.table({"code": ["HR", "K"], "description": ["Pulse", "Potassium"]}), raw / "metadata/codes.parquet")
    before = files(raw)
    codes = write_map(tmp_path / "map.csv")
    prepare(config(raw, out, codes=codes))
    assert read_back(out) == MAPPED
    assert files(raw) == before
    described = {row["code"]: row["description"] for row in pq.read_table(out / "metadata/codes.parquet").to_pylist()}
    assert described == {
        "temperature": "Temperature, degrees",
        "heart_rate": "Beats a minute",
        "K": "Potassium",
        "GENDER//F": None,
        "MEDS_BIRTH": None,
    }
    assert (out / "metadata/code_map.csv").read_text() == MAP
    (recorded,) = json.loads((out / "histories/metadata.json").read_text())["codes"]
    assert recorded == {"name": "map.csv", "sha256": CodeMap.read(codes).digest}
    histories, of_map = Histories.open(out), f"map.csv {CodeMap.read(codes).digest}"
    assert histories.inputs == {"data.path": histories.fingerprint, "data.codes": of_map}  # of a run's record
    assert provenance(histories)["codes"] == of_map  # of a bundle
    prepare(config(raw, tmp_path / "plain"))
    plain = Histories.open(tmp_path / "plain")
    assert plain.inputs.keys() == {"data.path"} and "codes" not in provenance(plain)
    assert "6 events of 4 codes are mapped; codes of the map without an event (1): Nowhere" in capsys.readouterr().out
    prepare(config(raw, out, codes=write_map(tmp_path / "noted.csv", "# another note\n" + MAP)))  # nothing to do
    with pytest.raises(UserError, match="prepared from other data or settings"):
        prepare(config(raw, out, codes=write_map(tmp_path / "other.csv", MAP.replace("0.5", "0.25"))))


def test_codes_of_different_units_under_one_name_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: dict[str, list[Row]] = {
        "train/0": [
            (1, n, code, value + n % 7) for n in range(30) for code, value in (("C", 36.0), ("F", 96.0), ("T", 36.5))
        ]
    }
    raw, header = write_raw(tmp_path / "raw", rows), "code,canonical_code,factor,offset\n"
    right = write_map(tmp_path / "right.csv", header + "C,T,,\nF,T,0.5556,-17.78\n")
    prepare(config(raw, tmp_path / "right", codes=right))
    assert "warning" not in capsys.readouterr().out
    prepare(config(raw, tmp_path / "wrong", codes=write_map(tmp_path / "wrong.csv", header + "C,T,,\nF,T,,\n")))
    assert (
        "makes 'T' of codes whose medians, after its factors, go from 39 ('C') to 99 ('F'): are"
        in capsys.readouterr().out
    )


def test_a_map_in_small_pieces_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, codes = write_raw(tmp_path / "raw", ROWS), write_map(tmp_path / "map.csv")
    monkeypatch.setattr("hymate.data.meds.ROWS", 2)
    prepare(config(raw, tmp_path / "out", codes=codes))
    assert read_back(tmp_path / "out") == MAPPED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 must name the columns"),
        ("# nothing\n", "line 1 must name the columns"),
        (f"{HEADER}\n", "names no code"),
        ("code;canonical_code\nA;b\n", "line 1 must name the columns code,canonical_code and perhaps"),
        ("code,canonical_code,unit\nA,b,mg\n", "line 1 must name the columns"),
        ("code,canonical_code,code\nA,b,A\n", "line 1 must name the columns"),
        ("code,factor\nA,2\n", "line 1 must name the columns"),
        (f"{HEADER}\nA,b,1,0\n", "line 2 has 4 fields, not 5: put a text with a comma in quotes"),
        (f"{HEADER}\nA,b,,,Serum, mg\n", "line 2 has 6 fields"),
        (f"{HEADER}\n\n# note\nA,,,,\n", "line 4: both codes must be there"),
        (f"{HEADER}\nA,b ,,,\n", "line 2: both codes must be there, canonical_code without blanks"),
        (f"{HEADER}\nA,b,1,0,\nB,b,,,\nA,c,,,\n", "line 4 is about the code of line 2, 'A': keep one"),
        (f"{HEADER}\nA,b,x,,\n", "line 2: factor must be a finite number such as 0.01, or empty for 1; got 'x'"),
        (f'{HEADER}\nA,b,"0,01",,\n', "line 2: factor must be a finite number"),
        (f"{HEADER}\nA,b,inf,,\n", "line 2: factor must be a finite number"),
        (f"{HEADER}\nA,b,,nan,\n", "line 2: offset must be a finite number"),
        (f"{HEADER}\nA,b,0,,\n", "line 2: a factor of 0 makes all values alike"),
        (f"{HEADER}\nMEDS_BIRTH//x,born,,,\n", "line 2: 'MEDS_BIRTH//x' is MEDS's own code"),
        (f"{HEADER}\nA,b,,,one\nB,b,,,two\n", "line 3 describes 'b' in another way"),
        (f"{HEADER}\nA,b,,,\nb,c,,,\n", "line 2 makes 'b' of a code, and line 3 something else of that"),
        (f'{HEADER}\nA,"b,,,\n', "line 2 is not CSV"),
    ],
)
def test_a_wrong_map_is_refused_in_a_line_before_anything_is_written(tmp_path: Path, text: str, message: str) -> None:
    raw = write_raw(tmp_path / "raw", ROWS)
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        prepare(config(raw, tmp_path / "out", codes=write_map(tmp_path / "map.csv", text)))
    assert message in str(caught.value) and "map.csv" in str(caught.value)
    assert not (tmp_path / "out").exists()


@settings(max_examples=200)
@given(
    st.lists(
        st.lists(st.sampled_from(["A", "b", '"', '""', ",", "1e999", "-2", "\x00", "\r", "\u2028", " "]), max_size=8)
    )
)
def test_any_text_is_a_map_or_refused_in_a_line(lines: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join([HEADER, *map("".join, lines)])
        try:
            found = CodeMap.read(write_map(Path(folder) / "map.csv", text))
        except UserError as error:
            assert str(error).isprintable()
        else:
            assert all(math.isfinite(line.factor) and line.factor != 0 for line in found.lines.values())


def test_a_map_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_bytes(b"\xff\xfe\x00")
    for codes, message in (
        ("no_such_map", r"no_such_map: there is no such file: give PATH\.csv, or one of ours: .*physionet2012"),
        (str(tmp_path / "none.csv"), "there is no such file"),
        (str(tmp_path / "map.csv"), "not a text file"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(config(write_raw(tmp_path / "raw", ROWS), tmp_path / "out", codes=codes))


def test_a_unit_may_change_under_the_same_code(tmp_path: Path) -> None:
    text = f"\ufeff{HEADER}\r\nHR,HR,2,1,\r\nTEMP,HR,,,\r\n"  # as a spreadsheet writes it
    prepare(config(write_raw(tmp_path / "raw", ROWS), tmp_path / "out", codes=write_map(tmp_path / "map.csv", text)))
    assert read_back(tmp_path / "out")[3] == [(3, 2, "HR", 36.5), (3, 3, "HR", 141.0)]


def test_a_factor_that_makes_a_value_too_large_is_refused(tmp_path: Path) -> None:
    codes = write_map(tmp_path / "map.csv", f"{HEADER}\nHR,hr,1e37,,\n")
    with pytest.raises(DataError, match=r"row 5: map\.csv makes a value of 'HR' too large") as caught:
        prepare(config(write_raw(tmp_path / "raw", {"train/0": ROWS["train/0"]}), tmp_path / "out", codes=codes))
    assert "90" not in str(caught.value)


def test_a_map_does_not_take_events_from_the_rules_of_what_is_known_when(tmp_path: Path) -> None:
    """Else a bill would be known at the midnight before, and a stay would not end."""
    for code in ("DIAGNOSIS//ICD//10//I10", "HOSPITAL_DISCHARGE//HOME", "Height"):
        raw = write_raw(tmp_path / code[:5], {"train/0": [(1, 4, "HR", 1.0), (1, 10, code, 2.0)]})
        codes = write_map(tmp_path / "map.csv", f"code,canonical_code\n{code},mine\n")
        with pytest.raises(DataError, match=rf"row 1: a rule of `known` is about '{code}'[^\n]*add a rule"):
            prepare(config(raw, tmp_path / "out", codes=codes))
        kept = write_map(tmp_path / "map.csv", f"code,canonical_code\n{code},{code} of ours\nHR,{code}//x\n")
        prepare(config(raw, tmp_path / f"out-{code[:5]}", codes=kept))
    static = write_raw(tmp_path / "static", {"train/0": [(1, None, "Height", 170.0), (1, 4, "HR", 1.0)]})
    codes = write_map(tmp_path / "map.csv", "code,canonical_code\nHeight,height\n")
    prepare(config(static, tmp_path / "out", codes=codes))  # a static event is known from the start


# ---------------------------------------------------------------------------- a model that was trained elsewhere


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small cohort with other codes and units, and the map to those that models know. No label in its folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    raw = write_meds(folder / "raw")
    for file in (raw / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        value, glucose = table["numeric_value"], pc.equal(table["code"], "LAB//glucose")
        value = pc.if_else(glucose, pc.multiply(value, 4.0), value)
        code = pc.replace_substring(table["code"], "LAB//", "OURS//")
        write_table(pa.table([table["subject_id"], table["time"], code, value.cast(pa.float32())], table.schema), file)
    lines = ["OURS//glucose,LAB//glucose,0.25,", "OURS//marker,LAB//marker,,", "OURS//sodium,LAB//sodium,,"]
    (folder / "map.csv").write_text("\n".join([HEADER.rpartition(",")[0], *lines]) + "\n")
    return raw, folder / "map.csv"


BOTH = {"start_inclusive": True, "end_inclusive": True}
DEFINITION = {
    "predicates": {"lab": {"code": "LAB//glucose", "value_min": 0.5}, "marker": {"code": "LAB//marker"}},
    "trigger": "lab",
    "windows": {
        "input": {"start": None, "end": "trigger", **BOTH, "index_timestamp": "end"},
        "target": {"start": "input.end", "end": "start + 12h", **BOTH, "start_inclusive": False, "label": "marker"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["given", "extracted"])
def test_a_model_of_elsewhere_predicts_our_codes(
    labels: str, elsewhere: tuple[Path, Path], small_data: Path, tmp_path: Path
) -> None:
    raw, codes = elsewhere
    theirs = write_meds(tmp_path / "theirs")
    ours = shutil.copytree(raw, tmp_path / "ours")
    bundle = write_risk_bundle(tmp_path / "bundle", vocabulary_of(small_data), context=24, seed=1)
    first, more = ["task=readmission"], [f"bundle={bundle}", f"out={tmp_path / 'p.parquet'}", "workers=1"]
    if labels == "extracted":
        for folder in (theirs, ours):
            shutil.rmtree(folder / "labels")
        (tmp_path / "own/task").mkdir(parents=True)
        (tmp_path / "own/task/mine.yaml").write_text(dump_yaml({"name": "readmission", "definition": DEFINITION}))
        first = ["--config-dir", str(tmp_path / "own"), "task=mine"]

    def predicted(data: Path, *overrides: str) -> pa.Table:
        predict(load("predict", [*first, f"data.path={data}", *more, *overrides], PredictConfig))
        return pq.read_table(tmp_path / "p.parquet")

    as_they_are, mapped = predicted(theirs), predicted(ours, f"codes={codes}")
    assert mapped.num_rows == as_they_are.num_rows > 20
    risk = "predicted_boolean_probability"
    assert mapped.drop_columns([risk]).equals(as_they_are.drop_columns([risk]))
    np.testing.assert_allclose(mapped[risk].to_numpy(), as_they_are[risk].to_numpy(), atol=1e-6)
    prepare(config(ours, tmp_path / "prepared", codes=str(codes)))
    np.testing.assert_allclose(predicted(tmp_path / "prepared")[risk].to_numpy(), mapped[risk].to_numpy(), atol=1e-6)
    with pytest.raises(UserError, match="is prepared, and codes are mapped when a dataset is prepared"):
        predicted(tmp_path / "prepared", f"codes={codes}")
    events = pa.concat_tables(pq.read_table(file) for file in sorted((ours / "data").rglob("*.parquet")))
    in_memory = hymate.load(bundle, "cpu", codes).predict(events, at=mapped.select(["subject_id", "prediction_time"]))
    np.testing.assert_allclose(in_memory[risk].to_numpy(), mapped[risk].to_numpy(), atol=1e-6)
    if labels == "given":
        with pytest.raises(UserError, match="none of the codes that the bundle knows"):
            predicted(ours)


@pytest.mark.slow
def test_states_of_another_map_are_not_used(elsewhere: tuple[Path, Path], small_data: Path, tmp_path: Path) -> None:
    raw, codes = elsewhere
    bundle = write_risk_bundle(tmp_path / "bundle", vocabulary_of(small_data))
    given = ["task=readmission", f"bundle={bundle}", f"data.path={raw}", f"out={tmp_path / 'p.parquet'}", "context=all"]
    given += [f"states={tmp_path / 'states'}"]
    predict(load("predict", [*given, f"codes={codes}"], PredictConfig))
    other = write_map(tmp_path / "other.csv", codes.read_text().replace("0.25", "0.5"))
    with pytest.raises(UserError, match="holds the states of another bundle, code map or version"):
        predict(load("predict", [*given, f"codes={other}"], PredictConfig))


@pytest.mark.slow
def test_a_model_of_elsewhere_is_explained_and_evaluated_on_our_codes(
    elsewhere: tuple[Path, Path], small_data: Path, tmp_path: Path
) -> None:
    raw, codes = elsewhere
    bundle = write_risk_bundle(tmp_path / "bundle", vocabulary_of(small_data), seed=1)
    found = {}
    for name, data, more in (("theirs", write_meds(tmp_path / "theirs"), []), ("ours", raw, [f"codes={codes}"])):
        out = tmp_path / name / "explained"
        given = ["task=readmission", f"bundle={bundle}", f"data.path={data}", "workers=1", *more]
        explain(load("explain", [*given, f"out={out}", "num_predictions=6", "num_subjects=1"], ExplainConfig))
        evaluate(load("evaluate", [*given, f"out={tmp_path / name / 'evaluated'}"], EvaluateConfig))
        results = json.loads((tmp_path / name / "evaluated" / "results.json").read_text())
        assert results.pop("data") == str(data)
        found[name] = pq.read_table(out / "variables.parquet").sort_by("code").to_pydict(), results
        assert not [path for path in tmp_path.rglob(".*") if path.is_dir()], "a copy of patient data stays"
    (theirs, scored), (ours, scored_here) = found["theirs"], found["ours"]
    assert ours["code"] == theirs["code"] and "LAB//glucose" in ours["code"]
    np.testing.assert_allclose(ours["mean_abs_attribution"], theirs["mean_abs_attribution"], atol=1e-5)
    for model, of in scored["models"].items():
        assert scored_here["models"][model]["brier"] == pytest.approx(of["brier"], abs=1e-6)


# ---------------------------------------------------------------------------------------------- the maps that ship


@pytest.mark.parametrize("name", ["physionet2012", "physionet2019", "mimic_iv_demo"])
def test_a_map_that_ships_is_chosen_by_its_name_or_path(name: str) -> None:
    by_name = CodeMap.read(name)
    assert by_name == CodeMap.read(str(FOLDER / f"{name}.csv"))
    given = ["source=meds", "raw=R", "out=O", f"codes={name}"]
    assert load("prepare", given, PrepareConfig).codes == name
    assert set(by_name.descriptions) == {line.canonical for line in by_name.lines.values()}, "each has a unit"


def test_the_maps_that_ship_describe_a_variable_in_one_way() -> None:
    texts: dict[str, set[str]] = {}
    for file in FOLDER.glob("*.csv"):
        for canonical, text in CodeMap.read(file.stem).descriptions.items():
            texts.setdefault(canonical, set()).add(text)
    assert {canonical: found for canonical, found in texts.items() if len(found) > 1} == {}


@pytest.mark.slow
def test_the_maps_that_ship_make_the_real_datasets_one(shared_data: Path, tmp_path: Path) -> None:
    """No unit contradicts another after mapping, and each pair shares as many measured variables as it can, which a
    thousand stays of a split, at most, show.
    """
    names = ["physionet2012", "physionet2019", "mimic_iv_demo"]
    demo, places = shared_data / "mimic_iv_demo_meds", {}
    for name in names[:2]:
        if not (shared_data / name).is_dir():
            pytest.skip(f"no {name}/ in the real data")
        places[name] = str(tmp_path / name)
        prepare(PrepareConfig(name, places[name], str(shared_data / name), workers=1))  # type: ignore[arg-type]
        made = initial_bundle("icu").extra, Histories.open(places[name])
        assert seen(*made) == "same split", "the bundle that ships knows whom it learned from"
        for file in Path(places[name]).glob("data/*/*.parquet"):
            if file.stem != "0":
                file.unlink()
    raw = [*places.values(), str(demo)]
    prepare(PrepareConfig("meds", str(tmp_path / "all"), raw, list(names), names, workers=1))
    metadata = json.loads((tmp_path / "all/histories/metadata.json").read_text())
    assert metadata["contradictions"] == []
    measured = []
    for place, name in enumerate(names):
        files = sorted((tmp_path / "all/data" / str(place)).rglob("*.parquet"))
        events = pa.concat_tables([pq.read_table(file, columns=["code", "numeric_value"]) for file in files])
        found = set(events.filter(pc.is_valid(events["numeric_value"]))["code"].unique().to_pylist())
        assert not found & (CodeMap.read(name).lines.keys()), "a code of the map is left"
        measured.append(found & CodeMap.read(name).descriptions.keys())
    (p12, p19, mimic), of_2019 = measured, CodeMap.read("physionet2019").descriptions.keys()
    assert of_2019 - p19 == {"end_tidal_co2"}, "the only variable of the maps that is nowhere measured"
    assert [len(p12 & p19), len(p12 & mimic), len(p19 & mimic), len(p12 & p19 & mimic)] == [21, 36, 29, 20]
    assert {"fio2", "temperature", "glucose", "creatinine", "magnesium"} <= p12 & p19 & mimic
    assert "troponin_i" in p12 & p19 and "troponin_t" in p12 & mimic and "troponin_t" not in p19
    # as they are, percents and Fahrenheit contradict fractions and Celsius, in a part of the stays, too
    wrong = (FOLDER / "mimic_iv_demo.csv").read_text().replace("0.55555556,-17.7777778", ",").replace(",0.01,", ",,")
    maps: list[str | None] = [names[0], write_map(tmp_path / "wrong.csv", wrong)]
    for split in ("tuning", "held_out"):
        (Path(raw[0]) / "data" / split / "0.parquet").unlink()
    prepare(PrepareConfig("meds", str(tmp_path / "wrong"), [raw[0], raw[2]], maps, workers=1))
    found_wrong = json.loads((tmp_path / "wrong/histories/metadata.json").read_text())["contradictions"]
    assert {each["code"] for each in found_wrong} == {"fio2", "temperature"}
