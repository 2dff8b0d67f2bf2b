"""What a benchmark's runs are compared by: their predictions, kept in the run's folder; table, report and picture.

Shape legend: N labels of the compared split, R runs (seeds) of a contender, K areas (AUROC, AUPRC).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hymate import metrics, trust
from hymate.config import UserError
from hymate.data.examples import Examples
from hymate.data.meds import read_parquet, write_parquet
from hymate.storage import Location, write_text
from hymate.training import pictures, tables

REFERENCE = "gradient_boosting"  # what every contender is compared with
Split = Literal["tuning", "held_out"]
COMPARED: tuple[Split, ...] = ("tuning", "held_out")
Array = NDArray[Any]


@dataclass(frozen=True)
class Run:
    """One contender with one seed on a share of the training patients; `name` is a baseline's or a contender's."""

    name: str
    share: float
    seed: int

    @property
    def stem(self) -> str:
        """What its files' names begin with."""
        return f"{self.name}-{self.share:g}-{self.seed}"

    def results(self, folder: Location) -> Location:
        """What is known of the run; it is written last, so the run is there when this file is."""
        return folder / f"{self.stem}.json"

    def predictions(self, folder: Location, split: Split) -> Location:
        """Subjects, labels and probabilities of a split."""
        return folder / f"{self.stem}-{split}.parquet"


def write_run(
    run: Run, folder: Location, examples: Mapping[str, Examples], probabilities: Mapping[Split, Array], **more: Any
) -> None:
    """Predictions of both splits, so that a comparison on the held-out one needs no second training."""
    for split in COMPARED:
        columns = {"subject_id": examples[split].subject_id_E, "label": examples[split].label_E}
        write_parquet(pa.table(columns | {"probability": probabilities[split]}), run.predictions(folder, split))
    write_text(json.dumps({**dataclasses.asdict(run), **more}) + "\n", run.results(folder))


@dataclass(frozen=True)
class Comparison:
    """The runs of a folder that are compared on a split; those that are not there yet are left out."""

    folder: Location
    names: Sequence[str]
    shares: Sequence[float]
    seeds: int
    split: Split
    task: str

    def read(self, name: str, share: float) -> tuple[list[dict[str, Any]], Array, Array, Array] | None:
        """Of one contender's runs what is known of each, their subjects (N,), labels (N,) and probabilities (R, N).

        The probabilities of all contenders are recalibrated on the tuning split, as those of a bundle are. Raises
        UserError where the runs are not of the same labels.
        """
        runs = [Run(name, share, seed) for seed in range(self.seeds)]
        runs = [run for run in runs if run.results(self.folder).is_file()]
        if not runs:
            return None
        found = [read_parquet(run.predictions(self.folder, self.split)) for run in runs]
        subject_N, label_N = (found[0][column].to_numpy() for column in ("subject_id", "label"))
        for table in found:
            alike = len(table) == len(label_N) and np.array_equal(table["label"].to_numpy(), label_N)
            if not alike or not np.array_equal(table["subject_id"].to_numpy(), subject_N):
                raise UserError(f"{self.folder}: runs of {name} have other labels than each other: delete those files")
        tuning = [read_parquet(run.predictions(self.folder, "tuning")) for run in runs]
        probability_RN = np.stack([_recalibrated(*pair) for pair in zip(tuning, found, strict=True)])
        told = [json.loads(run.results(self.folder).read_text()) for run in runs]
        return told, subject_N, label_N, probability_RN


def _recalibrated(tuning: pa.Table, table: pa.Table) -> Array:
    label_M, tuning_M = (tuning[name].to_numpy() for name in ("label", "probability"))
    return trust.recalibrate(label_M, trust.logit(tuning_M)).probability(table["probability"].to_numpy())


def compare(comparison: Comparison) -> dict[str, Any]:
    """What benchmark.json says of all runs that are there."""
    rows = []
    for share in sorted(comparison.shares, reverse=True):
        reference = comparison.read(REFERENCE, share)
        for name in comparison.names:
            read = comparison.read(name, share)
            if read is None:
                continue
            told, subject_N, label_N, probability_RN = read
            rows.append(
                {
                    "name": name,
                    "share": share,
                    **_scored(label_N, probability_RN, subject_N, None if reference is None else reference[-1]),
                    "ece": None if comparison.split == "tuning" else _mean_ece(label_N, probability_RN),
                    "parameters": told[0]["parameters"],
                    "seconds": float(np.mean([one["seconds"] for one in told])),
                    "pretraining_seconds": float(np.mean([one.get("pretraining_seconds", 0.0) for one in told])),
                }
            )
    return {"split": comparison.split, "task": comparison.task, "rows": rows}


