"""One model follows another while requests go on: reload, moving users, cut-over, rollback."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

import pytest

from api.http.metrics import ApiMetrics
from api.jobs.reembed import ReembedError, check_wanted, one_pass, reembed
from api.memory.client import MemoryClient
from api.models.engine import Engine
from memory_service.protocol.question import Question
from memory_service.protocol.structs import RekeyRequest, RetrieveRequest, UserRekey
from memory_service.service.models import ModelMismatch
from model.checkpoint import load_checkpoint, save_checkpoint
from model.serving.recommender import Recommender
from tests.api.models.changing import USERS, Service, same, version
from tests.memory_service.calling import remember, took, vectors
from tests.memory_service.calling import service as memory
from tests.synthetic import random_checkpoint

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
