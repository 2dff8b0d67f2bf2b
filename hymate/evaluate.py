"""Command: the full report of a finished model on any labelled data, another hospital's included.

    python -m hymate.evaluate bundle=BUNDLE data.path=DATA_DIR task=readmission out=DIR

The dataset is a prepared one, under the bundle's rules of when events become known; a MEDS folder is prepared under
them first, with `codes` as its code map, and that copy goes at the end. A fraction of its patients
(`recalibrate`, drawn by a hash of their ids) recalibrates the model by a temperature and a shift, and chooses
thresholds for it. The other patients are scored twice: by the model as it is, with the thresholds that the bundle
names, and recalibrated. Nothing else is fitted. `out` gets report.md, results.json, a picture of each model, and
predictions.parquet: of all patients, by the model as it is.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from hymate import scripts

    scripts.command("evaluate")

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from hymate.config import DataPath, InTime, ReportConfig, TaskConfig, check, not_negative
from hymate.data.examples import Examples, labelled_examples, require_both_classes
from hymate.data.histories import Histories
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.tasks import read_or_extract_labels
from hymate.errors import UserError
from hymate.evaluation import alarms, calibration, decisions, external, figures, metrics, results, survival
from hymate.evaluation.explaining import work_beside
from hymate.evaluation.subgroups import subgroups
from hymate.evaluation.transport import transport
from hymate.hashing import seeded_hash
from hymate.inference.bundle import Bundle
from hymate.inference.dataset import RequestConfig, is_prepared, most, open_for, predict_dataset
from hymate.inference.predictions import RISK
from hymate.inference.provenance import initial_weights, trained_on
from hymate.storage.paths import Location, locate, readable, require_folder, write_text

if TYPE_CHECKING:
    from hymate.inference.plain import PlainModels

OF_BUNDLE = "of the bundle, chosen in its training"  # thresholds and policies
CHOSEN_HERE = "chosen on the patients that recalibrated it"


@dataclass(frozen=True)
class EvaluateConfig(RequestConfig):
    """`python -m hymate.evaluate`'s configuration.

    out: folder of the report.
    recalibrate: fraction of the patients that recalibrate the model and choose its thresholds; the others are scored.
        0 scores all of them, by the model as it is alone, as always for a task in time.
    seed: of the draw of that fraction.
    subgroups: as `report.subgroups` in fine-tuning.
    age_bands: as `report.age_bands` in fine-tuning.
    """

    recalibrate: float = 0.2
    seed: int = 0
    subgroups: list[str] = field(default_factory=list)
    age_bands: list[int] = field(default_factory=lambda: ReportConfig().age_bands)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, recalibrate=(0 <= self.recalibrate < 1, "must be at least 0 and below 1"))
        not_negative(self, "seed")
        ReportConfig(False, False, self.subgroups, self.age_bands)  # checks them


def run(config: EvaluateConfig) -> None:
    bundle, out = config.read_bundle(), locate(config.out)
    require_folder(out, "out")
    decides = config.recalibrate or config.task.in_time or external.thresholds_of(bundle.extra, config.task.name)
    if not decides:
        raise UserError(f"{config.bundle}: names no thresholds (an older hymate made it): give recalibrate=0.2")
    config.request(bundle)  # checks the code map
    data = config.data.path
    if is_prepared(locate(data)):
        _evaluate(config, bundle, out, data)
        return
    with work_beside(out) as work:
        copy, workers = str(work / "data"), most(config.workers, "cpu")
        prepare(PrepareConfig("meds", copy, data, config.codes, known=bundle.known, workers=workers))
        _evaluate(replace(config, data=DataPath(copy), codes=None), bundle, out, data)


def _evaluate(config: EvaluateConfig, bundle: Bundle, out: Location, data: str) -> None:
    """The command for a prepared dataset; `data` is what the user calls it."""
    histories = open_for(bundle, locate(config.data.path))
    examples = _labelled(config, histories)
    if config.task.in_time:
        judged = _judged_in_time(config, bundle, config.task.in_time, examples, out)
        judged |= _described(config, bundle, histories, examples, data)
        write_text(external.report_in_time(judged), out / external.REPORT)
        results.write(judged, out)
        external.show_in_time(judged, out)
        return
    fits_E = _recalibrates(config, examples)
    part, scored = examples.only(fits_E), examples.only(~fits_E)
    groups = subgroups(histories, scored, config.subgroups, config.age_bands)
    prob_E, days_E = _predicted(config, bundle, examples, out)
    models, recalibrated_on = {external.AS_IT_IS: (prob_E[fits_E], prob_E[~fits_E])}, None
    if len(part):
        fitted = calibration.recalibrate(part.label_E, calibration.logit(prob_E[fits_E]), part.weight_E)
        models[external.RECALIBRATED] = fitted.probability(prob_E[fits_E]), fitted.probability(prob_E[~fits_E])
        recalibrated_on = {"fraction": config.recalibrate, "seed": config.seed, **results.sizes(part)}
        recalibrated_on |= fitted.record(scored.label_E, prob_E[~fits_E], scored.weight_E)
    found: dict[str, Any] = {"recalibrated_on": recalibrated_on, "models": {}}
    courses = alarms.Courses.of(scored, config.task.utility) if config.task.utility else None
    for name, (prob_M, prob_N) in models.items():
        own = bundle.extra if name == external.AS_IT_IS else {}
        thresholds, policy, chosen = _decided(config.task, own, part, prob_M)
        every, stem = (scored.label_E, prob_N, scored.subject_id_E), name.replace(" ", "-")
        judged = metrics.scores(*every, scored.weight_E)
        judged |= decisions.assess(*every, groups, thresholds, scored.weight_E)
        judged |= {"split": config.split, "thresholds": chosen[0], "picture": f"{stem}.png"}
        figures.plot_task(out / judged["picture"], scored.label_E, prob_N, scored.weight_E, judged, {})
        if courses and policy:
            of_alarms, _ = alarms.judge(courses, prob_N[courses.order_N], policy)
            judged["alarms"] = {"model": of_alarms | {"chosen": chosen[1]}}
            judged["alarms_picture"] = f"{stem}-alarms.png"
            figures.plot_alarms(out / judged["alarms_picture"], judged["alarms"])
        found["models"][name] = judged
    if days_E is not None:
        at_E = ~fits_E & ~np.isnan(examples.days_E)
        columns = examples.days_E, days_E, examples.subject_id_E, examples.weight_E
        found["days"] = metrics.day_scores(*(column_E[at_E] for column_E in columns))
    found |= _described(config, bundle, histories, examples, data)
    # trees know the patients that they learned from by heart
    if config.task.name in bundle.plain and not external.learned_here(found):
        found["parts"] = _parts(bundle.plain[config.task.name], histories, scored, prob_E[~fits_E])
    write_text(external.report(found), out / external.REPORT)
    results.write(found, out)
    external.show(found, out)


def _described(
    config: EvaluateConfig, bundle: Bundle, histories: Histories, examples: Examples, data: str
) -> dict[str, Any]:
    """What is evaluated on what."""
    return {
        "task": config.task.name,
        "bundle": config.bundle,
        "data": data,
        "split": config.split,
        "trained_on": trained_on(bundle.extra, histories),
        "initial_weights": initial_weights(bundle.extra),
        "before": external.scores_before(bundle.extra, config.task.name),
        "transport": transport(histories, examples, bundle.vocabulary, config.seed),
    }


def _parts(
    models: PlainModels, histories: Histories, scored: Examples, mean_N: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Of a mean of a network and plain models, the AUROC and AUPRC of each alone and how much better the mean is.

    mean_N: the mean's probabilities. Its logit is a weighted sum, so the network's follows from it and from that of the
    plain models, but for rounding.
    """
    plain_N = models.part(histories, scored)
    logits = {"network": calibration.logit(mean_N) - plain_N, "plain": plain_N}
    of_patients = scored.subject_id_E, scored.weight_E
    found = {}
    for key, logit_N in logits.items():
        less = metrics.paired_difference(scored.label_E, mean_N, logit_N, *of_patients, metrics.LEVEL_OF_BOTH)
        found[key] = metrics.areas(scored.label_E, logit_N, *of_patients) | {"difference": less}
    return found


