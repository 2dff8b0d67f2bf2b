"""Several MEDS datasets as one source.

A subject's new id is its old one times PLACES, plus the place of its dataset in the list: the last two digits say which
dataset it is from, and the digits before them which subject. So no two subjects get one id, and `original` gives the
old one back. A shard of the first dataset is 0/<shard>.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import meds
import numpy as np
import pyarrow as pa

from hymate.data.histories import FOLDER, WORK
from hymate.data.label_files import read_file, write_labels
from hymate.data.meds import DATA_SCHEMA, DataError, Source, read_batches, read_small, read_splits, write_metadata
from hymate.data.sources.mapped import CODE_MAP, rewrite
from hymate.storage.paths import Location, files_below, present, write_text

PLACES = 100  # most datasets
ORIGIN = "ORIGIN"
LARGEST = np.iinfo(np.int64).max // PLACES - 1


def original(subject_id: int) -> tuple[int, int]:
    """The place of a subject's dataset, and its id there.

    >>> original(1000402), original(-99)
    ((2, 10004), (1, -1))
    """
    return subject_id % PLACES, subject_id // PLACES


@dataclass(frozen=True)
class Several:
    """Datasets that are each a source of their own; splits and labels come along.

    origins: their names, each of which becomes a static code `ORIGIN//<name>` of its subjects; none for no such code.
    """

    sources: tuple[Source, ...]
    origins: tuple[str, ...] = ()
    name: str = "meds"

    def fingerprint(self) -> str:
        made_of = [*(source.fingerprint() for source in self.sources), *self.origins]
        return hashlib.sha256(repr(made_of).encode()).hexdigest()

    def shards(self) -> list[str]:
        return [f"{place}/{shard}" for place, source in enumerate(self.sources) for shard in source.shards()]

    def counts(self) -> dict[str, int]:
        return {}

    def write_shard(self, shard: str, out: Location) -> None:
        place, _, own = shard.partition("/")
        written = _written(out, int(place))
        self.sources[int(place)].write_shard(own, written)
        path = written / meds.data_subdirectory / f"{own}.parquet"
        rewrite(self._events(path, int(place)), out / meds.data_subdirectory / f"{shard}.parquet")
        path.unlink()

    def finish(self, out: Location) -> None:
        splits, codes, about = [], [], []
        for place, source in enumerate(self.sources):
            written = _written(out, place)
            source.finish(written)
            splits.append(_renumbered(read_splits(written), place, written))
            codes.append(read_small(written / meds.code_metadata_filepath, meds.CodeMetadataSchema))
            about.append(json.loads((written / meds.dataset_metadata_filepath).read_text()))
            if present(written / CODE_MAP):
                write_text((written / CODE_MAP).read_text(), out / CODE_MAP.replace(".csv", f"-{place}.csv"))
            labels = written / "labels"
            for name, path in (files_below(labels, ".parquet") if present(labels) else {}).items():
                task, _, file = name.partition("/")
                write_labels(_renumbered(read_file(path), place, path), labels_of(out, task, place) / file)
        described = pa.concat_tables(codes, promote_options="default")
        _, first = np.unique(described["code"].to_numpy(), return_index=True)
        texts = {key: [str(of[key]) for of in about if of.get(key)] for key in ("dataset_name", "license")}
        dataset = {key: " + ".join(dict.fromkeys(of)) for key, of in texts.items() if of}
        write_metadata(out, dataset, pa.concat_tables(splits), described.take(np.sort(first)))

    def _events(self, path: Location, place: int) -> Iterator[pa.Table]:
        """A shard's events with the new ids, each subject's after its origin."""
        last = None
        for batch in read_batches(path, DATA_SCHEMA.names, path):
            table = _renumbered(pa.Table.from_batches([batch]), place, path)
            subject_id_R = table["subject_id"].to_numpy()
            starts = np.flatnonzero(np.diff(subject_id_R, prepend=subject_id_R[:1] - 1))
            starts = starts[subject_id_R[starts] != last]
            last = subject_id_R[-1]
            if self.origins:
                origin = pa.table(
                    {"subject_id": subject_id_R[starts], "code": [f"{ORIGIN}//{self.origins[place]}"] * len(starts)}
                )
                order = np.insert(np.arange(len(table)), starts, len(table) + np.arange(len(starts)))
                code = table["code"].cast(pa.string())
                table = table.set_column(table.column_names.index("code"), "code", code)
                table = pa.concat_tables([table, origin], promote_options="default").take(order)
            yield table


def labels_of(out: Location, task: str, place: int) -> Location:
    """The folder of the labels that a dataset brought."""
    return out / "labels" / task / str(place)


def _written(out: Location, place: int) -> Location:
    """Where a dataset's own source writes it."""
    return out / FOLDER / WORK / "datasets" / str(place)


def _renumbered(table: pa.Table, place: int, named: Location) -> pa.Table:
    """A table with the new ids of its subjects."""
    subject_id_R = table["subject_id"].to_numpy().astype(np.int64)
    if len(subject_id_R) and not -LARGEST <= subject_id_R.min() <= subject_id_R.max() <= LARGEST:
        raise DataError(
            f"{named}: a subject_id has more than {len(str(LARGEST)) - 1} digits, and two more would not fit: number "
            "the subjects of this dataset from 1"
        )
    at = table.column_names.index("subject_id")
    return table.set_column(at, "subject_id", pa.array(subject_id_R * PLACES + place))
