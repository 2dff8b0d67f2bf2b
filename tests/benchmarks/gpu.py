"""The first quarter of an hour on a GPU: what the machine can do, and what HyMaTE makes of it.

    python tests/benchmarks/gpu.py --out results [--wheels DIR] [--data DATA_DIR] [--only base,peers] [--rehearse]

This file needs Python alone; in its first second it prints what the machine has and what it lacks. Then the parts of
gpu_parts.py run, the most telling ones first, each in a process of its own and for a limited time. A part that fails,
hangs or lacks something costs nothing but itself. `results/gpu.json` holds after each part all that was measured, with
the traceback of what failed; the exit code is 1 where something did.

--wheels: a folder of wheels for a machine without internet. They are installed into DIR/site, without dependencies,
which comes first on the path of the parts. --data: a prepared dataset, for the lengths of its histories; without it
they are drawn as the synthetic cohort's are. --rehearse: everything on the CPU, so small that it takes a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# seconds that each part may take, in the order in which they run; new shapes compile a hundred kernels at first
PARTS = {
    "machine": 30,
    "ceilings": 40,
    "base": 240,
    "peers": 120,
    "long": 60,
    "profile": 45,
    "inference": 60,
    "mamba1": 60,
    "small": 150,
}
PACKAGES = (
    *("torch", "triton", "mamba-ssm", "causal-conv1d", "deepspeed", "transformers", "numpy", "pyarrow", "PyYAML"),
    *("hydra-core", "meds", "safetensors", "rich"),
)


def found() -> dict[str, str | None]:
    """The version of each package, None where it is missing. Nothing is imported."""
    importlib.invalidate_caches()
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def card() -> str:
    """The NVIDIA driver's list of GPUs, or why there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return "no nvidia-smi"
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    return "; ".join((answer.stdout or answer.stderr).split("\n")).strip("; ")


def install(wheels: Path) -> dict[str, str]:
    """Install each wheel into wheels/site; "installed", or why not, for each."""
    outcome = {}
    for wheel in sorted(wheels.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--upgrade", "--target", str(wheels / "site"), str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True)
        outcome[wheel.name] = "installed" if done.returncode == 0 else _last_line(done.stderr) or "pip failed"
    return outcome


def spare_compiled_part(site: Path) -> None:
    """Let mamba-ssm be imported without its compiled part: it imports that at once, though only Mamba-1 uses it."""
    file = site / "mamba_ssm" / "ops" / "selective_scan_interface.py"
    if file.exists():
        guarded = "try:\n    import selective_scan_cuda\nexcept ImportError:\n    selective_scan_cuda = None\n"
        file.write_text(file.read_text().replace("\nimport selective_scan_cuda\n", f"\n{guarded}"))


def run_part(command: list[str], seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part for so many seconds at most: what it measured, how long it took, and what it printed if it broke.

    The command gets the path of a file after its arguments, in which it keeps what it measured as JSON.
    """
    began, ended = time.monotonic(), None
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(report)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
                if code:
                    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {seconds:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it may have left
                process.wait()
        part: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
        part["measured"] = json.loads(report.read_text()) if report.exists() else []
        if ended:
            part |= {"ended": ended, "printed": log.read_text(errors="replace")[-4000:]}
    return part


def outcome(part: dict[str, Any]) -> str:
    """ "failed", "left out" where nothing was measured for want of something, or "done"."""
    if "ended" in part or any("error" in each for each in part["measured"]):
        return "failed"
    return "left out" if all("left_out" in each for each in part["measured"]) else "done"


def show(name: str, part: dict[str, Any]) -> None:
    """A line for the part and one for each measurement."""
    ended = f": {part['ended']}; {_last_line(part['printed'])}" if "ended" in part else ""
    print(f"{name:10} {part['seconds']:5.0f} s  {part['outcome']}{ended}")
    for each in part["measured"]:
        measures = "; ".join(
            f"{key} {_number(value)}" for key, value in each.items() if key not in ("what", "traceback")
        )
        print(f"    {each['what']}: {measures.replace('left_out', 'left out:')}")
    sys.stdout.flush()


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _last_line(text: str) -> str:
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "")


def write(results: dict[str, Any], path: Path) -> None:
    """Atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def main() -> None:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the part that runs ends, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", help="parts, with commas between them")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.wheels:
        sys.path.insert(0, str(options.wheels / "site"))
    results: dict[str, Any] = {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": sys.version,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "card": card(),
        "compiler": shutil.which("nvcc"),
        "packages": found(),
    }

    def announce() -> None:
        there = [f"{package} {number}" for package, number in results["packages"].items() if number]
        missing = [package for package, number in results["packages"].items() if not number]
        print(f"{', '.join(there) or 'none of the packages'}\nmissing: {', '.join(missing) or 'nothing'}", flush=True)

    print(f"Python {platform.python_version()}, {results['platform']}, {results['cores']} cores; {results['card']}")
    announce()
    if options.wheels:
        results["wheels"] = install(options.wheels)
        spare_compiled_part(options.wheels / "site")
        results["packages"] = found()
        for name, what in results["wheels"].items():
            print(f"{name}: {what}")
        announce()
    first = [str(options.wheels.absolute() / "site")] if options.wheels else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*first, str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        ),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_AUTOTUNING": "1",  # what one part has tuned, the next need not
    }
    results["parts"] = {}
    patience = 10 if options.rehearse else 1  # a rehearsal may run on a busy machine
    for name in names:
        left = patience * 60 * options.minutes - (time.monotonic() - began)
        if left < 10:
            part: dict[str, Any] = {"seconds": 0.0, "measured": [{"what": name, "left_out": "no time was left"}]}
        else:
            command = [sys.executable, str(HERE / "gpu_parts.py"), name]
            command += ["--rehearse"] if options.rehearse else []
            command += ["--data", str(options.data.absolute())] if options.data else []
            command += ["--tflops", str(_rate(results["parts"]))]
            part = run_part(command, min(left, patience * PARTS[name]), environment)
        results["parts"][name] = {"outcome": outcome(part), **part}
        write(results, options.out / "gpu.json")
        show(name, results["parts"][name])
    print(f"{time.monotonic() - began:.0f} s; {options.out / 'gpu.json'}")
    sys.exit(any(part["outcome"] == "failed" for part in results["parts"].values()))


def _rate(parts: dict[str, Any]) -> float:
    """The fastest matrix product that was measured, TFLOP/s; 0 where none was."""
    ceilings = parts["ceilings"]["measured"] if "ceilings" in parts else []
    return max((each.get("tflops", 0.0) for each in ceilings), default=0.0)


if __name__ == "__main__":
    main()
