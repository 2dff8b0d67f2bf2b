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

if __name__ == "__main__":  # before the imports, which take seconds
    from hymate import scripts

    scripts.command("predict")

from dataclasses import dataclass

from hymate.config import Place
from hymate.errors import ConfigError, UserError
from hymate.inference.dataset import Context, RequestConfig, predict_dataset
from hymate.inference.streaming import check_streamable
from hymate.storage.paths import locate, require_file, require_folder


@dataclass(frozen=True)
class PredictConfig(RequestConfig):
    """`python -m hymate.predict`'s configuration.

    out: Parquet file of the predictions; or a folder that gets one for each part of the dataset.
    context: the events read before a prediction time: "bundle" (as many as in fine-tuning) or "all".
    states: with context=all, the folder that keeps each subject's state (patient data), so that only new events are
        read.
    """

    context: Context = "bundle"
    states: Place | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states is not None and self.context != "all":
            raise ConfigError("states=DIR needs context=all: a state stands for the whole history before it")


def run(config: PredictConfig) -> None:
    try:
        _run(config)
    except FloatingPointError as error:  # weights that are finite can still be too large
        raise UserError(f"bundle={config.bundle}: {error}") from error


def _run(config: PredictConfig) -> None:
    bundle, out = config.read_bundle(), locate(config.out)
    (require_file if out.name.endswith(".parquet") else require_folder)(out, "out")
    states = None if config.states is None else locate(config.states)
    if states is not None:
        require_folder(states, "states")
    if config.context == "all":
        check_streamable(bundle.model)
        bundle.require_whether("context=all")
    written, found = predict_dataset(config.request(bundle, config.context, states), out, config.workers)
    left_out = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in found.left_out.items() if count)
    print(f"{found.unknown / max(found.read, 1):.1%} of the events read have codes that the bundle does not know")
    if states is not None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.states.items()))
        print(f"{found.read} events read; states in {states}: {counts}")
    files = " and ".join(map(str, written))
    print(f"{found.predictions} predictions in {files}" + (f" (left out: {left_out})" if left_out else ""))
