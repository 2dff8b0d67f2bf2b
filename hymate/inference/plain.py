"""Plain models that a bundle holds beside its network, as tables: boosted trees, logistic regression; and the mean of
all logits.

`boosting.parquet` has a row for each node of a task's trees, a tree after the other, parents before their children:
    task, tree
    variable, statistic, window    the feature that is asked about (`hymate.data.features.Column`); null in a leaf
    threshold, missing_left        on to the left where the feature is at most the threshold, or where it is missing so
    left, right                    the children, rows of the task counted from 0; -1 in a leaf
    value                          what a leaf adds to the logit
`linear.parquet` has a row for each feature of a task's logistic regression; the file is there if any task has one:
    task, variable, statistic, window
    low, high                      the limits of the feature; of a count, those of the logarithm of 1 + the count
    slope                          the limited feature adds its product with it to the logit
    missing                        what the feature adds where it is missing
config.yaml has the rest, for each task, as `PlainConfig`.

Shape legend, besides that of `hymate.data.features`: T trees, N nodes of all trees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

from hymate.config import check, not_negative
from hymate.data.examples import Examples
from hymate.data.features import AGE, VALUE_STATISTICS, Column, FeatureSpec, features
from hymate.data.histories import Histories
from hymate.data.meds import UNREADABLE, read_parquet, write_parquet
from hymate.errors import UserError
from hymate.storage.paths import Location
from hymate.trees import to_tree

CELLS = 16_000_000  # of features at a time: 64 MB
LINEAR_CELLS = 1_000_000  # of these, of which float64 copies are made: 25 MB
OF_CODES = {"count", "hours_since", "static", "static_value", *VALUE_STATISTICS}  # statistics
FEATURE = [("variable", pa.string()), ("statistic", pa.string()), ("window", pa.int32())]
NODES = pa.schema(
    [
        ("task", pa.string()),
        ("tree", pa.int32()),
        *FEATURE,
        ("threshold", pa.float64()),
        ("missing_left", pa.bool_()),
        ("left", pa.int32()),
        ("right", pa.int32()),
        ("value", pa.float64()),
    ]
)
SLOPES = pa.schema(
    [
        ("task", pa.string()),
        *FEATURE,
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("slope", pa.float64()),
        ("missing", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Trees:
    """Boosted trees: the logit is the sum of the values of the leaves that they lead to.

    root_T: each tree's first node. feature_N: the column of the feature table, -1 in a leaf. left_N, right_N: nodes,
    -1 in a leaf.
    """

    root_T: np.ndarray
    feature_N: np.ndarray
    threshold_N: np.ndarray
    missing_left_N: np.ndarray
    left_N: np.ndarray
    right_N: np.ndarray
    value_N: np.ndarray

    def logit(self, value_EX: np.ndarray) -> np.ndarray:
        """Of each row of a feature table (float32): float64 (E,), summed tree by tree, as the libraries sum."""
        logit_E = np.zeros(len(value_EX))
        nodes = self.feature_N, self.threshold_N, self.missing_left_N, self.left_N, self.right_N, self.value_N
        _add(value_EX, self.root_T, *nodes, logit_E)
        return logit_E


@njit(cache=True)
def _add(value_EX, root_T, feature_N, threshold_N, missing_left_N, left_N, right_N, value_N, logit_E):  # type: ignore[no-untyped-def]
    for e in range(len(logit_E)):
        for root in root_T:
            n = root
            while feature_N[n] >= 0:
                x = value_EX[e, feature_N[n]]
                goes_left = missing_left_N[n] if np.isnan(x) else x <= threshold_N[n]
                n = left_N[n] if goes_left else right_N[n]
            logit_E[e] += value_N[n]


@dataclass(frozen=True)
class Linear:
    """A linear model of features that are kept within limits: the logit, but for its intercept, is the sum of what each
    of `columns` adds, as `linear.parquet` has it.
    """

    columns: tuple[Column, ...]
    low_X: np.ndarray
    high_X: np.ndarray
    slope_X: np.ndarray
    missing_X: np.ndarray

    def logit(self, value_EX: np.ndarray) -> np.ndarray:
        """Of each row of a feature table (float32), without the intercept: float64 (E,)."""
        is_count_X, logits = FeatureSpec((), self.columns).is_count_X, [np.zeros(0)]
        rows = max(1, LINEAR_CELLS // max(1, len(self.columns)))
        for start in range(0, len(value_EX), rows):
            value_NX = value_EX[start : start + rows]
            limited_NX = logarithmic(value_NX, is_count_X).clip(self.low_X, self.high_X)
            logits.append(np.where(np.isnan(value_NX), self.missing_X, limited_NX * self.slope_X).sum(axis=1))
        return np.concatenate(logits)


def logarithmic(value_EX: np.ndarray, is_count_X: np.ndarray) -> np.ndarray:
    """Counts as the logarithm of 1 + the count; float64."""
    value_EX = value_EX.astype(np.float64)
    value_EX[:, is_count_X] = np.log1p(value_EX[:, is_count_X])
    return value_EX


@dataclass(frozen=True)
class PlainConfig:
    """A task's plain models, as config.yaml keeps them.

    The network's logit and that of the plain models are recalibrated, averaged with equal weights, and the mean is
    recalibrated. All of this is linear, so four numbers remain.

    windows_hours: as in `FeatureSpec`.
    network_weight, boosting_weight, linear_weight, shift: the mean's logit is the weighed sum of those of the network,
        of the trees and of logistic regression without its intercept, plus the shift.
    """

    windows_hours: tuple[float, ...]
    network_weight: float
    boosting_weight: float
    shift: float
    linear_weight: float = 0.0

    def __post_init__(self) -> None:
        rise = all(low < high for low, high in pairwise((0.0, *self.windows_hours)))
        check(self, windows_hours=(rise, "must be positive and rise"))
        not_negative(self, "network_weight", "boosting_weight", "linear_weight")


@dataclass(frozen=True)
class PlainModels:
    """A task's plain models. columns: the features that the trees ask about. linear: None where its weight is 0."""

    config: PlainConfig
    columns: tuple[Column, ...]
    trees: Trees
    linear: Linear | None = None

    def mean(self, network_logit_E: np.ndarray, histories: Histories, examples: Examples) -> np.ndarray:
        """The mean's logits, float32 (E,), of the network's and of what the plain models find in each example's whole
        history.
        """
        network_E = self.config.network_weight * network_logit_E.astype(np.float64)
        return (network_E + self.part(histories, examples)).astype(np.float32)

    def part(self, histories: Histories, examples: Examples) -> np.ndarray:
        """The mean's logits less what the network adds to them, float64 (E,)."""
        of_linear = self.linear.columns if self.linear else ()
        spec = FeatureSpec(self.config.windows_hours, tuple(sorted({*self.columns, *of_linear})))
        place = {column: x for x, column in enumerate(spec.columns)}
        asked_Y, linear_Y = (np.array([place[column] for column in of], np.int64) for of in (self.columns, of_linear))
        plain = [np.zeros(0)]
        for part in examples.in_parts(max(1, CELLS // max(1, len(spec.columns)))).values():
            value_EX = features(histories, part, spec).value_EX[:]
            plain.append(self.config.boosting_weight * self.trees.logit(value_EX.take(asked_Y, axis=1)))
            if self.linear:
                plain[-1] += self.config.linear_weight * self.linear.logit(value_EX.take(linear_Y, axis=1))
        return np.concatenate(plain) + self.config.shift


# --------------------------------------------------------------------------------------------------------- as files


def write_plain(models: Mapping[str, PlainModels], boosting_path: Location, linear_path: Location) -> dict[str, dict]:
    """Write the tables of each task; the sections of config.yaml for them."""
    write_parquet(pa.concat_tables(_nodes(task, of_task) for task, of_task in models.items()), boosting_path)
    linear = [_slopes(task, of_task.linear) for task, of_task in models.items() if of_task.linear]
    if linear:
        write_parquet(pa.concat_tables(linear), linear_path)
    return {task: to_tree(of_task.config) for task, of_task in models.items()}


def _nodes(task: str, models: PlainModels) -> pa.Table:
    trees = models.trees
    asked = [models.columns[x] if x >= 0 else None for x in trees.feature_N.tolist()]
    tree_N = np.repeat(np.arange(len(trees.root_T)), np.diff(trees.root_T, append=len(asked)))
    of_nodes = trees.threshold_N, trees.missing_left_N, trees.left_N, trees.right_N, trees.value_N
    return _table(NODES, task, [tree_N, *_described(asked), *of_nodes])


def _slopes(task: str, linear: Linear) -> pa.Table:
    of_features = linear.low_X, linear.high_X, linear.slope_X, linear.missing_X
    return _table(SLOPES, task, [*_described(linear.columns), *of_features])


def _described(columns: Sequence[Column | None]) -> list[list]:
    return [[column and getattr(column, name) for column in columns] for name, _ in FEATURE]


def _table(schema: pa.Schema, task: str, columns: Sequence[Any]) -> pa.Table:
    arrays = [[task] * len(columns[0]), *columns]
    return pa.table([pa.array(array, of.type) for array, of in zip(arrays, schema, strict=True)], schema)


def read_plain(
    boosting_path: Location, linear_path: Location, configs: Mapping[str, PlainConfig]
) -> dict[str, PlainModels]:
    """Each task's plain models. Raises UserError where a file is missing, or holds no sound models of these tasks."""
    with_linear = {task: config for task, config in configs.items() if config.linear_weight}
    linear = _read(linear_path, SLOPES, with_linear, _linear)
    of_trees = _read(boosting_path, NODES, configs, _trees)
    return {
        task: PlainModels(configs[task], columns, trees, linear.get(task))
        for task, (columns, trees) in of_trees.items()
    }


def _read(
    path: Location, schema: pa.Schema, configs: Mapping[str, PlainConfig], of: Callable[[pa.Table, int], Any]
) -> dict[str, Any]:
    """What each of these tasks has in the file, which is not read where there are none."""
    if not configs:
        return {}
    try:
        table = read_parquet(path, schema.names)
        if table.schema.types != schema.types or set(table["task"].unique().to_pylist()) != set(configs):
            raise ValueError("other columns or tasks")
        described = {name for name, _ in FEATURE}
        if any(table[name].null_count for name in schema.names if name not in described):
            raise ValueError("a value is missing")
        tables = {task: table.filter(pc.field("task") == task) for task in configs}
        return {task: of(tables[task], 1 + len(config.windows_hours)) for task, config in configs.items()}
    except (*UNREADABLE, KeyError, ValueError) as error:
        raise UserError(f"{path}: missing or no plain models: copy the whole bundle again") from error


def _columns(table: pa.Table, num_windows: int) -> list[Column | None]:
    """Each row's feature. Raises ValueError where it is none."""
    asked = [Column(**row) for row in table.select([name for name, _ in FEATURE]).to_pylist()]
    for column in {*asked}:
        known = column == Column(AGE, "years") if column.variable == AGE else column.statistic in OF_CODES
        named = column.variable is not None and known and column.window in range(num_windows)
        if not named and column != (None, None, None):
            raise ValueError("no feature")
    return [None if column.variable is None else column for column in asked]


def _trees(table: pa.Table, num_windows: int) -> tuple[tuple[Column, ...], Trees]:
    """Raises ValueError where walking the trees would not end, or asks about what is no feature."""
    tree_N, left_N, right_N = (table[name].to_numpy() for name in ("tree", "left", "right"))
    threshold_N, value_N = table["threshold"].to_numpy(), table["value"].to_numpy()
    asked = _columns(table, num_windows)
    columns = sorted({column for column in asked if column})
    place = {column: x for x, column in enumerate(columns)}
    feature_N = np.array([place[column] if column else -1 for column in asked], np.int32)
    inner_N = np.flatnonzero(feature_N >= 0)
    for child_N in (left_N[inner_N], right_N[inner_N]):
        inside_N = (child_N > inner_N) & (child_N < len(table))
        if not inside_N.all() or (tree_N[child_N] != tree_N[inner_N]).any():
            raise ValueError("a child is no node behind its parent in the same tree")
    if (np.diff(tree_N) < 0).any() or np.isnan(threshold_N).any() or not np.isfinite(value_N).all():
        raise ValueError("no trees")
    root_T = np.flatnonzero(np.diff(tree_N, prepend=tree_N[0] - 1))
    missing_left_N = table["missing_left"].to_numpy(zero_copy_only=False)
    return tuple(columns), Trees(root_T, feature_N, threshold_N, missing_left_N, left_N, right_N, value_N)


def _linear(table: pa.Table, num_windows: int) -> Linear:
    """Raises ValueError where what a feature adds is no number, or is there twice."""
    columns = _columns(table, num_windows)
    if None in columns or len({*columns}) < len(columns):
        raise ValueError("no feature, or one twice")
    linear = Linear(tuple(columns), *(table[name].to_numpy() for name in SLOPES.names[-4:]))  # type: ignore[arg-type]
    if not all(np.isfinite(of_X).all() for of_X in (linear.low_X, linear.high_X, linear.slope_X, linear.missing_X)):
        raise ValueError("no numbers")
    return linear
