"""Several memory replicas as one: each user's calls go to the replica that owns the user, and memories of others are
asked of all of them, each of the users that it owns.

Who owns whom they say themselves (`memory_service.slots.Table`); it is looked at every second and whenever one is lost.
In a lost owner's place any other answers, with the version checked in Redis, as correct and only slower; what only the
lost one held for others is missing, and the answer says so (`degraded`). A memory service that stands alone is called
as it is.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from api.memory.client import MemoryClient, Readiness, Remembered
from api.problems import MemoryUnavailable, MemoryUnreachable
from memory_service.schemas import (
    CatalogueReply,
    Forgotten,
    GroupReply,
    ModelReply,
    ModelRequest,
    PlanReply,
    PlanRequest,
    QuotaRequest,
    RegisterReply,
    RegisterRequest,
    RekeyReply,
    RekeyRequest,
    RetrieveRequest,
    StalePage,
    UserMemory,
    UserPage,
    WriteReply,
    WriteRequest,
)
from memory_service.slots import ALL_SLOTS, NOBODY, Table, pack, range_of, read
from model import rules as rule
from model.bank import Entries, Retrieved, merged
from model.rules import Ints

LOOK_S = 1.0
"""How often it is looked who owns whom."""
STALE_S = 3.0
"""A view so old is not gone by any more: the calls that found it so wait for a new one."""
TRIES = 3
"""Replicas asked in place of one that is lost."""
BELIEVED = 5
"""Looks in a row that must say so before an older table is taken for the present one."""
T = TypeVar("T")
About = TypeVar("About", PlanRequest, WriteRequest, RekeyRequest)


@dataclass(frozen=True)
class View:
    """The group as it was seen last."""

    table: Table
    alive: frozenset[str]

    def owner(self, user_id: str) -> str:
        """Who owns a user; "" where nobody does."""
        place = int(self.table.owner[range_of(user_id)])
        return "" if place == NOBODY else self.table.members[place]


class MemoryGroup:
    """The calls of `MemoryClient`, over one memory service or a group. `urls`: some of the replicas, separated by
    commas; the others are learnt from them.

    Every method raises what `MemoryClient`'s does, once no replica is left that could answer.
    """

    def __init__(self, urls: str, timeout_s: float, token: str | None = None) -> None:
        self._seeds = [url.strip().rstrip("/") for url in urls.split(",") if url.strip()]
        self._timeout_s, self._token = timeout_s, token
        self._clients: dict[str, MemoryClient] = {}
        self._view: View | None = None
        self._looked_at, self._doubts = -np.inf, 0
        self._looking: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._down: set[str] = set()
        self._preferred = random.random()  # replicas asked for what any can tell differ between apis

    async def close(self) -> None:
        """Close all connections."""
        for task in (self._looking, self._probing):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    # ----------------------------------------------------------------------------------------- retrieve

    async def retrieve(self, request: RetrieveRequest) -> Remembered:
        """Memories of a batch of users. Where not all replicas answer for the users they own, it is degraded."""
        view = await self._current()
        if view is None or len(view.table.members) < 2:
            return await self._try(self._any(view), lambda client: client.retrieve(request))
        found = await self._retrieve(view, request)
        if found.degraded and self._down & set(view.table.members):
            await self._look_now()  # who could not be reached may have handed over to others
            if self._view is not None and not self._view.table.same(view.table):
                return await self._retrieve(self._view, request)
        return found

    async def _retrieve(self, view: View, request: RetrieveRequest) -> Remembered:
        asked = await self._ask_owners(view, request)
        found = _assembled([(rows, part) for rows, part, _ in asked], len(request.users))
        others = await self._ask_others(view, request, found, asked)
        parts = [one for one in others if one is not None]
        missing = len(parts) < len(others) or any(part.degraded for _, part in parts)
        return replace(
            found,
            degraded=found.degraded or missing,
            retrieved=_with_others(found.retrieved, [(rows, part.retrieved.collective) for rows, part in parts]),
        )

    async def _ask_owners(
        self, view: View, request: RetrieveRequest
    ) -> list[tuple[NDArray[np.int64], Remembered, str]]:
        """Everything about each user from the owner, memories of others only of whom it owns; and who answered."""

        async def ask(owner: str, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Remembered, str]:
            some = _rows_of(request, rows)

            async def of(client: MemoryClient) -> tuple[NDArray[np.int64], Remembered, str]:
                ranges = pack(view.table.owned(client.url))
                return rows, await client.retrieve(structs.replace(some, ranges=ranges, tell_held=True)), client.url

            return await self._try(self._order(view, owner), of)

        return await _all(ask(owner, rows) for owner, rows in self._by_owner(view, request.users).items())

    async def _ask_others(
        self,
        view: View,
        request: RetrieveRequest,
        found: Remembered,
        asked: Sequence[tuple[NDArray[np.int64], Remembered, str]],
    ) -> list[tuple[NDArray[np.int64], Remembered] | None]:
        """Memories of those whom the other replicas own, for the same queries; None where one does not answer."""
        queries = _queries(request, found.states)
        held = {row: items for rows, part, _ in asked for row, items in zip(rows.tolist(), part.held, strict=False)}
        wanting = found.retrieved.collective_k > 0

        async def ask(member: str) -> tuple[NDArray[np.int64], Remembered] | None:
            done = [rows for rows, _, who in asked if who == member]
            rows = np.flatnonzero(wanting & ~np.isin(np.arange(len(wanting)), np.concatenate([*done, []])))
            if not len(rows):
                return rows, Remembered.nothing(0, found.states.shape[1])
            if member in self._down:
                return None
            some = RetrieveRequest(
                model_version=request.model_version,
                users=[""] * len(rows),
                query_rows=np.arange(len(rows), dtype="<u4").tobytes(),
                queries=queries[rows].astype("<f4").tobytes(),
                entropy=found.retrieved.entropy[rows].astype("<f4").tobytes(),
                ranges=pack(view.table.owned(member)),
                held=[held.get(row, b"") for row in rows.tolist()],
            )
            try:
                return rows, await self._client(member).retrieve(some)
            except MemoryUnreachable:
                self._lose(member)
                return None

        owners = [one for one in view.table.members if view.table.owned(one).any()]
        return await _all(ask(member) for member in owners)

    # -------------------------------------------------------------------------------------------- write

    async def plan(self, request: PlanRequest) -> PlanReply:
        """What events would mean, and the states they need."""
        parts = await self._split(request, lambda client, part: client.plan(part))
        size = max(part.catalogue_size for _, part in parts)
        return PlanReply(size, _in_order([(rows, part.users) for rows, part in parts]))

    async def write(self, request: WriteRequest) -> WriteReply:
        """Write planned events."""
        parts = await self._split(request, lambda client, part: client.write(part))
        size = max(part.catalogue_size for _, part in parts)
        return WriteReply(size, _in_order([(rows, part.users) for rows, part in parts]))

    async def rekey(self, request: RekeyRequest) -> RekeyReply:
        """Give stale records the keys of this model."""
        parts = await self._split(request, lambda client, part: client.rekey(part))
        return RekeyReply([user for _, part in parts for user in part.rekeyed])

    async def forget(self, user_id: str) -> Forgotten:
        """Forget a user; every replica that is alive has let go."""
        view = await self._current()
        if view is None:
            return await self._try(self._any(None), lambda client: client.forget(user_id))

        async def of(client: MemoryClient) -> tuple[Forgotten, str]:
            return await client.forget(user_id), client.url

        gone, done = await self._try(self._order(view, view.owner(user_id)), of)
        await _all(self._let_go(member, user_id) for member in view.table.members if member != done)
        return gone

    async def _let_go(self, member: str, user_id: str) -> None:
        """Have a replica let go of a forgotten user. One that is gone holds nothing: it will read Redis anew."""
        try:
            await self._client(member).forget(user_id, here=True)
        except MemoryUnreachable as error:
            self._lose(member)
            await self._look_now()
            if self._view is not None and member in self._view.alive:
                raise MemoryUnavailable(f"{error.detail}: forgotten, but not confirmed by every replica") from error

    # ---------------------------------------------------------------------------------- what any can say

    async def inspect(self, user_id: str) -> UserMemory | None:
        """A user's bank; None where nothing is known."""
        view = await self._current()
        order = self._any(None) if view is None else self._order(view, view.owner(user_id))
        return await self._try(order, lambda client: client.inspect(user_id))

    async def model(self) -> ModelReply:
        """Which models serve and are wanted; users counted over all replicas."""
        return await self._everywhere(lambda client: client.model())

    async def change_model(self, request: ModelRequest) -> ModelReply:
        """Want another model, or let the wanted one serve; all replicas hear of it."""
        await self._try(self._any(await self._current()), lambda client: client.change_model(request))
        return await self._everywhere(lambda client: client.change_model(request))

    async def _everywhere(self, call: Callable[[MemoryClient], Awaitable[ModelReply]]) -> ModelReply:
        view = await self._current()
        if view is None:
            return await self._try(self._any(None), call)
        members = [one for one in view.table.members if one not in self._down]
        told = await asyncio.gather(*(call(self._client(one)) for one in members), return_exceptions=True)
        replies = [one for one in told if isinstance(one, ModelReply)]
        if not replies:
            return await self._try(self._any(view), call)
        users, moved = sum(one.users for one in replies), sum(one.moved for one in replies)
        first = replies[0]
        trouble = next((one.trouble for one in replies if one.trouble), "")
        return ModelReply(first.serving, first.wanted, first.serving_run, first.wanted_run, users, moved, trouble)

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
        trouble: MemoryUnavailable | None = None
        for url in self._any(await self._current()):
            try:
                return await self._client(url).ready()
            except MemoryUnavailable as error:
                trouble = error
        raise trouble or MemoryUnavailable("memory service: no replica is known")

    # ---------------------------------------------------------------------------------------- who to ask

    async def _of_any(self, call: Callable[[MemoryClient], Awaitable[T]]) -> T:
        return await self._try(self._any(await self._current()), call)

    async def _split(
        self, request: About, call: Callable[[MemoryClient, About], Awaitable[T]]
    ) -> list[tuple[NDArray[np.int64], T]]:
        """A call about users, in parts for their owners: the rows of each part, and its answer."""
        view, users = await self._current(), [user.user_id for user in request.users]
        if view is None or len(view.table.members) < 2 or not users:
            rows = np.arange(len(users))
            return [(rows, await self._try(self._any(view), lambda client: call(client, request)))]

        async def part(owner: str, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], T]:
            some = structs.replace(request, users=_take(request.users, rows))
            return rows, await self._try(self._order(view, owner), lambda client: call(client, some))

        return await _all(part(owner, rows) for owner, rows in self._by_owner(view, users).items())

    async def _try(self, order: Sequence[str], call: Callable[[MemoryClient], Awaitable[T]]) -> T:
        """The answer of the first replica in this order that can be reached."""
        for left, url in zip(reversed(range(min(TRIES, len(order)))), order, strict=False):
            try:
                return await call(self._client(url))
            except MemoryUnreachable:
                self._lose(url)
                if not left:
                    raise
        raise MemoryUnavailable("memory service: no replica is known")

    def _by_owner(self, view: View, users: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Rows of users by who is to be asked first; nobody's, and those of the lost, go to the others by turns."""
        rows: dict[str, list[int]] = {}
        there = [one for one in view.table.members if one not in self._down] or list(view.table.members)
        for row, user in enumerate(users):
            owner = view.owner(user) if user else ""
            rows.setdefault(owner if owner in there else there[row % len(there)], []).append(row)
        return {one: np.array(some, np.int64) for one, some in rows.items()}

    def _order(self, view: View, owner: str) -> list[str]:
        """Replicas to ask about a user of an owner; those that are lost come last."""
        rest = [one for one in view.table.members if one != owner]
        order = [*([owner] if owner else []), *rest]
        return sorted(order, key=lambda one: one in self._down)

    def _any(self, view: View | None) -> list[str]:
        """Replicas to ask for what any can say."""
        urls = list(view.table.members) if view is not None and view.table.members else self._seeds
        first = int(self._preferred * len(urls))
        return sorted([*urls[first:], *urls[:first]], key=lambda one: one in self._down)

    def _client(self, url: str) -> MemoryClient:
        client = self._clients.get(url)
        if client is None:
            client = self._clients[url] = MemoryClient(url, self._timeout_s, self._token)
        return client

    # ------------------------------------------------------------------------------------ who owns whom

    async def _current(self) -> View | None:
        """The group as seen a moment ago; None where the memory service stands alone, or nobody answers."""
        age = time.monotonic() - self._looked_at
        if age > STALE_S:
            await self._look_now()
        elif age > LOOK_S:
            self._look_soon()
        return self._view

    async def _look_now(self) -> None:
        self._look_soon()
        assert self._looking is not None
        await asyncio.shield(self._looking)

    def _look_soon(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())

    def _lose(self, url: str) -> None:
        self._down.add(url)
        self._look_soon()

    async def _look(self) -> None:
        """Ask somebody who is there. Whoever was lost is asked beside that, and no longer lost after an answer."""
        members = [] if self._view is None else list(self._view.table.members)
        known = list(dict.fromkeys([*members, *self._seeds]))
        random.shuffle(known)
        seen = await self._first_answer(url for url in known if url not in self._down)
        if seen is not None:
            self._adopt(seen)
        self._down &= {*self._seeds, *(known if self._view is None else self._view.table.members)}
        self._looked_at = time.monotonic()
        if self._down and (self._probing is None or self._probing.done()):
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Ask the lost; one that hangs keeps nobody waiting."""
        for reply in await asyncio.gather(*(self._described(url) for url in list(self._down))):
            if reply is not None:
                self._adopt(reply)

    async def _first_answer(self, urls: Iterable[str]) -> GroupReply | None:
        for url in urls:
            if (reply := await self._described(url)) is not None:
                return reply
        return None

    async def _described(self, url: str) -> GroupReply | None:
        try:
            reply = await self._client(url).group()
        except MemoryUnreachable:
            self._down.add(url)
            return None
        except MemoryUnavailable:
            return None
        self._down.discard(url)
        return reply

    def _adopt(self, reply: GroupReply) -> None:
        if reply.table is None:
            self._view = None
            return
        with suppress(ValueError):
            table = read(reply.table)
            if self._view is not None and table.epoch < self._view.table.epoch:
                self._doubts += 1
                if self._doubts < BELIEVED:
                    return
            self._doubts = 0
            self._view = View(table, frozenset(reply.alive))


async def _all(calls: Iterable[Awaitable[T]]) -> list[T]:
    """What all calls return; where some fail, the first failure once all have come to an end."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]


# ------------------------------------------------------------------------------------- parts and wholes


def _take(users: Sequence[T], rows: Ints) -> list[T]:
    return [users[row] for row in rows.tolist()]


def _in_order(parts: Sequence[tuple[NDArray[np.int64], Sequence[T]]]) -> list[T]:
    """The users of all parts in the order of the whole."""
    placed = {row: one for rows, some in parts for row, one in zip(rows.tolist(), some, strict=True)}
    return [placed[row] for row in sorted(placed)]


def _rows_of(request: RetrieveRequest, rows: NDArray[np.int64]) -> RetrieveRequest:
    """The part of a request that is about some of its rows."""
    place = {row: n for n, row in enumerate(rows.tolist())}
    at, width = np.frombuffer(request.query_rows, "<u4"), 0
    if len(at):
        width = len(request.queries) // len(at)
    given = [n for n, row in enumerate(at.tolist()) if row in place]
    return structs.replace(
        request,
        users=_take(request.users, rows),
        query_rows=np.array([place[int(at[n])] for n in given], "<u4").tobytes(),
        queries=b"".join(request.queries[n * width : (n + 1) * width] for n in given),
        k=np.frombuffer(request.k, "<i4")[rows].tobytes() if request.k else b"",
        ignore={place[row]: items for row, items in request.ignore.items() if row in place},
        uncounted=[place[row] for row in request.uncounted if row in place],
        alone=[place[row] for row in request.alone if row in place],
        entropy=np.frombuffer(request.entropy, "<f4")[rows].tobytes() if request.entropy else b"",
        now=np.frombuffer(request.now, "<f8")[rows].tobytes() if request.now else b"",
    )


def _queries(request: RetrieveRequest, states: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B, d) what the memories of others are looked for with: states, or what was sent instead."""
    queries = rule.unit(states).astype(np.float32)
    at, given = np.frombuffer(request.query_rows, "<u4"), np.frombuffer(request.queries, "<f4")
    if len(given) != len(at) * queries.shape[1]:
        raise MemoryUnavailable("memory service: states are not of this model's width")
    queries[at] = given.reshape(len(at), queries.shape[1])
    return queries


def _assembled(parts: Sequence[tuple[NDArray[np.int64], Remembered]], count: int) -> Remembered:
    """Answers about parts of a batch of `count` users as one."""
    order = np.argsort(np.concatenate([rows for rows, _ in parts]), kind="stable")

    def column(name: str, of: str = "") -> NDArray[Any]:
        values = [getattr(getattr(part, of) if of else part, name) for _, part in parts]
        return np.asarray(np.concatenate(values)[order])

    seen = [one for _, part in parts for one in part.seen]
    return Remembered(
        retrieved=Retrieved(
            entropy=column("entropy", "retrieved"),
            k=column("k", "retrieved"),
            bank_size=column("bank_size", "retrieved"),
            own=_scattered([(rows, part.retrieved.own) for rows, part in parts], count),
            collective=_scattered([(rows, part.retrieved.collective) for rows, part in parts], count),
            collective_k=column("collective_k", "retrieved"),
            habits=_habits([(rows, part.retrieved.habits) for rows, part in parts], count),
            present=_present([(rows, part.retrieved.present) for rows, part in parts], count),
        ),
        known=column("known"),
        versions=column("versions"),
        states=column("states"),
        seen=[seen[n] for n in order.tolist()],
        stale=[one for _, part in parts for one in part.stale],
        without={int(rows[n]): job for rows, part in parts for n, job in part.without.items()},
        moved={int(rows[n]): model for rows, part in parts for n, model in part.moved.items()},
        degraded=any(part.degraded for _, part in parts),
        catalogue_size=max(part.catalogue_size for _, part in parts),
    )


def _scattered(parts: Sequence[tuple[NDArray[np.int64], Entries]], count: int) -> Entries:
    """Entries of some rows put among `count` rows; the others have none."""
    whole = Entries.empty(count, max((part.item.shape[1] for _, part in parts), default=0))
    columns = {name: getattr(whole, name).copy() for name in Entries.COLUMNS}
    for rows, part in parts:
        for name, values in columns.items():
            values[rows, : part.item.shape[1]] = getattr(part, name)
    return Entries(**columns)


def _habits(parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], count: int) -> NDArray[np.float32]:
    """What entries of some rows tell put among `count` rows, (count, K, F). F is 0 where a part that has entries does
    not tell: its replica, of another version, knows no habits.
    """
    told = [habits.shape[2] for _, habits in parts if habits.shape[1]]
    width = max((habits.shape[1] for _, habits in parts), default=0)
    whole = np.zeros((count, width, min(told, default=0)), np.float32)
    for rows, habits in parts:
        if habits.shape[1]:
            whole[rows, : habits.shape[1]] = habits[..., : whole.shape[2]]
    return whole


def _present(parts: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], count: int) -> NDArray[np.int64]:
    """Items of some rows put among `count` rows, (count, P)."""
    whole = np.zeros((count, max((items.shape[1] for _, items in parts), default=0)), np.int64)
    for rows, items in parts:
        whole[rows, : items.shape[1]] = items
    return whole


def _with_others(retrieved: Retrieved, parts: Sequence[tuple[NDArray[np.int64], Entries]]) -> Retrieved:
    """With the best of what every replica found among those whom it owns."""
    every = [retrieved.collective, *(_scattered([part], len(retrieved.k)) for part in parts if len(part[0]))]
    return replace(retrieved, collective=merged(every, retrieved.collective_k))
