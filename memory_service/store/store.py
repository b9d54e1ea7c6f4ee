"""The store: everything that is kept in Redis. Which keys there are: `memory_service.store.keys`."""

from __future__ import annotations

from memory_service.store.coordination import Coordination
from memory_service.store.items import StoredItems
from memory_service.store.records import UserRecords
from memory_service.store.redis.connect import Connector
from memory_service.store.scripts import SCRIPTS
from model.config import RulesConfig


class Store(UserRecords, StoredItems, Coordination):
    """Records, catalogue and what processes agree on, in one Redis or Redis Cluster. Connects at the first call.

    Args:
        url: of Redis; of a Redis Cluster several, separated by commas.
        rules: layout of the banks that are read.
        timeout_s: how long an answer is waited for.
        idle_s: records expire this many seconds after their last write (0: never).
        replicas: Redis replicas that confirm each write; None: one in a Redis Cluster, none elsewhere.

    Raises:
        StoreURLError: a URL cannot be used.
    """

    def __init__(
        self, url: str, rules: RulesConfig, timeout_s: float, idle_s: int = 0, replicas: int | None = None
    ) -> None:
        super().__init__(Connector(url, timeout_s, SCRIPTS, replicas), rules, idle_s)

    async def ping(self) -> None:
        """Raise StoreUnavailable if Redis does not answer."""
        await (await self.redis.connection()).ping()

    async def close(self) -> None:
        """Close all connections."""
        await self.redis.close()
