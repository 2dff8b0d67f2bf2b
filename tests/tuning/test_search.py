"""Fine-tuning: the search space, what a trial trains, and a whole search that is stopped and continued."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import starts, wait_until, with_pretended_gpu
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_cohort import SIZES
from small_models import SMALL, vocabulary_of

from hymate.command import load
from hymate.config import DataConfig, ObjectiveConfig, SearchConfig, TrainConfig
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.label_files import read_labels
from hymate.device import CPU
from hymate.errors import ConfigError, UserError
from hymate.evaluation.calibration import recalibrate
from hymate.inference.bundle import Bundle, read_bundle
from hymate.inference.predictions import prediction_table
from hymate.inference.provenance import SENTENCES, provenance
from hymate.inference.scoring import predict
from hymate.model.pretrain_model import PretrainModel
from hymate.tuning import space
from hymate.tuning.search import TuneConfig, search
from hymate.tuning.trial import (
    Study,
    TrialConfig,
    draw_trials,
    parameter_groups,
    risk_model,
    starting_point,
    trial_config,
)

ROOT = Path(__file__).resolve().parents[2]

CUT = ["data.context=32", "data.tokens_per_row=256"]

DIVERGING = 1e36  # as a learning rate


@pytest.fixture(scope="module")
def pretrained(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = vocabulary_of(small_data)
    torch.manual_seed(1)
    state = PretrainModel(SMALL, ObjectiveConfig(), vocabulary.size).state_dict()
    folder = tmp_path_factory.mktemp("pretrained") / "bundle"
    settings = DataConfig(str(small_data), context=64, tokens_per_row=256, min_count=1)
    extra = {"provenance": provenance(Histories.open(small_data))}
    Bundle("pretrained", SMALL, settings, vocabulary, state, extra=extra).write(folder)
    return folder


def configured(data: Path, init: Path | None, *overrides: str) -> TuneConfig:
    init_key = "init=null" if init is None else f"init={init}"
    return load("tune", ["task=readmission", f"data.path={data}", init_key, *CUT, *overrides], TuneConfig)


# -------------------------------------------------------------------------------------------------------- space


@given(num_trials=st.integers(1, 20), seed=st.integers(0, 100))
def test_points_spread_evenly_over_the_space(num_trials: int, seed: int) -> None:
    drawn = space.draw(
        {
            "head_lr": {"loguniform": [1e-4, 1e-2]},
            "dropout": {"uniform": [0.1, 0.3]},
            "pooling": {"choice": ["last", "mean"]},
            "frozen": True,
        },
        num_trials,
        seed,
    )
    below = sum(point["head_lr"] < 1e-3 for point in drawn)
    assert abs(below - num_trials / 2) <= 1
    assert abs(sum(point["pooling"] == "last" for point in drawn) - num_trials / 2) <= 1
    assert all(1e-4 <= p["head_lr"] <= 1e-2 and 0.1 <= p["dropout"] <= 0.3 and p["frozen"] is True for p in drawn)


def test_the_configuration_names_every_parameter() -> None:
    assert all(f"`{name}`" in str(SearchConfig.__doc__) for name in space.PARAMETERS)


@pytest.mark.parametrize("search", ["default", "quick", "physionet"])
def test_a_search_keeps_the_papers_pooling_unless_it_is_set(small_data: Path, search: str) -> None:
    def poolings(model: str, *settings: str) -> set[str]:
        chosen = [f"data.path={small_data}", "init=null", "task=mortality", f"model={model}", f"search={search}"]
        config = load("tune", [*chosen, *settings], TuneConfig)
        start = starting_point(config.data, config.model, None)
        eight = dataclasses.replace(config.search, num_trials=8)
        return {trial.model.pooling for trial in draw_trials(config.tasks, eight, config.train, start)}

    ours = {"default": {"fusion", "variables", "last"}, "quick": {"fusion"}, "physionet": {"variables"}}[search]
    assert poolings("paper") == {"attention"}
    assert poolings("small") == ours
    for model in ("paper", "small"):
        assert poolings(model, "search.space.pooling=mean") == {"mean"}
        assert poolings(model, "search.space.pooling.choice=[last, mean]") == {"last", "mean"}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("+search.space.head_lrr=0.1", "search.space.head_lrr"),
        ("search.space.head_lr.loguniform=[0.1]", "search.space.head_lr.loguniform"),
        ("search.space.head_lr.loguniform=[0,1]", "search.space.head_lr.loguniform"),
        ("search.space.pooling.choice=[]", "search.space.pooling.choice"),
        ("+search.space.dropout.choice=[0.1]", "~search.space.dropout.uniform"),
    ],
)
def test_an_impossible_search_is_refused_when_it_is_configured(small_data: Path, override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        configured(small_data, None, override, "train.rows_per_step=2")


@pytest.mark.parametrize(
    "point",
    [
        *({"context": 1024}, {"pooling": "first"}, {"dropout": 1.5}, {"head_lr": -1.0}, {"frozen": "yes"}),
        *({"head_lr": "fast"}, {"backbone_lr": None}, {"early_fraction": "high"}, {"teacher_fraction": True}),
    ],
)
def test_an_impossible_point_is_refused_before_any_trial(small_data: Path, pretrained: Path, point: dict) -> None:
    config = configured(small_data, pretrained)
    with pytest.raises(ConfigError):
        trial_config(config.tasks, config.train, starting_point(config.data, None, str(pretrained)), point)


# ------------------------------------------------------------------------------------------------------- trials


def test_the_bundle_brings_model_vocabulary_and_rare_code_rule(small_data: Path, pretrained: Path) -> None:
    start = starting_point(DataConfig(str(small_data), context=32, min_count=1000), None, str(pretrained))
    assert start.model == SMALL and start.data.min_count == 1 and start.data.context == 32
    assert len(start.vocabulary.codes) == 3
    wider = replace(SMALL, num_heads=4)
    with pytest.raises(ConfigError, match=r"model\.num_heads=4 .* 2"):
        starting_point(start.data, wider, str(pretrained))
    with pytest.raises(ConfigError, match="model=small"):
        starting_point(start.data, None, None)


@pytest.mark.parametrize("frozen", [False, True])
def test_backbone_and_head_have_their_own_learning_rates(small_data: Path, pretrained: Path, frozen: bool) -> None:
    start = starting_point(DataConfig(str(small_data), min_count=1), None, str(pretrained))
    trial = TrialConfig(["readmission"], [], start.data, start.model, TrainConfig(), 1e-4, 1e-3, frozen)
    model = risk_model(start, trial)
    for name, weight in model.backbone.state_dict().items():
        assert torch.equal(weight, start.state[f"backbone.{name}"])
    lrs = {id(p): group["lr"] for group in parameter_groups(model, trial) for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 1e-3 if not name.startswith("backbone.") else None if frozen else 1e-4
        assert lrs.get(id(parameter)) == expected, name


def test_a_tuning_split_of_one_class_is_refused_with_its_counts(small_data: Path, tmp_path: Path) -> None:
    held = read_labels(small_data / "labels" / "readmission" / "train").to_pylist()
    tuning = [
        {**row, "boolean_value": True} for row in read_labels(small_data / "labels/readmission/tuning").to_pylist()
    ]
    rest = read_labels(small_data / "labels" / "readmission" / "held_out").to_pylist()
    table = read_labels(small_data / "labels" / "readmission").schema
    pq.write_table(_table(held + tuning + rest, table), tmp_path / "0.parquet")
    config = configured(small_data, None, "model=debug", f"task.labels={tmp_path}", f"run.dir={tmp_path}/runs")
    with pytest.raises(UserError, match="the tuning split has 48 positive and 0 negative labels"):
        search(config)
    assert not (tmp_path / "runs").exists()


def test_earlier_views_are_refused_for_labels_without_a_start(small_data: Path, tmp_path: Path) -> None:
    config = configured(small_data, None, "model=debug", "search.space.early_fraction=0.5", f"run.dir={tmp_path}/runs")
    with pytest.raises(
        UserError, match=r"^search\.space\.early_fraction: the labels of readmission have no start[^\n]*$"
    ):
        search(config)
    assert not (tmp_path / "runs").exists()


def test_a_mean_without_held_out_labels_is_refused(small_data: Path, tmp_path: Path) -> None:
    """Nothing would show whether it is better than each of both."""
    for split in ("train", "tuning"):
        (tmp_path / "mine" / split).mkdir(parents=True)
        labels = pq.read_table(small_data / "labels/readmission" / split / "0.parquet")
        pq.write_table(labels, tmp_path / "mine" / split / "0.parquet")
    given = ["model=debug", "report.ensemble=true", f"task.labels={tmp_path / 'mine'}", f"run.dir={tmp_path}/runs"]
    with pytest.raises(UserError, match=r"^report\.ensemble: task readmission has no held-out labels of both[^\n]*$"):
        search(configured(small_data, None, *given))
    assert not (tmp_path / "runs").exists()


def _table(rows: list[dict], schema: object) -> object:
    return pa.Table.from_pylist(rows, schema)


# ------------------------------------------------------------------------------------------------------- search


SAMPLE = f"train.eval_labels={SIZES['tuning']}"  # half of them


def command(data: Path, init: Path, runs: Path, head_lrs: str, *overrides: str) -> list[str]:
    """Two short trials with head learning rates `head_lrs`."""
    short = ["train.max_steps=8", "train.eval_every=2", "train.warmup_steps=1", "train.patience=0", "train.log_every=2"]
    short += ["search.num_trials=2", "search.grace_steps=8", "search.max_failures=1"]
    given = ["task=readmission", f"data.path={data}", f"init={init}", f"run.dir={runs}", "run.name=r"]
    lrs = ["~search.space.head_lr", f"+search.space.head_lr={{choice:{head_lrs}}}", "search.space.frozen=false"]
    lrs += ["search.space.teacher_fraction=0.5"]
    return [sys.executable, str(ROOT / "finetune" / "tune.py"), *given, *CUT, *short, *lrs, *overrides]


@pytest.fixture(scope="module")
def run(
    small_data: Path, pretrained: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A search in which one trial diverges, without a reader and stopped in the middle, then continued by the same
    command, on a machine with a GPU for which the kernels are missing.
    """
    runs = tmp_path_factory.mktemp("tuned")
    environment = with_pretended_gpu(environment, tmp_path_factory.mktemp("pretended"))
    line = command(small_data, pretrained, runs, f"[1e-3,{DIVERGING}]", SAMPLE)
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as stopped:
        assert stopped.stdout is not None and stopped.stderr is not None
        stopped.stdout.readline()
        stopped.stdout.close()
        wait_until(lambda: len(_steps(runs / "r")) >= 2 or stopped.poll() is not None, "the search goes on")
        stopped.send_signal(signal.SIGTERM)
        (runs / "stopped.txt").write_text(stopped.stderr.read())
    assert stopped.returncode == 143, (runs / "stopped.txt").read_text()
    assert json.loads((runs / "r" / "run.json").read_text())["outcome"] == {"state": "stopped"}
    assert not (runs / "r" / "results.json").exists()
    begun = [len(starts(runs / "r" / "tb" / f"trial-{index}")) for index in range(2)]
    (runs / "begun.json").write_text(json.dumps(begun))
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (runs / "said.txt").write_text(done.stdout)
    (runs / "warned.txt").write_text(done.stderr)
    return runs / "r"


