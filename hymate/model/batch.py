"""A packed row of patient histories: what the loader makes and the model reads.

Shape legend, used throughout the code base:
    L  events in the row, all patients one after the other, no padding
    S  segments: one patient's window of events each (a patient may have several)
    A  answers: prediction times, each of which reads its segment's events up to one of them
    F  static events (sex, age at admission, ...) of all segments
    T  tasks
    G  variables: pairs of a segment and a code that it holds, or of an answer and a code that it has read
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

UNKNOWN_ID = 0
MASK_ID = 1
FIRST_CODE_ID = 2
HOURS_PER_YEAR = 8766.0  # of 365.25 days
CHUNK = 64  # events over which `hymate.model.moments` computes at once


def changed(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with each of its tensors changed, and those of the dataclasses in it."""
    found = {f.name: getattr(item, f.name) for f in fields(item)}
    tensors = {name: change(value) for name, value in found.items() if isinstance(value, Tensor)}
    inner = {name: changed(value, change) for name, value in found.items() if is_dataclass(value)}
    return replace(item, **tensors, **inner)


@dataclass(frozen=True)
class Variables:
    """Which variables a row holds, by segment and code.

    key_G: int64, segment * vocabulary size + code id; ascending.
    variable_L: int64, each event's.
    lengths: S Python ints, how many variables each segment has.
    """

    key_G: Tensor
    variable_L: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, row: Batch, vocab_size: int) -> Variables:
        """A row's."""
        key_G, variable_L = torch.unique(row.segment_L.long() * vocab_size + row.code_L, return_inverse=True)
        return cls(key_G, variable_L, torch.bincount(key_G // vocab_size, minlength=row.num_segments).tolist())


@dataclass(frozen=True)
class VariablesSoFar:
    """Which variables each answer of a row has read, by answer and code, and what is known of them.

    answer_G: int64, whose they are; never decreasing.
    lengths: A Python ints, how many variables each answer has read.
    code_G, code_N: int64, their codes: places in `code_N`, the row's code ids.
    features_GX: as `hymate.model.pooling.VariablePooling.FEATURES`.
    order_L: int64, the row's events by segment, code and place.
    events_G, first_N, last_N: int64, the events of each that were read: places among those from a variable's first
        event (first_N) to its last that some answer reads (last_N), which are places in `order_L`.
    """

    answer_G: Tensor
    lengths: list[int]
    code_G: Tensor
    code_N: Tensor
    features_GX: Tensor
    order_L: Tensor
    events_G: Tensor
    first_N: Tensor
    last_N: Tensor

    def blocks(self, most: int) -> Iterator[tuple[slice, slice]]:
        """Consecutive answers with at most so many variables, or one answer; and their variables."""
        first = start = held = 0
        for answer, length in enumerate([*self.lengths, most + 1]):
            if held and held + length > most:
                yield slice(first, answer), slice(start, start + held)
                first, start, held = answer, start + held, 0
            held += length


@dataclass(frozen=True)
class Ends:
    """The distinct last events that a row's answers read, by chunks of CHUNK events.

    place_BR: int64, their places in their chunks, B of them; R is the most that any has, the others are filled with 0.
    end_A: int64, each answer's among the B * R.
    """

    place_BR: Tensor
    end_A: Tensor

    @classmethod
    def of(cls, row: Batch) -> Ends:
        """A row's."""
        last_N, number_A = torch.unique(row.last_of_answers, return_inverse=True)
        chunk_N, num_chunks = last_N // CHUNK, -(-row.num_events // CHUNK)
        count_B = torch.bincount(chunk_N, minlength=num_chunks)
        among_N = torch.arange(len(last_N), device=last_N.device) - (count_B.cumsum(0) - count_B)[chunk_N]
        place_BR = last_N.new_zeros(num_chunks, int(count_B.max()))
        place_BR[chunk_N, among_N] = last_N % CHUNK
        return cls(place_BR, (chunk_N * place_BR.shape[1] + among_N)[number_A])


@dataclass(frozen=True)
class Ahead:
    """What `Forecast` asks of each anchor's patient as of then.

    past, at_L: the patients, and where in the row each of their events is (`histories_until`).
    whole_N, value_N: int64, the anchors whose horizon is whole, and where in (A, members, K), flattened, a value is.
    measured_AK, value_AK: as in `Forecast`.
    """

    past: Batch
    at_L: Tensor
    whole_N: Tensor
    value_N: Tensor
    measured_AK: Tensor
    value_AK: Tensor


@dataclass(frozen=True)
class Coming:
    """Which codes come after each anchor, when, and with which value; all others have not come when the record ends.

    anchor_A: int64, events of the row, one or more in each segment, in their order.
    draw_A: float64, a random number in [0, 1) for each, or more where nothing comes.
    age_years_A, variables, ends: as `Batch` has them, of a row with these anchors as answers.
    until_hours_A: float32, from each anchor to the end of its segment.
    anchor_N, code_N: int64, what came after which anchor: of each code the first event, later than the anchor; a place
        in `anchor_A`, never decreasing, and a code id.
    hours_N, value_N: float32, from the anchor to that event, and its normalised value, NaN where it has none.
    valued_N: int64, the places of those with a value.
    lengths: A Python ints, how many codes came after each anchor.
    """

    anchor_A: Tensor
    draw_A: Tensor
    age_years_A: Tensor
    until_hours_A: Tensor
    anchor_N: Tensor
    code_N: Tensor
    hours_N: Tensor
    value_N: Tensor
    valued_N: Tensor
    lengths: list[int]
    variables: Variables | VariablesSoFar | None = None
    ends: Ends | None = None

    def past(self, row: Batch) -> Batch:
        """The row with an answer at each anchor, as of then."""
        return replace(
            row,
            last_A=self.anchor_A,
            age_years_A=self.age_years_A,
            lag_hours_A=torch.zeros_like(self.until_hours_A),
            variables=self.variables,
            ends=self.ends,
        )


@dataclass(frozen=True)
class Asked:
    """What a self-supervised loss asks of a row: a function of the row and its seeds, not of the weights.

    code_L, hidden_L: the code ids that the model sees, and bool, whose value it does not see.
    code_N, value_N: int64, the events whose code or value is hidden.
    count_K: float64, how many targets each term has.
    ahead, coming: what is asked at anchors.
    """

    code_L: Tensor
    hidden_L: Tensor
    code_N: Tensor
    value_N: Tensor
    count_K: Tensor
    ahead: Ahead | None
    coming: Coming | None


@dataclass
class Batch:
    """One packed row. All tensors are on one device; a patient's outputs never depend on the others'.

    code_L: int64, model vocabulary ids (UNKNOWN_ID for rare codes).
    value_L: float32, robustly normalised value; NaN where the event has none.
    quantile_L: float32 in [-1, 1], the value's rank within its code's training distribution; NaN likewise.
    time_hours_L: float32, hours since the window's first event.
    gap_hours_L: float32, hours since the event before (0 for a window's first).
    segment_L: int32, 0..S-1, non-decreasing.
    cu_seqlens: S+1 Python ints; segment s is events cu_seqlens[s]:cu_seqlens[s+1]. Never empty segments.
    bounds: int64 (S+1,), the same numbers where the tensors are.
    static_code_F, static_value_F, static_quantile_F, static_segment_F: as above, for events without a time.
    age_years_A: float32, age at the prediction time (in pretraining the window's end); NaN where the birth is unknown.
    lag_hours_A: float32, hours from the last event read to the prediction time (0 in pretraining).
    example_A: int64, the position of each answer's example in the loader's list (its subject, its label).
    label_AT: float32, each task's label, 1 or 0; NaN where the task has none at this example. Pretraining has no tasks.
    days_AT: float32, how long what each task is about lasts; NaN where it has no label or the task no days.
    label_weight_AT: float32, how much each label counts in a mean over labels; 1 where nothing else is known.
    seed_S: int64, not negative; it depends only on the run's seed, the epoch and the example. What is drawn for a
        segment (masks, anchors) starts from it, and so does not depend on the row that it stands in.
    seed: a number that depends only on the run's seed and the row's place in the data order; dropout starts from it.
    last_A: int64, the last event that each answer reads, never decreasing and in every segment; None where each
        segment has one answer, at its end.
    variables, ends, asked: what a model needs besides, and what its loss asks; None where it finds that itself, for
        which a GPU would have to be waited for. `LossModel.ask` finds it where the row is made.
    """

    code_L: Tensor
    value_L: Tensor
    quantile_L: Tensor
    time_hours_L: Tensor
    gap_hours_L: Tensor
    segment_L: Tensor
    cu_seqlens: list[int]
    bounds: Tensor
    static_code_F: Tensor
    static_value_F: Tensor
    static_quantile_F: Tensor
    static_segment_F: Tensor
    age_years_A: Tensor
    lag_hours_A: Tensor
    example_A: Tensor
    label_AT: Tensor
    days_AT: Tensor
    label_weight_AT: Tensor
    seed_S: Tensor
    seed: int = 0
    last_A: Tensor | None = None
    variables: Variables | VariablesSoFar | None = None
    ends: Ends | None = None
    asked: Asked | None = None

    @property
    def num_events(self) -> int:
        """L."""
        return int(self.code_L.shape[0])

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> list[int]:
        """Of each segment."""
        return [stop - start for start, stop in pairwise(self.cu_seqlens)]

    @property
    def last_of_answers(self) -> Tensor:
        """The last event that each answer reads: int64 (A,)."""
        return self.bounds[1:] - 1 if self.last_A is None else self.last_A

    def by_answer(self, x_SX: Tensor) -> Tensor:
        """What each segment has (S, ...), for each of its answers (A, ...)."""
        return x_SX if self.last_A is None else x_SX[self.segment_L[self.last_A].long()]

    def to(self, device: torch.device | str) -> Batch:
        """The same row on `device`."""
        return changed(self, lambda x: x.to(device, non_blocking=True))


def ranges(start_N: Tensor, length_N: Tensor) -> tuple[Tensor, Tensor]:
    """start, start + 1, ... of each range one after the other, and the number of the range that each belongs to."""
    range_M = torch.arange(len(start_N), device=start_N.device).repeat_interleave(length_N)
    first_N = length_N.cumsum(0) - length_N
    return torch.arange(len(range_M), device=start_N.device) + (start_N - first_N)[range_M], range_M
