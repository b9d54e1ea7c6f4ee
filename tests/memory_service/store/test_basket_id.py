"""Interactions of one basket happen at the same time: in logs, online, in records, and when a file of them is sent."""

import csv
import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.jobs.backfill import backfill
from api.jobs.batches import batches
from memory_service.protocol.plans import event_of
from memory_service.protocol.structs import EventIn
from memory_service.store.record import pack_record, unpack_record
from model.checkpoint import load_checkpoint
from model.config import DatasetConfig, RulesConfig
from model.data.dataset import Dataset, last_basket, read_dataset
from model.data.interactions import DatasetError
from model.data.reading import read_interactions
from model.data.streaming import LogLine, portions
from model.memory.changes import Change, apply, rekey, without
from model.memory.events import Event, basket_identity, event_identity, plan
from model.memory.record import UserRecord
from model.memory.rules import unit
from tests.memory_service.calling import NOW, Caller, opened, took

ALL = DatasetConfig(core=1)
RULES = RulesConfig(capacity=5, k_max=5, k_base=5, clusters=4, similarity_threshold=-1.0)
DIM = 4
Row = tuple[str, str, float, str]
"""User, item, time and basket."""
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["u", "v"]),
        st.sampled_from(["i1", "i2", "i3", "i4"]),
        st.integers(0, 20).map(float),
        st.sampled_from(["", "a", "b", "c"]),
    ),
    min_size=1,
    max_size=30,
)


def written(file: Path, rows: list[Row]) -> Path:
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([("user_id", "item_id", "timestamp", "basket_id"), *rows])
    return file


def at_once(rows: list[Row]) -> list[Row]:
    """The same log in order of time, with baskets expressed by equal times only."""
    times = {}
    for user, _, time, basket in rows:
        times.setdefault((user, basket), []).append(time)
    ordered = sorted(rows, key=lambda row: row[2])
    return [(user, item, min(times[user, basket]) if basket else time, "") for user, item, time, basket in ordered]


def assert_same(one: Dataset, other: Dataset) -> None:
    """Check that two datasets hold the same events, whatever the numbers of users and items."""
    events = [
        {
            user: [(data.item_ids[i - 1], t) for i, t in zip(data.items[at], data.times[at], strict=True)]
            for n, user in enumerate(data.user_ids)
            for at in [data.sequence(n)]
        }
        for data in (one, other)
    ]
    assert events[0] == events[1]


# ------------------------------------------------------------------------------------------------- logs


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, core=st.integers(1, 2))
def test_baskets_of_a_log_are_equal_times(tmp_path_factory, rows, core):
    """Events that the filter removes count, too, for the time of a basket."""
    folder, config = tmp_path_factory.mktemp("logs"), DatasetConfig(core=core)
    file, plain = written(folder / "a.csv", rows), written(folder / "b.csv", at_once(rows))
    try:
        wanted = read_dataset(plain, config)
    except DatasetError:
        with pytest.raises(DatasetError, match="empty after filtering"):
            read_dataset(file, config)
    else:
        assert_same(read_dataset(file, config), wanted)


def test_without_times_a_basket_has_the_position_of_its_first_event(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("user_id,item_id,basket_id\nu,i1,a\nu,i2,b\nv,i1,a\nu,i3,a\nu,i4,\nu,i5, \nu,i6,b\n")
    dataset = read_dataset(file, ALL)
    names = np.array(("", *dataset.item_ids))[dataset.items]
    assert names.tolist() == ["i1", "i3", "i2", "i6", "i4", "i5", "i1"]
    assert dataset.times.tolist() == [0, 0, 2, 2, 4, 5, 0]
    assert not dataset.has_times
    assert last_basket(dataset).test_end.tolist() == [6, -1]
    assert dataset.opens().tolist() == [True, False, True, False, True, True, True]


def test_the_same_basket_id_of_two_users_means_two_baskets(tmp_path):
    rows = [("u", "i1", 5.0, "a"), ("v", "i1", 1.0, "a"), ("u", "i2", 9.0, "a"), ("v", "i2", 2.0, "a")]
    dataset = read_dataset(written(tmp_path / "a.csv", rows), ALL)
    assert dataset.times.tolist() == [5, 5, 1, 1]


@pytest.mark.parametrize("kind", ["inter", "parquet"])
def test_baskets_of_other_files(tmp_path, kind):
    """Ids may be numbers, and an empty field means no basket."""
    file = tmp_path / f"a.{kind}"
    if kind == "inter":
        file.write_text(
            "user_id:token\titem_id:token\torder:token\ttimestamp:float\nu\ti1\t7\t3\nu\ti2\t\t4\nu\ti3\t7\t5\n"
        )
    else:
        columns = {"user_id": ["u"] * 3, "item_id": ["i1", "i2", "i3"], "order": [7, None, 7], "timestamp": [3, 4, 5]}
        pq.write_table(pa.table(columns), file)
    config = DatasetConfig(core=1, basket_column="order")
    log = read_interactions(file, config)
    assert (log.basket.tolist(), log.time.tolist()) == ([0, -1, 0], [3, 4, 5])
    assert read_dataset(file, config).times.tolist() == [3, 3, 4]
    assert read_interactions(file).basket is None
    assert [line.basket_id for one in portions(file, config) for line in one] == ["7", None, "7"]


@pytest.mark.parametrize(("basket", "what"), [("b" * 257, "id of 257 bytes"), ("b\0", "an id cannot contain NUL")])
def test_an_invalid_basket_id_is_reported_with_its_place(tmp_path, basket, what):
    file = written(tmp_path / "a.csv", [("u", "i", 1.0, ""), ("u", "i", 1.0, basket)])
    with pytest.raises(DatasetError, match=f"line 3, column 'basket_id': {what}"):
        read_dataset(file, ALL)
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"user_id": "u", "item_id": "i", "basket_id": basket}))
    with pytest.raises(DatasetError, match=f"line 1, column 'basket_id': {what}"):
        list(portions(lines))


