"""A prepared dataset of many patients that is an index and nothing else: its histories' files are not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prepared_rows import CODES

from hymate.data.index import INDEX_SCHEMA

PER_GROUP, GROUPS = 131, 400  # patients of a row group, as 2,000 events each would fill it; row groups of a shard
SPLITS = (("held_out", 0.1), ("train", 0.8), ("tuning", 0.1))


def write_index(root: Path, num_patients: int) -> Path:
    """Patients of 1 to 4,000 events, every hundredth without any, in shards of one split each."""
    folder = root / "histories"
    folder.mkdir(parents=True)
    rng, sizes, first = np.random.default_rng(0), {}, 0
    with pq.ParquetWriter(folder / "index.parquet", INDEX_SCHEMA, compression="zstd") as writer:
        for split, fraction in SPLITS:
            stop, number, events = min(num_patients, first + round(num_patients * fraction)), 0, 0
            sizes[split] = {"subjects": stop - first}
            while first < stop:
                N = min(PER_GROUP * GROUPS, stop - first)
                # ids all over the place, each once: an odd factor permutes the integers modulo a power of two
                subject_id_N = np.arange(first, first + N) * 0x9E3779B1 % (1 << 40)
                num_events_N = rng.integers(1, 4001, N, dtype=np.int32)
                num_events_N[::100] = 0
                place_N = np.arange(N, dtype=np.int32)
                shard = pa.DictionaryArray.from_arrays(np.zeros(N, np.int32), [f"{split}/{number}"])
                of_split = pa.DictionaryArray.from_arrays(np.zeros(N, np.int32), [split])
                columns = [subject_id_N, of_split, shard, place_N // PER_GROUP, place_N % PER_GROUP, num_events_N]
                writer.write_table(pa.table(columns, INDEX_SCHEMA.names).cast(INDEX_SCHEMA))
                first, number, events = first + N, number + 1, events + int(num_events_N.sum())
            sizes[split]["events"] = events
    codes = pa.table({"code": CODES, "id": pa.array(range(len(CODES)), pa.int32())})
    pq.write_table(codes, folder / "vocabulary.parquet")
    metadata = {"format_version": 1, "source": "test", "fingerprint": "0", "splits": sizes}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return root


def own_mib() -> float:
    """This process's memory that no other shares, and the pages of files that no other has looked at, MiB."""
    return sum(_kib(name) for name in ("Private_Clean", "Private_Dirty")) / 1024


def written_mib() -> float:
    """This process's memory that is in no file, MiB: what the machine can't take back."""
    return _kib("Anonymous") / 1024


def _kib(name: str) -> int:
    lines = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
