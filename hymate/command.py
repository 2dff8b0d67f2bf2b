"""A command's configuration: YAML files and the command line -> the checked sections of `hymate.config`, and back.

`load` composes a YAML file of `configs/` with the command line's overrides, or takes a run's own configuration, and
builds one of the dataclasses from it. Everything a user can get wrong in a configuration (a misspelt key, a value of
the wrong type or outside its range, a required key left out) ends here, as one line that names the key and the remedy.

The declared type of a key decides how its value is read. Text (a path, a name, a choice) is taken as it was typed;
numbers, lists and dictionaries are read by Hydra's grammar.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hymate import ending, machine
from hymate.config import TaskConfig
from hymate.errors import ConfigError, first_line
from hymate.places import CREDENTIAL, CREDENTIAL_REFUSED, UNPRINTABLE
from hymate.runs import COMMAND_LINE, CONFIGS, RECORD, read_record
from hymate.storage.paths import locate
from hymate.trees import build, flattened, parse_yaml, unknown_key

T = TypeVar("T")
_CREDENTIAL_NAME = re.compile(
    r"(^|_)(password|passwd|secret|token|credentials?|access_key|api_key)($|_)", re.IGNORECASE
)
_HELP = "--help lists the settings, what they are and what they can be"
_INSTEAD = {  # of Hydra's options, what does here what they do there
    **dict.fromkeys(("multirun", "m"), "give the command once for each value; finetune/tune.py searches"),
    **dict.fromkeys(("cfg", "c", "info", "i", "resolve", "package", "p", "hydra-help", "version"), _HELP),
    **dict.fromkeys(
        ("config-dir", "cd", "config-path", "cp", "config-name", "cn"),
        "a file of configs/ is chosen as group=file; --config-dir DIR, first and without --repeat, adds files of yours",
    ),
    **dict.fromkeys(("run", "r"), "leave it out, a command runs"),
    "experimental-rerun": "--repeat RUN_FOLDER, first, repeats a run",
    **dict.fromkeys(("shell-completion", "sc"), _HELP),
    "repeat": "give it first and its folder after it: --repeat RUN_FOLDER",
}
# ${names:${task}}: the task's name, of several joined
OmegaConf.register_new_resolver("names", lambda task: task.get("name") or "-".join(task), replace=True)


def load(config_name: str, overrides: Sequence[str], schema: type[T]) -> T:
    """Compose `configs/<config_name>.yaml` with Hydra overrides into `schema`.

    With `--repeat RUN_FOLDER` before the overrides, these change the configuration that the folder's run.json holds.
    With `--config-dir DIR` before them, a group has the files of DIR's folder of that name as well.
    Raises ConfigError (one line) for anything wrong in any of them.
    """
    repeated = overrides[1:2] if overrides[:1] == ["--repeat"] else None
    folders = _folders(overrides)
    if repeated is not None or len(folders) > 1:
        overrides = overrides[2:]
    try:
        GlobalHydra.instance().clear()
        for override in overrides:
            key, equals, value = override.partition("=")
            _refuse_credentials(key.lstrip("+~") if equals else "an argument", value if equals else key)
            _refuse_options(override, schema)
        if repeated is not None:
            overrides = [_for_hydra(override, schema) for override in overrides]
            return build(schema, _changed(_recorded(config_name, *repeated), overrides))
        overrides = [
            override if _chooses_file(override, folders) else _for_hydra(override, schema)
            for override in _each_task_by_name(overrides)
        ]
        if "~task" in overrides and typing.get_type_hints(schema).get("task") is TaskConfig:
            raise ConfigError("task=[...] names several tasks, but this command takes one: give task=NAME")
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            own = ", ".join(_quoted(f"file://{folder}") for folder in folders[1:])
            composed = compose(config_name, overrides=[*overrides, f"hydra.searchpath=[{own}]"])
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} is required: add {missing[0]}=VALUE to the command")
        tree = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    for key, value in flattened(typing.cast("dict[str, Any]", tree)).items():
        _refuse_credentials(key, str(value))
    return build(schema, typing.cast("dict[str, Any]", tree))


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
            tree = parse_yaml(file.read_text())
        except (ValueError, OSError) as error:
            raise ConfigError(f"{file} is not readable as YAML ({first_line(error)})") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{file}: write keys and values into it, each as key: value")
    return [CONFIGS, own]


def _recorded(config_name: str, run: str = "") -> dict[str, Any]:
    """The configuration that a run folder holds."""
    record = read_record(locate(run)) if run else None
    if record is None:
        raise ConfigError(f"--repeat {run or 'RUN_FOLDER'}: not a run's folder, it has no {RECORD}")
    if record["command"] != config_name:
        raise ConfigError(f"--repeat {run}: a run of {record['command']}, not of {config_name}")
    for key, value in flattened(record["config"]).items():
        _refuse_credentials(key, str(value))
    return record["config"]


def _changed(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with single keys changed; what is in it stays text, even if Hydra would make something of it.

    >>> _changed({"run": {"name": "a"}, "init": "${x}"}, ["run.name=b"])
    {'run': {'name': 'b'}, 'init': '${x}'}
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        *sections, key = override.key_or_group.split(".")
        section = tree
        for name in sections:
            section = section[name] if isinstance(section.get(name), dict) else {}
        if override.is_delete():
            section.pop(key, None)
        else:
            value = OmegaConf.create({"value": override.value()})
            section[key] = OmegaConf.to_container(value, resolve=True)["value"]  # type: ignore[call-overload,index]
    return tree


def _refuse_options(override: str, schema: type) -> None:
    """Raises ConfigError where an argument is not key=value: one of Hydra's options or keys, say."""
    key, equals, _ = override.partition("=")
    names = {field.name for field in dataclasses.fields(schema)}
    folder = "run.dir=DIR" if "run" in names else "out=PLACE"
    if (old := key.lstrip("+~")) == "train.use_gpu" and "device" in names:
        raise ConfigError(f"{old} is not a known key: device=cuda, cpu or auto (without train.) has taken its place")
    if UNPRINTABLE.search(override):
        raise ConfigError(f"{override!a} holds a control character, or is not UTF-8: rename what it names")
    if re.match(r"[+~]*hydra([./@]|$)", key):
        raise ConfigError(
            f"{key} is a setting of Hydra's own, which changes nothing here: {folder} says where to write"
        )
    if override.startswith("-"):
        name = key.lstrip("-")
        instead = _INSTEAD.get(name, "settings are written key=value, without dashes; --help lists them")
        raise ConfigError(f"{key} is not an option: {instead}")
    if not equals and not override.startswith("~"):
        raise ConfigError(
            f"{override!r} is not a setting: write key=value, with quotes around all of it if it has spaces"
        )


