r"""Does a longer context earn its keep? Held-out AUROC by context, where the law's driver lies far back.

    python -m hymate.data.prepare source=synthetic out=DATA_DIR synthetic.subjects=480 synthetic.mean_events=131072 \
        synthetic.driver_distance=32768 splits.train=0.6 splits.tuning=0.1 splits.held_out=0.3
    python tests/benchmarks/long_context.py DATA_DIR OUT [--contexts 512 ...] [--cut] [--boosting] [--quick] [K=V ...]

Fine-tunes a model context by context, from the shortest on: at each it sees only the last so many events before a
prediction, in training and afterwards. A context starts from the weights of the next shorter one in OUT, the shortest
from scratch, and takes as many steps as read EVENTS events, at most STEPS. The best checkpoint on the tuning split is
scored on the held-out split, once, beside the ceiling: the best score of any model that sees as many events. K=V
changes any key of finetune/tune.py.

OUT/curve.json gathers the rows of all calls with the same OUT, and OUT/long_context.png draws them. --cut trains
nothing: it lets the model of the longest context in OUT read only so many events. --boosting adds gradient boosting on
aggregate features of whole histories.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from hymate import device
from hymate.command import load
from hymate.data.examples import Examples, labelled_examples
from hymate.data.features import FeatureConfig
from hymate.data.histories import Histories
from hymate.data.loader import Rows
from hymate.data.meds import SPLITS, write_text
from hymate.data.synthetic.source import ceiling as ceiling_of
from hymate.data.tasks import read_or_extract_labels
from hymate.evaluation import metrics
from hymate.evaluation.baseline_fits import fitted_to
from hymate.evaluation.figures import BLUE, DPI, GREY, ORANGE
from hymate.inference.bundle import Bundle
from hymate.inference.scoring import score
from hymate.model.encoder import RiskModel
from hymate.training import checkpoint, loop
from hymate.training.telemetry import Telemetry
from hymate.tuning.search import TuneConfig
from hymate.tuning.trial import (
    TrialConfig,
    labelled_rows,
    parameter_groups,
    risk_model,
    starting_point,
    trial_config,
    tuning_scores,
)

EVENTS, STEPS, QUICK_STEPS, LABELS_PER_STEP = 1 << 21, 240, 8, 8
LEAST_ROW = 8192  # events computed at once
SETTINGS = (
    "task=readmission",
    "init=null",
    "model=debug",
    "model.dropout=0",
    "model.pooling=variables",
    "model.num_queries=1",
    "train.learning_rate=1e-2",
    "train.warmup_steps=4",
)


def configured(options: argparse.Namespace, context: int) -> TuneConfig:
    """The same number of labels a step at every context, in rows of LEAST_ROW events where that many fill one."""
    row = max(context, min(LABELS_PER_STEP * context, LEAST_ROW))
    steps = QUICK_STEPS if options.quick else min(STEPS, EVENTS // (LABELS_PER_STEP * context))
    sizes = (
        f"data.context={context}",
        f"data.tokens_per_row={row}",
        f"train.rows_per_step={LABELS_PER_STEP * context // row}",
        f"train.max_steps={steps}",
        f"train.eval_every={max(min(steps, 16), steps // 2)}",
        f"train.seed={context}",  # other labels first than at the context before
    )
    return load("tune", [f"data.path={options.data}", *SETTINGS, *sizes, *options.overrides], TuneConfig)


@dataclass(frozen=True)
class Point:
    """What a row of the table is made of; weights: folder of the model's weights, a file for each context."""

    histories: Histories
    examples: dict[str, Examples]
    start: Bundle
    trial: TrialConfig
    weights: Path

    @classmethod
    def of(cls, options: argparse.Namespace, context: int) -> Point:
        config = configured(options, context)
        histories, table = Histories.open(options.data), read_or_extract_labels(options.data, config.tasks[0]).table
        examples = {split: labelled_examples(histories, table, split) for split in SPLITS}
        start = starting_point(config.data, config.model, None)
        trial = trial_config(config.tasks, config.train, start, {})
        return cls(histories, examples, start, trial, options.out / f"{trial.model.layers}-{trial.model.pooling}")

    @property
    def name(self) -> str:
        return f"{self.trial.model.layers}, {self.trial.model.pooling}"

    @property
    def contexts(self) -> list[int]:
        """Whose weights there are."""
        return [int(path.stem) for path in self.weights.glob("*.safetensors")]

    def model(self, context: int | None) -> RiskModel:
        """With the weights of that context, or new ones."""
        model = risk_model(self.start, self.trial)
        if context is not None:
            model.load_state_dict(load_file(self.weights / f"{context}.safetensors"))
        return model

    def rows(self, split: str) -> Rows:
        return labelled_rows(self.start, self.trial, self.histories, self.examples[split])

    def held_out(self, model: RiskModel, device: torch.device) -> dict[str, Any]:
        outputs = score(model.to(device).eval(), self.rows("held_out"), device)
        return scored(self.examples["held_out"], outputs.probability_ET[:, 0])


