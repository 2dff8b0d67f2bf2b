"""`init`: the bundle that pretraining, tuning and benchmarks start from."""

from __future__ import annotations

import multiprocessing
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import ROOT
from raw_meds import config, write_raw
from small_cohort import write_meds

from hymate.command import load
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.tasks import read_or_extract_labels
from hymate.data.vocabulary import Vocabulary
from hymate.errors import ConfigError, UserError
from hymate.inference.bundle import CARD, Bundle
from hymate.inference.initial import SHIPPED, check_codes, initial_bundle, require_same_model
from hymate.inference.provenance import provenance
from hymate.model.pretrain_model import PretrainModel
from hymate.runs import absolute
from hymate.training import loop
from hymate.training.pretraining import PretrainConfig, pretrain, pretraining_job
from hymate.tuning.benchmark import _calls, benchmark, train_and_score
from hymate.tuning.protocol import BenchmarkConfig, ContenderRun
from hymate.tuning.search import TuneConfig, search
from hymate.tuning.trial import draw_trials, risk_model, starting_point, trial_job

MAP = "code,canonical_code\nLAB//marker,heart_rate\nLAB//sodium,sodium\nLAB//glucose,glucose\n"
MODEL = ["model=debug", "model.pooling=variables", "model.members=2"]
FORECAST = ["objective=forecast", "objective.horizon_hours=12"]
CHALLENGE = ("HR//bpm", "Na//mEq/L", "Glucose//mg/dL")  # the same codes in PhysioNet 2012
CUT = ["data.context=32", "data.tokens_per_row=256"]
STEP = ["train.rows_per_step=1", "train.max_steps=1", "train.warmup_steps=0", "train.eval_every=1"]


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cohort with codes that the bundle knows."""
    folder = tmp_path_factory.mktemp("canonical")
    (folder / "map.csv").write_text(MAP)
    prepare(config(write_meds(folder / "raw"), folder / "data", codes=str(folder / "map.csv")))
    return folder / "data"


@pytest.fixture(scope="module")
def init(canonical: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of the cohort, as pretraining writes it."""
    folder = tmp_path_factory.mktemp("pretrained") / "bundle"
    given = load("pretrain", [f"data.path={canonical}", *MODEL, *FORECAST, *CUT], PretrainConfig)
    histories = Histories.open(canonical)
    vocabulary, extra = Vocabulary.of(histories, 10), {"provenance": provenance(histories)}
    torch.manual_seed(1)
    state = PretrainModel(given.model, given.objective, vocabulary.size).state_dict()
    Bundle("pretrained", given.model, given.data, vocabulary, state, extra=extra).write(folder)
    return str(folder)


def test_codes_that_the_bundle_does_not_know_are_pointed_out(
    init: str, canonical: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = initial_bundle(init)
    check_codes(bundle, init, Histories.open(canonical))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"^init=.*/bundle knows the codes of 0\.0% of .* with a code map to"):
        check_codes(bundle, init, Histories.open(small_data))

    rows = {
        f"{split}/0": [(place * 100 + n, n, code, 1.0) for n in range(40) for code in CHALLENGE]
        for place, split in enumerate(("train", "tuning", "held_out"), start=1)
    }
    prepare(config(write_raw(tmp_path / "challenge", rows), tmp_path / "a"))
    with pytest.raises(UserError, match=r"knows .*: prepare it with codes=physionet2012, by which .* 100%$"):
        check_codes(bundle, init, Histories.open(tmp_path / "a"))

    mixed = {
        shard: sorted(own + [(id, n, "heart_rate", 80.0) for id, n, code, _ in own if code == CHALLENGE[0]])
        for shard, own in rows.items()
    }
    prepare(config(write_raw(tmp_path / "mixed", mixed), tmp_path / "b"))
    check_codes(bundle, init, Histories.open(tmp_path / "b"))
    line = f"warning: init={init} knows the codes of 25.0% of this dataset's training events: prepare it with codes="
    assert capsys.readouterr().out.startswith(line)


