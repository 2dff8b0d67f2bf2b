"""Memory of a training process: what large arrays leave stays with the process, in every thread."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import threading, torch
from hymate.training.memory import keep_freed_memory

def resident_mib():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmRSS"].split()[0]) // 1024

def left_by(size_mib):
    before = resident_mib()
    torch.ones(size_mib << 20, dtype=torch.uint8)
    print(resident_mib() - before)

left_by(100)
keep_freed_memory()
left_by(100)
thread = threading.Thread(target=left_by, args=(300,))
thread.start()
thread.join()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_arrays_stay_with_the_process() -> None:
    output = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    default, kept, kept_in_a_thread = (int(line) for line in output.split())
    assert default < 50, "by default the system has it back at once"
    assert kept > 90
    assert kept_in_a_thread > 190, "300 MiB less the 100 that were there"
