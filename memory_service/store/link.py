"""The road to Redis: one server, or a Redis Cluster, which is found out at the first call.

Commands are sent in one round trip: to one server as they are; to a cluster those of each primary together, side by
side. A `durable` batch is answered once Redis' replicas confirmed it (`WAIT`), on the connection that wrote it.

What a cluster may lose: nothing that one failure at a time takes. Where a primary has no replica online (it took over a
moment ago, or its replica restarts) its writes count as kept as long as most primaries take it for a living one;
`unreplicated` counts them. A primary that is down fails its own slots only, and is looked for beside the calls.

Errors of the Redis client are translated here: callers see `StoreUnavailable`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import sha1
from typing import Any

import redis.asyncio as redis
from redis.asyncio.cluster import ClusterNode, PipelineCommand
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    MaxConnectionsError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    SlotNotCoveredError,
    TimeoutError,
    TryAgainError,
)
from typing_extensions import override

from memory_service.tasks import end
from model.errors import RamrecError

URL_ERROR = (
    "the URL of Redis is not usable: wanted redis://, rediss:// (TLS) or unix://, a password percent-encoded, "
    "and only options that redis-py knows; several, separated by commas, only for a Redis Cluster"
)
SCAN_COUNT = 1000
RETRY_S = 0.25
"""How often a lost primary is looked for."""
SHORT_WAIT_MS = 50
"""How long a write waits for replicas where there was none a moment ago."""
TRIES = 16
"""Moves of slots that one batch follows."""
NODE_SHIFT = 40
"""Where a cursor through a cluster says which primary it is at; below it stands that primary's own."""
UNREACHABLE = (ConnectionError, TimeoutError, BusyLoadingError, ClusterDownError, SlotNotCoveredError, OSError)
REFUSING = (ReadOnlyError, OutOfMemoryError, MaxConnectionsError, RedisClusterException)
Command = tuple[bytes | str | int, ...]
log = logging.getLogger(__name__)


class StoreURLError(RamrecError):
    """The URL of Redis cannot be used. Does not quote it: it may hold a password."""


class StoreUnavailable(RuntimeError):  # noqa: N818 - a state of the store, not of the call
    """Redis cannot be reached, is loading, refuses writes (memory or disk full), or did not answer in time."""


class ShardUnavailable(StoreUnavailable):
    """The same of one primary of a cluster: others answer."""


class Link:
    """One Redis, or a cluster; `scripts` are taught to it where it does not know them. `replicas`: how many of Redis'
    replicas confirm durable commands; None: one in a cluster, none elsewhere.

    Raises:
        StoreURLError: `url` cannot be used.
    """

    def __init__(self, url: str, timeout_s: float, scripts: Sequence[str] = (), replicas: int | None = None) -> None:
        self._urls, self._timeout_s = [one.strip() for one in url.split(",")], timeout_s
        self._scripts, self._replicas = tuple(scripts), replicas
        self._first = Single(self._urls[0], timeout_s, self._scripts, replicas or 0)
        self._road: Single | Cluster | None = None
        self._connecting = asyncio.Lock()
        with usable_url():
            for other in self._urls[1:]:
                parse_url(other)

    @property
    def unreplicated(self) -> int:
        """Durable batches that were kept by a primary alone, because it has no replica."""
        return self._road.unreplicated if isinstance(self._road, Cluster) else 0

    @property
    def lost(self) -> int:
        """Primaries out of reach."""
        return len(self._road.down) if isinstance(self._road, Cluster) else 0

    @property
    def is_cluster(self) -> bool:
        """Whether it is a Redis Cluster, as far as is known."""
        return isinstance(self._road, Cluster)

    async def road(self) -> Single | Cluster:
        """What it is. Raises StoreUnavailable, StoreURLError."""
        if self._road is None:
            async with self._connecting:
                if self._road is None:
                    self._road = await self._find_out()
        return self._road

    async def _find_out(self) -> Single | Cluster:
        trouble: StoreUnavailable | None = None
        for url in self._urls:
            one = self._first if url == self._urls[0] else Single(url, self._timeout_s, self._scripts, 0)
            try:
                is_cluster = await one.is_cluster()
            except StoreUnavailable as error:
                trouble = error
                continue
            finally:
                if one is not self._first:
                    await one.close()
            if is_cluster:
                await self._first.close()
                replicas = 1 if self._replicas is None else self._replicas
                return Cluster(self._urls, self._timeout_s, self._scripts, replicas)
            if len(self._urls) > 1:
                raise StoreURLError(URL_ERROR)
            return self._first
        raise trouble or StoreUnavailable("no URL of Redis")

    async def send(self, commands: Sequence[Command], *, durable: bool = False, partly: bool = False) -> list[Any]:
        """Answers to commands, in their order. Where it raises, some may have been carried out. `partly`: what a
        primary that is out of reach should have answered is a ShardUnavailable, and the others' answers are there.
        """
        return await (await self.road()).send(commands, durable, partly) if commands else []

    async def close(self) -> None:
        """Close all connections."""
        await (self._road or self._first).close()


