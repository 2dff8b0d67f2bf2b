"""Cutting a long list of histories into blocks, and packing those of a block into rows: by best fit decreasing. Before
that, which prediction times of a history are answered together.

Johnson (1973): best fit decreasing uses at most 11/9 of the fewest possible rows (plus a constant); on patient
histories, where short ones fill what long ones leave, all rows but the last are full to within a few events.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

BLOCK_EVENTS = 4_000_000  # read together: 64 MB of times, codes and values


def blocks(num_events_N: np.ndarray, most: int = BLOCK_EVENTS) -> list[np.ndarray]:
    """Consecutive items in blocks of about `most` events, at least one item each: their places among the items."""
    events_N = num_events_N.astype(np.int64)
    block_N = (np.cumsum(events_N) - events_N) // most
    return np.split(np.arange(len(events_N)), np.flatnonzero(np.diff(block_N)) + 1)


def pack(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Distribute items over rows whose lengths sum to at most `budget`.

    Longest first, each item goes to the open row with the least room that still holds it. Items of equal
    length are taken in their given order, so the result is a pure function of the arguments.

    lengths: (N,) integers in 1..budget.
    Returns the rows, each an int64 array of indices into `lengths`; every index lies in exactly one row.

    >>> [row.tolist() for row in pack(np.array([3, 6, 5, 4, 2]), budget=10)]
    [[1, 3], [2, 0, 4]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) == 0:
        return []
    shortest, longest = int(lengths.min()), int(lengths.max())
    assert shortest >= 1 and longest <= budget, f"lengths {shortest}..{longest} do not fit rows of 1..{budget}"

    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), dtype=np.int64)
    rooms: list[int] = []  # the distinct rooms left in open rows, ascending
    open_rows: dict[int, list[int]] = {}  # room -> rows that have it
    num_rows = 0
    for place, length in enumerate(lengths[order].tolist()):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = num_rows, budget
            num_rows += 1
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        room -= length
        if room >= shortest:  # otherwise nothing fits any more: the row is closed
            if room not in open_rows:
                open_rows[room] = []
                insort(rooms, room)
            open_rows[room].append(row)
        row_of[place] = row
    by_row = np.argsort(row_of, kind="stable")
    ends = np.cumsum(np.bincount(row_of, minlength=num_rows))
    return np.split(order[by_row], ends[:-1])


def answered_together(position_E: np.ndarray, stop_E: np.ndarray, context: int) -> np.ndarray:
    """Which examples one segment answers: the first of each segment's, int64 and ascending.

    From a history's latest prediction time back, a segment is the last `context` events up to it. It answers each
    earlier time that has at least half of the context before it in the segment, or its whole history; from the latest
    of the others goes the next segment, and so on. A segment answers at most `context` times.

    position_E: each example's history, never decreasing. stop_E: how many events it may use, never decreasing within a
    history.

    >>> answered_together(np.array([0, 0, 0, 0, 1]), np.array([3, 5, 7, 9, 2]), context=4)
    array([0, 2, 4])
    """
    lo_H = np.flatnonzero(np.diff(position_E, prepend=-1))
    hi_H = np.append(lo_H[1:], len(position_E))
    number_H, most = np.arange(len(lo_H)), int(stop_E.max()) + 1
    key_E = np.repeat(number_H, hi_H - lo_H) * most + stop_E
    found = []
    while len(lo_H):
        start_H = np.maximum(stop_E[hi_H - 1].astype(np.int64) - context, 0)
        least_H = np.where(start_H > 0, start_H + (context + 1) // 2, 0)
        first_H = np.searchsorted(key_E, number_H * most + least_H)
        first_H = np.maximum(first_H, np.maximum(lo_H, hi_H - context))
        found.append(first_H)
        on_H = first_H > lo_H
        lo_H, hi_H, number_H = lo_H[on_H], first_H[on_H], number_H[on_H]
    return np.sort(np.concatenate(found))


def window_starts(position_E: np.ndarray, stop_E: np.ndarray, context: int) -> np.ndarray:
    """The first event that each example reads in the segment which answers it: int64."""
    first_N = answered_together(position_E, stop_E, context)
    num_answers_N = np.diff(first_N, append=len(stop_E))
    return np.repeat(np.maximum(stop_E[first_N + num_answers_N - 1].astype(np.int64) - context, 0), num_answers_N)
