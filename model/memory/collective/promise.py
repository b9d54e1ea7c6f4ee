"""Which inverted lists a query looks at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.memory.collective.layout import Layout, branches
from model.memory.collective.lists import NO_LIST, CellLists
from model.memory.rules import Ints

LAST_WEIGHTS = np.array([1.0, 0.6, 0.4, 0.25, 0.15], np.float32)
"""Weight of a list by which of the last items (`layout.LAST`) leads to it."""
OWN_LIST, OTHER = 3.0, 1.5
"""Nearness of an item to the best branch of itself, and to its other branches; neighbours rarely exceed 2."""
LENGTH_COUNTS = 0.1
"""What a list loses for each factor of e in its length: a long list costs as much as several short ones."""


def promising(lists: CellLists, layout: Layout, last: Ints, budget: int) -> NDArray[np.int64]:
    """(B, P) the lists to search for the last items (B, L), the most promising first, padded with NO_LIST.

    They have `budget` entries, or a little more; if there are no more entries than that, these are all lists.
    """
    if len(lists) <= budget:
        return np.broadcast_to(np.arange(lists.used), (len(last), lists.used))
    suggested, score = _suggested(lists, layout, last)
    row, place = np.nonzero(suggested >= 0)
    names = row * np.int64(lists.used + 1) + suggested[row, place]
    different, which = np.unique(names, return_inverse=True)
    row, found = np.divmod(different, lists.used + 1)
    length = lists.size[found]
    promise = np.bincount(which, score[suggested >= 0], len(different)) - LENGTH_COUNTS * np.log(np.maximum(length, 1))
    order = np.lexsort((found, -promise, row))
    order = order[length[order] > 0]
    return _within(row[order], found[order], length[order], len(last), budget)


def _within(row: Ints, found: Ints, length: Ints, rows: int, budget: int) -> NDArray[np.int64]:
    """The first lists of each row that fit into the budget, (rows, P); row, found, length (n,) in order of `row`."""
    first = np.searchsorted(row, np.arange(rows))
    before = np.cumsum(length) - length
    fits = before - before[first[row]] < budget
    place = np.arange(len(row)) - first[row]
    chosen = np.full((rows, int(place[fits].max(initial=-1)) + 1), NO_LIST, np.int64)
    chosen[row[fits], place[fits]] = found[fits]
    return chosen


def _suggested(lists: CellLists, layout: Layout, last: Ints) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The lists (B, S) that the last items (B, L) lead to, some of them twice, padded with NO_LIST, and their scores.

    For each item and its neighbours it takes the branch of the item taken before, as in the query; for the item itself
    also the other branches, with a lower score.
    """
    near, width = layout.near, last.shape[1]
    known = np.where(last < len(near), last, 0)
    before = np.pad(last[:, 1:], ((0, 0), (0, 1)))
    own, weight = lists.of(last, branches(before)), LAST_WEIGHTS[:width]
    others = lists.all_of(last)
    following = lists.of(near[known], branches(last)[:, :, None])
    parts = (own[:, :, None], others, following)
    nearness, count = layout.nearness[known], len(last)
    worth = (np.full((count, width, 1), OWN_LIST), np.full((count, width, 1), OTHER), nearness)
    scores = [np.broadcast_to(weight[:, None] * near, part.shape) for near, part in zip(worth, parts, strict=True)]
    return (
        np.concatenate([part.reshape(count, -1) for part in parts], axis=1),
        np.concatenate([score.reshape(count, -1) for score in scores], axis=1).astype(np.float32),
    )
