"""README.md, CONTRIBUTING.md and docs/: every command runs, what comes from the code is current, the site builds."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hourly
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from commands import ROOT, Command, documented, pages
from pretraining_runs import scalars
from small_cohort import write_meds
from small_models import vocabulary_of, write_risk_bundle
from trained import task_of

from hymate.command import load
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.meds import SPLITS
from hymate.data.tasks import read_or_extract_labels
from hymate.evaluation.metrics import auroc
from hymate.inference.bundle import read_bundle

DOCS = ROOT / "docs"
REASONS = (  # for which a command may be untested
    "needs a GPU",
    "needs Kubernetes",
    "needs Slurm",
    "needs several machines",
    "needs an account at a cloud",
)
ELSEWHERE = {  # what something else runs: how a command begins, and the file that has it run
    "make demo": "tests/product/test_demo.py",
    "ray job submit": "tests/product/test_jobs.py",
    "cluster/local.sh": "tests/product/test_jobs.py",
    "python finetune/benchmark.py": "tests/tuning/test_benchmark.py",
    "python finetune/tune.py search=quick": "tests/product/test_demo.py",
    "python -m hymate.ops.cpu.precompile": "Makefile",
    "python -m hymate.plan model=base gpus=8 data.tokens_per_row": "tests/commands/test_plan.py",
}
PAGES_ELSEWHERE = {
    "docs/storage.md": "tests/storage/test_storage.py",
    "docs/from_raw_tables.md": "tests/product/test_from_raw_tables.py",
}
FOLDERS = ("pretrain", "finetune", "configs", "hymate", "docs", "tests")
SHELL = ("python3 -m venv .venv", ". .venv/bin/activate", "export RAY_AUTH_MODE=token")
SMALL = {
    "pretrain/run.py": "data.context=64 data.tokens_per_row=256 data.min_count=1 train.max_steps=4 train.eval_every=2 "
    "train.warmup_steps=1 train.rows_per_step=2 train.eval_rows=2 train.log_every=1 train.num_workers=1",
    "finetune/tune.py": "data.context=64 data.tokens_per_row=256 data.min_count=1 train.max_steps=4 "
    "train.eval_every=2 train.warmup_steps=1 search.num_trials=1",
    "hymate.explain": "num_predictions=4 num_subjects=1",
}


def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------------------------- pages


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


def test_pages_from_the_code_are_current() -> None:
    made = generate()
    assert doctest.testmod(made).failed == 0
    remedy = "run python docs/generate.py"
    assert (DOCS / "configuration.md").read_text() == made.configuration(), remedy
    python = (DOCS / "python.md").read_text()
    assert python == made.with_reference(python), remedy


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_python_blocks_run(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after the other, beside the files that they name."""
    write_risk_bundle(tmp_path / "runs" / "tune-readmission" / "bundle", vocabulary_of(small_data))
    events = pq.read_table(small_data / "data" / "held_out" / "0.parquet")
    events = events.filter(pc.equal(events["subject_id"], events["subject_id"][0]))
    pq.write_table(events[:-2], tmp_path / "events.parquet")
    pq.write_table(events[-2:], tmp_path / "new.parquet")
    monkeypatch.chdir(tmp_path)
    for page in pages():
        names: dict[str, Any] = {}
        for block in python_blocks(page):
            exec(compile(block, page, "exec"), names)
        if page == "docs/python.md":
            assert 0 < names["risk"] < 1 and len(names["reasons"]) > 5 and names["state_LD"].shape == (5, 64)


@pytest.mark.slow
def test_the_encoder_alone_is_twenty_lines_without_arrow_and_hydra() -> None:
    (block,) = (block for block in python_blocks("docs/python.md") if "HyMaTE(" in block)
    assert len([line for line in block.splitlines() if line]) <= 20
    absent = ("pyarrow", "hydra", "omegaconf", "yaml", "ray", "deepspeed", "polars", "meds")
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n{block}assert state_LD.requires_grad"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_that_a_page_names_exists() -> None:
    named = r"`((?:hymate|pretrain|finetune|configs|cluster|tests|docs)/[\w./-]*)`"
    for page in pages():
        for path in re.findall(named, (ROOT / page).read_text()):
            assert (ROOT / path).exists(), f"{page} names {path}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        assert (ROOT / path).exists(), path


