"""The plan of the house: a file imports its floor's lower files and lower floors only; nothing imports upward."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT

import hymate

PACKAGE = Path(hymate.__file__).parent
# From the ground up. The rooms of a floor are in order, too: a later one may use an earlier one. Inside a folder files
# may use each other, but not in circles.
FLOORS = (
    ("errors", "hashing", "machine", "ending", "scripts"),
    ("places", "config", "trees"),
    ("ops",),
    ("model",),
    ("storage",),
    ("device", "runs", "start_worker", "cluster", "work", "command"),
    ("data",),
    ("inference",),
    ("training",),
    ("evaluation",),
    ("tuning",),
    ("interface", "plan", "predict", "evaluate", "explain", "baselines"),
)
ROOMS = [room for floor in FLOORS for room in floor]
# What a library may be imported by; where a name is not here, everyone may.
LIBRARIES = {
    "ray": {"cluster", "training.ray_train", "training.meeting", "tuning.ray_tune"},
    "deepspeed": {
        "training.deepspeed",
        "training.loop",
        "training.checkpoint",
        "training.stragglers",
        "training.footprint",
    },
    "pyarrow": {
        "storage",
        "work",
        "data",
        "inference",
        "evaluation",
        "tuning",
        "training",
        "predict",
        "evaluate",
        "explain",
        "baselines",
        "interface",
    },
    "hydra": {"command"},
    "omegaconf": {"command"},
}


def modules() -> dict[str, Path]:
    """Names below `hymate.` and their files."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            names[name] = path
    return names


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Each module that a file imports, anywhere in it, and the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own(name: str, known: dict[str, Path]) -> str | None:
    """The module of ours that an imported name is or is in."""
    if not name.startswith("hymate."):
        return None
    parts = name.split(".")[1:]
    candidates = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((candidate for candidate in candidates if candidate in known), None)


def test_every_room_has_its_floor() -> None:
    assert {name.split(".")[0] for name in modules()} == set(ROOMS)


def test_no_import_points_upward_or_sideways() -> None:
    known = modules()
    wrong = []
    for name, path in known.items():
        room = name.split(".")[0]
        for target, line in imported(path):
            other = own(target, known)
            if other and other.split(".")[0] != room and ROOMS.index(other.split(".")[0]) > ROOMS.index(room):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle() -> None:
    known = modules()
    uses = {name: {o for t, _ in imported(path) if (o := own(t, known)) and o != name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(uses[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in uses:
        visit(name, ())


def test_a_library_is_known_where_the_plan_says() -> None:
    wrong = []
    for name, path in modules().items():
        for target, line in imported(path):
            allowed = LIBRARIES.get(target.split(".")[0])
            if allowed is not None and not {name, name.split(".")[0]} & allowed:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {name} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_the_encoder_needs_neither_pyarrow_nor_hydra() -> None:
    code = (
        "import sys, hymate.model.encoder; "
        "print([name for name in ('pyarrow', 'hydra', 'omegaconf', 'yaml', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_import_what_they_need_and_no_more() -> None:
    """Each of these takes from a fifth of a second to two seconds of every command and of every process of Ray."""
    large = {"deepspeed", "matplotlib", "pandas", "polars", "ray", "scipy.optimize", "scipy.stats", "sklearn"}
    unwanted = {  # one after the other in the same process
        **dict.fromkeys(("hymate.data.prepare", "hymate.baselines"), large | {"torch"}),
        **dict.fromkeys((f"hymate.{name}" for name in ("training.pretraining", "plan", "predict", "explain")), large),
        **dict.fromkeys((f"hymate.{name}" for name in ("evaluate", "tuning.search", "tuning.benchmark")), large),
        "hymate.tuning.ray_tune": large - {"pandas", "ray"} | {"ray.train.torch"},
    }
    code = (
        "import importlib, json, sys\n"
        "for name, unwanted in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    assert not (found := sys.modules.keys() & set(unwanted)), f'{name} imports {found}'\n"
    )
    given = json.dumps([(name, sorted(libraries)) for name, libraries in unwanted.items()])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_test_files_share_through_support_alone() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    shared = [f"{path}:{line}" for path in files for name, line in imported(path) if name.startswith("test_")]
    assert len(files) > 100 and not shared, "\n".join(shared)


def test_test_files_have_one_subject_each() -> None:
    """As far as length shows it."""
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert max(lines.values()) <= 550, max(lines, key=lambda path: lines[path])


def test_the_page_on_the_architecture_has_these_floors() -> None:
    rows = re.findall(r"^\| \d+ \| (.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)", row)) for row in rows] == list(FLOORS)
