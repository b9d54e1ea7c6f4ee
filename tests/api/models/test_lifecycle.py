"""One model follows another while requests go on: reload, moving users, cut-over, rollback, refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import httpx2
import pytest
import redis

from api.http.app import create_app as create_api
from api.http.metrics import ApiMetrics
from api.jobs.reembed import ReembedError, check_wanted, one_pass, reembed
from api.memory.client import MemoryClient
from api.models.engine import Engine
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.protocol.question import Question
from memory_service.protocol.structs import RekeyRequest, RetrieveRequest, UserRekey
from memory_service.service.models import ModelMismatch
from memory_service.settings import MemorySettings
from model.checkpoint import HEADER_FILE, WEIGHTS_FILE, load_checkpoint, save_checkpoint
from model.serving.recommender import Recommender
from tests.conftest import served
from tests.memory_service.calling import remember, took, vectors
from tests.memory_service.calling import service as memory
from tests.synthetic import random_checkpoint, small_config

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


@pytest.fixture
def service(run, valkey_url, stack) -> Service:
    """The old model serves, and all users have memories."""
    one = Service(stack, run, valkey_url)
    one.take(*USERS)
    return one


@pytest.fixture
def fresh(valkey_url, stack) -> Iterator[object]:
    """A service of one model over an empty Redis of its own, where some users have taken the same."""
    numbers = iter(range(1, 16))

    def started(run: Path, *users: str) -> Service:
        one = Service(stack, run, f"{valkey_url}?db={next(numbers)}")
        one.take(*users)
        return one

    return started


# ------------------------------------------------------------------------------------------- never mixed


def test_each_user_is_answered_by_the_model_of_the_record_exactly_as_a_fresh_service_would(service, fresh, run, other):
    before = service.answers(*USERS)
    state = service.reload(other)
    assert state == {
        "serving": version(run),
        "wanted": version(other),
        "state": "moving",
        "users": len(USERS),
        "moved": 0,
    }
    same(service.answers(*USERS), before)
    moving = USERS[:5]
    service.take(*moving, items=range(4, 5))  # a touch moves a user at once
    new = fresh(other, *moving)
    new.take(*moving, items=range(4, 5))
    answers = service.answers(*USERS)
    same({user: answers[user] for user in moving}, new.answers(*moving))
    same({user: answers[user] for user in USERS[5:]}, before)  # the others' memories have not gone from the old one
    assert [answers[user]["memory"]["degraded"] for user in USERS] == [True] * 5 + [False] * 3
    assert any(one["memory"]["collective"]["retrieved"] for one in answers.values())
    assert service.ready()["moving"] == {"wanted": version(other), "users": 8, "moved": 5}
    nobody = service.api.post("/recommend", json={"sequence": ["i3", "i4"]}).json()
    assert nobody["model_version"] == version(run)


def test_after_the_cut_over_everything_is_as_if_the_new_model_had_always_been_there(service, fresh, run, other):
    service.reload(other)
    assert reembed(other, service.memory_url) == len(USERS)
    assert service.serving() == (version(other), version(other))
    assert "moving" not in service.ready()
    same(service.answers(*USERS), fresh(other, *USERS).answers(*USERS))
    assert service.models("stranger") == {version(other)}
    assert not any(one["memory"]["degraded"] for one in service.answers(*USERS).values())


def test_users_that_nobody_knew_are_written_for_the_wanted_model(service, fresh, other):
    service.reload(other)
    service.take("u40", "u41")
    same(service.answers("u40", "u41"), fresh(other, "u40", "u41").answers("u40", "u41"))


def test_going_back_gives_the_answers_of_before(service, run, other):
    before = service.answers(*USERS)
    for folder in (other, run):
        service.reload(folder)
        assert reembed(folder, service.memory_url) == len(USERS)
        assert service.serving() == (version(folder), version(folder))
    same(service.answers(*USERS), before)


def test_a_reload_can_be_taken_back_before_the_cut_over(service, fresh, run, other):
    service.reload(other)
    service.take("u0", "u1", items=range(4, 5))
    assert service.reload(run)["state"] == "serving"
    assert service.models(*USERS) == {version(run)}
    assert reembed(run, service.memory_url) == 0  # those two were moved when they were asked about
    unmoved = fresh(run, *USERS)
    unmoved.take("u0", "u1", items=range(4, 5))
    same(service.answers(*USERS), unmoved.answers(*USERS))


def test_the_model_that_serves_already_changes_nothing(service, run):
    before = service.answers(*USERS)
    assert service.api.post("/model/reload").json()["state"] == "serving"
    assert service.reload(run)["wanted"] == version(run)
    same(service.answers(*USERS), before)


def test_an_item_hidden_in_between_is_hidden_for_both_models_at_once(service, run, other):
    service.reload(other)
    service.take("u0", items=range(4, 5))
    assert service.models("u0", "u7") == {version(run), version(other)}
    shown = {user: {item["item_id"] for item in one["items"]} for user, one in service.answers("u0", "u7").items()}
    both = sorted(shown["u0"] & shown["u7"])[0]
    assert service.api.patch(f"/items/{both}", json={"hidden": True}).status_code == 200
    for one in service.answers("u0", "u7").values():
        assert both not in {item["item_id"] for item in one["items"]}


def test_retrievals_counted_before_a_move_come_along(service, other):
    service.api.post("/recommend", json={"user_id": "u0"})
    service.reload(other)
    service.take("u0", items=range(4, 5))
    entries = service.api.get("/users/u0/memory").json()["entries"]
    assert sum(entry["access"] for entry in entries) > 0


# --------------------------------------------------------------------------------- several processes


def test_other_processes_over_the_same_redis_follow(service, run, other, valkey_url, stack):
    second = Service(stack, run, valkey_url)
    service.reload(other)
    service.take("u0", items=range(4, 5))
    assert second.models("u0") == {version(other)}  # a record of a model that it did not know
    second.take("u1", items=range(4, 5))
    assert service.models("u0", "u1") == second.models("u0", "u1") == {version(other)}
    assert reembed(other, second.memory_url) == len(USERS) - 2
    for one in (second, service):
        one.take("u2", items=range(4, 6))
        assert one.models(*USERS) == {version(other)}
    same(service.answers(*USERS), second.answers(*USERS))


@pytest.mark.parametrize("back", [False, True])
def test_no_request_fails_while_models_change(service, run, other, valkey_url, stack, back):
    second, done = Service(stack, run, valkey_url), Event()

    def ask(one: Service, user: str) -> set[str]:
        found: set[str] = set()
        while not done.is_set():
            answer = one.answers(user, "stranger")[user]
            assert answer["source"] == "memory"
            found.add(answer["model_version"])
        return found

    def write(one: Service, user: str) -> int:
        count = 0
        while not done.is_set():
            assert one.take(user, items=range(1), first=100 + count)["accepted"] == 1
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, one, user) for one, user in ((service, "u0"), (second, "u0"), (second, "u5"))]
        writing = [pool.submit(write, one, user) for one, user in ((service, "u6"), (second, "u7"))]
        try:
            for folder in (other, run) if back else (other,):
                service.reload(folder)
                reembed(folder, service.memory_url)
                assert service.serving()[0] == version(folder)
        finally:
            done.set()
        assert set().union(*(one.result() for one in asking)) <= {version(run), version(other)}
        assert all(one.result() > 0 for one in writing)
    assert service.models(*USERS) == second.models(*USERS) == {version(run if back else other)}


def test_a_process_that_is_behind_takes_no_user_back(run, valkey_url, tmp_path, go):
    """It has followed from the first model to the second, and has yet to hear that the first is wanted again."""
    second = save_checkpoint(tmp_path, random_checkpoint(seed=4))
    here, behind = memory(run, valkey_url), memory(run, valkey_url)
    first = version(run)

    async def story() -> tuple[str, bool]:
        for one in (here, behind):
            await one.start()
        await remember(here, "u", took(0, "i1"))
        await here.models.want(second, tmp_path)
        await here.models.cut_over(second)
        await behind.models.follow()
        await here.models.want(first, run)
        (stale,) = (await behind.retrieve(Question.unpacked(RetrieveRequest(second, ["u"])))).stale
        move = UserRekey("u", stale.version, vectors("u", 1), vectors("u", 1))
        with pytest.raises(ModelMismatch, match=f"written for model {first}"):
            await behind.rekey(RekeyRequest(second, [move]))
        found = await here.inspect("u")
        for one in (here, behind):
            await one.close()
        return found.model_version, behind.models.wanted.model_version

    assert go(story()) == (first, first)


# ----------------------------------------------------------------------------------------- interrupted


def test_a_broken_off_reembed_goes_on_where_it_was(service, other, monkeypatch):
    monkeypatch.setattr("api.jobs.reembed.PAGE", 2)

    class BrokenOffError(Exception):
        pass

    async def begin() -> None:
        engine = Engine(Recommender.load(other), MemoryClient(service.memory_url, 30), ApiMetrics())
        await check_wanted(engine)

        def after_some(looked_at: int, moved: int) -> None:
            if moved:
                raise BrokenOffError

        try:
            with pytest.raises(BrokenOffError):
                await one_pass(engine, after_some)
        finally:
            await engine.close()

    service.reload(other)
    asyncio.run(begin())
    moved = service.ready()["moving"]["moved"]
    assert 0 < moved < len(USERS)
    assert reembed(other, service.memory_url) == len(USERS) - moved


def test_only_the_wanted_model_can_be_moved_to(service, run, other):
    with pytest.raises(ReembedError, match=f"wants model {version(run)}"):
        reembed(other, service.memory_url)


def test_a_restart_in_the_middle_goes_on_with_both_models(run, other, valkey_url):
    with ExitStack() as first:
        service = Service(first, run, valkey_url)
        service.take(*USERS)
        before = service.answers(*USERS)
        service.reload(other)
        service.take("u0", "u1", items=range(4, 5))
    with ExitStack() as second:
        service = Service(second, run, valkey_url)
        assert service.serving() == (version(run), version(other))
        assert service.models("u0", "u1") == {version(other)}
        answers = service.answers(*USERS[2:])
        assert {one["model_version"] for one in answers.values()} == {version(run)}
        assert [len(one["items"]) for one in answers.values()] == [len(before[user]["items"]) for user in answers]
        assert reembed(other, service.memory_url) == len(USERS) - 2
    with ExitStack() as third:
        service = Service(third, run, valkey_url)  # configured as ever, it follows what serves by now
        assert service.serving() == (version(other), version(other))
        assert service.models(*USERS) == {version(other)}


def test_a_process_started_with_something_new_makes_that_serve(run, other, valkey_url, tmp_path):
    save_checkpoint(tmp_path, random_checkpoint(seed=5))
    with ExitStack() as first:
        service = Service(first, run, valkey_url)
        service.take(*USERS)
        service.reload(other)
    with ExitStack() as second:
        service = Service(second, tmp_path, valkey_url)
        assert service.serving() == (version(tmp_path), version(tmp_path))
        assert service.models(*USERS) == {version(tmp_path)}


def test_a_folder_overwritten_and_read_anew(service, run, other, valkey_url, tmp_path, stack):
    """The configured folder gets a new content; a process that is started then has only that."""
    save_checkpoint(tmp_path, load_checkpoint(run))
    url = f"{valkey_url}?db=9"
    with ExitStack() as first:
        one = Service(first, tmp_path, url)
        one.take(*USERS)
        save_checkpoint(tmp_path, load_checkpoint(other))
        assert one.api.post("/model/reload").json()["wanted"] == version(other)
        assert one.models(*USERS) == {version(run)}
    one = Service(stack, tmp_path, url)
    assert one.serving() == (version(other), version(other))
    assert one.models(*USERS) == {version(other)}


# --------------------------------------------------------------------------------------------- forget


def test_who_is_forgotten_in_between_is_gone_from_both_models(service, fresh, run, other):
    service.reload(other)
    service.take("u0", "u1", "u4", items=range(4, 5))
    for user in ("u0", "u5"):  # one has moved, one has not
        assert service.api.delete(f"/users/{user}/memory").json()["existed"]
        assert service.api.get(f"/users/{user}/memory").status_code == 404
    new, old = fresh(other, "u1", "u4"), fresh(run, *[user for user in USERS if user not in ("u0", "u5")])
    new.take("u1", "u4", items=range(4, 5))
    same(service.answers("u1", "u4"), new.answers("u1", "u4"))
    same(service.answers("u2", "u3"), old.answers("u2", "u3"))


# --------------------------------------------------------------------------------------------- refused


def _flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)


def _truncated(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-100])


def _of_another_format(folder: Path) -> None:
    header = json.loads((folder / HEADER_FILE).read_text())
    (folder / HEADER_FILE).write_text(json.dumps(header | {"format": 9}))


def _of_another_capacity(folder: Path) -> None:
    config = small_config()
    rules = config.rules.model_copy(update={"capacity": 20})
    save_checkpoint(folder, random_checkpoint(config.model_copy(update={"rules": rules}), seed=3))


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flipped, "content does not match version"),
        (_truncated, "cannot read"),
        (_of_another_format, "checkpoint format 9"),
        (_of_another_capacity, "rules.capacity 20, the serving model 10"),
        (_empty, "no checkpoint at"),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_old_one_goes_on(service, run, other, tmp_path, damage, reason):
    before = service.answers(*USERS)
    save_checkpoint(tmp_path, load_checkpoint(other))
    damage(tmp_path)
    response = service.api.post("/model/reload", json={"run": str(tmp_path)})
    assert (response.status_code, response.json()["code"]) == (422, "checkpoint_refused")
    assert reason in response.json()["detail"]
    assert service.serving() == (version(run), version(run))
    same(service.answers(*USERS), before)
    assert service.take("u0", items=range(4, 5))["accepted"] == 1


def test_a_body_that_names_no_folder_is_refused(service):
    for body in ({"run": ""}, {"run": 5}, {"runs": "x"}):
        assert service.api.post("/model/reload", json=body).status_code == 422
    assert service.api.post("/model/reload", json={"run": "a\0b"}).json()["code"] == "checkpoint_refused"


def test_a_process_that_cannot_read_the_wanted_model_says_so_and_goes_on(service, run, other, valkey_url):
    with redis.Redis.from_url(valkey_url) as client:
        state = {"serving": version(run), "serving_run": str(run), "wanted": "f" * 16, "wanted_run": str(other)}
        client.set("ramrec:model", json.dumps(state | {"base": version(run)}))
    url = f"{service.memory_url}/v1/stale?version={'f' * 16}"
    assert httpx2.get(url).status_code == 409  # it looked
    ready = httpx2.get(f"{service.memory_url}/health/ready").json()
    assert f"holds model {version(other)}" in ready["trouble"]
    assert service.models(*USERS) == {version(run)}
    service.take("u0", items=range(4, 5))