def test_the_site_builds_and_needs_nothing_from_the_web(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("mkdocs"))
    done = subprocess.run(
        [program, "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for file in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]* src="(http[^"]*)"|<link[^>]* href="(http[^"]*)"', file.read_text()
        )
        assert not loaded, f"{file.name} loads {loaded}"


# ----------------------------------------------------------------------------------------------------- commands


def test_commands_are_untested_for_a_reason_only() -> None:
    for page in pages():
        for command in documented(page):
            assert command.untested in (None, *REASONS), f"{page}: {command}"
    for file in {*ELSEWHERE.values(), *PAGES_ELSEWHERE.values()}:
        assert (ROOT / file).is_file(), file


def test_no_command_hides_in_the_text() -> None:
    for page in pages():
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        hidden = re.findall(r"`((?:python|ray|kubectl|sbatch) [^`]*=[^`]*)`", text)
        assert not hidden, f"{page}: put {hidden} into a block"


def test_the_settings_of_every_command_are_taken() -> None:
    """The quick half of `test_documented_commands_run`: a misspelt key or file is found before anything runs."""
    made = generate()
    schemas = {_script(made._usage(name)): (name, schema) for name, schema in made.COMMANDS.items()}
    taken = 0
    for page in pages():
        for line in (command.line for command in documented(page) if command.line.startswith("python ")):
            if _script(line) in schemas and "--repeat" not in line:
                _, _, settings = line.partition(_script(line))
                load(schemas[_script(line)][0], shlex.split(settings), schemas[_script(line)][1])
                taken += 1
    assert taken >= 20


def _script(line: str) -> str:
    """What a command line runs: a script, or a module."""
    words = line.split()
    return words[2] if words[1] == "-m" else words[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that looks like the repository, with the raw data that the pages' placeholders stand for."""
    folder = tmp_path_factory.mktemp("docs")
    for name in (*FOLDERS, "Makefile", "mkdocs.yml", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    write_challenge(folder / "RAW_DIR", num_stays=120)
    hourly.write(folder / "SEPSIS_DIR", septic_stays(range(1, 81)))
    hourly.write(folder / "UNSEEN_DIR", septic_stays(range(101, 113)))
    write_meds(folder / "MEDS_DIR")
    shutil.copytree(folder / "MEDS_DIR" / "labels" / "readmission", folder / "LABELS_DIR")
    add_admissions(folder / "MEDS_DIR")
    yield folder


@pytest.mark.slow
def test_documented_commands_run(place: Path) -> None:
    ran: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="hy", dir="/tmp") as ray_files:
        environment = {**os.environ, "RAY_TMPDIR": ray_files, "TORCHDYNAMO_DISABLE": "1", "COLUMNS": "200"}
        for page in pages():
            if page in PAGES_ELSEWHERE:
                continue
            for command in documented(page):
                words = _words(command)
                if words is not None and command.line not in ran:
                    done = subprocess.run(
                        words, cwd=place, env=environment, capture_output=True, text=True, timeout=600
                    )
                    output = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
                    assert done.returncode == 0, f"{page}: {command.line}\n{output}"
                    ran.add(command.line)
    assert len(ran) >= 20
    for name in ("mortality", "sepsis", "sepsis-unseen"):
        assert (place / "runs" / name / "report.md").is_file()
    assert (place / "predictions.parquet").is_file()
    check_repeated(place / "runs" / "pretrain", place / "runs" / "again")
    check_tasks(place / "runs" / "tune-mortality-length_of_stay-time_to_readmission")
    check_several(place / "ALL_DIR")


def _words(command: Command) -> list[str] | None:
    """What is run for a command: small, with this Python; None where nothing is."""
    if command.untested or command.line.startswith((*ELSEWHERE, *SHELL)):
        return None
    words = shlex.split(re.sub(r"model=(small|base|physionet(?:2019)?)", "model=debug", command.line))
    match Path(words[0]).name:
        case "make":
            return ["make", "-n", *words[1:]]  # its own tests run what a target does
        case "pip":
            return _check_pip(words)
        case "tensorboard":
            return [str(Path(sys.executable).with_name("tensorboard")), "--inspect", *words[1:]]
        case "python":
            small = "" if "--repeat" in words else SMALL.get(_script(command.line), "")
            return [sys.executable, *words[1:], *shlex.split(small)]
    raise AssertionError(f"no test knows how to run: {command.line}")


def _check_pip(words: list[str]) -> None:
    """The extras and files that an installation names are there; nothing is fetched."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[1] in ("install", "wheel")
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert extra in extras, extra


def check_repeated(first: Path, again: Path) -> None:
    """A pretraining that was repeated from its record is the same bit for bit."""
    records = [json.loads((run / "run.json").read_text()) for run in (first, again)]
    assert records[0]["outcome"]["val_loss"] == records[1]["outcome"]["val_loss"]
    assert records[1]["attempts"][0]["overrides"][:2] == ["--repeat", "runs/pretrain"]
    losses = scalars(first, "train/loss")
    assert len(losses) == records[0]["config"]["train"]["max_steps"] and scalars(again, "train/loss") == losses


def check_tasks(run: Path) -> None:
    """A run of three tasks, each of another kind, left a head, scores and predictions for each."""
    chosen_by = {  # the metrics of each task
        "mortality": ["auroc", "auprc"],
        "length_of_stay": ["auroc", "auprc", "concordance"],
        "time_to_readmission": ["auroc"],
    }
    found = json.loads((run / "results.json").read_text())
    assert [part["task"] for part in found["tasks"]] == list(chosen_by) and "auroc" not in found
    best = found["trials"][found["best_trial"]]["best"]
    means = [np.mean([best[f"{task}/{name}"] for name in names]) for task, names in chosen_by.items()]
    assert best["mean"] == pytest.approx(np.mean(means))
    for part in found["tasks"]:
        table = pq.read_table(run / "predictions" / f"{part['task']}.parquet")
        assert len(table) == part["num_labels"]
        assert ("days" in part, "horizons" in part) == (
            part["task"] == "length_of_stay",
            part["task"] == "time_to_readmission",
        )
        if "horizons" not in part:
            label, prob = (table[name].to_numpy() for name in ("boolean_value", "predicted_boolean_probability"))
            assert part["auroc"]["value"] == pytest.approx(auroc(label, prob))
    days = pq.read_table(run / "predictions" / "length_of_stay-days.parquet")
    error = np.abs(days["float_value"].to_numpy() - days["predicted_float_value"].to_numpy())
    assert found["tasks"][1]["days"]["mae"]["value"] == pytest.approx(error.mean(), rel=1e-5)
    report, bundle = (run / "report.md").read_text(), read_bundle(run)
    assert all(f"| {task} | held_out" in report for task in chosen_by) and "| length_of_stay | " in report
    assert (bundle.tasks, bundle.in_days) == (list(chosen_by), ["length_of_stay"])
    assert list(bundle.in_time) == ["time_to_readmission"]


def check_several(data: Path) -> None:
    """Of three datasets made one, each task has the labels of one, in every split: the ids end in its place."""
    histories = Histories.open(data)
    for place, name in enumerate(("mortality", "sepsis", "readmission")):
        labels = read_or_extract_labels(data, task_of(data, name)).table
        for split in SPLITS:
            examples = labelled_examples(histories, labels, split)
            assert len(examples) and set(examples.subject_id_E % 100) == {place}, (name, split)


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


def septic_stays(numbers: range) -> dict[int, bytes]:
    """Files of PhysioNet 2019: ten hours each; who becomes septic, every fourth, has a higher heart rate."""
    rng = np.random.default_rng(0)

    def stay(septic: bool) -> bytes:
        heart_rate = rng.normal(110 if septic else 80, 10, 10)
        return hourly.text(hourly.hour(h, int(septic and h > 6), HR=round(heart_rate[h - 1])) for h in range(1, 11))

    return {number: stay(number % 4 == 0) for number in numbers}


def add_admissions(meds: Path) -> None:
    """Hospital stays for the tasks, in place of the label folder; a third come back, a quarter die."""
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
            stay, back = 5 + subject % 5, 5 if subject % 3 == 0 else 60
            days = {0: "ADMISSION//EMERGENCY", stay: "DISCHARGE//HOME", stay + back: "ADMISSION//EMERGENCY"}
            days |= {stay + back + 3: "DISCHARGE//DIED" if subject % 4 == 0 else "DISCHARGE//HOME", 400: "VISIT"}
            for day, kind in days.items():
                code = kind if kind == "VISIT" else f"HOSPITAL_{kind}"
                events.append({"subject_id": subject, "time": start + day * day_us, "code": code})
        table = pa.Table.from_pylist(events, DATA_SCHEMA).sort_by([("subject_id", "ascending"), ("time", "ascending")])
        write_parquet(table, shard)
