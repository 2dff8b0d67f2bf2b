"""What many labels of a stay cost: an epoch over hourly labels beside one with one label a stay.

    python tests/benchmarks/dense.py [--stays 64] [--profile]

trains one epoch of three data sets with the same model and the same synthetic stays (about 40 hours, eight events an
hour): one label at each stay's end; a label each hour, those of a stay answered together; and a label each hour, each
read by itself. Times are CPU seconds of the process, of which the row's making, the model and AdamW are part, the
fastest of --repeats turns; all take turns in one process.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from prepared_rows import events_per_epoch

from hymate.config import ModelConfig
from hymate.data.examples import Examples, labelled_examples
from hymate.data.histories import Histories
from hymate.data.known import KnownConfig
from hymate.data.loader import Rows
from hymate.data.meds import US_PER_HOUR
from hymate.data.statistics import NUM_KNOTS, VOCABULARY_SCHEMA
from hymate.data.tables import events_of, histories_of
from hymate.data.vocabulary import Vocabulary
from hymate.model.encoder import RiskModel

CODES = [f"LAB//{number}" for number in range(40)]
VITALS = 7  # the first codes, measured in most hours; the others once in a day or two
CONTEXT, TOKENS_PER_ROW = 1024, 8192
START_US = 1_700_000_000_000_000
SMALL = ModelConfig(d_model=64, layers="MMMA", window=128)
MODELS = {
    "fusion": SMALL,
    "fusion, 8 members": replace(SMALL, members=8),
    "attention (the paper's)": replace(SMALL, pooling="attention", num_queries=1),
    "mean": replace(SMALL, pooling="mean"),
    "last": replace(SMALL, pooling="last"),
    "variables": replace(SMALL, pooling="variables"),
    "variables, 8 members": replace(SMALL, pooling="variables", members=8),
}


def stays(number: int) -> tuple[Histories, pa.Table]:
    """Histories in memory, and a label for each hour of each."""
    rng = np.random.default_rng(0)
    events: dict[str, list[np.ndarray]] = {"subject_id": [], "time": [], "code": [], "numeric_value": []}
    labels: dict[str, list[np.ndarray]] = {"subject_id": [], "prediction_time": []}
    for subject in range(number):
        hours = int(rng.integers(30, 51))
        measured = rng.random((hours, len(CODES))) < np.where(np.arange(len(CODES)) < VITALS, 0.9, 0.05)
        hour, code = np.nonzero(measured)
        events["subject_id"].append(np.full(len(hour), subject))
        events["time"].append(START_US + hour * US_PER_HOUR)
        events["code"].append(code)
        events["numeric_value"].append(rng.normal(size=len(hour)))
        labels["subject_id"].append(np.full(hours, subject))
        labels["prediction_time"].append(START_US + np.arange(hours) * US_PER_HOUR)
    columns = {name: np.concatenate(parts) for name, parts in events.items()}
    table = pa.table(
        {
            "subject_id": columns["subject_id"],
            "time": pa.array(columns["time"], pa.timestamp("us")),
            "code": np.array(CODES)[columns["code"]],
            "numeric_value": columns["numeric_value"].astype(np.float32),
        }
    )
    asked = {name: np.concatenate(parts) for name, parts in labels.items()}
    label_table = pa.table(
        {
            "subject_id": asked["subject_id"],
            "prediction_time": pa.array(asked["prediction_time"], pa.timestamp("us")),
            "boolean_value": rng.random(len(asked["subject_id"])) < 0.1,
        }
    )
    return histories_of(events_of(table), KnownConfig()), label_table


def vocabulary() -> Vocabulary:
    """Of standard normal values."""
    knots = np.linspace(-2, 2, NUM_KNOTS, dtype=np.float32).tolist()
    one = {"count": 1000, "subjects": 100, "value_count": 1000, "median": 0.0, "scale": 1.0, "quantiles": knots}
    rows = [{"code": code, "id": number, **one} for number, code in enumerate(CODES)]
    return Vocabulary(pa.Table.from_pylist(rows, schema=VOCABULARY_SCHEMA))


def rows_of(histories: Histories, examples: Examples, together: bool) -> Rows:
    return Rows(
        histories,
        vocabulary(),
        examples,
        context=CONTEXT,
        tokens_per_row=TOKENS_PER_ROW,
        seed=0,
        crop="last",
        together=together,
    )


def epoch(model: RiskModel, optimizer: torch.optim.Optimizer, rows: Rows) -> float:
    """CPU seconds of an epoch, a step a row."""
    started = time.process_time()
    for row, _ in rows.once(rank=0, world_size=1):
        model.loss(model.ask(row)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stays", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--profile", action="store_true", help="of an epoch of hourly labels, instead of times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    histories, labels = stays(arguments.stays)
    hourly = labelled_examples(histories, labels, "all")
    once = hourly.only(np.append(np.diff(hourly.position_E) > 0, True))
    settings = {
        "one label a stay": rows_of(histories, once, True),
        "hourly, together": rows_of(histories, hourly, True),
        "hourly, one by one": rows_of(histories, hourly, False),
    }
    events = {name: events_per_epoch(rows) for name, rows in settings.items()}
    print(f"{len(once)} stays, {len(hourly)} hourly labels; events of an epoch: {events}")
    print(f"| pooling | {' | '.join(f'{name}, s' for name in settings)} | ratio together | ratio one by one |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.models:
        torch.manual_seed(0)
        model = RiskModel(MODELS[name], len(CODES) + 2, ["sepsis"]).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if arguments.profile:
            epoch(model, optimizer, settings["hourly, together"])
            with torch.profiler.profile() as profile:
                epoch(model, optimizer, settings["hourly, together"])
            print(name, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30), sep="\n")
            continue
        epoch(model, optimizer, settings["one label a stay"])  # compiles
        found = dict.fromkeys(settings, float("inf"))
        for turn in range(arguments.repeats):
            for key, rows in settings.items():
                if turn == 0 or key != "hourly, one by one":  # once: it takes long, and noise is small beside it
                    found[key] = min(found[key], epoch(model, optimizer, rows))
        one, together, apart = found.values()
        print(f"| {name} | {one:.2f} | {together:.2f} | {apart:.2f} | {together / one:.2f} | {apart / one:.1f} |")


if __name__ == "__main__":
    main()
