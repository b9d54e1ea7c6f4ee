"""The memory service over HTTP: keep-alive connections, msgpack bodies, a timeout for every call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import aiohttp
import msgspec

from api.http.problems import (
    ApiProblem,
    CheckpointRefused,
    DeadlineExceeded,
    MemoryUnavailable,
    MemoryUnreachable,
    ModelGone,
)
from api.memory.port import Readiness
from memory_service.protocol.answer import Answer
from memory_service.protocol.call.context import CALL
from memory_service.protocol.call.tracing import span
from memory_service.protocol.hash_slots import ALL_SLOTS
from memory_service.protocol.question import Question
from memory_service.protocol.replies import check_inspected, check_listed, check_planned, check_written
from memory_service.protocol.structs import (
    CONTENT_TYPE,
    CatalogueReply,
    Forgotten,
    ModelReply,
    ModelRequest,
    PlanReply,
    PlanRequest,
    Problem,
    QuotaReply,
    QuotaRequest,
    RegisterReply,
    RegisterRequest,
    RekeyReply,
    RekeyRequest,
    ReplicasReply,
    RetrieveReply,
    StalePage,
    UserPage,
    Users,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.user_memory import UserMemory

CONNECT_TIMEOUT_S = 1.0
"""A running replica accepts a connection much faster."""
REPLICAS_TIMEOUT_S = 1.0
"""For asking which replicas there are."""
LOADING_TIMEOUT_S = 600.0
"""For a change of models: the service reads a checkpoint, or all changed records, before it answers."""
Reply = TypeVar("Reply", bound=msgspec.Struct)


class MemoryClient:
    """One memory replica over HTTP (`api.memory.port.Memory`)."""

    def __init__(self, url: str, timeout_s: float, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout_s = timeout_s
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s), headers=headers)

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()

    async def retrieve(self, question: Question) -> Answer:
        """Retrieves memories of a batch of users."""
        reply = await self._post("/v1/retrieve", question.packed(), RetrieveReply)
        with _checking():
            return Answer.unpacked(reply, question.users)

    async def plan(self, request: PlanRequest) -> PlanReply:
        """Plans events."""
        reply = await self._post("/v1/plan", request, PlanReply)
        with _checking():
            check_planned(reply, request)
        return reply

    async def write(self, request: WriteRequest) -> WriteReply:
        """Writes planned events."""
        reply = await self._post("/v1/write", request, WriteReply)
        with _checking():
            check_written(reply, request)
        return reply

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Gives stale records keys and states of another model."""
        return await self._post("/v1/rekey", request, RekeyReply)

    async def inspect(self, user_id: str) -> UserMemory | None:
        """Returns all that is known about a user; None: nothing."""
        found = await self._call("GET", "/v1/user", UserMemory, params={"user_id": user_id})
        if found is not None:
            with _checking():
                check_inspected(found, user_id)
        return found

    async def forget(self, user_id: str) -> Forgotten:
        """Deletes all that is known about a user."""
        return _found(await self._call("DELETE", "/v1/user", Forgotten, params={"user_id": user_id}))

    async def drop(self, user_id: str) -> None:
        """Has this replica drop a user whom another replica has forgotten from its caches."""
        _found(await self._call("DELETE", "/v1/user", Forgotten, params={"user_id": user_id, "here": "true"}))

    async def model(self) -> ModelReply:
        """Returns the serving and the wanted model."""
        return await self._get("/v1/model", ModelReply)

    async def change_model(self, request: ModelRequest) -> ModelReply:
        """Makes a model the wanted one, or lets the wanted model serve."""
        data = msgspec.msgpack.encode(request)
        return _found(await self._call("POST", "/v1/model", ModelReply, data=data, timeout_s=LOADING_TIMEOUT_S))

    async def walk(self, cursor: int, limit: int, slots: range = ALL_SLOTS) -> UserPage:
        """Lists users of some hash slots, a page at a time."""
        return await self._get("/v1/walk", UserPage, cursor=cursor, limit=limit, **_bounds(slots))

    async def stale(self, version: str, cursor: int, limit: int, slots: range = ALL_SLOTS) -> StalePage:
        """Lists users of some hash slots whose records are not of model `version`, a page at a time."""
        return await self._get("/v1/stale", StalePage, version=version, cursor=cursor, limit=limit, **_bounds(slots))

    async def users(self, prefix: str, limit: int) -> Sequence[str]:
        """Lists user ids with a prefix."""
        return (await self._get("/v1/users", Users, prefix=prefix, limit=limit)).users

    async def catalogue(self, since: int, revision: int) -> CatalogueReply:
        """Lists catalogue items from number `since` on, and earlier items that changed after `revision`."""
        reply = await self._get("/v1/catalogue", CatalogueReply, since=since, revision=revision)
        with _checking():
            return check_listed(reply, since)

    async def register(self, request: RegisterRequest) -> RegisterReply:
        """Registers or changes catalogue items."""
        return await self._post("/v1/catalogue", request, RegisterReply)

    async def quota(self, request: QuotaRequest) -> int:
        """Returns how many of the wanted requests are granted."""
        return (await self._post("/v1/quota", request, QuotaReply)).granted

    async def replicas(self) -> ReplicasReply:
        """Returns the replicas that there are."""
        timeout_s = min(REPLICAS_TIMEOUT_S, self._timeout_s)
        return _found(await self._call("GET", "/v1/replicas", ReplicasReply, timeout_s=timeout_s))

    async def ready(self) -> Readiness:
        """Returns the readiness of this replica. Raises MemoryUnavailable if it is not ready."""
        try:
            async with self._session.get(f"{self.url}/health/ready") as response:
                status, content = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unreachable(error) from error
        if status == 401:
            raise _failure(status, content)
        with _checking():
            readiness = msgspec.json.decode(content, type=Readiness)
        if not readiness.authorized:
            raise MemoryUnavailable("memory service: it wants a token (RAMREC_API_MEMORY_TOKEN)")
        if status != 200:
            raise MemoryUnavailable(f"memory service: {readiness.status}")
        return readiness

    # ------------------------------------------------------------------------------------------- requests

    async def _get(self, path: str, kind: type[Reply], **params: str | int) -> Reply:
        sent = {name: str(value) for name, value in params.items()}
        return _found(await self._call("GET", path, kind, params=sent))

    async def _post(self, path: str, body: msgspec.Struct, kind: type[Reply]) -> Reply:
        return _found(await self._call("POST", path, kind, data=msgspec.msgpack.encode(body)))

    async def _call(
        self,
        method: str,
        path: str,
        kind: type[Reply],
        *,
        data: bytes | None = None,
        params: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Reply | None:
        """Returns the decoded response; None for 404. Takes no longer than the request that it is made for may take."""
        call = CALL.get()
        left_s, timeout_s = math.inf if call is None else call.left_s, timeout_s or self._timeout_s
        if left_s <= 0:
            raise DeadlineExceeded("the deadline of the request passed before the memory service was called")
        timeout = aiohttp.ClientTimeout(total=min(timeout_s, left_s), sock_connect=CONNECT_TIMEOUT_S)
        try:
            with span(f"memory {path}", remote=True):
                status, content = await self._exchange(method, path, data, params, timeout)
        except (aiohttp.ClientError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and left_s < timeout_s:
                raise DeadlineExceeded("memory service: no answer before the deadline of the request") from error
            raise _unreachable(error) from error
        if status == 200:
            with _checking():
                return msgspec.msgpack.decode(content, type=kind)
        if status == 404:
            return None
        raise _failure(status, content)

    async def _exchange(
        self,
        method: str,
        path: str,
        data: bytes | None,
        params: dict[str, str] | None,
        timeout: aiohttp.ClientTimeout,
    ) -> tuple[int, bytes]:
        """Sends a request as part of the current span. Returns status and body of the response."""
        call = CALL.get()
        headers = {"Content-Type": CONTENT_TYPE} | ({} if call is None else call.onward())
        url = self.url + path
        async with self._session.request(
            method, url, data=data, params=params, headers=headers, timeout=timeout
        ) as response:
            return response.status, await response.read()


@contextmanager
def _checking() -> Iterator[None]:
    """Turns errors in decoding and checking a reply into MemoryUnavailable."""
    try:
        yield
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise MemoryUnavailable(f"memory service: {error}: not a memory service?") from error


def _bounds(slots: range) -> dict[str, int]:
    return {"first_slot": slots.start, "last_slot": slots.stop - 1}


def _found(reply: Reply | None) -> Reply:
    if reply is None:
        raise MemoryUnavailable("memory service answered 404: not a memory service?")
    return reply


def _unreachable(error: Exception) -> MemoryUnreachable:
    return MemoryUnreachable(f"memory service: {str(error) or 'no answer in time'}")


def _failure(status: int, content: bytes) -> ApiProblem:
    """The problem to raise for an error response."""
    try:
        found = msgspec.msgpack.decode(content, type=Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return MemoryUnavailable(f"memory service answered {status}: no detail")
    if found.code == CheckpointRefused.code:
        return CheckpointRefused(found.detail)
    kind = ModelGone if status == 409 else MemoryUnavailable
    return kind(f"memory service answered {status}: {found.code}: {found.detail}")
