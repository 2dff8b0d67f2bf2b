"""A run's Ray cluster: its own is closed to others, and so is everything in cluster/; one that can't be used."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import PATIENCE_S, ROOT, listening, processes

from hymate import cluster
from hymate.config import TrainConfig
from hymate.errors import UserError

SESSION = """
import sys
from hymate.cluster import ray_session
with ray_session(cpus_per_worker=1):
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def session() -> Iterator[tuple[psutil.Process, str, dict[str, str]]]:
    """A process with a Ray cluster of its own, its address, and the environment of a stranger on this machine."""
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
    hosts = listening(process)
    assert hosts and all(host.is_loopback for host in hosts), hosts
    running = processes()
    lines = [running[part.pid][1] for part in process.children(recursive=True) if part.pid in running]
    assert any("raylet" in line for line in lines) and not any("dashboard/dashboard.py" in line for line in lines)


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


TOO_LARGE = """
import time
from hymate import cluster
with cluster.ray_session(cpus_per_worker=1):
    try:
        list(cluster.each(lambda shard: time.sleep(600), ["train/7"]))
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_task_that_no_memory_holds_ends_in_a_line() -> None:
    """On a machine whose memory counts as full as soon as anything is in it."""
    with tempfile.TemporaryDirectory(prefix="hy", dir="/tmp", ignore_cleanup_errors=True) as folder:
        full = {"RAY_memory_usage_threshold": "0.0001", "RAY_memory_monitor_refresh_ms": "100"}
        full |= {"RAY_task_oom_retry_delay_base_ms": "10", "RAY_TMPDIR": folder}
        done = subprocess.run(
            [sys.executable, "-c", TOO_LARGE],
            env=os.environ | full,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    (line,) = done.stdout.splitlines()
    assert line.startswith("UserError train/7: 4 times its process was killed because its machine ran out"), done


# ---------------------------------------------------------------------------------------------- what can't be had


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("ray://127.0.0.1:10001", "is not the address of a cluster: give HOST:PORT"),
        ("http://127.0.0.1:8265", "is not the address of a cluster"),
        ("local", "is not the address of a cluster"),
        ("127.0.0.1", r"no Ray cluster that can be used \(Invalid address format: 127.0.0.1\)"),
        ("127.0.0.1:six", "no Ray cluster that can be used"),
        ("nowhere.invalid:6379", r"\(Temporary failure in name resolution|Name or service not known"),
        ("two words:6379", "no Ray cluster that can be used"),
    ],
)
def test_an_address_of_no_cluster_is_refused(address: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"^RAY_ADDRESS={re.escape(address)}.*{reason}") as caught:
        cluster.available_gpus(TrainConfig())
    assert "\n" not in str(caught.value)


def test_a_cluster_that_is_gone_or_silent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(cluster, "ANSWER_S", 2.0)
        with pytest.raises(UserError, match=rf"^RAY_ADDRESS={address}: .*\(no answer for 2 s\)"):
            cluster.available_gpus(TrainConfig())
    monkeypatch.undo()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS={address}: .*\(Connection refused\)"):
        cluster.available_gpus(TrainConfig())


@pytest.mark.slow
def test_sigterm_ends_the_wait_for_a_cluster() -> None:
    script = "from hymate import ending\nending.watch()\nwith ending.command():\n"
    script += "    from hymate.config import TrainConfig\n    from hymate import cluster\n"
    script += "    cluster.available_gpus(TrainConfig())"
    with socket.create_server(("", 0)) as silent:
        silent.settimeout(PATIENCE_S)
        environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{silent.getsockname()[1]}"}
        with subprocess.Popen(
            [sys.executable, "-c", script], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
        ) as process:
            silent.accept()[0].close()
            process.terminate()
            _, said = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, said) == (143, "stopped by SIGTERM: the same command continues it\n")


def test_a_ray_of_our_own_finds_another_place_where_the_usual_one_does_not_do(
    nobody: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        closed, deep = Path(folder) / "closed", Path(folder) / ("x" * 50)
        (closed / "ray").mkdir(parents=True, mode=0o500)  # as another user's would be
        deep.mkdir()
        for unfit, reason in ((closed, "Permission denied"), (deep, "longer than [0-9]+ characters")):
            monkeypatch.setenv("TMPDIR", str(unfit))
            with cluster.ray_folder() as other:
                assert Path(other).parent == Path("/tmp") and Path(other).stat().st_mode & 0o777 == 0o700
            assert not Path(other).exists()
            with monkeypatch.context() as given, pytest.raises(UserError, match=f"{reason}.*set RAY_TMPDIR to"):
                given.setenv("RAY_TMPDIR", str(unfit))
                with cluster.ray_folder():
                    pass
        monkeypatch.setenv("TMPDIR", folder)
        with cluster.ray_folder() as usual:
            assert usual == f"{folder}/ray"


def test_what_is_in_cluster_is_closed_to_others() -> None:
    files = [path for path in (ROOT / "cluster").rglob("*") if path.is_file()]
    for path in files:
        text = path.read_text()
        assert not re.search(r"dashboard-host[ =:\"']+(0\.0\.0\.0|::)", text), path
        assert not re.search(r"RAY_AUTH_MODE[ =:\"']+(?!token)\w", text), path
        starts = re.search(r"^\s*(nohup )?ray start ", text, flags=re.MULTILINE)
        assert not starts or "RAY_AUTH_MODE=token" in text[: starts.start()], f"{path} starts Ray without a token"
    assert any(path.name == "local.sh" for path in files)
