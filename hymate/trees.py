"""The sections of `hymate.config` and plain trees, as YAML and JSON have them; no file, no Hydra.

`build` makes checked sections of a tree and `to_tree` a tree of them; `defaults` is the tree of what is left out, and
`keys` says what there is to set, from the types, defaults and docstrings of the dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

import yaml

from hymate.config import QUOTE_IT, is_number
from hymate.errors import ConfigError, UserError, first_line

T = TypeVar("T")
REQUIRED = "required"
KINDS = {int: "a whole number", bool: "true or false"}
RENAMED = {f"{name}_share": f"{name}_fraction" for name in ("mask", "span", "min_lr", "early", "teacher")}
RENAMED_IN_EXPLAIN = {"cohort": "num_predictions", "patients": "num_subjects"}


def keys(schema: type, tree: Any = None, where: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Each key of a dataclass and of those in it: its whole name (`a.b.c`), type, default, and what it means.

    The default is what `tree` has, else the dataclass's, else REQUIRED. The meaning is the entry `key: meaning` of the
    docstring, its own or that of a dataclass that it extends.
    """
    docstrings = (inspect.getdoc(each) or "" for each in reversed(schema.__mro__) if is_dataclass(each))
    text = re.sub(r"\n {4,}", " ", "\n".join(docstrings))
    meanings = dict(re.findall(r"^(\w+): +(.*)$", text, re.MULTILINE))
    tree = tree if isinstance(tree, Mapping) else {}
    for name, hint in hints(schema).items():
        if section := section_of(hint):
            yield from keys(section, tree.get(name), f"{where}{name}.")
        else:
            assert name in meanings, f"{schema.__name__}'s docstring lacks a line '{name}: MEANING'"
            yield f"{where}{name}", hint, tree.get(name, _default(schema, name)), meanings[name]


def hints(schema: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their annotations."""
    found = typing.get_type_hints(schema, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(schema)}


def options(hint: Any) -> list[Any]:
    """The types that a type allows, without their annotations: those of a union, else itself."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    allowed = typing.get_args(hint) if union else [hint]
    return [typing.get_args(each)[0] if typing.get_origin(each) is Annotated else each for each in allowed]


def section_of(hint: Any) -> type[Any] | None:
    """The dataclass that a type allows."""
    return next((each for each in options(hint) if isinstance(each, type) and is_dataclass(each)), None)


def _default(schema: type, name: str) -> Any:
    field = schema.__dataclass_fields__[name]  # type: ignore[attr-defined]
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING else field.default


def defaults(schema: type) -> dict[str, Any]:
    """The tree of a dataclass where nothing is set; keys that are required are not in it."""
    tree: dict[str, Any] = {}
    for name, hint in hints(schema).items():
        default = _default(schema, name)
        if is_dataclass(hint):
            tree[name] = defaults(typing.cast("type", hint))
        elif default is not REQUIRED:
            tree[name] = default
    return tree


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with changes; sections are merged key by key.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    both = dict(tree)
    for key, value in changes.items():
        sections = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merged(both[key], value) if sections else value
    return both


def holds_sections(tree: Any) -> bool:
    """Whether a tree is one of sections alone."""
    return isinstance(tree, Mapping) and all(isinstance(item, Mapping) for item in tree.values())


def build(schema: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from a plain tree, checking names and types, and a type's annotation, a function, its values.

    where: what comes before the keys of this section in the whole configuration ("train."), for messages.

    >>> from hymate.config import RunConfig
    >>> build(RunConfig, {"name": "a", "dri": "b"})
    Traceback (most recent call last):
    ...
    hymate.errors.ConfigError: dri is not a known key: did you mean dir?
    """
    known = hints(schema)
    for key in tree:
        if key not in known:
            raise unknown_key_error(str(key), known, where)
    values = {key: _convert(known[key], value, f"{where}{key}") for key, value in tree.items()}
    for name in known:
        if name not in values and _default(schema, name) is REQUIRED:
            raise ConfigError(f"{where}{name} is required: add {where}{name}=VALUE to the command")
    try:
        return schema(**values)
    except ConfigError as error:  # its checks name their keys without the section
        raise ConfigError(f"{where}{error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        allowed = [each for each in args if each is not type(None)]
        lists = [each for each in allowed if typing.get_origin(each) is list and isinstance(value, list)]
        return _convert([*lists, allowed[-1] if holds_sections(value) else allowed[0]][0], value, path)
    if origin is Annotated:
        value = _convert(args[0], value, path)
        try:
            args[1](value)
        except UserError as error:
            raise ConfigError(f"{path}: {error}") from error
        return value
    if is_dataclass(hint) or origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a section of keys, got {value!r}")
        if origin is not dict:
            return build(typing.cast("type[Any]", hint), value, f"{path}.")
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        return origin(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Literal and value not in args:
        raise ConfigError(f"{path} must be one of {', '.join(map(str, args))}; got {value!r}")
    if hint is float:
        if not is_number(value):
            raise ConfigError(f"{path} must be a finite number, got {value!r:.80}")
        return float(value)
    if hint is str and not isinstance(value, str):
        raise ConfigError(f"{path} must be text, got {value!r}: {QUOTE_IT}")
    if hint in (int, bool) and type(value) is not hint:
        raise ConfigError(f"{path} must be {KINDS[hint]}, got {value!r}")
    return value


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


def renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree that an older version wrote, with the names that its keys have now."""
    items = ((key, renamed(value) if isinstance(value, Mapping) else value) for key, value in tree.items())
    return {RENAMED.get(key, key): value for key, value in items}


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """YAML text of plain values, for `parse_yaml`."""
    return yaml.dump(dict(tree), Dumper=_PlainDumper, sort_keys=False)


def parse_yaml(text: str) -> Any:
    """Plain values from YAML text that may come from anybody. Raises ValueError (one line) where it is no such text."""
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, ArithmeticError, TypeError, RecursionError) as error:
        raise ValueError(first_line(error)) from error


def unknown_key_error(key: str, known: Collection[str], where: str) -> ConfigError:
    """What to raise for a key that is none of `known`, below `where`."""
    today = (RENAMED | RENAMED_IN_EXPLAIN).get(key)
    close = [today] if today in known else difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {where}{close[0]}?" if close else f"known keys are {', '.join(known)}"
    return ConfigError(f"{where + key or repr(key)} is not a known key: {hint}")


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their whole keys, `a.b.c`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def shown(value: Any) -> str:
    """A value as it is typed.

    >>> print(shown([1, 2]), shown(None), shown(True), shown({"a": 1e-3}))
    [1,2] null true {a: 0.001}
    """
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
