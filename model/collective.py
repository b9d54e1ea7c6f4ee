"""The collective scope: all users' memories searchable at once, through FAISS. No torch, no I/O.

`IndexIVFScalarQuantizer` fp16; the lists are the cells of the checkpoint's centroids, kept with every entry, so nothing
is trained or assigned here. Changes are visible to the next search, and what is dropped is gone. Entries come out as
(item, similarity, weights) and never say whose they are; those of items that too few hold can be left out. Evaluation
and the memory service use this one class.
Not safe for changes beside a search (faiss returns garbage silently): callers keep to one thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

# Before faiss is loaded: two OpenMP threads hang a forked child. Training may have asked for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
from numpy.typing import NDArray

from model.bank import NOT_SHARED, Banks, Entries, tied
from model.rules import Bools, Floats, Ints

ITEM_BITS = 32
"""An entry's id: slot << ITEM_BITS | item number. A bank holds an item once, so ids stay while entries move about."""
OWN_SHARE = 8
"""Neighbours fetched beyond K, in case some are the asker's own."""
FETCH_LIMIT = 2048
"""Most neighbours looked at for one query while its own entries and ties at the K-th place are resolved."""
SAMPLED = 256
"""Places looked at for each entry of a sample: most places of most slots are empty."""
COLUMNS = {"item": np.uint32, "quality": np.float32, "recency": np.float32, "rating": np.float32}


def cells(keys: Floats, positions: Ints, centroids: Floats) -> NDArray[np.int32]:
    """Which list each key (n, d) belongs to; none for keys made before any item (position ≤ 0),
    which are alike for all users. (n,)
    """
    nearest = np.argmax(keys.astype(np.float32) @ centroids.T, axis=1)
    return np.where(np.asarray(positions) <= 0, NOT_SHARED, nearest).astype(np.int32)


