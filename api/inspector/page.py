"""What a browser gets: the inspector page at `GET /` and its files. They ask nothing but the public API.

The page may load what comes from here and run no script written into it (its Content-Security-Policy), so that a
hostile title could not even if the page made markup of it, which it does not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from api.http.problems import NotFound

FOLDER = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class File:
    """A file of the page: its bytes, how browsers are told of them, and a tag that changes with them."""

    content: bytes
    media_type: str
    tag: str

    @classmethod
    def read(cls, path: Path) -> File:
        """From the package's folder."""
        content = path.read_bytes()
        return cls(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:16]}"')

    def answer(self, request: Request) -> Response:
        """The file, or that the browser has it already."""
        headers = {**SAFE, "ETag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


FILES = {path.name: File.read(path) for path in FOLDER.iterdir() if path.suffix in TYPES}
"""By name; read once."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def home(request: Request) -> Response:
    """The inspector page."""
    return FILES["index.html"].answer(request)


@router.get("/inspector/{name}")
async def part(name: str, request: Request) -> Response:
    """A file of the page."""
    if name not in FILES:
        raise NotFound("the inspector page has no such file", "file_not_found")
    return FILES[name].answer(request)
