"""What becomes of the triggers of a task: which get a label, and what a label stands for.

`hymate.data.definition` finds the triggers, the windows and whether the label's event happened. Whether a missing
event was not observed because the patient died (a competing risk) or because the record ends (censoring) is settled
here, and every outcome is counted:

    triggers            times at which the definition's trigger matches (several codes at one time are one trigger)
    excluded            its windows do not hold there (e.g. discharged before the prediction time), or nothing is left
                        to predict: the label window is over before the prediction time, or its event has been seen
    died_before    the competing event, death, came at or before the prediction time: not at risk, no label
    competing_deaths    death after it, before the label window ends and without the label's event: no label under
                        `competing_rule: exclude`, a negative one under `negative`
    censored            the record ends inside the window, without a death there: no label. Under `censoring_rule:
                        exclude` with the label's event or without, under the other rules without
    positives_unseen    with the label's event, and the record ends inside the window, without a death there
    transfers           labels whose window ends in a discharge with an admission within 6 hours; where there are any
    labels, positives, subjects     what remains

so triggers = excluded + died_before + censored + labels, + competing_deaths under `exclude`.

Of a task in time every trigger at risk has a label: what came first, and when. There

    died_before         the competing event came at the prediction time, or between the trigger and it: no label
    competing_deaths    the competing event came first, up to the last horizon
    censored            the record ends before either, and before the last horizon

so triggers = excluded + died_before + labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import polars as pl
import pyarrow as pa

from hymate.config import TaskConfig
from hymate.data.censoring import censoring_weights
from hymate.data.definition import Found
from hymate.data.label_files import COMPETING, EVENT, sizes
from hymate.data.meds import US_PER_DAY


def settled(rows: pl.DataFrame, task: TaskConfig) -> pl.DataFrame:
    """What becomes of each trigger, by the rules above, as further columns.

    dead: before the prediction time. dies: in the label window. competing: that, without the label's event. unseen: the
    record ends in the window, without a death there. labelled: whether it gets a label, whose value is `event`. Of a
    task in time also `until`: when the first of both came, or how far the record was seen.
    """
    if task.in_time:
        return _first_of_both(rows, task)
    dead = (pl.col("died") <= pl.col("prediction_time")).fill_null(False)
    rows = rows.with_columns(dead=dead, dies=~dead & (pl.col("died") <= pl.col("end")).fill_null(False))
    rows = rows.with_columns(
        competing=pl.col("dies") & ~pl.col("event"),
        unseen=~pl.col("dead") & ~pl.col("dies") & (pl.col("last") < pl.col("end")),
    )
    censored = pl.col("unseen") if task.censoring_rule == "exclude" else pl.col("unseen") & ~pl.col("event")
    lost = pl.col("dead") | censored
    if task.competing_rule == "exclude":
        lost |= pl.col("competing")
    return rows.with_columns(labelled=~lost)


def _first_of_both(rows: pl.DataFrame, task: TaskConfig) -> pl.DataFrame:
    """`settled`, of a task in time: of the event and the competing one at the same time, the event is first."""
    if task.competing is None:
        rows = rows.with_columns(rival_before=pl.lit(False), rival_time=pl.lit(None, pl.Datetime("us")))
    horizon = pl.col("prediction_time") + pl.duration(microseconds=round(task.horizons_days[-1] * US_PER_DAY))
    rows = rows.with_columns(ends=pl.min_horizontal("end", horizon), dead=pl.col("rival_before"))
    came, rival = (pl.col(name) <= pl.col("ends") for name in ("event_time", "rival_time"))
    later = (pl.col("event_time") > pl.col("rival_time")).fill_null(False)
    rows = rows.with_columns(event=came.fill_null(False) & ~later, dies=rival.fill_null(False))
    rows = rows.with_columns(competing=pl.col("dies") & ~pl.col("event"), labelled=~pl.col("dead"))
    seen = pl.min_horizontal("last", "ends")
    return rows.with_columns(
        unseen=pl.col("labelled") & ~pl.col("event") & ~pl.col("competing") & (seen < horizon),
        until=pl.when("event").then("event_time").when("competing").then("rival_time").otherwise(seen),
    )


def outcomes(found: Found, triggers: pl.DataFrame, task: TaskConfig) -> dict[str, int]:
    """The counts above, from what `settled` gives."""
    transfers = int((triggers["labelled"] & triggers["transferred"]).sum())
    return {
        "triggers": found.num_triggers,
        "excluded": found.num_triggers - triggers.height,
        "died_before": int(triggers["dead"].sum()),
        "competing_deaths": int((triggers["competing"] & ~triggers["dead"]).sum()),
        "censored": int((triggers["unseen"] & (triggers["labelled"] == bool(task.in_time))).sum()),
        **({} if task.in_time else {"positives_unseen": int((triggers["unseen"] & triggers["event"]).sum())}),
        **({"transfers": transfers} if transfers else {}),
        **sizes(label_table(triggers, task)),
    }


def label_table(rows: pl.DataFrame, task: TaskConfig) -> pa.Table:
    """The labels of those triggers that have one, and `start` and `weight` where the task has them."""
    values = {"boolean_value": pl.col("event")}
    if task.longer_than_days is not None:
        days = (pl.col("end") - pl.col("trigger")).dt.total_microseconds() / US_PER_DAY
        values = {"boolean_value": days > task.longer_than_days, "float_value": days.cast(pl.Float32)}
    if task.in_time:
        days = (pl.col("until") - pl.col("prediction_time")).dt.total_microseconds() / US_PER_DAY
        cause = pl.when("event").then(EVENT).when("competing").then(COMPETING).otherwise(0)
        values |= {"integer_value": cause.cast(pl.Int64), "float_value": days.cast(pl.Float32)}
    extra = ["start"] if task.start is not None else []
    extra += ["weight"] if "weight" in rows.columns else []
    return rows.filter("labelled").select("subject_id", "prediction_time", *extra, **values).to_arrow()


def weighed(shards: Sequence[pl.DataFrame], splits: pa.Table) -> list[pl.DataFrame]:
    """The triggers of each shard with their `weight`, by the censoring in the split of their subject.

    Each split by itself: its scores then are an estimate from its patients alone, nothing of the held-out ones reaches
    training, and where follow-up differs between splits (by calendar time, say) each has its own.
    """
    rows = pl.concat(shards)
    split_of = dict(zip(splits["subject_id"].to_pylist(), splits["split"].to_pylist(), strict=True))
    split = np.array([split_of.get(subject) for subject in rows["subject_id"].to_list()], dtype=object)
    until = pl.coalesce(
        pl.when("event").then("event_time"), pl.when("dies").then("died"), pl.when("unseen").then("last"), "end"
    )
    followed = rows.select((until - pl.col("prediction_time")).dt.total_microseconds()).to_series().to_numpy()
    censored = (rows["unseen"] & ~rows["event"]).to_numpy()
    at_risk = ~rows["dead"].to_numpy()
    weight = np.ones(rows.height)
    for name in set(split.tolist()):
        own = at_risk & (split == name)
        weight[own] = censoring_weights(followed[own], censored[own])
    rows = rows.with_columns(weight=pl.Series(weight, dtype=pl.Float32))
    heights = [shard.height for shard in shards]
    return [rows.slice(stop - height, height) for height, stop in zip(heights, accumulate(heights), strict=True)]
