"""Records that are kept as a whole between the plan of a write and the write itself. No I/O."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memory_service.store.records import Tombstone
from model.memory.events import Plan
from model.memory.record import UserRecord

RECENT_USERS = 2048
"""Most records that are kept."""


@dataclass(frozen=True)
class RecentRecord:
    """A user's record and tombstone as Redis last had them, and the plan that was last made from the record, with its
    token.
    """

    record: UserRecord
    tombstone: Tombstone | None
    plan: Plan | None = None
    token: str = ""

    def plan_named(self, token: str) -> Plan | None:
        """The plan if this is its token."""
        return self.plan if token and token == self.token else None


class RecentRecords:
    """The recent records by user id, at most `limit`; those that were put least recently are dropped first."""

    def __init__(self, limit: int = RECENT_USERS) -> None:
        self._limit = limit
        self._records: OrderedDict[str, RecentRecord] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, user: str) -> RecentRecord | None:
        """The recent record of a user; None: there is none."""
        return self._records.get(user)

    def put(self, records: Mapping[str, RecentRecord]) -> None:
        """Keep these records, in place of those that were kept of the same users."""
        self._records.update(records)
        for user in records:
            self._records.move_to_end(user)
        while len(self._records) > self._limit:
            self._records.popitem(last=False)

    def drop(self, users: Iterable[str]) -> None:
        """Keep nothing of these users."""
        for user in users:
            self._records.pop(user, None)


def new_token() -> str:
    """A token for a plan: 64 random bits, so that no other process has given the same."""
    return os.urandom(8).hex()
