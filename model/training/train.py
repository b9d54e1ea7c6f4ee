"""Training: first the encoder, then the fusion on events that the encoder was not trained on.

The encoder is over-confident on events that it was trained on, and would teach the gate to ignore memory. Therefore the
fusion is fitted on users held out from the encoder, or on validation items, which follow all training events as
requests do. Memories and queries come from this one encoder; a checkpoint holds both.
An interrupted run resumes where it stopped: weights, optimiser and best epoch are saved after every epoch, and all
random numbers of an epoch depend on the seed and the epoch alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from model.checkpoint import Checkpoint, save_checkpoint
from model.config import Config, TrainingConfig
from model.data.dataset import Dataset, split_of
from model.data.interactions import DatasetError
from model.memory.collective.layout import Layout
from model.network.encoder import SequenceEncoder
from model.network.fusion import MemoryFusion
from model.training.collective_layout import layout_of, plane_of, sampled_keys
from model.training.distributed import ALONE, Peers
from model.training.encoder_stage import fit_encoder
from model.training.fusion_stage import fit_fusion
from model.training.memory_rules import fit_rules, measured_rules
from model.training.optimisation import Report, named_weights
from model.training.replay import MemorySpace, trajectory


def train(
    dataset: Dataset, config: Config, run: Path, report: Report = lambda epoch: None, peers: Peers = ALONE
) -> Checkpoint:
    """Fit encoder and fusion, write the checkpoint to `run` and return it. Resumes an interrupted run of equal config.

    With several `peers`, every process calls this with the same data, config and folder. The first one reports and
    writes; the checkpoint that the others return has no version. Training runs on the device of `peers`.

    Raises:
        PeersError: the processes do not resume from the same state.
        TrainingError: a loss was not finite, or `run` holds the state of another config or dataset.
        DatasetError: no user has three events, as training, validation and test need one each.
    """
    if not (split_of(dataset).validation >= 0).any():
        raise DatasetError("no user has three events (or baskets): training, validation and test need one each")
    config = fitted_config(config, dataset)
    if config.training.threads:
        torch.set_num_threads(max(1, config.training.threads // peers.size))
    held_out = hold_out(dataset.users, config.training)
    report = report if peers.is_first else lambda epoch: None
    encoder = fit_encoder(dataset, config, ~held_out, run, report, peers)
    keys = sampled_keys(dataset, encoder, config)
    space = _shared(memory_space(dataset, encoder, config, keys), peers)
    state = trajectory(dataset, encoder)
    space = replace(space, rules=fit_rules(dataset, state, space, config.training))
    fusion, exclude_seen = fit_fusion(dataset, config, encoder, state, space, held_out, report, peers)
    rules = space.rules.model_copy(update={"exclude_seen": exclude_seen})
    config = config.model_copy(update={"rules": rules, "fusion": fusion.config})
    checkpoint = _checkpoint(dataset, config, encoder, fusion, space, peers.from_first(plane_of(keys)))
    if not peers.is_first:
        return checkpoint
    return replace(checkpoint, version=save_checkpoint(run, checkpoint))


def _checkpoint(
    dataset: Dataset,
    config: Config,
    encoder: SequenceEncoder,
    fusion: MemoryFusion,
    space: MemorySpace,
    plane: NDArray[np.float32],
) -> Checkpoint:
    """The checkpoint of fitted networks, not saved yet."""
    return Checkpoint(
        config=config,
        item_ids=dataset.item_ids,
        metadata={item: dataset.metadata[item] for item in dataset.item_ids if item in dataset.metadata},
        weights=named_weights(encoder, "encoder.") | named_weights(fusion, "fusion."),
        item_clusters=space.clusters,
        popularity=space.layout.popularity,
        key_span=space.layout.span,
        key_plane=plane,
        item_near=space.layout.near,
        item_nearness=space.layout.nearness,
    )


def fitted_config(config: Config, dataset: Dataset) -> Config:
    """The config with settings that depend on the data: the unit of time, a wider range of ratings, and how often users
    come back to items.
    """
    found: dict[str, Any] = {"time_unit": "seconds" if dataset.has_times else "position"}
    if dataset.has_ratings:
        found["rating_min"] = min(config.rules.rating_min, float(np.nanmin(dataset.ratings)))
        found["rating_max"] = max(config.rules.rating_max, float(np.nanmax(dataset.ratings)))
    rules = measured_rules(dataset, config.rules.model_copy(update=found))
    return config.model_copy(update={"rules": rules})


def hold_out(users: int, config: TrainingConfig) -> NDArray[np.bool_]:
    """(users,) bool: users kept from the encoder, drawn by the seed; none if `fusion_targets` needs none."""
    chosen = np.zeros(users, bool)
    if config.fusion_targets == "validation":
        return chosen
    order = np.random.default_rng([config.seed, 1]).permutation(users)
    chosen[order[: max(1, round(users * config.held_out_users))]] = True
    return chosen


def memory_space(dataset: Dataset, encoder: SequenceEncoder, config: Config, keys: NDArray[np.float32]) -> MemorySpace:
    """Rules, item clusters and index layout for a fitted encoder. keys (n, d): a sample of the keys of entries."""
    return MemorySpace(config.rules, cluster_items(encoder, config), layout_of(dataset, encoder, keys))


def _shared(space: MemorySpace, peers: Peers) -> MemorySpace:
    """The memory space of the first process."""
    layout = space.layout
    shared = Layout(
        peers.from_first(layout.near),
        peers.from_first(layout.nearness),
        peers.from_first(layout.span),
        peers.from_first(layout.popularity),
    )
    return replace(space, clusters=peers.from_first(space.clusters), layout=shared)


def cluster_items(encoder: SequenceEncoder, config: Config) -> NDArray[np.int32]:
    """k-means clusters of the directions of item embeddings, (items + 1,) int32; −1 for padding."""
    vectors = functional.normalize(encoder.item.weight[1:].detach(), dim=1).cpu().numpy()
    clusters = min(config.rules.clusters, len(vectors))
    centroids = _spherical_kmeans(vectors, clusters, config.training.seed)
    return np.concatenate([[-1], np.argmax(vectors @ centroids.T, axis=1)]).astype(np.int32)


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
