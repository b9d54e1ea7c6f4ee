"""A client of the REST API for `ramrec inspect`. It checks every answer before anything is printed."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from api.commands.inspect.text import plain
from api.http.schemas.items import ITEMS_LIMIT, ItemsResponse
from model.errors import RamrecError

TIMEOUT_S = 60.0
QUERY_LIMIT = 4000
"""Longest query string in characters: servers and proxies accept lines of 8 KB."""
LINE = 300
"""Longest error message in characters."""

Schema = TypeVar("Schema")


class InspectError(RamrecError):
    """The service cannot be reached, refuses, or sends an answer that is not valid."""


class RefusedError(InspectError):
    """The service answered with an error status; `code` is the `code` of its problem document, or ""."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class InspectClient:
    """The REST API, called with an API key.

    No proxy is used and no redirect is followed, so the key is sent to no other address.
    """

    def __init__(self, url: str, key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise InspectError(f"{plain(url)} is no URL of a REST API; it must begin with http:// or https://")
        if key and not (key.isascii() and key.isprintable()):
            raise InspectError("the API key holds characters that are not allowed in a key")
        self._url, self._headers = url.rstrip("/"), {"Authorization": f"Bearer {key}"} if key else {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._answer(path, None)

    def post(self, path: str, body: Any) -> Any:
        """The JSON that answers a body."""
        return self._answer(path, json.dumps(body).encode())

    def titles(self, item_ids: Sequence[str]) -> dict[str, str]:
        """Item id → title in the catalogue."""
        found: dict[str, str] = {}
        for query in queries(item_ids):
            answer = understood(ItemsResponse, self.get(f"/items?{query}"))
            found |= {item.item_id: item.title for item in answer.items}
        return found

    def _answer(self, path: str, body: bytes | None) -> Any:
        text = self._text(path, body)
        try:
            return json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            message = f"{self._url}{path} gave an answer that is no JSON; is this a RAMRec api?"
            raise InspectError(plain(message, LINE)) from error

    def _text(self, path: str, body: bytes | None) -> bytes:
        url = self._url + path
        try:
            request = urllib.request.Request(url, body, self._headers | {"Content-Type": "application/json"})
            with self._opener.open(request, timeout=TIMEOUT_S) as response:
                text: bytes = response.read()
                return text
        except urllib.error.HTTPError as error:
            raise _refusal(url, error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: the URL is not valid
            reason = getattr(error, "reason", error)
            raise InspectError(plain(f"cannot reach {self._url}: {reason}", LINE)) from error


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Do not follow."""


def encoded(item_or_user: str) -> str:
    """An id quoted for a path or a query. Dots are quoted, too: clients and proxies resolve `..` in a path.

    >>> encoded("a/b ..")
    'a%2Fb%20%2E%2E'
    """
    return quote(item_or_user, safe="").replace(".", "%2E")


def queries(item_ids: Sequence[str]) -> Iterator[str]:
    """Query strings that name every item once, each within the limits of one look-up and of a line of HTTP."""
    query: list[str] = []
    for one in dict.fromkeys(item_ids):
        word = f"id={encoded(one)}"
        if query and (len(query) == ITEMS_LIMIT or sum(map(len, query)) + len(query) + len(word) > QUERY_LIMIT):
            yield "&".join(query)
            query = []
        query.append(word)
    if query:
        yield "&".join(query)


def understood(schema: type[Schema], answer: Any) -> Schema:
    """Validate an answer. Raises InspectError if it does not fit the schema."""
    try:
        return TypeAdapter(schema).validate_python(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole answer"
        raise InspectError(
            plain(f"an answer is not understood ({where}: {first['msg']}); is this a RAMRec api of this version?", LINE)
        ) from error


def _refusal(url: str, error: urllib.error.HTTPError) -> RefusedError:
    """The error that a problem document describes."""
    try:
        text = error.read()
    except (OSError, http.client.HTTPException):
        text = b""
    try:
        problem = json.loads(text)
        detail, code = str(problem["detail"]), str(problem["code"])
    except (ValueError, RecursionError, TypeError, KeyError):
        detail, code = f"{error.reason}; is this a RAMRec api?", ""
    return RefusedError(plain(f"{url} answered {error.code}: {detail}", LINE), error.code, code)
