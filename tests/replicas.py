"""Replicas of the memory service and an api over them: real servers on threads of this process."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from benchmarks.ports import free_port
from memory_service.http.app import create_app as create_memory
from memory_service.protocol.structs import ReplicasReply
from memory_service.settings import MemorySettings
from tests.conftest import served
from tests.redis_cluster import until


def replicas_seen_by(url: str) -> dict[str, bool]:
    """Who is there as one replica sees it, and whether everything is loaded there."""
    return msgspec.msgpack.decode(httpx2.get(f"{url}/v1/replicas").content, type=ReplicasReply).replicas


def all_ready(*urls: str) -> bool:
    """Whether these replicas and no others are there, with everything loaded."""
    return all(replicas_seen_by(url) == dict.fromkeys(urls, True) for url in urls)


class Replicas:
    """Replicas over one Redis, and an api."""

    def __init__(self, run: Path, redis_url: str, stack: ExitStack, **settings: Any) -> None:
        self._run, self._redis_url, self._stack = run, redis_url, stack
        self._settings = {"collective_users": 1, "patience_s": 1} | settings
        self.opened: dict[str, ExitStack] = {}

    def add(self) -> str:
        """Start one more; returns its URL once it answers."""
        port = free_port()
        settings = MemorySettings(
            run=self._run, redis_url=self._redis_url, port=port, redis_timeout_s=5, **self._settings
        )
        opened = self._stack.enter_context(ExitStack())
        url = opened.enter_context(served(create_memory(settings), port))
        self.opened[url] = opened
        return url

    def remove(self, url: str) -> None:
        """Stop one without a word to the others, as a crash would."""
        self.opened.pop(url).close()

    def settle(self) -> None:
        """Wait until all are ready, and those that were removed count as gone."""
        until(lambda: all_ready(*self.opened))

    def api(self, *seeds: str) -> httpx2.Client:
        """An api over them."""
        settings = ApiSettings(run=self._run, memory_url=",".join(seeds or self.opened))
        url = self._stack.enter_context(served(create_api(settings)))
        client = self._stack.enter_context(httpx2.Client(base_url=url, timeout=60))
        client.memory_url = settings.memory_url
        return client
