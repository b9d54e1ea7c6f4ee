"""What an entry knows about coming back: by hand, and however its events came."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import RulesConfig
from model.memory.bank import Banks
from model.memory.changes import Change, apply
from model.memory.events import Event, Plan, plan
from model.memory.habits import (
    DAY_HALF_LIVES,
    DAY_S,
    FEATURES,
    HOUR_S,
    LEAST,
    OCCASION_HALF_LIVES,
    PERIODS_H,
    SUMS,
    TIMED,
    activation,
    features,
    first_taken,
    habit_of,
    request_time,
    taken_again,
    usual_time,
)
from model.memory.record import UserRecord
from model.memory.rules import unit
from tests.synthetic import random_banks

RULES = RulesConfig(capacity=12, k_max=5, k_base=5, clusters=4, longest_gap_s=10 * DAY_S)
OCCASIONS = slice(0, len(OCCASION_HALF_LIVES))
DAYS = slice(OCCASIONS.stop, OCCASIONS.stop + len(DAY_HALF_LIVES))
CYCLES = slice(DAYS.stop, SUMS)
COS, SIN = slice(CYCLES.start, CYCLES.start + len(PERIODS_H)), slice(CYCLES.start + len(PERIODS_H), SUMS)
MONDAY = 4 * DAY_S
"""The first Monday of Unix time, 0:00."""


def at_once(time: np.ndarray, occasion: np.ndarray) -> np.ndarray:
    """Sums of one item's events, computed from all of them."""
    angle = 2 * np.pi / HOUR_S * time[:, None] / PERIODS_H
    counts = [
        np.exp2(-(occasion.max() - occasion)[:, None] / OCCASION_HALF_LIVES),
        np.exp2(-(time.max() - time)[:, None] / DAY_S / DAY_HALF_LIVES),
    ]
    return np.concatenate([*counts, np.cos(angle), np.sin(angle)], axis=1).sum(axis=0)


def one_by_one(time: np.ndarray, occasion: np.ndarray) -> np.ndarray:
    """The same, kept up to date with every event, in the order given."""
    sums, last, number = first_taken(time[:1]), time[:1], occasion[:1]
    for when, nth in zip(time[1:, None], occasion[1:, None], strict=True):
        sums = taken_again(sums, last, number, when, nth)
        last, number = np.maximum(last, when), np.maximum(number, nth)
    return sums[0]


def told(facts: dict[str, object], occasions: int, now: float, rules: RulesConfig = RULES) -> dict[str, float]:
    """Features of the only entry of a bank, by name."""
    columns = {name: np.asarray(value)[None, None] for name, value in facts.items()}
    found = features(columns, np.ones((1, 1), bool), np.array([occasions]), np.array([now]), rules)
    return dict(zip(FEATURES, found[0, 0].tolist(), strict=True))


def remember(record: UserRecord, taken: list[tuple[int, float]]) -> tuple[UserRecord, Plan]:
    planned = plan(record, [Event(n, item, time, timed=False) for n, (item, time) in enumerate(taken)])
    keys = unit(np.ones((len(taken), 4)))
    return apply([Change(record, planned, keys, keys[0], np.zeros(len(taken), int))])[0], planned


def written(*batches: list[tuple[int, float]]) -> UserRecord:
    record = UserRecord.new(4, RULES)
    for batch in batches:
        record, _ = remember(record, batch)
    return record


def entry(record: UserRecord, item: int) -> dict[str, np.ndarray]:
    slot = record.banks.fields["item"][0, : record.size].tolist().index(item)
    return {name: values[0, slot] for name, values in record.banks.fields.items()}


# -------------------------------------------------------------------------------------------------- sums


def test_sums_of_a_first_event():
    six_o_clock = first_taken(np.array([0.0, 6 * HOUR_S]))
    assert six_o_clock.shape == (2, SUMS)
    assert six_o_clock[:, : CYCLES.start].tolist() == [[1.0] * 9] * 2
    assert six_o_clock[0, CYCLES].tolist() == [1.0] * 5 + [0.0] * 5
    assert np.allclose(six_o_clock[1, COS], [0, -1, 0, np.cos(np.pi / 14), np.cos(np.pi / 7)], atol=1e-6)
    assert np.allclose(six_o_clock[1, SIN], [1, 0, -1, np.sin(np.pi / 14), np.sin(np.pi / 7)], atol=1e-6)


