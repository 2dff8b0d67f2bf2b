"""Write the pages that come from the code: configuration.md, and the reference in python.md.

    python docs/generate.py

A test fails where a page is not what this command writes.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import hymate
from hymate.baselines import BaselinesConfig
from hymate.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ReportConfig,
    RunConfig,
    SearchConfig,
    TaskConfig,
    TrainConfig,
)
from hymate.data.prepare import PrepareConfig
from hymate.explain import ExplainConfig
from hymate.plan import PlanConfig
from hymate.predict import PredictConfig
from hymate.training.pretraining import PretrainConfig
from hymate.tuning.benchmark import BenchmarkConfig
from hymate.tuning.search import TuneConfig

DOCS = Path(__file__).resolve().parent
CONFIGS = DOCS.parent / "configs"
SECTIONS = {
    "data": DataConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "train": TrainConfig,
    "task": TaskConfig,
    "search": SearchConfig,
    "report": ReportConfig,
    "run": RunConfig,
}
COMMANDS = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "tune": TuneConfig,
    "predict": PredictConfig,
    "explain": ExplainConfig,
    "baselines": BaselinesConfig,
    "benchmark": BenchmarkConfig,
    "plan": PlanConfig,
}
ENTRY = re.compile(r"(\w+): +(.*)")
REQUIRED = "required"
INTRODUCTION = """\
# Configuration

*Written from the code by `python docs/generate.py`; a test fails where it is out of date.*

`key=value` overrides a key, `group=file` chooses a file of `configs/<group>/`. A misspelt key, an impossible value or a
missing path ends the command in one line before any work starts. `--help` prints a command's keys in the terminal.
`--repeat RUN_FOLDER`, given first, takes the configuration of an earlier run, of which single keys can be changed.

`--config-dir DIR`, given first, adds files of yours: `DIR/model/mine.yaml`, which begins with `defaults: [_base]`, is
then `model=mine`. A file with the name of one of ours is refused.

Text (a path, a name, a choice) is taken as you type it. Lists and dictionaries need quotes around the whole setting:
`'report.subgroups=["^RACE//"]'`.

## Sections

Several commands share these. The default is that of the section; a command or a file may have another one, which is
listed [with the command](#commands) or [with the file](#files).
"""


def main() -> None:
    (DOCS / "configuration.md").write_text(configuration())
    page = DOCS / "python.md"
    page.write_text(with_reference(page.read_text()))


# ----------------------------------------------------------------------------------------------- configuration.md


def configuration() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, section in SECTIONS.items():
        parts += [f"### {name}\n", f"{_summary(section)}\n", _table(_keys(section, f"{name}."))]
    parts.append("## Commands\n")
    for name, command in COMMANDS.items():
        parts += [f"### {name}\n", f"```text\n{_usage(name)}\n```\n", *_command(name, command)]
    parts.append("## Files\n\nWhat each file changes of its section's defaults.\n")
    parts.append(_table(_files(), head=("file", "changes")))
    return "\n".join(parts)


def _command(name: str, command: type) -> Iterator[str]:
    """What a command has of its own, which sections, and which defaults of its own in these."""
    tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    shared, own = [], []
    for key, kind, default, meaning in _keys(command, ""):
        section = key.partition(".")[0]
        if kind == "section":
            shared.append(section)
        else:
            own.append((key, kind, _shown(_value(tree, key, default)), meaning))
    chosen = {k: v for entry in tree.pop("defaults", []) if isinstance(entry, dict) for k, v in entry.items()}
    if own:
        yield _table(own)
    if shared:
        of = {section: _section(command, section) for section in shared}
        links = [f"[{section}](#{of[section]})" + _file(chosen, section, of[section]) for section in shared]
        yield f"Sections: {', '.join(links)}.\n"
    changed = [f"`{key}={_shown(value)}`" for key, value in _leaves(tree) if key.partition(".")[0] in shared]
    changed = [text for text in changed if not text.endswith(f"={REQUIRED}`")]
    if changed:
        yield f"Defaults of its own: {', '.join(changed)}.\n"


def _section(command: type, key: str) -> str:
    """The name of the section whose keys a command has below `key`."""
    options = _options(typing.get_type_hints(command)[key])
    return next(name for name, section in SECTIONS.items() if section in options)


def _file(chosen: Mapping[str, Any], key: str, section: str) -> str:
    file = chosen.get(key, chosen.get(f"{section}@{key}", "default"))
    if file in ("???", None):
        return " (choose a file)" if file else " (no file)"
    return "" if file == "default" else f" (`{section}={file}`)" if key == section else f" (keys of {section})"


def _usage(name: str) -> str:
    """The command lines at the head of a command's file."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line[2:] for line in lines if re.match(r"# python ", line))


def _keys(section: type, where: str) -> Iterator[tuple[str, str, Any, str]]:
    """Each key of a section and of those in it: name, type, default, meaning."""
    meanings, hints = _meanings(section), typing.get_type_hints(section)
    for spec in dataclasses.fields(section):
        key, options = f"{where}{spec.name}", _options(hints[spec.name])
        inner = next((each for each in options if dataclasses.is_dataclass(each)), None)
        if inner in SECTIONS.values():
            yield key, "section", None, ""
        elif inner is not None:
            yield from _keys(inner, f"{key}.")
        else:
            meaning = meanings.get(spec.name, "")
            assert meaning, f"{section.__name__}'s docstring lacks a line '{spec.name}: MEANING'"
            yield key, _kind(hints[spec.name]), _default(spec), meaning[0].upper() + meaning[1:]


def _meanings(section: type) -> dict[str, str]:
    """The entries `key: meaning` of a section's docstring; a line that is indented belongs to the one above."""
    entries: dict[str, str] = {}
    name = ""
    for line in inspect.getdoc(section).splitlines():  # type: ignore[union-attr]
        entry = ENTRY.fullmatch(line)
        if entry and entry[1] in section.__dataclass_fields__:
            name = entry[1]
            entries[name] = entry[2]
        elif line.startswith("    ") and name:
            entries[name] += f" {line.strip()}"
        else:
            name = ""
    return entries


def _summary(section: type) -> str:
    return inspect.getdoc(section).partition("\n\n")[0].replace("\n", " ")  # type: ignore[union-attr]


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else REQUIRED


def _options(hint: Any) -> list[Any]:
    """The types that a hint allows, None aside."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return [each for each in typing.get_args(hint) if each is not type(None)] if union else [hint]


def _kind(hint: Any) -> str:
    """A type in words.

    >>> _kind(int | None), _kind(list[str]), _kind(typing.Literal["a", "b"])
    ('whole number or null', 'list of text', '`a`, `b`')
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if each is type(None) else _kind(each) for each in args)
    if origin is typing.Literal:
        return ", ".join(f"`{each}`" for each in args)
    if origin in (list, tuple):
        return f"list of {_kind(args[0])}"
    if origin is dict or hint is dict:
        return "dictionary"
    return {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}.get(hint, "text")


