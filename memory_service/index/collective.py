"""The collective scope of the memory service: whose entries are in the index of a model, and as of which stamp.

It is filled from Redis at the start, a batch of users at a time between other calls. Later it follows the records that
this process writes or reads, and what Redis tells of changes (`memory_service.store.feed`): users whom other processes
wrote or forgot, and records that expired. Slots are private to this process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memory_service.store.batch import RecordBatch
from model.checkpoint import Checkpoint
from model.memory.bank import Banks
from model.memory.changes import Stacked
from model.memory.collective.index import CollectiveIndex
from model.memory.collective.rows import NO_SLOT
from model.memory.record import UserRecord
from model.memory.retrieval import Entries
from model.memory.rules import Floats, Ints

COMPARE_USERS = 500
"""Users that are compared at a time; other calls are answered in between."""
OF_MEMORY = 0.5
"""Share of the memory that the entries of others may take if no limit is set."""
SLACK = 1.5
"""Bytes allocated for each byte in use: lists and rows grow in steps."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Loaded:
    """Records read from Redis: `batch`, which belongs to `users`, and the `records` of other users, one by one."""

    users: list[str]
    batch: RecordBatch
    records: dict[str, UserRecord]


Read = Callable[[list[str]], Awaitable[Loaded]]
Stamps = Callable[[list[str]], Awaitable[list[int]]]


