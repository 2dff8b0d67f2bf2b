"""Hosts on this machine, as root: each has a network, processes, a name, a /tmp, a /dev/shm and a home of its own.

A bridge joins them. They share no folder but the one that holds the code; what they exchange goes over the network.
Nothing has to be taken down: namespaces and links go with the processes that hold them, and these end with the tests'
process, whatever ends that.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, ROOT, wait_until

DELAYED = Path(__file__).with_name("delayed.py")
NAMES = "127.0.0.1 localhost\n"
FIRST, OUTSIDE = 1, 254  # last numbers of addresses: of the first host, and of this machine
PORT = 6379  # of a cluster's head
ONE_CPU = ["--num-cpus", "1", "--object-store-memory", str(128 << 20)]
ENDS_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
INIT = """
set -e
hostname "$1"
cd "$2"
for part in hosts resolv.conf; do mount --bind $part /etc/$part; done
mount -t tmpfs tmpfs /dev/shm
mkdir -p tmp/home
for needed in "${@:3}"; do
    case $needed in /tmp/*) mkdir -p "tmp/${needed#/tmp/}"; mount --bind "$needed" "tmp/${needed#/tmp/}";; esac
done
mount --rbind tmp /tmp
touch ready
while true; do sleep 3600 & wait $!; done # and reap what others leave
"""


@dataclass(frozen=True, eq=False)
class Host:
    """folder: tmp, its /tmp. init: the first of its processes, whose end is the host's. link: its cable's other end.

    processes: what holds it, and what was started in it.
    """

    name: str
    address: str
    folder: Path
    init: int
    switch: int
    link: str
    processes: list[subprocess.Popen[Any]]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """A process of the host, with its own environment and these variables of `options["env"]`."""
        environment = {
            "HOME": "/tmp/home",
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(ROOT),
            **options.pop("env", {}),
        }
        inside = ["nsenter", "--target", str(self.init), "--all", f"--wd={ROOT}"]
        process = subprocess.Popen([*ENDS_WITH_US, *inside, *arguments], env=environment, text=True, **options)
        self.processes.append(process)
        return process

    def run(self, *arguments: str, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
        """A command of the host, to its end."""
        with self.start(*arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                said, complained = process.communicate(timeout=PATIENCE_S)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, said, complained)

    def kill(self) -> None:
        """The host dies, with all of its processes."""
        with suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        for process in self.processes:
            if "delayed.py" in str(process.args):
                process.kill()
            process.wait(PATIENCE_S)

    def cut(self) -> None:
        """Nothing reaches the host, nor what it sends anybody."""
        _ip(self.switch, f"link set {self.link} down")

    def mend(self) -> None:
        """The host's cable is whole again."""
        _ip(self.switch, f"link set {self.link} up")

    def narrow(self, rate: str) -> None:
        """The host sends no more than this, such as "20mbit"."""
        limit = f"tc qdisc add dev eth0 root tbf rate {rate} burst 32kb latency 200ms"
        subprocess.run(["nsenter", "--target", str(self.init), "--net", *limit.split()], check=True)


@dataclass(eq=False)
class Network:
    """switch: the process whose network the bridge is in. prefix: of all addresses."""

    folder: Path
    switch: int
    prefix: str
    hosts: list[Host] = field(default_factory=list)

    @property
    def outside(self) -> str:
        """The address under which the hosts know this machine."""
        return f"{self.prefix}.{OUTSIDE}"

    def add(self, own_name: str | None = "127.0.1.1", delay_s: float = 0.0) -> Host:
        """A new host.

        own_name: what its name means to itself: an address, on an interface that leads nowhere, or nothing. Other hosts
        don't know it. delay_s: of its cable, each way.
        """
        number = FIRST + len(self.hosts)
        name, address = f"host{number}", f"{self.prefix}.{number}"
        folder = self.folder / name
        (folder / "tmp").mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        (folder / "hosts").write_text(NAMES + (f"{own_name} {name}\n" if own_name else ""))
        (folder / "resolv.conf").write_text("")
        unshared = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        script = ["bash", "-c", INIT, "init", name, str(folder), str(ROOT), sys.prefix, sys.base_prefix]
        with (folder / "init.log").open("w") as log:
            outer = subprocess.Popen([*ENDS_WITH_US, *unshared, *script], stdout=log, stderr=log)
        wait_until(lambda: (folder / "ready").exists() or outer.poll() is not None, f"{name} is there")
        assert outer.poll() is None, (folder / "init.log").read_text()
        init = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
        link = f"port{number}"
        processes = [outer]
        if delay_s:
            processes.append(self._delayed(link, f"far{number}", delay_s))
            _ip(self.switch, f"link set far{number} netns {init} name eth0")
        else:
            _ip(self.switch, f"link add {link} type veth peer name eth0 netns {init}")
        _ip(self.switch, f"link set {link} master bridge up")
        _ip(init, "link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up")
        if own_name and not own_name.startswith("127."):
            _ip(init, "link add nowhere type bridge", f"addr add {own_name}/24 dev nowhere", "link set nowhere up")
        # without a way out Ray takes the address that the host's name has
        _ip(init, f"route add default via {self.outside}")
        host = Host(name, address, folder, init, self.switch, link, processes)
        self.hosts.append(host)
        return host

    def _delayed(self, *arguments: object) -> subprocess.Popen[Any]:
        inside = ["nsenter", "--target", str(self.switch), "--net", sys.executable, str(DELAYED), *map(str, arguments)]
        process = subprocess.Popen([*ENDS_WITH_US, *inside], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        return process


def start_ray(host: Host, head: Host | None, environment: Mapping[str, str], *options: str) -> None:
    """As docs/cluster.md does on machines by hand; returns when the host is part of the cluster.

    head: whose cluster to join; None starts one.
    """
    start = ["ray", "start", "--head", "--block", "--dashboard-agent-listen-port", "0", "--disable-usage-stats"]
    arguments = start if head is None else [str(ROOT / "cluster" / "join.sh"), f"{head.address}:{PORT}"]
    (host.folder / "ray.log").unlink(missing_ok=True)
    with (host.folder / "ray.log").open("w") as log:
        host.start(*arguments, *ONE_CPU, *options, env=environment, stdout=log, stderr=log)
    wait_until(lambda: joined(host), f"{host.name} is part of the cluster")


def joined(host: Host) -> int:
    """How often Ray has started on a host."""
    return (host.folder / "ray.log").read_text().count("Ray runtime started")


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network without hosts; their files are in `folder`. Skips the test where namespaces can't be had."""
    if os.geteuid() != 0:
        pytest.skip("hosts of their own need root")
    if missing := [tool for tool in ("ip", "nsenter", "setpriv", "tc", "unshare") if not shutil.which(tool)]:
        pytest.skip(f"hosts of their own need {' and '.join(missing)}")
    with subprocess.Popen([*ENDS_WITH_US, "unshare", "--net", "sleep", "infinity"], stderr=subprocess.PIPE) as switch:
        try:
            wait_until(lambda: switch.poll() is not None or _has_own_network(switch.pid), "there is a network")
            link = f"hy{os.getpid()}"
            made = subprocess.run(
                f"ip link add {link} type veth peer name port{OUTSIDE} netns {switch.pid}".split(),
                capture_output=True,
                text=True,
            )
            if switch.poll() is not None or made.returncode:
                pytest.skip(f"hosts of their own can't be had here: {made.stderr.strip()}")
            found = Network(folder, switch.pid, _free_prefix())
            _ip(None, f"addr add {found.outside}/24 dev {link}", f"link set {link} up")
            _ip(switch.pid, "link add bridge type bridge", "link set bridge up")
            _ip(switch.pid, f"link set port{OUTSIDE} master bridge up")
            try:
                yield found
            finally:
                for host in found.hosts:
                    host.kill()
        finally:
            switch.kill()
    wait_until(lambda: not Path(f"/sys/class/net/{link}").exists(), "the network is gone")


def _has_own_network(process: int) -> bool:
    with suppress(OSError):
        return os.readlink(f"/proc/{process}/ns/net") != os.readlink("/proc/self/ns/net")
    return False


def _free_prefix() -> str:
    """198.18.0.0/15 is for tests of networks (RFC 2544)."""
    taken = subprocess.run(["ip", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    prefixes = [f"198.{18 + number // 256}.{number % 256}" for number in range(512)]
    first = os.getpid() % len(prefixes)
    return next(prefix for prefix in prefixes[first:] + prefixes[:first] if f" {prefix}." not in taken)


def _ip(process: int | None, *commands: str) -> None:
    """Commands of `ip` in a process's network, or in this one."""
    inside = [] if process is None else ["nsenter", "--target", str(process), "--net"]
    for command in commands:
        subprocess.run([*inside, "ip", *command.split()], check=True)