def test_a_basket_column_that_the_config_names_must_be_there(tmp_path):
    file = written(tmp_path / "a.csv", [("u", "i", 1.0, "")])
    with pytest.raises(DatasetError, match="column 'order' is missing"):
        read_dataset(file, DatasetConfig(core=1, basket_column="order"))


def test_json_lines_may_name_baskets(tmp_path):
    file = tmp_path / "a.jsonl"
    event = {"user_id": "u", "item_id": "i"}
    file.write_text("\n".join(json.dumps(event | more) for more in ({"basket_id": "b"}, {"basket_id": " "}, {})))
    assert [line.basket_id for one in portions(file) for line in one] == ["b", None, None]


def test_batches_keep_baskets_together():
    """In the order of their first events; without times, in the order of the file."""
    drawn = [(5, "a"), (1, "b"), (6, None), (9, "a"), (3, "b"), (7, "b"), (2, None)]
    timed = [LogLine("u", f"i{n}", float(time), basket_id=basket) for n, (time, basket) in enumerate(drawn)]
    untimed = [LogLine("u", f"i{n}", basket_id=basket) for n, (_, basket) in enumerate(drawn)]
    assert [batch.rows for batch in batches(timed)] == [[1, 4, 5, 6, 0, 3, 2]]
    assert [batch.rows for batch in batches(untimed)] == [[0, 3, 1, 4, 5, 2, 6]]


# ---------------------------------------------------------------------------------------------- records


def key(n: int) -> np.ndarray:
    return unit(np.random.default_rng(n).normal(size=DIM))


def remember(record: UserRecord, *events: Event) -> UserRecord:
    """Apply events with keys that are a function of the position, in place of an encoder."""
    planned = plan(record, events)
    keys = np.array([key(1000 + position) for position in planned.job.positions]).reshape(-1, DIM)
    return apply([Change(record, planned, keys, key(0), np.zeros(len(keys), int))])[0]


def log_of(record: UserRecord) -> list[tuple[int, float]]:
    return list(zip(record.log_item.tolist(), record.log_time.tolist(), strict=True))


@pytest.fixture
def new() -> UserRecord:
    return UserRecord.new(DIM, RULES)


def test_events_of_a_basket_have_the_time_of_its_first_event(new):
    record = remember(new, Event(0, 1, 30.0, basket=5), Event(1, 2, 20.0), Event(2, 3, 10.0, basket=5))
    assert log_of(record) == [(3, 10.0), (1, 10.0), (2, 20.0)]
    assert record.banks.occasions.tolist() == [2]
    assert record.basket == 0


def test_an_open_basket_goes_on_in_later_calls(new):
    record = remember(new, Event(0, 1, 10.0, basket=5))
    record = remember(record, Event(0, 2, 17.0, basket=5), Event(1, 3, 25.0, timed=False, basket=5))
    assert log_of(record) == [(1, 10.0), (2, 10.0), (3, 10.0)]
    assert (record.basket, record.banks.occasions.tolist()) == (5, [1])
    record = remember(record, Event(0, 4, 5.0, basket=5), Event(1, 5, 3.0))
    assert log_of(record) == [(5, 3.0), (1, 10.0), (2, 10.0), (3, 10.0), (4, 10.0)]
    assert record.basket == 5


