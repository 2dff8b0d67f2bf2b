"""Explanations on the synthetic cohort: do the planted drivers rank first, and which order of events is faithful?

    python -m hymate.data.prepare source=synthetic out=DATA_DIR synthetic.subjects=4000 synthetic.mean_events=250
    python finetune/tune.py task=readmission data.path=DATA_DIR ... run.name=NAME
    python tests/benchmarks/faithfulness.py BUNDLE DATA_DIR [--cases 200] [--removed 60]

Three tables over held-out predictions drawn by chance: the variables by importance with their part in the law; by how
much attributions miss the difference of logits, for several numbers of steps; and deletion and insertion in the order
of attributions, of attention, by chance, and, for the first --removed cases, of the change when each event is removed
by itself, which costs a pass over the history for every event.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from hymate import explain
from hymate.data.examples import labelled_examples
from hymate.data.histories import Histories
from hymate.data.label_files import read_labels
from hymate.data.synthetic.codes import DISTRACTORS
from hymate.data.synthetic.law import COPD, CREATININE, HAEMOGLOBIN, HEART_FAILURE
from hymate.device import choose
from hymate.evaluation.attribution import Attribution, Case, Explainer, integrated_gradients
from hymate.evaluation.explaining import Measured, changes, most_important, movements
from hymate.inference.bundle import read_bundle

DRIVERS = (CREATININE, HAEMOGLOBIN, HEART_FAILURE, COPD)
STEPS = (8, 16, 32, 64, 128)


def measured(explainer: Explainer, cases: list[Case], attributions: list[Attribution]) -> Measured:
    removed = most_important(explainer, cases, attributions)
    change_NR = changes(explainer, cases, removed)
    moved = movements(explainer, cases, attributions, np.random.default_rng(0))
    return Measured(attributions, removed, change_NR, moved)


def ranking(explainer: Explainer, cases: list[Case], attributions: list[Attribution]) -> None:
    table = explain.variable_table(explainer, cases, measured(explainer, cases, attributions)).to_pandas()
    by_attribution = table["mean_abs_attribution"].rank(ascending=False)
    print("| rank when removed | by attribution | variable | part in the law | change when removed | attribution |")
    print("|---|---|---|---|---|---|")
    for place, row in table.iterrows():
        part = "driver" if row.code in DRIVERS else "distractor" if row.code in DISTRACTORS else ""
        if part or place < 10:
            numbers = f"{row.mean_abs_change:.3f} | {row.mean_abs_attribution:.3f}"
            print(f"| {place + 1} | {by_attribution[place]:.0f} | `{row.code}` | {part} | {numbers} |")


def completeness(explainer: Explainer, cases: list[Case]) -> None:
    print("\n| steps | gap, mean | gap, 95 % | gap, most | s |\n|---|---|---|---|---|")
    for steps in STEPS:
        start = time.perf_counter()
        rows = [row for _, row in explainer.rows(cases)]
        gap_N = np.abs([a.gap for row in rows for a in integrated_gradients(explainer.model, row, steps)])
        elapsed = time.perf_counter() - start
        print(f"| {steps} | {gap_N.mean():.4f} | {np.quantile(gap_N, 0.95):.4f} | {gap_N.max():.4f} | {elapsed:.1f} |")


def event_removal(explainer: Explainer, case: Case) -> np.ndarray:
    """(L,): the logit less that without each event, one at a time; 0 where nothing would be left."""
    kept = ~np.eye(len(case.history), dtype=bool)
    shortened = [replace(case, history=case.history.keep(kept_L)) for kept_L in kept if kept_L.any()]
    logit, *rest = explainer.logits([case, *shortened])
    return logit - np.array(rest) if rest else np.zeros(1)


def orders(explainer: Explainer, cases: list[Case], attributions: list[Attribution]) -> None:
    start = time.perf_counter()
    removal = [replace(a, event_L=event_removal(explainer, c)) for c, a in zip(cases, attributions, strict=True)]
    elapsed = time.perf_counter() - start
    curves = explain.faithfulness(measured(explainer, cases, attributions))
    by_removal = explain.faithfulness(measured(explainer, cases, removal))
    print(f"\n| {len(cases)} cases, events in order of | {' | '.join(curves)} |")
    print("|---|" + "---|" * len(curves))
    for order in curves[explain.FALL]:
        print(f"| {order} | {' | '.join(f'{curve[order].mean():.2f}' for curve in curves.values())} |")
    values = " | ".join(f"{curve['attribution'].mean():.2f}" for curve in by_removal.values())
    print(f"| removal of each event ({elapsed:.0f} s) | {values} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--removed", type=int, default=60)
    options = parser.parse_args()
    histories = Histories.open(options.data)
    examples = labelled_examples(histories, read_labels(options.data / "labels" / "readmission"), "held_out")
    bundle = read_bundle(options.bundle, kind="risk")
    explainer = Explainer(bundle, histories, choose("auto", bundle.model))
    cases = explainer.cases(examples, np.random.default_rng(0).permutation(len(examples))[: options.cases])
    attributions = explainer.attributions(cases)
    ranking(explainer, cases, attributions)
    completeness(explainer, cases)
    orders(explainer, cases[: options.removed], attributions[: options.removed])
    if options.removed < len(cases):
        curves = explain.faithfulness(measured(explainer, cases, attributions))
        print(f"\nall {len(cases)} cases")
        for order in curves[explain.FALL]:
            print(f"| {order} | {' | '.join(f'{curve[order].mean():.2f}' for curve in curves.values())} |")


if __name__ == "__main__":
    main()
