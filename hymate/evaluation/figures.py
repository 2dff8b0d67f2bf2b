"""report.md's picture of one task, and a benchmark's: ROC, precision-recall, calibration, decision curve or comparison.

Shape legend: N labels, T thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from hymate.evaluation.decisions import GRID, net_benefit
from hymate.storage.paths import Location, atomic_path

# Okabe & Ito 2008: distinct for all kinds of colour vision
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
INCHES, DPI = (9.5, 8.2), 110
REACHED = 0.01  # share of the probabilities that must reach a threshold for it to be drawn
Array = NDArray[Any]


def draw(
    path: Location, label_N: Array, prob_N: Array, weight_N: Array, found: Mapping[str, Any], boosting_N: Array | None
) -> None:
    """Write the PNG; found: `metrics.scores` and `trust.assess` of the same labels, which have both classes, and
    "boosting" if boosting_N has its probabilities.
    """
    figure = Figure(figsize=INCHES, layout="constrained")
    roc, precision_recall, calibration, decision = figure.subplots(2, 2).flat
    _roc(roc, label_N, prob_N, weight_N, found, boosting_N)
    _precision_recall(precision_recall, label_N, prob_N, weight_N, found, boosting_N)
    _calibration(calibration, prob_N, found)
    _decision(decision, label_N, prob_N, weight_N)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


def _roc(
    axes: Axes, label_N: Array, prob_N: Array, weight_N: Array, found: Mapping[str, Any], boosting_N: Array | None
) -> None:
    false_positive, true_positive, _ = roc_curve(label_N, prob_N, sample_weight=weight_N, drop_intermediate=False)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="chance")
    axes.plot(false_positive, true_positive, color=BLUE, label=f"model, area {found['auroc']['value']:.3f}")
    if boosting_N is not None:
        false_positive, true_positive, _ = roc_curve(
            label_N, boosting_N, sample_weight=weight_N, drop_intermediate=False
        )
        area = found["boosting"]["auroc"]["value"]
        axes.plot(
            false_positive, true_positive, color=GREEN, linestyle="--", label=f"gradient boosting, area {area:.3f}"
        )
    points = found["operating_points"]
    axes.plot(
        [1 - point["specificity"]["value"] for point in points],
        [point["sensitivity"]["value"] for point in points],
        "o",
        color=ORANGE,
        label="thresholds for 80, 90, 95 % specificity",
    )
    axes.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(loc="lower right", frameon=False)


def _precision_recall(
    axes: Axes, label_N: Array, prob_N: Array, weight_N: Array, found: Mapping[str, Any], boosting_N: Array | None
) -> None:
    precision, recall, _ = precision_recall_curve(label_N, prob_N, sample_weight=weight_N)
    axes.axhline(found["prevalence"], color=GREY, linestyle=":", label=f"chance, {found['prevalence']:.3f}")
    # the last point is (0, 1) by convention, not a threshold
    axes.step(recall[:-1], precision[:-1], color=BLUE, label=f"model, area {found['auprc']['value']:.3f}")
    if boosting_N is not None:
        precision, recall, _ = precision_recall_curve(label_N, boosting_N, sample_weight=weight_N)
        area = found["boosting"]["auprc"]["value"]
        axes.step(recall[:-1], precision[:-1], color=GREEN, linestyle="--", label=f"gradient boosting, area {area:.3f}")
    points = [point for point in found["operating_points"] if point["ppv"]["value"] is not None]
    axes.plot([p["sensitivity"]["value"] for p in points], [p["ppv"]["value"] for p in points], "o", color=ORANGE)
    axes.set(title="Precision and recall", xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    axes.set(xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(loc="upper right", frameon=False)


def _calibration(axes: Axes, prob_N: Array, found: Mapping[str, Any]) -> None:
    curve = found["calibration"]["curve"]
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


def _decision(axes: Axes, label_N: Array, prob_N: Array, weight_N: Array) -> None:
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


def draw_benchmark(
    path: Location,
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, tuple[Array, Array, Array]],
    reference: str,
) -> None:
    """Write the PNG of a benchmark: ROC, precision-recall, calibration, and AUPRC over the number of labels, or where
    there is one number the differences to the reference.

    rows: of its JSON file; curves: labels, probabilities and weights of each contender of the largest number, by name.
    """
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["name"] for row in rows))}
    figure = Figure(figsize=INCHES, layout="constrained")
    compared, roc, precision_recall, calibration = figure.subplots(2, 2).flat
    if len({row["budget"] for row in rows}) > 1:
        _draw_budgets(compared, rows, colours)
    else:
        _draw_differences(compared, rows, reference)
    roc.plot([0, 1], [0, 1], color=GREY, linestyle=":")
    for name, (label_N, prob_N, weight_N) in curves.items():
        chance = np.average(label_N, weights=weight_N)  # the same for all
        precision_recall.axhline(chance, color=GREY, linestyle=":")
        false_positive, true_positive, _ = roc_curve(label_N, prob_N, sample_weight=weight_N)
        colour = colours[name]
        roc.plot(false_positive, true_positive, color=colour, label=name.replace("_", " "))
        precision, recall, _ = precision_recall_curve(label_N, prob_N, sample_weight=weight_N)
        precision_recall.step(recall[:-1], precision[:-1], color=colour)
        groups = np.array_split(np.argsort(prob_N), 10)
        predicted, observed = (
            [np.average(x_N[at], weights=weight_N[at]) for at in groups] for x_N in (prob_N, label_N)
        )
        calibration.plot(predicted, observed, "o-", color=colour)
    end = calibration.get_xlim()[1]
    calibration.plot([0, end], [0, end], color=GREY, linestyle=":")
    roc.set(title="ROC", xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01))
    roc.legend(loc="lower right", frameon=False, fontsize="small")
    precision_recall.set(title="Precision and recall", xlabel="recall (sensitivity)", ylabel="precision (PPV)")
    precision_recall.set(xlim=(0, 1), ylim=(0, 1.01))
    calibration.set(title="Calibration, tenths", xlabel="predicted probability", ylabel="observed share")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


def _draw_budgets(axes: Axes, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
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


def _draw_differences(axes: Axes, rows: Sequence[Mapping[str, Any]], reference: str) -> None:
    others = [row for row in rows if row["name"] != reference]
    axes.axvline(0, color=GREY, linestyle=":")
    for shift, metric in ((-0.12, "auroc"), (0.12, "auprc")):
        drawn = [(place + shift, row[metric]["difference"]) for place, row in enumerate(others)]
        drawn = [(place, difference) for place, difference in drawn if difference["ci"] is not None]
        if drawn:
            y, middle = np.array([[place, difference["value"]] for place, difference in drawn]).T
            low, high = np.array([difference["ci"] for _, difference in drawn]).T
            arms = np.maximum(0, [middle - low, high - middle])  # of few patients the interval may lie beside it
            axes.errorbar(middle, y, xerr=arms, fmt="o", capsize=2, label=metric.upper())
    axes.set_yticks(range(len(others)), [row["name"].replace("_", " ") for row in others])
    axes.invert_yaxis()
    axes.set(title=f"Less {reference.replace('_', ' ')}'s, 95 % intervals", xlabel="difference")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", frameon=False, fontsize="small")
