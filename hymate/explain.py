"""Command: which events and variables moved a risk bundle's predictions, and how faithful the explanation is.

    python -m hymate.explain bundle=BUNDLE data.path=DATA_DIR task=readmission out=DIR

For predictions drawn at random, DIR holds
    explanation.md       what to read: variables by importance, and the measured faithfulness
    variables.parquet    every variable: mean attribution and, of the most important, change of the logit without it
    importance.png, faithfulness.png
and for single patients (those asked for, or those at the highest risk), of each the prediction with the highest risk,
    patients/patient-K.png     a timeline
    patients/events.parquet    their events: code, time, value, attention, attribution

A variable is a code. `hymate.evaluation.attribution` says what the numbers are. patients/ is patient data: protect and
delete it like the records.

Shape legend, besides that of `hymate.evaluation.attribution`: C codes of the dataset.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from hymate import scripts

    scripts.command("explain")

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hymate.config import positive
from hymate.data.meds import US_PER_HOUR, write_parquet
from hymate.errors import UserError
from hymate.evaluation import figures
from hymate.evaluation.attribution import FRACTIONS, Attribution, Case, Explainer, check_explainable, event_table
from hymate.evaluation.explaining import Measured, Spread, work_beside
from hymate.evaluation.tables import markdown
from hymate.inference.bundle import Bundle
from hymate.inference.dataset import (
    Counts,
    Request,
    RequestConfig,
    asked_of,
    is_prepared,
    most,
    open_for,
    predict_dataset,
)
from hymate.inference.predictions import RISK
from hymate.storage.paths import Location, locate, readable, require_folder, write_text

SHOWN, ROWS = 15, 12  # variables in explanation.md, and with a row of their own in a timeline
FALL, RISE = "deletion: the logit falls by", "insertion: the logit rises by"
AWAY, SHORT = "deletion: the logit moves by", "insertion: the logit is still off by"
VERDICT = {
    True: "The attributions find what raises the risk better than attention and chance do.",
    False: "**On these predictions the attributions find what raises the risk no better than attention or chance: do "
    "not rely on them.**",
}


@dataclass(frozen=True)
class ExplainConfig(RequestConfig):
    """`python -m hymate.explain`'s configuration.

    out: folder of the explanation; its patients/ holds patient data.
    subjects: ids of the subjects to show; without any, those at the highest risk.
    num_subjects: how many of those at the highest risk are shown.
    num_predictions: most predictions behind the tables of variables and of faithfulness.
    """

    split: Literal["all", "train", "tuning", "held_out"] = "held_out"
    subjects: list[int] = field(default_factory=list)
    num_subjects: int = 3
    num_predictions: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "num_subjects", "num_predictions")


def run(config: ExplainConfig) -> None:
    bundle, out = config.read_bundle(), locate(config.out)
    check_explainable(bundle)
    bundle.require_whether("explain")
    require_folder(out, "out")
    request = config.request(bundle)
    with work_beside(out) as work:
        predictions, counts = _predictions(request, bundle, config, work)
        patients = chosen_patients(predictions, config.subjects, config.num_subjects)
        drawn = np.random.default_rng(0).permutation(len(predictions))[: config.num_predictions]
        chosen = np.append(patients, np.sort(drawn))
        spread = Spread(request, predictions, chosen, work, most(config.workers, request.device))
        risk_N = predictions[RISK].to_numpy()[patients]
        explain_patients(spread.explainer, spread.cases[: len(patients)], risk_N, out / "patients")
        measured = spread.measured(len(patients))
    cases = spread.cases[len(patients) :]
    variables = variable_table(spread.explainer, cases, measured)
    curves = faithfulness(measured)
    write_parquet(variables, out / "variables.parquet")
    shown = variables.slice(0, SHOWN).to_pydict()
    figures.plot_importance(
        out / "importance.png",
        shown["code"],
        np.array(shown["mean_abs_attribution"], dtype=float),
        np.array(shown["mean_abs_change"], dtype=float),
    )
    figures.plot_faithfulness(out / "faithfulness.png", FRACTIONS, curves)
    write_text(explanation(config, variables, curves, measured.attributions), out / "explanation.md")
    print(f"{counts.unknown / max(counts.read, 1):.1%} of the events read have codes that the bundle does not know")
    print(f"{len(cases)} predictions explained in {out / 'explanation.md'}")
    print(f"{len(patients)} patients shown in {out / 'patients'}: protect it like the records")


def _predictions(request: Request, bundle: Bundle, config: ExplainConfig, work: Location) -> tuple[pa.Table, Counts]:
    """All predictions, in the order of a prepared dataset's examples, or by subject and time; and what was read."""
    examples = None
    if is_prepared(request.data):
        examples = asked_of(open_for(bundle, request.data), config.task, config.split)
        _check_subjects(config.subjects, examples.subject_id_E, config.split)
    (path, *_), counts = predict_dataset(request, work / "predictions.parquet", config.workers)
    predictions = pq.read_table(readable(path))
    _check_subjects(config.subjects, predictions["subject_id"].to_numpy(), config.split)
    if examples is not None:
        order_E = np.lexsort((examples.prediction_time_E, examples.subject_id_E))
        predictions = predictions.take(np.argsort(order_E, kind="stable"))
    return predictions, counts


