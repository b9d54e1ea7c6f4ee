"""Recent records: which are kept, and how a plan is found again."""

from memory_service.service.recent import RecentRecord, RecentRecords, new_token
from model.memory.events import Event, plan
from model.memory.record import UserRecord
from tests.synthetic import small_config

NEW = UserRecord.new(16, small_config().rules)


def recent(token: str = "") -> RecentRecord:
    return RecentRecord(NEW, None, plan(NEW, [Event(0, 1, 1.0)]), token)


def test_those_put_least_recently_go_first():
    records = RecentRecords(2)
    records.put({"a": recent(), "b": recent()})
    records.put({"a": recent("again")})
    records.put({"c": recent()})
    assert [records.get(user) is not None for user in "abc"] == [True, False, True]
    assert (len(records), records.get("a").token) == (2, "again")
    records.drop(["a", "unknown"])
    assert [records.get(user) is not None for user in "ac"] == [False, True]


def test_a_plan_is_found_by_its_token_only():
    kept = recent("token")
    assert kept.plan_named("token") is kept.plan
    assert kept.plan_named("other") is kept.plan_named("") is recent().plan_named("") is None


def test_no_two_tokens_are_equal():
    assert len({new_token() for _ in range(1000)}) == 1000
