"""Whether a change of the code leaves every number as it was: the demo and PhysioNet 2012, small, before and after.

    python tests/benchmarks/unchanged.py BEFORE_CHECKOUT [RAW_DIR]

runs preparing, pretraining, fine-tuning, prediction, explanation and the plain baseline with the code of another
checkout and with this one's, and compares what they leave: prepared data, losses, weights, predictions, results and
reports. RAW_DIR has files of PhysioNet 2012 (`set-b.tar.xz` or `set-b/`); without it only the demo is compared. It
prints each file that differs, and exits with 1 where any does. Times are left out, and so are checkpoints, whose
weights the bundles have.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent.parent
MEMBERS = 400  # stays of PhysioNet 2012
TIMED = re.compile(
    r"(seconds|_s\b|per_second|(data|collective|stall)_(share|fraction)|memory|gib|wait|slow|time/|worker|throughput)",
    re.IGNORECASE,
)
LEFT_OUT = re.compile(r"^raw/|checkpoints/|progress\.json$|(attempt|claim)\.json$|results\.png$")
SECONDS = re.compile(r"\"(seconds|features|fit)\": \d+\.\d+|in \d+\.\d s")
SMALL = "model=debug data.context=256 data.tokens_per_row=2048"
TRAIN = "train=zero2 train.num_workers=2 train.max_steps=20 train.eval_every=10 train.warmup_steps=2 train.eval_rows=4"
TUNE = "data.context=256 data.tokens_per_row=2048 train.rows_per_step=1 train.max_steps=40 train.eval_every=20"
SEARCH = "search=quick search.num_trials=2 search.grace_steps=40 search.max_concurrent=1"
POOLED = f"{SEARCH} search.space.pooling=variables"
DEMO = f"""
hymate.data.prepare source=synthetic out=data synthetic.subjects=400 synthetic.mean_events=150
pretrain/run.py data.path=data {SMALL} {TRAIN} objective=both run.name=pretrained
finetune/tune.py task=[readmission,mortality] data.path=data init=runs/pretrained {SEARCH} {TUNE} run.name=tuned
hymate.predict bundle=runs/tuned data.path=data task=readmission out=predictions.parquet
hymate.explain bundle=runs/tuned data.path=data task=readmission out=explanation
hymate.baselines data.path=data task=readmission baseline=logistic_regression out=baseline
"""
CHALLENGE = f"""
hymate.data.prepare source=physionet2012 raw=raw out=data
pretrain/run.py data.path=data {SMALL} model.mixer=mamba1 {TRAIN} run.name=pretrained
finetune/tune.py task=mortality data.path=data init=runs/pretrained {POOLED} {TUNE} run.name=tuned
hymate.predict bundle=runs/tuned data.path=data task=mortality out=predictions.parquet
"""


def run(checkout: Path, commands: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    for line in commands.strip().splitlines():
        name, *settings = line.split()
        program = [str(checkout / name)] if name.endswith(".py") else ["-m", name]
        command = [sys.executable, *program, *settings]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{checkout}: {line}\n{done.stderr}")


def content(path: Path) -> Any:
    """What of a file has to stay; None where nothing has."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return str(table.schema), repr(table.to_pydict())  # NaN is not equal to itself, its text is
    if path.suffix == ".safetensors":
        return {name: (str(array.dtype), array.tobytes()) for name, array in load_file(path).items()}
    if path.name == "run.json":
        record = json.loads(path.read_text())
        return {key: record[key] for key in ("command", "config", "inputs", "outcome")}
    if "tfevents" in path.name:
        events = EventAccumulator(str(path)).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if not TIMED.search(tag)]
        return {tag: repr([(scalar.step, scalar.value) for scalar in events.Scalars(tag)]) for tag in tags}
    if path.suffix in (".json", ".md", ".yaml", ".txt"):
        return SECONDS.sub("", path.read_text())
    return None


def left(folder: Path) -> dict[str, Any]:
    """What a folder holds, by names without what changes with the time."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"tfevents\..*", "tfevents", str(path.relative_to(folder)))
        if path.is_file() and not LEFT_OUT.search(name):
            kept = content(path)
            if kept is not None:
                found[name] = kept
    return found


def first_difference(old: str, new: str) -> str:
    pairs = enumerate(zip(old, new, strict=False))
    start = max(0, next((i for i, (a, b) in pairs if a != b), min(len(old), len(new))) - 40)
    return f"  - {old[start : start + 160]}\n  + {new[start : start + 160]}"


def sample(raw: Path, folder: Path) -> None:
    """The first stays of one set, with their outcomes."""
    archive = next(iter(sorted(raw.glob("set-?.tar.xz"))))
    letter = archive.name[4]
    with tarfile.open(archive) as tar:
        names = sorted(member.name for member in tar if member.name.endswith(".txt"))[:MEMBERS]
        tar.extractall(folder, members=[tar.getmember(name) for name in names], filter="data")
    outcomes = (raw / f"Outcomes-{letter}.txt").read_text().splitlines()
    kept = {Path(name).stem for name in names}
    rows = [outcomes[0], *(row for row in outcomes[1:] if row.split(",")[0] in kept)]
    (folder / f"Outcomes-{letter}.txt").write_text("\n".join(rows) + "\n")


def main() -> None:
    before, *given = map(Path, sys.argv[1:])
    differing: list[str] = []
    for commands in (DEMO, CHALLENGE)[: 1 + len(given)]:
        found = []
        for checkout in (before.resolve(), ROOT):
            folder = Path(tempfile.gettempdir()) / "hymate-unchanged"  # one for both: configurations hold its name
            folder.mkdir()
            try:
                if commands is CHALLENGE:
                    sample(given[0], folder / "raw")
                run(checkout, commands, folder)
                found.append(left(folder))
            finally:
                shutil.rmtree(folder)
        old, new = found
        for name in sorted(old.keys() | new.keys()):
            same = old.get(name) == new.get(name)
            print(f"{'same     ' if same else 'DIFFERENT'} {name}")
            if not same:
                differing.append(name)
                print(first_difference(repr(old.get(name)), repr(new.get(name))))
    sys.exit(f"{len(differing)} files differ" if differing else 0)


if __name__ == "__main__":
    main()