# ----------------------------------------------------------------------------------------------------- patients


def chosen_patients(predictions: pa.Table, subjects: Sequence[int], count: int) -> np.ndarray:
    """Rows of the predictions, at most one a subject, that of its highest risk: those of `subjects`, or without any the
    `count` first.

    In order of risk, the highest first.
    """
    subject_id_E = predictions["subject_id"].to_numpy()
    order_E = np.argsort(-predictions[RISK].to_numpy(), kind="stable")
    _, first = np.unique(subject_id_E[order_E], return_index=True)
    highest = order_E[np.sort(first)]
    return highest[np.isin(subject_id_E[highest], subjects)] if subjects else highest[:count]


def explain_patients(explainer: Explainer, cases: Sequence[Case], risk_N: np.ndarray, folder: Location) -> None:
    """A timeline of each of the cases, whose risks are given, and the table of all their events."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.glob("patient-*.png"):
        path.unlink()  # of an earlier command, which may have shown others
    tables = []
    for number, (case, risk) in enumerate(zip(cases, risk_N.tolist(), strict=True), start=1):
        (attribution,) = explainer.attributions([case])
        table = event_table(explainer.histories.codes, case, attribution)
        tables.append(table.add_column(0, "patient", pa.array([number] * len(table), pa.int32())))
        static, events = attribution.static_F.sum(), attribution.event_L.sum()
        when = np.datetime64(case.time_us, "us").astype("datetime64[m]")
        title = (
            f"patient {number} (subject {case.history.subject_id}) at {when}: risk {risk:.2f}\n"
            f"logit {attribution.logit:.2f} = {attribution.baseline:.2f} without knowing the events "
            f"{events:+.2f} events {static:+.2f} static"
        )
        row_L, labels = _timeline_rows(explainer.histories.codes, case, attribution)
        hours_L = (case.time_us - case.history.time) / US_PER_HOUR
        plotted = (hours_L, row_L, attribution.event_L, attribution.attention_L, labels)
        figures.plot_timeline(folder / f"patient-{number}.png", title, *plotted)
    write_parquet(pa.concat_tables(tables), folder / "events.parquet")


def _timeline_rows(codes: Sequence[str], case: Case, attribution: Attribution) -> tuple[np.ndarray, list[str]]:
    """Each event's row (L,): the variables that moved the risk most have one each, the others share the last."""
    found, variable_L = np.unique(case.history.code, return_inverse=True)
    total = np.bincount(variable_L, attribution.event_L)
    first = np.argsort(-np.abs(total), kind="stable")[:ROWS]
    row_of = np.full(len(found), len(first))
    row_of[first] = np.arange(len(first))
    labels = []
    for variable in first.tolist():
        last = case.history.value[variable_L == variable][-1]
        labels.append(figures.short(codes[found[variable]]) + ("" if np.isnan(last) else f"  {last:.4g}"))
    others = len(found) - len(first)
    return row_of[variable_L], [*labels, f"{others} other variables"] if others else labels


def _check_subjects(subjects: Sequence[int], subject_id_E: np.ndarray, split: str) -> None:
    for place, known in enumerate(np.isin(subjects, subject_id_E).tolist()):
        if not known:
            raise UserError(
                f"subjects[{place}] has no prediction in split={split}: choose split=all or another subject"
            )


# ------------------------------------------------------------------------------------------------------- predictions


