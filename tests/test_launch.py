"""A Ray of a run's own is closed to others, and so is everything in cluster/."""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import PATIENCE_S, ROOT

SESSION = """
import sys
from hymate.config import TrainConfig
from hymate.training.launch import ray_session
with ray_session(TrainConfig()):
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def session() -> Iterator[tuple[psutil.Process, str, dict[str, str]]]:
    """A process with a Ray of its own, its address, and the environment of a stranger on this machine."""
    with tempfile.TemporaryDirectory(prefix="hy", dir="/tmp", ignore_cleanup_errors=True) as folder:
        settings = {"RAY_TMPDIR": folder, "RAY_AUTH_TOKEN_PATH": f"{folder}/token"}
        (Path(folder) / "token").write_text("0" * 64)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        command = [sys.executable, "-c", SESSION]
        environment = inherited | settings
        with subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            loopback = {"RAY_TMPDIR": folder, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
            yield psutil.Process(process.pid), address, inherited | loopback
            process.communicate()


@pytest.mark.slow
def test_a_ray_of_our_own_listens_on_loopback_without_a_dashboard(
    session: tuple[psutil.Process, str, dict[str, str]],
) -> None:
    process, address, _ = session
    assert ipaddress.ip_address(address.rpartition(":")[0]).is_loopback
    all_of_it = [process, *process.children(recursive=True)]
    sockets = [held for part in all_of_it for held in part.net_connections("tcp") if held.status == psutil.CONN_LISTEN]
    hosts = {ipaddress.ip_address(held.laddr.ip.removeprefix("::ffff:")) for held in sockets}
    assert hosts and all(host.is_loopback for host in hosts), hosts
    lines = [part.cmdline() for part in all_of_it]
    assert all("--disable-frontend" in line for line in lines if any("dashboard/dashboard.py" in word for word in line))


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "1" * 64])
def test_a_ray_of_our_own_refuses_strangers(
    session: tuple[psutil.Process, str, dict[str, str]], token: str | None, tmp_path: Path
) -> None:
    _, address, environment = session
    own = {"RAY_AUTH_MODE": "disabled"}
    if token is not None:
        (tmp_path / "token").write_text(token)
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    line = [str(Path(sys.executable).with_name("ray")), "status", "--address", address]
    refused = subprocess.run(line, env=environment | own, capture_output=True, text=True, timeout=PATIENCE_S)
    assert refused.returncode != 0 and "Unauthenticated" in refused.stdout + refused.stderr, refused.stderr


def test_what_is_in_cluster_is_closed_to_others() -> None:
    files = [path for path in (ROOT / "cluster").rglob("*") if path.is_file()]
    for path in files:
        text = path.read_text()
        assert not re.search(r"dashboard-host[ =:\"']+(0\.0\.0\.0|::)", text), path
        assert not re.search(r"RAY_AUTH_MODE[ =:\"']+(?!token)\w", text), path
        starts = re.search(r"^\s*(nohup )?ray start ", text, flags=re.MULTILINE)
        assert not starts or "RAY_AUTH_MODE=token" in text[: starts.start()], f"{path} starts Ray without a token"
    assert any(path.name == "local.sh" for path in files)
