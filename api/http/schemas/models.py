"""Bodies about the model and the process: `/model`, `/model/reload`, `/health/live`, `/health/ready`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.http.schemas.fields import RequestBody, Scope


class ModelResponse(BaseModel):
    """The model that serves, its configuration, and the version that is wanted (another one while a change of models
    is under way).
    """

    model_version: str
    wanted: str
    items: int
    scopes: list[Scope]
    config: dict[str, Any]


class ReloadRequest(RequestBody):
    """Folder of a checkpoint, by a path that is valid in all processes; absent: each process reads its configured
    folder again.
    """

    run: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """The folder."""


class ReloadResponse(BaseModel):
    """Which model serves and which is wanted; `moved` of about `users` users have records of the wanted model."""

    serving: str
    wanted: str
    state: Literal["serving", "moving"]
    users: int
    moved: int


class Moving(BaseModel):
    """A change of models is under way; `moved` of about `users` users have records of the wanted model."""

    wanted: str
    users: int
    moved: int


class Ready(BaseModel):
    """Recommendations with memory are available; `memory_s`: how long the memory service took to say so."""

    status: Literal["ready"]
    model_version: str
    memory_s: float
    moving: Moving | None = None


class Unready(BaseModel):
    """Why recommendations with memory are not available."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "memory service: no answer in time"}]})

    status: str


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"]
