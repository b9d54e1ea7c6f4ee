"""All that is remembered about one user. No torch, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.memory.bank import Banks
from model.memory.rules import Ints

LOG_LIMIT = 512
"""Newest (item, time) pairs kept in a user's log."""
SEEN_LIMIT = 8192
"""Items that a user is known to have had; beyond this number the earliest are dropped."""
EVENT_ID_LIMIT = 1024
"""Newest event ids kept to recognise retries."""
UNKNOWN_POSITION = -1
"""Position of an event that is older than the log: its key is the state before any item."""


def _no_items() -> NDArray[np.uint32]:
    return np.zeros(0, "<u4")


@dataclass(frozen=True)
class UserRecord:
    """All that is remembered about one user.

    banks: exactly this user's bank (one row).
    version: number of writes. model_version: of the model that made keys and state. events: all events ever accepted.
    share: whether the bank is part of the collective scope. checksum: of the stored bytes; 0: not stored yet.
    log_item, log_time: the newest `LOG_LIMIT` events in order of time (s). seen: the items that the user had.
    event_ids: the newest identities of events. state (d,): the encoder's state after all events.
    basket: identity of the basket at the newest time of the log; 0: none.
    """

    banks: Banks
    version: int = 0
    model_version: str = ""
    events: int = 0
    share: bool = True
    checksum: int = 0
    log_item: NDArray[np.uint32] = field(default_factory=_no_items)
    log_time: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0, "<f8"))
    seen: NDArray[np.uint32] = field(default_factory=_no_items)
    event_ids: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, "<u8"))
    state: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, "<f4"))
    basket: int = 0

    @classmethod
    def new(cls, dim: int, rules: RulesConfig) -> UserRecord:
        """The record of a user of whom nothing is known."""
        return cls(Banks(1, dim, rules), state=np.zeros(dim, "<f4"))

    @property
    def size(self) -> int:
        """Entries in the bank."""
        return int(self.banks.size[0])

    @property
    def stamp(self) -> int:
        """Version and checksum in one number; 0: nothing is known. Stored records with equal stamps are the same.

        The version alone is not enough: it can occur twice if a store lost its last second or a tombstone.
        """
        return self.version << 32 | self.checksum

    @property
    def newest_item(self) -> int:
        """The largest item number that occurs."""
        if len(self.seen) < SEEN_LIMIT:  # nothing was dropped, so bank and log hold no other items
            return int(self.seen.max(initial=0))
        columns = (self.banks.fields["item"], self.log_item, self.seen)
        return max(int(column.max(initial=0)) for column in columns)

    @property
    def log_start(self) -> int:
        """Absolute position of the first event in the log."""
        return self.events - len(self.log_item)


@dataclass(frozen=True)
class EncodeJob:
    """States that are wanted of a user's sequence.

    items: the known tail of the sequence, whose first item is at absolute position `start`. Wanted are the state before
    each of `positions` (absolute; −1: the state before any item), and the state after the last item.
    """

    start: int
    items: Ints
    positions: Ints
