"""The collective scope: all users' memories searchable at once, through FAISS. No torch, no I/O.

Every entry is filed in the list of the item that its user took just before, a long list in branches by the item
before that; a query asks the lists of its user's last items and of items that tend to follow them, the most promising
first, up to a budget of entries looked at. So nothing is trained or assigned here, and finding lists costs the same at
any size.
Keys are kept as codes of 4 or 8 bits a dimension, all else in packed rows: see `benchmarks/memory/lists.md`.
Changes are visible to the next search, and what is dropped is gone. Entries come out as (item, similarity, weights) and
never say whose they are; those of items that too few hold can be left out. Evaluation and the memory service use this
one class.
Not safe for changes beside a search (faiss returns garbage silently): callers keep to one thread.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

# Before faiss is loaded: two OpenMP threads hang a forked child. Training may have asked for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.memory.bank import NOT_SHARED, Banks, Entries, tied
from model.memory.events import EncodeJob
from model.memory.rules import Bools, Floats, Ints

LAST = 5
"""Items of the asking user that lists are found by, the newest first."""
LAST_WEIGHTS = np.array([1.0, 0.6, 0.4, 0.25, 0.15], np.float32)
"""How promising a list is by the place of the item that leads to it."""
OWN_LIST, OTHER = 3.0, 1.5
"""How near an item is to itself, and to its branches but the best; the neighbours' nearness is seldom beyond 2."""
LENGTH_COUNTS = 0.1
"""What a list loses for each factor of e in length: it costs as much as several short ones."""
BRANCH_BITS = 7
ITEM_BITS = 24
"""Bits of a cell. Items beyond share lists with others: they cost time, not answers."""
BRANCHED = 128
"""Entries a list at which an item's lists are split in two."""
OWN_SHARE = 8
"""Neighbours fetched beyond K, in case some are the asker's own."""
FETCH_LIMIT = 2048
"""Most neighbours looked at for one query while its own entries and ties at the K-th place are resolved."""
ROOMS = np.array([0, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 60, 76, 96, 128, 192, 256, 384, 512, 768, 1024])
"""Rows that a slot may have room for."""
WIDE = 1.6
"""Times the model's widest span that codes of 8 bits cover."""
LOOSE = 0.2
"""The share of entries that were added since lists and rows were compact, from which on it is worth doing it again."""
THINNING = 0.84
"""The share of entries that is kept falls by this factor whenever there are too many."""
KEPT_OF_ITEM = 100
"""Entries of every item that a sample keeps, where there are so many."""
FACTS = ("quality", "recency", "rating")


# ------------------------------------------------------------------------------------------------- what a model says


@dataclass(frozen=True)
class Layout:
    """What a model says about its collective index, rows by item number.

    near (items + 1, n) int32: items whose lists are worth asking where this one was taken, 0 = none; nearness, alike,
    float32: how much so. span (2, d) float32: between which values each dimension of most keys lies. popularity
    (items + 1,) float32: share of the interactions that training saw.
    """

    near: NDArray[np.int32]
    nearness: NDArray[np.float32]
    span: NDArray[np.float32]
    popularity: NDArray[np.float32]

    def numbered(self, numbers: Ints) -> Layout:
        """The same for other item numbers: numbers (items + 1,), 0 for padding and items without one."""
        rows = int(numbers.max(initial=0)) + 1
        near = np.zeros((rows, self.near.shape[1]), np.int32)
        nearness = np.zeros(near.shape, np.float32)
        popularity = np.zeros(rows, np.float32)
        near[numbers], nearness[numbers], popularity[numbers] = numbers[self.near], self.nearness, self.popularity
        near[0], nearness[0], popularity[0] = 0, 0, 0
        return Layout(near, nearness, self.span, popularity)


def cells(last: Ints, before: Ints) -> NDArray[np.int32]:
    """Where entries (n,) are filed: `last` is the item that each one's user took just before, `before` the one before
    that, 0 = none. An entry made before any item is in no list: such keys are alike for all users.
    """
    cell = _folded(last) << BRANCH_BITS | _branches(before)
    return np.where(np.asarray(last) <= 0, NOT_SHARED, cell).astype(np.int32)


