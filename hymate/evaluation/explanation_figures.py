"""The pictures of an explanation, drawn without a display.

Shape legend: L events of one case, R rows of a picture (the last is all variables without a row), G shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hymate.storage.paths import Location, atomic_path

TICKS_HOURS = {
    "0": 0,
    "1 h": 1,
    "6 h": 6,
    "1 d": 24,
    "3 d": 72,
    "1 wk": 168,
    "1 mo": 730,
    "3 mo": 2190,
    "1 y": 8766,
    "5 y": 43_830,
    "20 y": 175_320,
}
LABEL_WIDTH = 34
_RAISES, _LOWERS, _DULL = "#b2182b", "#2166ac", "#8a8a8a"  # the ends of the colour map RdBu_r
_LINE = {"attribution": _RAISES, "attention": "#e08214", "random": _DULL}


def timeline(
    path: Location,
    title: str,
    hours_before_L: np.ndarray,
    row_L: np.ndarray,
    attribution_L: np.ndarray,
    attention_L: np.ndarray | None,
    labels: Sequence[str],
) -> None:
    """One prediction: its events by variable and time, coloured and sized by attribution, attention below.

    hours_before_L: hours before the prediction, not negative. row_L: 0..R-1, the row of each event; labels: R.
    """
    R = len(labels)
    x_L = _position(hours_before_L)
    limit = max(float(np.abs(attribution_L).max()), 1e-6)
    colour = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
    heights = [R] if attention_L is None else [R, 3.2]
    figure = Figure(figsize=(11, 1.7 + 0.34 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[4, 1], height_ratios=heights)
    events, totals = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    order = np.argsort(np.abs(attribution_L), kind="stable")  # what matters lies on top
    weight_L = np.abs(attribution_L) / limit
    events.scatter(
        x_L[order],
        row_L[order],
        s=6 + 150 * weight_L[order],
        c=colour.to_rgba(attribution_L[order]),
        edgecolors=_DULL,
        linewidths=0.4,
    )
    events.set_yticks(range(R), labels, fontsize=8)
    events.set_ylim(R - 0.4, -0.6)
    events.grid(axis="x", color="#e6e6e6")
    events.set_axisbelow(True)
    for row in range(R):
        events.axhline(row, color="#f2f2f2", linewidth=0.8, zorder=0)
    _time_axis(events, hours_before_L)
    total_R = np.bincount(row_L, attribution_L, minlength=R)
    totals.barh(range(R), total_R, color=[_RAISES if total > 0 else _LOWERS for total in total_R], height=0.7)
    totals.axvline(0, color=_DULL, linewidth=0.8)
    totals.set_yticks([])
    totals.set_ylim(events.get_ylim())
    totals.set_xlabel("sum, logit")
    figure.suptitle(f"{title}\nred raises the risk, blue lowers it; size is the amount", fontsize=10)
    if attention_L is None:
        events.set_xlabel("time before the prediction")
    else:
        below = figure.add_subplot(grid[1, 0], sharex=events)
        below.vlines(x_L, 0, attention_L, color=_LINE["attention"], linewidth=0.8)
        below.set_ylim(0, None)
        below.set_ylabel("attention", fontsize=8)
        below.tick_params(axis="y", labelsize=7)
        below.set_xlabel("time before the prediction")
        events.tick_params(axis="x", labelbottom=False)
    _save(figure, path)


def importance(path: Location, codes: Sequence[str], attribution_R: np.ndarray, change_R: np.ndarray) -> None:
    """Variables by importance, the first on top: mean size of attribution, and of the change on removal."""
    R = len(codes)
    figure = Figure(figsize=(10, 1.2 + 0.27 * R), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, size_R, name in (
        (left, attribution_R, "mean |attribution|, logit"),
        (right, change_R, "mean |change| when removed, logit"),
    ):
        axes.barh(range(R), np.nan_to_num(size_R), color="#4d7ea8", height=0.7)
        axes.set_xlabel(name)
        axes.grid(axis="x", color="#e6e6e6")
        axes.set_axisbelow(True)
    left.set_yticks(range(R), [short(code) for code in codes], fontsize=8)
    left.set_ylim(R - 0.4, -0.6)
    _save(figure, path)


def faithfulness(path: Location, shares: Sequence[float], curves: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """A panel for each measure: its curve (G,) for each order of the events."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, (measure, orders) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
        for order, curve_G in orders.items():
            axes.plot(range(len(shares)), curve_G, marker="o", markersize=3.5, color=_LINE[order], label=order)
        axes.axhline(0, color=_DULL, linewidth=0.8)
        axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        axes.set_xlabel("share of the events", fontsize=9)
        axes.set_ylabel("logit", fontsize=9)
        axes.set_title(measure, fontsize=10)
        axes.legend(fontsize=8)
    _save(figure, path)


def _position(hours_L: np.ndarray) -> np.ndarray:
    """Where on the time axis: logarithmic, because the last hours matter as much as the years before."""
    return -np.log10(1 + hours_L)


def _time_axis(axes: Axes, hours_before_L: np.ndarray) -> None:
    longest = float(hours_before_L.max())
    ticks = {label: hours for label, hours in TICKS_HOURS.items() if hours <= 1.3 * longest or hours <= 1}
    axes.set_xticks(_position(np.array(list(ticks.values()), dtype=float)), list(ticks), fontsize=8)
    axes.set_xlim(1.03 * float(_position(np.array(max(longest, 1.0)))), 0.06)


def short(label: str) -> str:
    """A label that leaves room for the picture."""
    return label if len(label) <= LABEL_WIDTH else f"{label[: LABEL_WIDTH - 1]}…"


def _save(figure: Figure, path: Location) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
