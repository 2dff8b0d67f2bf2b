"""Compares the runs of a benchmark by the predictions in its folder: table, report and picture.

Shape legend: N labels that everyone is scored on, R models of a contender: one for each seed or, of cross-validation,
for each seed and fold; K areas (AUROC, AUPRC).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hymate.data.examples import Examples
from hymate.data.meds import read_parquet, write_parquet
from hymate.errors import UserError
from hymate.evaluation import figures, metrics, tables
from hymate.storage.paths import Location, write_text

REFERENCE = "gradient_boosting"  # what every contender is compared with
LOOKS = "looks.json"
Split = Literal["cross_validation", "held_out"]
Array = NDArray[Any]


@dataclass(frozen=True)
class Run:
    """One training: a contender, `budget` labels (0: all there are), a seed, and the fold that it is scored on.

    name: a baseline's or a contender's. fold: None for the held-out split.
    """

    name: str
    budget: int
    seed: int
    fold: int | None

    @property
    def stem(self) -> str:
        """What its files' names begin with."""
        scored_on = "held_out" if self.fold is None else f"fold{self.fold}"
        return f"{self.name}-{self.budget or 'all'}-seed{self.seed}-{scored_on}"

    @property
    def labels(self) -> str:
        """In words, which labels it has: the same for every contender."""
        scored_on = "" if self.fold is None else f", fold {self.fold}"
        return f"{self.budget or 'all'} labels, seed {self.seed}{scored_on}"

    def __str__(self) -> str:
        return f"{self.name} on {self.labels}"

    def results(self, folder: Location) -> Location:
        """The run's results; this file is written last, so where it is the run is complete."""
        return folder / f"{self.stem}.json"

    def predictions(self, folder: Location) -> Location:
        """Subjects, prediction times, labels, their weights and recalibrated probabilities."""
        return folder / f"{self.stem}.parquet"


def write_run(run: Run, folder: Location, test: Examples, probability_E: Array, **known: Any) -> None:
    """Write the run's predictions and its other results."""
    columns = {
        "subject_id": test.subject_id_E,
        "prediction_time": test.prediction_time_E,
        "label": test.label_E,
        "weight": test.weight_E,
        "probability": probability_E,
    }
    write_parquet(pa.table(columns), run.predictions(folder))
    write_text(json.dumps({**dataclasses.asdict(run), **known}) + "\n", run.results(folder))


@dataclass(frozen=True)
class Scored:
    """One contender's finished runs on one budget.

    known: each run's results. probability_RN: NaN where a model did not score a label because it lies in
    another fold.
    """

    known: list[dict[str, Any]]
    seeds: int
    subject_N: Array
    label_N: Array
    weight_N: Array
    probability_RN: Array


@dataclass(frozen=True)
class Comparison:
    """The runs of a folder that are compared; a seed that lacks a fold is left out."""

    folder: Location
    names: Sequence[str]
    budgets: Sequence[int]
    seeds: int
    split: Split
    folds: int
    task: str

    def read(self, name: str, budget: int) -> Scored | None:
        """Raises UserError where the seeds were not scored on the same labels."""
        folds = [None] if self.split == "held_out" else list(range(self.folds))
        seeds = [[Run(name, budget, seed, fold) for fold in folds] for seed in range(self.seeds)]
        seeds = [runs for runs in seeds if all(run.results(self.folder).is_file() for run in runs)]
        if not seeds:
            return None
        scored = [[read_parquet(run.predictions(self.folder)) for run in runs] for runs in seeds]
        labels = [_labels(tables_of_seed) for tables_of_seed in scored]
        if any(not labels[0].equals(other) for other in labels):
            raise UserError(f"{self.folder}: runs of {name} have other labels than each other: delete those files")
        probability_RN = np.concatenate([_probabilities(tables_of_seed) for tables_of_seed in scored])
        known = [json.loads(run.results(self.folder).read_text()) for runs in seeds for run in runs]
        subject_N, label_N, weight_N = (labels[0][name].to_numpy() for name in ("subject_id", "label", "weight"))
        return Scored(known, len(seeds), subject_N, label_N, weight_N, probability_RN)


