"""One pass over a history's events for all of its prediction times: what lies in each window before them.

A window slides along the events of a variable. What is in it is kept as two groups: those that came since the last
turn, as one summary, and before them one summary for each place at which the window may begin. When its beginning
passes the turn, the summaries are made of what is left. So an event enters two summaries, however many times are
asked, and nothing is ever subtracted: equal values have a deviation of exactly 0. Two summaries are joined as Chan et
al. (1983) join means and squares.

Shape legend, besides that of `hymate.data.features`: K lists, each the events of one variable in one history, in
their order; L the events of all lists; B prediction times, those of a history side by side and rising; T statistics.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hymate import machine

machine.settle()  # else Numba finds no place for its files in some containers

STATISTICS = ("count", "hours_since", "minimum", "maximum", "mean", "deviation", "first", "last", "slope")
HOUR = 3.6e9  # in microseconds
Summary = tuple[float, float, float, float, float, float, float, float]

# A summary: number; sum of the values' distances from the list's first, which is exact for float32 values, and sum of
# squares around their mean; the same of hours; sum of products around both means; minimum and maximum.
_NOTHING: Summary = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, np.inf, -np.inf)


@njit(cache=True)
def _joined(a: Summary, b: Summary) -> Summary:
    if a[0] == 0 or b[0] == 0:
        return b if a[0] == 0 else a
    both = a[0] * b[0] / (a[0] + b[0])
    x, t = b[1] / b[0] - a[1] / a[0], b[3] / b[0] - a[3] / a[0]
    return (
        a[0] + b[0],
        a[1] + b[1],
        a[2] + b[2] + x * x * both,
        a[3] + b[3],
        a[4] + b[4] + t * t * both,
        a[5] + b[5] + x * t * both,
        min(a[6], b[6]),
        max(a[7], b[7]),
    )


@njit(cache=True)
def _single(time, value, i):  # type: ignore[no-untyped-def]
    return (1.0, value[i] - value[0], 0.0, (time[i] - time[0]) / HOUR, 0.0, 0.0, value[i], value[i])


@njit(cache=True)
def _in_window(time, place, asked, stop, near, far, low, high):  # type: ignore[no-untyped-def]
    """Fill low and high: the events [low, high) of a list that lie in a window before each prediction time.

    The window holds what lies less than `far` before it, or just so, but more than `near`, which is negative where all
    of the first `stop` events may be used.
    """
    first = last = 0
    for b in range(len(asked)):
        while last < len(time) and place[last] < stop[b] and (near < 0 or asked[b] - time[last] > near):
            last += 1
        while first < last and asked[b] - time[first] > far:
            first += 1
        low[b], high[b] = first, last


@njit(cache=True)
def _summarised(time, value, low, high, column, row, out, later):  # type: ignore[no-untyped-def]
    """Write the statistics of the values in each window [low, high) of a list to its rows of `out`.

    later: (L, 8) scratch; later[i] summarises the events from i to the turn.
    """
    turn = seen = 0
    since = _NOTHING
    for b in range(len(low)):
        lo, hi = low[b], high[b]
        if lo > turn:
            since = _NOTHING
            for i in range(hi - 1, lo - 1, -1):
                since = _joined(_single(time, value, i), since)
                for k in range(8):
                    later[i, k] = since[k]
            turn = seen = hi
            since = _NOTHING
        while seen < hi:
            since = _joined(since, _single(time, value, seen))
            seen += 1
        if lo == hi:
            continue
        whole = since
        if lo < turn:
            o = later[lo]
            whole = (o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7])
            whole = _joined(whole, since)
        n, distances, squares, _, hour_squares, products, least, most = whole
        slope = products / hour_squares if hour_squares > 0 else np.nan
        found = (least, most, value[0] + distances / n, np.sqrt(squares / n), value[lo], value[hi - 1], slope)
        for k in range(7):
            if column[2 + k] >= 0:
                out[row + b, column[2 + k]] = found[k]


@njit(cache=True)
def write_statistics(lists, time, place, value, asked, stop, near, far, column, out):  # type: ignore[no-untyped-def]
    """Write what each window holds of each list.

    lists: int64 (K, 5): its events [start, stop), its variable, the prediction times [start, stop) of its history.
    time, place: int64 (L,), microseconds and the place in the history; value: float64 (L,), NaN where there is none.
    asked, stop: int64 (B,), prediction times and how many events of the history may be used.
    near, far: int64 (W,), microseconds. column: int64 (W, C, T), a statistic's column of `out`, -1 where it has none.
    out: float32 (B, X), written where there is something in the window.
    """
    most = 0
    for k in range(len(lists)):
        most = max(most, lists[k, 1] - lists[k, 0])
    low, high = np.empty(len(asked), np.int64), np.empty(len(asked), np.int64)
    later = np.empty((most, 8))
    for k in range(len(lists)):
        start, end, variable, b0, b1 = lists[k]
        own_time, own_place = time[start:end], place[start:end]
        has_value = np.flatnonzero(~np.isnan(value[start:end]))
        value_time, value_place, values = own_time[has_value], own_place[has_value], value[start:end][has_value]
        for w in range(len(near)):
            columns = column[w, variable]
            if columns.max() < 0:
                continue
            lo, hi = low[: b1 - b0], high[: b1 - b0]
            if columns[:2].max() >= 0:
                _in_window(own_time, own_place, asked[b0:b1], stop[b0:b1], near[w], far[w], lo, hi)
                for b in range(b1 - b0):
                    if hi[b] > lo[b] and columns[0] >= 0:
                        out[b0 + b, columns[0]] = hi[b] - lo[b]
                    if hi[b] > lo[b] and columns[1] >= 0:
                        out[b0 + b, columns[1]] = (asked[b0 + b] - own_time[hi[b] - 1]) / HOUR
            if columns[2:].max() >= 0 and len(values):
                _in_window(value_time, value_place, asked[b0:b1], stop[b0:b1], near[w], far[w], lo, hi)
                _summarised(value_time, values, lo, hi, columns, b0, out, later)


@njit(cache=True)
def count_filled(lists, time, place, value, asked, stop, near, far, filled):  # type: ignore[no-untyped-def]
    """Add to filled, int64 (2, W or more, C or more): at how many prediction times a window holds an event of a
    variable, and one with a value. The others are as in `write_statistics`.
    """
    low, high = np.empty(len(asked), np.int64), np.empty(len(asked), np.int64)
    for k in range(len(lists)):
        start, end, variable, b0, b1 = lists[k]
        kept = np.arange(start, end)
        for which in range(2):
            for w in range(len(near)):
                lo, hi = low[: b1 - b0], high[: b1 - b0]
                _in_window(time[kept], place[kept], asked[b0:b1], stop[b0:b1], near[w], far[w], lo, hi)
                filled[which, w, variable] += (hi > lo).sum()
            kept = kept[~np.isnan(value[start:end])]


def windows_us(ends_hours: Any) -> tuple[np.ndarray, np.ndarray]:
    """`near` and `far` of the whole history, then of windows with these rising ends."""
    end_us_W = np.round(np.array(ends_hours) * HOUR).astype(np.int64)
    whole = np.iinfo(np.int64).max
    return np.array([-1, -1, *end_us_W[:-1]][: 1 + len(end_us_W)]), np.array([whole, *end_us_W])