def _chooses_file(override: str, folders: Sequence[Path]) -> bool:
    """Whether an override is about a group of the folders. Raises ConfigError where the group has no such file."""
    key, equals, value = override.partition("=")
    group = key.lstrip("+~").partition("@")[0]
    files = _groups(folders).get(group)
    if files is None:
        return False
    names = re.split(r"\s*,\s*", value.removeprefix("[").removesuffix("]"))
    for name in names:
        if equals and name.lower() != "null" and name not in files:
            choices = ", ".join(name for name in files if not name.startswith("_"))
            raise ConfigError(
                f"{override}: there is no {group}/{name}: choose from {choices}; a key of it is {group}.KEY=VALUE"
            )
    if len(names) > 1:
        raise ConfigError(f"{override}: {group} takes one of them: give {group}={names[0]}")
    return True


def _groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The names of each group's files."""
    files = [file for folder in folders for file in folder.glob("*/*.yaml")]
    groups = sorted({file.parent.name for file in files})
    return {group: sorted(file.stem for file in files if file.parent.name == group) for group in groups}


def _for_hydra(override: str, schema: type) -> str:
    """A setting as Hydra reads it: text as it was typed, in Hydra's quotes, anything else as it is.

    >>> from hymate.config import RunConfig
    >>> print(_for_hydra("name=1.10", RunConfig), _for_hydra("name='1.10'", RunConfig))
    name="1.10" name="1.10"

    Raises ConfigError for a key that the schema does not know, or a list or dictionary that Hydra cannot read.
    """
    key, _, text = override.partition("=")
    if key.startswith("~"):
        return override
    kinds = _declared(schema, key.lstrip("+").split("."))
    value = _read(text)
    if str in kinds or any(typing.get_origin(kind) is Literal for kind in kinds):
        if value is None and type(None) in kinds:
            return override
        in_quotes = text[:1] in ("'", '"') and value is not _UNREADABLE
        return f"{key}={_quoted(value if in_quotes else text)}"
    if value is not _UNREADABLE:
        return override
    if text[:1] in ("[", "{", "'", '"'):
        raise ConfigError(
            f"{override}: {key} cannot be read: put each text in it in quotes, and all of it in others, e.g. "
            f'\'{key}=["^RACE//", "a=b"]\''
        )
    return f"{key}={_quoted(text)}"


