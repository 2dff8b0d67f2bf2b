"""Extracting a task's labels from MEDS shards with its ACES definition, and what is wrong where there are none."""

from __future__ import annotations

import errno
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa

from hymate.config import TaskConfig
from hymate.data.codemap import CodeMap
from hymate.data.definition import find, parse, read_predicates
from hymate.data.details import SUMMARY, Details, no_event_error
from hymate.data.known import KnownConfig
from hymate.data.label_files import write_labels
from hymate.data.meds import read_parquet, write_parquet
from hymate.data.outcomes import label_table, outcomes, settled, weighed
from hymate.data.parts import run_parts
from hymate.errors import UserError
from hymate.storage.paths import Location, locked, new_folder, remove_tree, write_text
from hymate.work import worth


class Extracted(NamedTuple):
    """A shard's triggers at which every window holds, with what becomes of them; the counts of `outcomes`."""

    triggers: pl.DataFrame
    counts: dict[str, int]
    details: Details


def extract(
    task: TaskConfig,
    shards: Mapping[str, Location],
    splits: pa.Table | None,
    known: KnownConfig,
    folder: Location,
    fingerprint: str,
) -> dict[str, Any]:
    """Write the labels of every shard and a summary to `folder`, in one move, and return the summary.

    Shards are read in processes, or on a cluster; after a kill those that were read are there. splits: of the subjects,
    where the labels have weights. Raises UserError where no trigger gets a label.
    """
    config, work = parse(task), folder.parent / f".{folder.name}"
    try:
        with locked(work / "lock"), new_folder(folder, SUMMARY) as new:
            workers = worth(sum(path.stat().st_size for path in shards.values()))
            keep = partial(_keep_shard, shards=shards, task=task, known=known, work=work)
            run_parts(f"labels of {task.name}", keep, list(shards), work, fingerprint, workers)
            extracted = {shard: _kept_shard(shard, work) for shard in shards}
            triggers = [each.triggers for each in extracted.values()]
            for shard, rows in zip(shards, triggers if splits is None else weighed(triggers, splits), strict=True):
                write_labels(label_table(rows, task), new / f"{shard}.parquet")
            counts = _sum(each.counts for each in extracted.values())
            parts = [asdict(each.details) for each in extracted.values()]
            details = Details(**{spec.name: _sum(part[spec.name] for part in parts) for spec in fields(Details)})
            _require_labels(task, config, counts, details)
            _warn(task, config, details)
            summary = {
                "fingerprint": fingerprint,
                **asdict(details),
                "counts": counts,
                "never_positive": _never(config, config.windows[config.label_window].label, details.unmatched()),
                "shards": {shard: each.counts for shard, each in extracted.items()},
            }
            write_text(json.dumps(summary, indent=2) + "\n", new / SUMMARY)
            remove_tree(work)
    except UserError:
        remove_tree(work)
        raise
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise UserError(
            f"{folder.parent} cannot be written: make it writable for the labels of {task.name}, or give "
            "task.labels=FOLDER"
        ) from error
    return summary


def _keep_shard(
    shard: str, shards: Mapping[str, Location], task: TaskConfig, known: KnownConfig, work: Location
) -> None:
    found = _extract_shard(shards[shard], task, parse(task), known)
    write_parquet(found.triggers.to_arrow(), work / f"{shard}.parquet")
    write_text(json.dumps({"counts": found.counts, "details": asdict(found.details)}), work / f"{shard}.json")


def _kept_shard(shard: str, work: Location) -> Extracted:
    found = json.loads((work / f"{shard}.json").read_text())
    triggers = pl.DataFrame(pl.from_arrow(read_parquet(work / f"{shard}.parquet")))
    return Extracted(triggers, found["counts"], Details(**found["details"]))


def labels_of_shard(path: Location, task: TaskConfig, known: KnownConfig, codes: CodeMap | None = None) -> pa.Table:
    """The labels of one MEDS shard, its codes mapped, without weights, which need all of them."""
    return label_table(_extract_shard(path, task, parse(task), known, codes).triggers, task)


def _extract_shard(
    path: Location, task: TaskConfig, config: Any, known: KnownConfig, codes: CodeMap | None = None
) -> Extracted:
    predicates = read_predicates(path, config, known, codes)
    found = find(config, predicates.events, task.start, task.kinds, task.competing if task.in_time else None)
    died = pl.col(task.competing) > 0 if task.competing else pl.lit(False)
    subjects = predicates.events.group_by("subject_id").agg(
        last=pl.col("time").max(), died=pl.col("time").filter(died).min()
    )
    rows = found.rows.join(subjects, on="subject_id", how="left").sort("subject_id", "prediction_time")
    triggers = settled(rows, task)
    at_risk = triggers.filter(~pl.col("dead"))
    kinds = {kind: int(at_risk[kind].sum()) for kind in task.kinds}
    details = Details(found.excluded, kinds, predicates.matches, predicates.deaths)
    return Extracted(triggers, outcomes(found, triggers, task), details)


def _sum(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for part in parts:
        total.update(part)
    return dict(total)


# ---------------------------------------------------------------------------------------------- what is wrong


def _never(config: Any, name: str, without: Mapping[str, str]) -> list[str]:
    """Why a predicate holds nowhere: its plain predicates without an event, or itself where each of them has one; none
    where it holds somewhere, as ACES's own do.
    """
    if name not in without:
        return []
    inputs = config.predicates[name].input_predicates if name in config.derived_predicates else []
    return sorted({other for each in inputs for other in _never(config, each, without)}) or [name]


def _warn(task: TaskConfig, config: Any, details: Details) -> None:
    """Print what an extraction that found labels may have missed."""
    if unexpected := [name for name in details.unmatched() if name not in task.kinds]:
        names = ", ".join(unexpected)
        print(f"task {task.name}: no event matches {names}: check the codes in task.definition", file=sys.stderr)
    for what, number in details.excluded.items():
        if what not in config.windows:
            print(f"task {task.name}: {number} triggers get no label because of window {what}", file=sys.stderr)


def _require_labels(task: TaskConfig, config: Any, counts: Mapping[str, int], details: Details) -> None:
    without = details.unmatched()
    static = [name for name, predicate in config.plain_predicates.items() if predicate.static and name in without]
    if not counts["triggers"]:
        never = _never(config, config.trigger.predicate, without)
        if never or static:
            raise no_event_error(task, "trigger" if never else "static predicate", never or static, without)
    if not counts["labels"]:
        why = ", ".join(f"{value} {name}" for name, value in counts.items())
        left_out = [f"{value} because of window {name}" for name, value in details.excluded.items() if value]
        why += f"; excluded: {', '.join(left_out)}" if left_out else ""
        why += f"; predicates that match no event: {', '.join(without)}" if without else ""
        raise UserError(f"task {task.name}: no trigger gets a label ({why}): correct task.definition")
