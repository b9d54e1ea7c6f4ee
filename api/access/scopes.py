"""Who may do what: the scope that each route needs, and the check of a caller's key against it.

A route that is not listed here needs `admin`: what was forgotten is shut, not open.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.routing import compile_path

import api.http.paths  # noqa: F401 - the convertor `id`
from api.access.keys import Key, KeyRing, Scope
from api.http.problems import Forbidden, Unauthorized

ROUTES: dict[tuple[str, str], Scope | None] = {
    ("POST", "/recommend"): "recommend",
    ("POST", "/recommend/batch"): "recommend",
    ("GET", "/items"): "recommend",
    ("GET", "/items/{item_id:id}"): "recommend",
    ("GET", "/model"): "recommend",
    ("POST", "/memories"): "ingest",
    ("GET", "/users"): "admin",
    ("GET", "/users/{user_id:id}/memory"): "admin",
    ("DELETE", "/users/{user_id:id}/memory"): "admin",
    ("PUT", "/items/{item_id:id}"): "admin",
    ("PATCH", "/items/{item_id:id}"): "admin",
    ("POST", "/model/reload"): "admin",
    ("GET", "/metrics"): "admin",
    ("GET", "/health/live"): None,
    ("GET", "/health/ready"): None,
    ("GET", "/openapi.json"): None,
    ("GET", "/docs"): None,
    ("GET", "/docs/oauth2-redirect"): None,
    ("GET", "/redoc"): None,
    ("GET", "/"): None,
    ("GET", "/inspector/{name}"): None,
}
"""Method and path template → the scope that a key needs; None: open to everybody."""

_TEMPLATES = [(method, compile_path(path)[0], path, scope) for (method, path), scope in ROUTES.items() if "{" in path]


def needed(method: str, path: str) -> tuple[str, Scope | None]:
    """Template and scope of what a request asks for; ("unknown", "admin") where no such route is listed."""
    if (method, path) in ROUTES:
        return path, ROUTES[method, path]
    for its_method, pattern, template, scope in _TEMPLATES:
        if method == its_method and pattern.match(path):
            return template, scope
    return "unknown", "admin"


def presented(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The key that a request brings: `Authorization: Bearer …`, else `X-API-Key`."""
    sent = headers.get(b"authorization")
    if sent is not None and sent[:7].lower() == b"bearer ":
        return sent[7:].strip()
    return headers.get(b"x-api-key")


def admit(ring: KeyRing, scope: Scope, headers: Mapping[bytes, bytes]) -> Key:
    """The caller's key, which may do what `scope` allows.

    Raises:
        Unauthorized: no key, or none that is known. Forbidden: it lacks the scope.
    """
    sent = presented(headers)
    if sent is None:
        raise Unauthorized("an API key is wanted: Authorization: Bearer …, or X-API-Key")
    key = ring.find(sent)
    if key is None:
        raise Unauthorized("this API key is not known", known=False)
    if scope not in key.scopes:
        raise Forbidden(f"this needs an API key with the scope {scope}")
    return key
