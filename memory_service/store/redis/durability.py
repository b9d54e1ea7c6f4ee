"""When a write counts as kept: once Redis replicas have confirmed it (WAIT), or if nothing can replace its primary.

In a Redis Cluster, no single failure may lose an acknowledged write. A primary without a Redis replica (it took over a
moment ago, or its replica restarts) keeps its writes alone: they count as kept as long as most primaries see it alive,
since then nobody is promoted in its place.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from redis.exceptions import RedisError

from memory_service.store.redis.adapter import Command, text
from memory_service.store.redis.errors import ShardUnavailable
from memory_service.store.redis.nodes import ClusterNodes
from memory_service.store.redis.topology import Address

SHORT_WAIT_MS = 50
"""How long a write waits for Redis replicas where there was none a moment ago."""
ALONE_S = 1.0
"""How long a primary that had no Redis replica is expected to have none."""


def patience_ms(timeout_s: float) -> int:
    """How long Redis waits for its replicas: half of the time that its answer is waited for."""
    return max(1, int(timeout_s * 500))


class Durability:
    """Confirms writes of a cluster's primaries by `replicas` Redis replicas each (0: writes need no confirmation)."""

    def __init__(self, nodes: ClusterNodes, replicas: int, timeout_s: float) -> None:
        self.unreplicated = 0
        """Batches that a primary without a Redis replica has kept alone."""
        self._nodes, self._replicas, self._patience_ms = nodes, replicas, patience_ms(timeout_s)
        self._alone_until: dict[Address, float] = {}

    def waits(self, node: Address) -> list[Command]:
        """The command that makes a primary wait for its Redis replicas, if any; its answer goes to `confirm`."""
        if not self._replicas:
            return []
        is_alone = self._alone_until.get(node, 0.0) > time.monotonic()
        return [("WAIT", self._replicas, min(SHORT_WAIT_MS, self._patience_ms) if is_alone else self._patience_ms)]

    async def confirm(self, node: Address, confirmed: Any) -> None:
        """Check the answer to WAIT. Raises ShardUnavailable where the primary's last writes may get lost."""
        if isinstance(confirmed, int) and confirmed >= self._replicas:
            self._alone_until.pop(node, None)
        elif await self._has_no_replica(node) and await self._is_trusted(node):
            self._alone_until[node] = time.monotonic() + ALONE_S
            self.unreplicated += 1
        else:
            raise ShardUnavailable(f"Redis {node}: written, but not confirmed by {self._replicas} Redis replicas")

    async def _has_no_replica(self, node: Address) -> bool:
        """Whether no Redis replica is online, so that none that lacks the write could be promoted."""
        role = await self._asked(node, "ROLE")
        return bool(role) and text(role[0]) == "master" and not role[2]

    async def _is_trusted(self, node: Address) -> bool:
        """Whether most primaries see a primary alive; otherwise another may be promoted in its place."""
        node_id = await self._asked(node, "CLUSTER", "MYID")
        if node_id is None:
            return False
        others = [other for other in self._nodes.primaries() if other != node]
        views = await asyncio.gather(*(self._sees_alive(other, text(node_id)) for other in others))
        return 1 + sum(views) > (len(others) + 1) / 2

    async def _sees_alive(self, node: Address, other_id: str) -> bool:
        """Whether a server sees another one (by its id) as a primary that has not failed."""
        listing = text(await self._asked(node, "CLUSTER", "NODES") or b"")
        flags = next((line.split()[2] for line in listing.splitlines() if line.startswith(other_id)), "")
        return "master" in flags and "fail" not in flags

    async def _asked(self, node: Address, *command: str) -> Any:
        """The answer of a server; None if it is out of reach."""
        try:
            return await self._nodes.server(node).ask(*command)
        except (RedisError, OSError, ShardUnavailable):
            return None
