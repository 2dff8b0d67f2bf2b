"""A command's configuration: dataclasses, YAML files and the command line -> its checked sections.

`load` starts from the defaults of the command's dataclass, merges into them what the YAML files of `configs/` say, and
then each setting of the command line; `--repeat` starts from a run's own configuration. Everything that a user can get
wrong (a misspelt key, a value of the wrong type or outside its range, a required key left out) ends here, as one line
that names the key and the remedy.

Hydra finds the files (each one's list `defaults`) and reads numbers, lists and dictionaries; OmegaConf fills in
`${...}`. Where a key holds text (a path, a name, a choice), the text is taken as it was typed.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hymate import ending, machine, trees
from hymate.config import TaskConfig
from hymate.errors import ConfigError, first_line
from hymate.places import CREDENTIAL, CREDENTIAL_REFUSED, UNPRINTABLE
from hymate.runs import COMMAND_LINE, CONFIGS, RECORD, absolute, read_record
from hymate.storage.paths import locate

T = TypeVar("T")
_CREDENTIAL_NAME = re.compile(
    r"(^|_)(password|passwd|secret|token|credentials?|access_key|api_key)($|_)", re.IGNORECASE
)
_INSTEAD = (
    "--help lists the settings, which are written key=value, without dashes; --repeat RUN_FOLDER or --config-dir DIR "
    "comes first, with a space; finetune/tune.py searches over values"
)
_USAGE = """
Override any key as key=value, choose a group's file as group=file.
--repeat RUN_FOLDER first: that run's configuration instead of what is below, with single keys changed.
--config-dir DIR first: your own files as well, such as DIR/model/mine.yaml for model=mine.
"""
# ${names:${task}}: the task's name, of several joined
OmegaConf.register_new_resolver("names", lambda task: task.get("name") or "-".join(task), replace=True)


def main(config_name: str, schema: type[T], run: Callable[[T], object], argv: Sequence[str] | None = None) -> None:
    """A command's entry point: `run(config)`, whose paths are absolute; `hymate.ending` says how it ends where it does
    not end well.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with ending.command():
        if "--help" in argv or "-h" in argv:
            print(_help(config_name, _folders(argv), schema))
            return
        COMMAND_LINE.set(tuple(argv))
        machine.settle()
        run(absolute(load(config_name, argv, schema)))


def load(config_name: str, arguments: Sequence[str], schema: type[T]) -> T:
    """The configuration of `configs/<config_name>.yaml` with the settings of a command line.

    With `--repeat RUN_FOLDER` before the settings, these change the configuration that the folder's run.json holds.
    With `--config-dir DIR` before them, a group has the files of DIR's folder of that name as well.
    Raises ConfigError (one line) for anything wrong in any of them.
    """
    repeats, folders = arguments[:1] == ["--repeat"], _folders(arguments)
    settings = list(arguments[2:] if repeats or len(folders) > 1 else arguments)
    for setting in settings:
        _refuse_what_is_no_setting(setting, schema)
        _refuse_a_group_without_use(setting, folders, schema)
    try:
        if repeats:
            tree = _recorded(config_name, *arguments[1:2])
        else:
            settings = _each_task_by_name(settings)
            choices = [setting for setting in settings if _chooses_file(setting, folders)]
            if "~task" in choices and trees.hints(schema).get("task") is TaskConfig:
                raise ConfigError("task=[...] names several tasks, but this command takes one: give task=NAME")
            tree = _composed(config_name, choices, folders, schema)
            settings = [setting for setting in settings if setting not in choices]
        for setting in settings:
            tree = _with(tree, setting, schema)
        config = OmegaConf.create(tree)
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{missing[0]} is required: add {missing[0]}=VALUE to the command")
        tree = typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(" ".join(lines[:3])) from error
    for key, value in trees.flattened(tree).items():
        _refuse_credentials(key, str(value))
    return trees.build(schema, tree)


# -------------------------------------------------------------------------------------------- where a tree begins


def _recorded(config_name: str, run: str = "") -> dict[str, Any]:
    """The configuration that a run folder holds; a ${...} in it is text."""
    record = read_record(locate(run)) if run else None
    if record is None:
        raise ConfigError(f"--repeat {run or 'RUN_FOLDER'}: not a run's folder, it has no {RECORD}")
    if record["command"] != config_name:
        raise ConfigError(f"--repeat {run}: a run of {record['command']}, not of {config_name}")
    return typing.cast("dict[str, Any]", _as_text(trees.renamed(record["config"])))


def _composed(config_name: str, choices: Sequence[str], folders: Sequence[Path], schema: type) -> dict[str, Any]:
    """The defaults of the schema with what the command's file and the chosen files say; a ${...} is not filled in."""
    own = ", ".join(QuotedString(f"file://{folder}", Quote.double).with_quotes() for folder in folders[1:])
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose(config_name, overrides=[*choices, f"hydra.searchpath=[{own}]"])
    return trees.merged(trees.defaults(schema), typing.cast("dict[str, Any]", OmegaConf.to_container(composed)))


