"""FAISS' inverted lists, one or several for each item."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from model.memory.collective.codec import Codec
from model.memory.collective.layout import BRANCH_BITS, item_of_cell
from model.memory.collective.rows import at_least
from model.memory.rules import Ints

NO_LIST = -1
BRANCHED = 128
"""Entries per list above which the lists of an item are doubled."""


class CellLists:
    """Files entries by cell. An item has 2^n consecutive lists; FAISS' id of an entry is its `row`."""

    def __init__(self, codec: Codec, lists: int = 1024) -> None:
        self._codec = codec
        self.index = codec.index(lists)
        self._inverted: Any = self.index.invlists
        self.size = np.zeros(lists, np.int32)
        """Entries in each list."""
        self._used = 0
        self._free: dict[int, list[int]] = {}  # first lists of free blocks, by the length of the block
        self._first = np.full(1, NO_LIST, np.int32)  # by item: its first list
        self._splits = np.zeros(1, np.uint8)  # by item: n
        self._count = np.zeros(1, np.int32)  # by item: its entries

    def __len__(self) -> int:
        """Entries in all lists."""
        return int(self.index.ntotal)

    @property
    def used(self) -> int:
        """Number of lists, including empty ones."""
        return self._used

    # ----------------------------------------------------------------------------------------------- find

    def of(self, items: Ints, branch: Ints) -> NDArray[np.int64]:
        """The list of each (item, branch); NO_LIST if the item has no entries."""
        at = self._known(items)
        branch = branch & ((1 << self._splits[at].astype(np.int64)) - 1)
        return np.where(self._count[at] > 0, self._first[at] + branch, NO_LIST).astype(np.int64)

    def all_of(self, items: Ints) -> NDArray[np.int64]:
        """All lists (B, L, M) of each item (B, L) that has more than one, padded with NO_LIST."""
        at = self._known(items)
        length = np.where(self._splits[at] > 0, 1 << self._splits[at].astype(np.int64), 0)[:, :, None]
        place = np.arange(int(length.max(initial=0)))
        return np.where(place < length, self._first[at][:, :, None] + place, NO_LIST)

    def _known(self, items: Ints) -> NDArray[np.int64]:
        item = item_of_cell(items)
        return np.where(item < len(self._first), item, 0)  # item 0 has no lists

    # --------------------------------------------------------------------------------------------- change

    def add(self, rows: Ints, cell: Ints, keys: NDArray[np.floating]) -> None:
        """File entries (n,) with keys (n, d) under their cells. Call `split` afterwards."""
        cell = np.asarray(cell, np.int64)
        item = cell >> BRANCH_BITS
        self._make(item)
        lists = self._lists(cell)
        np.add.at(self._count, item, np.int32(1))
        np.add.at(self.size, lists, np.int32(1))
        order = np.argsort(lists, kind="stable")  # neighbours in memory are written one after another
        width = self.index.coarse_code_size()
        packed = np.empty((len(rows), width + self.index.code_size), np.uint8)
        packed[:, :width] = lists[order].astype("<i8")[:, None].view(np.uint8)[:, :width]
        packed[:, width:] = self._codec.codes(keys)[order]
        self.index.add_sa_codes(packed, np.asarray(rows, np.int64)[order])

    def remove(self, rows: Ints, cell: Ints) -> None:
        """Remove entries."""
        cell = np.asarray(cell, np.int64)
        lists = self._lists(cell)
        order = np.argsort(lists, kind="stable")
        places, first, count = np.unique(lists[order], return_index=True, return_counts=True)
        rows = np.asarray(rows)[order]
        for place, start, length in zip(places.tolist(), first.tolist(), count.tolist(), strict=True):
            self._remove(place, rows[start : start + length])
        np.subtract.at(self._count, cell >> BRANCH_BITS, np.int32(1))
        self.index.ntotal -= len(cell)

    def rename(self, rows: Ints, others: Ints, cell: Ints) -> None:
        """Give entries other row numbers, none of which is among the present ones."""
        lists = self._lists(np.asarray(cell, np.int64))
        for place, row, other in zip(lists.tolist(), rows.tolist(), others.tolist(), strict=True):
            ids, _ = self._view(place)
            ids[ids == row] = other

    def _remove(self, place: int, rows: Ints) -> None:
        """Fill the holes with the last entries of the list."""
        ids, codes = self._view(place)
        left = len(ids) - len(rows)
        if len(rows) == 1:
            hole = int((ids == rows[0]).argmax())
            ids[hole], codes[hole] = ids[left], codes[left]
        else:
            is_gone = np.isin(ids, rows)
            holes, kept = np.flatnonzero(is_gone[:left]), left + np.flatnonzero(~is_gone[left:])
            ids[holes], codes[holes] = ids[kept], codes[kept]
        self._inverted.resize(place, left)
        self.size[place] = left

    def _view(self, place: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Ids and codes of a list, as views of FAISS' memory."""
        size, width = int(self.size[place]), self._codec.code_size
        if not size:
            return np.zeros(0, np.int64), np.zeros((0, width), np.uint8)
        ids = faiss.rev_swig_ptr(self._inverted.get_ids(place), size)
        return ids, faiss.rev_swig_ptr(self._inverted.get_codes(place), size * width).reshape(size, width)

    def _lists(self, cell: Ints) -> NDArray[np.int64]:
        item = cell >> BRANCH_BITS
        branch = cell & ((1 << self._splits[item].astype(np.int64)) - 1)
        return np.ascontiguousarray(self._first[item] + branch, np.int64)

    def _make(self, items: Ints) -> None:
        """Make lists for the items that have none."""
        most = int(items.max(initial=0)) + 1
        self._first = at_least(self._first, most, NO_LIST)
        self._splits, self._count = at_least(self._splits, most), at_least(self._count, most)
        new = np.unique(items[self._first[items] < 0])
        if len(new):
            self._first[new] = self._claim(len(new), 1)

    # ---------------------------------------------------------------------------------------------- space

    def _claim(self, count: int, length: int) -> NDArray[np.int64]:
        """The first lists of `count` blocks of `length` consecutive lists."""
        free = self._free.get(length, [])
        again = [free.pop() for _ in range(min(count, len(free)))]
        fresh = self._used + length * np.arange(count - len(again))
        self._reserve(length * len(fresh))
        self._used += length * len(fresh)
        return np.concatenate([np.array(again, np.int64), fresh])

    def _reserve(self, lists: int) -> None:
        """Make room for this many more lists."""
        if self._used + lists > len(self.size):
            self._replace(self._empty(max(self._used + lists, 2 * len(self.size))))

    def _empty(self, lists: int) -> Any:
        """Inverted lists without entries, of which there are at least as many as now."""
        self.size = np.concatenate([self.size, np.zeros(max(0, lists - len(self.size)), np.int32)])
        return faiss.ArrayInvertedLists(len(self.size), self.index.code_size)

    def _replace(self, new: Any) -> None:
        """Move all entries to new inverted lists, which take no more memory than they need."""
        lists, new.nlist = new.nlist, self._inverted.nlist  # merge_from wants equal numbers
        new.merge_from(self._inverted, 0)
        new.nlist = self.index.nlist = lists
        self.index.replace_invlists(new, True)
        new.this.disown()  # the index deletes it
        self._inverted = new

    # ---------------------------------------------------------------------------------------------- split

    def split(self, items: Ints | None, cell_of: NDArray[np.int32]) -> None:
        """Give more lists to those of the items (None: all) whose lists are too long.

        Args:
            cell_of: cell of every filed entry, by row.
        """
        items, splits = self._too_long(items)
        self._reserve(int((1 << splits).sum()))
        self._spread(items, splits, cell_of, self._inverted)

    def rebuild(self, cell_of: NDArray[np.int32]) -> None:
        """`split` for all items, which also frees the memory that was set aside for growth."""
        items, splits = self._too_long(None)
        new = self._empty(self._used + int((1 << splits).sum()))
        self._spread(items, splits, cell_of, new)
        self._replace(new)

    def _too_long(self, items: Ints | None) -> tuple[Ints, NDArray[np.int64]]:
        """The items that need more lists, and n of each, for 2^n lists."""
        items = np.arange(len(self._count)) if items is None else items
        items = items[self._count[items] > BRANCHED << self._splits[items].astype(np.int64)]
        splits = np.searchsorted(BRANCHED << np.arange(BRANCH_BITS), self._count[items])
        need_more = splits > self._splits[items]
        return items[need_more], splits[need_more]

    def _spread(self, items: Ints, splits: Ints, cell_of: NDArray[np.int32], into: Any) -> None:
        """Move the entries of each item to 2^splits new lists in `into`."""
        for item, n in zip(items.tolist(), splits.tolist(), strict=True):
            length, old, first = 1 << int(self._splits[item]), int(self._first[item]), int(self._claim(1, 1 << n)[0])
            for place in range(old, old + length):
                ids, codes = self._view(place)
                branch = cell_of[ids] & ((1 << n) - 1)
                order = np.argsort(branch, kind="stable")
                self._fill(into, first, branch[order], ids[order], codes[order])
                self._inverted.resize(place, 0)
                self.size[place] = 0
            self._free.setdefault(length, []).append(old)
            self._first[item], self._splits[item] = first, n

    def _fill(self, into: Any, first: int, branch: Ints, ids: NDArray[np.int64], codes: NDArray[np.uint8]) -> None:
        """Put entries, in order of their branch, into the empty lists of these branches."""
        branches, starts = np.unique(branch, return_index=True)
        ends = [*starts.tolist(), len(branch)][1:]
        for place, start, end in zip((first + branches).tolist(), starts.tolist(), ends, strict=True):
            some, bytes_of = ids[start:end], codes[start:end]
            into.add_entries(place, end - start, faiss.swig_ptr(some), faiss.swig_ptr(bytes_of))
            self.size[place] = end - start