def _value(tree: Mapping[str, Any], key: str, default: Any) -> Any:
    """A key's default: that of the command's file, if it has the key."""
    for name in key.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return default
        tree = tree[name]
    return tree


def _leaves(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and where.count(".") < 1:
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _shown(value: Any) -> str:
    """A value as it is typed.

    >>> _shown([1, 2]), _shown(None), _shown(True), _shown("???")
    ('[1,2]', 'null', 'true', 'required')
    """
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(each)}' for key, each in value.items())}}}"
    if isinstance(value, float):
        return f"{value:g}"
    return REQUIRED if value == "???" else str(value)


def _files() -> Iterator[tuple[str, str]]:
    """Each file of a group, and what it sets."""
    for group in sorted(folder for folder in CONFIGS.iterdir() if folder.is_dir()):
        section = SECTIONS.get(group.name)
        base = {spec.name: _default(spec) for spec in dataclasses.fields(section)} if section else {}
        for file in sorted(group.glob("*.yaml")):
            if file.stem == "_base" or group.name == "data":
                continue
            tree = _plain(file)
            changes = [f"`{key}={_shown(value)}`" for key, value in tree.items() if base.get(key) != value]
            if group.name in ("task", "known"):
                changes = [f"the file explains itself: `configs/{group.name}/{file.name}`"]
            yield f"`{group.name}={file.stem}`", ", ".join(changes) or "nothing"


def _plain(file: Path) -> dict[str, Any]:
    tree = yaml.safe_load(file.read_text()) or {}
    tree.pop("defaults", None)
    return tree


def _table(rows: Any, head: tuple[str, ...] = ("key", "type", "default", "meaning")) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        cells = [row[0]] if len(head) == 2 else [f"`{row[0]}`"]
        cells += [row[1]] if len(head) == 2 else [row[1], _default_cell(row[2]), row[3]]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _default_cell(value: Any) -> str:
    text = _shown(value)
    return text if text == REQUIRED else f"`{text}`" if text else '`""`'


# ------------------------------------------------------------------------------------------------------ python.md

MARK = "<!-- from the docstrings: python docs/generate.py -->\n"


def with_reference(page: str) -> str:
    """The page with what follows MARK written again: functions, then classes with their public methods."""
    before, _, _ = page.partition(MARK)
    things = {name: getattr(hymate, name) for name in getattr(hymate, "__all__", [])}
    ordered = sorted(things, key=lambda name: inspect.isclass(things[name]))
    return before + MARK + "".join(_reference(name, things[name]) for name in ordered)


def _reference(name: str, thing: Any) -> str:
    if not inspect.isclass(thing):
        return _described("###", f"hymate.{name}", thing)
    methods = {each: what for each, what in vars(thing).items() if inspect.isfunction(what) and each[0] != "_"}
    parts = [_described("####", f"{name}.{each}", what) for each, what in methods.items()]
    return f"\n### hymate.{name}\n\n{_as_list(inspect.getdoc(thing) or '')}\n" + "".join(parts)


def _described(heading: str, name: str, function: Any) -> str:
    signature = re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(inspect.signature(function)).replace("(self, ", "("))
    return f"\n{heading} {name}\n\n```text\n{name}{signature}\n```\n\n{_as_list(inspect.getdoc(function) or '')}\n"


def _as_list(docstring: str) -> str:
    """A docstring with its entries `name: text` as a list.

    >>> print(_as_list("A model.\\n\\nat: a time,\\n    in UTC.\\ndays: or not."))
    A model.
    <BLANKLINE>
    - **at**: a time,
      in UTC.
    - **days**: or not.
    """
    lines, may_begin = [], False  # an entry follows an empty line or another entry
    for line in docstring.splitlines():
        entry = re.match(r"(\w+): ", line) if may_begin else None
        may_begin = not line or entry is not None or (may_begin and line.startswith("    "))
        lines.append(f"- **{entry[1]}**: {line[entry.end() :]}" if entry else re.sub(r"^ {4}(?=\S)", "  ", line))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
