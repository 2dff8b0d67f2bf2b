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

if __name__ == "__main__":
    from hymate import ending

    ending.watch()  # the imports take seconds

import contextlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from hymate.command import main
from hymate.config import DataPath, Place, TaskConfig
from hymate.data.examples import Examples
from hymate.data.histories import read_metadata
from hymate.data.known import KnownConfig
from hymate.data.meds import US_PER_HOUR, write_parquet
from hymate.data.prepare import PrepareConfig, prepare
from hymate.device import Wanted, choose
from hymate.errors import ConfigError, UserError
from hymate.evaluation import figures
from hymate.evaluation.attribution import FRACTIONS, Attribution, Case, Explainer, deletion_and_insertion, event_table
from hymate.evaluation.tables import markdown
from hymate.inference.bundle import read_bundle
from hymate.inference.dataset import asked_of, open_for
from hymate.inference.scoring import predict
from hymate.storage.paths import Location, locate, require_folder, write_text

T = TypeVar("T")
REMOVED = 40  # variables whose removal is scored, those with the largest attributions; each costs a pass
BLOCK = 16  # cases between two steps of the progress bar
SHOWN, ROWS = 15, 12  # variables in explanation.md, and with a row of their own in a timeline
FALL, RISE = "deletion: the logit falls by", "insertion: the logit rises by"
AWAY, SHORT = "deletion: the logit moves by", "insertion: the logit is still off by"
VERDICT = {
    True: "The attributions find what raises the risk better than attention and chance do.",
    False: "**On these predictions the attributions find what raises the risk no better than attention or chance: do "
    "not rely on them.**",
}


