"""The operations of the OpenAPI document: what each call takes and answers, with examples, and how it can fail."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgspec

from memory_service.protocol.columns import Columns, Job
from memory_service.protocol.hash_slots import SLOTS
from memory_service.protocol.structs import (
    CatalogueReply,
    EventIn,
    Forgotten,
    Item,
    ModelReply,
    ModelRequest,
    PlanReply,
    PlanRequest,
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
    UserPage,
    UserPlan,
    UserRekey,
    Users,
    UserWrite,
    UserWritten,
    WriteReply,
    WriteRequest,
)
from memory_service.protocol.user_memory import EntryOut, HowMany, QualityParts, UserMemory

Json = dict[str, Any]
MODEL, NEXT = "5f0c2a7be1d94386", "0a6c19d2f48b7e53"
TEXT: Json = {"type": "string"}


@dataclass(frozen=True)
class Failure:
    """A possible error: status, code, meaning, and an example of its `detail`."""

    status: int
    code: str
    meaning: str
    detail: str


@dataclass(frozen=True)
class Operation:
    """One operation. `body` and `answer` are examples; their types are the schemas."""

    method: str
    path: str
    name: str
    about: str
    answer: msgspec.Struct
    failures: tuple[Failure, ...]
    body: msgspec.Struct | None = None
    query: tuple[Json, ...] = ()


INVALID_BODY = Failure(
    400, "invalid_body", "The body is not msgpack of the right shape", "Expected `str`, got `int` - at `$.users[0]`"
)
UNAUTHORIZED = Failure(401, "unauthorized", "The token is missing or wrong", "this memory service wants its token")
NOT_FOUND = Failure(404, "user_not_found", "Nothing is known about this user", "nothing is known about this user")
MISMATCH = Failure(
    409,
    "model_mismatch",
    "The model is not loaded here, or is not the wanted one",
    f"this service serves model {MODEL}, the call is for a1b2",
)
REFUSED = Failure(422, "checkpoint_refused", "The checkpoint cannot be used; nothing has changed", "no model a1b2")
TOO_LARGE = Failure(413, "body_too_large", "The body exceeds the limit", "the body is larger than 33554432 bytes")
INVALID_COLUMNS = Failure(
    422, "invalid_columns", "Columns do not fit together", "queries has 12 bytes, wanted 64 values of 4"
)
INVALID_QUERY = Failure(422, "invalid_query", "A query parameter is missing or not a number", "user_id: field required")
QUEUE_FULL = Failure(429, "queue_full", "Too many calls are in progress", "64 calls are under way")
DAMAGED = Failure(500, "damaged_record", "A record fails its checksum; it is not overwritten", "record of user 196")
UNAVAILABLE = Failure(503, "store_unavailable", "Redis is out of reach", "Redis is out of reach")

LATE = Failure(
    503, "deadline_exceeded", "The deadline of the caller has passed", "the deadline passed while the body came in"
)

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
CURSOR = _parameter("cursor", {"type": "integer", "default": 0}, "Where the last page ended.", example=17)
SLOT_RANGE = (
    _parameter("first_slot", {"type": "integer", "default": 0}, "First hash slot of Redis Cluster.", example=8192),
    _parameter("last_slot", {"type": "integer", "default": SLOTS - 1}, "Last hash slot.", example=16_383),
)
EVENT = EventIn(0, "50", 1_764_000_000.0, 5.0, "order-17")
ONE, NOW = struct.pack("<i", 1), struct.pack("<2d", 1_764_000_000.0, 1_764_000_000.0)
ENTRY = Columns(ONE, struct.pack("<I", 50), _floats(0.8), _floats(0.7), _floats(1), _floats(5))
OPERATIONS = (
    Operation(
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
    Operation(
        "post",
        "/v1/plan",
        "plan",
        "What events would mean, and which states writing them needs; nothing is changed",
        PlanReply(1682, [UserPlan("196", 3, [0], [], [], Job(0, struct.pack("<I", 50), struct.pack("<q", 2)))]),
        WRITING,
        PlanRequest(MODEL, 1_764_000_000.0, [UserEvents("196", [EVENT])]),
    ),
    Operation(
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
    Operation(
        "post",
        "/v1/rekey",
        "rekey",
        "Give stale records the keys of this model; records that changed meanwhile are left alone",
        RekeyReply(["196"]),
        WRITING,
        RekeyRequest(MODEL, [UserRekey("196", 3, _floats(0.6, 0.8, 0, 0), _floats(0, 0.6, 0.8, 0))]),
    ),
    Operation(
        "post",
        "/v1/quota",
        "quota",
        "Requests that an API key may make in a second, granted in portions",
        QuotaReply(10),
        (*BODY, UNAVAILABLE),
        QuotaRequest("5f0c2a7be1d943865f0c2a7be1d94386", 1_764_000_000, 100, 10),
    ),
    Operation(
        "get",
        "/v1/user",
        "inspect",
        "All that is known about a user",
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
    Operation(
        "delete",
        "/v1/user",
        "forget",
        "Delete everything about a user; a tombstone keeps late retries from bringing the user back",
        Forgotten(existed=True, replicas=["http://10.0.0.8:8001"]),
        (INVALID_QUERY, UNAVAILABLE),
        query=(
            USER,
            _parameter(
                "here",
                {"type": "boolean", "default": False},
                "Another memory replica has forgotten the user; this one drops the user from memory.",
                example=True,
            ),
        ),
    ),
    Operation(
        "get",
        "/v1/replicas",
        "replicas",
        "The memory replicas that are present, and whether each has loaded everything",
        ReplicasReply("http://10.0.0.7:8001", {"http://10.0.0.7:8001": True, "http://10.0.0.8:8001": False}),
        (UNAVAILABLE,),
    ),
    Operation(
        "get",
        "/v1/users",
        "users",
        "User ids that begin with a prefix, sorted; any of them if there are more than the limit",
        Users(["196", "1960"]),
        (INVALID_QUERY, UNAVAILABLE),
        query=(
            _parameter("prefix", TEXT | {"default": ""}, "What the ids begin with.", example="19"),
            _parameter("limit", {"type": "integer", "default": 100}, "The most ids, clamped to 1…1000.", example=10),
        ),
    ),
    Operation(
        "get",
        "/v1/catalogue",
        "catalogue",
        "Catalogue items from a number on, with metadata and hidden flags, and earlier items that changed",
        CatalogueReply(
            1682, 3, [Item("alien", {"title": "Alien", "year": 1979})], 1682, [(50, Item("50", None, True))]
        ),
        (INVALID_QUERY, UNAVAILABLE),
        query=(
            _parameter("since", {"type": "integer", "default": 1}, "The first number, at least 1.", example=1682),
            _parameter(
                "revision",
                {"type": "integer", "default": 0},
                "Changes after it are listed.",
                example=2,
            ),
        ),
    ),
    Operation(
        "post",
        "/v1/catalogue",
        "register",
        "Register or change items",
        RegisterReply([1682], 1682, 4),
        (*BODY, INVALID_COLUMNS, UNAVAILABLE),
        RegisterRequest([Item("alien", {"title": "Alien", "year": 1979})], overwrite=True),
    ),
    Operation(
        "get",
        "/v1/model",
        "model",
        "The serving and the wanted model, and how many users have been moved to that",
        ModelReply(MODEL, NEXT, "/runs/one", "/runs/two", 943, 120),
        (UNAVAILABLE,),
    ),
    Operation(
        "post",
        "/v1/model",
        "change_model",
        "Make a model the wanted one, in all processes; or let the wanted model serve",
        ModelReply(MODEL, NEXT, "/runs/one", "/runs/two", 943, 0),
        (*BODY, MISMATCH, REFUSED, UNAVAILABLE),
        ModelRequest(NEXT, "/runs/two"),
    ),
    Operation(
        "get",
        "/v1/walk",
        "walk",
        "A page of the users whose records are in some hash slots",
        UserPage(17, ["196", "186"]),
        (INVALID_QUERY, UNAVAILABLE),
        query=(
            CURSOR,
            _parameter("limit", {"type": "integer", "default": 1000}, "About as many looked at, 1…10000.", example=100),
            *SLOT_RANGE,
        ),
    ),
    Operation(
        "get",
        "/v1/stale",
        "stale",
        "A page of the users whose records are not of the wanted model, and what would rekey them",
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
