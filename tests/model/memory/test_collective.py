"""The collective index against brute force over the same banks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import model.memory.collective.index as index_module
import model.memory.collective.lists as lists_module
from model.config import RulesConfig
from model.memory.bank import NOT_SHARED, Banks, stack_banks
from model.memory.collective.codec import Codec
from model.memory.collective.index import CollectiveIndex
from model.memory.collective.layout import LAST, Layout, branches, cells, cells_of
from model.memory.collective.lists import CellLists
from model.memory.record import EncodeJob
from model.memory.rules import unit
from tests.synthetic import span_of

USERS, DIM, ITEMS = 60, 8, 40
RULES = RulesConfig(capacity=12, similarity_threshold=-1.0, collective_bits=8)
RNG = np.random.default_rng(4)
QUERIES = unit(RNG.normal(size=(30, DIM)))
LAST_ITEMS = RNG.integers(1, ITEMS, (30, LAST))
LAYOUT = Layout(
    near=np.zeros((ITEMS, 2), np.int32),
    nearness=np.zeros((ITEMS, 2), np.float32),
    span=span_of(DIM),
    popularity=np.append(0, np.full(ITEMS - 1, 1 / (ITEMS - 1))).astype(np.float32),
)
EVERY = Codec(LAYOUT.span, 8)


def banks(seed: int = 0, events: int = 20, items: int = ITEMS, users: int = USERS) -> Banks:
    rng, made = np.random.default_rng(seed), Banks(users, DIM, RULES)
    taken = np.pad(rng.integers(1, items, (users, events)), ((0, 0), (2, 0)))
    for position in range(events):
        keys = unit(rng.normal(size=(users, DIM)))
        cell = cells(taken[:, position + 1], taken[:, position])
        rating = rng.integers(1, 6, users).astype(np.float32)
        made.write(np.arange(users), taken[:, position + 2], keys, np.full(users, 60.0 * position), rating, cell)
    return made


def index_of(made: Banks, rules: RulesConfig = RULES, limit: int = 0) -> CollectiveIndex:
    index = CollectiveIndex(LAYOUT, rules, limit)
    index.put(np.arange(len(made)), made)
    return index


def kept(made: Banks, codec: Codec = EVERY) -> np.ndarray:
    """Keys as the index has them."""
    flat = made.key.astype(np.float32).reshape(-1, DIM)
    return codec.rounded(flat).reshape(made.key.shape)


def brute_force(made: Banks, query: np.ndarray, asker: int, k: int, users: int = 1) -> np.ndarray:
    item, others = made.fields["item"], np.arange(len(made)) != asker
    holders = np.bincount(item[made.valid() & others[:, None]], minlength=int(item.max()) + 1)
    similarity = kept(made) @ query
    similarity[~made.valid() | (made.fields["cell"] == NOT_SHARED) | (holders[item] < users)] = -np.inf
    if asker >= 0:
        similarity[asker] = -np.inf
    return np.sort(similarity.ravel())[::-1][:k]


# ---------------------------------------------------------------------------------------------- search


def test_finds_what_brute_force_finds_without_the_askers_own():
    made = banks()
    k = np.arange(30) % 12
    found = index_of(made).search(QUERIES, LAST_ITEMS, np.arange(30), k)
    for row in range(30):
        wanted = brute_force(made, QUERIES[row], row, k[row])
        assert found.valid[row].sum() == k[row]
        assert np.allclose(found.similarity[row, : k[row]], wanted, atol=1e-5)
        others = np.delete(np.arange(USERS), row)
        keys = kept(made)[others] @ QUERIES[row]
        for place in range(k[row]):
            hit = np.isclose(keys, found.similarity[row, place], atol=1e-5)
            assert found.item[row, place] in made.fields["item"][others][hit]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["put", "drop"]), st.integers(0, 11)), max_size=12),
    users=st.integers(1, 5),
)
def test_what_too_few_others_hold_is_left_out_whatever_changed_before(steps, users):
    """Banks come, grow, shrink and go; an item counts once a bank, one's own does not, and one that nobody may find
    does.
    """
    index, there = CollectiveIndex(LAYOUT, RULES), {}
    for seed, (what, slot) in enumerate([*(("put", slot) for slot in range(8)), *steps]):
        if what == "put":
            there[slot] = banks(seed, events=1 + seed * 7 % 16, users=1)
            index.put(np.array([slot]), there[slot])
        else:
            index.drop(np.array([slot]))
            there[slot] = Banks(1, DIM, RULES)
    made = stack_banks([there.get(slot, Banks(1, DIM, RULES)) for slot in range(12)])
    askers = np.append(np.arange(12), np.full(18, -1))
    found = index.search(QUERIES, LAST_ITEMS, askers, np.full(30, 100), users)
    for row in range(30):
        wanted = brute_force(made, QUERIES[row], askers[row], 100, users)
        wanted = wanted[np.isfinite(wanted)]
        assert np.allclose(found.similarity[row, found.valid[row]], wanted, atol=1e-5)
    assert len(index) == (made.valid() & (made.fields["cell"] != NOT_SHARED)).sum()


def test_own_entries_and_ties_do_not_crowd_others_out():
    made = banks()
    made.key[:] = made.key[0, 0]  # everybody's entries are alike: ties everywhere
    made.fields["cell"][:] = cells(np.array([7]), np.array([3]))
    query, last = made.key[0, :1].astype(np.float32), np.array([[7, 3, 0, 0, 0]])
    found = index_of(made).search(query, last, np.array([3]), np.array([10]))
    others, everything = np.delete(np.arange(USERS), 3), made.all_entries()
    names = ("item", "rating", "recency", "quality")
    item, *worth = (getattr(everything, name)[others][made.valid(others)] for name in names)
    best = np.lexsort((item, *(-one.astype(np.float16) for one in worth)))[:10]
    assert (
        found.item[0].tolist() == item[best].tolist()
    )  # ties go by quality, recency, rating, then item: keys are alike


def test_a_change_is_seen_and_what_is_dropped_is_gone():
    made, newer = banks(), banks(seed=1)
    index = index_of(made)
    total = len(index)
    index.put(np.array([5]), newer.row(5))
    both = stack_banks([newer.row(user) if user == 5 else made.row(user) for user in range(USERS)])
    nobody, k = np.full(30, -1), np.full(30, 9)
    expected = [brute_force(both, query, -1, 9) for query in QUERIES]
    assert np.allclose(index.search(QUERIES, LAST_ITEMS, nobody, k).similarity, expected, atol=1e-5)
    index.drop(np.arange(USERS))
    assert len(index) == 0 < total
    assert not index.search(QUERIES, LAST_ITEMS, nobody, k).valid.any()


def test_nothing_changes_where_memory_is_given_back():
    made = banks()
    index, k = index_of(made), np.full(30, 9)
    before = index.search(QUERIES, LAST_ITEMS, np.arange(30), k)
    index.compact()
    index.put(np.array([USERS]), banks(seed=3, users=1))
    index.drop(np.array([USERS]))
    after = index.search(QUERIES, LAST_ITEMS, np.arange(30), k)
    assert np.array_equal(before.item, after.item)
    assert np.array_equal(before.similarity, after.similarity)


def test_entries_carry_the_features_of_the_bank():
    made = banks()
    found = index_of(made).search(QUERIES[:1], LAST_ITEMS[:1], np.array([-1]), np.array([5]))
    everything = made.all_entries()
    keys = kept(made) @ QUERIES[0]
    for place in range(5):
        user, slot = np.argwhere(np.isclose(keys, found.similarity[0, place], atol=1e-6) & made.valid())[0]
        for name in ("item", "quality", "recency", "rating"):
            assert getattr(found, name)[0, place] == pytest.approx(getattr(everything, name)[user, slot], abs=1e-3)


def test_an_empty_index_answers_with_nothing():
    found = CollectiveIndex(LAYOUT, RULES).search(QUERIES, LAST_ITEMS, np.arange(30), np.full(30, 4))
    assert not found.valid.any()


# ----------------------------------------------------------------------------------------------- lists


def one_entry(item: int, before: int, key: np.ndarray) -> Banks:
    made = Banks(1, DIM, RULES)
    made.write(
        np.array([0]),
        np.array([9]),
        key[None],
        np.array([0.0]),
        np.float32([np.nan]),
        cells(np.array([item]), np.array([before])),
    )
    return made


def found_from(index: CollectiveIndex, *last: int) -> int:
    """Entries found for a user who took these items last, the newest first."""
    asked = np.array([[*last, 0, 0, 0, 0, 0][:LAST]])
    return int(index.search(QUERIES[:1], asked, np.array([-1]), np.array([10])).valid.sum())


def test_an_entry_is_found_from_the_item_taken_before_it_and_from_those_that_lead_there():
    """With a budget of one entry: else a small index is looked at as a whole."""
    near, nearness = LAYOUT.near.copy(), LAYOUT.nearness.copy()
    near[5, 0], nearness[5, 0] = 7, 1.0
    layout = Layout(near, nearness, LAYOUT.span, LAYOUT.popularity)
    index = CollectiveIndex(layout, RULES.model_copy(update={"collective_codes": 1}))
    for slot, item in enumerate((7, 11)):
        index.put(np.array([slot]), one_entry(item, 0, QUERIES[slot]))
    assert (found_from(index, 7), found_from(index, 5), found_from(index, 3), found_from(index)) == (1, 1, 0, 0)
    assert found_from(index, 3, 11) == 1  # not the last one, but one of the last


def test_an_item_that_the_model_does_not_know_has_a_list_of_its_own():
    index = CollectiveIndex(LAYOUT, RULES.model_copy(update={"collective_codes": 1}))
    for slot, item in enumerate((7, 5 * ITEMS)):
        index.put(np.array([slot]), one_entry(item, 0, QUERIES[slot]))
    assert (found_from(index, 5 * ITEMS), found_from(index, 5 * ITEMS + 1)) == (1, 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_long_lists_branch_and_nothing_is_lost(monkeypatch, bits):
    """Thousands of entries after one item: what was taken before it leads to its branch, and everything is there."""
    monkeypatch.setattr(lists_module, "BRANCHED", 16)
    rng, count = np.random.default_rng(3), 3000
    keys, before = unit(rng.normal(size=(count, DIM))).astype(np.float32), rng.integers(1, 50, count)
    codec, cell = Codec(LAYOUT.span, bits), cells(np.full(count, 7), before)
    lists, rows = CellLists(codec, 4), np.arange(1, count + 1)
    cell_of = np.append(np.int32(0), cell)
    for some in np.array_split(np.arange(count), 7):
        lists.add(rows[some], cell[some], keys[some])
        lists.split(np.array([7]), cell_of)
    assert lists.size.sum() == len(lists) == lists.index.invlists.compute_ntotal() == count
    assert (lists.size > 0).sum() > 20
    asked = lists.of(np.array([7]), branches(np.array([31])))
    index = lists.index
    index.nprobe, index.max_codes = 1, 0
    _, found = index.search_preassigned(keys[:1], count, asked[:, None], np.zeros((1, 1), np.float32))
    assert set(rows[before == 31]) <= set(found[0].tolist())
    gone = rng.permutation(count)[:2000]
    lists.remove(rows[gone], cell[gone])
    left = np.setdiff1d(rows, rows[gone])
    every = np.arange(lists.used)[None]
    index.nprobe = lists.used
    similarity, found = index.search_preassigned(QUERIES[:1], count, every, np.zeros(every.shape, np.float32))
    assert sorted(found[0, :1000].tolist()) == left.tolist()
    assert (found[0, 1000:] < 0).all()
    assert np.allclose(similarity[0, :1000], codec.rounded(keys)[found[0, :1000] - 1] @ QUERIES[0], atol=1e-5)


def test_states_before_any_item_are_not_shared():
    assert cells(np.array([0, 3, 3]), np.array([0, 0, 2]))[0] == NOT_SHARED
    assert len(index_of(banks(events=1))) == 0


def test_the_cells_of_a_job_are_those_of_the_items_before_each_position():
    job = EncodeJob(10, np.array([21, 22, 23], np.uint32), np.array([-1, 10, 11, 12, 13]))
    wanted = cells(np.array([0, 0, 21, 22, 23]), np.array([0, 0, 0, 21, 22]))
    assert cells_of(job).tolist() == wanted.tolist()


# ----------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize(("bits", "most"), [(4, 0.02), (8, 0.005)])
def test_codes_keep_similarities_and_lengths(bits, most):
    """FAISS decodes what the codec says, and a key's similarity to itself stays 1."""
    rng, dim = np.random.default_rng(0), 128
    keys = unit(rng.normal(size=(500, dim))).astype(np.float32)
    codec = Codec(span_of(dim), bits)
    coded = codec.rounded(keys)
    assert np.abs((coded * keys).sum(axis=1) - 1.0).mean() < most / 2
    assert np.abs(keys @ coded.T - keys @ keys.T).mean() < most
    index = codec.index(1)
    assert index.code_size == dim * bits // 8
    assert np.allclose(index.sq.decode(index.sq.compute_codes(coded)), coded, atol=1e-5)


