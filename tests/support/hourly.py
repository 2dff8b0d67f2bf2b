"""Stays as PhysioNet 2019 has them: a file each, a line an hour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hymate.data.meds import SplitsConfig
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.sources.physionet2019 import COLUMNS

HELD_OUT = SplitsConfig(0, 0, 1)
STATIC = {"Age": "83.14", "Gender": "0", "Unit1": "NaN", "Unit2": "NaN", "HospAdmTime": "-0.03"}
Line = dict[str, str]


def hour(number: int, label: int | str = 0, **values: object) -> Line:
    """A line of a file: column -> text."""
    given = {name: str(value) for name, value in values.items()}
    return STATIC | given | {"ICULOS": str(number), "SepsisLabel": str(label)}


def text(lines: Iterable[Line], columns: Iterable[str] = COLUMNS, end: str = "\n") -> bytes:
    """A file."""
    columns = list(columns)
    rows = [columns, *([line.get(name, "NaN") for name in columns] for line in lines)]
    return "".join("|".join(row) + end for row in rows).encode()


def write(raw: Path, files: Mapping[int, bytes], folder: str = "training_setA") -> Path:
    """Files by their stays' numbers, in a folder of `raw`."""
    (raw / folder).mkdir(parents=True, exist_ok=True)
    for number, content in files.items():
        (raw / folder / f"p{number:06d}.psv").write_bytes(content)
    return raw


def converted(raw: Path, out: Path, splits: SplitsConfig = HELD_OUT) -> Path:
    """The prepared dataset."""
    settings = {"source": "physionet2019", "raw": str(raw), "out": str(out), "workers": 1, "splits": splits}
    prepare(PrepareConfig(**settings))  # type: ignore[arg-type]
    return out
