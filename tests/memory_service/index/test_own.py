"""The index of own memories: exact, one list per user."""

import numpy as np

from memory_service.index.own import OwnIndex

DIM = 16


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
