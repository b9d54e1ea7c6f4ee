"""One Redis server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError
from typing_extensions import override

from memory_service.store.redis.adapter import Command, Source, text
from memory_service.store.redis.connection import RedisConnection
from memory_service.store.redis.durability import patience_ms
from memory_service.store.redis.errors import StoreUnavailable, translated

TRIES = 16
"""Times that a batch is sent while the server lacks scripts."""


class SingleServer(RedisConnection):
    """One server; `replicas` is the number of Redis replicas that confirm durable writes.

    Raises:
        StoreURLError: `url` cannot be used.
    """

    def __init__(self, url: str, timeout_s: float, scripts: Sequence[str], replicas: int) -> None:
        self._source = Source(url, timeout_s, retries=1)  # a server may close connections that are not in use
        self._server = self._source.server()
        self._url, self._scripts, self._replicas = url, scripts, replicas
        self._patience_ms = patience_ms(timeout_s)
        self.database = self._source.database

    async def is_cluster(self) -> bool:
        """Whether this server belongs to a Redis Cluster; False if it does not let us ask."""
        with translated():
            try:
                return "cluster_enabled:1" in text(await self._server.ask("INFO", "cluster"))
            except ResponseError:
                return False

    @override
    async def send(self, commands: Sequence[Command], *, durable: bool = False, partly: bool = False) -> list[Any]:
        if not commands:
            return []
        wait: list[Command] = [("WAIT", self._replicas, self._patience_ms)] if durable and self._replicas else []
        with translated():
            answers = await self._answers([*commands, *wait])
        if wait and answers.pop() < self._replicas:
            raise StoreUnavailable(f"written, but not confirmed by {self._replicas} Redis replicas")
        return answers

    async def _answers(self, commands: Sequence[Command]) -> list[Any]:
        """Answers to commands; raises the first error among them. Loads the scripts where the server lacks them."""
        for _ in range(TRIES):
            answers = await self._server.send(commands)
            error = next((answer for answer in answers if isinstance(answer, Exception)), None)
            if error is None:
                return answers
            if not isinstance(error, NoScriptError):
                raise error
            # Scripts are lost all at once: none of this batch has run.
            await self._server.send([("SCRIPT", "LOAD", script) for script in self._scripts])
        raise StoreUnavailable("Redis does not keep the scripts of the memory service: another client flushes them")

    @override
    def grouped(self, keys: Sequence[bytes]) -> list[list[int]]:
        return [list(range(len(keys)))] if keys else []

    @override
    async def ping(self) -> None:
        with translated():
            await self._server.ask("PING")

    @override
    async def scan(self, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        with translated():
            after, keys = await self._server.ask("SCAN", cursor, "MATCH", match, "COUNT", count)
        return int(after), keys

    @override
    async def primaries(self) -> list[str]:
        return [self._url]

    @override
    async def refresh(self) -> None:
        return

    @override
    async def listeners(self) -> list[Redis]:
        return [self._source.listener()]

    @override
    async def close(self) -> None:
        await self._server.close()
