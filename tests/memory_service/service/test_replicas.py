"""Two memory services over one Valkey behave like one memory: a plain model of it says what each answer must be."""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import redis
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from memory_service.protocol.structs import (
    EventIn,
    PlanRequest,
    RetrieveReply,
    RetrieveRequest,
    UserEvents,
    UserMemory,
    UserPlan,
    UserWrite,
    UserWritten,
    WriteRequest,
)
from memory_service.service.service import MemoryService
from memory_service.store.store import Store
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import RulesConfig
from tests.synthetic import random_checkpoint, small_config

DIM = 16
CAPACITY = 4
USERS = ("ann", "ben", "cid", "dan")
RESIDENT = (100, 2)
"""Banks that may stay in memory: the first replica keeps all, the second has to make room all the time."""
TRIES = 3
RULES = RulesConfig(
    capacity=CAPACITY,
    clusters=4,
    time_unit="position",
    weight_access=0.0,  # whose retrievals were counted where does not decide what is pruned
    prune_std=1.0,
    similarity_threshold=-1.0,
    collective_k_min=50,
    collective_k_max=50,
)
ITEMS = {user: [f"i{5 * n + m}" for m in range(1, 6)] + [f"new-of-{user}"] for n, user in enumerate(USERS)}
"""Every user takes items of their own only: five that the model knows and one that it does not."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("small-banks")
    save_checkpoint(folder, random_checkpoint(small_config().model_copy(update={"rules": RULES})))
    return load_checkpoint(folder, with_weights=False)


# ------------------------------------------------------------------------------------ keys and states


def drawn(*seed: object) -> np.ndarray:
    """A vector of unit length that follows from the seed alone."""
    rng = np.random.default_rng(list(repr(seed).encode()))
    vector = rng.normal(size=DIM)
    return (vector / np.linalg.norm(vector)).astype("<f4")


def key_of(user: str, item: str, position: int) -> np.ndarray:
    return drawn("key", user, item, position)


def state_of(user: str, sequence: Sequence[str]) -> np.ndarray:
    return drawn("state", user, *sequence)


# --------------------------------------------------------------------------------------------- model


@dataclass
class Entry:
    """One memory."""

    item: str
    key: np.ndarray
    time: float
    rating: float | None
    shared: bool
    frequency: int = 1
    retrieved: int = 0

    def again(self, event: EventIn, when: float, key: np.ndarray, shared: bool) -> None:
        self.frequency += 1
        keep = min(0.9, 0.7 + 0.05 * math.log(self.frequency))
        blended = keep * self.key.astype("<f4") + (1 - keep) * key
        self.key = (blended / np.linalg.norm(blended)).astype("<f2")
        if event.rating is not None and (when >= self.time or self.rating is None):
            self.rating = event.rating
        self.time = max(self.time, when)
        self.shared |= shared


@dataclass(frozen=True)
class Wanted:
    """What a batch of events must be sorted into, and the log with those that are new."""

    accepted: list[tuple[EventIn, float]]
    duplicates: list[int]
    forgotten: list[int]
    log: list[tuple[str, float]]
    positions: list[int]


@dataclass
class Person:
    """All that is remembered about one user."""

    version: int = 0
    last_version: int = 0
    forgotten_until: float = -math.inf
    log: list[tuple[str, float]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    bank: list[Entry] = field(default_factory=list)
    pruned: int = 0

    def sort_out(self, events: Sequence[EventIn], received_at: float) -> Wanted:
        timed = [(event, received_at if event.timestamp is None else event.timestamp) for event in events]
        known = set(self.log) | {(entry.item, entry.time) for entry in self.bank}
        ids, log = set(self.ids), list(self.log)
        accepted, duplicates, forgotten = [], [], []
        for event, when in sorted(timed, key=lambda one: (one[1], one[0].index)):
            exact = event.timestamp is not None and (event.item_id, when) in known
            if when <= self.forgotten_until:
                forgotten.append(event.index)
            elif exact or event.event_id in ids:
                duplicates.append(event.index)
            else:
                accepted.append((event, when))
                known.add((event.item_id, when))
                ids |= {event.event_id} - {None}
                log.insert(bisect_right(log, when, key=lambda one: one[1]), (event.item_id, when))
        positions = _positions(log, accepted)
        return Wanted(accepted, sorted(duplicates), sorted(forgotten), log, positions)

    def take(self, user: str, wanted: Wanted) -> None:
        if not wanted.accepted:
            return
        self.version = self.last_version = self.last_version + 1
        self.log = wanted.log
        for (event, when), position in zip(wanted.accepted, wanted.positions, strict=True):
            self.ids |= {event.event_id} - {None}
            self.seen += [event.item_id] if event.item_id not in self.seen else []
            self._remember(event, when, key_of(user, event.item_id, position), position > 0)

    def forgotten(self, when: float) -> Person:
        """What is left: nobody, whose next version follows the last one and whose earlier events are refused."""
        return Person(last_version=self.last_version, forgotten_until=when)

    def _remember(self, event: EventIn, when: float, key: np.ndarray, shared: bool) -> None:
        for entry in self.bank:
            if entry.item == event.item_id:
                entry.again(event, when, key, shared)
                return
        self.bank.append(Entry(event.item_id, key.astype("<f2"), when, event.rating, shared))
        if len(self.bank) > CAPACITY:
            self._prune()

    def _prune(self) -> None:
        worth = self._worth()
        mean = sum(worth) / len(worth)
        floor = mean - RULES.prune_std * math.sqrt(sum((one - mean) ** 2 for one in worth) / len(worth))
        lowest = min(worth[:-1])  # the last one is the one just written
        kept = [
            entry for entry, one in zip(self.bank[:-1], worth[:-1], strict=True) if one >= floor and one > lowest
        ] + self.bank[-1:]
        self.pruned += len(self.bank) - len(kept)
        self.bank = kept

    def _worth(self) -> list[float]:
        oldest_first = sorted(range(len(self.bank)), key=lambda slot: self.bank[slot].time)
        age = {slot: len(self.bank) - 1 - rank for rank, slot in enumerate(oldest_first)}
        total = RULES.weight_frequency + RULES.weight_recency + RULES.weight_rating
        return [
            (
                RULES.weight_frequency * min(1.0, math.log(entry.frequency) / math.log(16))
                + RULES.weight_recency * 2 ** (-age[slot] / RULES.half_life_entries)
                + RULES.weight_rating * (0.5 if entry.rating is None else (entry.rating - 1) / 4)
            )
            / total
            for slot, entry in enumerate(self.bank)
        ]


def _positions(log: list[tuple[str, float]], accepted: list[tuple[EventIn, float]]) -> list[int]:
    """Where each accepted event stands in the log: of equal ones, the first stands first."""
    taken: set[int] = set()
    for event, when in reversed(accepted):
        last = max(n for n, one in enumerate(log) if one == (event.item_id, when) and n not in taken)
        taken.add(last)
    return sorted(taken)


# ------------------------------------------------------------------------------------------ calls


class Replica:
    """One memory service, called as the api calls it."""

    def __init__(self, url: str, checkpoint: Checkpoint, resident_users: int = 100) -> None:
        store = Store(url, checkpoint.config.rules, 10)
        self.service = MemoryService(store, checkpoint, resident_users, url=f"replica {id(self)}", patience_s=3600)

    async def started(self) -> Replica:
        await self.service.start()
        return self

    async def close(self) -> None:
        await self.service.close()

    async def plan(self, user: str, events: list[EventIn], received_at: float) -> UserPlan:
        asked = PlanRequest(self.service.model_version, received_at, [UserEvents(user, events)])
        return (await self.service.plan(asked)).users[0]

    async def write(self, plan: UserPlan, events: list[EventIn], received_at: float) -> UserWritten:
        """Write what was planned, with the keys that the plan asks for."""
        names = await self.names()
        items = [names[number] for number in plan.job.unpack().items.tolist()]
        item_of = {event.index: event.item_id for event in events}
        positions = plan.job.unpack().positions.tolist()
        keys = [key_of(plan.user_id, item_of[n], at) for n, at in zip(plan.accepted, positions, strict=True)]
        state = state_of(plan.user_id, items).tobytes()
        write = UserWrite(plan.user_id, plan.version, events, b"".join(key.tobytes() for key in keys), state)
        asked = WriteRequest(self.service.model_version, received_at, [write])
        return (await self.service.write(asked)).users[0]

    async def ingest(self, user: str, events: list[EventIn], received_at: float, tries: int = TRIES) -> UserWritten:
        """Plan and write; where another was faster, write by the plan that came back."""
        plan = await self.plan(user, events, received_at)
        for _ in range(tries):
            written = await self.write(plan, events, received_at)
            if written.retry is None:
                return written
            plan = written.retry
        raise AssertionError(f"lost {tries} times in a row")

    async def retrieve(self, users: Sequence[str], counted: bool = False, **more: bytes) -> RetrieveReply:
        everything = np.full(len(users), CAPACITY, "<i4").tobytes()
        uncounted = [] if counted else list(range(len(users)))
        asked = RetrieveRequest(self.service.model_version, list(users), k=everything, uncounted=uncounted, **more)
        return await self.service.retrieve(asked)

    async def others(self, user: str) -> list[str]:
        """Items that a user (""; nobody) is told of others."""
        query = drawn("query").tobytes()
        found = (await self.retrieve([user], query_rows=b"\0\0\0\0", queries=query)).collective.unpack()
        names = await self.names()
        return sorted(names[number] for number in found.item[0, found.valid[0]].tolist())

    async def forget(self, user: str) -> bool:
        return (await self.service.forget(user)).existed

    async def inspect(self, user: str) -> UserMemory | None:
        return await self.service.inspect(user)

    async def names(self) -> list[str]:
        """Item ids by number; nothing has number 0."""
        listing = await self.service.catalogue.listing(1)
        return ["", *(item.item_id for item in listing.items)]


@pytest.fixture
def pair(valkey_url, checkpoint, go) -> Iterator[tuple[Replica, Replica]]:
    both = [go(Replica(valkey_url, checkpoint, limit).started()) for limit in RESIDENT]
    yield both[0], both[1]
    for one in both:
        go(one.close())


def column(data: bytes, kind: str) -> list:
    return np.frombuffer(data, kind).tolist()


def split(data: bytes, counts: list[int]) -> list[list[int]]:
    bounds = np.cumsum([0, *counts]).tolist()
    values = column(data, "<u4")
    return [values[start:stop] for start, stop in pairwise(bounds)]


# --------------------------------------------------------------------------------------- state machine

WHO = st.sampled_from(USERS)
WHICH = st.sampled_from([0, 1])
BATCH = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from(["new", "new", "new", "late", "same time", "untimed"]),
        st.integers(0, 9),
        st.sampled_from([None, 1.0, 3.0, 5.0]),
        st.sampled_from([None, None, None, "a", "b", "c"]),
    ),
    min_size=1,
    max_size=3,
)


@dataclass(frozen=True)
class Request:
    """One user's events as they were sent."""

    user: str
    events: list[EventIn]
    received_at: float


