"""The JSON lines of an export: items first (`{"item": …}`), then users (`{"user": …}`).

Items are named by id, so that catalogue numbers need not agree. Keys are base64 of little-endian fp16; sums and states
of little-endian f4. Lines without habits, of an older version, are accepted: habits are computed from their logs.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from memory_service.protocol.bounds import ID_LIMIT_BYTES
from memory_service.store.items import CatalogueItem
from model.errors import RamrecError
from model.memory.bank import KEY
from model.memory.habits import DAY_HALF_LIVES, OCCASION_HALF_LIVES, SUMS

LARGEST = 1000
"""Capacity that every bank fits into."""
MOST = 2**32 - 1
"""The largest count that a record can hold."""
COUNTS = len(OCCASION_HALF_LIVES) + len(DAY_HALF_LIVES)
"""How many of an entry's sums are counts; the others are sums of cosines and sines."""


class TransferError(RamrecError):
    """A file cannot be written or read, or one of its lines is invalid; the message names it."""


class ItemLine(msgspec.Struct, forbid_unknown_fields=True):
    """An item of the catalogue; `about` is its metadata."""

    item_id: str
    about: msgspec.Raw = msgspec.Raw(b"null")
    hidden: bool = False

    def registered(self) -> CatalogueItem:
        """The item as the store registers it."""
        about = bytes(self.about)
        return CatalogueItem(self.item_id, b"" if about == b"null" else about, self.hidden)


class EntryLine(msgspec.Struct, forbid_unknown_fields=True):
    """A memory entry without its key and sums. `cell`: −1 if the collective index does not hold the entry; any other
    value is computed again at import.
    """

    item_id: str
    cell: int
    frequency: int
    access: int
    rating: float | None
    time: float
    last_access: float
    first_time: float = 0.0
    occasion: int = 0


class UserLine(msgspec.Struct, forbid_unknown_fields=True):
    """A record.

    Attributes:
        keys: of the n entries, (n, d) fp16.
        state: encoder output, (d,) f4.
        sums: habits of the entries, (n, SUMS) f4.
        occasions: None if the export is from a version that kept no habits.
        basket: identity of the newest basket (0: none).
    """

    user_id: str
    version: int
    model_version: str
    events: int
    share: bool
    pruned: int
    entries: list[EntryLine]
    keys: bytes
    log: list[tuple[str, float]]
    seen: list[str]
    event_ids: list[int]
    state: bytes
    occasions: int | None = None
    sums: bytes = b""
    basket: int = 0

    def items(self) -> Iterator[str]:
        """Ids of all items that the line names; one may appear several times."""
        yield from (entry.item_id for entry in self.entries)
        yield from (item for item, _ in self.log)
        yield from self.seen


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """A line: either an item or a user."""

    item: ItemLine | None = None
    user: UserLine | None = None

    def packed(self) -> bytes:
        """The line as JSON, with its line break."""
        filled = {name: getattr(self, name) for name in ("item", "user") if getattr(self, name) is not None}
        return msgspec.json.encode(filled) + b"\n"


def read(number: int, line: bytes) -> Line:
    """Line `number` of a file, checked. Raises TransferError if it is invalid."""
    try:
        found = msgspec.json.decode(line, type=Line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransferError(f"line {number}: {error}") from error
    if (found.item is None) == (found.user is None):
        raise TransferError(f"line {number}: needs either `item` or `user`")
    if found.user is not None:
        _check(number, found.user)
    return found


def _check(number: int, user: UserLine) -> None:
    dim = len(user.state) // 4
    if dim == 0 or len(user.state) % 4 or len(user.keys) != len(user.entries) * dim * KEY.itemsize:
        raise TransferError(f"line {number}: keys and state of {user.user_id!r} do not fit together")
    vectors = [np.frombuffer(user.state, "<f4"), np.frombuffer(user.keys, KEY).astype(np.float32)]
    if not all(np.isfinite(values).all() for values in vectors):
        raise TransferError(f"line {number}: keys or state of {user.user_id!r} are not finite")
    if user.version < 1 or len(user.entries) > LARGEST or not 1 <= len(user.user_id.encode()) <= ID_LIMIT_BYTES:
        raise TransferError(f"line {number}: version, bank size or user_id out of range")
    if any(not 0 <= event_id < 2**64 for event_id in user.event_ids) or user.events < len(user.log):
        raise TransferError(f"line {number}: event counts or ids of {user.user_id!r} are out of range")
    if not 0 <= user.basket < 2**64 or (user.basket and not user.log):
        raise TransferError(f"line {number}: basket of {user.user_id!r} is out of range, or of no event in its log")
    if user.occasions is not None:
        _check_habits(number, user)


def _check_habits(number: int, user: UserLine) -> None:
    if len(user.sums) != len(user.entries) * 4 * SUMS:
        raise TransferError(f"line {number}: sums and entries of {user.user_id!r} do not fit together")
    sums = np.frombuffer(user.sums, "<f4").reshape(-1, SUMS)
    if not (np.abs(sums) <= MOST).all() or (sums[:, :COUNTS] < 0).any():  # a NaN is not <= either
        raise TransferError(f"line {number}: sums of {user.user_id!r} are not finite or out of range")
    if not all(0 <= count <= MOST for count in (user.occasions or 0, *(entry.occasion for entry in user.entries))):
        raise TransferError(f"line {number}: occasions of {user.user_id!r} are out of range")
    if any(entry.frequency < 1 or entry.first_time > entry.time for entry in user.entries):
        raise TransferError(f"line {number}: frequency or first_time of an entry of {user.user_id!r} is out of range")
