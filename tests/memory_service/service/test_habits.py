"""Models that retrieve by habits, and what the memory service keeps for them."""

from zlib import crc32

import numpy as np
import pytest
import redis

from memory_service.protocol.answer import Answer
from memory_service.protocol.hash_slots import user_key
from memory_service.protocol.structs import (
    EventIn,
    RekeyReply,
    RekeyRequest,
    UserRekey,
)
from memory_service.store.record import HABITS, REST_2, unpack_record
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import RulesConfig
from model.memory.changes import Change, apply
from model.memory.events import Event, plan
from model.memory.habits import FEATURES
from model.memory.record import UserRecord
from model.memory.rules import unit
from tests.memory_service.calling import DIM, NOW, Caller, column, opened, took, vectors
from tests.synthetic import habitual_config, random_checkpoint, small_config


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
        reply = habitual.retrieve(*users, "nobody", now=moments(now, now, now, now), uncounted=[0, 1, 2])
        found = Answer.unpacked(reply, [*users, "nobody"])
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
    plain = Answer.unpacked(habitual.retrieve(*users), users)
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
    head = REST_2.pack(record.model_version.encode(), record.events, 1, int(record.banks.pruned[0]), *counts)
    columns = [values[0, :n] for name, values in fields.items() if name not in HABITS]
    columns += [record.banks.key[0, :n], record.log_item, record.log_time, record.seen, record.event_ids, record.state]
    body = head + b"".join(one.tobytes() for one in columns)
    start = data[:4] + b"\2\0" + data[6:16]
    return start + crc32(body, crc32(start)).to_bytes(4, "little") + body
