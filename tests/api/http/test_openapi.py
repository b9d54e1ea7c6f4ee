"""The OpenAPI documents of both services are complete, and their examples keep what their schemas say."""

from collections.abc import Iterator

import httpx2
import jsonschema_rs
import pytest
import schemathesis
from fastapi.routing import APIRoute
from starlette.routing import Route

from api.access.keys import create_key
from api.http.app import create_app as create_api
from api.settings import ApiSettings
from memory_service.http.app import create_app as create_memory
from memory_service.settings import MemorySettings

METHODS = {"GET", "PUT", "POST", "PATCH", "DELETE"}


@pytest.fixture
def api(run):
    return create_api(ApiSettings(run=run, memory_url="http://127.0.0.1:9"))


@pytest.fixture
def memory(run):
    return create_memory(MemorySettings(run=run, redis_url="redis://127.0.0.1:9"))


@pytest.fixture
def guarded(run, tmp_path):
    create_key(tmp_path / "keys.json", "anybody", ("recommend",), None)
    return create_api(ApiSettings(run=run, memory_url="http://127.0.0.1:9", keys=tmp_path / "keys.json"))


@pytest.fixture(params=["api", "guarded", "memory"])
def app(request):
    return request.getfixturevalue(request.param)


def operations(document: dict) -> Iterator[tuple[str, str, dict]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_every_route_is_described_and_every_description_has_a_route(app):
    def leaves(routes) -> Iterator[Route]:
        for route in routes:
            if isinstance(route, Route):
                yield route
            elif hasattr(route, "original_router"):  # how FastAPI keeps an included router
                yield from leaves(route.original_router.routes)

    shown = [route for route in leaves(app.routes) if route.include_in_schema]
    served = {
        (method, route.path.replace(":id}", "}")) for route in shown for method in METHODS & (route.methods or set())
    }
    assert served == {(method, path) for method, path, _ in operations(app.openapi())}
    assert any(isinstance(route, APIRoute) for route in shown)


def test_operations_have_distinct_names_a_tag_and_a_description(app):
    found = [operation for _, _, operation in operations(app.openapi())]
    assert len({operation["operationId"] for operation in found}) == len(found)
    tags = {tag["name"] for tag in app.openapi()["tags"]}
    for operation in found:
        assert set(operation["tags"]) <= tags
        assert operation["tags"]
        assert operation.get("description") or operation.get("summary")


def contents(document: dict) -> Iterator[tuple[str, dict]]:
    """Where a body is described, with the schemas of the document beside it."""
    for method, path, operation in operations(document):
        bodies = {"request": operation.get("requestBody", {"content": {}})} | operation["responses"]
        for which, body in bodies.items():
            for kind, media in body["content"].items():
                yield f"{method} {path} {which} {kind}", media


def examples(media: dict, schemas: dict) -> list:
    name = media["schema"].get("$ref", "").rpartition("/")[2]
    named = [one["value"] for one in media.get("examples", {}).values()]
    alone = [media["example"]] if media.get("example") is not None else []
    return alone + named + schemas.get(name, {}).get("examples", [])


def test_every_body_has_examples_and_they_fit_its_schema(app):
    document = app.openapi()
    schemas = document["components"]["schemas"]
    for where, media in contents(document):
        validator = jsonschema_rs.validator_for({**media["schema"], "components": {"schemas": schemas}})
        shown = examples(media, schemas)
        assert shown, where
        for example in shown:
            assert validator.is_valid(example), (where, [error.message for error in validator.iter_errors(example)])


def test_every_error_is_a_problem_and_says_when_to_come_again(app):
    for method, path, operation in operations(app.openapi()):
        for status, answer in operation["responses"].items():
            if status == "200" or path.startswith("/health"):
                continue
            (media,) = answer["content"].values()
            assert media["schema"] == {"$ref": "#/components/schemas/Problem"}, (method, path, status)
            assert ("Retry-After" in answer.get("headers", {})) == (status in ("429", "503")), (method, path, status)


def test_every_parameter_has_an_example_and_says_what_it_is(app):
    for method, path, operation in operations(app.openapi()):
        for parameter in operation.get("parameters", ()):
            assert parameter["description"], (method, path)
            shown = parameter.get("example", parameter.get("examples", parameter["schema"].get("examples")))
            assert shown, (method, path, parameter["name"])


def test_every_field_of_a_request_says_what_it_is(guarded):
    schemas = guarded.openapi()["components"]["schemas"]
    for method, path, operation in operations(guarded.openapi()):
        for media in operation.get("requestBody", {"content": {}})["content"].values():
            for one in media["schema"].get("anyOf", [media["schema"]]):
                name = one.get("$ref", "").rpartition("/")[2]
                fields = schemas.get(name, {"properties": {}})["properties"]
                for field, about in fields.items():
                    said = [part.get("description") for part in (about, *about.get("anyOf", ()))]
                    assert any(said), (method, path, name, field)


def test_a_guarded_api_says_so(guarded):
    found = {(m, path): operation for m, path, operation in operations(guarded.openapi())}
    assert {"401", "403"} <= set(found["POST", "/recommend"]["responses"])
    assert found["POST", "/recommend"]["security"] == [{"bearer": ["recommend"]}, {"apiKey": ["recommend"]}]
    assert "401" not in found["GET", "/health/live"]["responses"]


@pytest.mark.parametrize("url", ["api_url", "memory_url"])
def test_the_document_is_served_and_is_openapi(url, request):
    base = request.getfixturevalue(url)
    response = httpx2.get(base + "/openapi.json")
    assert response.status_code == 200
    schemathesis.openapi.from_dict(response.json()).validate()
