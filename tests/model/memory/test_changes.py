"""Records: what batches of events, forgotten items and another model make of them."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import RulesConfig
from model.memory.bank import HABIT_FIELDS
from model.memory.changes import Change, apply, rekey, rekey_job, with_habits, without
from model.memory.events import Event, event_identity, plan
from model.memory.habits import OCCASION_HALF_LIVES, first_taken
from model.memory.record import EVENT_ID_LIMIT, LOG_LIMIT, UserRecord
from model.memory.rules import unit

RULES = RulesConfig(capacity=5, k_max=5, k_base=5, clusters=4, similarity_threshold=-1.0)
DIM = 4
NAN = float("nan")


def key(n: int) -> np.ndarray:
    return unit(np.random.default_rng(n).normal(size=DIM))


def remember(record: UserRecord, events: list[Event], **more: object) -> UserRecord:
    planned = plan(record, events)
    keys = np.array([key(event.item) for event in planned.accepted]).reshape(-1, DIM)
    cells = np.zeros(len(keys), int)
    return apply([Change(record, planned, keys, key(99), cells, **more)])[0]


def events(*pairs: tuple[int, float], **more: object) -> list[Event]:
    return [Event(n, item, time, **more) for n, (item, time) in enumerate(pairs)]


@pytest.fixture
def new() -> UserRecord:
    return UserRecord.new(DIM, RULES)


def items_of(record: UserRecord) -> list[int]:
    return record.banks.fields["item"][0, : record.size].tolist()


def test_a_first_event(new):
    record = remember(new, [Event(0, 7, 100.0, 4.0, event_id=5)])
    assert (record.version, record.events, record.size) == (1, 1, 1)
    assert record.log_item.tolist() == [7]
    assert record.log_time.tolist() == [100.0]
    assert record.seen.tolist() == [7]
    assert record.event_ids.tolist() == [5]
    assert np.allclose(record.banks.key[0, 0], key(7), atol=1e-3)
    assert new.version == new.size == 0


def test_an_item_taken_again_counts_up_and_blends_its_key(new):
    record = remember(new, events((7, 1.0), (8, 2.0)))
    planned = plan(record, events((7, 3.0), rating=2.0))
    record = apply([Change(record, planned, key(50)[None], key(1), np.zeros(1, int))])[0]
    fields = record.banks.fields
    assert items_of(record) == [7, 8]
    assert fields["frequency"][0, 0] == 2
    assert fields["time"][0, 0] == 3.0
    assert fields["rating"][0, 0] == 2.0
    alpha = 0.7 + 0.05 * np.log(2)
    assert np.allclose(record.banks.key[0, 0], unit(alpha * key(7) + (1 - alpha) * key(50)), atol=2e-3)


def test_a_late_repeat_leaves_time_and_rating(new):
    record = remember(new, events((7, 10.0), rating=5.0))
    record = remember(record, events((7, 4.0), rating=1.0))
    fields = record.banks.fields
    assert (fields["frequency"][0, 0], fields["time"][0, 0], fields["rating"][0, 0]) == (2, 10.0, 5.0)
    assert record.log_time.tolist() == [4.0, 10.0]


def test_a_repeat_without_a_rating_keeps_the_old_rating(new):
    record = remember(remember(new, events((7, 1.0), rating=4.0)), events((7, 2.0)))
    assert record.banks.fields["rating"][0, 0] == 4.0


def test_duplicates_by_id_by_time_and_within_a_request(new):
    record = remember(new, [Event(0, 7, 1.0, event_id=11)])
    again = [
        Event(0, 9, 5.0, event_id=11),  # the same id
        Event(1, 7, 1.0, event_id=12),  # the same item and time
        Event(2, 7, 1.0, timed=False),  # without a time it cannot be recognised, so it counts
        Event(3, 8, 6.0, event_id=13),
        Event(4, 8, 7.0, event_id=13),
    ]
    planned = plan(record, again)
    assert planned.duplicates == (0, 1, 4)
    assert [event.index for event in planned.accepted] == [2, 3]


def test_an_entry_in_the_bank_recognises_an_event_that_left_the_log(new):
    long = remember(new, events((7, 0.0), *((8, float(n)) for n in range(1, LOG_LIMIT + 1))))
    assert 7 not in long.log_item
    assert plan(long, events((7, 0.0))).duplicates == (0,)


def test_forgotten_events_are_refused(new):
    planned = plan(new, events((1, 5.0), (2, 6.0), (3, 7.0)), forgotten_until=6.0)
    assert planned.forgotten == (0, 1)
    assert [event.item for event in planned.accepted] == [3]


def test_a_late_event_goes_where_it_belongs(new):
    record = remember(new, events((1, 10.0), (2, 20.0), (3, 30.0)))
    planned = plan(record, events((9, 20.0), (8, 5.0)))
    assert planned.log_item.tolist() == [8, 1, 2, 9, 3]
    assert [event.item for event in planned.accepted] == [8, 9]
    assert planned.job.positions.tolist() == [0, 3]
    assert (planned.job.start, planned.job.items.tolist()) == (0, [8, 1, 2, 9, 3])


def test_an_event_older_than_a_full_log_gets_the_first_state(new):
    record = remember(new, events(*((1 + n % 9, float(n)) for n in range(LOG_LIMIT + 10))))
    assert record.log_start == 10
    planned = plan(record, events((20, 3.0), (21, 9999.0)))
    assert planned.job.positions.tolist() == [-1, LOG_LIMIT + 11]
    assert type(planned.job.start) is int  # it goes over the wire
    assert planned.job.start == 11
    after = remember(record, events((20, 3.0), (21, 9999.0)))
    assert (after.events, len(after.log_item), after.log_start) == (LOG_LIMIT + 12, LOG_LIMIT, 12)
    assert 20 in after.seen


def test_a_full_bank_stays_within_its_capacity_and_keeps_what_was_just_written(new):
    record = new
    for n in range(30):
        record = remember(record, [Event(0, n + 1, float(n), 1.0)])
        assert record.size <= RULES.capacity
        assert n + 1 in items_of(record)
    assert record.seen.tolist() == list(range(1, 31))
    assert record.banks.pruned[0] == 30 - record.size


def test_limits_of_what_is_kept(new):
    record = remember(new, [Event(n, 1 + n % 9, float(n), event_id=n + 1) for n in range(EVENT_ID_LIMIT + 5)])
    assert len(record.log_item) == LOG_LIMIT
    assert record.event_ids[[0, -1]].tolist() == [6, EVENT_ID_LIMIT + 5]
    assert record.events == EVENT_ID_LIMIT + 5


def test_a_forgotten_users_versions_go_on(new):
    assert remember(new, events((1, 1.0)), first_version=41).version == 42


def test_retrievals_are_merged_at_the_next_write(new):
    record = remember(remember(new, events((7, 1.0))), events((8, 2.0)), accesses=[(7, 3, 50.0), (30, 9, 1.0)])
    assert record.banks.fields["access"][0, :2].tolist() == [3, 0]
    assert record.banks.fields["last_access"][0, 0] == 50.0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([NAN, 1.0, 5.0]), st.booleans()), min_size=1, max_size=25),
    st.sets(st.integers(1, 24)),
)
def test_the_record_does_not_depend_on_how_events_were_chunked(taken, cuts):
    """In order of time, some at one time; keys are what the encoder says for a position, here a function of it."""
    times = np.cumsum([step for *_, step in taken]).tolist()
    stream = [
        Event(n, item, float(time), rating, event_id=n + 1)
        for n, ((item, rating, _), time) in enumerate(zip(taken, times, strict=True))
    ]
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]

    def written(chunks: list[list[Event]]) -> UserRecord:
        record = UserRecord.new(DIM, RULES)
        for chunk in chunks:
            planned = plan(record, chunk)
            keys = np.array([key(1000 + p) for p in planned.job.positions]).reshape(-1, DIM)
            record = apply([Change(record, planned, keys, key(0), np.zeros(len(keys), int))])[0]
        return record

    whole = written([stream])
    parts = written([stream[a:b] for a, b in pairwise(edges) if a < b])
    for name in whole.banks.fields:
        assert np.array_equal(whole.banks.fields[name], parts.banks.fields[name], equal_nan=True)
    assert np.array_equal(whole.banks.key, parts.banks.key)
    assert whole.banks.occasions.tolist() == parts.banks.occasions.tolist() == [len(set(times))]
    for name in ("log_item", "log_time", "seen", "event_ids"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def test_users_written_together_equal_each_alone(new):
    batches = [events((1, 1.0), (2, 2.0)), events((3, 1.0)), events(*((n + 1, float(n)) for n in range(9)))]
    plans = [plan(new, batch) for batch in batches]
    changes = [
        Change(new, p, np.array([key(e.item) for e in p.accepted]), key(99), np.arange(len(p.accepted))) for p in plans
    ]
    for together, change in zip(apply(changes), changes, strict=True):
        alone = apply([change])[0]
        assert np.array_equal(together.banks.key, alone.banks.key)
        assert together.seen.tolist() == alone.seen.tolist()


def test_identity_of_events():
    assert event_identity("u", "i", None, None) == 0
    assert event_identity("u", "i", 1.0, None) == event_identity("u", "i", 1, None) != 0
    assert event_identity("u", "i", 1.0, "a") == event_identity("u", "other", None, "a")
    assert event_identity("u", "i", 1.0, "a") != event_identity("v", "i", 1.0, "a")


def test_rekeying_needs_the_state_where_each_item_was_last_logged(new):
    record = remember(new, events((1, 1.0), (2, 2.0), (1, 3.0)))
    job = rekey_job(record)
    assert job.positions.tolist() == [2, 1]
    fresh = rekey(record, "other", np.stack([key(1), key(2)]), key(3))
    assert (fresh.version, fresh.model_version) == (record.version + 1, "other")
    assert np.allclose(fresh.banks.key[0, 0], key(1), atol=1e-3)
    assert items_of(fresh) == items_of(record)
    wider = rekey(record, "wide", np.ones((2, 8)), np.ones(8))
    assert wider.banks.key.shape[2] == 8


@settings(max_examples=50, deadline=None)
@given(
    taken=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=20),
    ignored=st.lists(st.integers(1, 12), max_size=6),
)
def test_a_record_without_items_is_that_of_a_user_who_never_took_them(taken, ignored):
    """Where nothing was pruned and keys do not depend on what was taken before: bank and log, to the bit; but that the
    user did something at those times is still known.
    """
    roomy = UserRecord.new(DIM, RULES.model_copy(update={"capacity": 20}))
    stream = [Event(n, item, float(time), event_id=n + 1) for n, (item, time) in enumerate(taken)]
    record, others = remember(roomy, stream), [event for event in stream if event.item not in ignored]
    found, never = without(record, ignored), remember(roomy, others) if others else roomy
    assert (found.size, found.events) == (never.size, never.events)
    by_occasion = len(OCCASION_HALF_LIVES)
    for name, values in (*found.banks.fields.items(), ("key", found.banks.key)):
        wanted = never.banks.key if name == "key" else never.banks.fields[name]
        mine, theirs = values[0, : found.size], wanted[0, : never.size]
        if name == "sums":
            mine, theirs = mine[:, by_occasion:], theirs[:, by_occasion:]
        assert name == "occasion" or np.array_equal(mine, theirs, equal_nan=name == "rating"), name
    kept = np.flatnonzero(~np.isin(record.banks.fields["item"][0, : record.size], ignored))
    for name in HABIT_FIELDS:  # habits of the others are what they were
        assert np.array_equal(found.banks.fields[name][0, : found.size], record.banks.fields[name][0, kept]), name
    assert found.banks.occasions.tolist() == record.banks.occasions.tolist() == [len({time for _, time in taken})]
    assert np.array_equal(found.log_item, never.log_item)
    assert np.array_equal(found.log_time, never.log_time)
    assert np.array_equal(found.seen, record.seen)  # what the user really had
    assert (found is record) == (len(others) == len(stream))
    assert items_of(record) == items_of(remember(roomy, stream))  # the given one is left as it was


HABITS = ("first_time", "occasion", "sums")


def before_habits(record: UserRecord) -> UserRecord:
    """The record as it was before entries knew habits."""
    banks = record.banks.row(0)
    for name in HABITS:
        banks.fields[name][:] = 0
    banks.occasions[:] = 0
    return replace(record, banks=banks)


@settings(max_examples=60, deadline=None)
@given(taken=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=40))
def test_habits_follow_exactly_from_a_log_of_all_events(taken):
    """The events arrive in order; an item taken again after it was pruned starts from zero."""
    times = np.cumsum([hours * 3600.0 for _, hours in taken]).tolist()
    stream = [Event(n, item, time, timed=False) for n, ((item, _), time) in enumerate(zip(taken, times, strict=True))]
    record = remember(UserRecord.new(DIM, RULES), stream)
    old = before_habits(record)
    found = with_habits(old)
    assert found.banks.occasions.tolist() == record.banks.occasions.tolist()
    for name in ("first_time", "occasion", "frequency", "time"):
        assert np.array_equal(*(one.banks.fields[name][0, : record.size] for one in (found, record))), name
    assert np.allclose(*(one.banks.fields["sums"][0, : record.size] for one in (found, record)), atol=1e-4)
    assert not old.banks.fields["sums"].any()  # the given one is left as it was


def test_an_entry_that_is_older_than_the_log_counts_as_one_event(new):
    early = events((7, 0.0), (7, 1.0), (6, 2.0))
    record = remember(new, early + [Event(3 + n, 8, 3.0 + n // 2, timed=False) for n in range(LOG_LIMIT - 1)])
    assert record.log_item[:2].tolist() == [6, 8]
    found = with_habits(before_habits(record))
    seven, six, eight = ({name: values[0, slot] for name, values in found.banks.fields.items()} for slot in range(3))
    assert (seven["frequency"], seven["first_time"], seven["time"], seven["occasion"]) == (2, 1.0, 1.0, 0)
    assert np.array_equal(seven["sums"], first_taken(np.array([1.0]))[0])
    assert (six["first_time"], six["occasion"]) == (2.0, 1)
    assert (eight["frequency"], eight["first_time"], eight["occasion"]) == (LOG_LIMIT - 1, 3.0, 1 + LOG_LIMIT // 2)
    assert found.banks.occasions.tolist() == [1 + LOG_LIMIT // 2]


def test_a_record_without_entries_or_log_has_no_habits(new):
    assert with_habits(new).banks.occasions.tolist() == [0]
    record = remember(new, events((7, 5.0)))
    unlogged = with_habits(replace(before_habits(record), log_item=record.log_item[:0], log_time=record.log_time[:0]))
    assert (unlogged.banks.fields["first_time"][0, 0], unlogged.banks.occasions[0]) == (5.0, 0)
    assert np.array_equal(unlogged.banks.fields["sums"][0, 0], first_taken(np.array([5.0]))[0])


def test_an_item_taken_again_after_it_was_pruned_starts_from_zero():
    first_in = RULES.model_copy(update={"eviction": "first-in"})
    record = remember(UserRecord.new(DIM, first_in), events(*((7, float(n)) for n in range(3))))
    record = remember(record, events(*((n, 10.0 + n) for n in range(1, 6))))
    assert items_of(record) == [1, 2, 3, 4, 5]
    record = remember(record, events((7, 99.0)))
    entry = {name: values[0, items_of(record).index(7)] for name, values in record.banks.fields.items()}
    assert (entry["frequency"], entry["first_time"], entry["time"], entry["occasion"]) == (1, 99.0, 99.0, 9)
    assert np.array_equal(entry["sums"], first_taken(np.array([99.0]))[0])
    assert (record.events, record.banks.occasions.tolist()) == (9, [9])


def test_habits_stay_when_a_bank_gets_other_keys_or_a_smaller_capacity(new):
    record = remember(new, events((7, 0.0), (8, 1.0), (7, 2.0), (9, 3.0)))
    moved = rekey(record, "other", np.ones((3, 8)), np.ones(8))
    small = record.banks.fitted(RULES.model_copy(update={"capacity": 2}))
    assert moved.banks.occasions.tolist() == small.occasions.tolist() == [4]
    slots = [items_of(record).index(item) for item in small.fields["item"][0, :2]]
    for name in HABIT_FIELDS:
        assert np.array_equal(moved.banks.fields[name], record.banks.fields[name])
        assert np.array_equal(small.fields[name][0, :2], record.banks.fields[name][0, slots])
