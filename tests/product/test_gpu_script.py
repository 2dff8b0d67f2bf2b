"""tests/benchmarks/gpu.py without a GPU: its rehearsal from end to end, and what parts that break leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
from gpu import PARTS, outcome, run_part, spare_compiled_part

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests" / "benchmarks" / "gpu.py"


def packages(folder: Path, **modules: str) -> dict[str, str]:
    """The environment of a machine that has these modules, each with its source, before all others."""
    folder.mkdir()
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


ALONE = ("machine", "ceilings", "base", "peers")  # what breaks, and what the rate of matrix products is needed for
TOGETHER = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu_parts
assert gpu_parts.PARTS.keys() == set(sys.argv[2].split(","))
for name in sys.argv[3].split(","):
    sys.argv[1:] = [name, "--rehearse", f"{name}.json"]
    gpu_parts.main()
"""


def test_a_rehearsal_reports_its_parts_and_outlives_one_that_fails(tmp_path: Path) -> None:
    """The other parts, rehearsed in one process, which imports once what each of them would."""
    environment = packages(tmp_path / "site", transformers="raise RuntimeError('made to fail')")
    out = tmp_path / "results"
    command = [sys.executable, str(SCRIPT), "--rehearse", "--only", ",".join(ALONE), "--out", str(out)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    results = json.loads((out / "gpu.json").read_text())
    parts = results["parts"]
    assert list(parts) == list(ALONE), done.stderr
    failed = [name for name in ALONE if parts[name]["outcome"] != "done"]
    assert failed == ["machine", "peers"] and done.returncode == 1, done.stdout
    for name, part in parts.items():
        assert part["measured"] and name in done.stdout
        for each in part["measured"]:
            assert f"    {each['what']}: " in done.stdout
            if "error" in each:
                assert each["what"].startswith("transformers") and "made to fail" in each["error"]
                assert "Traceback" in each["traceback"] and "Traceback" not in done.stdout

    others = [name for name in PARTS if name not in ALONE]
    command = [sys.executable, "-c", TOGETHER, str(SCRIPT.parent), ",".join(PARTS), ",".join(others)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    measured = [each for part in parts.values() for each in part["measured"] if "error" not in each]
    for name in others:
        part = {"measured": json.loads((tmp_path / f"{name}.json").read_text())}
        assert outcome(part) == "done", part
        measured += part["measured"]
    for each in measured:
        assert each.get("left_out") or any(isinstance(value, int | float | str) for value in list(each.values())[1:])
    found = {each["what"]: each for each in measured}
    assert found["bf16 matrix product, 64 square"]["tflops"] > 0
    for what in ("base, mamba2, plain", "base, mamba1, DeepSpeed ZeRO 2", "base, 1,024 events, activations kept"):
        speed = found[what]
        assert speed["events_per_second"] > 0 and speed["peak_gib"] > 0
    assert found["base, mamba2, DeepSpeed ZeRO 2"]["fraction_of_matrix_rate"] > 0
    assert found["HyMaTE, packed, real lengths"]["filled"] > 0.8
    assert found["base, prediction here and on the CPU"]["largest_difference_of_logits"] == 0
    assert found["base, streaming 1,024 events"]["append_16_ms"] > 0
    assert len(found["base, one step"]["longest"]) == 10


FIRST = "import json, sys; open(sys.argv[1], 'w').write(json.dumps([{'what': 'first', 'ms': 1.0}]));"


@pytest.mark.parametrize(
    ("source", "ended"),
    [
        (f"{FIRST} import os; os.kill(os.getpid(), 11)", "signal SIGSEGV"),
        (f"{FIRST} print('out of luck'); sys.exit(3)", "exit code 3"),
        (f"{FIRST} import time; print('out of luck', flush=True); time.sleep(60)", "stopped after 3 s"),
    ],
)
def test_a_part_that_dies_or_hangs_keeps_what_it_measured(source: str, ended: str) -> None:
    part = run_part([sys.executable, "-c", source], 3, dict(os.environ))
    assert part["measured"] == [{"what": "first", "ms": 1.0}]
    assert part["ended"] == ended and outcome(part) == "failed"
    assert "SIGSEGV" in ended or part["printed"] == "out of luck\n"


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([{"what": "a", "ms": 1.0}, {"what": "b", "left_out": "no such package"}], "done"),
        ([{"what": "a", "left_out": "no such package"}], "left out"),
        ([{"what": "a", "ms": 1.0}, {"what": "b", "error": "ValueError", "traceback": ""}], "failed"),
    ],
)
def test_a_part_is_done_where_anything_was_measured_and_nothing_failed(
    measured: list[dict[str, Any]], expected: str
) -> None:
    assert outcome({"seconds": 1.0, "measured": measured}) == expected


def test_a_bare_machine_is_described_before_anything_is_imported(tmp_path: Path) -> None:
    """Without any package, as `-I -S` makes of this Python; a wheel that is none is named."""
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("not a wheel")
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--minutes", "0", "--wheels", str(tmp_path)]
    done = subprocess.run([*command, "--out", "results"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Python 3") and lines[1] == "none of the packages"
    assert lines[2].startswith("missing: torch, triton, mamba-ssm")
    results = json.loads((tmp_path / "results" / "gpu.json").read_text())
    assert "installed" not in results["wheels"]["broken-1.0-py3-none-any.whl"]
    assert list(results["parts"]) == list(PARTS)
    assert {each["left_out"] for part in results["parts"].values() for each in part["measured"]} == {"no time was left"}


def test_an_installed_mamba_ssm_does_without_its_compiled_part(tmp_path: Path) -> None:
    file = tmp_path / "mamba_ssm" / "ops" / "selective_scan_interface.py"
    file.parent.mkdir(parents=True)
    file.write_text("import math\n\nimport selective_scan_cuda\n\nPI = math.pi\n")
    spare_compiled_part(tmp_path)
    spare_compiled_part(tmp_path)
    there: dict[str, Any] = {}
    exec(file.read_text(), there)
    assert there["PI"] and there["selective_scan_cuda"] is None
    spare_compiled_part(tmp_path / "nothing installed")


def test_gpu_tests_are_found_without_ray_and_what_other_tests_need(tmp_path: Path) -> None:
    absent = dict.fromkeys(("ray", "moto", "boto3", "tensorboard", "aces"), "raise ModuleNotFoundError(__name__)")
    environment = {**packages(tmp_path / "site", **absent), "PYTEST_ADDOPTS": "--collect-only"}
    command = ["make", "test-gpu", f"PYTHON={sys.executable}", f"VENV={tmp_path}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_a_checkpoint_goes_on_on_the_other_device[cpu-cuda-mamba2]" in done.stdout
    assert "[cpu-cpu" not in done.stdout and "test_fused.py" in done.stdout
