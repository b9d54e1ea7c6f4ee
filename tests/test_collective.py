"""The collective index against brute force over the same banks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.bank import NOT_SHARED, Banks, stack_banks
from model.collective import CollectiveIndex, cells
from model.config import RulesConfig
from model.rules import unit

USERS, DIM, LISTS = 60, 8, 6
RULES = RulesConfig(capacity=12, similarity_threshold=-1.0)
RNG = np.random.default_rng(4)
CENTROIDS = unit(RNG.normal(size=(LISTS, DIM)))
QUERIES = unit(RNG.normal(size=(30, DIM)))


def banks(seed: int = 0, events: int = 20, items: int = 40, users: int = USERS) -> Banks:
    rng, made = np.random.default_rng(seed), Banks(users, DIM, RULES)
    for position in range(events):
        keys = unit(rng.normal(size=(users, DIM)))
        cell = cells(keys, np.full(users, position), CENTROIDS)
        rating = rng.integers(1, 6, users).astype(np.float32)
        made.write(np.arange(users), rng.integers(1, items, users), keys, np.full(users, 60.0 * position), rating, cell)
    return made


def index_of(made: Banks) -> CollectiveIndex:
    index = CollectiveIndex(CENTROIDS, RULES.capacity, LISTS)
    index.put(np.arange(len(made)), made)
    return index


def brute_force(made: Banks, query: np.ndarray, asker: int, k: int, users: int = 1) -> np.ndarray:
    item, others = made.fields["item"], np.arange(len(made)) != asker
    holders = np.bincount(item[made.valid() & others[:, None]], minlength=int(item.max()) + 1)
    similarity = made.key.astype(np.float32) @ query
    similarity[~made.valid() | (made.fields["cell"] == NOT_SHARED) | (holders[item] < users)] = -np.inf
    if asker >= 0:
        similarity[asker] = -np.inf
    return np.sort(similarity.ravel())[::-1][:k]


def test_finds_what_brute_force_finds_without_the_askers_own():
    made = banks()
    k = np.arange(30) % 12
    found = index_of(made).search(QUERIES, np.arange(30), k)
    for row in range(30):
        wanted = brute_force(made, QUERIES[row], row, k[row])
        assert found.valid[row].sum() == k[row]
        assert np.allclose(found.similarity[row, : k[row]], wanted, atol=1e-5)
        others = np.delete(np.arange(USERS), row)
        keys = made.key[others].astype(np.float32) @ QUERIES[row]
        for place in range(k[row]):
            hit = np.isclose(keys, found.similarity[row, place], atol=1e-5)
            assert found.item[row, place] in made.fields["item"][others][hit]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["put", "drop"]), st.integers(0, 11)), max_size=12),
    users=st.integers(1, 5),
)
def test_what_too_few_others_hold_is_left_out_whatever_changed_before(steps, users):
    """Banks come and go; an item counts once a bank, one's own does not, and one that nobody may find does."""
    index, there = CollectiveIndex(CENTROIDS, RULES.capacity, LISTS), {}
    for seed, (what, slot) in enumerate([*(("put", slot) for slot in range(8)), *steps]):
        if what == "put":
            there[slot] = banks(seed, events=16, items=60, users=1)
            index.put(np.array([slot]), there[slot])
        else:
            index.drop(np.array([slot]))
            there[slot] = Banks(1, DIM, RULES)
    made = stack_banks([there.get(slot, Banks(1, DIM, RULES)) for slot in range(12)])
    askers = np.append(np.arange(12), np.full(18, -1))
    found = index.search(QUERIES, askers, np.full(30, 100), users)
    for row in range(30):
        wanted = brute_force(made, QUERIES[row], askers[row], 100, users)
        wanted = wanted[np.isfinite(wanted)]
        assert np.allclose(found.similarity[row, found.valid[row]], wanted, atol=1e-5)


def test_own_entries_and_ties_do_not_crowd_others_out():
    made = banks()
    made.key[:] = made.key[0, 0]  # everybody's entries are alike: ties everywhere
    made.fields["cell"][:] = 0
    found = index_of(made).search(made.key[0, :1].astype(np.float32), np.array([3]), np.array([10]))
    others = np.delete(np.arange(USERS), 3)
    smallest = np.sort(made.fields["item"][others][made.valid(others)])[:10]
    assert found.item[0].tolist() == smallest.tolist()  # ties go by item


def test_a_change_is_seen_and_what_is_dropped_is_gone():
    made, newer = banks(), banks(seed=1)
    index = index_of(made)
    total = len(index)
    index.put(np.array([5]), newer.row(5))
    both = stack_banks([newer.row(user) if user == 5 else made.row(user) for user in range(USERS)])
    nobody, k = np.full(30, -1), np.full(30, 9)
    expected = [brute_force(both, query, -1, 9) for query in QUERIES]
    assert np.allclose(index.search(QUERIES, nobody, k).similarity, expected, atol=1e-5)
    index.drop(np.arange(USERS))
    assert len(index) == 0 < total
    assert not index.search(QUERIES, nobody, k).valid.any()


def test_entries_carry_the_features_of_the_bank():
    made = banks()
    found = index_of(made).search(QUERIES[:1], np.array([-1]), np.array([5]))
    everything = made.everything()
    keys = made.key.astype(np.float32) @ QUERIES[0]
    for place in range(5):
        user, slot = np.argwhere(np.isclose(keys, found.similarity[0, place], atol=1e-6) & made.valid())[0]
        for name in ("item", "quality", "recency", "rating"):
            assert getattr(found, name)[0, place] == pytest.approx(getattr(everything, name)[user, slot])


def test_states_before_any_item_are_not_shared():
    keys = unit(RNG.normal(size=(3, DIM)))
    assert cells(keys, np.array([0, -1, 1]), CENTROIDS)[:2].tolist() == [NOT_SHARED, NOT_SHARED]
    assert len(index_of(banks(events=1))) == 0


def test_an_empty_index_answers_with_nothing():
    found = CollectiveIndex(CENTROIDS, 12, 2).search(QUERIES, np.arange(30), np.full(30, 4))
    assert not found.valid.any()
