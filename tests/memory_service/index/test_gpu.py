"""Indexes searched on a copy answer as those that are not: on copies in memory, and on a GPU where there is one."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_service.http.app import create_app
from memory_service.index.gpu import GpuError, GpuOwnIndex, gpu_copier
from memory_service.index.own import OwnIndex
from memory_service.settings import MemorySettings
from model.memory.rules import unit
from tests.model.memory.test_collective import DIM
from tests.synthetic import random_banks, small_config

SLOTS, CAPACITY = 40, 12
RULES = small_config().rules.model_copy(update={"capacity": CAPACITY})
HAS_GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
DEVICES = [
    pytest.param(lambda: faiss.clone_index, id="memory"),
    pytest.param(gpu_copier, id="cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no GPU")),
]


def banks_of(users: int, seed: int):
    return random_banks(users, 9, DIM, RULES, seed=seed)


STEPS = st.lists(st.tuples(st.sampled_from(["put", "put", "drop"]), st.integers(0, SLOTS - 1)), min_size=1, max_size=12)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25, deadline=None)
@given(steps=STEPS)
def test_the_own_scope_answers_alike_whatever_changed_since_the_copy(device, steps):
    plain = OwnIndex(DIM, SLOTS, CAPACITY)
    copied = GpuOwnIndex(DIM, SLOTS, CAPACITY, device())
    queries, everybody = unit(np.random.default_rng(1).normal(size=(SLOTS, DIM))), np.arange(SLOTS)
    for seed, (what, slot) in enumerate(steps):
        bank = banks_of(1, seed)
        for index in (plain, copied):
            if what == "put":
                index.put(np.array([slot]), bank.key, bank.size)
            else:
                index.drop(np.array([slot]))
        wanted, found = plain.search(everybody, queries, 5), copied.search(everybody, queries, 5)
        assert np.array_equal(wanted[1], found[1])
        assert np.allclose(wanted[0][wanted[1] >= 0], found[0][found[1] >= 0], atol=1e-5)
        assert np.array_equal(np.isneginf(plain.similarities(everybody, queries)), np.isneginf(
            copied.similarities(everybody, queries)))  # fmt: skip


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_asking_for_one_is_a_clear_error(run):
    with pytest.raises(GpuError, match=r"built for the CPU|no GPU is visible"):
        create_app(MemorySettings(run=run, redis_url="redis://nowhere", device="cuda"))
