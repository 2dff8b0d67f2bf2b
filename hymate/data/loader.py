"""Prepared histories -> packed rows, in an order that any number of workers can share and resume.

The place of a row is (epoch, block, row). What stands there (which examples, which windows of them, the row's seed)
is a pure function of the seed and the place: shuffling and random windows come from a counter-based hash, never from a
generator with a state. A cursor is therefore enough to go on exactly, also on more or fewer workers.

Shuffling keeps reads local. An epoch shuffles the row groups of the files, takes consecutive ones together as a
block of about BLOCK_EVENTS events, and shuffles, packs and again shuffles inside the block. Going on in the middle of
an epoch packs one block, not those before it.

Legend, besides that of `hymate.batch`: E examples, N labels, P subjects in the dataset's index, G row groups.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, islice
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch

from hymate.batch import HOURS_PER_YEAR, UNKNOWN_ID, Batch
from hymate.config import TaskConfig, UserError
from hymate.data.histories import Histories, History
from hymate.data.meds import LAST_TIME, SPLITS
from hymate.data.packing import pack
from hymate.data.vocabulary import Vocabulary

BLOCK_EVENTS = 4_000_000  # 64 MB of times, codes and values
ROWS_AHEAD = 8  # rows that the background thread keeps ready
NO_TIME = -1  # prediction_time_E of pretraining examples
US_PER_HOUR = 3_600_000_000
US_PER_YEAR = int(HOURS_PER_YEAR) * US_PER_HOUR
EVALUATION = -1  # the "epoch" of an unshuffled pass

# What a random number is for; a part of its hash, so that no two uses share numbers.
_GROUP, _EXAMPLE, _ROW, _WINDOW, _SEED, _EARLY, _DRAW = range(7)

T = TypeVar("T")


@dataclass(frozen=True)
class Examples:
    """What an epoch visits: histories, each up to a time.

    position_E: int64, position of the history in the dataset's index.
    stop_E: int64, how many of its events may be used: those at or before the prediction time.
    earliest_E: int64, how many of them the earliest view has that the label belongs to, too (`Rows.early_share`): those
        up to the start of what the label is about; stop_E where there is no earlier view.
    prediction_time_E: int64, microseconds since 1970; NO_TIME in pretraining.
    label_ET: float32, 1 or 0, or between them what a teacher says; NaN where a task has no label at this time, and
        where its label is null.
    days_ET: float32; NaN likewise, and for tasks without days.
    weight_ET: float32, positive: how much each label counts (inverse probability of censoring); 1 where none is known.
    subject_id_E: int64.
    dropped: how many labels were left out, by reason.
    """

    position_E: np.ndarray
    stop_E: np.ndarray
    earliest_E: np.ndarray
    prediction_time_E: np.ndarray
    label_ET: np.ndarray
    days_ET: np.ndarray
    weight_ET: np.ndarray
    subject_id_E: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.position_E)

    def only(self, kept_E: np.ndarray) -> Examples:
        """Those where `kept_E` is true."""
        arrays = {name: value[kept_E] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays)

    @property
    def label_E(self) -> np.ndarray:
        """The labels of the only task."""
        return self.label_ET[:, _only_task(self)]

    @property
    def weight_E(self) -> np.ndarray:
        """The weights of the only task's labels."""
        return self.weight_ET[:, _only_task(self)]

    @property
    def days_E(self) -> np.ndarray:
        """The days of the only task."""
        return self.days_ET[:, _only_task(self)]


@dataclass(frozen=True)
class Cursor:
    """The next row of a run. The end of an epoch and the start of the next are the same place."""

    epoch: int = 0
    block: int = 0
    row: int = 0  # of the block


def pretraining_examples(histories: Histories, split: str) -> Examples:
    """Every history of `split` that has events, whole and without tasks. UserError when there is none."""
    if not len(histories.rows_of(split)):
        raise histories.without_subjects(split)
    position_E = np.asarray(histories.rows_of(split), dtype=np.int64)
    stop_E = histories.index["num_events"][position_E].astype(np.int64)
    has_events = stop_E > 0
    if not has_events.any():
        raise UserError(f"no history with events in split {split!r}: prepare the dataset with subjects in this split")
    position_E, stop_E = position_E[has_events], stop_E[has_events]
    return Examples(
        position_E=position_E,
        stop_E=stop_E,
        earliest_E=stop_E,
        prediction_time_E=np.full(len(position_E), NO_TIME),
        label_ET=np.empty((len(position_E), 0), dtype=np.float32),
        days_ET=np.empty((len(position_E), 0), dtype=np.float32),
        weight_ET=np.empty((len(position_E), 0), dtype=np.float32),
        subject_id_E=histories.index["subject_id"][position_E],
        dropped={"without_events": int((~has_events).sum())},
    )