def fine_tuned(point: Point, worker: loop.Worker) -> dict[str, Any]:
    """Train, keep the best checkpoint on the tuning split, score it on the held-out split."""
    trial = point.trial
    shorter = max((context for context in point.contexts if context < trial.data.context), default=None)
    model, best = point.model(shorter), point.model(None)

    def evaluate(model: Any) -> dict[str, float]:
        outputs = score(model, point.rows("tuning"), worker.device)
        return tuning_scores(point.examples["tuning"], outputs, trial.tasks)

    areas: list[float] = []

    def report(found: dict[str, float], folder: Path) -> None:
        areas.append(found["auroc"])
        if found["auroc"] == max(areas):
            checkpoint.load_weights(best, folder)

    point.weights.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    job = loop.Job(model, parameter_groups(model, trial), point.rows("train"), evaluate, metric="auroc", mode="max")
    silent = Telemetry(point.weights, enabled=False)
    loop.train(job, trial.train, worker, report=report, telemetry=silent, resume=None)
    trained = time.monotonic()
    save_file(best.state_dict(), point.weights / f"{trial.data.context}.safetensors")
    return {
        "model": point.name,
        "context": trial.data.context,
        "from": shorter,
        "steps": trial.train.max_steps,
        "tuning_auroc": max(areas),
        **point.held_out(best, worker.device),
        "seconds": {"training": trained - started, "scoring": time.monotonic() - trained},
    }


def cut(point: Point, worker: loop.Worker) -> dict[str, Any]:
    """The model of the longest context, reading no more than this one's events."""
    longest, started = max(point.contexts), time.monotonic()
    return {
        "model": f"{point.name}, trained at {longest:,}",
        "context": point.trial.data.context,
        **point.held_out(point.model(longest), worker.device),
        "seconds": {"training": 0.0, "scoring": time.monotonic() - started},
    }


def boosted(point: Point) -> dict[str, Any]:
    """Gradient boosting on aggregate features of whole histories."""
    started = time.monotonic()
    asked = (point.histories, point.examples, FeatureConfig(), 0)
    with tempfile.TemporaryDirectory() as folder:
        probability = fitted_to("gradient_boosting", *asked, Path(folder) / "own").probability
    return {
        "model": "gradient boosting",
        "context": None,
        "tuning_auroc": metrics.auroc(point.examples["tuning"].label_E, probability["tuning"]),
        **scored(point.examples["held_out"], probability["held_out"]),
        "seconds": {"training": time.monotonic() - started, "scoring": 0.0},
    }


def scored(examples: Examples, probability_E: np.ndarray) -> dict[str, Any]:
    found = metrics.scores(examples.label_E, probability_E, examples.subject_id_E)
    return {"auroc": found["auroc"]["value"], "ci": found["auroc"]["ci"], "num_labels": found["num_labels"]}


def show(row: Mapping[str, Any], ceiling: Mapping[str, float]) -> None:
    context = "whole histories" if row["context"] is None else f"{row['context']:,}"
    best = ceiling[str(row["context"])] if row["context"] else list(ceiling.values())[-1]
    low, high = row["ci"]
    seconds = f"{row['seconds']['training']:.0f} + {row['seconds']['scoring']:.0f}"
    tuning = f"{row['tuning_auroc']:.3f}" if "tuning_auroc" in row else ""
    value = f"{row['auroc']:.3f} [{low:.3f}, {high:.3f}]"
    print(f"| {row['model']} | {context} | {tuning} | {value} | {best:.3f} | {seconds} |", flush=True)


def draw(path: Path, rows: list[dict[str, Any]], ceiling: Mapping[str, float]) -> None:
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    contexts = [int(context) for context in ceiling]
    axes.plot(contexts, list(ceiling.values()), color=GREY, linestyle=":", label="ceiling of the context")
    names = dict.fromkeys(row["model"] for row in rows if row["context"])
    for name, color, marker in zip(names, (BLUE, ORANGE, "#009E73", "#CC79A7"), "osD^", strict=False):
        line = sorted((row for row in rows if row["model"] == name), key=lambda row: row["context"])
        x, y = [row["context"] for row in line], [row["auroc"] for row in line]
        error = [[row["auroc"] - row["ci"][0] for row in line], [row["ci"][1] - row["auroc"] for row in line]]
        axes.errorbar(x, y, yerr=error, color=color, fmt=f"{marker}-", capsize=2, label=name)
    for row in rows:
        if not row["context"]:
            axes.axhline(row["auroc"], color=GREY, linestyle="--", label=f"{row['model']}, whole histories")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set(xlabel="context: last events before the prediction", ylabel="held-out AUROC, 95 % interval")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=DPI, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="K=V")
    parser.add_argument("--contexts", type=int, nargs="*")
    parser.add_argument("--cut", action="store_true", help="train nothing: let the longest context's model read less")
    parser.add_argument("--boosting", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few steps at the two shortest contexts")
    options = parser.parse_intermixed_args()
    found = ceiling_of(options.data, "readmission", "held_out")
    assert found is not None, "the cohort is synthetic"
    ceiling = found["auroc_by_context"]
    if options.contexts is None:
        options.contexts = list(map(int, ceiling))[: 2 if options.quick else None]
    gathered = options.out / "curve.json"
    rows = json.loads(gathered.read_text()) if gathered.exists() else []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| model | context | tuning AUROC | held-out AUROC [95 % CI] | ceiling | s, training + scoring |")
    print("|---|---|---|---|---|---|", flush=True)
    model = configured(options, min(map(int, ceiling))).model
    assert model is not None, "SETTINGS has one"
    with loop.single_process(device.choose("auto", model)) as worker:
        make = cut if options.cut else fine_tuned
        runs = [partial(make, Point.of(options, context), worker) for context in sorted(options.contexts)]
        runs += [partial(boosted, Point.of(options, min(map(int, ceiling))))] if options.boosting else []
        for run in runs:
            row = run()
            show(row, ceiling)
            rows = [r for r in rows if (r["model"], r["context"]) != (row["model"], row["context"])] + [row]
            write_text(json.dumps(rows, indent=1) + "\n", gathered)
    draw(options.out / "long_context.png", rows, ceiling)


if __name__ == "__main__":
    main()
