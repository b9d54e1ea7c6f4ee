"""A plain model of what the memory keeps of users, without arrays, Redis or FAISS."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from memory_service.protocol.structs import (
    EventIn,
)
from model.config import RulesConfig

DIM = 16
CAPACITY = 4
USERS = ("ann", "ben", "cid", "dan")
RESIDENT = (100, 2)
"""Banks that may stay in memory: the first replica keeps all, the second has to make room all the time."""
TRIES = 3
RULES = RulesConfig(
    capacity=CAPACITY,
    clusters=4,
    time_unit="position",
    weight_access=0.0,  # whose retrievals were counted where does not decide what is pruned
    prune_std=1.0,
    similarity_threshold=-1.0,
    collective_k_min=50,
    collective_k_max=50,
)
ITEMS = {user: [f"i{5 * n + m}" for m in range(1, 6)] + [f"new-of-{user}"] for n, user in enumerate(USERS)}
"""Every user takes items of their own only: five that the model knows and one that it does not."""


def drawn(*seed: object) -> np.ndarray:
    """A vector of unit length that follows from the seed alone."""
    rng = np.random.default_rng(list(repr(seed).encode()))
    vector = rng.normal(size=DIM)
    return (vector / np.linalg.norm(vector)).astype("<f4")


def key_of(user: str, item: str, position: int) -> np.ndarray:
    return drawn("key", user, item, position)


def state_of(user: str, sequence: Sequence[str]) -> np.ndarray:
    return drawn("state", user, *sequence)


@dataclass
class Entry:
    """One memory."""

    item: str
    key: np.ndarray
    time: float
    rating: float | None
    shared: bool
    frequency: int = 1
    retrieved: int = 0

    def again(self, event: EventIn, when: float, key: np.ndarray, shared: bool) -> None:
        self.frequency += 1
        keep = min(0.9, 0.7 + 0.05 * math.log(self.frequency))
        blended = keep * self.key.astype("<f4") + (1 - keep) * key
        self.key = (blended / np.linalg.norm(blended)).astype("<f2")
        if event.rating is not None and (when >= self.time or self.rating is None):
            self.rating = event.rating
        self.time = max(self.time, when)
        self.shared |= shared


@dataclass(frozen=True)
class Wanted:
    """What a batch of events must be sorted into, and the log with those that are new."""

    accepted: list[tuple[EventIn, float]]
    duplicates: list[int]
    forgotten: list[int]
    log: list[tuple[str, float]]
    positions: list[int]


@dataclass
class Person:
    """All that is remembered about one user."""

    version: int = 0
    last_version: int = 0
    forgotten_until: float = -math.inf
    log: list[tuple[str, float]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    bank: list[Entry] = field(default_factory=list)
    pruned: int = 0

    def sort_out(self, events: Sequence[EventIn], received_at: float) -> Wanted:
        timed = [(event, received_at if event.timestamp is None else event.timestamp) for event in events]
        known = set(self.log) | {(entry.item, entry.time) for entry in self.bank}
        ids, log = set(self.ids), list(self.log)
        accepted, duplicates, forgotten = [], [], []
        for event, when in sorted(timed, key=lambda one: (one[1], one[0].index)):
            exact = event.timestamp is not None and (event.item_id, when) in known
            if when <= self.forgotten_until:
                forgotten.append(event.index)
            elif exact or event.event_id in ids:
                duplicates.append(event.index)
            else:
                accepted.append((event, when))
                known.add((event.item_id, when))
                ids |= {event.event_id} - {None}
                log.insert(bisect_right(log, when, key=lambda one: one[1]), (event.item_id, when))
        positions = _positions(log, accepted)
        return Wanted(accepted, sorted(duplicates), sorted(forgotten), log, positions)

    def take(self, user: str, wanted: Wanted) -> None:
        if not wanted.accepted:
            return
        self.version = self.last_version = self.last_version + 1
        self.log = wanted.log
        for (event, when), position in zip(wanted.accepted, wanted.positions, strict=True):
            self.ids |= {event.event_id} - {None}
            self.seen += [event.item_id] if event.item_id not in self.seen else []
            self._remember(event, when, key_of(user, event.item_id, position), position > 0)

    def forgotten(self, when: float) -> Person:
        """What is left: nobody, whose next version follows the last one and whose earlier events are refused."""
        return Person(last_version=self.last_version, forgotten_until=when)

    def _remember(self, event: EventIn, when: float, key: np.ndarray, shared: bool) -> None:
        for entry in self.bank:
            if entry.item == event.item_id:
                entry.again(event, when, key, shared)
                return
        self.bank.append(Entry(event.item_id, key.astype("<f2"), when, event.rating, shared))
        if len(self.bank) > CAPACITY:
            self._prune()

    def _prune(self) -> None:
        worth = self._worth()
        mean = sum(worth) / len(worth)
        floor = mean - RULES.prune_std * math.sqrt(sum((one - mean) ** 2 for one in worth) / len(worth))
        lowest = min(worth[:-1])  # the last one is the one just written
        kept = [
            entry for entry, one in zip(self.bank[:-1], worth[:-1], strict=True) if one >= floor and one > lowest
        ] + self.bank[-1:]
        self.pruned += len(self.bank) - len(kept)
        self.bank = kept

    def _worth(self) -> list[float]:
        oldest_first = sorted(range(len(self.bank)), key=lambda slot: self.bank[slot].time)
        age = {slot: len(self.bank) - 1 - rank for rank, slot in enumerate(oldest_first)}
        total = RULES.weight_frequency + RULES.weight_recency + RULES.weight_rating
        return [
            (
                RULES.weight_frequency * min(1.0, math.log(entry.frequency) / math.log(16))
                + RULES.weight_recency * 2 ** (-age[slot] / RULES.half_life_entries)
                + RULES.weight_rating * (0.5 if entry.rating is None else (entry.rating - 1) / 4)
            )
            / total
            for slot, entry in enumerate(self.bank)
        ]


def _positions(log: list[tuple[str, float]], accepted: list[tuple[EventIn, float]]) -> list[int]:
    """Where each accepted event stands in the log: of equal ones, the first stands first."""
    taken: set[int] = set()
    for event, when in reversed(accepted):
        last = max(n for n, one in enumerate(log) if one == (event.item_id, when) and n not in taken)
        taken.add(last)
    return sorted(taken)
