"""Pictures, made without a display: of a report, of a benchmark, of an explanation.

Shape legend: N labels, T thresholds; L events of one case, R rows of a picture (the last is all variables without a
row), G fractions of the events.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hymate.evaluation.decisions import GRID, net_benefit
from hymate.evaluation.metrics import curves
from hymate.evaluation.results import OTHERS
from hymate.evaluation.tables import duration
from hymate.storage.paths import Location, atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008: distinct for all kinds of colour vision
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#6E6E6E"
RAISES, LOWERS, DULL, FAINT = "#b2182b", "#2166ac", "#8a8a8a", "#e6e6e6"  # the first two end the colour map RdBu_r
ORDERS = {"attribution": RAISES, "attention": "#e08214", "random": DULL}
COLOURS = {"model": BLUE, **dict(zip(OTHERS.values(), (PURPLE, SKY, GREEN), strict=True))}
DPI, EXPLANATION_DPI = 110, 130
REACHED = 0.01  # fraction of the probabilities that must reach a threshold for it to be plotted
LABEL_WIDTH = 34
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
Array = NDArray[Any]


@contextmanager
def _figure(path: Location, width: float, height: float, dpi: int) -> Iterator[Figure]:
    """Written as a PNG when the block ends."""
    from matplotlib.figure import Figure  # late: half a second, and not every command draws

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


@contextmanager
def _four_panels(path: Location) -> Iterator[Sequence[Axes]]:
    with _figure(path, 9.5, 8.2, DPI) as figure:
        yield figure.subplots(2, 2).flat
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------------- report


def plot_task(
    path: Location,
    label_N: Array,
    prob_N: Array,
    weight_N: Array,
    found: Mapping[str, Any],
    others: Mapping[str, Array],
) -> None:
    """A task's ROC, precision-recall, calibration and decision curves.

    found: `metrics.scores` and `decisions.assess` of the same labels, which have both classes. others: probabilities of
    other models, by the keys of `results.OTHERS`.
    """
    models = [("model", prob_N, found, {"color": COLOURS["model"]})]
    for key, other_N in others.items():
        models.append((OTHERS[key], other_N, found[key], {"color": COLOURS[OTHERS[key]], "linestyle": "--"}))
    points = found["operating_points"]
    with _four_panels(path) as (roc, precision_recall, calibration, decision):
        roc.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
        precision_recall.axhline(
            found["prevalence"], color=GREY, linestyle=":", label=f"chance, {found['prevalence']:.3f}"
        )
        for name, p_N, scores, style in models:
            labels = [f"{name}, area {scores[area]['value']:.3f}" for area in ("auroc", "auprc")]
            _plot_roc(roc, label_N, p_N, weight_N, label=labels[0], **style)
            _plot_precision_recall(precision_recall, label_N, p_N, weight_N, label=labels[1], **style)
        roc.plot(
            [1 - point["specificity"]["value"] for point in points],
            [point["sensitivity"]["value"] for point in points],
            "o",
            color=ORANGE,
            label="thresholds for 80, 90, 95 % specificity",
        )
        points = [point for point in points if point["ppv"]["value"] is not None]
        sensitivity, ppv = ([point[name]["value"] for point in points] for name in ("sensitivity", "ppv"))
        precision_recall.plot(sensitivity, ppv, "o", color=ORANGE)
        roc.legend(loc="lower right", frameon=False)
        precision_recall.legend(loc="upper right", frameon=False)
        _plot_calibration(calibration, prob_N, found["calibration"]["curve"])
        _plot_decision(decision, label_N, prob_N, weight_N)


def _plot_roc(axes: Axes, label_N: Array, prob_N: Array, weight_N: Array, **style: Any) -> None:
    false_positive_G, recall_G, _ = curves(label_N, prob_N, weight_N)
    axes.plot(np.append(0, false_positive_G), np.append(0, recall_G), **style)
    axes.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01))


def _plot_precision_recall(axes: Axes, label_N: Array, prob_N: Array, weight_N: Array, **style: Any) -> None:
    _, recall_G, precision_G = curves(label_N, prob_N, weight_N)
    axes.step(np.append(0, recall_G), np.append(precision_G[0], precision_G), **style)  # the area below is the AUPRC
    axes.set(title="Precision and recall", xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    axes.set(xlim=(0, 1), ylim=(0, 1.01))


def _plot_calibration(axes: Axes, prob_N: Array, curve: Sequence[Mapping[str, Any]]) -> None:
    predicted = np.array([group["predicted"] for group in curve])
    observed = np.array([group["observed"]["value"] for group in curve])
    low, high = np.array([group["observed"]["ci"] for group in curve]).T
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="ideal")
    axes.errorbar(
        predicted, observed, yerr=[observed - low, high - observed], color=BLUE, fmt="o-", capsize=2, label="observed"
    )
    end = min(1.0, 1.05 * max(high.max(), predicted.max()))
    axes.set(title="Calibration", xlabel="predicted probability", ylabel="observed risk, 95 % CI")
    axes.fill_between([], [], color=GREY, alpha=0.35, label="number of predictions")
    axes.set(xlim=(0, end), ylim=(0, end))
    axes.legend(loc="upper left", frameon=False)
    counts = axes.twinx()
    counts.hist(prob_N, bins=np.linspace(0, end, 41).tolist(), color=GREY, alpha=0.35)
    counts.set_ylim(0, 5 * counts.get_ylim()[1])
    counts.set_yticks([])
    axes.set_zorder(counts.get_zorder() + 1)  # the curve before the histogram
    axes.patch.set_visible(False)


def _plot_decision(axes: Axes, label_N: Array, prob_N: Array, weight_N: Array) -> None:
    reached = [threshold for threshold in GRID if np.average(prob_N >= threshold, weights=weight_N) >= REACHED]
    threshold_T = np.array(reached or GRID[:1])
    model_T, all_T = (
        100 * net_benefit(label_N, p_N, threshold_T, weight_N[None])[:, 0] for p_N in (prob_N, np.ones_like(prob_N))
    )
    axes.axhline(0, color=GREY, linestyle=":", label="treat-none")
    axes.plot(threshold_T, all_T, color=ORANGE, linestyle="--", label="treat-all")
    axes.plot(threshold_T, model_T, color=BLUE, label="model")
    top = max(model_T.max(), all_T.max(), 0.1)
    axes.set(title="Decision curve", xlabel="threshold probability", ylabel="net benefit per 100 predictions")
    axes.set(ylim=(-0.25 * top, 1.1 * top))
    axes.legend(loc="upper right", frameon=False)


def plot_in_time(path: Location, found: Mapping[str, Any]) -> None:
    """Predicted and observed incidence by risk group, and calibration by each horizon; found: `survival.scores`."""
    days = [row["days"] for row in found["horizons"]]
    with _figure(path, 9.5, 4.3, DPI) as figure:
        incidence, calibration = figure.subplots(1, 2)
        for group, colour in zip(found["groups"], (GREEN, BLUE, ORANGE), strict=True):
            at, observed = np.array(group["curve"]).T
            incidence.step(at, observed, where="post", color=colour, label=group["group"])
            incidence.plot([0, *days], [0, *group["predicted"]], "o--", color=colour, markersize=4)
            for day, seen in zip(days, group["observed"], strict=True):
                if seen["ci"]:
                    incidence.vlines(day, *seen["ci"], color=colour, linewidth=4, alpha=0.25)
        incidence.plot([], [], "o--", color=GREY, label="predicted")
        incidence.plot([], [], color=GREY, label="observed (Aalen-Johansen, 95 % CI)")
        incidence.set(title="Incidence by risk group", xlabel="days from the prediction", ylabel="incidence")
        incidence.set(xlim=(0, days[-1] * 1.02), ylim=(0, 1.25 * incidence.get_ylim()[1]))  # with room for the legend
        incidence.set_yticks([tick for tick in incidence.get_yticks() if tick <= 1])
        incidence.legend(loc="upper left", frameon=False, fontsize="small")
        end = 0.0
        for row, shade in zip(found["horizons"], np.linspace(0.35, 1, len(days)), strict=True):
            if not (curve := row["calibration"]["curve"]):
                continue
            points = np.array([[group["predicted"], group["observed"]["value"]] for group in curve])
            low, high = np.array([group["observed"]["ci"] for group in curve]).T
            arms = [points[:, 1] - low, high - points[:, 1]]
            calibration.errorbar(
                *points.T, yerr=arms, color=BLUE, alpha=shade, fmt="o-", capsize=2, label=duration(row["days"])
            )
            end = max(end, float(points.max()), float(high.max()))
        calibration.plot([0, 1], [0, 1], color=GREY, linestyle=":")
        calibration.set(title="Calibration", xlabel="predicted incidence", ylabel="observed incidence, 95 % CI")
        calibration.set(xlim=(0, min(1.0, 1.05 * end)), ylim=(0, min(1.0, 1.05 * end)))
        calibration.legend(loc="upper left", frameon=False)
        for axes in (incidence, calibration):
            axes.spines[["top", "right"]].set_visible(False)


def plot_alarms(path: Location, found: Mapping[str, Any]) -> None:
    """Utility by the number of alarms, with the chosen policies, and who is found by which hour; found:
    `alarms.assess`.
    """
    with _figure(path, 9.5, 4.1, DPI) as figure:
        worth, early = figure.subplots(1, 2)
        seen = [0.0]
        for name, of_model in found.items():
            colour = COLOURS[name]
            curve = {key: [row[key] for row in of_model["curve"]] for key in ("alarms_per_day", "utility")}
            worth.plot(*curve.values(), color=colour, label=name)
            if of_model["utility"]["value"] is not None:
                low, high = of_model["utility"]["ci"] or [of_model["utility"]["value"]] * 2
                at, value = of_model["alarms_per_day"]["value"], of_model["utility"]["value"]
                worth.errorbar([at], [value], yerr=[[value - low], [high - value]], fmt="o", capsize=2, color=colour)
            hour, fraction = ([row[key] for row in of_model["found_by"]] for key in ("hour", "found"))
            early.step(
                [-24, *hour, 24], [0, *fraction, *(fraction or [0])[-1:]], where="post", color=colour, label=name
            )
            seen += hour
        worth.axhline(0, color=GREY, linestyle=":")
        worth.errorbar([], [], fmt="o", color=GREY, label="as chosen, held if so; lines: not held")
        worth.set(title="Worth of alarms", xlabel="alarms per patient-day", ylabel="normalised utility")
        worth.set(xlim=(0, None), ylim=(-0.5, None))
        worth.legend(loc="best", frameon=False)
        early.axvline(0, color=GREY, linestyle=":")
        early.set(title="Patients found", xlabel="hours from the onset", ylabel="fraction of patients with an onset")
        early.set(xlim=(min(seen) - 2, max(seen) + 2), ylim=(0, 1.02))
        early.legend(loc="upper left", frameon=False)
        for axes in (worth, early):
            axes.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------- benchmark


def plot_benchmark(
    path: Location,
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, tuple[Array, Array, Array]],
    reference: str,
) -> None:
    """ROC, precision-recall, calibration, and AUPRC by the number of labels; where there is only one number, the
    differences from the reference instead.

    rows: of its JSON file; curves: labels, probabilities and weights of each contender of the largest number, by name.
    """
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["name"] for row in rows))}
    with _four_panels(path) as (compared, roc, precision_recall, calibration):
        if len({row["budget"] for row in rows}) > 1:
            _plot_budgets(compared, rows, colours)
        else:
            _plot_differences(compared, rows, reference)
        roc.plot([0, 1], [0, 1], color=GREY, linestyle=":")
        for name, (label_N, prob_N, weight_N) in curves.items():
            chance = np.average(label_N, weights=weight_N)  # the same for all
            precision_recall.axhline(chance, color=GREY, linestyle=":")
            _plot_roc(roc, label_N, prob_N, weight_N, color=colours[name], label=name.replace("_", " "))
            _plot_precision_recall(precision_recall, label_N, prob_N, weight_N, color=colours[name])
            groups = np.array_split(np.argsort(prob_N), 10)
            predicted, observed = (
                [np.average(x_N[at], weights=weight_N[at]) for at in groups] for x_N in (prob_N, label_N)
            )
            calibration.plot(predicted, observed, "o-", color=colours[name])
        end = calibration.get_xlim()[1]
        calibration.plot([0, end], [0, end], color=GREY, linestyle=":")
        roc.legend(loc="lower right", frameon=False, fontsize="small")
        calibration.set(title="Calibration, tenths", xlabel="predicted probability", ylabel="observed risk")


def _plot_budgets(axes: Axes, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    labels = {row["budget"]: row["fitting"] + row["choosing"] for row in rows}
    for name, colour in colours.items():
        areas = [(labels[row["budget"]], row["auprc"]) for row in rows if row["name"] == name]
        own = sorted((number, area["mean"], area["sd"] or 0.0) for number, area in areas)
        if len(own) > 1:
            number, mean, deviation = np.array(own).T
            label = name.replace("_", " ")
            axes.errorbar(number, mean, yerr=deviation, fmt="o-", capsize=2, color=colour, label=label)
    axes.set(title="Few labels", xlabel="labels, those to choose by included", ylabel="AUPRC, mean and deviation")
    axes.set_xscale("log")
    axes.set_xticks(sorted(labels.values()), [f"{number:,}" for number in sorted(labels.values())])
    axes.set_xticks([], minor=True)
    axes.legend(loc="lower right", frameon=False, fontsize="small")


def _plot_differences(axes: Axes, rows: Sequence[Mapping[str, Any]], reference: str) -> None:
    others = [row for row in rows if row["name"] != reference]
    axes.axvline(0, color=GREY, linestyle=":")
    for shift, metric in ((-0.12, "auroc"), (0.12, "auprc")):
        differences = [(place + shift, row[metric]["difference"]) for place, row in enumerate(others)]
        differences = [(place, difference) for place, difference in differences if difference["ci"] is not None]
        if differences:
            y, middle = np.array([[place, difference["value"]] for place, difference in differences]).T
            low, high = np.array([difference["ci"] for _, difference in differences]).T
            arms = np.maximum(0, [middle - low, high - middle])  # of few patients the interval may lie beside it
            axes.errorbar(middle, y, xerr=arms, fmt="o", capsize=2, label=metric.upper())
    axes.set_yticks(range(len(others)), [row["name"].replace("_", " ") for row in others])
    axes.invert_yaxis()
    axes.set(title=f"Minus {reference.replace('_', ' ')}, 95 % CI", xlabel="difference")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", frameon=False, fontsize="small")


# -------------------------------------------------------------------------------------------------- explanation


def plot_timeline(
    path: Location,
    title: str,
    hours_before_L: Array,
    row_L: Array,
    attribution_L: Array,
    attention_L: Array | None,
    labels: Sequence[str],
) -> None:
    """One prediction: its events by variable and time, coloured and sized by attribution, attention below.

    hours_before_L: hours before the prediction, not negative. row_L: 0..R-1, the row of each event; labels: R.
    """
    R = len(labels)
    x_L = _position(hours_before_L)
    limit = max(float(np.abs(attribution_L).max()), 1e-6)
    heights = [R] if attention_L is None else [R, 3.2]
    with _figure(path, 11, 1.7 + 0.34 * sum(heights), EXPLANATION_DPI) as figure:
        grid = figure.add_gridspec(len(heights), 2, width_ratios=[4, 1], height_ratios=heights)
        events, totals = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        order = np.argsort(np.abs(attribution_L), kind="stable")  # what matters lies on top
        weight_L = np.abs(attribution_L) / limit
        events.scatter(
            x_L[order],
            row_L[order],
            s=6 + 150 * weight_L[order],
            c=attribution_L[order],
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            edgecolors=DULL,
            linewidths=0.4,
        )
        _list_variables(events, labels)
        for row in range(R):
            events.axhline(row, color="#f2f2f2", linewidth=0.8, zorder=0)
        _time_axis(events, hours_before_L)
        total_R = np.bincount(row_L, attribution_L, minlength=R)
        totals.barh(range(R), total_R, color=[RAISES if total > 0 else LOWERS for total in total_R], height=0.7)
        totals.axvline(0, color=DULL, linewidth=0.8)
        totals.set_yticks([])
        totals.set_ylim(events.get_ylim())
        totals.set_xlabel("sum, logit")
        figure.suptitle(f"{title}\nred raises the risk, blue lowers it; size is the amount", fontsize=10)
        if attention_L is None:
            events.set_xlabel("time before the prediction")
        else:
            below = figure.add_subplot(grid[1, 0], sharex=events)
            below.vlines(x_L, 0, attention_L, color=ORDERS["attention"], linewidth=0.8)
            below.set_ylim(0, None)
            below.set_ylabel("attention", fontsize=8)
            below.tick_params(axis="y", labelsize=7)
            below.set_xlabel("time before the prediction")
            events.tick_params(axis="x", labelbottom=False)


def plot_importance(path: Location, codes: Sequence[str], attribution_R: Array, change_R: Array) -> None:
    """Variables by importance, the first on top: mean size of attribution, and of the change on removal."""
    R = len(codes)
    with _figure(path, 10, 1.2 + 0.27 * R, EXPLANATION_DPI) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, size_R, name in (
            (left, attribution_R, "mean |attribution|, logit"),
            (right, change_R, "mean |change| when removed, logit"),
        ):
            axes.barh(range(R), np.nan_to_num(size_R), color="#4d7ea8", height=0.7)
            axes.set_xlabel(name)
            _list_variables(axes, [short(code) for code in codes])


def plot_faithfulness(path: Location, fractions: Sequence[float], curves: Mapping[str, Mapping[str, Array]]) -> None:
    """A panel for each measure: its curve (G,) for each order of the events."""
    with _figure(path, 10, 6.4, EXPLANATION_DPI) as figure:
        for axes, (measure, orders) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
            for order, curve_G in orders.items():
                axes.plot(range(len(fractions)), curve_G, marker="o", markersize=3.5, color=ORDERS[order], label=order)
            axes.axhline(0, color=DULL, linewidth=0.8)
            axes.set_xticks(range(len(fractions)), [f"{fraction:.0%}" for fraction in fractions])
            axes.set_xlabel("fraction of the events", fontsize=9)
            axes.set_ylabel("logit", fontsize=9)
            axes.set_title(measure, fontsize=10)
            axes.legend(fontsize=8)


def _list_variables(axes: Axes, labels: Sequence[str]) -> None:
    """From the top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", color=FAINT)
    axes.set_axisbelow(True)


def _position(hours_L: Array) -> Array:
    """Where on the time axis: logarithmic, because the last hours matter as much as the years before."""
    return -np.log10(1 + hours_L)


def _time_axis(axes: Axes, hours_before_L: Array) -> None:
    longest = float(hours_before_L.max())
    ticks = {label: hours for label, hours in TICKS_HOURS.items() if hours <= 1.3 * longest or hours <= 1}
    axes.set_xticks(_position(np.array(list(ticks.values()), dtype=float)), list(ticks), fontsize=8)
    axes.set_xlim(1.03 * float(_position(np.array(max(longest, 1.0)))), 0.06)


def short(label: str) -> str:
    """A label that leaves room for the picture."""
    return label if len(label) <= LABEL_WIDTH else f"{label[: LABEL_WIDTH - 1]}…"
