"""The memory service as callers see it: any number of replicas, each of which answers for any user, alone.

Which one is asked about a user follows from the user id (rendezvous hashing), so that each keeps other users' banks at
hand; where it cannot be reached the user's next one answers, as correct and as complete. Who is there the replicas say
themselves (`GET /v1/replicas`); it is looked at every second, and whenever one is lost.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TypeVar
from zlib import crc32

from msgspec import structs

from api.http.problems import MemoryUnavailable, MemoryUnreachable
from api.memory.client import MemoryClient, Readiness, Remembered
from memory_service.protocol.slots import ALL_SLOTS
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
    RetrieveRequest,
    StalePage,
    UserMemory,
    UserPage,
    WriteReply,
    WriteRequest,
)

LOOK_S = 1.0
"""How often it is looked which replicas are there."""
STALE_S = 3.0
"""A view so old is not gone by any more: the calls that found it so wait for a new one."""
TRIES = 4
"""Replicas asked before a call fails."""
HANGS_S = 1.0
"""A replica that has not answered for so long what it has at hand is given up."""
MASK = 2**64 - 1
T = TypeVar("T")
About = TypeVar("About", PlanRequest, WriteRequest, RekeyRequest)


class MemoryReplicas:
    """The calls of `MemoryClient`, over all replicas. `urls`: some of them, or of a Service before them, separated by
    commas; the others are learnt from these.

    Every method raises what `MemoryClient`'s does, once no replica is left that could answer.
    """

    def __init__(self, urls: str, timeout_s: float, token: str | None = None) -> None:
        self._seeds = [url.strip().rstrip("/") for url in urls.split(",") if url.strip()]
        self._timeout_s, self._token = timeout_s, token
        self._clients: dict[str, MemoryClient] = {}
        self._ready: list[str] = []
        self._salts: dict[str, int] = {}
        self._down: set[str] = set()
        self._looked_at = -float("inf")
        self._looking: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._preferred = str(random.random())  # what any replica can tell is asked of another one by each process

    async def close(self) -> None:
        """Close all connections."""
        for task in (self._looking, self._probing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    def replica_of(self, user_id: str | None) -> str:
        """Whom to ask about a user (None: anybody) first; batches are made of users of one replica."""
        return self._order(user_id)[0]

    # ------------------------------------------------------------------------------------- about some users

    async def retrieve(self, request: RetrieveRequest) -> Remembered:
        """Memories of a batch of users, all from the replica of the first."""
        await self._look_if_due()
        first = next((user for user in request.users if user), None)
        return await self._try(self._order(first), lambda client: client.retrieve(request), HANGS_S)

    async def plan(self, request: PlanRequest) -> PlanReply:
        """What events would mean, and the states they need."""
        parts = await self._split(request, lambda client, part: client.plan(part))
        return PlanReply(max(part.catalogue_size for _, part in parts), _whole([(r, p.users) for r, p in parts]))

    async def write(self, request: WriteRequest) -> WriteReply:
        """Write planned events."""
        parts = await self._split(request, lambda client, part: client.write(part))
        return WriteReply(max(part.catalogue_size for _, part in parts), _whole([(r, p.users) for r, p in parts]))

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Give stale records the keys of this model."""
        parts = await self._split(request, lambda client, part: client.rekey(part))
        return RekeyReply([user for _, part in parts for user in part.rekeyed])

    async def _split(
        self, request: About, call: Callable[[MemoryClient, About], Awaitable[T]]
    ) -> list[tuple[list[int], T]]:
        """A call about users, in parts for their replicas: the rows of each part, and its answer."""
        await self._look_if_due()
        rows: dict[str, list[int]] = {}
        for row, user in enumerate(request.users):
            rows.setdefault(self.replica_of(user.user_id), []).append(row)

        async def part(some: list[int]) -> tuple[list[int], T]:
            of_them = structs.replace(request, users=[request.users[row] for row in some])
            order = self._order(request.users[some[0]].user_id if some else None)
            return some, await self._try(order, lambda client: call(client, of_them))

        return await _all(part(some) for some in rows.values() or [[]])

    async def inspect(self, user_id: str) -> UserMemory | None:
        """A user's bank; None where nothing is known."""
        await self._look_if_due()
        return await self._try(self._order(user_id), lambda client: client.inspect(user_id))

    async def forget(self, user_id: str) -> Forgotten:
        """Forget a user; every replica that is there has let go."""
        await self._look_if_due()
        gone = await self._try(self._order(user_id), lambda client: client.forget(user_id))
        await _all(self._let_go(url, user_id) for url in gone.replicas)
        return gone

    async def _let_go(self, url: str, user_id: str) -> None:
        """Have a replica let go of a forgotten user. One that counts as gone gives nothing of others any more."""
        try:
            await self._client(url).forget(user_id, here=True)
        except MemoryUnreachable as error:
            self._lose(url)
            if url in (await self._of_any(lambda client: client.replicas())).replicas:
                raise MemoryUnavailable(f"{error.detail}: forgotten, but not confirmed by every replica") from error

    # ---------------------------------------------------------------------------------- what any can say

    async def model(self) -> ModelReply:
        """Which models serve and are wanted."""
        return await self._of_any(lambda client: client.model())

    async def change_model(self, request: ModelRequest) -> ModelReply:
        """Want another model, or let the wanted one serve. All replicas hear of it; the answer tells of the first that
        has trouble with it.
        """
        first = await self._of_any(lambda client: client.change_model(request))
        there = [url for url in self._ready if url not in self._down]
        others = [self._client(url).change_model(request) for url in there] if len(there) > 1 else []
        told = [one for one in await asyncio.gather(*others, return_exceptions=True) if isinstance(one, ModelReply)]
        return next((one for one in told if one.trouble), first)

    async def walk(self, cursor: int, limit: int, slots: range = ALL_SLOTS) -> UserPage:
        """A step through the users of some slots."""
        return await self._of_any(lambda client: client.walk(cursor, limit, slots))

    async def stale(self, version: str, cursor: int, limit: int, slots: range = ALL_SLOTS) -> StalePage:
        """A step through the users of some slots: those who are not of a model."""
        return await self._of_any(lambda client: client.stale(version, cursor, limit, slots))

    async def users(self, prefix: str, limit: int) -> Sequence[str]:
        """User ids with a prefix."""
        return await self._of_any(lambda client: client.users(prefix, limit))

    async def catalogue(self, since: int, revision: int) -> CatalogueReply:
        """Catalogue items from a number on, and what changed of those before since a revision."""
        return await self._of_any(lambda client: client.catalogue(since, revision))

    async def register(self, request: RegisterRequest) -> RegisterReply:
        """Register or change items."""
        return await self._of_any(lambda client: client.register(request))

    async def quota(self, request: QuotaRequest) -> int:
        """Requests that may be answered of those wanted."""
        return await self._of_any(lambda client: client.quota(request))

    async def ready(self) -> Readiness:
        """Which model serves, once a replica is ready."""
        await self._look_if_due()
        trouble: MemoryUnavailable | None = None
        for url in self._order(None):
            try:
                return await self._client(url).ready()
            except MemoryUnavailable as error:
                trouble = error
        raise trouble or MemoryUnavailable("memory service: no replica is known")

    async def _of_any(self, call: Callable[[MemoryClient], Awaitable[T]]) -> T:
        await self._look_if_due()
        return await self._try(self._order(None), call)

    # ---------------------------------------------------------------------------------------- whom to ask

    async def _try(
        self, order: Sequence[str], call: Callable[[MemoryClient], Awaitable[T]], hangs_s: float | None = None
    ) -> T:
        """The answer of the first replica in this order that can be reached; one that says nothing for `hangs_s` is
        given up where there is another.
        """
        order = order[:TRIES]
        for url, following in zip_longest(order, order[1:]):
            is_last = following not in self._ready or following in self._down
            try:
                async with asyncio.timeout(None if is_last else hangs_s):
                    return await call(self._client(url))
            except (MemoryUnreachable, TimeoutError):
                self._lose(url)
                if following is None:
                    raise
        raise MemoryUnavailable("memory service: no replica is known")

    def _order(self, user_id: str | None) -> list[str]:
        """Replicas to ask about a user (None: whatever any can tell), the first first: those that are lost come last,
        and what we were told to begin with, where the addresses that replicas name themselves lead nowhere.
        """
        of = crc32((self._preferred if user_id is None else user_id).encode())
        ranked = sorted(self._ready, key=lambda url: _mixed(self._salts[url] ^ of))
        order = list(dict.fromkeys([*ranked, *self._seeds]))
        return sorted(order, key=lambda url: url in self._down)

    def _client(self, url: str) -> MemoryClient:
        client = self._clients.get(url)
        if client is None:
            client = self._clients[url] = MemoryClient(url, self._timeout_s, self._token)
        return client

    # ----------------------------------------------------------------------------------------- who is there

    async def _look_if_due(self) -> None:
        """Know who was there a moment ago."""
        age = time.monotonic() - self._looked_at
        if age > LOOK_S:
            self._look_soon()
            if age > STALE_S and self._looking is not None:
                await asyncio.shield(self._looking)

    def _look_soon(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())

    def _lose(self, url: str) -> None:
        self._down.add(url)
        self._look_soon()

    async def _look(self) -> None:
        """Ask somebody who is there. Whoever was lost is asked beside that, and no longer lost after an answer."""
        known = [url for url in dict.fromkeys([*self._ready, *self._seeds]) if url not in self._down]
        random.shuffle(known)
        for url in known:
            if (reply := await self._described(url)) is not None:
                self._adopt(reply)
                break
        self._down &= {*self._seeds, *self._ready}
        self._looked_at = time.monotonic()
        if self._down and (self._probing is None or self._probing.done()):
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Ask the lost; one that hangs keeps nobody waiting."""
        for reply in await asyncio.gather(*(self._described(url) for url in list(self._down))):
            if reply is not None and not self._ready:
                self._adopt(reply)

    async def _described(self, url: str) -> ReplicasReply | None:
        try:
            reply = await self._client(url).replicas()
        except MemoryUnreachable:
            self._down.add(url)
            return None
        except MemoryUnavailable:
            return None
        self._down.discard(url)
        return reply

    def _adopt(self, reply: ReplicasReply) -> None:
        """Take over who is there. While nobody is ready, whoever is there is asked."""
        ready = [url for url, is_ready in reply.replicas.items() if is_ready]
        self._ready = sorted(ready or reply.replicas)
        self._salts = {url: _mixed(crc32(url.encode()) << 32) for url in self._ready}


def _mixed(number: int) -> int:
    """A number whose bits all depend on all of the given one's (splitmix64)."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """What all calls return; where some fail, the first failure once all have come to an end."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]


def _whole(parts: Sequence[tuple[Sequence[int], Sequence[T]]]) -> list[T]:
    """The users of all parts in the order of the whole."""
    placed = {row: one for rows, some in parts for row, one in zip(rows, some, strict=True)}
    return [placed[row] for row in sorted(placed)]
