"""The memory service over HTTP: keep-alive, msgpack, a timeout on every call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from api.http.problems import (
    ApiProblem,
    CheckpointRefused,
    DeadlineExceeded,
    MemoryUnavailable,
    MemoryUnreachable,
    ModelGone,
)
from api.memory.replies import check_inspected, check_listed, check_planned, check_retrieved, check_written
from memory_service.protocol.slots import ALL_SLOTS
from memory_service.protocol.structs import (
    CONTENT_TYPE,
    CatalogueReply,
    Forgotten,
    Job,
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
    RetrieveRequest,
    StalePage,
    StaleUser,
    UserMemory,
    UserPage,
    Users,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.telemetry import CALL, span
from model.memory.bank import Retrieved
from model.memory.habits import FEATURES

CONNECT_S = 1.0
"""A replica that is there is connected to in far less."""
LOOK_TIMEOUT_S = 1.0
LOADING_S = 600.0
"""The memory service reads a checkpoint, or all that changed, before it answers a change of models."""
Reply = TypeVar("Reply", bound=msgspec.Struct)


@dataclass(frozen=True)
class Remembered:
    """A retrieval reply unpacked. Columns of length B; items are catalogue numbers.

    `known`: something is remembered; `states` (B, d) float32; `seen`: items each user had; `stale`: users to be
    keyed anew first; `without`: rows that ignore something of what the user had, and how the state without it is made;
    `moved`: rows whose users must be asked about with another model, and which.
    """

    retrieved: Retrieved
    known: NDArray[np.bool_]
    versions: NDArray[np.int64]
    states: NDArray[np.float32]
    seen: list[NDArray[np.uint32]]
    stale: list[StaleUser]
    without: dict[int, Job]
    moved: dict[int, str]
    degraded: bool
    catalogue_size: int


def unpack(reply: RetrieveReply) -> Remembered:
    """Bytes to columns."""
    known, own = np.frombuffer(reply.known, "u1").astype(bool), reply.own.unpack()
    seen_count = np.frombuffer(reply.seen_count, "<i4")
    return Remembered(
        retrieved=Retrieved(
            entropy=np.frombuffer(reply.entropy, "<f4"),
            k=np.frombuffer(reply.k, "<i4").astype(np.int64),
            bank_size=np.frombuffer(reply.bank_size, "<i4").astype(np.int64),
            own=own,
            collective=reply.collective.unpack(),
            collective_k=np.frombuffer(reply.collective_k, "<i4").astype(np.int64),
            habits=_habits(reply.habits, own.valid),
            present=_present(reply),
        ),
        known=known,
        versions=np.frombuffer(reply.versions, "<i8"),
        states=np.frombuffer(reply.states, "<f4").reshape(len(known), -1),
        seen=np.split(np.frombuffer(reply.seen, "<u4"), np.cumsum(seen_count)[:-1]),
        stale=reply.stale,
        without=reply.without,
        moved=reply.moved,
        degraded=reply.degraded,
        catalogue_size=reply.catalogue_size,
    )


def _habits(data: bytes, valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """What memories tell, (B, K, F), 0 where not valid; F is 0 where they tell nothing. valid (B, K)."""
    habits = np.zeros((*valid.shape, len(FEATURES) if data else 0), np.float32)
    if data:
        habits[valid] = np.frombuffer(data, "<f4").reshape(-1, len(FEATURES))
    return habits


def _present(reply: RetrieveReply) -> NDArray[np.int64]:
    """Items that users take at the time of the request, (B, P), 0 where there are fewer."""
    count = np.frombuffer(reply.present_count, "<i4")
    there = np.arange(int(count.max(initial=0))) < count[:, None]
    present = np.zeros((len(reply.known), there.shape[1]), np.int64)
    if len(count):
        present[there] = np.frombuffer(reply.present, "<u4")
    return present


class MemoryClient:
    """One method a call of the memory service.

    Every method raises MemoryUnavailable where the service cannot be reached, does not answer in time, has no Redis,
    serves another model, or answers what no memory service does.
    """

    def __init__(self, url: str, timeout_s: float, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout_s = timeout_s
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s), headers=headers)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def retrieve(self, request: RetrieveRequest) -> Remembered:
        """Memories of a batch of users."""
        reply = await self._post("/v1/retrieve", request, RetrieveReply)
        with _doubting():
            check_retrieved(reply, request)
            return unpack(reply)

    async def plan(self, request: PlanRequest) -> PlanReply:
        """What events would mean, and the states they need."""
        reply = await self._post("/v1/plan", request, PlanReply)
        with _doubting():
            check_planned(reply, request)
        return reply

    async def write(self, request: WriteRequest) -> WriteReply:
        """Write planned events."""
        reply = await self._post("/v1/write", request, WriteReply)
        with _doubting():
            check_written(reply, request)
        return reply

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Give stale records the keys of this model."""
        return await self._post("/v1/rekey", request, RekeyReply)

    async def model(self) -> ModelReply:
        """Which models serve and are wanted."""
        return _there(await self._call("GET", "/v1/model", ModelReply))

    async def change_model(self, request: ModelRequest) -> ModelReply:
        """Want another model, or let the wanted one serve. Raises CheckpointRefused, too."""
        data = msgspec.msgpack.encode(request)
        return _there(await self._call("POST", "/v1/model", ModelReply, data=data, timeout_s=LOADING_S))

    async def walk(self, cursor: int, limit: int, slots: range = ALL_SLOTS) -> UserPage:
        """A step through the users of some slots."""
        params = {"cursor": str(cursor), "limit": str(limit)} | _bounds(slots)
        return _there(await self._call("GET", "/v1/walk", UserPage, params=params))

    async def stale(self, version: str, cursor: int, limit: int, slots: range = ALL_SLOTS) -> StalePage:
        """A step through the users of some slots: those who are not of a model."""
        params = {"version": version, "cursor": str(cursor), "limit": str(limit)} | _bounds(slots)
        return _there(await self._call("GET", "/v1/stale", StalePage, params=params))

    async def inspect(self, user_id: str) -> UserMemory | None:
        """A user's bank; None where nothing is known."""
        found = await self._call("GET", "/v1/user", UserMemory, params={"user_id": user_id})
        if found is not None:
            with _doubting():
                check_inspected(found, user_id)
        return found

    async def forget(self, user_id: str, *, here: bool = False) -> Forgotten:
        """Forget a user; `here`: let go of one whom another replica has forgotten."""
        params = {"user_id": user_id} | ({"here": "true"} if here else {})
        return _there(await self._call("DELETE", "/v1/user", Forgotten, params=params))

    async def replicas(self) -> ReplicasReply:
        """Which replicas are there."""
        limit_s = min(LOOK_TIMEOUT_S, self._timeout_s)
        return _there(await self._call("GET", "/v1/replicas", ReplicasReply, timeout_s=limit_s))

    async def users(self, prefix: str, limit: int) -> Sequence[str]:
        """User ids with a prefix."""
        params = {"prefix": prefix, "limit": str(limit)}
        return _there(await self._call("GET", "/v1/users", Users, params=params)).users

    async def catalogue(self, since: int, revision: int) -> CatalogueReply:
        """Catalogue items from a number on, and what changed of those before since a revision."""
        params = {"since": str(since), "revision": str(revision)}
        reply = _there(await self._call("GET", "/v1/catalogue", CatalogueReply, params=params))
        with _doubting():
            return check_listed(reply, since)

    async def register(self, request: RegisterRequest) -> RegisterReply:
        """Register or change items."""
        return await self._post("/v1/catalogue", request, RegisterReply)

    async def quota(self, request: QuotaRequest) -> int:
        """Requests that may be answered of those wanted."""
        return (await self._post("/v1/quota", request, QuotaReply)).granted

    async def ready(self) -> Readiness:
        """Which model the service serves, once it is ready."""
        try:
            async with self._session.get(f"{self.url}/health/ready") as response:
                content = await response.read()
                if response.status == 401:
                    raise _failure(401, content)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise MemoryUnreachable(f"memory service: {str(error) or 'no answer in time'}") from error
        with _doubting():
            about = msgspec.json.decode(content, type=Readiness)
        if not about.authorized:
            raise MemoryUnavailable("memory service: it wants a token (RAMREC_API_MEMORY_TOKEN)")
        if response.status != 200:
            raise MemoryUnavailable(f"memory service: {about.status}")
        return about

    async def _post(self, path: str, body: msgspec.Struct, kind: type[Reply]) -> Reply:
        return _there(await self._call("POST", path, kind, data=msgspec.msgpack.encode(body)))

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
        """The decoded answer; None for 404."""
        call = CALL.get()
        left_s = math.inf if call is None else call.left_s
        limit_s = timeout_s or self._timeout_s
        if left_s <= 0:
            raise DeadlineExceeded("the time of the request was over before the memory service was asked")
        try:
            with span(f"memory {path}", remote=True):
                call = CALL.get()  # its span is the one that the other side belongs under
                headers = {"Content-Type": CONTENT_TYPE} | ({} if call is None else call.onward())
                async with self._session.request(
                    method,
                    self.url + path,
                    data=data,
                    params=params,
                    headers=headers,
                    timeout=aiohttp.ClientTimeout(total=min(limit_s, left_s), sock_connect=CONNECT_S),
                ) as response:
                    content = await response.read()
                    status = response.status
        except (aiohttp.ClientError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and left_s < limit_s:
                raise DeadlineExceeded("memory service: no answer in the time of the request") from error
            raise MemoryUnreachable(f"memory service: {str(error) or 'no answer in time'}") from error
        if status == 200:
            return _decoded(content, kind)
        if status == 404:
            return None
        raise _failure(status, content)


class Readiness(msgspec.Struct):
    """What `/health/ready` of the memory service says."""

    status: str
    model_version: str
    authorized: bool = True
    wanted: str | None = None
    users: int = 0
    moved: int = 0


@contextmanager
def _doubting() -> Iterator[None]:
    """Around decoding and checking a reply."""
    try:
        yield
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise MemoryUnavailable(f"memory service: {error}: not a memory service?") from error


def _decoded(content: bytes, kind: type[Reply]) -> Reply:
    with _doubting():
        return msgspec.msgpack.decode(content, type=kind)


def _bounds(slots: range) -> dict[str, str]:
    return {"first_slot": str(slots.start), "last_slot": str(slots.stop - 1)}


def _there(reply: Reply | None) -> Reply:
    if reply is None:
        raise MemoryUnavailable("memory service answered 404: not a memory service?")
    return reply


def _failure(status: int, content: bytes) -> ApiProblem:
    """What an answer that is none means to our callers."""
    try:
        found = msgspec.msgpack.decode(content, type=Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return MemoryUnavailable(f"memory service answered {status}: no detail")
    if found.code == CheckpointRefused.code:
        return CheckpointRefused(found.detail)
    kind = ModelGone if status == 409 else MemoryUnavailable
    return kind(f"memory service answered {status}: {found.code}: {found.detail}")