def variable_table(explainer: Explainer, cases: Sequence[Case], measured: Measured) -> pa.Table:
    """All variables of the cases, the most important first.

    predictions: cases that have it. Means over all cases, 0 where a case doesn't have it, in units of the logit:
    mean_attribution, mean_abs_attribution: of the sum over its events; null for the birth (age), which has none.
    mean_change, mean_abs_change: the logit less that without it; null but for the removed variables and the birth.
    """
    codes, removed = explainer.histories.codes, measured.removed
    count_C, attribution_2C, change_2C = np.zeros(len(codes), int), np.zeros((2, len(codes))), np.zeros((2, len(codes)))
    for case, attribution in zip(cases, measured.attributions, strict=True):
        count_C[explainer.variables(case)] += 1
        total_C = attribution.by_code(case, len(codes))
        attribution_2C += total_C, np.abs(total_C)
    change_2C[:, removed] = np.nansum([measured.change_NR, np.abs(measured.change_NR)], axis=1)
    no_change_C = ~np.isin(np.arange(len(codes)), removed)
    no_attribution_C = np.arange(len(codes)) == explainer.birth_code
    N = len(cases)
    table = pa.table(
        {
            "code": codes,
            "predictions": count_C,
            "mean_attribution": pa.array(attribution_2C[0] / N, mask=no_attribution_C),
            "mean_abs_attribution": pa.array(attribution_2C[1] / N, mask=no_attribution_C),
            "mean_change": pa.array(change_2C[0] / N, mask=no_change_C),
            "mean_abs_change": pa.array(change_2C[1] / N, mask=no_change_C),
        }
    )
    order = [("mean_abs_change", "descending"), ("mean_abs_attribution", "descending")]
    return table.filter(pa.array(count_C > 0)).sort_by(order)


def faithfulness(measured: Measured) -> dict[str, dict[str, np.ndarray]]:
    """Measure -> order of the events -> curve (G,), the mean over the cases.

    FALL and RISE take what raised the risk most first; attention, which has no sign, can only take what it weighs
    most. AWAY and SHORT are fair to it: attributions are taken by size, and the sign of the change does not count.
    """
    logit_N = np.array([attribution.logit for attribution in measured.attributions])
    moved = {order: (deleted - logit_N, inserted - logit_N) for order, (deleted, inserted) in measured.moved.items()}
    signed = {order: change for order, change in moved.items() if order != "size"}
    sized = {order: moved["size" if order == "attribution" else order] for order in signed}
    return {
        FALL: {order: -deleted_GN.mean(axis=1) for order, (deleted_GN, _) in signed.items()},
        RISE: {order: inserted_GN.mean(axis=1) for order, (_, inserted_GN) in signed.items()},
        AWAY: {order: np.abs(deleted_GN).mean(axis=1) for order, (deleted_GN, _) in sized.items()},
        SHORT: {order: np.abs(inserted_GN).mean(axis=1) for order, (_, inserted_GN) in sized.items()},
    }


# ------------------------------------------------------------------------------------------------------- report


def explanation(
    config: ExplainConfig,
    variables: pa.Table,
    curves: dict[str, dict[str, np.ndarray]],
    attributions: Sequence[Attribution],
) -> str:
    """explanation.md: nothing in it is about a single patient."""
    names = ["predictions", "mean_abs_attribution", "mean_abs_change", "mean_change"]
    top = [["variable", "in predictions", "attribution", "change when removed", "of these, on average"]]
    for row in variables.slice(0, SHOWN).to_pylist():
        top.append([f"`{row['code']}`", *(_cell(row[name]) for name in names)])
    mean = {measure: {order: float(c.mean()) for order, c in of.items()} for measure, of in curves.items()}
    measured = [["events taken in order of", *mean]]
    measured += [[order, *(f"{of[order]:.2f}" for of in mean.values())] for order in mean[FALL]]
    faithful = all(mean[measure]["attribution"] == max(mean[measure].values()) for measure in (FALL, RISE))
    gap_N = np.abs([attribution.gap for attribution in attributions])
    gaps = f"{gap_N.mean():.2g} on average, {gap_N.max():.2g} at most"
    return f"""\
# Task {config.task.name}: what moved the predicted risk

{len(attributions)} predictions of the split {config.split}, drawn at random. All numbers are in units of the logit.

## Variables

{markdown(top)}

![](importance.png)

Means over all predictions. *Attribution*: the size of the sum over the variable's events, by integrated gradients (the
parts miss the difference that they should sum to by {gaps}).
*Change when removed*: how far the logit is from that of the same history without the variable; where the last column
is positive, having it raises the risk on average. All variables are in `variables.parquet`. These are reasons of the
model, not causes in the patient: of two variables that carry the same information, one may have all the importance.

## Faithfulness

Events are deleted from a history, or it is built up from them alone, and what is left is scored again; means over
{FRACTIONS[0]:.0%} to {FRACTIONS[-1]:.0%} of the events. {VERDICT[faithful]}

{markdown(measured)}

![](faithfulness.png)

In the first two columns what raised the risk most comes first, and larger is better. Attention has no sign, so the last
two take attributions by their size: there a larger deletion and a smaller insertion are better.
"""


def _cell(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
