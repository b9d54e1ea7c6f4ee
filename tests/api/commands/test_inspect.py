"""`ramrec inspect` against the whole service: what it says is what the api says, whatever ids and titles hold."""

import doctest
import json
import math
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from api import cli
from api.access.keys import create_key
from api.commands import drawing, inspect
from api.commands.drawing import (
    JOINERS,
    LONGEST,
    bar,
    change,
    day,
    habit_kept,
    habit_now,
    percent,
    plain,
    stacked,
)
from api.commands.portrait import shares
from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.checkpoint import save_checkpoint
from tests.api.http.test_api import recommend, remember, scores
from tests.api.recommend.test_explain import took
from tests.conftest import served
from tests.memory_service.service.test_degraded import Valkey
from tests.synthetic import habitual_config, random_checkpoint
from tests.system.test_imports import ROOT

HOSTILE = (
    "[red]x[/red] \x1b[31m\x1b]0;t\x07\x9b2J\r\n\t\u202e\u2066\u200f\ufeff\u2028[link=http://e]y \ud7ff" + "z" * 10_000
)


class Told(NamedTuple):
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=api_url))


@pytest.fixture
def ask(monkeypatch, capsys) -> Iterator[Callable[..., Told]]:
    """The command, as its entry point runs it."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "RAMREC_KEY"):
        monkeypatch.delenv(name, raising=False)

    def run(url: str, *words: object) -> Told:
        monkeypatch.setattr(sys, "argv", ["ramrec", "inspect", "--url", url, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Told(int(ended.value.code or 0), *capsys.readouterr())

    return run


def harmless(text: str) -> bool:
    """Nothing that steers a terminal, and no line longer than it is wide."""
    lines = text.split("\n")
    steering = [c for line in lines for c in line if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    return not steering and max(map(cell_len, lines)) <= 80


def section(told: Told, title: str) -> list[str]:
    """The lines of one section."""
    lines = told.out.split("\n")
    first = next(n for n, line in enumerate(lines) if line.startswith(title))
    rest = lines[first + 1 :]
    return rest[: rest.index("")] if "" in rest else rest


# -------------------------------------------------------------------------------------- what is told


def test_everything_is_told_and_is_what_the_api_says(ask, api_url, client):
    took(client, "v", "i1", "i2", "i6", "i20")
    took(client, "w", "i1", "i2", "i6", "i7", "i20")
    for n in range(25):
        remember(client, ("u", f"i{n % 23 + 1}", 1.6e9 + 86400 * n))
    bank = client.get("/users/u/memory").json()
    told = ask(api_url, "u", "--memories", 4)
    assert (told.code, told.err, harmless(told.out)) == (0, "", True)

    head = section(told, "User u")[0]
    assert (
        head == f"10 of 10 memories · 25 events · {bank['pruned']} pruned · version 25 · model {bank['model_version']}"
    )

    taste = section(told, "How diverse")
    assert taste[0].startswith(f"Entropy {bank['entropy']:.2f} ")
    listed = [line.split()[0] for line in taste if "%" in line]
    assert listed == sorted(bank["clusters"], key=lambda one: -bank["clusters"][one])

    own, others = (line for line in section(told, "How many") if " = " in line)
    assert own.endswith(f" {bank['adaptive_k']['own']['k']}")
    assert others.endswith(f" {bank['adaptive_k']['collective']['k']}")

    best = sorted(bank["entries"], key=lambda one: (-one["quality"], -one["timestamp"]))[:4]
    rows = [line for line in section(told, "The memories") if re.search(r"\d{4}-\d\d-\d\d", line)]
    titles = {"i1": "One"}
    for entry, row in zip(best, rows, strict=True):
        assert titles.get(entry["item_id"], entry["item_id"]) in row.split()
        assert f"{entry['quality']:.2f}" in row
        figures = [f"{part:.2f}"[1:] for part in entry["quality_parts"].values()]
        assert " ".join(figures) in " ".join(row.split())
    assert "and 6 memories of lower quality, not shown (--memories)" in told.out

    gone = [line for line in section(told, "What was forgotten") if re.search(r"\d{4}-\d\d-\d\d", line)]
    assert [row.split()[0] for row in gone] == [
        titles.get(one["item_id"], one["item_id"]) for one in bank["pruned_items"][:4]
    ]
    lowest = min(entry["quality"] for entry in bank["entries"])
    for one, row in zip(bank["pruned_items"], gone, strict=False):
        threshold = bank["threshold"]
        verdict = "weakest" if one["quality"] < lowest else "too weak" if one["quality"] < threshold else "would stay"
        assert row.rstrip().endswith(verdict)

    answer = recommend(client, user_id="u", top_n=5, explain=True)
    lines = section(told, "What is recommended")
    assert lines[0] == "Answered from memory."
    ranked = [line for line in lines if re.match(r"\d ", line)]
    assert [row.split()[1] for row in ranked] == [titles.get(i["item_id"], i["item_id"]) for i in answer["items"]]
    said = [line.split()[:2] for line in lines if re.match(r"    (own|others) ", line)]
    whose = {"own": "own", "collective": "others"}
    assert said == [
        [whose[reason["scope"]], titles.get(reason["item_id"], reason["item_id"])]
        for item in answer["items"]
        for reason in item["because"]
    ]
    assert {scope for scope, _ in said} == {"own", "others"}
    assert f"(gate): {percent(answer['memory']['gate'])}" in " ".join(lines)


@pytest.mark.parametrize("events", [1, 2, 5, 9, 10, 17])
def test_how_k_was_reached_adds_up(ask, api_url, client, events):
    took(client, "u", *(f"i{n * 7 % 30 + 1}" for n in range(events)))
    bank = client.get("/users/u/memory").json()
    lines = [line for line in section(ask(api_url, "u"), "How many") if " = " in line]
    for line, how in zip(lines, (bank["adaptive_k"]["own"], bank["adaptive_k"]["collective"]), strict=True):
        asked, wanted = re.search(r"= ([\d.]+) +(\d+) ", line).groups()
        assert float(asked) == pytest.approx(how["base"] * (0.5 + bank["entropy"]) * how["growth"], abs=0.006)
        assert int(wanted) == math.floor(how["base"] * (0.5 + bank["entropy"]) * how["growth"] + 0.5)
        most = min(how["k_max"], bank["bank_size"]) if line.startswith("own") else how["k_max"]
        assert min(max(int(wanted), how["k_min"]), most) == how["k"] == int(line.split()[-1])
    assert ("Too few memories to tell" in " ".join(section(ask(api_url, "u"), "How diverse"))) == (events == 1)


def test_shares_are_those_of_the_formula_and_add_up(client):
    for user, items in {"u": "i1 i2 i3 new i5", "v": "i1 i2 new i6", "w": "i1 i2 new i6 i7"}.items():
        took(client, user, *items.split())
    answer = recommend(client, user_id="u", explain=True, exclude_seen=False, top_n=35)
    memory = answer["memory"]
    copied_only = 0
    for item in answer["items"]:
        split, parts = shares(item), item["parts"]
        assert sum(split.values()) == pytest.approx(1, abs=1e-4)
        if parts["state"] is None:
            copied_only += 1
            continue
        alone = math.exp(parts["state"] + parts["calibration"] - memory["log_z"]) * (1 - memory["copying"])
        assert split["state"] == pytest.approx(alone / math.exp(item["score"]), rel=1e-3, abs=1e-6)  # float32 of 1
    assert copied_only == 1


def test_what_if_shows_every_move_against_the_usual_list(ask, api_url, client):
    took(client, "v", "i1", "i2", "i6", "i20")
    took(client, "w", "i1", "i2", "i6", "i7", "i20")
    took(client, "u", "i1", "i2", "i3", "i4", "i9")
    for words, body in (
        (("--scope", "own"), {"scopes": ["own"]}),
        (("--ignore", "i9", "--ignore", "i3", "--k", 1), {"ignore_memories": ["i9", "i3"], "k": 1}),
    ):
        asked, usual = (
            [item["item_id"] for item in recommend(client, user_id="u", explain=True, top_n=9, **more)["items"]]
            for more in (body, {})
        )
        assert asked != usual
        told = ask(api_url, "u", "--top-n", 9, *words)
        lines = section(told, "What if?")
        expected = []
        for rank, item in enumerate(asked, start=1):
            by = usual.index(item) + 1 - rank if item in usual else None
            expected.append(
                [str(rank), *("new" if by is None else "=" if not by else f"{'▲▼'[by < 0]} {abs(by)}").split(), item]
            )
        shown = [line.split() for line in lines if re.match(r"\d ", line)]
        assert [row[: len(wanted)] for row, wanted in zip(shown, expected, strict=True)] == expected
        gone = [f"{item} (was {rank})" for rank, item in enumerate(usual, start=1) if item not in asked]
        words = " ".join(line.strip() for line in lines)
        assert not gone or f"No longer in the list: {', '.join(gone)}" in words
        assert harmless(told.out)


def test_items_that_cannot_be_ignored_are_named(ask, api_url, client):
    took(client, "u", "i1", "i2")
    told = ask(api_url, "u", "--ignore", "i1", "--ignore", "i7")
    assert "nothing to ignore: i7." in told.out
    assert "as if never taken: One, i7." in told.out


def test_json_holds_the_raw_answers_and_nothing_else(ask, api_url, client):
    took(client, "u", "i1", "i2", "\u202ei3")

    told = ask(api_url, "u", "--json", "--top-n", 3, "--scope", "own")
    found = json.loads(told.out)
    assert told.out.isascii()
    assert list(found) == ["user_id", "memory", "recommendations", "usual"]
    assert found["memory"] == client.get("/users/u/memory").json()
    body = {"user_id": "u", "top_n": 3, "explain": True}
    for answer, more in ((found["recommendations"], {"scopes": ["own"]}), (found["usual"], {})):
        alone = recommend(client, **body, **more)
        assert scores(answer) == pytest.approx(scores(alone), abs=1e-4)
        assert {name: answer["memory"][name] for name in ("own", "collective")} == {
            name: alone["memory"][name] for name in ("own", "collective")
        }
        assert answer.keys() == alone.keys()
    assert list(json.loads(ask(api_url, "u", "--json").out)) == ["user_id", "memory", "recommendations"]
    stranger = ask(api_url, "nobody", "--json")
    assert (stranger.code, json.loads(stranger.out)["memory"]) == (1, None)


def test_looking_counts_as_no_use_of_a_memory(ask, api_url, client):
    took(client, "u", "i1", "i2", "i3")
    before = client.get("/users/u/memory").json()
    ask(api_url, "u", "--k", 2)
    assert client.get("/users/u/memory").json() == before
    remember(client, ("u", "i4"))
    assert {entry["access"] for entry in client.get("/users/u/memory").json()["entries"]} == {0}


# ------------------------------------------------------------------------------------------- habits

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


def test_a_service_before_habits_is_shown_as_ever(ask, api_url, client, stack):
    """Its answers say nothing of habits."""
    remember(client, ("u", "i1", 1.6e9), ("u", "i1", 1.6e9 + DAY), ("u", "i2", 1.6e9 + 2 * DAY))
    bank, answer = client.get("/users/u/memory").json(), recommend(client, user_id="u", explain=True)
    for entry in bank["entries"]:
        for name in ("first_time", "mean_gap_s", "occasions_since", "usual_hour", "usual_day"):
            del entry[name]
    app = FastAPI()
    app.get("/users/u/memory")(lambda: bank)
    app.post("/recommend/batch")(lambda: {"results": [answer]})
    app.get("/items")(lambda: {"items": []})
    told = ask(stack.enter_context(served(app)), "u")
    assert (told.code, told.err, "How often" in told.out) == (0, "", False)
    assert "2020-09-14" in told.out


# ------------------------------------------------------------------------------------- who and what


def test_an_unknown_user_is_told_of_and_gets_what_a_newcomer_gets(ask, api_url):
    told = ask(api_url, "nobody\x1b[2J", "--top-n", 3)
    assert (told.code, told.err) == (1, "ramrec: nothing is known about user nobody�[2J\n")
    assert [row.split()[1] for row in section(told, "What is recommended") if re.match(r"\d ", row)] == [
        "One",
        "i2",
        "i3",
    ]
    assert harmless(told.out)


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
        assert client.put(f"/items/{inspect.encoded(one)}", json={"metadata": {"title": HOSTILE}}).status_code == 200
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
    for module in (inspect, drawing):
        outcome = doctest.testmod(module)
        assert (outcome.failed, outcome.attempted > 0) == (0, True)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=80), max_size=500))
def test_look_ups_name_every_item_once_in_lines_of_bounded_length(ids):
    found = [[value for _, value in parse_qsl(query, strict_parsing=True)] for query in inspect.queries(ids)]
    assert [one for some in found for one in some] == list(dict.fromkeys(ids))
    assert all(len(some) <= 200 for some in found)
    assert all(len(query) <= inspect.QUERY_LIMIT for query in inspect.queries(ids))


def test_titles_of_many_items_with_long_ids_are_found(client, api_url):
    ids = [f"{n:03}{'界' * 80}" for n in range(60)]
    took(client, "u", *ids)
    client.put(f"/items/{inspect.encoded(ids[59])}", json={"metadata": {"title": "The last"}})
    titles = inspect.Service(api_url, None).titles(ids)
    assert (len(titles), titles[ids[59]]) == (60, "The last")


# --------------------------------------------------------------------------------- piped, and in colour


def test_piped_it_has_no_colour_and_where_characters_are_missing_it_still_prints(api_url, client):
    took(client, "u", "i1", "i2", "i3")

    def piped(**more: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "api.cli", "inspect", "u", "--url", api_url]
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
        return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False, env=environment | more)

    told = piped(PYTHONIOENCODING="utf-8")
    assert (told.returncode, told.stderr) == (0, b"")
    assert harmless(told.stdout.decode())
    poor = piped(PYTHONIOENCODING="ascii")
    assert (poor.returncode, poor.stdout.isascii(), poor.stderr) == (0, True, b"")
    assert b"\x1b[" in piped(FORCE_COLOR="1", TERM="xterm-256color", PYTHONIOENCODING="utf-8").stdout


# ----------------------------------------------------------------------------------- what goes wrong


def test_keys_need_both_scopes_and_each_refusal_is_one_line(ask, run, memory_url, stack, tmp_path, monkeypatch):
    keys = tmp_path / "keys.json"
    both, one, other = (
        create_key(keys, name, scopes, None)
        for name, scopes in (("both", ("admin", "recommend")), ("one", ("recommend",)), ("other", ("admin",)))
    )
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url, keys=keys))))
    for key, wrong in ((one, "scope admin"), (other, "scope recommend"), ("wrong", "not known"), (None, "is wanted")):
        told = ask(url, "u", *(("--key", key) if key else ()))
        assert (told.code, told.out, told.err.count("\n")) == (2, "", 1)
        assert wrong in told.err
        assert not key or key not in told.err
    assert ask(url, "u", "--key", both).code == 1
    monkeypatch.setenv("RAMREC_KEY", both)
    assert ask(url, "u").code == 1
    told = ask(url, "u", "--key", "sécret\n")
    assert (told.code, told.err) == (2, "ramrec: the API key holds characters that no key has\n")


def test_what_is_no_api_is_said_in_one_line(ask, stack):
    app, sent = FastAPI(), []

    @app.api_route("/{kind}/{rest:path}", methods=["GET", "POST"])
    def answer(kind: str, request: Request) -> Response:
        sent.append(dict(request.headers))
        if kind == "away":
            return RedirectResponse(str(request.base_url) + "html/x")
        bodies = {
            "html": "<html>",
            "list": "[]",
            "nan": '{"a": NaN}',
            "deep": "[" * 100_000,
            "not-utf-8": b"\xff",
            "none": "",
        }
        return Response(bodies.get(kind, "<p>\x1b[2J\n" * 9999), 418 if kind == "tea" else 200)

    url = stack.enter_context(served(app))
    for kind, says in {
        "html": "no JSON", "nan": "no JSON", "deep": "no JSON", "not-utf-8": "no JSON", "none": "no JSON",
        "list": "not understood", "tea": "answered 418", "away": "answered 307",
    }.items():  # fmt: skip
        told = ask(f"{url}/{kind}", "u", "--key", "secret")
        assert (told.code, told.out, told.err.count("\n"), "RAMRec api" in told.err) == (2, "", 1, True), kind
        assert says in told.err, kind
        assert harmless(told.err.replace(url, "")[:80])
    assert all(headers["authorization"] == "Bearer secret" for headers in sent)
    assert len(sent) == 9  # none was redirected; a list is no bank, and is found out once all has been asked


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "ftp://x", "x", "http://", "http://[::1", "http://a..b", "http://a b"]
)
def test_an_api_that_cannot_be_reached_is_said_in_one_line(ask, url):
    told = ask(url, "u")
    assert (told.code, told.out, told.err.count("\n")) == (2, "", 1)
    assert told.err.startswith(("ramrec: cannot reach ", "ramrec: x is no URL", "ramrec: ftp://x is no URL"))


def test_ids_that_are_no_text_are_refused(ask, api_url):
    for words in (["\udcff"], ["u", "--ignore", "\udcff"]):
        told = ask(api_url, *words)
        assert (told.code, told.out, told.err) == (2, "", "ramrec: the id � is not valid Unicode\n")
    told = ask(api_url, "")
    assert (told.code, told.out, told.err.count("\n"), "422" in told.err) == (2, "", 1, True)


def test_while_the_bank_cannot_be_read_the_list_is_shown_and_called_degraded(ask, run, tmp_path, stack):
    valkey = Valkey(tmp_path)
    stack.callback(valkey.server.terminate)
    settings = MemorySettings(run=run, redis_url=valkey.url, redis_timeout_s=0.2)
    memory_url = stack.enter_context(served(create_memory(settings)))
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url))))
    client = stack.enter_context(httpx2.Client(base_url=url))
    took(client, "u", "i1", "i2", "i3")
    assert ask(url, "u").code == 0
    with valkey.out_of_reach("killed"):
        told = ask(url, "u")
        assert (told.code, told.err.count("\n"), "503" in told.err) == (2, 1, True)
        assert "!! The bank cannot be read now." in told.out
        assert "!! DEGRADED" in told.out
        assert len([row for row in told.out.split("\n") if re.match(r"\d ", row)]) == 5
        assert json.loads(ask(url, "u", "--json").out)["recommendations"]["memory"]["degraded"] is True
