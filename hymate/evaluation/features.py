"""Aggregate features: what happened up to a prediction time, as one row of numbers.

For every code, over the whole history and in each window before the prediction time: how often; of its values the
minimum, maximum, mean, standard deviation, first, last and slope; and how long ago it was last recorded. Besides,
the static codes, the age and the number of all events. The windows' default ends at one day, two days, a week, a
month and a year, and columns that hardly any training label fills are left out: a stay of 48 hours is described day
by day, a history of years in growing windows.

Reading streams over the row groups: besides the features (4 bytes a label and column) it holds the cache of
`Histories` and some 200 bytes for each of BLOCK_EVENTS events.

Shape legend, besides that of `hymate.data.loader`: X features (columns), W windows (the first is the whole history),
C variables that have features, V codes of the dataset, L members of windows (an event is one of the whole history,
and mostly one of another window), G groups of members with the same example, window and variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hymate.data.examples import NO_TIME, Examples
from hymate.data.histories import Histories
from hymate.data.loader import ages
from hymate.data.meds import US_PER_HOUR
from hymate.data.packing import blocks
from hymate.errors import ConfigError, UserError

BLOCK_EVENTS = 500_000
WHOLE = 0  # the window that is the whole history
AGE, EVENTS = "(age)", "(events)"  # variables that are no codes
VALUE_STATISTICS = ("minimum", "maximum", "mean", "deviation", "first", "last", "slope")


@dataclass(frozen=True)
class FeatureConfig:
    """Which features there are.

    windows_hours: rising ends of the windows, in hours before the prediction time; each window reaches from the end
        of the one before (0 for the first) to its own, which belongs to it.
    max_features: most columns. Variables get theirs in the order of how many training labels have them, the most
        common first, until the next one's no longer fit.
    min_labels: fewest training labels that fill a column.
    """

    windows_hours: tuple[float, ...] = (24.0, 48.0, 168.0, 720.0, 8760.0)
    max_features: int = 4096
    min_labels: int = 10

    def __post_init__(self) -> None:
        edges = (0.0, *self.windows_hours)
        if any(low >= high for low, high in pairwise(edges)):
            raise ConfigError(f"windows_hours must be positive and rise, got {list(self.windows_hours)}")
        for name in ("max_features", "min_labels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


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
class FeatureTable:
    """value_EX: float32, a row for each of `examples`, a column for each of the specification's."""

    spec: FeatureSpec
    examples: Examples
    value_EX: np.ndarray

    def only(self, kept_E: np.ndarray) -> FeatureTable:
        """The rows where `kept_E` is true."""
        return FeatureTable(self.spec, self.examples.only(kept_E), self.value_EX[kept_E])


# ----------------------------------------------------------------------------------------------------- choosing


def choose(histories: Histories, examples: Examples, config: FeatureConfig) -> FeatureSpec:
    """The columns that `examples` (of the train split) fill often enough, within the budget.

    Raises UserError where there is none.
    """
    num_windows, num_codes = 1 + len(config.windows_hours), len(histories.codes)
    count_WV, value_count_WV = np.zeros((2, num_windows, num_codes), np.int64)
    static_V, static_value_V = np.zeros((2, num_codes), np.int64)
    events_W = np.zeros(num_windows, np.int64)
    num_births = 0
    for block in _blocks(histories, examples, config.windows_hours):
        key_L = block.window_L * num_codes + block.code_L
        for count, key, example, value in (
            (count_WV, key_L, block.example_L, None),
            (value_count_WV, key_L, block.example_L, block.value_L),
            (static_V, block.static_code_F, block.static_example_F, None),
            (static_value_V, block.static_code_F, block.static_example_F, block.static_value_F),
            (events_W, block.window_L, block.example_L, None),
        ):
            has_value = slice(None) if value is None else ~np.isnan(value)
            count.reshape(-1)[:] += _labels_having(key[has_value], example[has_value], count.size)
        num_births += int((~np.isnan(block.age_years_B)).sum())

    enough = config.min_labels
    variables = [[Column(EVENTS, "count", w) for w in np.flatnonzero(events_W >= enough).tolist()]]
    variables += [[Column(AGE, "years")]] if num_births >= enough else []
    for v in np.argsort(-np.maximum(static_V, count_WV[WHOLE]), kind="stable").tolist():
        code, columns = histories.codes[v], []
        if static_V[v] >= enough:
            columns.append(Column(code, "static_value" if static_value_V[v] >= enough else "static"))
        if count_WV[WHOLE, v] >= enough:
            columns.append(Column(code, "hours_since"))
        for w in range(num_windows):
            columns += [Column(code, "count", w)] if count_WV[w, v] >= enough else []
            columns += [Column(code, s, w) for s in VALUE_STATISTICS] if value_count_WV[w, v] >= enough else []
        variables.append(columns)
    fits = np.cumsum([len(columns) for columns in variables]) <= config.max_features
    chosen = tuple(column for columns, kept in zip(variables, fits, strict=True) if kept for column in columns)
    if not chosen:
        raise UserError(
            f"features.min_labels={enough} and features.max_features={config.max_features} leave no feature of "
            f"{len(examples)} training labels: lower the one or raise the other"
        )
    return FeatureSpec(config.windows_hours, chosen)


