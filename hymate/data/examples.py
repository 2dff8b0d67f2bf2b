"""Examples: histories up to a prediction time, with their labels.

Legend, besides that of `hymate.model.batch`: E examples, N labels, P subjects in the dataset's index.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from hymate.config import TaskConfig
from hymate.data.censoring import is_followed, lost_before
from hymate.data.histories import Histories
from hymate.data.label_files import EVENT
from hymate.data.meds import LAST_TIME, SPLITS
from hymate.data.positions import events_until
from hymate.errors import UserError

NO_TIME = -1  # prediction_time_E of pretraining examples


@dataclass(frozen=True)
class Consecutive:
    """The integers from `start` on, as an array that takes no memory; as much of NumPy's interface as is needed."""

    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, at_N: np.ndarray | Sequence[int]) -> np.ndarray:
        return self.start + np.asarray(at_N, np.int64)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.arange(self.start, self.start + self.length, dtype=dtype or np.int64)

    def searchsorted(self, values_N: np.ndarray) -> np.ndarray:
        return np.clip(values_N - self.start, 0, self.length)


@dataclass(frozen=True)
class Examples:
    """What an epoch visits: histories, each up to a time.

    position_E: int64, position of the history in the dataset's index; never decreasing.
    stop_E: integers, how many of its events may be used: those at or before the prediction time.
    earliest_E: int64, the fewest of them that an earlier view with the same label may show (`Rows.early_fraction`):
        those up to the label's start; stop_E where there is no earlier view.
    prediction_time_E: int64, microseconds since 1970; NO_TIME in pretraining.
    label_ET: float32, 1 or 0, or with a teacher between them; of a task in time what came first (EVENT, COMPETING or
        0); NaN where a task has no label at this time, and where its label is null.
    days_ET: float32; of a task in time until then; NaN likewise, and for tasks without days.
    weight_ET: float32, positive: how much each label counts (inverse probability of censoring); 1 where none is known.
    subject_id_E: int64.
    dropped: how many labels were left out, by reason.
    """

    position_E: np.ndarray | Consecutive
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

    def _arrays(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "dropped"}

    def only(self, kept: np.ndarray) -> Examples:
        """Those where `kept` is true (E,), or whose numbers, which increase, it holds."""
        kept = np.flatnonzero(kept) if kept.dtype == bool else kept
        return replace(self, **{name: value[kept] for name, value in self._arrays().items()})

    def in_parts(self, about: int) -> dict[str, Examples]:
        """Consecutive parts of about so many, none of which cuts a subject in two, by their numbers."""
        starts = np.flatnonzero(np.diff(self.position_E, prepend=-1))
        cuts = np.unique(starts[np.searchsorted(starts, np.arange(0, len(self), about)).clip(max=len(starts) - 1)])
        bounds = enumerate(zip(cuts, np.append(cuts, len(self))[1:], strict=True))
        return {f"{number:06d}": self.only(np.arange(*lo_hi)) for number, lo_hi in bounds}

    def without_labels(self) -> Examples:
        """The same times, as if nothing were known of their labels."""
        return replace(self, label_ET=np.full_like(self.label_ET, np.nan), days_ET=np.full_like(self.days_ET, np.nan))

    def table(self) -> pa.Table:
        """The examples of one task as a table, which `of_table` reads; without `dropped`."""
        return pa.table({name: np.asarray(value).ravel() for name, value in self._arrays().items()})

    @classmethod
    def of_table(cls, table: pa.Table) -> Examples:
        """What `table` made."""
        arrays = {name: table[name].to_numpy() for name in table.column_names}
        return cls(**{name: value[:, None] if name.endswith("_ET") else value for name, value in arrays.items()})

    def digest(self) -> str:
        """Of all arrays."""
        found = hashlib.sha256()
        for value in self._arrays().values():
            found.update(np.ascontiguousarray(value).tobytes())
        return found.hexdigest()

    def sample_weights(self, about: int, seed: int) -> np.ndarray:
        """How much each example counts (E,) in a sample that stands for all, 0 where it is not drawn.

        Both classes of each task are drawn as often, as far as there are so many, so that a rare outcome costs little
        precision; a weight is one over the probability of being drawn (Horvitz & Thompson 1952).
        """
        if len(self) <= about:
            return np.ones(len(self))
        drawn_E = np.zeros(len(self))
        for label_E in self.label_ET.T:
            for class_E in (label_E > 0.5, label_E <= 0.5):
                fair = about / (2 * self.label_ET.shape[1] * max(1, int(class_E.sum())))
                drawn_E[class_E] = np.maximum(drawn_E[class_E], min(1.0, fair))
        in_sample = np.random.default_rng(seed).random(len(self)) < drawn_E
        return np.divide(in_sample, drawn_E, out=np.zeros(len(self)), where=in_sample)

    def sampled(self, about: int, seed: int) -> Examples:
        """The examples of the sample, their labels with its weights."""
        weight_E = self.sample_weights(about, seed)
        weighed = replace(self, weight_ET=(self.weight_ET * weight_E[:, None]).astype(np.float32))
        return weighed.only(weight_E > 0)

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


