"""The report of a finished model on other data: `hymate.evaluate`'s results.json in sentences and tables.

`found` is the content of results.json. "models" has for each name what `metrics.scores` and `decisions.assess` found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hymate.evaluation import alarms, in_time, tables, transport
from hymate.evaluation.alarms import Policy
from hymate.evaluation.decisions import ENOUGH_POSITIVES, ENOUGH_SUBJECTS
from hymate.evaluation.metrics import AREAS, SHOWN
from hymate.evaluation.report import LIMITS, REPORT, score_cells, sections, verdict
from hymate.evaluation.results import OTHERS, RESULTS, SCORES
from hymate.evaluation.tables import markdown, number, percent, percent_with_interval, with_interval
from hymate.inference.provenance import SENTENCES
from hymate.storage.paths import Location

__all__ = [
    "AS_IT_IS",
    "RECALIBRATED",
    "REPORT",
    "learned_here",
    "policy_of",
    "report",
    "scores_before",
    "show",
    "thresholds_of",
]

AS_IT_IS, RECALIBRATED = "as it is", "recalibrated"
LEARNED_HERE = (
    "The model learned from patients of this dataset, or was chosen on them, and split={split} may hold them, so its "
    "scores may be too good. Give split=held_out of the split that it was trained on, or data that it has never seen."
)

WOULD_A_PART_DO = """\
The model is the mean of a network and plain models, which learned from the same labels. Would either alone rank these
patients as well?"""


def thresholds_of(extra: Mapping[str, Any], task: str) -> dict[float, float]:
    """Aimed specificity -> threshold, of a bundle's own report; empty where it names none."""
    return dict(extra.get("thresholds", {}).get(task, []))


def policy_of(extra: Mapping[str, Any], task: str) -> Policy | None:
    """When there is an alarm, of a bundle's own report; None where it names nothing."""
    named = extra.get("alarms", {}).get(task)
    return None if named is None else Policy(**named)


def scores_before(extra: Mapping[str, Any], task: str) -> dict[str, Any] | None:
    """A bundle's scores on its own held-out data, where it has any."""
    found = extra.get("held_out", {})
    found = found.get(task, found)
    return {name: found[name] for name in SCORES if name in found} if "auroc" in found else None


def show(found: Mapping[str, Any], out: Location) -> None:
    """Print the scores, and where everything is."""
    tables.show(_title(found), [row[:-3] for row in _score_rows(found)])  # the report has the rest
    if "parts" in found:
        tables.show("Parts of the mean", _part_rows(found))
    print(_changed(found))
    for note in _notes(found):
        print(f"Note: {note}")
    _show_files(out)


def _show_files(out: Location) -> None:
    for name, file in (("results", RESULTS), ("report", REPORT), ("predictions", "predictions.parquet")):
        print(f"{name:<12} {out / file}", flush=True)


def report(found: Mapping[str, Any]) -> str:
    """report.md."""
    parts = [f"# {_title(found)}", *(f"**Note:** {note}" for note in _notes(found))]
    parts += [f"**What changed.** {_changed(found)}", _recalibrated(found), markdown(_score_rows(found))]
    parts += [WOULD_A_PART_DO, markdown(_part_rows(found))] if "parts" in found else []
    if "days" in found:
        days = found["days"]
        parts.append(
            f"Days of {days['num_labels']:,} labels: mean absolute error {with_interval(days['mae'])}, that of the "
            f"median {number(days['mae_of_median'])}; concordance {with_interval(days['concordance'])}."
        )
    for name, judged in found["models"].items():
        picture = f"![ROC, precision-recall, calibration, decision curve]({judged['picture']})"
        parts += [f"## The model {name}", verdict(judged), picture]
        parts += [f"![{alarms.PICTURE_ALT}]({judged['alarms_picture']})"] if "alarms" in judged else []
    for name, judged in found["models"].items():
        parts += [f"## Tables: the model {name}", *(part.replace("## ", "### ", 1) for part in sections(judged))]
    return "\n\n".join([*parts, "## Limits", LIMITS]) + "\n"