def _labels_having(key_L: np.ndarray, example_L: np.ndarray, size: int) -> np.ndarray:
    """(size,): in how many examples each key occurs."""
    return np.bincount(np.unique(example_L * size + key_L) % size, minlength=size)


# ---------------------------------------------------------------------------------------------------- computing


def features(histories: Histories, examples: Examples, spec: FeatureSpec) -> FeatureTable:
    """The features of each example, from its events up to and including its prediction time."""
    empty_X = np.where(spec.is_count_X, 0, np.nan).astype(np.float32)
    value_EX = np.tile(empty_X, (len(examples), 1))
    place = {column: x for x, column in enumerate(spec.columns)}
    variables = sorted({EVENTS, *(column.variable for column in spec.columns)})
    position = {variable: c for c, variable in enumerate(variables)}
    position_V = np.array([position.get(code, -1) for code in histories.codes], np.int64)
    num_variables, num_windows = len(variables), 1 + len(spec.windows_hours)

    def columns_of(statistic: str) -> np.ndarray:
        """(W * C,): the column of each window's and variable's statistic, -1 where there is none."""
        return np.array([place.get(Column(c, statistic, w), -1) for w in range(num_windows) for c in variables])

    column_of = {statistic: columns_of(statistic) for statistic in ("count", "hours_since", *VALUE_STATISTICS)}
    static_of = {statistic: columns_of(statistic)[:num_variables] for statistic in ("static", "static_value")}

    def put(statistic: str, key_G: np.ndarray, result_G: np.ndarray) -> None:
        example_G, cell_G = np.divmod(key_G, num_windows * num_variables)
        _write(value_EX, example_G, column_of[statistic][cell_G], result_G)

    for block in _blocks(histories, examples, spec.windows_hours):
        if AGE in position:
            value_EX[block.example_B, place[Column(AGE, "years")]] = block.age_years_B
        variable_F = position_V[block.static_code_F]
        for statistic, value_F in (("static", np.ones(len(variable_F))), ("static_value", block.static_value_F)):
            column_F = np.where(variable_F >= 0, static_of[statistic][variable_F], -1)
            _write(value_EX, block.static_example_F, column_F, value_F)

        cell_L = block.example_L * num_windows + block.window_L
        put("count", *np.unique(cell_L * num_variables + position[EVENTS], return_counts=True))
        variable_L = position_V[block.code_L]
        key_L = np.where(variable_L >= 0, cell_L * num_variables + variable_L, -1)
        events = _Groups(np.flatnonzero(key_L >= 0), key_L)
        put("count", events.key_G, events.size_G)
        put("hours_since", events.key_G, block.hours_before_L[events.last_G])
        values = _Groups(np.flatnonzero((key_L >= 0) & ~np.isnan(block.value_L)), key_L)
        for statistic, result_G in _value_statistics(values, block.value_L, -block.hours_before_L).items():
            put(statistic, values.key_G, result_G)
    return FeatureTable(spec, examples, value_EX)


def _write(value_EX: np.ndarray, example_G: np.ndarray, column_G: np.ndarray, result_G: np.ndarray) -> None:
    kept_G = column_G >= 0
    value_EX[example_G[kept_G], column_G[kept_G]] = result_G[kept_G]


