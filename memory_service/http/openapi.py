"""The OpenAPI document of the memory service, made from the structs of its wire (`memory_service.protocol.structs`).

Bodies are msgpack. The schemas show their JSON rendering: `format: binary` is msgpack's bin (base64 in the examples),
keys that are integers on the wire stand as strings.
"""

from __future__ import annotations

import struct
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI

from memory_service.http.doorkeeper import OPEN
from memory_service.protocol.slots import SLOTS
from memory_service.protocol.structs import (
    CONTENT_TYPE,
    CatalogueReply,
    Columns,
    EntryOut,
    EventIn,
    Forgotten,
    HowMany,
    Item,
    Job,
    ModelReply,
    ModelRequest,
    PlanReply,
    PlanRequest,
    Problem,
    QualityParts,
    QuotaReply,
    QuotaRequest,
    RegisterReply,
    RegisterRequest,
    RekeyReply,
    RekeyRequest,
    ReplicasReply,
    RetrieveReply,
    RetrieveRequest,
    StalePage,
    StaleUser,
    UserEvents,
    UserMemory,
    UserPage,
    UserPlan,
    UserRekey,
    Users,
    UserWrite,
    UserWritten,
    WriteReply,
    WriteRequest,
)

Json = dict[str, Any]
REFS = "#/components/schemas/{name}"
MODEL, NEXT = "5f0c2a7be1d94386", "0a6c19d2f48b7e53"
TEXT: Json = {"type": "string"}


@dataclass(frozen=True)
class Failure:
    """An error that can occur: its status, code, what it means, and a `detail` as an example."""

    status: int
    code: str
    meaning: str
    detail: str


@dataclass(frozen=True)
class Call:
    """One operation. `body` and `answer` are examples, whose types are the schemas."""

    method: str
    path: str
    name: str
    about: str
    answer: msgspec.Struct
    failures: tuple[Failure, ...]
    body: msgspec.Struct | None = None
    query: tuple[Json, ...] = ()


INVALID_BODY = Failure(
    400, "invalid_body", "No msgpack of the right shape", "Expected `str`, got `int` - at `$.users[0]`"
)
UNAUTHORIZED = Failure(401, "unauthorized", "No token, or a wrong one", "this memory service wants its token")
NOT_FOUND = Failure(404, "user_not_found", "Nothing is known about this user", "nothing is known about this user")
MISMATCH = Failure(
    409,
    "model_mismatch",
    "The model is not loaded here, or not the wanted one",
    f"this service serves model {MODEL}, the call is for a1b2",
)
REFUSED = Failure(422, "checkpoint_refused", "The checkpoint cannot be used; nothing has changed", "no model a1b2")
TOO_LARGE = Failure(413, "body_too_large", "The body exceeds the limit", "the body is larger than 33554432 bytes")
INVALID_COLUMNS = Failure(
    422, "invalid_columns", "Columns do not fit together", "queries has 12 bytes, wanted 64 values of 4"
)
INVALID_QUERY = Failure(422, "invalid_query", "A query parameter is missing or no number", "user_id: field required")
QUEUE_FULL = Failure(429, "queue_full", "Too many calls are under way", "64 calls are under way")
DAMAGED = Failure(500, "damaged_record", "A record fails its checksum; it is not overwritten", "record of user 196")
UNAVAILABLE = Failure(503, "store_unavailable", "Redis is out of reach", "Redis is out of reach")

LATE = Failure(503, "deadline_exceeded", "The caller waits no longer", "the deadline passed while the body came in")

BODY = (INVALID_BODY, TOO_LARGE)
WRITING = (*BODY, MISMATCH, INVALID_COLUMNS, QUEUE_FULL, DAMAGED, UNAVAILABLE)


def _floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _parameter(name: str, schema: Json, about: str, *, required: bool = False, example: Any) -> Json:
    return {
        "name": name,
        "in": "query",
        "required": required,
        "schema": schema,
        "description": about,
        "example": example,
    }


