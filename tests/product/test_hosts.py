"""Pretraining over two hosts that have nothing in common but a network and a storage, not even their code."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from commands import ROOT
from hosts import PORT, network, start_ray
from pretraining_runs import command
from s3 import BUCKET, environment, serving

from hymate.inference.bundle import read_bundle
from hymate.storage.paths import locate, upload_files

SHORT = ["data.context=64", "data.tokens_per_row=64", "data.min_count=1", "train.rows_per_step=2", "train.eval_rows=2"]
SHORT += ["train.max_steps=4", "train.eval_every=2", "train.warmup_steps=1"]


@pytest.mark.slow
def test_hosts_whose_names_mean_nothing_to_others_train_together(small_data: Path, tmp_path: Path) -> None:
    """Debian and Ubuntu have a host's own name at 127.0.1.1. The other host has, in the same place, other code."""
    with network(tmp_path) as net, serving(tmp_path, net.outside) as server, environment(server.environment):
        upload_files(small_data, locate(f"s3://{BUCKET}/data"))
        head, other = net.add("127.0.1.1"), net.add(None)
        settings = {**server.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}
        settings |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HYMATE_OPS": "reference"}
        start_ray(head, None, settings, "--include-dashboard", "false")
        (other.folder / "tmp" / "hymate").mkdir()
        (other.folder / "tmp" / "hymate" / "__init__.py").write_text("raise SystemError('this is not the one')")
        assert other.run("mount", "--bind", "/tmp/hymate", str(ROOT / "hymate")).returncode == 0
        assert "this is not the one" in other.run("python", "-c", "import hymate").stderr
        start_ray(other, head, settings)
        arguments = command(
            Path("unused"), Path("unused"), f"data.path=s3://{BUCKET}/data", f"run.dir=s3://{BUCKET}/runs", *SHORT
        )
        done = head.run(*arguments, env={**settings, "RAY_ADDRESS": f"{head.address}:{PORT}"})
        assert done.returncode == 0, done.stderr
        record = json.loads(locate(f"s3://{BUCKET}/runs/pretrain/run.json").read_text())
        (attempt,) = record["attempts"]
        assert attempt["environment"]["nodes"] == 2 and len(attempt["starts"]) == 1
        assert read_bundle(locate(f"s3://{BUCKET}/runs/pretrain"), kind="pretrained").model.d_model == 32


@pytest.mark.slow
def test_pytorch_asks_a_dns_that_does_not_answer_only_once(tmp_path: Path) -> None:
    """By itself it would ask twice, and a start would wait 5 s for each answer."""
    code = "import sys, torch.distributed as dist; from hymate.training.meeting import ask_dns\n"
    code += "ask_dns(patiently=False); dist.TCPStore(sys.argv[1], 0, is_master=True)"
    asked = 0
    with network(tmp_path) as net, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((net.outside, 53))
        silent.setblocking(False)
        host = net.add()
        (host.folder / "resolv.conf").write_text(f"nameserver {net.outside}\n")
        done = host.run("python", "-c", code, host.address)
        assert done.returncode == 0, done.stderr
        with suppress(BlockingIOError):
            while b"in-addr" in silent.recv(512):
                asked += 1
    assert asked == 1
