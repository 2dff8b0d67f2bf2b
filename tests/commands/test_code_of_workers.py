"""Ray's workers run the driver's code, whatever is installed, in the current folder or at its place elsewhere."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from commands import ROOT, ray_processes, run, wait_until

from hymate.inference.bundle import read_bundle

SMALL = ["model=debug", "data.context=64", "data.tokens_per_row=64", "data.min_count=1", "train.num_workers=1"]
SMALL += [
    "train.rows_per_step=1",
    "train.max_steps=2",
    "train.warmup_steps=1",
    "train.eval_every=2",
    "train.eval_rows=2",
]
LEAVES_A_FILE = """
_train = train

def train(*args, **kwargs):
    import os, pathlib
    pathlib.Path({folder!r}, str(os.getpid())).touch()
    return _train(*args, **kwargs)
"""
ELSEWHERE = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'

pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout, not installed, whose workers each leave a file in the folder `ran`."""
    folder, ran = tmp_path / "checkout", tmp_path / "ran"
    for name in ("pretrain", "configs", "hymate"):
        shutil.copytree(ROOT / name, folder / name)
    ran.mkdir()
    with open(folder / "hymate" / "training" / "loop.py", "a") as file:
        file.write(LEAVES_A_FILE.format(folder=str(ran)))
    return folder


@pytest.fixture
def ray_files() -> Iterator[str]:
    """Where Ray keeps its files; what runs there is ended."""
    folder = tempfile.mkdtemp(prefix="hy", dir="/tmp")  # the paths of Ray's sockets are limited
    yield folder
    for pid in ray_processes(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
    wait_until(lambda: not ray_processes(folder), "Ray's processes end")
    shutil.rmtree(folder, ignore_errors=True)


def pretrains(checkout: Path, data: Path, environment: dict[str, str]) -> None:
    """The checkout's command, given in a folder that has another hymate, trains with the checkout's code."""
    folder = checkout.parent
    (folder / "here" / "hymate").mkdir(parents=True)
    (folder / "here" / "hymate" / "__init__.py").write_text("raise SystemError('this is not the one')")
    settings = [f"data.path={data}", *SMALL]
    done = run([sys.executable, str(checkout / "pretrain" / "run.py"), *settings], environment, folder / "here")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert read_bundle(folder / "here" / "runs" / "pretrain", kind="pretrained").model.d_model == 32
    assert len(list((folder / "ran").iterdir())) == 1, "the worker has run other code"


def settings(ray_files: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**inherited, "RAY_TMPDIR": ray_files, "TORCHDYNAMO_DISABLE": "1", "HYMATE_OPS": "reference"}


def test_on_this_machine(checkout: Path, small_data: Path, ray_files: str) -> None:
    pretrains(checkout, small_data, settings(ray_files))


def test_on_a_machine_with_other_code_in_the_same_place(checkout: Path, small_data: Path, ray_files: str) -> None:
    elsewhere = ["unshare", "--mount", "--map-root-user", "sh", "-c", ELSEWHERE, "sh"]
    elsewhere += [str(ROOT / "hymate"), str(checkout / "hymate")]
    if shutil.which("unshare") is None or subprocess.run([*elsewhere, "true"], capture_output=True).returncode:
        pytest.skip("no namespace in which a folder could be another machine's")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**settings(ray_files), **token}
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--disable-usage-stats"]
    ray += ["--node-ip-address", "127.0.0.1", "--num-cpus"]
    head = [*ray, "0", "--head", "--port", address.rpartition(":")[2], "--temp-dir", ray_files]
    for start in ([*head, "--include-dashboard", "false"], [*elsewhere, *ray, "2", "--address", address]):
        started = run(start, environment, checkout.parent)
        assert started.returncode == 0, started.stdout + started.stderr
    pretrains(checkout, small_data, {**environment, "RAY_ADDRESS": address})
