"""Outputs that cannot be written are refused before anything is computed, in a line that names the setting."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hymate import baselines, evaluate, explain, predict
from hymate.command import load
from hymate.data import prepare
from hymate.errors import UserError
from hymate.storage.paths import require_file, require_folder
from hymate.training.pretraining import PretrainConfig, pretrain
from hymate.tuning import benchmark, search


@pytest.fixture
def place(nobody: int) -> Iterator[Path]:
    """A folder of the user's whose parents can be passed by everybody."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


def closed(place: Path) -> Path:
    place.chmod(0o500)
    return place / "out"


def closed_itself(place: Path) -> Path:
    (place / "out").mkdir(mode=0o500)
    return place / "out"


def below_a_file(place: Path) -> Path:
    (place / "file").touch()
    return place / "file" / "out"


def below_a_dangling_link(place: Path) -> Path:
    (place / "link").symlink_to(place / "gone")
    return place / "link" / "out"


def a_pipe(place: Path) -> Path:
    os.mkfifo(place / "pipe")
    return place / "pipe"


def nameless(place: Path) -> Path:
    return Path(".")


def with_a_long_name(place: Path) -> Path:
    return place / ("x" * 300)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
def test_another_users_file_in_a_shared_folder_is_refused(nobody: int) -> None:
    with tempfile.NamedTemporaryFile(dir="/tmp") as own:
        require_file(Path(own.name), "out")
        os.seteuid(0)
        os.chown(own.name, 0, 0)
        os.seteuid(nobody)
        with pytest.raises(UserError, match=r"^out=/tmp/.* cannot be written to \(.* belongs to another user\)"):
            require_file(Path(own.name), "out")
        os.seteuid(0)


BAD: list[tuple[Callable[[Path], Path], str]] = [
    (closed, "Permission denied"),
    (below_a_file, "file is a file, not a folder"),
    (below_a_dangling_link, "link is a link to what is not there"),
    (with_a_long_name, "File name too long"),
]


@pytest.mark.parametrize(("bad", "reason"), [*BAD, (closed_itself, "Permission denied")])
def test_a_folder_that_cannot_be_written_to_is_refused(bad: Callable[[Path], Path], reason: str, place: Path) -> None:
    out = bad(place)
    before = sorted(place.iterdir())
    with pytest.raises(UserError, match=f"^out={out} cannot be written to .*{reason}.*: give out= another") as caught:
        require_folder(out, "out")
    assert "\n" not in str(caught.value) and sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("bad", "reason"),
    [*BAD, (closed_itself, "is a folder"), (nameless, "is a folder"), (a_pipe, "is a device or a pipe")],
)
def test_a_file_that_cannot_be_written_is_refused(bad: Callable[[Path], Path], reason: str, place: Path) -> None:
    out = bad(place)
    before = sorted(place.iterdir())
    with pytest.raises(UserError, match=f"^out={out} .*{reason}"):
        require_file(out, "out")
    assert sorted(place.iterdir()) == before


def test_what_can_be_written_is_left_as_it_was(place: Path) -> None:
    (place / "old").write_text("old")
    require_folder(place / "new" / "run", "run.dir")
    require_file(place / "new" / "file", "out")
    require_file(place / "old", "out")
    require_folder(place, "run.dir")
    assert [(path.name, path.read_text()) for path in place.iterdir()] == [("old", "old")]


SMALL = ["data.path={data}", "model=debug", "data.context=64", "data.tokens_per_row=64", "data.min_count=1"]
TASK = ["data.path={data}", "task=readmission"]


@pytest.mark.parametrize(
    ("name", "schema", "run", "work", "key", "given"),
    [
        ("predict", predict.PredictConfig, predict.run, "predict.predict_dataset", "out", [*TASK, "bundle=b"]),
        (
            "predict",
            predict.PredictConfig,
            predict.run,
            "predict.predict_dataset",
            "states",
            [*TASK, "bundle=b", "out={free}", "context=all"],
        ),
        ("explain", explain.ExplainConfig, explain.run, "explain.work_beside", "out", [*TASK, "bundle=b"]),
        ("evaluate", evaluate.EvaluateConfig, evaluate.run, "evaluate.open_for", "out", [*TASK, "bundle=b"]),
        ("baselines", baselines.BaselinesConfig, baselines.run, "baselines.read_or_extract_labels", "out", TASK),
        (
            "prepare",
            prepare.PrepareConfig,
            prepare.prepare,
            "data.prepare.MedsSource.shards",
            "out",
            ["source=meds", "raw={data}"],
        ),
        ("pretrain", PretrainConfig, pretrain, "training.pretraining.claimed", "run.dir", SMALL),
        (
            "tune",
            search.TuneConfig,
            search.search,
            "tuning.search.read_or_extract_labels",
            "run.dir",
            [*SMALL, "task=readmission", "init=null"],
        ),
        (
            "benchmark",
            benchmark.BenchmarkConfig,
            benchmark.benchmark,
            "tuning.benchmark.read_or_extract_labels",
            "run.dir",
            [*SMALL, "task=readmission"],
        ),
    ],
)
def test_a_command_refuses_before_it_computes(
    name: str,
    schema: type[Any],
    run: Callable[[Any], object],
    work: str,
    key: str,
    given: list[str],
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    settings = [setting.format(data=small_data, free=tmp_path / "p.parquet") for setting in given]
    config = load(name, [*settings, f"{key}={tmp_path / 'file' / 'out'}"], schema)
    computing = Mock(side_effect=AssertionError("it computes"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(f"hymate.{work}", computing)
    bundle = Mock(in_time={}, plain={})
    monkeypatch.setattr("hymate.inference.dataset.read_bundle", lambda *_, **__: Mock(for_task=lambda _: bundle))
    monkeypatch.setattr(predict, "check_streamable", Mock())
    with pytest.raises(UserError, match=rf"^{key}=.*cannot be written to \({tmp_path}/file is a file, not a folder\)"):
        run(config)
