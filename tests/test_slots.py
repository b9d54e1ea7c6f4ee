"""Who owns which users: the table of a group of memory replicas, as pure functions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from memory_service.slots import (
    NOBODY,
    RANGES,
    Table,
    departing,
    pack,
    range_of,
    read,
    revised,
    unpack,
    user_key,
)

ALL, NONE = np.ones(RANGES, bool), np.zeros(RANGES, bool)


def settled(table: Table, members: list[str], gone: set[str] = frozenset()) -> Table:
    """Everybody looks until nothing changes; each is always ready."""
    while True:
        before = table
        for one in members:
            table = revised(table, one, gone, ALL)
        if table.same(before):
            return table


def test_ranges_are_those_of_rediss_own_slots():
    for user in ("u1", "a}b", "}x", "{", "ü", "user:12345"):
        assert range_of(user) == key_slot(user_key(user)) // 16


def test_a_first_member_owns_everything_at_once():
    table = revised(Table(), "a", (), NONE)
    assert table.members == ("a",)
    assert table.owned("a").all()
    assert not table.contested().any()


def test_who_joins_is_heir_until_it_is_ready():
    table = revised(revised(Table(), "a", (), NONE), "b", (), NONE)
    assert table.owned("a").all()
    assert table.inherited("b").sum() == RANGES // 2
    assert revised(table, "a", (), ALL).owned("a").all(), "only the heir takes over"
    taken = revised(table, "b", (), ALL)
    assert taken.owned("b").sum() == taken.owned("a").sum() == RANGES // 2
    assert not taken.contested().any()


def test_who_leaves_owns_until_its_heirs_are_ready():
    table = settled(Table(), ["a", "b", "c"])
    going = revised(departing(table, "b"), "b", (), NONE)
    assert going.owned("b").sum() == table.owned("b").sum()
    assert (going.contested() == table.owned("b")).all()
    done = revised(revised(going, "a", (), ALL), "c", (), ALL)
    assert not done.owned("b").any()
    assert "b" not in revised(done, "a", (), NONE).members


def test_the_ranges_of_who_is_gone_have_owners_at_once():
    table = revised(settled(Table(), ["a", "b", "c"]), "a", {"b"}, NONE)
    assert table.members == ("a", "c")
    assert (table.owner != NOBODY).all()


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["join", "leave", "die"])), max_size=12))
@settings(deadline=None)
def test_shares_stay_even_moves_few_and_owners_unique(story):
    table = revised(Table(), "z", (), NONE)
    there = {"z"}
    for who, what in story:
        before, count = table, len(there)
        if what == "join":
            there.add(who)
            table = settled(table, sorted(there))
        elif who in there and what == "die":
            there.discard(who)
            table = settled(table, sorted(there), {who})
        elif who in there:
            there.discard(who)
            table = settled(departing(table, who), sorted(there))
        assert set(table.members) == there
        assert not table.contested().any()
        shares = [int(table.owned(one).sum()) for one in table.members]
        assert sum(shares) == RANGES
        assert max(shares) - min(shares) <= 1
        names = np.array([*before.members, ""], object)[before.owner], np.array(table.members, object)[table.owner]
        assert (names[0] != names[1]).sum() <= -(-RANGES // min(count, len(there))) if len(there) != count else True


def test_a_table_survives_the_wire_and_damage_is_refused():
    table = settled(Table(), ["a", "b"])
    written = table.write()
    assert read(written).same(table)
    with pytest.raises(ValueError, match="not a table"):
        read(type(written)(1, ["a"], [], written.owner, written.heir))
    with pytest.raises(ValueError, match="not a table"):
        read(type(written)(1, ["a", "b"], [], written.owner[:-2], written.heir))
    assert (unpack(pack(table.owned("a"))) == table.owned("a")).all()
    with pytest.raises(ValueError, match="bytes"):
        unpack(b"\0")
