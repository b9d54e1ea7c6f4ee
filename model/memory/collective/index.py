"""The index itself: entries are put, dropped, sampled and searched."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.memory.bank import NOT_SHARED, Banks
from model.memory.collective.codec import Codec
from model.memory.collective.layout import BRANCH_BITS, Layout
from model.memory.collective.lists import CellLists
from model.memory.collective.promise import promising
from model.memory.collective.rows import FACTS, Rows, at_least, marks, mixed
from model.memory.retrieval import Entries, tied_rows
from model.memory.rules import Bools, Floats, Ints

OWN_SHARE = 8
"""Neighbours fetched beyond K, in case some are the asker's own."""
FETCH_LIMIT = 2048
"""Most neighbours fetched for one query while own entries and ties at the K-th place are resolved."""
LOOSE = 0.2
"""Share of entries added since the last compaction above which `compact` does something."""
THINNING = 0.84
"""Factor by which the share of kept entries falls whenever there are too many."""
KEPT_OF_ITEM = 100
"""Entries of every item that a sample keeps, if there are so many."""


class CollectiveIndex:
    """Entries of many users, by slot (a small integer that the caller gives each user).

    Args:
        layout: of the model.
        rules: budget and bits of the codes.
        limit: most entries that are kept; 0: all. Beyond it, a sample is kept: which entries, follows from `whose` they
            are (see `know`) and their item, so that all indexes of the same entries and limit keep the same ones.
    """

    def __init__(self, layout: Layout, rules: RulesConfig, limit: int = 0) -> None:
        self.layout, self.limit = layout, limit
        self.share = 1.0
        """Share of the entries that are kept."""
        self.codec = Codec(layout.span, rules.collective_bits)
        """How keys are stored."""
        self.budget = rules.collective_codes
        """Entries that a search looks at."""
        self.rows = Rows()
        """The entries, filed or not."""
        self._lists = CellLists(self.codec)
        self._holders = np.zeros(1, np.int32)  # by item: slots that hold it
        self._added = 0  # since the last compaction

    def __len__(self) -> int:
        """Entries that can be found."""
        return len(self._lists)

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry: code, FAISS' id and row, without what is set aside for growth."""
        return int(self.codec.code_size) + 8 + self.rows.row_bytes

    # --------------------------------------------------------------------------------------------- change

    def know(self, slots: Ints, whose: NDArray[np.uint64]) -> None:
        """Tell whose these slots are: 64 random bits of each user, the same wherever the entries are indexed. Slots of
        which this is not told get bits that follow from their number.
        """
        self.rows.know(np.asarray(slots, np.int64), whose)

    def put(self, slots: Ints, banks: Banks, entries: Entries | None = None, *, split: bool = True) -> None:
        """Make the banks' entries those of the slots (distinct), one row of `banks` each, replacing what was there.

        Only entries that are new or whose key has changed are filed, and only those that are gone are removed.

        Args:
            entries: `banks.all_entries()`, if they are at hand.
            split: False leaves lists as long as they become, until `compact`. This is faster for many entries.
        """
        slots, entries = np.asarray(slots, np.int64), entries or banks.all_entries()
        self.rows.know(slots)
        item = self._kept(slots, entries)
        self._move(*self.rows.make_room(slots, (item > 0).sum(axis=1)))
        rows, positions = self.rows.places_of(slots, item)
        here = np.flatnonzero(item)
        filed = self._write(slots, rows.ravel()[here], positions.ravel()[here], here, item, banks, entries)
        if split and len(filed):
            self._lists.split(np.unique(filed), self.rows.cell)
        while self.limit and len(self) > self.limit:
            self._thin()

    def _kept(self, slots: Ints, entries: Entries) -> NDArray[np.uint32]:
        """(B, C) the items of the entries that are kept, 0 elsewhere."""
        item = np.where(entries.valid, entries.item, 0).astype(np.uint32)
        if self.share >= 1.0:
            return item
        return np.where(self._is_sampled(self.rows.whose[slots][:, None], item), item, np.uint32(0))

    def _write(
        self,
        slots: Ints,
        at: NDArray[np.int64],
        positions: NDArray[np.int64],
        here: NDArray[np.int64],
        items: NDArray[np.uint32],
        banks: Banks,
        entries: Entries,
    ) -> NDArray[np.int64]:
        """Write entries (`here`: places in the raveled banks) to the rows `at`, and empty all other rows of the slots.
        positions: of these rows in `rows.of(slots)`. Returns the items in whose lists something was filed.
        """
        rows, item, cell = self.rows, items.ravel()[here], banks.fields["cell"].ravel()[here]
        mark = np.where(cell == NOT_SHARED, np.uint32(0), marks(banks.key).ravel()[here])
        changed = (mark != rows.mark[at]) | (item != rows.item[at]) | (cell != rows.cell[at])
        theirs = rows.of(slots)
        is_gone = rows.item[theirs] > 0
        is_gone[positions[~changed]] = False
        self._take_out(theirs[is_gone])
        rows.item[at], rows.cell[at], rows.mark[at] = item, cell, mark
        for n, name in enumerate(FACTS):
            rows.facts[at, n] = getattr(entries, name).ravel()[here]
        self._count(item[changed], 1)
        new = changed & (mark > 0)
        if new.any():
            keys = banks.key.reshape(-1, banks.key.shape[2])[here[new]]
            self._lists.add(at[new], cell[new], keys)
            self._added += len(keys)
        return np.asarray(cell[new], np.int64) >> BRANCH_BITS

    def _move(self, old: NDArray[np.int64], new: NDArray[np.int64]) -> None:
        """Entries have moved to other rows."""
        filed = self.rows.mark[new] > 0
        self._lists.rename(old[filed], new[filed], self.rows.cell[new[filed]])

    def drop(self, slots: Ints) -> None:
        """Remove all entries of the slots, which may be unknown."""
        slots = np.asarray(slots, np.int64)
        slots = slots[self.rows.room(slots) > 0]
        rows = self.rows.of(slots)
        self._take_out(rows[self.rows.item[rows] > 0])
        self.rows.give_back(slots)

    def compact(self) -> None:
        """Split the lists that became too long. If many entries were added since the last time, also free the memory
        that was set aside for growth, which takes about 100 ms for a million entries.
        """
        if self._added > LOOSE * len(self):
            self._lists.rebuild(self.rows.cell)
            self.rows.compact()
            self._added = 0
            free_memory()
        else:
            self._lists.split(None, self.rows.cell)

    def _take_out(self, rows: NDArray[np.int64]) -> None:
        """Remove the entries in these rows."""
        if not len(rows):
            return
        filed = rows[self.rows.mark[rows] > 0]
        if len(filed):
            self._lists.remove(filed, self.rows.cell[filed])
        self._count(self.rows.item[rows], -1)
        self.rows.clear(rows)

    def _count(self, items: NDArray[np.uint32], by: int) -> None:
        self._holders = at_least(self._holders, int(items.max(initial=0)) + 1)
        np.add.at(self._holders, items.astype(np.int64), np.int32(by))

    # --------------------------------------------------------------------------------------------- sample

    def _is_sampled(self, whose: NDArray[np.uint64], items: NDArray[np.uint32]) -> Bools:
        """Whether entries belong to the sample."""
        popular = np.append(self.layout.popularity, np.float32(0))[np.minimum(items, len(self.layout.popularity))]
        expected = popular.astype(np.float64) * self.limit  # entries of the item in a uniform sample
        share = self.share * np.maximum(1.0, KEPT_OF_ITEM / np.maximum(expected, 1e-9))
        return np.asarray(mixed(whose ^ mixed(items)).astype(np.float64) < share * 2.0**64)

    def _thin(self) -> None:
        """Keep a smaller share of the entries."""
        self.share *= THINNING
        slots = self.rows.slots()
        rows, whose = self.rows.of(slots), np.repeat(self.rows.whose[slots], self.rows.room(slots))
        item = self.rows.item[rows]
        self._take_out(rows[(item > 0) & ~self._is_sampled(whose, item)])

    # --------------------------------------------------------------------------------------------- search

    def search(self, queries: Floats, last: Ints, askers: Ints, k: Ints, users: int = 1) -> Entries:
        """The k most similar entries of other users for each query, best first. There are fewer only if the lists that
        are looked at hold fewer.

        Similarities are compared to 6 decimals. Ties go by quality, recency, rating, key and item: slots do not matter.

        Args:
            queries: (B, d) unit length.
            last: (B, ≤ LAST) the items taken last, newest first; 0 = none.
            askers: (B,) slots whose own entries are left out; −1 = none.
            k: (B,).
            users: entries whose item is held by fewer other users are left out.
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
            rows[self.rows.are_of(rows, askers[pending])] = -1
            if users > 1:
                rows[self._too_few(rows, askers[pending], users)] = -1
            settled = _settled(similarity, rows, wanted[pending]) | (fetch >= FETCH_LIMIT)
            done = pending[settled]
            best[done], found[done] = self._best(similarity[settled], rows[settled], wanted[done], width)
            pending, fetch = pending[~settled], fetch * 4
        return self._entries(best, found)

    def scan(self, lists: range, queries: NDArray[np.float32], fetch: int) -> tuple[NDArray[np.float32], Ints]:
        """Similarities and rows (B, fetch) of the best entries of some lists, without a budget; row −1 where there are
        no more. The scan of all lists finds every entry.
        """
        every = np.broadcast_to(np.asarray(lists, np.int64), (len(queries), len(lists)))
        return self._nearest(queries, every, fetch, codes=0)

    def looked_at(self, last: Ints) -> NDArray[np.int64]:
        """(B,) entries in the lists that are searched for the last items (B, L)."""
        lists = self.promising(np.asarray(last, np.int64))
        return np.asarray(np.where(lists >= 0, self._lists.size[lists], 0).sum(axis=1), np.int64)

    @property
    def lists(self) -> int:
        """Number of lists, including empty ones."""
        return self._lists.used

    def most_of(self, slots: Ints) -> int:
        """The largest number of rows that one of the slots has."""
        return int(self.rows.room(np.asarray(slots)).max(initial=0))

    def is_of(self, rows: Ints, slots: Ints) -> Bools:
        """(B, K) whether rows (B, K) belong to slots (B,)."""
        return self.rows.are_of(np.asarray(rows, np.int64), np.asarray(slots, np.int64))

    def promising(self, last: Ints) -> NDArray[np.int64]:
        """(B, P) the lists that are searched for the last items (B, L), see `promise.promising`."""
        return promising(self._lists, self.layout, last, self.budget)

    def _nearest(
        self, queries: NDArray[np.float32], lists: Ints, fetch: int, codes: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarities and rows, (B, fetch), best first; row −1 where there are no more. codes: most entries that are
        looked at; 0: all.
        """
        index = self._lists.index
        index.nprobe, index.max_codes = lists.shape[1], 2 * self.budget if codes is None else codes
        asked = np.ascontiguousarray(lists, np.int64)
        similarity, rows = index.search_preassigned(np.ascontiguousarray(queries), fetch, asked, None)
        return similarity, rows

    def _too_few(self, rows: Ints, askers: Ints, users: int) -> Bools:
        """(B, K) whether fewer than `users` users other than the asker hold the item."""
        items = self.rows.item[np.maximum(rows, 0)]
        holders = self._holders[items]
        few = holders < users
        is_here = self.rows.room(askers) > 0
        for n in np.flatnonzero((holders == users).any(axis=1) & is_here).tolist():  # the asker makes the difference
            few[n] |= (holders[n] == users) & np.isin(items[n], self.rows.item[self.rows.of(askers[n : n + 1])])
        return few

    def _best(
        self, similarity: NDArray[np.float32], rows: Ints, k: Ints, width: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The first k of each query, in order; the others are marked −1."""
        equal, table = tied_rows(similarity, rows >= 0), self.rows
        order = np.argsort(rows < 0, axis=1, kind="stable")  # FAISS' order without those that are left out
        if len(equal):
            some = rows[equal]
            rounded = np.where(some >= 0, -np.round(similarity[equal].astype(np.float64), 6), np.inf)
            at = np.maximum(some, 0)
            quality, recency, rating = -table.facts[at].transpose(2, 0, 1)
            order[equal] = np.lexsort((table.item[at], table.mark[at], rating, recency, quality, rounded), axis=1)
        order = order[:, :width]
        rows, similarity = np.take_along_axis(rows, order, 1), np.take_along_axis(similarity, order, 1)
        return similarity, np.where(np.arange(order.shape[1]) < k[:, None], rows, -1)

    def _entries(self, similarity: NDArray[np.float32], rows: Ints) -> Entries:
        valid, at = rows >= 0, np.maximum(rows, 0)
        facts = np.where(valid[:, :, None], self.rows.facts[at], np.float16(0)).astype(np.float32)
        return Entries(
            item=np.where(valid, self.rows.item[at], 0).astype(np.int64),
            similarity=np.where(valid, similarity, np.float32(0)),
            valid=valid,
            **{name: facts[:, :, n] for n, name in enumerate(FACTS)},
        )


def free_memory() -> None:
    """Return freed memory to the operating system, if the C library can do so."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _settled(similarity: NDArray[np.float32], rows: Ints, k: Ints) -> NDArray[np.bool_]:
    """(B,) whether the best k are certainly among the fetched entries: either the lists are exhausted, or the last
    fetched is less similar than the k-th, so that no tie is cut off.
    """
    exhausted = similarity[:, -1] < -1e30
    usable = rows >= 0
    nth = np.cumsum(usable, axis=1)
    kth = np.where(usable & (nth == k[:, None]), np.round(similarity.astype(np.float64), 6), -np.inf).max(axis=1)
    return np.asarray(exhausted | ((nth[:, -1] >= k) & (np.round(similarity[:, -1].astype(np.float64), 6) < kth)))
