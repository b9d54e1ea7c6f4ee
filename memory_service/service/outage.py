"""Outages of Redis: once a call has failed, further calls fail at once until Redis answers again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

from memory_service.store.redis.errors import ShardUnavailable, StoreUnavailable
from memory_service.tasks import cancel_and_wait

RETRY_S = 0.25
"""Pause between two pings of a lost Redis."""
log = logging.getLogger(__name__)


class Outage:
    """Whether Redis is out of reach. `ping`: raises StoreUnavailable while Redis does not answer."""

    def __init__(self, ping: Callable[[], Awaitable[None]]) -> None:
        self._ping = ping
        self._search: asyncio.Task[None] | None = None

    @property
    def is_on(self) -> bool:
        """Whether Redis counts as out of reach."""
        return self._search is not None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Goes around calls of Redis. Raises StoreUnavailable at once during an outage; one that is raised within
        begins an outage, unless only a part of a Redis Cluster is out of reach.
        """
        if self.is_on:
            raise StoreUnavailable("Redis is out of reach")
        try:
            yield
        except ShardUnavailable:  # the other primaries answer
            raise
        except StoreUnavailable:
            self._begin()
            raise

    async def check(self) -> None:
        """Ping Redis, outage or not. Raises StoreUnavailable."""
        try:
            await self._ping()
        except StoreUnavailable:
            self._begin()
            raise
        self._end()

    async def close(self) -> None:
        """Stop looking for Redis."""
        await cancel_and_wait([self._search])

    def _begin(self) -> None:
        if self._search is None:
            log.warning("Redis is out of reach")
            self._search = asyncio.create_task(self._look_for_redis())

    def _end(self) -> None:
        if self._search is not None:
            log.warning("Redis answers again")
            self._search.cancel()
            self._search = None

    async def _look_for_redis(self) -> None:
        while self._search is asyncio.current_task():  # a cancellation may get lost (`memory_service.tasks`)
            await asyncio.sleep(RETRY_S)
            with suppress(StoreUnavailable):
                await self._ping()
                self._end()
