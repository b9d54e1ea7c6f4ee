"""Which memory replicas there are, and in which order to ask them about a user. No I/O.

The order follows from the user id by rendezvous hashing, so that each replica keeps other users' banks in memory. When
a replica joins or leaves, only the users that it takes over or gave up change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from memory_service.protocol.structs import ReplicasReply

MASK = 2**64 - 1


class Members:
    """Replicas by URL. `seeds`: the configured URLs, which are asked when no other replica answers."""

    def __init__(self, seeds: Sequence[str]) -> None:
        self.seeds = list(seeds)
        self.ready: list[str] = []
        self.lost: set[str] = set()
        """URLs at which nobody answered last time."""
        self._salts: dict[str, int] = {}

    @property
    def known(self) -> list[str]:
        """All URLs."""
        return list(dict.fromkeys([*self.ready, *self.seeds]))

    @property
    def reachable(self) -> list[str]:
        """All URLs but the lost ones."""
        return [url for url in self.known if url not in self.lost]

    def adopt(self, reply: ReplicasReply) -> None:
        """Takes over the list of a replica. As long as none is ready, those that are not are used."""
        ready = [url for url, is_ready in reply.replicas.items() if is_ready]
        self.ready = sorted(ready or reply.replicas)
        self._salts = {url: mixed(crc32(url.encode()) << 32) for url in self.ready}

    def prune_lost(self) -> None:
        """Stops keeping track of lost replicas that are no longer listed."""
        self.lost &= set(self.known)

    def is_usable(self, url: str | None) -> bool:
        """Whether a replica is ready and not lost."""
        return url in self.ready and url not in self.lost

    def order(self, key: str) -> list[str]:
        """URLs to ask about what `key` names, first choice first; seeds and lost replicas come last."""
        hashed = crc32(key.encode())
        ranked = sorted(self.ready, key=lambda url: mixed(self._salts[url] ^ hashed))
        return sorted(dict.fromkeys([*ranked, *self.seeds]), key=lambda url: url in self.lost)


def mixed(number: int) -> int:
    """A 64-bit number each of whose bits depends on all bits of `number` (the finalizer of splitmix64).

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31
