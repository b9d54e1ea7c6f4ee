"""The store: records as bytes, commits, catalogue numbers, user ids."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_service.store.items import CatalogueItem
from memory_service.store.record import RecordError, pack_record, unpack_record
from memory_service.store.store import Store
from model.config import RulesConfig
from model.memory.changes import Change, apply
from model.memory.events import Event, plan
from model.memory.record import UserRecord
from model.memory.rules import unit
from tests.memory_service.calling import DIM, took
from tests.synthetic import small_config


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
