"""The services of an api under test: looked at, or replaced."""

from collections.abc import Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api.http.services import Services


def with_services(app: FastAPI, change: Callable[[Services], Services] = lambda services: services) -> list[Services]:
    """Have `change` replace the services when the app starts; they are in the list from then on."""
    start, started = app.router.lifespan_context, []

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async with start(app) as state:
            started.append(change(state["services"]))
            yield {"services": started[-1]}

    app.router.lifespan_context = lifespan
    return started
