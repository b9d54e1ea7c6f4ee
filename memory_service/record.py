"""The binary record of one user, format 1. Little-endian throughout.

offset  size  field
0       4     magic "RMRC"
4       2     format (1)
6       2     key dimension d
8       8     record version
16      4     CRC-32 of everything from offset 20 on
20      16    model version, ASCII
36      8     events ever accepted
44      4     flags: 1 = share
48      4     pruned entries so far
52      4 x 4 counts: entries n, log l, seen s, event ids i
68            entry columns in the order of `model.bank.ENTRY_FIELDS`, n values each
              keys (n, d) fp16; log items u4 (l), log times f8 (l); seen u4 (s); event ids u8 (i); state f4 (d)
"""

from __future__ import annotations

import struct
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from model.bank import ENTRY_FIELDS, KEY, Banks
from model.config import RulesConfig
from model.events import UserRecord

MAGIC = b"RMRC"
FORMAT = 1
FIXED = struct.Struct("<4sHHQI")
REST = struct.Struct("<16sQIIIIII")
VERSION_BYTES = slice(8, 16)
"""Where a record's version stands, readable on its own (GETRANGE, and the write script)."""
SHARE = 1


class RecordError(ValueError):
    """Bytes that are no record of this format; says what is wrong."""


def pack_record(record: UserRecord) -> bytes:
    """A record as bytes."""
    banks, n = record.banks, record.size
    counts = (n, len(record.log_item), len(record.seen), len(record.event_ids))
    flags = SHARE if record.share else 0
    head = REST.pack(record.model_version.encode("ascii"), record.events, flags, int(banks.pruned[0]), *counts)
    columns = [banks.fields[name][0, :n].astype(kind) for name, kind in ENTRY_FIELDS.items()]
    columns += [banks.key[0, :n], record.log_item.astype("<u4"), record.log_time.astype("<f8")]
    columns += [record.seen.astype("<u4"), record.event_ids.astype("<u8"), record.state.astype("<f4")]
    body = head + b"".join(column.tobytes() for column in columns)
    return FIXED.pack(MAGIC, FORMAT, banks.key.shape[2], record.version, crc32(body)) + body


def unpack_record(data: bytes, rules: RulesConfig) -> UserRecord:
    """Bytes as a record, its bank laid out for `rules` (of a larger one the best entries are kept).

    Raises:
        RecordError: not a record, another format, or damaged.
    """
    dim, version, body = _checked(data)
    model_version, events, flags, pruned, n, log, seen, ids = REST.unpack_from(body)
    reader = _Reader(body, REST.size)
    banks = Banks(1, dim, rules.model_copy(update={"capacity": max(n, rules.capacity)}))
    for name, kind in ENTRY_FIELDS.items():
        banks.fields[name][0, :n] = reader.take(kind, n)
    banks.key[0, :n] = reader.take(KEY, n * dim).reshape(n, dim)
    banks.size[0], banks.pruned[0] = n, pruned
    record = UserRecord(
        banks=banks.fitted(rules),
        version=version,
        model_version=model_version.rstrip(b"\0").decode("ascii"),
        events=events,
        share=bool(flags & SHARE),
        log_item=reader.take(np.dtype("<u4"), log),
        log_time=reader.take(np.dtype("<f8"), log),
        seen=reader.take(np.dtype("<u4"), seen),
        event_ids=reader.take(np.dtype("<u8"), ids),
        state=reader.take(np.dtype("<f4"), dim),
    )
    reader.end()
    return record


def _checked(data: bytes) -> tuple[int, int, bytes]:
    if len(data) < FIXED.size + REST.size or data[:4] != MAGIC:
        raise RecordError("not a RAMRec record")
    _, form, dim, version, checksum = FIXED.unpack_from(data)
    if form != FORMAT:
        raise RecordError(f"record format {form}, this version reads {FORMAT}")
    body = data[FIXED.size :]
    if crc32(body) != checksum:
        raise RecordError("the record is damaged: checksum differs")
    return dim, version, body


class _Reader:
    def __init__(self, body: bytes, at: int) -> None:
        self.body, self.at = body, at

    def take(self, kind: np.dtype[Any], count: int) -> NDArray[Any]:
        stop = self.at + count * kind.itemsize
        if stop > len(self.body):
            raise RecordError("the record is cut short")
        values = np.frombuffer(self.body[self.at : stop], kind)
        self.at = stop
        return values

    def end(self) -> None:
        if self.at != len(self.body):
            raise RecordError("the record is longer than its counts say")
