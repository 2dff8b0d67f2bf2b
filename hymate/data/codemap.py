"""Code maps: one name and one unit for what several hospitals call and measure differently.

A map is a CSV file (UTF-8). Its first line names the columns; lines that begin with # are notes.

    code            a code of the dataset, as it stands there
    canonical_code  the code that takes its place
    factor, offset  the new value is value * factor + offset; empty for 1 and 0
    description     of the canonical code, with its unit; may be left out

A map is applied once, before anything else reads an event: rules of what becomes known when, tasks and models see the
canonical codes alone. Codes that are not in it stay as they are.

Shape legend: R rows of a batch, K codes that occur in it.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import meds
import numpy as np
import pyarrow as pa

from hymate.config import SHIPPED_NAME
from hymate.data.known import KnownConfig
from hymate.data.meds import DataError, Named, is_code
from hymate.errors import UserError
from hymate.runs import CONFIGS
from hymate.storage.paths import Location, locate

COLUMNS = ("code", "canonical_code", "factor", "offset", "description")
MAX_BYTES = 64 << 20
FOLDER = CONFIGS / "codes"  # the maps that ship


class Line(NamedTuple):
    """What becomes of a code."""

    canonical: str
    factor: float
    offset: float


@dataclass(frozen=True)
class CodeMap:
    """A code map that has been read; it pickles.

    name: of its file. text: what the file holds. lines: by code. descriptions: of canonical codes. late: codes that it
    must not rename where they have a time, because a rule of what becomes known when is about them and would not find
    the canonical code.
    """

    name: str
    text: str
    lines: Mapping[str, Line]
    descriptions: Mapping[str, str]
    late: frozenset[str] = frozenset()

    @classmethod
    def read(cls, place: str) -> CodeMap:
        """A user's map (PATH.csv), or one that ships, by its name. Raises UserError (one line) for a wrong one."""
        path: Location = FOLDER / f"{place}.csv" if re.fullmatch(SHIPPED_NAME, place) else locate(place)
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.csv")))
            raise UserError(f"codes={place}: there is no such file: give PATH.csv, or one of ours: {names}")
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError
            text = path.read_bytes().decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a text file (UTF-8) of at most {MAX_BYTES >> 20} MiB") from error
        return cls(path.name, text, *_parsed(path, text))

    @property
    def digest(self) -> str:
        """Of all that it does; notes and the order of its lines don't count."""
        all_of_it = sorted(self.lines.items()), sorted(self.descriptions.items())
        return hashlib.sha256(repr(all_of_it).encode()).hexdigest()

    @functools.cached_property
    def variables(self) -> dict[str, str]:
        """The canonical code of each code, and of each canonical one that is no other's old name: itself."""
        named = {code: line.canonical for code, line in self.lines.items()}
        return {canonical: canonical for canonical in named.values()} | named

    def under(self, known: KnownConfig) -> CodeMap:
        """The same map, which refuses to take events from the rules of what becomes known when."""
        codes, canonical = list(self.lines), [line.canonical for line in self.lines.values()]
        late = set()
        for old, new in zip(_roles(known, codes), _roles(known, canonical), strict=True):
            if old[1:] != new[1:] and any(old[1:]):
                late.add(old[0])
        return replace(self, late=frozenset(late))

    def apply(
        self, batch: pa.RecordBatch, named: Named, first_row: int = 0, found: Counter[str] | None = None
    ) -> pa.RecordBatch:
        """The same rows with canonical codes (strings) and their values.

        batch: has `time`, `code` and perhaps `numeric_value`; its first row is `first_row` of what errors call `named`.
        found: counts the events of each code of the map.
        Raises DataError for an event that the map must not rename, and for a value that does not fit a float32.
        """
        code = batch.column("code")
        code = code if isinstance(code, pa.DictionaryArray) else code.dictionary_encode()
        names = code.dictionary.to_pylist()
        line_K = [self.lines.get(name) for name in names]
        place_R = code.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
        if found is not None:
            counts = np.bincount(place_R, minlength=len(names) + 1).tolist()
            found.update({name: n for name, line, n in zip(names, line_K, counts, strict=False) if line})
        self._refuse_late(names, place_R, batch.column("time"), named, first_row)
        canonical = pa.array([line.canonical if line else name for line, name in zip(line_K, names, strict=True)])
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns["code"] = canonical.cast(pa.string()).take(code.indices)
        if "numeric_value" in columns and any(line and line[1:] != (1, 0) for line in line_K):
            factor_K, offset_K = (
                np.array([*(line[k] if line else empty for line in line_K), empty]) for k, empty in ((1, 1.0), (2, 0.0))
            )
            value = columns["numeric_value"]
            value_R = value.cast(pa.float64()).fill_null(math.nan).to_numpy(zero_copy_only=False)
            with np.errstate(over="ignore"):
                new_R = (value_R * factor_K[place_R] + offset_K[place_R]).astype(np.float32)
            lost = np.flatnonzero(np.isinf(new_R) & np.isfinite(value_R))
            if len(lost):
                raise DataError(
                    f"{named}: row {first_row + lost[0]}: {self.name} makes a value of {names[place_R[lost[0]]]!r:.80} "
                    "too large for a float32: correct its factor"
                )
            columns["numeric_value"] = pa.array(new_R, mask=value.is_null().to_numpy(zero_copy_only=False))
        return pa.RecordBatch.from_pydict(columns)

    def apply_to_table(self, table: pa.Table, named: Named) -> pa.Table:
        """`apply` for a whole table, some of a file's rows in any order."""
        batches = [self.apply(batch, named) for batch in table.combine_chunks().to_batches()]
        return pa.Table.from_batches(batches) if batches else table

    def _refuse_late(self, names: list[str], place_R: np.ndarray, time: pa.Array, named: Named, first_row: int) -> None:
        late_K = np.array([name in self.late for name in names] + [False])
        if late_K.any():
            rows = np.flatnonzero(late_K[place_R] & time.is_valid().to_numpy(zero_copy_only=False))
            if len(rows):
                code = names[place_R[rows[0]]]
                raise DataError(
                    f"{named}: row {first_row + rows[0]}: a rule of `known` is about {code!r:.80}, and none like it "
                    f"about {self.lines[code].canonical!r:.80}, by which {self.name} replaces it: leave this code out "
                    "of the map, or add a rule"
                )


