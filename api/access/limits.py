"""Requests per second of an API key, limited over all api processes together.

The memory service counts in Redis how many requests all processes took for the present second. A process takes a
portion at a time and spends it by itself, so that most requests need no call. While the memory service cannot be
reached, each process grants the whole limit by itself. Seconds are those of the api's clock, and each begins with the
full limit.
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
from memory_service.protocol.call.context import CALL
from memory_service.protocol.structs import QuotaRequest

PORTIONS = 10
"""Portions that a limit is divided into; a process can keep at most one from being used by the others."""
PATIENCE_S = 0.25
"""Timeout of a call for a portion."""
ALONE_S = 1.0
"""Time after a failed call in which the memory service is not called again."""
Lease = Callable[[QuotaRequest], Awaitable[int]]
log = logging.getLogger(__name__)


@dataclass
class Spending:
    """Requests of one key in one second: how many were granted and are left, and whether more were refused."""

    second: int = -1
    granted: int = 0
    left: int = 0
    refused: bool = False
    asking: asyncio.Task[None] | None = None

    def turn(self, second: int) -> None:
        """Begin a new second, if it is one."""
        if second != self.second:
            self.second, self.granted, self.left, self.refused = second, 0, 0, False


class Limits:
    """The requests that each key has left. `lease` calls the memory service; `clock` returns seconds UTC."""

    def __init__(self, lease: Lease, clock: Callable[[], float] = time.time) -> None:
        self._lease, self._clock = lease, clock
        self._spending: dict[str, Spending] = {}
        self._alone_until = 0.0

    def take(self, key: Key) -> bool:
        """Spend a request that was granted already. Returns False if there is none: then call `more`."""
        spending = self._spending.get(key.sha256)
        if spending is None:
            spending = self._spending[key.sha256] = Spending()
        spending.turn(int(self._clock()))
        if not spending.left:
            return False
        spending.left -= 1
        return True

    async def more(self, key: Key) -> None:
        """Get another portion and spend a request of it. Raises RateLimited if the limit is used up."""
        spending = self._spending[key.sha256]
        while not self.take(key):
            if spending.refused:
                raise RateLimited(f"the API key {key.name!r} has {key.per_second} requests a second")
            if spending.asking is None:
                spending.asking = asyncio.create_task(self._ask(key, spending))
            await asyncio.shield(spending.asking)

    async def _ask(self, key: Key, spending: Spending) -> None:
        CALL.set(None)  # the call is for all that wait, not for the first of them with its deadline
        limit, second = key.per_second or 0, spending.second
        try:
            granted = await self._granted(key, second, limit)
            if granted is None:  # unreachable: grant the rest of the limit
                granted = max(0, limit - spending.granted)
            if second == spending.second:
                spending.granted, spending.left, spending.refused = spending.granted + granted, granted, granted == 0
        finally:
            spending.asking = None

    async def _granted(self, key: Key, second: int, limit: int) -> int | None:
        if self._clock() < self._alone_until:
            return None
        name = sha256(key.sha256.encode()).hexdigest()[:32]  # a name from which the key's own hash cannot be told
        try:
            async with asyncio.timeout(PATIENCE_S):
                granted = await self._lease(QuotaRequest(name, second, limit, -(-limit // PORTIONS)))
        except (MemoryUnavailable, TimeoutError):
            if not self._alone_until:
                log.warning("limits of API keys are not shared between processes: the memory service does not answer")
            self._alone_until = self._clock() + ALONE_S
            return None
        if self._alone_until:
            log.warning("limits of API keys are shared again")
            self._alone_until = 0.0
        return granted
