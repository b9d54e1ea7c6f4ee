"""Fitting: first the encoder, then the fusion on events that the encoder was not trained on.

The encoder is over-confident on events that it was trained on and would teach the gate to ignore memory. So the fusion
is fitted on users held out from the encoder, or on everybody's validation items, which come after all training
events as requests do; memories and queries come from this one encoder. Both ship together.
A run that was interrupted goes on where it was: weights, optimiser and best epoch are saved after every epoch, and
all randomness of an epoch follows from (seed, epoch).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from model.checkpoint import Checkpoint, save_checkpoint
from model.config import Config, TrainingConfig
from model.dataset import Dataset, training_part
from model.distributed import ALONE, Peers
from model.encoder import SequenceEncoder, encode_states
from model.encoder_training import fit_encoder
from model.fusion_training import fit_fusion
from model.habit_training import fit_rules, measured_rules
from model.optimisation import Report, named_weights
from model.replay import MemorySpace, state_requests, trajectory

LISTS_A_ROOT = 6
"""Lists of the collective index over √N keys. Many small lists find more in the same time than √N lists: see
`benchmarks/memory/lists.md`."""
KEYS_A_LIST = 32
"""Keys that a centroid is trained on."""


def train(
    dataset: Dataset, config: Config, run: Path, report: Report = lambda epoch: None, peers: Peers = ALONE
) -> Checkpoint:
    """Fit encoder and fusion, write the checkpoint to `run`, return it. Resumes an interrupted run of equal config.

    With `peers` every process calls this with the same data, config and folder; the first one reports and writes, and
    the others' checkpoint has no version.

    Raises:
        PeersError: the processes do not go on from the same state.
        TrainingError: a loss was not finite, or `run` holds the state of another config or dataset.
        DatasetError: no user has the three events that training, validation and test need.
    """
    config = fitted_config(config, dataset)
    if config.training.threads:
        torch.set_num_threads(max(1, config.training.threads // peers.size))
    held_out = hold_out(dataset.users, config.training)
    report = report if peers.is_first else lambda epoch: None
    encoder = fit_encoder(dataset, config, ~held_out, run, report, peers)
    space = _shared(memory_space(dataset, encoder, config), peers)
    state = trajectory(dataset, encoder)
    space = replace(space, rules=fit_rules(dataset, state, space, config.training))
    fusion, exclude_seen = fit_fusion(dataset, config, encoder, state, space, held_out, report, peers)
    rules = space.rules.model_copy(update={"exclude_seen": exclude_seen})
    checkpoint = Checkpoint(
        config=config.model_copy(update={"rules": rules, "fusion": fusion.config}),
        item_ids=dataset.item_ids,
        metadata={item: dataset.metadata[item] for item in dataset.item_ids if item in dataset.metadata},
        weights=named_weights(encoder, "encoder.") | named_weights(fusion, "fusion."),
        item_clusters=space.clusters,
        index_centroids=space.centroids,
        popularity=popularity(dataset),
    )
    if not peers.is_first:
        return checkpoint
    version = save_checkpoint(run, checkpoint)
    return replace(checkpoint, version=version)


def fitted_config(config: Config, dataset: Dataset) -> Config:
    """The config with what the data decides: the unit of time, the range of ratings where it is wider, how much people
    come back to things.
    """
    found: dict[str, Any] = {"time_unit": "seconds" if dataset.has_times else "position"}
    if dataset.has_ratings:
        found["rating_min"] = min(config.rules.rating_min, float(np.nanmin(dataset.ratings)))
        found["rating_max"] = max(config.rules.rating_max, float(np.nanmax(dataset.ratings)))
    rules = measured_rules(dataset, config.rules.model_copy(update=found))
    return config.model_copy(update={"rules": rules})


def hold_out(users: int, config: TrainingConfig) -> NDArray[np.bool_]:
    """(users,) True for those kept from the encoder; follows from the seed. Nobody, where the fusion needs nobody."""
    chosen = np.zeros(users, bool)
    if config.fusion_targets == "validation":
        return chosen
    order = np.random.default_rng([config.seed, 1]).permutation(users)
    chosen[order[: max(1, round(users * config.held_out_users))]] = True
    return chosen


def popularity(dataset: Dataset) -> NDArray[np.float32]:
    """Share of the training interactions that each item has, (items + 1,)."""
    counts = np.bincount(dataset.items[training_part(dataset)], minlength=dataset.item_count + 1)
    return np.asarray(counts / counts.sum(), np.float32)


def memory_space(dataset: Dataset, encoder: SequenceEncoder, config: Config) -> MemorySpace:
    """Item clusters and index centroids of a fitted encoder, beside the rules."""
    return MemorySpace(config.rules, cluster_items(encoder, config), collective_centroids(dataset, encoder, config))


def _shared(space: MemorySpace, peers: Peers) -> MemorySpace:
    """The first process's for all."""
    clusters, centroids = peers.from_first(space.clusters), peers.from_first(space.centroids)
    return replace(space, clusters=clusters, centroids=centroids)


def cluster_items(encoder: SequenceEncoder, config: Config) -> NDArray[np.int32]:
    """k-means clusters of the item embeddings by direction, (items + 1,) int32; −1 for padding."""
    vectors = functional.normalize(encoder.item.weight[1:].detach(), dim=1).numpy()
    clusters = min(config.rules.clusters, len(vectors))
    centroids = _spherical_kmeans(vectors, clusters, config.training.seed)
    return np.concatenate([[-1], np.argmax(vectors @ centroids.T, axis=1)]).astype(np.int32)


def collective_centroids(dataset: Dataset, encoder: SequenceEncoder, config: Config) -> NDArray[np.float32]:
    """Centroids of memory keys for the collective index, (lists, d) float32; about 6·√N lists, from a sample."""
    rng = np.random.default_rng([config.training.seed, 3])
    total = len(dataset)
    lists = int(np.clip(round(LISTS_A_ROOT * math.sqrt(total)), 1, max(1, total // KEYS_A_LIST)))
    sample = rng.choice(total, min(total, lists * KEYS_A_LIST), replace=False)
    states = encode_states(encoder, state_requests(dataset, sample, dataset.item_count))
    vectors = functional.normalize(torch.from_numpy(states), dim=1).numpy()
    return _spherical_kmeans(vectors, lists, config.training.seed, iterations=10)


def _spherical_kmeans(
    vectors: NDArray[np.float32], clusters: int, seed: int, iterations: int = 20
) -> NDArray[np.float32]:
    import faiss

    kmeans = faiss.Kmeans(
        vectors.shape[1],
        clusters,
        niter=iterations,
        seed=seed + 1,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=10_000,
    )
    kmeans.train(np.ascontiguousarray(vectors, np.float32))
    return np.asarray(kmeans.centroids, np.float32)
