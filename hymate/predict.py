"""Command: score any MEDS or prepared dataset with a risk bundle.

    python -m hymate.predict bundle=BUNDLE data.path=DATA_DIR task=readmission out=predictions.parquet

The output follows the MEDS prediction schema (what `meds-evaluation` reads): subject_id, prediction_time,
boolean_value where the labels have it, predicted_boolean_value (probability of at least one half) and
predicted_boolean_probability. Of a bundle with several tasks `task` names the one to predict. Where it also predicts
days, these go into a second file, predictions-days.parquet beside predictions.parquet: subject_id, prediction_time,
float_value where the labels have it, and predicted_float_value.

context=bundle reads the last events before each prediction time, as many as in the model's fine-tuning. context=all
reads the whole history before it, however long, in bounded memory and once for all of a subject's prediction times.
states=DIR then keeps each subject's state after the last of its predictions: the next run reads only the events since,
and starts at the beginning for prediction times before it (`hymate.inference.states` has the rules). States are patient
data.
"""

from __future__ import annotations

if __name__ == "__main__":
    from hymate import ending

    ending.watch()  # the imports take seconds

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from hymate.command import main
from hymate.config import ConfigError, Place, TaskConfig, UserError
from hymate.data.examples import Examples, labelled_examples
from hymate.data.feeding import fed
from hymate.data.histories import Histories, read_metadata
from hymate.data.known import KnownConfig, differing
from hymate.data.loader import Rows
from hymate.data.meds import read_labels, write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.tasks import labels
from hymate.device import Wanted, choose
from hymate.inference.bundle import Bundle, build_model, read_bundle
from hymate.inference.states import StateFolder
from hymate.inference.streaming import StreamingModel, check_streamable
from hymate.model.batch import UNKNOWN_ID
from hymate.model.encoder import RiskModel
from hymate.storage.paths import Location, locate, require_file, require_folder


@dataclass(frozen=True)
class DataPath:
    """path: a prepared dataset, or any MEDS folder (prepared in a temporary folder first)."""

    path: Place


@dataclass(frozen=True)
class PredictConfig:
    """`python -m hymate.predict`'s configuration.

    bundle: a risk bundle, or the folder of a search.
    out: Parquet file of the predictions.
    split: "all" or one of the dataset's splits.
    context: the events read before a prediction time: "bundle" (as many as in fine-tuning) or "all".
    states: with context=all, the folder that keeps each subject's state (patient data), so that only new events are
        read.
    device: "auto" takes a GPU where all is there that the model needs, else the CPU; or "cpu", "cuda".
    """

    bundle: Place
    data: DataPath
    task: TaskConfig
    out: Place
    split: Literal["all", "train", "tuning", "held_out"] = "all"
    context: Literal["bundle", "all"] = "bundle"
    states: Place | None = None
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        if self.states is not None and self.context != "all":
            raise ConfigError("states=DIR needs context=all: a state stands for the whole history before it")


@dataclass(frozen=True)
class Outputs:
    """What a model says of E examples for its T tasks; float32. log_days_ET: log(1 + days), NaN for tasks without."""

    logit_ET: np.ndarray
    log_days_ET: np.ndarray

    @classmethod
    def empty(cls, num_examples: int, num_tasks: int) -> Outputs:
        """To be filled."""
        shape = (num_examples, num_tasks)
        return cls(np.full(shape, np.nan, dtype=np.float32), np.full(shape, np.nan, dtype=np.float32))

    @property
    def probability_ET(self) -> np.ndarray:
        return torch.sigmoid(torch.from_numpy(self.logit_ET)).numpy()

    @property
    def days_ET(self) -> np.ndarray:
        with np.errstate(over="ignore"):  # `check` tells of it
            return np.expm1(np.maximum(self.log_days_ET, 0))

    def check(self) -> None:
        """Raises FloatingPointError when anything but finite numbers was predicted."""
        in_days_T = ~np.isnan(self.log_days_ET).all(axis=0)
        if not (np.isfinite(self.logit_ET).all() and np.isfinite(self.days_ET[:, in_days_T]).all()):
            raise FloatingPointError("the model's predictions are not finite numbers: its training has diverged")


