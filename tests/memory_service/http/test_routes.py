"""Catalogue, users, metrics and refusals of the memory service over HTTP."""

import msgspec
import numpy as np
import pytest

from memory_service.protocol.structs import (
    CatalogueReply,
    Item,
    Problem,
    RegisterReply,
    RegisterRequest,
    RetrieveRequest,
    Users,
    UserWrite,
    WriteRequest,
)
from tests.memory_service.calling import NOW, opened, took, vectors


def test_the_catalogue(caller):
    reply = caller.call(
        "/v1/catalogue", RegisterRequest([Item("brand-new", {"title": "N"}), Item("i1")]), RegisterReply
    )
    assert reply.numbers == [31, 1]
    caller.call("/v1/catalogue", RegisterRequest([Item("i1", {"title": "X"})]), RegisterReply)
    listing = msgspec.msgpack.decode(caller.client.get("/v1/catalogue?since=1").content, type=CatalogueReply)
    assert listing.items[0].metadata == {"title": "One"}  # from the checkpoint; not overwritten
    caller.call("/v1/catalogue", RegisterRequest([Item("i1", {"title": "X"}, True)], overwrite=True), RegisterReply)
    listing = msgspec.msgpack.decode(caller.client.get("/v1/catalogue?since=1").content, type=CatalogueReply)
    assert listing.items[0] == Item("i1", {"title": "X"}, True)


def test_users_and_metrics(caller):
    caller.remember("anna", took(0, "i1"))
    assert msgspec.msgpack.decode(caller.client.get("/v1/users?prefix=an").content, type=Users).users == ["anna"]
    caller.retrieve("anna")
    text = caller.client.get("/metrics").text
    assert "ramrec_memory_users_retrieved_total 1.0" in text
    assert "ramrec_memory_events_written_total 1.0" in text


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/retrieve", b"", 400, "invalid_body"),
        ("/v1/retrieve", b"\xc1", 400, "invalid_body"),
        ("/v1/retrieve", msgspec.msgpack.encode({"model_version": 3}), 400, "invalid_body"),
        ("/v1/write", msgspec.msgpack.encode([]), 400, "invalid_body"),
        ("/v1/retrieve", RetrieveRequest("other", ["u"]), 409, "model_mismatch"),
        ("/v1/retrieve", RetrieveRequest("", []), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], k=b"123"), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], ignore={7: [1]}), 422, "invalid_columns"),
        (
            "/v1/retrieve",
            RetrieveRequest("", ["u"], query_rows=b"\x05\0\0\0", queries=bytes(64)),
            422,
            "invalid_columns",
        ),
        (
            "/v1/retrieve",
            RetrieveRequest("", ["u"], query_rows=b"\0\0\0\0", queries=b"\xff" * 64),
            422,
            "invalid_columns",
        ),
        ("/v1/retrieve", RetrieveRequest("", ["u"], now=b"1234567"), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], now=bytes(16)), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], now=b"\xff" * 8), 422, "invalid_columns"),
        ("/v1/retrieve", RetrieveRequest("", ["u"], now=np.float64(2e11).tobytes()), 422, "invalid_columns"),
    ],
)
def test_a_malformed_call_is_refused(caller, path, body, status, code):
    if isinstance(body, msgspec.Struct):
        body = msgspec.structs.replace(body, model_version=body.model_version or caller.model_version)
        body = msgspec.msgpack.encode(body)
    response = caller.client.post(path, content=body)
    assert response.status_code == status
    assert msgspec.msgpack.decode(response.content, type=Problem).code == code


def test_a_write_with_too_few_keys_is_refused_and_writes_nothing(caller):
    events = [took(0, "i1"), took(1, "i2")]
    write = UserWrite("u", 0, events, vectors("u", 1), vectors("u", 1))
    problem = caller.call("/v1/write", WriteRequest(caller.model_version, NOW, [write]), Problem, status=422)
    assert "keys" in problem.detail
    assert caller.inspect("u") is None


def test_a_giant_body_is_refused(run, valkey_url, stack):
    client = stack.enter_context(opened(run, valkey_url, body_limit_bytes=2048))
    assert client.post("/v1/retrieve", content=bytes(5000)).status_code == 413
