"""Ids, titles and figures of any kind are safe to print and short."""

import doctest
import json
import math
import re
import unicodedata
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from api.commands.inspect import client as inspect_client
from api.commands.inspect import text as inspect_text
from api.commands.inspect import widgets
from api.commands.inspect.client import QUERY_LIMIT, InspectClient, encoded, queries
from api.commands.inspect.text import JOINERS, LONGEST, change, day, percent, plain
from api.commands.inspect.widgets import bar, stacked
from tests.api.commands.inspect.output import harmless
from tests.api.recommend.test_explain import took

HOSTILE = (
    "[red]x[/red] \x1b[31m\x1b]0;t\x07\x9b2J\r\n\t\u202e\u2066\u200f\ufeff\u2028[link=http://e]y \ud7ff" + "z" * 10_000
)


@pytest.mark.parametrize(
    "user", ["a/b", "a b", "ü%41?x=1&y#z", "..", ".", "-x", "a//b/memory", "日本/語", "line\nend", "+"]
)
def test_ids_of_all_kinds_are_asked_for_as_they_are(ask, api_url, client, user):
    took(client, user, "i1", user)
    told = ask(api_url, "--json", "--", user) if user[0] == "-" else ask(api_url, user, "--json", "--ignore", user)
    found = json.loads(told.out)
    assert (told.code, found["memory"]["user_id"], found["memory"]["bank_size"]) == (0, user, 2)
    assert user[0] == "-" or found["recommendations"]["memory"]["bank_size"] == 1


def test_hostile_titles_and_ids_do_no_harm(ask, api_url, client):
    ids = [
        "[bold]i[/bold]",
        "\x1b[2J\x1b[31mid",
        "\u202eid\n\nid",
        "x" * 250,
        "界" * 80,
        "e" + "\u0301" * 100,
        ":smile:",
    ]
    for one in ids:
        assert client.put(f"/items/{encoded(one)}", json={"metadata": {"title": HOSTILE}}).status_code == 200
    client.put("/items/i2", json={"metadata": {"title": "[red]i2[/red]"}})
    client.put("/items/i3", json={"metadata": {"title": "\x1b\u202e"}})
    for user in ("u[red]\x1b]0;x\x07", "v", "w"):
        took(client, user, *ids, "i2", "i3")
    told = ask(
        api_url, "u[red]\x1b]0;x\x07", "--ignore", ids[1], "--ignore", "\x1b[1mno", "--top-n", 30, "--memories", 99
    )
    assert (told.code, told.err) == (0, "")
    assert harmless(told.out)
    for seen in ("User u[red]�]0;x�", "[red]x[/red] �[31m", "[bold]i[/", "[red]i2[/red]", "�[1mno"):
        assert seen in told.out
    assert "zzzzz" * 30 not in told.out


@given(st.text(max_size=600), st.integers(2, 200))
def test_plain_text_is_one_harmless_line_of_bounded_length(text, most):
    shown = plain(text, most)
    assert len(shown) <= most
    assert "\n" not in shown
    assert all(c in JOINERS or unicodedata.category(c)[0] != "C" for c in shown)
    assert not re.search(r"[\u0300-\u036f]{4}", shown)
    assert plain(shown, most) == shown


def test_plain_text_of_honest_kinds_stays_as_it_is():
    for text in ("Amélie", "می‌روم", "七人の侍", "Ελλάδα", "M*A*S*H [1970]", "שלום", "ไม่รู้", "👍", "Việt Nam"):
        assert plain(text) == unicodedata.normalize("NFC", text)
    assert plain("x" * 10_000) == "x" * (LONGEST - 1) + "…"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_figures_of_any_size_stay_short(number):
    assert len(day(number)) <= 10
    assert len(percent(abs(math.tanh(number)))) <= 9
    assert len(change(math.expm1(min(number, 700)))) <= 12
    assert cell_len(bar(number, 10)) <= 10
    assert cell_len(stacked({"a": number, "b": 0.4}, {"a": "x", "b": "y"}, {"a": "", "b": ""}, 10).plain) <= 10


def test_what_the_docstrings_promise():
    for module in (inspect_client, inspect_text, widgets):
        outcome = doctest.testmod(module)
        assert (outcome.failed, outcome.attempted > 0) == (0, True)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80), max_size=500))
def test_look_ups_name_every_item_once_in_lines_of_bounded_length(ids):
    found = [[value for _, value in parse_qsl(query, strict_parsing=True)] for query in queries(ids)]
    assert [one for some in found for one in some] == list(dict.fromkeys(ids))
    assert all(len(some) <= 200 for some in found)
    assert all(len(query) <= QUERY_LIMIT for query in queries(ids))


def test_titles_of_many_items_with_long_ids_are_found(client, api_url):
    ids = [f"{n:03}{'界' * 80}" for n in range(60)]
    took(client, "u", *ids)
    client.put(f"/items/{encoded(ids[59])}", json={"metadata": {"title": "The last"}})
    titles = InspectClient(api_url, None).titles(ids)
    assert (len(titles), titles[ids[59]]) == (60, "The last")
