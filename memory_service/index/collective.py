"""The collective scope as the service keeps it: whose entries are in the index, and at which stamp.

Filled from Redis at start, a batch of users at a time between other calls, and kept in step by every record that this
process writes or reads anew and by what Redis tells of changes (`store.feed`): what other processes wrote or forgot,
and what expired. Slots are this process's own; they never leave it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.checkpoint import Checkpoint
from model.memory.bank import Entries
from model.memory.collective import CollectiveIndex
from model.memory.events import Stacked, UserRecord
from model.memory.rules import Floats, Ints

Read = Callable[[list[str]], Awaitable[dict[str, UserRecord]]]
Stamps = Callable[[list[str]], Awaitable[list[int]]]
COMPARE_USERS = 500
OF_MEMORY = 0.5
"""Of the memory that there is, what others' entries may take where no limit is set."""
SLACK = 1.5
"""Bytes that lists and rows really take for one that is in use: they grow by doubling."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class CollectiveScope:
    """All sharing users' entries of one model. One thread.

    An entry is given away only where, the asker not counted, at least `users` sharing users hold its item. At most
    `limit` entries are kept, 0: all; beyond, a sample that is the same in every process of this limit.
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
        """What is searched."""
        return self._index

    @property
    def users(self) -> int:
        """Users whose entries can be found."""
        return len(self._slot)

    @property
    def known(self) -> int:
        """Users whose records were looked at, whether their entries can be found or not."""
        return len(self._stamp)

    def __len__(self) -> int:
        """Entries that can be found."""
        return len(self._index)

    async def compare(
        self, users: AsyncIterator[list[str]], stamps: Stamps, read: Read, loaded: Collection[str]
    ) -> None:
        """Bring the index to what Redis has, batch by batch. What was done stays where a batch fails. `loaded`: see
        `put`.
        """
        missing = set(self._stamp)
        async for names in users:
            missing.difference_update(names)
            await self.look_at(names, stamps, read, loaded)
        await self.look_at(sorted(missing), stamps, read, loaded)
        self._index.compact()

    async def look_at(self, names: list[str], stamps: Stamps, read: Read, loaded: Collection[str]) -> None:
        """Bring users to what Redis has, COMPARE_USERS at a time."""
        for at in range(0, len(names), COMPARE_USERS):
            await self._look_at(names[at : at + COMPARE_USERS], stamps, read, loaded)

    async def _look_at(self, names: list[str], stamps: Stamps, read: Read, loaded: Collection[str]) -> None:
        """The same at once. Others who look wait, a few milliseconds for some hundred users."""
        async with self._looking:
            self._touched.clear()
            found = dict(zip(names, await stamps(names), strict=True))
            changed = [name for name, stamp in found.items() if stamp != self._stamp.get(name, 0)]
            records = await read([name for name in changed if found[name]])
            for name in changed:
                if name not in records and name not in self._touched:
                    self.drop(name)
            self.put(((name, record) for name, record in records.items() if name not in self._touched), loaded)

    def put(self, records: Iterable[tuple[str, UserRecord]], loaded: Collection[str] = ()) -> None:
        """Make these the users' entries; a record that does not share, or is of another model, has none. One that
        shares and is of a `loaded` other model leaves the entries as they were before it moved there.
        """
        new = [(name, record) for name, record in records if self._stamp.get(name) != record.stamp]
        for name, record in new:
            if not self._shares(record):
                if not record.share or record.model_version not in loaded:
                    self._take_out(name)
                self._note(name, record)
        shared = [(name, record) for name, record in new if self._shares(record)]
        if shared:
            self._put([name for name, _ in shared], Stacked.of([record for _, record in shared]))

    def put_written(self, names: list[str], stacked: Stacked) -> None:
        """What was just written, of our model; a record older than what is here changes nothing: a later write was
        faster.
        """
        rows = [
            row
            for row, (name, record) in enumerate(zip(names, stacked.records, strict=True))
            if self._stamp.get(name, 0) >> 32 <= record.version
        ]
        if all(self._shares(stacked.records[row]) for row in rows):
            if rows:
                self._put([names[row] for row in rows], stacked.take(rows))
        else:
            self.put((names[row], stacked.records[row]) for row in rows)

    def _put(self, names: list[str], stacked: Stacked) -> None:
        slots = np.array([self._claim(name) for name in names])
        self._index.put(slots, stacked.banks, stacked.entries, np.array([_whose(name) for name in names], np.uint64))
        for name, record in zip(names, stacked.records, strict=True):
            self._note(name, record)

    def _note(self, name: str, record: UserRecord) -> None:
        self._touched.add(name)
        self._stamp[name] = record.stamp

    def drop(self, user_id: str) -> None:
        """Nothing is known about the user any more; fine where nothing was."""
        self._touched.add(user_id)
        self._stamp.pop(user_id, None)
        self._take_out(user_id)

    def _take_out(self, user_id: str) -> None:
        slot = self._slot.pop(user_id, None)
        if slot is not None:
            self._index.drop(np.array([slot]))
            self._free.append(slot)

    def search(self, queries: Floats, last: Ints, askers: list[str], k: Ints) -> Entries:
        """The k most similar entries of others for each query (B, d), among those where the items `last` (B, L) lead;
        askers (B): whose own are left out; k (B,).
        """
        return self._index.search(queries, last, self.slots(askers), k, self._least)

    def slots(self, users: Iterable[str]) -> NDArray[np.int64]:
        """The slot of each user's entries in the index, −1 where there are none."""
        return np.array([self._slot.get(user, -1) for user in users], np.int64)

    def know_items(self, numbers: Ints) -> None:
        """Item numbers of the model's items (items + 1,), the first 0; what is 0 is not known yet."""
        self._index.layout = self._layout.numbered(numbers)

    def _shares(self, record: UserRecord) -> bool:
        return record.share and record.model_version == self.model_version

    def _claim(self, user_id: str) -> int:
        slot = self._slot.get(user_id)
        if slot is None:
            slot = self._free.pop() if self._free else len(self._slot)
            self._slot[user_id] = slot
        return slot


def entries_that_fit(checkpoint: Checkpoint) -> int:
    """How many entries of others there is memory for."""
    room = OF_MEMORY * memory_bytes()
    index = CollectiveIndex(checkpoint.layout, checkpoint.config.rules)
    return int(room / (SLACK * index.entry_bytes))


def memory_bytes() -> int:
    """Memory of this machine, or as much of it as this process may use."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no limit says "max"
        there = min(there, int(CGROUP_LIMIT.read_text()))
    return there


def _whose(user_id: str) -> int:
    """64 random bits, always the same ones for a user."""
    return int.from_bytes(blake2b(user_id.encode(), digest_size=8).digest(), "little")
