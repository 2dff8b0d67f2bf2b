"""Shared fixtures: data, and a clean process-wide state."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ray_processes, wait_until
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# A shell's background commands and nohup ignore these, and the commands that the tests start would inherit it.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)

# how long an example takes says how busy the machine is
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

LONGEST = (
    "test_docs.py",
    "test_pretraining.py",
    "test_jobs.py",
    "test_benchmark.py",
    "test_hosts.py",
    "test_search.py",
    "test_wheel.py",
    "test_storage.py",
    "test_from_raw_tables.py",
    "test_demo.py",
    "test_explain.py",
    "test_cluster.py",
    "test_config.py",
    "test_codemap.py",
    "test_gpu_script.py",
    "test_baselines.py",
    "test_trial_workers.py",
    "test_plan.py",
    "test_gpu.py",
    "test_checkpoint.py",
    "test_absent_device.py",
    "test_deepspeed.py",
    "test_machine.py",
    "test_states.py",
    "test_ops.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that the processes of `make test` end at about the same time."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported and collected stays: the garbage collector need not go through it again


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real datasets (PhysioNet 2012, MIMIC-IV demo); the test is skipped where there is none."""
    folder = Path(os.environ.get("HYMATE_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data: set HYMATE_SHARED_DATA to a folder with physionet2012/ and mimic_iv_demo_meds/")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The small cohort, prepared. To be read: what writes into it takes a copy."""
    from small_cohort import prepare_small  # a machine with a GPU may lack what this imports

    folder = prepare_small(tmp_path_factory.mktemp("small"))
    before = _contents(folder)
    yield folder
    assert _contents(folder) == before, "a test wrote into the data of all"


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Arrays this small only lose by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Settings of a module's commands; Ray's files in a folder with a short name (its sockets' paths are limited)."""
    folder = tempfile.mkdtemp(prefix="hy", dir="/tmp")
    yield {**os.environ, "RAY_TMPDIR": folder, "TORCHDYNAMO_DISABLE": "1"}
    wait_until(lambda: not ray_processes(folder), "Ray's processes end")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nobody() -> Iterator[int]:
    """The tests run as a user, this id, whom permissions hold back: not as root."""
    if os.geteuid() != 0:
        yield os.geteuid()
        return
    os.seteuid(54321)
    yield 54321
    os.seteuid(0)
