"""Columns of labels that MEDS does not have, in a Parquet file beside them: `<stem>.extra.pq` beside `<stem>.parquet`.

MEDS labels allow no further columns. Line n of the file belongs to line n of the labels and repeats its keys:

    subject_id, prediction_time     those of the label
    start                           when the stay or course that the label is about began, at or before the prediction
                                    time; null where it isn't known. The patient may be shown as it was at any time
                                    between, with the same label
    weight                          how much the label counts, 1e-6 to 1e6: its inverse probability of being observed

`start` and `weight` may each be missing.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from hymate.data.meds import (
    LABEL_KINDS,
    LABEL_SCHEMA,
    UNREADABLE,
    DataError,
    cast_column,
    check_columns,
    is_time,
    read_label_file,
    read_parquet,
    unreadable,
    without_null_columns,
    write_parquet,
)
from hymate.storage.paths import Location, files_below

SUFFIX = ".extra.pq"
KEYS = tuple(LABEL_SCHEMA.names[:2])
SCHEMA = pa.schema(
    [*(LABEL_SCHEMA.field(key) for key in KEYS), ("start", pa.timestamp("us")), ("weight", pa.float32())]
)
WEIGHTS = (1e-6, 1e6)  # beyond these one label would be all that counts, or nothing
KINDS = {**LABEL_KINDS, "start": is_time, "weight": pa.types.is_floating}


def beside(labels: Location) -> Location:
    """The file that belongs to a file of labels."""
    return labels.with_suffix(SUFFIX)


def write_labels(table: pa.Table, path: Location) -> None:
    """A file of labels in MEDS's columns, and `start` and `weight`, where the table has them, beside it."""
    extra = [name for name in SCHEMA.names[2:] if name in table.column_names]
    if extra:
        write_parquet(table.select([*KEYS, *extra]), beside(path))
    write_parquet(without_null_columns(table.drop_columns(extra)), path)


def read_labels_and_extras(folder: Location) -> pa.Table:
    """All labels under a folder as `read_labels` has them, with `start` and `weight` where there are any.

    Labels of a file without them have a null start and the weight 1. Raises DataError as `read_labels` does, and
    where a file beside the labels does not fit them.
    """
    files = files_below(folder, ".parquet")
    if not files:
        raise DataError(f"{folder}: no label files (*.parquet): give a folder of MEDS labels")
    belong_to = {extra.with_suffix("").with_suffix(".parquet") for extra in files_below(folder, SUFFIX).values()}
    if alone := belong_to - set(files.values()):
        path = min(alone, key=str)
        raise DataError(f"{beside(path)}: there are no labels {path.name} beside it: move or delete it")
    table = pa.concat_tables([read_file(path) for path in files.values()], promote_options="default")
    if "weight" in table.column_names:
        weight = pc.fill_null(table["weight"], pa.scalar(1.0, pa.float32()))
        table = table.set_column(table.column_names.index("weight"), "weight", weight)
    return without_null_columns(table)


def read_file(path: Location) -> pa.Table:
    """A file of labels, with the `start` and `weight` beside it; DataError where either file is wrong."""
    labels, path = read_label_file(path), beside(path)
    if not path.is_file():
        return labels
    try:
        extra = read_parquet(path)
    except UNREADABLE as error:
        raise unreadable(path) from error
    check_columns(path, extra.schema, KINDS, SCHEMA, f"{SUFFIX} files have")
    if unknown := sorted(set(extra.column_names) - set(SCHEMA.names)):
        raise DataError(f"{path}: column {unknown[0]!r:.80} is none of {', '.join(SCHEMA.names)}: rename it or drop it")

    def column(name: str) -> pa.Array:
        return cast_column(extra[name].combine_chunks(), SCHEMA.field(name), path)

    for key in KEYS:
        if key not in extra.column_names:
            raise DataError(f"{path}: column {key} is missing: repeat the labels' {' and '.join(KEYS)}")
        if not column(key).equals(labels[key].combine_chunks()):
            raise DataError(f"{path}: {key} is not that of the labels, line by line: write it again")
    if "start" in extra.column_names:
        start = column("start")
        if pc.any(pc.greater(start, labels["prediction_time"])).as_py():
            raise DataError(f"{path}: a start lies after its prediction_time: mend it or make it null")
        labels = labels.append_column("start", start)
    if "weight" in extra.column_names:
        weight = column("weight")
        lowest, highest = (pa.scalar(bound, pa.float32()) for bound in WEIGHTS)
        counts = pc.and_(pc.greater_equal(weight, lowest), pc.less_equal(weight, highest))  # null where the weight is
        if counts.true_count < len(counts):
            raise DataError(f"{path}: a weight is null or not between {WEIGHTS[0]:g} and {WEIGHTS[1]:g}: mend it")
        labels = labels.append_column("weight", weight)
    return labels