USER = _parameter("user_id", TEXT, "The caller's user id.", required=True, example="196")
CURSOR = _parameter("cursor", {"type": "integer", "default": 0}, "Where the last step ended.", example=17)
SLOT_RANGE = (
    _parameter("first_slot", {"type": "integer", "default": 0}, "First slot of a Redis Cluster.", example=8192),
    _parameter("last_slot", {"type": "integer", "default": SLOTS - 1}, "Last slot.", example=16_383),
)
EVENT = EventIn(0, "50", 1_764_000_000.0, 5.0, "order-17")
ONE, NOW = struct.pack("<i", 1), struct.pack("<2d", 1_764_000_000.0, 1_764_000_000.0)
ENTRY = Columns(ONE, struct.pack("<I", 50), _floats(0.8), _floats(0.7), _floats(1), _floats(5))
CALLS = (
    Call(
        "post",
        "/v1/retrieve",
        "retrieve",
        "Entropy, K, memories, state and seen items of a batch of users",
        RetrieveReply(
            catalogue_size=1682,
            degraded=False,
            known=b"\1",
            versions=struct.pack("<q", 3),
            entropy=_floats(0.5),
            k=ONE,
            collective_k=ONE,
            bank_size=ONE,
            states=_floats(0.6, 0.8, 0, 0),
            own=ENTRY,
            collective=ENTRY,
            seen_count=ONE,
            seen=struct.pack("<I", 50),
            stale=[],
        ),
        (*BODY, MISMATCH, INVALID_COLUMNS, QUEUE_FULL, LATE),
        RetrieveRequest(MODEL, ["196", ""], k=struct.pack("<2i", 0, 5), ignore={0: [50]}, alone=[0], now=NOW),
    ),
    Call(
        "post",
        "/v1/plan",
        "plan",
        "What events would mean, and which keys writing them needs; nothing is changed",
        PlanReply(1682, [UserPlan("196", 3, [0], [], [], Job(0, struct.pack("<I", 50), struct.pack("<q", 2)))]),
        WRITING,
        PlanRequest(MODEL, 1_764_000_000.0, [UserEvents("196", [EVENT])]),
    ),
    Call(
        "post",
        "/v1/write",
        "write",
        "Write planned events with their keys, atomically per user, if nobody wrote in between",
        WriteReply(1682, [UserWritten("196", 4, [0], [], [])]),
        WRITING,
        WriteRequest(
            MODEL, 1_764_000_000.0, [UserWrite("196", 3, [EVENT], _floats(0.6, 0.8, 0, 0), _floats(0, 0.6, 0.8, 0))]
        ),
    ),
    Call(
        "post",
        "/v1/rekey",
        "rekey",
        "Give stale records the keys of this model; those that changed meanwhile are left alone",
        RekeyReply(["196"]),
        WRITING,
        RekeyRequest(MODEL, [UserRekey("196", 3, _floats(0.6, 0.8, 0, 0), _floats(0, 0.6, 0.8, 0))]),
    ),
    Call(
        "post",
        "/v1/quota",
        "quota",
        "Requests that an API key may make in a second, granted in portions",
        QuotaReply(10),
        (*BODY, UNAVAILABLE),
        QuotaRequest("5f0c2a7be1d943865f0c2a7be1d94386", 1_764_000_000, 100, 10),
    ),
    Call(
        "get",
        "/v1/user",
        "inspect",
        "A user's bank laid open",
        UserMemory(
            user_id="196",
            version=3,
            model_version=MODEL,
            events=3,
            share=True,
            entropy=0.5,
            k=3,
            capacity=75,
            pruned=0,
            clusters={7: 1.0},
            entries=[
                EntryOut(
                    item=50,
                    quality=0.6,
                    recency=1.0,
                    rating=5.0,
                    time=1_764_000_000.0,
                    frequency=1,
                    access=0,
                    last_access=0.0,
                    cluster=7,
                    parts=QualityParts(0.0, 0.4, 0.0, 0.2),
                    place=(0.31, -0.12),
                    first_time=1_764_000_000.0,
                )
            ],
            log=[(50, 1_764_000_000.0)],
            seen=1,
            catalogue_size=1682,
            standing=(0.28, -0.05),
            threshold=0.6,
            own=HowMany(13.0, 0.115, 3, 20, 1),
            collective=HowMany(20.0, 1.0, 10, 30, 20),
        ),
        (NOT_FOUND, INVALID_QUERY, DAMAGED, UNAVAILABLE),
        query=(USER,),
    ),
    Call(
        "delete",
        "/v1/user",
        "forget",
        "Remove everything about a user; a tombstone keeps late retries from bringing it back",
        Forgotten(existed=True, replicas=["http://10.0.0.8:8001"]),
        (INVALID_QUERY, UNAVAILABLE),
        query=(
            USER,
            _parameter(
                "here",
                {"type": "boolean", "default": False},
                "Another replica has forgotten the user; this one lets go.",
                example=True,
            ),
        ),
    ),
    Call(
        "get",
        "/v1/replicas",
        "replicas",
        "The replicas that are there, and whether everything is loaded at each",
        ReplicasReply("http://10.0.0.7:8001", {"http://10.0.0.7:8001": True, "http://10.0.0.8:8001": False}),
        (UNAVAILABLE,),
    ),
    Call(
        "get",
        "/v1/users",
        "users",
        "User ids that begin with a prefix, sorted; where there are more than the limit, some of them",
        Users(["196", "1960"]),
        (INVALID_QUERY, UNAVAILABLE),
        query=(
            _parameter("prefix", TEXT | {"default": ""}, "What the ids begin with.", example="19"),
            _parameter("limit", {"type": "integer", "default": 100}, "The most ids, clamped to 1…1000.", example=10),
        ),
    ),
    Call(
        "get",
        "/v1/catalogue",
        "catalogue",
        "Catalogue items from a number on, with metadata and hidden flags, and what changed of those before",
        CatalogueReply(
            1682, 3, [Item("alien", {"title": "Alien", "year": 1979})], 1682, [(50, Item("50", None, True))]
        ),
        (INVALID_QUERY, UNAVAILABLE),
        query=(
            _parameter("since", {"type": "integer", "default": 1}, "The first number, at least 1.", example=1682),
            _parameter("revision", {"type": "integer", "default": 0}, "Changes since then are told.", example=2),
        ),
    ),
    Call(
        "post",
        "/v1/catalogue",
        "register",
        "Register or change items",
        RegisterReply([1682], 1682, 4),
        (*BODY, INVALID_COLUMNS, UNAVAILABLE),
        RegisterRequest([Item("alien", {"title": "Alien", "year": 1979})], overwrite=True),
    ),
    Call(
        "get",
        "/v1/model",
        "model",
        "Which model serves here, which is wanted, and how far that one is",
        ModelReply(MODEL, NEXT, "/runs/one", "/runs/two", 943, 120),
        (UNAVAILABLE,),
    ),
    Call(
        "post",
        "/v1/model",
        "change_model",
        "Want another model, in every process; or let the wanted one serve",
        ModelReply(MODEL, NEXT, "/runs/one", "/runs/two", 943, 0),
        (*BODY, MISMATCH, REFUSED, UNAVAILABLE),
        ModelRequest(NEXT, "/runs/two"),
    ),
    Call(
        "get",
        "/v1/walk",
        "walk",
        "A step through the users whose records lie in some slots",
        UserPage(17, ["196", "186"]),
        (INVALID_QUERY, UNAVAILABLE),
        query=(
            CURSOR,
            _parameter("limit", {"type": "integer", "default": 1000}, "About as many looked at, 1…10000.", example=100),
            *SLOT_RANGE,
        ),
    ),
    Call(
        "get",
        "/v1/stale",
        "stale",
        "A step through all users: those whose records are not of the wanted model, and what they need",
        StalePage(0, 200, 1682, [StaleUser("196", 3, Job(0, struct.pack("<I", 50), struct.pack("<q", 0)))]),
        (MISMATCH, INVALID_QUERY, UNAVAILABLE),
        query=(
            _parameter("version", TEXT, "The wanted model.", required=True, example=NEXT),
            CURSOR,
            _parameter("limit", {"type": "integer", "default": 200}, "About as many users, 1…1000.", example=200),
            *SLOT_RANGE,
        ),
    ),
)


