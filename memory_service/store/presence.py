"""Which memory replicas are present: each announces itself in Redis, under its URL, again and again.

A memory replica that Redis has not heard from for `patience_s` counts as gone, and nobody waits for it any more, not
even to forget a user. From then on it must serve no memories of other users, until Redis has heard from it again and it
has compared what it holds with Redis: otherwise a user who was forgotten meanwhile would live on in it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from math import inf

from memory_service.store.redis.errors import StoreUnavailable
from memory_service.store.store import Store
from memory_service.tasks import cancel_and_wait

BEAT_S = 0.4
"""How often a memory replica announces itself."""
log = logging.getLogger(__name__)


class Presence:
    """This memory replica among the others.

    Args:
        store: where they announce themselves.
        url: where this one is reached.
        patience_s: how long a memory replica counts as present after it was last heard from.
        compare: brings what this one holds in line with Redis.
    """

    def __init__(self, store: Store, url: str, patience_s: float, compare: Callable[[], Awaitable[None]]) -> None:
        self.url = url
        self.replicas: dict[str, bool] = {}
        """The memory replicas at the last look, by URL, and whether each has loaded everything."""
        self.is_ready = False
        """Whether this one has loaded everything, so that callers may be sent here."""
        self.lapses = 0
        """How often this one counted as gone."""
        self._store, self._patience_s, self._compare = store, patience_s, compare
        self._compared_after, self._counts_until = 0, -inf
        self._has_left = False
        self._comparing: asyncio.Task[None] | None = None

    @property
    def is_current(self) -> bool:
        """Whether forgetting users waits for this memory replica, and it has missed none of them."""
        return time.monotonic() < self._counts_until and self._compared_after == self.lapses

    def caught_up(self, lapses: int) -> None:
        """Note that everything was compared with Redis, in a comparison that began after so many lapses."""
        self._compared_after = max(self._compared_after, lapses)

    async def run(self) -> None:
        """Announce this memory replica until cancelled."""
        try:
            while not self._has_left:
                with suppress(StoreUnavailable):
                    await self.beat()
                if self._compared_after < self.lapses and (self._comparing is None or self._comparing.done()):
                    self._comparing = asyncio.create_task(self._catch_up())
                await asyncio.sleep(BEAT_S)
        finally:
            await cancel_and_wait([self._comparing])

    async def beat(self) -> None:
        """Announce this memory replica once, and see which others are present. Raises StoreUnavailable."""
        begin = time.monotonic()
        was_present, self.replicas = await self._store.beat(self.url, self.is_ready, round(self._patience_s * 1000))
        was_heard_before = self._counts_until > -inf
        if was_heard_before and not was_present:
            self.lapses += 1
            log.warning("this memory replica counted as gone for a while: it compares what it holds with Redis")
        if not self._has_left:
            self._counts_until = begin + self._patience_s

    async def look(self) -> dict[str, bool]:
        """The memory replicas that are present now, by URL, and whether each is ready. Raises StoreUnavailable."""
        return await self._store.replicas()

    async def leave(self, linger_s: float) -> None:
        """Send callers to the others, and count as gone after `linger_s`; at once if no other is ready."""
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
