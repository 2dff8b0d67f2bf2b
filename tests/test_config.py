"""Configuration: every YAML file composes, and a mistake becomes one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from hymate.command import CONFIGS, build, load, to_tree
from hymate.config import ConfigError, ModelConfig, ObjectiveConfig, TaskConfig, TrainConfig
from hymate.predict import PredictConfig
from hymate.training.pretraining import PretrainConfig
from hymate.training.search import TuneConfig

PATH = "data.path=somewhere"
GROUPS = {"model": ModelConfig, "objective": ObjectiveConfig, "train": TrainConfig}
CHOICES = [
    f"{group}={file.stem}"
    for group in ("data", *GROUPS)
    for file in sorted((CONFIGS / group).glob("*.yaml"))
    if not file.stem.startswith("_")
]


def pretrain_config(*overrides: str) -> PretrainConfig:
    return load("pretrain", [PATH, *overrides], PretrainConfig)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice: str) -> None:
    assert isinstance(pretrain_config(choice), PretrainConfig)


@pytest.mark.parametrize("group", GROUPS)
def test_the_files_name_every_key_with_the_default_of_the_code(group: str) -> None:
    """So that every key can be overridden, and reading the YAML is enough."""
    written: dict[str, Any] = yaml.safe_load((CONFIGS / group / "_base.yaml").read_text())
    defaults = {field.name: field.default for field in dataclasses.fields(GROUPS[group])}
    assert written == defaults


def test_choices_do_what_their_names_say() -> None:
    assert [pretrain_config(f"train=zero{stage}").train.zero_stage for stage in range(4)] == [0, 1, 2, 3]
    assert pretrain_config("model=paper").model.mixer == "mamba1"
    assert pretrain_config("objective=forecast").objective.code_weight == 0
    assert pretrain_config("objective=both").objective.forecast_weight > 0
    config = pretrain_config("model=small", "train=zero2", "train.num_workers=4", "run.name=mine")
    assert (config.train.num_workers, config.run.name) == (4, "mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_workrs=2", "num_workrs"),
        ("model.d_modle=2", "d_modle"),
        ("model=tiny", "tiny"),
        ("train.num_workers=three", "train.num_workers must be int"),
        ("train.num_workers=3", "train.rows_per_step must be a multiple of train.num_workers=3"),
        ("train.zero_stage=4", "train.zero_stage must be 0, 1, 2 or 3"),
        ("train.precision=fp16", "train.precision must be one of fp32, bf16"),
        ("train.learning_rate=0", "train.learning_rate must be positive"),
        ("train.eval_rows=0", "train.eval_rows must be positive"),
        ("data.context=20000", "data.tokens_per_row must be at least data.context=20000"),
        ("model.layers=MXA", "model.layers takes the letters"),
        ("run.name=a/b", "run.name must be a plain folder name"),
        ("objective.mask_share=1.5", "objective.mask_share must be in"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        pretrain_config(override)
    assert message in str(caught.value)


def test_a_required_key_left_out_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^data\.path is required: add data\.path=VALUE to the command$"):
        load("pretrain", [], PretrainConfig)


def test_forecasting_refuses_a_bidirectional_model() -> None:
    with pytest.raises(ConfigError, match=r"needs model\.bidirectional=false"):
        pretrain_config("objective=both", "model.bidirectional=true")


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
