"""Prepared datasets."""

from __future__ import annotations

import contextlib
import io
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fuzz.meds import write_meds
from fuzz.mutations import mutated_parquet, mutated_text
from fuzz.reader import Files, Reader, files_of, float32s, frame_of, require
from hymate.data.histories import Histories, History
from hymate.data.prepare import PrepareConfig, prepare
from hymate.data.statistics import NUM_KNOTS
from hymate.data.vocabulary import Vocabulary


class Prepared(Reader):
    """A prepared dataset. Invariants: each subject of the index has its history, of as many events as the index says,
    with codes of the vocabulary, times that never decrease and finite values; nothing outside the folder is read."""

    name = "histories"

    def __init__(self, scratch: Path) -> None:
        raw = write_meds(scratch / "meds-for-histories")
        with contextlib.redirect_stderr(io.StringIO()):
            prepare(PrepareConfig(source="meds", raw=str(raw), out=str(scratch / "prepared"), workers=1))
        self.files = {
            name: data for name, data in files_of(scratch / "prepared").items() if name.startswith("histories/")
        }

    def mutate(self, rng: random.Random) -> Files:
        shard, index, vocabulary = (f"histories/{name}.parquet" for name in ("train/0", "index", "vocabulary"))
        name = rng.choices([shard, index, vocabulary, "histories/metadata.json"], [50, 22, 22, 6])[0]
        if name.endswith(".json"):
            return {name: mutated_text(rng, self.files[name])}
        return {name: mutated_parquet(rng, self.files[name], list(self.files.values()))}

    def check(self, folder: Path, rng: random.Random, program: str) -> None:
        histories = Histories.open(folder)
        read = histories.read(rng.sample(range(len(histories)), len(histories)))
        vocabulary = Vocabulary.read(folder / "histories" / "vocabulary.parquet")
        frame = frame_of(folder / "histories" / "vocabulary.parquet", program)
        require(histories.codes == frame["code"].to_list(), "other codes")
        check_vocabulary(vocabulary, frame)
        index = frame_of(folder / "histories" / "index.parquet", program)
        by_id = {history.subject_id: history for history in read}
        require(sorted(by_id) == sorted(index["subject_id"].to_list()), "other subjects")
        shards = {name: frame_of(folder / "histories" / f"{name}.parquet", program) for name in index["shard"].unique()}
        for entry in index.iter_rows(named=True):
            history, shard = by_id[entry["subject_id"]], shards[entry["shard"]]
            rows = shard.filter(pl.col("subject_id") == entry["subject_id"]).to_dicts()
            require(any(is_history(history, row) for row in rows), "no such history")
            require(len(history) == entry["num_events"], "another number of events")
            require(history.time.tolist() == sorted(history.time.tolist()), "times decrease")
            codes = [*history.code.tolist(), *history.static_code.tolist()]
            require(all(0 <= code < len(histories.codes) for code in codes), "codes outside the vocabulary")
            require(not np.isinf([*history.value, *history.static_value]).any(), "infinite values")


def is_history(history: History, row: dict[str, Any]) -> bool:
    def same(name: str) -> bool:
        found, expected = getattr(history, name).tolist(), row[name]
        return float32s(found) == float32s(expected) if "value" in name else found == expected

    lists = ("time", "code", "value", "static_code", "static_value")
    return history.birth_time == row["birth_time"] and all(same(name) for name in lists)


def check_vocabulary(vocabulary: Vocabulary, frame: pl.DataFrame) -> None:
    """Whether a vocabulary is that of a file, and can normalise values."""
    rows = sorted((row for row in frame.to_dicts() if row["count"] >= 1), key=lambda row: (-row["count"], row["code"]))
    require(vocabulary.codes == [row["code"] for row in rows], "other codes in the vocabulary")
    require(vocabulary.count_V[2:].tolist() == [row["count"] for row in rows], "other counts")
    require(len(set(vocabulary.codes)) == len(vocabulary.codes), "a code twice")
    knots_VQ = vocabulary.quantiles_VQ[2:]
    for row, knots_Q in zip(rows, knots_VQ, strict=True):
        expected = row["quantiles"] or [math.nan] * NUM_KNOTS
        require(np.array_equal(knots_Q, np.array(expected, np.float32), equal_nan=True), "other quantiles")
        require(bool(row["quantiles"]) == (row["value_count"] > 0), "quantiles without values")
    require((vocabulary.scale_V > 0).all() and not np.isnan(vocabulary.median_V).any(), "an impossible scale")
