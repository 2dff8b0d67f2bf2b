"""Configuration: every YAML file composes, and a mistake becomes one line."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose
from omegaconf import OmegaConf

from hymate import command as command_lines
from hymate.baselines import BaselinesConfig
from hymate.command import CONFIGS, load, main
from hymate.config import RunConfig, TaskConfig
from hymate.data.prepare import PrepareConfig
from hymate.errors import ConfigError
from hymate.evaluate import EvaluateConfig
from hymate.explain import ExplainConfig
from hymate.plan import PlanConfig
from hymate.predict import PredictConfig
from hymate.runs import run_folder
from hymate.training.pretraining import PretrainConfig
from hymate.trees import RENAMED, build, dump_yaml, parse_yaml, to_tree
from hymate.tuning.protocol import BenchmarkConfig
from hymate.tuning.search import TuneConfig
from hymate.tuning.space import check_point

PATH = "data.path=somewhere"
CHOICES = [
    f"{group}={file.stem}"
    for group in ("model", "objective", "train")
    for file in sorted((CONFIGS / group).glob("*.yaml"))
]


@pytest.fixture(autouse=True, scope="module")
def composed_once() -> Iterator[None]:
    """Hydra composes the same choices of the same files once: it takes four fifths of what a configuration takes."""
    once = functools.cache(lambda name, overrides: compose(name, overrides=list(overrides)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_lines, "compose", lambda name, overrides: once(name, tuple(overrides)))
        yield


def pretrain_config(*overrides: str) -> PretrainConfig:
    return load("pretrain", [PATH, *overrides], PretrainConfig)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice: str) -> None:
    assert isinstance(pretrain_config(choice), PretrainConfig)


def test_choices_do_what_their_names_say() -> None:
    assert [pretrain_config(f"train=zero{stage}").train.zero_stage for stage in range(4)] == [0, 1, 2, 3]
    assert pretrain_config("objective=forecast").objective.code_weight == 0
    assert pretrain_config("objective=both").objective.forecast_weight > 0
    assert pretrain_config("objective=time_to_event").objective.time_to_event_weight > 0
    config = pretrain_config("model=small", "train=zero2", "train.num_workers=4", "run.name=mine")
    assert (config.train.num_workers, config.run.name) == (4, "mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_workrs=2", "num_workrs"),
        ("model.d_modle=2", "d_modle"),
        ("model=tiny", "tiny"),
        ("train.num_workers=three", "train.num_workers must be a whole number"),
        ("train.num_workers=3", "train.rows_per_step must be a multiple of num_workers=3"),
        ("train.zero_stage=4", "train.zero_stage must be 0, 1, 2 or 3"),
        ("train.precision=fp16", "train.precision must be one of fp32, bf16"),
        ("train.learning_rate=0", "train.learning_rate must be positive"),
        ("train.eval_rows=0", "train.eval_rows must be positive"),
        ("data.context=20000", "data.tokens_per_row must be at least context=20000"),
        ("model.layers=MXA", "model.layers takes the letters"),
        ("task=[mortality,readmission]", "task is not a known key: known keys are data, model,"),
        ("run.name=a/b", "run.name must be a plain folder name"),
        ("objective.mask_fraction=1.5", "objective.mask_fraction must be in"),
        ("model=[debug,small]", "model takes one of them: give model=debug"),
        (".=x", "'' is not a known key: known keys are data, model,"),
        ("/etc=x", "/etc is not a known key: known keys are data, model,"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        pretrain_config(override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("pretrain", "objective.mask_share", "objective.mask_fraction"),
        ("pretrain", "objective.span_share", "objective.span_fraction"),
        ("pretrain", "train.min_lr_share", "train.min_lr_fraction"),
        ("tune", "search.space.early_share", "search.space.early_fraction"),
        ("tune", "+search.space.teacher_share", "search.space.teacher_fraction"),
        ("benchmark", "point.early_share", "point.early_fraction"),
        ("explain", "cohort", "num_predictions"),
        ("explain", "patients", "num_subjects"),
        ("benchmark", "contenders.distilled.point.teacher_share", "contenders.distilled.point.teacher_fraction"),
    ],
)
def test_a_key_of_before_is_refused_with_its_new_name(command: str, old: str, new: str) -> None:
    schema, required, _ = COMMANDS[command]
    with pytest.raises(ConfigError, match=rf"^{re.escape(old.lstrip('+'))} is not a known key: did you mean {new}\?"):
        load(command, [*required, f"{old}=0.1"], schema)


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1" + "0" * 400])
@pytest.mark.parametrize("key", ["train.learning_rate", "objective.code_weight", "model.mlp_ratio"])
def test_a_number_that_is_not_finite_is_refused_by_its_key(key: str, number: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} must be a finite number, got [^\n]*$"):
        pretrain_config(f"{key}={number}")


@pytest.mark.parametrize("number", ["inf", "nan", "1" + "0" * 400])
def test_a_search_is_not_over_numbers_that_are_not_finite(number: str) -> None:
    with pytest.raises(ConfigError, match=r"^search\.space\.dropout\.uniform must be two finite numbers[^\n]*$"):
        tune_config("task=mortality", f"search.space.dropout.uniform=[0, {number}]")
    with pytest.raises(ConfigError, match=r"^search\.space\.head_lr must be a finite positive number[^\n]*$"):
        check_point(
            {"head_lr": tune_config("task=mortality", f"search.space.head_lr={number}").search.space["head_lr"]},
            "search.space",
        )


# Each command with what it requires, and its keys that hold text.
COMMANDS: dict[str, tuple[type, list[str], list[str]]] = {
    "prepare": (PrepareConfig, ["source=meds", "raw=R", "out=D"], ["out", "raw"]),
    "pretrain": (PretrainConfig, [PATH], ["data.path", "run.dir", "init"]),
    "tune": (
        TuneConfig,
        [PATH, "init=B", "task=[mortality,readmission]"],
        ["init", "run.dir", "task.mortality.labels"],
    ),
    "benchmark": (BenchmarkConfig, [PATH, "task=mortality"], ["data.path", "task.labels", "task.competing"]),
    "predict": (
        PredictConfig,
        [PATH, "bundle=B", "out=o", "task=mortality", "context=all"],
        ["bundle", "out", "states"],
    ),
    "evaluate": (EvaluateConfig, [PATH, "bundle=B", "out=o", "task=mortality"], ["data.path", "bundle", "out"]),
    "explain": (ExplainConfig, [PATH, "bundle=B", "out=o", "task=mortality"], ["data.path", "bundle", "task.labels"]),
    "baselines": (BaselinesConfig, [PATH, "out=o", "task=mortality"], ["data.path", "out", "task.labels"]),
    "plan": (PlanConfig, [], ["data.path"]),
}
PLACES = ["s3:/x", "s3://", "S3://b/x", "file:x", "http://h/x", "~nobody-of-this-name", "", "s3://b/a?1", "s3://b/../x"]
TEXTS = [
    *("1.10", "1_000", "1e5", "12e4567", "7216e91", "+5", "-3", "007", "0x1F", ".5", "1.", "inf", "nan", "true", "OFF"),
    *("None", "~", "a=b", "=x", "date=2026-11-26/d", "d(1)", "or(a, b)", "(copy)", "d#1", "données", "Müller 患者"),
    *("it's", 'a "b" c', "'a'b'", '"a', "a'", "a,b", "a, b", "a: b", ";", "100%", "%20", "a&b", "*", "?", "a?b"),
    *("$HOME", "${run.name}", "a${", "\\${x}", "\\\\${x}", "{a: 1}", "{"),
    *("[1, 2]", "[a", "a]", "^ADM.*", "a//b", "..."),
    *("a b", " a ", "a ", "C:\\data\\new", "\\", "a\\", "a\\\\", "-x", "--x", "@x", "!x", "|", "<x>", "`x`", "\u200b"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "text"),
    [*(("pretrain", text) for text in TEXTS), *product(COMMANDS, ["1.10", "${x} d(1)#", "C:\\it's=é, b\\"])],
)
def test_text_is_taken_as_it_was_typed(command: str, text: str) -> None:
    schema, required, keys = COMMANDS[command]
    config = load(command, [*required, *(f"{key}={text}" for key in keys)], schema)
    tree = to_tree(config)
    for again in (json.loads(json.dumps(tree)), parse_yaml(dump_yaml(tree))):
        assert build(schema, again) == config
    for key in keys:
        found: Any = tree
        for part in key.split("."):
            found = found[part]
        assert found == text


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_what_names_no_place_is_refused_by_its_key(command: str) -> None:
    schema, required, keys = COMMANDS[command]
    for key, text in product(set(keys) - {"task.competing"}, PLACES):
        tree = to_tree(load(command, required, schema))
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[last] = text
        with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: [^\n]*$"):
            build(schema, tree)


@pytest.mark.parametrize("name", ["", "a/b", ".a", "~", "~a", "a\nb", "\x00", "\udcff"])
def test_the_name_of_a_run_is_that_of_a_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^name must be a plain folder name"):
        RunConfig(name)


def test_the_name_of_a_run_at_a_url_has_no_question_mark() -> None:
    assert run_folder(RunConfig("a?b")) == Path("runs/a?b").absolute()
    with pytest.raises(ConfigError, match=r"^name must be .*at a URL no \?"):
        RunConfig("a?b", "s3://bucket/runs")


def test_quotes_around_a_whole_text_are_not_part_of_it() -> None:
    assert pretrain_config("run.name='1.10'").run.name == pretrain_config('run.name="1.10"').run.name == "1.10"
    assert pretrain_config("""data.path='"x"'""").data.path == '"x"'
    assert tune_config("task=mortality", "init=null").init is None
    assert tune_config("task=mortality", "init='null'").init == "null"
    assert tune_config("task=mortality", "task.name=1e5").run.name == "tune-1e5"


def test_a_regular_expression_needs_no_quotes() -> None:
    code = "task.definition.predicates.hospital_admission.code.regex"
    gap = "task.definition.windows.gap.end"
    config = tune_config("task=mortality", f"{code}=^(ADM|HOSP)//.*$", f"{gap}=start + 48h")
    assert isinstance(config.task, TaskConfig) and config.task.definition is not None
    assert config.task.definition["predicates"]["hospital_admission"] == {"code": {"regex": "^(ADM|HOSP)//.*$"}}
    assert config.task.definition["windows"]["gap"]["end"] == "start + 48h"
    assert tune_config("task=mortality", 'report.subgroups=["^R#, ", b]').report.subgroups == ["^R#, ", "b"]


def test_numbers_lists_and_dictionaries_are_read_as_such() -> None:
    config = tune_config(
        "task=mortality",
        "train.max_steps=1_000",
        "train.learning_rate=1e-3",
        "train.beta1=0",
        "data.context=+64",
        "search.grace_steps=${train.max_steps}",
        "+search.space.context={choice: [2048, 8192]}",
        "report.age_bands=[18,65]",
        "report.boosting=False",
    )
    assert (config.train.max_steps, config.train.learning_rate, config.train.beta1) == (1000, 1e-3, 0.0)
    assert (config.data.context, config.search.grace_steps) == (64, 1000)
    assert config.search.space["context"] == {"choice": [2048, 8192]}
    assert config.report.age_bands == [18, 65] and config.report.boosting is False


def test_a_mean_of_network_and_boosting_needs_boosting() -> None:
    assert tune_config("task=mortality", "report.ensemble=true").report.ensemble
    with pytest.raises(ConfigError, match=r"^report\.ensemble needs report\.boosting=true, got True$"):
        tune_config("task=mortality", "report.ensemble=true", "report.boosting=false")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("report.subgroups=[1.10]", r"report\.subgroups\[0\] must be text, got 1\.1: put it in quotes"),
        ("report.subgroups=[^RACE]", "report.subgroups cannot be read: put each text in it in quotes"),
        ("report.subgroups=^RACE", "report.subgroups must be a list, got '\\^RACE'"),
        (
            "task.definition.predicates.died.code=250.00",
            r"died\.code must be text, got 250\.0: put it in quotes",
        ),
        (
            "+task.definition.predicates.x={code: 250.00}",
            r"x\.code must be text, got 250\.0: put it in quotes",
        ),
        (
            "+task.definition.predicates.x={code: {any: [A, 25]}}",
            r"x\.code must be text, got 25: put it in",
        ),
        ("task.definition.predicates.died.code.regex=1.10", r"died\.code must be text, got 1\.1: put it"),
        ("run={name: 1.10}", r"run\.name must be text, got 1\.1: put it in quotes"),
        ("run={name: a=b}", "run cannot be read: put each text in it in quotes"),
        ("train.max_steps=d(1)", r"train\.max_steps must be a whole number, got 'd\(1\)'"),
        ("train.max_steps=1,2", r"train\.max_steps must be a whole number, got '1,2'"),
        ("train.max_steps.x=1", r"train\.max_steps\.x is not a known key: train\.max_steps is one value"),
        ("task.lables=d(1)", "lables"),
        ("run.nam=d(1)", r"run\.nam is not a known key: did you mean run\.name\?"),
        (
            "task.definition.predicates.dide.code=A",
            r"dide is not a known key: did you mean .*died\?; \+task.*VALUE",
        ),
        ("search.space.contxt=64", r"contxt is not a known key: known keys are .*; \+search\.space\.contxt=VALUE adds"),
        ("model.d_model=64", r"model\.d_model cannot be set while model is null: choose model=FILE, too"),
        ("~run.nam", r"run\.nam is not a known key: did you mean run\.name\?"),
        ("+rum=d(1)", r"rum is not a known key: did you mean run\?"),
        ("model=d(1)", r"there is no model/d\(1\): choose from base, debug, "),
        ("train@pretrain=007", r"there is no train/007: choose from zero0, "),
        ("run.name", r"'run\.name' is not a setting: write key=value"),
        ("run.name=a\nb", r"'run\.name=a\\nb' holds a control character"),
        ("run.name=\udcff", "is not UTF-8"),
        ("known=mimic", r"^known is not a known key: known keys are data, .*run"),
        ("+model=small", r"^\+model=small: model takes one file: write model=small$"),
        ("hydra.run.dir=DIR", r"^hydra\.run\.dir is not a known key, .*run\.dir and run\.name"),
        ("+hydra.job.chdir=true", r"^hydra\.job\.chdir is not a known key"),
        ("hydra/launcher=joblib", "^hydra/launcher is not a known key"),
        ("~hydra", "^hydra is not a known key"),
        ("--multirun", r"--multirun is not an option: .*finetune/tune\.py searches"),
        ("-m", "-m is not an option"),
        ("--cfg", "--cfg is not an option: --help lists the settings"),
        (
            "--config-dir=/tmp",
            "--config-dir is not an option: .* --config-dir DIR comes first, with a space",
        ),
        ("-cn", "-cn is not an option"),
        ("--experimental-rerun", "--experimental-rerun is not an option: .* --repeat RUN_FOLDER "),
        ("--repeat", "--repeat is not an option: .* --repeat RUN_FOLDER or .* comes first, with a space"),
        ("--run.name=x", r"--run\.name is not an option: .* written key=value, without dashes"),
    ],
)
def test_what_cannot_be_taken_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        tune_config("task=mortality", override)
    assert re.search(message, str(caught.value)), str(caught.value)


def own_configs(folder: Path, text: str, name: str = "model/mine.yaml") -> str:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(text.encode("latin-1"))
    return str(folder)


@pytest.mark.parametrize("name", ["own", "a b", "a,b", "it's", 'a"b', "[x]", "a=b"])
def test_a_folder_of_ones_own_adds_files(name: str, tmp_path: Path) -> None:
    own = own_configs(tmp_path / name, "d_model: 48\nlayers: MA\nnum_heads: 2\n")
    config = load("pretrain", ["--config-dir", own, PATH, "model=mine", "model.d_state=24"], PretrainConfig)
    plain = pretrain_config("model.d_model=48", "model.layers=MA", "model.num_heads=2", "model.d_state=24")
    assert config == plain
    assert load("pretrain", ["--config-dir", own, PATH], PretrainConfig) == pretrain_config()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "model/other.yaml",
            "{}",
            r"^model=mine: there is no model/mine: choose from base, debug, large, other, ",
        ),
        ("own/mine.yaml", "{}", r"^model=mine: there is no model/mine: choose from base, "),
        ("model/small.yaml", "", r"/own/model/small\.yaml: HyMaTE itself has a model/small: rename the file$"),
        ("pretrain.yaml", "", r"/own/pretrain\.yaml: HyMaTE itself has a pretrain: rename the file$"),
        ("model/mine.yaml", "d_modle: 48\n", r"^model\.d_modle is not a known key: did you mean model\.d_model\?$"),
        ("model/mine.yaml", "defaults: [_bsae]\n", "model/_bsae"),
        ("model/mine.yaml", "d_model: [48\n", r"own/model/mine\.yaml is not readable as YAML \(.*\)$"),
        ("model/mine.yaml", "- 48\n", r"own/model/mine\.yaml: write keys and values"),
        ("model/mine.yaml", "d_model: \xff\n", r"own/model/mine\.yaml is not readable as YAML \(.*\)$"),
        ("model/mine.yaml", "d_model: ${nothing}\n", "nothing"),
    ],
)
def test_what_is_wrong_in_ones_own_folder_is_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    own = own_configs(tmp_path / "own", text, name)
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        load("pretrain", ["--config-dir", own, PATH, "model=mine"], PretrainConfig)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("given", [[], ["nowhere"]])
def test_a_folder_of_ones_own_that_is_not_there_is_named(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--config-dir (DIR|nowhere): there is no such folder$"):
        load("pretrain", ["--config-dir", *given], PretrainConfig)


def test_a_number_in_a_file_is_not_made_text() -> None:
    with pytest.raises(ConfigError, match=r"^run\.name must be text, got 1\.1: put it in quotes, "):
        build(PretrainConfig, {**to_tree(pretrain_config()), "run": yaml.safe_load("name: 1.10")})


@pytest.mark.parametrize("name", ["1.10", "7216e91", "${run.dir}", "d(1)", "\u00e9"])
def test_a_repeated_run_takes_names_as_typed(name: str, tmp_path: Path) -> None:
    record = {"command": "pretrain", "config": to_tree(pretrain_config("run.name=1.1"))}
    (tmp_path / "run.json").write_text(json.dumps({**record, "inputs": {}, "outcome": {}, "attempts": []}))
    config = load("pretrain", ["--repeat", str(tmp_path), f"run.name={name}", "train.max_steps=70"], PretrainConfig)
    assert (config.run.name, config.train.max_steps, config.data.path) == (name, 70, "somewhere")


def leaves(config: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each key of a configuration, its value and the dataclass's default."""
    for field in dataclasses.fields(config):
        key, value = f"{where}{field.name}", getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        elif isinstance(value, dict) and all(map(dataclasses.is_dataclass, value.values())):
            for name, item in value.items():
                yield from leaves(item, f"{key}.{name}.")
        else:
            yield key, list(value) if isinstance(value, tuple) else value, default


