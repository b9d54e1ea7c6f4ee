"""The memory service in this process, called without HTTP: for tests, benchmarks and notebooks.

The one module of `api` that imports the service itself; nothing that runs in production imports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from api.http.problems import CheckpointRefused, MemoryUnavailable, ModelGone
from api.memory.port import Readiness
from memory_service.protocol.answer import Answer
from memory_service.protocol.columns import BadRequest
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
from memory_service.service.merging import TooLate
from memory_service.service.models import ModelMismatch
from memory_service.service.service import MemoryService
from memory_service.store.record import RecordError
from memory_service.store.redis.errors import StoreUnavailable
from model.checkpoint import CheckpointError


class InProcessMemory:
    """A started memory service, called directly (`api.memory.port.Memory`).

    Questions and answers are packed and unpacked as for HTTP, so that the same checks apply.
    """

    def __init__(self, service: MemoryService) -> None:
        self._service = service

    async def close(self) -> None:
        """Closes the service."""
        await self._service.close()

    async def retrieve(self, question: Question) -> Answer:
        """Retrieves memories of a batch of users."""
        with _problems():
            answer = await self._service.retrieve(Question.unpacked(question.packed()))
        return Answer.unpacked(answer.packed(), question.users)

    async def plan(self, request: PlanRequest) -> PlanReply:
        """Plans events."""
        with _problems():
            return await self._service.plan(request)

    async def write(self, request: WriteRequest) -> WriteReply:
        """Writes planned events."""
        with _problems():
            return await self._service.write(request)

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Gives stale records keys and states of another model."""
        with _problems():
            return await self._service.rekey(request)

    async def inspect(self, user_id: str) -> UserMemory | None:
        """Returns all that is known about a user; None: nothing."""
        with _problems():
            return await self._service.inspect(user_id)

    async def forget(self, user_id: str) -> Forgotten:
        """Deletes all that is known about a user."""
        with _problems():
            return await self._service.forget(user_id)

    async def model(self) -> ModelReply:
        """Returns the serving and the wanted model."""
        return self._service.model()

    async def change_model(self, request: ModelRequest) -> ModelReply:
        """Makes a model the wanted one, or lets the wanted model serve."""
        with _problems():
            if request.cut_over:
                await self._service.models.cut_over(request.version)
            else:
                await self._service.models.want(request.version, Path(request.run))
        return self._service.model()

    async def walk(self, cursor: int, limit: int, slots: range = ALL_SLOTS) -> UserPage:
        """Lists users of some hash slots, a page at a time."""
        with _problems():
            return UserPage(*await self._service.store.walk(cursor, limit, slots))

    async def stale(self, version: str, cursor: int, limit: int, slots: range = ALL_SLOTS) -> StalePage:
        """Lists users of some hash slots whose records are not of model `version`, a page at a time."""
        with _problems():
            return await self._service.stale(version, cursor, limit, slots)

    async def users(self, prefix: str, limit: int) -> Sequence[str]:
        """Lists user ids with a prefix."""
        with _problems():
            return await self._service.store.users(prefix, limit)

    async def catalogue(self, since: int, revision: int) -> CatalogueReply:
        """Lists catalogue items from number `since` on, and earlier items that changed after `revision`."""
        with _problems():
            return await self._service.catalogue.listing(since, revision)

    async def register(self, request: RegisterRequest) -> RegisterReply:
        """Registers or changes catalogue items."""
        with _problems():
            return await self._service.catalogue.register(request)

    async def quota(self, request: QuotaRequest) -> int:
        """Returns how many of the wanted requests are granted."""
        with _problems():
            return (await self._service.quota(request)).granted

    async def ready(self) -> Readiness:
        """Returns the readiness of the service. Raises MemoryUnavailable if it is not ready."""
        with _problems():
            await self._service.check_store()
        return Readiness("ready", self._service.model_version)


@contextmanager
def _problems() -> Iterator[None]:
    """Turns the service's errors into those of the port."""
    try:
        yield
    except ModelMismatch as error:
        raise ModelGone(f"memory service: {error}") from error
    except CheckpointError as error:
        raise CheckpointRefused(str(error)) from error
    except (StoreUnavailable, BadRequest, RecordError, TooLate) as error:
        raise MemoryUnavailable(f"memory service: {error}") from error
