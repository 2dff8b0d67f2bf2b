"""finetune/benchmark.py: real runs under Ray on a small cohort, gone on with, and the numbers that it reports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import ROOT, run
from scipy.special import expit
from sklearn.metrics import average_precision_score, roc_auc_score
from small_cohort import prepare_small

from hymate.command import load
from hymate.config import ConfigError, UserError
from hymate.training.benchmark import BenchmarkConfig
from hymate.training.benchmark import benchmark as protocol
from hymate.training.comparison import COMPARED, Comparison, Run, compare, write_run

TINY = [
    *("model=debug", "model.d_model=16", "model.headdim=8", "model.num_heads=2", "data.context=32"),
    *("data.tokens_per_row=256", "data.min_count=1", "pretrain.max_steps=2", "pretrain.eval_every=2"),
    *("pretrain.warmup_steps=1", "pretrain.eval_rows=1", "train.max_steps=4", "train.eval_every=2"),
    *("train.warmup_steps=1", "train.rows_per_step=1", "averaged=2"),
]
ONLY = "only=[gradient_boosting,pretrained]"


def benchmark(
    data: Path, folder: Path, environment: dict[str, str], *overrides: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "finetune" / "benchmark.py"), "task=readmission", f"data.path={data}"]
    return run([*command, f"run.dir={folder}", *overrides], environment, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("cohort"))


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Ray keeps its files in a folder of their own, whose path must be short."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield {**os.environ, "DS_ACCELERATOR": "cpu", "RAY_TMPDIR": folder}


def test_runs_are_compared_and_gone_on_with(data: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    one = benchmark(data, tmp_path, environment, *TINY, ONLY, "seeds=1")
    assert one.returncode == 0, one.stderr
    folder = tmp_path / "benchmark-readmission"
    first = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    found = json.loads((folder / "benchmark.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["gradient_boosting", "pretrained", "pretrained_averaged"]
    for row in found["rows"]:
        table = pq.read_table(folder / "runs" / f"{row['name']}-1-0-tuning.parquet")
        label, probability = table["label"].to_numpy(), table["probability"].to_numpy()
        assert row["auroc"]["mean"] == pytest.approx(roc_auc_score(label, probability))
        assert row["auprc"]["mean"] == pytest.approx(average_precision_score(label, probability))
        assert row["auroc"]["sd"] is None and row["runs"] == 1
    reference, model, _ = found["rows"]
    difference = model["auroc"]["difference"]["value"]
    assert difference == pytest.approx(model["auroc"]["mean"] - reference["auroc"]["mean"])

    # one seed more of the baseline; what is there is only compared, now on the other split
    more = ["only=[gradient_boosting]", "seeds=2", "split=held_out"]
    two = benchmark(data, tmp_path, environment, *TINY, *more)
    assert two.returncode == 0, two.stderr
    assert {path: path.stat().st_mtime_ns for path in first} == first
    found = json.loads((folder / "benchmark.json").read_text())
    assert found["split"] == "held_out" and [row["runs"] for row in found["rows"]] == [2, 1, 1]
    assert "pretrained averaged" in two.stdout and "pretrained averaged" in (folder / "benchmark.md").read_text()
    tables = [pq.read_table(path) for path in (folder / "runs").glob("gradient_boosting-1-*-held_out.parquet")]
    areas = [roc_auc_score(table["label"].to_numpy(), table["probability"].to_numpy()) for table in tables]
    assert len(areas) == 2 and found["rows"][0]["auroc"]["mean"] == pytest.approx(np.mean(areas))
    assert (folder / "benchmark.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["shares=[0.5]", "only=[distilled]"], "leave nothing to run"),
        (["train.cpus_per_worker=1000"], "needs 1000 CPUs"),
        (["shares=[0.02]"], "the train split has 2 positive and 0 negative labels"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_trained(
    data: Path, tmp_path: Path, wrong: list[str], line: str
) -> None:
    given = ["task=readmission", f"data.path={data}", f"run.dir={tmp_path}", *TINY, "seeds=1", *wrong]
    with pytest.raises(UserError, match=line):
        protocol(load("benchmark", given, BenchmarkConfig))
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_run_is_one_line_and_the_runs_beside_it_end_well(
    data: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    # too few labels for boosting's features, which shows when they are chosen
    few = ["shares=[0.05]", "shared=[gradient_boosting,scratch]", "only=[gradient_boosting,scratch]", "seeds=1"]
    failed = benchmark(data, tmp_path, environment, *TINY, *few, "max_concurrent=2")
    assert failed.returncode == 2 and "gradient_boosting of seed 0 on 5% failed; 1 left" in failed.stdout, failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1 and "leave no feature of 6 training labels" in failed.stderr
    assert (tmp_path / "benchmark-readmission" / "runs" / "scratch-0.05-0.json").is_file()
    record = json.loads((tmp_path / "benchmark-readmission" / "run.json").read_text())
    assert record["outcome"]["state"] == "failed" and "no feature" in record["outcome"]["reason"]


def written(folder: Path, name: str, label: np.ndarray, probability: np.ndarray, seed: int = 0) -> None:
    """A run as if it had been trained; the tuning split holds the same as the held-out one."""
    examples = SimpleNamespace(subject_id_E=np.arange(len(label)), label_E=label)
    told = dict.fromkeys(COMPARED, probability)
    write_run(Run(name, 1.0, seed), folder, dict.fromkeys(COMPARED, examples), told, seconds=1.0, parameters=None)


def comparison(folder: Path, split: str = "held_out") -> Comparison:
    return Comparison(folder, ["gradient_boosting", "scratch"], [1.0], 2, split, "readmission")


def test_without_boosting_there_is_no_difference_to_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label, probability = rng.integers(0, 2, 200).astype(float), rng.random(200)
    written(tmp_path, "scratch", label, probability)
    (row,) = compare(comparison(tmp_path))["rows"]
    assert row["auroc"]["difference"] == row["auroc"]["ensemble_difference"] == {"value": None, "ci": None}
    written(tmp_path, "gradient_boosting", label, rng.random(200))
    _, row = compare(comparison(tmp_path))["rows"]
    assert row["auroc"]["difference"]["ci"][0] < row["auroc"]["difference"]["value"] != 0


def test_everyone_is_recalibrated_and_judged_by_other_labels_than_it_was_fitted_to(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(-1, 2, 4000)
    label = (rng.random(4000) < expit(logit)).astype(float)
    for seed, (name, scale, shift) in enumerate((("gradient_boosting", 1.5, 0.5), ("scratch", 0.7, -0.5))):
        written(tmp_path, name, label, expit(scale * logit + shift).astype(np.float32), seed)
    boosting, scratch = compare(comparison(tmp_path))["rows"]
    assert boosting["ece"] == pytest.approx(scratch["ece"], abs=3e-3) and boosting["ece"] < 0.02
    assert [row["ece"] for row in compare(comparison(tmp_path, "tuning"))["rows"]] == [None, None]


def test_runs_of_other_labels_are_not_compared(tmp_path: Path) -> None:
    label = np.arange(20) % 2.0
    for seed in range(2):
        written(tmp_path, "scratch", (label + seed) % 2, np.linspace(0.1, 0.9, 20), seed)
    with pytest.raises(UserError, match="runs of scratch have other labels than each other"):
        compare(comparison(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("only=[boosting]", "only: boosting is no contender"),
        ("shares=[0]", "shares must be above 0"),
        ("+contenders.gru.point.depth=3", "search.space.depth is not a parameter"),
        ("+contenders.gru.model.heads=3", "contenders.model.heads is not a known key"),
        ("point.head_lr={choice: [1e-3]}", "point: head_lr must be one value here, not a distribution"),
        ("point.head_lr=fast", "search.space.head_lr must be a positive number, got 'fast'"),
    ],
)
def test_a_mistake_is_one_line(wrong: str, line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        load("benchmark", ["task=readmission", "data.path=DATA", wrong], BenchmarkConfig)
