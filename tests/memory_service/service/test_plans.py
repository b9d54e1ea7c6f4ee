"""Plans that are kept for the write: found by their tokens, never used where they do not belong."""

import msgspec
import pytest

from memory_service.protocol.structs import PlanReply, PlanRequest, UserEvents, UserWrite, WriteReply, WriteRequest
from memory_service.service import writing
from memory_service.store.store import Store
from tests.memory_service.calling import NOW, opened, service, took, vectors


class CountingStore(Store):
    """Counts the looks at Redis."""

    looks = 0

    async def look(self, *asked, **more):
        self.looks += 1
        return await super().look(*asked, **more)


@pytest.fixture
def here(run, valkey_url, go):
    """A started memory service with a CountingStore."""
    started = service(run, valkey_url, CountingStore)
    go(started.start())
    yield started
    go(started.close())


@pytest.fixture
def plans(monkeypatch) -> list:
    """The plans that are made."""
    made, plan = [], writing.plan

    def noting(*about):
        made.append(plan(*about))
        return made[-1]

    monkeypatch.setattr(writing, "plan", noting)
    return made


def events(*items: str, since: float = 0.0) -> list:
    return [took(n, item, NOW + since + n) for n, item in enumerate(items)]


async def planned(of, sent: list) -> PlanReply:
    return await of.plan(PlanRequest(of.model_version, NOW, [UserEvents("u", sent)]))


async def written(of, plan, sent: list, token: str | None = None) -> WriteReply:
    packed = vectors("u", len(plan.accepted)), vectors("u", 1), plan.token if token is None else token
    return await of.write(WriteRequest(of.model_version, NOW, [UserWrite("u", plan.version, sent, *packed)]))


async def remember(of, sent: list, token: str | None = None):
    return (await written(of, (await planned(of, sent)).users[0], sent, token)).users[0]


def test_a_write_with_its_token_is_neither_planned_nor_read_again(here, plans, go):
    async def story():
        await remember(here, events("i1"))
        plans.clear()
        plan = (await planned(here, events("i2", since=9))).users[0]
        before = here.store.looks
        reply = await written(here, plan, events("i2", since=9))
        return reply.users[0], here.store.looks - before

    outcome, looks = go(story())
    assert (outcome.accepted, outcome.version, len(plans), looks) == ([0], 2, 1, 0)


@pytest.mark.parametrize("token", ["", "unknown"])
def test_a_write_without_a_known_token_is_planned_again(here, plans, go, token):
    assert go(remember(here, events("i1"), token)).accepted == [0]
    assert len(plans) == 2


def test_the_token_of_an_earlier_plan_is_unknown(here, plans, go):
    async def story():
        first = (await planned(here, events("i1"))).users[0]
        await planned(here, events("i2"))
        return (await written(here, first, events("i1"))).users[0]

    assert go(story()).accepted == [0]
    assert len(plans) == 3
    assert [entry.item for entry in go(here.inspect("u")).entries] == [1]


def test_a_retry_has_a_token_of_its_own(here, go):
    async def story():
        slow = (await planned(here, events("i1"))).users[0]
        await remember(here, events("i2", since=9))
        lost = (await written(here, slow, events("i1"))).users[0]
        won = (await written(here, lost.retry, events("i1"))).users[0]
        return slow.token, lost.retry.token, won

    first, second, won = go(story())
    assert len({"", first, second}) == 3
    assert (won.version, won.accepted, won.retry) == (2, [0], None)


def test_a_plan_of_another_replica_is_made_again(here, run, valkey_url, go):
    async def story():
        there = service(run, valkey_url)
        await there.start()
        plan = (await planned(there, events("i1"))).users[0]
        outcome = (await written(here, plan, events("i1"))).users[0]
        await there.close()
        return outcome

    assert go(story()).version == 1


def test_callers_that_know_no_tokens_are_served(run, valkey_url, stack, go):
    """A body of an api that is older than the token."""
    client = stack.enter_context(opened(run, valkey_url))
    version = client.app.state.service.model_version
    user = {"user_id": "u", "version": 0, "events": [], "keys": b"", "state": vectors("u", 1)}
    user["events"] = [{"index": 0, "item_id": "i1", "timestamp": NOW}]
    user["keys"] = vectors("u", 1)
    body = {"model_version": version, "received_at": NOW, "users": [user]}
    response = client.post("/v1/write", content=msgspec.msgpack.encode(body))
    assert msgspec.msgpack.decode(response.content, type=WriteReply).users[0].accepted == [0]
