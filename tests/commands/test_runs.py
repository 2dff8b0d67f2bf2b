"""What run.json says of a run: how it ended, and nothing that it should not; which command a run belongs to."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import wait_until

from hymate import runs
from hymate.command import load
from hymate.config import RunConfig, TaskConfig
from hymate.ending import Stopped
from hymate.errors import ConfigError, UserError
from hymate.runs import Run, Superseded, absolute, check_same_run, claimed
from hymate.training.pretraining import PretrainConfig
from hymate.trees import to_tree
from hymate.tuning.search import TuneConfig

CONFIG, INPUTS = RunConfig(name="one", dir="runs"), {"data.path": "f"}


def attempt(run: Path, error: BaseException | None = None, **found: Any) -> dict[str, Any]:
    """run.json after an attempt that ended in `error`, or well."""
    try:
        with claimed(run, "pretrain", CONFIG, INPUTS) as claim:
            assert json.loads((run / "run.json").read_text())["outcome"] == {"state": "running"}
            claim.workers_started(0, num_workers=2, num_nodes=1)
            claim.found.update(found)
            if error is not None:
                raise error
    except BaseException as caught:
        assert caught is error
    return json.loads((run / "run.json").read_text())


def caused(cause: BaseException) -> SystemExit:
    ending = SystemExit(1)
    ending.__cause__ = cause
    return ending


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, {"state": "finished", "val_loss": 1.5}),
        (UserError("no space left\nat all"), {"state": "failed", "reason": "no space left"}),
        (caused(FloatingPointError("the loss is nan")), {"state": "failed", "reason": "the loss is nan"}),
        (KeyError("subject 4711 of host.example"), {"state": "failed", "reason": "KeyError"}),
        (KeyboardInterrupt(), {"state": "stopped"}),
        (Stopped("saved at step 3"), {"state": "stopped"}),
    ],
)
def test_it_says_how_the_run_ended(tmp_path: Path, error: BaseException | None, outcome: dict[str, Any]) -> None:
    record = attempt(tmp_path, error, val_loss=1.5)
    assert record["outcome"] == outcome
    (only,) = record["attempts"]
    assert only["started"] <= only["starts"][0]["at"] <= only["ended"]


def test_attempts_add_up_and_a_killed_one_has_no_end(tmp_path: Path) -> None:
    record = attempt(tmp_path, KeyboardInterrupt())
    record["attempts"][0]["ended"] = None  # as a kill leaves it
    (tmp_path / "run.json").write_text(json.dumps(record))
    after = attempt(tmp_path)
    assert [one["ended"] is None for one in after["attempts"]] == [True, False]
    check_same_run(tmp_path, CONFIG, INPUTS, set())
    with pytest.raises(ConfigError, match=r"holds a run in which data\.path had other content"):
        check_same_run(tmp_path, CONFIG, {"data.path": "g"}, set())


def test_the_end_of_a_command_says_nothing_of_the_one_that_took_the_run_over(tmp_path: Path) -> None:
    with claimed(tmp_path, "pretrain", CONFIG, INPUTS):
        with pytest.raises(UserError), claimed(tmp_path, "pretrain", CONFIG, INPUTS) as later:
            later.found["val_loss"] = 1.5
            raise UserError("no space left")
        between = json.loads((tmp_path / "run.json").read_text())
    record = json.loads((tmp_path / "run.json").read_text())
    assert between["outcome"] == record["outcome"] == {"state": "failed", "reason": "no space left"}
    assert all(attempt["ended"] for attempt in record["attempts"])


def test_a_run_that_is_deleted_and_begun_again_is_not_the_one_that_ends(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path, "pretrain", CONFIG, INPUTS):
        (tmp_path / "run.json").unlink()
        raise KeyError("what its user must see")
    assert not (tmp_path / "run.json").exists()
    with claimed(tmp_path, "pretrain", CONFIG, INPUTS):
        (tmp_path / "run.json").unlink()
        attempt(tmp_path, val_loss=1.5)
        restarted = (tmp_path / "run.json").read_text()
    assert (tmp_path / "run.json").read_text() == restarted


def test_what_a_finished_run_found_is_known(tmp_path: Path) -> None:
    assert check_same_run(tmp_path, CONFIG, INPUTS, set()) is None
    attempt(tmp_path, KeyboardInterrupt())
    assert check_same_run(tmp_path, CONFIG, INPUTS, set()) is None
    attempt(tmp_path, val_loss=1.5)
    assert check_same_run(tmp_path, CONFIG, INPUTS, set()) == {"state": "finished", "val_loss": 1.5}
    other = RunConfig(name="one", dir="elsewhere")
    assert check_same_run(tmp_path, other, INPUTS, {"dir"}) is None, "it may go on with the other setting"


def test_a_run_of_another_version_is_refused_in_a_line(tmp_path: Path) -> None:
    record = attempt(tmp_path)
    for other in ({key: value for key, value in record.items() if key != "format"}, record | {"format": 99}):
        (tmp_path / "run.json").write_text(json.dumps(other))
        with pytest.raises(
            ConfigError, match=r"another version of HyMaTE.*choose another run\.name, or delete"
        ) as caught:
            check_same_run(tmp_path, CONFIG, INPUTS, set())
        assert "\n" not in str(caught.value)


def test_a_key_that_is_newer_than_a_run_had_its_default_there(tmp_path: Path) -> None:
    record = attempt(tmp_path, KeyboardInterrupt())
    del record["config"]["dir"]  # "runs", as by default
    (tmp_path / "run.json").write_text(json.dumps(record))
    check_same_run(tmp_path, CONFIG, INPUTS, set())
    with pytest.raises(ConfigError, match="dir was runs, now elsewhere"):
        check_same_run(tmp_path, RunConfig(name="one", dir="elsewhere"), INPUTS, set())


def repeated(run: Path, config: PretrainConfig | TuneConfig, command: str, *overrides: str) -> Any:
    with claimed(run, command, config, INPUTS):
        pass
    return load(command, ["--repeat", str(run), *overrides], type(config))


def test_a_configuration_comes_back_from_the_record(tmp_path: Path) -> None:
    config = load("pretrain", ["data.path=somewhere", "model=paper", "train=zero3"], PretrainConfig)
    assert repeated(tmp_path, config, "pretrain") == config
    changed = repeated(tmp_path, config, "pretrain", "run.name=again", "train.learning_rate=2e-3")
    assert (changed.run.name, changed.train.learning_rate, changed.model) == ("again", 2e-3, config.model)


def test_a_search_comes_back_from_the_record_and_nothing_in_it_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYMATE_TEST", "found out")
    given = ["task=[readmission,mortality]", "data.path=somewhere", "init=null", "model=debug"]
    config = load("tune", given, TuneConfig)
    assert isinstance(config.task, dict)
    config.task["mortality"] = TaskConfig("mortality", labels="${oc.env:HYMATE_TEST}")
    assert repeated(tmp_path, config, "tune") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.num_workrs=2"], "did you mean train.num_workers"),
        (["model=paper"], "model must be a section"),
        (["run.name"], "run.name"),
        (["train.api_key=x"], "credential"),
    ],
)
def test_a_mistake_in_a_repetition_is_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    config = load("pretrain", ["data.path=somewhere"], PretrainConfig)
    with pytest.raises(ConfigError, match=message) as caught:
        repeated(tmp_path, config, "pretrain", *overrides)
    assert "\n" not in str(caught.value)


def test_only_a_run_of_the_same_command_is_repeated(tmp_path: Path) -> None:
    for overrides in (["--repeat"], ["--repeat", str(tmp_path)]):
        with pytest.raises(ConfigError, match="not a run's folder"):
            load("pretrain", overrides, PretrainConfig)
    attempt(tmp_path)
    with pytest.raises(ConfigError, match="a run of pretrain, not of tune"):
        load("tune", ["--repeat", str(tmp_path)], TuneConfig)


def test_settings_of_other_programs_are_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook", "--token=abcdefghijklm"])
    monkeypatch.setenv("SOME_TOKEN", "abcdefghijklm")
    assert "abcdefghijklm" not in json.dumps(attempt(tmp_path))


# -------------------------------------------------------------------------------------------- whose the run is


@contextmanager
def claim(folder: Path) -> Iterator[Run]:
    with claimed(folder, "pretrain", CONFIG, INPUTS) as run:
        yield run


def test_a_command_takes_a_run_over_from_the_one_before(tmp_path: Path) -> None:
    with claim(tmp_path) as first, first.watched() as stop:
        first.check()
        assert not stop()
        with claim(tmp_path) as second:
            with pytest.raises(Superseded, match="another command has taken this run over"):
                first.check()
            with pytest.raises(Superseded):
                wait_until(stop, "the first command sees that it is superseded")
            second.check()
        given = json.loads((tmp_path / "run.json").read_text())["attempts"]
        assert [attempt["id"] for attempt in given] == [first.id, second.id]


def test_the_workers_are_asked_to_stop(tmp_path: Path) -> None:
    with claim(tmp_path) as run, run.watched() as stop:
        assert not run.ask_to_stop() and not stop(), "none has begun"
        run.workers_started(0, num_workers=2, num_nodes=1)
        assert not stop() and run.ask_to_stop()
        wait_until(stop, "the workers see it")
    with claim(tmp_path) as run, run.watched() as stop:
        assert not stop(), "the next command would stop at once"


def test_all_times_are_by_the_drivers_clock(tmp_path: Path) -> None:
    with claim(tmp_path) as run:
        try:
            runs.keep_time_of(time.time() - 3600)  # as a worker whose host is an hour ahead
            run.workers_started(0, num_workers=2, num_nodes=2)
        finally:
            runs.keep_time_of(time.time())
    (attempt,) = json.loads((tmp_path / "run.json").read_text())["attempts"]
    began, worked = (datetime.fromisoformat(at) for at in (attempt["started"], attempt["starts"][0]["at"]))
    assert timedelta(minutes=-61) < worked - began < timedelta(minutes=-59)


def test_a_command_does_not_stop_the_one_that_took_the_run_over(tmp_path: Path) -> None:
    with claim(tmp_path) as first:
        first.workers_started(0, num_workers=2, num_nodes=1)
        with claim(tmp_path) as second, second.watched() as stop:
            assert not first.ask_to_stop()
            second.check()
            assert not stop()


def test_a_search_that_is_taken_over_writes_nothing_into_the_other_ones_trials(tmp_path: Path) -> None:
    from hymate.tuning.ray_tune import Progress  # imports Ray

    (tmp_path / "traceback.txt").write_text("Traceback\nKeyError: 3")
    trial = SimpleNamespace(config={"index": 0}, error_file=str(tmp_path / "traceback.txt"))
    with claim(tmp_path / "run") as first:
        progress = Progress("mean", tmp_path / "run", first)
        for taken_over in (False, True):
            with claim(tmp_path / "run") if taken_over else nullcontext():
                progress.on_trial_error(1, [], trial)
            traceback = tmp_path / "run" / "trials" / "trial-0" / "error.txt"
            assert traceback.is_file() is not taken_over
            traceback.unlink(missing_ok=True)


def test_workers_get_absolute_paths_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [
        "data.path=somewhere",
        "task=[mortality,readmission]",
        "task.readmission.labels=labels",
        "init=run/../bundle",
    ]
    config = load("tune", overrides, TuneConfig)
    wanted = to_tree(config)
    wanted["data"]["path"], wanted["run"]["dir"] = str(tmp_path / "somewhere"), str(tmp_path / "runs")
    wanted["task"]["readmission"]["labels"], wanted["init"] = str(tmp_path / "labels"), str(tmp_path / "bundle")
    assert to_tree(absolute(config)) == wanted
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"task\.readmission\.labels=labels: a Ray job runs in a temporary folder"):
        absolute(dataclasses.replace(config, data=dataclasses.replace(config.data, path="/a"), init=None))
