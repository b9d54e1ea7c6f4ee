"""Which replicas are there: each says so in Redis, under its URL, again and again.

A replica that has not been heard of for `patience_s` counts as gone, and nobody waits for it any more, not even to
forget a user. So from then on it gives nothing of others' memories, until it is heard again and has compared what it
holds with Redis: who was forgotten meanwhile cannot live on in it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from math import inf

from memory_service.store.link import StoreUnavailable
from memory_service.store.store import Store
from memory_service.tasks import end

BEAT_S = 0.4
log = logging.getLogger(__name__)


class Presence:
    """This replica, reached at `url`, among the others. `compare` brings what it holds to what Redis has."""

    def __init__(self, store: Store, url: str, patience_s: float, compare: Callable[[], Awaitable[None]]) -> None:
        self.url = url
        self.replicas: dict[str, bool] = {}
        """Who was there at the last look, by URL, and whether everything is loaded there."""
        self.is_ready = False
        """Whether everything is loaded here, so that callers may be sent here."""
        self.lapses = 0
        """How often this replica counted as gone."""
        self._store, self._patience_s, self._compare = store, patience_s, compare
        self._compared_after, self._counts_until = 0, -inf  # never heard
        self._has_left = False
        self._comparing: asyncio.Task[None] | None = None

    @property
    def is_current(self) -> bool:
        """Whether forgets wait for this replica, and nothing was missed while they did not."""
        return time.monotonic() < self._counts_until and self._compared_after == self.lapses

    def caught_up(self, lapses: int) -> None:
        """All was compared with Redis, from when it had lapsed so often."""
        self._compared_after = max(self._compared_after, lapses)

    async def run(self) -> None:
        """Be heard for good."""
        try:
            while not self._has_left:
                with suppress(StoreUnavailable):
                    await self.beat()
                if self._compared_after < self.lapses and (self._comparing is None or self._comparing.done()):
                    self._comparing = asyncio.create_task(self._catch_up())
                await asyncio.sleep(BEAT_S)
        finally:
            await end([self._comparing])

    async def beat(self) -> None:
        """Be heard once, and look who else is there. Raises StoreUnavailable."""
        begin = time.monotonic()
        was_there, self.replicas = await self._store.beat(self.url, self.is_ready, round(self._patience_s * 1000))
        if self._counts_until > -inf and not was_there:
            self.lapses += 1
            log.warning("this replica counted as gone for a while: what it holds is compared with Redis")
        if not self._has_left:
            self._counts_until = begin + self._patience_s

    async def look(self) -> dict[str, bool]:
        """Who is there now, by URL, and whether everything is loaded there. Raises StoreUnavailable."""
        return await self._store.replicas()

    async def leave(self, linger_s: float) -> None:
        """Send callers to the others, and count as gone once they know; at once where there are no others."""
        self.is_ready = False
        with suppress(StoreUnavailable):
            await self.beat()
            if any(is_ready for url, is_ready in self.replicas.items() if url != self.url):
                await asyncio.sleep(linger_s)
            self._has_left, self._counts_until = True, -inf
            await self._store.silence(self.url)

    async def _catch_up(self) -> None:
        with suppress(StoreUnavailable):
            await self._compare()
