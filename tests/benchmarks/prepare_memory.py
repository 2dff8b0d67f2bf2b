"""Peak memory and speed of `hymate.data.prepare`: python tests/benchmarks/prepare_memory.py [--subjects N] [--dir DIR]

Prepares a synthetic cohort of at least 20 million events, then the same events again as a MEDS dataset that is one
shard of one row group, the hardest layout to stream. Prints, for each, the peak resident memory of every process
(the command and its workers) and the events per second, of wall time and of processor time (what one process does
on a machine of its own). Needs Linux (/proc) and about 3 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_MIB = 1536


def descendants(pid: int) -> list[int]:
    """A process and its children's children, as far as they are alive."""
    found = [pid]
    for parent in found:
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, tasks.read_text().split())
            except OSError:
                continue
    return found


def peak_mib(pid: int) -> float:
    """A process's highest resident memory so far; 0 for one that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def processor_seconds() -> float:
    """Of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(*overrides: str) -> tuple[float, float, dict[int, float]]:
    """Run the command; its seconds, its processor seconds, and the peak MiB of each of its processes."""
    started, processor = time.monotonic(), processor_seconds()
    command = [sys.executable, "-m", "hymate.data.prepare", *overrides]
    process = subprocess.Popen(command, cwd=ROOT)
    peaks: dict[int, float] = {}
    while process.poll() is None:
        for pid in descendants(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), peak_mib(pid))
        time.sleep(0.02)
    if process.returncode:
        sys.exit(process.returncode)
    return time.monotonic() - started, processor_seconds() - processor, peaks


def merge_shards(prepared: Path, raw: Path) -> None:
    """The same dataset with all shards in one row group of one file."""
    (raw / "data").mkdir(parents=True)
    shutil.copytree(prepared / "metadata", raw / "metadata")
    tables = [pq.read_table(path) for path in sorted((prepared / "data").rglob("*.parquet"))]
    table = pa.concat_tables(tables)
    pq.write_table(table, raw / "data" / "0.parquet", compression="zstd", row_group_size=table.num_rows)


def report(name: str, measured: tuple[float, float, dict[int, float]], out: Path, workers: int) -> bool:
    """Print a line; whether every process kept the limit."""
    seconds, processor, peaks = measured
    metadata = json.loads((out / "histories" / "metadata.json").read_text())
    events = sum(split["events"] for split in metadata["splits"].values())
    highest = ", ".join(f"{peak:.0f}" for peak in sorted(peaks.values(), reverse=True))
    print(
        f"{name}: {events / 1e6:.1f} M events in {seconds:.0f} s with {workers} workers ({events / seconds / 1e6:.2f} "
        f"M events/s; {events / processor / 1e6:.2f} M events per processor second); "
        f"peak resident MiB per process: {highest} (limit {LIMIT_MIB})",
        flush=True,
    )
    return max(peaks.values()) <= LIMIT_MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=10_500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=None, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        out, raw, again = (Path(folder) / name for name in ("synthetic", "one_shard", "again"))
        workers = f"workers={arguments.workers}"
        measured = measure("source=synthetic", f"synthetic.subjects={arguments.subjects}", workers, f"out={out}")
        small = report("synthetic source", measured, out, arguments.workers)
        merge_shards(out, raw)
        measured = measure("source=meds", f"raw={raw}", workers, f"out={again}")
        small &= report("meds source, one shard of one row group", measured, again, arguments.workers)
    sys.exit(0 if small else 1)


if __name__ == "__main__":
    main()
