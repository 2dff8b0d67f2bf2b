"""The search space of fine-tuning: what a configuration may say, and the points that a search tries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hymate.config import is_number
from hymate.errors import ConfigError
from hymate.trees import unknown_key_error

PARAMETERS = (
    "backbone_lr",
    "head_lr",
    "dropout",
    "frozen",
    "context",
    "pooling",
    "weight_decay",
    "early_fraction",
    "teacher_fraction",
)
PAPERS_POOLING = "attention"


def for_model(space: Mapping[str, Any], pooling: str) -> dict[str, Any]:
    """The search space for a model with this pooling.

    {ours: [...]} of the pooling is a choice for all models but one with the paper's, which keeps it. What stands
    beside it (a `choice` that isn't null) goes first, for every model.
    """
    spec = space.get("pooling")
    if not isinstance(spec, Mapping) or "ours" not in spec:
        return dict(space)
    given = {kind: values for kind, values in spec.items() if kind != "ours" and values is not None}
    if not given and pooling == PAPERS_POOLING:
        return {name: spec for name, spec in space.items() if name != "pooling"}
    return {**space, "pooling": given or {"choice": spec["ours"]}}


def check(space: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for an unknown parameter or a malformed distribution of the space at the key `where`."""
    for name, spec in for_model(space, pooling="").items():
        key = f"{where}.{name}"
        if name not in PARAMETERS:
            raise unknown_key_error(name, PARAMETERS, f"{where}.")
        if not isinstance(spec, Mapping):
            continue
        kind, values = next(iter(spec.items()), ("", None))
        if len(spec) > 1:
            raise ConfigError(
                f"{key} has several distributions ({', '.join(spec)}): drop the old one with ~{key}.{kind}"
            )
        if kind not in ("choice", "uniform", "loguniform") or not isinstance(values, Sequence):
            raise ConfigError(f"{key} must be a value, {{choice: [...]}} or {{uniform or loguniform: [low, high]}}")
        if kind == "choice":
            if not values:
                raise ConfigError(f"{key}.choice is empty: give at least one value")
        elif len(values) != 2 or not all(map(is_number, values)) or not values[0] < values[1]:
            raise ConfigError(f"{key}.{kind} must be two finite numbers [low, high], low < high, got {list(values)}")
        elif kind == "loguniform" and values[0] <= 0:
            raise ConfigError(f"{key}.loguniform needs positive bounds, got {list(values)}")


def check_point(point: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for an impossible value, of those that the model's and the training's sections don't check.

    where: the key at which the point, or the space that it is from, is set.
    """
    for name in ("backbone_lr", "head_lr"):
        if name in point and not (is_number(point[name]) and point[name] > 0):
            raise ConfigError(f"{where}.{name} must be a finite positive number, got {point[name]!r}")
    for name in ("early_fraction", "teacher_fraction"):
        if name in point and not (is_number(point[name]) and 0 <= point[name] <= 1):
            raise ConfigError(f"{where}.{name} must be a number between 0 and 1, got {point[name]!r}")
    if not isinstance(point.get("frozen", False), bool):
        raise ConfigError(f"{where}.frozen must be true or false, got {point['frozen']!r}")


def draw(space: Mapping[str, Any], num_trials: int, seed: int) -> list[dict[str, Any]]:
    """Points of the space as a Latin hypercube: each parameter's values are spread evenly over the trials.

    >>> sorted(p["context"] for p in draw({"context": {"choice": [512, 1024]}}, num_trials=4, seed=0))
    [512, 512, 1024, 1024]
    """
    generator = np.random.default_rng(seed)
    columns = {}
    for name, spec in space.items():
        fraction_N = (generator.permutation(num_trials) + generator.random(num_trials)) / num_trials
        columns[name] = [_value(spec, fraction) for fraction in fraction_N.tolist()]
    return [{name: column[i] for name, column in columns.items()} for i in range(num_trials)]


def _value(spec: Any, fraction: float) -> Any:
    """What lies at `fraction` in [0, 1) of a parameter's distribution."""
    if not isinstance(spec, Mapping):
        return spec
    ((kind, values),) = spec.items()
    if kind == "choice":
        return values[int(fraction * len(values))]
    low, high = values
    return (
        low + fraction * (high - low)
        if kind == "uniform"
        else math.exp(math.log(low) + fraction * math.log(high / low))
    )