def labelled_examples(histories: Histories, labels: pa.Table, split: str, required: bool = True) -> Examples:
    """A task's labels of `split`'s subjects, each with the events at or before its prediction time.

    labels: MEDS labels (subject_id, prediction_time and, where known, boolean_value and the days as float_value) and,
        where known, `start` and `weight` (see `hymate.data.extras`).
    Dropped and counted: labels whose subject is not in the dataset (`unknown_subject`), and labels without any
    event up to the prediction time (`without_events`, and those of them that are positive). Sorted by position and
    time, whatever the labels' order. Raises UserError when no label is left, unless they are not `required`.
    """
    subject_id_N = labels["subject_id"].to_numpy().astype(np.int64)
    time_N = labels["prediction_time"].cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
    label_N, days_N = _values(labels, "boolean_value"), _values(labels, "float_value")
    weight_N = _values(labels, "weight") if "weight" in labels.column_names else np.ones_like(label_N)

    known = np.isin(subject_id_N, histories.index["subject_id"])
    position_N, in_split = _join(subject_id_N, histories, split)
    order = np.lexsort((time_N, position_N))
    order = order[in_split[order]]
    position_E, time_E = position_N[order], time_N[order]
    start_E = _starts(labels)[order]
    stop_E, before_start_E, until_start_E = _events_until(
        histories, position_E, [(time_E, "right"), (start_E, "left"), (start_E, "right")]
    )
    # a view's last event is at the start or after it
    earliest_E = np.minimum(np.maximum(before_start_E + 1, until_start_E), stop_E)
    kept = stop_E > 0
    dropped = {
        "unknown_subject": int((~known).sum()),
        "without_events": int((~kept).sum()),
        "positives_without_events": int((label_N[order][~kept] > 0.5).sum()),
    }
    if not kept.any() and required:
        raise _no_example(histories, subject_id_N, split, dropped)
    return Examples(
        position_E=position_E[kept],
        stop_E=stop_E[kept],
        earliest_E=earliest_E[kept],
        prediction_time_E=time_E[kept],
        label_ET=label_N[order][kept][:, None],
        days_ET=days_N[order][kept][:, None],
        weight_ET=weight_N[order][kept][:, None],
        subject_id_E=subject_id_N[order][kept],
        dropped=dropped,
    )


def _no_example(histories: Histories, subject_id_N: np.ndarray, split: str, dropped: Mapping[str, int]) -> UserError:
    """What to say where no label of a split can be used: why, and what would help."""
    total = len(subject_id_N)
    if histories.odd_splits and not len(histories.rows_of(split)):
        return histories.without_subjects(split)
    if dropped["without_events"]:
        return UserError(
            f"all {dropped['without_events']} labels of split {split!r} have prediction times before the first event "
            "of their subject: check the labels' prediction times and their unit and time zone"
        )
    if dropped["unknown_subject"] == total:
        return UserError(
            f"none of the {total} labels is of a subject of the dataset (split {split!r} was asked for): check that "
            "labels and dataset hold the same subject ids"
        )
    of_split = {other: int(_join(subject_id_N, histories, other)[1].sum()) for other in SPLITS}
    where = ", ".join(f"{count} in {other}" for other, count in of_split.items() if count)
    return UserError(
        f"no label is of a subject in split {split!r}: of {total} labels {where or 'none'} and "
        f"{dropped['unknown_subject']} of unknown subjects: label subjects of {split!r}, or prepare the dataset with "
        "splits that hold labelled subjects"
    )