def add_below(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    """Add what a tree does not have."""
    for key, value in changes.items():
        if isinstance(value, dict):
            add_below(tree.setdefault(key, {}), value)
        else:
            tree.setdefault(key, value)


def files_of(command: str, task: str) -> dict[str, Any]:
    """What the command's file says and, below that, those that it chooses, read as plain YAML."""
    tree: dict[str, Any] = yaml.safe_load((CONFIGS / f"{command}.yaml").read_text())
    for choices in tree.pop("defaults"):
        for choice, name in choices.items() if isinstance(choices, dict) else ():
            group, _, section = choice.partition("@")
            if name is not None:
                chosen = yaml.safe_load((CONFIGS / group / f"{task if name == '???' else name}.yaml").read_text())
                for part in reversed((section or group).split(".")):
                    chosen = {part: chosen}
                add_below(tree, chosen)
    return tree


def test_a_run_of_before_is_repeated_with_the_new_names(tmp_path: Path) -> None:
    config = to_tree(pretrain_config("objective.mask_fraction=0.3", "train.min_lr_fraction=0.2"))
    text = json.dumps(config)
    for old, new in RENAMED.items():
        text = text.replace(f'"{new}"', f'"{old}"')
    assert text.count("_share") == len(RENAMED) - 2  # early and teacher are a search's
    before = json.loads(text)
    record = {"command": "pretrain", "config": before, "inputs": {}, "outcome": {}, "attempts": []}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert to_tree(load("pretrain", ["--repeat", str(tmp_path)], PretrainConfig)) == config


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_set_is_what_the_files_say_or_the_default_of_the_dataclass(command: str) -> None:
    schema, required, _ = COMMANDS[command]
    given = [re.sub(r"^task=.*", "task=mortality", setting) for setting in required]
    tree = files_of(command, "mortality")
    settings = dict(setting.split("=") for setting in given)
    for key, value in {"task.name": settings.pop("task", None), "seed": 0, "gpus": 8, **settings}.items():
        for part in reversed(key.split(".")):
            value = {part: yaml.safe_load(value) if isinstance(value, str) else value}
        add_below(tree, typing.cast("dict[str, Any]", value))
    said = OmegaConf.create(tree)
    for key, value, default in leaves(load(command, given, schema)):
        wanted = OmegaConf.select(said, key, default=default)
        wanted = OmegaConf.to_container(wanted, resolve=True) if OmegaConf.is_config(wanted) else wanted
        assert value == (list(wanted) if isinstance(wanted, tuple) else wanted), key


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_key_with_its_default_and_meaning(command: str, capsys: pytest.CaptureFixture) -> None:
    schema, required, _ = COMMANDS[command]
    main(command, schema, pytest.fail, ["x=1", "--help"])
    listed = dict(re.findall(r"^  ([a-z_.]+\w)( \(required\)|=.*?): \w?.+", capsys.readouterr().out, re.MULTILINE))
    given = [re.sub(r"^task=.*", "task=mortality", setting) for setting in required]
    named = {"task.name", *(setting.partition("=")[0] for setting in given)}
    absent = {"model": "model.d_model", "task.utility": "task.utility.alarm"}  # sections: a key of each
    for key, value, _ in leaves(load(command, given, schema)):
        if key.startswith(("known.rules.", "contenders.")):
            continue  # one key holds them all
        shown = listed[absent.get(key, key)]
        if key == "raw":  # which not every source needs
            assert shown == "=null"
            continue
        if key == "context":
            assert shown == "=bundle"
        elif key in named:
            assert shown == " (required)"
        elif isinstance(value, bool | int | float | str) and "${" not in shown and key.partition(".")[0] != "task":
            read = shown[1:] if isinstance(value, str) else yaml.safe_load(shown[1:])
            assert (float(read) if isinstance(value, float) else read) == value
    assert "known.rules" in listed or command != "prepare"


@pytest.mark.parametrize("model", ["small", "physionet", "large"])
def test_the_papers_model_is_the_same_beside_any_other(model: str) -> None:
    config = load("benchmark", [PATH, "task=mortality", f"model={model}"], BenchmarkConfig)
    assert config.model_of("paper") == pretrain_config("model=paper").model


def test_a_required_key_left_out_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^data\.path is required: add data\.path=VALUE to the command$"):
        load("pretrain", [], PretrainConfig)


@pytest.mark.parametrize("override", ["model.bidirectional=true", "model.causal=false", "model=paper"])
def test_forecasting_refuses_a_model_that_has_seen_the_future(override: str) -> None:
    for objective in ("both", "time_to_event"):
        with pytest.raises(ConfigError, match=r"needs model\.bidirectional=false and model\.causal=true"):
            pretrain_config(f"objective={objective}", override)
    pretrain_config("objective=both", override, "model.bidirectional=false", "model.causal=true")
    pretrain_config("objective=both", "model.layers=M", "model.causal=false")


def tune_config(*overrides: str) -> TuneConfig:
    return load("tune", [PATH, "init=null", *overrides], TuneConfig)


def test_one_task_is_spelt_with_or_without_brackets() -> None:
    plain, listed = (tune_config(task, "task.labels=DIR") for task in ("task=mortality", "task=[mortality]"))
    assert plain == listed
    assert isinstance(plain.task, TaskConfig) and plain.task.labels == "DIR" and plain.run.name == "tune-mortality"


def test_several_tasks_are_sections_by_name() -> None:
    predicate = "definition.predicates.hospital_admission.code.regex"
    config = tune_config(
        "task=[readmission,mortality,length_of_stay]",
        "task.mortality.labels=DIR",
        f'task.readmission.{predicate}="^ADM.*"',
        "task.length_of_stay.longer_than_days=3",
    )
    assert config.run.name == "tune-readmission-mortality-length_of_stay"
    assert [task.name for task in config.tasks] == ["readmission", "mortality", "length_of_stay"]
    assert [task.labels for task in config.tasks] == [None, "DIR", None]
    assert [task.longer_than_days for task in config.tasks] == [None, None, 3.0]
    regex = [task.definition["predicates"]["hospital_admission"]["code"]["regex"] for task in config.tasks]
    assert regex == ["^ADM.*", *["^HOSPITAL_ADMISSION//.*"] * 2]
    assert build(TuneConfig, to_tree(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "task"),
        (["task=[]"], "name at least one task"),
        (["task=[mortality,mortality]"], "each of them once"),
        (["task=[mortality,death]"], "task/death"),
        (["task=[readmission,mortality]", "task.labels=DIR"], "labels"),
        (["task=[readmission,mortality]", "task.mortality.lables=DIR"], "lables"),
        (["task=[readmission,mortality]", "task.mortality.name=readmission"], "different names"),
        (["task=[readmission,mortality]", "task.mortality.longer_than_days=-1"], "longer_than_days must be positive"),
    ],
)
def test_a_mistake_in_the_tasks_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        tune_config(*overrides)
    assert message in str(caught.value)


def test_prediction_takes_one_task() -> None:
    given = ["bundle=B", "data.path=D", "out=p.parquet"]
    assert load("predict", [*given, "task=[mortality]"], PredictConfig).task.name == "mortality"
    with pytest.raises(ConfigError, match="this command takes one: give task=NAME"):
        load("predict", [*given, "task=[mortality,readmission]"], PredictConfig)


def test_the_command_is_documented_where_it_is_configured() -> None:
    assert "python pretrain/run.py" in (CONFIGS / "pretrain.yaml").read_text()
    assert Path(CONFIGS.parent / "pretrain" / "run.py").is_file()
