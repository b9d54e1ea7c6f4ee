"""Which server of a Redis Cluster has which hash slot: the answer to CLUSTER SLOTS, kept up by redirections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memory_service.protocol.hash_slots import SLOTS
from memory_service.store.redis.adapter import text


class Address(NamedTuple):
    """Host and port of a server."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(eq=False)
class Shard:
    """A primary and its Redis replicas."""

    primary: Address
    replicas: list[Address] = field(default_factory=list)


class Topology:
    """The shard of each hash slot, as far as it is known."""

    def __init__(self, shards: dict[int, Shard] | None = None) -> None:
        self._shards = shards or {}

    @classmethod
    def parsed(cls, answer: Iterable[Any], asked: Address) -> Topology:
        """What a server (`asked`) answers to CLUSTER SLOTS: [first slot, last slot, primary, replica…] for each range.

        A server that does not know its own host leaves it empty: it is the one under which it was asked.
        """
        shards: dict[int, Shard] = {}
        of: dict[Address, Shard] = {}
        for first, last, *nodes in answer:
            primary, *replicas = (Address(text(host or "") or asked.host, int(port)) for host, port, *_ in nodes)
            shard = of.setdefault(primary, Shard(primary, replicas))
            shards |= dict.fromkeys(range(int(first), int(last) + 1), shard)
        return cls(shards)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known yet."""
        return not self._shards

    @property
    def is_complete(self) -> bool:
        """Whether every hash slot has a primary."""
        return len(self._shards) == SLOTS

    def merged(self, other: Topology) -> Topology:
        """This topology, with what another one knows of further hash slots."""
        return Topology(other._shards | self._shards)

    def primary_of(self, slot: int) -> Address | None:
        """The primary that has a hash slot; None if nobody is known to."""
        shard = self._shards.get(slot)
        return shard.primary if shard else None

    def primaries(self) -> list[Address]:
        """All primaries, in the order of their first hash slots: a failover does not change the order."""
        return list(dict.fromkeys(self._shards[slot].primary for slot in sorted(self._shards)))

    def servers(self) -> set[Address]:
        """All primaries and Redis replicas."""
        return {server for shard in set(self._shards.values()) for server in (shard.primary, *shard.replicas)}

    def move(self, slot: int, to: Address) -> None:
        """Follow a redirection (MOVED). If a replica of the shard has taken over, all slots of the shard follow."""
        shard = self._shards.get(slot)
        if shard is not None and to in shard.replicas:
            shard.replicas[shard.replicas.index(to)], shard.primary = shard.primary, to
        elif shard is None or to != shard.primary:
            known = (other for other in self._shards.values() if other.primary == to)
            self._shards[slot] = next(known, Shard(to))
