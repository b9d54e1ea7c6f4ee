"""What the store needs of Redis, be it one server (`single`) or a Redis Cluster (`cluster`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from redis.asyncio import Redis

from memory_service.store.redis.adapter import Command

SCAN_COUNT = 1000
"""Keys that Redis looks at in one step of a walk."""


class RedisConnection(ABC):
    """Connections to one Redis server or to all primaries of a Redis Cluster.

    All methods that talk to Redis raise StoreUnavailable if it is out of reach; ShardUnavailable if one primary is.
    """

    database = 0
    """Number of the database in use."""

    @property
    def unreplicated(self) -> int:
        """Durable batches that a primary without a Redis replica has kept alone."""
        return 0

    @property
    def lost(self) -> int:
        """Primaries out of reach."""
        return 0

    @abstractmethod
    async def send(self, commands: Sequence[Command], *, durable: bool = False, partly: bool = False) -> list[Any]:
        """Answers to commands, in their order. If it raises, some commands may have been executed.

        Args:
            commands: each names its key first (EVALSHA: after script and number of keys).
            durable: return only after Redis replicas have confirmed the writes.
            partly: put a ShardUnavailable in place of each answer that a primary out of reach owes, instead of raising.
        """

    @abstractmethod
    def grouped(self, keys: Sequence[bytes]) -> list[list[int]]:
        """Indices of keys, grouped by what one command may name together."""

    @abstractmethod
    async def ping(self) -> None:
        """Raise StoreUnavailable if no server answers."""

    @abstractmethod
    async def scan(self, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        """One step of a walk through all keys: the next cursor (0 at the end), and keys that match."""

    @abstractmethod
    async def primaries(self) -> list[str]:
        """Names of the servers that take writes."""

    @abstractmethod
    async def refresh(self) -> None:
        """Look up again which servers take writes."""

    @abstractmethod
    async def listeners(self) -> list[Redis]:
        """One new client for each primary, to listen to notifications with. The caller closes them."""

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""

    async def walk(self, match: bytes) -> AsyncGenerator[list[bytes], None]:
        """All keys that match, some at a time; a key may appear twice. Does not block Redis."""
        cursor = 0
        while True:
            cursor, keys = await self.scan(cursor, match, SCAN_COUNT)
            yield keys
            if cursor == 0:
                return
