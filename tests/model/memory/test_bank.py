"""Banks: retrieval is exact, eviction forgets what it should, and users do not affect each other."""

import numpy as np
import pytest

from model.config import RulesConfig
from model.memory.bank import NOT_SHARED, Banks
from model.memory.habits import activation
from model.memory.retrieval import select
from model.memory.rules import unit
from tests.synthetic import random_banks

RULES = RulesConfig(capacity=5, k_max=5, k_base=5, clusters=4, similarity_threshold=-1.0)
DIM = 4
CLUSTERS = np.append(-1, np.arange(40) % 4)
NAN = float("nan")


def key(n: int) -> np.ndarray:
    return unit(np.random.default_rng(n).normal(size=DIM))


def test_selection_prefers_similar_then_newer_then_later():
    similarity = np.array([[0.5, 0.9, 0.5, 0.2, 0.5]])
    time = np.array([[1.0, 0.0, 3.0, 9.0, 3.0]])
    slots, chosen = select(similarity, np.ones((1, 5), bool), time, np.array([4]), threshold=0.3)
    assert slots[0, chosen[0]].tolist() == [1, 4, 2, 0]
    slots, chosen = select(similarity, np.ones((1, 5), bool), time, np.array([5]), threshold=0.3)
    assert chosen[0].tolist() == [True] * 4 + [False]
    nudged = similarity + np.array([[2e-8, 0, 0, 0, 0]])
    assert select(nudged, np.ones((1, 5), bool), time, np.array([2]), 0.3)[0].tolist() == [[1, 4]]


def test_retrieval_of_a_batch_equals_each_user_alone():
    banks = random_banks(6, 12, DIM, RULES)
    query = unit(np.random.default_rng(5).normal(size=(6, DIM)))
    together = banks.retrieve(np.arange(6), query, CLUSTERS)
    for user in range(6):
        alone = banks.retrieve(np.array([user]), query[user : user + 1], CLUSTERS)
        assert alone.k[0] == together.k[user]
        width = alone.own.item.shape[1]
        assert alone.own.item[0].tolist() == together.own.item[user, :width].tolist()
        assert np.allclose(alone.own.quality[0], together.own.quality[user, :width])


def test_retrieval_by_activation_is_exact():
    """The learned sum decides, with the similarity in it; without the time of the request the similarity alone."""
    rules = RULES.model_copy(update={"activation": {"log_count": 1.0, "log_hours_since": -2.0, "similarity": 0.5}})
    banks = random_banks(3, 14, DIM, rules, items=6)
    query, rows = unit(np.random.default_rng(6).normal(size=(3, DIM))), np.arange(3)
    now = np.array([13 * 3600.0, 1e6, 1e7])
    found = banks.retrieve(rows, query, CLUSTERS, k=3, now=now)
    similarity = np.einsum("bcd,bd->bc", banks.key.astype(np.float32), query)
    wanted = activation(banks.habits(rows, now), similarity, rules)
    for user in range(3):
        best = np.argsort(-wanted[user, : banks.size[user]], kind="stable")[:3]
        assert found.own.item[user].tolist() == banks.fields["item"][user, best].tolist()
        assert np.array_equal(found.habits[user], banks.habits(rows, now)[user, best])
        at_once = banks.fields["item"][user, : banks.size[user]][
            banks.fields["time"][user, : banks.size[user]] == now[user]
        ]
        assert found.present[user][found.present[user] > 0].tolist() == at_once.tolist()
    plain = banks.retrieve(rows, query, CLUSTERS, k=3)
    assert (plain.habits.shape, plain.present.shape) == ((3, 3, 0), (3, 0))
    assert (np.diff(plain.own.similarity, axis=1) <= 1e-6).all()


def test_retrieval_is_exact():
    banks = random_banks(3, 9, DIM, RULES)
    query = unit(np.random.default_rng(6).normal(size=(3, DIM)))
    found = banks.retrieve(np.arange(3), query, CLUSTERS, k=3)
    for user in range(3):
        size = banks.size[user]
        exact = banks.key[user, :size].astype(np.float32) @ query[user]
        best = np.argsort(-exact)[: min(3, size)]
        assert found.own.item[user][found.own.valid[user]].tolist() == banks.fields["item"][user, best].tolist()
        assert np.allclose(found.own.similarity[user][found.own.valid[user]], exact[best], atol=1e-5)


def test_a_smaller_capacity_keeps_the_best():
    banks = random_banks(2, 12, DIM, RULES)
    small = banks.fitted(RULES.model_copy(update={"capacity": 2}))
    for user in range(2):
        size = banks.size[user]
        best = np.sort(np.argsort(-banks.quality()[user, :size], kind="stable")[:2])
        assert small.fields["item"][user, : small.size[user]].tolist() == banks.fields["item"][user, best].tolist()


def test_banks_of_many_users_do_not_touch_each_other():
    banks = Banks(3, DIM, RULES)
    banks.write(np.array([1]), np.array([4]), key(1)[None], np.array([1.0]), np.array([NAN]))
    assert banks.size.tolist() == [0, 1, 0]


@pytest.mark.parametrize("eviction", ["quality", "first-in", "random"])
def test_each_eviction_rule_forgets_the_right_entry(eviction):
    rules = RULES.model_copy(update={"eviction": eviction})
    banks, again = Banks(1, DIM, rules), Banks(1, DIM, rules)
    for both in (banks, again):
        for step, (item, rating) in enumerate([(1, 5.0), (2, 1.0), (3, 5.0), (4, 5.0), (5, 5.0), (6, 5.0)]):
            both.write(np.array([0]), np.array([item]), key(step)[None], np.array([step * 60.0]), np.array([rating]))
    left = banks.fields["item"][0, : banks.size[0]].tolist()
    assert len(left) == 5
    assert 6 in left  # what was just written stays
    assert left == again.fields["item"][0, : again.size[0]].tolist()
    if eviction == "quality":
        assert 2 not in left  # one star
    if eviction == "first-in":
        assert left == [2, 3, 4, 5, 6]


def test_the_newest_key_replaces_the_old_one_if_the_rules_say_so():
    for update in ("ema", "latest"):
        banks = Banks(1, DIM, RULES.model_copy(update={"key_update": update}))
        for step in (0, 1):
            banks.write(np.array([0]), np.array([7]), key(step)[None], np.array([float(step)]), np.array([NAN]))
        same = np.allclose(banks.key[0, 0].astype(float), key(1), atol=1e-3)
        assert same == (update == "latest")


def test_a_blended_entry_keeps_its_list_and_an_unlisted_one_gets_one():
    banks = Banks(1, DIM, RULES)
    for step, cell in enumerate([NOT_SHARED, 3, 5]):
        banks.write(
            np.array([0]), np.array([7]), key(step)[None], np.array([float(step)]), np.array([NAN]), np.array([cell])
        )
        assert banks.fields["cell"][0, 0] == [NOT_SHARED, 3, 3][step]
