"""Write the pages that come from the code: configuration.md, and the reference in python.md.

    python docs/generate.py

A test fails where a page is not what this command writes.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import hymate
from hymate import scripts
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
from hymate.trees import REQUIRED, defaults, hints, keys, options, parse_yaml, section_of, shown

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
COMMANDS = {name: getattr(import_module(module), schema) for name, (module, schema, _) in scripts.COMMANDS.items()}
INTRODUCTION = """\
# Configuration

*Written from the code by `python docs/generate.py`; a test fails where it is out of date.*

`key=value` overrides a key, `group=file` chooses a file of `configs/<group>/`. A misspelt key, an impossible value or a
missing path ends the command in one line before any work starts. `--help` prints a command's keys in the terminal.
`--repeat RUN_FOLDER`, given first, takes the configuration of an earlier run, of which single keys can be changed.

`--config-dir DIR`, given first, adds files of yours: `DIR/model/mine.yaml`, with the keys that differ from the default,
is then `model=mine`. A file with the name of one of ours is refused.

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
        parts += [f"### {name}\n", f"{_summary(section)}\n", _table(map(_row, keys(section, where=f"{name}.")))]
    parts.append("## Commands\n")
    for name, command in COMMANDS.items():
        parts += [f"### {name}\n", f"```text\n{_usage(name)}\n```\n", *_command(name, command)]
    parts.append("## Files\n\nWhat each file changes of its section's defaults.\n")
    parts.append(_table(_files(), head=("file", "changes")))
    return "\n".join(parts)


def _command(name: str, command: type) -> Iterator[str]:
    """What a command has of its own, which sections, and which defaults of its own in these."""
    tree = _plain(CONFIGS / f"{name}.yaml")
    chosen = _chosen(CONFIGS / f"{name}.yaml")
    shared = {key: of for key, hint in hints(command).items() if (of := _shared(section_of(hint)))}
    own = [key for key in keys(command, tree) if key[0].partition(".")[0] not in shared]
    if own:
        yield _table(map(_row, own))
    if shared:
        links = [f"[{key}](#{of})" + _file(chosen, key, of) for key, of in shared.items()]
        yield f"Sections: {', '.join(links)}.\n"
    changed = [f"`{key}={shown(value)}`" for key, value in _leaves(tree) if key.partition(".")[0] in shared]
    if changed:
        yield f"Defaults of its own: {', '.join(changed)}.\n"


def _shared(section: type | None) -> str | None:
    """The name of a section that several commands share."""
    return next((name for name, each in SECTIONS.items() if each is section), None)


def _file(chosen: Mapping[str, Any], key: str, section: str) -> str:
    file = chosen.get(key, chosen.get(f"{section}@{key}", "default"))
    if file in ("???", None):
        return " (choose a file)" if file else ""
    return "" if file == "default" else f" (`{section}={file}`)" if key == section else f" (keys of {section})"


def _usage(name: str) -> str:
    """The command lines at the head of a command's file."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line[2:] for line in lines if re.match(r"# python ", line))


def _row(key: tuple[str, Any, Any, str]) -> tuple[str, str, str, str]:
    """A key's line in a table."""
    name, hint, default, meaning = key
    text = shown(default)
    text = text if default is REQUIRED else f"`{text}`" if text else '`""`'
    return f"`{name}`", _kind(hint), text, meaning[0].upper() + meaning[1:]


def _summary(section: type) -> str:
    return inspect.getdoc(section).partition("\n\n")[0].replace("\n", " ")  # type: ignore[union-attr]


def _kind(hint: Any) -> str:
    """A type in words.

    >>> _kind(int | None), _kind(list[str]), _kind(typing.Literal["a", "b"])
    ('whole number or null', 'list of text', '`a`, `b`')
    """
    allowed = options(hint)
    if len(allowed) > 1:
        return " or ".join("null" if each is type(None) else _kind(each) for each in allowed)
    origin, args = typing.get_origin(allowed[0]), typing.get_args(allowed[0])
    if origin is typing.Literal:
        return ", ".join(f"`{each}`" for each in args)
    if origin in (list, tuple):
        return f"list of {_kind(args[0])}"
    if origin is dict:
        return "dictionary"
    return {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}[allowed[0]]


def _leaves(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and where.count(".") < 1:
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _files() -> Iterator[tuple[str, str]]:
    """Each file of a group, and what it sets."""
    for file in sorted(CONFIGS.glob("*/*.yaml")):
        group = file.parent.name
        if group in ("task", "known"):
            yield f"`{group}={file.stem}`", f"the file explains itself: `configs/{group}/{file.name}`"
            continue
        base = defaults(SECTIONS[group])
        changes = [f"`{key}={shown(value)}`" for key, value in _plain(file).items() if base.get(key) != value]
        yield f"`{group}={file.stem}`", ", ".join(changes) or "nothing"


def _plain(file: Path) -> dict[str, Any]:
    tree = parse_yaml(file.read_text())
    tree.pop("defaults", None)
    return tree


def _chosen(file: Path) -> dict[str, Any]:
    """The files that a command's file chooses, by group."""
    entries = parse_yaml(file.read_text()).get("defaults", [])
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def _table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ("key", "type", "default", "meaning")) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


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
