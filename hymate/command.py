"""A command's configuration: YAML files and the command line -> the checked sections of `hymate.config`, and back.

`load` composes a YAML file of `configs/` with the command line's overrides, or takes a run's own configuration, and
builds one of the dataclasses from it. Everything a user can get wrong in a configuration (a misspelt key, a value of
the wrong type or outside its range, a required key left out) ends here, as one line that names the key and the remedy.

The declared type of a key decides how its value is read. Text (a path, a name, a choice) is taken as it was typed;
numbers, lists and dictionaries are read by Hydra's grammar.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hymate import ending, machine
from hymate.config import QUOTE_IT, ConfigError, TaskConfig, is_number
from hymate.errors import UserError, first_line
from hymate.storage.paths import CREDENTIAL, CREDENTIAL_REFUSED, UNPRINTABLE, Location, locate

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RECORD = "run.json"  # in every run folder, see hymate.runs
COMMAND_LINE: ContextVar[tuple[str, ...]] = ContextVar("what the user gave the command", default=())
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
        "configurations are files of configs/, chosen as group=file; --repeat RUN_FOLDER, first, takes a run's",
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
    Raises ConfigError (one line) for anything wrong in either.
    """
    repeated = overrides[1:2] if overrides[:1] == ["--repeat"] else None
    if repeated is not None:
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
            override if _chooses_file(override) else _for_hydra(override, schema)
            for override in _each_task_by_name(overrides)
        ]
        if "~task" in overrides and typing.get_type_hints(schema).get("task") is TaskConfig:
            raise ConfigError("task=[...] names several tasks, but this command takes one: give task=NAME")
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose(config_name, overrides=overrides)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} is required: add {missing[0]}=VALUE to the command")
        tree = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    for key, value in _flat(typing.cast("dict[str, Any]", tree)).items():
        _refuse_credentials(key, str(value))
    return build(schema, typing.cast("dict[str, Any]", tree))


def _recorded(config_name: str, run: str = "") -> dict[str, Any]:
    """The configuration that a run folder holds."""
    record = read_record(locate(run)) if run else None
    if record is None:
        raise ConfigError(f"--repeat {run or 'RUN_FOLDER'}: not a run's folder, it has no {RECORD}")
    if record["command"] != config_name:
        raise ConfigError(f"--repeat {run}: a run of {record['command']}, not of {config_name}")
    for key, value in _flat(record["config"]).items():
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


def _chooses_file(override: str) -> bool:
    """Whether an override is about a group of `configs/`. Raises ConfigError where the group has no such file."""
    key, equals, value = override.partition("=")
    group = key.lstrip("+~").partition("@")[0]
    if group not in {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}:
        return False
    files = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
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
            raise _unknown(keys[0], hints, where)
        return _declared(hints[keys[0]], keys[1:], f"{path}.")
    if origin in (dict, list, tuple):
        return _declared(args[-1] if origin is dict else args[0], keys[1:], f"{path}.")
    raise ConfigError(f"{path} is not a known key: {where.rstrip('.')} is one value")


def _unknown(key: str, known: Collection[str], where: str) -> ConfigError:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {where}{close[0]}?" if close else f"known keys are {', '.join(known)}"
    return ConfigError(f"{where + key or repr(key)} is not a known key: {hint}")


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
            print(_help(config_name))
            return
        COMMAND_LINE.set(tuple(argv))
        machine.settle()
        run(load(config_name, argv, schema))