class _Groups:
    """Members (positions in the L arrays) by key, those of a key in the order of time."""

    def __init__(self, member_L: np.ndarray, key_L: np.ndarray) -> None:
        self.member_L = member_L[np.argsort(key_L[member_L], kind="stable")]
        sorted_L = key_L[self.member_L]
        self.start_G = np.flatnonzero(np.diff(sorted_L, prepend=-1))
        self.size_G = np.diff(self.start_G, append=len(sorted_L))
        self.key_G = sorted_L[self.start_G]
        self.first_G = self.member_L[self.start_G]
        self.last_G = self.member_L[self.start_G + self.size_G - 1]

    def reduce(self, operation: np.ufunc, x_L: np.ndarray) -> np.ndarray:
        """x_L is in the order of member_L."""
        return operation.reduceat(x_L, self.start_G) if len(x_L) else np.zeros(0)

    def centred(self, x_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The means (G,) and the members' distances from them, exactly 0 where all of a group are equal."""
        shifted_L = x_L[self.member_L] - np.repeat(x_L[self.first_G], self.size_G)
        mean_G = self.reduce(np.add, shifted_L) / self.size_G
        return x_L[self.first_G] + mean_G, shifted_L - np.repeat(mean_G, self.size_G)


def _value_statistics(groups: _Groups, value_L: np.ndarray, hour_L: np.ndarray) -> dict[str, np.ndarray]:
    """VALUE_STATISTICS of each group (G,); a slope needs two times."""
    mean_G, from_mean_L = groups.centred(value_L)
    _, hour_from_mean_L = groups.centred(hour_L)
    spread_G = groups.reduce(np.add, hour_from_mean_L**2)
    return {
        "minimum": groups.reduce(np.minimum, value_L[groups.member_L]),
        "maximum": groups.reduce(np.maximum, value_L[groups.member_L]),
        "mean": mean_G,
        "deviation": np.sqrt(groups.reduce(np.add, from_mean_L**2) / groups.size_G),
        "first": value_L[groups.first_G],
        "last": value_L[groups.last_G],
        "slope": groups.reduce(np.add, hour_from_mean_L * from_mean_L) / np.where(spread_G > 0, spread_G, np.nan),
    }


# ------------------------------------------------------------------------------------------------------ reading


class _Block(NamedTuple):
    """Some consecutive examples (B). Values are float64, NaN where there is none or it is not finite."""

    example_B: np.ndarray
    age_years_B: np.ndarray
    example_L: np.ndarray
    window_L: np.ndarray
    code_L: np.ndarray
    value_L: np.ndarray
    hours_before_L: np.ndarray  # the prediction time
    static_example_F: np.ndarray
    static_code_F: np.ndarray
    static_value_F: np.ndarray


def _blocks(histories: Histories, examples: Examples, windows_hours: Sequence[float]) -> Iterator[_Block]:
    """The examples with their events up to and including the prediction time, about BLOCK_EVENTS at once."""
    assert (examples.prediction_time_E != NO_TIME).all(), "features need prediction times"
    end_us_W = np.round(np.array(windows_hours) * US_PER_HOUR).astype(np.int64)
    for example_B in blocks(examples.stop_E, BLOCK_EVENTS):
        read = histories.read(examples.position_E[example_B])
        stop_B, time_B = examples.stop_E[example_B], examples.prediction_time_E[example_B]
        cut = list(zip(read, stop_B.tolist(), strict=True))
        before_us = np.repeat(time_B, stop_B) - np.concatenate([history.time[:stop] for history, stop in cut])
        window = 1 + np.searchsorted(end_us_W, before_us, side="left")
        # every event belongs to the whole history, and to a window where it is not older than all of them
        member_L = np.concatenate([np.arange(len(window)), np.flatnonzero(window <= len(end_us_W))])
        window_L = np.where(np.arange(len(member_L)) < len(window), WHOLE, window[member_L])
        num_static_B = [len(history.static_code) for history in read]
        yield _Block(
            example_B=example_B,
            age_years_B=ages([history.birth_time for history in read], time_B).numpy(),
            example_L=np.repeat(example_B, stop_B)[member_L],
            window_L=window_L,
            code_L=np.concatenate([history.code[:stop] for history, stop in cut]).astype(np.int64)[member_L],
            value_L=_finite(np.concatenate([history.value[:stop] for history, stop in cut]))[member_L],
            hours_before_L=(before_us / US_PER_HOUR)[member_L],
            static_example_F=np.repeat(example_B, num_static_B),
            static_code_F=np.concatenate([history.static_code for history in read]).astype(np.int64),
            static_value_F=_finite(np.concatenate([history.static_value for history in read])),
        )


def _finite(value_L: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(value_L), value_L, np.nan).astype(np.float64)
