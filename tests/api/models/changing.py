"""An api and a memory service that go from one model to the next, and how their answers are compared."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.checkpoint import load_checkpoint
from tests.conftest import served

USERS = [f"u{n}" for n in range(8)]
OLD, NEW = "run", "other"


class Service:
    """An api and a memory service over one Redis."""

    def __init__(self, stack: ExitStack, run: Path, url: str) -> None:
        memory = create_memory(MemorySettings(run=run, redis_url=url))
        self.memory_url = stack.enter_context(served(memory))
        api = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=self.memory_url))))
        self.api = stack.enter_context(httpx2.Client(base_url=api, timeout=60))

    def take(self, *users: str, items: range = range(4), first: int = 0) -> dict:
        """Each user takes some items, every other of them those of the user before."""
        events = [
            {"user_id": user, "item_id": f"i{1 + (int(user[1:]) // 2 + n) % 34}", "timestamp": 1.6e9 + first + n}
            for user in users
            for n in items
        ]
        response = self.api.post("/memories", json={"interactions": events})
        assert response.status_code == 200, response.text
        return response.json()

    def answers(self, *users: str) -> dict[str, dict]:
        asks = {"requests": [{"user_id": user, "top_n": 40, "explain": True} for user in users]}
        response = self.api.post("/recommend/batch", json=asks)
        assert response.status_code == 200, response.text
        return dict(zip(users, response.json()["results"], strict=True))

    def models(self, *users: str) -> set[str]:
        """The models that answer users."""
        return {one["model_version"] for one in self.answers(*users).values()}

    def reload(self, run: Path) -> dict:
        response = self.api.post("/model/reload", json={"run": str(run)})
        assert response.status_code == 200, response.text
        return response.json()

    def ready(self) -> dict:
        """Readiness; an api that finds the memory service ahead follows it."""
        response = self.api.get("/health/ready")
        assert response.status_code == 200, response.text
        return response.json()

    def serving(self) -> tuple[str, str]:
        self.ready()
        about = self.api.get("/model").json()
        return about["model_version"], about["wanted"]


def version(run: Path) -> str:
    return load_checkpoint(run, with_weights=False).version


def told(answer: dict) -> dict:
    """What an answer says that depends on records and models alone: a record's version counts its moves, too. Scores to
    1e-4: what else is in a batch shows in the digits behind.
    """
    memory = {name: _near(one) for name, one in answer["memory"].items() if name not in ("version", "degraded")}
    items = {item["item_id"]: _near(item["score"]) for item in answer["items"]}
    return {"items": items, "memory": memory, "model": answer["model_version"]}


def _near(value: object) -> object:
    if isinstance(value, list):
        return [{name: _near(one) for name, one in memory.items()} for memory in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def same(answers: dict[str, dict], as_in: dict[str, dict]) -> None:
    assert {user: told(one) for user, one in answers.items()} == {user: told(as_in[user]) for user in answers}