def score(model: RiskModel, rows: Rows, device: torch.device) -> Outputs:
    """One pass over `rows`: what the model says of each of its examples, which must have the model's tasks.

    Raises FloatingPointError when the model gives anything but finite numbers.
    """
    outputs = Outputs.empty(*rows.examples.label_ET.shape)
    parts = []
    with torch.no_grad(), contextlib.closing(fed(rows.once(rank=0, world_size=1), device, model.ask)) as ready:
        for batch, counts in ready:
            assert counts, "one rank repeats no row"
            said = model(batch)
            parts.append((batch.example_S, said["logit_ST"].float(), said["log_days_ST"].float()))
    at, logit, log_days = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))  # the only wait
    outputs.logit_ET[at], outputs.log_days_ET[at] = logit, log_days
    outputs.check()
    return outputs


def predict(bundle: Bundle, histories: Histories, examples: Examples, device: torch.device) -> tuple[Outputs, Rows]:
    """What the bundle says of each example, which must have its tasks (see `Bundle.for_task`), and the rows that was
    read from (with their share of unknown codes).
    """
    rows = Rows(
        histories,
        bundle.vocabulary,
        examples,
        context=bundle.data.context,
        tokens_per_row=bundle.data.tokens_per_row,
        seed=0,
        crop="last",
    )
    return score(build_model(bundle).to(device), rows, device), rows


def predict_whole(
    bundle: Bundle,
    histories: Histories,
    examples: Examples,
    device: torch.device,
    states: StateFolder | None = None,
) -> tuple[Outputs, int, float]:
    """As `predict`, from all events up to each example's time; also how many were read, and the share of unknown ones.

    Each history is read once, chunk by chunk, for all of its examples; it goes on from a state in `states` for
    the examples that lie after it, and leaves there its state after its last example. Raises as `score` does.
    """
    model = StreamingModel(build_model(bundle).to(device), bundle.vocabulary, histories.codes)
    outputs = Outputs.empty(len(examples), len(bundle.tasks))
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
            said = model.outputs(state, history, int(examples.prediction_time_E[example]))
            outputs.logit_ET[example], outputs.log_days_ET[example] = said
        Outputs(outputs.logit_ET[own_E], outputs.log_days_ET[own_E]).check()
        if states and state and (kept is None or kept.num_events < state.num_events):
            states.save(history.subject_id, state, events_L)
    return outputs, read, unknown / max(read, 1)


def write_predictions(examples: Examples, outputs: Outputs, path: Location) -> list[Location]:
    """One task's predictions into `path` and, where it predicts days, these into a file beside it; the paths."""
    tables = {path: prediction_table(examples, outputs.probability_ET[:, 0])}
    if not np.isnan(outputs.log_days_ET).any():
        tables[path.with_stem(f"{path.stem}-days")] = day_table(examples, outputs.days_ET[:, 0])
    for file, table in tables.items():
        write_parquet(table, file)
    return list(tables)


def prediction_table(examples: Examples, probability_E: np.ndarray) -> pa.Table:
    """The MEDS prediction table, by subject and time; boolean_value only where every example has a label."""
    values = {} if np.isnan(examples.label_E).any() else {"boolean_value": pa.array(examples.label_E > 0.5, pa.bool_())}
    values["predicted_boolean_value"] = pa.array(probability_E >= 0.5, pa.bool_())
    values["predicted_boolean_probability"] = pa.array(probability_E, pa.float32())
    return _by_subject_and_time(examples, values)


def day_table(examples: Examples, days_E: np.ndarray) -> pa.Table:
    """Predicted days, by subject and time, in the manner of the MEDS prediction schema, which has none for numbers."""
    known = {} if np.isnan(examples.days_E).all() else {"float_value": pa.array(examples.days_E, from_pandas=True)}
    return _by_subject_and_time(examples, {**known, "predicted_float_value": pa.array(days_E, pa.float32())})


