"""Habits in words, and where `ramrec inspect` shows them."""

import math
import re
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.commands.inspect.text import habit_kept, habit_now
from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.checkpoint import save_checkpoint
from tests.api.calls import recommend, remember
from tests.api.commands.inspect.output import harmless, section
from tests.conftest import served
from tests.synthetic import habitual_config, random_checkpoint

MIN, HOUR, DAY, WEEK = 60, 3600, 86400, 7 * 86400
KEPT = {  # count, mean gap, since, usual hour, usual day (0: Monday)
    (7, 6 * DAY, 3 * DAY, 8.0, None): "7 times, every 6 days, last 3 days ago, usually around 08:00 UTC",
    (1, None, 3 * DAY, None, None): "once, 3 days ago",
    (1, None, DAY, 8.0, 2.5): "once, 1 day ago",
    (2, 6 * DAY, HOUR, None, None): "twice, 6 days apart, last 1 hour ago",
    (2, DAY, 30, None, None): "twice, 1 day apart, last a moment ago",
    (3, DAY, 30 * HOUR, 23.6, None): "3 times, every day, last 30 hours ago, usually around 00:00 UTC",
    (4, WEEK, WEEK, 7.5, 6.99): "4 times, every week, last 1 week ago, usually on Sundays around 08:00 UTC",
    (5, 10 * DAY, 14 * DAY, None, 0.0): "5 times, every 10 days, last 2 weeks ago, usually on Mondays (UTC)",
    (1234, MIN, 5 * MIN, None, None): "1,234 times, every minute, last 5 minutes ago",
    (3, 5, 90 * MIN, None, None): "3 times, seconds apart, last 90 minutes ago",
    (3, 0, 365 * DAY, None, None): "3 times, last 1 year ago",
    (3, None, 61 * DAY, None, None): "3 times, last 2 months ago",
    (3, 45 * DAY, 400 * DAY, None, None): "3 times, every 6 weeks, last 13 months ago",
    (6, 365.25 * DAY, 8 * 365.25 * DAY, None, None): "6 times, every year, last 8 years ago",
    (1, None, -3 * HOUR, None, None): "once, 3 hours ahead",
}  # fmt: skip
NOW = {  # count, since, at this hour, on this day
    (7, 3 * DAY, True, False): "7 times, last 3 days ago, usually at this hour",
    (7, 3 * DAY, False, True): "7 times, last 3 days ago, usually on this day of the week",
    (7, 3 * DAY, True, True): "7 times, last 3 days ago, usually on this day of the week and at this hour",
    (1, 0, False, False): "once, a moment ago",
    (1, None, False, False): "once",
    (2, 2 * HOUR, False, False): "twice, last 2 hours ago",
    (12, None, False, False): "12 times",
}  # fmt: skip


def test_habits_are_said_in_plain_english():
    assert {one: habit_kept(*one) for one in KEPT} == KEPT
    assert {one: habit_now(*one) for one in NOW} == NOW


@given(
    st.integers(1, 10**9), st.floats(0, 1e11), st.floats(-1e11, 1e11), st.floats(0, 24), st.floats(0, 7), st.booleans()
)
def test_habits_of_any_size_stay_short(count, gap, since, hour, day_of_week, now):
    told = habit_kept(count, gap, since, hour, day_of_week)
    assert len(told) <= 120
    assert not re.search(r"\b1 \w+s\b|\bevery 1 ", told)
    assert len(habit_now(count, since, now, now)) <= 100


def habitual(folder: Path, valkey_url: str, stack: ExitStack) -> str:
    """A service whose model looks at habits, and recommends again what was taken."""
    save_checkpoint(folder, random_checkpoint(habitual_config(exclude_seen=False)))
    memory = stack.enter_context(served(create_memory(MemorySettings(run=folder, redis_url=valkey_url))))
    return stack.enter_context(served(create_api(ApiSettings(run=folder, memory_url=memory))))


@pytest.fixture
def habitual_url(tmp_path, valkey_url, stack) -> str:
    return habitual(tmp_path, valkey_url, stack)


def habits_of_u(client: httpx2.Client) -> str:
    """A user takes i2 seven times at an hour, i3 twice, and i4 once; gives that hour, as it is said."""
    now = time.time()
    remember(client, *(("u", "i2", now - (3 + 6 * n) * DAY) for n in range(7)))
    remember(client, ("u", "i3", now - 16 * DAY), ("u", "i3", now - 2 * DAY), ("u", "i4", now - 26 * HOUR))
    return f"{math.floor(now / HOUR + 0.5) % 24:02}:00 UTC"


def test_habits_are_told_in_the_bank_and_where_they_speak_for_an_item(ask, habitual_url, stack):
    client = stack.enter_context(httpx2.Client(base_url=habitual_url))
    hour = habits_of_u(client)
    told = ask(habitual_url, "u", "--top-n", 30)
    assert (told.code, told.err, harmless(told.out)) == (0, "", True)
    assert section(told, "How often") == [
        f"i2: 7 times, every 6 days, last 3 days ago, usually around {hour}",
        "i3: twice, 2 weeks apart, last 2 days ago",
    ]
    answer = recommend(client, user_id="u", explain=True, top_n=30)
    own = [i["item_id"] for i in answer["items"] for one in i["because"] if one["item_id"] == i["item_id"]]
    said = " ".join(" ".join(section(told, "What is recommended")).split())
    phrases = {
        "i2": "7 times, last 3 days ago, usually at this hour",
        "i3": "twice, last 2 days ago",
        "i4": "once, 26 hours ago",
    }
    assert {"i2"} <= set(own) <= set(phrases)
    for item, phrase in phrases.items():
        assert said.count(phrase) == own.count(item)
    few = ask(habitual_url, "u", "--memories", 1)
    assert "and 1 memory taken less often, not shown (--memories)" in few.out
