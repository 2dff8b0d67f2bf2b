"""Every command of the README, as written but for placeholders and sizes, on small data with the debug model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import ROOT, readme_commands
from small_cohort import write_meds

from hymate.evaluation.metrics import auroc
from hymate.inference.bundle import read_bundle

# not run by test_readme_commands_run: make test is what runs this file, make demo is below, jobs are in test_jobs.py,
# and the last two are for machines with a GPU; what has an s3:// in it is in test_storage.py
ELSEWHERE = ("make test", "make demo", "ray job submit", "pip install", "MAMBA_KEEP_CUDA_BUILD=")
SMALL = {
    "pretrain/run.py": "data.context=64 data.tokens_per_row=256 data.min_count=1 train.max_steps=4 train.eval_every=2 "
    "train.warmup_steps=1 train.rows_per_step=2 train.eval_rows=2",
    "finetune/tune.py": "data.context=64 data.tokens_per_row=256 data.min_count=1 train.max_steps=4 "
    "train.eval_every=2 train.warmup_steps=1 search.num_trials=2 search.grace_steps=2",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that looks like the repository, with the raw data that the README's placeholders stand for."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("pretrain", "finetune", "configs", "hymate"):
        (folder / name).symlink_to(ROOT / name)
    write_challenge(folder / "RAW_DIR", num_stays=120)
    write_meds(folder / "MEDS_DIR")
    shutil.copytree(folder / "MEDS_DIR" / "labels" / "readmission", folder / "LABELS_DIR")
    add_admissions(folder / "MEDS_DIR")
    yield folder


def test_readme_commands_run(place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hy", dir="/tmp") as ray_files:
        environment = {**os.environ, "RAY_TMPDIR": ray_files, "TORCHDYNAMO_DISABLE": "1", "COLUMNS": "200"}
        ran = []
        for command in readme_commands():
            if command.startswith(ELSEWHERE) or "s3://" in command:
                continue
            words = shlex.split(re.sub(r"model=(small|physionet)", "model=debug", command))
            if words[0] == "tensorboard":
                words = [str(Path(sys.executable).with_name("tensorboard")), "--inspect", *words[1:]]
            else:
                assert words[0] == "python", f"no test knows how to run: {command}"
                words = [sys.executable, *words[1:], *shlex.split(SMALL.get(words[1], ""))]
            done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            ran.append(command)
    assert len(ran) >= 9
    assert (place / "runs" / "mortality" / "report.md").is_file()
    assert (place / "predictions.parquet").is_file()
    outcomes = [
        json.loads((place / "runs" / name / "run.json").read_text())["outcome"] for name in ("pretrain", "again")
    ]
    assert outcomes[0]["val_loss"] == outcomes[1]["val_loss"]
    check_tasks(place / "runs" / "tune-readmission-mortality-length_of_stay")


def check_tasks(run: Path) -> None:
    """A run of three tasks left a head, scores and predictions for each."""
    tasks = ["readmission", "mortality", "length_of_stay"]
    found = json.loads((run / "results.json").read_text())
    assert [part["task"] for part in found["tasks"]] == tasks and "auroc" not in found
    scored = ["auroc", "auprc"]
    best = found["trials"][found["best_trial"]]["best"]
    means = []
    for part in found["tasks"]:
        own = [*scored, "concordance"] if part["task"] == "length_of_stay" else scored
        means.append(sum(best[f"{part['task']}/{name}"] for name in own) / len(own))
        table = pq.read_table(run / "predictions" / f"{part['task']}.parquet")
        label, prob = (table[name].to_numpy() for name in ("boolean_value", "predicted_boolean_probability"))
        assert len(label) == part["num_labels"] and part["auroc"]["value"] == pytest.approx(auroc(label, prob))
        assert ("days" in part) == (part["task"] == "length_of_stay")
    assert best["mean"] == pytest.approx(sum(means) / 3)
    days = pq.read_table(run / "predictions" / "length_of_stay-days.parquet")
    error = np.abs(days["float_value"].to_numpy() - days["predicted_float_value"].to_numpy())
    assert found["tasks"][2]["days"]["mae"]["value"] == pytest.approx(error.mean(), rel=1e-5)
    report, bundle = (run / "report.md").read_text(), read_bundle(run)
    assert all(f"| {task} | held_out |" in report for task in tasks) and "| length_of_stay | " in report
    assert (bundle.tasks, bundle.in_days) == (tasks, ["length_of_stay"])


def test_the_demo_ends_in_a_table(tmp_path: Path) -> None:
    sizes = ["SUBJECTS=150", "PRETRAIN_STEPS=100", "TUNE_STEPS=100"]
    venv = Path(sys.executable).parent.parent
    with tempfile.TemporaryDirectory(prefix="hy", dir="/tmp") as ray_files:
        environment = {**os.environ, "RAY_TMPDIR": ray_files, "TORCHDYNAMO_DISABLE": "1"}
        arguments = ["make", "demo", "-o", f"{venv}/.installed", f"VENV={venv}", f"DEMO={tmp_path}", *sizes]
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for expected in ("held_out", "best possible", "AUROC [95 % CI]", "bundle ", "tensorboard --logdir"):
        assert expected in done.stdout
    assert (tmp_path / "runs" / "readmission" / "bundle" / "model.safetensors").is_file()


def test_readme_names_every_configuration_file() -> None:
    tree = re.search(r"```text\nconfigs/\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert tree is not None
    for file in (ROOT / "configs").rglob("*.yaml"):
        if file.stem != "_base":
            assert file.stem in tree.group(1), f"{file.name} is missing in the README's tree"


def write_challenge(folder: Path, num_stays: int) -> None:
    """Challenge text files of set b; who dies has a higher heart rate."""
    rng = np.random.default_rng(0)
    (folder / "set-b").mkdir(parents=True)
    outcomes = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    for i in range(num_stays):
        record, died = 140000 + i, i % 4 == 0
        lines = ["Time,Parameter,Value", f"00:00,RecordID,{record}", f"00:00,Age,{rng.integers(20, 90)}"]
        lines += ["00:00,Gender,1", "00:00,Height,-1", f"00:00,ICUType,{rng.integers(1, 5)}", "00:00,Weight,80"]
        lines += [f"{h:02d}:15,HR,{rng.normal(110 if died else 80, 10):.0f}" for h in range(0, 48, 3)]
        (folder / "set-b" / f"{record}.txt").write_text("\n".join(lines) + "\n")
        outcomes.append(f"{record},10,5,{rng.integers(2, 20)},{5 if died else -1},{int(died)}")
    (folder / "Outcomes-b.txt").write_text("\n".join(outcomes) + "\n")


def add_admissions(meds: Path) -> None:
    """Hospital stays for the README's tasks, in place of the label folder; a third come back, a quarter die."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hymate.data.meds import DATA_SCHEMA, write_parquet

    shutil.rmtree(meds / "labels")
    day_us = 86_400_000_000
    for shard in (meds / "data").rglob("*.parquet"):
        events = pq.read_table(shard).to_pylist()
        first = {}
        for event in events:
            first.setdefault(event["subject_id"], event["time"])
        for subject, time in first.items():
            start = int(time.timestamp() * 1_000_000)
            stay, back = 5 + subject % 5, 10 if subject % 3 == 0 else 60
            days = {0: "ADMISSION//EMERGENCY", stay: "DISCHARGE//HOME", stay + back: "ADMISSION//EMERGENCY"}
            days |= {stay + back + 3: "DISCHARGE//DIED" if subject % 4 == 0 else "DISCHARGE//HOME", 400: "VISIT"}
            for day, kind in days.items():
                code = kind if kind == "VISIT" else f"HOSPITAL_{kind}"
                events.append({"subject_id": subject, "time": start + day * day_us, "code": code})
        table = pa.Table.from_pylist(events, DATA_SCHEMA).sort_by([("subject_id", "ascending"), ("time", "ascending")])
        write_parquet(table, shard)
