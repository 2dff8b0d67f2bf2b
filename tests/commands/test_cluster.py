"""What cluster/ ships, with CPUs and GPUs: the tools that read it take it, others stay out, sizes are measured."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from commands import ROOT, documented, points, ray_processes, run, step_of, wait_until
from kuberay import SCHEMAS
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from hymate.command import load
from hymate.inference.bundle import read_bundle
from hymate.training.pretraining import PretrainConfig

CLUSTER = ROOT / "cluster"
KUBERNETES_VERSION = "1.30"
VARIANTS = ("cpu", "gpu")
UNITS = {"Mi": 2**20, "Gi": 2**30}


def variant(file: str, kind: str) -> str:
    """A file's text with CPUs, as it is, or with GPUs, by the command at its head."""
    text = (CLUSTER / file).read_text()
    if kind == "cpu":
        return text
    command = ["sed", "-e", "/# CPU$/d", "-e", "s/#GPU: //"]
    assert "#GPU" not in text or "sed -e '/# CPU$/d' -e 's/#GPU: //'" in text, f"{file} does not say how"
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def resources(file: str, kind: str = "cpu") -> dict[str, dict[str, Any]]:
    """Kubernetes resources of a file by their kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(variant(f"kubernetes/{file}", kind))}


def pod_templates(tree: Any) -> list[dict[str, Any]]:
    """Every pod template in a resource."""
    if isinstance(tree, list):
        return [found for each in tree for found in pod_templates(each)]
    if not isinstance(tree, dict):
        return []
    if "containers" in tree.get("spec", {}):
        return [tree]
    return [found for each in tree.values() for found in pod_templates(each)]


def ray_clusters(kind: str) -> list[dict[str, Any]]:
    job, cluster = resources("rayjob.yaml", kind)["RayJob"], resources("raycluster.yaml", kind)["RayCluster"]
    return [job["spec"]["rayClusterSpec"], cluster["spec"]]


def settings_of(command: str) -> PretrainConfig:
    """The configuration of a pretraining command in a container."""
    words = shlex.split(command)
    assert words[:2] == ["python", "/opt/hymate/pretrain/run.py"]
    return load("pretrain", words[2:], PretrainConfig)


def num_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def measured_mib(model: str) -> float:
    """The most that a worker took at the default context, by the page's table of sizes."""
    (row,) = re.findall(
        rf"^\| `{model}` \| .*? \| ([\d,]+) MiB \|", (ROOT / "docs" / "cluster.md").read_text(), flags=re.M
    )
    return float(row.replace(",", ""))


# --------------------------------------------------------------------------------------------------- Kubernetes


def validate(resource: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError where the schema of a resource's kind, or of a pod in it, knows better."""
    if resource["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
        return
    jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    for template in pod_templates(resource):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("file", sorted(file.name for file in (CLUSTER / "kubernetes").glob("*.yaml")))
def test_kubernetes_takes_it(file: str, kind: str) -> None:
    for resource in resources(file, kind).values():
        validate(resource)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("backoffLimit", "backofLimit"), ("replicas: 2", "replicas: two"), ("limits:", "limit:")],
)
def test_mistakes_are_found(right: str, wrong: str) -> None:
    text = variant("kubernetes/rayjob.yaml", "cpu").replace(right, wrong)
    with pytest.raises(jsonschema.ValidationError):
        validate(yaml.safe_load(text))


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_job_brings_the_cluster_that_is_also_there_alone(kind: str) -> None:
    of_job, alone = ray_clusters(kind)
    assert of_job == alone


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_job_fits_its_cluster(kind: str) -> None:
    job = resources("rayjob.yaml", kind)["RayJob"]["spec"]
    config = settings_of(job["entrypoint"])
    train = config.train
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    of_pod = container["resources"]
    per_pod = int(of_pod["limits"]["nvidia.com/gpu"]) if kind == "gpu" else int(of_pod["requests"]["cpu"])
    assert (config.device == "cuda") == (kind == "gpu")
    assert train.num_workers == group["replicas"] * per_pod
    assert per_pod * train.cpus_per_worker <= int(of_pod["requests"]["cpu"])


def test_memory_is_what_was_measured() -> None:
    job = resources("rayjob.yaml")["RayJob"]["spec"]
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert "model=small" in job["entrypoint"]
    needed = int(container["resources"]["requests"]["cpu"]) * measured_mib("small") * 2**20
    assert needed < num_bytes(container["resources"]["limits"]["memory"]) < 2 * needed


