"""What memory replicas and api processes agree on through Redis: the model, who is present, and quotas."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from memory_service.store import scripts
from memory_service.store.keys import MODEL, REPLICAS, quota_key
from memory_service.store.redis.connect import Connector

QUOTA_S = 60
"""How long a count of granted requests is kept: longer than clocks differ."""


class ModelState(msgspec.Struct, frozen=True):
    """The serving and the wanted model: their versions and the folders of their checkpoints.

    `base` is the model that the process which asked was started with. A process that is started with it again follows
    this state; one that is started with a new model makes that one serve.
    """

    serving: str
    serving_run: str
    wanted: str
    wanted_run: str
    base: str

    def replace(self, **changes: str) -> ModelState:
        """A copy with other values in some fields."""
        return msgspec.structs.replace(self, **changes)


class Coordination:
    """Reads and writes what processes share besides memories; a part of `Store`. All methods raise StoreUnavailable."""

    def __init__(self, redis: Connector) -> None:
        self.redis = redis

    # -------------------------------------------------------------------------------------------- model

    async def model(self) -> ModelState | None:
        """The serving and the wanted model; None until another model has been asked for."""
        data = (await self.redis.send([("GET", MODEL)]))[0]
        return None if data is None else msgspec.json.decode(data, type=ModelState)

    async def swap_model(self, before: ModelState, after: ModelState) -> bool:
        """Replace the state if it is still `before`, or missing; returns whether it was replaced."""
        data = (await self.redis.send([("GET", MODEL)]))[0]
        if data is not None and msgspec.json.decode(data, type=ModelState) != before:
            return False
        return await self.swap(MODEL, data or b"", msgspec.json.encode(after))

    async def swap(self, key: str, before: bytes, after: bytes) -> bool:
        """Replace a small value if it is still `before` (empty: missing); returns whether it was replaced."""
        return bool((await self.redis.send([scripts.call(scripts.SWAP, [key], [before, after])], durable=True))[0])

    # ----------------------------------------------------------------------------------------- presence

    async def beat(self, url: str, is_ready: bool, for_ms: int) -> tuple[bool, dict[str, bool]]:
        """Count a memory replica as present for a while.

        Returns:
            Whether it still counted as present, and all that are present (see `replicas`).
        """
        command = scripts.call(scripts.BEAT, [REPLICAS], [url, "+" if is_ready else "-", for_ms])
        was_present, found = (await self.redis.send([command]))[0]
        return bool(was_present), _readiness(found)

    async def replicas(self) -> dict[str, bool]:
        """The memory replicas that are present, by URL, and whether each has loaded everything."""
        return _readiness((await self.redis.send([scripts.call(scripts.BEAT, [REPLICAS])]))[0][1])

    async def silence(self, url: str) -> None:
        """Count a memory replica as absent from now on."""
        await self.redis.send([("ZREM", REPLICAS, f"+{url}", f"-{url}")])

    # ------------------------------------------------------------------------------------------- quotas

    async def grant(self, key: str, second: int, limit: int, want: int) -> int:
        """How many of the wanted requests the limit of an API key leaves in a second; they count as used."""
        command = scripts.call(scripts.QUOTA, [quota_key(key, second)], [want, limit, QUOTA_S])
        granted: int = (await self.redis.send([command]))[0]
        return granted


def _readiness(found: Sequence[bytes]) -> dict[str, bool]:
    return {entry[1:].decode(): entry[:1] == b"+" for entry in found}
