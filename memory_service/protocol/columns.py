"""Columns of numbers in bodies: arrays packed as little-endian bytes, bytes checked and read as arrays."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.memory.record import EncodeJob
from model.memory.retrieval import Entries


class BadRequest(ValueError):  # noqa: N818 - answered with 422
    """The columns of a request do not fit together. The message names the column."""


def column(data: bytes, kind: str, count: int, name: str, limit: float = np.inf) -> NDArray[Any]:
    """Reads `count` numbers of dtype `kind` from bytes; `name` is the column's name in error messages.

    Raises BadRequest if there are more or fewer numbers, if one is not finite, or if one exceeds `limit` in size.
    """
    size = np.dtype(kind).itemsize
    if len(data) != count * size:
        raise BadRequest(f"{name} has {len(data)} bytes, expected {count} values of {size} bytes")
    values = np.frombuffer(data, kind)
    if not np.isfinite(values).all():
        raise BadRequest(f"{name} contains a number that is not finite")
    if limit < np.inf and np.abs(values).max(initial=0) > limit:
        raise BadRequest(f"{name} contains a number larger than {limit}")
    return values


def check_rows(rows: Collection[int], count: int, name: str) -> None:
    """Raises BadRequest unless every row is in 0 … count − 1."""
    for row in rows:
        if not 0 <= row < count:
            raise BadRequest(f"{name} names row {row}, but there are {count} rows")


def mask(rows: Collection[int], count: int, name: str) -> NDArray[np.bool_]:
    """(count,) bool, True at the given rows. Raises BadRequest if a row does not exist."""
    check_rows(rows, count, name)
    chosen = np.zeros(count, bool)
    chosen[list(rows)] = True
    return chosen


class Job(msgspec.Struct):
    """Which states the encoder computes, from which sequence (`model.memory.record.EncodeJob`): `items` u4, `positions`
    i8.
    """

    start: int
    items: bytes
    positions: bytes

    @classmethod
    def pack(cls, job: EncodeJob) -> Job:
        """The job as bytes."""
        return cls(job.start, job.items.astype("<u4").tobytes(), job.positions.astype("<i8").tobytes())

    def unpack(self) -> EncodeJob:
        """The job as arrays."""
        return EncodeJob(self.start, np.frombuffer(self.items, "<u4"), np.frombuffer(self.positions, "<i8"))


class Columns(msgspec.Struct):
    """Memories of B queries without padding (`model.memory.retrieval.Entries`): `count` (B,) i4; then the entries of
    all queries, one query after another: `item` u4, the others f4.
    """

    count: bytes
    item: bytes
    similarity: bytes
    quality: bytes
    recency: bytes
    rating: bytes

    @classmethod
    def pack(cls, entries: Entries) -> Columns:
        """The entries as bytes."""
        valid = entries.valid
        reals = [getattr(entries, name)[valid].astype("<f4").tobytes() for name in cls.__struct_fields__[2:]]
        return cls(valid.sum(axis=1).astype("<i4").tobytes(), entries.item[valid].astype("<u4").tobytes(), *reals)

    def unpack(self) -> Entries:
        """The entries as arrays, padded to the longest row."""
        count = np.frombuffer(self.count, "<i4")
        valid = np.arange(int(count.max(initial=0))) < count[:, None]
        item = np.zeros(valid.shape, np.int64)
        item[valid] = np.frombuffer(self.item, "<u4")

        def padded(values: bytes) -> NDArray[np.float32]:
            reals = np.zeros(valid.shape, np.float32)
            reals[valid] = np.frombuffer(values, "<f4")
            return reals

        similarity, quality, recency, rating = map(padded, (self.similarity, self.quality, self.recency, self.rating))
        return Entries(item, similarity, quality, recency, rating, valid)
