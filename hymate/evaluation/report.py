"""Search results: results.json, report.md and the tables on the console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hymate.config import TaskConfig
from hymate.data.examples import Examples
from hymate.data.tasks import LabelSet, unmatched
from hymate.evaluation.decisions import ENOUGH_POSITIVES, ENOUGH_SUBJECTS
from hymate.evaluation.metrics import AREAS
from hymate.evaluation.tables import markdown, new_console, number, with_interval
from hymate.evaluation.verdict import sections, verdict
from hymate.inference.provenance import SENTENCES
from hymate.storage.paths import Location, write_text

RESULTS, REPORT = "results.json", "report.md"

SCORES = (
    "num_labels",
    "num_positives",
    "num_subjects",
    "num_positive_subjects",
    "prevalence",
    "auroc",
    "auprc",
    "brier",
    "ece",
    "days",
)
DAYS = """\
How long it lasts, in days. "Of the median" is the error of the best constant, which a useful model must beat;
concordance is the chance that of two durations the longer one is predicted to be longer."""
WEIGHTED = (
    "labels count by their weights, {lowest:.2f} to {highest:.2f}, in training and in every score here; a tool without "
    "weights finds other numbers for the same predictions"
)
MEANING = {
    "triggers": "times at which the task's trigger occurs",
    "excluded": "a window's condition does not hold there, or nothing is left to predict",
    "died_in_hospital": "death at or before the prediction time: not at risk, no label",
    "competing_deaths": "death inside the label window without the event: {rule}",
    "censored": "the record ends inside the label window, without a death there: no label{censoring}",
    "positives_unseen": "with the event, and the record ends inside the label window: {unseen}",
    "labels": "labels",
    "positives": "positive labels",
    "subjects": "subjects with a label",
}
LIMITS = """\
Not a medical device. The model knows the codes, units and practices of the dataset it was trained on. On another
site's data, look at the fraction of unknown codes that `predict` prints, and validate locally before any use."""
NO_HELD_OUT = (
    "there are no held-out labels: these scores are of the tuning split, which also chose and recalibrated the model, "
    "so they are too good"
)
Status = Literal["finished", "stopped early", "failed"]
CENSORING = {
    "exclude": (", with the event or without", "no label"),
    "exclude_negatives": (", where the event was not seen", "a positive label, so positives are too frequent"),
    "weights": (
        ", where the event was not seen",
        "a positive label; labels weigh one over their probability of being seen, in all scores here but not in other "
        "tools",
    ),
}
COMPETING = {"negative": "a negative label", "exclude": "no label"}


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. best: scores on the tuning split of its best checkpoint, and their step; may be empty."""

    index: int
    parameters: dict[str, Any]
    status: Status
    step: int | None
    best: dict[str, float]
    checkpoint: Location | None
    error: str | None


def of_task(
    task: TaskConfig, scores: Mapping[str, Any], label_set: LabelSet, examples: Mapping[str, Examples], split: str
) -> dict[str, Any]:
    """A task's part of results.json. scores: `metrics.scores` on `split`, held_out unless that has no labels."""
    found = {"task": task.name, "split": split, **scores}
    positive, everyone = scores["num_positive_subjects"], scores["num_subjects"]
    counts = (positive, ENOUGH_POSITIVES, " with a positive label"), (everyone, ENOUGH_SUBJECTS, "")
    few = [f"only {n} patients{which} ({enough} are needed)" for n, enough, which in counts if n < enough]
    notes = [NO_HELD_OUT] if split != "held_out" else []
    notes += [f"too few to judge the AUROC: {', '.join(few)}"] if few else []
    if notes:
        found["note"] = "; ".join(notes)
    weight_E = np.concatenate([part.weight_E for part in examples.values()])
    if (weight_E != 1).any():
        found["weights"] = {"lowest": float(weight_E.min()), "highest": float(weight_E.max())}
    return found | {
        "labels": label_set.counts,
        "label_details": label_set.details,
        "competing_rule": task.competing_rule,
        "censoring_rule": task.censoring_rule,
        "splits": {split: _sizes(part) for split, part in examples.items()},
    }


