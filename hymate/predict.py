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

import pyarrow as pa

from hymate.command import main
from hymate.config import DataPath, Place, TaskConfig
from hymate.data.examples import Examples, labelled_examples
from hymate.data.histories import Histories, read_metadata
from hymate.data.known import KnownConfig, differing
from hymate.data.label_files import read_labels
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.tasks import read_or_extract_labels
from hymate.device import Wanted, choose
from hymate.errors import ConfigError, UserError
from hymate.inference.bundle import Bundle, build_model, read_bundle
from hymate.inference.scoring import predict, predict_whole, write_predictions
from hymate.inference.states import StateFolder
from hymate.inference.streaming import check_streamable
from hymate.storage.paths import Location, locate, require_file, require_folder


@dataclass(frozen=True)
class PredictConfig:
    """`python -m hymate.predict`'s configuration.

    bundle: a risk bundle, or the folder of a search.
    out: Parquet file of the predictions.
    split: "all" or one of the dataset's splits.
    context: the events read before a prediction time: "bundle" (as many as in fine-tuning) or "all".
    states: with context=all, the folder that keeps each subject's state (patient data), so that only new events are
        read.
    device: "auto" takes a GPU if what the model needs for it is installed, else the CPU; or "cpu", "cuda".
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
            model = build_model(bundle).to(device)
            outputs, num_read, unknown_fraction = predict_whole(model, bundle, histories, examples, device, states)
        else:
            outputs, rows = predict(bundle, histories, examples, device)
            unknown_fraction = rows.unknown_fraction
    written = write_predictions(examples, outputs, locate(config.out))
    dropped = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in examples.dropped.items() if count)
    print(f"{unknown_fraction:.1%} of the events read have codes that the bundle does not know")
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
                f"{path}: prepared under other rules than the bundle's of when events become known ({len(codes)} codes "
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
        prepare(PrepareConfig(source="meds", raw=str(path), out=folder, known=known), here=True)
        yield Path(folder)


def _prediction_times(root: Location, task: TaskConfig) -> pa.Table:
    """The task's labels; labels handed in as a folder need no boolean_value, for prediction needs only the times."""
    return (
        read_labels(locate(task.labels))
        if task.labels is not None
        else read_or_extract_labels(root, task, times_only=True).table
    )


def _examples(histories: Histories, table: pa.Table, split: str) -> Examples:
    if split == "all":
        histories = histories.with_splits(dict.fromkeys(histories.splits, split))
    return labelled_examples(histories, table, split)


if __name__ == "__main__":
    main("predict", PredictConfig, run)
