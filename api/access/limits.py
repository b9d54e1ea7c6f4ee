"""Requests per second of an API key, shared by all api processes.

The memory service counts in Redis what each process took for the present second; a process takes a portion at a time
and spends it by itself, so that most requests wait for nothing. Where it cannot be asked, each process grants the
whole limit by itself. Seconds are those of the api's clock; each begins with a full allowance.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256

from api.access.keys import Key
from api.http.problems import MemoryUnavailable, RateLimited
from memory_service.protocol.structs import QuotaRequest
from memory_service.protocol.telemetry import CALL

PORTIONS = 10
"""Portions that a limit is taken in: what other processes cannot use is at most one for each."""
PATIENCE_S = 0.25
"""How long the memory service may take to grant a portion."""
ALONE_S = 1.0
"""How long it is not asked again after it did not answer."""
Lease = Callable[[QuotaRequest], Awaitable[int]]
log = logging.getLogger(__name__)


@dataclass
class Spending:
    """One key's requests in one second: granted in all, left of that, and whether no more are granted."""

    second: int = -1
    granted: int = 0
    left: int = 0
    refused: bool = False
    asking: asyncio.Task[None] | None = None

    def turn(self, second: int) -> None:
        """A new second begins."""
        if second != self.second:
            self.second, self.granted, self.left, self.refused = second, 0, 0, False


class Limits:
    """What is left to each key. `lease` asks the memory service; `clock` gives seconds UTC."""

    def __init__(self, lease: Lease, clock: Callable[[], float] = time.time) -> None:
        self._lease, self._clock = lease, clock
        self._spending: dict[str, Spending] = {}
        self._alone_until = 0.0

    def take(self, key: Key) -> bool:
        """Spend a request of what is at hand; False: ask `more`."""
        one = self._spending.get(key.sha256)
        if one is None:
            one = self._spending[key.sha256] = Spending()
        one.turn(int(self._clock()))
        if not one.left:
            return False
        one.left -= 1
        return True

    async def more(self, key: Key) -> None:
        """Spend a request after another portion was granted. Raises RateLimited."""
        one = self._spending[key.sha256]
        while not self.take(key):
            if one.refused:
                raise RateLimited(f"the API key {key.name!r} has {key.per_second} requests a second")
            if one.asking is None:
                one.asking = asyncio.create_task(self._ask(key, one))
            await asyncio.shield(one.asking)

    async def _ask(self, key: Key, one: Spending) -> None:
        CALL.set(None)  # this is for all who wait: the deadline of the one who asks first is not theirs
        limit, second = key.per_second or 0, one.second
        try:
            granted = await self._granted(key, second, limit)
            if granted is None:  # out of reach: all that this process has not granted yet
                granted = max(0, limit - one.granted)
            if second == one.second:
                one.granted, one.left, one.refused = one.granted + granted, granted, granted == 0
        finally:
            one.asking = None

    async def _granted(self, key: Key, second: int, limit: int) -> int | None:
        if self._clock() < self._alone_until:
            return None
        name = sha256(key.sha256.encode()).hexdigest()[:32]  # not what a key is known by
        try:
            async with asyncio.timeout(PATIENCE_S):
                granted = await self._lease(QuotaRequest(name, second, limit, -(-limit // PORTIONS)))
        except (MemoryUnavailable, TimeoutError):
            if not self._alone_until:
                log.warning("limits of API keys are not shared: the memory service does not answer")
            self._alone_until = self._clock() + ALONE_S
            return None
        if self._alone_until:
            log.warning("limits of API keys are shared again")
            self._alone_until = 0.0
        return granted