def report_in_time(found: Mapping[str, Any]) -> str:
    """report.md of a task in time."""
    parts = [f"# {_title(found)}", *(f"**Note:** {note}" for note in _seen_before(found))]
    changed = transport.paragraph(found["transport"], found["horizons"][-1]["prevalence"], None)
    parts += [in_time.verdict(found), f"**What changed.** {changed}", f"![{in_time.PICTURE_ALT}]({found['picture']})"]
    return "\n\n".join([*parts, *in_time.sections(found), "## Limits", LIMITS]) + "\n"


def show_in_time(found: Mapping[str, Any], out: Location) -> None:
    """Print the scores of a task in time, and where everything is."""
    tables.show(_title(found), in_time.horizon_rows(found))
    for note in _seen_before(found):
        print(f"Note: {note}")
    _show_files(out)


def _title(found: Mapping[str, Any]) -> str:
    return f"Task {found['task']}: a finished model on split {found['split']} of {found['data']}"


def _notes(found: Mapping[str, Any]) -> list[str]:
    judged, notes = found["models"][AS_IT_IS], _seen_before(found)
    if judged["num_positive_subjects"] < ENOUGH_POSITIVES or judged["num_subjects"] < ENOUGH_SUBJECTS:
        notes.append(
            f"Too few patients to judge the AUROC: {judged['num_subjects']}, of whom {judged['num_positive_subjects']} "
            f"have a positive label ({ENOUGH_SUBJECTS} and {ENOUGH_POSITIVES} are needed)."
        )
    return notes


def learned_here(found: Mapping[str, Any]) -> bool:
    """Whether the model may have learned from the patients that are scored."""
    own = found["trained_on"]
    return own == "another split" or (own == "same split" and found["split"] != "held_out")


def _seen_before(found: Mapping[str, Any]) -> list[str]:
    own, initial = found["trained_on"], found["initial_weights"]
    if learned_here(found):
        return [LEARNED_HERE.format(split=found["split"])]
    maybe = initial in ("other data", "not known") or (initial == "another split" and own == "same split")
    return [f"{SENTENCES[initial].capitalize()}."] if maybe else []


def _changed(found: Mapping[str, Any]) -> str:
    before = found["before"] and found["before"]["prevalence"]
    return transport.paragraph(found["transport"], found["models"][AS_IT_IS]["prevalence"], before)


def _recalibrated(found: Mapping[str, Any]) -> str:
    on, num_subjects = found["recalibrated_on"], found["models"][AS_IT_IS]["num_subjects"]
    if on is None:
        return f"The model is scored as it is, on all {num_subjects:,} patients."
    return (
        f"The model was recalibrated (temperature {on['temperature']:.2f}, shift {on['shift']:+.2f}) on "
        f"{percent(on['fraction'])} of the patients, drawn at random: {on['subjects']:,} patients, {on['labels']:,} "
        f"labels, {on['positives']:,} of them positive. The other {num_subjects:,} patients are scored, by the model "
        "as it is and recalibrated. Recalibration does not change how patients are ranked."
    )


def _part_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Where the model is a mean, how its parts rank the same patients."""
    rows = [["part", "AUROC [95 % CI]", "AUPRC [95 % CI]", "mean minus this: AUROC [97.5 % CI]", "AUPRC [97.5 % CI]"]]
    for key, part in found.get("parts", {}).items():
        areas = (with_interval(scores[name]) for scores in (part, part["difference"]) for name in AREAS)
        rows.append([OTHERS[key], *areas])
    return rows


def _score_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The models here, and below them the scores on the held-out part of their own data."""
    header = ["model", "labels", "patients", "prevalence", *SHOWN.values(), "mean risk", "observed", "slope"]
    rows = [header]
    for name, judged in found["models"].items():
        fit = judged["calibration"]
        shown = percent(fit["predicted"]), percent_with_interval(fit["observed"]), with_interval(fit["slope"])
        rows.append([name, *_sizes(judged), *score_cells(judged), *shown])
    if (before := found["before"]) is not None:
        rows.append(["on its own held-out data", *_sizes(before), *score_cells(before), "", "", ""])
    return rows


def _sizes(scores: Mapping[str, Any]) -> list[str]:
    return [f"{scores['num_labels']:,}", f"{scores['num_subjects']:,}", number(scores["prevalence"])]
