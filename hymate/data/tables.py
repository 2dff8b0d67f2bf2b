"""MEDS tables in memory, of pyarrow, polars or pandas: checked, and made into histories as prepared ones are."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from hymate.data.histories import Histories
from hymate.data.known import KnownConfig
from hymate.data.label_files import LABEL_SCHEMA, aligned_labels
from hymate.data.meds import (
    DATA_SCHEMA,
    UTC,
    DataError,
    Events,
    aligned_events,
    check_events,
    decode,
)


def events_of(given: Any) -> pa.Table:
    """A table of events in the columns and types of DATA_SCHEMA, its rows in their order.

    Raises DataError where it is no table, has no rows, or isn't MEDS data, in the ways that `decode` says, too.
    """
    table = _arrow(given, "events", DATA_SCHEMA.names)
    check_events(table.schema, "events")
    if not table.num_rows:
        raise DataError("events: holds no rows: give the events of at least one subject")
    events = aligned_events(table, "events")
    _decoded(events, {})
    return events


def histories_of(events: pa.Table, known: KnownConfig) -> Histories:
    """The histories of what `events_of` gave, in any order of its rows; those at one time stay in theirs.

    known: when events become known.
    """
    code_ids: dict[str, int] = {}
    return Histories.of_events(_decoded(events, code_ids).sorted(), code_ids, known)


def _decoded(events: pa.Table, code_ids: dict[str, int]) -> Events:
    (rows,) = events.combine_chunks().to_batches()
    return decode(rows, code_ids, 0, "events")


def times_of(at: Any, subject_id_N: np.ndarray) -> pa.Table:
    """Prediction times as MEDS labels: of a table with subject_id and prediction_time, or one time for all subjects.

    Raises DataError where it is neither, or in a zone other than UTC.
    """
    if not isinstance(at, str | datetime):
        return aligned_labels(_arrow(at, "at", LABEL_SCHEMA.names), "at")
    no_time = DataError("at: not a time: write it as 2026-01-01T08:00 (ISO 8601, in UTC)")
    try:
        time = datetime.fromisoformat(at) if isinstance(at, str) else at
        zone, time_us = time.tzname(), np.datetime64(time.replace(tzinfo=None), "us")
    except ValueError:
        raise no_time from None
    if np.isnat(time_us):  # pandas has a time that is none
        raise no_time
    if zone not in (None, *UTC):
        raise DataError("at: a time in another zone than UTC: convert it, as the events' times are in UTC")
    return pa.table({"subject_id": subject_id_N, "prediction_time": np.full(len(subject_id_N), time_us)})


def _arrow(given: Any, named: str, columns: Sequence[str]) -> pa.Table:
    """A table of pyarrow, polars or pandas in pyarrow's memory, at least those of the columns that it has."""
    try:
        if hasattr(given, "to_arrow"):  # polars
            return given.to_arrow()
        if hasattr(given, "iloc"):  # pandas, whose other columns may mix types
            given = given[[name for name in given.columns if name in columns]]
        return given if isinstance(given, pa.Table) else pa.table(given)
    except (TypeError, ValueError, AttributeError, pa.ArrowException):  # from None: it may quote values
        what = "a table of pyarrow, polars or pandas" if named == "events" else "ISO text, a datetime, or a table"
        kind = f"{type(given).__module__.partition('.')[0]}.{type(given).__qualname__}"
        raise DataError(f"{named}: {what} with one type in each column is needed, not {kind}") from None
