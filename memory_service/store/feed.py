"""What changes in Redis, heard as it happens: who was written, forgotten, or has expired.

Redis tells it itself (keyspace notifications, from each primary of a cluster), in the same step as the change, so that
nothing need be written for it, and what expires is told, too. Notifications are not kept for who does not listen: after
every interruption, and where another primary takes over, the listener is told that it may have missed something.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import redis.asyncio as redis
from redis.exceptions import RedisError, ResponseError

from memory_service.protocol.slots import user_of
from memory_service.store.link import Link, StoreUnavailable
from memory_service.tasks import end

PATTERN = b"__keyspace@*__:ramrec:{*"
MARK = b"__:ramrec:{"
EVENTS = set("K$gxe")
"""Keyspace notifications of strings and deletions, of what expired, and of what was evicted."""
GATHER_S = 0.25
"""How long what changes is gathered before it is looked at."""
QUIET_S = 1.0
"""How often it is looked whether primaries are still the same."""
RETRY_S = 0.25
log = logging.getLogger(__name__)


class Feed:
    """Listens as long as `run` runs. `changed` is called with users; `missed` after each new beginning."""

    def __init__(
        self, link: Link, changed: Callable[[set[str]], Awaitable[None]], missed: Callable[[], Awaitable[None]]
    ) -> None:
        self._link, self._changed, self._missed = link, changed, missed
        self._gathered: set[str] = set()
        self._some = asyncio.Event()
        self.listening = asyncio.Event()
        """Set while nothing is missed."""

    async def run(self) -> None:
        """Listen for good."""
        telling = asyncio.create_task(self._tell())
        try:
            while True:
                with suppress(StoreUnavailable, RedisError, OSError):
                    await self._listen()
                self.listening.clear()
                await asyncio.sleep(RETRY_S)
                with suppress(StoreUnavailable):
                    await (await self._link.road()).refresh()
        finally:
            await end([telling])

    async def _listen(self) -> None:
        """Until a primary is lost or others have taken over."""
        async with AsyncExitStack() as stack:
            road = await self._link.road()
            clients = await road.listeners()
            for client in clients:
                stack.push_async_callback(client.aclose)
            heard = [await self._subscribed(client, stack) for client in clients]
            self.listening.set()
            await self._missed()
            tasks = [asyncio.create_task(self._hear(one)) for one in heard]
            tasks.append(asyncio.create_task(self._watch(await road.primaries())))
            try:
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
            finally:
                await end(tasks)

    async def _subscribed(self, client: redis.Redis, stack: AsyncExitStack) -> Any:
        await _turn_on(client)
        heard = client.pubsub(ignore_subscribe_messages=True)
        stack.push_async_callback(heard.aclose)
        await heard.psubscribe(PATTERN)
        return heard

    async def _hear(self, heard: Any) -> None:
        while True:
            message = await heard.get_message(timeout=QUIET_S)
            if message is not None:
                self._gathered.add(user_of(b"ramrec:{" + message["channel"].split(MARK, 1)[1]))
                self._some.set()

    async def _watch(self, before: list[str]) -> None:
        """Until other primaries have taken over."""
        road = await self._link.road()
        while await road.primaries() == before:
            await asyncio.sleep(QUIET_S)
            await road.refresh()

    async def _tell(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(GATHER_S)
            self._some.clear()
            users, self._gathered = self._gathered, set()
            try:
                await self._changed(users)
            except StoreUnavailable:
                self._gathered |= users
                self._some.set()
                await asyncio.sleep(RETRY_S)


async def _turn_on(client: redis.Redis) -> None:
    """Have a server send notifications, where it may be told so."""
    try:
        now = (await client.config_get("notify-keyspace-events"))["notify-keyspace-events"]
        on = set((now or "").replace("A", "g$lshzxetd"))
        if not on >= EVENTS:
            await client.config_set("notify-keyspace-events", "".join(sorted(on | EVENTS)))
    except (ResponseError, KeyError) as error:  # not ours to set: a managed Redis has a parameter for it
        log.warning("cannot turn on keyspace notifications (wanted: notify-keyspace-events K$gxe): %s", error)
