"""The memory service as any number of memory replicas, each of which can answer about any user.

A call about users goes to the first replica in their order (`api.memory.members`). If that cannot be reached the next
one answers, just as correctly. The replicas themselves tell which of them there are (`GET /v1/replicas`); they are
asked every second and whenever one is lost.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TypeVar

from msgspec import structs

from api.http.problems import MemoryUnavailable, MemoryUnreachable
from api.memory.client import MemoryClient
from api.memory.members import Members
from api.memory.port import Readiness
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
    ReplicasReply,
    StalePage,
    UserPage,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.user_memory import UserMemory

LOOK_S = 1.0
"""How often the list of replicas is refreshed."""
STALE_S = 3.0
"""Calls wait for a fresh list if the present one is older than this."""
TRIES = 4
"""Replicas that are asked before a call fails."""
HANGING_S = 1.0
"""A retrieval moves on to the next replica after this time without an answer."""
T = TypeVar("T")
AboutUsers = TypeVar("AboutUsers", PlanRequest, WriteRequest, RekeyRequest)


class MemoryReplicas:
    """All memory replicas as one service (`api.memory.port.Memory`).

    `urls`, separated by commas, are those of some replicas, or of a load balancer in front of them; the others are
    learnt from these. A call raises what `MemoryClient` raises once no replica is left to ask.
    """

    def __init__(self, urls: str, timeout_s: float, token: str | None = None) -> None:
        self._members = Members([url.strip().rstrip("/") for url in urls.split(",") if url.strip()])
        self._timeout_s, self._token = timeout_s, token
        self._clients: dict[str, MemoryClient] = {}
        self._looked_at = -float("inf")
        self._looking: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._anybody = str(random.random())  # each process asks another replica first what any of them can answer

    async def close(self) -> None:
        """Closes all connections."""
        for task in (self._looking, self._probing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    def replica_of(self, user_id: str | None) -> str:
        """URL of the replica that is asked first about a user; None: about what any can answer."""
        return self._order(user_id)[0]

    # ---------------------------------------------------------------------------------------- about users

    async def retrieve(self, question: Question) -> Answer:
        """Retrieves memories of a batch of users, all from the replica of the first."""
        await self._look_if_due()
        first = next((user for user in question.users if user), None)
        return await self._first_of(self._order(first), lambda client: client.retrieve(question), HANGING_S)

    async def plan(self, request: PlanRequest) -> PlanReply:
        """Plans events."""
        parts = await self._split(request, lambda client, part: client.plan(part))
        size = max(reply.catalogue_size for _, reply in parts)
        return PlanReply(size, _joined([(rows, reply.users) for rows, reply in parts]))

    async def write(self, request: WriteRequest) -> WriteReply:
        """Writes planned events."""
        parts = await self._split(request, lambda client, part: client.write(part))
        size = max(reply.catalogue_size for _, reply in parts)
        return WriteReply(size, _joined([(rows, reply.users) for rows, reply in parts]))

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Gives stale records keys and states of another model."""
        parts = await self._split(request, lambda client, part: client.rekey(part))
        return RekeyReply([user for _, reply in parts for user in reply.rekeyed])

    async def _split(
        self, request: AboutUsers, call: Callable[[MemoryClient, AboutUsers], Awaitable[T]]
    ) -> list[tuple[list[int], T]]:
        """Sends each replica the part about its users. Returns the rows of each part with the reply to it."""
        await self._look_if_due()
        rows_of: dict[str, list[int]] = {}
        for row, user in enumerate(request.users):
            rows_of.setdefault(self.replica_of(user.user_id), []).append(row)

        async def part(rows: list[int]) -> tuple[list[int], T]:
            some = structs.replace(request, users=[request.users[row] for row in rows])
            order = self._order(request.users[rows[0]].user_id if rows else None)
            return rows, await self._first_of(order, lambda client: call(client, some))

        return await _all(part(rows) for rows in rows_of.values() or [[]])

    async def inspect(self, user_id: str) -> UserMemory | None:
        """Returns all that is known about a user; None: nothing."""
        await self._look_if_due()
        return await self._first_of(self._order(user_id), lambda client: client.inspect(user_id))

    async def forget(self, user_id: str) -> Forgotten:
        """Deletes all that is known about a user; when it returns, every replica has dropped the user."""
        await self._look_if_due()
        forgotten = await self._first_of(self._order(user_id), lambda client: client.forget(user_id))
        await _all(self._drop(url, user_id) for url in forgotten.replicas)
        return forgotten

    async def _drop(self, url: str, user_id: str) -> None:
        """Has one replica drop a forgotten user. A replica that is no longer listed gives no memories of others."""
        try:
            await self._client(url).drop(user_id)
        except MemoryUnreachable as error:
            self._lose(url)
            if url in (await self._of_any(lambda client: client.replicas())).replicas:
                raise MemoryUnavailable(f"{error.detail}: forgotten, but not confirmed by every replica") from error

    # ------------------------------------------------------------------------------------ about the service

    async def model(self) -> ModelReply:
        """Returns the serving and the wanted model."""
        return await self._of_any(lambda client: client.model())

    async def change_model(self, request: ModelRequest) -> ModelReply:
        """Makes a model the wanted one, or lets the wanted model serve, on all replicas.

        Returns the reply of a replica that has trouble with the model, if there is one.
        """
        first = await self._of_any(lambda client: client.change_model(request))
        usable = [url for url in self._members.ready if self._members.is_usable(url)]
        others = [self._client(url).change_model(request) for url in usable] if len(usable) > 1 else []
        replies = await asyncio.gather(*others, return_exceptions=True)
        return next((one for one in replies if isinstance(one, ModelReply) and one.trouble), first)

    async def walk(self, cursor: int, limit: int, slots: range = ALL_SLOTS) -> UserPage:
        """Lists users of some hash slots, a page at a time."""
        return await self._of_any(lambda client: client.walk(cursor, limit, slots))

    async def stale(self, version: str, cursor: int, limit: int, slots: range = ALL_SLOTS) -> StalePage:
        """Lists users of some hash slots whose records are not of model `version`, a page at a time."""
        return await self._of_any(lambda client: client.stale(version, cursor, limit, slots))

    async def users(self, prefix: str, limit: int) -> Sequence[str]:
        """Lists user ids with a prefix."""
        return await self._of_any(lambda client: client.users(prefix, limit))

    async def catalogue(self, since: int, revision: int) -> CatalogueReply:
        """Lists catalogue items from number `since` on, and earlier items that changed after `revision`."""
        return await self._of_any(lambda client: client.catalogue(since, revision))

    async def register(self, request: RegisterRequest) -> RegisterReply:
        """Registers or changes catalogue items."""
        return await self._of_any(lambda client: client.register(request))

    async def quota(self, request: QuotaRequest) -> int:
        """Returns how many of the wanted requests are granted."""
        return await self._of_any(lambda client: client.quota(request))

    async def ready(self) -> Readiness:
        """Returns the readiness of the first replica that is ready. Raises MemoryUnavailable if none is."""
        await self._look_if_due()
        trouble = MemoryUnavailable("memory service: no replica is known")
        for url in self._order(None):
            try:
                return await self._client(url).ready()
            except MemoryUnavailable as error:
                trouble = error
        raise trouble

    async def _of_any(self, call: Callable[[MemoryClient], Awaitable[T]]) -> T:
        await self._look_if_due()
        return await self._first_of(self._order(None), call)

    # ------------------------------------------------------------------------------------------ whom to ask

    async def _first_of(
        self, order: Sequence[str], call: Callable[[MemoryClient], Awaitable[T]], hanging_s: float | None = None
    ) -> T:
        """Returns the reply of the first replica that can be reached.

        A replica that has not answered after `hanging_s` is given up, unless it is the last one to ask.
        """
        order = order[:TRIES]
        for url, following in zip_longest(order, order[1:]):
            try:
                async with asyncio.timeout(hanging_s if self._members.is_usable(following) else None):
                    return await call(self._client(url))
            except (MemoryUnreachable, TimeoutError):
                self._lose(url)
                if following is None:
                    raise
        raise MemoryUnavailable("memory service: no replica is known")

    def _order(self, user_id: str | None) -> list[str]:
        return self._members.order(self._anybody if user_id is None else user_id)

    def _client(self, url: str) -> MemoryClient:
        client = self._clients.get(url)
        if client is None:
            client = self._clients[url] = MemoryClient(url, self._timeout_s, self._token)
        return client

    # --------------------------------------------------------------------------------- which replicas there are

    async def _look_if_due(self) -> None:
        """Refreshes the list of replicas in the background; waits for it if the present list is too old."""
        age = time.monotonic() - self._looked_at
        if age > LOOK_S:
            self._look_soon()
            if age > STALE_S and self._looking is not None:
                await asyncio.shield(self._looking)

    def _look_soon(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())

    def _lose(self, url: str) -> None:
        self._members.lost.add(url)
        self._look_soon()

    async def _look(self) -> None:
        """Takes over the list of any replica that answers. Lost replicas are asked in the background."""
        reachable = self._members.reachable
        random.shuffle(reachable)
        for url in reachable:
            if (reply := await self._listed_by(url)) is not None:
                self._members.adopt(reply)
                break
        self._members.prune_lost()
        self._looked_at = time.monotonic()
        if self._members.lost and (self._probing is None or self._probing.done()):
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Asks the lost replicas; those that answer are no longer lost."""
        for reply in await asyncio.gather(*(self._listed_by(url) for url in list(self._members.lost))):
            if reply is not None and not self._members.ready:
                self._members.adopt(reply)

    async def _listed_by(self, url: str) -> ReplicasReply | None:
        """The list of a replica; None if there is no answer."""
        try:
            reply = await self._client(url).replicas()
        except MemoryUnreachable:
            self._members.lost.add(url)
            return None
        except MemoryUnavailable:
            return None
        self._members.lost.discard(url)
        return reply


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Returns the results of all calls. If some fail, raises the first error after all have ended."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def _joined(parts: Sequence[tuple[Sequence[int], Sequence[T]]]) -> list[T]:
    """The users of all parts in the order of their rows."""
    of_row = {row: user for rows, users in parts for row, user in zip(rows, users, strict=True)}
    return [of_row[row] for row in sorted(of_row)]