@pytest.mark.parametrize("kind", VARIANTS)
def test_kubernetes_keeps_others_out(kind: str) -> None:
    """Tokens on, no dashboard outside, no rights that training has no use for."""
    for cluster in ray_clusters(kind):
        assert cluster["authOptions"] == {"mode": "token"}
        assert not {"serviceType", "enableIngress", "headService"} & cluster["headGroupSpec"].keys()
    policies = {file: resources(file)["NetworkPolicy"]["spec"] for file in ("shared.yaml", "tensorboard.yaml")}
    admitted = policies["shared.yaml"]["podSelector"]["matchLabels"]
    assert "ingress" not in policies["tensorboard.yaml"]
    for file in ("rayjob.yaml", "raycluster.yaml", "tensorboard.yaml"):
        for resource in resources(file, kind).values():
            for template in pod_templates(resource):
                labels = (
                    policies["tensorboard.yaml"]["podSelector"]["matchLabels"] if "tensorboard" in file else admitted
                )
                assert template["metadata"]["labels"] == labels
                spec = template["spec"]
                assert spec["securityContext"]["runAsNonRoot"] and spec["automountServiceAccountToken"] is False
                for container in spec["containers"]:
                    assert container["image"] == "REGISTRY/hymate"
                    assert container["securityContext"]["allowPrivilegeEscalation"] is False
                    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert resources("tensorboard.yaml")["Service"]["spec"]["type"] == "ClusterIP"


# ----------------------------------------------------------------------------------- virtual machines, container


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_cluster_launcher_takes_it(kind: str) -> None:
    config = yaml.safe_load(variant("vm.yaml", kind))
    assert (config["available_node_types"]["worker"]["resources"].get("GPU", 0) > 0) == (kind == "gpu")
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert [command for command in commands if "ray start" in command and "RAY_AUTH_MODE=token" in command]
    assert "--dashboard-host 127.0.0.1" in config["head_start_ray_commands"][-1]
    validate_config(prepare_config(config))  # against Ray's own schema