def test_an_event_more_by_hand():
    """Four days and five occasions later."""
    once = first_taken(np.array([0.0]))
    twice = taken_again(once, np.array([0.0]), np.array([1]), np.array([4 * DAY_S]), np.array([6]))[0]
    assert twice[OCCASIONS] == pytest.approx([1 + 2 ** -(5 / h) for h in (1.5, 5, 15, 50, 200)])
    assert twice[DAYS] == pytest.approx([1 + 1 / 16, 1.5, 1 + 2 ** -(4 / 15), 1 + 2 ** -(4 / 60)])
    assert twice[COS][:3] == pytest.approx([2, 2, 2], abs=1e-5)
    assert twice[COS][3] == pytest.approx(1 + np.cos(2 * np.pi * 4 / 7), abs=1e-5)
    assert once[0, : CYCLES.start].tolist() == [1.0] * 9


TIMES = st.lists(st.integers(0, 2000), min_size=1, max_size=30, unique=True)


@settings(max_examples=80, deadline=None)
@given(hours=TIMES)
def test_sums_kept_up_to_date_are_those_of_all_events(hours):
    time = np.sort(np.array(hours)) * HOUR_S
    occasion = np.arange(1, 2 * len(time), 2)  # others were taken in between
    assert np.allclose(one_by_one(time, occasion), at_once(time, occasion), atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(hours=TIMES, data=st.data())
def test_late_events_give_the_same_sums(hours, data):
    time = np.array(hours) * HOUR_S
    order = np.array(data.draw(st.permutations(range(len(time)))))
    occasion = np.argsort(np.argsort(time)) + 1
    assert np.allclose(one_by_one(time[order], occasion[order]), at_once(time, occasion), atol=1e-4)


# --------------------------------------------------------------------------------------------- occasions


def test_a_basket_is_one_occasion_whether_it_comes_at_once_or_item_by_item():
    basket = [(1, 50.0), (2, 50.0), (3, 50.0)]
    for record in (written([(9, 10.0)], basket), written([(9, 10.0)], *([one] for one in basket))):
        assert record.banks.occasions.tolist() == [2]
        assert [int(entry(record, item)["occasion"]) for item in (9, 1, 2, 3)] == [1, 2, 2, 2]
    again = written([(9, 10.0)], basket, [(1, 60.0), (1, 60.0)])
    assert (again.banks.occasions.tolist(), int(entry(again, 1)["occasion"])) == ([3], 3)
    assert entry(again, 1)["frequency"] == 3
    assert entry(again, 1)["sums"][OCCASIONS] == pytest.approx([2 + 2 ** -(1 / h) for h in OCCASION_HALF_LIVES])


@settings(max_examples=80, deadline=None)
@given(taken=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=20), data=st.data())
def test_whatever_came_late_an_entry_knows_its_times_and_its_occasion(taken, data):
    """Nothing was pruned, and the log reaches back to the beginning."""
    order, edges = data.draw(st.permutations(taken)), sorted(data.draw(st.sets(st.integers(1, 20))))
    cuts = [0, *(edge for edge in edges if edge < len(order)), len(order)]
    batches = [[(item, hours * HOUR_S) for item, hours in order[a:b]] for a, b in pairwise(cuts)]
    record = written(*batches)
    moments = sorted({hours for _, hours in taken})
    assert record.banks.occasions.tolist() == [len(moments)]
    for item in {item for item, _ in taken}:
        hours, found = sorted(hours for one, hours in taken if one == item), entry(record, item)
        assert (found["first_time"], found["time"]) == (hours[0] * HOUR_S, hours[-1] * HOUR_S)
        assert (found["frequency"], found["occasion"]) == (len(hours), moments.index(hours[-1]) + 1)
        wanted = at_once(np.array(hours) * HOUR_S, np.zeros(len(hours)))
        assert np.allclose(found["sums"][CYCLES], wanted[CYCLES], atol=1e-4)
        assert np.allclose(found["sums"][DAYS], wanted[DAYS], atol=1e-4)


def test_a_late_event_says_how_many_occasions_came_after_it():
    record = written([(1, 10.0), (2, 20.0)], [(3, 30.0)])
    planned = plan(record, [Event(n, 9, time) for n, time in enumerate((5.0, 20.0, 25.0, 25.0, 40.0))])
    assert [event.time for event in planned.accepted] == [5.0, 20.0, 25.0, 40.0]  # one of 25.0 is a duplicate
    assert (planned.opens.tolist(), planned.ago.tolist()) == ([True, False, True, True], [3, 1, 1, 0])


# ---------------------------------------------------------------------------------------------- features


