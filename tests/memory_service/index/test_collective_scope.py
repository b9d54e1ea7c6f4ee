"""The collective scope as it is served: others' memories at once, never one's own, never those of the forgotten."""

import asyncio
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_service.index.collective import CollectiveScope
from memory_service.protocol.hash_slots import user_key
from memory_service.protocol.structs import RetrieveReply, RetrieveRequest
from memory_service.service.service import MemoryService
from memory_service.store.record import pack_record, unpack_record
from memory_service.store.store import Store
from model.checkpoint import load_checkpoint, save_checkpoint
from model.memory.bank import NOT_SHARED
from model.memory.collective.layout import LAST
from model.memory.record import UserRecord
from tests.memory_service.calling import DIM, Caller, ask, opened, remember, retrieved, service, took, vectors
from tests.redis_cluster import until
from tests.synthetic import random_banks


@pytest.fixture
def caller(run, valkey_url, stack) -> Caller:
    return Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)


SECRET = 31
"""Catalogue number of the first item that the model (30 items) does not know."""


def took_all(*items: str):
    return [took(n, item) for n, item in enumerate(items)]


def others(reply: RetrieveReply, row: int = 0) -> list[int]:
    found = reply.collective.unpack()
    return found.item[row, found.valid[row]].tolist()


def asking(caller: Caller, user: str, by: str = "somebody", **more) -> RetrieveReply:
    """What `user` is told of others, with a query as `by` has it."""
    return caller.retrieve(user, query_rows=np.array([0], "<u4").tobytes(), queries=vectors(by, 1), **more)


@pytest.fixture
def narrow(run, valkey_url, stack, tmp_path) -> Caller:
    """A service that looks at one list, and knows no neighbours of items."""
    known = load_checkpoint(run)
    rules = known.config.rules.model_copy(update={"collective_codes": 1})
    config = known.config.model_copy(update={"rules": rules})
    version = save_checkpoint(tmp_path, replace(known, config=config, item_near=np.zeros_like(known.item_near)))
    return Caller(stack.enter_context(opened(tmp_path, valkey_url)), version)


def test_others_are_found_by_what_was_taken_last(narrow):
    """As the record says, or as the caller does, whose numbers are another's."""
    narrow.remember("a", *took_all("i1", "i2", "i3"))  # memories of i2, behind i1, and of i3, behind i2
    narrow.remember("b", *took_all("i9", "i2"))
    narrow.remember("c", *took_all("i8", "i7"))
    assert others(narrow.retrieve("b")) == [3]
    assert others(narrow.retrieve("c")) == []

    def after(*last: int) -> list[int]:
        told = np.array([*last, 0, 0, 0, 0, 0][:LAST], "<u4").tobytes()
        return others(asking(narrow, "c", last=told))

    assert (after(2), after(5, 2), after(1), after(5), after()) == ([3], [3], [2], [], [])


def test_a_limit_keeps_a_sample(run, valkey_url, stack):
    caller = Caller(stack.enter_context(opened(run, valkey_url, collective_entries=60)), load_checkpoint(run).version)
    for user in range(20):
        caller.remember(f"u{user}", *took_all(*(f"i{n}" for n in range(1, 9))))
    index = caller.client.app.state.service.serving.collective.index
    assert 0 < len(index) <= 60 < 20 * 7
    assert index.share < 1


def test_a_write_is_found_by_others_at_once_and_never_by_its_user(caller):
    assert others(asking(caller, "b")) == []
    caller.remember("a", *took_all("i1", "i2", "i3"))
    assert sorted(others(asking(caller, "b"))) == [2, 3]  # i1 was taken before any item: nobody's context
    assert others(asking(caller, "a")) == []
    assert sorted(others(caller.retrieve("", query_rows=b"\0\0\0\0", queries=vectors("x", 1)))) == [2, 3]
    assert others(asking(caller, "b", alone=[0])) == []
    assert others(caller.retrieve("nobody")) == []  # no state to ask with


