"""Entries as in a large service: sequences in which items follow each other as in a log, with keys computed from the
previous items, as an encoder with a sketch computes them, but without an encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from model.config import RulesConfig
from model.data.dataset import Dataset, training_part
from model.memory.bank import Banks
from model.memory.collective.layout import LAST, Layout, cells
from model.memory.rules import unit
from model.training.collective_layout import SPAN, best_neighbours, followers

DIM = 128
ENTRIES = 10
"""Entries of a user; the first is made before any item, so it is not shared."""
FOLLOWS, FOLLOWS_BEFORE = 0.6, 0.2
"""How often an item is drawn from those that followed the last one in the log, or the one before; else any."""
STATE_DECAY, SKETCH_DECAY, NOISE = 0.8, 0.5, 0.3
CHUNK = 20_000
"""Users generated at a time."""


@dataclass(frozen=True)
class World:
    """Items of a log: which follow which, how popular they are, and two random directions (items + 1, 64) of each."""

    starts: np.ndarray
    after: np.ndarray
    weight: np.ndarray
    popular: np.ndarray
    vectors: np.ndarray
    sketches: np.ndarray
    layout: Layout

    @classmethod
    def of(cls, dataset: Dataset) -> World:
        """The world of a log, with the layout that training would compute from it."""
        before, after, often = followers(dataset)
        counts = np.bincount(dataset.items[training_part(dataset)], minlength=dataset.item_count + 1)
        starts = np.searchsorted(before, np.arange(len(counts) + 1))
        rng = np.random.default_rng(0)
        vectors, sketches = (unit(rng.normal(size=(len(counts), DIM // 2))) for _ in range(2))
        vectors[0] = sketches[0] = 0
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        near, nearness = best_neighbours((before, after, often), nothing, counts)
        spread = SPAN / np.sqrt(DIM)
        span = np.array([[-spread] * DIM, [spread] * DIM], np.float32)
        popularity = (counts / counts.sum()).astype(np.float32)
        layout = Layout(near, nearness, span, popularity)
        return cls(starts, after, np.cumsum(often), np.cumsum(popularity), vectors, sketches, layout)

    def sequences(self, users: int, rng: np.random.Generator) -> np.ndarray:
        """(users, ENTRIES) items."""
        items = np.zeros((users, ENTRIES + 2), np.int64)
        for place in range(2, ENTRIES + 2):
            draw = rng.random(users)
            behind = np.where(draw < FOLLOWS + FOLLOWS_BEFORE, items[:, place - 2], 0)
            led = np.where(draw < FOLLOWS, items[:, place - 1], behind)
            items[:, place] = self._next(led, rng.random(users))
        return items[:, 2:]

    def _next(self, led: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """An item that followed each of these; if none did, any, by popularity."""
        low, high = self.starts[led], self.starts[led + 1]
        base = np.append(0.0, self.weight)
        found = np.searchsorted(self.weight, base[low] + draw * (base[high] - base[low]), side="right")
        follower = self.after[np.clip(found, low, np.maximum(high - 1, low)).clip(max=len(self.after) - 1)]
        popular = np.searchsorted(self.popular, draw * self.popular[-1], side="right").clip(1, len(self.popular) - 1)
        return np.where((high > low) & (led > 0), follower, popular)

    def keys(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(users, ENTRIES, DIM) float16: the key before each of the items (users, ENTRIES)."""
        users = len(items)
        state, sketch = np.zeros((users, DIM // 2)), np.zeros((users, DIM // 2))
        keys = np.zeros((users, ENTRIES, DIM), np.float16)
        for place in range(ENTRIES):
            noisy = unit(state) + NOISE * unit(rng.normal(size=state.shape))
            keys[:, place] = unit(np.concatenate([unit(noisy), unit(sketch)], axis=1))
            state = STATE_DECAY * state + self.vectors[items[:, place]]
            sketch = SKETCH_DECAY * sketch + self.sketches[items[:, place]]
        return keys

    def chunks(self, users: int, seed: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Items and keys of this many users, CHUNK at a time; always the same ones."""
        for at in range(0, users, CHUNK):
            rng = np.random.default_rng([seed, at])
            items = self.sequences(min(CHUNK, users - at), rng)
            yield items, self.keys(items, rng)


def banks_of(items: np.ndarray, keys: np.ndarray, rules: RulesConfig) -> Banks:
    """The users' banks with these items and keys."""
    users, count = items.shape
    banks = Banks(users, keys.shape[2], rules)
    padded = np.pad(items, ((0, 0), (2, 0)))
    cell = cells(padded[:, 1:-1].ravel(), padded[:, :-2].ravel()).reshape(users, count)
    columns = {"item": items, "cell": cell, "frequency": 1, "rating": np.nan, "time": np.arange(count) * 3600.0}
    for name, values in columns.items():
        banks.fields[name][:, :count] = values
    banks.key[:, :count], banks.size[:] = keys, count
    return banks


def last_of(items: np.ndarray) -> np.ndarray:
    """(users, LAST) the items that each user took before the last of these, newest first."""
    return np.asarray(items[:, -2 : -2 - LAST : -1])