def _order(folds: Sequence[pa.Table]) -> Array:
    """By subject and time: that of every seed, however its folds were drawn."""
    whole = pa.concat_tables(folds)
    return np.lexsort((whole["prediction_time"].to_numpy(), whole["subject_id"].to_numpy()))


def _labels(folds: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(folds).drop_columns("probability").take(_order(folds))


def _probabilities(folds: Sequence[pa.Table]) -> Array:
    """(folds, N)"""
    fold_N = np.repeat(np.arange(len(folds)), [len(fold) for fold in folds])
    probability_N = pa.concat_tables(folds)["probability"].to_numpy()
    return np.where(fold_N == np.arange(len(folds))[:, None], probability_N, np.nan)[:, _order(folds)]


def compare(comparison: Comparison) -> dict[str, Any]:
    """The content of the split's JSON file, from all finished runs."""
    rows = []
    for budget in comparison.budgets:
        reference = comparison.read(REFERENCE, budget)
        for name in comparison.names:
            scored = comparison.read(name, budget)
            if scored is None:
                continue
            known = scored.known
            rows.append(
                {
                    "name": name,
                    "budget": budget,
                    "fitting": known[0]["fitting"],
                    "choosing": known[0]["choosing"],
                    **_areas(scored, reference),
                    "ece": _mean_ece(scored),
                    "parameters": known[0]["parameters"],
                    "seconds": float(np.mean([run["seconds"] for run in known])),
                    "pretraining_seconds": float(np.mean([run["pretraining_seconds"] for run in known])),
                }
            )
    return {"split": comparison.split, "task": comparison.task, "rows": rows}


def _areas(scored: Scored, reference: Scored | None) -> dict[str, Any]:
    """Mean over seeds (of cross-validation: of the means over folds) and its standard deviation; intervals of the mean,
    and of its difference to the reference's, over resampled patients; the scores of the seeds' mean probability, which
    is an ensemble. Without a reference its differences are None.
    """
    label_N, weight_N, probability_RN = scored.label_N, scored.weight_N, scored.probability_RN
    other_RN = probability_RN if reference is None else reference.probability_RN
    paired = metrics.mean_difference(label_N, probability_RN, other_RN, scored.subject_N, weight_N)
    mean_N, other_mean_N = np.nanmean(probability_RN, axis=0), np.nanmean(other_RN, axis=0)
    ensemble = metrics.paired_difference(label_N, mean_N, other_mean_N, scored.subject_N, weight_N)
    unknown = {"value": None, "ci": None}
    found: dict[str, Any] = {"seeds": scored.seeds}
    for name, area in zip(metrics.AREAS, (metrics.auroc, metrics.auprc), strict=True):
        of_model = [area(label_N[at], p_N[at], weight_N[at]) for p_N in probability_RN for at in [~np.isnan(p_N)]]
        of_seed = np.array(of_model, dtype=float).reshape(scored.seeds, -1).mean(axis=1)
        found[name] = {
            "mean": float(of_seed.mean()),
            "sd": float(of_seed.std(ddof=1)) if scored.seeds > 1 else None,
            "ci": paired[name]["ci"],
            "difference": unknown if reference is None else paired[name]["difference"],
            "ensemble": area(label_N, mean_N, weight_N),
            "ensemble_difference": unknown if reference is None else ensemble[name],
        }
    return found


def _mean_ece(scored: Scored) -> float:
    """Of each seed's probabilities of all labels, those of all folds together; mean over the seeds."""
    by_seed = np.split(scored.probability_RN, scored.seeds)
    errors = [metrics.ece(scored.label_N, np.nanmean(each, axis=0), scored.weight_N) for each in by_seed]
    return float(np.mean(np.array(errors, dtype=float)))


def note_look(folder: Location, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All looks at the held-out labels so far, this one the last; what was seen before is no new look.

    They are kept in the run's folder: of each its time, and the mean areas that it showed.
    """
    path = folder / LOOKS
    looks: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    seen = [
        {key: row[key] for key in ("name", "budget", "seeds")} | {area: row[area]["mean"] for area in metrics.AREAS}
        for row in found["rows"]
    ]
    if not any(look["seen"] == seen for look in looks):
        looks.append({"at": datetime.now(UTC).isoformat(timespec="seconds"), "seen": seen})
        write_text(json.dumps(looks, indent=1) + "\n", path)
    return looks


# ------------------------------------------------------------------------------------------------------ reporting


def _budgets(found: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The budgets with results, in order, each with its title."""
    rows = {row["budget"]: row for row in found["rows"]}
    return [
        (
            budget,
            f"{row['fitting'] + row['choosing']:,} labels: {row['fitting']:,} to fit, {row['choosing']:,} to choose",
        )
        for budget, row in rows.items()
    ]


def _cells(found: Mapping[str, Any], budget: int) -> list[list[str]]:
    head = ["model", "seeds", "AUROC", "AUPRC", "AUROC less boosting's", "AUPRC less boosting's"]
    head += ["seeds averaged", "calibration error", "parameters", "training, s"]
    cells = [head]
    for row in found["rows"]:
        if row["budget"] != budget:
            continue
        areas = [row[name] for name in metrics.AREAS]
        spread = ["" if area["sd"] is None else f" ± {area['sd']:.3f}" for area in areas]
        low_high = ["" if area["ci"] is None else " [{:.3f}, {:.3f}]".format(*area["ci"]) for area in areas]
        named = zip(areas, spread, low_high, strict=True)
        seconds = f"{row['seconds']:.0f}"
        if row["pretraining_seconds"]:
            seconds += f" + {row['pretraining_seconds']:.0f}"
        cells.append(
            [
                row["name"].replace("_", " "),
                str(row["seeds"]),
                *(f"{area['mean']:.3f}{sd}{interval}" for area, sd, interval in named),
                *("" if row["name"] == REFERENCE else tables.with_interval(area["difference"]) for area in areas),
                ", ".join(tables.number(area["ensemble"]) for area in areas),
                tables.number(row["ece"]),
                "" if row["parameters"] is None else f"{row['parameters']:,}",
                seconds,
            ]
        )
    return cells


def report(comparison: Comparison, found: Mapping[str, Any], looks: Sequence[Mapping[str, Any]]) -> str:
    """The split's Markdown file; looks: those at the held-out labels, this one the last."""
    text = (
        "Mean and standard deviation over seeds, with the 95 % interval over resampled patients; differences to "
        "gradient boosting on the same patients, seeds averaged likewise. Each number of labels counts all that a run "
        "has seen: it was fitted to some, the others chose among its candidates (checkpoints, numbers of trees, "
        "penalties) by cross-entropy and recalibrated its probabilities.\n\n"
    )
    if comparison.split == "cross_validation":
        title = f"{comparison.folds} folds of the train and tuning patients"
        text += (
            "Areas are means over the folds, which each seed draws for itself. The vocabulary and pretraining have "
            "seen the inputs of the folds that are scored, never their labels.\n"
        )
    else:
        title = "held-out patients"
        earlier = ", ".join(look["at"] for look in looks[:-1])
        text += f"**Look {len(looks)} of this benchmark at these labels**" + (f", after {earlier}" if earlier else "")
        text += ". Looks by other commands are not counted here.\n"
    parts = [f"# {comparison.task}, {title}\n", text]
    for budget, name in _budgets(found):
        parts += [f"## {name}\n", tables.markdown(_cells(found, budget)) + "\n"]
    return "\n".join(parts) + f"\n![]({comparison.split}.png)\n"


def show(found: Mapping[str, Any]) -> None:
    """Print the tables, but for the last columns."""
    for budget, name in _budgets(found):
        title = f"{found['task']}, {found['split'].replace('_', '-')}, {name}"
        tables.show(title, [row[:6] for row in _cells(found, budget)], width=150)


def draw(comparison: Comparison, found: Mapping[str, Any], path: Location) -> None:
    """AUPRC over the budgets, and ROC, precision-recall and calibration of the seeds' mean probabilities."""
    curves = {}
    for name in comparison.names:
        scored = comparison.read(name, comparison.budgets[0])
        if scored is not None:
            curves[name] = (scored.label_N, np.nanmean(scored.probability_RN, axis=0), scored.weight_N)
    figures.draw_benchmark(path, found["rows"], curves, REFERENCE)
