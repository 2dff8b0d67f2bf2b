"""What preparing and streaming a dataset cost for each event: the unit costs of docs/cluster.md's table.

    python tests/benchmarks/scale.py DIR [--subjects 80000] [--steps raw prepare stream subjects]

raw: a synthetic cohort, written as MEDS and prepared, for its MEDS files; prepare: these files prepared as a user's
are (source=meds); stream: the loader gives one epoch of the prepared dataset's training split, in one process. Prints
for each its wall and processor time, bytes and the peak resident memory of its processes. subjects: what the splits
of half a million subjects and of 2 million take in the process that makes arrays of them, and in the others; what the
index takes is measured by patients.py. DIR keeps the data: delete it yourself. 80,000 subjects are 163 million events,
of which an epoch shows 104 million, and 4 GB. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from loader import epoch_speed, open_rows, resident_mib
from patients import answers
from prepare_memory import measure, peak_mib
from prepared_rows import events_per_epoch

from hymate.data.histories import Splits


def num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def size(prepared: Path) -> tuple[int, int]:
    """Subjects and events of a prepared dataset."""
    splits = json.loads((prepared / "histories" / "metadata.json").read_text())["splits"].values()
    return sum(split["subjects"] for split in splits), sum(split["events"] for split in splits)


def prepare(out: Path, *overrides: str) -> None:
    seconds, processor, peaks = measure(*overrides, f"out={out}", f"workers={os.cpu_count()}")
    num_subjects, num_events = size(out)
    meds_bytes, index_bytes = num_bytes(out / "data"), (out / "histories" / "index.parquet").stat().st_size
    history_bytes = num_bytes(out / "histories") - index_bytes
    print(
        f"{overrides[0]}: {num_subjects:,} subjects, {num_events:,} events in {seconds:.0f} s, {processor:.0f} s of "
        f"processor time: {processor / num_events * 1e6:.2f} us an event\n"
        f"  bytes an event: MEDS {meds_bytes / num_events:.2f}, histories {history_bytes / num_events:.2f}; index "
        f"{index_bytes / num_subjects:.1f} bytes a subject\n"
        f"  peak resident MiB of its processes: {', '.join(f'{peak:.0f}' for peak in sorted(peaks.values())[::-1])}",
        flush=True,
    )


def stream(results: Connection, prepared: Path) -> None:
    torch.set_num_threads(1)
    before = resident_mib()
    rows = open_rows(prepared, "train", context=8192, budget=16384)
    opened = resident_mib() - before
    per_second, per_cpu_second, memory = epoch_speed(rows, epoch=0)
    num_events = events_per_epoch(rows)
    speed = num_events / per_second, num_events / per_cpu_second
    results.send((num_events, *speed, before, opened, memory, peak_mib(os.getpid())))


def splits_of(out: Path, num_subjects: int) -> Path:
    """A dataset's splits, of so many subjects, and nothing else."""
    ids = pa.array(range(num_subjects), pa.int64())
    split = pa.array(["train"] * num_subjects, pa.string())
    (out / "metadata").mkdir(parents=True)
    pq.write_table(pa.table({"subject_id": ids, "split": split}), out / "metadata" / "subject_splits.parquet")
    return out


def hold(results: Connection, folder: Path) -> None:
    """Resident MiB in the end and at most, without those before."""
    before = resident_mib()
    kept = Splits(folder, beside=folder / "made")
    results.send((resident_mib() - before, peak_mib(os.getpid()) - before))
    del kept


def subjects(folder: Path) -> None:
    sizes = (500_000, 2_000_000)
    datasets = [splits_of(folder / f"splits-{size}", size) for size in sizes]
    for process in ("the first process of a host", "another process"):
        needed = [answers(hold, 1, dataset)[0] for dataset in datasets]
        for size, (held, peak) in zip(sizes, needed, strict=True):
            print(f"splits in {process}, {size:,} subjects: {held:.0f} MiB held, {peak:.0f} at most")
        held, peak = ((more - less) * 2**20 / (sizes[1] - sizes[0]) for less, more in zip(*needed, strict=True))
        print(f"  {held:.0f} bytes a subject held, {peak:.0f} at most", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--subjects", type=int, default=80_000)
    steps = ["raw", "prepare", "stream", "subjects"]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps)
    options = parser.parse_args()
    raw, prepared = options.folder / "raw", options.folder / "prepared"
    if "raw" in options.steps:
        prepare(raw, "source=synthetic", f"synthetic.subjects={options.subjects}")
    if "prepare" in options.steps:
        prepare(prepared, "source=meds", f"raw={raw}")
    if "stream" in options.steps:
        ((num_events, wall, cpu, before, opened, memory, peak),) = answers(stream, 1, prepared)
        print(
            f"stream: {num_events:,} training events in {wall:.0f} s, {cpu:.0f} s of processor time: "
            f"{cpu / num_events * 1e6:.2f} us an event\n"
            f"  resident MiB: {before:.0f} before, {opened:.0f} more when opened, "
            f"{', '.join(f'{mib:.0f}' for mib in memory)} at the epoch's quarters, at most {peak:.0f}"
        )

    if "subjects" in options.steps:
        subjects(options.folder)


if __name__ == "__main__":
    main()