class Replicas(RuleBasedStateMachine):
    """Writes, retrievals, forgets and restarts through either replica, in any order."""

    url: str
    checkpoint: Checkpoint

    def __init__(self) -> None:
        super().__init__()
        with redis.Redis.from_url(self.url) as raw:
            raw.flushall()
        self.runner = asyncio.Runner()
        self.run = self.runner.run
        self.replica = [self.run(Replica(self.url, self.checkpoint, limit).started()) for limit in RESIDENT]
        self.observer = self.run(Replica(self.url, self.checkpoint).started())
        self.people = {user: Person() for user in USERS}
        self.history: list[Request] = []
        self.pending: list[tuple[Request, UserPlan]] = []
        self.clock = 0.0

    def teardown(self) -> None:
        for one in (*self.replica, self.observer):
            self.run(one.close())
        self.runner.close()

    # ------------------------------------------------------------------------------------- rules: writes

    @rule(user=WHO, batch=BATCH, planner=WHICH, writer=WHICH)
    def events_are_written(self, user, batch, planner, writer):
        self.ingest(self.request(user, batch), planner, writer)

    @rule(user=WHO, batch=BATCH, planner=WHICH)
    def events_are_planned_to_be_written_later(self, user, batch, planner):
        request = self.request(user, batch)
        self.pending.append((request, self.planned(request, planner)))

    @precondition(lambda self: self.pending)
    @rule(which=st.integers(0, 99), writer=WHICH)
    def what_was_planned_is_written(self, which, writer):
        request, plan = self.pending.pop(which % len(self.pending))
        self.write_planned(request, plan, writer)

    @rule(user=WHO, slow=BATCH, fast=BATCH, planner=WHICH, rival=WHICH, writer=WHICH)
    def a_rival_writes_between_plan_and_write(self, user, slow, fast, planner, rival, writer):
        request = self.request(user, slow)
        plan = self.planned(request, planner)
        self.ingest(self.request(user, fast), rival, rival)
        self.write_planned(request, plan, writer)

    @rule(user=WHO, batch=BATCH, planner=WHICH, which=WHICH, writer=WHICH)
    def a_forget_comes_between_plan_and_write(self, user, batch, planner, which, writer):
        request = self.request(user, batch)
        plan = self.planned(request, planner)
        self.forget(which, user)
        self.write_planned(request, plan, writer)

    @precondition(lambda self: self.history)
    @rule(which=st.integers(0, 99), planner=WHICH, writer=WHICH)
    def an_old_request_is_repeated(self, which, planner, writer):
        request = self.history[which % len(self.history)]
        before = self.people[request.user].version
        written = self.ingest(request, planner, writer)
        assert written.accepted == []
        assert sorted(written.duplicates + written.forgotten) == sorted(event.index for event in request.events)
        assert self.people[request.user].version == before

    @rule(user=WHO, batch=BATCH, rival=BATCH)
    def both_replicas_write_at_the_same_time(self, user, batch, rival):
        requests = [self.request(user, batch), self.request(user, rival)]
        calls = [one.ingest(*self.sent(request)) for one, request in zip(self.replica, requests, strict=True)]

        async def together():
            return await asyncio.gather(*calls)

        outcomes = list(zip(self.run(together()), requests, strict=True))
        for written, request in sorted(outcomes, key=lambda one: (one[0].version, not one[0].accepted)):
            self.took(request, written)

    # ------------------------------------------------------------------------------------ rules: the rest

    @rule(users=st.lists(WHO, min_size=1, max_size=4), which=WHICH, counted=st.booleans())
    def memories_are_retrieved(self, users, which, counted):
        reply = self.run(self.replica[which].retrieve(users, counted))
        self.check_reply(reply, users)
        for user in users if counted else ():
            for entry in self.people[user].bank:
                entry.retrieved += 1

    @rule(users=st.permutations(USERS))
    def both_replicas_answer_alike(self, users):
        one, other = (self.run(replica.retrieve(users)) for replica in self.replica)
        for name in ("versions", "known", "entropy", "k", "bank_size", "states", "seen_count", "seen"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.own.count == other.own.count
        assert one.own.item == other.own.item
        alike = column(one.own.similarity, "<f4"), column(other.own.similarity, "<f4")
        assert np.allclose(*alike, atol=1e-5)
        self.check_reply(one, users)

    @rule(which=WHICH, asker=st.sampled_from(["", "stranger", *USERS]))
    def others_memories_are_exactly_theirs_once_they_were_asked_about(self, which, asker):
        self.check_reply(self.run(self.replica[which].retrieve(USERS)), USERS)
        assert self.run(self.replica[which].others(asker)) == self.shared(asker)

    @rule(which=WHICH, user=WHO)
    def nobody_is_told_of_their_own(self, which, user):
        assert not set(self.run(self.replica[which].others(user))) & set(ITEMS[user])

    @rule(which=WHICH, user=WHO)
    def a_user_is_forgotten(self, which, user):
        self.forget(which, user)

    @precondition(lambda self: any(person.version for person in self.people.values()))
    @rule(which=st.integers(0, 99), batch=BATCH, writer=WHICH)
    def a_user_is_forgotten_while_a_write_is_under_way(self, which, batch, writer):
        known = [user for user in USERS if self.people[user].version]
        user = known[which % len(known)]
        request = self.request(user, batch)
        calls = self.replica[writer].ingest(*self.sent(request)), self.replica[1 - writer].forget(user)

        async def together():
            return await asyncio.gather(*calls)

        before = time.time()
        written, existed = self.run(together())
        assert existed
        if not written.forgotten:  # it came first
            self.took(request, written)
        self.forgot(user, before)

    @rule(which=WHICH)
    def a_replica_is_restarted(self, which):
        self.run(self.replica[which].close())
        self.replica[which] = self.run(Replica(self.url, self.checkpoint, RESIDENT[which]).started())

    # ---------------------------------------------------------------------------------------- invariants

    @invariant()
    def what_is_kept_is_what_the_model_keeps(self):
        names = self.run(self.observer.names())
        for user, person in self.people.items():
            memory = self.run(self.observer.inspect(user))
            assert (memory is None) == (person.version == 0)
            if memory is not None:
                self.check_memory(memory, person, names)
        assert self.run(self.observer.others("")) == self.shared("")

    def check_memory(self, memory: UserMemory, person: Person, names: list[str]) -> None:
        assert (memory.version, memory.events, memory.seen) == (person.version, len(person.log), len(person.seen))
        assert [(names[item], when) for item, when in memory.log] == person.log
        kept = [(names[entry.item], entry.time, entry.frequency, entry.rating) for entry in memory.entries]
        assert kept == [(entry.item, entry.time, entry.frequency, entry.rating) for entry in person.bank]
        assert memory.pruned == person.pruned
        for entry, wanted in zip(memory.entries, person.bank, strict=True):
            assert entry.access <= wanted.retrieved, "counted more often than it was retrieved"

    # -------------------------------------------------------------------------------------------- helpers

    def now(self) -> float:
        """A time that was not yet."""
        self.clock = max(time.time(), self.clock + 1e-6)
        return self.clock

    def request(self, user: str, batch) -> Request:
        person, events = self.people[user], []
        for index, (item, kind, place, rating, event_id) in enumerate(batch):
            if kind == "untimed":
                when, event_id = None, event_id or f"at {self.now()}"
            elif kind == "new" or not person.log:
                when = self.now()
            else:
                when = earlier(person, place, same=kind == "same time")
            events.append(EventIn(index, ITEMS[user][item], when, rating, event_id))
        return Request(user, events, self.now())

    def sent(self, request: Request) -> tuple[str, list[EventIn], float]:
        return request.user, request.events, request.received_at

    def wanted(self, request: Request) -> Wanted:
        return self.people[request.user].sort_out(request.events, request.received_at)

    def planned(self, request: Request, planner: int) -> UserPlan:
        plan = self.run(self.replica[planner].plan(*self.sent(request)))
        self.check_plan(plan, request)
        return plan

    def ingest(self, request: Request, planner: int, writer: int) -> UserWritten:
        plan = self.planned(request, planner)
        written = self.run(self.replica[writer].write(plan, request.events, request.received_at))
        assert written.retry is None, "nobody wrote in between"
        self.took(request, written)
        return written

    def write_planned(self, request: Request, plan: UserPlan, writer: int) -> None:
        """Write by a plan that may be outdated: refused if it is, done by the plan that comes back."""
        person, wanted = self.people[request.user], self.wanted(request)
        fewer = person.forgotten_until > 0 and len(plan.accepted) > len(wanted.accepted)
        outdated = plan.version != person.version or fewer
        written = self.run(self.replica[writer].write(plan, request.events, request.received_at))
        assert (written.retry is not None) == outdated
        if written.retry is not None:
            assert (written.accepted, written.duplicates, written.forgotten) == ([], [], [])
            self.check_plan(written.retry, request)
            written = self.run(self.replica[1 - writer].write(written.retry, request.events, request.received_at))
        self.took(request, written)

    def took(self, request: Request, written: UserWritten) -> None:
        """The outcome is the one wanted; from now on the model has these events too."""
        wanted, person = self.wanted(request), self.people[request.user]
        assert written.retry is None
        assert written.accepted == [event.index for event, _ in wanted.accepted]
        assert (written.duplicates, written.forgotten) == (wanted.duplicates, wanted.forgotten)
        person.take(request.user, wanted)
        assert written.version == person.version
        self.history.append(request)

    def forget(self, which: int, user: str) -> None:
        before, known = time.time(), self.people[user].version > 0
        assert self.run(self.replica[which].forget(user)) == known
        self.forgot(user, before)
        assert not set(self.run(self.replica[which].others(""))) & set(ITEMS[user])

    def forgot(self, user: str, before: float) -> None:
        (stone,) = self.run(self.observer.service.store.tombstones([user]))
        person = self.people[user]
        assert (stone is None) == (person.last_version == 0)
        if stone is not None:
            assert before <= stone.time <= time.time()
            self.people[user] = person.forgotten(stone.time)

    def shared(self, asker: str) -> list[str]:
        """Items of the entries that others than the asker share: those whose key was made in a context."""
        banks = [person.bank for user, person in self.people.items() if user != asker]
        return sorted(entry.item for bank in banks for entry in bank if entry.shared)

    def check_plan(self, plan: UserPlan, request: Request) -> None:
        wanted, job = self.wanted(request), plan.job.unpack()
        names = self.run(self.observer.names())
        assert plan.version == self.people[request.user].version
        assert plan.accepted == [event.index for event, _ in wanted.accepted]
        assert (plan.duplicates, plan.forgotten) == (wanted.duplicates, wanted.forgotten)
        assert [names[number] for number in job.items.tolist()] == [item for item, _ in wanted.log]
        assert (job.start, job.positions.tolist()) == (0, wanted.positions)

    def check_reply(self, reply: RetrieveReply, users: Sequence[str]) -> None:
        people, names = [self.people[user] for user in users], self.run(self.observer.names())
        seen = split(reply.seen, column(reply.seen_count, "<i4"))
        states = np.frombuffer(reply.states, "<f4").reshape(len(users), DIM)
        assert (reply.degraded, reply.stale) == (False, [])
        assert column(reply.known, "u1") == [int(person.version > 0) for person in people]
        assert column(reply.versions, "<i8") == [person.version for person in people]
        assert column(reply.bank_size, "<i4") == [len(person.bank) for person in people]
        assert [[names[number] for number in one] for one in seen] == [person.seen for person in people]
        own = reply.own.unpack()
        for row, (user, person) in enumerate(zip(users, people, strict=True)):
            state = state_of(user, [item for item, _ in person.log]) if person.version else np.zeros(DIM, "<f4")
            assert np.array_equal(states[row], state)
            ranked = own.similarity[row, own.valid[row]].tolist()
            found = {names[item]: one for item, one in zip(own.item[row, own.valid[row]].tolist(), ranked, strict=True)}
            assert all(better >= worse - 1e-5 for better, worse in pairwise(ranked))
            wanted = {entry.item: float(entry.key.astype("<f4") @ state) for entry in person.bank}
            assert found == pytest.approx(wanted, abs=2e-3)


def earlier(person: Person, place: int, same: bool) -> float:
    """A time between two events of the log (or before all of them, but in this life), or that of one of them."""
    times = [when for _, when in person.log]
    at = place % len(times)
    if same:
        return times[at]
    before = times[at - 1] if at else max(times[0] - 1, person.forgotten_until)
    return (before + times[at]) / 2


def test_two_replicas_are_one_memory(valkey_url, checkpoint):
    machine = type("Bound", (Replicas,), {"url": valkey_url, "checkpoint": checkpoint})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=25, deadline=None, phases=(Phase.generate,))
    )


