"""`ramrec ingest` against the whole service: order, stopping and going on, waiting, and what is said about it."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from hypothesis import given
from hypothesis import strategies as st

from api.http.app import create_app as create_api
from api.jobs.backfill import backfill
from api.jobs.batches import BLOCK, LARGEST, batches, with_event_ids
from api.jobs.journal import JournalError, journal_file
from api.jobs.sender import BackfillError
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings
from model.config import DatasetConfig
from model.data.interactions import DatasetError
from model.data.streaming import LogLine
from tests.conftest import served

ROOT = Path(__file__).parents[3]
USERS, EVENTS, MANY = 12, 300, 2500
"""MANY: more than a record recognises again by itself."""


@pytest.fixture(autouse=True)
def _state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=api_url))


# ---------------------------------------------------------------------------------------- parcels


LINES = st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 50)), min_size=1, max_size=3000)


@given(LINES, st.booleans())
def test_parcels_hold_every_line_once_and_keep_each_users_order(drawn, timed):
    lines = [LogLine(f"u{u * u % 10}", f"i{n}", (t or 0) if timed else t) for n, (u, t) in enumerate(drawn)]
    before = [LogLine("u", "i", 0.0)] * 1000
    _, lines = with_event_ids([before, lines], "file")
    cut = batches(lines)
    assert sorted(row for one in cut for row in one.rows) == list(range(len(lines)))
    assert max(len(one.rows) for one in cut) <= LARGEST
    rows_of = defaultdict(list)
    for one in cut:
        assert one.users == {line.user_id for line in one.lines}
        for row in one.rows:
            rows_of[lines[row].user_id].append(row)
    for rows in rows_of.values():
        times = [lines[row].timestamp for row in rows]
        assert rows == (sorted(rows) if None in times else sorted(rows, key=lambda row: (lines[row].timestamp, row)))
    for row, line in enumerate(lines):
        assert line.event_id == (f"file:{1000 + row}" if line.timestamp is None else None)


def test_users_of_neighbouring_parcels_differ_where_they_can():
    lines = [LogLine(f"u{u}", f"i{n}") for u in range(40) for n in range(5 * BLOCK)]
    cut = batches(lines)
    shared = [bool(one.users & other.users) for one, other in pairwise(cut)]
    assert sum(shared) <= len(shared) / 4


# ------------------------------------------------------------------------------------- end to end


def items_of(u: int, count: int) -> list[str]:
    return [f"i{1 + (u * 7 + n * n) % 30}" for n in range(count)]


def log_of(folder: Path, kind: str, users: str, first: int = EVENTS) -> Path:
    """`first` events of one user and 300 of eleven others, with times (shuffled) or as sequences."""
    taken = {f"{users}{u}": items_of(u, EVENTS if u else first) for u in range(USERS)}
    file = folder / f"{users}.{kind}"
    if kind == "csv":
        rows = [f"{user},{item},{1_600_000_000 + n}" for user, items in taken.items() for n, item in enumerate(items)]
        random.Random(0).shuffle(rows)
        file.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    else:
        file.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in taken.items()))
    return file


def remembered(client: httpx2.Client, user: str, timed: bool) -> dict[str, object]:
    """All that is remembered about a user but the number of writes; untimed events differ in when they were sent."""
    memory = client.get(f"/users/{user}/memory").json()
    del memory["user_id"], memory["version"]
    if not timed:
        for entry in memory["log"] + memory["entries"] + memory["pruned_items"]:
            for name in ("timestamp", "first_time", "mean_gap_s", "usual_hour", "usual_day"):
                entry.pop(name, None)
        memory["pruned_items"].sort(key=lambda one: one["item_id"])  # the latest first
    return memory


class Gate:
    """A proxy before the api: lets through `open` requests for memories, then keeps the answers to itself."""

    def __init__(self, url: str) -> None:
        self.app, self.open, self.closed = FastAPI(lifespan=None), 1, threading.Event()
        self.answered: list[int] = []
        self.changed = threading.Condition()

        @self.app.post("/memories")
        async def memories(request: Request) -> Response:
            async with httpx2.AsyncClient(timeout=60) as client:
                answer = await client.post(f"{url}/memories", content=await request.body(), headers=JSON)
            with self.changed:
                self.answered.append(answer.status_code)
                self.changed.notify_all()
            if len(self.answered) > self.open:
                self.closed.set()
                while not await request.is_disconnected():
                    await asyncio.sleep(0.01)
            return Response(answer.content, answer.status_code, {"Retry-After": answer.headers.get("Retry-After", "")})


JSON = {"Content-Type": "application/json"}


def ingest(file: Path, url: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "api.cli", "ingest", "--file", str(file), "--url", url, *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("kind", "number"), [("csv", signal.SIGKILL), ("txt", signal.SIGKILL), ("txt", signal.SIGINT)])
def test_stopped_in_the_middle_nothing_is_lost_and_nothing_doubled(client, api_url, tmp_path, stack, kind, number):
    """Killed when one answer had arrived and others were kept but not acknowledged."""
    gate = Gate(api_url)
    gate_url = stack.enter_context(served(gate.app))
    killed = ingest(log_of(tmp_path, kind, "killed", MANY), gate_url)
    assert gate.closed.wait(60)
    killed.send_signal(number)
    _, said = killed.communicate(timeout=60)
    assert killed.returncode == (130 if number == signal.SIGINT else -number)
    assert ("goes on from there" in said) == (number == signal.SIGINT)
    gate.open = 10**9
    resumed = ingest(tmp_path / f"killed.{kind}", gate_url)
    out, err = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, err
    assert "acknowledged before" in out
    backfill(api_url, log_of(tmp_path, kind, "whole", MANY))
    for u in range(USERS):
        one = remembered(client, f"killed{u}", kind == "csv")
        assert one == remembered(client, f"whole{u}", kind == "csv")
        assert one["events"] == (EVENTS if u else MANY)
        assert [entry["item_id"] for entry in one["log"]] == items_of(u, one["events"])[-512:]


def test_sent_again_a_sequence_file_doubles_nothing(client, api_url, tmp_path):
    file = log_of(tmp_path, "txt", "u")
    first = backfill(api_url, file)
    assert (first.tally.accepted, first.before) == (3600, 0)
    second = backfill(api_url, file)
    assert (second.tally, second.before) == (first.tally, 3600)  # not sent
    third = backfill(api_url, file, again=True)
    assert (third.tally.accepted, third.tally.duplicates, third.before) == (0, 3600, 0)
    assert client.get("/users/u3/memory").json()["events"] == EVENTS


def test_another_service_is_sent_everything(memory_url, run, tmp_path, stack):
    """One journal a service."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"user_id": "u", "item_id": "i1"}\n')
    for accepted in (1, 0):
        url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url))))
        outcome = backfill(url, file)
        assert (outcome.before, outcome.tally.accepted, outcome.tally.duplicates) == (0, accepted, 1 - accepted)