@dataclass(frozen=True)
class ExplainConfig:
    """`python -m hymate.explain`'s configuration.

    bundle: a risk bundle, or the folder of a search.
    out: folder of the explanation; its patients/ holds patient data.
    split: "all" or one of the dataset's splits.
    subjects: ids of the subjects to show; without any, those at the highest risk.
    num_subjects: how many of those at the highest risk are shown.
    num_predictions: most predictions behind the tables of variables and of faithfulness.
    device: "auto" takes a GPU if what the model needs for it is installed, else the CPU; or "cpu", "cuda".
    """

    bundle: Place
    data: DataPath
    task: TaskConfig
    out: Place
    split: Literal["all", "train", "tuning", "held_out"] = "held_out"
    subjects: list[int] = field(default_factory=list)
    num_subjects: int = 3
    num_predictions: int = 200
    device: Wanted = "auto"

    def __post_init__(self) -> None:
        for name in ("num_subjects", "num_predictions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


def run(config: ExplainConfig) -> None:
    """The command."""
    bundle = read_bundle(locate(config.bundle), kind="risk").for_task(config.task.name)
    out = locate(config.out)
    require_folder(out, "out")
    device = choose(config.device, bundle.model)
    with prepared(locate(config.data.path), bundle.known) as root:
        histories = open_for(bundle, root)
        examples = asked_of(histories, config.task, config.split, here=True)
        _check_subjects(config.subjects, examples, config.split)
        outputs, rows = predict(bundle, histories, examples, device)
        prob_E = outputs.probability_ET[:, 0]
        explainer = Explainer(bundle, histories, device)
        patients = chosen_patients(examples, prob_E, config.subjects, config.num_subjects)
        explain_patients(explainer, examples, prob_E, patients, out / "patients")
        drawn = np.random.default_rng(0).permutation(len(examples))[: config.num_predictions]
        cases = explainer.cases(examples, np.sort(drawn))
        blocks = [cases[start : start + BLOCK] for start in range(0, len(cases), BLOCK)]
        attributions = [a for block in _track(blocks, "Attributions") for a in explainer.attributions(block)]
        variables = variable_table(explainer, cases, attributions)
        curves = faithfulness(explainer, cases, attributions)
    write_parquet(variables, out / "variables.parquet")
    shown = variables.slice(0, SHOWN).to_pydict()
    figures.plot_importance(
        out / "importance.png",
        shown["code"],
        np.array(shown["mean_abs_attribution"], dtype=float),
        np.array(shown["mean_abs_change"], dtype=float),
    )
    figures.plot_faithfulness(out / "faithfulness.png", FRACTIONS, curves)
    write_text(explanation(config, variables, curves, attributions), out / "explanation.md")
    print(f"{rows.unknown_fraction:.1%} of the events read have codes that the bundle does not know")
    print(f"{len(cases)} predictions explained in {out / 'explanation.md'}")
    print(f"{len(patients)} patients shown in {out / 'patients'}: protect it like the records")


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


# ----------------------------------------------------------------------------------------------------- patients


def chosen_patients(examples: Examples, prob_E: np.ndarray, subjects: Sequence[int], count: int) -> np.ndarray:
    """Examples, at most one a subject, that of its highest risk: those of `subjects`, or without any the `count` first.

    In order of risk, the highest first.
    """
    order_E = np.argsort(-prob_E, kind="stable")
    _, first = np.unique(examples.subject_id_E[order_E], return_index=True)
    highest = order_E[np.sort(first)]
    return highest[np.isin(examples.subject_id_E[highest], subjects)] if subjects else highest[:count]


def explain_patients(
    explainer: Explainer, examples: Examples, prob_E: np.ndarray, chosen: np.ndarray, folder: Location
) -> None:
    """A timeline of each of the `chosen` examples, and the table of all their events."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in folder.glob("patient-*.png"):
        path.unlink()  # of an earlier command, which may have shown others
    tables = []
    cases = explainer.cases(examples, chosen)
    for number, (example, case) in enumerate(zip(chosen.tolist(), cases, strict=True), start=1):
        (attribution,) = explainer.attributions([case])
        table = event_table(explainer.histories.codes, case, attribution)
        tables.append(table.add_column(0, "patient", pa.array([number] * len(table), pa.int32())))
        static, events = attribution.static_F.sum(), attribution.event_L.sum()
        when = np.datetime64(case.time_us, "us").astype("datetime64[m]")
        title = (
            f"patient {number} (subject {case.history.subject_id}) at {when}: risk {prob_E[example]:.2f}\n"
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


def _check_subjects(subjects: Sequence[int], examples: Examples, split: str) -> None:
    for place, known in enumerate(np.isin(subjects, examples.subject_id_E).tolist()):
        if not known:
            raise UserError(
                f"subjects[{place}] has no prediction in split={split}: choose split=all or another subject"
            )


# ------------------------------------------------------------------------------------------------------- predictions


def variable_table(explainer: Explainer, cases: Sequence[Case], attributions: Sequence[Attribution]) -> pa.Table:
    """All variables of the cases, the most important first.

    predictions: cases that have it. Means over all cases, 0 where a case doesn't have it, in units of the logit:
    mean_attribution, mean_abs_attribution: of the sum over its events; null for the birth (age), which has none.
    mean_change, mean_abs_change: the logit less that without it; null but for the REMOVED variables and the birth.
    """
    codes = explainer.histories.codes
    count_C, attribution_2C, change_2C = np.zeros(len(codes), int), np.zeros((2, len(codes))), np.zeros((2, len(codes)))
    for case, attribution in zip(cases, attributions, strict=True):
        count_C[explainer.variables(case)] += 1
        code = np.concatenate([case.history.static_code, case.history.code])
        total_C = np.bincount(code, np.append(attribution.static_F, attribution.event_L), minlength=len(codes))
        attribution_2C += total_C, np.abs(total_C)
    removed = np.argsort(-attribution_2C[1], kind="stable")[:REMOVED].tolist()
    removed += [] if explainer.birth_code is None else [explainer.birth_code]
    for case in _track(cases, "Removing variables"):
        for variable, change in explainer.effects(case, removed).items():
            change_2C[:, variable] += change, abs(change)
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


def faithfulness(
    explainer: Explainer, cases: Sequence[Case], attributions: Sequence[Attribution]
) -> dict[str, dict[str, np.ndarray]]:
    """Measure -> order of the events -> curve (G,), the mean over the cases.

    FALL and RISE take what raised the risk most first; attention, which has no sign, can only take what it weighs
    most. AWAY and SHORT are fair to it: attributions are taken by size, and the sign of the change does not count.
    """
    rng = np.random.default_rng(0)
    logit_N = np.array([attribution.logit for attribution in attributions])
    orders = {"attribution": [a.event_L for a in attributions], "size": [np.abs(a.event_L) for a in attributions]}
    attention = [a.attention_L for a in attributions if a.attention_L is not None]
    if attention:
        orders["attention"] = attention
    orders["random"] = [rng.random(len(a.event_L)) for a in attributions]
    moved = {}
    for order in _track(list(orders), "Deletion and insertion"):
        deleted_GN, inserted_GN = deletion_and_insertion(explainer, cases, orders[order])
        moved[order] = deleted_GN - logit_N, inserted_GN - logit_N
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


def _track(items: Sequence[T], text: str) -> Iterable[T]:
    return track(items, text, console=Console(stderr=True, quiet=not sys.stderr.isatty()), transient=True)


if __name__ == "__main__":
    main("explain", ExplainConfig, run)