@pytest.mark.parametrize(("newer", "open_now"), [(Event(0, 9, 20.0), 0), (Event(0, 9, 20.0, basket=6), 6)])
def test_a_newer_event_closes_a_basket(new, newer, open_now):
    record = remember(remember(new, Event(0, 1, 10.0, basket=5)), newer)
    assert record.basket == open_now
    late = remember(record, Event(0, 2, 15.0, basket=5))
    assert log_of(late) == [(1, 10.0), (2, 15.0), (9, 20.0)]
    assert late.basket == open_now
    assert log_of(remember(late, Event(0, 3, 21.0, basket=open_now)))[-1] == (3, 20.0 if open_now else 21.0)


def test_other_events_at_the_time_of_a_basket_leave_it_open(new):
    record = remember(remember(new, Event(0, 1, 10.0, basket=5)), Event(0, 2, 10.0))
    assert record.basket == 5
    assert remember(remember(new, Event(0, 2, 10.0)), Event(0, 1, 10.0, basket=5)).basket == 5
    assert remember(record, Event(0, 3, 10.0, basket=6), Event(1, 4, 10.0)).basket == 6


def test_an_item_counts_once_in_a_basket(new):
    twice = [Event(0, 1, 10.0, event_id=1, basket=5), Event(1, 1, 12.0, event_id=2, basket=5)]
    assert plan(new, twice).duplicates == (1,)
    assert plan(remember(new, twice[0]), twice[1:]).duplicates == (1,)
    untimed = [replace(one, event_id=0, timed=False) for one in twice]
    assert plan(new, untimed).duplicates == (1,)
    assert plan(new, [replace(one, basket=0) for one in untimed]).duplicates == ()
    many = [Event(n, n + 1, 10.0 + n, timed=False, basket=5) for n in range(9)]
    assert plan(remember(new, *many), many).duplicates == tuple(range(9))


def test_an_event_that_is_sent_again_after_its_basket_is_known_by_its_own_time(new):
    sent = [event_of("u", EventIn(n, f"i{n}", 10.0 + n, basket_id="b"), n + 1, NOW) for n in range(2)]
    assert [one.event_id for one in sent] == [event_identity("u", f"i{n}", 10.0 + n, None) for n in range(2)]
    record = remember(remember(new, *sent), Event(0, 9, 20.0))
    assert plan(record, sent).duplicates == (0, 1)


def test_forgotten_events_do_not_set_the_time_of_a_basket(new):
    """Otherwise an event after the user was forgotten would get a time before it."""
    planned = plan(new, [Event(0, 1, 10.0, basket=5), Event(1, 2, 15.0, basket=5)], forgotten_until=12.0)
    assert (planned.forgotten, planned.log_time.tolist(), planned.basket) == ((0,), [15.0], 5)


def test_the_identity_of_a_basket_depends_on_the_user():
    assert basket_identity("u", None) == basket_identity("u", "") == 0
    assert 0 < basket_identity("u", "b") == basket_identity("u", "b") != basket_identity("v", "b")
    assert basket_identity("u", "b") != event_identity("u", "", None, "b")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 2), st.sampled_from(["on", "new", "none"])), min_size=1, max_size=25
    ),
    st.sets(st.integers(1, 24)),
)
def test_baskets_do_not_depend_on_how_events_were_chunked(drawn, cuts):
    """Baskets follow each other, and each begins later than all events before: if the first event of a basket were a
    duplicate, a call with no further events of it would write nothing, and the basket would stay unknown.
    """
    stream, basket, time = [], 0, 100.0
    for n, (item, step, kind) in enumerate(drawn):
        begins = kind == "new" or (kind == "on" and basket == 0)
        time += max(step, begins)
        basket = n + 1 if begins else basket if kind == "on" else 0
        stream.append(Event(n, item, time, event_id=n + 1, basket=basket))
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    parts = UserRecord.new(DIM, RULES)
    whole = remember(parts, *stream)
    for a, b in pairwise(edges):
        parts = remember(parts, *stream[a:b])
    parts = replace(parts, version=whole.version)
    assert pack_record(parts) == pack_record(whole)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS)
def test_a_call_means_what_the_log_means(tmp_path_factory, rows):
    """However baskets are mixed, a call has the effect of a file; an item twice at one time counts once, however."""
    dataset = read_dataset(written(tmp_path_factory.mktemp("logs") / "a.csv", rows), ALL)
    for n, user in enumerate(dataset.user_ids):
        mine = [(item, time, basket) for name, item, time, basket in rows if name == user]
        events = [
            Event(at, int(item[1:]), time, basket=basket_identity(user, basket))
            for at, (item, time, basket) in enumerate(mine)
        ]
        at = dataset.sequence(n)
        names = [int(dataset.item_ids[item - 1][1:]) for item in dataset.items[at]]
        wanted = list(dict.fromkeys(zip(names, dataset.times[at].tolist(), strict=True)))
        record = remember(UserRecord.new(DIM, RULES), *events)
        assert log_of(record) == wanted
        assert record.banks.occasions.tolist() == [len(set(dataset.times[at]))]


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_a_record_keeps_its_basket(basket):
    record = replace(remember(UserRecord.new(DIM, RULES), Event(0, 1, 10.0), Event(1, 2, 20.0)), basket=basket)
    assert unpack_record(pack_record(record), RULES).basket == basket
    assert rekey(record, "other", np.ones((2, 6)), np.ones(6)).basket == basket
    assert without(record, [1]).basket == basket


