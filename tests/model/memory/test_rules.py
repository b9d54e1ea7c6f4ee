import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model.config import RulesConfig
from model.memory import rules as rule

RULES = RulesConfig()
NAN = float("nan")


def banks(max_size: int = 12) -> st.SearchStrategy:
    weights = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, max_size)), elements=st.floats(0, 1))
    return weights.flatmap(lambda w: st.tuples(st.just(w), hnp.arrays(np.int64, w.shape, elements=st.integers(-1, 7))))


@given(banks())
def test_entropy_lies_between_0_and_1_and_leaves_its_input_alone(bank):
    weights, cluster = bank
    before = weights.copy(), cluster.copy()
    found = rule.entropy(weights, cluster, 8)
    assert ((found >= 0) & (found <= 1)).all()
    assert np.array_equal(weights, before[0])
    assert np.array_equal(cluster, before[1])


def test_entropy_by_hand():
    cluster = np.array([[0, 0, 1, -1]])
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    assert rule.entropy(np.ones((1, 4)), cluster, 8)[0] == pytest.approx(expected, abs=1e-6)
    assert rule.entropy(np.array([[3.0, 1.0]]), np.array([[0, 1]]), 8)[0] == pytest.approx(0.8112781, abs=1e-6)


@pytest.mark.parametrize("cluster", [[-1, -1], [4, -1]])
def test_entropy_of_next_to_nothing_is_neutral(cluster):
    assert rule.entropy(np.ones((1, 2)), np.array([cluster]), 8)[0] == 0.5


def test_entropy_of_a_bank_without_quality_counts_entries():
    assert rule.entropy(np.zeros((1, 2)), np.array([[0, 1]]), 8)[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("diversity", "size", "k"),
    [(0.5, 0, 0), (0.5, 2, 2), (0.0, 75, 7), (1.0, 75, 20), (0.5, 75, 13), (1.0, 19, 10), (0.0, 4, 3)],
)
def test_own_k_by_hand(diversity, size, k):
    assert rule.own_k(np.array([diversity]), np.array([size]), RULES)[0] == k


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 100))
def test_k_rises_with_entropy_and_stays_in_its_bounds(a, b, size):
    low, high = rule.own_k(np.array([min(a, b), max(a, b)]), np.array([size, size]), RULES)
    assert low <= high <= min(RULES.k_max, size)
    assert low >= min(RULES.k_min, size)
    low, high = rule.collective_k(np.array([min(a, b), max(a, b)]), RULES)
    assert RULES.collective_k_min <= low <= high <= RULES.collective_k_max


def test_the_papers_k_grows_until_100_entries():
    paper = RulesConfig(k_rule="paper", k_base=10, capacity=200)
    found = rule.own_k(np.full(3, 0.5), np.array([25, 100, 200]), paper)
    assert found.tolist() == [5, 10, 10]


def test_window_start_by_hand():
    assert rule.window_start(np.array([0, 50, 51, 62, 63, 74]), 50, 12).tolist() == [0, 0, 12, 12, 24, 24]


@given(st.integers(0, 5000), st.integers(4, 100), st.integers(1, 100))
def test_a_window_is_never_longer_than_allowed_nor_shorter_than_needed(length, window, stride):
    stride = min(stride, window)
    start = int(rule.window_start(length, window, stride))
    assert length - start <= window
    assert start % stride == 0
    assert length <= window or length - start > window - stride


def test_recency_halves_with_every_half_life():
    time = np.array([[0.0, 86400.0, 3 * 86400.0, 99.0]])
    valid = np.array([[True, True, True, False]])
    found = rule.age_recency(time, valid, RulesConfig(half_life_s=86400.0))[0]
    assert found.tolist() == pytest.approx([0.125, 0.25, 1.0, 0.0])


def test_recency_by_position_counts_newer_entries():
    rules = RulesConfig(time_unit="position", half_life_entries=1.0)
    found = rule.age_recency(np.array([[7.0, 7.0, 3.0, 0.0]]), np.array([[True, True, True, False]]), rules)[0]
    assert found.tolist() == pytest.approx([0.5, 1.0, 0.25, 0.0])


def test_quality_by_hand():
    rules = RulesConfig(weight_frequency=1, weight_recency=1, weight_access=1, weight_rating=1)
    found = rule.quality(np.array([4]), np.array([0.5]), np.array([16]), np.array([4.0]), rules)
    assert found[0] == pytest.approx((0.5 + 0.5 + 1.0 + 0.75) / 4)
    assert rule.quality(np.array([1]), np.array([0.0]), np.array([0]), np.array([NAN]), rules)[0] == pytest.approx(
        0.125
    )


@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(0, 10**6), st.floats(-10, 10) | st.just(NAN))
def test_quality_lies_between_0_and_1(frequency, recency, access, rating):
    found = rule.quality(np.array([frequency]), np.array([recency]), np.array([access]), np.array([rating]), RULES)
    assert 0 <= found[0] <= 1


def test_ema_weight_by_hand():
    assert rule.ema_weight(np.array([1, 2, 1000])).tolist() == pytest.approx([0.7, 0.7 + 0.05 * math.log(2), 0.9])


@given(
    hnp.arrays(np.float64, (3, 4), elements=st.floats(-1, 1)),
    hnp.arrays(np.float64, (3, 4), elements=st.floats(-1, 1)),
    st.integers(1, 50),
)
def test_a_blended_key_lies_between_old_and_new(old, new, frequency):
    old, new = rule.unit(old + 0.01), rule.unit(new + 0.01)
    before = old.copy(), new.copy()
    mixed = rule.blend_keys(old, new, np.full(3, frequency))
    assert np.array_equal(old, before[0])
    assert np.array_equal(new, before[1])
    together = np.einsum("bd,bd->b", old, new)
    for end in (old, new):
        assert (np.einsum("bd,bd->b", mixed, end) >= together - 1e-5).all() or np.allclose(mixed, 0, atol=1e-3)


def test_the_weakest_go_and_the_one_just_written_stays():
    worth = np.array([[0.5, 0.1, 0.6, 0.55, 0.05]], np.float32)
    valid, protected = np.ones((1, 5), bool), np.array([[False, False, False, False, True]])
    assert rule.weak_entries(worth, valid, protected, RulesConfig(prune_std=10)).tolist() == [
        [False, True, False, False, False]
    ]
    assert rule.weak_entries(worth, valid, protected, RulesConfig(prune_std=0.0)).tolist() == [
        [False, True, False, False, False]
    ]
    nobody = np.zeros((1, 5), bool)
    assert rule.weak_entries(worth, valid, nobody, RulesConfig(prune_std=0.5)).sum() == 2


def test_of_equally_weak_entries_the_earliest_goes():
    worth, valid = np.full((1, 3), 0.5, np.float32), np.ones((1, 3), bool)
    assert rule.weak_entries(worth, valid, np.zeros((1, 3), bool), RULES).tolist() == [[True, False, False]]
