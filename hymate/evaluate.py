"""Command: the full report of a finished model on any labelled data, another hospital's included.

    python -m hymate.evaluate bundle=BUNDLE data.path=DATA_DIR task=readmission out=DIR

The dataset is a prepared one, under the bundle's rules of when events become known. A fraction of its patients
(`recalibrate`, drawn by a hash of their ids) recalibrates the model by a temperature and a shift, and chooses
thresholds for it. The other patients are scored twice: by the model as it is, with the thresholds that the bundle
names, and recalibrated. Nothing else is fitted. `out` gets report.md, results.json, a picture of each model, and
predictions.parquet: of all patients, by the model as it is.
"""

from __future__ import annotations

if __name__ == "__main__":
    from hymate import ending

    ending.watch()  # the imports take seconds

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from hymate.command import main
from hymate.config import DataPath, Place, ReportConfig, TaskConfig
from hymate.data.examples import Examples, labelled_examples, require_both_classes
from hymate.data.histories import Histories
from hymate.data.tasks import read_or_extract_labels
from hymate.device import Wanted, choose
from hymate.errors import ConfigError, UserError
from hymate.evaluation import alarms, calibration, decisions, external, figures, metrics, results
from hymate.evaluation.subgroups import subgroups
from hymate.evaluation.transport import transport
from hymate.hashing import seeded_hash
from hymate.inference.bundle import Bundle, read_bundle
from hymate.inference.dataset import Request, open_for, predict_dataset
from hymate.inference.provenance import seen
from hymate.runs import absolute
from hymate.storage.paths import Location, locate, readable, require_folder, write_text


@dataclass(frozen=True)
class EvaluateConfig:
    """`python -m hymate.evaluate`'s configuration.

    bundle: a risk bundle, or the run folder of finetune/tune.py.
    out: folder of the report.
    split: "all" or one of the dataset's splits.
    recalibrate: fraction of the patients that recalibrate the model and choose its thresholds; the others are scored.
        0 scores all of them, by the model as it is alone.
    seed: of the draw of that fraction.
    subgroups: as `report.subgroups` in fine-tuning.
    age_bands: as `report.age_bands` in fine-tuning.
    workers: processes; 0 is as many as CPUs or GPUs have enough to do. On a cluster each of its CPUs or GPUs is one.
    device: "auto" takes a GPU if what the model needs for it is installed, else the CPU; or "cpu", "cuda".
    """

    bundle: Place
    data: DataPath
    task: TaskConfig
    out: Place
    split: Literal["all", "train", "tuning", "held_out"] = "all"
    recalibrate: float = 0.2
    seed: int = 0
    subgroups: list[str] = field(default_factory=list)
    age_bands: list[int] = field(default_factory=lambda: ReportConfig().age_bands)
    workers: int = 0
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.recalibrate < 1:
            raise ConfigError(f"recalibrate must be at least 0 and below 1, got {self.recalibrate}")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        ReportConfig(False, self.subgroups, self.age_bands)  # checks them


