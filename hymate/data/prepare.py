"""Command: raw data -> MEDS -> prepared histories and vocabulary.

    python -m hymate.data.prepare source=meds raw=RAW_DIR out=DATA_DIR workers=4

Each stage goes over the shards in parallel processes and streams through a shard: a process holds about ROWS
events, one subject and per code at most SAMPLE_SIZE values, whatever the size of the dataset. The splits of all
subjects are read by the first process of a host (83 bytes each, measured), for all of them. Files appear whole or not
at all, and a journal under histories/.work says which are done, so that a killed preparation continues when the command
is given again.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from hymate import scripts

    scripts.command("prepare")

import contextlib
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from hymate.config import Codes, Place, check
from hymate.data.codemap import CodeMap
from hymate.data.histories import FOLDER, FORMAT_VERSION, WORK, Splits, read_metadata, write_histories
from hymate.data.index import INDEX, INDEX_SCHEMA, open_index
from hymate.data.known import NEVER, KnownConfig, KnownTimes, sentences
from hymate.data.meds import (
    RENAME_SPLITS,
    ROWS,
    SPLITS,
    DataError,
    Source,
    SplitsConfig,
    codes_table,
    iter_events,
    open_parquet,
    write_parquet,
)
from hymate.data.sources.by_time import (
    ByTime,
    counts_left_out,
    leave_out_later,
    leave_out_later_labels,
    limit,
    split_dates,
)
from hymate.data.sources.mapped import Mapped
from hymate.data.sources.meds import MedsSource
from hymate.data.sources.physionet2012 import PhysioNet2012Source
from hymate.data.sources.physionet2019 import PhysioNet2019Source
from hymate.data.sources.several import PLACES, Several
from hymate.data.statistics import CodeStatistics, contradictions
from hymate.data.synthetic.course import SyntheticConfig
from hymate.data.synthetic.source import SyntheticSource
from hymate.errors import ConfigError, UserError
from hymate.runs import CONFIGS
from hymate.storage.paths import (
    Location,
    UrlPath,
    atomic_path,
    locate,
    locked,
    readable,
    remove_tree,
    require_folder,
    write_text,
)
from hymate.trees import build, parse_yaml, to_tree
from hymate.work import Journal, Stages, stages

# each makes a `Source` of the raw folder, the splits and the seed
SOURCES: dict[str, Callable[[Location, SplitsConfig, int], Source]] = {
    "meds": MedsSource,
    "physionet2012": PhysioNet2012Source,
    "physionet2019": PhysioNet2019Source,
}


CONTRADICTIONS = "contradictions.json"


@functools.cache
def mimic() -> KnownConfig:
    """The rules for MIMIC-style codes, configs/known/mimic.yaml."""
    return build(KnownConfig, parse_yaml((CONFIGS / "known" / "mimic.yaml").read_text()))


@dataclass(frozen=True)
class PrepareConfig:
    """`python -m hymate.data.prepare`'s configuration.

    source: what `raw` holds; "synthetic" makes its own data.
    out: new folder of the prepared dataset, or one that an interrupted command left.
    raw: folder of the raw data; "synthetic" needs none. Of source=meds also several, which become one dataset.
    splits: fractions of the subjects, where the source does not bring its own splits.
    codes: code map, which gives what several hospitals measure one name and one unit: a CSV file, or the name of one of
        ours (a file of configs/codes/). Of several datasets a list, with null for none, or one for all.
    origins: names of several datasets, each of which becomes a static code ORIGIN//NAME of its subjects.
    known: when events become known, of source=meds; the events of the other sources are known at their stamps.
    seed: of everything random.
    workers: processes; each holds some 0.3 GB. On a cluster each of its CPUs is one.
    synthetic: the synthetic cohort, of source=synthetic.
    """

    source: Literal["physionet2012", "physionet2019", "meds", "synthetic"]
    out: Place
    raw: Place | list[Place] | None = None
    codes: Codes | list[Codes | None] | None = None
    origins: list[str] = field(default_factory=list)
    splits: SplitsConfig = field(default_factory=SplitsConfig)
    known: KnownConfig = field(default_factory=mimic)
    seed: int = 0
    workers: int = 2
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        check(self, workers=(self.workers >= 1, "must be at least 1"))
        if self.source != "synthetic" and self.raw is None:
            raise ConfigError(f"raw is required with source={self.source}: add raw=DIR to the command")
        if self.source == "synthetic" and self.raw is not None:
            raise ConfigError("raw is not for source=synthetic, which makes its own data: leave it out")
        self._check_several()
        if self.source != "meds" and self.known.rules and self.known != mimic():
            raise ConfigError(f"known is for source=meds, not for source={self.source}: leave it out")

    def _check_several(self) -> None:
        raw, number = self.raw, len(self.raw) if isinstance(self.raw, list) else 1
        lists = {"codes": isinstance(self.codes, list), "origins": bool(self.origins)}
        for key in lists:
            if lists[key] and not (isinstance(raw, list) and len(getattr(self, key)) == number):
                raise ConfigError(f"{key} must have an entry for each dataset in raw=[DIR,DIR]")
        if isinstance(raw, list):
            check(
                self,
                source=(self.source == "meds", "must be meds where raw names several datasets: prepare each first"),
                raw=(0 < number <= PLACES and len(set(raw)) == number, f"must be 1 to {PLACES} datasets, each once"),
                origins=(
                    len(set(self.origins)) == len(self.origins)
                    and all(re.fullmatch(r"[\w.-]+", o) for o in self.origins),
                    "must be different names of letters, digits and -_.",
                ),
            )

    @property
    def datasets(self) -> list[str]:
        """What the datasets in `raw` are called, where it names several."""
        folders = [locate(place).name for place in self.raw] if isinstance(self.raw, list) else []
        return self.origins or folders

    @property
    def rules(self) -> KnownConfig:
        """When the source's events become known."""
        return self.known if self.source == "meds" else KnownConfig()

    def open_source(self) -> Source:
        """The configured source."""
        places = self.raw if isinstance(self.raw, list) else [str(self.raw)]
        sources: list[Source] = (
            [SyntheticSource(self.synthetic, self.splits)]
            if self.source == "synthetic"
            else [SOURCES[self.source](locate(place).absolute(), self.splits, self.seed) for place in places]
        )
        pairs = zip(sources, self.code_maps, strict=True)
        sources = [Mapped(source, codes) if codes else source for source, codes in pairs]
        source = Several(tuple(sources), tuple(self.origins)) if isinstance(self.raw, list) else sources[0]
        return ByTime(source, self.splits) if self.splits.by == "time" else source

    @functools.cached_property
    def code_maps(self) -> list[CodeMap | None]:
        """The code map of each dataset in `raw`."""
        number = len(self.raw) if isinstance(self.raw, list) else 1
        names = self.codes if isinstance(self.codes, list) else [self.codes] * number
        return [None if name is None else CodeMap.read(name).under(self.rules) for name in names]

    def record(self) -> dict[str, Any]:
        """What metadata.json keeps of how the raw data were read."""
        maps = [codes and {"name": codes.name, "sha256": codes.digest} for codes in self.code_maps]
        several = {"datasets": self.datasets, "subject_ids": f"{PLACES} * subject_id + place of its dataset"}
        return ({"codes": maps} if any(maps) else {}) | (several if self.datasets else {})