def _judged_in_time(
    config: EvaluateConfig, bundle: Bundle, asked: InTime, examples: Examples, out: Location
) -> dict[str, Any]:
    """The scores of a task in time; its predictions and its picture are in the folder."""
    (_, incidences), _ = predict_dataset(config.request(bundle), out / "predictions.parquet", config.workers)
    table = pq.read_table(readable(incidences))
    order_E = np.lexsort((examples.prediction_time_E, examples.subject_id_E))  # that of the file
    incidence_ECH = np.empty((len(examples), asked.num_causes, len(asked.horizons_days)))
    columns = [table[name].to_numpy() for name in table.column_names[2:]]
    incidence_ECH[order_E] = np.stack(columns, axis=1).reshape(incidence_ECH.shape)
    known = examples.days_E, examples.label_E, incidence_ECH, asked.horizons_days
    found = survival.scores(*known, examples.subject_id_E, examples.weight_E)
    found |= {"competing": asked.competing, "picture": "as-it-is.png"}
    figures.plot_in_time(out / found["picture"], found)
    return found


def _decided(
    task: TaskConfig, own: Mapping[str, Any], part: Examples, prob_M: np.ndarray
) -> tuple[dict[float, float], alarms.Policy | None, list[str]]:
    """When a model alerts and, of a task with a utility, has an alarm; and of both where that was chosen.

    As the model's bundle says in `own`, or else as is best with the probabilities of the part that recalibrates.
    """
    thresholds = external.thresholds_of(own, task.name)
    policy = external.policy_of(own, task.name) if task.utility else None
    chosen = [OF_BUNDLE if found else CHOSEN_HERE for found in (thresholds, policy)]
    if not thresholds:
        thresholds = decisions.thresholds(part.label_E, prob_M, part.weight_E)
    if task.utility and not policy and len(part):
        courses = alarms.Courses.of(part, task.utility)
        policy = alarms.choose(courses, prob_M[courses.order_N], task.utility)
    return thresholds, policy, chosen


def _labelled(config: EvaluateConfig, histories: Histories) -> Examples:
    labels = read_or_extract_labels(histories.path, config.task).table
    if config.split == "all":
        histories = histories.with_splits(dict.fromkeys(histories.splits, config.split))
    examples = labelled_examples(histories, labels, config.split)
    # labels of elsewhere may look less far ahead than the model does
    require_both_classes(config.task, {config.split: examples}, any_horizon=True)
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
    files, _ = predict_dataset(config.request(bundle), out / "predictions.parquet", config.workers)
    order_E = np.lexsort((examples.prediction_time_E, examples.subject_id_E))  # that of the files
    columns = []
    for file, name in zip(files, (RISK, "predicted_float_value"), strict=False):
        column_E = np.empty(len(examples), np.float64)
        column_E[order_E] = pq.read_table(readable(file))[name].to_numpy()
        columns.append(column_E)
    return columns[0], columns[1] if len(columns) > 1 else None