def _steps(run_path: Path) -> list[int]:
    """Steps at which the good trials were evaluated, in order, as their newest checkpoints have them."""
    newest = (max(trial.glob("step-*/state.json"), default=None) for trial in (run_path / "trials").glob("trial-*"))
    return [scores["step"] for file in newest if file for scores in json.loads(file.read_text())["evaluations"]]


def test_trials_share_the_examples_that_the_search_found(small_data: Path, tmp_path: Path) -> None:
    """What Ray keeps once for all processes of a host are the buffers of a pickle: every array must be one."""
    config = configured(small_data, None, "model=debug", "search.num_trials=2")
    start = starting_point(config.data, config.model, None)
    first, second = draw_trials(config.tasks, config.search, config.train, start)
    trials = [replace(first, teacher_fraction=0.0), replace(second, teacher_fraction=0.25)]
    histories, table = Histories.open(small_data), read_labels(small_data / "labels" / "readmission")
    training, tuning = (labelled_examples(histories, table, split) for split in ("train", "tuning"))
    teacher_ET = np.linspace(0, 1, len(training), dtype=np.float32)[:, None]
    teacher_ET[3:5] = np.nan  # as where a task has no teacher: the label itself is learned
    buffers: list[pickle.PickleBuffer] = []
    study = Study(start, training, tuning, "mean", trials, tmp_path, teacher_ET)
    pickled = pickle.dumps(study, protocol=5, buffer_callback=buffers.append)
    shared = [memoryview(buffer).toreadonly() for buffer in buffers]
    received = pickle.loads(pickled, buffers=shared)
    for examples, expected in zip(received.examples(trials[0]), (training, tuning), strict=True):
        for name, values in dataclasses.asdict(expected).items():
            got = getattr(examples, name)
            assert name == "dropped" or not got.flags.owndata
            np.testing.assert_array_equal(got, values)
    distilled, _ = received.examples(trials[1])
    expected_ET = np.where(np.isnan(teacher_ET), training.label_ET, 0.75 * training.label_ET + 0.25 * teacher_ET)
    np.testing.assert_allclose(distilled.label_ET, expected_ET, rtol=1e-6)
    assert distilled.stop_E is received.training.stop_E


