"""Command: raw data -> MEDS -> prepared histories and vocabulary.

    python -m hymate.data.prepare source=meds raw=RAW_DIR out=DATA_DIR workers=4

Each stage goes over the shards in parallel processes and streams through a shard: a process holds about ROWS
events, one subject, the splits of all subjects (68 bytes each, measured) and per code at most SAMPLE_SIZE values,
whatever the size of the dataset. Files appear whole or not at all, and a journal under histories/.work says which
are done, so that a killed preparation continues when the command is given again.
"""

from __future__ import annotations

if __name__ == "__main__":
    from hymate import ending

    ending.watch()  # the imports take seconds

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hymate.command import CONFIGS, main
from hymate.config import Place
from hymate.data.histories import FOLDER, FORMAT_VERSION, Splits, read_metadata, write_histories
from hymate.data.known import NEVER, KnownConfig, KnownTimes, sentences
from hymate.data.meds import (
    RENAME_SPLITS,
    SPLITS,
    DataError,
    Source,
    SplitsConfig,
    codes_table,
    iter_events,
    read_splits,
    write_parquet,
)
from hymate.data.sources.meds import MedsSource
from hymate.data.sources.physionet2012 import PhysioNet2012Source
from hymate.data.statistics import CodeStatistics
from hymate.data.synthetic.course import SyntheticConfig
from hymate.data.synthetic.source import SyntheticSource
from hymate.ending import without_ctrl_c
from hymate.errors import ConfigError, UserError
from hymate.storage.paths import Location, UrlPath, locate, locked, readable, remove_tree, require_folder, write_text
from hymate.storage.remote import StorageError
from hymate.trees import build, parse_yaml, to_tree

WORK = ".work"  # inside histories/: the journal and what later stages need
JOURNAL_S = 10.0  # between two journals at a URL


@functools.cache
def mimic() -> KnownConfig:
    """The rules for MIMIC-style codes, configs/known/mimic.yaml."""
    return build(KnownConfig, parse_yaml((CONFIGS / "known" / "mimic.yaml").read_text()))


@dataclass(frozen=True)
class PrepareConfig:
    """`python -m hymate.data.prepare`'s configuration.

    source: what `raw` holds; "synthetic" makes its own data.
    out: new folder of the prepared dataset, or one that an interrupted command left.
    raw: folder of the raw data; "synthetic" needs none.
    splits: fractions of the subjects, where the source does not bring its own splits.
    known: when events become known, of source=meds; the events of the other sources are known at their stamps.
    seed: of everything random.
    workers: processes; each holds some 0.3 GB, and 68 bytes a patient.
    synthetic: the synthetic cohort, of source=synthetic.
    """

    source: Literal["physionet2012", "meds", "synthetic"]
    out: Place
    raw: Place | None = None
    splits: SplitsConfig = field(default_factory=SplitsConfig)
    known: KnownConfig = field(default_factory=mimic)
    seed: int = 0
    workers: int = 2
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers must be at least 1, got {self.workers}")
        if self.source != "synthetic" and self.raw is None:
            raise ConfigError(f"raw is required with source={self.source}: add raw=DIR to the command")
        if self.source != "meds" and self.known.rules and self.known != mimic():
            raise ConfigError(f"known is for source=meds, not for source={self.source}: leave it out")

    @property
    def rules(self) -> KnownConfig:
        """When the source's events become known."""
        return self.known if self.source == "meds" else KnownConfig()

    def open_source(self) -> Source:
        """The configured source."""
        if self.source == "synthetic":
            return SyntheticSource(self.synthetic, self.splits)
        kind = PhysioNet2012Source if self.source == "physionet2012" else MedsSource
        return kind(locate(str(self.raw)).absolute(), self.splits, self.seed)