def test_the_container_file_builds_what_is_there() -> None:
    text = (CLUSTER / "Containerfile").read_text().replace("\\\n", " ")
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    stages = [argument for name, argument in instructions if name == "FROM"]
    assert [stage.rpartition(" AS ")[2] for stage in stages[:-1]] == ["cpu", "cuda"] and stages[-1] == "${DEVICE}"
    assert ["ARG", "DEVICE=cpu"] in instructions
    ignored = (CLUSTER / "Containerfile.dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[0] == "*", "no data, runs or environments"
    for name, argument in instructions:
        if name == "COPY":
            sources = [word for word in argument.split()[:-1] if not word.startswith("--")]
            assert sources and all((ROOT / source).exists() for source in sources), argument
            assert all(source in admitted or source.split("/")[0] in admitted for source in sources), argument
    (install,) = [argument for name, argument in instructions if name == "RUN" and "pip install" in argument]
    for_cpus, for_gpus = (install.replace("--no-cache-dir $TORCH", each) for each in re.findall(r'TORCH="(.*?)"', text))
    assert for_gpus in [command.line for command in documented("docs/gpu.md")], "as docs/gpu.md has it"
    assert for_cpus == "pip install --extra-index-url https://download.pytorch.org/whl/cpu -e ."
    users = [argument for name, argument in instructions if name == "USER"]
    assert users == ["1000:1000"], "as the pods' runAsUser"
    assert "RAY_AUTH_MODE=token" in text


def test_the_kernels_are_those_of_the_pytorch_beside_them() -> None:
    lines = [line for line in (CLUSTER / "cuda.txt").read_text().splitlines() if not line.startswith("#")]
    channels = {line.rstrip("/").rpartition("/")[2] for line in lines if line.startswith("--")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [line for line in lines if not line.startswith("--")] == ["hymate[cuda]"]
    pinned = {each.name: each for each in map(Requirement, project["optional-dependencies"]["cuda"])}
    version = {name: Version(str(each.specifier).removeprefix("==")) for name, each in pinned.items()}
    torch = version.pop("torch")
    assert channels == {torch.local}, "each index is for one CUDA"
    cuda = f"{torch.local[2:-1]}.{torch.local[-1]}"
    assert version.keys() == {"mamba-ssm", "causal-conv1d"}
    assert {each.local for each in version.values()} == {f"cu.{cuda}.torch.{torch.major}.{torch.minor}"}
    (ours,) = [each for each in map(Requirement, project["dependencies"]) if each.name == "torch"]
    assert torch.public in ours.specifier


# -------------------------------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize("kind", VARIANTS)
def test_shells_take_the_scripts(kind: str, tmp_path: Path) -> None:
    for name in ("slurm.sh", "local.sh", "join.sh")[: 3 if kind == "cpu" else 1]:
        script = tmp_path / name
        script.write_text(variant(name, kind))
        checked = run(["bash", "-n", str(script)], dict(os.environ), tmp_path)
        assert checked.returncode == 0, checked.stderr
        shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert shellcheck is not None, "it comes with the extra dev"
        checked = run([shellcheck, "--exclude", "SC1091", str(script)], dict(os.environ), tmp_path)
        assert checked.returncode == 0, checked.stdout


FAKE_RAY = """#!/usr/bin/env bash
printf '%s\\n' "Ray runtime started" "----- BEGIN raylet.err tail" "*** StackTrace" "----- END raylet.err tail"
echo "$*" >>started
[ "$(wc -l <started)" -lt 3 ] || exec tail -f /dev/null
"""


def test_a_machine_joins_again_when_its_ray_has_ended(tmp_path: Path) -> None:
    for name, text in {"ray": FAKE_RAY, "sleep": "#!/usr/bin/env bash\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment, started = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}, tmp_path / "started"
    arguments = [str(CLUSTER / "join.sh"), "head:6379", "--num-cpus", "1"]
    with subprocess.Popen(
        arguments, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as joining:
        wait_until(lambda: started.exists() and started.read_text().count("\n") == 3, "Ray has started three times")
        joining.terminate()
        said, _ = joining.communicate(timeout=60)
    assert said.count("Ray has ended; it starts again") == 2 and "StackTrace" not in said
    assert set(started.read_text().splitlines()) == {
        "start --block --address head:6379 --num-cpus 1 --dashboard-agent-listen-port 0 --disable-usage-stats "
        "--log-color false"
    }


FAKE_SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 == --overlap ]] && shift || shift 2; done
exec "$@"
"""
FAKE_SQUEUE = """#!/usr/bin/env bash
echo RUNNING
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case $1 in
show) tr , '\\n' <<<"$3" ;;
requeue) touch "requeued-$2" ;;
esac
"""


@pytest.fixture
def slurm_job(small_data: Path, tmp_path: Path) -> Iterator[tuple[list[str], dict[str, str], Path]]:
    """A job's command, environment and folder on two machines, which are both this one; srun, squeue
    and scontrol are not Slurm's.
    """
    job, tools = str(os.getpid()), tmp_path / "tools"
    folder = tmp_path / "checkout"
    for name in ("pretrain", "configs", "hymate"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    tools.mkdir()
    for name, text in {"srun": FAKE_SRUN, "squeue": FAKE_SQUEUE, "scontrol": FAKE_SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "PATH": f"{tools}{os.pathsep}{environment['PATH']}",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": "2",
    }
    environment |= {"SLURM_JOB_NODELIST": "localhost,localhost", "SLURM_CPUS_PER_TASK": "1", "RAY_worker_niceness": "0"}
    environment |= {"HYMATE_OPS": "reference", "TORCHDYNAMO_DISABLE": "1"}
    sizes = ["data.context=64", "data.tokens_per_row=64", "data.min_count=1", "model=debug", "train.eval_rows=2"]
    sizes += [
        "train.warmup_steps=1",
        "train.eval_every=3",
        "train.log_every=1",
        "train.rows_per_step=2",
        f"data.path={small_data}",
        f"run.dir={tmp_path}/runs",
    ]
    yield ["bash", str(CLUSTER / "slurm.sh"), *sizes], environment, folder
    shutil.rmtree(f"/tmp/hymate-{job}", ignore_errors=True)


@pytest.mark.slow
def test_a_preempted_slurm_job_goes_on(slurm_job: tuple[list[str], dict[str, str], Path], tmp_path: Path) -> None:
    """On two machines, then on one, with as many rows a step."""
    command, environment, folder = slurm_job
    files, runs = f"/tmp/hymate-{environment['SLURM_JOB_ID']}", tmp_path / "runs" / "pretrain"

    def start(*settings: str) -> subprocess.Popen[str]:
        words = [*command, *settings]
        return subprocess.Popen(
            words, env=environment, cwd=folder, start_new_session=True, text=True, stdout=subprocess.PIPE
        )

    def ended(job: subprocess.Popen[str]) -> str:
        """What the job printed; its processes end as Slurm would end them."""
        job.wait(180)
        with suppress(ProcessLookupError):  # they have ended by themselves
            os.killpg(job.pid, signal.SIGTERM)
        wait_until(lambda: not ray_processes(files), "the job's Ray has ended")
        return job.stdout.read() if job.stdout else ""

    first = start("train.max_steps=1000000")
    wait_until(lambda: step_of(runs) > 3 or first.poll() is not None, "the first checkpoints are there")
    first.send_signal(signal.SIGTERM)
    said = ended(first)
    assert first.returncode == 143, said
    assert (folder / f"requeued-{environment['SLURM_JOB_ID']}").is_file()
    last = max(json.loads(path.read_text())["step"] for path in (runs / "checkpoints").glob("*/state.json"))
    environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    again = start(f"train.max_steps={last + 3}")
    assert f"bundle: {runs}/bundle" in ended(again) and again.returncode == 0
    assert read_bundle(runs, kind="pretrained").model.d_model == 32
    assert [point.step for point in points(runs, "train/loss")][-1] == last + 3
