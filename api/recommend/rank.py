"""Fourth stage: the best items for each request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from api.catalogue.catalogue import Indices
from api.http.schemas.recommend import RecommendRequest
from api.models.engine import Engine
from api.recommend.remember import RememberedBatch
from model.memory.ids import CatalogueNumbers
from model.serving.recommender import Query, Ranked

NO_STATE: NDArray[np.float32] = np.zeros(0, np.float32)


@dataclass(frozen=True)
class RankedBatch:
    """Remembered requests and their best items, one `Ranked` each; `indices` says which items these are."""

    remembered: RememberedBatch
    indices: Indices
    ranked: Sequence[Ranked]


async def rank_batch(batch: RememberedBatch) -> RankedBatch:
    """Rank for all requests in one pass, in the model's thread."""
    engine = batch.parsed.engine
    others = CatalogueNumbers(batch.retrieved.collective.item)
    indices = Indices(engine.catalogue, engine.recommender.index_of, others)
    return RankedBatch(batch, indices, await engine.compute(rank, batch, indices))


def rank(batch: RememberedBatch, indices: Indices) -> list[Ranked]:
    """The best items for each request: by the model where there is a state, otherwise the most popular ones."""
    engine, begin = batch.parsed.engine, time.perf_counter()
    recommender, queries = engine.recommender, _queries(batch, indices)
    scored = [row for row, state in enumerate(batch.states) if state is not None]
    ranked: dict[int, Ranked] = {}
    if scored:
        memories = indices.translated(batch.retrieved)
        memories = memories if len(scored) == len(queries) else memories.take(np.array(scored))
        chosen = [queries[row] for row in scored]
        states = np.stack([query.state for query in chosen])
        prediction = recommender.predict(states, memories, [query.seen for query in chosen])
        begin = engine.metrics.stage("fuse", begin)
        explained = [batch.parsed.requests[row].explain for row in scored]
        ranked = dict(zip(scored, recommender.rank(prediction, chosen, memories, explained), strict=True))
    best = [ranked.get(row) or recommender.most_popular(query) for row, query in enumerate(queries)]
    engine.metrics.stage("score", begin)
    return best


def _queries(batch: RememberedBatch, indices: Indices) -> list[Query]:
    """The requests as the model takes them."""
    hidden = indices.of(batch.parsed.engine.catalogue.hidden)
    items = indices.of(CatalogueNumbers(np.concatenate([*batch.seen]).astype(np.int64)))
    seen = np.split(items, np.cumsum([len(numbers) for numbers in batch.seen])[:-1])
    return [_query(batch, row, seen[row], hidden, indices) for row in range(len(batch.parsed))]


def _query(
    batch: RememberedBatch, row: int, seen: NDArray[np.int64], hidden: NDArray[np.int64], indices: Indices
) -> Query:
    """One request as the model takes it. `seen`: items that the user took; those to be ignored stay excluded, but get
    no repeat bias.
    """
    engine, request, state = batch.parsed.engine, batch.parsed.requests[row], batch.states[row]
    repeated = seen
    if request.ignore_memories:
        repeated = np.setdiff1d(seen, indices.named(request.ignore_memories))
    if request.sequence:
        sent = indices.named(request.sequence)
        seen, repeated = np.union1d(seen, sent), np.union1d(repeated, sent)
    excluded = [hidden, seen] if _excludes_seen(engine, request) else [hidden]
    if request.exclude_items:
        excluded.append(indices.named(request.exclude_items))
    return Query(
        state=NO_STATE if state is None else state,
        seen=repeated[repeated <= engine.recommender.item_count] if indices.reaches_beyond else repeated,
        excluded=np.concatenate(excluded),
        candidates=None if request.candidates is None else indices.named(request.candidates),
        top_n=request.top_n,
        passing=indices.passing(request.filter) if request.filter else None,
    )


def _excludes_seen(engine: Engine, request: RecommendRequest) -> bool:
    """Whether items that the user took are left out: as the request says, otherwise as the model's data suggests."""
    if request.exclude_seen is None:
        return engine.recommender.config.rules.exclude_seen
    return request.exclude_seen
