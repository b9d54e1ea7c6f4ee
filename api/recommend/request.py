"""First stage: requests as they arrive, and in the terms of a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from api.http.schemas.fields import Scope
from api.http.schemas.recommend import RecommendRequest
from api.models.engine import Engine
from model.memory import rules
from model.memory.collective.layout import LAST
from model.serving.recommender import NO_ITEMS

SCOPES: tuple[Scope, ...] = ("own", "collective")
"""Scopes that a request can name."""
NO_LAST: NDArray[np.uint32] = np.zeros(LAST, "<u4")


class TimedRequest(NamedTuple):
    """A request, and the time that it is answered for, in seconds UTC."""

    request: RecommendRequest
    at: float


def timed(requests: Sequence[RecommendRequest]) -> list[TimedRequest]:
    """Requests that arrived together: those that name no time are answered for now, all for the same time."""
    now = time.time()
    return [TimedRequest(request, now if request.timestamp is None else request.timestamp) for request in requests]


def wants(request: RecommendRequest, scope: Scope) -> bool:
    """Whether memories of a scope are to be used."""
    return request.scopes is None or scope in request.scopes


@dataclass(frozen=True)
class ParsedBatch:
    """B requests in the terms of one model; every column has length B.

    times (B,) float64: what they are answered for, seconds UTC. sequences: item indices (n,) int64 of each request's
    sequence, without unknown items. last: catalogue numbers (LAST,) uint32 of the newest items of each sequence, newest
    first, 0 = none. unknown_items: ids in sequence and candidates that the model does not know. entropy (B,) float32:
    of the sequences; neutral without one.
    """

    engine: Engine
    requests: Sequence[RecommendRequest]
    times: NDArray[np.float64]
    sequences: Sequence[NDArray[np.int64]]
    last: Sequence[NDArray[np.uint32]]
    unknown_items: Sequence[list[str]]
    entropy: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.requests)

    def take(self, rows: Sequence[int]) -> ParsedBatch:
        """The batch of some rows."""
        return replace(
            self,
            requests=[self.requests[row] for row in rows],
            times=self.times[rows],
            sequences=[self.sequences[row] for row in rows],
            last=[self.last[row] for row in rows],
            unknown_items=[self.unknown_items[row] for row in rows],
            entropy=self.entropy[rows],
        )


def parse(engine: Engine, requests: Sequence[TimedRequest]) -> ParsedBatch:
    """Requests in the terms of the engine's model."""
    asked = [request.request for request in requests]
    sequences = [_sequence(engine, request) for request in asked]
    return ParsedBatch(
        engine=engine,
        requests=asked,
        times=np.array([request.at for request in requests], np.float64),
        sequences=sequences,
        last=[_last_of(engine, request) for request in asked],
        unknown_items=[_unknown_items(engine, request) for request in asked],
        entropy=_entropy(engine, sequences),
    )


def newest(numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The newest of some items (n,), which are oldest first: (LAST,), newest first, 0 = none."""
    last = numbers[: -LAST - 1 : -1]
    return np.pad(last, (0, LAST - len(last)))


def _sequence(engine: Engine, request: RecommendRequest) -> NDArray[np.int64]:
    if not request.sequence:
        return NO_ITEMS
    index_of = engine.recommender.index_of
    return np.array([index_of[item] for item in request.sequence if item in index_of], np.int64)


def _last_of(engine: Engine, request: RecommendRequest) -> NDArray[np.uint32]:
    if not request.sequence:
        return NO_LAST
    return newest(np.array(engine.catalogue.numbers(request.sequence), "<u4"))


def _unknown_items(engine: Engine, request: RecommendRequest) -> list[str]:
    if request.sequence is None and request.candidates is None:
        return []
    index_of = engine.recommender.index_of
    named = (*(request.sequence or ()), *(request.candidates or ()))
    return list(dict.fromkeys(item for item in named if item not in index_of))


def _entropy(engine: Engine, sequences: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    clusters = engine.recommender.checkpoint.item_clusters
    entropy = np.full(len(sequences), rules.NEUTRAL, np.float32)
    for row, sequence in enumerate(sequences):
        if len(sequence):
            count, weights = engine.recommender.config.rules.clusters, np.ones((1, len(sequence)))
            entropy[row] = rules.entropy(weights, clusters[sequence][None], count)[0]
    return entropy
