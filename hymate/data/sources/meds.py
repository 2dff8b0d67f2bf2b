"""A MEDS 0.4 dataset as a source of `hymate.data.prepare`: checked, then linked or copied."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flexible_schema.exceptions import SchemaValidationError, TableValidationError  # type: ignore[import-untyped]

from hymate.data.details import SUMMARY
from hymate.data.label_files import SUFFIX, read_file, write_labels
from hymate.data.meds import (
    DATA_SCHEMA,
    MEDS_VERSION,
    STATIC_TIME,
    UNREADABLE,
    DataError,
    Events,
    SplitsConfig,
    aligned_events,
    check_events,
    codes_table,
    iter_events,
    open_parquet,
    read_batches,
    read_small,
    read_splits,
    unreadable_error,
    write_metadata,
)
from hymate.hashing import seeded_hash
from hymate.storage.paths import Location, atomic_path, files_below, local_copy, present

READABLE_VERSIONS = ("0.3", "0.4")  # 0.3.3, which meds_etl writes, has the same files and columns as 0.4


@dataclass(frozen=True)
class MedsSource:
    """A MEDS 0.4 or 0.3.3 dataset: checked, then linked (copied where linking is impossible).

    Subjects keep the splits of metadata/subject_splits.parquet; without that file they are split by a seeded hash
    of their ids into the fractions of `splits`. Label folders (labels/<task>/) come along.
    """

    raw: Location
    splits: SplitsConfig
    seed: int
    name: str = "meds"

    def shards(self) -> list[str]:
        if not self.raw.is_dir():
            raise DataError(f"{self.raw}: no such folder: raw=DIR must be a MEDS dataset (data/, metadata/)")
        folder = self.raw / meds.data_subdirectory
        shards = sorted(name.removesuffix(".parquet") for name in files_below(folder, ".parquet"))
        if not shards:
            raise DataError(f"{folder}: no *.parquet shards: raw=DIR must be a MEDS dataset (data/, metadata/)")
        self._check_version()
        return shards

    def _check_version(self) -> None:
        path = self.raw / meds.dataset_metadata_filepath
        try:
            version = json.loads(path.read_text())["meds_version"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f'{path}: missing or without "meds_version": write {{"meds_version": "{meds.__version__}"}} there '
                f"if this is a MEDS {MEDS_VERSION} dataset"
            ) from error
        if ".".join(str(version).split(".")[:2]) not in READABLE_VERSIONS:
            raise DataError(
                f"{path}: MEDS version {' '.join(str(version).split())[:20]} is not supported: convert the dataset to "
                f"MEDS {MEDS_VERSION}"
            )

    def fingerprint(self) -> str:
        digest = hashlib.sha256(b"2")  # of what is made of the files; another number has them prepared again
        files = [f"{meds.data_subdirectory}/{shard}.parquet" for shard in self.shards()]
        files += [meds.dataset_metadata_filepath, *self._label_files(), *self._label_files(SUFFIX)]
        if present(self.raw / meds.subject_splits_filepath):
            files.append(meds.subject_splits_filepath)
        else:
            digest.update(repr((self.splits, self.seed)).encode())
        for name in files:
            # A Parquet footer holds sizes, offsets and statistics of all columns: it stands for the content.
            with (self.raw / name).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - (1 << 16)))
                digest.update(f"{name} {size}\n".encode())
                digest.update(file.read())
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        return {}

    def write_shard(self, shard: str, out: Location) -> None:
        raw = self._raw_shard(shard)
        conforms = _check_schema(raw)
        with atomic_path(out / meds.data_subdirectory / f"{shard}.parquet") as temporary:
            if conforms:
                _link_or_copy(raw, temporary)
            else:
                _copy_aligned(raw, temporary)
            check_shard(temporary, named=raw)

    def finish(self, out: Location) -> None:
        subject_id_N = self._subjects()
        with open_parquet(self._raw_shard(self.shards()[0])) as file:
            if "unit" in file.schema_arrow.names:
                print(
                    f"warning: the column `unit` of {self.raw} is not read: where a code has several units, make each "
                    "pair a code of its own (CODE//UNIT)",
                    flush=True,
                )
        if present(self.raw / meds.subject_splits_filepath):
            splits = read_splits(self.raw)
            self._check_all_split(subject_id_N, splits["subject_id"].to_numpy())
        else:
            if self.splits.by == "subject":
                print(f"{self.raw} has no {meds.subject_splits_filepath}: its subjects are split at random", flush=True)
            split_N = self.splits.assign(seeded_hash(subject_id_N.view(np.uint64), self.seed) / 2.0**64)
            splits = pa.table({"subject_id": subject_id_N, "split": split_N})
        codes_path = self.raw / meds.code_metadata_filepath
        codes = read_small(codes_path, meds.CodeMetadataSchema) if present(codes_path) else codes_table({})
        dataset = json.loads((self.raw / meds.dataset_metadata_filepath).read_text())
        del dataset["meds_version"]  # what is written here is of ours
        write_metadata(out, dataset, splits, codes)
        for name, path in self._label_files().items():
            write_labels(read_file(path), out / name)
        if extracted := [task.name for task in self._label_folders() if present(task / SUMMARY)]:
            print(f"{self.raw}: labels that were extracted there don't come along: {', '.join(extracted)}", flush=True)

    def _raw_shard(self, shard: str) -> Location:
        return self.raw / meds.data_subdirectory / f"{shard}.parquet"

    def _label_files(self, suffix: str = ".parquet") -> dict[str, Location]:
        """The files of all label folders, by their path in the dataset; but not what we extracted from it, which is
        extracted again from whatever is made of it.
        """
        return {
            f"labels/{task.name}/{name}": path
            for task in self._label_folders()
            if not present(task / SUMMARY)
            for name, path in files_below(task, suffix).items()
        }

    def _label_folders(self) -> list[Location]:
        folder = self.raw / "labels"
        return sorted((task for task in folder.iterdir() if task.is_dir()), key=str) if present(folder) else []

    def _subjects(self) -> np.ndarray:
        """All subjects, sorted; raises DataError where one is in two shards."""
        shards = self.shards()
        ids = []
        for shard in map(self._raw_shard, shards):
            batches = read_batches(shard, ["subject_id"], shard)
            of_batches = [np.unique(batch.column(0).to_numpy()) for batch in batches]
            ids.append(np.unique(np.concatenate(of_batches)).astype(np.int64))
        shard_N = np.repeat(np.arange(len(shards)), [len(i) for i in ids])
        subject_id_N = np.concatenate(ids)
        order = np.argsort(subject_id_N, kind="stable")
        subject_id_N = subject_id_N[order]
        twice = np.flatnonzero(np.diff(subject_id_N) == 0)
        if len(twice):
            first, second = (self._raw_shard(shards[shard_N[order[twice[0] + k]]]) for k in (0, 1))
            raise DataError(f"{first} and {second}: share {len(twice)} subject(s): write each subject into one shard")
        return subject_id_N

    def _check_all_split(self, subject_id_N: np.ndarray, known_M: np.ndarray) -> None:
        without = int((~np.isin(subject_id_N, known_M)).sum())
        if without:
            path = self.raw / meds.subject_splits_filepath
            raise DataError(
                f"{path}: {without} of {len(subject_id_N)} subjects have no split: add them, "
                "or remove the file to have all subjects split by hash"
            )


def check_shard(path: Location, named: Location) -> None:
    """Check what schemas cannot say of a shard: subjects contiguous, times sorted, values finite, not empty.

    Raises DataError that names the file `named`.
    """
    subjects = []
    for events in iter_events(path, {}, named):
        starts = events.starts
        subjects.append(events.subject_id_R[starts])
        _check_sorted(events, named)
    if not subjects:
        raise DataError(f"{named}: holds no rows: delete the shard or extract it again")
    subject_id_N = np.concatenate(subjects)
    scattered = len(subject_id_N) - len(np.unique(subject_id_N))
    if scattered:
        raise DataError(f"{named}: {scattered} subject(s) not contiguous: sort the shard by subject_id, time")


def _check_sorted(events: Events, named: Location) -> None:
    timed = np.flatnonzero(events.time_R != STATIC_TIME)
    subject_id, time = events.subject_id_R[timed], events.time_R[timed]
    earlier = np.flatnonzero((time[1:] < time[:-1]) & (subject_id[1:] == subject_id[:-1]))
    if len(earlier):
        row = events.first_row + timed[earlier[0] + 1]
        raise DataError(f"{named}: row {row}: earlier than the row before: sort the shard by subject_id, time")


def _check_schema(path: Location) -> bool:
    """Whether a shard conforms to the MEDS schema as it is; False where a cast makes it.

    Raises DataError for columns that are missing or of another kind.
    """
    try:
        with open_parquet(path) as file:
            schema = file.schema_arrow
    except UNREADABLE as error:
        raise unreadable_error(path) from error
    check_events(schema, path)
    try:
        meds.DataSchema.validate(schema.empty_table())
    except (SchemaValidationError, TableValidationError):
        return False
    return True


def _copy_aligned(raw: Location, target: Path) -> None:
    """Copy a shard's MEDS columns, cast to the standard's types."""
    with pq.ParquetWriter(target, DATA_SCHEMA, compression="zstd") as writer:
        first_row = 0
        for batch in read_batches(raw, DATA_SCHEMA.names, raw):
            writer.write_table(aligned_events(batch, raw, first_row))
            first_row += batch.num_rows


def _link_or_copy(raw: Location, target: Path) -> None:
    with local_copy(raw) as found:
        try:
            os.link(found.resolve(), target)  # a link to a symbolic link would be one, too
        except OSError:  # another file system, or one without links
            shutil.copyfile(found, target)
