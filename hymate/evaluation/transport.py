"""What differs between the data that a model learned from and other data: codes, their values, the prevalence.

The labels count in the prevalence alone. Shape legend: V vocabulary ids, C codes of the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import meds
import numpy as np

from hymate.data.examples import Examples
from hymate.data.histories import Histories
from hymate.data.meds import is_code
from hymate.data.vocabulary import Vocabulary
from hymate.evaluation.tables import percent
from hymate.model.batch import FIRST_CODE_ID, UNKNOWN_ID

MOST_PATIENTS = 20_000  # that are looked at
BLOCK = 512  # histories at once
EXPECTED = 20  # events of a code that would be there at its training rate: of fewer, none may be chance
RARER = 10  # times as rare as in training is worth a word
FEWEST_VALUES = 20  # of a code, for its median
NAMED = 5


def transport(histories: Histories, examples: Examples, vocabulary: Vocabulary, seed: int) -> dict[str, Any]:
    """What the histories of the labelled patients hold, against a vocabulary's training data.

    patients, of: how many were looked at, and how many there are. events: what the model can read of them, the static
    ones and those before the last prediction time; unknown: the fraction of them whose codes the model does not know.
    unknown_codes: the most frequent of those, with their fraction of the events. The vocabulary counts whole histories,
    so it is compared with whole histories. rarer: codes at least RARER times as rare as in training, with their events
    per 1,000 that the model knows (births apart) in training and here. values: codes whose median lies outside the
    middle 90 % of the training values, with both medians.
    """
    position_P, first_P = np.unique(np.asarray(examples.position_E), return_index=True)
    last_P = np.append(first_P[1:], len(examples)) - 1
    drawn_P = np.sort(np.random.default_rng(seed).permutation(len(position_P))[:MOST_PATIENTS])
    count_C, read_C = np.zeros((2, len(histories.codes)), np.int64)
    values = dict[int, list[np.ndarray]]()
    for block in np.array_split(drawn_P, max(1, -(-len(drawn_P) // BLOCK))):
        read = histories.read(position_P[block])
        for history, stop in zip(read, examples.stop_E[last_P[block]].tolist(), strict=True):
            code_L = np.concatenate([history.static_code, history.code])
            value_L = np.concatenate([history.static_value, history.value])
            count_C += np.bincount(code_L, minlength=len(count_C))
            read_C += np.bincount(code_L[: len(history.static_code) + stop], minlength=len(count_C))
            valued_L = np.flatnonzero(~np.isnan(value_L))
            order_L = valued_L[np.argsort(code_L[valued_L], kind="stable")]
            valued_C, at = np.unique(code_L[order_L], return_index=True)
            for code, own in zip(valued_C.tolist(), np.split(value_L[order_L], at[1:]), strict=True):
                values.setdefault(code, []).append(own)
    id_C, events = vocabulary.ids_of(histories.codes), int(read_C.sum())
    return {
        "patients": len(drawn_P),
        "of": len(position_P),
        "events": events,
        "unknown": float(read_C[id_C == UNKNOWN_ID].sum() / max(events, 1)),
        "unknown_codes": _most(histories.codes, np.where(id_C == UNKNOWN_ID, read_C, 0), events),
        "rarer": _rarer(vocabulary, np.bincount(id_C, count_C, vocabulary.size)),
        "values": _moved(histories.codes, id_C, values, vocabulary),
    }


def _most(codes: Sequence[str], count_C: np.ndarray, events: int) -> list[list[Any]]:
    order_C = np.argsort(-count_C, kind="stable")
    return [[codes[code], float(count_C[code] / events)] for code in order_C.tolist() if count_C[code]]


def _rarer(vocabulary: Vocabulary, count_V: np.ndarray) -> list[list[Any]]:
    births = [id for id, code in enumerate(vocabulary.codes, FIRST_CODE_ID) if is_code(code, meds.birth_code)]
    left_out = [UNKNOWN_ID, *births]  # the vocabulary has no count of the first, histories none of the others
    (rate_V, _), (here_V, events) = (_rates(each_V, left_out) for each_V in (vocabulary.count_V, count_V))
    found_V = (rate_V * events >= EXPECTED) & (here_V * RARER <= rate_V)
    order = [id for id in np.argsort(-rate_V, kind="stable").tolist() if found_V[id]]
    return [[vocabulary.codes[id - FIRST_CODE_ID], float(1000 * rate_V[id]), float(1000 * here_V[id])] for id in order]


def _rates(count_V: np.ndarray, left_out: Sequence[int]) -> tuple[np.ndarray, float]:
    """Fractions of the events (V,), and how many these are, without those of some ids."""
    count_V = count_V.astype(np.float64)
    count_V[left_out] = 0
    return count_V / max(count_V.sum(), 1), count_V.sum()


def _moved(
    codes: Sequence[str], id_C: np.ndarray, values: Mapping[int, list[np.ndarray]], vocabulary: Vocabulary
) -> list[list[Any]]:
    found: list[tuple[str, float, float, int]] = []
    for code, parts in values.items():
        knots_Q, value_L = vocabulary.quantiles_VQ[id_C[code]], np.concatenate(parts)
        if len(value_L) < FEWEST_VALUES or np.isnan(knots_Q[0]):
            continue
        low, high = np.quantile(knots_Q, (0.05, 0.95))
        if not low <= (median := float(np.median(value_L))) <= high:
            found.append((codes[code], float(vocabulary.median_V[id_C[code]]), median, len(value_L)))
    return [list(row[:3]) for row in sorted(found, key=lambda row: (-row[3], row[0]))]


def paragraph(found: Mapping[str, Any], prevalence: float | None, prevalence_before: float | None) -> str:
    """It in sentences; the codes that matter most are named. prevalence: None where it is not known."""
    sample = f" (a sample of the {found['of']:,})" if found["patients"] < found["of"] else ""
    sentences = [
        f"The model knows the codes of {percent(1 - found['unknown'])} of the {found['events']:,} events that precede "
        f"these predictions, of {found['patients']:,} patients{sample}."
    ]
    if found["unknown_codes"]:
        listed = [f"`{code}` ({percent(fraction)} of the events)" for code, fraction in found["unknown_codes"]]
        sentences.append(f"It does not know {_listed(listed)}.")
    if found["rarer"]:
        listed = [
            f"`{code}` ({before:.3g} of 1,000 known events there, {here:.3g} here)"
            for code, before, here in found["rarer"]
        ]
        sentences.append(f"Far rarer than in its training data: {_listed(listed)}.")
    if found["values"]:
        listed = [f"`{code}` (median {there:.4g} there, {here:.4g} here)" for code, there, here in found["values"]]
        sentences.append(f"**Values lie elsewhere, perhaps in another unit:** {_listed(listed)}.")
    if not found["rarer"] and not found["values"] and found["unknown"] < 1:
        sentences.append("No code is far rarer than in training, and no median lies outside the usual values there.")
    before = "" if prevalence_before is None else f"; in its own held-out data {percent(prevalence_before)} were"
    if prevalence is not None:
        sentences.append(f"Here {percent(prevalence)} of the labels are positive{before}.")
    return " ".join(sentences)


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - NAMED
    return "; ".join(texts[:NAMED]) + (f"; and {more} more (results.json)" if more > 0 else "")