def empty_index(centroids: NDArray[np.float32], probes: int) -> Any:
    """A FAISS index of the centroids' lists that entries can be put into and removed from by id."""
    lists, dim = centroids.shape
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(np.ascontiguousarray(centroids, np.float32))
    index: Any = faiss.IndexIVFScalarQuantizer(
        quantizer, dim, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.is_trained, index.nprobe = True, min(probes, lists)
    index.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
    return index


class CollectiveIndex:
    """Entries of many users by slot (any small integer that the caller gives a user)."""

    def __init__(self, centroids: NDArray[np.float32], capacity: int, probes: int) -> None:
        self._index = empty_index(centroids, probes)
        self._columns = {name: np.zeros((0, capacity), kind) for name, kind in COLUMNS.items()}
        self._mark = np.zeros((0, capacity), np.uint64)  # what is in the index for each entry; 0: nothing
        self._holders = np.zeros(1, np.int32)  # slots whose banks hold each item number; of number 0 it says nothing
        self._uncounted = np.zeros(0, bool)  # slots that are not among the holders
        self.elsewhere = np.zeros(1, np.int32)
        """Holders of each item number in other indexes; as far as it reaches."""

    def __len__(self) -> int:
        """Entries that can be found."""
        return int(self._index.ntotal)

    def put(self, slots: Ints, banks: Banks, entries: Entries | None = None) -> None:
        """Make the banks' entries those of the slots (distinct), one row of `banks` each, replacing what was there.
        `entries`: `banks.everything()`, where it is at hand.

        Only entries that are new, or whose key changed, are indexed; only those that are gone are removed.
        """
        slots = np.asarray(slots, np.int64)
        self.grow(int(slots.max(initial=-1)) + 1)
        entries, width = entries or banks.everything(), self._mark.shape[1]
        cell = banks.fields["cell"][:, :width]
        shared = entries.valid[:, :width] & (cell != NOT_SHARED)
        mark = np.where(shared, _marks(banks.key[:, :width], entries.item[:, :width], cell), np.uint64(0))
        added, gone = _changes(mark, self._mark[slots])
        self._remove(slots, gone)
        self._count(slots, self._columns["item"][slots], entries.item[:, :width])
        for name in COLUMNS:
            self._columns[name][slots] = getattr(entries, name)[:, :width]
        self._mark[slots] = mark
        row, place = np.nonzero(added)
        if len(row):
            keys = np.ascontiguousarray(banks.key[row, place], np.float32)
            ids = slots[row] << ITEM_BITS | entries.item[row, place]
            self._insert(ids, keys, cell[row, place].astype(np.int64))

    def drop(self, slots: Ints) -> None:
        """Remove all entries of the slots; unknown slots are fine."""
        slots = np.asarray(slots, np.int64)
        slots = slots[slots < len(self._mark)]
        self._remove(slots, self._mark[slots] > 0)
        items = self._columns["item"][slots]
        self._count(slots, items, np.zeros_like(items))
        for values in (*self._columns.values(), self._mark):
            values[slots] = 0

    def count(self, slots: Ints, counted: bool) -> None:
        """Whether slots that are known are among the holders of their items. They are, unless told otherwise."""
        slots = np.asarray(slots, np.int64)
        slots = slots[self._uncounted[slots] == counted]
        items = self._columns["item"][slots]
        if counted:
            self._uncounted[slots] = False
            self._count(slots, np.zeros_like(items), items)
        else:
            self._count(slots, items, np.zeros_like(items))
            self._uncounted[slots] = True

    def holders(self, most: int) -> NDArray[np.uint8]:
        """How many slots hold each item number (the index), at most `most`."""
        counts = np.minimum(self._holders, most).astype(np.uint8)
        counts[0] = 0
        return counts

    def held(self, slot: int) -> NDArray[np.uint32]:
        """Item numbers that a slot holds; none of an unknown slot."""
        items = self._columns["item"][slot : slot + 1] if slot >= 0 else self._columns["item"][:0]
        return np.asarray(items[items > 0])

    def _count(self, slots: Ints, before: Ints, after: Ints) -> None:
        """Banks (B, C) of slots (B,) hold other items than before; 0 is none."""
        self._holders = _at_least(self._holders, int(after.max(initial=0)) + 1)
        changed = before != after
        changed[self._uncounted[slots]] = False
        np.subtract.at(self._holders, before[changed], 1)
        np.add.at(self._holders, after[changed], 1)

    def _remove(self, slots: Ints, gone: Bools) -> None:
        row, place = np.nonzero(gone)
        if len(row):
            ids = slots[row].astype(np.int64) << ITEM_BITS | self._columns["item"][slots[row], place].astype(np.int64)
            self._delete(ids)

    def _insert(self, ids: NDArray[np.int64], keys: NDArray[np.float32], lists: NDArray[np.int64]) -> None:
        self._add_to(self._index, ids, keys, lists)

    def _delete(self, ids: NDArray[np.int64]) -> None:
        self._remove_from(self._index, ids)

    def _nearest(self, queries: NDArray[np.float32], fetch: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarities and ids, (B, fetch), best first; −1 where there is nothing."""
        similarity, ids = self._index.search(queries, fetch)
        return similarity, ids

    @staticmethod
    def _add_to(index: Any, ids: NDArray[np.int64], keys: NDArray[np.float32], lists: NDArray[np.int64]) -> None:
        index.add_core(len(ids), *(faiss.swig_ptr(one) for one in (keys, ids, lists)))

    @staticmethod
    def _remove_from(index: Any, ids: NDArray[np.int64]) -> None:
        index.remove_ids(faiss.IDSelectorArray(len(ids), faiss.swig_ptr(ids)))

    @property
    def lists(self) -> int:
        """Lists that entries are kept in, empty ones included."""
        return int(self._index.nlist)

    @property
    def capacity(self) -> int:
        """Entries that a slot has at most."""
        return int(self._mark.shape[1])

    def sample(self, count: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Keys (n, d) of up to `count` entries chosen at random, and the slots (n,) that they are in."""
        if not len(self):
            return np.zeros((0, self._index.d), np.float32), np.zeros(0, np.int64)
        slots, places = (rng.integers(0, size, SAMPLED * count) for size in self._mark.shape)
        some = np.flatnonzero(self._mark[slots, places])[:count]
        ids = slots[some] << ITEM_BITS | self._columns["item"][slots[some], places[some]].astype(np.int64)
        keys = [self._index.reconstruct(int(one)) for one in ids]
        return np.array(keys, np.float32).reshape(-1, self._index.d), slots[some]

    def scan(
        self, lists: range, queries: NDArray[np.float32], fetch: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarities (B, fetch) of the best entries of some lists, and the slots that they are in, −1 where there
        are no more: whatever is in all lists, however far from the query, is found by asking for all of them.
        """
        probes, self._index.nprobe = self._index.nprobe, len(lists)
        try:
            wanted = np.broadcast_to(np.asarray(lists, np.int64), (len(queries), len(lists)))
            similarity, ids = self._index.search_preassigned(queries, fetch, wanted, None)
        finally:
            self._index.nprobe = probes
        return similarity, np.where(ids >= 0, ids >> ITEM_BITS, -1)

    def search(
        self,
        queries: Floats,
        askers: Ints,
        k: Ints,
        users: int = 1,
        passing: Bools | None = None,
        held: Sequence[Ints] | None = None,
    ) -> Entries:
        """The k most similar entries of others for each query, best first; fewer only if there are fewer in the lists
        scanned. Similarities are compared to 6 decimals; ties go by item, then quality, so that no slot shows.

        Args:
            queries: (B, d) unit length. askers: (B,) slots whose own entries are left out, −1 = none. k: (B,).
            users: entries of items that fewer others hold are left out.
            passing: (S,) by slot: whose entries are looked at at all.
            held: items of each asker, where those are counted `elsewhere`.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        wanted, askers = np.asarray(k, np.int64), np.asarray(askers, np.int64)
        width = int(wanted.max(initial=0))
        best = np.zeros((len(queries), width), np.float32)
        who = np.full((len(queries), width), -1, np.int64)
        pending, fetch = np.flatnonzero(wanted > 0), width + min(width, OWN_SHARE)
        while len(pending) and len(self):
            similarity, ids = self._nearest(queries[pending], fetch)
            ids[ids >> ITEM_BITS == askers[pending, None]] = -1
            if passing is not None:
                ids[~passing[np.maximum(ids >> ITEM_BITS, 0)]] = -1
            if users > 1:
                theirs = None if held is None else [held[row] for row in pending.tolist()]
                ids[self._too_few(ids, askers[pending], users, theirs)] = -1
            settled = _settled(similarity, ids, wanted[pending]) | (fetch >= FETCH_LIMIT)
            rows = pending[settled]
            best[rows], who[rows] = self._best(similarity[settled], ids[settled], wanted[rows], width)
            pending, fetch = pending[~settled], fetch * 4
        return self._entries(best, who)

    def _too_few(self, ids: NDArray[np.int64], askers: Ints, users: int, held: Sequence[Ints] | None = None) -> Bools:
        """(B, K) whether fewer than `users`, the asker not counted, hold the item."""
        items = np.where(ids >= 0, ids & ((1 << ITEM_BITS) - 1), 0)
        holders = self._holders[items]
        if len(self.elsewhere) > 1:
            holders = holders + np.where(
                items < len(self.elsewhere), self.elsewhere[np.minimum(items, len(self.elsewhere) - 1)], 0
            )
        few = holders < users
        here = (askers >= 0) & (askers < len(self._mark))
        row, column = np.nonzero((holders == users) & here[:, None])  # the asker makes the difference
        few[row, column] = (self._columns["item"][askers[row]] == items[row, column][:, None]).any(axis=1)
        if held is not None:
            for n in np.flatnonzero((holders == users).any(axis=1)).tolist():
                few[n] |= (holders[n] == users) & np.isin(items[n], held[n])
        return few

    def _best(
        self, similarity: NDArray[np.float32], ids: NDArray[np.int64], k: Ints, width: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The first k of each row, in order; the others are marked −1."""
        rows = tied(similarity, ids >= 0)
        order = np.argsort(ids < 0, axis=1, kind="stable")  # as faiss found them, without the askers' own
        if len(rows):
            some = ids[rows]
            rounded = np.where(some >= 0, -np.round(similarity[rows].astype(np.float64), 6), np.inf)
            quality = self._facts(some)["quality"]
            order[rows] = np.lexsort((-quality, some & ((1 << ITEM_BITS) - 1), rounded), axis=1)
        order = order[:, :width]
        ids, similarity = np.take_along_axis(ids, order, 1), np.take_along_axis(similarity, order, 1)
        return similarity, np.where(np.arange(order.shape[1]) < k[:, None], ids, -1)

    def _entries(self, similarity: NDArray[np.float32], ids: NDArray[np.int64]) -> Entries:
        valid = ids >= 0
        return Entries(
            item=np.where(valid, ids & ((1 << ITEM_BITS) - 1), 0),
            similarity=np.where(valid, similarity, np.float32(0)),
            valid=valid,
            **self._facts(ids),
        )

    def _facts(self, ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What stands beside the keys of ids (B, K), by column; 0 where the id is −1."""
        valid, capacity = ids >= 0, self._mark.shape[1]
        known = ids[valid]
        slots, items = known >> ITEM_BITS, (known & ((1 << ITEM_BITS) - 1)).astype(np.uint32)
        place = slots * capacity + np.argmax(self._columns["item"].take(slots, axis=0) == items[:, None], axis=1)
        facts = {name: np.zeros(ids.shape, kind) for name, kind in COLUMNS.items() if name != "item"}
        for name, values in facts.items():
            values[valid] = self._columns[name].reshape(-1).take(place)
        return facts

    def grow(self, slots: int) -> None:
        """Make room for so many slots."""
        missing = slots - len(self._mark)
        if missing > 0:
            missing = max(missing, len(self._mark))  # doubling keeps growth cheap
            self._columns = {name: _lengthened(values, missing) for name, values in self._columns.items()}
            self._mark = _lengthened(self._mark, missing)
            self._uncounted = np.pad(self._uncounted, (0, missing))


def _at_least(values: NDArray[Any], length: int) -> NDArray[Any]:
    """At least so long, with zeros at the end; doubling keeps growth cheap."""
    return values if len(values) >= length else np.pad(values, (0, max(length - len(values), len(values))))


def _lengthened(values: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.pad(values, ((0, rows), (0, 0)))


def _marks(keys: NDArray[np.float16], items: Ints, cell: Ints) -> NDArray[np.uint64]:
    """(B, C) a 64-bit mark of each entry's key (B, C, d), item and list: alike only where all three are. Never 0."""
    word = np.uint64 if keys.shape[2] % 4 == 0 else np.uint16
    words = np.ascontiguousarray(keys).view(word).astype(np.uint64, copy=False)
    factors = _factors(words.shape[2] + 2)
    mixed = words @ factors[2:] + items.astype(np.uint64) * factors[0] + cell.astype(np.uint64) * factors[1]
    return np.asarray(mixed ^ mixed >> np.uint64(31) | np.uint64(1))


@cache
def _factors(count: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(0, 2**64, count, np.uint64) | np.uint64(1)


def _changes(new: NDArray[np.uint64], old: NDArray[np.uint64]) -> tuple[Bools, Bools]:
    """Which of the new marks (B, C) are not among the old of their row, and which of the old are gone; 0 is nothing."""
    added, gone = new > 0, old > 0
    rows = np.flatnonzero(gone.any(axis=1))
    if len(rows):
        same = new[rows, :, None] == old[rows, None, :]
        added[rows] &= ~same.any(axis=2)
        gone[rows] &= ~same.any(axis=1)
    return added, gone


def _settled(similarity: NDArray[np.float32], ids: NDArray[np.int64], k: Ints) -> NDArray[np.bool_]:
    """(B,) whether the best k are surely among the fetched: the lists are exhausted, or what was fetched reaches below
    the k-th similarity, so that no tie was cut off.
    """
    exhausted = similarity[:, -1] < -1e30
    usable = ids >= 0
    nth = np.cumsum(usable, axis=1)
    kth = np.where(usable & (nth == k[:, None]), np.round(similarity.astype(np.float64), 6), -np.inf).max(axis=1)
    return np.asarray(exhausted | ((nth[:, -1] >= k) & (np.round(similarity[:, -1].astype(np.float64), 6) < kth)))
