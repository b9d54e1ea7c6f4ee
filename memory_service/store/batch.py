"""Many packed records read at once, straight into stacked arrays: for loading the memories of many users."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory_service.store.record import FORMAT, MAGIC, SHARE, TAIL, is_intact, record_of
from model.config import RulesConfig
from model.memory.bank import ENTRY_FIELDS, KEY, Banks
from model.memory.changes import Stacked
from model.memory.record import UserRecord

HEAD = np.dtype(
    [
        ("magic", "S4"),
        ("format", "<u2"),
        ("dim", "<u2"),
        ("version", "<u8"),
        ("checksum", "<u4"),
        ("model", "S16"),
        ("events", "<u8"),
        ("flags", "<u4"),
        ("pruned", "<u4"),
        ("occasions", "<u4"),
        ("basket", "<u8"),
        ("entries", "<u4"),
        ("log", "<u4"),
        ("seen", "<u4"),
        ("ids", "<u4"),
    ]
)
"""The first bytes of a record of the present format."""
ENTRY_BYTES = sum(kind.itemsize for kind in ENTRY_FIELDS.values())
SHARED_FIELDS = ("item", "cell", "frequency", "access", "rating", "time")
"""The entry columns that a collective index needs."""


@dataclass(frozen=True)
class RecordBatch:
    """Undamaged, sharing records of one model, in the present format.

    Attributes:
        packed: the records.
        heads: (B,) HEAD.
        banks: of the users; only the columns that were asked for are filled.
    """

    packed: list[bytes]
    heads: NDArray[np.void]
    banks: Banks

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def stamps(self) -> list[int]:
        """`UserRecord.stamp` of each record."""
        both = zip(self.heads["version"].tolist(), self.heads["checksum"].tolist(), strict=True)
        return [version << 32 | checksum for version, checksum in both]

    @property
    def newest_item(self) -> int:
        """The largest item number that occurs in a record."""
        logs = self._joined(self._tail, self.heads["log"] * 4)
        seen = self._joined(self._tail + self.heads["log"].astype(np.int64) * 12, self.heads["seen"] * 4)
        return max(int(items.max(initial=0)) for items in (self.banks.fields["item"], logs, seen))

    @cached_property
    def _tail(self) -> NDArray[np.int64]:
        """(B,) offset of what follows the keys."""
        entry = ENTRY_BYTES + KEY.itemsize * self.banks.key.shape[2]
        return HEAD.itemsize + self.heads["entries"].astype(np.int64) * entry

    def _joined(self, start: NDArray[np.int64], length: NDArray[np.integer]) -> NDArray[np.uint32]:
        """Item numbers at these offsets of all records."""
        parts = zip(self.packed, start.tolist(), (start + length).tolist(), strict=True)
        return np.frombuffer(b"".join([memoryview(data)[first:end] for data, first, end in parts]), "<u4")

    def take(self, rows: Sequence[int]) -> RecordBatch:
        """The records of some rows; itself if these are all."""
        if len(rows) == len(self):
            return self
        at = np.asarray(rows, np.int64)
        return RecordBatch([self.packed[row] for row in rows], self.heads[at], self.banks.rows(at))

    def stacked(self) -> Stacked:
        """The records with all that they hold, their banks as views; all columns must have been read."""
        heads = zip(self.heads.tolist(), self._tail.tolist(), strict=True)
        return Stacked([self._record(row, at, head) for row, (head, at) in enumerate(heads)], self.banks)

    def _record(self, row: int, at: int, head: tuple[Any, ...]) -> UserRecord:
        _, _, dim, version, checksum, model, events, flags, _, _, basket, _, log, seen, ids = head
        tail = []
        for kind, count in zip(TAIL, (log, log, seen, ids, dim), strict=True):
            tail.append(np.frombuffer(self.packed[row], kind, count, at))
            at += count * kind.itemsize
        share, model_version, bank = bool(flags & SHARE), model.decode("ascii"), self.banks.rows(slice(row, row + 1))
        return record_of(bank, version, checksum, model_version, events, share, basket, tail)


def read_batch(
    found: Sequence[bytes | None],
    rules: RulesConfig,
    dim: int,
    model_version: str,
    columns: Collection[str] = tuple(ENTRY_FIELDS),
) -> tuple[list[int], RecordBatch]:
    """Read those of the packed records that a batch can hold, and the rows in `found` that these are.

    Left out, for `unpack_record`, are damaged records, older formats, other models, users who do not share, and banks
    beyond the capacity of `rules`.
    """
    long = [row for row, data in enumerate(found) if data is not None and len(data) >= HEAD.itemsize]
    packed = [data for row in long if (data := found[row]) is not None]
    heads = np.frombuffer(b"".join([data[: HEAD.itemsize] for data in packed]), HEAD)
    is_read = _is_regular(packed, heads, rules, dim, model_version)
    rows = [at for at in np.flatnonzero(is_read).tolist() if is_intact(packed[at])]
    packed, heads = [packed[at] for at in rows], heads[rows]
    return [long[at] for at in rows], RecordBatch(packed, heads, _banks(packed, heads, rules, dim, columns))


def _is_regular(
    packed: list[bytes], heads: NDArray[np.void], rules: RulesConfig, dim: int, model_version: str
) -> NDArray[np.bool_]:
    """(B,) which heads are as a batch wants them, and agree with the length of the record."""
    n, log, seen, ids = (heads[name].astype(np.int64) for name in ("entries", "log", "seen", "ids"))
    length = HEAD.itemsize + n * (ENTRY_BYTES + KEY.itemsize * dim) + 12 * log + 4 * seen + 8 * ids + 4 * dim
    regular = (heads["magic"] == MAGIC) & (heads["format"] == FORMAT) & (heads["dim"] == dim)
    regular &= (heads["model"] == model_version.encode("ascii")) & (heads["flags"] & SHARE > 0)
    return np.asarray(regular & (n <= rules.capacity) & (length == [len(data) for data in packed]))


def _banks(
    packed: list[bytes], heads: NDArray[np.void], rules: RulesConfig, dim: int, columns: Collection[str]
) -> Banks:
    """The banks of all records, those of the same number of entries at a time."""
    banks = Banks(len(packed), dim, rules)
    size = heads["entries"].astype(np.int64)
    banks.size[:], banks.pruned[:], banks.occasions[:] = size, heads["pruned"], heads["occasions"]
    for n in np.unique(size[size > 0]).tolist():
        rows = np.flatnonzero(size == n)
        kind = _entries_of(n, dim)
        parts = [memoryview(packed[row])[HEAD.itemsize : HEAD.itemsize + kind.itemsize] for row in rows.tolist()]
        entries = np.frombuffer(b"".join(parts), kind)
        for name in columns:
            banks.fields[name][rows, :n] = entries[name]
        banks.key[rows, :n] = entries["key"]
    return banks


@lru_cache(4096)
def _entries_of(n: int, dim: int) -> np.dtype[np.void]:
    """What follows the head of a record with n entries: their columns, then their keys."""
    columns = [(name, kind.base, (n, *kind.shape)) for name, kind in ENTRY_FIELDS.items()]
    return np.dtype([*columns, ("key", KEY, (n, dim))])
