"""Which device a command computes on, with GPUs that are only pretended; what computes on a real one is in the tests
marked `gpu`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from commands import ROOT
from small_models import vocabulary_of, write_risk_bundle

from hymate import device, explain, predict
from hymate.command import load
from hymate.config import ModelConfig
from hymate.device import Wanted, choose
from hymate.errors import ConfigError, UserError
from hymate.explain import ExplainConfig
from hymate.plan import PlanConfig
from hymate.predict import PredictConfig
from hymate.training.pretraining import PretrainConfig
from hymate.tuning.search import TuneConfig

MAMBA2, MAMBA1 = ModelConfig(layers="MA"), ModelConfig(layers="MA", mixer="mamba1")
NO_MAMBA = ModelConfig(layers="GA")
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Pretends a machine: how many GPUs PyTorch finds, and which of the kernels' modules are installed."""
    monkeypatch.delenv("HYMATE_OPS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def pretend(gpus: int, *installed: str, broken: Collection[str] = ()) -> None:
        def load(name: str) -> None:
            if name in broken:
                raise ImportError(f"{name}.so: undefined symbol: _ZN3c10\nmore")

        monkeypatch.setattr(device, "find_spec", lambda name: name if name in installed else None)
        monkeypatch.setattr(device, "import_module", load)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return pretend


KERNELS = ("mamba_ssm", "selective_scan_cuda")


@pytest.mark.parametrize(
    ("gpus", "installed", "models", "workers", "chosen", "reason"),
    [
        (0, KERNELS, [MAMBA2], 1, "cpu", "PyTorch finds no GPU"),
        (1, (), [MAMBA2], 1, "cpu", "a GPU is there, but mamba-ssm is not installed"),
        (1, (), [NO_MAMBA], 1, "cuda", "device=auto"),
        (1, (), [NO_MAMBA, MAMBA2], 1, "cpu", "mamba-ssm is not installed"),
        (1, ("mamba_ssm",), [MAMBA2], 1, "cuda", "device=auto"),
        (1, ("mamba_ssm",), [MAMBA1], 1, "cpu", "kernel for mixer=mamba1 is not installed"),
        (1, KERNELS, [MAMBA1, MAMBA2], 1, "cuda", "device=auto"),
        (1, KERNELS, [MAMBA2], 2, "cpu", "train.num_workers=2 needs 2 GPUs, and this machine has 1"),
        (2, KERNELS, [MAMBA2], 2, "cuda", "device=auto"),
    ],
)
def test_auto_takes_gpus_where_everything_is_there_and_says_why_not(
    machine: Machine,
    caplog: pytest.LogCaptureFixture,
    gpus: int,
    installed: tuple[str, ...],
    models: list[ModelConfig],
    workers: int,
    chosen: str,
    reason: str,
) -> None:
    machine(gpus, *installed)
    with caplog.at_level(logging.INFO, "hymate"):
        assert choose("auto", *models, workers=workers).type == chosen
    (record,) = caplog.records
    assert record.getMessage().startswith(f"computing on {chosen}: ") and reason in record.getMessage()
    assert (record.levelno == logging.WARNING) == (chosen == "cpu" and gpus > 0), "what is passed over is seen"
    if chosen == "cpu":
        with pytest.raises(UserError, match=f"^device=cuda: .*{reason}") as refused:
            choose("cuda", *models, workers=workers)
        assert "\n" not in str(refused.value)
    else:
        assert choose("cuda", *models, workers=workers) == torch.device("cuda", 0)


def test_kernels_that_were_built_for_another_pytorch_are_not_taken(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine(1, *KERNELS, broken=["mamba_ssm"])
    assert choose("auto", MAMBA2).type == "cpu"
    (said,) = caplog.messages
    assert "mamba-ssm cannot be imported (mamba_ssm.so: undefined symbol: _ZN3c10), and" in said


def test_the_cpu_is_taken_without_asking_for_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2, *KERNELS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert choose("cpu", MAMBA2, workers=64) == torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "in_cluster", "workers", "chosen"),
    [
        ("auto", 2, 2, "cuda"),
        ("auto", 1, 2, "cpu"),
        ("auto", 0, 1, "cpu"),
        ("cuda", 0, 4, "cuda"),
        ("cpu", 4, 1, "cpu"),
    ],
)
def test_a_cluster_counts_by_its_own_gpus(
    machine: Machine, wanted: Wanted, in_cluster: int, workers: int, chosen: str
) -> None:
    """The driver's machine often has none; with device=cuda a run waits for machines to join."""
    # kernels that are installed do not import on a head without a GPU
    machine(8 if chosen == "cpu" else 0, *KERNELS, broken=KERNELS)
    assert choose(wanted, MAMBA2, workers=workers, cluster_gpus=in_cluster).type == chosen