def _folders(arguments: Sequence[str]) -> list[Path]:
    """Where the configuration files are: in `configs/` and in the folder that `--config-dir`, first, names.

    Raises ConfigError where that is no folder, or one of its files is not YAML or has the name of one of ours.
    """
    if arguments[:1] != ["--config-dir"]:
        return [CONFIGS]
    own = Path(*arguments[1:2]).absolute()
    if len(arguments) < 2 or not own.is_dir():
        raise ConfigError(f"--config-dir {' '.join(arguments[1:2]) or 'DIR'}: there is no such folder")
    for file in sorted(own.rglob("*.yaml")):
        name = file.relative_to(own)
        if (CONFIGS / name).exists():
            raise ConfigError(f"{file}: HyMaTE itself has a {name.with_suffix('')}: rename the file")
        try:
            tree = trees.parse_yaml(file.read_text())
        except (ValueError, OSError) as error:
            raise ConfigError(f"{file} is not readable as YAML ({first_line(error)})") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{file}: write keys and values into it, each as key: value")
    return [CONFIGS, own]


def _groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The names of each group's files."""
    files = [file for folder in folders for file in folder.glob("*/*.yaml")]
    groups = sorted({file.parent.name for file in files})
    return {group: sorted(file.stem for file in files if file.parent.name == group) for group in groups}


def _chooses_file(setting: str, folders: Sequence[Path]) -> bool:
    """Whether a setting is about a group of the folders. Raises ConfigError where the group has no such file."""
    key, equals, value = setting.partition("=")
    group = key.lstrip("+~").partition("@")[0]
    files = _groups(folders).get(group)
    if files is None:
        return False
    names = re.split(r"\s*,\s*", value.removeprefix("[").removesuffix("]"))
    for name in names:
        if equals and name.lower() != "null" and name not in files:
            choices = f"choose from {', '.join(files)}; a key of it is {group}.KEY=VALUE"
            raise ConfigError(f"{setting}: there is no {group}/{name}: {choices}")
    if len(names) > 1:
        raise ConfigError(f"{setting}: {group} takes one of them: give {group}={names[0]}")
    return True


def _each_task_by_name(settings: Sequence[str]) -> list[str]:
    """`task=[a,b]` as Hydra puts each file into a section of its own: task.a and task.b, not both into task.

    >>> _each_task_by_name(["task=[a,b]", "task.b.labels=DIR"])
    ['~task', '+task@task.a=a', '+task@task.b=b', 'task.b.labels=DIR']
    >>> _each_task_by_name(["task=[a]", "task.labels=DIR"])
    ['task=a', 'task.labels=DIR']
    """
    expanded: list[str] = []
    for setting in settings:
        listed = re.fullmatch(r"task=\[(.*)\]", setting)
        names = [name.strip() for name in listed[1].split(",")] if listed else []
        if listed and not (all(names) and len(set(names)) == len(names)):
            raise ConfigError(f"{setting}: name at least one task, and each of them once")
        if len(names) > 1:
            expanded += ["~task", *(f"+task@task.{name}={name}" for name in names)]
        else:
            expanded.append(f"task={names[0]}" if names else setting)
    return expanded


# ---------------------------------------------------------------------------------------------------- settings


def _with(tree: dict[str, Any], setting: str, schema: type) -> dict[str, Any]:
    """The tree with a setting: KEY=VALUE or ~KEY; +KEY=VALUE where the key is a new one of a dictionary.

    Raises ConfigError for a key that neither the schema nor the tree knows, or for a value that cannot be read.
    """
    key, _, text = setting.partition("=")
    name = key.lstrip("+~")
    *sections, last = parts = name.split(".")
    kinds = _kinds(schema, parts, tree, new=key.startswith("+"))
    if key.startswith("~"):
        section = tree
        for part in sections:
            section = section[part]
        section.pop(last, None)
        return tree
    changes = _value(name, text, kinds)
    for part in reversed(parts):
        changes = {part: changes}
    return trees.merged(tree, changes)


def _kinds(hint: Any, parts: Sequence[str], tree: Any, new: bool, where: str = "") -> list[Any]:
    """The types that a key, given by its parts, may have below `hint`, where `tree` is what it holds now.

    new: whether the key may be a new one of a dictionary. Raises ConfigError for an unknown one.
    """
    allowed = trees.options(hint)
    if not parts:
        return allowed
    part, path = parts[0], f"{where}{parts[0]}"
    inside = tree if isinstance(tree, Mapping) else {}
    section = trees.section_of(hint)
    table = next((each for each in allowed if each is Any or typing.get_origin(each) is dict), None)
    if section and not (table and trees.holds_sections(inside)):
        known = trees.hints(section)
        if part not in known:
            raise trees.unknown_key_error(part, known, where)
        if tree is None and type(None) in allowed:
            raise ConfigError(f"{path} cannot be set while {where[:-1]} is null: choose {where[:-1]}=FILE, too")
        return _kinds(known[part], parts[1:], inside.get(part), new, f"{path}.")
    if not table or not (inside or new):
        raise ConfigError(f"{path} is not a known key: {where[:-1]} is one value")
    if part not in inside and not new:
        raise ConfigError(f"{trees.unknown_key_error(part, inside, where)}; +{where}{'.'.join(parts)}=VALUE adds one")
    below = Any if table is Any else typing.get_args(table)[1]
    return _kinds(below, parts[1:], inside.get(part), new, f"{path}.")


