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
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit

from hymate.data.examples import Examples
from hymate.data.meds import read_parquet, write_parquet
from hymate.errors import UserError
from hymate.evaluation import figures, metrics, tables
from hymate.evaluation.calibration import logit
from hymate.runs import run_folder
from hymate.storage.paths import Location, write_text
from hymate.tuning.protocol import HELD_OUT, PLAIN, REFERENCE, BenchmarkConfig, ContenderRun

LOOKS = "looks.json"
AND_PLAIN = " and plain models"  # behind the name of a contender: the mean of both
Array = NDArray[Any]


def folder_of(config: BenchmarkConfig) -> Location:
    """Where the runs leave their predictions and results."""
    return run_folder(config.run) / "runs"


def write_run(run: ContenderRun, folder: Location, test: Examples, probability_E: Array, **known: Any) -> None:
    """Write the run's predictions and its other results."""
    columns = {
        "subject_id": test.subject_id_E,
        "prediction_time": test.prediction_time_E,
        "label": test.label_E,
        "weight": test.weight_E,
        "probability": probability_E,
    }
    write_parquet(pa.table(columns), run.predictions_path(folder))
    write_text(json.dumps({**dataclasses.asdict(run), **known}) + "\n", run.results_path(folder))


def write(config: BenchmarkConfig) -> dict[str, Any]:
    """Compare all finished runs of the split; the content of its JSON file, beside which are its report and picture.

    "looks": all looks at the held-out labels, this one the last.
    """
    path = run_folder(config.run)
    found = compare(config)
    found["looks"] = _note_look(path, found) if config.split == HELD_OUT else []
    write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", path / f"{config.split}.json")
    write_text(_report(config, found), path / f"{config.split}.md")
    _draw(config, found, path / f"{config.split}.png")
    return found


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


def _names(config: BenchmarkConfig) -> list[str]:
    """All that are compared, the means with the plain models last."""
    return [*config.names, *(f"{name}{AND_PLAIN}" for name in config.ensemble)]


def _read(config: BenchmarkConfig, name: str, budget: int) -> Scored | None:
    """The seeds that have all folds. Raises UserError where they were not scored on the same labels."""
    if name.endswith(AND_PLAIN):
        return _averaged(_read(config, name.removesuffix(AND_PLAIN), budget), _read(config, PLAIN, budget))
    folder = folder_of(config)
    seeds = [[ContenderRun(name, budget, seed, fold) for fold in config.folds_of_split] for seed in range(config.seeds)]
    seeds = [runs for runs in seeds if all(run.results_path(folder).is_file() for run in runs)]
    if not seeds:
        return None
    scored = [_by_subject_and_time([read_parquet(run.predictions_path(folder)) for run in runs]) for runs in seeds]
    labels = [table.drop_columns(["fold", "probability"]) for table in scored]
    if any(not labels[0].equals(other) for other in labels):
        raise UserError(f"{folder}: runs of {name} have different labels: delete those files")
    fold_F1 = np.arange(len(config.folds_of_split))[:, None]
    probability_RN = [np.where(table["fold"].to_numpy() == fold_F1, table["probability"], np.nan) for table in scored]
    known = [json.loads(run.results_path(folder).read_text()) for runs in seeds for run in runs]
    subject_N, label_N, weight_N = (labels[0][name].to_numpy() for name in ("subject_id", "label", "weight"))
    return Scored(known, len(seeds), subject_N, label_N, weight_N, np.concatenate(probability_RN))


def _averaged(scored: Scored | None, plain: Scored | None) -> Scored | None:
    """The mean of the logits of both, of the seeds that both have."""
    if scored is None or plain is None:
        return None
    seeds = {run["seed"] for run in scored.known} & {run["seed"] for run in plain.known}
    if not seeds:
        return None
    own, other = (
        [(run, prob_N) for run, prob_N in zip(of.known, of.probability_RN, strict=True) if run["seed"] in seeds]
        for of in (scored, plain)
    )
    known, mean = [], []
    for (run, prob_N), (of_plain, plain_N) in zip(own, other, strict=True):
        known.append({**run, "seconds": run["seconds"] + of_plain["seconds"]})
        mean.append(expit((logit(prob_N) + logit(plain_N)) / 2))
    return dataclasses.replace(scored, known=known, seeds=len(seeds), probability_RN=np.stack(mean))


def _by_subject_and_time(folds: Sequence[pa.Table]) -> pa.Table:
    """All folds of a seed in the order of every seed, however its folds were drawn; "fold": the one it came from."""
    fold_N = np.repeat(np.arange(len(folds)), [len(fold) for fold in folds])
    whole = pa.concat_tables(folds).append_column("fold", pa.array(fold_N))
    return whole.sort_by([("subject_id", "ascending"), ("prediction_time", "ascending")])


