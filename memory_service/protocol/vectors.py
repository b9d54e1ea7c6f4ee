"""What the encoder computes for a write or a rekey: arrays on both sides, `UserWrite` and `UserRekey` in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memory_service.protocol.bounds import NUMBER_LIMIT, UNIT_LIMIT
from memory_service.protocol.columns import BadRequest, column
from memory_service.protocol.structs import EventIn, StaleUser, UserPlan, UserRekey, UserWrite
from model.memory.rules import Floats


@dataclass(frozen=True)
class Vectors:
    """One user's keys (n, d), of unit length, and the state (d,) after the last event."""

    keys: Floats
    state: Floats

    def write_of(self, plan: UserPlan, events: Sequence[EventIn]) -> UserWrite:
        """Writes planned events; there is one key for each accepted event."""
        return UserWrite(plan.user_id, plan.version, list(events), _packed(self.keys), _packed(self.state), plan.token)

    def rekey_of(self, stale: StaleUser) -> UserRekey:
        """Rekeys a stale record; there is one key for each entry, in bank order."""
        return UserRekey(stale.user_id, stale.version, _packed(self.keys), _packed(self.state))

    @classmethod
    def unpacked(cls, user: UserWrite | UserRekey) -> Vectors:
        """The float32 vectors of a user. Raises BadRequest if keys and state have different widths or numbers are out
        of range.
        """
        width = len(user.state) // 4
        state = column(user.state, "<f4", width, "state", NUMBER_LIMIT)
        rows = len(user.keys) // (4 * width) if width else 0
        return cls(column(user.keys, "<f4", rows * width, "keys", UNIT_LIMIT).reshape(rows, width), state)

    def check(self, rows: int, width: int) -> None:
        """Raises BadRequest unless there are `rows` keys of `width` numbers each."""
        if self.state.shape != (width,):
            raise BadRequest(f"state has {len(self.state)} numbers, expected {width}")
        if len(self.keys) != rows:
            raise BadRequest(f"keys has {len(self.keys)} rows, expected {rows}")


def _packed(vectors: NDArray[np.floating]) -> bytes:
    return vectors.astype("<f4").tobytes()
