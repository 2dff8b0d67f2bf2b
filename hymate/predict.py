"""Command: score any MEDS or prepared dataset with a risk bundle.

    python -m hymate.predict bundle=BUNDLE data.path=DATA_DIR task=readmission out=predictions.parquet

The output follows the MEDS prediction schema (what `meds-evaluation` reads): subject_id, prediction_time,
boolean_value where the labels have it, predicted_boolean_value (probability of at least one half) and
predicted_boolean_probability.

context=bundle reads the last events before each prediction time, as many as in the model's fine-tuning. context=all
reads the whole history before it, however long, in bounded memory and once for all of a subject's prediction times.
states=DIR then keeps each subject's state after the last of its predictions: the next run reads only the events since,
and starts at the beginning for prediction times before it (`hymate.states` has the rules). States are patient data.
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

from hymate.batch import UNKNOWN_ID, Batch
from hymate.bundle import Bundle, build_model, read_bundle
from hymate.config import ConfigError, TaskConfig, UserError, main
from hymate.data.histories import Histories, read_metadata
from hymate.data.loader import Examples, Rows, labelled_examples
from hymate.data.meds import read_labels, write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.tasks import labels
from hymate.states import StateFolder
from hymate.streaming import StreamingModel, check_streamable


@dataclass(frozen=True)
class DataPath:
    """path: a prepared dataset, or any MEDS folder (prepared in a temporary folder first)."""

    path: str


@dataclass(frozen=True)
class PredictConfig:
    """bundle: a risk bundle or a tuning run's folder; split: "all" or one of the dataset's splits.

    context: the events read before a prediction time, as many as the bundle's context or all; states: with all, the
    folder that keeps the subjects' states.
    """

    bundle: str
    data: DataPath
    task: TaskConfig
    out: str
    split: Literal["all", "train", "tuning", "held_out"] = "all"
    context: Literal["bundle", "all"] = "bundle"
    states: str | None = None

    def __post_init__(self) -> None:
        if self.states is not None and self.context != "all":
            raise ConfigError("states=DIR needs context=all: a state stands for the whole history before it")


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
    _check_finite(logit_E)
    return logit_E


def predict(bundle: Bundle, histories: Histories, examples: Examples) -> tuple[np.ndarray, Rows]:
    """Probability of each example (E,), and the rows it was read from (with their share of unknown codes)."""
    device = _device()
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
    return _probability(logit_E), rows


def predict_whole(
    bundle: Bundle, histories: Histories, examples: Examples, states: StateFolder | None = None
) -> tuple[np.ndarray, int, float]:
    """Probability of each example (E,) from all events up to its time, how many were read, and how many unknown.

    Each history is read once, chunk by chunk, for all of its examples; it goes on from a state in `states` for
    the examples that lie after it, and leaves there its state after its last example. Raises as `score` does.
    """
    device = _device()
    model = StreamingModel(build_model(bundle).to(device), bundle.vocabulary, histories.codes)
    logit_E = np.full(len(examples), np.nan, dtype=np.float32)
    read = unknown = 0
    order_E = np.lexsort((examples.stop_E, examples.position_E))
    for own_E in np.split(order_E, np.flatnonzero(np.diff(examples.position_E[order_E])) + 1):
        (history,) = histories.read(examples.position_E[own_E[:1]])
        events_L = model.events(history)
        kept = states.load(history.subject_id, events_L, device) if states else None
        state, start = None, 0
        for example in own_E.tolist():
            stop = int(examples.stop_E[example])
            if kept and start < kept.num_events <= stop:
                state, start = kept, kept.num_events
            state = model.append(state, events_L[start:stop])
            read, unknown = read + stop - start, unknown + int((events_L["id"][start:stop] == UNKNOWN_ID).sum())
            start = stop
            logit_E[example] = model.logit(state, history, int(examples.prediction_time_E[example]))
        _check_finite(logit_E[own_E])
        if states and state and (kept is None or kept.num_events < state.num_events):
            states.save(history.subject_id, state, events_L)
    return _probability(logit_E), read, unknown / max(read, 1)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _probability(logit_E: np.ndarray) -> np.ndarray:
    return torch.sigmoid(torch.from_numpy(logit_E)).numpy()


def _check_finite(logit_E: np.ndarray) -> None:
    if not np.isfinite(logit_E).all():
        raise FloatingPointError("the model's predictions are not finite numbers: its training has diverged")


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
    if config.context == "all":
        check_streamable(bundle.model)
    with contextlib.ExitStack() as stack:
        states = None
        if config.states is not None:
            states = stack.enter_context(StateFolder(Path(config.states), bundle.fingerprint))
        root = stack.enter_context(prepared(Path(config.data.path)))
        histories = Histories.open(root)
        examples = _examples(histories, _prediction_times(root, config.task), config.split)
        if not bundle.vocabulary.ids_of(histories.codes).any():
            raise UserError(f"{config.data.path} has none of the codes that the bundle knows: it is coded differently")
        if config.context == "all":
            probability_E, num_read, unknown_share = predict_whole(bundle, histories, examples, states)
        else:
            probability_E, rows = predict(bundle, histories, examples)
            unknown_share = rows.unknown_share
    write_parquet(prediction_table(examples, probability_E), Path(config.out))
    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in examples.dropped.items() if count)
    print(f"{unknown_share:.1%} of the events read have codes that the bundle does not know")
    if states is not None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(states.counts.items()))
        print(f"{num_read} events read; states in {states.path}: {counts}")
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
