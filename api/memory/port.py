"""The port through which the api calls the memory service.

Implementations: `client` over HTTP, `replicas` over any number of memory replicas, `in_process` without HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from memory_service.protocol.answer import Answer
from memory_service.protocol.hash_slots import ALL_SLOTS
from memory_service.protocol.question import Question
from memory_service.protocol.structs import (
    CatalogueReply,
    Forgotten,
    ModelReply,
    ModelRequest,
    PlanReply,
    PlanRequest,
    QuotaRequest,
    RegisterReply,
    RegisterRequest,
    RekeyReply,
    RekeyRequest,
    StalePage,
    UserPage,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.user_memory import UserMemory


class Readiness(msgspec.Struct):
    """What `GET /health/ready` of the memory service answers.

    `authorized`: the caller's token was accepted. `wanted`: the model that users are being moved to, if any; `moved` of
    its `users` have been.
    """

    status: str
    model_version: str
    authorized: bool = True
    wanted: str | None = None
    users: int = 0
    moved: int = 0


class Memory(Protocol):
    """Calls of the memory service.

    Every call raises MemoryUnavailable if the service cannot be reached, does not answer in time, cannot reach Redis or
    answers nonsense, and ModelGone if it does not work with the model that the call names.
    """

    async def close(self) -> None:
        """Closes all connections."""

    async def retrieve(self, question: Question) -> Answer:
        """Retrieves memories of a batch of users."""

    async def plan(self, request: PlanRequest) -> PlanReply:
        """Plans events: which are new, and which states writing them needs. Changes nothing."""

    async def write(self, request: WriteRequest) -> WriteReply:
        """Writes planned events, each user's atomically."""

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Gives stale records keys and states of another model."""

    async def inspect(self, user_id: str) -> UserMemory | None:
        """Returns all that is known about a user; None: nothing."""

    async def forget(self, user_id: str) -> Forgotten:
        """Deletes all that is known about a user."""

    async def model(self) -> ModelReply:
        """Returns the serving and the wanted model."""

    async def change_model(self, request: ModelRequest) -> ModelReply:
        """Makes a model the wanted one, or lets the wanted model serve.

        Raises CheckpointRefused if the service cannot load the model.
        """

    async def walk(self, cursor: int, limit: int, slots: range = ALL_SLOTS) -> UserPage:
        """Lists users of some hash slots, a page at a time."""

    async def stale(self, version: str, cursor: int, limit: int, slots: range = ALL_SLOTS) -> StalePage:
        """Lists users of some hash slots whose records are not of model `version`, a page at a time."""

    async def users(self, prefix: str, limit: int) -> Sequence[str]:
        """Lists user ids with a prefix."""

    async def catalogue(self, since: int, revision: int) -> CatalogueReply:
        """Lists catalogue items from number `since` on, and earlier items that changed after `revision`."""

    async def register(self, request: RegisterRequest) -> RegisterReply:
        """Registers or changes catalogue items."""

    async def quota(self, request: QuotaRequest) -> int:
        """Returns how many of the requests that an API key wants to make in a second are granted."""

    async def ready(self) -> Readiness:
        """Returns the readiness of the service. Raises MemoryUnavailable if it is not ready."""
