"""The OpenAPI document of the memory service, made from the structs of `memory_service.protocol.structs`.

Bodies are msgpack. The schemas show them as JSON: `format: binary` is msgpack's bin (base64 in the examples), and
integer keys are strings.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import msgspec
from fastapi import FastAPI

from memory_service.http.middleware import OPEN
from memory_service.http.operations import MODEL, OPERATIONS, TEXT, UNAUTHORIZED, Failure, Json, Operation
from memory_service.protocol.structs import CONTENT_TYPE, Problem

REFS = "#/components/schemas/{name}"


def document(app: FastAPI, guarded: bool) -> Json:
    """The OpenAPI 3.1 document. `guarded`: calls need the token."""
    structs = [type(part) for call in OPERATIONS for part in (call.body, call.answer) if part is not None]
    _, schemas = msgspec.json.schema_components([*structs, Problem], ref_template=REFS)
    paths: Json = {}
    for call in OPERATIONS:
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
            operation["responses"]["401"] = _failure(UNAUTHORIZED)  # calls that need no token refuse a wrong one
    return made


def _operation(call: Operation) -> Json:
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
    """A schema that msgspec made for JSON, adapted to msgpack: bytes are binary, integers have 64 bits."""
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
                "Not ready yet, or Redis is out of reach",
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
