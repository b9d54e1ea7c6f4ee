"""What the memory service answers about a batch of users: arrays on both sides, `RetrieveReply` in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memory_service.protocol.bounds import ENTRIES_LIMIT, K_LIMIT, NUMBER_LIMIT
from memory_service.protocol.columns import Columns, Job
from memory_service.protocol.replies import check_job, check_stale, demand
from memory_service.protocol.structs import RetrieveReply, StaleUser
from model.memory.habits import FEATURES
from model.memory.retrieval import Retrieved
from model.memory.rules import Bools, Ints


@dataclass(frozen=True)
class Answer:
    """What is known about the B users of a question. Items are catalogue numbers.

    retrieved: entropy, K and memories.
    known (B,) bool: the user has a record. versions (B,) int64: of the records. states (B, d) float32.
    seen: for each user, all items ever taken, uint32.
    stale: users whose records must be rekeyed before they can be asked about.
    without: rows that ignore items the user had taken → the job that encodes the state without them; a job without
        items: nothing is left to encode.
    moved: rows whose records belong to another loaded model → that model's version.
    degraded: Redis is out of reach, or the collective index is still being filled.
    catalogue_size: number of items in the catalogue; no item in the answer has a larger number.
    """

    retrieved: Retrieved
    known: Bools
    versions: Ints
    states: NDArray[np.float32]
    seen: Sequence[NDArray[np.uint32]]
    degraded: bool
    catalogue_size: int
    stale: list[StaleUser] = field(default_factory=list)
    without: dict[int, Job] = field(default_factory=dict)
    moved: dict[int, str] = field(default_factory=dict)

    def packed(self) -> RetrieveReply:
        """The answer as a response body."""
        found = self.retrieved
        present = found.present > 0
        return RetrieveReply(
            catalogue_size=self.catalogue_size,
            degraded=self.degraded,
            known=self.known.astype("u1").tobytes(),
            versions=self.versions.astype("<i8").tobytes(),
            entropy=found.entropy.astype("<f4").tobytes(),
            k=found.k.astype("<i4").tobytes(),
            collective_k=found.collective_k.astype("<i4").tobytes(),
            bank_size=found.bank_size.astype("<i4").tobytes(),
            states=self.states.astype("<f4").tobytes(),
            own=Columns.pack(found.own),
            collective=Columns.pack(found.collective),
            seen_count=np.array([len(items) for items in self.seen], "<i4").tobytes(),
            seen=np.concatenate([np.zeros(0, "<u4"), *self.seen]).astype("<u4").tobytes(),
            stale=self.stale,
            without=self.without,
            moved=self.moved,
            habits=found.habits[found.own.valid].astype("<f4").tobytes(),
            present_count=present.sum(axis=1).astype("<i4").tobytes() if present.shape[1] else b"",
            present=found.present[present].astype("<u4").tobytes(),
        )

    @classmethod
    def unpacked(cls, reply: RetrieveReply, users: Sequence[str]) -> Answer:
        """The answer in a response body to a question about `users`.

        Raises ValueError if the columns do not fit the question or each other, or a number is out of its range.
        """
        _check(reply, users)
        own, seen_count = reply.own.unpack(), np.frombuffer(reply.seen_count, "<i4")
        return cls(
            retrieved=Retrieved(
                entropy=np.frombuffer(reply.entropy, "<f4"),
                k=np.frombuffer(reply.k, "<i4").astype(np.int64),
                bank_size=np.frombuffer(reply.bank_size, "<i4").astype(np.int64),
                own=own,
                collective=reply.collective.unpack(),
                collective_k=np.frombuffer(reply.collective_k, "<i4").astype(np.int64),
                habits=_habits(reply.habits, own.valid),
                present=_present(reply),
            ),
            known=np.frombuffer(reply.known, "u1").astype(bool),
            versions=np.frombuffer(reply.versions, "<i8"),
            states=np.frombuffer(reply.states, "<f4").reshape(len(users), -1),
            seen=np.split(np.frombuffer(reply.seen, "<u4"), np.cumsum(seen_count)[:-1]),
            degraded=reply.degraded,
            catalogue_size=reply.catalogue_size,
            stale=reply.stale,
            without=reply.without,
            moved=reply.moved,
        )


def _habits(data: bytes, valid: Bools) -> NDArray[np.float32]:
    """Features of the own entries, (B, K, F), 0 where not valid; F is 0 where there are none. valid (B, K)."""
    habits = np.zeros((*valid.shape, len(FEATURES) if data else 0), np.float32)
    if data:
        habits[valid] = np.frombuffer(data, "<f4").reshape(-1, len(FEATURES))
    return habits


def _present(reply: RetrieveReply) -> NDArray[np.int64]:
    """Items that the users take at the time of the request, (B, P), padded with 0."""
    count = np.frombuffer(reply.present_count, "<i4")
    there = np.arange(int(count.max(initial=0))) < count[:, None]
    present = np.zeros((len(reply.known), there.shape[1]), np.int64)
    if len(count):
        present[there] = np.frombuffer(reply.present, "<u4")
    return present


def _check(reply: RetrieveReply, users: Sequence[str]) -> None:
    """Columns have the length of the question, items are in the catalogue, numbers are finite."""
    rows, own, others = len(users), reply.own, reply.collective
    narrow = (reply.entropy, reply.k, reply.collective_k, reply.bank_size, reply.seen_count, own.count, others.count)
    demand(len(reply.known) == rows, "known")
    demand(len(reply.versions) == 8 * rows and all(len(column) == 4 * rows for column in narrow), "rows")
    counts = np.frombuffer(b"".join(narrow[1:]), "<i4").reshape(-1, rows)
    demand(counts.min() >= 0 and counts[-2:].max() <= ENTRIES_LIMIT and counts[:2].max() <= K_LIMIT, "counts")
    demand(len(reply.seen) == 4 * int(counts[3].sum()), "seen")
    for columns, total in zip((own, others), counts[-2:].sum(axis=1).tolist(), strict=True):
        demand(all(len(column) == 4 * total for column in (columns.item, *_reals(columns))), "entries")
    _check_items(own.item + others.item + reply.seen, reply.catalogue_size)
    _check_numbers(b"".join((reply.entropy, reply.states, *_reals(own), *_reals(others))), "numbers")
    _check_habits(reply, rows)
    check_stale(reply.stale, users, reply.catalogue_size)
    for row, job in reply.without.items():
        demand(0 <= row < rows, "without")
        check_job(job, reply.catalogue_size)


def _check_habits(reply: RetrieveReply, rows: int) -> None:
    """Either all own entries have features or none has; the present items are in the catalogue."""
    demand(len(reply.habits) in (0, len(FEATURES) * len(reply.own.item)), "habits")
    _check_numbers(reply.habits, "habits")
    demand(len(reply.present_count) in (0, 4 * rows), "present")
    count = np.frombuffer(reply.present_count, "<i4")
    demand(bool(((count >= 0) & (count <= ENTRIES_LIMIT)).all()), "present")
    demand(4 * int(count.sum()) == len(reply.present), "present")
    _check_items(reply.present, reply.catalogue_size)


def _check_items(data: bytes, catalogue_size: int) -> None:
    items = np.frombuffer(data, "<u4")
    demand(not len(items) or (items.min() > 0 and items.max() <= catalogue_size), "items")


def _check_numbers(data: bytes, name: str) -> None:
    demand(bool(np.abs(np.frombuffer(data, "<f4")).max(initial=0) <= NUMBER_LIMIT), name)  # False for NaN


def _reals(columns: Columns) -> tuple[bytes, ...]:
    return columns.similarity, columns.quality, columns.recency, columns.rating
