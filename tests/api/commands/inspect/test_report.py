"""What `ramrec inspect` prints is what the api answers."""

import json
import math
import os
import re
import subprocess
import sys

import pytest

from api.commands.inspect.recommendations import shares
from api.commands.inspect.text import percent
from tests.api.calls import recommend, remember, scores
from tests.api.commands.inspect.output import harmless, section
from tests.api.recommend.test_explain import took
from tests.system.test_imports import ROOT


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


def test_an_unknown_user_is_told_of_and_gets_what_a_newcomer_gets(ask, api_url):
    told = ask(api_url, "nobody\x1b[2J", "--top-n", 3)
    assert (told.code, told.err) == (1, "ramrec: nothing is known about user nobody�[2J\n")
    assert [row.split()[1] for row in section(told, "What is recommended") if re.match(r"\d ", row)] == [
        "One",
        "i2",
        "i3",
    ]
    assert harmless(told.out)


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
