"""The servers of a Redis Cluster: connections to each, which of them are out of reach, and who has taken over."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import suppress

from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from memory_service.store.redis.adapter import Command, Server, Source, text
from memory_service.store.redis.errors import ShardUnavailable, StoreUnavailable, StoreURLError
from memory_service.store.redis.topology import Address, Topology
from memory_service.tasks import cancel_and_wait

RETRY_S = 0.25
"""Pause between two attempts to find the primaries."""
log = logging.getLogger(__name__)


class ClusterNodes:
    """Finds the primary of each hash slot, and looks again, besides the calls, whenever one is lost or has changed.

    Raises:
        StoreURLError: a URL cannot be used for a cluster.
    """

    def __init__(self, urls: Sequence[str], timeout_s: float) -> None:
        sources = [Source(url, timeout_s) for url in urls]
        if any(source.database for source in sources):
            raise StoreURLError
        self._source = sources[0]
        self._seeds = [Address(*source.address) for source in sources]
        self._servers: dict[Address, Server] = {}
        self._topology = Topology()
        self._down: dict[Address, str] = {}
        self._connecting = asyncio.Lock()
        self._search: asyncio.Task[None] | None = None

    @property
    def lost(self) -> int:
        """Primaries out of reach."""
        return len(self._down)

    def server(self, node: Address) -> Server:
        """Connections to a server. Raises ShardUnavailable if the server is known to be out of reach."""
        if node in self._down:
            raise ShardUnavailable(f"Redis {node}: {self._down[node]}")
        return self._server(node)

    def primaries(self) -> list[Address]:
        """All primaries, in the order of their first hash slots."""
        return self._topology.primaries()

    def reachable(self) -> list[Address]:
        """Primaries that are not known to be out of reach."""
        return [node for node in self.primaries() if node not in self._down]

    def primary_for(self, command: Command) -> Address:
        """The primary that has the key of a command. Raises ShardUnavailable if none is known."""
        key = command[3] if command[0] == "EVALSHA" else command[1]
        slot = key_slot(key if isinstance(key, bytes) else str(key).encode())
        node = self._topology.primary_of(slot)
        if node is None:
            self._seek()
            raise ShardUnavailable(f"no primary of the Redis Cluster has hash slot {slot}")
        return node

    async def connect(self) -> None:
        """Find the primaries, unless they have been found before. Raises StoreUnavailable."""
        if self._topology.is_empty:
            async with self._connecting:
                if self._topology.is_empty:
                    await self.refresh()

    async def refresh(self) -> None:
        """Ask servers for the primaries, until they have named one for each hash slot. Raises StoreUnavailable."""
        trouble: Exception | None = None
        found = Topology()
        known = dict.fromkeys([*self._topology.servers(), *self._seeds])
        for node in sorted(known, key=lambda node: (node in self._down, random.random())):  # those out of reach last
            try:
                found = found.merged(Topology.parsed(await self._server(node).ask("CLUSTER", "SLOTS"), node))
            except (RedisError, OSError) as error:
                trouble = error
            if found.is_complete:
                break
        if found.is_empty:
            raise StoreUnavailable(f"no server of the Redis Cluster answers: {trouble}") from trouble
        self._topology = found
        await self._close(set(self._servers) - found.servers() - set(self._seeds))

    def move(self, slot: int, to: Address) -> None:
        """Follow a redirection of a hash slot, and see what else has changed."""
        self._topology.move(slot, to)
        self._seek()

    def lose(self, node: Address, error: Exception) -> ShardUnavailable:
        """Note that a server is out of reach, and look for the one that takes over; the error to raise."""
        why = str(error) or type(error).__name__
        if node not in self._down:
            log.warning("Redis %s is out of reach: %s", node, why)
            self._down[node] = why
        self._seek()
        return ShardUnavailable(f"Redis {node}: {why}")

    async def close(self) -> None:
        """Close all connections."""
        await cancel_and_wait([self._search])
        await self._close(set(self._servers))
        self._topology = Topology()

    # ------------------------------------------------------------------------------------------- search

    def _seek(self) -> None:
        if self._search is None or self._search.done():
            self._search = asyncio.create_task(self._look_for_primaries())

    async def _look_for_primaries(self) -> None:
        """Refresh until every hash slot has a primary that answers: a new one, or the same one again."""
        while True:
            await asyncio.sleep(RETRY_S)
            with suppress(StoreUnavailable):
                await self.refresh()
            serving = set(self.primaries())
            for node in list(self._down):
                if node not in serving or await self._answers(node):
                    log.warning("Redis %s %s", node, "answers again" if node in serving else "was replaced")
                    del self._down[node]
            if not self._down and self._topology.is_complete:
                return

    async def _answers(self, node: Address) -> bool:
        try:
            return "cluster_state:ok" in text(await self._server(node).ask("CLUSTER", "INFO"))
        except (RedisError, OSError):
            return False

    # -------------------------------------------------------------------------------------- connections

    def listener(self, node: Address) -> Redis:
        """A client of a server to subscribe with, for the caller to close."""
        return self._source.listener(node)

    def _server(self, node: Address) -> Server:
        if node not in self._servers:
            self._servers[node] = self._source.server(node)
        return self._servers[node]

    async def _close(self, nodes: set[Address]) -> None:
        for server in [self._servers.pop(node) for node in nodes]:
            await server.close()
