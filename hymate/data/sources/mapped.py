"""A source whose codes are replaced by those of a code map, in the MEDS data that it writes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hymate.data.codemap import CodeMap
from hymate.data.histories import FOLDER, WORK
from hymate.data.meds import (
    DATA_SCHEMA,
    Source,
    aligned_events,
    codes_table,
    read_batches,
    read_small,
    write_parquet,
)
from hymate.data.statistics import units_differ
from hymate.storage.paths import Location, atomic_path, write_text

CODE_MAP = "metadata/code_map.csv"  # the map, as it was given
FOUND = f"{FOLDER}/{WORK}/code_map"  # of each shard how often it has which codes of the map, and some of their values
MOST_VALUES = 200  # of a code in a shard that becomes one variable with another
SHOWN = 10  # codes that a line names at most


@dataclass(frozen=True)
class Rewritten:
    """Another source, whose shards are changed once they are written."""

    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    def shards(self) -> list[str]:
        return self.source.shards()

    def counts(self) -> dict[str, int]:
        return self.source.counts()


@dataclass(frozen=True)
class Mapped(Rewritten):
    """Another source, with a code map applied to each shard once it is written."""

    codes: CodeMap

    def fingerprint(self) -> str:
        made_of = f"{self.source.fingerprint()} {self.codes.digest} {sorted(self.codes.late)}"
        return hashlib.sha256(made_of.encode()).hexdigest()

    def write_shard(self, shard: str, out: Location) -> None:
        self.source.write_shard(shard, out)
        found, values = Counter[str](), dict[str, list[float]]()
        first_row, path = 0, out / meds.data_subdirectory / f"{shard}.parquet"

        def mapped(batch: pa.RecordBatch) -> pa.Table:
            nonlocal first_row
            mapped = self.codes.apply(batch, f"{meds.data_subdirectory}/{shard}.parquet", first_row, found)
            first_row += len(batch)
            self._sample(batch.column("code"), mapped.column("numeric_value"), values)
            return pa.Table.from_batches([mapped])

        rewrite((mapped(batch) for batch in read_batches(path, DATA_SCHEMA.names, path)), path)
        write_text(json.dumps([found, values]), out / FOUND / f"{shard}.json")

    def _sample(self, code: pa.Array, value: pa.Array, values: dict[str, list[float]]) -> None:
        """Add the first new values of each code that becomes one variable with another."""
        code = code.dictionary_encode() if not isinstance(code, pa.DictionaryArray) else code
        place_R = code.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        value_R = value.to_numpy(zero_copy_only=False)
        for place, name in enumerate(code.dictionary.to_pylist()):
            if name in self.codes.joined and len(own := values.setdefault(name, [])) < MOST_VALUES:
                own_R = value_R[place_R == place]
                own += own_R[~np.isnan(own_R)][: MOST_VALUES - len(own)].tolist()

    def finish(self, out: Location) -> None:
        self.source.finish(out)
        found, values = Counter[str](), defaultdict[str, list[float]](list)
        for shard in self.shards():
            of_shard, its_values = json.loads((out / FOUND / f"{shard}.json").read_text())
            found.update(of_shard)
            for code, own in its_values.items():
                values[code] += own
        self._describe(out / meds.code_metadata_filepath, found)
        write_text(self.codes.text, out / CODE_MAP)
        absent = [code for code in self.codes.lines if not found[code]]
        line = f"{self.codes.name}: {found.total():,} events of {len(self.codes.lines) - len(absent)} codes are mapped"
        if absent:
            more = ", ..." if len(absent) > SHOWN else ""
            line += f"; codes of the map without an event ({len(absent)}): {', '.join(absent[:SHOWN])}{more}"
        print(line, flush=True)
        self._compare(values)

    def _compare(self, values: Mapping[str, list[float]]) -> None:
        """Point out codes that become one variable and seem to have different units."""
        of_variable = defaultdict[str, dict[str, list[float]]](dict)
        for code in sorted(values):
            if values[code]:
                of_variable[self.codes.joined[code]][code] = values[code]
        for variable, of_codes in sorted(of_variable.items()):
            if units_differ(list(of_codes.values())):
                medians = ", ".join(f"{code!r:.80} {np.median(own):g}" for code, own in list(of_codes.items())[:SHOWN])
                print(
                    f"warning: {self.codes.name} makes {variable!r:.80} of codes with different medians ({medians}): "
                    "are the units the same? Their factors can mend it",
                    flush=True,
                )

    def _describe(self, path: Location, found: Counter[str]) -> None:
        """Have the canonical codes in metadata/codes.parquet, with their descriptions, and not those they replace."""
        codes = read_small(path, meds.CodeMetadataSchema)
        canonical = dict.fromkeys(line.canonical for code, line in self.codes.lines.items() if found[code])
        new = codes_table({code: self.codes.descriptions.get(code) for code in canonical})
        replaced = pa.array([*self.codes.lines, *canonical], pa.string())
        others = codes.filter(pc.invert(pc.is_in(codes["code"], replaced)))
        write_parquet(pa.concat_tables([others, new], promote_options="default"), path)


def rewrite(tables: Iterable[pa.Table], path: Location) -> None:
    """Write events in pieces, atomically, to the file of a shard, perhaps the one that they are read from."""
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, DATA_SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in tables:
            writer.write_table(aligned_events(table, path))