def test_what_one_user_took_is_told_to_nobody_until_others_took_it_too(run, valkey_url, stack):
    caller = Caller(stack.enter_context(opened(run, valkey_url, collective_users=2)), load_checkpoint(run).version)
    caller.remember("a", *took_all("i1", "i2", "secret"))
    caller.remember("b", *took_all("i2", "i3"))
    assert others(asking(caller, "c")) == [2]  # b took it, too, though not in a context to be found
    assert others(asking(caller, "a")) == others(asking(caller, "b")) == []  # beside themselves one user has i2
    caller.remember("d", *took_all("i9", "secret"))
    assert sorted(others(asking(caller, "c"))) == [2, SECRET, SECRET]
    caller.forget("d")
    assert others(asking(caller, "c")) == [2]
    again = Caller(stack.enter_context(opened(run, valkey_url, collective_users=2)), caller.model_version)
    assert others(asking(again, "c")) == [2]


def test_collective_k_follows_entropy_and_an_unknown_users_is_the_callers(caller):
    few = asking(caller, "x", entropy=np.array([0.0], "<f4").tobytes())
    many = asking(caller, "x", entropy=np.array([1.0], "<f4").tobytes())
    assert np.frombuffer(few.collective_k, "<i4")[0] < np.frombuffer(many.collective_k, "<i4")[0]


def test_forgotten_users_leave_the_index_also_after_a_restart(run, valkey_url, caller, stack):
    caller.remember("a", *took_all("i1", "i2"))
    caller.remember("b", *took_all("i3", "i4"))
    caller.forget("a")
    assert others(asking(caller, "c")) == [4]
    again = Caller(stack.enter_context(opened(run, valkey_url)), caller.model_version)
    assert others(asking(again, "c")) == [4]


def test_a_restart_fills_the_index_and_few_residents_do_not_shrink_it(run, valkey_url, caller, stack):
    for n in range(12):
        caller.remember(f"u{n}", *took_all(f"i{n + 1}", f"i{n + 2}", f"i{n + 3}"))
    before = asking(caller, "c")
    small = Caller(stack.enter_context(opened(run, valkey_url, resident_users=2)), caller.model_version)
    for n in range(12):
        small.retrieve(f"u{n}")
    assert len(others(before)) > 3
    assert asking(small, "c").collective == before.collective


def test_what_another_replica_forgot_is_gone_once_it_is_asked_about(run, valkey_url, caller, stack):
    caller.remember("a", *took_all("i1", "i2"))
    other = Caller(stack.enter_context(opened(run, valkey_url)), caller.model_version)
    other.remember("a", took(5, "i9"))
    caller.retrieve("a")
    assert sorted(others(asking(caller, "c"))) == [2, 9]
    other.forget("a")
    caller.retrieve("a")
    assert others(asking(caller, "c")) == []


def test_users_who_do_not_share_and_damaged_records_are_left_out(run, valkey_url, caller, stack):
    rules = load_checkpoint(run).config.rules
    for user in ("private", "damaged", "open"):
        caller.remember(user, *took_all("i1", "i2"))
    with redis.Redis.from_url(valkey_url) as client:
        record = unpack_record(client.get(user_key("private")), rules)
        client.set(user_key("private"), pack_record(replace(record, share=False, version=2)))
        client.setrange(user_key("damaged"), 100, b"\xff\xff\xff")
    again = Caller(stack.enter_context(opened(run, valkey_url)), caller.model_version)
    assert others(asking(again, "c")) == [2]
    until(lambda: others(asking(caller, "c")) == [2, 2])  # the damaged one was read before
    off = Caller(stack.enter_context(opened(run, valkey_url, collective=False)), caller.model_version)
    assert (others(asking(off, "c")), np.frombuffer(asking(off, "c").collective_k, "<i4")[0]) == ([], 0)


class SlowStore(Store):
    """Holds every batch of records back until `gate` opens."""

    gate: asyncio.Event

    async def load_packed(self, users):
        found = await super().load_packed(users)
        if users:
            await self.gate.wait()
        return found


def test_writes_and_forgets_while_the_index_is_filled(run, valkey_url, go):
    async def overlapping():
        first = service(run, valkey_url)
        await first.start()
        for user in ("a", "b", "c"):
            await remember(first, user, *took_all("i1", "i2"))
        late = service(run, valkey_url, SlowStore)
        late.store.gate = asyncio.Event()
        filling = asyncio.create_task(late.start())
        while late.catalogue.size == 0:
            await asyncio.sleep(0)
        degraded = (await ask(late, "b")).degraded
        await remember(late, "a", took(7, "i7"))
        await late.forget("c")
        late.store.gate.set()
        await filling
        answer = await retrieved(late, _everything(late, "x"))
        for one in (first, late):
            await one.store.close()
        return degraded, answer

    degraded, answer = go(overlapping())
    assert (degraded, answer.degraded) == (True, False)
    assert sorted(others(answer)) == [2, 2, 7]


