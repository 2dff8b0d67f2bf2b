"""Command: gradient boosting and other plain models, on aggregate features of the same histories and labels.

    python -m hymate.baselines data.path=DATA_DIR task=mortality out=DIR

Trains on the train split, chooses on the tuning split (the number of trees, or the strength of logistic regression's
penalty), recalibrates the probabilities there as a search does, and scores the held-out split once (labels without
held-out patients are scored on the tuning split, with a note). `out` then holds results.json (the scores of
`hymate.evaluation.metrics`, what was chosen, the importance of variables and features), predictions.parquet (the MEDS
prediction schema) and run.json (the settings).

Shape legend: E examples, X features (see `hymate.data.features`), M marks of what is missing.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from hymate import scripts

    scripts.command("baselines")

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hymate.config import DataPath, Place, TaskConfig, not_negative
from hymate.data.examples import Examples, examples_by_split
from hymate.data.features import FeatureConfig
from hymate.data.histories import Histories
from hymate.data.meds import write_parquet
from hymate.data.synthetic.source import ceiling
from hymate.data.tasks import LabelSet, read_or_extract_labels
from hymate.evaluation import metrics, tables
from hymate.evaluation.baseline_fits import FEATURES, fitted_to, recalibrated
from hymate.evaluation.baseline_models import Kind, lightgbm
from hymate.evaluation.report import score_rows
from hymate.evaluation.results import NO_HELD_OUT, RESULTS, sizes
from hymate.inference.predictions import prediction_table
from hymate.runs import RECORD, claimed
from hymate.storage.paths import Location, locate, require_folder, write_text


@dataclass(frozen=True)
class BaselinesConfig:
    """`python -m hymate.baselines`'s configuration.

    out: folder of the results.
    baseline: the classifier of the features.
    seed: of the trees' column and row samples and of the importance.
    features: aggregates of each variable before the prediction time.
    """

    data: DataPath
    task: TaskConfig
    out: Place
    baseline: Kind = "gradient_boosting"
    seed: int = 0
    features: FeatureConfig = field(default_factory=FeatureConfig)

    def __post_init__(self) -> None:
        not_negative(self, "seed")
        self.task.require_whether("a baseline")


def run(config: BaselinesConfig) -> None:
    if config.baseline == "lightgbm":
        lightgbm()
    root, out = locate(config.data.path), locate(config.out)
    require_folder(out, "out")
    histories = Histories.open(root)
    label_set = read_or_extract_labels(root, config.task)
    # held-out patients without a label are a mistake in the labels; a dataset may have no held-out patients
    needs_held_out = "held_out" in histories.splits
    examples = examples_by_split(histories, config.task, label_set.table, needs_held_out)
    if not needs_held_out:
        del examples["held_out"]
    (out / RECORD).unlink(missing_ok=True)  # each run is a new one
    inputs = {"data.path": histories.fingerprint, "task.labels": label_set.digest()}
    with claimed(out, "baselines", config, inputs) as run:
        found = _scored(config, histories, label_set, examples)
        write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", out / RESULTS)
        run.found.update({name: found[name]["value"] for name in ("auroc", "auprc")})
    _show(found, out)


def _scored(
    config: BaselinesConfig, histories: Histories, label_set: LabelSet, examples: Mapping[str, Examples]
) -> dict[str, Any]:
    """The content of results.json; the predictions are in the folder."""
    root, out = locate(config.data.path), locate(config.out)
    scored = "held_out" if "held_out" in examples else "tuning"
    asked = config.baseline, histories, examples, config.features, config.seed, out / FEATURES
    fitted = fitted_to(*asked, important=True)
    probability, recalibration = recalibrated(fitted, examples, scored)
    scores = {
        split: metrics.scores(examples[split].label_E, p_E, examples[split].subject_id_E, examples[split].weight_E)
        for split, p_E in probability.items()
    }
    write_parquet(prediction_table(examples[scored], probability[scored]), out / "predictions.parquet")
    found = {
        "task": config.task.name,
        "baseline": config.baseline,
        "split": scored,
        "note": NO_HELD_OUT if scored == "tuning" else None,
        **scores[scored],
        # of the labels that it was recalibrated on a calibration error would say nothing
        "tuning": {"task": config.task.name, "split": "tuning", **scores["tuning"], "ece": None},
        "recalibration": recalibration,
        **fitted.summary(),
        "importance": fitted.importance,
        **label_set.summary(),
        "splits": {split: sizes(part) for split, part in examples.items()},
    }
    if (best := ceiling(root, config.task.name, scored)) is not None:
        found["ceiling"] = best
    return found


def _show(found: dict[str, Any], out: Location) -> None:
    title = f"Task {found['task']}: {found['baseline'].replace('_', ' ')} on {found['num_features']} aggregate features"
    (header, tuning), (_, *rows) = score_rows(found["tuning"]), score_rows(found)
    tables.show(title, [header, *([] if found["split"] == "tuning" else [tuning]), *rows])
    if found["note"]:
        print(f"Note: {found['note']}")
    for name, value in found["chosen"].items():
        print(f"chosen on the tuning split: {name} {value:g}")
    top = ", ".join(f"{name} {fall:.3f}" for name, fall in list(found["importance"]["variables"].items())[:5])
    print(f"AUROC falls by, if a variable's values are shuffled among patients: {top}")
    for name, file in (("results", RESULTS), ("predictions", "predictions.parquet")):
        print(f"{name:<12} {out / file}", flush=True)