def test_a_driver_without_what_gpus_need_leaves_a_cluster_s_gpus_alone(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(0)
    assert choose("auto", MAMBA2, cluster_gpus=1).type == "cpu"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose("auto", NO_MAMBA, cluster_gpus=1).type == "cpu"
    assert choose("cuda", MAMBA2, cluster_gpus=1).type == "cuda", "the workers look again"
    first, second = caplog.messages
    assert "mamba-ssm is not installed" in first and "this PyTorch was built without CUDA" in second
    assert first.endswith("; device=cuda goes by what the workers have, not the driver")


def test_forced_operators_and_hidden_gpus_count(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(1)
    monkeypatch.setenv("HYMATE_OPS", "reference")
    assert choose("auto", MAMBA2).type == "cuda", "the reference runs everywhere"
    monkeypatch.setenv("HYMATE_OPS", "cpu")
    with pytest.raises(UserError, match="HYMATE_OPS=cpu"):
        choose("cuda", NO_MAMBA)
    machine(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=r"PyTorch finds no GPU \(CUDA_VISIBLE_DEVICES=''\)"):
        choose("cuda", NO_MAMBA)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="this PyTorch was built without CUDA"):
        choose("cuda", NO_MAMBA)


def test_nothing_else_asks_pytorch_for_gpus() -> None:
    asking = re.compile(r"(cuda|accelerator|mps)\.(is_available|device_count)")
    files = [path for folder in ("hymate", "pretrain", "finetune") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if asking.search(path.read_text())] == ["device.py"]


# ----------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def bundle(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_risk_bundle(tmp_path_factory.mktemp("risk") / "bundle", vocabulary_of(small_data), context=24)


def given(bundle: Path, data: Path, out: Path, *overrides: str) -> list[str]:
    return ["task=readmission", f"bundle={bundle}", f"data.path={data}", f"out={out}", *overrides]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("overrides", [[], ["context=all", "states=STATES"]])
def test_predictions_come_from_the_cpu_where_a_gpu_lacks_its_kernels(
    machine: Machine,
    small_data: Path,
    bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    overrides: list[str],
) -> None:
    """Also with states, which are put where the model is."""
    machine(1)
    folder = [override.replace("STATES", str(tmp_path / "states")) for override in overrides]
    config = load("predict", given(bundle, small_data, tmp_path / "p.parquet", *folder), PredictConfig)
    for _ in range(2):  # the second time from the states
        caplog.clear()
        predict.run(config)
        assert ["mamba-ssm is not installed" in text for text in caplog.messages] == [True]
    assert (tmp_path / "p.parquet").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_explanations_come_from_the_cpu_where_a_gpu_lacks_its_kernels(
    machine: Machine, small_data: Path, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine(1)
    explain.run(
        load("explain", given(bundle, small_data, tmp_path, "num_predictions=2", "num_subjects=1"), ExplainConfig)
    )
    assert ["mamba-ssm is not installed" in text for text in caplog.messages] == [True]
    assert (tmp_path / "explanation.md").is_file()


def test_device_cuda_is_refused_before_any_data_is_read(machine: Machine, bundle: Path, tmp_path: Path) -> None:
    machine(1)
    for command, schema, run in (("predict", PredictConfig, predict.run), ("explain", ExplainConfig, explain.run)):
        config = load(command, given(bundle, tmp_path / "nowhere", tmp_path / "out", "device=cuda"), schema)
        with pytest.raises(UserError, match=r"^device=cuda: .*mamba-ssm is not installed"):
            run(config)


@pytest.mark.parametrize(
    ("command", "schema", "more"),
    [("pretrain", PretrainConfig, []), ("tune", TuneConfig, ["task=readmission", "init=null"])],
)
def test_the_old_key_is_refused_with_the_new_one(command: str, schema: type, more: list[str]) -> None:
    for old in ("train.use_gpu=true", "+train.use_gpu=false"):
        with pytest.raises(ConfigError, match=r"^train\.use_gpu is not a known key: device=cuda, cpu or auto"):
            load(command, ["data.path=x", old, *more], schema)
    with pytest.raises(ConfigError, match=r"^train\.use_gpu is not a known key: known keys are"):
        load("plan", ["train.use_gpu=true"], PlanConfig)  # has no device
    with pytest.raises(ConfigError, match="device must be one of auto, cpu, cuda; got 'gpu'"):
        load("pretrain", ["data.path=x", "device=gpu"], PretrainConfig)
