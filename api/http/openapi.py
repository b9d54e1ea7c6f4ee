"""The OpenAPI document beyond what FastAPI derives from routes and schemas: the errors of each operation and an example
of its response (both declared on the route, see `api.http.policy`), and one schema for all errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from api.http.policy import Policy, policy_of
from api.http.problems import MEDIA_TYPE, RETRY_AFTER_S, ApiProblem, Forbidden, RateLimited, Unauthorized, members
from api.http.schemas.problem import Problem

Json = dict[str, Any]
TAGS = {
    "recommend": "Recommendations.",
    "memory": "What is known about users: store it, look at it, forget it.",
    "catalogue": "Items: their metadata, and which of them are hidden.",
    "model": "The model that serves.",
    "probes": "For orchestrators and Prometheus.",
}
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, made by `ramrec keys create`."},
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "The same key in a header of its own.",
    },
}
REFS = "#/components/schemas/{model}"


class DescribedRoute(APIRoute):
    """A route whose documented responses include the errors that its endpoint declares."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["responses"] = {**(options.get("responses") or {}), **failures(*policy_of(endpoint).errors)}
        super().__init__(path, endpoint, **options)


def failures(*problems: ApiProblem) -> dict[int | str, Json]:
    """The `responses` of a route that can end in these problems, each of which is its own example."""
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
    """The name of an operation in generated clients: that of the endpoint."""
    return route.name


def document(app: FastAPI, routers: Iterable[APIRouter], *, guarded: bool) -> Json:
    """The OpenAPI document, made once. `guarded`: callers need API keys."""
    if app.openapi_schema is None:
        tags = [{"name": name, "description": about} for name, about in TAGS.items()]
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes, tags=tags
        )
        schemas = made["components"]["schemas"]
        schemas |= models_json_schema([(Problem, "serialization")], ref_template=REFS)[1]["$defs"]
        if guarded:
            made["components"]["securitySchemes"] = SCHEMES
        for operation, policy in _operations(made, routers):
            _show_response(operation, policy.example, schemas)
            if guarded and policy.scope is not None:
                _require_key(operation, policy.scope)
        app.openapi_schema = made
    return app.openapi_schema


def _operations(made: Json, routers: Iterable[APIRouter]) -> Iterator[tuple[Json, Policy]]:
    """The operations of a document, and what their routes declare."""
    for route in (route for router in routers for route in router.routes):
        if isinstance(route, APIRoute) and route.include_in_schema:
            for method in route.methods or ():
                yield made["paths"][route.path_format][method.lower()], policy_of(route.endpoint)


def _show_response(operation: Json, example: Any, schemas: Json) -> None:
    """Describe the response by its schema, and add the example."""
    response = operation["responses"]["200"]
    for media in response["content"].values():
        name = media["schema"].get("$ref", "").rpartition("/")[2]
        response["description"] = schemas.get(name, {}).get("description", operation["description"])
        media["example"] = example


def _require_key(operation: Json, scope: str) -> None:
    """Say which scope a key needs, and how calls without it are refused."""
    operation["security"] = [{name: [scope]} for name in SCHEMES]  # OpenAPI 3.1 has scopes for any scheme
    refusals = failures(
        Unauthorized("an API key is required"),
        Forbidden(f"the scope {scope} is required"),
        RateLimited("the API key 'web' has 100 requests a second"),
    )
    for status, refusal in refusals.items():
        _add_failure(operation["responses"], str(status), refusal)


def _add_failure(responses: Json, status: str, failure: Json) -> None:
    """Add a failure to the responses, which may already describe another one of this status."""
    present = responses.setdefault(status, failure)
    if present is not failure:
        present["description"] += failure["description"].partition(":")[2]
        present["content"][MEDIA_TYPE]["examples"] |= failure["content"][MEDIA_TYPE]["examples"]
