"""Which patients a bundle's training has seen: recorded in the bundle, and checked when it is used again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from hymate.data.histories import Histories, read_metadata
from hymate.data.sources.several import PLACES

Seen = Literal["new", "same split", "another split", "other data", "not known"]
CHUNK = 1 << 20  # patients at once
LEARNED_FROM = ("train", "tuning")  # checkpoints are chosen on the tuning split
SENTENCES: dict[Seen, str] = {
    "same split": "the initial weights come from training on this dataset and split, without the held-out patients",
    "another split": (
        "the initial weights come from training on another split of this dataset, so held-out patients may have been "
        "seen in it and the scores may be too good: pretrain on this split, or use that one"
    ),
    "other data": (
        "the initial weights come from training on other data; held-out patients who are in both may have been seen"
    ),
    "not known": (
        "the initial weights come from training on other data or on another split of the same (their bundle does not "
        "say which), so held-out patients may have been seen"
    ),
}


def provenance(histories: Histories, initial_weights: Seen = "new") -> dict[str, Any]:
    """A bundle's record of the dataset that it was trained on, as plain values.

    initial_weights: `seen` of the weights that training started from; "new" where they were drawn.

    Of a dataset that was made of several, `learned_from_each` has the digest that each of them has by itself. `codes`
    has the code maps that made its codes, where there are any.
    """
    several = (read_metadata(histories.path) or {}).get("datasets", [])
    each = [_digest(histories, LEARNED_FROM, place) for place in range(len(several))]
    return {
        "fingerprint": histories.fingerprint,
        "patients": _digest(histories, histories.splits),
        "learned_from": _digest(histories, LEARNED_FROM),
        "initial_weights": initial_weights,
        **({"learned_from_each": each} if each else {}),
        **({"codes": ", ".join(histories.code_maps)} if histories.code_maps else {}),
    }


def seen(extra: Mapping[str, Any], histories: Histories) -> Seen:
    """Whether the training of a bundle or of its initial weights may have seen held-out patients of a dataset.

    As `trained_on` with "same split" where neither has; else what the initial weights had seen counts.
    """
    own, initial = trained_on(extra, histories), initial_weights(extra)
    return own if own != "same split" or initial == "new" else initial


def trained_on(extra: Mapping[str, Any], histories: Histories) -> Seen:
    """What a dataset is to the training that a bundle records in its `extra`, whatever its initial weights had seen.

    "same split" where the dataset's train and tuning patients were those of the training. Bundles of before record a
    fingerprint of dataset and split only: where it is not this dataset's, it is "not known".
    """
    recorded = extra.get("provenance")
    if not isinstance(recorded, Mapping):
        known = histories.fingerprint in (extra.get("data_fingerprint"), extra.get("fingerprint"))
        return "same split" if known else "not known"
    own = provenance(histories)
    each = recorded.get("learned_from_each")
    if own["learned_from"] in [recorded.get("learned_from"), *(each if isinstance(each, list) else [])]:
        return "same split"
    return "another split" if own["patients"] == recorded.get("patients") else "other data"


def initial_weights(extra: Mapping[str, Any]) -> Seen:
    """What a bundle records of its initial weights: `seen` of them, for the dataset that the bundle was trained on."""
    recorded = extra.get("provenance")
    initial = recorded.get("initial_weights") if isinstance(recorded, Mapping) else None
    return next((known for known in SENTENCES if known == initial), "new")


def _digest(histories: Histories, splits: Sequence[str], place: int | None = None) -> str:
    """Hash of the ids and numbers of events of some splits' patients, by id: two datasets may use the same ids.

    place: of one of the datasets that this one was made of; its patients alone count, by the ids that they have there.
    """
    index, found = histories.index, hashlib.sha256()
    for start in range(0, len(index), CHUNK):
        position_N = index.by_subject_P[start : start + CHUNK]
        position_N = position_N[np.any([index.is_in(position_N, split) for split in splits], axis=0)]
        row_N2 = np.stack([index.subject_id_P[position_N], index.num_events_P[position_N]], axis=1, dtype=np.int64)
        if place is not None:
            row_N2 = row_N2[row_N2[:, 0] % PLACES == place] // [PLACES, 1]
        found.update(row_N2.tobytes())
    return found.hexdigest()