def test_two_at_once_are_not_allowed():
    with (
        journal_file("a", "b"),
        journal_file("a", "c"),
        pytest.raises(JournalError, match="another process"),
        journal_file("a", "b"),
    ):
        pass


def test_a_damaged_journal_is_named_and_can_be_left(api_url, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"user_id": "u", "item_id": "i1", "timestamp": 1}\n')
    backfill(api_url, file)
    (journal,) = (tmp_path / "state").glob("ramrec/ingest/*.json")
    journal.write_text("{")
    with pytest.raises(JournalError, match=r"cannot be read .* --again"):
        backfill(api_url, file)
    assert backfill(api_url, file, again=True).tally.duplicates == 1


def test_nothing_is_sent_of_a_file_with_an_error_at_its_end(client, api_url, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"user_id": "u", "item_id": "i1"}\n' * 3000 + "{")
    with pytest.raises(DatasetError, match="line 3001"):
        backfill(api_url, file)
    assert client.get("/users/u/memory").status_code == 404


def test_columns_and_every_field_of_json_lines_arrive(client, api_url, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("who,what,when,stars\nu,i1,2020-01-01,4\nu,i2,2020-01-02,\n")
    names = {"user_column": "who", "item_column": "what", "time_column": "when", "rating_column": "stars"}
    assert backfill(api_url, file, DatasetConfig(**names)).tally.accepted == 2
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"user_id": "u", "item_id": "i3", "event_id": "e"}\n' * 2)
    assert backfill(api_url, lines).tally.duplicates == 1
    memory = client.get("/users/u/memory").json()
    assert [(one["item_id"], one["rating"]) for one in memory["entries"]] == [("i1", 4), ("i2", None), ("i3", None)]


