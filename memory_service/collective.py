"""The collective scope as the service keeps it: whose entries are in the index, and at which stamp.

Filled from Redis at start, a batch of users at a time between other calls, kept in step by every record that this
process writes or reads anew, and compared with Redis again now and then: what other processes wrote or forgot, and what
expired. Slots are this process's own; they never leave it. In a group of replicas only the users of this one's `Part`
are here; how many hold an item elsewhere is told by the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from memory_service.replica import Replicate, ReplicatedCollectiveIndex
from memory_service.slots import Part, range_of
from model.bank import Entries
from model.checkpoint import Checkpoint
from model.collective import CollectiveIndex
from model.events import Stacked, UserRecord
from model.rules import Bools, Floats, Ints

Read = Callable[[list[str]], Awaitable[dict[str, UserRecord]]]
Stamps = Callable[[list[str]], Awaitable[list[int]]]
COMPARE_USERS = 500


class CollectiveScope:
    """All sharing users' entries of one model. One thread.

    An entry is given away only where, the asker not counted, at least `users` sharing users hold its item.
    """

    def __init__(
        self, checkpoint: Checkpoint, users: int = 1, replicate: Replicate | None = None, part: Part | None = None
    ) -> None:
        rules = checkpoint.config.rules
        self.model_version = checkpoint.version
        self._least, self._part = users, part
        self._range: NDArray[np.int16] = np.zeros(0, np.int16)  # of the user in each slot
        layout = (checkpoint.index_centroids, rules.capacity, rules.collective_probes)
        self._index = ReplicatedCollectiveIndex(*layout, replicate) if replicate else CollectiveIndex(*layout)
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
        left = sorted(missing)
        for at in range(0, len(left), COMPARE_USERS):
            await self.look_at(left[at : at + COMPARE_USERS], stamps, read, loaded)

    async def look_at(self, names: list[str], stamps: Stamps, read: Read, loaded: Collection[str]) -> None:
        """Bring some users to what Redis has; those of other replicas are left alone. Others who look wait: a few
        milliseconds, where it is some hundred users.
        """
        if self._part is not None:
            names = [name for name in names if self._part.keeps(name)]
        if not names:
            return
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
        if self._part is not None:
            new = [(name, record) for name, record in new if self._part.keeps(name)]
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
            if self._stamp.get(name, 0) >> 32 <= record.version and (self._part is None or self._part.keeps(name))
        ]
        if all(self._shares(stacked.records[row]) for row in rows):
            if rows:
                self._put([names[row] for row in rows], stacked.take(rows))
        else:
            self.put((names[row], stacked.records[row]) for row in rows)

    def _put(self, names: list[str], stacked: Stacked) -> None:
        slots = np.array([self._claim(name) for name in names])
        if self._part is not None:
            self._place(self._part, slots, np.array([range_of(name) for name in names]))
        self._index.put(slots, stacked.banks, stacked.entries)
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

    def search(
        self,
        queries: Floats,
        askers: list[str],
        k: Ints,
        ranges: Bools | None = None,
        held: Sequence[Ints] | None = None,
    ) -> Entries:
        """The k most similar entries of others for each query (B, d); askers (B): whose own are left out; k (B,).

        ranges: (RANGES,) whose entries are searched, None: all that are here. held: items of askers who are elsewhere.
        """
        slots = np.array([self._slot.get(user, -1) for user in askers], np.int64)
        return self._index.search(queries, slots, k, self._least, self._passing(ranges), held)

    def _passing(self, ranges: Bools | None) -> Bools | None:
        """(S,) by slot; None where nobody is left out."""
        if self._part is None or ranges is None or ranges[self._part.kept].all():
            return None
        return np.asarray(ranges[self._range])

    # -------------------------------------------------------------------------------------------- parts

    async def let_go(self) -> None:
        """Take out users who are not to be here any more, some at a time between other calls."""
        if self._part is not None:
            names = [name for name in list(self._stamp) if not self._part.keeps(name)]
            for at in range(0, len(names), COMPARE_USERS):
                for name in names[at : at + COMPARE_USERS]:
                    if not self._part.keeps(name):  # by now it may be wanted again
                        self.drop(name)
                await asyncio.sleep(0)

    def count(self) -> None:
        """Count those as holders whose ranges are counted here now, and no others."""
        if self._part is not None:
            slots = np.array(list(self._slot.values()), np.int64)
            counts = self._part.counted[self._range[slots]]
            for counted in (True, False):
                self._index.count(slots[counts == counted], counted)

    @property
    def enough(self) -> int:
        """A count of holders that a higher one does not differ from: the asker may be one of them."""
        return self._least + 1

    def holders(self) -> NDArray[np.uint8]:
        """How many users counted here hold each item number (the index), at most `enough`."""
        return self._index.holders(self.enough)

    def count_elsewhere(self, counts: Sequence[NDArray[np.uint8]]) -> None:
        """How many hold each item number at each of the other replicas."""
        total = np.zeros(max([1, *map(len, counts)]), np.int32)
        for some in counts:
            total[: len(some)] += some
        self._index.elsewhere = total

    def held(self, user_id: str) -> NDArray[np.uint32]:
        """Item numbers for which a user is counted here."""
        counts = self._part is None or self._part.counted[range_of(user_id)]
        return self._index.held(self._slot.get(user_id, -1) if counts else -1)

    def _shares(self, record: UserRecord) -> bool:
        return record.share and record.model_version == self.model_version

    def _claim(self, user_id: str) -> int:
        slot = self._slot.get(user_id)
        if slot is None:
            slot = self._free.pop() if self._free else len(self._slot)
            self._slot[user_id] = slot
        return slot

    def _place(self, part: Part, slots: Ints, ranges: Ints) -> None:
        """Slots' users are of these ranges."""
        most = int(slots.max()) + 1
        if most > len(self._range):
            self._range = np.pad(self._range, (0, max(most - len(self._range), len(self._range))))
        self._range[slots] = ranges
        self._index.grow(most)
        for counted in (True, False):
            self._index.count(slots[part.counted[ranges] == counted], counted)