def _by_subject_and_time(examples: Examples, values: dict[str, pa.Array]) -> pa.Table:
    columns = {
        "subject_id": pa.array(examples.subject_id_E, pa.int64()),
        "prediction_time": pa.array(examples.prediction_time_E, pa.timestamp("us")),
    }
    return pa.table(columns | values).sort_by([("subject_id", "ascending"), ("prediction_time", "ascending")])


def run(config: PredictConfig) -> None:
    """The command."""
    try:
        _run(config)
    except FloatingPointError as error:  # weights that are finite can still be too large
        raise UserError(f"bundle={config.bundle}: {error}") from error


def _run(config: PredictConfig) -> None:
    bundle = read_bundle(locate(config.bundle), kind="risk").for_task(config.task.name)
    require_file(locate(config.out), "out")
    if config.states is not None:
        require_folder(locate(config.states), "states")
    if config.context == "all":
        check_streamable(bundle.model)
    device = choose(config.device, bundle.model)
    with contextlib.ExitStack() as stack:
        states = None
        if config.states is not None:
            states = stack.enter_context(StateFolder(locate(config.states), bundle.fingerprint))
        opened = asked_of(bundle, locate(config.data.path), config.task, config.split)
        histories, examples = stack.enter_context(opened)
        if config.context == "all":
            outputs, num_read, unknown_share = predict_whole(bundle, histories, examples, device, states)
        else:
            outputs, rows = predict(bundle, histories, examples, device)
            unknown_share = rows.unknown_share
    written = write_predictions(examples, outputs, locate(config.out))
    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in examples.dropped.items() if count)
    print(f"{unknown_share:.1%} of the events read have codes that the bundle does not know")
    if states is not None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(states.counts.items()))
        print(f"{num_read} events read; states in {states.path}: {counts}")
    files = " and ".join(map(str, written))
    print(f"{len(examples)} predictions in {files}" + (f" (left out: {dropped})" if dropped else ""))


@contextlib.contextmanager
def asked_of(bundle: Bundle, path: Location, task: TaskConfig, split: str) -> Iterator[tuple[Histories, Examples]]:
    """The dataset at `path`, prepared or not, and what of it the bundle is to predict: the task's times in `split`.

    Raises UserError where the bundle knows none of the dataset's codes, and where the dataset was prepared under rules
    of when events become known that treat it in another way than the bundle's.
    """
    with prepared(path, bundle.known) as root:
        histories = Histories.open(root)
        if codes := differing(bundle.known, histories.known, histories.codes):
            raise UserError(
                f"{path}: prepared under other rules of when events become known than the bundle's ({len(codes)} codes "
                f"differ, {codes[0]!r} for one): give data.path the MEDS folder that it was prepared from"
            )
        examples = _examples(histories, _prediction_times(root, task), split)
        if not bundle.vocabulary.ids_of(histories.codes).any():
            raise UserError(f"{path} has none of the codes that the bundle knows: it is coded differently")
        yield histories, examples


@contextlib.contextmanager
def prepared(path: Location, known: KnownConfig) -> Iterator[Location]:
    """`path` if it is a prepared dataset, else a temporary one prepared from the MEDS folder at `path`, whose events
    become known by the rules of `known`."""
    if read_metadata(path) is not None or not (path / "data").is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hymate-") as folder:
        prepare(PrepareConfig(source="meds", raw=str(path), out=folder, known=known))
        yield Path(folder)


def _prediction_times(root: Location, task: TaskConfig) -> pa.Table:
    """The task's labels; labels handed in as a folder need no boolean_value, for prediction needs only the times."""
    return read_labels(locate(task.labels)) if task.labels is not None else labels(root, task, times_only=True).table


def _examples(histories: Histories, table: pa.Table, split: str) -> Examples:
    if split == "all":
        histories = histories.with_splits(np.full(len(histories), split, dtype=object))
    return labelled_examples(histories, table, split)


if __name__ == "__main__":
    main("predict", PredictConfig, run)