def require_both_classes(task: TaskConfig, examples: Mapping[str, Examples]) -> None:
    """Raises UserError where a split's labels are all alike: nothing can be learned from it, or measured on it."""
    for split, part in examples.items():
        label_E, days_E = part.label_E, part.days_E
        positives = int((label_E > 0.5).sum())
        remedy = "prepare the dataset with more subjects in this split, or choose another task"
        if positives in (0, len(label_E)):
            lost = part.dropped.get("without_events", 0)
            lost_positives = part.dropped.get("positives_without_events", 0)
            if lost_positives if positives == 0 else lost - lost_positives:
                remedy = (
                    f"{lost} more ({lost_positives} positive) were left out, because their prediction times lie before "
                    "the first event of their subject: check the labels' prediction times"
                )
            raise UserError(
                f"task {task.name}: the {split} split has {positives} positive and {len(label_E) - positives} negative "
                f"labels, and both are needed: {remedy}"
            )
        if task.longer_than_days is not None and len(np.unique(days_E[~np.isnan(days_E)])) < 2:
            raise UserError(f"task {task.name}: the {split} split needs two different float_values; {remedy}")


def united(parts: Sequence[Examples]) -> Examples:
    """The examples of several tasks, one a part: each history and time of any of them is an example, with the labels of
    all of them.

    Where a task has several labels at one time, each is an example. Sorted as `labelled_examples` sorts; what the parts
    have dropped is theirs to tell.
    """
    key_N3 = np.concatenate([_keys(part) for part in parts])
    key_E3, first_E, example_N = np.unique(key_N3, axis=0, return_index=True, return_inverse=True)
    label_ET, days_ET = (np.full((len(key_E3), len(parts)), np.nan, dtype=np.float32) for _ in range(2))
    weight_ET = np.ones_like(label_ET)
    earliest_E = np.zeros(len(key_E3), dtype=np.int64)  # every label's start counts
    np.maximum.at(earliest_E, example_N.reshape(-1), np.concatenate([part.earliest_E for part in parts]))
    example_of = np.split(example_N.reshape(-1), np.cumsum([len(part) for part in parts])[:-1])
    for task, (part, example_P) in enumerate(zip(parts, example_of, strict=True)):
        label_ET[example_P, task], days_ET[example_P, task] = part.label_E, part.days_E
        weight_ET[example_P, task] = part.weight_E
    return Examples(
        position_E=key_E3[:, 0],
        stop_E=np.concatenate([part.stop_E for part in parts])[first_E],
        earliest_E=earliest_E,
        prediction_time_E=key_E3[:, 1],
        label_ET=label_ET,
        days_ET=days_ET,
        weight_ET=weight_ET,
        subject_id_E=np.concatenate([part.subject_id_E for part in parts])[first_E],
    )


