"""What a search records: the scores of each task and its trials, as plain values, in results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from hymate.config import TaskConfig
from hymate.data.examples import Examples
from hymate.data.tasks import LabelSet
from hymate.evaluation import metrics
from hymate.evaluation.decisions import ENOUGH_POSITIVES, ENOUGH_SUBJECTS
from hymate.storage.paths import Location, write_text

RESULTS = "results.json"
COUNTS = ("num_labels", "num_positives", "num_subjects", "num_positive_subjects", "prevalence")
SCORES = (*COUNTS, *metrics.SHOWN, "days", "integrated_brier", "concordance")
NO_HELD_OUT = (
    "there are no held-out labels: these scores are of the tuning split, which also chose and recalibrated the model, "
    "so they are too good"
)
Status = Literal["finished", "stopped early", "failed"]


@dataclass(frozen=True)
class TrialEnd:
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
        **label_set.summary(),
        "competing_rule": task.competing_rule,
        "censoring_rule": task.censoring_rule,
        **({"competing": task.competing} if task.in_time else {}),
        "splits": {split: sizes(part) for split, part in examples.items()},
    }


def sizes(examples: Examples) -> dict[str, int]:
    """Of the labels of one task."""
    return {
        "labels": len(examples),
        "positives": int((examples.label_E == 1).sum()),
        "subjects": len(set(examples.subject_id_E.tolist())),
        **examples.dropped,
    }


def collect(parts: Sequence[dict[str, Any]], metric: str, ends: Sequence[TrialEnd], best: TrialEnd) -> dict[str, Any]:
    """The content of results.json: each task's part, several as a list under "tasks", and the trials."""
    return (parts[0] if len(parts) == 1 else {"tasks": list(parts)}) | {
        "metric": metric,
        "best_trial": best.index,
        "trials": [
            {**asdict(end), "checkpoint": None if end.checkpoint is None else str(end.checkpoint)} for end in ends
        ],
    }


# where a task's part has the scores of models beside its own, and what they are called
OTHERS = {
    "network": "network alone",
    "plain": "plain models alone",
    "boosting": "gradient boosting",
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


def thresholds_of(found: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """Each task's aimed specificities with their thresholds, for the bundle."""
    return {
        part["task"]: [[point["aim"], point["threshold"]] for point in part["operating_points"]]
        for part in parts_of(found)
        if "operating_points" in part
    }


def policies_of(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Each task's alarm policy (`hymate.evaluation.alarms.Policy`), for the bundle."""
    return {part["task"]: part["alarms"]["model"]["policy"] for part in parts_of(found) if "alarms" in part}


def predictions_file(task: str, tasks: Sequence[str]) -> str:
    """Where a run keeps a task's predictions: the MEDS prediction schema is for one task."""
    return "predictions.parquet" if len(tasks) == 1 else f"predictions/{task}.parquet"


def write(found: Mapping[str, Any], run_path: Location) -> None:
    """results.json, whose presence means that the run is finished."""
    write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", run_path / RESULTS)


def read(run_path: Location) -> dict[str, Any] | None:
    """results.json of a finished run, else None."""
    path = run_path / RESULTS
    return json.loads(path.read_text()) if path.exists() else None
