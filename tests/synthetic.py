"""Small made-up data and models of known properties, for tests."""

from __future__ import annotations

import numpy as np

from model.checkpoint import Checkpoint
from model.config import Config, EncoderConfig, FusionConfig, RulesConfig, TrainingConfig
from model.data.dataset import Dataset
from model.memory.bank import Banks
from model.memory.habits import FEATURES
from model.memory.retrieval import Entries, Retrieved
from model.network.encoder import SequenceEncoder
from model.network.fusion import MemoryFusion
from model.training.optimisation import named_weights

ACTIVATION = {name: round(0.9 * (-1) ** n / (n % 5 + 1), 3) for n, name in enumerate(FEATURES)} | {"similarity": 2.0}
"""Weights of every sign for all that a memory tells."""


def small_config(encoder: dict[str, object] | None = None, **training: object) -> Config:
    shape = {"dim": 16, "layers": 1, "heads": 2, "window": 8, "dropout": 0.1}
    return Config(
        encoder=EncoderConfig(**shape | (encoder or {})),
        rules=RulesConfig(capacity=10, clusters=4, k_max=6, k_base=5, similarity_threshold=-1.0),
        fusion=FusionConfig(heads=2),
        training=TrainingConfig(
            **{"max_epochs": 3, "fusion_max_epochs": 2, "batch_tokens": 256, "threads": 1} | training
        ),
    )


def habitual_config(**rules: object) -> Config:
    """A model that retrieves by habits."""
    config = small_config()
    return config.model_copy(update={"rules": config.rules.model_copy(update={"activation": ACTIVATION, **rules})})


def cyclic_dataset(users: int = 40, items: int = 12, length: int = 15, seed: int = 0) -> Dataset:
    """Every user walks round the items from a place of their own: the next item follows from the last one."""
    start = np.random.default_rng(seed).integers(0, items, users)
    sequences = (start[:, None] + np.arange(length)) % items + 1
    return Dataset(
        user_ids=tuple(f"u{n}" for n in range(users)),
        item_ids=tuple(f"i{n}" for n in range(1, items + 1)),
        offsets=np.arange(users + 1) * length,
        items=sequences.ravel().astype(np.int32),
        times=np.tile(np.arange(length, dtype=float) * 1000, users),
        ratings=np.tile(np.float32([1, 3, 5]), users * length)[: users * length],
        has_times=True,
        has_ratings=True,
    )


def random_checkpoint(config: Config | None = None, items: int = 30, seed: int = 0) -> Checkpoint:
    """An untrained model with everything a service needs."""
    import torch

    config = config or small_config()
    torch.manual_seed(seed)
    encoder = SequenceEncoder(config.encoder, items)
    fusion = MemoryFusion(config.fusion, config.encoder.dim)
    with torch.no_grad():  # far from their small starts, so that differences show
        encoder.item.weight[1:].normal_()
        fusion.repeat_bias.fill_(-1.5)
        fusion.unknown.normal_()
        fusion.shift.normal_()
        fusion.copy.share[-1].bias.fill_(-0.5)
        if config.rules.activation:
            fusion.repeats.layers[-1].weight.normal_()
            fusion.repeats.seen.fill_(0.5)
            fusion.repeats.present.fill_(-2.0)
    rng = np.random.default_rng(seed)
    width = config.encoder.width
    return Checkpoint(
        config=config,
        item_ids=tuple(f"i{n}" for n in range(1, items + 1)),
        item_clusters=np.append(-1, np.arange(items) % config.rules.clusters).astype(np.int32),
        popularity=np.append(0, np.arange(items, 0, -1) / (items * (items + 1) / 2)).astype(np.float32),
        key_span=span_of(width),
        key_plane=np.linalg.qr(rng.normal(size=(width, 3)))[0].T.astype(np.float32),
        item_near=near_items(items, rng),
        item_nearness=np.tile(np.float32([1.0, 0.5, 0.25]), (items + 1, 1)),
        weights=named_weights(encoder, "encoder.") | named_weights(fusion, "fusion."),
        metadata={"i1": {"title": "One"}},
    )


def span_of(width: int) -> np.ndarray:
    """Where most dimensions of unit vectors of any direction lie, see `model.memory.collective.layout.Layout`."""
    reach = 2.5 / np.sqrt(width)
    return np.float32([[-reach] * width, [reach] * width])


def near_items(items: int, rng: np.random.Generator) -> np.ndarray:
    """Three neighbours of each item, none of padding."""
    near = rng.integers(1, items + 1, (items + 1, 3)).astype(np.int32)
    near[0] = 0
    return near


def random_memories(rows: int, width: int, items: int, seed: int = 0, empty_row: bool = True) -> Retrieved:
    """Memories of `rows` users from both scopes, with habits; the last user has none."""
    rng = np.random.default_rng(seed)

    def entries() -> Entries:
        count = rng.integers(1, width + 1, rows)
        if empty_row:
            count[-1] = 0
        valid = np.arange(width) < count[:, None]
        real = [np.where(valid, rng.random((rows, width)), 0).astype(np.float32) for _ in range(4)]
        return Entries(np.where(valid, rng.integers(1, items + 1, (rows, width)), 0), *real, valid)

    own, others = entries(), entries()
    k, entropy = own.valid.sum(axis=1), rng.random(rows).astype(np.float32)
    told = np.where(own.valid[..., None], rng.normal(size=(rows, width, len(FEATURES))), 0).astype(np.float32)
    present = np.where(np.arange(rows)[:, None] % 2, own.item[:, :1], 0)
    return Retrieved(entropy, k, k * 2, own, others, others.valid.sum(axis=1), told, present)


def random_banks(users: int, events: int, dim: int, rules: RulesConfig, items: int = 30, seed: int = 0) -> Banks:
    from model.memory.rules import unit

    rng = np.random.default_rng(seed)
    banks = Banks(users, dim, rules)
    for step in range(events):
        keys = unit(rng.normal(size=(users, dim)))
        item = rng.integers(1, items + 1, users)
        rating = rng.integers(1, 6, users).astype(np.float32)
        banks.write(np.arange(users), item, keys, np.full(users, step * 3600.0), rating)
    return banks
