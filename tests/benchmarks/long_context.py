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
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from hymate import baselines, metrics
from hymate.config import load
from hymate.data.features import FeatureConfig, choose, features
from hymate.data.histories import Histories
from hymate.data.loader import Examples, labelled_examples
from hymate.data.meds import SPLITS, write_text
from hymate.data.synthetic import ORACLE
from hymate.data.tasks import labels
from hymate.predict import score
from hymate.telemetry import Telemetry
from hymate.training import checkpoint, engine
from hymate.training.finetune import (
    TrialConfig,
    labelled_rows,
    parameter_groups,
    risk_model,
    starting_point,
    tuning_scores,
)
from hymate.training.pictures import BLUE, DPI, GREY, ORANGE
from hymate.training.search import TuneConfig, trial_config

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
QUICK = (512, 1024)
EVENTS, STEPS, QUICK_STEPS, LABELS_PER_STEP = 1 << 22, 240, 4, 8
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
    """The same labels a step at every context, in rows of LEAST_ROW events where so many labels fill one."""
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


def fine_tuned(options: argparse.Namespace, config: TuneConfig, worker: engine.Worker) -> dict[str, Any]:
    """Train, keep the best checkpoint on the tuning split, score it on the held-out split."""
    histories, table = Histories.open(config.data.path), labels(options.data, config.tasks[0]).table
    start = starting_point(config.data, config.model, None)
    trial = trial_config(config, start, {})
    name = _name(trial)
    training, tuning, held_out = (labelled_examples(histories, table, split) for split in SPLITS)
    model, best = risk_model(start, trial), risk_model(start, trial)
    weights = options.out / name.replace(", ", "-")
    shorter = [context for context in _contexts(weights) if context < trial.data.context]
    if shorter:
        model.load_state_dict(load_file(weights / f"{max(shorter)}.safetensors"))

    def evaluate(model: Any) -> dict[str, float]:
        return tuning_scores(
            tuning, score(model, labelled_rows(start, trial, histories, tuning), worker.device), trial.tasks
        )

    scores: list[float] = []

    def report(found: dict[str, float], folder: Path) -> None:
        scores.append(found["auroc"])
        if found["auroc"] == max(scores):
            checkpoint.load_weights(best, folder)
        print(f"    step {found['step']}: tuning AUROC {found['auroc']:.3f}, loss {found['loss']:.3f}", flush=True)

    started = time.monotonic()
    rows = labelled_rows(start, trial, histories, training)
    scratch = options.out / "scratch"
    job = engine.Job(model, parameter_groups(model, trial), rows, evaluate, score="auroc", mode="max")
    silent = Telemetry(scratch, enabled=False)
    engine.train(job, trial.train, worker, report=report, telemetry=silent, resume=None, scratch=scratch)
    trained = time.monotonic()
    outputs = score(best.to(worker.device).eval(), labelled_rows(start, trial, histories, held_out), worker.device)
    weights.mkdir(exist_ok=True)
    save_file(best.state_dict(), weights / f"{trial.data.context}.safetensors")
    return {
        "model": name,
        "context": trial.data.context,
        "from": max(shorter, default=None),
        "steps": trial.train.max_steps,
        "tuning_auroc": max(scores),
        **_scored(held_out, outputs.probability_ET[:, 0]),
        "seconds": {"training": trained - started, "scoring": time.monotonic() - trained},
    }


def cut(options: argparse.Namespace, config: TuneConfig, worker: engine.Worker) -> dict[str, Any]:
    """The weights of the longest context in OUT, reading config.data.context events."""
    histories, table = Histories.open(config.data.path), labels(options.data, config.tasks[0]).table
    start = starting_point(config.data, config.model, None)
    trial = trial_config(config, start, {})
    weights = options.out / _name(trial).replace(", ", "-")
    longest = max(_contexts(weights))
    model = risk_model(start, trial)
    model.load_state_dict(load_file(weights / f"{longest}.safetensors"))
    held_out = labelled_examples(histories, table, "held_out")
    started = time.monotonic()
    rows = labelled_rows(start, trial, histories, held_out)
    outputs = score(model.to(worker.device).eval(), rows, worker.device)
    return {
        "model": f"{_name(trial)}, trained at {longest:,}",
        "context": trial.data.context,
        **_scored(held_out, outputs.probability_ET[:, 0]),
        "seconds": {"training": 0, "scoring": time.monotonic() - started},
    }


def _name(trial: TrialConfig) -> str:
    return f"{trial.model.layers}, {trial.model.pooling}"


def _contexts(weights: Path) -> list[int]:
    return [int(path.stem) for path in weights.glob("*.safetensors")]


def boosted(options: argparse.Namespace, config: TuneConfig) -> dict[str, Any]:
    """Gradient boosting on aggregate features of whole histories."""
    histories, table = Histories.open(config.data.path), labels(options.data, config.tasks[0]).table
    started = time.monotonic()
    examples = {split: labelled_examples(histories, table, split) for split in SPLITS}
    spec = choose(histories, examples["train"], FeatureConfig())
    tables = {split: features(histories, part, spec) for split, part in examples.items()}
    model = baselines.fit("gradient_boosting", tables["train"], tables["tuning"], seed=0)
    fitted = time.monotonic()
    probability = {split: model.probability(tables[split].value_EX) for split in ("tuning", "held_out")}
    return {
        "model": "gradient boosting",
        "context": None,
        "tuning_auroc": metrics.auroc(examples["tuning"].label_E, probability["tuning"]),
        **_scored(examples["held_out"], probability["held_out"]),
        "seconds": {"training": fitted - started, "scoring": time.monotonic() - fitted},
    }


def _scored(examples: Examples, probability_E: Any) -> dict[str, Any]:
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
    axes.legend(loc="upper left", frameon=False)
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
    if options.contexts is None:
        options.contexts = QUICK if options.quick else CONTEXTS
    ceiling = json.loads((options.data / ORACLE).with_suffix(".json").read_text())["ceiling"]["held_out"]
    ceiling = ceiling["auroc_by_context"]
    gathered = options.out / "curve.json"
    rows = json.loads(gathered.read_text()) if gathered.exists() else []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| model | context | tuning AUROC | held-out AUROC [95 % CI] | ceiling | s, training + scoring |")
    print("|---|---|---|---|---|---|", flush=True)
    with engine.single_process(torch.cuda.is_available()) as worker:
        configs = [configured(options, context) for context in sorted(options.contexts)]
        runs = [partial(cut if options.cut else fine_tuned, options, config, worker) for config in configs]
        runs += [partial(boosted, options, configured(options, CONTEXTS[0]))] if options.boosting else []
        for run in runs:
            row = run()
            show(row, ceiling)
            rows = [r for r in rows if (r["model"], r["context"]) != (row["model"], row["context"])] + [row]
            write_text(json.dumps(rows, indent=1) + "\n", gathered)
    draw(options.out / "long_context.png", rows, ceiling)


if __name__ == "__main__":
    main()