def document(app: FastAPI, guarded: bool) -> Json:
    """The OpenAPI 3.1 document; `guarded`: calls need the token."""
    structs = [type(part) for call in CALLS for part in (call.body, call.answer) if part is not None]
    _, schemas = msgspec.json.schema_components([*structs, Problem], ref_template=REFS)
    paths: Json = {}
    for call in CALLS:
        paths.setdefault(call.path, {})[call.method] = _operation(call)
    made = {
        "openapi": "3.1.0",
        "info": {"title": app.title, "version": app.version, "description": __doc__},
        "tags": [{"name": name, "description": about} for name, about in TAGS.items()],
        "paths": paths | deepcopy(PROBES),
        "components": {"schemas": _precise(schemas)},
    }
    return _guarded(made) if guarded else made


def _guarded(made: Json) -> Json:
    made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, methods in made["paths"].items():
        for operation in methods.values():
            if path not in OPEN:
                operation["security"] = [{"token": []}]
            operation["responses"]["401"] = _failure(UNAUTHORIZED)  # where none is needed, a wrong one is refused
    return made


def _operation(call: Call) -> Json:
    body = {"requestBody": {"required": True, "content": _msgpack(call.body)}} if call.body is not None else {}
    return {
        "operationId": call.name,
        "summary": call.about,
        "description": (type(call.body) if call.body is not None else type(call.answer)).__doc__,
        "tags": ["memory"],
        "parameters": list(call.query),
        **body,
        "responses": {
            "200": {"description": type(call.answer).__doc__, "content": _msgpack(call.answer)},
            **{str(failure.status): _failure(failure) for failure in call.failures},
        },
    }