@pytest.mark.slow
def test_a_stopped_search_goes_on_where_it_was(run: Path) -> None:
    assert _steps(run) == [2, 4, 6, 8]
    good = json.loads((run / "results.json").read_text())["best_trial"]
    first, second = starts(run / "tb" / f"trial-{good}")
    assert first == 0 and second >= 2, "the trial began again from scratch"
    *_, said = (run.parent / "stopped.txt").read_text().splitlines()
    assert said == "stopped by SIGTERM: the same command continues it"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="mamba-ssm is installed")
def test_a_search_runs_on_the_cpu_where_a_gpu_lacks_its_kernels(run: Path) -> None:
    (line,) = (run.parent / "warned.txt").read_text().splitlines()
    assert line.startswith("computing on cpu: a GPU is there, but mamba-ssm is not installed"), line
    assert json.loads((run / "run.json").read_text())["config"]["device"] == "cpu"


@pytest.mark.slow
def test_a_search_leaves_no_pickle(run: Path) -> None:
    names = {path.name for path in run.rglob("*") if path.is_file()}
    assert not [name for name in names if name.startswith("experiment_state") or name.endswith((".pkl", ".pickle"))]
    assert not (run / "tune").exists()


@pytest.mark.slow
def test_a_finished_search_leaves_everything_it_promises(run: Path, small_data: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    assert (found["task"], found["split"]) == ("readmission", "held_out")
    assert found["num_labels"] == 2 * SIZES["held_out"] and found["num_subjects"] == SIZES["held_out"]
    assert found["prevalence"] == 0.5
    for name in ("auroc", "auprc"):
        low, high = found[name]["ci"]
        assert 0 <= low <= found[name]["value"] <= high <= 1
    assert 0 <= found["brier"] <= 1 and 0 <= found["ece"] <= 1
    assert "only 12 patients with a positive label (100 are needed), only 24 patients (" in found["note"]
    assert found["labels"]["labels"] == 2 * sum(SIZES.values())
    assert found["splits"]["tuning"]["positives"] == SIZES["tuning"]
    assert 0 < found["compared_on"]["labels"] < found["compared_on"]["of"] == 2 * SIZES["tuning"]
    assert found["compared_on"]["standard_error"]["auroc"] > 0
    assert found["splits"]["train"]["subjects"] == SIZES["train"]

    good = found["trials"][found["best_trial"]]
    checkpoints = [json.loads(path.read_text())["score"] for path in (run / "trials").glob("*/step-*/state.json")]
    assert good["status"] == "finished" and good["step"] == 8
    assert good["best"]["mean"] == pytest.approx(max(checkpoints))
    assert good["best"]["mean"] == pytest.approx((good["best"]["auroc"] + good["best"]["auprc"]) / 2)

    report = (run / "report.md").read_text()
    assert f"{found['auroc']['value']:.3f}" in report and "too few" in report
    assert found["picture"] == "readmission.png" and "(readmission.png)" in report
    assert (run / "readmission.png").read_bytes().startswith(b"\x89PNG")
    assert found["initial_weights"] == "same split" and SENTENCES["same split"] in report
    assert "| model | " in report and "| gradient boosting | " in report.split("## Scores")[1]  # both recalibrated
    assert "by chance alone a perfect model" in report.split("## Scores")[0]  # the verdict comes first
    boosting = found["boosting"]
    for name in ("auroc", "auprc"):
        difference = found[name]["value"] - boosting[name]["value"]
        assert boosting["difference"][name]["value"] == pytest.approx(difference)
        assert f"{boosting[name]['value']:.3f}" in report.split("## Scores")[0]
    said = (run.parent / "said.txt").read_text()
    assert f"{found['auprc']['value']:.3f}" in said and str(run / "bundle") in said and "tensorboard --logdir" in said
    assert ", and gradient boosting to compare" in said and "fitting gradient boosting" not in said  # once, not twice


@pytest.mark.slow
def test_a_failed_trial_is_shown_and_sinks_nothing(run: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    (failed,) = [trial for trial in found["trials"] if trial["index"] != found["best_trial"]]
    assert failed["status"] == "failed" and failed["parameters"]["head_lr"] == DIVERGING
    assert failed["error"].startswith("FloatingPointError")
    assert failed["error"] in (run / "report.md").read_text()
    said = (run.parent / "said.txt").read_text()
    assert f"trial-{failed['index']} failed: FloatingPointError" in said
    assert re.search("trials [01] done, [01] running, 1 failed", said), said
    begun = json.loads((run.parent / "begun.json").read_text())[failed["index"]]
    assert len(starts(run / "tb" / f"trial-{failed['index']}")) == begun + 1, (
        "it was tried again, which ends the same way"
    )


@pytest.mark.slow
def test_the_bundle_gives_the_predictions_that_were_scored(run: Path, small_data: Path) -> None:
    bundle = read_bundle(run, kind="risk")
    assert bundle.tasks == ["readmission"] and bundle.data.context == 32
    histories = Histories.open(small_data)
    examples = labelled_examples(histories, read_labels(small_data / "labels" / "readmission"), "held_out")
    outputs = predict(bundle, histories, examples, CPU)
    written = pq.read_table(run / "predictions.parquet")
    assert prediction_table(examples, outputs.probability_ET[:, 0]).equals(written)
    found = json.loads((run / "results.json").read_text())
    assert bundle.extra["recalibration"] == {found["task"]: found["recalibration"]}
    trained = load_file(Path(found["trials"][found["best_trial"]]["checkpoint"]) / "model.safetensors")
    tuning = labelled_examples(histories, read_labels(small_data / "labels" / "readmission"), "tuning")
    untouched = dataclasses.replace(bundle, state=trained)
    before, after = (predict(b, histories, tuning, CPU).logit_ET[:, 0] for b in (untouched, bundle))
    recalibration = recalibrate(tuning.label_E, before)
    assert recalibration.temperature == pytest.approx(found["recalibration"]["temperature"], rel=1e-4)
    assert after == pytest.approx(recalibration(before), abs=1e-5)
    assert _likelihood(tuning.label_E, after) <= _likelihood(tuning.label_E, before)
    label, prob = (written[name].to_numpy() for name in ("boolean_value", "predicted_boolean_probability"))
    pairs = (prob[label][:, None] > prob[~label]) + 0.5 * (prob[label][:, None] == prob[~label])
    assert found["auroc"]["value"] == pytest.approx(pairs.mean())
    assert found["brier"] == pytest.approx(np.mean((prob - label) ** 2), abs=1e-6)


def _likelihood(label: np.ndarray, logit: np.ndarray) -> float:
    """Negative log-likelihood of the labels."""
    return float(np.logaddexp(0, np.where(label > 0.5, -logit, logit)).sum())


@pytest.mark.slow
def test_meds_evaluation_reads_the_predictions(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    line = [sys.executable, "-m", "meds_evaluation", f"predictions_path={run / 'predictions.parquet'}"]
    line += [f"output_file={out}", f"hydra.run.dir={tmp_path}/hydra"]
    subprocess.run(line, check=True, capture_output=True, timeout=120)
    theirs = json.loads(out.read_text())["samples_equally_weighted"]
    ours = json.loads((run / "results.json").read_text())
    assert theirs["roc_auc_score"] == pytest.approx(ours["auroc"]["value"])
    assert theirs["average_precision_score"] == pytest.approx(ours["auprc"]["value"])


@pytest.mark.slow
def test_tensorboard_has_curves_and_hyperparameters(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = json.loads((run / "results.json").read_text())
    events = EventAccumulator(str(run / "tb" / f"trial-{found['best_trial']}" / "tb"))
    events.Reload()
    assert {"validation/auroc", "train/loss", "best/auroc"} <= set(events.Tags()["scalars"])
    assert "_hparams_/session_start_info" in events.summary_metadata


@pytest.mark.slow
def test_a_finished_search_only_shows_its_results_again(run: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    record = json.loads((run / "run.json").read_text())
    assert set(record["inputs"]) == {"data.path", "init", "task.labels"}
    config = record["config"]
    trials = f"[1e-3,{DIVERGING}]"
    line = command(Path(config["data"]["path"]), Path(config["init"]), run.parent, trials, SAMPLE)
    smaller = [*line, "report.boosting=false"]  # on a machine that cannot hold its features
    search(load("tune", smaller[2:], TuneConfig))
    assert str(run / "bundle") in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=r"train\.seed was 0, now 1") as caught:
        search(load("tune", [*line[2:], "train.seed=1"], TuneConfig))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_search_whose_trials_all_fail_says_why(
    small_data: Path, pretrained: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    line = command(
        small_data, pretrained, tmp_path, f"[{DIVERGING}]", "search.num_trials=1", "search.space.teacher_fraction=0"
    )
    failed = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert failed.returncode == 2
    assert "all 1 trials failed, the first with FloatingPointError" in failed.stderr
    assert "0 done, 0 running, 1 failed" in failed.stdout
    assert len(starts(tmp_path / "r" / "tb" / "trial-0")) == 1, "it was tried again, which ends the same way"
    assert not (tmp_path / "r" / "results.json").exists() and not (tmp_path / "r" / "bundle").exists()
