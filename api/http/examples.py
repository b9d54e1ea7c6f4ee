"""Examples for the OpenAPI document: errors and responses, which the routes declare (`api.http.policy`)."""

from __future__ import annotations

from typing import Any

from api.http.middleware import BODY_LIMIT
from api.http.problems import (
    BodyTooLarge,
    CheckpointRefused,
    DeadlineExceeded,
    IngestionFull,
    InvalidJson,
    InvalidRequest,
    MemoryUnavailable,
    NotFound,
    Overloaded,
    WriteConflict,
)

BODY_TOO_LARGE = BodyTooLarge(BODY_LIMIT)
INVALID_BODY = (
    InvalidJson("Expecting value"),
    BODY_TOO_LARGE,
    InvalidRequest(
        "top_n: Input should be less than or equal to 1000",
        errors=[{"field": "top_n", "message": "Input should be less than or equal to 1000"}],
    ),
)
INVALID_RELOAD = (
    InvalidJson("Expecting value"),
    BODY_TOO_LARGE,
    InvalidRequest(
        "runs: Extra inputs are not permitted",
        errors=[{"field": "runs", "message": "Extra inputs are not permitted"}],
    ),
)
REFUSED = CheckpointRefused("/runs/ml-100k-new: content does not match version 0a6c19d2f48b7e53; the files are damaged")
INVALID = InvalidRequest(
    "limit: Input should be greater than or equal to 1",
    errors=[{"field": "limit", "message": "Input should be greater than or equal to 1"}],
)
INVALID_ID = InvalidRequest(
    "user_id: Value error, an id must not contain NUL",
    errors=[{"field": "user_id", "message": "Value error, an id must not contain NUL"}],
)
UNAVAILABLE = MemoryUnavailable("memory service: no answer in time")
NOT_STORED = (
    IngestionFull("10000 of at most 10000 interactions are being written"),
    MemoryUnavailable("memory service: no answer in time", committed=["196"]),
    WriteConflict("1 users were written by others 3 times in a row; they were not changed", committed=["196"]),
)
LATE = DeadlineExceeded("no answer within the 0.200 s that the caller waits")
FULL = Overloaded("2048 of at most 2048 requests are waiting")
NO_USER = NotFound("nothing is known about this user", "user_not_found")
NO_ITEM = NotFound("this item is not in the catalogue", "item_not_found")

VERSION, NEXT = "5f0c2a7be1d94386", "0a6c19d2f48b7e53"
HABIT = {
    "count": 7,
    "since_s": 259200.0,
    "mean_gap_s": 518400.0,
    "at_this_hour": True,
    "on_this_day": False,
    "logit": 0.18,
}
RECOMMENDED: dict[str, Any] = {
    "recommendation_id": "a3c9b1d2e4f54c0b8f6a7d8e9f0a1b2c",
    "user_id": "196",
    "source": "memory",
    "items": [
        {
            "item_id": "50",
            "score": -3.1,
            "because": [
                {
                    "item_id": "172",
                    "scope": "own",
                    "similarity": 0.83,
                    "weight": 0.4,
                    "habit": HABIT,
                    "logit": 0.21,
                    "copied": 0.0,
                }
            ],
        }
    ],
    "memory": {
        "entropy": 0.71,
        "k": 16,
        "bank_size": 39,
        "version": 39,
        "own": {"k": 16, "retrieved": 16},
        "collective": {"k": 24, "retrieved": 24},
        "gate": 0.12,
        "copying": 0.08,
        "log_z": 11.92,
        "memories": [{"item_id": "172", "scope": "own", "similarity": 0.83, "weight": 0.4, "habit": HABIT}],
        "degraded": False,
    },
    "unknown_items": [],
    "model_version": VERSION,
}
ITEM = {
    "item_id": "alien",
    "title": "Alien",
    "metadata": {"title": "Alien", "year": 1979, "genres": ["Horror", "Sci-Fi"]},
    "hidden": False,
    "known_to_model": False,
    "cluster": None,
}
BANK = {
    "user_id": "196",
    "version": 39,
    "model_version": VERSION,
    "events": 39,
    "bank_size": 1,
    "capacity": 75,
    "pruned": 0,
    "seen": 39,
    "share": True,
    "entropy": 0.5,
    "k": 1,
    "clusters": {"7": 1.0},
    "entries": [
        {
            "item_id": "50",
            "quality": 0.6,
            "recency": 1.0,
            "rating": 5.0,
            "timestamp": 1764000000.0,
            "frequency": 1,
            "access": 0,
            "last_access": None,
            "cluster": 7,
            "quality_parts": {"frequency": 0.0, "recency": 0.4, "access": 0.0, "rating": 0.2},
            "position": [0.31, -0.12],
            "first_time": 1764000000.0,
            "mean_gap_s": None,
            "occasions_since": 0,
            "usual_hour": None,
            "usual_day": None,
        }
    ],
    "log": [{"item_id": "50", "timestamp": 1764000000.0}],
    "position": [0.28, -0.05],
    "threshold": 0.6,
    "adaptive_k": {
        "own": {"base": 13.0, "growth": 0.115, "k_min": 3, "k_max": 20, "k": 1},
        "collective": {"base": 20.0, "growth": 1.0, "k_min": 10, "k_max": 30, "k": 20},
    },
    "pruned_items": [],
}
INGESTED = {
    "accepted": 1,
    "duplicates": 1,
    "rejected": [{"index": 2, "code": "forgotten", "detail": "the user was forgotten after this event"}],
    "versions": {"196": 40},
}
FORGOTTEN = {"user_id": "196", "existed": True}
MODEL = {
    "model_version": VERSION,
    "wanted": VERSION,
    "items": 1682,
    "scopes": ["own", "collective"],
    "config": {"encoder": {"dim": 64, "window": 50}},
}
RELOADED = {"serving": VERSION, "wanted": NEXT, "state": "moving", "users": 943, "moved": 0}
READY = {"status": "ready", "model_version": VERSION, "memory_s": 0.0007}