def test_features_by_hand():
    sums = np.arange(1, SUMS + 1) / 10
    facts = {"frequency": 3, "first_time": MONDAY, "time": MONDAY + 4 * DAY_S, "occasion": 5, "sums": sums}
    now = MONDAY + 6 * DAY_S + 6 * HOUR_S
    found = told(facts, 8, now)
    assert found["log_count"] == pytest.approx(np.log(3))
    assert found["share"] == pytest.approx(1.0)
    assert found["log_occasions_since"] == pytest.approx(np.log(4))
    assert found["log_count_5_occasions"] == pytest.approx(np.log(0.2 * 2 ** -(3 / 5) + LEAST))
    assert found["log_hours_since"] == found["log_hours_idle"] == pytest.approx(np.log1p(54) / 2)
    assert found["same_time"] == 0.0
    assert found["log_count_4_days"] == pytest.approx(np.log(0.7 * 2 ** -(2.25 / 4) + LEAST))
    assert (found["log_mean_gap_hours"], found["has_gap"]) == (pytest.approx(np.log1p(48) / 2), 1.0)
    assert found["log_overdue"] == pytest.approx(np.log(2.3 / 2.05), abs=1e-5)
    x, y = sums[COS][0], sums[SIN][0]  # six o'clock: all of the sine, nothing of the cosine
    assert found["now_24_hours"] == pytest.approx(y / 4, abs=1e-5)
    assert found["regular_24_hours"] == pytest.approx(np.hypot(x, y) / 4)
    assert found["often_now_24_hours"] == pytest.approx(y / 7, abs=1e-5)


def test_the_entry_of_a_first_event_has_no_gap_and_one_taken_now_says_so():
    facts = {"frequency": 1, "first_time": 50.0, "time": 50.0, "occasion": 1, "sums": first_taken(np.array([50.0]))[0]}
    found = told(facts, 1, 50.0)
    assert [found[name] for name in ("log_mean_gap_hours", "has_gap", "log_overdue")] == [0.0, 0.0, 0.0]
    assert (found["same_time"], found["log_hours_since"], found["log_occasions_since"]) == (1.0, 0.0, 0.0)
    assert told(facts, 1, 51.0)["same_time"] == 0.0


def banks_of(events: int, seed: int = 0, rules: RulesConfig = RULES, users: int = 5) -> Banks:
    return random_banks(users, events, 4, rules, items=20, seed=seed)


def facts_of(banks: Banks) -> dict[str, np.ndarray]:
    return {name: banks.fields[name] for name in ("frequency", "first_time", "time", "occasion", "sums")}


@settings(max_examples=40, deadline=None)
@given(events=st.integers(0, 20), seed=st.integers(0, 50), later=st.floats(-1e6, 1e8))
def test_features_are_finite_zero_where_nothing_is_and_leave_what_is_given(events, seed, later):
    banks = banks_of(events, seed)
    now = np.full(len(banks), events * 3600.0 + later)
    before = {name: values.copy() for name, values in facts_of(banks).items()}
    found = banks.habits(np.arange(len(banks)), now)
    assert found.shape == (*banks.valid().shape, len(FEATURES))
    assert np.isfinite(found).all()
    assert not found[~banks.valid()].any()
    assert all(np.array_equal(before[name], values) for name, values in facts_of(banks).items())
    assert (now == events * 3600.0 + later).all()


def test_an_entry_tells_the_same_wherever_it_stands():
    banks, now = banks_of(14), np.full(5, 1e6)
    wanted, order = banks.habits(np.arange(5), now), np.random.default_rng(0).permutation(banks.key.shape[1])
    moved = {name: values[:, order] for name, values in facts_of(banks).items()}
    assert np.array_equal(features(moved, banks.valid()[:, order], banks.occasions, now, RULES), wanted[:, order])


@settings(max_examples=40, deadline=None)
@given(days=st.floats(0, 3000), seed=st.integers(0, 20))
def test_long_after_the_last_event_everything_stays_but_the_hour(days, seed):
    banks, rows = banks_of(10, seed), np.arange(5)
    newest = np.max(np.where(banks.valid(), banks.fields["time"], 0), axis=1)
    limit, now = newest + RULES.longest_gap_s, newest + RULES.longest_gap_s + days * DAY_S
    assert np.array_equal(request_time(now, newest, RULES), limit)
    cyclic = np.array([name.startswith(("now_", "often_now_")) for name in FEATURES])
    found = banks.habits(rows, now)
    assert np.array_equal(found[..., ~cyclic], banks.habits(rows, limit)[..., ~cyclic])
    a_week_later = banks.habits(rows, now + 7 * DAY_S)
    assert np.allclose(found, a_week_later, atol=1e-4)


