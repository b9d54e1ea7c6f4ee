"""What the store relies on in redis-py, whichever of the supported versions is installed."""

import asyncio

import pytest
import redis
from redis.exceptions import ConnectionError, MaxConnectionsError, ResponseError

from memory_service.store.redis.adapter import Source, text
from memory_service.store.redis.errors import StoreURLError

TIMEOUT_S = 5.0


def port_url(cluster, n: int = 0) -> str:
    return f"redis://127.0.0.1:{cluster.ports[n]}"


@pytest.mark.parametrize(
    ("url", "database"),
    [("redis://there", 0), ("redis://there:1/7", 7), ("unix:///there?db=3", 3), ("rediss://t/0", 0)],
)
def test_a_url_names_a_database(url, database):
    assert Source(url, TIMEOUT_S).database == database


def test_a_url_names_an_address_but_not_that_of_a_socket():
    assert Source("redis://:word@there:7001", TIMEOUT_S).address == ("there", 7001)
    assert Source("redis://there", TIMEOUT_S).address == ("there", 6379)
    with pytest.raises(StoreURLError):
        _ = Source("unix:///there", TIMEOUT_S).address


@pytest.mark.parametrize("url", ["there", "http://there", "redis://there/0?odd=1", "redis://there:port"])
def test_a_url_that_cannot_be_used_is_refused_before_anything_connects(url):
    with pytest.raises(StoreURLError):
        Source(url, TIMEOUT_S)


def test_errors_stand_in_the_place_of_answers(go, valkey_url):
    async def story():
        server = Source(valkey_url, TIMEOUT_S).server()
        try:
            return await server.send([("SET", "word", b"\xff"), ("INCR", "word"), ("GET", "word")])
        finally:
            await server.close()

    written, error, kept = go(story())
    assert written
    assert isinstance(error, ResponseError)
    assert kept == b"\xff"


def test_a_connection_that_broke_is_replaced(go, valkey_url):
    async def story():
        server = Source(valkey_url, TIMEOUT_S, retries=1).server()
        try:
            await server.send([("SET", "word", 1)])
            with redis.Redis.from_url(valkey_url) as other:
                other.client_kill_filter(_type="normal")
            return await server.send([("GET", "word")])
        finally:
            await server.close()

    assert go(story()) == [b"1"]


def test_batches_at_the_same_time_have_connections_of_their_own_which_are_used_again(go, valkey_url):
    async def story():
        server = Source(f"{valkey_url}?max_connections=3", TIMEOUT_S).server()
        try:
            both = [("CLIENT", "ID"), ("CLIENT", "ID")]
            found = [await asyncio.gather(*(server.send(both) for _ in range(3))) for _ in range(4)]
            with pytest.raises(MaxConnectionsError):
                await asyncio.gather(*(server.send(both) for _ in range(4)))
            return found
        finally:
            await server.close()

    for batches in (rounds := go(story())):
        assert all(first == second for first, second in batches)
        assert {first for first, _ in batches} == {first for first, _ in rounds[0]}
        assert len({first for first, _ in batches}) == 3


def test_after_a_batch_that_was_cancelled_answers_are_those_of_the_next(go, valkey_url):
    async def story():
        server = Source(f"{valkey_url}?max_connections=1", TIMEOUT_S).server()
        try:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(server.send([("BLPOP", "nothing", 1), ("ECHO", "late")]), 0.1)
            return await server.send([("ECHO", "next")])
        finally:
            await server.close()

    assert go(story()) == [b"next"]


def test_where_nobody_listens_the_error_is_one_of_connections(go):
    async def story():
        server = Source("redis://127.0.0.1:1", TIMEOUT_S).server()
        try:
            await server.send([("PING",)])
        finally:
            await server.close()

    with pytest.raises(ConnectionError):
        go(story())


def test_closing_a_server_closes_its_connections(go, valkey_url):
    async def story():
        server = Source(valkey_url, TIMEOUT_S).server()
        await server.send([("CLIENT", "SETNAME", "of-this-test")])
        await server.close()

    go(story())
    with redis.Redis.from_url(valkey_url) as other:
        assert "of-this-test" not in {one["name"] for one in other.client_list()}


def test_answers_are_raw(go, valkey_cluster):
    """Clients of redis-py parse these, each version in its own way."""

    async def story():
        source = Source(port_url(valkey_cluster), TIMEOUT_S)
        server = source.server(source.address)
        try:
            words = (("CLUSTER", "SLOTS"), ("CLUSTER", "NODES"), ("CLUSTER", "INFO"), ("CLUSTER", "MYID"), ("ROLE",))
            return [await server.ask(*command) for command in words]
        finally:
            await server.close()

    slots, nodes, info, my_id, role = go(story())
    assert sum(last - first + 1 for first, last, *_ in slots) == 16384
    assert {int(port) for _, _, *servers in slots for _, port, *_ in servers} == set(valkey_cluster.ports)
    assert text(my_id) in text(nodes)
    assert len(text(nodes).splitlines()) == len(valkey_cluster.ports)
    assert "cluster_state:ok" in text(info)
    assert (text(role[0]), len(role[2])) == ("master", 1)


def test_a_batch_asks_redirects_and_waits_on_one_connection(go, valkey_cluster):
    async def story():
        source = Source(port_url(valkey_cluster), TIMEOUT_S)
        server = source.server(source.address)
        try:
            return [
                await server.send([("ASKING",), ("SET", key, 1), ("WAIT", 1, 1000)])
                for key in ("{a}", "{b}", "{c}", "{d}", "{e}", "{f}", "{g}", "{h}")
            ]
        finally:
            await server.close()

    valkey_cluster.flush()
    moved = [written for _, written, _ in go(story()) if isinstance(written, Exception)]
    kept = [confirmed for _, written, confirmed in go(story()) if not isinstance(written, Exception)]
    assert kept == [1] * (8 - len(moved))
    for error in moved:
        assert error.port in valkey_cluster.ports
        assert 0 <= error.slot_id < 16384