def cells_of(job: EncodeJob) -> NDArray[np.int32]:
    """Cells of the keys that a job makes, one for each of its positions."""
    items = np.concatenate([[0, 0], job.items]).astype(np.int64)
    place = np.where(job.positions > job.start, job.positions - job.start, 0)
    return cells(items[place + 1], items[place])


def _folded(items: Ints) -> NDArray[np.int64]:
    """Items as cells name them."""
    return np.asarray(items, np.int64) & ((1 << ITEM_BITS) - 1)


def _branches(before: Ints) -> NDArray[np.int64]:
    """A number of BRANCH_BITS bits for each item."""
    mixed = np.asarray(before).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(64 - BRANCH_BITS)).astype(np.int64)


# ------------------------------------------------------------------------------------------------------------- codes


class Codec:
    """Keys as codes: each dimension in 2^bits cells of equal width over the model's span; of 8 bits, over a wider one
    that is the same for all dimensions (FAISS is twice as fast then).

    Of a key of unit length the code is that of a multiple, such that key · code is 1: what rounding took in length is
    given back. Codes depend on nothing but the key and the model.
    """

    def __init__(self, span: NDArray[np.float32], bits: int) -> None:
        self.bits, self.dim = bits, span.shape[1]
        if bits == 8:
            most = np.float32(WIDE * np.abs(span).max())
            self._low, width = np.full(self.dim, -most), np.full(self.dim, 2 * most)
        else:
            self._low, width = span[0], span[1] - span[0]
        self._cells = 2**bits
        self._step = np.maximum(width / self._cells, np.float32(1e-6)).astype(np.float32)

    def index(self, lists: int) -> Any:
        """An empty FAISS index of so many lists."""
        kind, bounds = faiss.ScalarQuantizer, (self._low, self._step * (self._cells - 1))
        of = kind.QT_4bit if self.bits == 4 else kind.QT_8bit_uniform
        quantizer = faiss.IndexFlatIP(self.dim)
        index: Any = faiss.IndexIVFScalarQuantizer(quantizer, self.dim, lists, of, faiss.METRIC_INNER_PRODUCT, False)
        each = bounds if self.bits == 4 else tuple(one[:1] for one in bounds)
        faiss.copy_array_to_vector(np.concatenate(each).astype(np.float32), index.sq.trained)
        index.is_trained = True
        return index

    def rounded(self, keys: NDArray[np.float32]) -> NDArray[np.float32]:
        """Keys (n, d) of unit length as they come out of their codes; FAISS makes the same codes of these."""
        along = np.einsum("nd,nd->n", keys, self._middles(keys))
        return self._middles(keys / np.maximum(along, 0.5)[:, None])

    def _middles(self, keys: NDArray[np.float32]) -> NDArray[np.float32]:
        cell = np.clip(np.floor((keys - self._low) / self._step), 0, self._cells - 1)
        return np.asarray(self._low + (cell + np.float32(0.5)) * self._step, np.float32)


# ------------------------------------------------------------------------------------------------------------- lists