def _scored(label_N: Array, probability_RN: Array, subject_N: Array, reference_RN: Array | None) -> dict[str, Any]:
    """Mean and standard deviation over seeds; intervals of the mean, and of its difference to the reference's, over
    resampled patients; the scores of the seeds' mean probability, which is an ensemble. Without a reference its
    differences are None.
    """
    areas_KR = np.array([[area(label_N, p_N) for p_N in probability_RN] for area in (metrics.auroc, metrics.auprc)])
    others_RN = probability_RN if reference_RN is None else reference_RN
    paired = metrics.mean_difference(label_N, probability_RN, others_RN, subject_N)
    mean_N = probability_RN.mean(axis=0)
    ensemble = metrics.paired_difference(label_N, mean_N, others_RN.mean(axis=0), subject_N)
    unknown = {"value": None, "ci": None}
    found: dict[str, Any] = {"runs": len(probability_RN)}
    for number, name in enumerate(metrics.AREAS):
        area = (metrics.auroc, metrics.auprc)[number]
        found[name] = {
            "mean": float(areas_KR[number].mean()),
            "sd": float(areas_KR[number].std(ddof=1)) if len(probability_RN) > 1 else None,
            "ci": paired[name]["ci"],
            "difference": unknown if reference_RN is None else paired[name]["difference"],
            "ensemble": area(label_N, mean_N),
            "ensemble_difference": unknown if reference_RN is None else ensemble[name],
        }
    return found


def _mean_ece(label_N: Array, probability_RN: Array) -> float:
    return float(np.mean([metrics.ece(label_N, p_N) for p_N in probability_RN]))


# ------------------------------------------------------------------------------------------------------ reporting


def _cells(found: Mapping[str, Any], share: float) -> list[list[str]]:
    head = ["model", "runs", "AUROC", "AUPRC", "AUROC less boosting's", "AUPRC less boosting's"]
    head += ["seeds averaged", "calibration error", "parameters", "training, s"]
    cells = [head]
    for row in found["rows"]:
        if row["share"] != share:
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
                str(row["runs"]),
                *(f"{area['mean']:.3f}{sd}{interval}" for area, sd, interval in named),
                *("" if row["name"] == REFERENCE else tables.with_interval(area["difference"]) for area in areas),
                ", ".join(tables.number(area["ensemble"]) for area in areas),
                tables.number(row["ece"]),
                "" if row["parameters"] is None else f"{row['parameters']:,}",
                seconds,
            ]
        )
    return cells


def report(comparison: Comparison, found: Mapping[str, Any]) -> str:
    """benchmark.md."""
    parts = [f"# {found['task']}, {found['split'].replace('_', '-')} split\n"]
    parts.append(
        "Mean and standard deviation over seeds, with the 95 % interval over resampled patients; differences to "
        "gradient boosting on the same patients, seeds averaged likewise. Probabilities are recalibrated on the tuning "
        "split, whose own calibration error would say nothing.\n"
    )
    for share in sorted(comparison.shares, reverse=True):
        parts.append(f"\n## Learned from {share:.0%} of the training patients\n")
        parts.append(tables.markdown(_cells(found, share)) + "\n")
    return "\n".join(parts) + "\n![](benchmark.png)\n"


def show(found: Mapping[str, Any]) -> None:
    """The tables on the console."""
    console = tables.new_console(150)
    for share in sorted({row["share"] for row in found["rows"]}, reverse=True):
        title = f"{found['task']}, {found['split']} split, {share:.0%} of the training patients"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        head, *rows = _cells(found, share)
        for name in head[:6]:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row[:6])
        console.print(table)


def draw(comparison: Comparison, found: Mapping[str, Any], path: Location) -> None:
    """Curves over the shares, and ROC, precision-recall and calibration of the seeds' mean probabilities."""
    curves = {}
    for name in comparison.names:
        read = comparison.read(name, max(comparison.shares))
        if read is not None:
            _, _, label_N, probability_RN = read
            curves[name] = (label_N, probability_RN.mean(axis=0))
    chance = float(np.mean(next(iter(curves.values()))[0]))
    pictures.draw_benchmark(path, found["rows"], curves, chance, REFERENCE)
