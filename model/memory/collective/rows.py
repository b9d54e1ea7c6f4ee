"""The table of entries: one row each, in a range of rows for every slot."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.memory.rules import Bools, Ints

NO_SLOT = -1
"""Slot of a user without entries in the index."""
ROOMS = np.array([0, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 60, 76, 96, 128, 192, 256, 384, 512, 768, 1024])
"""Numbers of rows that a slot may have."""
FACTS = ("quality", "recency", "rating")


class Rows:
    """What is known of each entry, by row. Row 0 belongs to nobody.

    Attributes:
        item: uint32, 0 = the row is free.
        cell: int32.
        mark: uint32, `marks` of the key that is filed; 0: none is, because the entry is not shared.
        facts: (rows, 3) float16, columns FACTS.
        whose: uint64 by slot, random bits of the user; 0 = not given yet.
    """

    def __init__(self) -> None:
        self.item, self.cell = np.zeros(1, np.uint32), np.zeros(1, np.int32)
        self.mark, self.facts = np.zeros(1, np.uint32), np.zeros((1, len(FACTS)), np.float16)
        self.whose = np.zeros(0, np.uint64)
        self._start, self._room = np.zeros(0, np.int64), np.zeros(0, np.int32)  # by slot
        self._end = 1
        self._free: dict[int, list[int]] = {}  # first rows of free ranges, by length

    @property
    def columns(self) -> tuple[NDArray[Any], ...]:
        """All columns."""
        return self.item, self.cell, self.mark, self.facts

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(column[:1].nbytes for column in self.columns)

    def know(self, slots: Ints, whose: NDArray[np.uint64] | None = None) -> None:
        """Make these slots exist. whose: see `Rows`; None: slots that have no bits yet get some that follow from their
        number.
        """
        most = int(slots.max(initial=NO_SLOT)) + 1
        self._start, self._room = at_least(self._start, most), at_least(self._room, most)
        self.whose = at_least(self.whose, most)
        if whose is not None:
            self.whose[slots] = whose
        elif (self.whose[slots] == 0).any():
            new = slots[self.whose[slots] == 0]
            self.whose[new] = mixed(new)

    # ----------------------------------------------------------------------------------------------- find

    def slots(self) -> NDArray[np.int64]:
        """Slots that have rows."""
        return np.flatnonzero(self._room)

    def room(self, slots: Ints) -> NDArray[np.int64]:
        """(B,) number of rows of each slot; 0 for unknown ones."""
        is_known = (slots >= 0) & (slots < len(self._room))
        if not len(self._room):
            return np.zeros(len(slots), np.int64)
        return np.where(is_known, self._room[np.where(is_known, slots, 0)], 0).astype(np.int64)

    def of(self, slots: Ints) -> NDArray[np.int64]:
        """All rows of known slots, one range after another."""
        return _ranges(self._start[slots], self._room[slots])

    def are_of(self, rows: Ints, slots: Ints) -> Bools:
        """(B, K) whether rows (B, K) belong to slots (B,)."""
        room = self.room(slots)[:, None]
        if not room.any():
            return np.zeros(rows.shape, bool)
        first = self._start[np.where(room[:, 0] > 0, slots, 0)][:, None]
        return np.asarray((rows >= first) & (rows < first + room))

    def places_of(self, slots: Ints, items: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows for items (B, C) of slots (B,), in which an item has the row that it has already, or a free one.

        Returns:
            (B, C) rows, and their positions in `of(slots)`; both are meaningless where an item is 0.
        """
        room = self._room[slots].astype(np.int64)
        place = np.cumsum(items > 0, axis=1) - 1
        within = np.arange(int(room.max(initial=0)))
        is_row = within < room[:, None]
        present = np.where(is_row, self.item[np.where(is_row, self._start[slots][:, None] + within, 0)], 0)
        old = np.flatnonzero(present.any(axis=1))
        if len(old):
            place[old] = _matched(items[old], present[old], is_row[old])
        return self._start[slots][:, None] + place, (np.cumsum(room) - room)[:, None] + place

    # --------------------------------------------------------------------------------------------- change

    def make_room(self, slots: Ints, wanted: Ints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give slots at least this many rows each. Returns the old and new rows of those that had to move."""
        is_short = wanted > self._room[slots]
        slots, rooms = slots[is_short], ROOMS[np.searchsorted(ROOMS, wanted[is_short])]
        start = np.zeros(len(slots), np.int64)
        for room in np.unique(rooms).tolist():
            start[rooms == room] = self._claim(int((rooms == room).sum()), room)
        old, new = self.of(slots), _ranges(start, self._room[slots])
        for column in self.columns:
            column[new] = column[old]
            column[old] = 0
        self.give_back(slots)
        self._start[slots], self._room[slots] = start, rooms
        return old, new

    def _claim(self, count: int, room: int) -> NDArray[np.int64]:
        """The first rows of `count` ranges."""
        free = self._free.get(room, [])
        again = [free.pop() for _ in range(min(count, len(free)))]
        fresh = self._end + room * np.arange(count - len(again))
        self._end += room * len(fresh)
        self.item, self.cell, self.mark, self.facts = (at_least(column, self._end) for column in self.columns)
        return np.concatenate([np.array(again, np.int64), fresh])

    def give_back(self, slots: Ints) -> None:
        """Free the rows of slots; they must be empty."""
        for start, room in zip(self._start[slots].tolist(), self._room[slots].tolist(), strict=True):
            if room:
                self._free.setdefault(room, []).append(start)
        self._start[slots], self._room[slots] = 0, 0

    def clear(self, rows: Ints) -> None:
        """Empty these rows."""
        for column in self.columns:
            column[rows] = 0

    def compact(self) -> None:
        """Free the memory that was set aside for growth."""
        self.item, self.cell, self.mark, self.facts = (column[: self._end].copy() for column in self.columns)


def _matched(items: NDArray[np.uint32], present: NDArray[np.uint32], is_row: Bools) -> NDArray[np.int64]:
    """(B, C) the place of each item (B, C) among those present (B, W), or a free place (is_row, not needed by another
    item); 0 for item 0. Each row must have enough places.
    """
    width = present.shape[1]
    who, at = np.nonzero(present)
    names = who << 32 | present[who, at].astype(np.int64)
    order = np.argsort(names)
    row, column = np.nonzero(items)
    wanted = row << 32 | items[row, column].astype(np.int64)
    found = np.minimum(np.searchsorted(names, wanted, sorter=order), len(names) - 1)
    found = order[found]
    is_known = names[found] == wanted
    place = np.zeros(items.shape, np.int64)
    place[row[is_known], column[is_known]] = at[found[is_known]]
    is_free = is_row.copy()
    is_free[row[is_known], at[found[is_known]]] = False
    row, column = row[~is_known], column[~is_known]
    free = np.flatnonzero(is_free)
    first = np.searchsorted(free, row * width)
    place[row, column] = free[first + np.arange(len(row)) - np.searchsorted(row, row)] % width
    return place


def _ranges(start: Ints, length: Ints) -> NDArray[np.int64]:
    """The numbers from each start on, `length` of them, one range after another."""
    length = np.asarray(length, np.int64)
    before = np.cumsum(length) - length
    return np.asarray(np.arange(int(length.sum())) + np.repeat(start - before, length))


def at_least(values: NDArray[Any], length: int, fill: int = 0) -> NDArray[Any]:
    """The array, if it has this length, or a longer copy, by half at least so that repeated growth stays cheap."""
    missing = length - len(values)
    if missing <= 0:
        return values
    more = np.full((max(missing, len(values) // 2), *values.shape[1:]), fill, values.dtype)
    return np.concatenate([values, more])


def marks(keys: NDArray[np.float16]) -> NDArray[np.uint32]:
    """32 bits of each key (..., d), never 0: different keys rarely have the same."""
    word = np.uint64 if keys.shape[-1] % 4 == 0 else np.uint16
    words = np.ascontiguousarray(keys).view(word).astype(np.uint64, copy=False)
    hashed = words @ _factors(words.shape[-1])
    return np.asarray((hashed >> np.uint64(32)).astype(np.uint32) | np.uint32(1))


@cache
def _factors(count: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(0, 2**64, count, np.uint64) | np.uint64(1)


def mixed(values: Ints) -> NDArray[np.uint64]:
    """64 random bits for each value, always the same ones (splitmix64)."""
    found = np.asarray(values).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found = (found ^ found >> np.uint64(shift)) * np.uint64(factor)
    return np.asarray(found ^ found >> np.uint64(31))