def _everything(of: MemoryService, user: str):
    return RetrieveRequest(of.model_version, [user], query_rows=b"\0\0\0\0", queries=vectors("q", 1))


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "drop"]), st.integers(0, 5), st.integers(1, 14)), min_size=1, max_size=25
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_the_index_holds_exactly_the_latest_banks(run, steps):
    """After any writes and drops a search of all lists equals one over the banks by plain numpy."""
    checkpoint = load_checkpoint(run, with_weights=False)
    scope, banks = CollectiveScope(checkpoint), {}
    for version, (what, user, events) in enumerate(steps, start=1):
        name = f"u{user}"
        if what == "drop":
            scope.drop(name)
            banks.pop(name, None)
            continue
        bank = random_banks(1, events, DIM, checkpoint.config.rules, seed=version)
        bank.fields["cell"][:] = np.arange(bank.key.shape[1]) % 5 - 1
        scope.put([(name, UserRecord(bank, version=version, model_version=checkpoint.version))])
        banks[name] = bank

    def kept(key: np.ndarray) -> np.ndarray:
        return scope.index.codec.rounded(key.astype(np.float32)[None])[0]

    query = np.random.default_rng(1).normal(size=(1, DIM)).astype(np.float32)
    query /= np.linalg.norm(query)
    for asker in ("u0", "nobody"):
        found = scope.search(query, np.zeros((1, LAST), np.int64), [asker], np.array([1000]))
        wanted = sorted(
            (
                (round(float(kept(bank.key[0, slot]) @ query[0]), 4), int(bank.fields["item"][0, slot]))
                for name, bank in banks.items()
                if name != asker
                for slot in range(int(bank.size[0]))
                if bank.fields["cell"][0, slot] != NOT_SHARED
            ),
            reverse=True,
        )
        got = [
            (round(float(s), 4), int(i))
            for s, i in zip(found.similarity[0][found.valid[0]], found.item[0][found.valid[0]], strict=True)
        ]
        assert len(got) == len(wanted)
        assert sorted(item for _, item in got) == sorted(item for _, item in wanted)
        assert np.allclose([one for one, _ in got], [one for one, _ in wanted], atol=2e-3)
    assert scope.users == len(banks)


# ----------------------------------------------------------------------------------------------- api


def test_an_item_the_model_never_saw_is_recommended_because_others_took_it(api_url):
    with httpx2.Client(base_url=api_url) as client:
        events = [
            {"user_id": f"u{user}", "item_id": item, "timestamp": 1.6e9 + n}
            for user in range(20)
            for n, item in enumerate(["i1", "i2", "new-on-the-shelf"])
        ]
        assert client.post("/memories", json={"interactions": events}).json()["accepted"] == 60
        ask = {"sequence": ["i1", "i2"], "top_n": 31, "explain": True}
        answer = client.post("/recommend", json=ask).json()
        assert answer["source"] == "memory"
        assert answer["memory"]["collective"]["retrieved"] > 0
        found = {item["item_id"]: item for item in answer["items"]}
        new = found["new-on-the-shelf"]
        assert np.isclose(sum(reason["copied"] for reason in new["because"][:3]), 3 / 20, atol=0.05)
        assert {reason["scope"] for reason in new["because"]} == {"collective"}
        assert all("u" not in reason for reason in new["because"])
        only = client.post("/recommend", json=ask | {"candidates": ["new-on-the-shelf", "i9"]}).json()
        assert {item["item_id"] for item in only["items"]} == {"new-on-the-shelf", "i9"}
        for barred in (
            {"exclude_items": ["new-on-the-shelf"]},
            {"scopes": ["own"]},
            {"user_id": "u1"},
            {"sequence": ["i1", "i2", "new-on-the-shelf"]},
        ):
            without = client.post("/recommend", json=ask | barred).json()
            assert "new-on-the-shelf" not in {item["item_id"] for item in without["items"]}, barred
        assert client.patch("/items/new-on-the-shelf", json={"hidden": True}).json()["hidden"]
        hidden = client.post("/recommend", json=ask).json()
        assert "new-on-the-shelf" not in {item["item_id"] for item in hidden["items"]}