def test_rejections_are_counted_and_the_first_are_told(api_url, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"user_id": "u{n}", "item_id": "i1", "timestamp": {-n}}}\n' for n in range(9)))
    sent = ingest(file, api_url)
    out, err = sent.communicate(timeout=60)
    assert out.splitlines()[-1] == "accepted 1, duplicates 0, rejected 8"
    assert err.count("rejected: timestamp_negative: ") == 5
    assert "(user u1, item i1)" in err


# ------------------------------------------------------------------------------------ a service in trouble


def test_a_service_that_is_away_is_waited_for(valkey_url, run, tmp_path, stack: ExitStack):
    file = tmp_path / "a.jsonl"
    file.write_text('{"user_id": "u", "item_id": "i1"}\n')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=f"http://127.0.0.1:{port}"))))
    gate = Gate(api)
    gate.open = 10**9
    sent = ingest(file, stack.enter_context(served(gate.app)))
    with gate.changed:
        assert gate.changed.wait_for(lambda: gate.answered == [503], 60)
    stack.enter_context(served(create_memory(MemorySettings(run=run, redis_url=valkey_url)), port))
    out, err = sent.communicate(timeout=60)
    assert "accepted 1" in out, err


def test_impatience_names_what_the_service_said(run, tmp_path, stack):
    file = tmp_path / "a.jsonl"
    file.write_text('{"user_id": "u", "item_id": "i1"}\n')
    url = stack.enter_context(served(create_api(ApiSettings(run=run, memory_url="http://127.0.0.1:9"))))
    with pytest.raises(BackfillError, match=r"took nothing for 0 s, at last 503: memory service: Cannot connect"):
        backfill(url, file, patience_s=0)
    with pytest.raises(BackfillError, match=r"cannot reach http://127\.0\.0\.1:9/memories"):
        backfill("http://127.0.0.1:9/", file)


@pytest.mark.parametrize(("status", "body"), [(500, "see the log"), (403, json.dumps({"detail": "not yours"}))])
def test_a_refusal_is_reported_with_what_was_said(tmp_path, stack, status, body):
    app = FastAPI()

    @app.post("/memories")
    async def refuse(request: Request) -> Response:
        seen.append(request.headers["Authorization"])
        return Response(body, status)

    seen: list[str] = []
    file = tmp_path / "a.jsonl"
    file.write_text('{"user_id": "u", "item_id": "i1"}\n')
    with pytest.raises(BackfillError, match=f"answered {status}: (see the log|not yours)$"):
        backfill(stack.enter_context(served(app)), file, key="secret")
    assert seen == ["Bearer secret"]


def test_no_home_for_the_journal_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(JournalError, match="set XDG_STATE_HOME"), journal_file("x"):
        pass
    assert os.environ["XDG_STATE_HOME"]


def test_a_large_request_is_encoded_in_portions_between_which_others_come_first(client):
    """1000 events of 50 users: 11 windows of 8 items each."""
    events = [{"user_id": f"u{n % 50}", "item_id": f"i{1 + n % 30}"} for n in range(1000)]
    assert client.post("/memories", json={"interactions": events}).json()["accepted"] == 1000
    assert 'ramrec_api_seconds_count{stage="encode"} 3.0' in client.get("/metrics").text
