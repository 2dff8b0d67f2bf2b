"""Splits by calendar time: a model learns from the past, and is tuned and scored on patients who came later.

What decides is when a subject enters the record: its first event with a time, births aside. That is known when the
patient comes, and does not depend on how the record goes on; a split by the last event, or by each label's own time,
would sort patients by how long they live and how often they return. One subject is in one split.

Subjects who entered before the first date are for training, those before the second for tuning, the others are held
out. A record of a training subject goes on after the first date, which was not known then: such events and labels are
left out, and after the second date those of tuning subjects. A record's end is then censoring, as elsewhere.

Dates must be real. `_refuse_shifted` says what can be seen of dates that are not. A shift by some weeks can't be seen,
and blurs the two dates by as much.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hymate.data.histories import FOLDER, WORK, Splits
from hymate.data.label_files import beside, read_file, write_labels
from hymate.data.meds import (
    DATA_SCHEMA,
    LAST_TIME,
    SPLITS,
    STATIC_TIME,
    US_PER_DAY,
    DataError,
    SplitsConfig,
    is_code,
    iter_events,
    read_batches,
    read_splits,
    write_parquet,
)
from hymate.data.sources.mapped import Rewritten, rewrite
from hymate.storage.paths import Location, files_below, present, readable, write_text

ENTRIES, DATES, LEFT_OUT = (f"{FOLDER}/{WORK}/by_time/{name}" for name in ("entries", "dates.json", "left_out"))
EVENTS, LABELS = f"{LEFT_OUT}/events", f"{LEFT_OUT}/labels"  # how many, of each file
CENTURY_US = 36525 * US_PER_DAY
FEW = 0.01  # of the subjects may have odd dates
Limit = Callable[[np.ndarray], np.ndarray]  # of subject ids (R,) the times (R,), in microseconds since 1970


@dataclass(frozen=True)
class ByTime(Rewritten):
    """Another source with its subjects split by time, whatever splits it brings."""

    splits: SplitsConfig

    def fingerprint(self) -> str:
        # the number is of what is made of the source; another one has it prepared again
        return hashlib.sha256(f"{self.source.fingerprint()} {self.splits} by time, 2".encode()).hexdigest()

    def write_shard(self, shard: str, out: Location) -> None:
        self.source.write_shard(shard, out)
        subjects, entries = [], []
        code_ids: dict[str, int] = {}
        for events in iter_events(out / meds.data_subdirectory / f"{shard}.parquet", code_ids):
            births = [id for code, id in code_ids.items() if is_code(code, meds.birth_code)]
            counts_R = (events.time_R != STATIC_TIME) & ~np.isin(events.code_R, births)
            entry_R = np.where(counts_R, events.time_R, LAST_TIME)
            subjects.append(events.subject_id_R[events.starts])
            entries.append(np.minimum.reduceat(entry_R, events.starts))
        table = pa.table({"subject_id": np.concatenate(subjects), "entry": np.concatenate(entries)})
        write_parquet(table, out / ENTRIES / f"{shard}.parquet")

    def finish(self, out: Location) -> None:
        self.source.finish(out)
        tables = [pq.read_table(readable(out / ENTRIES / f"{shard}.parquet")) for shard in self.shards()]
        subject_id_N, entry_N = (pa.concat_tables(tables)[name].to_numpy() for name in ("subject_id", "entry"))
        dated_N = np.sort(entry_N[entry_N < LAST_TIME])
        _refuse_shifted(dated_N)
        dates = [_date(dated_N, fraction) for fraction in np.cumsum([self.splits.train, self.splits.tuning])]
        # who has no event with a time tells nothing of it
        split_N = np.where(entry_N == LAST_TIME, 0, np.searchsorted(dates, entry_N, side="right"))
        for place, split in enumerate(SPLITS):
            if getattr(self.splits, split) > 0 and not (split_N == place).any():
                raise DataError(f"splits.by=time: no subject is left for {split}: too many enter the record on one day")
        table = pa.table({"subject_id": subject_id_N, "split": np.array(SPLITS)[split_N]})
        write_parquet(meds.SubjectSplitSchema.align(table), out / meds.subject_splits_filepath)
        write_text(json.dumps(dict(zip(SPLITS, dates, strict=False))), out / DATES)


def split_dates(out: Location) -> dict[str, str]:
    """The day from which on nothing of a split is known, for those that have one; while a dataset is prepared."""
    return {split: str(np.datetime64(us // US_PER_DAY, "D")) for split, us in _dates(out).items() if us < LAST_TIME}


def limit(out: Location, splits: Splits) -> Limit | None:
    """From when on nothing of subjects is known; None where the dataset is not split by time."""
    if not (out / DATES).is_file():
        return None
    dates = {**_dates(out), SPLITS[-1]: LAST_TIME}
    names, date_S = sorted(SPLITS), np.array([dates[name] for name in sorted(SPLITS)])
    return lambda subject_id_R: date_S[np.searchsorted(names, splits.of(subject_id_R).astype(str))]


def leave_out_later(shard: str, out: Location) -> None:
    """Leave out of a shard what is after its subjects' split."""
    path, left_out = out / meds.data_subdirectory / f"{shard}.parquet", 0
    limit_of = limit(out, Splits(out, beside=out / FOLDER / WORK / "splits"))

    def kept() -> Iterator[pa.Table]:
        nonlocal left_out
        for batch in read_batches(path, DATA_SCHEMA.names, path):
            later = _later(batch, "time", limit_of)
            left_out += int(later.sum())
            yield pa.Table.from_batches([batch]).filter(pa.array(~later))
        _count(left_out, out / EVENTS / f"{shard}.json")

    rewrite(kept(), path)


