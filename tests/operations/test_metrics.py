"""The metrics of both services, compared with what was done, and how the memory service measures recall."""

import asyncio
import re

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from memory_service.protocol.structs import UserEvents
from memory_service.service import recall as probe
from model.checkpoint import load_checkpoint
from model.memory.collective.index import CollectiveIndex
from tests.memory_service.calling import Caller, opened, remember, took
from tests.memory_service.calling import service as in_process
from tests.model.memory.test_collective import LAST_ITEMS, LAYOUT, QUERIES, RULES, banks, brute_force, index_of


def figures(client: httpx2.Client | TestClient) -> dict[str, float]:
    """The value of each sample, by name and labels."""
    return {name: float(value) for name, value in re.findall(r"^([a-z]\S*) (\S+)$", client.get("/metrics").text, re.M)}


@pytest.fixture
def client(api_url):
    with httpx2.Client(base_url=api_url, timeout=30) as opened:
        yield opened


# ---------------------------------------------------------------------------------------------- recall


SLOTS = np.arange(30)


def test_searching_all_lists_is_full_recall_whatever_the_slices(go, monkeypatch):
    index = index_of(banks())
    assert go(probe.recall_of(index, QUERIES, LAST_ITEMS, SLOTS)) == 1.0
    monkeypatch.setattr(probe, "SLICE", 1)
    assert go(probe.recall_of(index, QUERIES, LAST_ITEMS, SLOTS)) == 1.0


def test_recall_is_the_share_of_what_brute_force_finds(go):
    made = banks()
    index = index_of(made, RULES.model_copy(update={"collective_codes": 200}))  # of about 600
    measured = go(probe.recall_of(index, QUERIES, LAST_ITEMS, SLOTS))
    found = index.search(QUERIES, LAST_ITEMS, SLOTS, np.full(30, probe.NEIGHBOURS))
    shares = []
    for row, (query, slot) in enumerate(zip(QUERIES, SLOTS, strict=True)):
        wanted = brute_force(made, query, slot, probe.NEIGHBOURS)
        shares.append((found.similarity[row][found.valid[row]] >= wanted[-1] - 1e-5).sum() / probe.NEIGHBOURS)
    assert measured == pytest.approx(np.mean(shares))
    assert 0.05 < measured < 0.9


def test_the_sample_consists_of_residents_their_last_items_and_their_slots(go, run, valkey_url):
    async def sampled():
        service = in_process(run, valkey_url)
        await service.start()
        try:
            for user, items in (("a", ["i3", "i1", "i2"]), ("b", ["i2", "i1"])):
                await remember(service, user, *(took(n, item) for n, item in enumerate(items)))
            space = service.serving
            queries, last, slots = space.sample(space.collective, 20, np.random.default_rng(1))
            number = {item: service.catalogue.number_of(item) for item in ("i1", "i2", "i3")}
            return queries, last.tolist(), slots.tolist(), number, space.collective.slots(["a", "b"]).tolist()
        finally:
            await service.close()

    queries, last, slots, number, own = go(sampled())
    assert np.allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-4)
    there = dict(zip(slots, last, strict=True))
    assert there[own[0]] == [number["i2"], number["i1"], number["i3"], 0, 0]
    assert there[own[1]] == [number["i1"], number["i2"], 0, 0, 0]


def test_other_tasks_run_between_the_slices(go, monkeypatch):
    monkeypatch.setattr(probe, "SLICE", 1)
    monkeypatch.setattr(probe, "CORE_SHARE", 1)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def both() -> int:
        task, index = asyncio.create_task(other()), index_of(banks())
        await probe.recall_of(index, QUERIES, LAST_ITEMS, SLOTS)
        task.cancel()
        return index.lists

    assert go(both()) <= turns


def test_without_other_users_nothing_is_measured(go):
    index = CollectiveIndex(LAYOUT, RULES)
    assert go(probe.recall_of(index, QUERIES, LAST_ITEMS, SLOTS)) is None
    index.put(np.arange(1), banks(users=1))
    assert go(probe.recall_of(index, QUERIES[:1], LAST_ITEMS[:1], np.zeros(1, np.int64))) is None


# -------------------------------------------------------------------------------------------- services


def test_the_memory_service_counts_banks_prunes_and_conflicts(run, valkey_url, stack):
    caller = Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)
    caller.remember("a", *(took(n, f"i{n + 1}") for n in range(8)))
    assert figures(caller.client)["ramrec_memory_entries_pruned_total"] == 0
    caller.remember("a", *(took(n, f"i{n + 1}") for n in range(8, 14)))  # 14 items, of which 10 fit
    caller.remember("b", took(20, "i1"), took(21, "i2"))
    caller.retrieve("a", "b", "nobody")
    seen = figures(caller.client)
    assert seen["ramrec_memory_entries_pruned_total"] == caller.inspect("a").pruned == 4
    assert seen["ramrec_memory_events_written_total"] == 16
    assert seen["ramrec_memory_bank_size_count"] == seen["ramrec_memory_collective_k_count"] == 3
    assert seen["ramrec_memory_bank_size_sum"] == 10 + 2
    assert [seen[f'ramrec_memory_bank_size_bucket{{le="{bound}"}}'] for bound in ("0.0", "2.0", "10.0")] == [1, 2, 3]
    assert seen["ramrec_memory_collective_users"] == 2
    assert seen["ramrec_memory_ready"] == seen["ramrec_memory_redis_up"] == 1
    assert seen["ramrec_memory_redis_ping_seconds"] > 0
    version = caller.model_version
    assert seen[f'ramrec_memory_model{{role="serving",version="{version}"}}'] == 1
    assert seen[f'ramrec_memory_model{{role="wanted",version="{version}"}}'] == 1
    assert seen["ramrec_memory_model_trouble"] == 0
    assert seen["process_resident_memory_bytes"] > 1e6


def test_a_write_conflict_is_counted(run, valkey_url, stack):
    caller = Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)
    caller.remember("a", took(0, "i1"))
    users = [UserEvents("a", [took(1, "i2")])]
    planned = caller.plan(*users).users
    caller.remember("a", took(2, "i3"))
    assert caller.write_planned(planned, users).users[0].retry is not None
    assert figures(caller.client)["ramrec_memory_write_conflicts_total"] == 1


def test_recall_is_measured_repeatedly(run, valkey_url, stack):
    caller = Caller(stack.enter_context(opened(run, valkey_url, recall_s=0.01)), load_checkpoint(run).version)
    before = figures(caller.client)
    assert np.isnan(before["ramrec_memory_collective_recall"])
    assert before["ramrec_memory_collective_recall_timestamp_seconds"] == 0
    for user in ("a", "b", "c"):
        caller.remember(user, *(took(n, f"i{n + 1}") for n in range(5)))
    while not (seen := figures(caller.client))["ramrec_memory_collective_recall_timestamp_seconds"]:
        pass
    assert seen["ramrec_memory_collective_recall"] == 1  # a model as small as this searches all lists


def test_the_api_times_routes_and_names_its_models(client, run):
    version = load_checkpoint(run).version
    client.post("/recommend", json={"top_n": 3})
    client.post("/recommend", json={"top_n": 0})
    seen = figures(client)
    assert seen['ramrec_api_request_seconds_count{route="/recommend"}'] == 2
    assert 0 < seen['ramrec_api_request_seconds_sum{route="/recommend"}'] < 60
    assert seen[f'ramrec_api_model{{role="serving",version="{version}"}}'] == 1
    assert seen["ramrec_api_model_trouble"] == 0
    assert seen["process_resident_memory_bytes"] > 1e6