def prepare(config: PrepareConfig) -> None:
    """Write the prepared dataset to `config.out`, continuing what an earlier run left there.

    Raises DataError where the raw data are wrong (nothing is left in `out` then), UserError where `out` belongs
    to something else or the disk is full.
    """
    console = Console(stderr=True)
    source, rules, out = config.open_source(), config.rules, locate(config.out).absolute()
    if read_metadata(out) is None:
        require_folder(out, "out")
    shards = source.shards()
    made_of = f"{FORMAT_VERSION} {source.name} {source.fingerprint()}" + (f" {rules}" if rules.rules else "")
    fingerprint = hashlib.sha256(made_of.encode()).hexdigest()
    if _is_complete(out, fingerprint):
        console.print(f"{out} is already prepared from this source: nothing to do")
        return
    # two preparations at a URL, which has no locks, do each other's work again
    taken = f"{out}: another preparation is writing there: wait for it, or change out=DIR"
    with locked(out / FOLDER / WORK / "lock", taken), _bar(console) as bar:
        started = time.monotonic()
        journal = Journal(out / FOLDER / WORK / "journal.jsonl", fingerprint)
        try:
            with journal, _Stages(journal, bar, shards, config.workers) as stages:
                _run(source, out, rules, fingerprint, stages)
        except DataError:
            _remove(out)
            raise
    remove_tree(out / FOLDER / WORK)
    metadata = read_metadata(out)
    assert metadata is not None
    if others := [split for split in metadata["splits"] if split not in SPLITS]:
        names = ", ".join(map(repr, others))[:200]
        console.print(
            f"warning: no training or scoring uses the splits {names}: {RENAME_SPLITS}", markup=False, soft_wrap=True
        )
    if missing := read_splits(out).num_rows - sum(size["subjects"] for size in metadata["splits"].values()):
        console.print(
            f"warning: {missing:,} subjects of {meds.subject_splits_filepath} have no events: is a shard missing, or "
            "is its name without .parquet?",
            markup=False,
            soft_wrap=True,
        )
    for split, size in metadata["splits"].items():
        console.print(f"{split}: {size['subjects']:,} subjects, {size['events']:,} events")
    for sentence in sentences(metadata["known"], metadata["known_events"]):
        console.print(sentence, markup=False, soft_wrap=True)
    console.print(f"prepared {out} in {time.monotonic() - started:.0f} s")


def _run(source: Source, out: Location, known: KnownConfig, fingerprint: str, stages: _Stages) -> None:
    stages.each("write MEDS", functools.partial(source.write_shard, out=out))
    stages.once("metadata", functools.partial(source.finish, out))
    stages.each("count codes", functools.partial(count_shard, out=out, known=known))
    stages.once("vocabulary", functools.partial(_write_vocabulary, out, stages.shards))
    stages.each("write histories", functools.partial(encode_shard, out=out, known=known))
    _write_index(out, stages.shards, source.name, known, fingerprint)


# ------------------------------------------------------------------------------------------------------- stages


def count_shard(shard: str, out: Location, known: KnownConfig) -> None:
    """Gather the code statistics of one written shard."""
    statistics = CodeStatistics()
    splits, times = _splits(out), KnownTimes(known)
    for stamped in iter_events(out / meds.data_subdirectory / f"{shard}.parquet", statistics.code_ids):
        events = times.apply(stamped, statistics.code_ids)
        starts = events.starts
        is_train_N = splits.of(events.subject_id_R[starts]) == meds.train_split
        is_train_R = np.repeat(is_train_N, np.diff(starts, append=len(events)))
        statistics.add(events, is_train_R & (events.time_R != NEVER), shard)
    write_parquet(statistics.table(), out / FOLDER / WORK / "statistics" / f"{shard}.parquet")


def encode_shard(shard: str, out: Location, known: KnownConfig) -> None:
    """Write the histories of one shard, its part of the index and what the rules did to its events."""
    codes = pq.read_table(readable(out / FOLDER / "vocabulary.parquet"), columns=["code"])["code"].to_pylist()
    data = out / meds.data_subdirectory / f"{shard}.parquet"
    code_ids = {code: id for id, code in enumerate(codes)}
    times = KnownTimes(known)
    index = write_histories(data, out / FOLDER / f"{shard}.parquet", shard, code_ids, _splits(out), times)
    write_parquet(index, out / FOLDER / WORK / "index" / f"{shard}.parquet")
    write_text(json.dumps(times.counts), out / FOLDER / WORK / "known" / f"{shard}.json")


def _splits(out: Location) -> Splits:
    return _splits_of(out, (out / meds.subject_splits_filepath).stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _splits_of(out: Location, version: int) -> Splits:
    return Splits(read_splits(out))


def _write_vocabulary(out: Location, shards: Sequence[str]) -> None:
    statistics = CodeStatistics()
    for shard in shards:
        statistics.merge(pq.read_table(readable(out / FOLDER / WORK / "statistics" / f"{shard}.parquet")))
    vocabulary = statistics.vocabulary()
    write_parquet(vocabulary, out / FOLDER / "vocabulary.parquet")

    described = pq.read_table(readable(out / meds.code_metadata_filepath))
    others = vocabulary["code"].filter(pc.invert(pc.is_in(vocabulary["code"], described["code"])))
    added = codes_table(dict.fromkeys(others.to_pylist()))
    write_parquet(
        pa.concat_tables([described, added], promote_options="default"),
        out / meds.code_metadata_filepath,
    )


def _write_index(out: Location, shards: Sequence[str], source: str, known: KnownConfig, fingerprint: str) -> None:
    parts = (readable(out / FOLDER / WORK / "index" / f"{shard}.parquet") for shard in shards)
    index = pa.concat_tables([pq.read_table(part) for part in parts])
    write_parquet(index, out / FOLDER / "index.parquet")
    sizes = index.group_by("split").aggregate([("subject_id", "count"), ("num_events", "sum")]).to_pylist()
    metadata = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "fingerprint": fingerprint,
        "splits": {
            size["split"]: {"subjects": size["subject_id_count"], "events": size["num_events_sum"]}
            for size in sorted(sizes, key=lambda size: size["split"])
        },
    }
    if known.rules:
        of_shards = [json.loads((out / FOLDER / WORK / "known" / f"{shard}.json").read_text()) for shard in shards]
        counts = {
            name: {count: sum(of_shard[name][count] for of_shard in of_shards) for count in ("moved", "left_out")}
            for name in known.rules
        }
        metadata |= {"known": to_tree(known), "known_events": counts}
    write_text(json.dumps(metadata, indent=1) + "\n", out / FOLDER / "metadata.json")


