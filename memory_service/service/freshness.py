"""Freshness: what this process holds of users is compared with Redis before it is used, and what changed is loaded.

Stamps of many users are compared in one round trip. So any memory replica may serve any user, and an acknowledged write
is seen by the next retrieval.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from memory_service.service.catalogue import Catalogue
from memory_service.service.models import Models
from memory_service.service.outage import Outage
from memory_service.service.recent import RecentRecord, RecentRecords
from memory_service.service.space import Space
from memory_service.store.store import Store
from model.memory.record import UserRecord


class CachedUsers:
    """What this process holds of users: banks and entries in the spaces of the loaded models, and recent records.

    Calls that wait for Redis watch whom other calls change meanwhile.
    """

    def __init__(self, models: Models, recent: RecentRecords) -> None:
        self._models, self.recent = models, recent
        self._watchers: list[set[str]] = []

    @contextmanager
    def watching(self) -> Iterator[set[str]]:
        """Gives a set to which the users are added who are changed within the `with` block."""
        changed: set[str] = set()
        self._watchers.append(changed)
        try:
            yield changed
        finally:
            self._watchers = [watcher for watcher in self._watchers if watcher is not changed]

    def note_changed(self, users: Iterable[str]) -> None:
        """Tell the watchers that these users were changed."""
        for watcher in self._watchers:
            watcher.update(users)

    def share(self, records: Sequence[tuple[str, UserRecord]]) -> None:
        """Make these the entries of the users in the collective index of each record's model."""
        for space in self._models.spaces.values():
            space.share(records, self._models.spaces)

    def drop(self, users: Collection[str]) -> None:
        """Hold nothing of these users."""
        if not users:
            return
        for space in self._models.spaces.values():
            space.drop(users)
        self.recent.drop(users)
        self.note_changed(users)


@dataclass(frozen=True)
class StampLook:
    """What a look at Redis has found.

    stamps: of the users that were looked at, 0: no readable record. records: those that were loaded. lost: users whose
    records are out of reach. is_partial: whether a record could not be read.
    """

    stamps: dict[str, int]
    records: dict[str, UserRecord]
    lost: Collection[str]
    is_partial: bool


class Freshness:
    """Brings what is held of users to what Redis has."""

    def __init__(self, store: Store, outage: Outage, catalogue: Catalogue, cached: CachedUsers) -> None:
        self._store, self._outage, self._catalogue, self._cached = store, outage, catalogue, cached

    # ---------------------------------------------------------------------------------------- residents

    async def refresh(self, space: Space, users: Iterable[str]) -> bool:
        """Make the users residents as they are in Redis; users on a primary that is out of reach stay as they are.

        Other calls run while this one waits for Redis. A user whom they changed, or who is not at the stamp agreed on
        once nothing is awaited any more, is looked at again.

        Returns:
            Whether some record could not be read.

        Raises:
            StoreUnavailable
        """
        space.residents.make_room()
        agreed: dict[str, int] = {}
        pending, is_partial = [user for user in dict.fromkeys(users) if user], False
        while pending:
            here = _resident_stamps(space, pending)
            check = [user for user in pending if here[user] and agreed.get(user, here[user]) == here[user]]
            with self._cached.watching() as changed:
                seen = await self._look(check, sorted(set(pending).difference(check)))
            is_partial |= seen.is_partial
            settled = {user: stamp for user, stamp in seen.stamps.items() if user not in changed}
            agreed = {user: stamp for user, stamp in agreed.items() if user not in seen.lost} | settled
            self._settle(space, settled, seen.records)
            now = _resident_stamps(space, list(agreed))
            pending = [user for user in seen.stamps if user in changed]
            pending += [user for user in agreed if now[user] != agreed[user] and user not in changed]
        return is_partial

    async def _look(self, check: list[str], load: list[str]) -> StampLook:
        """Compare the stamps of some users and load the records of others, in one round trip."""
        with self._outage.guard():
            look = await self._store.look(check, load, partly=True)
        records = self._store.readable(load, look.records)
        await self._catalogue.cover(records.values())
        is_partial = bool(look.lost) or len(records) < sum(data is not None for data in look.records)
        stamps = dict(zip(check, look.stamps, strict=True))
        stamps |= {user: records[user].stamp if user in records else 0 for user in load}
        if look.lost:
            stamps = {user: stamp for user, stamp in stamps.items() if user not in look.lost}
        return StampLook(stamps, records, look.lost, is_partial)

    def _settle(self, space: Space, stamps: Mapping[str, int], records: Mapping[str, UserRecord]) -> None:
        """Drop the users without a record, and take over the records that were loaded."""
        self._cached.drop([user for user, stamp in stamps.items() if stamp == 0])
        loaded = {user: records[user] for user in stamps if user in records}
        if loaded:
            space.put(loaded)
            self._cached.share(list(loaded.items()))
            self._cached.note_changed(loaded)

    # ------------------------------------------------------------------------------------------ records

    async def read(self, spaces: Mapping[str, Space]) -> dict[str, RecentRecord]:
        """The records and tombstones of users as they are in Redis; recent records are loaded only if they changed. A
        user without a record gets a new one, of the space that is given for the user.

        Raises StoreUnavailable, and RecordError for a damaged record, which must not be overwritten.
        """
        kept = self._kept(spaces)
        rest = [user for user in spaces if user not in kept]
        with self._cached.watching() as changed:
            with self._outage.guard():
                look = await self._store.look(list(kept), rest, [*kept, *rest])
                loaded = self._store.unpack(rest, look.records)
                stamps = zip(kept.items(), look.stamps, strict=True)
                outdated = [user for (user, recent), stamp in stamps if recent.record.stamp != stamp]
                if outdated:
                    loaded |= await self._store.load(outdated)
            await self._catalogue.cover(record for record in loaded.values() if record is not None)
        self._take_over({user: record for user, record in loaded.items() if user not in changed})
        found = {}
        for user, tombstone in zip([*kept, *rest], look.tombstones, strict=True):
            if user in loaded:
                found[user] = RecentRecord(loaded[user] or spaces[user].new, tombstone)
            elif kept[user].tombstone == tombstone:
                found[user] = kept[user]  # with its plan
            else:
                found[user] = RecentRecord(kept[user].record, tombstone)
        self._cached.recent.put(found)
        return found

    def _kept(self, spaces: Mapping[str, Space]) -> dict[str, RecentRecord]:
        """The recent records that may be used for the given spaces: a new record is laid out for one space only."""
        found = {user: self._cached.recent.get(user) for user in spaces}
        return {
            user: recent
            for user, recent in found.items()
            if recent is not None and (recent.record.version > 0 or recent.record is spaces[user].new)
        }

    def _take_over(self, loaded: Mapping[str, UserRecord | None]) -> None:
        self._cached.drop([user for user, record in loaded.items() if record is None])
        self._cached.share([(user, record) for user, record in loaded.items() if record is not None])


def _resident_stamps(space: Space, users: Sequence[str]) -> dict[str, int]:
    """Stamps of residents, 0 for users who are none; they count as used just now."""
    return dict(zip(users, space.residents.stamps(space.residents.find(users)), strict=True))