def prepare(config: PrepareConfig) -> None:
    """Write the prepared dataset to `config.out`, continuing what an earlier run left there.

    Raises DataError where the raw data are wrong (nothing is left in `out` then), UserError where `out` belongs
    to something else or the disk is full.
    """
    console, source, rules, out = Console(stderr=True), config.open_source(), config.rules, locate(config.out)
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
    other = f"{out}: holds an unfinished preparation of other data or settings: delete it, or change out"
    with locked(out / FOLDER / WORK / "lock", taken):
        started = time.monotonic()
        journal = Journal(out / FOLDER / WORK / "journal.jsonl", fingerprint, other)
        try:
            with stages(shards, journal, config.workers) as run:
                _run(config, source, out, fingerprint, run)
        except DataError:
            _remove(out)
            raise
    remove_tree(out / FOLDER / WORK)
    _summarise(out, console)
    console.print(f"prepared {out} in {time.monotonic() - started:.0f} s")


def _run(config: PrepareConfig, source: Source, out: Location, fingerprint: str, run: Stages) -> None:
    known = config.rules
    run.each("write MEDS", functools.partial(source.write_shard, out=out))
    run.once("metadata", functools.partial(source.finish, out))
    if config.splits.by == "time":
        run.each("cut by time", functools.partial(leave_out_later, out=out))
        run.once("cut labels", functools.partial(leave_out_later_labels, out))
    run.each("count codes", functools.partial(count_shard, out=out, known=known))
    run.once("vocabulary", functools.partial(_write_vocabulary, out, run.shards, len(config.datasets)))
    run.each("write histories", functools.partial(encode_shard, out=out, known=known))
    record = {"source": source.name, "fingerprint": fingerprint, **config.record()}
    if config.datasets:
        record["contradictions"] = json.loads((out / FOLDER / WORK / CONTRADICTIONS).read_text())
    if config.splits.by == "time":
        record |= {"split_dates": split_dates(out), "left_out": counts_left_out(out)}
    _write_index(out, run.shards, source, known, record)