# -------------------------------------------------------------------------------------- at the same time


def taken(user: str, *items: int, since: float = 1e9) -> list[EventIn]:
    """Events of one request, a second apart."""
    return [EventIn(n, ITEMS[user][item], since + n) for n, item in enumerate(items)]


def test_writers_through_both_replicas_at_once_lose_nothing(pair, go):
    requests = [taken("ann", n % 6, (n + 1) % 6, since=1e9 + 10 * n) for n in range(16)]

    async def together():
        calls = [pair[n % 2].ingest("ann", events, 1e9, tries=40) for n, events in enumerate(requests)]
        return await asyncio.gather(*calls), await pair[0].inspect("ann")

    written, memory = go(together())
    assert [one.accepted for one in written] == [[0, 1]] * len(requests)
    assert sorted(one.version for one in written) == list(range(1, len(requests) + 1))
    assert [when for _, when in memory.log] == sorted(event.timestamp for events in requests for event in events)
    assert (memory.version, memory.events) == (len(requests), 2 * len(requests))


def test_one_request_sent_many_times_at_once_is_kept_once(pair, go):
    events = taken("ann", 0, 1, 2)

    async def together():
        calls = [pair[n % 2].ingest("ann", events, 1e9, tries=40) for n in range(10)]
        return await asyncio.gather(*calls), await pair[1].inspect("ann")

    written, memory = go(together())
    assert Counter(len(one.accepted) for one in written) == {3: 1, 0: 9}
    assert Counter(len(one.duplicates) for one in written) == {3: 9, 0: 1}
    assert (memory.version, [entry.frequency for entry in memory.entries]) == (1, [1, 1, 1])


