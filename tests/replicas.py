"""Memory replicas and an api in front of them, real servers on threads of this process; and what to ask them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import numpy as np
import pytest

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from benchmarks.ports import free_port
from memory_service.http.app import create_app as create_memory
from memory_service.protocol.structs import ReplicasReply
from memory_service.settings import MemorySettings
from tests.conftest import served
from tests.redis_cluster import until

USERS = [f"user {n}" for n in range(24)]
NOW = 1_700_000_000
QUESTIONS = [
    *({"user_id": user, "top_n": 40} for user in USERS),
    *({"user_id": user, "top_n": 40, "ignore_memories": ["i1", "i2", "i3"]} for user in USERS[:6]),
    *({"user_id": user, "top_n": 40, "exclude_seen": False, "k": 2, "scopes": ["own"]} for user in USERS[:6]),
    *({"user_id": user, "sequence": ["i3", "i9"], "top_n": 40} for user in USERS[:6]),
    {"sequence": ["i1", "i5", "i7"], "top_n": 40},
    {"sequence": ["i2"], "scopes": ["collective"], "top_n": 40},
    {"user_id": "nobody", "top_n": 40},
    {},
]
"""Requests for recommendations of every kind."""


class Replicas:
    """Memory replicas over one Redis."""

    def __init__(self, run: Path, redis_url: str, stack: ExitStack, **settings: Any) -> None:
        self._run, self._redis_url, self._stack = run, redis_url, stack
        self._settings = {"collective_users": 1, "patience_s": 1} | settings
        self.opened: dict[str, ExitStack] = {}

    def add(self) -> str:
        """Starts a replica. Returns its URL once it answers."""
        port = free_port()
        settings = MemorySettings(
            run=self._run, redis_url=self._redis_url, port=port, redis_timeout_s=5, **self._settings
        )
        opened = self._stack.enter_context(ExitStack())
        url = opened.enter_context(served(create_memory(settings), port))
        self.opened[url] = opened
        return url

    def remove(self, url: str) -> None:
        """Stops a replica without telling the others, like a crash."""
        self.opened.pop(url).close()

    def settle(self) -> None:
        """Waits until all replicas are ready and the removed ones are no longer listed."""
        until(lambda: all_ready(*self.opened))

    def api(self, *seeds: str) -> httpx2.Client:
        """Starts an api in front of the replicas, which knows only the `seeds` (default: all) at first."""
        settings = ApiSettings(run=self._run, memory_url=",".join(seeds or self.opened))
        url = self._stack.enter_context(served(create_api(settings)))
        client = self._stack.enter_context(httpx2.Client(base_url=url, timeout=60))
        client.memory_url = settings.memory_url
        return client


def replicas_seen_by(url: str) -> dict[str, bool]:
    """The list of a replica: URLs, and whether each is ready."""
    return msgspec.msgpack.decode(httpx2.get(f"{url}/v1/replicas").content, type=ReplicasReply).replicas


def all_ready(*urls: str) -> bool:
    """Whether exactly these replicas are listed by all of them, as ready."""
    return all(replicas_seen_by(url) == dict.fromkeys(urls, True) for url in urls)


def metric(url: str, name: str) -> float:
    """A metric of a replica, summed over its labels' values."""
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def history(user: str) -> list[dict[str, Any]]:
    """Interactions of a user: common items, and one that no other user has or exactly one other."""
    n = USERS.index(user)
    rng = np.random.default_rng(n)
    items = [f"i{item}" for item in rng.choice(np.arange(1, 31), 7, replace=False)]
    items.insert(4, f"rare {n % (len(USERS) // 2)}" if n % 3 else f"only {n}")
    return [
        {"user_id": user, "item_id": item, "timestamp": NOW + 60 * at, "rating": float(rng.integers(1, 6))}
        for at, item in enumerate(items)
    ]


def take(api: httpx2.Client, *interactions: dict[str, Any]) -> dict[str, Any]:
    """Sends interactions, which must be accepted. Returns the response."""
    response = api.post("/memories", json={"interactions": list(interactions)})
    assert response.status_code == 200, response.text
    return response.json()


def answers(api: httpx2.Client) -> list[dict[str, Any]]:
    """Answers to all QUESTIONS, in a form that `==` compares to 5 decimals, without ids."""
    questions = [{**question, "explain": True} for question in QUESTIONS]  # explained retrievals are not counted
    response = api.post("/recommend/batch", json={"requests": questions})
    assert response.status_code == 200, response.text
    return [_comparable(answer) for answer in response.json()["results"]]


def _comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """Batches are made up differently, and sums differ in their last digits with them."""
    answer.pop("recommendation_id")
    answer["items"] = {item["item_id"]: pytest.approx(item["score"], abs=1e-5) for item in answer["items"]}
    about = answer["memory"]
    numbers = {"entropy", "gate", "copying", "log_z"} & about.keys()
    about |= {name: pytest.approx(about[name], abs=1e-5) for name in numbers}
    for memory in about["memories"]:
        memory |= {name: pytest.approx(memory[name], abs=1e-5) for name in ("similarity", "weight")}
    return answer
