"""What a model says about its collective index, and under which cell an entry is filed. Pure numpy, no FAISS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.memory.bank import NOT_SHARED
from model.memory.record import EncodeJob
from model.memory.rules import Ints

LAST = 5
"""How many of a user's last items, newest first, are used to find lists."""
BRANCH_BITS = 7
ITEM_BITS = 24
"""Bits of a cell. Items with larger numbers share lists with others: that costs time, but changes no answer."""


@dataclass(frozen=True)
class Layout:
    """What a model says about its collective index. Rows are item numbers; row 0 is padding.

    Attributes:
        near: (items + 1, n) int32, items whose lists are worth searching if this item was taken; 0 = none.
        nearness: (items + 1, n) float32, how much each of them is worth.
        span: (2, d) float32, lower and upper bound of most values of each key dimension.
        popularity: (items + 1,) float32, share of the training interactions.
    """

    near: NDArray[np.int32]
    nearness: NDArray[np.float32]
    span: NDArray[np.float32]
    popularity: NDArray[np.float32]

    def numbered(self, numbers: Ints) -> Layout:
        """The same layout for other item numbers: numbers (items + 1,), 0 for padding and for items without one."""
        rows = int(numbers.max(initial=0)) + 1
        near = np.zeros((rows, self.near.shape[1]), np.int32)
        nearness = np.zeros(near.shape, np.float32)
        popularity = np.zeros(rows, np.float32)
        near[numbers], nearness[numbers], popularity[numbers] = numbers[self.near], self.nearness, self.popularity
        near[0], nearness[0], popularity[0] = 0, 0, 0
        return Layout(near, nearness, self.span, popularity)


def cells(last: Ints, before: Ints) -> NDArray[np.int32]:
    """The cells (n,) of entries whose users took the item `last` (n,) just before and `before` (n,) before that.

    0 = none. An entry without a last item is NOT_SHARED: such keys are the same for all users.
    """
    cell = item_of_cell(last) << BRANCH_BITS | branches(before)
    return np.where(np.asarray(last) <= 0, NOT_SHARED, cell).astype(np.int32)


def cells_of(job: EncodeJob) -> NDArray[np.int32]:
    """The cells of the keys that a job makes, one for each of its positions."""
    items = np.concatenate([[0, 0], job.items]).astype(np.int64)
    place = np.where(job.positions > job.start, job.positions - job.start, 0)
    return cells(items[place + 1], items[place])


def item_of_cell(items: Ints) -> NDArray[np.int64]:
    """The number (ITEM_BITS bits) that stands for each item in a cell."""
    return np.asarray(items, np.int64) & ((1 << ITEM_BITS) - 1)


def branches(before: Ints) -> NDArray[np.int64]:
    """The number (BRANCH_BITS bits) that stands for each item taken before the last one in a cell."""
    mixed = np.asarray(before).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(64 - BRANCH_BITS)).astype(np.int64)