class Lists:
    """FAISS' inverted lists by cell. An item's lists stand side by side, 2^n of them; `row` is what they say of an
    entry.
    """

    def __init__(self, codec: Codec, lists: int = 1024) -> None:
        self._codec = codec
        self.index = codec.index(lists)
        self.size = np.zeros(lists, np.int32)
        """Entries in each list."""
        self._used = 0
        self._free: dict[int, list[int]] = {}  # by how many stand side by side
        self._first = np.full(1, -1, np.int32)  # of an item
        self._splits = np.zeros(1, np.uint8)  # n of an item
        self._count = np.zeros(1, np.int32)  # entries of an item

    def __len__(self) -> int:
        """Entries in all lists."""
        return int(self.index.ntotal)

    @property
    def used(self) -> int:
        """Lists that there are, empty ones included."""
        return self._used

    def of(self, items: Ints, branch: Ints) -> NDArray[np.int64]:
        """The list of each (item, branch); −1 where the item has none."""
        item = _folded(items)
        at = np.where(item < len(self._first), item, 0)  # item 0 has none
        branch = branch & ((1 << self._splits[at].astype(np.int64)) - 1)
        return np.where(self._count[at] > 0, self._first[at] + branch, -1).astype(np.int64)

    def all_of(self, items: Ints) -> NDArray[np.int64]:
        """All lists of each item (B, L) that has more than one, (B, L, M), −1 = no more."""
        item = _folded(items)
        at = np.where(item < len(self._first), item, 0)
        beside = np.where(self._splits[at] > 0, 1 << self._splits[at].astype(np.int64), 0)[:, :, None]
        place = np.arange(int(beside.max(initial=0)))
        return np.where(place < beside, self._first[at][:, :, None] + place, -1)

    def add(self, rows: Ints, cell: Ints, keys: NDArray[np.float32], cell_of: NDArray[np.int32]) -> None:
        """File entries under their cells. cell_of: cells by row, of all that are filed."""
        item = np.asarray(cell, np.int64) >> BRANCH_BITS
        self._make(item)
        np.add.at(self._count, item, 1)
        lists = self._lists(np.asarray(cell, np.int64))
        np.add.at(self.size, lists, 1)
        codes, ids = self._codec.rounded(keys), np.ascontiguousarray(rows, np.int64)
        self.index.add_core(len(ids), *(faiss.swig_ptr(one) for one in (codes, ids, lists)))
        self._split(np.unique(item), cell_of)

    def remove(self, rows: Ints, cell: Ints) -> None:
        """Take entries out."""
        cell = np.asarray(cell, np.int64)
        lists = self._lists(cell)
        order = np.argsort(lists, kind="stable")
        places, first = np.unique(lists[order], return_index=True)
        for one, some in zip(places.tolist(), np.split(np.asarray(rows)[order], first[1:]), strict=True):
            self._remove(one, some)
        np.subtract.at(self._count, cell >> BRANCH_BITS, 1)
        self.index.ntotal -= len(cell)

    def rename(self, rows: Ints, others: Ints, cell: Ints) -> None:
        """Say the other row of each of these entries from now on; none of them is among the rows named so far."""
        lists = self._lists(np.asarray(cell, np.int64))
        for one, row, other in zip(lists.tolist(), rows.tolist(), others.tolist(), strict=True):
            ids, _ = self._view(one)
            ids[ids == row] = other

    def _remove(self, one: int, rows: Ints) -> None:
        ids, codes = self._view(one)
        left = len(ids) - len(rows)
        gone = np.isin(ids, rows) if len(rows) > 1 else ids == rows[0]
        holes, kept = np.flatnonzero(gone[:left]), left + np.flatnonzero(~gone[left:])
        ids[holes], codes[holes] = ids[kept], codes[kept]
        self.index.invlists.resize(one, left)
        self.size[one] = left

    def _view(self, one: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        inside, size, width = self.index.invlists, int(self.size[one]), self.index.code_size
        if not size:
            return np.zeros(0, np.int64), np.zeros((0, width), np.uint8)
        ids = faiss.rev_swig_ptr(inside.get_ids(one), size)
        return ids, faiss.rev_swig_ptr(inside.get_codes(one), size * width).reshape(size, width)

    def _lists(self, cell: Ints) -> NDArray[np.int64]:
        item = cell >> BRANCH_BITS
        branch = cell & ((1 << self._splits[item].astype(np.int64)) - 1)
        return np.ascontiguousarray(self._first[item] + branch, np.int64)

    def _make(self, items: Ints) -> None:
        """Lists for items that have none."""
        most = int(items.max(initial=0)) + 1
        self._first = _at_least(self._first, most, -1)
        self._splits, self._count = _at_least(self._splits, most), _at_least(self._count, most)
        new = np.unique(items[self._first[items] < 0])
        if len(new):
            self._first[new] = self._claim(len(new), 1)

    def _claim(self, count: int, beside: int) -> NDArray[np.int64]:
        """The first of `beside` lists side by side, `count` times."""
        free = self._free.get(beside, [])
        again = [free.pop() for _ in range(min(count, len(free)))]
        fresh = self._used + beside * np.arange(count - len(again))
        self._used += beside * len(fresh)
        if self._used > self.index.nlist:
            self._grow(max(self._used, 2 * self.index.nlist))
        return np.concatenate([np.array(again, np.int64), fresh])

    def compact(self) -> None:
        """Give back what was set aside for growth."""
        self._grow(self.index.nlist)

    def _grow(self, lists: int) -> None:
        new: Any = faiss.ArrayInvertedLists(lists, self.index.code_size)
        new.nlist = self.index.nlist  # so many are moved
        new.merge_from(self.index.invlists, 0)
        new.nlist = lists
        self.index.nlist = lists
        self.index.replace_invlists(new, True)
        new.this.disown()  # the index deletes them
        self.size = _at_least(self.size, lists)

    def _split(self, items: Ints, cell_of: NDArray[np.int32]) -> None:
        """Twice as many lists for items whose lists are long."""
        for item in items[self._count[items] > BRANCHED << self._splits[items].astype(np.int64)].tolist():
            while self._splits[item] < BRANCH_BITS and self._count[item] > BRANCHED << int(self._splits[item]):
                self._double(item, cell_of)

    def _double(self, item: int, cell_of: NDArray[np.int32]) -> None:
        beside = 1 << int(self._splits[item])
        old = range(int(self._first[item]), int(self._first[item]) + beside)
        first = int(self._claim(1, 2 * beside)[0])
        for place, one in enumerate(old):
            ids, codes = self._view(one)
            high = cell_of[ids] & beside > 0
            for there, some in ((first + place, ~high), (first + beside + place, high)):
                self._fill(there, ids[some], codes[some])
            self.index.invlists.resize(one, 0)
            self.size[one] = 0
        self._free.setdefault(beside, []).append(old.start)
        self._first[item], self._splits[item] = first, self._splits[item] + 1

    def _fill(self, one: int, ids: Ints, codes: NDArray[np.uint8]) -> None:
        if len(ids):
            self.index.invlists.add_entries(one, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
        self.size[one] = len(ids)


# ------------------------------------------------------------------------------------------------------------- index


class CollectiveIndex:
    """Entries of many users by slot (any small integer that the caller gives a user).

    limit: most entries that are kept, 0 = all. Beyond, those of a sample are: which ones follows from `whose` they are
    (see `put`) and their item, so that all indexes of the same entries and limit keep the same ones.
    """

    def __init__(self, layout: Layout, rules: RulesConfig, limit: int = 0) -> None:
        self.layout, self.limit, self.share = layout, limit, 1.0
        self.codec = Codec(layout.span, rules.collective_bits)
        """How keys are kept."""
        self.budget = rules.collective_codes
        """Entries that a search looks at."""
        self._lists = Lists(self.codec)
        self._start, self._room = np.zeros(0, np.int64), np.zeros(0, np.int32)  # of a slot's rows
        self._whose = np.zeros(0, np.uint64)
        self._free: dict[int, list[int]] = {}  # first rows by room
        self._end = 1  # row 0 is nobody's
        self._item, self._cell = np.zeros(1, np.uint32), np.zeros(1, np.int32)
        self._mark = np.zeros(1, np.uint32)  # of the key that is in the lists for each row; 0: none
        self._facts = np.zeros((1, len(FACTS)), np.float16)
        self._holders = np.zeros(1, np.int32)  # slots that hold each item number
        self._added = 0  # since lists and rows were compact

    def __len__(self) -> int:
        """Entries that can be found."""
        return len(self._lists)

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry: code, FAISS' id, row. What is set aside for growth is not counted."""
        return int(self._lists.index.code_size) + 8 + sum(column[:1].nbytes for column in self._columns)

    @property
    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self._item, self._cell, self._mark, self._facts

    # ------------------------------------------------------------------------------------------------------ change

    def put(self, slots: Ints, banks: Banks, entries: Entries | None = None, whose: Ints | None = None) -> None:
        """Make the banks' entries those of the slots (distinct), one row of `banks` each, replacing what was there.

        Only entries that are new, or whose key changed, are filed; only those that are gone are removed.

        Args:
            entries: `banks.everything()`, where it is at hand. whose: (B,) a number of 64 random bits for each user,
                the same wherever the user's entries are indexed; none: the slot stands for it.
        """
        slots = np.asarray(slots, np.int64)
        entries = entries or banks.everything()
        self._know(slots, _mixed(slots) if whose is None else np.asarray(whose, np.uint64))
        item = np.where(entries.valid, entries.item, 0).astype(np.uint32)
        item = np.where(self._sampled(self._whose[slots][:, None], item), item, np.uint32(0))
        self._make_room(slots, (item > 0).sum(axis=1))
        row, place = np.nonzero(item)
        at = self._rows_for(slots, item)[row, place]
        cell = banks.fields["cell"][row, place]
        mark = np.where(cell == NOT_SHARED, np.uint32(0), _marks(banks.key[row, place]))
        facts = np.stack([getattr(entries, name)[row, place] for name in FACTS], axis=1)
        before = self._mark[at], self._item[at], self._cell[at]
        changed = np.any([new != old for new, old in zip((mark, item[row, place], cell), before, strict=True)], axis=0)
        self._take_out(np.setdiff1d(self._rows_of(slots), at[~changed], assume_unique=True))
        self._item[at], self._cell[at], self._mark[at], self._facts[at] = item[row, place], cell, mark, facts
        self._count(item[row, place][changed], 1)
        new = changed & (mark > 0)
        if new.any():
            keys = banks.key[row[new], place[new]].astype(np.float32)
            self._lists.add(at[new], cell[new], keys, self._cell)
            self._added += len(keys)
        while self.limit and len(self) > self.limit:
            self._thin()

    def drop(self, slots: Ints) -> None:
        """Remove all entries of the slots; unknown slots are fine."""
        slots = np.asarray(slots, np.int64)
        slots = slots[slots < len(self._start)]
        self._take_out(self._rows_of(slots))
        self._give_back(slots)

    def compact(self) -> None:
        """Give back the memory that lists and rows set aside for growth, where much was added since the last time: some
        50 ms for a million entries.
        """
        if self._added > LOOSE * len(self):
            self._lists.compact()
            self._item, self._cell, self._mark, self._facts = (one[: self._end].copy() for one in self._columns)
            self._added = 0
            give_back()

    def _take_out(self, rows: Ints) -> None:
        """Nothing is in these rows any more; some may be empty."""
        filed = rows[self._mark[rows] > 0]
        if len(filed):
            self._lists.remove(filed, self._cell[filed])
        self._count(self._item[rows], -1)
        for column in self._columns:
            column[rows] = 0

    def _count(self, items: NDArray[np.uint32], by: int) -> None:
        self._holders = _at_least(self._holders, int(items.max(initial=0)) + 1)
        np.add.at(self._holders, items, by)
        self._holders[0] = 0

    # -------------------------------------------------------------------------------------------------------- rows

    def _know(self, slots: Ints, whose: NDArray[np.uint64]) -> None:
        most = int(slots.max(initial=-1)) + 1
        self._start, self._room = _at_least(self._start, most), _at_least(self._room, most)
        self._whose = _at_least(self._whose, most)
        self._whose[slots] = whose

    def _make_room(self, slots: Ints, wanted: Ints) -> None:
        """So many rows for each slot; the entries of one that had fewer move."""
        short = wanted > self._room[slots]
        if short.any():
            slots, rooms = slots[short], ROOMS[np.searchsorted(ROOMS, wanted[short])]
            start = np.zeros(len(slots), np.int64)
            for room in np.unique(rooms).tolist():
                start[rooms == room] = self._claim(int((rooms == room).sum()), room)
            self._move(self._rows_of(slots), _ranges(start, self._room[slots]))
            self._give_back(slots)
            self._start[slots], self._room[slots] = start, rooms

    def _move(self, old: Ints, new: Ints) -> None:
        """What is in some rows is in others from now on."""
        filed = self._mark[old] > 0
        self._lists.rename(old[filed], new[filed], self._cell[old[filed]])
        for column in self._columns:
            column[new] = column[old]
            column[old] = 0

    def _claim(self, count: int, room: int) -> NDArray[np.int64]:
        free = self._free.get(room, [])
        again = [free.pop() for _ in range(min(count, len(free)))]
        fresh = self._end + room * np.arange(count - len(again))
        self._end += room * len(fresh)
        self._item, self._cell, self._mark, self._facts = (_at_least(one, self._end) for one in self._columns)
        return np.concatenate([np.array(again, np.int64), fresh])

    def _give_back(self, slots: Ints) -> None:
        for start, room in zip(self._start[slots].tolist(), self._room[slots].tolist(), strict=True):
            if room:
                self._free.setdefault(room, []).append(start)
        self._start[slots], self._room[slots] = 0, 0

    def _rows_of(self, slots: Ints) -> NDArray[np.int64]:
        """All rows of the slots."""
        return _ranges(self._start[slots], self._room[slots])

    def _rows_for(self, slots: Ints, items: NDArray[np.uint32]) -> NDArray[np.int64]:
        """(B, C) the row of each item (0: meaningless): the one that has it, or one that has none of them."""
        width = int(self._room[slots].max(initial=0))
        ranks = np.cumsum(items > 0, axis=1) - 1
        place = np.arange(width)
        inside = place < self._room[slots][:, None]
        there = np.where(inside, self._item[np.where(inside, self._start[slots][:, None] + place, 0)], 0)
        old = np.flatnonzero(there.any(axis=1))
        if len(old):
            same = (items[old][:, :, None] == there[old][:, None, :]) & (items[old] > 0)[:, :, None]
            known = same.any(axis=2)
            free = np.argsort(same.any(axis=1) | ~inside[old], axis=1, kind="stable")
            nth = np.clip(np.cumsum(~known & (items[old] > 0), axis=1) - 1, 0, None)
            ranks[old] = np.where(known, same.argmax(axis=2), np.take_along_axis(free, np.minimum(nth, width - 1), 1))
        return np.asarray(self._start[slots][:, None] + ranks)

    # ------------------------------------------------------------------------------------------------------ sample

    def _sampled(self, whose: NDArray[np.uint64], items: NDArray[np.uint32]) -> Bools:
        """Whether entries are among those that are kept."""
        if self.share >= 1.0:
            return np.ones(items.shape, bool)
        popular = np.append(self.layout.popularity, np.float32(0))[np.minimum(items, len(self.layout.popularity))]
        expected = popular.astype(np.float64) * self.limit  # that is how many a sample without favour would keep
        share = self.share * np.maximum(1.0, KEPT_OF_ITEM / np.maximum(expected, 1e-9))
        return np.asarray(_mixed(whose ^ _mixed(items)).astype(np.float64) < share * 2.0**64)

    def _thin(self) -> None:
        """Keep a smaller share of the entries."""
        self.share *= THINNING
        slots = np.flatnonzero(self._room)
        room = self._room[slots].astype(np.int64)
        rows = self._rows_of(slots)
        kept = self._sampled(np.repeat(self._whose[slots], room), self._item[rows])
        self._take_out(rows[~kept & (self._item[rows] > 0)])

    # ------------------------------------------------------------------------------------------------------ search

    def search(self, queries: Floats, last: Ints, askers: Ints, k: Ints, users: int = 1) -> Entries:
        """The k most similar entries of others for each query, best first; fewer only if there are fewer in the lists
        looked at. Similarities are compared to 6 decimals; ties go by quality, recency, rating, key and item: no slot
        shows, and what number an item has hardly counts.

        Args:
            queries: (B, d) unit length. last: (B, ≤ LAST) the items that were taken last, the newest first, 0 = none.
            askers: (B,) slots whose own entries are left out, −1 = none. k: (B,).
            users: entries of items that fewer others hold are left out.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        wanted, askers = np.asarray(k, np.int64), np.asarray(askers, np.int64)
        width = int(wanted.max(initial=0))
        best = np.zeros((len(queries), width), np.float32)
        found = np.full((len(queries), width), -1, np.int64)
        pending, fetch = np.flatnonzero(wanted > 0), width + min(width, OWN_SHARE)
        if not len(pending) or not len(self):
            return self._entries(best, found)
        lists: Ints = self.promising(np.asarray(last, np.int64))
        while len(pending) and lists.shape[1]:
            similarity, rows = self._nearest(queries[pending], lists[pending], fetch)
            rows[self._is_own(rows, askers[pending])] = -1
            if users > 1:
                rows[self._too_few(rows, askers[pending], users)] = -1
            settled = _settled(similarity, rows, wanted[pending]) | (fetch >= FETCH_LIMIT)
            done = pending[settled]
            best[done], found[done] = self._best(similarity[settled], rows[settled], wanted[done], width)
            pending, fetch = pending[~settled], fetch * 4
        return self._entries(best, found)

    def scan(self, lists: range, queries: NDArray[np.float32], fetch: int) -> tuple[NDArray[np.float32], Ints]:
        """Similarities (B, fetch) of the best entries of some lists (`lists`), and their rows, −1 where there are no
        more: whatever is in the index, however far from the query, is found by asking for all lists.
        """
        every = np.broadcast_to(np.asarray(lists, np.int64), (len(queries), len(lists)))
        return self._nearest(queries, every, fetch, codes=0)

    def looked_at(self, last: Ints) -> NDArray[np.int64]:
        """(B,) entries in the lists that are asked for the last items (B, L)."""
        lists = self.promising(np.asarray(last, np.int64))
        return np.asarray(np.where(lists >= 0, self._lists.size[lists], 0).sum(axis=1), np.int64)

    @property
    def lists(self) -> int:
        """Lists that entries are kept in, empty ones included."""
        return self._lists.used

    def most_of(self, slots: Ints) -> int:
        """Most rows that any of these slots has."""
        known = np.asarray(slots)[(np.asarray(slots) >= 0) & (np.asarray(slots) < len(self._room))]
        return int(self._room[known].max(initial=0))

    def is_of(self, rows: Ints, slots: Ints) -> Bools:
        """(B, K) whether rows (B, K) are those of slots (B,)."""
        return self._is_own(np.asarray(rows, np.int64), np.asarray(slots, np.int64))

    def promising(self, last: Ints) -> NDArray[np.int64]:
        """(B, P) the lists that are looked at for the last items (B, L), the most promising first, −1 = none. All,
        where the budget suffices.
        """
        if len(self) <= self.budget:
            return np.broadcast_to(np.arange(self._lists.used), (len(last), self._lists.used))
        lists, score = self._suggested(last)
        count = len(last)
        row, one = np.nonzero(lists >= 0)
        suggested = row * np.int64(self._lists.used + 1) + lists[row, one]
        different, where = np.unique(suggested, return_inverse=True)
        row, one = np.divmod(different, self._lists.used + 1)
        length = self._lists.size[one]
        promise = np.bincount(where, score[lists >= 0], len(different)) - LENGTH_COUNTS * np.log(np.maximum(length, 1))
        order = np.lexsort((one, -promise, row))
        order = order[length[order] > 0]
        row, one, length = row[order], one[order], length[order]
        first = np.searchsorted(row, np.arange(count))
        total = np.cumsum(length) - length
        near = total - total[first[row]] < self.budget
        place = np.arange(len(row)) - first[row]
        chosen = np.full((count, int(place[near].max(initial=-1)) + 1), -1, np.int64)
        chosen[row[near], place[near]] = one[near]
        return chosen

    def _suggested(self, last: Ints) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Lists (B, S) that the last items (B, L) suggest, −1 = none, and how much so; some more than once.

        Of each item and its neighbours the branch is asked where the item stands behind that before it, as it does in
        the question; of the item itself all others too, after those.
        """
        near, width = self.layout.near, last.shape[1]
        known = np.where(last < len(near), last, 0)
        before = np.pad(last[:, 1:], ((0, 0), (0, 1)))
        own, weight = self._lists.of(last, _branches(before)), LAST_WEIGHTS[:width]
        others = self._lists.all_of(last)
        following = self._lists.of(near[known], _branches(last)[:, :, None])
        parts = (own[:, :, None], others, following)
        nearness, count = self.layout.nearness[known], len(last)
        worth = (np.full((count, width, 1), OWN_LIST), np.full((count, width, 1), OTHER), nearness)
        score = [np.broadcast_to(weight[:, None] * one, part.shape) for one, part in zip(worth, parts, strict=True)]
        return (
            np.concatenate([part.reshape(count, -1) for part in parts], axis=1),
            np.concatenate([one.reshape(count, -1) for one in score], axis=1).astype(np.float32),
        )

    def _nearest(
        self, queries: NDArray[np.float32], lists: Ints, fetch: int, codes: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarities and rows, (B, fetch), best first; −1 where there is nothing. codes: most that are looked at."""
        index = self._lists.index
        index.nprobe, index.max_codes = lists.shape[1], 2 * self.budget if codes is None else codes
        asked = np.ascontiguousarray(lists, np.int64)
        similarity, rows = index.search_preassigned(np.ascontiguousarray(queries), fetch, asked, None)
        return similarity, rows

    def _is_own(self, rows: Ints, askers: Ints) -> Bools:
        here = (askers >= 0) & (askers < len(self._start))
        at = np.where(here, askers, 0)
        if not len(self._start):
            return np.zeros(rows.shape, bool)
        first, room = self._start[at][:, None], np.where(here, self._room[at], 0)[:, None]
        return np.asarray((rows >= first) & (rows < first + room))

    def _too_few(self, rows: Ints, askers: Ints, users: int) -> Bools:
        """(B, K) whether fewer than `users`, the asker not counted, hold the item."""
        items = self._item[np.maximum(rows, 0)]
        holders = self._holders[items]
        few = holders < users
        here = (askers >= 0) & (askers < len(self._start))
        for n in np.flatnonzero((holders == users).any(axis=1) & here).tolist():  # the asker makes the difference
            few[n] |= (holders[n] == users) & np.isin(items[n], self._item[self._rows_of(askers[n : n + 1])])
        return few

    def _best(
        self, similarity: NDArray[np.float32], rows: Ints, k: Ints, width: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The first k of each query, in order; the others are marked −1."""
        equal = tied(similarity, rows >= 0)
        order = np.argsort(rows < 0, axis=1, kind="stable")  # as faiss found them, without the askers' own
        if len(equal):
            some = rows[equal]
            rounded = np.where(some >= 0, -np.round(similarity[equal].astype(np.float64), 6), np.inf)
            at = np.maximum(some, 0)
            quality, recency, rating = -self._facts[at].transpose(2, 0, 1)
            order[equal] = np.lexsort((self._item[at], self._mark[at], rating, recency, quality, rounded), axis=1)
        order = order[:, :width]
        rows, similarity = np.take_along_axis(rows, order, 1), np.take_along_axis(similarity, order, 1)
        return similarity, np.where(np.arange(order.shape[1]) < k[:, None], rows, -1)

    def _entries(self, similarity: NDArray[np.float32], rows: Ints) -> Entries:
        valid, at = rows >= 0, np.maximum(rows, 0)
        facts = np.where(valid[:, :, None], self._facts[at], np.float16(0)).astype(np.float32)
        return Entries(
            item=np.where(valid, self._item[at], 0).astype(np.int64),
            similarity=np.where(valid, similarity, np.float32(0)),
            valid=valid,
            **{name: facts[:, :, n] for n, name in enumerate(FACTS)},
        )


def give_back() -> None:
    """Let the operating system have what this process has freed, where the C library can do that."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _ranges(start: Ints, length: Ints) -> NDArray[np.int64]:
    """The numbers from each start on, so many of them, one range after another."""
    length = np.asarray(length, np.int64)
    before = np.cumsum(length) - length
    return np.asarray(np.arange(int(length.sum())) + np.repeat(start - before, length))


def _at_least(values: NDArray[Any], length: int, filled: int = 0) -> NDArray[Any]:
    """At least so long, `filled` at the end; growing by a quarter at least keeps it cheap."""
    missing = length - len(values)
    if missing <= 0:
        return values
    longer = np.full((len(values) + max(missing, len(values) // 4), *values.shape[1:]), filled, values.dtype)
    longer[: len(values)] = values
    return longer


def _marks(keys: NDArray[np.float16]) -> NDArray[np.uint32]:
    """(n,) a 32-bit mark of each key (n, d): seldom alike where keys are not. Never 0."""
    word = np.uint64 if keys.shape[1] % 4 == 0 else np.uint16
    words = np.ascontiguousarray(keys).view(word).astype(np.uint64, copy=False)
    mixed = words @ _factors(words.shape[1])
    return np.asarray((mixed >> np.uint64(32)).astype(np.uint32) | np.uint32(1))


def _mixed(values: Ints) -> NDArray[np.uint64]:
    """64 random bits for each value, always the same ones."""
    mixed = np.asarray(values).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
    return np.asarray(mixed ^ mixed >> np.uint64(31))


@cache
def _factors(count: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(0, 2**64, count, np.uint64) | np.uint64(1)


def _settled(similarity: NDArray[np.float32], rows: Ints, k: Ints) -> NDArray[np.bool_]:
    """(B,) whether the best k are surely among the fetched: the lists are exhausted, or what was fetched reaches below
    the k-th similarity, so that no tie was cut off.
    """
    exhausted = similarity[:, -1] < -1e30
    usable = rows >= 0
    nth = np.cumsum(usable, axis=1)
    kth = np.where(usable & (nth == k[:, None]), np.round(similarity.astype(np.float64), 6), -np.inf).max(axis=1)
    return np.asarray(exhausted | ((nth[:, -1] >= k) & (np.round(similarity[:, -1].astype(np.float64), 6) < kth)))