def compare(config: BenchmarkConfig) -> dict[str, Any]:
    """The content of the split's JSON file, from all finished runs."""
    rows = []
    for budget in config.largest_first:
        reference = _read(config, REFERENCE, budget)
        for name in _names(config):
            scored = _read(config, name, budget)
            if scored is None:
                continue
            known = scored.known
            rows.append(
                {
                    "name": name,
                    "budget": budget,
                    "fitting": round(np.mean([run["fitting"] for run in known])),
                    "choosing": round(np.mean([run["choosing"] for run in known])),
                    **_areas(scored, reference),
                    "ece": _mean_ece(scored),
                    "parameters": known[0]["parameters"],
                    "seconds": float(np.mean([run["seconds"] for run in known])),
                    "pretraining_seconds": float(np.mean([run["pretraining_seconds"] for run in known])),
                }
            )
    return {"split": config.split, "task": config.task.name, "rows": rows}


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


def _note_look(folder: Location, found: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def _tables(found: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """A table for each budget that has results, in order, by its title."""
    head = ["model", "seeds", "AUROC", "AUPRC", "AUROC minus boosting's", "AUPRC minus boosting's"]
    head += ["seeds averaged", "calibration error", "parameters", "training, s"]
    cells: dict[str, list[list[str]]] = {}
    titles: dict[int, str] = {}
    for row in found["rows"]:
        patients = f"{row['budget']:,} patients" if row["budget"] else "all patients"
        labels = f"{row['fitting']:,} labels to fit, {row['choosing']:,} to choose"
        title = titles.setdefault(row["budget"], f"{patients}: {labels}")  # means over a contender's runs
        areas = [row[name] for name in metrics.AREAS]
        spread = ["" if area["sd"] is None else f" ± {area['sd']:.3f}" for area in areas]
        low_high = ["" if area["ci"] is None else " [{:.3f}, {:.3f}]".format(*area["ci"]) for area in areas]
        named = zip(areas, spread, low_high, strict=True)
        pretraining = f" + {row['pretraining_seconds']:.0f}" if row["pretraining_seconds"] else ""
        cells.setdefault(title, [head]).append(
            [
                row["name"].replace("_", " "),
                str(row["seeds"]),
                *(f"{area['mean']:.3f}{sd}{interval}" for area, sd, interval in named),
                *("" if row["name"] == REFERENCE else tables.with_interval(area["difference"]) for area in areas),
                ", ".join(tables.number(area["ensemble"]) for area in areas),
                tables.number(row["ece"]),
                "" if row["parameters"] is None else f"{row['parameters']:,}",
                f"{row['seconds']:.0f}{pretraining}",
            ]
        )
    return cells


def _report(config: BenchmarkConfig, found: Mapping[str, Any]) -> str:
    """The split's Markdown file."""
    text = (
        "Mean and standard deviation over seeds, with 95 % CI over patients; differences from gradient boosting are on "
        "the same patients, averaged over seeds likewise. The number of patients counts all whose labels a run uses: "
        "it is fitted to those of some; those of the others choose among its candidates (checkpoints, numbers of "
        "trees, penalties) by cross-entropy and recalibrate its probabilities.\n\n"
    )
    if config.ensemble:
        text += '"And plain models" is the mean of both logits, which is not recalibrated once more.\n\n'
    if config.split == "cross_validation":
        patients = f"{config.folds} folds of the train and tuning patients"
        text += (
            "AUROC and AUPRC are means over the folds, which each seed draws for itself. The vocabulary and "
            "pretraining have seen the inputs of the folds that are scored, never their labels.\n"
        )
    else:
        patients = "held-out patients"
        looks = found["looks"]
        earlier = ", ".join(look["at"] for look in looks[:-1])
        text += f"**Look {len(looks)} of this benchmark at these labels**" + (f", after {earlier}" if earlier else "")
        text += ". Looks by other commands are not counted here.\n"
    parts = [f"# {config.task.name}, {patients}\n", text]
    for title, rows in _tables(found).items():
        parts += [f"## {title}\n", tables.markdown(rows) + "\n"]
    return "\n".join(parts) + f"\n![]({config.split}.png)\n"


def show(found: Mapping[str, Any]) -> None:
    """Print the tables, but for the last columns."""
    for title, rows in _tables(found).items():
        name = f"{found['task']}, {found['split'].replace('_', '-')}, {title}"
        tables.show(name, [row[:6] for row in rows], width=150)


def _draw(config: BenchmarkConfig, found: Mapping[str, Any], path: Location) -> None:
    """AUPRC over the budgets, and ROC, precision-recall and calibration of the seeds' mean probabilities."""
    curves = {}
    for name in _names(config):
        scored = _read(config, name, config.largest_first[0])
        if scored is not None:
            curves[name] = (scored.label_N, np.nanmean(scored.probability_RN, axis=0), scored.weight_N)
    figures.plot_benchmark(path, found["rows"], curves, REFERENCE)