class Road(ABC):
    """What one server and a cluster have in common."""

    def __init__(self, scripts: Sequence[str], replicas: int, timeout_s: float) -> None:
        self._scripts, self._replicas = scripts, replicas
        self._wait_ms = max(1, int(timeout_s * 500))

    @abstractmethod
    def together(self, keys: Sequence[bytes]) -> list[list[int]]:
        """Places of keys that one command may name together."""

    @abstractmethod
    async def send(self, commands: Sequence[Command], durable: bool, partly: bool = False) -> list[Any]:
        """Answers to commands."""

    @abstractmethod
    async def ping(self) -> None:
        """Raises StoreUnavailable where nothing answers."""

    @abstractmethod
    async def scan(self, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        """A step through all keys: where to go on (0: all were named), and some keys."""

    @abstractmethod
    async def primaries(self) -> list[str]:
        """Names of the servers that are written to."""

    @abstractmethod
    async def refresh(self) -> None:
        """Look which servers there are. Raises StoreUnavailable."""

    @abstractmethod
    async def listeners(self) -> list[redis.Redis]:
        """Clients, one for each primary, for the caller to listen with and to close."""

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""

    async def keys(self, match: bytes) -> AsyncGenerator[list[bytes], None]:
        """All keys that match, some at a time; one may be named twice. Does not block Redis."""
        cursor = 0
        while True:
            cursor, keys = await self.scan(cursor, match, SCAN_COUNT)
            yield keys
            if cursor == 0:
                return


class Single(Road):
    """One server."""

    def __init__(self, url: str, timeout_s: float, scripts: Sequence[str], replicas: int) -> None:
        super().__init__(scripts, replicas, timeout_s)
        self._url, self._timeout_s = url, timeout_s
        with usable_url():
            self._redis = self._client()
            self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # not connected: reads the options in the URL

    def _client(self) -> redis.Redis:
        once_more = Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))  # pooled connections go stale
        timeout_s = self._timeout_s
        return redis.Redis.from_url(
            self._url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=once_more
        )

    async def is_cluster(self) -> bool:
        """Whether this server is part of a cluster."""
        async with translated():
            try:
                return bool((await self._redis.info("cluster")).get("cluster_enabled"))
            except ResponseError:  # not ours to ask
                return False

    @override
    def together(self, keys: Sequence[bytes]) -> list[list[int]]:
        return [list(range(len(keys)))] if keys else []

    @override
    async def send(self, commands: Sequence[Command], durable: bool, partly: bool = False) -> list[Any]:
        wait = [("WAIT", self._replicas, self._wait_ms)] if durable and self._replicas else []
        async with translated():
            for _ in range(TRIES):
                async with self._redis.pipeline(transaction=False) as pipe:
                    for command in [*commands, *wait]:
                        pipe.execute_command(*command)
                    try:
                        found = list(await pipe.execute())
                    except NoScriptError:  # refused before anything was run, and a write that was run is not run twice
                        for text in self._scripts:
                            await self._redis.script_load(text)
                        continue
                if wait and found.pop() < self._replicas:
                    raise StoreUnavailable(f"written, but not confirmed by {self._replicas} replicas of Redis")
                return found
        raise StoreUnavailable("Redis does not keep our scripts")

    @override
    async def ping(self) -> None:
        async with translated():
            await self._redis.ping()

    @override
    async def scan(self, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        async with translated():
            found: Any = await self._redis.scan(cursor, match, count)
            after, keys = found
        return int(after), keys

    @override
    async def primaries(self) -> list[str]:
        return [self._url]

    @override
    async def refresh(self) -> None:
        return

    @override
    async def listeners(self) -> list[redis.Redis]:
        return [self._client()]

    @override
    async def close(self) -> None:
        await self._redis.aclose()


class Cluster(Road):
    """A Redis Cluster. Which primary has a slot is redis-py's to know; it is asked again whenever one is lost."""

    def __init__(self, urls: Sequence[str], timeout_s: float, scripts: Sequence[str], replicas: int) -> None:
        super().__init__(scripts, replicas, timeout_s)
        options = [parse_url(url) for url in urls]
        with usable_url():
            self._cluster = redis.RedisCluster.from_url(
                urls[0],
                startup_nodes=[ClusterNode(one["host"], one.get("port", 6379)) for one in options[1:]] or None,
                require_full_coverage=False,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
            )
        self.down: dict[str, str] = {}
        """Primaries out of reach, and why."""
        self.unreplicated = 0
        self._alone_until: dict[str, float] = {}
        self._seeker: asyncio.Task[None] | None = None

    @property
    def _nodes(self) -> Any:
        return self._cluster.nodes_manager

    @override
    def together(self, keys: Sequence[bytes]) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for place, key in enumerate(keys):
            groups.setdefault(key_slot(key), []).append(place)
        return list(groups.values())

    @override
    async def send(self, commands: Sequence[Command], durable: bool, partly: bool = False) -> list[Any]:
        await self._connect()
        results: list[Any] = [None] * len(commands)
        asking: dict[int, ClusterNode] = {}
        left = list(range(len(commands)))
        for attempt in range(TRIES):
            groups: dict[ClusterNode, list[int]] = {}
            for n in left:
                try:
                    groups.setdefault(asking.get(n) or self._node_of(commands[n]), []).append(n)
                except ShardUnavailable as error:
                    if not partly:
                        raise
                    results[n] = error
            parts = await asyncio.gather(
                *(
                    self._at(node, [commands[n] for n in some], [n in asking for n in some], durable)
                    for node, some in groups.items()
                ),
                return_exceptions=True,
            )
            asking, left = {}, []
            trouble: BaseException | None = None
            for (node, some), answers in zip(groups.items(), parts, strict=True):
                if partly and isinstance(answers, ShardUnavailable):
                    for n in some:
                        results[n] = answers
                    continue
                if isinstance(answers, BaseException):
                    trouble = answers
                    continue
                for n, answer in zip(some, answers, strict=True):
                    results[n] = answer
                    if await self._redirected(node, answer, n, asking):
                        left.append(n)
                    elif isinstance(answer, Exception):
                        trouble = answer
            if trouble is not None:
                raise await _of_a_shard(trouble)
            if not left:
                return results
            if attempt > TRIES // 4:
                await asyncio.sleep(RETRY_S / 8)
        raise ShardUnavailable("slots of the Redis Cluster are being moved")

    async def _redirected(self, node: ClusterNode, answer: Any, n: int, asking: dict[int, ClusterNode]) -> bool:
        """Whether a command was refused before it was run and is to be sent again, perhaps elsewhere."""
        match answer:
            case AskError():
                host, port = answer.host or node.host, answer.port
                asking[n] = self._nodes.get_node(host=host, port=port) or ClusterNode(
                    host, port, **self._nodes.connection_kwargs
                )
            case MovedError():
                await self._nodes.move_slot(answer)
            case NoScriptError():
                with suppress(*UNREACHABLE):
                    for text in self._scripts:
                        await node.execute_command("SCRIPT LOAD", text)
            case TryAgainError():
                pass
            case _:
                return False
        return True

    async def _at(
        self, node: ClusterNode, commands: Sequence[Command], asking: Sequence[bool], durable: bool
    ) -> list[Any]:
        """Answers of one primary, some of which may be errors. Raises ShardUnavailable."""
        if node.name in self.down:
            raise ShardUnavailable(f"Redis {node.name}: {self.down[node.name]}")
        wanted = []
        for command, asks in zip(commands, asking, strict=True):
            if asks:
                wanted.append(PipelineCommand(0, "ASKING"))
            wanted.append(PipelineCommand(1, *command))
        wait = (
            PipelineCommand(0, "WAIT", self._replicas, self._patience_ms(node)) if durable and self._replicas else None
        )
        try:
            await node.execute_pipeline([*wanted, wait] if wait else wanted)
        except UNREACHABLE as error:
            raise self._lose(node, error) from error
        answers = [command.result for command in wanted if command.position]
        for answer in answers:
            if isinstance(answer, UNREACHABLE):
                raise self._lose(node, answer) from answer
        if wait and not all(isinstance(answer, Exception) for answer in answers):
            await self._confirm(node, wait.result)
        return answers

    # ------------------------------------------------------------------------------------- confirmation

    def _patience_ms(self, node: ClusterNode) -> int:
        alone = self._alone_until.get(node.name, 0.0) > time.monotonic()
        return min(SHORT_WAIT_MS, self._wait_ms) if alone else self._wait_ms

    async def _confirm(self, node: ClusterNode, confirmed: Any) -> None:
        """Whether what a primary wrote is kept. Raises ShardUnavailable where it may not be."""
        if isinstance(confirmed, int) and confirmed >= self._replicas:
            self._alone_until.pop(node.name, None)
        elif await self._has_no_replica(node) and await self._is_trusted(node):
            self._alone_until[node.name] = time.monotonic() + 1
            self.unreplicated += 1
        else:
            raise ShardUnavailable(f"Redis {node.name}: written, but not confirmed by {self._replicas} replicas")

    async def _has_no_replica(self, node: ClusterNode) -> bool:
        """Whether no replica is online, so that none could be promoted with less than the primary has."""
        try:
            role = await node.execute_command("ROLE")
        except (RedisError, OSError):
            return False
        return role[0] in (b"master", "master") and not role[2]

    async def _is_trusted(self, node: ClusterNode) -> bool:
        """Whether most primaries take a primary for a living one: else another may be promoted in its place."""
        try:
            name = _text(await node.execute_command("CLUSTER MYID"))
        except (RedisError, OSError):
            return False
        others = [other for other in self._cluster.get_primaries() if other.name != node.name]
        views = await asyncio.gather(*(self._view(other, name) for other in others))
        return 1 + sum(views) > (len(others) + 1) / 2

    async def _view(self, of: ClusterNode, name: str) -> bool:
        """Whether a primary sees another (by its id) as a primary that has not failed."""
        try:
            told = await of.execute_command("CLUSTER NODES")
        except (RedisError, OSError):
            return False
        if isinstance(told, dict):  # as redis-py parses it
            flags = next((one["flags"] for one in told.values() if one["node_id"] == name), "")
        else:
            lines = [line.split() for line in _text(told).splitlines()]
            flags = next((line[2] for line in lines if line[0] == name), "")
        return "master" in flags and "fail" not in flags

    # ----------------------------------------------------------------------------------------- topology

    async def _connect(self) -> None:
        async with translated():
            await self._cluster.initialize()

    def _node_of(self, command: Command) -> ClusterNode:
        key = command[3] if command[0] == "EVALSHA" else command[1]
        nodes = self._nodes.slots_cache.get(key_slot(key if isinstance(key, bytes) else str(key).encode()))
        if not nodes:
            self._seek()
            raise ShardUnavailable("no primary of the Redis Cluster has this slot")
        node: ClusterNode = nodes[0]
        return node

    def _lose(self, node: ClusterNode, error: BaseException) -> ShardUnavailable:
        why = str(error) or type(error).__name__
        if node.name not in self.down:
            log.warning("Redis %s is out of reach: %s", node.name, why)
            self.down[node.name] = why
        self._seek()
        return ShardUnavailable(f"Redis {node.name}: {why}")

    def _seek(self) -> None:
        if self._seeker is None or self._seeker.done():
            self._seeker = asyncio.create_task(self._look_for_primaries())

    async def _look_for_primaries(self) -> None:
        """Until every slot has a primary that answers. Another may have taken over, or the same one is back."""
        while True:
            await asyncio.sleep(RETRY_S)
            with suppress(RedisError, OSError):
                await self._nodes.initialize()
            serving = {node.name: node for node in self._cluster.get_primaries()}
            for name in list(self.down):
                if name not in serving or await self._answers(serving[name]):
                    log.warning("Redis %s %s", name, "answers again" if name in serving else "was replaced")
                    del self.down[name]
            covered = len(self._nodes.slots_cache) == 16384
            if not self.down and covered:
                return

    async def _answers(self, node: ClusterNode) -> bool:
        try:
            told = await node.execute_command("CLUSTER INFO")
        except (RedisError, OSError):
            return False
        state = told.get("cluster_state") if isinstance(told, dict) else told
        return state == "ok" or (isinstance(state, bytes) and b"cluster_state:ok" in state)

    # --------------------------------------------------------------------------------------------- walk

    @override
    async def ping(self) -> None:
        await self._connect()
        primaries = self._cluster.get_primaries()
        if primaries and all(node.name in self.down for node in primaries):
            raise StoreUnavailable("no primary of the Redis Cluster answers")
        up = [node for node in primaries if node.name not in self.down]
        found = await asyncio.gather(
            *(self._at(node, [("PING",)], [False], False) for node in up), return_exceptions=True
        )
        if all(isinstance(one, BaseException) for one in found):
            raise StoreUnavailable("no primary of the Redis Cluster answers")

    @override
    async def scan(self, cursor: int, match: bytes, count: int) -> tuple[int, list[bytes]]:
        await self._connect()
        primaries = self._in_order()
        at, inner = cursor >> NODE_SHIFT, cursor & (1 << NODE_SHIFT) - 1
        if at >= len(primaries):
            return 0, []
        answer = (await self._at(primaries[at], [("SCAN", inner, "MATCH", match, "COUNT", count)], [False], False))[0]
        if isinstance(answer, Exception):
            raise await _of_a_shard(answer)
        after, keys = int(answer[0]), answer[1]
        if after:
            return at << NODE_SHIFT | after, keys
        return (at + 1 << NODE_SHIFT if at + 1 < len(primaries) else 0), keys

    def _in_order(self) -> list[ClusterNode]:
        """Primaries in the order of their first slots: a failover changes it not."""
        first: dict[str, int] = {}
        nodes: dict[str, ClusterNode] = {}
        for slot, (node, *_) in sorted(self._nodes.slots_cache.items()):
            first.setdefault(node.name, slot)
            nodes[node.name] = node
        return [nodes[name] for name in sorted(first, key=lambda name: first[name])]

    @override
    async def refresh(self) -> None:
        await self._connect()
        async with translated():
            await self._nodes.initialize()

    @override
    async def primaries(self) -> list[str]:
        await self._connect()
        return [node.name for node in self._in_order()]

    @override
    async def listeners(self) -> list[redis.Redis]:
        await self._connect()
        return [
            redis.Redis(
                connection_pool=redis.ConnectionPool(connection_class=node.connection_class, **node.connection_kwargs)
            )
            for node in self._in_order()
        ]

    @override
    async def close(self) -> None:
        await end([self._seeker])
        await self._cluster.aclose()


async def _of_a_shard(trouble: BaseException) -> BaseException:
    """What one primary said, as an error of ours where it is one of its state."""
    try:
        async with translated():
            raise trouble
    except ShardUnavailable as error:
        return error
    except StoreUnavailable as error:
        return ShardUnavailable(str(error))
    except BaseException as error:
        return error


def _text(said: bytes | str) -> str:
    return said.decode() if isinstance(said, bytes) else said


def sha(text: str) -> str:
    """Name of a script."""
    return sha1(text.encode()).hexdigest()


@contextmanager
def usable_url() -> Iterator[None]:
    """Around reading a URL. What its errors say may hold the password."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RedisError):
        raise StoreURLError(URL_ERROR) from None


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Around calls of the Redis client."""
    try:
        yield
    except (*UNREACHABLE, *REFUSING) as error:
        raise StoreUnavailable(str(error) or type(error).__name__) from error
    except ResponseError as error:
        if "MISCONF" not in str(error):  # the AOF cannot be written; redis-py has no class for it
            raise
        raise StoreUnavailable(str(error)) from error
