"""Gradient boosting that a bundle holds beside its network: trees as a plain table, and the mean of both logits.

`boosting.parquet` has a row for each node of a task's trees, a tree after the other, parents before their children:
    task, tree
    variable, statistic, window    the feature that is asked about (`hymate.data.features.Column`); null in a leaf
    threshold, missing_left        on to the left where the feature is at most the threshold, or where it is missing so
    left, right                    the children, rows of the task counted from 0; -1 in a leaf
    value                          what a leaf adds to the logit
config.yaml has the rest, for each task, as `BoostingConfig`.

Shape legend, besides that of `hymate.data.features`: T trees, N nodes of all trees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

from hymate.config import check
from hymate.data.examples import Examples
from hymate.data.features import AGE, VALUE_STATISTICS, Column, FeatureSpec, features
from hymate.data.histories import Histories
from hymate.data.meds import UNREADABLE, read_parquet, write_parquet
from hymate.errors import UserError
from hymate.storage.paths import Location
from hymate.trees import to_tree

CELLS = 16_000_000  # of features at a time: 64 MB
OF_CODES = {"count", "hours_since", "static", "static_value", *VALUE_STATISTICS}  # statistics
SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("tree", pa.int32()),
        ("variable", pa.string()),
        ("statistic", pa.string()),
        ("window", pa.int32()),
        ("threshold", pa.float64()),
        ("missing_left", pa.bool_()),
        ("left", pa.int32()),
        ("right", pa.int32()),
        ("value", pa.float64()),
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
class BoostingConfig:
    """A task's boosting, as config.yaml keeps it.

    The network's logit and the trees' are recalibrated, averaged with equal weights, and the mean is recalibrated. All
    of this is linear, so three numbers remain.

    windows_hours: as in `FeatureSpec`.
    network_weight, boosting_weight, shift: the mean's logit is the weighed sum of both, plus the shift.
    """

    windows_hours: tuple[float, ...]
    network_weight: float
    boosting_weight: float
    shift: float

    def __post_init__(self) -> None:
        rise = all(low < high for low, high in pairwise((0.0, *self.windows_hours)))
        check(self, windows_hours=(rise, "must be positive and rise"))

    def mean(self, network_logit_E: np.ndarray, trees_logit_E: np.ndarray) -> np.ndarray:
        """The mean's logits, float32 (E,)."""
        weighed_E = self.network_weight * network_logit_E.astype(np.float64) + self.boosting_weight * trees_logit_E
        return (weighed_E + self.shift).astype(np.float32)


@dataclass(frozen=True)
class Boosting:
    """A task's boosting. columns: the features that its trees ask about."""

    config: BoostingConfig
    columns: tuple[Column, ...]
    trees: Trees

    def mean(self, network_logit_E: np.ndarray, histories: Histories, examples: Examples) -> np.ndarray:
        """`BoostingConfig.mean` of the network's logits and of what the trees find in each example's whole history."""
        spec = FeatureSpec(self.config.windows_hours, self.columns)
        parts = examples.in_parts(max(1, CELLS // max(1, len(self.columns)))).values()
        logits = [self.trees.logit(features(histories, part, spec).value_EX[:]) for part in parts]
        return self.config.mean(network_logit_E, np.concatenate([np.zeros(0), *logits]))


# --------------------------------------------------------------------------------------------------------- as a file


def write_boosting(boosting: Mapping[str, Boosting], path: Location) -> dict[str, dict]:
    """Write the trees of each task; the sections of config.yaml for them."""
    write_parquet(pa.concat_tables([_table(task, of_task) for task, of_task in boosting.items()]), path)
    return {task: to_tree(of_task.config) for task, of_task in boosting.items()}


def _table(task: str, boosting: Boosting) -> pa.Table:
    trees, columns = boosting.trees, boosting.columns
    asked = [columns[x] if x >= 0 else None for x in trees.feature_N.tolist()]
    tree_N = np.repeat(np.arange(len(trees.root_T)), np.diff(trees.root_T, append=len(asked)))
    of_nodes = (trees.threshold_N, trees.missing_left_N, trees.left_N, trees.right_N, trees.value_N)
    arrays = [
        [task] * len(asked),
        tree_N,
        [column and column.variable for column in asked],
        [column and column.statistic for column in asked],
        [column and column.window for column in asked],
        *of_nodes,
    ]
    return pa.table([pa.array(array, of.type) for array, of in zip(arrays, SCHEMA, strict=True)], SCHEMA)


def read_boosting(path: Location, configs: Mapping[str, BoostingConfig]) -> dict[str, Boosting]:
    """Each task's boosting. Raises UserError where the file is missing or holds no sound trees of these tasks."""
    try:
        table = read_parquet(path, SCHEMA.names)
        if table.schema.types != SCHEMA.types or set(table["task"].unique().to_pylist()) != set(configs):
            raise ValueError("other columns or tasks")
        return {task: _of(table.filter(pc.field("task") == task), config) for task, config in configs.items()}
    except (*UNREADABLE, KeyError, ValueError) as error:
        raise UserError(f"{path}: missing or no trees of boosting: copy the whole bundle again") from error


def _of(table: pa.Table, config: BoostingConfig) -> Boosting:
    """Raises ValueError where walking the trees would not end, or asks about what is no feature."""
    plain = [name for name in SCHEMA.names if name not in ("variable", "statistic", "window")]
    if any(table[name].null_count for name in plain):
        raise ValueError("a value is missing")
    tree_N, left_N, right_N = (table[name].to_numpy() for name in ("tree", "left", "right"))
    threshold_N, value_N = table["threshold"].to_numpy(), table["value"].to_numpy()
    nulls = {name: table[name].is_null() for name in ("variable", "statistic", "window")}
    if not nulls["variable"].equals(nulls["statistic"]) or not nulls["variable"].equals(nulls["window"]):
        raise ValueError("a part of a feature is missing")
    asked = [Column(**row) for row in table.select(["variable", "statistic", "window"]).to_pylist()]
    is_leaf_N = np.array([column.variable is None for column in asked])
    columns = sorted({column for column in asked if column.variable is not None})
    place = {column: x for x, column in enumerate(columns)}
    for column in columns:
        known = column == Column(AGE, "years") if column.variable == AGE else column.statistic in OF_CODES
        if not known or column.window not in range(len(config.windows_hours) + 1):
            raise ValueError("no feature")
    inner_N = np.flatnonzero(~is_leaf_N)
    for child_N in (left_N[inner_N], right_N[inner_N]):
        inside_N = (child_N > inner_N) & (child_N < len(table))
        if not inside_N.all() or (tree_N[child_N] != tree_N[inner_N]).any():
            raise ValueError("a child is no node behind its parent in the same tree")
    if (np.diff(tree_N) < 0).any() or np.isnan(threshold_N).any() or not np.isfinite(value_N).all():
        raise ValueError("no trees")
    trees = Trees(
        np.flatnonzero(np.diff(tree_N, prepend=tree_N[0] - 1)),
        np.array([place.get(column, -1) for column in asked], np.int32),
        threshold_N,
        table["missing_left"].to_numpy(zero_copy_only=False),
        left_N,
        right_N,
        value_N,
    )
    return Boosting(config, tuple(columns), trees)
