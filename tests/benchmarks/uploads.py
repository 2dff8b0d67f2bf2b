"""How long pretraining waits for checkpoints that go to an S3-compatible server on this machine; what checksums cost.

    python tests/benchmarks/uploads.py DATA_DIR [--checkpoints N] [--every STEPS] [key=value ...]

Runs pretrain/run.py with its runs at the server; key=value are its further settings. Prints a Markdown row: the size of
a checkpoint, seconds between two, the fraction of them that training stood still, that fraction if it waited for the
upload (the last checkpoint is sent once more, with nothing else going on), and the checksums' milliseconds a megabyte,
of checking that checkpoint. The first stall is left out: it has no checkpoint before it that may still be on its way.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from commands import ROOT, points
from s3 import BUCKET, environment, serving

from hymate.storage.paths import UrlPath, local_copy, locate, upload_files
from hymate.training import checkpoint
from hymate.training.keeper import Kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared dataset")
    parser.add_argument("--checkpoints", type=int, default=11)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    options, settings = parser.parse_known_args()
    steps = [f"train.max_steps={options.checkpoints * options.every}", f"train.eval_every={options.every}"]
    steps += ["train.warmup_steps=1", "train.eval_rows=1"]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server, environment(server.environment):
        runs = f"s3://{BUCKET}/runs"
        command = [sys.executable, str(ROOT / "pretrain" / "run.py"), f"data.path={options.data.absolute()}"]
        command += [f"run.dir={runs}", "run.name=uploads", *steps, *settings]
        subprocess.run(command, check=True, env={"DS_ACCELERATOR": "cpu", **os.environ}, stdout=subprocess.DEVNULL)
        run = locate(runs) / "uploads"
        with local_copy(run / "tb") as events:
            stalls = [(point.wall_time, point.value) for point in points(events.parent, "checkpoint/stall_fraction")]
        with local_copy(run / "checkpoints" / Kept(run / "checkpoints", 1).names()[0]) as newest:
            megabytes = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / 1e6
            started = time.perf_counter()
            checkpoint.verify(newest)
            checked = time.perf_counter()
            again = locate(f"s3://{BUCKET}/again")
            assert isinstance(again, UrlPath)
            upload_files(newest, again)
            sent_s = time.perf_counter() - checked
    apart_s = (stalls[-1][0] - stalls[0][0]) / (len(stalls) - 1)
    fractions = [fraction for _, fraction in stalls[1:]]
    print("| checkpoint, MB | s between two | stall fraction, mean and largest | if it waited | checksums, ms a MB |")
    print("| --- | --- | --- | --- | --- |")
    print(
        f"| {megabytes:.1f} | {apart_s:.1f} | {statistics.mean(fractions):.2%}, {max(fractions):.2%} "
        f"| {sent_s / (apart_s + sent_s):.1%} | {(checked - started) * 1e3 / megabytes:.2f} |"
    )


if __name__ == "__main__":
    main()