class Rows:
    """Packed rows of `examples`, endless for training (`steps`) or one pass for evaluation (`once`).

    context: most events of one history; longer ones are cut to a window: crop "random" draws one per (seed,
        epoch, example) with every start equally likely, "last" takes the events just before the end.
    tokens_per_row: most events of one row.
    early_share: share of the examples of a training epoch that are shown as they were at an earlier time: the last
        events are left out, up to half of those since the start of what the label is about (`Examples.earliest_E`),
        and the time of the last one left is the prediction time. Each epoch draws other views. More views of few
        patients, each with its own label; examples without an earlier view are always shown whole.
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
        early_share: float = 0.0,
    ) -> None:
        assert len(examples) > 0 and 0 < context <= tokens_per_row
        self.histories, self.vocabulary, self.examples = histories, vocabulary, examples
        self.tokens_per_row, self.seed, self.crop = tokens_per_row, seed, crop
        self.context, self.early_share = context, early_share
        self._id_of_code = vocabulary.ids_of(histories.codes).astype(np.int64)
        self._groups = _GroupedExamples(histories, examples.position_E)
        self._events_seen = 0
        self._events_unknown = 0

    # -------------------------------------------------------------------------------------------- public passes

    def steps(
        self, cursor: Cursor, rows_per_step: int, rank: int, world_size: int
    ) -> Generator[tuple[list[Batch], Cursor], None, None]:
        """Endless optimiser steps from `cursor` on: this rank's rows and the cursor after the step.

        Row i of a step goes to rank i % world_size. An epoch's leftover rows open the next step.
        """
        assert rows_per_step % world_size == 0
        with contextlib.closing(_prefetched(self._rows_of_rank(cursor, rows_per_step, rank, world_size))) as rows:
            while step := list(islice(rows, rows_per_step // world_size)):
                yield [batch for batch, _ in step], step[-1][1]

    def once(self, rank: int, world_size: int) -> Generator[tuple[Batch, bool], None, None]:
        """One unshuffled pass, the same every time, in the same number of rows on every rank.

        Ranks that run short repeat the last row with False: it is there to keep the ranks in step, not to count.
        """
        with contextlib.closing(_prefetched(self._evaluation_of_rank(rank, world_size))) as rows:
            yield from rows

    def place_of(self, row: Batch) -> str:
        """Where a row's histories are in the dataset's files: enough to look at them, and names no subject."""
        index, positions = self.histories.index, self.examples.position_E[row.example_S.cpu().numpy()]
        rows_of: dict[tuple[str, int], list[int]] = {}
        for position in sorted(set(positions.tolist())):
            group = (index["shard"][position], int(index["row_group"][position]))
            rows_of.setdefault(group, []).append(int(index["row"][position]))
        return ", ".join(f"shard {shard} row group {group} rows {rows}" for (shard, group), rows in rows_of.items())

    # ----------------------------------------------------------------------------------------------- statistics

    @property
    def num_events(self) -> int:
        """Events of one epoch, after cutting to the context."""
        return int(np.minimum(self.examples.stop_E, self.context).sum())

    @cached_property
    def rows_per_epoch(self) -> int:
        """Rows of epoch 0; later epochs differ by a few where the data fills several shuffle blocks."""
        return sum(1 for _ in self._order(0))

    @property
    def packing_efficiency(self) -> float:
        """Share of the rows' token budget that holds events."""
        return self.num_events / (self.rows_per_epoch * self.tokens_per_row)

    @property
    def unknown_share(self) -> float:
        """Share of the events read so far whose code the vocabulary does not have; NaN before the first row."""
        return self._events_unknown / self._events_seen if self._events_seen else math.nan

    # ---------------------------------------------------------------------------------------------------- order

    def _order(self, epoch: int, first_block: int = 0) -> Iterator[_Place]:
        """The rows of an epoch from a block on; packed block by block, as they are asked for."""
        groups = self._permutation(epoch, _GROUP, np.arange(self._groups.num_groups))
        for block, members_G in enumerate(self._groups.blocks(groups)[first_block:], start=first_block):
            members = np.concatenate([self._groups.examples_of(group) for group in members_G])
            members = members[self._permutation(epoch, _EXAMPLE, members)]
            rows = [members[row] for row in pack(self._windows(epoch, members).length_S, self.tokens_per_row)]
            order = self._permutation(epoch, _ROW, np.array([row[0] for row in rows]))
            for place, row in enumerate(order):
                yield _Place(epoch, block, place, rows[row])

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
        example_S = place.examples
        windows = self._windows(place.epoch, example_S)
        read = self.histories.read(self.examples.position_E[example_S])
        stop_S = windows.start_S + windows.length_S
        slices = map(slice, windows.start_S.tolist(), stop_S.tolist())
        cut = [history.keep(window) for history, window in zip(read, slices, strict=True)]
        prediction_time_S = self.examples.prediction_time_E[example_S]
        last_time_S = np.array([history.time[-1] for history in cut])
        row = packed_row(
            cut,
            np.where((prediction_time_S == NO_TIME) | windows.early_S, last_time_S, prediction_time_S),
            self.vocabulary,
            self._id_of_code,
        )
        self._events_seen += row.num_events
        self._events_unknown += int((row.code_L == UNKNOWN_ID).sum())
        return replace(
            row,
            example_S=torch.from_numpy(example_S),
            label_ST=torch.from_numpy(self.examples.label_ET[example_S]),
            days_ST=torch.from_numpy(self.examples.days_ET[example_S]),
            label_weight_ST=torch.from_numpy(self.examples.weight_ET[example_S]),
            seed_S=torch.from_numpy((_hash(self.seed, place.epoch, _DRAW, example_S) >> np.uint64(1)).astype(np.int64)),
            seed=int(_hash(self.seed, place.epoch, _SEED, place.block, np.array([place.row]))[0] >> np.uint64(1)),
        )

    def _windows(self, epoch: int, example_S: np.ndarray) -> _Windows:
        """Which events of its history each example shows in an epoch."""
        stop_S = self.examples.stop_E[example_S]
        early_S = np.zeros(len(example_S), dtype=bool)
        if self.early_share and epoch != EVALUATION:
            draw_S = _hash(self.seed, epoch, _EARLY, example_S) / 2.0**64
            spare_S = stop_S - self.examples.earliest_E[example_S]
            early_S = (draw_S < self.early_share) & (spare_S > 0)
            cut_S = np.floor(spare_S * draw_S / self.early_share / 2).astype(np.int64)
            stop_S = np.where(early_S, stop_S - cut_S, stop_S)
        length_S = np.minimum(stop_S, self.context)
        spare_S = stop_S - length_S
        if self.crop == "random":
            spare_S = (_hash(self.seed, epoch, _WINDOW, example_S) % (spare_S + 1).astype(np.uint64)).astype(np.int64)
        return _Windows(spare_S, length_S, early_S)