def _summarise(out: Location, console: Console) -> None:
    """Print what a prepared dataset holds, and what looks wrong with it."""
    metadata = read_metadata(out)
    assert metadata is not None
    lines = []
    if others := [split for split in metadata["splits"] if split not in SPLITS]:
        names = ", ".join(map(repr, others))[:200]
        lines.append(f"warning: no training or scoring uses the splits {names}: {RENAME_SPLITS}")
    with open_parquet(out / meds.subject_splits_filepath) as splits:
        missing = splits.metadata.num_rows - sum(size["subjects"] for size in metadata["splits"].values())
    if missing:
        lines.append(
            f"warning: {missing:,} subjects of {meds.subject_splits_filepath} have no events: is a shard missing, or "
            "is its name without .parquet?"
        )
    for split, size in metadata["splits"].items():
        lines.append(f"{split}: {size['subjects']:,} subjects, {size['events']:,} events")
    for found in metadata.get("contradictions", []):
        medians = zip(metadata["datasets"], found["medians"], strict=True)
        named = " and ".join(f"{median:g} in {name}" for name, median in medians if median is not None)
        lines.append(f"warning: {found['code']}: its median is {named}: are the units the same? A code map can mend it")
    for split, date in metadata.get("split_dates", {}).items():
        lines.append(f"{split}: before {date}")
    counts = metadata["source_counts"] | metadata.get("left_out", {})
    lines += [f"{times:,} {what}" for what, times in counts.items()]
    for line in lines + sentences(metadata["known"], metadata["known_events"]):
        console.print(line, markup=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------------- stages


def count_shard(shard: str, out: Location, known: KnownConfig) -> None:
    """Gather the code statistics of one written shard."""
    statistics = CodeStatistics()
    splits = _splits(out)
    times = KnownTimes(known, limit(out, splits))
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
    splits = _splits(out)
    times = KnownTimes(known, limit(out, splits))
    index = write_histories(data, out / FOLDER / f"{shard}.parquet", shard, code_ids, splits, times)
    write_parquet(index, out / FOLDER / WORK / "index" / f"{shard}.parquet")
    write_text(json.dumps(times.counts), out / FOLDER / WORK / "known" / f"{shard}.json")


def _splits(out: Location) -> Splits:
    return Splits(out, beside=out / FOLDER / WORK / "splits")


def _write_vocabulary(out: Location, shards: Sequence[str], num_datasets: int) -> None:
    statistics, of_datasets = CodeStatistics(), [CodeStatistics() for _ in range(num_datasets)]
    for shard in shards:
        of_shard = pq.read_table(readable(out / FOLDER / WORK / "statistics" / f"{shard}.parquet"))
        statistics.merge(of_shard)
        if of_datasets:
            of_datasets[int(shard.partition("/")[0])].merge(of_shard)
    if of_datasets:
        found = contradictions([each.vocabulary() for each in of_datasets])
        write_text(json.dumps(found), out / FOLDER / WORK / CONTRADICTIONS)
    vocabulary = statistics.vocabulary()
    write_parquet(vocabulary, out / FOLDER / "vocabulary.parquet")

    described = pq.read_table(readable(out / meds.code_metadata_filepath))
    others = vocabulary["code"].filter(pc.invert(pc.is_in(vocabulary["code"], described["code"])))
    added = codes_table(dict.fromkeys(others.to_pylist()))
    write_parquet(
        pa.concat_tables([described, added], promote_options="default"),
        out / meds.code_metadata_filepath,
    )


def _write_index(out: Location, shards: Sequence[str], source: Source, known: KnownConfig, record: dict) -> None:
    sizes: dict[str, dict[str, int]] = {}
    with (
        atomic_path(out / FOLDER / INDEX) as temporary,
        pq.ParquetWriter(temporary, INDEX_SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        for shard in shards:
            part = pq.read_table(readable(out / FOLDER / WORK / "index" / f"{shard}.parquet"))
            writer.write_table(part, row_group_size=ROWS)
            of_part = part.group_by("split").aggregate([("subject_id", "count"), ("num_events", "sum")])
            for found in of_part.to_pylist():
                size = sizes.setdefault(found["split"], {"subjects": 0, "events": 0})
                size["subjects"] += found["subject_id_count"]
                size["events"] += found["num_events_sum"]
    if isinstance(out, Path):
        open_index(out / FOLDER)  # makes its arrays
    metadata = {
        "format_version": FORMAT_VERSION,
        **record,
        "splits": dict(sorted(sizes.items())),
        "source_counts": source.counts(),
    }
    if known.rules:
        of_shards = [json.loads((out / FOLDER / WORK / "known" / f"{shard}.json").read_text()) for shard in shards]
        counts = {
            name: {count: sum(of_shard[name][count] for of_shard in of_shards) for count in ("moved", "left_out")}
            for name in known.rules
        }
        metadata |= {"known": to_tree(known), "known_events": counts}
    write_text(json.dumps(metadata, indent=1) + "\n", out / FOLDER / "metadata.json")


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
