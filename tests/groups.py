"""Groups of memory replicas and an api over them, in real processes' stead: real servers on threads of this process."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from api.app import create_app as create_api
from api.settings import ApiSettings
from benchmarks.ports import free_port
from memory_service.app import create_app as create_memory
from memory_service.schemas import GroupReply
from memory_service.settings import MemorySettings
from memory_service.slots import read, unpack
from tests.conftest import served
from tests.redis_cluster import until


def described(url: str) -> GroupReply:
    """The group as a replica sees it."""
    return msgspec.msgpack.decode(httpx2.get(f"{url}/v1/group").content, type=GroupReply)


def settled(*urls: str) -> bool:
    """Whether all see the same members, nothing changes hands, and everything is loaded."""
    for url in urls:
        reply = described(url)
        table = read(reply.table)
        if sorted(table.members) != sorted(urls) or table.contested().any():
            return False
        if not (table.owned(url) <= unpack(reply.loaded)).all():
            return False
    return True


class Group:
    """Memory replicas over one Redis, and an api."""

    def __init__(self, run: Path, redis_url: str, stack: ExitStack, **settings: Any) -> None:
        self._run, self._redis_url, self._stack = run, redis_url, stack
        self._settings = {"collective_users": 1, "group_patience_s": 1} | settings
        self.replicas: dict[str, ExitStack] = {}

    def add(self) -> str:
        """Start one more replica; returns its URL once it answers."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        settings = MemorySettings(
            run=self._run, redis_url=self._redis_url, advertise=url, redis_timeout_s=5, **self._settings
        )
        opened = self._stack.enter_context(ExitStack())
        opened.enter_context(served(create_memory(settings), port))
        self.replicas[url] = opened
        return url

    def remove(self, url: str) -> None:
        """Stop a replica without a word to the others, as a crash would."""
        self.replicas.pop(url).close()

    def settle(self) -> None:
        """Wait until the group has shared everything out."""
        until(lambda: settled(*self.replicas))

    def api(self, *seeds: str) -> httpx2.Client:
        """An api over the group."""
        settings = ApiSettings(run=self._run, memory_url=",".join(seeds or self.replicas))
        url = self._stack.enter_context(served(create_api(settings)))
        client = self._stack.enter_context(httpx2.Client(base_url=url, timeout=60))
        client.memory_url = settings.memory_url
        return client
