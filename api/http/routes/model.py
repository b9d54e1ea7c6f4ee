"""Routes about the model and the process: which model serves, whether the process is ready, its metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from api.http import examples
from api.http.openapi import DescribedRoute
from api.http.policy import declare
from api.http.problems import MemoryUnavailable
from api.http.schemas.models import Alive, ModelResponse, Ready, ReloadRequest, ReloadResponse, Unready
from api.http.services import Services
from api.recommend.request import SCOPES

Reload = Annotated[ReloadRequest | None, Body(openapi_examples={"another": {"value": {"run": "/runs/ml-100k-new"}}})]

router = APIRouter(route_class=DescribedRoute)


@router.get("/model", tags=["model"])
@declare("recommend", example=examples.MODEL)
async def model(request: Request) -> ModelResponse:
    """The model that serves, and its configuration."""
    models = Services.of(request).models
    recommender = models.serving.recommender
    return ModelResponse(
        model_version=recommender.version,
        wanted=models.wanted.version,
        items=len(recommender.checkpoint.item_ids),
        scopes=list(SCOPES),
        config=recommender.config.model_dump(),
    )


@router.post("/model/reload", tags=["model"])
@declare(
    "admin",
    *examples.INVALID_RELOAD,
    examples.REFUSED,
    examples.UNAVAILABLE,
    example=examples.RELOADED,
    has_deadline=False,
)
async def reload_model(request: Request, body: Reload = None) -> ReloadResponse:
    """Load a checkpoint and make its model the wanted one in all processes. It serves once `ramrec reembed` has moved
    all users to it; a user for whom an interaction is stored before is moved at once. If the checkpoint is that of the
    model that serves, that model stays, and no other is wanted any more.
    """
    models = Services.of(request).models
    state = await models.reload(Path(body.run) if body is not None and body.run is not None else None)
    return ReloadResponse(
        serving=state.serving,
        wanted=state.wanted,
        state="serving" if state.wanted == state.serving else "moving",
        users=state.users,
        moved=state.moved,
    )


@router.get("/health/live", tags=["probes"])
@declare(None, example={"status": "alive"}, is_polled=True)
async def live() -> Alive:
    """Whether the process answers."""
    return Alive(status="alive")


@router.get("/health/ready", tags=["probes"], response_model=Ready, responses={503: {"model": Unready}})
@declare(None, example=examples.READY, is_polled=True)
async def ready(request: Request) -> JSONResponse:
    """Whether recommendations with memory are available: the memory service and Redis answer, with the same model."""
    services = Services.of(request)
    if services.stopping.is_set():
        return JSONResponse({"status": "about to stop"}, 503)
    models, begin = services.models, time.perf_counter()
    try:
        memory = await models.serving.memory.ready()
        served = memory.model_version
        if served != models.serving.version:
            await models.follow()
    except MemoryUnavailable as error:
        return JSONResponse({"status": error.detail}, 503)
    if served not in models.engines:
        return JSONResponse({"status": f"the memory service serves model {served}"}, 503)
    about = {"status": "ready", "model_version": served, "memory_s": time.perf_counter() - begin}
    if memory.wanted is not None:
        about["moving"] = {"wanted": memory.wanted, "users": memory.users, "moved": memory.moved}
    return JSONResponse(about)


@router.get("/metrics", tags=["probes"], response_class=PlainTextResponse)
@declare("admin", example="# HELP ramrec_requests_total Answers by route and status\n", is_polled=True)
async def metrics(request: Request) -> Response:
    """Prometheus metrics, summed over all workers of `ramrec serve`."""
    services = Services.of(request)
    services.models.show(services.metrics)
    return Response(generate_latest(services.metrics), media_type=CONTENT_TYPE_LATEST)