def _roles(known: KnownConfig, codes: list[str]) -> Iterator[tuple[str, object, bool, bool]]:
    """Of each code how it is treated by the rules, and whether it begins or ends a stay."""
    begin, end = map(set, known.stays(codes))
    for code, treatment in zip(codes, known.treatment(codes), strict=True):
        yield code, treatment, code in begin, code in end


def _parsed(path: Location, text: str) -> tuple[dict[str, Line], dict[str, str]]:
    """The lines by code, and the descriptions of canonical codes. Raises UserError that names the first wrong one."""
    rows = _rows(path, text)
    number, header = next(rows, (1, []))
    unknown = [name for name in header if name not in COLUMNS or header.count(name) > 1]
    if unknown or not {"code", "canonical_code"} <= set(header):
        raise UserError(
            f"{path}: line {number} must name the columns code,canonical_code and perhaps factor,offset,description, "
            "with commas between them"
        )
    lines: dict[str, Line] = {}
    line_of: dict[str, int] = {}
    descriptions: dict[str, str] = {}
    for number, row in rows:
        where = f"{path}: line {number}"
        if len(row) != len(header):
            raise UserError(f"{where} has {len(row)} fields, not {len(header)}: put a text with a comma in quotes")
        of = dict(zip(header, row, strict=True))
        code, canonical = of["code"], of["canonical_code"]
        if not code or not canonical or canonical != canonical.strip():
            raise UserError(f"{where}: both codes must be there, canonical_code without blanks around it")
        if code in lines:
            raise UserError(f"{where} is about the code of line {line_of[code]}, {code!r:.80}: keep one of them")
        if is_code(code, meds.birth_code) or is_code(code, meds.death_code):
            raise UserError(f"{where}: {code!r:.80} is MEDS's own code and keeps its name: remove the line")
        factor = _number(where, "factor", of.get("factor", ""), 1)
        offset = _number(where, "offset", of.get("offset", ""), 0)
        if factor == 0:
            raise UserError(f"{where}: a factor of 0 makes all values alike: correct it, or leave it empty for 1")
        description = of.get("description", "").strip()
        if description and descriptions.setdefault(canonical, description) != description:
            raise UserError(f"{where} describes {canonical!r:.80} in another way than a line before: use one text")
        lines[code], line_of[code] = Line(canonical, factor, offset), number
    if not lines:
        raise UserError(f"{path}: names no code: add lines code,canonical_code")
    for code, line in lines.items():
        if line.canonical != code and lines.get(line.canonical, line).canonical != line.canonical:
            raise UserError(
                f"{path}: line {line_of[code]} makes {line.canonical!r:.80} of a code, and line "
                f"{line_of[line.canonical]} something else of that: maps are applied once, so name the last in both"
            )
    return lines, descriptions


def _rows(path: Location, text: str) -> Iterator[tuple[int, list[str]]]:
    """The number and fields of each line, without notes and empty lines."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip(" ,\n") and not line.startswith("#"):
            try:
                (row,) = csv.reader([line], strict=True)
            except csv.Error as error:
                raise UserError(f"{path}: line {number} is not CSV ({error}): correct its quotes") from error
            yield number, row


def _number(where: str, name: str, text: str, empty: float) -> float:
    try:
        number = float(text) if text.strip() else float(empty)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {name} must be a finite number such as 0.01, or empty for {empty}; got {text!r:.40}")
    return number
