"""The binary record of one user, format 2. Little-endian throughout.

offset  size  field
0       4     magic "RMRC"
4       2     format (2)
6       2     key dimension d
8       8     record version
16      4     CRC-32 of everything else: bytes 0 to 15, then 20 to the end
20      16    model version, ASCII
36      8     events ever accepted
44      4     flags: 1 = share
48      4     pruned entries so far
52      4 x 4 counts: entries n, log l, seen s, event ids i
68            entry columns in the order of `model.bank.ENTRY_FIELDS`, n values each
              keys (n, d) fp16; log items u4 (l), log times f8 (l); seen u4 (s); event ids u8 (i); state f4 (d)

In format 1 the checksum began at offset 20, so that damage to the version went unnoticed. Records of older formats are
read, and become records of the present one at the user's next write.
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
FORMAT = 2
FIXED = struct.Struct("<4sHHQI")
REST = struct.Struct("<16sQIIIIII")
STAMP = struct.Struct("<QI")
"""What stands at offset 8 of every record, readable on its own: version and checksum (`UserRecord.stamp`)."""
SHARE = 1

CHECKSUM = slice(16, 20)
MODEL = slice(20, 36)
FORMATS = (1, FORMAT)
"""Formats that can be read."""


class RecordError(ValueError):
    """Bytes that are no record of this format; says what is wrong."""


def pack_record(record: UserRecord) -> bytes:
    """A record as bytes."""
    banks, n = record.banks, record.size
    counts = (n, len(record.log_item), len(record.seen), len(record.event_ids))
    flags, pruned = SHARE if record.share else 0, int(banks.pruned[0])
    head = REST.pack(record.model_version.encode("ascii"), record.events, flags, pruned, *counts)
    columns = [banks.fields[name][0, :n] for name in ENTRY_FIELDS]
    columns += [banks.key[0, :n], record.log_item, record.log_time, record.seen, record.event_ids, record.state]
    kinds = (*ENTRY_FIELDS.values(), KEY, *TAIL)
    body = b"".join(
        [head, *(column.astype(kind, copy=False).data for column, kind in zip(columns, kinds, strict=True))]
    )
    start = FIXED.pack(MAGIC, FORMAT, banks.key.shape[2], record.version, 0)[: CHECKSUM.start]
    return start + crc32(body, crc32(start)).to_bytes(4, "little") + body


TAIL = tuple(np.dtype(kind) for kind in ("<u4", "<f8", "<u4", "<u8", "<f4"))
"""What follows the keys: log items, log times, seen, event ids, state."""


def unpack_record(data: bytes, rules: RulesConfig) -> UserRecord:
    """Bytes as a record, its bank laid out for `rules` (of a larger one the best entries are kept).

    Raises:
        RecordError: not a record, a format of a later version, or damaged.
    """
    dim, version, body = _checked(data)
    model_version, events, flags, pruned, n, *tail = REST.unpack_from(body)
    kinds = (*ENTRY_FIELDS.values(), KEY, *TAIL)
    columns = _columns(body, kinds, (*[n] * len(ENTRY_FIELDS), n * dim, tail[0], *tail, dim))
    roomy = rules if n <= rules.capacity else rules.model_copy(update={"capacity": n})
    banks = Banks(1, dim, roomy)
    for name, values in zip(ENTRY_FIELDS, columns, strict=False):
        banks.fields[name][0, :n] = values
    keys, log_item, log_time, seen, event_ids, state = columns[len(ENTRY_FIELDS) :]
    banks.key[0, :n] = keys.reshape(n, dim)
    banks.size[0], banks.pruned[0] = n, pruned
    return UserRecord(
        banks=banks.fitted(rules),
        version=version,
        model_version=model_version.rstrip(b"\0").decode("ascii"),
        events=events,
        share=bool(flags & SHARE),
        checksum=int.from_bytes(data[CHECKSUM], "little"),
        log_item=log_item,
        log_time=log_time,
        seen=seen,
        event_ids=event_ids,
        state=state,
    )


def model_of(data: bytes) -> str:
    """The model version as it stands at `MODEL` in a record, which may be damaged."""
    return data.rstrip(b"\0").decode("latin-1")


def stamp_bytes(stamp: int) -> bytes:
    """A stamp as it stands in a record; nothing for 0, the stamp of a record that is not there."""
    return STAMP.pack(stamp >> 32, stamp & 0xFFFFFFFF) if stamp else b""


def _checked(data: bytes) -> tuple[int, int, bytes]:
    """Key dimension, version and body of undamaged bytes."""
    if len(data) < FIXED.size + REST.size or data[:4] != MAGIC:
        raise RecordError("not a RAMRec record")
    _, form, dim, version, checksum = FIXED.unpack_from(data)
    if form not in FORMATS:
        raise RecordError(f"record format {form}, this version reads {FORMATS[0]} to {FORMATS[-1]}")
    body = data[CHECKSUM.stop :]
    if crc32(body, 0 if form == 1 else crc32(data[: CHECKSUM.start])) != checksum:
        raise RecordError("the record is damaged: checksum differs")
    return dim, version, body


def _columns(body: bytes, kinds: tuple[np.dtype[Any], ...], counts: tuple[int, ...]) -> list[NDArray[Any]]:
    """The columns behind the head, one after another."""
    columns, at = [], REST.size
    length = at + sum(count * kind.itemsize for count, kind in zip(counts, kinds, strict=True))
    if length != len(body):
        raise RecordError(f"the record has {len(body)} bytes, its counts say {length}")
    for count, kind in zip(counts, kinds, strict=True):
        columns.append(np.frombuffer(body, kind, count, at))
        at += count * kind.itemsize
    return columns
