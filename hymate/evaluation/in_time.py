"""The report of a task in time: `survival.scores` in sentences and tables.

`part`: what results.json holds of the task: `hymate.evaluation.results.of_task` with `survival.scores`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hymate.evaluation.metrics import AREAS
from hymate.evaluation.tables import duration, markdown, number, percent, percent_with_interval, with_interval

PICTURE_ALT = "predicted and observed incidence by risk group, calibration by each horizon"
AS_LEARNED = "Risks in time are as they were learned: they are not recalibrated."
NO_BOOSTING = "there is no gradient boosting for tasks in time"
HORIZONS = """\
By each horizon: the observed incidence is the Aalen-Johansen estimate; "lost" are those whose record or label window
ends before, with neither event. They count for as long as they were seen: the others are weighed by one over their
probability of being followed so far (but not in concordance). That is right where leaving does not depend on the risk.
Who had the competing event is a negative. AUROC is the dynamic one. The integrated Brier score is the mean over time up
to the last horizon; concordance is the chance that of two patients the one who has the event first has the higher risk,
where it is known who. A dash: nobody is followed so far, or there is one outcome only."""
GROUPS = "Thirds of the predictions by the risk at the last horizon: predicted and observed incidence."
MEANING = {
    "triggers": "times at which the task's trigger occurs",
    "excluded": "a window's condition does not hold there, or nothing is left to predict",
    "died_before": "the competing event came at or before the prediction time: not at risk, no label",
    "competing_deaths": "the competing event came first",
    "censored": "record or label window ends before either event and the last horizon: labelled as seen so far",
    "labels": "labels",
    "positives": "the event came first, by the last horizon",
    "subjects": "subjects with a label",
}


def is_in_time(part: Mapping[str, Any]) -> bool:
    """Whether a part of results.json is of a task in time."""
    return "horizons" in part


def verdict(part: Mapping[str, Any]) -> str:
    """How good the model is and whether its risks are right, in a few sentences (Markdown)."""
    of_split = "held-out " if part["split"] == "held_out" else ""
    followed = [row for row in part["horizons"] if row["num_labels"]]
    last, competing = followed[-1], ""
    if part["competing"] is not None:
        competing = f"; {part['competing']} comes first in {percent_with_interval(last['competing']['observed'])}"
    areas = ", ".join(f"{with_interval(row['auroc'])} by {duration(row['days'])}" for row in followed)
    fits = ((row["calibration"], duration(row["days"])) for row in followed)
    beyond = "".join(
        f" Nobody is followed to {duration(row['days'])}, so what comes by then is not known."
        for row in part["horizons"]
        if row not in followed
    )
    risks = ", ".join(
        f"{percent(fit['predicted'])} by {days} ({percent_with_interval(fit['observed'])} observed)"
        for fit, days in fits
    )
    brier = f" The integrated Brier score is {number(part['integrated_brier'])}; 0 is best." if not beyond else ""
    sentences = {
        "How good.": (
            f"Of {part['num_labels']:,} {of_split}predictions for {part['num_subjects']:,} patients {last['lost']:,} "
            f"were lost before {duration(last['days'])}. By then the event comes in "
            f"{percent_with_interval(last['calibration']['observed'])}{competing}. AUROC is {areas}: the chance that "
            "who has had the event by then has a higher risk than who has not; guessing gives 0.5. Concordance is "
            f"{with_interval(part['concordance'])}.{beyond}"
        ),
        "Would gradient boosting do?": f"Not compared: {NO_BOOSTING}.",
        "Probabilities.": f"The mean predicted incidence is {risks}.{brier}",
    }
    return "\n".join(f"- **{name}** {text}" for name, text in sentences.items())


def score_cells(part: Mapping[str, Any]) -> list[list[str]]:
    """Of each horizon, as `report.score_rows` has them after the task."""
    rows = []
    for row in part["horizons"]:
        sizes = [str(row["num_labels"]), str(row["num_subjects"]), number(row["prevalence"])]
        areas = (with_interval(row[name]) for name in AREAS)
        split = f"{part['split']}, {duration(row['days'])}"
        rows.append([split, *sizes, *areas, number(row["brier"]), number(row["ece"])])
    return rows


def sections(part: Mapping[str, Any]) -> list[str]:
    """Tables, as Markdown parts."""
    parts = ["## Horizons", HORIZONS, markdown(horizon_rows(part))]
    parts.append(
        f"Integrated Brier score {number(part['integrated_brier'])}, concordance {with_interval(part['concordance'])}."
    )
    if part["competing"] is not None:
        rows = [["by", f"{part['competing']} first, observed", "predicted"]]
        for row in part["horizons"]:
            fit = row["competing"]
            rows.append([duration(row["days"]), percent_with_interval(fit["observed"]), percent(fit["predicted"])])
        parts += ["## Competing event", markdown(rows)]
    pairs_of = [f"{what} by {duration(row['days'])}" for row in part["horizons"] for what in ("predicted", "observed")]
    rows = [["group", "labels", *pairs_of]]
    for group in part["groups"]:
        pairs = zip(group["predicted"], group["observed"], strict=True)
        cells = [text for predicted, seen in pairs for text in (percent(predicted), percent_with_interval(seen))]
        rows.append([group["group"], f"{group['labels']:,}", *cells])
    return [*parts, "## Risk groups", GROUPS, markdown(rows)]


def horizon_rows(part: Mapping[str, Any]) -> list[list[str]]:
    """A header and a line for each horizon."""
    rows = [["by", "lost", "observed incidence", "predicted", "AUROC [95 % CI]", "Brier", "ECE", "by chance", "slope"]]
    for row in part["horizons"]:
        fit = row["calibration"]
        shown = percent_with_interval(fit["observed"]), percent(fit["predicted"]), with_interval(row["auroc"])
        errors = number(row["brier"]), number(fit["ece"]), number(fit["by_chance"]), with_interval(fit["slope"])
        rows.append([duration(row["days"]), f"{row['lost']:,}", *shown, *errors])
    return rows
