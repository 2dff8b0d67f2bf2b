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

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import ROOT, run
from sklearn.metrics import average_precision_score, roc_auc_score
from small_cohort import prepare_small

from hymate.command import load
from hymate.config import ConfigError
from hymate.training.benchmark import BenchmarkConfig

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
        ("only=[boosting]", "only: boosting is no contender"),
        ("shares=[0]", "shares must be above 0"),
        ("+contenders.gru.point.depth=3", "search.space.depth is not a parameter"),
        ("+contenders.gru.model.heads=3", "contenders.model.heads is not a known key"),
    ],
)
def test_a_mistake_is_one_line(wrong: str, line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        load("benchmark", ["task=readmission", "data.path=DATA", wrong], BenchmarkConfig)