def pretraining_examples(histories: Histories, split: str) -> Examples:
    """Every history of `split` that has events, whole and without tasks. UserError when there is none.

    They are views of the index: their number costs no memory.
    """
    index, of_split = histories.index, [segment for segment in histories.index.segments if segment.split == split]
    if not of_split:
        raise histories.without_subjects_error(split)
    _, start, empty, stop = of_split[0]
    own, count = slice(start, empty), empty - start
    if not count:
        raise UserError(f"no history with events in split {split!r}: prepare the dataset with subjects in this split")
    nothing_ET = np.empty((count, 0), dtype=np.float32)
    return Examples(
        position_E=Consecutive(start, count),
        stop_E=index.num_events_P[own],
        earliest_E=index.num_events_P[own],
        prediction_time_E=np.broadcast_to(np.int64(NO_TIME), (count,)),
        label_ET=nothing_ET,
        days_ET=nothing_ET,
        weight_ET=nothing_ET,
        subject_id_E=index.subject_id_P[own],
        dropped={"without_events": stop - empty},
    )


def labelled_examples(histories: Histories, labels: pa.Table, split: str, required: bool = True) -> Examples:
    """A task's labels of `split`'s subjects, each with the events at or before its prediction time.

    labels: MEDS labels (subject_id, prediction_time and, where known, boolean_value and the days as float_value) and,
        where known, `start` and `weight` (see `hymate.data.label_files`); of a task in time as `LabelSet` has them.
    Dropped and counted: labels whose subject is not in the dataset (`unknown_subject`), and labels without any
    event up to the prediction time (`without_events`, and those of them that are positive). Sorted by position and
    time, whatever the labels' order. Raises UserError when no label is left, unless they are not `required`.
    """
    subject_id_N = labels["subject_id"].to_numpy().astype(np.int64)
    time_N = labels["prediction_time"].cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
    truth = "cause" if "cause" in labels.column_names else "boolean_value"
    label_N, days_N = _values(labels, truth), _values(labels, "float_value")
    weight_N = _values(labels, "weight") if "weight" in labels.column_names else np.ones_like(label_N)

    position_N = histories.index.find(subject_id_N)
    known = position_N >= 0
    in_split = known & histories.index.is_in(position_N, split)
    order = np.lexsort((time_N, position_N))
    order = order[in_split[order]]
    position_E, time_E = position_N[order], time_N[order]
    start_E = _starts(labels)[order]
    stop_E, before_start_E, until_start_E = events_until(
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
        raise _no_example_error(histories, position_N, split, dropped)
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


def _no_example_error(
    histories: Histories, position_N: np.ndarray, split: str, dropped: Mapping[str, int]
) -> UserError:
    """The error where no label of a split can be used: its cause and the remedy."""
    total = len(position_N)
    if histories.odd_splits and split not in histories.splits:
        return histories.without_subjects_error(split)
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
    of_split = {other: int(histories.index.is_in(position_N[position_N >= 0], other).sum()) for other in SPLITS}
    where = ", ".join(f"{count} in {other}" for other, count in of_split.items() if count)
    return UserError(
        f"no label is of a subject in split {split!r}: of {total} labels {where or 'none'} and "
        f"{dropped['unknown_subject']} of unknown subjects: label subjects of {split!r}, or prepare the dataset with "
        "splits that hold labelled subjects"
    )


def require_both_classes(task: TaskConfig, examples: Mapping[str, Examples], any_horizon: bool = False) -> None:
    """Raises UserError where a split's labels are all alike: nothing can be learned from it, or measured on it.

    any_horizon: of a task in time one horizon that can be judged is enough; otherwise all must be.
    """
    for split, part in examples.items():
        label_E, days_E = part.label_E, part.days_E
        positives = int((label_E > 0.5).sum())
        remedy = "prepare the dataset with more subjects in this split, or choose another task"
        if task.in_time:
            _require_seen(task, split, label_E, days_E, any_horizon)
            continue
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


def _require_seen(task: TaskConfig, split: str, cause_E: np.ndarray, days_E: np.ndarray, any_horizon: bool) -> None:
    """Raises UserError where a horizon of a task in time can't be judged; any_horizon: where none can."""
    horizons = np.asarray(task.horizons_days, np.float32).tolist()
    unjudged = {horizon: why for horizon in horizons if (why := _why_unjudged(horizon, cause_E, days_E))}
    if unjudged and (len(unjudged) == len(horizons) or not any_horizon):
        horizon, why = next(iter(unjudged.items()))
        leave_out = "" if any_horizon else "leave this horizon out of task.horizons_days, or "
        raise UserError(
            f"task {task.name}: nobody of the {split} split {why} {horizon:g} days: {leave_out}give labels that look "
            "further ahead (of a definition, a later end of its label window) or more subjects in this split"
        )


def _why_unjudged(horizon_days: float, cause_E: np.ndarray, days_E: np.ndarray) -> str:
    """What nobody is or does, where a horizon can't be judged; else nothing."""
    came_E = (cause_E == EVENT) & (days_E <= days_E.dtype.type(horizon_days))
    others_E = ~came_E & ~lost_before(horizon_days, days_E, cause_E)  # a competing event settles it, too
    if not came_E.any():
        return "has the event within"
    if not others_E.any() or not is_followed(horizon_days, days_E, cause_E):
        return "is followed, without the event, for"
    return ""


def examples_by_split(
    histories: Histories, task: TaskConfig, labels: pa.Table, needs_held_out: bool = False
) -> dict[str, Examples]:
    """The `labelled_examples` of each of SPLITS; there may be none in held_out, unless it `needs_held_out`. Raises
    UserError where one of the others has none, or labels of one class, or where a horizon of a task in time can't be
    judged in any. What is left out is printed.
    """
    may_lack = () if needs_held_out else ("held_out",)
    examples = {split: labelled_examples(histories, labels, split, required=split not in may_lack) for split in SPLITS}
    judged = [split for split in SPLITS if split != "held_out" or (task.in_time and len(examples[split]))]
    require_both_classes(task, {split: examples[split] for split in judged})
    note_dropped(task, examples.values())
    return examples


def note_dropped(task: TaskConfig, parts: Iterable[Examples]) -> dict[str, int]:
    """Print how many labels of a task were left out of some splits, if any, and return the counts."""
    total = Counter[str]()
    for part in parts:
        total.update(part.dropped)
        total["unknown_subject"] = part.dropped["unknown_subject"]  # each part counts those of all splits
    unknown, early, positive = (
        total[name] for name in ("unknown_subject", "without_events", "positives_without_events")
    )
    if unknown or early:
        print(
            f"Note: task {task.name}: {unknown + early} labels are left out: {unknown} of subjects who are not in the "
            f"dataset, {early} ({positive} positive) before the first event of their subject",
            flush=True,
        )
    return dict(total)


def united(parts: Sequence[Examples]) -> Examples:
    """The examples of several tasks, one a part: each history and time of any of them is an example, with the labels of
    all of them.

    Where a task has several labels at one time, each is an example. Sorted as `labelled_examples` sorts; `dropped`
    stays with the parts.
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


def _only_task(examples: Examples) -> int:
    assert examples.label_ET.shape[1] == 1, "these are the examples of several tasks"
    return 0


def _starts(labels: pa.Table) -> np.ndarray:
    """Each label's start, int64 microseconds; after every event where it is unknown."""
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
