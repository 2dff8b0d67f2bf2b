"""Command: score any MEDS or prepared dataset with a risk bundle.

    python -m hymate.predict bundle=BUNDLE data.path=DATA_DIR task=readmission out=predictions.parquet

The output follows the MEDS prediction schema (what `meds-evaluation` reads): subject_id, prediction_time,
boolean_value where the labels have it, predicted_boolean_value (probability of at least one half) and
predicted_boolean_probability.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hymate.batch import Batch
from hymate.bundle import Bundle, build_model, read_bundle
from hymate.config import TaskConfig, UserError, main
from hymate.data.histories import Histories, read_metadata
from hymate.data.loader import Examples, Rows, labelled_examples
from hymate.data.meds import read_labels, write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.tasks import labels


@dataclass(frozen=True)
class DataPath:
    """path: a prepared dataset, or any MEDS folder (prepared in a temporary folder first)."""

    path: str


@dataclass(frozen=True)
class PredictConfig:
    """bundle: a risk bundle or a tuning run's folder; split: "all" or one of the dataset's splits."""

    bundle: str
    data: DataPath
    task: TaskConfig
    out: str
    split: Literal["all", "train", "tuning", "held_out"] = "all"


def score(model: Callable[[Batch], dict[str, Tensor]], rows: Rows, device: torch.device) -> np.ndarray:
    """One pass over `rows`: the logit of each of its examples, float32 (E,).

    Raises FloatingPointError when the model gives anything but finite numbers.
    """
    logit_E = np.full(len(rows.examples), np.nan, dtype=np.float32)
    with torch.no_grad():
        for batch, counts in rows.once(rank=0, world_size=1):
            assert counts, "one rank repeats no row"
            logit_S = model(batch.to(device))["logit_S"]
            logit_E[batch.example_S.numpy()] = logit_S.float().cpu().numpy()
    if not np.isfinite(logit_E).all():
        raise FloatingPointError("the model's predictions are not finite numbers: its training has diverged")
    return logit_E


def predict(bundle: Bundle, histories: Histories, examples: Examples) -> tuple[np.ndarray, Rows]:
    """Probability of each example (E,), and the rows it was read from (with their share of unknown codes)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = Rows(
        histories,
        bundle.vocabulary,
        examples,
        context=bundle.data.context,
        tokens_per_row=bundle.data.tokens_per_row,
        seed=0,
        crop="last",
        weight_by="segments",
    )
    logit_E = score(build_model(bundle).to(device), rows, device)
    return torch.sigmoid(torch.from_numpy(logit_E)).numpy(), rows


def prediction_table(examples: Examples, probability_E: np.ndarray) -> pa.Table:
    """The MEDS prediction table, by subject and time; boolean_value only where every example has a label."""
    columns = {
        "subject_id": pa.array(examples.subject_id_E, pa.int64()),
        "prediction_time": pa.array(examples.prediction_time_E, pa.timestamp("us")),
    }
    if not np.isnan(examples.label_E).any():
        columns["boolean_value"] = pa.array(examples.label_E > 0.5, pa.bool_())
    columns["predicted_boolean_value"] = pa.array(probability_E >= 0.5, pa.bool_())
    columns["predicted_boolean_probability"] = pa.array(probability_E, pa.float32())
    return pa.table(columns).sort_by([("subject_id", "ascending"), ("prediction_time", "ascending")])


def run(config: PredictConfig) -> None:
    """The command."""
    bundle = read_bundle(Path(config.bundle), kind="risk")
    if config.task.name not in bundle.tasks:
        raise UserError(f"the bundle predicts {', '.join(bundle.tasks)}, not task={config.task.name}")
    with prepared(Path(config.data.path)) as root:
        histories = Histories.open(root)
        examples = _examples(histories, _prediction_times(root, config.task), config.split)
        if not bundle.vocabulary.ids_of(histories.codes).any():
            raise UserError(f"{config.data.path} has none of the codes that the bundle knows: it is coded differently")
        probability_E, rows = predict(bundle, histories, examples)
    write_parquet(prediction_table(examples, probability_E), Path(config.out))
    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in examples.dropped.items() if count)
    print(f"{rows.unknown_share:.1%} of the events read have codes that the bundle does not know")
    print(f"{len(examples)} predictions in {config.out}" + (f" (left out: {dropped})" if dropped else ""))


@contextlib.contextmanager
def prepared(path: Path) -> Iterator[Path]:
    """`path` if it is a prepared dataset, else a temporary one prepared from the MEDS folder at `path`."""
    if read_metadata(path) is not None or not (path / "data").is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hymate-") as folder:
        prepare(PrepareConfig(source="meds", raw=str(path), out=folder))
        yield Path(folder)


def _prediction_times(root: Path, task: TaskConfig) -> pa.Table:
    """The task's labels; labels handed in as a folder need no boolean_value, for prediction needs only the times."""
    return read_labels(Path(task.labels)) if task.labels is not None else labels(root, task).table


def _examples(histories: Histories, table: pa.Table, split: str) -> Examples:
    if split == "all":
        everyone = {**histories.index, "split": np.full(len(histories), split, dtype=object)}
        histories = Histories(histories.path, histories.codes, everyone, histories.fingerprint)
    return labelled_examples(histories, table, split)


if __name__ == "__main__":
    main("predict", PredictConfig, run)