def test_before_the_last_event_nothing_has_an_age():
    banks, rows = banks_of(10), np.arange(5)
    newest = np.max(np.where(banks.valid(), banks.fields["time"], 0), axis=1)
    idle = FEATURES.index("log_hours_idle")
    assert np.array_equal(request_time(newest - 500.0, newest, RULES), newest)
    assert not banks.habits(rows, newest - 500.0)[..., idle].any()


def test_a_log_without_times_tells_nothing_of_times():
    rules = RULES.model_copy(update={"time_unit": "position"})
    banks, rows = banks_of(12, rules=rules), np.arange(5)
    timeless = banks.habits(rows, np.full(5, 12.0))
    assert not timeless[..., TIMED].any()
    banks.rules = RULES
    assert np.array_equal(timeless[..., ~TIMED], banks.habits(rows, np.full(5, 12.0))[..., ~TIMED])
    known = {name for name, timed in zip(FEATURES, TIMED, strict=True) if not timed}
    occasions = {f"log_count_{half_life:g}_occasions" for half_life in OCCASION_HALF_LIVES}
    assert known == {"log_count", "share", "log_occasions_since", *occasions}


def test_shares_of_a_bank_sum_to_one():
    banks = banks_of(15)
    share = banks.habits(np.arange(5), np.full(5, 1e6))[..., FEATURES.index("share")]
    assert np.allclose(share.sum(axis=1), 1.0)


# --------------------------------------------------------------------------------------------- activation


def test_activation_is_a_weighted_sum_by_name():
    found = banks_of(10).habits(np.arange(5), np.full(5, 1e6))
    similarity = np.random.default_rng(0).normal(size=found.shape[:2]).astype(np.float32)
    rules = RULES.model_copy(update={"activation": {"log_count": 2.0, "now_24_hours": -1.5, "similarity": 3.0}})
    wanted = 2.0 * found[..., 0] - 1.5 * found[..., FEATURES.index("now_24_hours")] + 3.0 * similarity.astype(float)
    assert np.allclose(activation(found, similarity, rules), wanted)
    alone = rules.model_copy(update={"activation": {"share": 1.0}})
    assert np.allclose(activation(found, similarity, alone), found[..., FEATURES.index("share")])


def test_a_weight_of_what_is_no_feature_is_refused():
    with pytest.raises(ValueError, match="activation names mood"):
        RulesConfig(activation={"mood": 1.0})


# ------------------------------------------------------------------------------------------ in plain words


def daily(hour: float, days: int, every: int = 1) -> tuple[UserRecord, float]:
    """A user who takes item 1 at an hour of the day from a Monday on; and the time of the last event."""
    time = [MONDAY + (day * every * 24 + hour) * HOUR_S for day in range(days)]
    return written(*([(1, when)] for when in time)), time[-1]


def test_what_there_is_to_say_about_a_memory():
    record, last = daily(6.5, 5)

    def said(now: float):
        return habit_of(record.banks.habits(np.array([0]), np.array([now]))[0, 0])

    tomorrow, evening = said(last + DAY_S), said(last + 12 * HOUR_S)
    assert (tomorrow.count, tomorrow.at_this_hour, evening.at_this_hour) == (5, True, False)
    assert tomorrow.since_s == pytest.approx(DAY_S, rel=1e-4)
    assert tomorrow.mean_gap_s == pytest.approx(DAY_S, rel=1e-4)
    once, when = daily(6.5, 1)
    first = habit_of(once.banks.habits(np.array([0]), np.array([when + 60]))[0, 0])
    assert (first.count, first.mean_gap_s, first.at_this_hour, first.on_this_day) == (1, None, False, False)


def test_the_usual_time_of_the_day_and_of_the_week():
    often, _ = daily(6.5, 10)
    assert usual_time(10, entry(often, 1)["sums"], 24.0) == pytest.approx(6.5, abs=1e-3)
    assert usual_time(10, entry(often, 1)["sums"], 168.0) is None  # any day
    assert usual_time(2, entry(daily(6.5, 2)[0], 1)["sums"], 24.0) is None  # too seldom
    mondays, _ = daily(20.0, 4, every=7)
    assert usual_time(4, entry(mondays, 1)["sums"], 168.0) == pytest.approx(4 * 24 + 20.0, abs=1e-2)  # from Thursday
    assert usual_time(4, entry(mondays, 1)["sums"], 24.0) == pytest.approx(20.0, abs=1e-3)
