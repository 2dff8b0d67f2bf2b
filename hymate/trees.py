"""From plain trees, as in YAML and JSON, to the checked sections of `hymate.config`, and back; no files, no Hydra."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

import yaml

from hymate.config import QUOTE_IT, is_number
from hymate.errors import ConfigError, UserError, first_line

T = TypeVar("T")


def build(schema: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from a plain tree, checking names and types, and a type's annotation, a function, its values.

    >>> from hymate.config import RunConfig
    >>> build(RunConfig, {"name": "a", "dri": "b"})
    Traceback (most recent call last):
    ...
    hymate.errors.ConfigError: dri is not a known key: did you mean dir?
    """
    hints = typing.get_type_hints(schema, include_extras=True)
    known = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{where}{key}"
        if key not in known:
            raise unknown_key(str(key), known, where)
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


def unknown_key(key: str, known: Collection[str], where: str) -> ConfigError:
    """What to raise for a key that is none of `known`, below `where`."""
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {where}{close[0]}?" if close else f"known keys are {', '.join(known)}"
    return ConfigError(f"{where + key or repr(key)} is not a known key: {hint}")


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their whole keys, `a.b.c`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