# ------------------------------------------------------------------------------------------------------- pieces


def packed_row(windows: Sequence[History], end_S: np.ndarray, vocabulary: Vocabulary, id_of_code: np.ndarray) -> Batch:
    """One row of windows, each of at least one event and seen from its time in end_S (int64, microseconds).

    id_of_code: `vocabulary`'s ids (int64) of the dataset's codes. Segments are numbered as examples, without tasks.
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
    gap_L = np.diff(time_L, prepend=time_L[:1])
    gap_L[first_S] = 0
    return Batch(
        code_L=torch.from_numpy(id_L),
        value_L=torch.from_numpy(z_L),
        quantile_L=torch.from_numpy(quantile_L),
        time_hours_L=ratio(time_L - np.repeat(time_L[first_S], length_S), US_PER_HOUR),
        gap_hours_L=ratio(gap_L, US_PER_HOUR),
        segment_L=torch.from_numpy(np.repeat(segment_S, length_S)),
        cu_seqlens=cu_seqlens.tolist(),
        static_code_F=torch.from_numpy(static_id_F),
        static_value_F=torch.from_numpy(static_z_F),
        static_quantile_F=torch.from_numpy(static_quantile_F),
        static_segment_F=torch.from_numpy(np.repeat(segment_S, [len(window.static_code) for window in windows])),
        age_years_S=ages([window.birth_time for window in windows], end_S),
        lag_hours_S=ratio(end_S - time_L[last_S], US_PER_HOUR),
        example_S=torch.arange(len(windows)),
        label_ST=torch.empty(len(windows), 0),
        days_ST=torch.empty(len(windows), 0),
        label_weight_ST=torch.empty(len(windows), 0),
        seed_S=torch.zeros(len(windows), dtype=torch.int64),
    )


class _Windows(NamedTuple):
    """Each example's first event and number of events, and whether it is shown as it was earlier."""

    start_S: np.ndarray
    length_S: np.ndarray
    early_S: np.ndarray


class _Place(NamedTuple):
    """A row in the order of a run."""

    epoch: int
    block: int
    row: int
    examples: np.ndarray


class _GroupedExamples:
    """Which examples lie in which row group of the files, and how many events each group holds."""

    def __init__(self, histories: Histories, position_E: np.ndarray) -> None:
        shard_P, row_group_P = histories.index["shard"], histories.index["row_group"]
        new_P = (shard_P[1:] != shard_P[:-1]) | (row_group_P[1:] != row_group_P[:-1])
        group_P = np.concatenate([[0], np.cumsum(new_P)])
        events_of_group = np.bincount(group_P, weights=histories.index["num_events"])
        used, group_E, counts = np.unique(group_P[position_E], return_inverse=True, return_counts=True)
        self.num_groups = len(used)
        self._events_G = events_of_group[used]
        self._order_E = np.argsort(group_E, kind="stable")
        self._ends_G = np.cumsum(counts)

    def examples_of(self, group: int) -> np.ndarray:
        start = self._ends_G[group - 1] if group else 0
        return self._order_E[start : self._ends_G[group]]

    def blocks(self, group_G: np.ndarray) -> list[np.ndarray]:
        """Consecutive groups, together about BLOCK_EVENTS events (always at least one group)."""
        events_G = self._events_G[group_G]
        block_G = (np.cumsum(events_G) - events_G) // BLOCK_EVENTS
        return np.split(group_G, np.flatnonzero(np.diff(block_G)) + 1)


