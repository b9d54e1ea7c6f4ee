"""What the routes of a process share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Event

from fastapi import Request

from api.access.limits import Limits
from api.http.metrics import ApiMetrics
from api.http.schemas.recommend import RecommendResponse
from api.ingest.ingest import Intake
from api.inspector.files import PageFile
from api.models.engine import Engine
from api.models.lifecycle import LoadedModels
from api.recommend.batching import MicroBatcher
from api.recommend.request import TimedRequest


@dataclass(frozen=True)
class Services:
    """The state of the application from its start to its stop (`api.http.lifespan`).

    models: the loaded models. batcher: answers `POST /recommend`. intake: limits `POST /memories`. limits: of API keys.
    metrics: shown by `GET /metrics`. page: files of the inspector page, by name. stopping: set when the process is to
    stop.
    """

    models: LoadedModels
    batcher: MicroBatcher[TimedRequest, RecommendResponse]
    intake: Intake
    limits: Limits
    metrics: ApiMetrics
    page: Mapping[str, PageFile]
    stopping: Event

    @classmethod
    def of(cls, request: Request) -> Services:
        """The services of the application that a request was sent to."""
        services: Services = request.scope["state"]["services"]
        return services

    @property
    def engine(self) -> Engine:
        """The engine of the model that serves."""
        return self.models.serving