def build(schema: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from a plain tree, checking names and types, and a type's annotation, a function, its values.

    >>> from hymate.config import RunConfig
    >>> build(RunConfig, {"name": "a", "dri": "b"})
    Traceback (most recent call last):
    ...
    hymate.config.ConfigError: dri is not a known key: did you mean dir?
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    known = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{where}{key}"
        if key not in known:
            raise _unknown(str(key), known, where)
        values[key] = _convert(hints[key], value, path)
    for name, spec in known.items():
        if name not in values and spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is required: add {where}{name}=VALUE to the command")
    return schema(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        sections = isinstance(value, Mapping) and all(isinstance(item, Mapping) for item in value.values())
        return _convert(options[-1] if sections else options[0], value, path)
    if origin is Annotated:
        value = _convert(args[0], value, path)
        try:
            args[1](value)
        except UserError as error:
            raise ConfigError(f"{path}: {error}") from error
        return value
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{path} must be one of {', '.join(map(str, args))}; got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a section of keys, got {value!r}")
        return build(typing.cast("type[Any]", hint), value, f"{path}.")
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        return origin(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a section of keys, got {value!r}")
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()} if args else dict(value)
    if hint is float:
        if not is_number(value):
            raise ConfigError(f"{path} must be a finite number, got {value!r:.80}")
        return float(value)
    if hint is str and not isinstance(value, str):
        raise ConfigError(f"{path} must be text, got {value!r}: {QUOTE_IT}")
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise ConfigError(f"{path} must be {hint.__name__}, got {value!r}")


def to_tree(config: Any) -> dict[str, Any]:
    """The plain nested dictionary of a configuration, for YAML and JSON."""
    return dataclasses.asdict(config)


class _PlainLoader(yaml.SafeLoader):
    """Plain values only. An alias is refused: with them a small file can stand for a tree that fills the memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which no file of ours has")
        return super().compose_node(parent, index)


class _PlainDumper(yaml.SafeDumper):
    """Writes what `_PlainLoader` reads: a value that stands in two places is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """YAML text of plain values, for `parse_yaml`."""
    return yaml.dump(dict(tree), Dumper=_PlainDumper, sort_keys=False)


def parse_yaml(text: str) -> Any:
    """Plain values from YAML text that may come from anybody. Raises ValueError (one line) where it is no such text."""
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, ArithmeticError, TypeError, RecursionError) as error:
        raise ValueError(first_line(error)) from error


def read_record(run: Location) -> dict[str, Any] | None:
    """What run.json of a run folder holds, None where there is none. Raises ConfigError where it is something else."""
    path = run / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable: choose another run.name") from error
    kinds = {"command": str, "config": dict, "inputs": dict, "outcome": dict, "attempts": list}
    if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise ConfigError(f"{path} is not the record of a run: choose another run.name")
    return record


def check_same_run(run: Location, config: Any, inputs: Mapping[str, str], changeable: Set[str]) -> None:
    """Whether the run that a folder holds, if any, has this configuration, but for `changeable` keys, and these inputs.

    inputs: digests of what settings of the configuration name, by the settings' names. Raises ConfigError naming the
    first key that differs.
    """
    record = read_record(run)
    if record is None:
        return
    remedy = f"choose another run.name, or delete {run}"
    old, new = _flat(record["config"]), _flat(to_tree(config))
    for key in sorted((old.keys() | new.keys()) - changeable):
        if old.get(key) != new.get(key) and key != "train.use_gpu":
            was = f"{key} was {old.get(key)}, now {new.get(key)}"
            raise ConfigError(f"{run} holds a run with another configuration: {was}; {remedy}")
    for key in sorted(record["inputs"].keys() | inputs.keys()):
        if record["inputs"].get(key) != inputs.get(key):
            raise ConfigError(f"{run} holds a run of another content of {key}; {remedy}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _help(config_name: str) -> str:
    groups = "\n".join(
        f"  {folder.name}: {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}"
        for folder in sorted(CONFIGS.iterdir())
        if folder.is_dir()
    )
    text = (CONFIGS / f"{config_name}.yaml").read_text()
    usage = "Override any key as key=value, choose a group's file as group=file."
    usage += "\n--repeat RUN_FOLDER first: that run's configuration instead of what is below, with single keys changed."
    return f"{usage}\n\nGroups:\n{groups}\n\n{text}"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])
