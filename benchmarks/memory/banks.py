"""Synthetic banks of the size that the targets assume: d 64, 75 entries per user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memory_service.store.store import Store
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import Config, EncoderConfig
from model.memory.bank import Banks
from model.memory.collective.layout import cells
from model.memory.habits import first_taken
from model.memory.record import UserRecord
from model.memory.rules import unit

DIM, ENTRIES, ITEMS = 64, 75, 3000
START, HOUR = 1.7e9, 3600.0
NOISE = 0.5
"""Length of the noise that is added to the direction of the previous item to make a key."""
NEIGHBOURS = 16
CHUNK = 500


def checkpoint(folder: Path) -> Checkpoint:
    """Write a checkpoint with random weights to a folder: all that a memory service needs for such banks."""
    import torch

    from model.network.encoder import SequenceEncoder
    from model.network.fusion import MemoryFusion
    from model.training.optimisation import named_weights

    config = Config(encoder=EncoderConfig(dim=DIM, layers=1, heads=2))
    torch.manual_seed(0)
    encoder = SequenceEncoder(config.encoder, ITEMS)
    made = Checkpoint(
        config=config,
        item_ids=tuple(f"i{n}" for n in range(1, ITEMS + 1)),
        item_clusters=np.append(-1, np.arange(ITEMS) % config.rules.clusters).astype(np.int32),
        popularity=np.append(0, np.full(ITEMS, 1 / ITEMS)).astype(np.float32),
        weights=named_weights(encoder, "encoder.") | named_weights(MemoryFusion(config.fusion, DIM), "fusion."),
        metadata={},
        **tables(ITEMS, DIM),
    )
    save_checkpoint(folder, made)
    return load_checkpoint(folder, with_weights=False)


def tables(items: int, width: int) -> dict[str, Any]:
    """The tables of a checkpoint for a collective index: keys in all directions, neighbours drawn at random."""
    rng, reach = np.random.default_rng(0), np.full(width, 2.5 / np.sqrt(width), np.float32)
    near = rng.integers(1, items + 1, (items + 1, NEIGHBOURS)).astype(np.int32)
    near[0] = 0
    return {
        "key_span": np.stack([-reach, reach]),
        "key_plane": np.linalg.qr(rng.normal(size=(width, 3)))[0].T.astype(np.float32),
        "item_near": near,
        "item_nearness": np.where(near > 0, np.float32(1), np.float32(0)),
    }


def user(n: int) -> str:
    return f"user-{n:07d}"


def records(of: Checkpoint, users: range, seed: int = 0, entries: int = ENTRIES) -> Iterator[list[UserRecord]]:
    """Records of users, CHUNK at a time; each key lies around a direction of the previous item."""
    directions = unit(np.random.default_rng(0).standard_normal((ITEMS + 1, DIM), np.float32))
    for at in range(users.start, users.stop, CHUNK):
        count = min(CHUNK, users.stop - at)
        rng = np.random.default_rng((seed, at))
        items = (rng.integers(0, ITEMS, (count, 1)) + 37 * np.arange(entries)) % ITEMS + 1
        before = np.pad(items, ((0, 0), (2, 0)))
        cell = cells(before[:, 1:-1].ravel(), before[:, :-2].ravel()).reshape(items.shape)
        noise = rng.standard_normal((count, entries, DIM), np.float32) / np.sqrt(DIM)
        keys = unit(directions[before[:, 1:-1]] + NOISE * noise)
        states = unit(directions[items[:, -1]] + NOISE * noise[:, -1])
        yield [_record(of, keys[row], cell[row], items[row], states[row]) for row in range(count)]


def _record(of: Checkpoint, keys: np.ndarray, cell: np.ndarray, items: np.ndarray, state: np.ndarray) -> UserRecord:
    entries = len(items)
    times = START + HOUR * np.arange(entries)
    banks = Banks(1, DIM, of.config.rules)
    columns = {"item": items, "cell": cell, "frequency": 1, "rating": np.nan, "time": times, "first_time": times}
    columns |= {"occasion": np.arange(1, entries + 1), "sums": first_taken(times)}
    for name, values in columns.items():
        banks.fields[name][0, :entries] = values
    banks.key[0, :entries], banks.size[0], banks.occasions[0] = keys, entries, entries
    return UserRecord(
        banks=banks,
        version=1,
        model_version=of.version,
        events=entries,
        log_item=items.astype("<u4"),
        log_time=times,
        seen=items.astype("<u4"),
        event_ids=np.arange(1, entries + 1, dtype="<u8"),
        state=state.astype("<f4"),
    )


async def fill(url: str, of: Checkpoint, users: range, entries: int = ENTRIES) -> None:
    """Write the records of users directly to Redis."""
    store = Store(url, of.config.rules, 30.0)
    at = users.start
    for chunk in records(of, users, entries=entries):
        await store.commit([(user(at + n), 0, record) for n, record in enumerate(chunk)])
        at += len(chunk)
    await store.close()