def _only_task(examples: Examples) -> int:
    assert examples.label_ET.shape[1] == 1, "these are the examples of several tasks"
    return 0


def _starts(labels: pa.Table) -> np.ndarray:
    """When what each label is about began, int64 microseconds; after every event where it isn't known."""
    if "start" not in labels.column_names:
        return np.full(len(labels), LAST_TIME)
    return labels["start"].cast(pa.int64()).fill_null(LAST_TIME).to_numpy()


def _values(labels: pa.Table, name: str) -> np.ndarray:
    """A column as float32 (booleans as 0 and 1), NaN where it is null or there is none."""
    if name not in labels.column_names:
        return np.full(len(labels), np.nan, dtype=np.float32)
    values = labels[name].cast(pa.uint8()) if pa.types.is_boolean(labels[name].type) else labels[name]
    return values.cast(pa.float32()).to_numpy()


def _keys(examples: Examples) -> np.ndarray:
    """(E, 3): position, time, and how many examples with both of them come before; the examples are sorted."""
    place_E = np.arange(len(examples))
    key_E2 = np.stack([examples.position_E, examples.prediction_time_E], axis=1)
    start = np.flatnonzero((np.diff(key_E2, axis=0, prepend=-1) != 0).any(axis=1))
    return np.column_stack([key_E2, place_E - np.repeat(start, np.diff(start, append=len(examples)))])


def _join(subject_id_N: np.ndarray, histories: Histories, split: str) -> tuple[np.ndarray, np.ndarray]:
    """For each subject id: its position in the index, and whether it is in `split` (if not, the position is void)."""
    position_P = np.asarray(histories.rows_of(split), dtype=np.int64)
    if len(position_P) == 0:
        return np.zeros(len(subject_id_N), dtype=np.int64), np.zeros(len(subject_id_N), dtype=bool)
    subject_id_P = histories.index["subject_id"][position_P]
    order_P = np.argsort(subject_id_P)
    at_N = np.minimum(np.searchsorted(subject_id_P[order_P], subject_id_N), len(order_P) - 1)
    position_N = position_P[order_P[at_N]]
    return position_N, histories.index["subject_id"][position_N] == subject_id_N


def _events_until(
    histories: Histories, position_E: np.ndarray, times: Sequence[tuple[np.ndarray, Literal["left", "right"]]]
) -> np.ndarray:
    """How many events lie before each example's times ("left") or at them, too ("right"): (len(times), E).

    Reads at most about BLOCK_EVENTS events at once. position_E must be sorted.
    """
    count_E = np.empty((len(times), len(position_E)), dtype=np.int64)
    block_E = np.cumsum(histories.index["num_events"][position_E].astype(np.int64)) // BLOCK_EVENTS
    for block in np.split(np.arange(len(position_E)), np.flatnonzero(np.diff(block_E)) + 1):
        for example, history in zip(block.tolist(), histories.read(position_E[block]), strict=True):
            for number, (time_E, side) in enumerate(times):
                count_E[number, example] = np.searchsorted(history.time, time_E[example], side=side)
    return count_E


def ages(birth_time: list[int | None], end_S: np.ndarray) -> torch.Tensor:
    known_S = np.array([birth is not None for birth in birth_time])
    age_us_S = end_S - np.array([birth or 0 for birth in birth_time], dtype=np.int64)
    return ratio(np.where(known_S, age_us_S, np.nan), US_PER_YEAR)


def ratio(difference_us: np.ndarray, unit_us: int) -> torch.Tensor:
    """Time differences in another unit, float32; the difference itself was taken in integers."""
    return torch.from_numpy((difference_us / unit_us).astype(np.float32))


def _hash(*parts: int | np.ndarray) -> np.ndarray:
    """Chained SplitMix64 finalisers (Steele, Lea and Flood 2014): uint64, uniform, equal on every machine.

    The last part is an array; the others are integers, taken modulo 2**64.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _prefetched(items: Iterator[T]) -> Generator[T, None, None]:
    """`items`, made by a background thread up to ROWS_AHEAD before they are asked for.

    An exception in the making is raised here, in its turn. Closing the generator ends the thread.
    """
    end = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hymate-loader") as thread:
        pending = deque(thread.submit(next, items, end) for _ in range(ROWS_AHEAD))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            for future in pending:
                future.cancel()
