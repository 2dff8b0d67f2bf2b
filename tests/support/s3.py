"""An S3-compatible server, on the loopback interface or a given one: a real process that can be stopped for a while."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from commands import wait_until

from hymate.storage import remote

BUCKET = "bucket"


@dataclass(frozen=True)
class Server:
    """environment: what leads clients to it."""

    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """It takes connections and answers none while the block runs."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextmanager
def serving(folder: Path, host: str = "127.0.0.1") -> Iterator[Server]:
    """A server with an empty bucket at an address of this machine; its log is in `folder`."""
    with socket.create_server((host, 0)) as free:
        port = free.getsockname()[1]
    address = f"http://{host}:{port}"
    arguments = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    with (folder / "server.log").open("wb") as log, subprocess.Popen(arguments, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: process.poll() is not None or _answers(address), "the server answers")
            urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
            keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
            yield Server(process, {"AWS_ENDPOINT_URL": address, **keys, remote.PATIENCE: "12"})
        finally:
            process.kill()


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """os.environ with `settings` while the block runs; filesystems are what it says where they are first used."""
    before = dict(os.environ)
    os.environ.update(settings)
    remote.connect.cache_clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        remote.connect.cache_clear()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/moto-api/data.json").close()
    except (urllib.error.URLError, ConnectionError):
        return False
    return True
