"""Which memory replica owns which users: the 16,384 slots of Redis Cluster, in ranges, shared out among the replicas.

A user's range follows from the slot of the record's key, Redis' own CRC16. The table says of every range who owns it
and, while it changes hands, who its heir is: the heir reads the range's memories, then takes it over, so that at every
moment one replica searches it. Pure functions of a table; who is alive and what is loaded comes from outside.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
from numpy.typing import NDArray
from redis.crc import key_slot

from model.rules import Bools

SLOTS = 16384
ALL_SLOTS = range(SLOTS)
RANGES = 1024
"""Ranges of 16 slots."""
NOBODY = -1


def user_key(user_id: str) -> bytes:
    """Key of a user's record in Redis; its slot is that of the user id."""
    return b"ramrec:{" + user_id.encode() + b"}"


def user_of(key: bytes) -> str:
    """The user whose record a key is."""
    return key[len(b"ramrec:{") : -1].decode()


def slot_of(user_id: str) -> int:
    """The slot of a user."""
    return int(key_slot(user_key(user_id)))


def range_of(user_id: str) -> int:
    """The range of a user."""
    return slot_of(user_id) * RANGES // SLOTS


def pack(ranges: Bools) -> bytes:
    """(RANGES,) as bits."""
    return np.packbits(ranges).tobytes()


def unpack(data: bytes) -> NDArray[np.bool_]:
    """Bits as (RANGES,). Raises ValueError where they are not as many."""
    if len(data) * 8 != RANGES:
        raise ValueError(f"ranges has {len(data)} bytes, wanted {RANGES // 8}")
    return np.unpackbits(np.frombuffer(data, "u1")).astype(bool)


def _nobody() -> NDArray[np.int16]:
    return np.full(RANGES, NOBODY, np.int16)


class Written(msgspec.Struct):
    """A table as it is kept and sent: owner and heir of each range (i2, places among the members; −1: nobody)."""

    epoch: int
    members: list[str]
    leaving: list[str]
    owner: bytes
    heir: bytes


@dataclass(frozen=True)
class Table:
    """The members of a group (their URLs) and what each owns; `epoch` counts its changes. owner, heir (RANGES,) int16:
    places among the members, −1 nobody.
    """

    epoch: int = 0
    members: tuple[str, ...] = ()
    leaving: frozenset[str] = frozenset()
    owner: NDArray[np.int16] = field(default_factory=_nobody)
    heir: NDArray[np.int16] = field(default_factory=_nobody)

    def owned(self, member: str) -> NDArray[np.bool_]:
        """(RANGES,) what a member owns."""
        return np.asarray(self.owner == self._place(member))

    def inherited(self, member: str) -> NDArray[np.bool_]:
        """(RANGES,) what a member is the heir of."""
        return np.asarray(self.heir == self._place(member))

    def contested(self) -> NDArray[np.bool_]:
        """(RANGES,) what is changing hands."""
        return np.asarray(self.heir != NOBODY)

    def _place(self, member: str) -> int:
        return self.members.index(member) if member in self.members else len(self.members)

    def same(self, other: Table) -> bool:
        """Whether both say the same, whatever their epochs."""
        alike = (self.members, self.leaving) == (other.members, other.leaving)
        return alike and bool((self.owner == other.owner).all() and (self.heir == other.heir).all())

    def write(self) -> Written:
        """As it is kept and sent."""
        own, heir = self.owner.astype("<i2").tobytes(), self.heir.astype("<i2").tobytes()
        return Written(self.epoch, list(self.members), sorted(self.leaving), own, heir)


def read(written: Written) -> Table:
    """A table as it was kept or sent. Raises ValueError where it cannot be one."""
    owner, heir = np.frombuffer(written.owner, "<i2"), np.frombuffer(written.heir, "<i2")
    both, members = np.concatenate([owner, heir]), tuple(written.members)
    if len(owner) != RANGES or len(heir) != RANGES or both.min() < NOBODY or both.max() >= len(members):
        raise ValueError("ranges: not a table of owners")
    return Table(written.epoch, members, frozenset(written.leaving), owner.astype(np.int16), heir.astype(np.int16))


class Part:
    """What of the collective scope one replica holds, by range (RANGES,). `kept`: users' memories are in its index, or
    about to be; `loaded`: all that Redis has of them is there; `counted`: they count among the holders of their items
    here and nowhere else.
    """

    def __init__(self) -> None:
        self.kept, self.loaded, self.counted = (np.zeros(RANGES, bool) for _ in range(3))

    def keeps(self, user_id: str) -> bool:
        """Whether a user's memories are kept here."""
        return bool(self.kept[range_of(user_id)])


def revised(table: Table, me: str, gone: Collection[str], ready: Bools) -> Table:
    """The table after one member's look at it: it joins, the `gone` are left out, ranges are shared out as evenly as
    may be with as few as may be moved, and what is `ready` here (RANGES,) of what it is heir of is taken over. Ranges
    of the gone have a new owner at once: nobody else searches them.
    """
    table = _with_members(table, [*table.members, *([] if me in table.members else [me])])
    stay = [one for one in table.members if one not in gone and not _is_done(table, one, me)]
    table = _with_members(table, sorted(stay))
    target = _shared_out(table)
    orphaned, moving = table.owner == NOBODY, target != table.owner
    owner, heir = np.where(orphaned, target, table.owner), np.where(moving & ~orphaned, target, NOBODY)
    taken = (heir == table.members.index(me)) & ready
    return replace(
        table,
        owner=np.where(taken, heir, owner).astype(np.int16),
        heir=np.where(taken, NOBODY, heir).astype(np.int16),
    )


def departing(table: Table, me: str) -> Table:
    """The table with a member on its way out: others become heirs of all it owns."""
    return replace(table, leaving=table.leaving | {me}) if me in table.members else table


def _is_done(table: Table, member: str, me: str) -> bool:
    """Whether a member that is leaving has handed over everything; nobody writes itself out of the table that it
    still reads.
    """
    return member in table.leaving and member != me and not table.owned(member).any()


def _with_members(table: Table, members: list[str]) -> Table:
    places = {one: n for n, one in enumerate(members)}
    new_place = np.array([*(places.get(one, NOBODY) for one in table.members), NOBODY], np.int16)
    return replace(
        table,
        members=tuple(members),
        leaving=frozenset(one for one in table.leaving if one in places),
        owner=new_place[table.owner],
        heir=new_place[table.heir],
    )


def _shared_out(table: Table) -> NDArray[np.int16]:
    """(RANGES,) who is to own each range: heirs and owners keep what they may, the highest ranges move first."""
    staying = [n for n, one in enumerate(table.members) if one not in table.leaving]
    staying = staying or list(range(len(table.members)))  # all are leaving: nothing moves any more
    held = np.where(table.heir != NOBODY, table.heir, table.owner)
    held = np.where(np.isin(held, staying), held, NOBODY)
    most_first = sorted(staying, key=lambda n: (-int((held == n).sum()), n))
    fair, more = divmod(RANGES, len(staying))
    quota = {n: fair + (place < more) for place, n in enumerate(most_first)}
    for n in staying:
        held[np.flatnonzero(held == n)[quota[n] :]] = NOBODY
    free = np.flatnonzero(held == NOBODY)
    wanting = np.repeat(staying, [quota[n] - int((held == n).sum()) for n in staying])
    held[free] = wanting
    return held.astype(np.int16)
