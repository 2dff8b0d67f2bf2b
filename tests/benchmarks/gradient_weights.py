"""How much a patient's targets weigh in a pretraining step, over what is due: the same for all targets of a term.

    python tests/benchmarks/gradient_weights.py DATA_DIR [--tokens-per-row 16384] [--rows 4] [--steps 20]

"by rows" is what a mean over each row, weighed by the row's events, would give; "by targets" is what the loss gives.
That the gradient itself is that of one mean over all targets is a test (tests/training/test_loop.py).
"""

from __future__ import annotations

import argparse
from itertools import islice

import numpy as np
import torch

from hymate.command import load
from hymate.data.examples import pretraining_examples
from hymate.data.histories import Histories
from hymate.data.loader import Cursor, Rows
from hymate.data.vocabulary import Vocabulary
from hymate.model.objectives import mean_loss
from hymate.model.pretrain_model import PretrainModel
from hymate.training.pretraining import PretrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a prepared dataset")
    parser.add_argument("--tokens-per-row", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    settings = [f"data.path={options.data}", "model=debug", "objective=both", "objective.horizon_hours=12"]
    config = load("pretrain", [*settings, f"data.tokens_per_row={options.tokens_per_row}"], PretrainConfig)
    histories = Histories.open(options.data)
    vocabulary = Vocabulary.of(histories, config.data.min_count)
    rows = Rows(
        histories,
        vocabulary,
        pretraining_examples(histories, "train"),
        context=config.data.context,
        tokens_per_row=config.data.tokens_per_row,
        seed=0,
        crop="random",
    )
    model = PretrainModel(config.model, config.objective, vocabulary.size)
    by_rows, by_targets = ([], [])
    for step, _ in islice(rows.steps(Cursor(), options.rows, 0, 1), options.steps):
        count_RK = torch.stack([model.count_targets(row) for row in step])
        total_K, events_R = count_RK.sum(dim=0), np.array([row.num_events for row in step])
        for count_K, fraction in zip(count_RK, events_R / events_R.sum(), strict=True):
            sum_K = torch.zeros_like(count_K, requires_grad=True)
            loss, _ = mean_loss(dict.fromkeys(model.terms, 1.0), sum_K, total_K)
            by_rows.append(torch.where(count_K > 0, fraction * total_K / count_K, torch.nan))
            by_targets.append(torch.autograd.grad(loss, sum_K)[0] * total_K)
    print("| term | by rows | by targets |\n|---|---|---|")
    for number, (name, weight) in enumerate(model.terms.items()):
        if weight:
            spans = [np.array([float(each[number]) for each in found]) for found in (by_rows, by_targets)]
            print(f"| {name} | " + " | ".join(f"{np.nanmin(x):.2f} to {np.nanmax(x):.2f}" for x in spans) + " |")


if __name__ == "__main__":
    main()