class CollectiveScope:
    """The entries of all sharing users of one model. Use it from one thread.

    Args:
        checkpoint: of the model.
        users: number of sharing users other than the asker who must hold an item before its entries are given away.
        limit: most entries that are kept; 0: all. Beyond it, a sample, the same in every process with this limit.
    """

    def __init__(self, checkpoint: Checkpoint, users: int = 1, limit: int = 0) -> None:
        self.model_version = checkpoint.version
        self._least = users
        self._layout = checkpoint.layout
        self._index = CollectiveIndex(self._layout, checkpoint.config.rules, limit)
        self._slot: dict[str, int] = {}
        self._stamp: dict[str, int] = {}
        self._free: list[int] = []
        self._touched: set[str] = set()  # users who changed while Redis was being read
        self._looking = asyncio.Lock()

    @property
    def index(self) -> CollectiveIndex:
        """The index that is searched."""
        return self._index

    @property
    def users(self) -> int:
        """Users whose entries can be found."""
        return len(self._slot)

    @property
    def known(self) -> int:
        """Users whose records were read, whether or not their entries can be found."""
        return len(self._stamp)

    def __len__(self) -> int:
        """Entries that can be found."""
        return len(self._index)

    # ------------------------------------------------------------------------------------------- compare

    async def compare(
        self, users: AsyncIterator[list[str]], stamps: Stamps, read: Read, loaded: Collection[str]
    ) -> None:
        """Bring the index to what Redis has, batch by batch; batches before one that fails are kept.

        Args:
            users: all users in Redis.
            stamps, read: read from Redis.
            loaded: see `put`.
        """
        missing = set(self._stamp)
        async for names in users:
            missing.difference_update(names)
            await self._look_at(names, stamps, read, loaded, split=False)
        await self._look_at(sorted(missing), stamps, read, loaded, split=False)
        self._index.compact()

    async def look_at(self, names: list[str], stamps: Stamps, read: Read, loaded: Collection[str]) -> None:
        """Bring these users to what Redis has. Arguments as of `compare`."""
        await self._look_at(names, stamps, read, loaded, split=True)

    async def _look_at(
        self, names: list[str], stamps: Stamps, read: Read, loaded: Collection[str], *, split: bool
    ) -> None:
        for at in range(0, len(names), COMPARE_USERS):
            async with self._looking:
                await self._update(names[at : at + COMPARE_USERS], stamps, read, loaded, split)

    async def _update(self, names: list[str], stamps: Stamps, read: Read, loaded: Collection[str], split: bool) -> None:
        self._touched.clear()
        found = dict(zip(names, await stamps(names), strict=True))
        changed = [name for name, stamp in found.items() if stamp != self._stamp.get(name, 0)]
        news = await read([name for name in changed if found[name]])
        present = {*news.records, *news.users}
        for name in changed:
            if name not in present and name not in self._touched:
                self.drop(name)
        self.put(((name, record) for name, record in news.records.items() if name not in self._touched), loaded)
        rows = [row for row, name in enumerate(news.users) if name not in self._touched]
        self.put_batch([news.users[row] for row in rows], news.batch.take(rows), split=split)

    # ----------------------------------------------------------------------------------------------- put

    def put(self, records: Iterable[tuple[str, UserRecord]], loaded: Collection[str] = ()) -> None:
        """Make these the users' entries. A record that does not share, or belongs to another model, has none; but a
        user who shares and has moved to another of the `loaded` models keeps the entries of before.
        """
        new = [(name, record) for name, record in records if self._stamp.get(name) != record.stamp]
        for name, record in new:
            if not self._shares(record):
                if not record.share or record.model_version not in loaded:
                    self._take_out(name)
                self._note(name, record.stamp)
        shared = [(name, record) for name, record in new if self._shares(record)]
        if shared:
            self._put_stacked([name for name, _ in shared], Stacked.of([record for _, record in shared]))

    def put_batch(self, names: Sequence[str], batch: RecordBatch, *, split: bool = True) -> None:
        """`put` for a batch of records, which are of our model and share. split: see `CollectiveIndex.put`."""
        stamps = batch.stamps
        rows = [row for row, name in enumerate(names) if self._stamp.get(name) != stamps[row]]
        if rows:
            self._put([names[row] for row in rows], [stamps[row] for row in rows], batch.take(rows).banks, split)

    def put_written(self, names: list[str], stacked: Stacked) -> None:
        """Put records of our model that were just written. A record older than the present one is skipped: a later
        write was faster.
        """
        rows = [
            row
            for row, (name, record) in enumerate(zip(names, stacked.records, strict=True))
            if self._stamp.get(name, 0) >> 32 <= record.version
        ]
        if all(self._shares(stacked.records[row]) for row in rows):
            if rows:
                self._put_stacked([names[row] for row in rows], stacked.take(rows))
        else:
            self.put((names[row], stacked.records[row]) for row in rows)

    def _put_stacked(self, names: list[str], stacked: Stacked) -> None:
        self._put(names, [record.stamp for record in stacked.records], stacked.banks, True, stacked.entries)

    def _put(
        self, names: list[str], stamps: list[int], banks: Banks, split: bool, entries: Entries | None = None
    ) -> None:
        new = [name for name in names if name not in self._slot]
        slots = np.array([self._claim(name) for name in names], np.int64)
        if new:
            self._index.know(self.slots(new), np.array([_whose(name) for name in new], np.uint64))
        self._index.put(slots, banks, entries, split=split)
        for name, stamp in zip(names, stamps, strict=True):
            self._note(name, stamp)

    def _note(self, name: str, stamp: int) -> None:
        self._touched.add(name)
        self._stamp[name] = stamp

    def drop(self, user_id: str) -> None:
        """Remove all that is known about a user, if anything."""
        self._touched.add(user_id)
        self._stamp.pop(user_id, None)
        self._take_out(user_id)

    def _take_out(self, user_id: str) -> None:
        slot = self._slot.pop(user_id, None)
        if slot is not None:
            self._index.drop(np.array([slot]))
            self._free.append(slot)

    def _shares(self, record: UserRecord) -> bool:
        return record.share and record.model_version == self.model_version

    def _claim(self, user_id: str) -> int:
        slot = self._slot.get(user_id)
        if slot is None:
            slot = self._free.pop() if self._free else len(self._slot)
            self._slot[user_id] = slot
        return slot

    # -------------------------------------------------------------------------------------------- search

    def search(self, queries: Floats, last: Ints, askers: list[str], k: Ints) -> Entries:
        """The k most similar entries of other users for each query, as `CollectiveIndex.search` finds them.

        Args:
            queries: (B, d) unit length.
            last: (B, L) the items taken last, newest first.
            askers: (B,) users whose own entries are left out.
            k: (B,).
        """
        return self._index.search(queries, last, self.slots(askers), k, self._least)

    def slots(self, users: Iterable[str]) -> NDArray[np.int64]:
        """The slot of each user, NO_SLOT if the user has no entries in the index."""
        return np.array([self._slot.get(user, NO_SLOT) for user in users], np.int64)

    def know_items(self, numbers: Ints) -> None:
        """Tell the catalogue numbers of the model's items (items + 1,), the first 0; 0 = not known yet."""
        self._index.layout = self._layout.numbered(numbers)


def entries_that_fit(checkpoint: Checkpoint) -> int:
    """How many entries of other users the memory has room for."""
    index = CollectiveIndex(checkpoint.layout, checkpoint.config.rules)
    return int(OF_MEMORY * memory_bytes() / (SLACK * index.entry_bytes))


def memory_bytes() -> int:
    """Memory of this machine, or as much of it as this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # without a limit, the file says "max"
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return total


def _whose(user_id: str) -> int:
    """64 random bits of a user, always the same ones."""
    return int.from_bytes(blake2b(user_id.encode(), digest_size=8).digest(), "little")