def collect(parts: Sequence[dict[str, Any]], metric: str, outcomes: Sequence[Outcome], best: Outcome) -> dict[str, Any]:
    """The content of results.json: each task's part, several as a list under "tasks", and the trials."""
    return (parts[0] if len(parts) == 1 else {"tasks": list(parts)}) | {
        "metric": metric,
        "best_trial": best.index,
        "trials": [
            {**asdict(outcome), "checkpoint": None if outcome.checkpoint is None else str(outcome.checkpoint)}
            for outcome in outcomes
        ],
    }


def parts_of(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Each task's part, from `of_task`."""
    return list(found.get("tasks", [found]))


def scores_of(found: Mapping[str, Any], split: str) -> dict[str, Any]:
    """The scores in results.json that are of a split, for the bundle; of several tasks by their names."""
    scores = {
        part["task"]: {name: part[name] for name in SCORES if name in part}
        for part in parts_of(found)
        if part["split"] == split
    }
    return scores if "tasks" in found else scores.get(found["task"], {})


def predictions_file(task: str, tasks: Sequence[str]) -> str:
    """Where a run keeps a task's predictions: the MEDS prediction schema is for one task."""
    return "predictions.parquet" if len(tasks) == 1 else f"predictions/{task}.parquet"


def _sizes(examples: Examples) -> dict[str, int]:
    return {
        "labels": len(examples),
        "positives": int((examples.label_E > 0.5).sum()),
        "subjects": len(set(examples.subject_id_E.tolist())),
        **examples.dropped,
    }


def write(found: Mapping[str, Any], run_path: Location) -> None:
    """report.md, then results.json, whose presence means that the run is finished."""
    write_text(report(found), run_path / REPORT)
    write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", run_path / RESULTS)


def read(run_path: Location) -> dict[str, Any] | None:
    """results.json of a finished run, else None."""
    path = run_path / RESULTS
    return json.loads(path.read_text()) if path.exists() else None


# ------------------------------------------------------------------------------------------------------ showing


def show(found: Mapping[str, Any], run_path: Location) -> None:
    """The trials and the scores as tables, and where everything is."""
    console = new_console()
    for title, rows in (
        ("Trials (scores on the tuning split)", trial_rows(found)),
        (_title(found), score_rows(found)),
        ("Predicted days", day_rows(found)),
    ):
        if len(rows) == 1:
            continue
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for name in rows[0]:
            table.add_column(name, overflow="fold")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for note in notes(found):
        console.print(f"Note: {note}", highlight=False)
    for name, text in (
        ("results", run_path / RESULTS),
        ("report", run_path / REPORT),
        ("predictions", run_path / ("predictions" if "tasks" in found else "predictions.parquet")),
        ("bundle", found["bundle"]),
        ("curves", f"tensorboard --logdir {run_path / 'tb'}"),
    ):
        console.print(f"{name:<12} {text}", highlight=False, soft_wrap=True)


def report(found: Mapping[str, Any]) -> str:
    """report.md: the verdict, a picture of each task where there is one, and what is behind them."""
    alt = "ROC, precision-recall, calibration, decision curve"
    drawn = [f"![{alt}]({part['picture']})" for part in parts_of(found) if part["picture"]]
    return "\n\n".join([f"# {_title(found)}", *_verdict(found), *drawn, *_details(found)]) + "\n"


def card(found: Mapping[str, Any]) -> str:
    """The bundle's model card."""
    return "\n\n".join([*_verdict(found), *_details(found)]) + "\n"


def _verdict(found: Mapping[str, Any]) -> list[str]:
    parts = [f"**Note:** {note}." for note in notes(found)]
    for part in parts_of(found):
        if part["split"] == "held_out":
            parts += [*_task_column(found, f"**{part['task']}**"), verdict(part)]
    return parts


def _details(found: Mapping[str, Any]) -> list[str]:
    """Markdown parts; how the numbers came about, and tables."""
    days = day_rows(found)
    parts = [
        "## Scores",
        "Intervals are 95 %. Those of proportions are Wilson's, over patients (Kish's effective number, where patients "
        f"have unequal numbers of labels); the others resample patients. {_scored_once(found)} by the checkpoint that "
        f"was best on the tuning split ({_criterion(found)}), after its logits were recalibrated on the tuning split. "
        "So were gradient boosting's:",
        markdown(recalibration_rows(found)),
        markdown(score_rows(found)),
    ]
    if found["initial_weights"] == "same split":
        parts.append(f"Here {SENTENCES['same split']}.")
    if len(days) > 1:
        parts += [DAYS, markdown(days)]
    for part in parts_of(found):
        if part["split"] == "held_out":
            parts += [*_task_column(found, f"# {part['task']}"), *sections(part)]
    parts += ["## Labels", markdown(split_rows(found))]
    for part in parts_of(found):
        if "triggers" in part["labels"]:
            of_task = f" of {part['task']}" if "tasks" in found else ""
            rule, (censoring, unseen) = COMPETING[part["competing_rule"]], CENSORING[part["censoring_rule"]]
            rows = [["count", "what"]]
            rows += [
                [str(part["labels"][k]), text.format(rule=rule, censoring=censoring, unseen=unseen)]
                for k, text in MEANING.items()
                if k in part["labels"]
            ]
            parts += [f"How the labels{of_task} came about, in all splits:", markdown(rows)]
            parts += _label_details(part.get("label_details", {}))
    if found.get("known"):
        moved = "\n".join(f"- {sentence}" for sentence in found["known"])
        parts += [f"Some events became known later than their stamp. Histories hold them at that time:\n\n{moved}"]
    parts += ["## Trials", markdown(trial_rows(found))]
    failed = [t for t in found["trials"] if t["error"]]
    parts += [f"- trial {t['index']} failed: {t['error']}" for t in failed]
    return [*parts, "## Limits", LIMITS]


def _label_details(details: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Sentences on what the definition's windows and predicates found."""
    sentences = []
    if any(details.get("excluded", {}).values()):
        sentences.append(f"Excluded by window: {_counted(details['excluded'])}.")
    if kinds := details.get("kinds"):
        sentences.append(f"First events in the label window by kind, also where left out: {_counted(kinds)}.")
    if matches := details.get("predicates"):
        sentences.append(f"Events that each predicate matches: {_counted(matches)}.")
        if without := {name: why for name, why in unmatched(matches).items() if name not in details.get("kinds", {})}:
            named = ", ".join(f"{name} ({why})" if why else name for name, why in without.items())
            sentences.append(f"**No event matches {named}: check the codes.**")
    return sentences


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if not name.startswith("_"))


def recalibration_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and lines for each task: each model's temperature and shift, its calibration error before and after."""
    rows = [[*_task_column(found, "task"), "logits of", "temperature", "shift", "ECE before", "after"]]
    for part in parts_of(found):
        boosting = part["boosting"] or {}
        for name, model in (("model", part), ("gradient boosting", boosting)):
            if "recalibration" in model:
                fitted = model["recalibration"]
                changes = f"{fitted['temperature']:.2f}", f"{fitted['shift']:+.2f}"
                errors = number(fitted["ece_before"]), number(model["ece"])
                rows.append([*_task_column(found, part["task"]), name, *changes, *errors])
    return rows


def score_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and a line for each task's held-out scores; below it boosting's and the difference, where it was fitted,
    and of a synthetic cohort what its law makes possible.
    """
    header = ["split", "labels", "subjects", "prevalence", "AUROC [95 % CI]", "AUPRC [95 % CI]", "Brier", "ECE"]
    rows = [_task_column(found, "task") + header]
    for part in parts_of(found):
        rows.append(
            [
                *_task_column(found, part["task"]),
                part["split"],
                str(part["num_labels"]),
                str(part["num_subjects"]),
                number(part["prevalence"]),
                with_interval(part["auroc"]),
                with_interval(part["auprc"]),
                number(part["brier"]),
                number(part["ece"]),
            ]
        )
        boosting = part.get("boosting") or {}
        if "difference" in boosting:
            areas = [with_interval(boosting[name]) for name in AREAS]
            others = [number(boosting[name]) for name in ("brier", "ece")]
            rows.append([*_task_column(found, ""), "gradient boosting", "", "", "", *areas, *others])
            differences = [with_interval(boosting["difference"][name]) for name in AREAS]
            rows.append([*_task_column(found, ""), "difference [97.5 % CI]", "", "", "", *differences, "", ""])
        if "ceiling" in part:
            best = [number(part["ceiling"][name]) for name in ("auroc", "auprc", "brier")]
            rows.append([*_task_column(found, ""), "best possible", "", "", "", *best, ""])
    return rows


def day_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and a line for each task that predicts days."""
    rows = [["task", "labels", "mean absolute error [95 % CI]", "of the median", "concordance [95 % CI]"]]
    for part in parts_of(found):
        if "days" in part:
            days = part["days"]
            scores = [with_interval(days["mae"]), number(days["mae_of_median"]), with_interval(days["concordance"])]
            rows.append([part["task"], str(days["num_labels"]), *scores])
    return rows


def notes(found: Mapping[str, Any]) -> list[str]:
    """Sentences that a reader of the scores must know."""
    initial = found.get("initial_weights", "new")  # results of before do not say
    sentences = [] if initial in ("new", "same split") else [SENTENCES[initial]]
    for part in parts_of(found):
        of_part = [part["note"]] if "note" in part else []
        if "weights" in part:
            of_part.append(WEIGHTED.format(**part["weights"]))
        sentences += [": ".join([*_task_column(found, part["task"]), sentence]) for sentence in of_part]
    return sentences


def split_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and a line for each split's usable labels."""
    rows = [[*_task_column(found, "task"), "split", "labels", "positives", "subjects", "without events before"]]
    for part in parts_of(found):
        for split, sizes in part["splits"].items():
            keys = ("labels", "positives", "subjects", "without_events")
            rows.append([*_task_column(found, part["task"]), split, *(str(sizes.get(key, 0)) for key in keys)])
    return rows


def trial_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and a line for each trial, the best first; of the parameters those that vary."""
    metric = found["metric"]
    order = sorted(found["trials"], key=lambda trial: -trial["best"].get(metric, -1.0))
    names = [name for name in order[0]["parameters"] if len({str(t["parameters"][name]) for t in order}) > 1]
    rows = [["trial", "status", "steps", "best at", "mean", "auroc", "auprc", *names]]
    for trial in order:
        mark = " *" if trial["index"] == found["best_trial"] else ""
        best = trial["best"]
        rows.append(
            [
                f"{trial['index']}{mark}",
                trial["status"],
                str(trial["step"] or 0),
                str(best.get("step", "-")),
                *(number(best.get(name)) for name in ("mean", "auroc", "auprc")),
                *(_parameter(trial["parameters"][name]) for name in names),
            ]
        )
    return rows


def _title(found: Mapping[str, Any]) -> str:
    parts = parts_of(found)
    splits = " or ".join(sorted({part["split"] for part in parts}))
    return f"Task{'s' * (len(parts) > 1)} {', '.join(part['task'] for part in parts)}: risk model on the {splits} split"


def _scored_once(found: Mapping[str, Any]) -> str:
    held_out = any(part["split"] == "held_out" for part in parts_of(found))
    return "The held-out split was scored once," if held_out else "The tuning split was scored"


def _criterion(found: Mapping[str, Any]) -> str:
    parts = parts_of(found)
    scores = "AUROC, AUPRC and, for days, concordance" if any("days" in part for part in parts) else "AUROC and AUPRC"
    metric = f"mean of {scores}" if found["metric"] == "mean" else found["metric"].upper()
    return f"{metric}, averaged over the tasks" if len(parts) > 1 else metric


def _task_column(found: Mapping[str, Any], text: str) -> list[str]:
    return [text] if "tasks" in found else []


def _parameter(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
