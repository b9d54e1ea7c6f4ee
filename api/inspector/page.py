"""Routes of the inspector, a page at `GET /` that uses nothing but the public API.

Its Content-Security-Policy lets the page load files from here only, and run no inline script: even if the page turned a
hostile title into markup, which it does not do, a script in it would not run.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api.http.policy import declare
from api.http.problems import NotFound
from api.http.services import Services

router = APIRouter(include_in_schema=False)


@router.get("/")
@declare(None)
async def inspector_page(request: Request) -> Response:
    """The page itself."""
    return Services.of(request).page["index.html"].response(request)


@router.get("/inspector/{name}")
@declare(None)
async def inspector_file(name: str, request: Request) -> Response:
    """A file of the page."""
    file = Services.of(request).page.get(name)
    if file is None:
        raise NotFound("the inspector page has no such file", "file_not_found")
    return file.response(request)
