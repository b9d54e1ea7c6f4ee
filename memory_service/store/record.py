"""The packed record of one user, format 4. Little-endian throughout.

offset  size  field
0       4     magic "RMRC"
4       2     format (4)
6       2     key dimension d
8       8     record version
16      4     CRC-32 of everything else: bytes 0 to 15, then 20 to the end
20      16    model version, ASCII
36      8     events ever accepted
44      4     flags: 1 = share
48      4     pruned entries so far
52      4     occasions so far
56      8     identity of the basket of the newest occasion (0: none)
64      4 x 4 counts: entries n, log l, seen s, event ids i
80            entry columns in the order of `model.memory.bank.ENTRY_FIELDS`, n values each (of the sums, n rows)
              keys (n, d) fp16; log items u4 (l), log times f8 (l); seen u4 (s); event ids u8 (i); state f4 (d)

Format 3 has no baskets: its counts begin at offset 56. Format 2 has no habits either: neither the occasions nor the
entry columns HABITS, which are computed from the log, as far as it reaches (`model.memory.changes.with_habits`). A
record of an older format is stored in the present one at its user's next write.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig
from model.memory.bank import ENTRY_FIELDS, KEY, Banks
from model.memory.changes import with_habits
from model.memory.record import UserRecord

MAGIC = b"RMRC"
FORMAT = 4
FORMATS = range(2, FORMAT + 1)
"""Formats that can be read."""
FIXED = struct.Struct("<4sHHQI")
REST = struct.Struct("<16sQIIIQIIII")
REST_3, REST_2 = struct.Struct("<16sQIIIIIII"), struct.Struct("<16sQIIIIII")
STAMP = struct.Struct("<QI")
"""Version and checksum (`UserRecord.stamp`), at offset 8 of every record and readable on their own."""
SHARE = 1
CHECKSUM = slice(16, 20)
MODEL = slice(20, 36)
HABITS = ("first_time", "occasion", "sums")
"""Entry columns that format 2 does not have."""
TAIL = tuple(np.dtype(kind) for kind in ("<u4", "<f8", "<u4", "<u8", "<f4"))
"""What follows the keys: log items, log times, seen, event ids, state."""


class RecordError(ValueError):
    """Bytes that cannot be read as a record; says why."""


def pack_record(record: UserRecord) -> bytes:
    """A record as bytes, in the present format."""
    banks, n = record.banks, record.size
    counts = (n, len(record.log_item), len(record.seen), len(record.event_ids))
    flags, pruned, occasions = SHARE if record.share else 0, int(banks.pruned[0]), int(banks.occasions[0])
    about = (record.events, flags, pruned, occasions, record.basket)
    head = REST.pack(record.model_version.encode("ascii"), *about, *counts)
    columns = [banks.fields[name][0, :n] for name in ENTRY_FIELDS]
    columns += [banks.key[0, :n], record.log_item, record.log_time, record.seen, record.event_ids, record.state]
    kinds = (*ENTRY_FIELDS.values(), KEY, *TAIL)
    body = b"".join(
        [head, *(column.astype(kind.base, copy=False).data for column, kind in zip(columns, kinds, strict=True))]
    )
    start = FIXED.pack(MAGIC, FORMAT, banks.key.shape[2], record.version, 0)[: CHECKSUM.start]
    return start + crc32(body, crc32(start)).to_bytes(4, "little") + body


def unpack_record(data: bytes, rules: RulesConfig) -> UserRecord:
    """Bytes as a record, with its bank laid out for `rules`; of a larger bank the best entries are kept.

    Raises:
        RecordError: not a record, a format that this version cannot read, or damaged.
    """
    form, dim, version, body = _checked(data)
    (model_version, events, flags, pruned, occasions, basket, n, *tail), at = _head(form, body)
    names = [name for name in ENTRY_FIELDS if form >= 3 or name not in HABITS]
    kinds = (*(ENTRY_FIELDS[name] for name in names), KEY, *TAIL)
    columns = _columns(body, at, kinds, (*[n] * len(names), n * dim, tail[0], *tail, dim))
    roomy = rules if n <= rules.capacity else rules.model_copy(update={"capacity": n})
    banks = Banks(1, dim, roomy)
    for name, values in zip(names, columns, strict=False):
        banks.fields[name][0, :n] = values
    keys, *rest = columns[len(names) :]
    banks.key[0, :n] = keys.reshape(n, dim)
    banks.size[0], banks.pruned[0], banks.occasions[0] = n, pruned, occasions
    checksum, model = int.from_bytes(data[CHECKSUM], "little"), model_version.rstrip(b"\0").decode("ascii")
    record = record_of(banks.fitted(rules), version, checksum, model, events, bool(flags & SHARE), basket, rest)
    return record if form >= 3 else with_habits(record)


def record_of(
    banks: Banks,
    version: int,
    checksum: int,
    model_version: str,
    events: int,
    share: bool,
    basket: int,
    tail: Sequence[NDArray[Any]],
) -> UserRecord:
    """A record of its parts; tail: as in TAIL."""
    log_item, log_time, seen, event_ids, state = tail
    return UserRecord(
        banks=banks,
        version=version,
        model_version=model_version,
        events=events,
        share=share,
        checksum=checksum,
        log_item=log_item,
        log_time=log_time,
        seen=seen,
        event_ids=event_ids,
        state=state,
        basket=basket,
    )


def model_of(data: bytes) -> str:
    """The model version from the bytes at `MODEL` of a record, which may be damaged."""
    return data.rstrip(b"\0").decode("latin-1")


def stamp_bytes(stamp: int) -> bytes:
    """A stamp as it is stored in a record; empty for 0, the stamp of a missing record."""
    return STAMP.pack(stamp >> 32, stamp & 0xFFFFFFFF) if stamp else b""


def is_intact(data: bytes) -> bool:
    """Whether the checksum of a record (of at least `FIXED.size` bytes) is right."""
    view = memoryview(data)
    return crc32(view[CHECKSUM.stop :], crc32(view[: CHECKSUM.start])) == int.from_bytes(view[CHECKSUM], "little")


def _checked(data: bytes) -> tuple[int, int, int, bytes]:
    """Format, key dimension, version and body of a record. Raises RecordError."""
    if len(data) < FIXED.size or data[:4] != MAGIC:
        raise RecordError("not a RAMRec record: it does not begin with RMRC")
    _, form, dim, version, _ = FIXED.unpack_from(data)
    if form not in FORMATS:
        raise RecordError(f"the record has format {form}; this version reads formats {FORMATS[0]} to {FORMATS[-1]}")
    if not is_intact(data):
        raise RecordError("the record is damaged: its checksum is wrong")
    return form, dim, version, data[CHECKSUM.stop :]


def _head(form: int, body: bytes) -> tuple[tuple[Any, ...], int]:
    """The first values of a body, in the order of format 4 (missing occasions and basket: 0), and where they end."""
    rest = REST if form >= 4 else REST_3 if form == 3 else REST_2
    if len(body) < rest.size:
        raise RecordError("the record is cut short within its head")
    head = rest.unpack_from(body)
    about, counts = head[:-4], head[-4:]
    return (*about, *(0,) * (6 - len(about)), *counts), rest.size


def _columns(body: bytes, at: int, kinds: tuple[np.dtype[Any], ...], counts: tuple[int, ...]) -> list[NDArray[Any]]:
    """The columns behind the head, one after another, from offset `at` on."""
    columns = []
    length = at + sum(count * kind.itemsize for count, kind in zip(counts, kinds, strict=True))
    if length != len(body):
        raise RecordError(f"the record has {len(body)} bytes, its counts say {length}")
    for count, kind in zip(counts, kinds, strict=True):
        columns.append(np.frombuffer(body, kind, count, at))
        at += count * kind.itemsize
    return columns
