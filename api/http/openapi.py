"""The OpenAPI document beyond what FastAPI derives from routes and schemas: which errors an operation has, an
example of every answer (`api/http/examples.py`), one schema of all problems.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from api.access.scopes import ROUTES
from api.http.examples import ANSWERS
from api.http.problems import MEDIA_TYPE, RETRY_AFTER_S, ApiProblem, Forbidden, RateLimited, Unauthorized, members
from api.http.schemas import Problem

Json = dict[str, Any]
TAGS = {
    "recommend": "Ask for recommendations.",
    "memory": "What is kept about users: add to it, look at it, forget it.",
    "catalogue": "Items: what is known about them, and which are hidden.",
    "model": "The checkpoint that answers.",
    "probes": "For orchestration and Prometheus.",
}
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of `ramrec keys create`."},
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same in a header of its own.",
    },
}
REFS = "#/components/schemas/{model}"


def failures(*problems: ApiProblem) -> dict[int | str, Json]:
    """The `responses` of a route that can end in these problems; each is its own example."""
    answers: dict[int | str, Json] = {}
    for problem in problems:
        answer = answers.setdefault(problem.status, _failure(problem.status))
        value = members(problem.status, problem.code, problem.title, problem.detail, **problem.extra)
        example = {"summary": problem.title, "value": value}
        answer["content"][MEDIA_TYPE]["examples"][problem.code] = example
    for answer in answers.values():
        codes = ", ".join(f"`{code}`" for code in answer["content"][MEDIA_TYPE]["examples"])
        answer["description"] = f"{answer['description']}: {codes}"
    return answers


def _failure(status: int) -> Json:
    retry = {"description": "Seconds.", "schema": {"type": "string"}, "example": str(RETRY_AFTER_S)}
    headers = {"headers": {"Retry-After": retry}} if status in (429, 503) else {}
    body = {MEDIA_TYPE: {"schema": {"$ref": REFS.format(model=Problem.__name__)}, "examples": {}}}
    return {"description": HTTPStatus(status).phrase, **headers, "content": body}


def operation_id(route: APIRoute) -> str:
    """What generated clients call an operation: the endpoint's name."""
    return route.name


def document(app: FastAPI, *, guarded: bool) -> Json:
    """The OpenAPI document, made once; `guarded`: callers need API keys."""
    if app.openapi_schema is None:
        tags = [{"name": name, "description": about} for name, about in TAGS.items()]
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=tags
        )
        schemas = made["components"]["schemas"]
        schemas |= models_json_schema([(Problem, "serialization")], ref_template=REFS)[1]["$defs"]
        for methods in made["paths"].values():
            for operation in methods.values():
                _show_answer(operation, schemas)
        if guarded:
            _secure(made)
        app.openapi_schema = made
    return app.openapi_schema


def _secure(made: Json) -> None:
    """Say which operation needs which scope, and how it refuses."""
    made["components"]["securitySchemes"] = SCHEMES
    for (method, path), scope in ROUTES.items():
        operation = made["paths"].get(path.replace(":id}", "}"), {}).get(method.lower())
        if operation is not None and scope is not None:
            operation["security"] = [{name: [scope]} for name in SCHEMES]  # OpenAPI 3.1 has scopes for any scheme
            refusals = failures(
                Unauthorized("an API key is wanted"),
                Forbidden(f"the scope {scope} is wanted"),
                RateLimited("the API key 'web' has 100 requests a second"),
            )
            for status, answer in refusals.items():
                _add_answer(operation["responses"], str(status), answer)


def _add_answer(responses: Json, status: str, answer: Json) -> None:
    """Add a failure to an operation, which may have others of this status."""
    there = responses.setdefault(status, answer)
    if there is not answer:
        there["description"] += answer["description"].partition(":")[2]
        there["content"][MEDIA_TYPE]["examples"] |= answer["content"][MEDIA_TYPE]["examples"]


def _show_answer(operation: Json, schemas: Json) -> None:
    """Describe the answer by its schema, and add the example."""
    answer = operation["responses"]["200"]
    for media in answer["content"].values():
        name = media["schema"].get("$ref", "").rpartition("/")[2]
        answer["description"] = schemas.get(name, {}).get("description", operation["description"])
        media["example"] = ANSWERS.get(operation["operationId"])
