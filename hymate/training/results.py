"""What a search ends in: results.json, report.md and the tables on the console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hymate.config import TaskConfig
from hymate.data.loader import Examples
from hymate.data.meds import write_text
from hymate.data.tasks import LabelSet

RESULTS, REPORT = "results.json", "report.md"
# Below these an AUROC's interval is so wide that the number says next to nothing.
ENOUGH_POSITIVES, ENOUGH_SUBJECTS = 100, 200
TABLE_WIDTH = 130  # of a stream that is no terminal

MEANING = {
    "triggers": "times at which the task's trigger occurs",
    "excluded": "its windows do not hold there",
    "died_in_hospital": "death at or before the prediction time: not at risk, no label",
    "competing_deaths": "death inside the label window without the event: {rule}",
    "censored": "the record ends inside the label window without the event: no label",
    "labels": "labels",
    "positives": "positive labels",
    "subjects": "subjects with a label",
}
LIMITS = """\
Not a medical device. The model knows the codes, units and practices of the dataset it was trained on: on another
site's data look at the share of unknown codes that prediction prints, and validate locally before any use."""
Status = Literal["finished", "stopped early", "failed"]
COMPETING = {"negative": "a negative label", "exclude": "no label"}


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. best: scores on the tuning split of its best checkpoint, and their step; may be empty."""

    index: int
    parameters: dict[str, Any]
    status: Status
    step: int | None
    best: dict[str, float]
    checkpoint: Path | None
    error: str | None


def collect(
    task: TaskConfig,
    scores: Mapping[str, Any],
    label_set: LabelSet,
    examples: Mapping[str, Examples],
    metric: str,
    outcomes: Sequence[Outcome],
    best: Outcome,
) -> dict[str, Any]:
    """The content of results.json. scores: `metrics.scores` on the held-out split."""
    found = {"task": task.name, "split": "held_out", **scores}
    positives = round((scores["prevalence"] or 0) * scores["num_labels"])
    if positives < ENOUGH_POSITIVES or scores["num_subjects"] < ENOUGH_SUBJECTS:
        found["note"] = (
            f"{positives} positive labels and {scores['num_subjects']} subjects are too few for the AUROC to mean "
            f"anything: at least {ENOUGH_POSITIVES} and {ENOUGH_SUBJECTS} are needed"
        )
    return found | {
        "labels": label_set.counts,
        "competing_rule": task.competing_rule,
        "splits": {split: _sizes(part) for split, part in examples.items()},
        "metric": metric,
        "best_trial": best.index,
        "trials": [
            {**asdict(outcome), "checkpoint": None if outcome.checkpoint is None else str(outcome.checkpoint)}
            for outcome in outcomes
        ],
    }


def _sizes(examples: Examples) -> dict[str, int]:
    return {
        "labels": len(examples),
        "positives": int((examples.label_E > 0.5).sum()),
        "subjects": len(set(examples.subject_id_E.tolist())),
        **examples.dropped,
    }


def write(found: Mapping[str, Any], run_path: Path) -> None:
    """report.md, then results.json, whose presence means that the run is finished."""
    write_text(report(found), run_path / REPORT)
    write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", run_path / RESULTS)


def read(run_path: Path) -> dict[str, Any] | None:
    """results.json of a finished run, else None."""
    path = run_path / RESULTS
    return json.loads(path.read_text()) if path.exists() else None


# ------------------------------------------------------------------------------------------------------ showing


def show(found: Mapping[str, Any], run_path: Path) -> None:
    """The trials and the scores as tables, and where everything is."""
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    for title, rows in (("Trials (scores on the tuning split)", trial_rows(found)), (_title(found), score_rows(found))):
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for name in rows[0]:
            table.add_column(name, overflow="fold")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    if "note" in found:
        console.print(f"Note: {found['note']}", highlight=False)
    for name, text in (
        ("results", run_path / RESULTS),
        ("report", run_path / REPORT),
        ("predictions", run_path / "predictions.parquet"),
        ("bundle", found["bundle"]),
        ("curves", f"tensorboard --logdir {run_path / 'tb'}"),
    ):
        console.print(f"{name:<12} {text}", highlight=False, soft_wrap=True)


def report(found: Mapping[str, Any]) -> str:
    """report.md."""
    return f"# {_title(found)}\n\n{card(found)}"


def card(found: Mapping[str, Any]) -> str:
    """What report.md and the bundle's model card say."""
    scores, splits = score_rows(found), split_rows(found)
    parts = [
        "Intervals are 95 %, from a bootstrap over patients. The held-out split was scored once, by the checkpoint "
        f"that was best on the tuning split ({_criterion(found)}).",
        _markdown(scores),
    ]
    if "note" in found:
        parts.append(f"**Note:** {found['note']}.")
    parts += ["## Labels", _markdown(splits)]
    if "triggers" in found["labels"]:
        rule = COMPETING[found["competing_rule"]]
        rows = [["count", "what"]]
        rows += [
            [str(found["labels"][k]), text.format(rule=rule)] for k, text in MEANING.items() if k in found["labels"]
        ]
        parts += ["All splits, how the labels came about:", _markdown(rows)]
    parts += ["## Trials", _markdown(trial_rows(found))]
    failed = [t for t in found["trials"] if t["error"]]
    parts += [f"- trial {t['index']} failed: {t['error']}" for t in failed]
    parts += ["## Limits", LIMITS]
    return "\n\n".join(parts) + "\n"


def score_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and the line of the held-out scores; of a synthetic cohort also what its law makes possible."""
    rows = [
        ["split", "labels", "subjects", "prevalence", "AUROC [95 % CI]", "AUPRC [95 % CI]", "Brier", "ECE"],
        [
            found["split"],
            str(found["num_labels"]),
            str(found["num_subjects"]),
            _number(found["prevalence"]),
            _with_interval(found["auroc"]),
            _with_interval(found["auprc"]),
            _number(found["brier"]),
            _number(found["ece"]),
        ],
    ]
    if "ceiling" in found:
        best = [_number(found["ceiling"][name]) for name in ("auroc", "auprc", "brier")]
        rows.append(["best possible", "", "", "", *best, ""])
    return rows


def split_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and a line for each split's usable labels."""
    rows = [["split", "labels", "positives", "subjects", "without events before"]]
    for split, sizes in found["splits"].items():
        keys = ("labels", "positives", "subjects", "without_events")
        rows.append([split, *(str(sizes.get(key, 0)) for key in keys)])
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
                *(_number(best.get(name)) for name in ("mean", "auroc", "auprc")),
                *(_parameter(trial["parameters"][name]) for name in names),
            ]
        )
    return rows


def _title(found: Mapping[str, Any]) -> str:
    return f"Task {found['task']}: risk model on the {found['split']} split"


def _criterion(found: Mapping[str, Any]) -> str:
    return "mean of AUROC and AUPRC" if found["metric"] == "mean" else found["metric"].upper()


def _with_interval(score: Mapping[str, Any]) -> str:
    if score["value"] is None or score["ci"] is None:
        return _number(score["value"])
    low, high = score["ci"]
    return f"{score['value']:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _parameter(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