class Journal:
    """The finished (stage, shard) pairs of an unfinished preparation: a JSON line each, after one that names it.

    At a URL, where nothing can be appended, it is written again now and then and when a `with` block ends: what a kill
    loses of it is done again.
    """

    def __init__(self, path: Location, fingerprint: str) -> None:
        header = {"fingerprint": fingerprint}
        if not path.is_file():
            write_text(json.dumps(header) + "\n", path)
        # A line that a kill cut short is no newline-ended line: it does not count, and the next one starts afresh.
        lines = path.read_text().split("\n")[:-1]
        if json.loads(lines[0]) != header:
            out = path.parent.parent.parent
            raise UserError(
                f"{out}: holds an unfinished preparation of other data or settings: delete it, or change out"
            )
        write_text("\n".join(lines) + "\n", path)
        self._done = {tuple(json.loads(line)) for line in lines[1:]}
        self._path, self._lines, self._written = path, lines, time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if isinstance(self._path, UrlPath) and kind is not StorageError:
            self._write()

    def is_done(self, stage: str, shard: str) -> bool:
        return (stage, shard) in self._done

    def record(self, stage: str, shard: str) -> None:
        self._lines.append(json.dumps([stage, shard]))
        if isinstance(self._path, Path):
            with self._path.open("a") as file:
                file.write(self._lines[-1] + "\n")
        elif time.monotonic() - self._written > JOURNAL_S:
            self._write()

    def _write(self) -> None:
        write_text("\n".join(self._lines) + "\n", self._path)
        self._written = time.monotonic()


class _Stages:
    """Runs stages over shards in processes, leaving out what the journal has as done."""

    def __init__(self, journal: Journal, bar: Progress, shards: Sequence[str], workers: int) -> None:
        self.shards = shards
        self._journal = journal
        self._bar = bar
        self._pool = None
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                for child in multiprocessing.active_children():
                    child.kill()  # a shard may take minutes
            self._pool.shutdown(cancel_futures=True)

    def each(self, stage: str, task: Callable[[str], None]) -> None:
        """Run `task(shard)` for every shard."""
        todo = [shard for shard in self.shards if not self._journal.is_done(stage, shard)]
        row = self._bar.add_task(stage, total=len(self.shards), completed=len(self.shards) - len(todo))
        for shard in self._results(task, todo):
            self._journal.record(stage, shard)
            self._bar.advance(row)

    def once(self, stage: str, task: Callable[[], None]) -> None:
        """Run `task()`."""
        row = self._bar.add_task(stage, total=1)
        if not self._journal.is_done(stage, ""):
            task()
            self._journal.record(stage, "")
        self._bar.advance(row)

    def _results(self, task: Callable[[str], None], todo: Sequence[str]) -> Iterator[str]:
        if self._pool is None:
            for shard in todo:
                task(shard)
                yield shard
            return
        with without_ctrl_c():
            futures = {self._pool.submit(task, shard): shard for shard in todo}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures.pop(future)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out: give the same command with fewer "
                "workers=; it continues"
            ) from error


def _start_worker() -> None:
    pa.set_cpu_count(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # a killed command leaves no process behind that still writes

    threading.Thread(target=follow, daemon=True).start()


# ------------------------------------------------------------------------------------------------ output folder


def _is_complete(out: Location, fingerprint: str) -> bool:
    """Whether `out` holds this preparation, finished; raises UserError where it holds something else."""
    metadata = read_metadata(out)
    if metadata is not None:
        if metadata["fingerprint"] != fingerprint:
            raise UserError(f"{out}: prepared from other data or settings: delete it, or change out=DIR")
        remove_tree(out / FOLDER / WORK)
        return True
    if out.exists() and not (out / FOLDER / WORK).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: not empty: out=DIR must be a new or empty folder, or one to continue")
    return False


def _remove(out: Location) -> None:
    for name in ("data", "labels", "metadata", FOLDER):
        remove_tree(out / name)
    if not isinstance(out, UrlPath):
        with contextlib.suppress(OSError):  # it holds something else
            out.rmdir()


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


if __name__ == "__main__":
    main("prepare", PrepareConfig, prepare)