def test_an_entry_of_128_dimensions_takes_at_most_100_bytes_where_that_is_asked_for():
    layout = Layout(LAYOUT.near, LAYOUT.nearness, span_of(128), LAYOUT.popularity)
    assert CollectiveIndex(layout, RulesConfig(collective_bits=4)).entry_bytes <= 100


# ---------------------------------------------------------------------------------------------- sample


def sampled(order: np.ndarray, limit: int, whose: np.ndarray, batch: int) -> set[tuple[int, int]]:
    """(user, item) of what an index keeps of many users' banks, put in this order."""
    made, index = banks(seed=7, users=len(order)), CollectiveIndex(LAYOUT, RULES, limit)
    for at in range(0, len(order), batch):
        users = order[at : at + batch]
        slots = np.arange(at, at + len(users))
        index.know(slots, whose[users])
        index.put(slots, made.rows(users))
    assert len(index) <= limit
    item = index.rows.item
    return {
        (int(order[slot]), int(item[row]))
        for slot in range(len(order))
        for row in index.rows.of(np.array([slot])).tolist()
        if item[row]
    }


def test_indexes_of_one_limit_keep_the_same_sample_in_whatever_order_it_comes(monkeypatch):
    monkeypatch.setattr(index_module, "KEPT_OF_ITEM", 1)
    users = 400
    whose = np.random.default_rng(1).integers(0, 2**63, users).astype(np.uint64)
    first = sampled(np.arange(users), 1000, whose, 25)
    second = sampled(np.random.default_rng(2).permutation(users), 1000, whose, 40)
    assert first == second
    assert len(first) > 700


def test_a_sample_keeps_entries_of_rare_items():
    layout = Layout(
        LAYOUT.near, LAYOUT.nearness, LAYOUT.span, np.append([0, 0.999], np.full(38, 1e-5)).astype(np.float32)
    )
    made = banks(users=300)
    made.fields["item"][made.fields["item"] == 1] = 2
    made.fields["item"][:, 0] = 1
    index = CollectiveIndex(layout, RULES, 1500)
    index.put(np.arange(300), made)
    assert index.share < 1
    kept_of = np.bincount(index.rows.item, minlength=ITEMS)
    assert kept_of[1] < 300
    assert kept_of[2:].min() > 0
