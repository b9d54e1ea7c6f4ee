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
    DoesNotFitError,
    Load,
    Machine,
    banks_bytes,
    index_bytes,
    memory_s,
    others_s,
    own_scope_only,
    plan,
    record_bytes,
    replicas_needed,
    write_limit,
)
from benchmarks.scale.figures import RESULTS, figures, fitted, foretold, sizes
from benchmarks.scale.queueing import departures, exponential, latencies, lognormal
from benchmarks.scale.run import extrapolated

COSTS = Costs(
    redis_user=1000, redis_entry=180, resident_user=20_000, shared_entry=100, replica=1e8,
    own_s=1e-4, others_s=15e-5, tenfold_s=5e-5, write_s=2e-4, heard_s=6e-5, api_s=5e-4,
    redis_request_s=9e-6, redis_write_s=3e-5, redis_heard_s=1e-5, wire_memory=1200, wire_caller=900,
)  # fmt: skip
USERS, REQUESTS, WRITES = st.floats(1e3, 1e8), st.floats(1, 1e5), st.floats(0, 5e3)


def test_the_parts_add_up():
    load = Load(users=1e6, entries=20, requests=1000, writes=50, active=0.5, share=0.5)
    assert record_bytes(COSTS, 20) == 4600
    assert load.kept == 1e7
    assert index_bytes(COSTS, load) == pytest.approx(1e9)
    assert banks_bytes(COSTS, load) == pytest.approx(1e10)
    assert others_s(COSTS, 1e6) == pytest.approx(150e-6)
    assert memory_s(COSTS, load) == pytest.approx(300e-6)
    assert memory_s(own_scope_only(COSTS), load) == 1e-4
    assert len(fields(NOTHING)) == 16
    found = plan(COSTS, load, Machine())
    assert found.replicas == replicas_needed(COSTS, load, Machine()) == 1
    assert found.replica_bytes == pytest.approx(1.11e10)
    assert (found.memory_machines, found.redis_machines, found.api_machines) == (1, 1, 1)


@given(USERS, REQUESTS, WRITES)
def test_more_of_anything_never_costs_less(users, requests, writes):
    load, machine = Load(users, 20, requests, writes, active=0.2, share=0.01), Machine(ram=4096 * GIB)
    usual = plan(COSTS, load, machine)
    for more in (
        replace(load, users=2 * users), replace(load, entries=40), replace(load, share=0.02),
        replace(load, requests=2 * requests), replace(load, writes=writes + 500), replace(load, active=0.4),
    ):  # fmt: skip
        assert plan(COSTS, more, machine).machines >= usual.machines


@given(USERS, REQUESTS, WRITES)
def test_the_replicas_of_a_plan_suffice_and_one_less_would_not(users, requests, writes):
    machine, load = Machine(), Load(users, 20, requests, writes)
    count = replicas_needed(COSTS, load, machine)

    def fits(replicas: int) -> bool:
        asked = requests / replicas * memory_s(COSTS, load)
        written = writes / replicas * (COSTS.write_s + (replicas - 1) * COSTS.heard_s)
        return asked + written <= machine.busy * (1 + 1e-9)

    assert fits(count)
    assert count == 1 or not fits(count - 1)


@given(USERS, st.floats(1e3, 1e5), WRITES, st.floats(0.001, 0.1))
def test_what_a_plan_puts_on_a_machine_has_room_there(users, requests, writes, share):
    machine, load = Machine(), Load(users, 20, requests, writes, active=0.2, share=share)
    try:
        found = plan(COSTS, load, machine)
    except DoesNotFitError:
        assert COSTS.replica + index_bytes(COSTS, load) > machine.ram * machine.full
        return
    held = found.side_by_side * (COSTS.replica + index_bytes(COSTS, load))
    assert held + banks_bytes(COSTS, load) / found.memory_machines <= machine.ram * machine.full * (1 + 1e-9)
    assert found.memory_machines * found.side_by_side >= found.replicas


def test_requests_divide_by_replicas():
    load = Load(1e6, 20, 1e4)
    one, ten = (replicas_needed(COSTS, replace(load, requests=requests), Machine()) for requests in (1e5, 1e6))
    assert ten / one == pytest.approx(10, rel=0.02)


def test_hearing_of_writes_is_a_limit_that_replicas_do_not_move():
    machine, load = Machine(), Load(1e6, 20, 1000.0)
    limit = write_limit(COSTS, machine)
    assert limit == pytest.approx(10_000)
    assert replicas_needed(COSTS, replace(load, writes=0.99 * limit), machine) > 100
    with pytest.raises(DoesNotFitError, match="beyond the 10,000 that replicas can hear of"):
        replicas_needed(COSTS, replace(load, writes=limit), machine)
    assert replicas_needed(own_scope_only(COSTS), replace(load, writes=2 * limit), machine) < 10


def test_an_index_that_no_machine_holds_is_no_plan_and_a_sample_of_it_is():
    load = Load(1e8, 20, 1e5, 1000.0, active=0.2)
    with pytest.raises(DoesNotFitError, match=r"2,000,000,000 entries does not fit"):
        plan(COSTS, load, Machine())
    tenth, twentieth = (plan(COSTS, replace(load, share=share), Machine()) for share in (0.1, 0.05))
    assert twentieth.memory_machines < tenth.memory_machines
    assert twentieth.replica_bytes < tenth.replica_bytes
    rows = extrapolated(COSTS, Machine(), [(1e8, 1e5, (1.0, 0.1))], 0.01)
    assert ["trouble" in row for row in rows] == [True, False, False]


def test_a_dearer_or_smaller_machine_costs_more():
    load = Load(1e7, 20, 20_000.0, 500.0, active=0.2, share=0.5)
    usual = plan(COSTS, load, Machine())
    assert plan(COSTS, load, Machine(price=1.6)).price_hour == pytest.approx(2 * usual.price_hour)
    assert plan(COSTS, load, Machine(ram=32 * GIB)).machines > usual.machines
    assert plan(COSTS, load, Machine(cores=32, ram=256 * GIB)).machines < usual.machines


# ------------------------------------------------------------------------------------------- what was measured


@pytest.mark.skipif(not RESULTS.exists(), reason="not measured yet: make bench-scale")
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [(names.REDIS, 0.1), (names.HELD, 0.3), (names.BOTH, 0.35), (names.API, 0.35)],
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


def test_an_idle_cluster_answers_in_the_time_of_its_parts():
    rng = np.random.default_rng(0)
    seconds = latencies(1.0, 2, 8, exponential(5e-4), exponential(1e-3), 50_000, rng)
    assert seconds.mean() == pytest.approx(1.5e-3, rel=0.03)


def test_latency_grows_with_load_and_falls_with_replicas():
    def p99(requests: float, replicas: int) -> float:
        drawn = latencies(requests, 4, replicas, exponential(5e-4), exponential(1e-3), 60_000, np.random.default_rng(0))
        return float(np.percentile(drawn, 99))

    assert p99(300, 1) < p99(600, 1) < p99(900, 1)
    assert p99(900, 1) > p99(900, 2) > p99(900, 4)


def test_replicas_share_requests_as_if_each_had_its_part_of_them():
    """M/M/1 of half the arrivals each, with random assignment."""
    nothing = lambda rng, count: np.zeros(count)  # noqa: E731
    seconds = latencies(1200.0, 1, 2, nothing, exponential(1e-3), 400_000, np.random.default_rng(0))
    assert seconds.mean() == pytest.approx(1 / 400.0, rel=0.05)
