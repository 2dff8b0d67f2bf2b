"""The pretraining command, end to end: real Ray and DeepSpeed processes, killed and continued."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from commands import PATIENCE_S, ROOT, ray_processes, run, step_of, wait_until
from pretraining_runs import EVAL_EVERY, STEPS, command, flip_a_bit, saved_steps, scalars, started, train_workers
from safetensors.torch import load_file

from hymate.command import load
from hymate.data.histories import Histories
from hymate.data.prepare import PrepareConfig, prepare
from hymate.errors import UserError
from hymate.inference.bundle import read_bundle
from hymate.runs import code
from hymate.training.pretraining import PretrainConfig, pretrain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "data"
    given = ["source=synthetic", "workers=1", f"out={out}", "synthetic.subjects=60", "synthetic.mean_events=300"]
    prepare(load("prepare", given, PrepareConfig))
    return out


def recorded(run_folder: Path) -> dict[str, Any]:
    return json.loads((run_folder / "run.json").read_text())


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Settings that lead to a running cluster: a test that is not about how Ray starts need not start one."""
    ray = str(Path(sys.executable).with_name("ray"))
    port = "26379"
    settings = {**environment, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    options = ["--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats"]
    head = {key: value for key, value in settings.items() if key != "RAY_ADDRESS"}
    subprocess.run(
        [ray, "start", "--head", "--port", port, "--temp-dir", environment["RAY_TMPDIR"], *options],
        env=head,
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    yield settings
    for pid in ray_processes(environment["RAY_TMPDIR"]):
        with suppress(ProcessLookupError):  # a worker ends with its raylet
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(
    data: Path, cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run of two workers and what its command said."""
    runs = tmp_path_factory.mktemp("undisturbed")
    done = run(command(data, runs), cluster, runs)
    assert done.returncode == 0, done.stderr
    return runs / "pretrain", done


def test_a_run_ends_in_a_bundle_and_says_where(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]], data: Path
) -> None:
    folder, done = undisturbed
    assert re.search(rf"best val_loss \d+\.\d+ at step \d+\nbundle: {folder}/bundle\ncurves: tensorboard", done.stdout)
    assert re.search(rf"step {STEPS}/{STEPS}  loss .* val_loss .* events/s", done.stdout)
    assert len(done.stdout.splitlines()) < 20 and not done.stderr, done.stderr
    bundle = read_bundle(folder, kind="pretrained")
    assert bundle.model.d_model == 32 and bundle.data.context == 512
    assert bundle.extra["metrics"]["val_loss"] == recorded(folder)["outcome"]["val_loss"]
    assert bundle.extra["provenance"]["fingerprint"] in (folder / "bundle" / "README.md").read_text()


def test_a_run_learns_and_shows_it_on_tensorboard(undisturbed: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = undisturbed
    losses = [value for _, value in scalars(folder, "train/loss")]
    assert len(losses) == STEPS and sum(losses[-10:]) < sum(losses[:10])
    for name in ("code_loss", "value_loss", "time_loss", "next_value_loss"):
        assert len(scalars(folder, f"train/{name}")) == STEPS
    for name in ("learning_rate", "gradient_norm", "events_per_second"):
        assert len(scalars(folder, f"train/{name}")) == STEPS
    assert all(0 < value <= 1 for _, value in scalars(folder, "train/packing_efficiency"))
    assert [step for step, _ in scalars(folder, "validation/val_loss")] == [*range(EVAL_EVERY, STEPS + 1, EVAL_EVERY)]


def test_the_best_checkpoints_and_the_last_are_kept(undisturbed: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = undisturbed
    scores = dict(scalars(folder, "validation/val_loss"))
    assert saved_steps(folder) == {*sorted(scores, key=lambda step: scores[step])[:2], STEPS}


def configured(data: Path, runs: Path, *overrides: str) -> PretrainConfig:
    return load("pretrain", command(data, runs, *overrides)[2:], PretrainConfig)


def test_a_finished_run_is_not_run_again(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]], data: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, done = undisturbed
    before = (folder / "bundle" / "model.safetensors").stat().st_mtime_ns
    pretrain(configured(data, folder.parent))
    assert capsys.readouterr().out.splitlines() == done.stdout.splitlines()[-3:]
    assert (folder / "bundle" / "model.safetensors").stat().st_mtime_ns == before


def test_another_configuration_does_not_continue_the_run(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]], data: Path
) -> None:
    folder, _ = undisturbed
    changed = r"train\.learning_rate was 0\.001, now 0\.01; choose another run\.name"
    with pytest.raises(UserError, match=changed) as caught:
        pretrain(configured(data, folder.parent, "train.learning_rate=0.01"))
    assert "\n" not in str(caught.value)


def test_a_killed_worker_and_a_killed_driver_change_nothing(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]],
    data: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    whole, _ = undisturbed
    losses = scalars(whole, "train/loss")
    arguments, folder, ray_folder = command(data, tmp_path), tmp_path / "pretrain", environment["RAY_TMPDIR"]
    with started(arguments, environment, tmp_path) as driver:
        wait_until(lambda: step_of(folder) > EVAL_EVERY or driver.poll() is not None, "the first checkpoint is there")
        first = train_workers(ray_folder)
        assert len(first) == 2
        os.kill(max(first), signal.SIGKILL)
        wait_until(
            lambda: not first & train_workers(ray_folder) or driver.poll() is not None, "the workers are replaced"
        )
        wait_until(lambda: step_of(folder) > 2 * EVAL_EVERY or driver.poll() is not None, "the run goes on")
        seen = [step for step, _ in scalars(folder, "train/loss")]
        assert len(seen) >= EVAL_EVERY and seen == [*range(1, len(seen) + 1)], "the curves are there while it runs"
        assert driver.poll() is None and step_of(folder) < STEPS, "the driver was to be killed in mid-run"
    # at once: the killed driver's workers live on for a moment
    resumed = run(arguments, environment, tmp_path)
    assert resumed.returncode == 0 and not resumed.stderr, resumed.stderr

    attempts, outcome = recorded(folder)["attempts"], recorded(folder)["outcome"]
    assert outcome["val_loss"] == recorded(whole)["outcome"]["val_loss"]
    begun = [start["step"] for attempt in attempts for start in attempt["starts"]]
    assert len(begun) == 3 and begun[0] == 0 and begun == sorted(begun)
    assert all(step % EVAL_EVERY == 0 for step in begun)
    assert [attempt["ended"] is None for attempt in attempts] == [True, False], "the first was killed"
    expected, actual = (load_file(path / "bundle" / "model.safetensors") for path in (whole, folder))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert scalars(folder, "train/loss") == losses, "steps are missing, doubled or different"


def test_a_longer_run_goes_on_with_one_worker_from_the_newest_whole_checkpoint_until_it_is_stopped(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]], data: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "pretrain"
    shutil.copytree(undisturbed[0], folder)
    newest = max((folder / "checkpoints").glob("step-*/"))
    flip_a_bit(newest / "optimizer-00001-of-00002.safetensors")
    changes = ("train.num_workers=1", "train.zero_stage=3", "train.max_steps=100000")
    said = tmp_path / "said.txt"
    with said.open("wb") as file, started(command(data, tmp_path, *changes), cluster, tmp_path, stdout=file) as driver:
        wait_until(lambda: step_of(folder) > STEPS or driver.poll() is not None, "the run goes on")
        driver.send_signal(signal.SIGINT)  # SIGTERM is tried as Slurm and Ray's jobs send it
        driver.wait(PATIENCE_S)
    assert driver.returncode == 130 and recorded(folder)["outcome"] == {"state": "stopped"}, said.read_text()
    damaged = (
        f"{newest.name} is damaged: optimizer-00001-of-00002.safetensors is not what was written; the checkpoint before"
    )
    rate = f"instead of {STEPS}: from step {STEPS - EVAL_EVERY} on the learning rate is"
    assert said.read_text().count(rate) == said.read_text().count(damaged) == 1, said.read_text()
    stopped_at = step_of(folder)
    assert stopped_at in saved_steps(folder)
    assert [step for step, _ in scalars(folder, "train/loss")] == [*range(1, stopped_at + 1)]


def test_a_run_that_diverges_ends_at_once_and_names_the_rows(
    data: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    changes = ("train.learning_rate=1e30", "train.warmup_steps=0", "train.num_workers=1", "train.max_skipped=3")
    failed = run(command(data, tmp_path, *changes), cluster, tmp_path)
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert re.match(r"error: 4 steps in a row, up to step \d, had a loss or gradient that is not finite", line), line
    shard, records = re.search(r"The last one's rows: shard (\S+) row group \d+ records \[([\d, ]+)\]", line).groups()
    length = pq.read_metadata(data / "histories" / f"{shard}.parquet").num_rows
    assert all(0 <= int(record) < length for record in records.split(","))
    assert not (tmp_path / "pretrain" / "bundle").exists()
    assert len(list((tmp_path / "pretrain" / "tb").glob("events.*"))) == 1, "it was tried again"
    outcome = recorded(tmp_path / "pretrain")["outcome"]
    assert outcome["state"] == "failed" and f"error: {outcome['reason']}" == line, outcome


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=nowhere"], "not a prepared dataset"),
        (["train.num_workers=1000", "train.rows_per_step=1000"], "CPUs, this machine has"),
        (["device=cuda"], "PyTorch"),
    ],
)
def test_what_cannot_run_is_refused_before_any_worker(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=message) as caught:
        pretrain(configured(data, tmp_path, *overrides))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pretrain").exists()


def test_a_dataset_without_a_tuning_split_is_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    index = tmp_path / "data" / "histories" / "index.parquet"
    table = pq.read_table(index)
    split = pc.replace_substring(table["split"], "tuning", "train")
    pq.write_table(table.set_column(1, pa.field("split", pa.string()), split), index)
    with pytest.raises(UserError, match="no subject is in the tuning split"):
        pretrain(configured(tmp_path / "data", tmp_path))


def test_the_run_folder_says_what_the_run_was(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]], data: Path
) -> None:
    folder, _ = undisturbed
    record = recorded(folder)
    config, (attempt,) = record["config"], record["attempts"]
    assert config["train"]["max_steps"] == STEPS and config["model"]["d_model"] == 32
    assert record["inputs"]["data.path"] == Histories.open(data).fingerprint
    assert record["outcome"]["state"] == "finished" and record["outcome"]["step"] % EVAL_EVERY == 0
    assert attempt["overrides"] == command(data, folder.parent)[2:]
    assert [start["step"] for start in attempt["starts"]] == [0]
    used = attempt["environment"]
    assert (used["workers"], used["nodes"]) == (2, 1) and used["packages"]["torch"] == version("torch")
    assert attempt["code"] == code()
    text = (folder / "run.json").read_text()
    assert socket.gethostname() not in text