def run(config: EvaluateConfig) -> None:
    """The command."""
    config = absolute(config)
    bundle, out = read_bundle(locate(config.bundle), kind="risk").for_task(config.task.name), locate(config.out)
    require_folder(out, "out")
    thresholds = external.thresholds_of(bundle.extra, config.task.name)
    if not thresholds and not config.recalibrate:
        raise UserError(f"{config.bundle}: names no thresholds (an older hymate made it): give recalibrate=0.2")
    histories = open_for(bundle, locate(config.data.path))
    examples = _labelled(config, histories)
    fits_E = _recalibrates(config, examples)
    part, scored = examples.only(fits_E), examples.only(~fits_E)
    groups = subgroups(histories, scored, config.subgroups, config.age_bands)
    prob_E, days_E = _predicted(config, bundle, examples, out)

    of_bundle = "of the bundle, chosen in its training"
    models = {external.AS_IT_IS: (prob_E[~fits_E], thresholds, of_bundle)}
    utility, policies = config.task.utility, {}
    if utility is not None and (named := external.policy_of(bundle.extra, config.task.name)) is not None:
        policies[external.AS_IT_IS] = named, of_bundle
    found: dict[str, Any] = {"recalibrated_on": None}
    if len(part):
        fitted = calibration.recalibrate(part.label_E, calibration.logit(prob_E[fits_E]), part.weight_E)
        chosen = [
            decisions.thresholds(part.label_E, prob_M, part.weight_E)
            for prob_M in (prob_E[fits_E], fitted.probability(prob_E[fits_E]))
        ]
        on = "chosen on the patients that recalibrated it"
        models[external.RECALIBRATED] = fitted.probability(prob_E[~fits_E]), chosen[1], on
        if not thresholds:
            models[external.AS_IT_IS] = prob_E[~fits_E], chosen[0], on
        if utility is not None:
            learned = alarms.Courses.of(part, utility)
            prob_M = prob_E[fits_E][learned.order_N]
            for name, prob in ((external.AS_IT_IS, prob_M), (external.RECALIBRATED, fitted.probability(prob_M))):
                policies.setdefault(name, (alarms.choose(learned, prob, utility), on))
        recalibration = fitted.record(scored.label_E, prob_E[~fits_E], scored.weight_E)
        found["recalibrated_on"] = {"fraction": config.recalibrate, "seed": config.seed, **results.sizes(part)}
        found["recalibrated_on"] |= recalibration
    found["models"] = {}
    for name, (prob_N, threshold_of, chosen_on) in models.items():
        every = scored.label_E, prob_N, scored.subject_id_E
        judged = metrics.scores(*every, scored.weight_E)
        judged |= decisions.assess(*every, groups, threshold_of, scored.weight_E)
        judged |= {"split": config.split, "thresholds": chosen_on, "picture": f"{name.replace(' ', '-')}.png"}
        figures.plot_task(out / judged["picture"], scored.label_E, prob_N, scored.weight_E, judged, None)
        if utility is not None and name in policies:
            courses, (policy, chosen_on) = alarms.Courses.of(scored, utility), policies[name]
            of_alarms = alarms.judge(courses, prob_N[courses.order_N], policy)[0]
            judged["alarms"] = {"model": of_alarms | {"chosen": chosen_on}}
            judged["alarms_picture"] = judged["picture"].replace(".png", "-alarms.png")
            figures.plot_alarms(out / judged["alarms_picture"], judged["alarms"])
        found["models"][name] = judged
    if days_E is not None:
        at_E = ~fits_E & ~np.isnan(examples.days_E)
        columns = examples.days_E, days_E, examples.subject_id_E, examples.weight_E
        found["days"] = metrics.day_scores(*(column_E[at_E] for column_E in columns))
    found |= {
        "task": config.task.name,
        "bundle": config.bundle,
        "data": config.data.path,
        "split": config.split,
        "learned_here": seen(bundle.extra, histories) in ("same split", "another split"),
        "before": external.scores_before(bundle.extra, config.task.name),
        "transport": transport(histories, examples, bundle.vocabulary, config.seed),
    }
    write_text(external.report(found), out / external.REPORT)
    results.write(found, out)
    external.show(found, out)


def _labelled(config: EvaluateConfig, histories: Histories) -> Examples:
    labels = read_or_extract_labels(histories.path, config.task).table
    if config.split == "all":
        histories = histories.with_splits(dict.fromkeys(histories.splits, config.split))
    examples = labelled_examples(histories, labels, config.split)
    require_both_classes(config.task, {config.split: examples})
    return examples


def _recalibrates(config: EvaluateConfig, examples: Examples) -> np.ndarray:
    """Whether an example is of the patients that recalibrate the model (E,)."""
    fits_E = seeded_hash(examples.subject_id_E.view(np.uint64), config.seed) / 2.0**64 < config.recalibrate
    for who, own_E in (("recalibrate the model", fits_E), ("are scored", ~fits_E)):
        if config.recalibrate and len(np.unique(examples.label_E[own_E] > 0.5)) < 2:
            raise UserError(
                f"recalibrate={config.recalibrate}: the patients that {who} have no positive or no negative label: "
                "choose another fraction or seed"
            )
    return fits_E


def _predicted(
    config: EvaluateConfig, bundle: Bundle, examples: Examples, out: Location
) -> tuple[np.ndarray, np.ndarray | None]:
    """The bundle's probabilities and, where it predicts them, days (E,)."""
    device = choose(config.device, bundle.model)
    places = locate(config.bundle), locate(config.data.path)
    request = Request(*places, config.task, config.split, "bundle", device.type)
    files, _ = predict_dataset(request, out / "predictions.parquet", config.workers)
    order_E = np.lexsort((examples.prediction_time_E, examples.subject_id_E))  # that of the files
    columns = []
    for file, name in zip(files, ("predicted_boolean_probability", "predicted_float_value"), strict=False):
        column_E = np.empty(len(examples), np.float64)
        column_E[order_E] = pq.read_table(readable(file))[name].to_numpy()
        columns.append(column_E)
    return columns[0], columns[1] if len(columns) > 1 else None


if __name__ == "__main__":
    main("evaluate", EvaluateConfig, run)