def test_values_in_another_unit_are_pointed_out(init: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "map.csv").write_text(
        MAP.replace("\n", ",\n").replace("_code,", "_code,offset").replace("sodium,\n", "sodium,9\n")
    )
    prepare(config(write_meds(tmp_path / "raw"), tmp_path / "data", codes=str(tmp_path / "map.csv")))
    capsys.readouterr()
    check_codes(initial_bundle(init), init, Histories.open(tmp_path / "data"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: sodium: its median is 8.9") and line.endswith("A code map can mend it")


def test_a_search_without_common_codes_is_refused_before_it_begins(init: str, small_data: Path, tmp_path: Path) -> None:
    settings = ["task=readmission", f"data.path={small_data}", f"run.dir={tmp_path}", f"init={init}", *CUT]
    with pytest.raises(UserError, match="knows the codes of"):
        search(load("tune", settings, TuneConfig))
    given = [f"data.path={small_data}", f"run.dir={tmp_path}", f"init={init}", *CUT]
    with pytest.raises(UserError, match="knows the codes of"):
        pretrain(load("pretrain", [*given, *MODEL], PretrainConfig))
    with pytest.raises(ConfigError, match=r"model\.d_model=128 does not fit .* 32: give the bundle's model"):
        pretrain(load("pretrain", given, PretrainConfig))
    compared = ["task=readmission", f"data.path={small_data}", f"run.dir={tmp_path}", f"init={init}", *CUT, "seeds=1"]
    with pytest.raises(ConfigError, match=r"model\.d_model=64 does not fit .* 32: give"):
        benchmark(load("benchmark", compared, BenchmarkConfig))
    with pytest.raises(UserError, match="knows the codes of"):
        benchmark(load("benchmark", [*compared, *MODEL], BenchmarkConfig))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ training


def test_fine_tuning_starts_from_it(init: str, canonical: Path) -> None:
    settings = ["task=readmission", f"data.path={canonical}", f"init={init}", "search.num_trials=1", *CUT, *STEP]
    given = load("tune", [*settings, "search.space.pooling=variables", "search.space.frozen=false"], TuneConfig)
    start = starting_point(given.data, given.model, given.init)
    (trial,) = draw_trials(given.tasks, given.search, given.train, start)
    histories = Histories.open(canonical)
    table = read_or_extract_labels(canonical, given.tasks[0]).table
    examples = [labelled_examples(histories, table, split) for split in ("train", "tuning")]
    with loop.single_process() as worker:
        job = trial_job(start, trial, histories, *examples, "mean", worker)
    begun = job.module.state_dict()
    shipped = {
        name: weight
        for name, weight in initial_bundle(init).state.items()
        if name.startswith(("backbone.", "pooling."))
    }
    assert shipped and all(torch.equal(begun[name], weight) for name, weight in shipped.items())


def test_pretraining_goes_on_from_it(init: str, canonical: Path) -> None:
    more = ["objective.code_weight=1", "objective.time_to_event_weight=1"]
    settings = [f"data.path={canonical}", f"init={init}", *MODEL, *FORECAST, *more, *CUT, *STEP]
    given = load("pretrain", settings, PretrainConfig)
    with loop.single_process() as worker:
        job = pretraining_job(given, worker)
    bundle, begun = initial_bundle(init), job.module.state_dict()
    assert all(torch.equal(begun[name], weight) for name, weight in bundle.state.items())
    new = begun.keys() - bundle.state.keys()
    assert {name.partition(".")[0] for name in new} == {"code_head", "time_head"}


@pytest.mark.slow
def test_a_benchmark_starts_from_it_instead_of_pretraining(init: str, canonical: Path, tmp_path: Path) -> None:
    settings = [
        "task=readmission",
        f"data.path={canonical}",
        f"run.dir={tmp_path}",
        *MODEL,
        f"init={init}",
        *CUT,
        *STEP,
    ]
    given = load("benchmark", [*settings, "only=[pretrained]", "folds=2", "seeds=1", "device=cpu"], BenchmarkConfig)
    run = ContenderRun("pretrained", 0, 0, 0)
    (call,) = _calls(given, [run])
    assert (call.name, call.needs) == (str(run), None)
    with multiprocessing.get_context("spawn").Pool(1) as processes:  # DeepSpeed trains once in one
        processes.starmap(train_and_score, [(given, run)])
    assert (tmp_path / "benchmark-readmission" / "runs" / "pretrained-all-seed0-fold0.json").is_file()


# ------------------------------------------------------------------------------------------------- those that ship


def test_a_bundle_that_ships_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = initial_bundle("icu")
    assert (bundle.kind, bundle.fingerprint) == ("pretrained", initial_bundle(str(SHIPPED / "icu")).fingerprint)
    monkeypatch.chdir(tmp_path)

    def init_of(init: str) -> str | None:
        return absolute(load("tune", ["task=mortality", "data.path=data", f"init={init}"], TuneConfig)).init

    assert init_of("icu") == "icu"  # no path, which other machines might not have
    assert init_of("runs/icu") == str(tmp_path / "runs" / "icu")
    (tmp_path / "icu").mkdir()
    assert init_of("icu") == str(tmp_path / "icu")  # one's own folder comes first


def test_a_wrong_name_is_refused_with_those_that_ship(small_data: Path, tmp_path: Path) -> None:
    settings = ["task=readmission", f"data.path={small_data}", f"run.dir={tmp_path}", "init=icux"]
    line = "^init=icux: there is no such folder: give that of a bundle or of a finished run, or the name .* ours: icu$"
    with pytest.raises(UserError, match=line):
        search(absolute(load("tune", settings, TuneConfig)))
    assert not list(tmp_path.iterdir())


def test_its_card_names_licences_and_the_pretraining_that_made_it() -> None:
    """The card is written by hand, so its figures are compared with the bundle."""
    bundle, card = initial_bundle("icu"), (SHIPPED / "icu" / CARD).read_text()
    sources = (
        "Open Data Commons Attribution License 1.0",
        "Creative Commons Attribution 4.0",
        "Goldberger",
        "MIMIC-IV",
    )
    for named in (*sources, "2012;39:245-248", "2020;48:210-217", bundle.extra["provenance"]["fingerprint"]):
        assert named in card, named
    for name, value in bundle.extra["metrics"].items():
        assert f"| {name} | {value:.4g} |" in card
    files = [file.stat().st_size for file in (SHIPPED / "icu").iterdir()]
    assert len(files) == 4 and sum(files) < 4e6


def test_the_command_that_makes_it_makes_this_one(tmp_path: Path) -> None:
    """`make icu`: all settings are taken, and its model, context and rule for rare codes are the bundle's."""
    made = [
        "make",
        "--no-print-directory",
        "-n",
        "-o",
        ".venv/.installed",
        "icu",
        f"P2012={tmp_path}",
        f"P2019={tmp_path}",
        "ICU=built",
    ]
    done = subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    commands = {words[1]: words[2:] for words in map(shlex.split, lines) if words[0].endswith("python")}
    given = load("pretrain", commands["pretrain/run.py"], PretrainConfig)
    bundle = initial_bundle("icu")
    assert (given.model, given.data.context, given.data.min_count) == (
        bundle.model,
        bundle.data.context,
        bundle.data.min_count,
    )
    *prepared, several = (shlex.split(line)[3:] for line in lines if "hymate.data.prepare" in line)
    assert len(prepared) == 2
    for settings in (*prepared, several):
        load("prepare", settings, PrepareConfig)
    assert lines[-1].startswith("cp built/runs/icu/bundle/") and lines[-1].endswith(" hymate/bundles/icu/")


def test_its_scan_may_become_aware_of_time_and_begins_as_it_was(canonical: Path) -> None:
    settings = ["task=readmission", f"data.path={canonical}", "init=icu", "model=physionet", *STEP]
    given = load("tune", [*settings, "model.time_aware_scan=true", "search.space.frozen=true"], TuneConfig)
    start = starting_point(given.data, given.model, given.init)
    with pytest.raises(ConfigError, match=r"search\.space\.frozen: .* nothing of time .*frozen=false$"):
        draw_trials(given.tasks, given.search, given.train, start)
    space = {**given.search.space, "frozen": False}
    trial, *_ = draw_trials(given.tasks, replace(given.search, space=space), given.train, start)
    model, begun = risk_model(start, trial), initial_bundle("icu")
    added = {name for name in model.state_dict() if name.startswith("backbone.")} - begun.state.keys()
    assert added and all(name.endswith(".time_weight") for name in added)
    assert not any(model.state_dict()[name].any() for name in added)
    compared = [*settings, "model.time_aware_scan=true", f"run.dir={canonical.parent}/compared", "seeds=1"]
    with pytest.raises(ConfigError, match=r"^contenders\.pretrained\.point\.frozen: .*frozen=false$"):
        benchmark(load("benchmark", compared, BenchmarkConfig))
    timed = replace(begun, model=start.model)
    with pytest.raises(ConfigError, match="time_aware_scan=False does not fit the bundle of init, which has True"):
        require_same_model(timed, begun.model)


@pytest.mark.parametrize("model", ["physionet", "physionet2019"])
def test_both_recipes_start_from_its_encoder_and_its_variables(model: str, canonical: Path) -> None:
    settings = ["task=readmission", f"data.path={canonical}", "init=icu", f"model={model}", f"search={model}", *STEP]
    given = load("tune", settings, TuneConfig)
    start = starting_point(given.data, given.model, given.init)
    trial, *_ = draw_trials(given.tasks, given.search, given.train, start)
    begun = risk_model(start, trial).state_dict()
    parts = ("backbone.", "pooling.")
    pretrained = {name: weight for name, weight in start.state.items() if name.startswith(parts)}
    new = {name for name in begun if name.startswith(parts)} - pretrained.keys()
    assert new == ({"pooling.elapsed.moment.weight"} if start.model.elapsed else set())
    for name, weight in pretrained.items():  # fewer members: the first ones
        assert torch.equal(begun[name], weight[: len(begun[name])]), name
    assert len(begun["pooling.static.weight"]) == start.model.members == {"physionet": 8, "physionet2019": 1}[model]
