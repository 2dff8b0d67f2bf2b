"""Draw docs/figures: the architecture, and the picture of a report.

    python docs/draw.py [DEMO_DIR]

DEMO_DIR is what `make demo` left; without it only the architecture is drawn.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

FIGURES = Path(__file__).resolve().parent / "figures"
INK, PALE = "#1d2733", "#5b6b7b"
DATA, WORK, MODEL, USE = "#dbe9f6", "#e4f1e1", "#fbe8d0", "#ece3f4"
Point = tuple[float, float]


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    architecture(FIGURES / "architecture.svg")
    if demo := sys.argv[1:]:
        for task, name in ("readmission", "report"), ("time_to_readmission", "incidence"):
            shutil.copy(Path(demo[0]) / "runs" / task / f"{task}.png", FIGURES / f"{name}.png")


def architecture(path: Path) -> None:
    """From raw tables to a risk above, the model below."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hymate", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(12.4, 6.2))
        axes.set(xlim=(0, 124), ylim=(0, 62))
        axes.axis("off")
        axes.set_position((0, 0, 1, 1))
        figure.patch.set_facecolor("white")
        _path(axes)
        _model(axes)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _path(axes: Axes) -> None:
    axes.text(2, 59, "From raw tables to a risk", fontsize=13, fontweight="bold", color=INK)
    _box(
        axes,
        (2, 37),
        (16, 19),
        DATA,
        "raw data",
        ["CSV, OMOP", "(by extractors)", "MEDS 0.4", "PhysioNet 2012", "synthetic"],
    )
    _box(
        axes,
        (23, 37),
        (17, 19),
        WORK,
        "prepare",
        ["checks every file", "orders events by when", "they became known", "train-only vocabulary", "bounded memory"],
    )
    _box(
        axes,
        (45, 37),
        (16, 19),
        DATA,
        "prepared data",
        ["MEDS + labels", "histories, Parquet", "3 splits", "local or s3://"],
    )
    _box(axes, (66, 47.5), (23, 11), WORK, "pretrain", ["Ray Train workers,", "DeepSpeed ZeRO 0 to 3"])
    _box(axes, (66, 33), (23, 11), WORK, "tune", ["Ray Tune, AUROC and AUPRC;", "held-out scored once"])
    _box(axes, (94, 47.5), (28, 11), MODEL, "pretrained bundle", ["safetensors, config,", "vocabulary, model card"])
    _box(
        axes,
        (94, 33),
        (28, 11),
        MODEL,
        "risk bundle and report",
        ["recalibrated; intervals over", "patients; boosting beside it"],
    )
    for start, end in [((18, 46.5), (23, 46.5)), ((40, 46.5), (45, 46.5)), ((61, 50), (66, 52)), ((61, 43), (66, 40))]:
        _arrow(axes, start, end)
    _arrow(axes, (89, 53), (94, 53))
    _arrow(axes, (89, 38.5), (94, 38.5))
    _arrow(axes, (100, 47.5), (83, 44))
    axes.text(108, 31, "predict · stream · explain · Python", fontsize=9.5, ha="center", color=INK, style="italic")


def _model(axes: Axes) -> None:
    axes.text(2, 26.5, "The model", fontsize=13, fontweight="bold", color=INK)
    axes.text(
        15.5, 26.5, "several patients packed into one row; nothing passes from one to the next", fontsize=10, color=PALE
    )
    _box(axes, (2, 5), (18, 18), DATA, "events", ["code", "value", "time", "static: sex, age, ..."])
    _box(
        axes,
        (25, 5),
        (19, 18),
        USE,
        "embedding",
        ["code +", "normalised value +", "time since start", "and since last"],
    )
    axes.add_patch(_patch((49, 5), (31, 18), WORK))
    axes.text(64.5, 20.3, "encoder", fontsize=11, fontweight="bold", ha="center", color=INK)
    for i, letter in enumerate("MMMA"):
        axes.add_patch(_patch((51.2 + 7.1 * i, 11), (5.6, 7), MODEL if letter == "M" else USE))
        axes.text(54 + 7.1 * i, 14.5, letter, fontsize=13, fontweight="bold", ha="center", va="center", color=INK)
    axes.text(64.5, 7, "M: Mamba   A: attention in a window", fontsize=9.5, ha="center", color=INK)
    _box(axes, (85, 5), (17, 18), USE, "pooling", ["one vector", "for each patient", "+ static features"])
    _box(axes, (107, 5), (15, 18), MODEL, "heads", ["hidden events", "forecasts", "risks, days"])
    for x in (20, 44, 80, 102):
        _arrow(axes, (x, 14), (x + 5, 14))


def _box(axes: Axes, corner: Point, size: Point, colour: str, title: str, lines: list[str]) -> None:
    axes.add_patch(_patch(corner, size, colour))
    x, top = corner[0] + size[0] / 2, corner[1] + size[1]
    axes.text(x, top - 2.7, title, fontsize=11, fontweight="bold", ha="center", color=INK)
    for i, line in enumerate(lines):
        axes.text(x, top - 5.9 - 2.6 * i, line, fontsize=9.5, ha="center", color=INK)


def _patch(corner: Point, size: Point, colour: str) -> FancyBboxPatch:
    return FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=1", facecolor=colour, edgecolor=PALE)


def _arrow(axes: Axes, start: Point, end: Point) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.4})


if __name__ == "__main__":
    main()
