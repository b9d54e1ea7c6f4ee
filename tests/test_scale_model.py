"""The capacity model and the simulation of `benchmarks/scale`: units, monotonicity, theory, and what was measured."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale import measure as names
from benchmarks.scale.capacity import (
    GIB,
    NOTHING,
    Costs,
    Load,
    Machine,
    api_s,
    best_lists,
    fan_out_limit,
    fan_out_s,
    memory_bytes,
    memory_s,
    plan,
    redis_bytes,
    replicas_needed,
    scan_s,
    wire_bytes,
)
from benchmarks.scale.figures import RESULTS, figures, fitted, foretold, sizes
from benchmarks.scale.queueing import departures, exponential, latencies, lognormal

COSTS = Costs(
    redis_user=1000, redis_entry=180, resident_user=20_000, shared_entry=200, replica=1e8,
    own_s=1e-4, call_s=6e-5, list_s=1.6e-8, entry_s=1.2e-8, api_s=5e-4, merge_s=1e-4,
    wire_own=1200, wire_part=700, wire_caller=900,
)  # fmt: skip
USERS, REQUESTS = st.floats(1e3, 1e9), st.floats(1, 1e5)


def test_the_parts_add_up():
    load = Load(users=1e6, entries=20, requests=1000, active=0.5, lists=6000, probes=16)
    assert redis_bytes(COSTS, 1e6, 20) == pytest.approx(4.6e9)
    assert memory_bytes(COSTS, load, replicas=3) == pytest.approx(3e8 + 1e10 + 4e9)
    assert fan_out_s(COSTS, load) == pytest.approx(60e-6 + 96e-6)
    assert scan_s(COSTS, load) == pytest.approx(1.2e-8 * 2e7 * 16 / 6000)
    assert memory_s(COSTS, load, 4) == pytest.approx(1e-4 + 4 * 156e-6 + scan_s(COSTS, load))
    assert (api_s(COSTS, 1), api_s(COSTS, 3)) == (5e-4, pytest.approx(7e-4))
    assert (wire_bytes(COSTS, 1), wire_bytes(COSTS, 3)) == (1200, 2600)
    assert len(fields(NOTHING)) == 14


@given(USERS, REQUESTS, st.integers(1, 500))
def test_more_of_anything_never_costs_less(users, requests, replicas):
    load = Load(users, 20, requests, lists=20_000)
    for more in (replace(load, users=2 * users), replace(load, entries=40)):
        assert memory_bytes(COSTS, more) > memory_bytes(COSTS, load)
        assert memory_s(COSTS, more, replicas) > memory_s(COSTS, load, replicas)
    assert memory_s(COSTS, load, replicas + 1) > memory_s(COSTS, load, replicas)
    assert scan_s(COSTS, load, replicas + 1) < scan_s(COSTS, load, replicas)


@given(USERS, st.floats(1, 2000))
def test_the_replicas_of_a_plan_suffice_and_one_less_would_not(users, requests):
    machine, load = Machine(), Load(users, 20, requests)
    count, binds = replicas_needed(COSTS, load, machine, 8)

    def fits(replicas: int) -> bool:
        room = machine.ram * machine.full / 8
        busy = requests * (COSTS.own_s / replicas + fan_out_s(COSTS, load) + scan_s(COSTS, load, replicas))
        return memory_bytes(COSTS, load, replicas) / replicas <= room * (1 + 1e-9) and busy <= 0.6 * (1 + 1e-9)

    assert fits(count)
    assert count == 1 or not fits(count - 1)
    assert binds in ("ram", "cpu")


def test_fan_out_is_a_limit_that_replicas_do_not_move():
    machine = Machine()
    load = Load(1e6, 20, 0.0)
    limit = fan_out_limit(COSTS, load, machine)
    assert limit == pytest.approx(0.6 / 156e-6)
    assert replicas_needed(COSTS, replace(load, requests=0.99 * limit), machine, 16)[0] > 100
    with pytest.raises(ValueError, match="beyond the fan-out limit"):
        replicas_needed(COSTS, replace(load, requests=limit), machine, 16)
    assert plan(COSTS, replace(load, requests=0.2 * limit), machine).copies == 1
    assert plan(COSTS, replace(load, requests=3 * limit), machine).copies > 3


def test_as_many_lists_as_suit_do_least():
    load = Load(1e7, 20, 1.0)
    best = best_lists(COSTS, load, 8)
    work = {lists: memory_s(COSTS, replace(load, lists=lists), 8) for lists in (best // 2, best, best * 2)}
    assert min(work, key=work.get) == best


def test_a_dearer_or_smaller_machine_costs_more():
    load = Load(1e7, 20, 5000.0, active=0.2)
    usual = plan(COSTS, load, Machine())
    assert plan(COSTS, load, Machine(price=1.6)).price_hour == pytest.approx(2 * usual.price_hour)
    assert plan(COSTS, load, Machine(ram=32 * GIB)).machines > usual.machines
    assert plan(COSTS, load, Machine(cores=32)).machines < usual.machines


# ------------------------------------------------------------------------------------------- what was measured


@pytest.mark.skipif(not RESULTS.exists(), reason="not measured yet: make bench-scale")
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [(names.REDIS, 0.1), (names.HELD, 0.3), (names.PART, 0.3), (names.BOTH, 0.35), (names.API, 0.35)],
)
def test_the_model_agrees_with_what_was_measured(name, tolerance):
    found = figures()
    costs = fitted(found)
    assert min(getattr(costs, column.name) for column in fields(costs)) >= 0
    assert len(sizes(found)) >= 3
    for size in sizes(found):
        assert foretold(costs, size)[name] == pytest.approx(found[size.name, name], rel=tolerance), size.name


# ---------------------------------------------------------------------------------------------- simulation


def test_one_server_waits_as_theory_says():
    """M/M/1: 1 / (µ − λ) on average, exponential."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1 / 600.0, 400_000))
    seconds = departures(arrivals, exponential(1e-3)(rng, 400_000)) - arrivals
    assert seconds.mean() == pytest.approx(1 / 400.0, rel=0.05)
    assert np.percentile(seconds, 99) == pytest.approx(np.log(100) / 400.0, rel=0.1)


def test_times_of_service_have_the_mean_and_variation_asked_for():
    drawn = lognormal(2e-3, 0.5)(np.random.default_rng(0), 200_000)
    assert drawn.mean() == pytest.approx(2e-3, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(0.5, rel=0.03)


def test_an_idle_cluster_answers_in_the_time_of_its_slowest_part():
    """The greatest of n exponential times is n-th harmonic number times the mean."""
    rng = np.random.default_rng(0)
    seconds = latencies(1.0, 1, 8, lambda rng, count: np.zeros(count), exponential(1e-3), 50_000, rng)
    assert seconds.mean() == pytest.approx(1e-3 * sum(1 / n for n in range(1, 9)), rel=0.03)


def test_latency_grows_with_load_and_with_replicas_that_all_must_answer():
    def p99(requests: float, replicas: int) -> float:
        drawn = latencies(requests, 4, replicas, exponential(5e-4), exponential(1e-3), 60_000, np.random.default_rng(0))
        return float(np.percentile(drawn, 99))

    assert p99(300, 4) < p99(600, 4) < p99(900, 4)
    assert p99(600, 1) < p99(600, 4) < p99(600, 16)
