"""Files of MEDS labels, and of the columns that MEDS labels do not have: `<stem>.extra.pq` beside `<stem>.parquet`.

Line n of the second file belongs to line n of the labels and repeats its keys:

    subject_id, prediction_time     those of the label
    start                           when the stay or course that the label is about began, at or before the prediction
                                    time; null where it isn't known. The patient may be shown as it was at any time
                                    between, with the same label
    weight                          how much the label counts, 1e-6 to 1e6: its inverse probability of being observed

`start` and `weight` may each be missing.

Of a task in time (`TaskConfig.kind`) the labels' own columns hold what came first, and when:

    integer_value                   0 nothing until the end of the record, EVENT, or COMPETING: the competing event
    float_value                     days from the prediction time until then
"""

from __future__ import annotations

import functools

import meds
import pyarrow as pa
import pyarrow.compute as pc

from hymate.data.meds import (
    FIRST_TIME,
    LAST_TIME,
    DataError,
    Named,
    cast_column,
    check_columns,
    is_number,
    is_text,
    is_time,
    read_whole,
    write_parquet,
)
from hymate.storage.paths import Location, files_below

LABEL_SCHEMA: pa.Schema = meds.LabelSchema.schema()
LABEL_KINDS = {
    "subject_id": pa.types.is_integer,
    "prediction_time": lambda kind: is_time(kind) or pa.types.is_date(kind),
    "boolean_value": lambda kind: pa.types.is_boolean(kind) or pa.types.is_null(kind),
    "integer_value": is_number,
    "float_value": is_number,
    "categorical_value": lambda kind: is_text(kind) or pa.types.is_null(kind),
}
EVENT, COMPETING = 1, 2
SUFFIX = ".extra.pq"
KEYS = tuple(LABEL_SCHEMA.names[:2])
EXTRA_SCHEMA = pa.schema(
    [*(LABEL_SCHEMA.field(key) for key in KEYS), ("start", pa.timestamp("us")), ("weight", pa.float32())]
)
EXTRA_KINDS = {**LABEL_KINDS, "start": is_time, "weight": pa.types.is_floating}
WEIGHTS = (1e-6, 1e6)  # beyond these one label would be all that counts, or nothing


def beside(labels: Location) -> Location:
    """The file that belongs to a file of labels."""
    return labels.with_suffix(SUFFIX)


def write_labels(table: pa.Table, path: Location) -> None:
    """A file of labels in MEDS's columns, and `start` and `weight`, where the table has them, beside it."""
    extra = [name for name in EXTRA_SCHEMA.names[2:] if name in table.column_names]
    if extra:
        write_parquet(table.select([*KEYS, *extra]), beside(path))
    write_parquet(without_null_columns(table.drop_columns(extra)), path)


def read_labels(folder: Location) -> pa.Table:
    """All labels under a folder: subject_id, prediction_time, the value columns that hold anything, and `start` and
    `weight` where there are any; labels of a file without these have a null start and the weight 1.

    Raises DataError where there are no labels, where they are malformed, and where a file beside them does not fit.
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


def without_null_columns(labels: pa.Table) -> pa.Table:
    """Labels without the value columns that hold nothing."""

    def is_null(name: str) -> bool:
        return labels[name].null_count == labels.num_rows and (labels.num_rows > 0 or name != "boolean_value")

    return labels.drop_columns([name for name in labels.column_names[2:] if is_null(name)])


def sizes(labels: pa.Table) -> dict[str, int]:
    """How many labels, positive ones and subjects there are."""
    return {
        "labels": labels.num_rows,
        "positives": pc.sum(labels["boolean_value"]).as_py() or 0,
        "subjects": pc.count_distinct(labels["subject_id"]).as_py(),
    }


def read_file(path: Location) -> pa.Table:
    """A file of labels, with the `start` and `weight` beside it; DataError where either file is wrong."""
    labels, path = _read_standard(path), beside(path)
    if not path.is_file():
        return labels
    extra = read_whole(path)
    check_columns(path, extra.schema, EXTRA_KINDS, EXTRA_SCHEMA, f"{SUFFIX} files have")
    if unknown := sorted(set(extra.column_names) - set(EXTRA_SCHEMA.names)):
        raise DataError(
            f"{path}: column {unknown[0]!r:.80} is none of {', '.join(EXTRA_SCHEMA.names)}: rename it or drop it"
        )

    def column(name: str) -> pa.Array:
        return cast_column(extra[name].combine_chunks(), EXTRA_SCHEMA.field(name), path)

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


def _read_standard(path: Location) -> pa.Table:
    """A file of labels without what is beside it, in the standard's columns and types."""
    table = read_whole(path)
    labels = aligned_labels(table, path)
    time = table["prediction_time"].type
    if pa.types.is_timestamp(time) and time.tz is not None:
        _note_utc()
    return labels


def aligned_labels(table: pa.Table, path: Named) -> pa.Table:
    """A table of labels in the standard's columns and types; raises DataError where it is malformed."""
    check_columns(path, table.schema, LABEL_KINDS, LABEL_SCHEMA, "MEDS labels have")
    columns = []
    for spec in LABEL_SCHEMA:
        required = spec.name in LABEL_SCHEMA.names[:2]
        if spec.name not in table.column_names:
            if required:
                raise DataError(f"{path}: column {spec.name} is missing: MEDS labels need it")
            columns.append(pa.nulls(table.num_rows, spec.type))
            continue
        columns.append(cast_column(table[spec.name].combine_chunks(), spec, path))
        nulls = table[spec.name].null_count
        if (required and nulls) or (spec.name == "boolean_value" and 0 < nulls < table.num_rows):
            raise DataError(f"{path}: column {spec.name} has nulls: drop those rows")
    labels = pa.table(columns, schema=LABEL_SCHEMA)
    times = pc.min_max(labels["prediction_time"].cast(pa.int64())).as_py()
    if labels.num_rows and not FIRST_TIME <= times["min"] <= times["max"] < LAST_TIME:
        raise DataError(f"{path}: a prediction_time is outside the years 1 to 9999: mend it or drop its row")
    return labels


@functools.cache  # one line for all files
def _note_utc() -> None:
    print("Note: the labels' times are in UTC, and are taken as they stand: the data's must be in UTC, too", flush=True)