def test_readers_of_both_replicas_never_see_less_than_was_acknowledged(pair, go):
    acknowledged, done = 0, False

    async def writer():
        nonlocal acknowledged, done
        for n in range(30):
            acknowledged = (await pair[n % 2].ingest("ann", taken("ann", n % 6, since=1e9 + n), 1e9)).version
        done = True

    async def reader(replica: Replica, users: Sequence[str]):
        last = 0
        while not done:
            least = max(last, acknowledged)
            last = column((await replica.retrieve(users)).versions, "<i8")[0]
            assert last >= least

    async def together():
        for user in USERS[1:]:  # more than the second replica may keep
            await pair[0].ingest(user, taken(user, 0), 1e9)
        readers = [reader(replica, ["ann", *more]) for replica in pair for more in ((), USERS[1:])]
        await asyncio.gather(writer(), *readers)

    go(together())
    assert acknowledged == 30


def test_a_retrieval_is_counted_once_whoever_writes_next(pair, go):
    async def story():
        await pair[0].ingest("ann", taken("ann", 0), 1e9)
        for replica in (pair[0], pair[1], pair[1]):
            await replica.retrieve(["ann"], counted=True)
        for n in range(6):
            await pair[n // 2 % 2].ingest("ann", taken("ann", 1, since=2e9 + n), 2e9)
        return await pair[0].inspect("ann")

    assert [entry.access for entry in go(story()).entries] == [3, 0]


def test_a_redis_that_lost_its_last_second_does_not_leave_the_replicas_at_odds(pair, go, valkey_url):
    """What comes after the loss has the version of what was lost, and is not it."""
    here, there = pair

    async def story():
        await here.ingest("ann", taken("ann", 0, 1), 1e9)
        with redis.Redis.from_url(valkey_url) as raw:
            (key,) = (key for key in raw.scan_iter() if b"ann" in key)
            kept = raw.get(key)
            await there.ingest("ann", taken("ann", 2, since=2e9), 2e9)
            raw.set(key, kept)
        await here.ingest("ann", taken("ann", 3, since=3e9), 3e9)
        return (
            await here.retrieve(["ann"]),
            await there.retrieve(["ann"]),
            await here.others(""),
            await there.others(""),
        )

    one, other, others_here, others_there = go(story())
    assert (one.seen, one.own.item) == (other.seen, other.own.item)
    assert others_here == others_there
