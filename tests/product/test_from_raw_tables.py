"""The recipes of docs/from_raw_tables.md: their tables are written, their commands run, what they print is compared.

Each recipe installs its extractor into an environment of its own, as the page says: meds_etl needs another `meds` than
we do, and MEDS-Extract would load its pytest plugins into all of our tests. The environments stay beside our own
(`sys.prefix`), so that only the first run pays for them.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT

from hymate.data.histories import Histories

EXTRACTORS = Path(sys.prefix) / "extractors"
PAGE = (ROOT / "docs" / "from_raw_tables.md").read_text()
COPIES = 10  # of the page's two patients
SHIFTS = {"patient_id": 2, "person_id": 2, "stay_id": 1000, "visit_occurrence_id": 1000}  # from one copy to the next
pytestmark = pytest.mark.slow


def test_the_csv_recipe(tmp_path: Path) -> None:
    follow("CSV tables", tmp_path)
    histories = Histories.open(str(tmp_path / "data" / "hospital"))
    sizes = {split: len(histories.positions(split)) for split in histories.splits}
    assert sizes == {"train": 16, "tuning": 2, "held_out": 2}
    assert histories.known_events["billing"] == {"moved": 3 * COPIES, "left_out": 0}
    static, events = prepared(histories, subject=1)
    assert static == {"SEX//F"}
    assert events[:2] == [
        ("2021-05-03T14:20:00", "HOSPITAL_ADMISSION//EMERGENCY", None),
        ("2021-05-03T15:02:00", "LAB//CREATININE//mg/dL", 1.4),
    ]
    assert ("2021-06-08T11:00:00", "DIAGNOSIS//ICD//10//I50.9", None) in events  # 30 days after the discharge


def test_the_omop_recipe(tmp_path: Path) -> None:
    follow("OMOP", tmp_path)
    histories = Histories.open(str(tmp_path / "data" / "omop"))
    assert len(histories) == 2 * COPIES
    assert histories.known_events == {
        "billing": {"moved": 2 * COPIES, "left_out": 0},
        "death_dates": {"moved": 0, "left_out": 0},
        "clinic_dates": {"moved": 0, "left_out": 0},
        "dates": {"moved": COPIES, "left_out": 0},  # of what meds_etl takes from midnights
    }
    static, events = prepared(histories, subject=1)
    assert static == {"Gender/F", "Race/5", "Ethnicity/Not Hispanic"}
    assert events[:2] == [
        ("2021-05-03T14:20:00", "HOSPITAL_ADMISSION//Visit/IP", None),
        ("2021-05-03T15:02:00", "LOINC/2160-0//mg/dL", 1.4),
    ]
    days = 6 + 11 / 24  # from the diagnosis' stamp to the end of the stay
    assert ("2021-06-08T11:00:00", "CONDITION//ICD10CM/I50.9", round(days, 3)) in events
    _, events = prepared(histories, subject=2)
    assert ("2020-02-11T00:00:00", "LOINC/2160-0//<0.2", None) in events


def prepared(histories: Histories, subject: int) -> tuple[set[str], list[tuple[str, str, float | None]]]:
    """A subject's static codes, and the events by the time at which they became known: time, code, value."""
    (history,) = histories.read(np.flatnonzero(histories.index.subject_id_P == subject))
    times = history.time.astype("datetime64[us]").astype("datetime64[s]")
    values = [None if np.isnan(value) else round(float(value), 3) for value in history.value]
    codes = [histories.codes[code] for code in history.code]
    events = list(zip(map(str, times), codes, values, strict=True))
    return {histories.codes[code] for code in history.static_code}, events


def follow(section: str, folder: Path) -> None:
    """Do what a section of the page says, block after block."""
    printed = ""
    for name, kind, text in blocks(section):
        if kind == "bash" and "pip install" in text:
            install(text)
        elif kind == "bash":
            printed = run(text, folder)
        elif kind == "text":
            assert sorted(printed.strip().splitlines()) == sorted(text.strip().splitlines())
        else:
            assert name, f"no file is named for this block:\n{text}"
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(more_patients(text) if kind == "csv" else text)


def blocks(section: str) -> Iterator[tuple[str, str, str]]:
    """Of a section's code blocks: the file named in the line before ("" if none is), the language, the text."""
    found = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert found, f"the page has no section {section!r}"
    for match in re.finditer(r"(?:^`([\w./]+)`\n\n)?^```(\w+)\n(.*?)^```", found[1], flags=re.DOTALL | re.MULTILINE):
        yield match[1] or "", match[2], match[3]


def more_patients(table: str) -> str:
    """The page's rows, and copies of them under other ids; a table without patients stays as it is."""
    rows = list(csv.DictReader(io.StringIO(table)))
    if not SHIFTS.keys() & rows[0].keys():
        return table
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for copy in range(COPIES):
        shifts = {name: copy * shift for name, shift in SHIFTS.items() if name in rows[0]}
        writer.writerows({**row, **{name: int(row[name]) + shift for name, shift in shifts.items()}} for row in rows)
    return out.getvalue()


def install(script: str) -> None:
    """Run the page's commands that install an extractor, unless these very ones have been run before."""
    EXTRACTORS.mkdir(exist_ok=True)
    with (EXTRACTORS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = EXTRACTORS / f"{hashlib.sha256(script.encode()).hexdigest()[:16]}.installed"
        if done.exists():
            return
        try:
            run(script, EXTRACTORS, PIP_RETRIES="1", PIP_TIMEOUT="10", PIP_DISABLE_PIP_VERSION_CHECK="1")
        except AssertionError as error:
            if "Retrying (Retry(" in str(error):  # pip could not connect
                pytest.skip("the package index is out of reach, and the extractor is not yet installed")
            raise
        done.touch()


def run(script: str, folder: Path, **settings: str) -> str:
    """What a block of the page prints, in a shell whose `python` is ours and whose ~ is where the extractors are."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **settings}
    command = ["bash", "-euo", "pipefail", "-c", script.replace("~/", f"{EXTRACTORS}/")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout
