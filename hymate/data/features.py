"""Aggregate features: what happened up to a prediction time, as one row of numbers.

For every code, over the whole history and in each window before the prediction time: how often; of its values the
minimum, maximum, mean, standard deviation, first, last and slope; and how long ago it was last recorded. Besides,
the static codes, the age and the number of all events. By default the windows end at one day, two days, a week, a
month and a year, for patients who are asked about often at six hours, too, and columns that hardly any training label
fills are left out: a stay of 48 hours is described day by day, a history of years in growing windows.

A history is read once for all of its labels (`hymate.data.sweep`), and reading streams over the row groups:
besides the features (4 bytes a label and column) it holds the cache of `Histories` and some 200 bytes for each of
BLOCK_EVENTS events.

Shape legend, besides that of `hymate.data.loader`: X features (columns), W windows (the first is the whole history),
C variables that have features, V codes of the dataset, B examples of a block, L its events, F its examples' static
events, T statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hymate.config import check, positive
from hymate.data.examples import NO_TIME, Examples
from hymate.data.histories import Histories, ages
from hymate.data.packing import blocks
from hymate.data.sweep import STATISTICS, count_filled, windows_us, write_statistics
from hymate.errors import UserError

BLOCK_EVENTS = 500_000
WHOLE = 0  # the window that is the whole history
AGE, EVENTS = "(age)", "(events)"  # variables that are no codes
VALUE_STATISTICS = STATISTICS[2:]
WINDOWS = (24.0, 48.0, 168.0, 720.0, 8760.0)  # hours
OFTEN, OFTEN_ASKED = 4, 6.0  # labels a subject from which on there is one more window, and its end in hours


@dataclass(frozen=True)
class FeatureConfig:
    """Which features there are.

    windows_hours: rising ends of the windows, in hours before the prediction time; each window reaches from the end
        of the one before (0 for the first) to its own, which belongs to it. null is 24, 48, 168, 720 and 8760, and also
        6 where the training subjects have four labels or more on average.
    max_features: most columns. Variables get theirs in the order of how many training labels have them, the most
        common first, until the next one's no longer fit.
    min_labels: fewest training labels that fill a column.
    """

    windows_hours: tuple[float, ...] | None = None
    max_features: int = 4096
    min_labels: int = 10

    def __post_init__(self) -> None:
        ends = self.windows_hours or ()
        check(
            self, windows_hours=(all(low < high for low, high in pairwise((0.0, *ends))), "must be positive and rise")
        )
        positive(self, "max_features", "min_labels")

    def windows(self, train: Examples) -> tuple[float, ...]:
        """The ends of the windows for these training examples."""
        if self.windows_hours is not None:
            return self.windows_hours
        return ((OFTEN_ASKED,) if asked_often(train) else ()) + WINDOWS


def asked_often(examples: Examples) -> bool:
    """Whether a subject has OFTEN labels or more on average."""
    return len(examples) >= OFTEN * len(np.unique(examples.position_E))


class Column(NamedTuple):
    """One feature.

    variable: a code, AGE or EVENTS (all codes, also those without features of their own).
    statistic: "count" of events; one of VALUE_STATISTICS of their values ("deviation" is the population's standard
        deviation, "slope" the least-squares one per hour); "hours_since" the last event; "static_value" of a static
        code, "static" 1 where it has one without values; "years".
    window: WHOLE, or k for the k-th of FeatureConfig.windows_hours.
    """

    variable: str
    statistic: str
    window: int = WHOLE


@dataclass(frozen=True)
class FeatureSpec:
    """The columns of a feature table. `choose` makes it from the train split; it applies to any dataset."""

    windows_hours: tuple[float, ...]
    columns: tuple[Column, ...]

    @property
    def names(self) -> list[str]:
        """One name a column, such as "HR//bpm mean 24-48 h"."""
        edges = (0.0, *self.windows_hours)
        spans = ["", *(f" {low:g}-{high:g} h" for low, high in pairwise(edges))]
        return [f"{column.variable} {column.statistic}{spans[column.window]}" for column in self.columns]

    @property
    def is_count_X(self) -> np.ndarray:
        """Which columns are counts or marks, 0 where there is nothing; the others are NaN there."""
        return np.array([column.statistic in ("count", "static") for column in self.columns])


@dataclass(frozen=True)
class Rows:
    """Rows of float32 tables that lie one below the other, on disk mostly; as much of NumPy's interface as is needed.

    row_E: the numbers of the rows, int64, among those of all parts.
    """

    parts: Sequence[np.ndarray]
    row_E: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> Rows:
        """All rows of the parts."""
        return cls(parts, np.arange(sum(map(len, parts))))

    def __len__(self) -> int:
        return len(self.row_E)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.row_E), self.parts[0].shape[1]

    def __getitem__(self, at_N: slice | np.ndarray) -> np.ndarray:
        """Some of the rows, in memory."""
        row_N = self.row_E[at_N]
        stop_P = np.cumsum([len(part) for part in self.parts])
        part_N = np.searchsorted(stop_P, row_N, side="right")
        value_NX = np.empty((len(row_N), self.shape[1]), np.float32)
        for part in np.unique(part_N).tolist():
            own_N = part_N == part
            value_NX[own_N] = self.parts[part][row_N[own_N] - (stop_P[part] - len(self.parts[part]))]
        return value_NX

    def only(self, kept_E: np.ndarray) -> Rows:
        """The rows where `kept_E` is true; nothing is read."""
        return Rows(self.parts, self.row_E[kept_E])


@dataclass(frozen=True)
class FeatureTable:
    """value_EX: float32, a row for each of `examples`, a column for each of the specification's; Rows of what is larger
    than memory.
    """

    spec: FeatureSpec
    examples: Examples
    value_EX: np.ndarray | Rows

    def only(self, kept_E: np.ndarray) -> FeatureTable:
        """The rows where `kept_E` is true."""
        value_EX = self.value_EX.only(kept_E) if isinstance(self.value_EX, Rows) else self.value_EX[kept_E]
        return FeatureTable(self.spec, self.examples.only(kept_E), value_EX)


# ----------------------------------------------------------------------------------------------------- choosing


def filled(histories: Histories, examples: Examples, windows_hours: Sequence[float]) -> np.ndarray:
    """How many of the labels fill a feature, int64 (2, W + 1, V + 1); counts of several parts may be added.

    First those that have an event, then those that have one with a value. The last window stands for static codes; the
    last code for all events, and among the static ones for an age.
    """
    num_codes = len(histories.codes)
    near_W, far_W = windows_us(windows_hours)
    found = np.zeros((2, len(near_W) + 1, num_codes + 1), np.int64)
    for block in _blocks(histories, examples):
        of_lists = block.lists(np.arange(num_codes), num_codes)
        count_filled(*of_lists, block.time_B, block.stop_B, near_W, far_W, found)
        for which, kept_F in enumerate((slice(None), ~np.isnan(block.static_value_F))):
            key_F = block.static_row_F[kept_F] * num_codes + block.static_code_F[kept_F]
            found[which, -1, :-1] += np.bincount(np.unique(key_F) % num_codes, minlength=num_codes)
        found[0, -1, -1] += (~np.isnan(block.age_years_B)).sum()
    return found


def choose(histories: Histories, examples: Examples, config: FeatureConfig) -> FeatureSpec:
    """The columns that `examples` (of the train split) fill often enough, within the budget.

    Raises UserError where there is none.
    """
    windows_hours = config.windows(examples)
    return chosen(histories.codes, filled(histories, examples, windows_hours), len(examples), windows_hours, config)


def chosen(
    codes: Sequence[str],
    filled_2WV: np.ndarray,
    num_labels: int,
    windows_hours: tuple[float, ...],
    config: FeatureConfig,
) -> FeatureSpec:
    """`choose`, of what so many labels fill."""
    enough_2WV = filled_2WV >= config.min_labels
    windows = range(len(windows_hours) + 1)
    variables = [[Column(EVENTS, "count", w) for w in windows if enough_2WV[0, w, -1]]]
    variables += [[Column(AGE, "years")]] if enough_2WV[0, -1, -1] else []
    for v in np.argsort(-np.maximum(filled_2WV[0, -1, :-1], filled_2WV[0, WHOLE, :-1]), kind="stable").tolist():
        code, columns = codes[v], []
        if enough_2WV[0, -1, v]:
            columns.append(Column(code, "static_value" if enough_2WV[1, -1, v] else "static"))
        if enough_2WV[0, WHOLE, v]:
            columns.append(Column(code, "hours_since"))
        for w in windows:
            columns += [Column(code, "count", w)] if enough_2WV[0, w, v] else []
            columns += [Column(code, s, w) for s in VALUE_STATISTICS] if enough_2WV[1, w, v] else []
        variables.append(columns)
    fits = np.cumsum([len(columns) for columns in variables]) <= config.max_features
    fitting = tuple(column for columns, kept in zip(variables, fits, strict=True) if kept for column in columns)
    if not fitting:
        raise UserError(
            f"features.min_labels={config.min_labels} and features.max_features={config.max_features} leave no feature "
            f"of {num_labels} training labels: lower the one or raise the other"
        )
    return FeatureSpec(windows_hours, fitting)


# ---------------------------------------------------------------------------------------------------- computing


def features(histories: Histories, examples: Examples, spec: FeatureSpec) -> FeatureTable:
    """The features of each example, from its events up to and including its prediction time."""
    empty_X = np.where(spec.is_count_X, 0, np.nan).astype(np.float32)
    value_EX = np.tile(empty_X, (len(examples), 1))
    place = {column: x for x, column in enumerate(spec.columns)}
    variables = sorted({EVENTS, *(column.variable for column in spec.columns)})
    position = {variable: c for c, variable in enumerate(variables)}
    position_V = np.array([position.get(code, -1) for code in histories.codes], np.int64)
    windows = range(1 + len(spec.windows_hours))
    column_WCT = np.array(
        [[[place.get(Column(c, s, w), -1) for s in STATISTICS] for c in variables] for w in windows], np.int64
    )
    static_2C = np.array([[place.get(Column(c, s), -1) for c in variables] for s in ("static", "static_value")])
    near_W, far_W = windows_us(spec.windows_hours)
    for block in _blocks(histories, examples):
        value_BX = value_EX[block.first : block.first + len(block.time_B)]
        of_lists = block.lists(position_V, position[EVENTS])
        write_statistics(*of_lists, block.time_B, block.stop_B, near_W, far_W, column_WCT, value_BX)
        if AGE in position:
            value_BX[:, place[Column(AGE, "years")]] = block.age_years_B
        variable_F = position_V[block.static_code_F]
        for static_C, value_F in zip(static_2C, (np.ones(len(variable_F)), block.static_value_F), strict=True):
            column_F = np.where(variable_F >= 0, static_C[variable_F], -1)
            kept_F = column_F >= 0
            value_BX[block.static_row_F[kept_F], column_F[kept_F]] = value_F[kept_F]
    return FeatureTable(spec, examples, value_EX)


# ------------------------------------------------------------------------------------------------------ reading


class _Block(NamedTuple):
    """Consecutive examples of some histories, from the example `first` on.

    time_B, stop_B: their prediction times, and how many of the history's events are not later. row_H: each history's
    first example in the block, and after the last one their number. The events are those of the histories one after
    the other up to the last prediction time, place_L their place in the history. Values are float64, NaN where there is
    none or it is not finite. static_row_F: the example.
    """

    first: int
    time_B: np.ndarray
    stop_B: np.ndarray
    age_years_B: np.ndarray
    row_H: np.ndarray
    history_L: np.ndarray
    place_L: np.ndarray
    event_time_L: np.ndarray
    code_L: np.ndarray
    value_L: np.ndarray
    static_row_F: np.ndarray
    static_code_F: np.ndarray
    static_value_F: np.ndarray

    def lists(self, variable_V: np.ndarray, of_all: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The events by history and variable, as `hymate.data.sweep` takes them: lists, time, place, value.

        variable_V: of each code, -1 for none; of_all: the variable that every event belongs to, too.
        """
        variable_L = variable_V[self.code_L]
        event_M = np.concatenate([np.flatnonzero(variable_L >= 0), np.arange(len(variable_L))])
        variable_M = variable_L[event_M]
        variable_M[len(event_M) - len(variable_L) :] = of_all
        key_M = self.history_L[event_M] * (max(variable_V.max(initial=0), of_all) + 1) + variable_M
        order_M = np.argsort(key_M, kind="stable")
        event_M, variable_M, key_M = event_M[order_M], variable_M[order_M], key_M[order_M]
        start_K = np.flatnonzero(np.diff(key_M, prepend=-1))
        history_K = self.history_L[event_M[start_K]]
        rows = (self.row_H[history_K], self.row_H[history_K + 1])
        lists_K5 = np.stack([start_K, np.append(start_K[1:], len(key_M)), variable_M[start_K], *rows], axis=1)
        return lists_K5, self.event_time_L[event_M], self.place_L[event_M], self.value_L[event_M]


def _blocks(histories: Histories, examples: Examples) -> Iterator[_Block]:
    """The examples with the events up to their prediction times, about BLOCK_EVENTS of them at once."""
    assert (examples.prediction_time_E != NO_TIME).all(), "features need prediction times"
    position_E = np.asarray(examples.position_E)
    first_H = np.flatnonzero(np.diff(position_E, prepend=-1))
    last_H = np.append(first_H[1:], len(position_E)) - 1
    for history_B in blocks(examples.stop_E[last_H], BLOCK_EVENTS) if len(first_H) else []:
        first, stop = int(first_H[history_B[0]]), int(last_H[history_B[-1]]) + 1
        read = histories.read(position_E[first_H[history_B]])
        num_events = examples.stop_E[last_H[history_B]].astype(np.int64)
        cut = list(zip(read, num_events.tolist(), strict=True))
        row_H = np.append(first_H[history_B], stop) - first
        history_B = np.repeat(np.arange(len(read)), np.diff(row_H))
        own = [read[h] for h in history_B.tolist()]
        time_B, stop_B = (x[first:stop].astype(np.int64) for x in (examples.prediction_time_E, examples.stop_E))
        # one pass goes forward
        assert all((np.diff(x_B)[np.diff(history_B) == 0] >= 0).all() for x_B in (time_B, stop_B)), "not sorted"
        history_L = np.repeat(np.arange(len(read)), num_events)
        yield _Block(
            first=first,
            time_B=time_B,
            stop_B=stop_B,
            age_years_B=ages([history.birth_time for history in own], time_B),
            row_H=row_H,
            history_L=history_L,
            place_L=np.arange(len(history_L)) - np.repeat(np.cumsum(num_events) - num_events, num_events),
            event_time_L=np.concatenate([history.time[:count] for history, count in cut]),
            code_L=np.concatenate([history.code[:count] for history, count in cut]).astype(np.int64),
            value_L=_finite(np.concatenate([history.value[:count] for history, count in cut])),
            static_row_F=np.repeat(np.arange(len(own)), [len(history.static_code) for history in own]),
            static_code_F=np.concatenate([history.static_code for history in own]).astype(np.int64),
            static_value_F=_finite(np.concatenate([history.static_value for history in own])),
        )


def _finite(value_L: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(value_L), value_L, np.nan).astype(np.float64)
