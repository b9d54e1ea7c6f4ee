"""From requests to responses, a micro-batch at a time.

    parse → encode → remember → rank → respond

Each stage makes an immutable batch of the one before it. Where memory cannot be reached, the encoder (for a sequence)
or popularity answers, and the response says that it is degraded.
"""

from __future__ import annotations

from collections.abc import Sequence

from api.http.schemas.recommend import RecommendRequest, RecommendResponse
from api.models.engine import Engine
from api.models.lifecycle import LoadedModels
from api.recommend.rank import rank_batch
from api.recommend.remember import Attempts, remember
from api.recommend.request import TimedRequest, timed
from api.recommend.respond import respond
from memory_service.protocol.call.tracing import span


async def recommend(models: LoadedModels, requests: Sequence[RecommendRequest]) -> list[RecommendResponse]:
    """The responses to requests, for the time that each names, otherwise for now."""
    return await answer(models, timed(requests))


async def answer(models: LoadedModels, requests: Sequence[TimedRequest]) -> list[RecommendResponse]:
    """The responses to requests, in their order; each user is answered by the model that the user's record is of."""
    responses: dict[int, RecommendResponse] = {}
    waiting: list[tuple[Engine, Sequence[int]]] = [(models.serving, range(len(requests)))]
    attempts = Attempts()
    with span("recommend"):
        while waiting:
            engine, rows = waiting.pop()
            batch, moved = await remember(models, engine, [requests[row] for row in rows], attempts)
            if moved:
                waiting += ((other, [rows[n] for n in some]) for other, some in moved.items())
                left = {n for some in moved.values() for n in some}
                here = [n for n in range(len(rows)) if n not in left]
                batch, rows = batch.take(here), [rows[n] for n in here]
            if rows:
                responses |= zip(rows, respond(await rank_batch(batch)), strict=True)
    return [responses[row] for row in range(len(requests))]