def test_a_basket_goes_on_after_a_restart(run, valkey_url, stack):
    version = load_checkpoint(run).version
    with opened(run, valkey_url) as client:
        Caller(client, version).remember("u", took(0, "i1", basket_id="b"))
    caller = Caller(stack.enter_context(opened(run, valkey_url)), version)
    caller.remember("u", took(9, "i2", basket_id="b"), EventIn(10, "i3", basket_id="b"))
    assert [time for _, time in caller.inspect("u").log] == [NOW] * 3
    caller.forget("u")
    caller.remember("u", EventIn(0, "i4", NOW + 1e8, basket_id="b"))
    assert [time for _, time in caller.inspect("u").log] == [NOW + 1e8]


# ------------------------------------------------------------------------------------------------ online


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    return stack.enter_context(httpx2.Client(base_url=api_url))


def told(client: httpx2.Client, *interactions: dict) -> dict:
    answer = client.post("/memories", json={"interactions": list(interactions)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def remembered(client: httpx2.Client, user: str) -> dict:
    """Everything that is remembered of a user except the number of writes."""
    memory = client.get(f"/users/{user}/memory").json()
    del memory["user_id"], memory["version"]
    return memory


def test_items_sent_one_by_one_make_the_same_basket_as_in_one_call(client):
    scanned = [{"item_id": f"i{n + 1}", "timestamp": 1000.0 + n, "basket_id": "b"} for n in range(4)]
    scanned += [{"item_id": f"i{n + 3}", "timestamp": 5000.0 + n, "basket_id": "c"} for n in range(4)]
    for one in scanned:
        assert told(client, one | {"user_id": "scanned"})["accepted"] == 1
    told(client, *(one | {"user_id": "together"} for one in scanned))
    plain = [{"item_id": one["item_id"], "timestamp": 1000.0 if one["basket_id"] == "b" else 5000.0} for one in scanned]
    told(client, *(one | {"user_id": "plain"} for one in plain))
    memory = remembered(client, "plain")
    assert [one["occasions_since"] for one in memory["entries"]] == [1, 1, 0, 0, 0, 0]
    assert remembered(client, "scanned") == remembered(client, "together") == memory
    again = told(client, *(one | {"user_id": "scanned"} for one in scanned))
    assert (again["accepted"], again["duplicates"]) == (0, 8)
    now, ask = 9000.0, {"top_n": 30, "exclude_seen": False}
    answers = [
        client.post("/recommend", json=ask | {"user_id": user, "timestamp": now}).json()
        for user in ("scanned", "plain")
    ]
    scores = [{item["item_id"]: item["score"] for item in answer["items"]} for answer in answers]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize("basket", ["", "b" * 257, "b\0", 7, ["b"]])
def test_an_invalid_basket_id_is_refused(client, basket):
    event = {"user_id": "u", "item_id": "i1", "basket_id": basket}
    answer = client.post("/memories", json={"interactions": [event]})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "basket_id" in answer.text
    assert client.get("/users/u/memory").status_code == 404


def test_null_means_no_basket(client):
    told(client, *({"user_id": "u", "item_id": f"i{n}", "timestamp": n, "basket_id": None} for n in (1, 2)))
    assert [one["timestamp"] for one in remembered(client, "u")["log"]] == [1, 2]


def test_a_file_of_baskets_is_remembered_as_training_reads_it(client, api_url, tmp_path):
    """With more events than one call takes, overlapping baskets, and rows in random order."""
    rows = [("u", f"i{n % 30 + 1}", 1e9 + 3600 * n, f"b{n // 6}{'x' if n % 2 else 'y'}") for n in range(1100)]
    random.Random(0).shuffle(rows)
    file = written(tmp_path / "a.csv", rows)
    tally = backfill(api_url, file, keep_journal=False).tally
    assert (tally.accepted, tally.duplicates) == (1100, 0)
    dataset = read_dataset(file, ALL)
    names = [dataset.item_ids[item - 1] for item in dataset.items]
    log = [(one["item_id"], one["timestamp"]) for one in remembered(client, "u")["log"]]
    assert log == list(zip(names, dataset.times.tolist(), strict=True))[-len(log) :]
    assert len(log) == 512
