"""All use of redis-py that depends on its version: connections to servers, and answers as Redis sends them.

Built on the connections of `redis.asyncio`: not on its cluster client, whose inner parts change between versions, nor
on its pipelines, which take twice as long. `tests/memory_service/store/test_adapter.py` must hold for every
supported version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, MaxConnectionsError, RedisError, ResponseError

from memory_service.store.redis.errors import StoreURLError

Command = tuple[bytes | str | int, ...]


class Source:
    """Makes connections with the options of a URL (password, TLS, database), which are read once.

    `retries`: how often a batch is sent again over a new connection if its connection has broken.

    Raises:
        StoreURLError: the URL cannot be used.
    """

    def __init__(self, url: str, timeout_s: float, retries: int = 0) -> None:
        retry = Retry(NoBackoff(), retries, supported_errors=(ConnectionError,))
        try:
            pool = ConnectionPool.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=retry)
            pool.make_connection()  # type: ignore[no-untyped-call]  # not connected: checks the options
        except (ValueError, TypeError, KeyError, RedisError):
            raise StoreURLError from None
        self._class, self._limit, self._retries = pool.connection_class, pool.max_connections, retries
        self._options: dict[str, Any] = pool.connection_kwargs

    @property
    def database(self) -> int:
        """Number of the database that the URL names; 0 if it names none."""
        return int(self._options.get("db") or 0)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the URL. Raises StoreURLError for a unix socket."""
        if "path" in self._options:
            raise StoreURLError
        return self._options.get("host", "localhost"), int(self._options.get("port", 6379))

    def server(self, address: tuple[str, int] | None = None) -> Server:
        """The server at an address, or the one that the URL names. The caller closes it."""
        return Server(self._pool(address), self._limit, self._retries)

    def listener(self, address: tuple[str, int] | None = None) -> Redis:
        """A client of redis-py for the same server, to subscribe with. The caller closes it."""
        return Redis.from_pool(self._pool(address))

    def _pool(self, address: tuple[str, int] | None) -> ConnectionPool:
        options = self._options if address is None else self._options | {"host": address[0], "port": address[1]}
        return ConnectionPool(connection_class=self._class, **options)


class Server:
    """A server, and the connections to it that are open: a batch of commands has one for itself."""

    def __init__(self, pool: ConnectionPool, limit: int, retries: int) -> None:
        self._pool, self._limit, self._retries = pool, limit, retries
        self._free: list[Any] = []
        self._all: list[Any] = []

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Raw answers to commands that are sent in one round trip over one connection, in their order.

        An error that Redis answers to one command stands in the place of its answer. Raises redis-py's errors if the
        server is out of reach.
        """
        connection = self._free.pop() if self._free else self._opened()
        try:
            for _ in range(self._retries):
                try:
                    return await _exchange(connection, commands)
                except ConnectionError:  # the server may have closed it while it was free; it connects again
                    await connection.disconnect(nowait=True)
            return await _exchange(connection, commands)
        except BaseException:  # answers may be left unread
            await connection.disconnect(nowait=True)
            raise
        finally:
            self._free.append(connection)

    async def ask(self, *command: bytes | str | int) -> Any:
        """The raw answer to one command. Raises redis-py's error if the answer is one."""
        (answer,) = await self.send([command])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        """Close all connections; the batches that use one fail."""
        for connection in self._all:
            await connection.disconnect()

    def _opened(self) -> Any:
        if len(self._all) >= self._limit:
            raise MaxConnectionsError(f"all {self._limit} connections to Redis are in use")
        self._all.append(self._pool.make_connection())  # type: ignore[no-untyped-call]
        return self._all[-1]


async def _exchange(connection: Any, commands: Sequence[Command]) -> list[Any]:
    await connection.send_packed_command(connection.pack_commands(commands))
    return [await _answer(connection) for _ in commands]


async def _answer(connection: Any) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


def text(answer: bytes | str) -> str:
    """An answer as text, whichever of the two types redis-py gives it."""
    return answer.decode() if isinstance(answer, bytes) else answer
