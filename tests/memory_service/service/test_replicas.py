"""Two memory services over one Valkey behave like one memory: a plain model of it says what each answer must be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    RetrieveReply,
    UserPlan,
    UserWritten,
)
from memory_service.protocol.user_memory import UserMemory
from model.checkpoint import Checkpoint
from tests.memory_service.calling import column
from tests.memory_service.plain_memory import (
    DIM,
    ITEMS,
    RESIDENT,
    USERS,
    Person,
    Wanted,
    state_of,
)
from tests.memory_service.replica import Replica


def split(data: bytes, counts: list[int]) -> list[list[int]]:
    bounds = np.cumsum([0, *counts]).tolist()
    values = column(data, "<u4")
    return [values[start:stop] for start, stop in pairwise(bounds)]


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
        (tombstone,) = self.run(self.observer.service.store.tombstones([user]))
        person = self.people[user]
        assert (tombstone is None) == (person.last_version == 0)
        if tombstone is not None:
            assert before <= tombstone.time <= time.time()
            self.people[user] = person.forgotten(tombstone.time)

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
