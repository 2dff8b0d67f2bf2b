"""What becomes a worker of Ray's: its environment and arguments, and nothing that this script does not know."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hymate

SCRIPT = Path(hymate.__file__).parent / "start_worker.py"


def started(context: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    asked = [f"--serialized-runtime-env-context={json.dumps(context)}", "--language=PYTHON", "--node=here"]
    worker = "import os, sys; print(sys.argv[1:], os.environ['HYMATE_TEST'])"
    environment = {**os.environ, "HYMATE_THERE": "there"}
    command = [sys.executable, str(SCRIPT), "-c", worker, *asked]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_worker_has_its_arguments_and_an_environment_that_refers_to_the_one_before() -> None:
    values = {"HYMATE_TEST": "a:${HYMATE_THERE}:${HYMATE_NOT_THERE}"}
    done = started({"env_vars": values, "py_executable": sys.executable, "command_prefix": [], "java_jars": []})
    assert done.stdout.strip() == "['--node=here'] a:there:", done.stderr


def test_a_worker_that_needs_more_is_refused() -> None:
    done = started({"env_vars": {}, "py_executable": sys.executable, "command_prefix": ["podman", "run"]})
    assert done.returncode == 1 and "podman" in done.stderr
