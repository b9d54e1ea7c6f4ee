"""Which kind of Redis the URLs lead to is found out at the first call: a service starts while Redis is still down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from memory_service.store.redis.adapter import Command
from memory_service.store.redis.cluster import ClusterConnection
from memory_service.store.redis.connection import RedisConnection
from memory_service.store.redis.errors import StoreUnavailable, StoreURLError
from memory_service.store.redis.single import SingleServer


class Connector:
    """Opens the connection to the Redis that `urls` (separated by commas) name, when it is first used.

    Args:
        urls: one server, or several servers of one Redis Cluster.
        timeout_s: how long an answer is waited for.
        scripts: Lua scripts that commands call by `scripts.sha`; loaded where Redis does not know them.
        replicas: Redis replicas that confirm durable writes; None: one in a Redis Cluster, none elsewhere.

    Raises:
        StoreURLError: a URL cannot be used.
    """

    def __init__(self, urls: str, timeout_s: float, scripts: Sequence[str] = (), replicas: int | None = None) -> None:
        self._urls, self._timeout_s = [url.strip() for url in urls.split(",")], timeout_s
        self._scripts, self._replicas = tuple(scripts), replicas
        self._servers = [SingleServer(url, timeout_s, self._scripts, replicas or 0) for url in self._urls]
        self._connection: RedisConnection | None = None
        self._connecting = asyncio.Lock()

    @property
    def unreplicated(self) -> int:
        """Durable batches that a primary without a Redis replica has kept alone."""
        return self._connection.unreplicated if self._connection else 0

    @property
    def lost(self) -> int:
        """Primaries of a Redis Cluster out of reach."""
        return self._connection.lost if self._connection else 0

    async def connection(self) -> RedisConnection:
        """The connection. Raises StoreUnavailable; StoreURLError if several URLs lead to a single server."""
        if self._connection is None:
            async with self._connecting:
                if self._connection is None:
                    self._connection = await self._connect()
        return self._connection

    async def _connect(self) -> RedisConnection:
        if await self._is_cluster():
            await self._close_servers()
            replicas = 1 if self._replicas is None else self._replicas
            return ClusterConnection(self._urls, self._timeout_s, self._scripts, replicas)
        if len(self._servers) > 1:
            raise StoreURLError
        return self._servers[0]

    async def _is_cluster(self) -> bool:
        """What the first server that answers says. Raises StoreUnavailable if none answers."""
        trouble: StoreUnavailable | None = None
        for server in self._servers:
            try:
                return await server.is_cluster()
            except StoreUnavailable as error:
                trouble = error
        raise trouble or StoreUnavailable("no URL of Redis is given")

    async def send(self, commands: Sequence[Command], *, durable: bool = False, partly: bool = False) -> list[Any]:
        """See `RedisConnection.send`."""
        return await (await self.connection()).send(commands, durable=durable, partly=partly) if commands else []

    async def close(self) -> None:
        """Close all connections."""
        if self._connection is not None:
            await self._connection.close()
        await self._close_servers()

    async def _close_servers(self) -> None:
        for server in self._servers:
            await server.close()