_UNREADABLE = object()


def _read(text: str) -> Any:
    """A value by Hydra's grammar; _UNREADABLE where it is none, or several."""
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return _UNREADABLE
    return _UNREADABLE if override.is_sweep_override() else override.value()


def _quoted(text: str) -> str:
    """A text such that Hydra and OmegaConf, which would fill in ${...}, give it back."""
    return QuotedString(re.sub(r"(\\*)\$\{", r"\1\1\\${", text), Quote.double).with_quotes()


def _declared(hint: Any, keys: Sequence[str], where: str = "") -> set[Any]:
    """The types that a key, given by its parts, may have below `hint`. Raises ConfigError for an unknown one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in args if option is not type(None)]
        section = keys and len(options) > 1 and keys[0] not in {f.name for f in dataclasses.fields(options[0])}
        found = _declared(options[-1] if section else options[0], keys, where)
        return found if keys else found | set(args)
    if not keys or hint is Any:
        return {hint}
    path = f"{where}{keys[0]}"
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        if keys[0] not in hints:
            raise unknown_key(keys[0], hints, where)
        return _declared(hints[keys[0]], keys[1:], f"{path}.")
    if origin in (dict, list, tuple):
        return _declared(args[-1] if origin is dict else args[0], keys[1:], f"{path}.")
    raise ConfigError(f"{path} is not a known key: {where.rstrip('.')} is one value")


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


def _each_task_by_name(overrides: Sequence[str]) -> list[str]:
    """`task=[a,b]` as Hydra puts each file into a section of its own: task.a and task.b, not both into task.

    >>> _each_task_by_name(["task=[a,b]", "task.b.labels=DIR"])
    ['~task', '+task@task.a=a', '+task@task.b=b', 'task.b.labels=DIR']
    >>> _each_task_by_name(["task=[a]", "task.labels=DIR"])
    ['task=a', 'task.labels=DIR']
    """
    parsed: list[str] = []
    for text in overrides:
        names = OverridesParser.create().parse_override(text).value() if text.startswith("task=[") else None
        if not isinstance(names, list):
            parsed.append(text)
            continue
        if not names or len(set(map(str, names))) < len(names):
            raise ConfigError(f"{text}: name at least one task, and each of them once")
        parsed += [f"task={names[0]}"] if len(names) == 1 else ["~task", *(f"+task@task.{n}={n}" for n in names)]
    return parsed


def main(config_name: str, schema: type[T], run: Callable[[T], object], argv: Sequence[str] | None = None) -> None:
    """A command's entry point: `run(config)`; `hymate.ending` says how it ends where it does not end well."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with ending.command():
        if "--help" in argv or "-h" in argv:
            print(_help(config_name, _folders(argv)))
            return
        COMMAND_LINE.set(tuple(argv))
        machine.settle()
        run(load(config_name, argv, schema))


def _help(config_name: str, folders: Sequence[Path]) -> str:
    groups = "\n".join(f"  {group}: {', '.join(files)}" for group, files in _groups(folders).items())
    text = (CONFIGS / f"{config_name}.yaml").read_text()
    usage = "Override any key as key=value, choose a group's file as group=file."
    usage += "\n--repeat RUN_FOLDER first: that run's configuration instead of what is below, with single keys changed."
    usage += "\n--config-dir DIR first: your own files as well, such as DIR/model/mine.yaml for model=mine."
    return f"{usage}\n\nGroups:\n{groups}\n\n{text}"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])
