"""A source whose codes are replaced by those of a code map, in the MEDS data that it writes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    decode,
    read_batches,
    read_small,
    write_parquet,
)
from hymate.data.statistics import CodeStatistics, contradictions_within
from hymate.storage.paths import Location, atomic_path, files_below, readable, write_text

CODE_MAP = "metadata/code_map.csv"  # the map, as it was given
FOUND = f"{FOLDER}/{WORK}/code_map"  # of each shard which codes of the map it has, and how often
VALUES = f"{FOLDER}/{WORK}/code_map_values"  # of each shard the statistics of the new values, by the codes of before
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
        found, statistics = Counter[str](), CodeStatistics()
        first_row, path = 0, out / meds.data_subdirectory / f"{shard}.parquet"

        def mapped(batch: pa.RecordBatch) -> pa.Table:
            nonlocal first_row
            events = decode(batch, statistics.code_ids, first_row, path)
            mapped = self.codes.apply(batch, f"{meds.data_subdirectory}/{shard}.parquet", first_row, found)
            first_row += len(batch)
            value_R = mapped.column("numeric_value").fill_null(np.nan).to_numpy()
            counts_C = np.array([code in self.codes.variables for code in statistics.code_ids], bool)
            statistics.add(replace(events, value_R=value_R), counts_C[events.code_R], shard)
            return pa.Table.from_batches([mapped])

        rewrite((mapped(batch) for batch in read_batches(path, DATA_SCHEMA.names, path)), path)
        write_parquet(statistics.table().filter(pc.field("count") > 0), out / VALUES / f"{shard}.parquet")
        write_text(json.dumps(found), out / FOUND / f"{shard}.json")

    def finish(self, out: Location) -> None:
        self.source.finish(out)
        found, statistics = Counter[str](), CodeStatistics()
        for shard in self.shards():
            found.update(json.loads((out / FOUND / f"{shard}.json").read_text()))
        for values in files_below(out / VALUES, ".parquet").values():
            statistics.merge(pq.read_table(readable(values)))
        self._describe(out / meds.code_metadata_filepath, found)
        write_text(self.codes.text, out / CODE_MAP)
        absent = [code for code in self.codes.lines if not found[code]]
        line = f"{self.codes.name}: {found.total():,} events of {len(self.codes.lines) - len(absent)} codes are mapped"
        if absent:
            more = ", ..." if len(absent) > SHOWN else ""
            line += f"; codes of the map without an event ({len(absent)}): {', '.join(absent[:SHOWN])}{more}"
        print(line, flush=True)
        for variable, medians in contradictions_within(statistics.vocabulary(), self.codes.variables).items():
            (low, first), *_, (high, last) = sorted((median, code) for code, median in medians.items())
            print(
                f"warning: {self.codes.name} makes {variable!r:.80} of codes whose medians, after its factors, go from "
                f"{low:.4g} ({first!r:.80}) to {high:.4g} ({last!r:.80}): are the units the same? Correct the factors",
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
