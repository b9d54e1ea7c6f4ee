"""What a route declares beside its path: who may call it, which errors it ends in, and an example of its response."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi.routing import APIRoute

from api.access.keys import KeyScope
from api.http.problems import ApiProblem
from memory_service.protocol.call.envelope import UNKNOWN

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


@dataclass(frozen=True)
class Policy:
    """How the calls of a route are treated.

    scope: what a caller's API key must allow; None: the route needs no key.
    errors: examples of the errors that the route can end in, beside those of a missing key.
    example: an example of the response.
    has_deadline: whether the setting `request_timeout_s` limits calls whose caller names no deadline.
    is_polled: Prometheus or an orchestrator calls it all the time, so that successful calls are not logged.
    """

    scope: KeyScope | None = "admin"
    errors: tuple[ApiProblem, ...] = ()
    example: Any = None
    has_deadline: bool = True
    is_polled: bool = False


UNDECLARED = Policy()
"""Of routes that declare nothing: a policy that was forgotten closes a route, it does not open it."""
OPEN = Policy(None)


def declare(
    scope: KeyScope | None, *errors: ApiProblem, example: Any = None, has_deadline: bool = True, is_polled: bool = False
) -> Callable[[Endpoint], Endpoint]:
    """Decorator: give an endpoint its policy. It goes below the decorator that makes the route."""

    def mark(endpoint: Endpoint) -> Endpoint:
        vars(endpoint)["policy"] = Policy(scope, errors, example, has_deadline, is_polled)
        return endpoint

    return mark


def policy_of(endpoint: object) -> Policy:
    """The policy that was declared for an endpoint."""
    policy: Policy = getattr(endpoint, "policy", UNDECLARED)
    return policy


class RouteTable:
    """Finds the route of a request ahead of the framework, so that a policy applies before anything is read or run.

    `open_paths`: pages of the framework itself, which need no key.
    """

    def __init__(self, routers: Iterable[APIRouter], open_paths: Iterable[str | None]) -> None:
        self._exact = {("GET", path): (path, OPEN) for path in open_paths if path}
        self._templates = []
        for route in (route for router in routers for route in router.routes if isinstance(route, APIRoute)):
            found = route.path, policy_of(route.endpoint)
            for method in route.methods or ():
                if route.param_convertors:
                    self._templates.append((method, route.path_regex, found))
                else:
                    self._exact[method, route.path] = found

    def find(self, method: str, path: str) -> tuple[str, Policy]:
        """Template and policy of the route of a request; ("unknown", UNDECLARED) if there is none."""
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact
        for its_method, pattern, found in self._templates:
            if method == its_method and pattern.match(path):
                return found
        return UNKNOWN, UNDECLARED