def _value(key: str, text: str, kinds: Sequence[Any]) -> Any:
    """The value that a text stands for: a text as it was typed, anything else as Hydra reads it.

    >>> _value("run.name", "1.10", [str]), _value("run.name", "'1.10'", [str]), _value("train.seed", "1_0", [int])
    ('1.10', '1.10', 10)
    """
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        readable, value = not override.is_sweep_override(), override.value()
    except HydraException:
        readable, value = False, None
    in_brackets, in_quotes = text[:1] in ("[", "{"), text[:1] in ("'", '"')
    listed = text[:1] == "[" and any(typing.get_origin(kind) is list for kind in kinds)
    if (str in kinds and not listed) or any(typing.get_origin(kind) is Literal for kind in kinds):
        if readable and value is None and type(None) in kinds:
            return None
        return _as_text(value if readable and in_quotes else text)
    if not readable and (in_brackets or in_quotes):
        example = f'\'{key}=["^RACE//", "a=b"]\''
        remedy = f"put each text in it in quotes, and all of it in others, e.g. {example}"
        raise ConfigError(f"{key}={text}: {key} cannot be read: {remedy}")
    return value if readable else _as_text(text)


def _as_text(value: Any) -> Any:
    """A value in which OmegaConf leaves each ${...} as it is."""
    if isinstance(value, Mapping):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _refuse_what_is_no_setting(argument: str, schema: type) -> None:
    """Raises ConfigError for what is not key=value or ~key, or holds a credential."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    _refuse_credentials(name if equals else "an argument", value if equals else key)
    if name == "train.use_gpu" and "device" in trees.hints(schema):
        raise ConfigError(f"{name} is not a known key: device=cuda, cpu or auto (without train.) has taken its place")
    if re.match(r"hydra($|[./@])", name):
        raise ConfigError(
            f"{name} is not a known key, as Hydra's own do nothing here: --help lists the command's; "
            "run.dir and run.name, or out, say where results go"
        )
    if UNPRINTABLE.search(argument):
        raise ConfigError(f"{argument!a} holds a control character, or is not UTF-8: rename what it names")
    if argument.startswith("-"):
        raise ConfigError(f"{key} is not an option: {_INSTEAD}")
    if not equals and not argument.startswith("~"):
        remedy = "write key=value, with quotes around all of it if it has spaces"
        raise ConfigError(f"{argument!r} is not a setting: {remedy}")


def _refuse_a_group_without_use(setting: str, folders: Sequence[Path], schema: type) -> None:
    """Raises ConfigError where a setting chooses a file of a group that the command lacks, or a second one (`+`)."""
    key = setting.partition("=")[0]
    group, known = key.lstrip("+~").partition("@")[0], trees.hints(schema)
    if group not in _groups(folders):
        return
    if group not in known:
        raise trees.unknown_key_error(group, known, "")
    if key.startswith("+"):
        raise ConfigError(f"{setting}: {group} takes one file: write {setting[1:]}")


def _refuse_credentials(key: str, value: str) -> None:
    """Raises ConfigError, without the value, where a setting holds or is named like a credential, or holds what the
    environment keeps under such a name: the configuration is written into run folders, which others may read."""
    secrets = (
        held
        for name, held in os.environ.items()
        if _CREDENTIAL_NAME.search(name) and not name.endswith(("_PATH", "_FILE")) and len(held) >= 12
    )
    named = _CREDENTIAL_NAME.search(key.rpartition(".")[2]) and value not in ("", "None", "null")
    if named or CREDENTIAL.search(value) or any(secret in value for secret in secrets):
        raise ConfigError(f"{key} {CREDENTIAL_REFUSED}")


def _help(config_name: str, folders: Sequence[Path], schema: type) -> str:
    """How the command is called, the groups' files, and each key with its default here and what it means."""
    text = (CONFIGS / f"{config_name}.yaml").read_text()
    head = re.sub("^# ", "", text.partition("defaults:")[0], flags=re.MULTILINE)
    groups = "".join(f"  {group}: {', '.join(files)}\n" for group, files in _groups(folders).items())
    tree = _composed(config_name, [f"~{group}" for group in re.findall(r"- (\w+): \?\?\?", text)], folders, schema)
    lines = []
    for key, _, value, meaning in trees.keys(schema, tree):
        start = f"  {key} (required)" if value is trees.REQUIRED else f"  {key}={trees.shown(value)}"
        lines.append(textwrap.fill(f"{start}: {meaning}", 120, subsequent_indent="      "))
    return f"{head}{_USAGE}\nGroups:\n{groups}\nKeys:\n" + "\n".join(lines)
