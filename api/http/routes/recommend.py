"""`POST /recommend` and `POST /recommend/batch`, which `api.http.fast_path` answers."""

from __future__ import annotations

from fastapi import APIRouter, Request

from api.http.examples import FULL, INVALID_BODY, LATE, RECOMMENDED
from api.http.openapi import DescribedRoute
from api.http.policy import declare
from api.http.schemas.recommend import (
    RecommendBatchRequest,
    RecommendBatchResponse,
    RecommendRequest,
    RecommendResponse,
)
from api.http.services import Services
from api.recommend.request import timed

router = APIRouter(route_class=DescribedRoute, tags=["recommend"])


@router.post("/recommend")
@declare("recommend", *INVALID_BODY, FULL, LATE, example=RECOMMENDED)
async def recommend_one(body: RecommendRequest, request: Request) -> RecommendResponse:
    """The top-N for a user, a sequence of items, both, or nobody in particular."""
    services = Services.of(request)
    if body.filter:
        await services.models.prepare([body.filter])
    return (await services.batcher.submit(timed([body]), request.is_disconnected))[0]


@router.post("/recommend/batch")
@declare("recommend", *INVALID_BODY, FULL, LATE, example={"results": [RECOMMENDED]})
async def recommend_batch(body: RecommendBatchRequest, request: Request) -> RecommendBatchResponse:
    """The same for up to 256 requests."""
    services = Services.of(request)
    asked = timed(body.requests)
    await services.models.prepare([one.filter for one in body.requests if one.filter])
    return {"results": await services.batcher.submit(asked, request.is_disconnected)}
