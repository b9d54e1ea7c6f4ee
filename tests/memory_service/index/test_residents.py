"""Banks ready to be asked, against the rules of `model.memory.bank` that they speed up."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_service.index.residents import EMPTY_SLOT, SPARE, OwnQueries, Residents
from model.config import RulesConfig
from model.memory.bank import HABIT_FIELDS, Banks
from model.memory.changes import Stacked
from model.memory.habits import FEATURES
from model.memory.record import UserRecord
from model.memory.retrieval import select
from model.memory.rules import unit
from tests.synthetic import ACTIVATION, habitual_config, random_banks, small_config

DIM, USERS = 16, 12
RULES, HABITUAL = small_config().rules, habitual_config().rules
CLUSTERS = np.append(-1, np.arange(30) % RULES.clusters)


def filled(limit: int = USERS, events: int = 14, seed: int = 0, rules: RulesConfig = RULES) -> tuple[Residents, Banks]:
    residents, banks = Residents(limit, DIM, rules, "m"), random_banks(USERS, events, DIM, rules, seed=seed)
    residents.put(names(), records(banks), CLUSTERS)
    return residents, banks


def names(users: int = USERS) -> list[str]:
    return [f"u{n}" for n in range(users)]


def records(banks: Banks, version: int = 1) -> list[UserRecord]:
    state = np.ones(DIM, np.float32)
    return [UserRecord(banks.row(n), version=version, model_version="m", state=state) for n in range(len(banks))]


def wish(residents: Residents, queries: np.ndarray, k: np.ndarray, now: np.ndarray | None = None) -> OwnQueries:
    return OwnQueries(residents.find(names()), unit(queries).astype(np.float32), k, now)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    events=st.integers(1, 25),
    k=st.lists(st.integers(0, 10), min_size=USERS, max_size=USERS),
    alike=st.booleans(),
    threshold=st.sampled_from([-1.0, 0.2]),
)
def test_residents_choose_what_the_rules_choose(seed, events, k, alike, threshold):
    """Ties (keys that are alike), thresholds and any K: the entries are those of `select`."""
    rules = RULES.model_copy(update={"similarity_threshold": threshold})
    banks = random_banks(USERS, events, DIM, rules, seed=seed)
    if alike:
        banks.key[:] = banks.key[:, :1]
    residents = Residents(USERS, DIM, rules, "m")
    residents.put(names(), records(banks), CLUSTERS)
    queries = np.random.default_rng(seed).normal(size=(USERS, DIM))
    asked = wish(residents, queries, np.array(k))
    found = residents.search(asked)

    adaptive = residents.k[residents.slots(names())]
    wanted = np.minimum(np.where(np.array(k) > 0, k, adaptive), banks.size)
    similarity = np.einsum("bcd,bd->bc", banks.key.astype(np.float32), asked.queries)
    slots, chosen = select(similarity, banks.valid(), banks.fields["time"], wanted, threshold)
    expected = banks.describe(np.arange(USERS), slots, chosen, np.take_along_axis(similarity, slots, 1))
    assert np.array_equal(found.k, wanted)
    for row in range(USERS):
        assert found.entries.item[row][found.entries.valid[row]].tolist() == expected.item[row][chosen[row]].tolist()
        for name in ("similarity", "quality", "recency", "rating"):
            got, want = getattr(found.entries, name)[row], getattr(expected, name)[row]
            assert np.allclose(got[found.entries.valid[row]], want[chosen[row]], atol=1e-5)


@pytest.mark.parametrize("copier", [None, faiss.clone_index])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    events=st.integers(1, 25),
    k=st.sampled_from([None, 1, 4, 10]),
    alike=st.booleans(),
    timed=st.booleans(),
    weights=st.sampled_from([ACTIVATION, {"log_count": 1.0}, {"share": 0.0}, {"similarity": -1.0, "same_time": 9.0}]),
    later=st.sampled_from([-3600.0, 0.0, 5000.0, 1e9]),
)
def test_residents_choose_by_activation_what_the_rules_choose(copier, seed, events, k, alike, timed, weights, later):
    """With all features and any ties: what `Banks.retrieve` finds, tells and knows to be present."""
    unit_of_time = "seconds" if timed else "position"
    rules = HABITUAL.model_copy(update={"activation": weights, "time_unit": unit_of_time})
    banks = random_banks(USERS, events, DIM, rules, items=15, seed=seed)
    if alike:
        banks.key[:] = banks.key[:, :1]
    residents = Residents(USERS, DIM, rules, "m", copier)
    residents.put(names(), records(banks), CLUSTERS)
    queries = np.random.default_rng(seed).normal(size=(USERS, DIM))
    now = (events - 1) * 3600.0 + later * np.arange(USERS) / USERS
    asked = wish(residents, queries, np.full(USERS, k or 0), now)
    found, wanted = residents.search(asked), banks.retrieve(np.arange(USERS), asked.queries, CLUSTERS, k, now)
    assert np.array_equal(found.k, wanted.k)
    assert np.array_equal(found.entries.valid, wanted.own.valid)
    assert np.array_equal(np.where(found.entries.valid, found.entries.item, 0), wanted.own.item)
    assert np.array_equal(found.habits, wanted.habits)
    assert np.allclose(found.entries.similarity, wanted.own.similarity, atol=1e-5)
    assert [set(row) - {0} for row in found.present.tolist()] == [set(row) - {0} for row in wanted.present.tolist()]
    slots = asked.slots[:, None]
    assert np.array_equal(
        np.where(found.entries.valid, residents._facts["item"][slots, found.places], 0), wanted.own.item
    )


def test_without_the_time_of_a_request_similarity_decides():
    plain, habitual = filled()[0], filled(rules=HABITUAL)[0]
    queries, k = np.random.default_rng(4).normal(size=(USERS, DIM)), np.zeros(USERS, int)
    wanted = plain.search(wish(plain, queries, k))
    for residents, now in ((habitual, None), (plain, np.full(USERS, 1e6))):
        found = residents.search(wish(residents, queries, k, now))
        assert np.array_equal(found.entries.item, wanted.entries.item)
        assert np.array_equal(found.places, wanted.places)
        assert (found.habits.shape, found.present.shape) == ((*found.places.shape, 0), (USERS, 0))
    assert plain._habits == {}  # a model that does not look at habits keeps none
    assert not np.array_equal(
        habitual.search(wish(habitual, queries, k, np.full(USERS, 1e6))).entries.item, wanted.entries.item
    )


def test_entropy_and_k_are_those_of_the_rules():
    residents, banks = filled()
    slots = residents.slots(names())
    retrieved = banks.retrieve(np.arange(USERS), unit(np.ones((USERS, DIM))), CLUSTERS)
    assert np.array_equal(residents.entropy[slots], retrieved.entropy)
    assert np.array_equal(residents.k[slots], retrieved.k)
    assert (residents.entropy[EMPTY_SLOT], residents.k[EMPTY_SLOT], residents.size[EMPTY_SLOT]) == (0.5, 0, 0)


def test_the_least_recently_used_go_first_and_a_call_keeps_its_own():
    residents, _banks = filled()
    some = random_banks(USERS, 5, DIM, RULES, seed=3)
    residents.put([f"new{n}" for n in range(USERS)], records(some), CLUSTERS)
    residents.find([f"new{n}" for n in range(2, USERS)])
    residents.find(["u0", "u5"])
    assert len(residents) == 2 * USERS
    residents.make_room()
    assert len(residents) == USERS
    assert (residents.slots(["u0", "u5"]) != EMPTY_SLOT).all()
    assert (residents.slots(["u1", "u2"]) == EMPTY_SLOT).all()


def test_more_users_than_there_is_room_for_push_out_older_ones():
    residents = Residents(1, DIM, RULES, "m")
    many = records(random_banks(1, 5, DIM, RULES)) * (SPARE // 2)
    for turn in range(3):
        last = [f"u{turn}-{n}" for n in range(len(many))]
        residents.put(last, many, CLUSTERS)
    assert len(residents) <= SPARE + 1
    assert (residents.slots(last) != EMPTY_SLOT).all()


def test_retrievals_are_counted_until_the_next_record():
    residents, banks = filled()
    found = residents.search(wish(residents, np.ones((USERS, DIM)), np.full(USERS, 2)))
    counted = np.arange(USERS) != 1
    slots = residents.slots(names())
    for _ in range(2):
        residents.count(slots, found, counted, 1e9)
    assert sorted(residents.accesses("u0")) == sorted((int(item), 2, 1e9) for item in found.entries.item[0])
    assert residents.accesses("u1") == residents.accesses("stranger") == []
    before = residents.accesses("u0")
    residents.put(["u0"], records(banks, version=2)[:1], CLUSTERS)  # read anew: another process wrote
    assert sorted(residents.accesses("u0")) == sorted(before)
    residents.put_fresh(["u0"], Stacked.of(records(banks, version=3)[:1]), CLUSTERS)  # written here
    assert residents.accesses("u0") == []


def test_a_record_of_another_model_answers_nothing_and_says_so():
    residents, _banks = filled()
    old = UserRecord(random_banks(1, 5, 8, RULES).row(0), version=3, model_version="older")
    residents.put(["u0"], [old], CLUSTERS)
    slot = residents.slots(["u0"])
    assert (residents.stale[slot][0], residents.version[slot][0], residents.size[slot][0]) == (True, 3, 0)
    assert not residents.search(wish(residents, np.ones((USERS, DIM)), np.full(USERS, 3))).entries.valid[0].any()


def test_a_guest_answers_like_a_resident_and_leaves_nothing_behind():
    residents, _banks = filled()
    before = residents.search(wish(residents, np.ones((USERS, DIM)), np.full(USERS, 3)))
    guest = records(random_banks(1, 7, DIM, RULES, seed=8))[0]
    with residents.guests([guest], CLUSTERS) as slot:
        found = residents.search(OwnQueries(slot, unit(np.ones((1, DIM))), np.array([3])))
        residents.count(slot, found, np.ones(1, bool), 1e9)
    wanted = guest.banks.retrieve(np.array([0]), unit(np.ones((1, DIM))), CLUSTERS, k=3)
    assert found.entries.item.tolist() == wanted.own.item.tolist()
    assert (len(residents), residents.size[slot].tolist(), residents.version[slot].tolist()) == (USERS, [0], [0])
    after = residents.search(wish(residents, np.ones((USERS, DIM)), np.full(USERS, 3)))
    assert np.array_equal(before.entries.item, after.entries.item)


def test_who_is_dropped_leaves_nothing_behind():
    residents, _ = filled()
    slot = residents.slots(["u3"])
    residents.drop(["u3", "stranger"])
    assert (residents.slots(["u3"])[0], len(residents)) == (EMPTY_SLOT, USERS - 1)
    assert not residents.state[slot].any()
    assert residents.search(OwnQueries(slot, np.ones((1, DIM), np.float32), np.array([5]))).entries.valid.sum() == 0


def test_who_is_dropped_leaves_no_habits_behind():
    residents, _ = filled(rules=HABITUAL)
    slot = residents.slots(["u3"])
    assert residents._habits["sums"][slot].any()
    residents.drop(["u3"])
    assert residents._habits.keys() == set(HABIT_FIELDS)
    assert not any(values[slot].any() for values in (*residents._habits.values(), residents._occasions))
    found = residents.search(OwnQueries(slot, np.ones((1, DIM), np.float32), np.array([5]), np.array([1e9])))
    assert (found.entries.valid.sum(), found.habits.shape) == (0, (1, 0, len(FEATURES)))


@pytest.mark.parametrize("rules", [RULES, HABITUAL])
@pytest.mark.parametrize("size", [0, 1, 10])
def test_nobody_and_small_banks(size, rules):
    residents, banks = Residents(3, DIM, rules, "m"), Banks(1, DIM, rules)
    if size:
        banks = random_banks(1, size, DIM, RULES)
    residents.put(["u"], records(banks)[:1], CLUSTERS)
    slots, queries = residents.slots(["u", "x"]), unit(np.ones((2, DIM)))
    for now in (None, np.array([1e9, 0.0])):
        found = residents.search(OwnQueries(slots, queries, np.array([9, 9]), now))
        assert found.k.tolist() == found.entries.valid.sum(axis=1).tolist() == [min(int(banks.size[0]), 9), 0]