def _msgpack(example: msgspec.Struct) -> Json:
    schema = {"$ref": REFS.format(name=type(example).__name__)}
    return {CONTENT_TYPE: {"schema": schema, "example": msgspec.to_builtins(example, str_keys=True)}}


def _failure(failure: Failure) -> Json:
    retry = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds.", "example": "1"}}
    headers = {"headers": retry} if failure.status in (429, 503) else {}
    content = _msgpack(Problem(failure.code, failure.detail))
    return {"description": f"`{failure.code}`: {failure.meaning}", **headers, "content": content}


def _precise(schema: Any) -> Any:
    """What msgspec says of JSON, said of msgpack: bytes are bytes, integers have 64 bits."""
    if isinstance(schema, list):
        return [_precise(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("contentEncoding") == "base64":
        rest = {key: value for key, value in schema.items() if key != "contentEncoding"}
        return {**rest, "format": "binary"}
    wide = {"minimum": -(2**63), "maximum": 2**64 - 1} if schema.get("type") == "integer" else {}
    return {**wide, **{key: _precise(value) for key, value in schema.items()}}


def _probe(name: str, about: str, answers: dict[str, Json]) -> Json:
    return {"get": {"operationId": name, "summary": about, "tags": ["probes"], "responses": answers}}


def _json_answer(about: str, **example: str | bool) -> Json:
    schema = {
        "type": "object",
        "properties": {
            name: {"type": "boolean"} if isinstance(value, bool) else TEXT for name, value in example.items()
        },
        "required": [name for name in example if name != "detail"],
    }
    return {"description": about, "content": {"application/json": {"schema": schema, "example": example}}}


TAGS = {"memory": "The banks: msgpack in, msgpack out.", "probes": "For orchestration and Prometheus."}
PROBES = {
    "/health/live": _probe("live", "The process answers", {"200": _json_answer("It does", status="alive")}),
    "/health/ready": _probe(
        "ready",
        "Redis answers, and what is in it is loaded",
        {
            "200": _json_answer("Ready", status="ready", model_version=MODEL, authorized=True),
            "503": _json_answer(
                "Not yet, or Redis is lost",
                status="redis is out of reach",
                model_version=MODEL,
                authorized=True,
                detail="timeout",
            ),
        },
    ),
    "/metrics": _probe(
        "metrics",
        "Prometheus metrics",
        {"200": {"description": "Text format", "content": {"text/plain": {"schema": TEXT, "example": "# HELP …"}}}},
    ),
}
