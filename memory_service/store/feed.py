"""News of what changes in Redis as it happens: which records were written, deleted, or have expired.

Redis itself publishes them (keyspace notifications, from each primary of a cluster) in the same step as the change, so
that nothing is written for it and expiry is published too. Redis does not keep notifications for a listener that is
away: after each interruption, and when another primary takes over, the feed says that some may have been missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from memory_service.protocol.hash_slots import user_of
from memory_service.store.redis.connect import Connector
from memory_service.store.redis.connection import RedisConnection
from memory_service.store.redis.errors import StoreUnavailable
from memory_service.tasks import cancel_and_wait

CHANNEL = "__keyspace@{database}__:"
EVENTS = set("K$gxe")
"""Keyspace notifications (K) of strings ($), of deletions (g), of expiry (x) and of evictions (e)."""
GATHER_S = 0.25
"""How long changes are gathered before they are handed on."""
WATCH_S = 1.0
"""How often the primaries are compared with those that are listened to."""
RETRY_S = 0.25
"""Pause before listening again after an interruption."""
log = logging.getLogger(__name__)


class Feed:
    """Listens while `run` runs.

    Args:
        redis: what to listen to.
        changed: called with the users whose records have changed.
        missed: called each time that listening begins, as earlier changes may have been missed.
    """

    def __init__(
        self, redis: Connector, changed: Callable[[set[str]], Awaitable[None]], missed: Callable[[], Awaitable[None]]
    ) -> None:
        self._redis, self._changed, self._missed = redis, changed, missed
        self._gathered: set[str] = set()
        self._some = asyncio.Event()
        self.listening = asyncio.Event()
        """Set while no change can be missed."""

    async def run(self) -> None:
        """Listen until cancelled, and begin again after each interruption."""
        handing_on = asyncio.create_task(self._hand_on())
        try:
            while True:
                with suppress(StoreUnavailable, RedisError, OSError):
                    await self._listen()
                self.listening.clear()
                await asyncio.sleep(RETRY_S)
                with suppress(StoreUnavailable):
                    await (await self._redis.connection()).refresh()
        finally:
            await cancel_and_wait([handing_on])

    async def _listen(self) -> None:
        """Listen to all primaries until one is lost or replaced."""
        connection = await self._redis.connection()
        channel = CHANNEL.format(database=connection.database).encode()
        async with AsyncExitStack() as stack:
            primaries, clients = await connection.primaries(), await connection.listeners()
            for client in clients:
                stack.push_async_callback(client.aclose)
            subscriptions = [await self._subscribed(client, channel, stack) for client in clients]
            self.listening.set()
            await self._missed()
            tasks = [asyncio.create_task(self._hear(subscription, channel)) for subscription in subscriptions]
            tasks.append(asyncio.create_task(_watch(connection, primaries)))
            try:
                ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
            finally:
                await cancel_and_wait(tasks)

    async def _subscribed(self, client: Redis, channel: bytes, stack: AsyncExitStack) -> Any:
        await _turn_on(client)
        subscription = client.pubsub(ignore_subscribe_messages=True)
        stack.push_async_callback(subscription.aclose)
        await subscription.psubscribe(channel + b"ramrec:{*")
        return subscription

    async def _hear(self, subscription: Any, channel: bytes) -> None:
        while True:
            message = await subscription.get_message(timeout=None)  # None for a confirmed subscription
            if message is not None:
                self._gathered.add(user_of(message["channel"].removeprefix(channel)))
                self._some.set()

    async def _hand_on(self) -> None:
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


async def _watch(connection: RedisConnection, before: list[str]) -> None:
    """Return once other servers have become primaries."""
    while await connection.primaries() == before:
        await asyncio.sleep(WATCH_S)
        await connection.refresh()


async def _turn_on(client: Redis) -> None:
    """Make a server publish the notifications, if it lets us."""
    try:
        now = (await client.config_get("notify-keyspace-events"))["notify-keyspace-events"]
        on = set((now or "").replace("A", "g$lshzxetd"))
        if not on >= EVENTS:
            await client.config_set("notify-keyspace-events", "".join(sorted(on | EVENTS)))
    except (ResponseError, KeyError) as error:  # a managed Redis forbids CONFIG
        log.warning("cannot turn on keyspace notifications: set notify-keyspace-events to K$gxe in Redis (%s)", error)