def leave_out_later_labels(out: Location) -> None:
    """Leave out the labels whose prediction time is after their subjects' split."""
    folder = out / "labels"
    limit_of = limit(out, Splits(out, beside=out / FOLDER / WORK / "splits"))
    subjects = read_splits(out)["subject_id"]
    for name, path in (files_below(folder, ".parquet") if present(folder) else {}).items():
        labels = read_file(path)
        labels = labels.filter(pc.is_in(labels["subject_id"], subjects))
        later = _later(labels, "prediction_time", limit_of)
        _count(int(later.sum()), out / LABELS / f"{name}.json")
        if later.all():
            beside(path).unlink(missing_ok=True)
            path.unlink()
        elif later.any():
            write_labels(labels.filter(pa.array(~later)), path)


def _count(left_out: int, path: Location) -> None:
    """Note it before the file is rewritten: after a kill in between, nothing that is later is found in it."""
    before = json.loads(path.read_text()) if path.is_file() else 0
    write_text(json.dumps(max(before, left_out)), path)


def counts_left_out(out: Location) -> dict[str, int]:
    """How many events and labels were left out because they are after their subjects' split."""
    names = {EVENTS: "events after their split's dates: left out", LABELS: "labels after them: left out"}
    found = {name: files_below(out / folder, ".json").values() for folder, name in names.items()}
    return {name: sum(json.loads(file.read_text()) for file in files) for name, files in found.items()}


def _later(rows: pa.Table | pa.RecordBatch, name: str, limit_of: Limit | None) -> np.ndarray:
    assert limit_of is not None
    rows = rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows])
    time_R = rows[name].cast(pa.int64()).fill_null(STATIC_TIME).to_numpy()
    return time_R >= limit_of(rows["subject_id"].to_numpy())


def _dates(out: Location) -> dict[str, int]:
    return dict(json.loads((out / DATES).read_text()))


def _date(dated_N: np.ndarray, fraction: float) -> int:
    """The midnight before which about this fraction of the subjects entered."""
    place = round(fraction * len(dated_N))
    return LAST_TIME if place >= len(dated_N) else int(dated_N[place] // US_PER_DAY * US_PER_DAY)


def _refuse_shifted(dated_N: np.ndarray) -> None:
    """Raises DataError where entries, sorted, show that dates are not real."""
    fault = ""
    if not len(dated_N):
        raise DataError("splits.by=time: no event has a time")
    today = np.datetime64(datetime.datetime.now(datetime.UTC).replace(tzinfo=None), "us").astype(np.int64)
    future = len(dated_N) - np.searchsorted(dated_N, today, side="right")
    low, high = dated_N[[round(FEW * (len(dated_N) - 1)), round((1 - FEW) * (len(dated_N) - 1))]]
    days, on_day = np.unique(dated_N // US_PER_DAY, return_counts=True)
    if future > FEW * len(dated_N):
        fault = f"{future:,} of {len(dated_N):,} subjects enter the record in the future"
    elif high - low > CENTURY_US:
        fault = "the subjects enter the record over more than a century"
    elif on_day.max() > len(dated_N) / 2:
        day = np.datetime64(int(days[on_day.argmax()]), "D")
        fault = f"{on_day.max():,} of {len(dated_N):,} subjects enter the record on one day, {day}"
    if fault:
        raise DataError(
            f"splits.by=time: {fault}, so dates are not real here (shifted for each patient, or all begin at one): "
            "leave splits.by out"
        )
