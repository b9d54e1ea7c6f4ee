"""Fifth stage: the responses."""

from __future__ import annotations

from typing import Literal

from api.catalogue.catalogue import Indices
from api.http.schemas.recommend import MemoryUse, Recommended, RecommendResponse
from api.models.engine import Engine
from api.recommend.explain import add_explanation
from api.recommend.rank import RankedBatch
from api.recommend.remember import RememberedBatch
from model.memory.ids import ItemIndices
from model.serving.recommender import Ranked


def respond(batch: RankedBatch) -> list[RecommendResponse]:
    """The responses to a batch, in the order of its requests. They are counted in the metrics."""
    remembered, parsed = batch.remembered, batch.remembered.parsed
    engine, used = parsed.engine, _memory_use(batch.remembered)
    responses: list[RecommendResponse] = []
    for row, (request, best, memory) in enumerate(zip(parsed.requests, batch.ranked, used, strict=True)):
        items = _items(engine, best, batch.indices)
        if request.explain:
            add_explanation(engine, remembered.retrieved, row, best, items, memory)
        source = _source(remembered, row, memory)
        engine.metrics.answered(source, memory, known=remembered.known[row])
        item_ids = [item["item_id"] for item in items]
        responses.append(
            {
                "recommendation_id": engine.metrics.feedback.answered(request.user_id, memory, item_ids),
                "user_id": request.user_id,
                "source": source,
                "items": items,
                "memory": memory,
                "unknown_items": parsed.unknown_items[row],
                "model_version": engine.version,
            }
        )
    return responses


def _items(engine: Engine, ranked: Ranked, indices: Indices) -> list[Recommended]:
    names = indices.item_ids(ItemIndices(ranked.items), engine.recommender.checkpoint.item_ids)
    return [{"item_id": name, "score": score} for name, score in zip(names, ranked.scores.tolist(), strict=True)]


def _source(batch: RememberedBatch, row: int, memory: MemoryUse) -> Literal["memory", "encoder", "popularity"]:
    """What a response is based on: popularity if there is no state; memory if the user is known or collective memories
    were found; otherwise the encoder.
    """
    if batch.states[row] is None:
        return "popularity"
    return "memory" if batch.known[row] or memory["collective"]["retrieved"] else "encoder"


def _memory_use(batch: RememberedBatch) -> list[MemoryUse]:
    """What memory contributed to each response."""
    retrieved = batch.retrieved
    columns = (
        retrieved.entropy,
        retrieved.k,
        retrieved.bank_size,
        retrieved.own.valid.sum(axis=1),
        retrieved.collective_k,
        retrieved.collective.valid.sum(axis=1),
    )
    return [
        {
            "entropy": entropy,
            "k": k,
            "bank_size": size,
            "version": version,
            "own": {"k": k, "retrieved": own},
            "collective": {"k": collective_k, "retrieved": others},
            "degraded": degraded,
        }
        for version, degraded, entropy, k, size, own, collective_k, others in zip(
            batch.versions, batch.degraded, *(column.tolist() for column in columns), strict=True
        )
    ]
