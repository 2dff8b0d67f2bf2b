"""Prepared histories -> packed rows, in an order that any number of workers can share and resume.

The place of a row is (epoch, block, row). What stands there (which examples, which windows of them, the row's seed)
is a pure function of the seed and the place: shuffling and random windows come from a counter-based hash, never from a
generator with a state. A cursor is therefore enough to go on exactly, also on more or fewer workers.

Shuffling keeps reads local. An epoch shuffles the row groups of the files, takes so many of them together as a block
that it holds about BLOCK_EVENTS events, and shuffles, packs and again shuffles inside the block. The order of the row
groups is computed for a block when it is asked for: going on in the middle of an epoch packs one block, not those
before it, and nothing here grows with the patients but 8 bytes for each row group.

Labels of one history share segments (`hymate.data.packing.answered_together`): a segment answers consecutive examples,
the last of them at its end. The segments are in the order of their examples, and what is drawn for one depends on its
last example.

Legend, besides that of `hymate.model.batch`: E examples, N segments of an epoch, G row groups with examples, B row
groups of a block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, islice
from typing import Literal, NamedTuple

import numpy as np
import torch

from hymate.data.examples import NO_TIME, Consecutive, Examples
from hymate.data.feeding import prefetched
from hymate.data.histories import Histories, History, ages
from hymate.data.meds import US_PER_HOUR
from hymate.data.packing import BLOCK_EVENTS, answered_together, pack
from hymate.data.vocabulary import Vocabulary
from hymate.hashing import SPLITMIX_STEP, permuted, splitmix64
from hymate.model.batch import UNKNOWN_ID, Batch

ROWS_AHEAD = 8  # rows that the background thread keeps ready
EVALUATION = -1  # the "epoch" of an unshuffled pass

# What a random number is for; a part of its hash, so that no two uses share numbers.
_GROUP, _EXAMPLE, _ROW, _WINDOW, _SEED, _EARLY, _DRAW = range(7)


@dataclass(frozen=True)
class Cursor:
    """The next row of a run. The end of an epoch and the start of the next are the same place."""

    epoch: int = 0
    block: int = 0
    row: int = 0  # of the block


class Rows:
    """Packed rows of `examples`, endless for training (`steps`) or one pass for evaluation (`once`).

    context: most events of one history; longer ones are cut to a window: crop "random" draws one per (seed,
        epoch, example) with every start equally likely, "last" takes the events just before the end.
    tokens_per_row: most events of one row.
    early_fraction: of the examples of a training epoch, how many are shown as they were at an earlier time: the last
        events are left out, up to half of those since the start of what the label is about (`Examples.earliest_E`),
        and the time of the last one left is the prediction time. Each epoch draws other views. More views of few
        patients, each with its own label; examples without an earlier view are always shown whole, and so are those
        that share a segment.
    together: whether examples of one history may share segments, for a model that does not see ahead.
    """

    def __init__(
        self,
        histories: Histories,
        vocabulary: Vocabulary,
        examples: Examples,
        *,
        context: int,
        tokens_per_row: int,
        seed: int,
        crop: Literal["random", "last"],
        early_fraction: float = 0.0,
        together: bool = False,
    ) -> None:
        assert len(examples) > 0 and 0 < context <= tokens_per_row
        self.histories, self.vocabulary, self.examples = histories, vocabulary, examples
        self.tokens_per_row, self.seed, self.crop = tokens_per_row, seed, crop
        self.context, self.early_fraction = context, early_fraction
        self._id_of_code = vocabulary.ids_of(histories.codes).astype(np.int64)
        # each segment's examples
        self._first_N: np.ndarray | Consecutive = Consecutive(0, len(examples))
        self._last_N: np.ndarray | Consecutive = self._first_N
        self._position_N = examples.position_E
        if together:
            assert crop == "last"
            self._first_N = answered_together(np.asarray(examples.position_E), examples.stop_E, context)
            self._last_N = np.append(self._first_N[1:], len(examples)) - 1
            self._position_N = examples.position_E[self._first_N]
        self._first_G = _first_of_groups(histories, self._position_N)
        self.events_read = 0
        self.events_unknown = 0

    # -------------------------------------------------------------------------------------------- public passes

    def steps(
        self, cursor: Cursor, rows_per_step: int, rank: int, world_size: int
    ) -> Generator[tuple[list[Batch], Cursor], None, None]:
        """Endless optimiser steps from `cursor` on: this rank's rows and the cursor after the step.

        Row i of a step goes to rank i % world_size. An epoch's leftover rows open the next step.
        """
        assert rows_per_step % world_size == 0
        with contextlib.closing(
            prefetched(self._rows_of_rank(cursor, rows_per_step, rank, world_size), ROWS_AHEAD)
        ) as rows:
            while step := list(islice(rows, rows_per_step // world_size)):
                yield [batch for batch, _ in step], step[-1][1]

    def once(self, rank: int, world_size: int) -> Generator[tuple[Batch, bool], None, None]:
        """One unshuffled pass, the same every time, in the same number of rows on every rank.

        Ranks that run short repeat the last row with False: it is there to keep the ranks in step, not to count.
        """
        with contextlib.closing(prefetched(self._evaluation_of_rank(rank, world_size), ROWS_AHEAD)) as rows:
            yield from rows

    def place_of(self, row: Batch) -> str:
        """Where a row's histories are in the dataset's files: enough to look at them, and names no subject."""
        positions = self.examples.position_E[row.example_A.cpu().numpy()]
        records_of: dict[tuple[str, int], list[int]] = {}
        for place in self.histories.index.places(np.unique(positions)):
            records_of.setdefault(place[:2], []).append(place.record)
        return ", ".join(
            f"shard {shard} row group {group} records {records}" for (shard, group), records in records_of.items()
        )

    # ---------------------------------------------------------------------------------------------------- order

    def _order(self, epoch: int, first_block: int = 0) -> Iterator[_Place]:
        """The rows of an epoch from a block on; packed block by block, as they are asked for."""
        num_groups = len(self._first_G) - 1
        for block in range(first_block, math.ceil(num_groups / self._groups_per_block)):
            start = block * self._groups_per_block
            group_B = np.arange(start, min(start + self._groups_per_block, num_groups))
            if epoch != EVALUATION:
                group_B = permuted(group_B, num_groups, int(_hash(self.seed, epoch, _GROUP, np.zeros(1))[0]))
            spans = zip(self._first_G[group_B].tolist(), self._first_G[group_B + 1].tolist(), strict=True)
            members = np.concatenate([np.arange(*span) for span in spans])
            members = members[self._permutation(epoch, _EXAMPLE, self._last_N[members])]
            # of answers, too, a row has at most as many as of events
            size_S = np.maximum(self._windows(epoch, members).length_S, self._num_answers(members))
            rows = [members[row] for row in pack(size_S, self.tokens_per_row)]
            order = self._permutation(epoch, _ROW, self._last_N[[row[0] for row in rows]])
            for place, row in enumerate(order):
                yield _Place(epoch, block, place, rows[row])

    @cached_property
    def _groups_per_block(self) -> int:
        index = self.histories.index
        used_G = np.searchsorted(index.start_G, self._position_N[self._first_G[:-1]], side="right") - 1
        return max(1, round(BLOCK_EVENTS / max(1.0, float(index.events_G[used_G].mean()))))

    def _permutation(self, epoch: int, use: int, key: np.ndarray) -> np.ndarray:
        """A random order of things with distinct keys; the given order in evaluation."""
        if epoch == EVALUATION:
            return np.arange(len(key))
        return np.argsort(_hash(self.seed, epoch, use, key), kind="stable")

    def _places(self, cursor: Cursor) -> Iterator[_Place]:
        for place in self._order(cursor.epoch, cursor.block):
            if (place.block, place.row) >= (cursor.block, cursor.row):
                yield place
        for epoch in count(cursor.epoch + 1):
            yield from self._order(epoch)

    def _rows_of_rank(
        self, cursor: Cursor, rows_per_step: int, rank: int, world_size: int
    ) -> Iterator[tuple[Batch, Cursor]]:
        places = self._places(cursor)
        while True:
            step = list(islice(places, rows_per_step))
            after = Cursor(step[-1].epoch, step[-1].block, step[-1].row + 1)
            for i in range(rank, rows_per_step, world_size):
                yield self._batch(step[i]), after

    def _evaluation_of_rank(self, rank: int, world_size: int) -> Iterator[tuple[Batch, bool]]:
        places = list(self._order(EVALUATION))
        num_turns = math.ceil(len(places) / world_size)
        for turn in range(rank, num_turns * world_size, world_size):
            yield self._batch(places[min(turn, len(places) - 1)]), turn < len(places)

    # ------------------------------------------------------------------------------------------------- assembly

    def _batch(self, place: _Place) -> Batch:
        """Read, cut and join the histories of one row."""
        examples, segment_S = self.examples, place.segments
        windows = self._windows(place.epoch, segment_S)
        stop_S = windows.start_S + windows.length_S
        slices = map(slice, windows.start_S.tolist(), stop_S.tolist())
        read = self.histories.read(self._position_N[segment_S])
        cut = [history.keep(window) for history, window in zip(read, slices, strict=True)]
        of_S = zip(self._first_N[segment_S].tolist(), (self._last_N[segment_S] + 1).tolist(), strict=True)
        example_A = np.concatenate([np.arange(*own) for own in of_S])
        of_A = np.repeat(np.arange(len(segment_S)), self._num_answers(segment_S))
        # an earlier view ends before its example does
        stop_A = np.minimum(examples.stop_E[example_A].astype(np.int64), stop_S[of_A])
        row = packed_row(
            cut,
            np.where(windows.early_S[of_A], NO_TIME, examples.prediction_time_E[example_A]),
            self.vocabulary,
            self._id_of_code,
            last_A=(windows.length_S.cumsum() - stop_S)[of_A] + stop_A - 1,
        )
        self.events_read += row.num_events
        self.events_unknown += int((row.code_L == UNKNOWN_ID).sum())
        seed_S = _hash(self.seed, place.epoch, _DRAW, self._last_N[segment_S]) >> np.uint64(1)
        return replace(
            row,
            example_A=torch.from_numpy(example_A),
            label_AT=torch.from_numpy(examples.label_ET[example_A]),
            days_AT=torch.from_numpy(examples.days_ET[example_A]),
            label_weight_AT=torch.from_numpy(examples.weight_ET[example_A]),
            seed_S=torch.from_numpy(seed_S.astype(np.int64)),
            seed=int(_hash(self.seed, place.epoch, _SEED, place.block, np.array([place.row]))[0] >> np.uint64(1)),
        )

    def _num_answers(self, segment_S: np.ndarray) -> np.ndarray:
        return self._last_N[segment_S] - self._first_N[segment_S] + 1

    def _windows(self, epoch: int, segment_S: np.ndarray) -> _Windows:
        """Which events of its history each segment shows in an epoch."""
        last_S = self._last_N[segment_S]
        stop_S = self.examples.stop_E[last_S].astype(np.int64)
        early_S = np.zeros(len(last_S), dtype=bool)
        if self.early_fraction and epoch != EVALUATION:
            draw_S = _hash(self.seed, epoch, _EARLY, last_S) / 2.0**64
            spare_S = stop_S - self.examples.earliest_E[last_S]
            early_S = (draw_S < self.early_fraction) & (spare_S > 0) & (self._num_answers(segment_S) == 1)
            cut_S = np.floor(spare_S * draw_S / self.early_fraction / 2).astype(np.int64)
            stop_S = np.where(early_S, stop_S - cut_S, stop_S)
        length_S = np.minimum(stop_S, self.context)
        spare_S = stop_S - length_S
        if self.crop == "random":
            spare_S = (_hash(self.seed, epoch, _WINDOW, last_S) % (spare_S + 1).astype(np.uint64)).astype(np.int64)
        return _Windows(spare_S, length_S, early_S)


# ------------------------------------------------------------------------------------------------------- pieces


def packed_row(
    windows: Sequence[History],
    end_A: np.ndarray,
    vocabulary: Vocabulary,
    id_of_code: np.ndarray,
    last_A: np.ndarray | None = None,
) -> Batch:
    """One row of windows, each of at least one event.

    end_A: int64, microseconds, the time of each answer; NO_TIME for that of the last event that it reads.
    id_of_code: `vocabulary`'s ids (int64) of the dataset's codes.
    last_A: int64, the last event of the row that each answer reads; None for one answer at the end of each window.

    Answers are numbered as examples, without tasks.
    """
    length_S = np.array([len(window) for window in windows])
    id_L = id_of_code[np.concatenate([window.code for window in windows])]
    z_L, quantile_L = vocabulary.normalise(id_L, np.concatenate([window.value for window in windows]))
    static_id_F = id_of_code[np.concatenate([window.static_code for window in windows])]
    static_value_F = np.concatenate([window.static_value for window in windows])
    static_z_F, static_quantile_F = vocabulary.normalise(static_id_F, static_value_F)
    segment_S = np.arange(len(windows), dtype=np.int32)

    time_L = np.concatenate([window.time for window in windows])
    cu_seqlens = np.concatenate([[0], np.cumsum(length_S)])
    first_S, last_S = cu_seqlens[:-1], cu_seqlens[1:] - 1
    last_A = last_S if last_A is None else last_A
    last_time_A, segment_L = time_L[last_A], np.repeat(segment_S, length_S)
    end_A = np.where(end_A == NO_TIME, last_time_A, end_A)
    gap_L = np.diff(time_L, prepend=time_L[:1])
    gap_L[first_S] = 0
    return Batch(
        code_L=torch.from_numpy(id_L),
        value_L=torch.from_numpy(z_L),
        quantile_L=torch.from_numpy(quantile_L),
        time_hours_L=ratio(time_L - np.repeat(time_L[first_S], length_S), US_PER_HOUR),
        gap_hours_L=ratio(gap_L, US_PER_HOUR),
        segment_L=torch.from_numpy(segment_L),
        cu_seqlens=cu_seqlens.tolist(),
        bounds=torch.from_numpy(cu_seqlens),
        static_code_F=torch.from_numpy(static_id_F),
        static_value_F=torch.from_numpy(static_z_F),
        static_quantile_F=torch.from_numpy(static_quantile_F),
        static_segment_F=torch.from_numpy(np.repeat(segment_S, [len(window.static_code) for window in windows])),
        age_years_A=torch.from_numpy(ages([windows[s].birth_time for s in segment_L[last_A]], end_A)),
        lag_hours_A=ratio(end_A - last_time_A, US_PER_HOUR),
        example_A=torch.arange(len(end_A)),
        label_AT=torch.empty(len(end_A), 0),
        days_AT=torch.empty(len(end_A), 0),
        label_weight_AT=torch.empty(len(end_A), 0),
        seed_S=torch.zeros(len(windows), dtype=torch.int64),
        last_A=None if len(last_A) == len(windows) else torch.from_numpy(last_A),
    )


class _Windows(NamedTuple):
    """Each segment's first event and number of events, and whether it is shown as it was earlier."""

    start_S: np.ndarray
    length_S: np.ndarray
    early_S: np.ndarray


class _Place(NamedTuple):
    """A row in the order of a run."""

    epoch: int
    block: int
    row: int
    segments: np.ndarray


def _first_of_groups(histories: Histories, position_N: np.ndarray | Consecutive) -> np.ndarray:
    """The first segment of each row group that has any, and the number of segments, int64 (G + 1,)."""
    first = position_N.searchsorted(histories.index.start_G)
    first_G = first[np.diff(first, append=len(position_N)) > 0]
    return np.append(first_G, len(position_N))


def ratio(difference_us: np.ndarray, unit_us: int) -> torch.Tensor:
    """Time differences in another unit, float32; the difference itself was taken in integers."""
    return torch.from_numpy((difference_us / unit_us).astype(np.float32))


def _hash(*parts: int | np.ndarray) -> np.ndarray:
    """One hash of all parts, uint64 and uniform; the last part is an array, the others are integers."""
    state = np.zeros(1, dtype=np.int64)
    for part in parts:
        state = splitmix64((state ^ np.asarray(part).astype(np.int64)) + SPLITMIX_STEP)
    return state.view(np.uint64)
