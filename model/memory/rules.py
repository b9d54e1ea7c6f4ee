"""The memory rules, as pure functions of numpy arrays.

Training, evaluation and serving all use these functions to decide what a memory is worth, which memories are forgotten,
how diverse a user is and how many memories to retrieve. They do not change their arguments.
Source: "Dynamic Memory-Augmented Sequential Recommendation with Adaptive Retrieval" (RAM, AKR). Where a rule differs
from the paper, its docstring says so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.config import RulesConfig

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

NEUTRAL = 0.5
"""Entropy of a bank that is too small to have one, and rating term of an event without a rating."""
SATURATION = 16
"""Frequency or access count at which its quality term reaches 1."""


def window_start(length: int | Ints, window: int, stride: int) -> Ints:
    """Position of the first item in the window of the state after `length` items.

    It is 0 up to `window` items, then moves in steps of `stride`. It depends on the absolute position alone, so states
    do not depend on how events were divided into requests.

    >>> window_start(np.array([0, 8, 9, 10, 11]), window=8, stride=2).tolist()
    [0, 0, 2, 2, 4]
    """
    beyond = np.maximum(np.asarray(length, dtype=np.int64) - window, 0)
    return -(-beyond // stride) * stride


def age_recency(time: Floats, valid: Bools, rules: RulesConfig) -> NDArray[np.float32]:
    """How recent each entry is: 1 for the newest of its bank, half of that after every half-life.

    Args:
        time: (B, C) event times in s, or any increasing numbers if `time_unit` is "position".
        valid: (B, C) True where there is an entry.

    Returns:
        (B, C) float32 in [0, 1]; 0 where not valid. If `time_unit` is "position", the age of an entry is the number of
        newer entries; among equal times the later slot is newer.
    """
    if rules.time_unit == "position":
        order = np.argsort(np.where(valid, time, np.inf), axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(time.shape[1]), time.shape), axis=1)
        age = valid.sum(axis=1, keepdims=True) - 1 - rank
        half_lives = age / rules.half_life_entries
    else:
        newest = np.max(np.where(valid, time, -np.inf), axis=1, keepdims=True, initial=-np.inf)
        half_lives = np.where(valid, newest - np.where(valid, time, 0.0), 0.0) / rules.half_life_s
    return np.where(valid, np.exp2(-np.maximum(half_lives, 0.0)), 0.0).astype(np.float32)


def rating_term(rating: Floats, rules: RulesConfig) -> NDArray[np.float32]:
    """Ratings of any shape scaled to [0, 1]; NaN (no rating) gives NEUTRAL."""
    scaled = (rating - rules.rating_min) / (rules.rating_max - rules.rating_min)
    return np.where(np.isnan(scaled), NEUTRAL, np.clip(scaled, 0.0, 1.0)).astype(np.float32)


def quality(frequency: Ints, recency: Floats, access: Ints, rating: Floats, rules: RulesConfig) -> NDArray[np.float32]:
    """Quality of memories: the weighted mean of four terms in [0, 1]. All arguments have one shape.

    The terms of frequency and access grow with the logarithm of the counts. rating: as given, NaN = none.
    """
    worth = sum(_quality_terms(frequency, recency, access, rating, rules).values()) / _quality_weight(rules)
    return np.asarray(worth, dtype=np.float32)


def quality_parts(
    frequency: Ints, recency: Floats, access: Ints, rating: Floats, rules: RulesConfig
) -> dict[str, NDArray[np.float32]]:
    """What each of the four terms contributes to the quality, by name; they sum to it. Arguments: see `quality`."""
    terms, weight = _quality_terms(frequency, recency, access, rating, rules), _quality_weight(rules)
    return {name: np.asarray(term / weight, dtype=np.float32) for name, term in terms.items()}


def _quality_terms(
    frequency: Ints, recency: Floats, access: Ints, rating: Floats, rules: RulesConfig
) -> dict[str, Floats]:
    terms = {
        "frequency": (rules.weight_frequency, np.log(np.maximum(frequency, 1)) / np.log(SATURATION)),
        "recency": (rules.weight_recency, recency),
        "access": (rules.weight_access, np.log1p(access) / np.log1p(SATURATION)),
        "rating": (rules.weight_rating, rating_term(rating, rules)),
    }
    return {name: weight * np.clip(term, 0.0, 1.0) for name, (weight, term) in terms.items()}


def _quality_weight(rules: RulesConfig) -> float:
    return rules.weight_frequency + rules.weight_recency + rules.weight_access + rules.weight_rating


def ema_weight(frequency: Ints) -> NDArray[np.float32]:
    """Weight α of the old key when an item is taken for the `frequency`-th time (paper): min(.9, .7 + .05 ln f)."""
    grown = 0.7 + 0.05 * np.log(np.maximum(frequency, 1))
    return np.minimum(0.9, grown).astype(np.float32)


def unit(vectors: Floats) -> NDArray[np.float32]:
    """Vectors (..., d) scaled to length 1; a zero vector stays zero."""
    wide = vectors.astype(np.float32)
    length = np.sqrt(np.einsum("...d,...d->...", wide, wide))[..., None]
    return np.asarray(wide / np.maximum(length, 1e-12), dtype=np.float32)


def blend_keys(old: Floats, new: Floats, frequency: Ints) -> NDArray[np.float32]:
    """Key of an item taken again, normalise(α·old + (1−α)·new), (B, d). frequency (B,): including the new event."""
    alpha = ema_weight(frequency)[:, None]
    return unit(alpha * old.astype(np.float32) + (1.0 - alpha) * new.astype(np.float32))


def weak_entries(worth: Floats, valid: Bools, protected: Bools, rules: RulesConfig) -> Bools:
    """Which entries of banks over capacity are pruned, (B, C). worth, valid, protected: (B, C).

    These are all entries below the adaptive threshold mean(q) − c·std(q), and always the lowest one (of equals, the
    earliest slot). If `eviction` is not "quality", it is the lowest one alone. The entry just written is `protected`,
    so that pruning never undoes a write. Banks must hold at least two entries.
    """
    candidate = valid & ~protected
    weak = candidate & (worth < pruning_threshold(worth, valid, rules)) & (rules.eviction == "quality")
    lowest = np.argmin(np.where(candidate, worth, np.inf), axis=1)
    weak[np.arange(len(weak)), lowest] = True
    return np.asarray(weak, bool)


def pruning_threshold(worth: Floats, valid: Bools, rules: RulesConfig) -> NDArray[np.float64]:
    """Quality below which a bank over capacity forgets, mean(q) − c·std(q), (B, 1). Banks must not be empty."""
    count = valid.sum(axis=1, keepdims=True)
    known = np.where(valid, worth.astype(np.float64), 0.0)
    mean = known.sum(axis=1, keepdims=True) / count
    variance = np.where(valid, (worth - mean) ** 2, 0.0).sum(axis=1, keepdims=True) / count
    return np.asarray(mean - rules.prune_std * np.sqrt(variance), np.float64)


def scrambled(item: Ints, time: Floats) -> NDArray[np.float32]:
    """A number in [0, 1) that looks random but is a function of item and time: repeatable random eviction."""
    mixed = item.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ time.astype(np.float64).view(np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return ((mixed >> np.uint64(40)) / np.float64(1 << 24)).astype(np.float32)


def cluster_shares(weights: Floats, cluster: Ints, clusters: int) -> NDArray[np.float64]:
    """Distribution of weight over item clusters, (B, clusters); rows sum to 1, or to 0 without any weight.

    Args:
        weights: (B, C) ≥ 0.
        cluster: (B, C) cluster of each entry; −1: none (padding, or an item that the model does not know).
    """
    rows = np.arange(len(weights))[:, None]
    known = cluster >= 0
    flat = np.where(known, rows * clusters + cluster, 0)
    mass = np.where(known, weights.astype(np.float64) + 1e-9, 0.0)
    shares = np.bincount(flat.ravel(), mass.ravel(), minlength=len(weights) * clusters)
    shares = shares[: len(weights) * clusters].reshape(len(weights), clusters)
    total = shares.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(shares, total, out=np.zeros_like(shares), where=total > 0), np.float64)


def entropy(weights: Floats, cluster: Ints, clusters: int) -> NDArray[np.float32]:
    """How diverse each user is: Shannon entropy over item clusters, divided by its maximum, (B,) in [0, 1].

    The maximum is ln(min(n, clusters)), where n is the number of entries with a cluster; n ≤ 1 gives 0.5. The paper
    takes a softmax over pairwise similarities, which is near 1 for every user; it is not offered. Arguments: see
    `cluster_shares`.

    >>> entropy(np.ones((2, 4)), np.array([[0, 1, 2, 3], [0, 0, 0, 0]]), 8).tolist()
    [1.0, 0.0]
    """
    shares = cluster_shares(weights, cluster, clusters)
    positive = np.where(shares > 0, shares, 1.0)
    raw = -(shares * np.log(positive)).sum(axis=1)
    count = (cluster >= 0).sum(axis=1)
    largest = np.log(np.maximum(np.minimum(count, clusters), 2))
    diversity = np.clip(np.abs(raw) / largest, 0.0, 1.0)
    return np.where(count <= 1, NEUTRAL, diversity).astype(np.float32)


def own_k(diversity: Floats, size: Ints, rules: RulesConfig) -> NDArray[np.int64]:
    """How many memories to retrieve from a user's own bank, (B,); 0 for an empty bank. diversity, size: (B,).

    round(base·(0.5 + H)·sqrt(n / capacity)), clamped to [k_min, min(k_max, n)]. `k_rule` "paper" is the published
    rule, whose growth term is min(1, sqrt(n / 100)).
    """
    n = np.asarray(size, dtype=np.int64)
    wanted = _half_up(rules.k_base * (0.5 + diversity.astype(np.float64)) * k_growth(n, rules))
    return np.minimum(np.clip(wanted, rules.k_min, rules.k_max), n)


def k_growth(size: Ints, rules: RulesConfig) -> NDArray[np.float64]:
    """The growth term of `own_k` for banks of this size (B,): (B,) in [0, 1]."""
    n = np.asarray(size, dtype=np.int64)
    return np.minimum(1.0, np.sqrt(n / 100.0)) if rules.k_rule == "paper" else np.sqrt(n / rules.capacity)


def collective_k(diversity: Floats, rules: RulesConfig) -> NDArray[np.int64]:
    """How many memories to retrieve from other users, (B,). It depends on entropy alone: new users need them most."""
    wanted = _half_up(rules.collective_k_base * (0.5 + diversity.astype(np.float64)))
    return np.clip(wanted, rules.collective_k_min, rules.collective_k_max)


def _half_up(values: Floats) -> NDArray[np.int64]:
    return np.asarray(np.floor(values + 0.5), np.int64)
