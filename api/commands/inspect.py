"""`ramrec inspect`: what a running service remembers about a user and what it did with it, asked over the REST API.

Looking changes nothing: neither reading a bank nor asking with `explain` counts as a use of a memory.
"""

from __future__ import annotations

import http.client
import io
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from api.commands.drawing import Titles, plain
from api.commands.portrait import Lists, nameable, portrait
from api.http.schemas import (
    ITEMS_LIMIT,
    ItemsResponse,
    RecommendBatchResponse,
    RecommendResponse,
    Scope,
    UserMemoryResponse,
)
from model.errors import RamrecError

TIMEOUT_S = 60.0
QUERY_LIMIT = 4000
"""Characters of a query string at most: servers and proxies take lines of 8 KB."""
LINE = 300
"""Characters of an error at most."""
UNKNOWN = "user_not_found"

Face = TypeVar("Face")


class InspectError(RamrecError):
    """The service cannot be reached, refuses, or answers what cannot be understood."""


class RefusedError(InspectError):
    """The service answered, but not with what was asked for; `code`: its own word for it, or ""."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Question:
    """What to recommend, and what to vary: K, scopes and ignored items as in `POST /recommend`."""

    top_n: int = 5
    k: int | None = None
    scopes: tuple[Scope, ...] = ()
    ignore: tuple[str, ...] = ()

    @property
    def varied(self) -> dict[str, Any]:
        """What is asked for otherwise than usual."""
        ways = {"k": self.k, "scopes": list(dict.fromkeys(self.scopes)), "ignore_memories": list(self.ignore)}
        return {name: way for name, way in ways.items() if way}

    def requests(self, user: str) -> list[dict[str, Any]]:
        """What is asked; and where something is varied, the same without that."""
        usual = {"user_id": user, "top_n": self.top_n, "explain": True}
        return [usual | self.varied, usual] if self.varied else [usual]


@dataclass(frozen=True)
class Findings:
    """All answers as they came. `memory` is None where there is none, `refusal` says why."""

    user_id: str
    memory: Any
    recommendations: list[Any]
    refusal: RefusedError | None

    def as_json(self) -> dict[str, Any]:
        """As one object; `usual`: what is recommended when nothing is varied."""
        usual = {"usual": self.recommendations[1]} if len(self.recommendations) > 1 else {}
        return {"user_id": self.user_id, "memory": self.memory, "recommendations": self.recommendations[0], **usual}


def look(url: str, user: str, question: Question, *, key: str | None = None, rows: int = 15, raw: bool = False) -> bool:
    """Ask about a user and print what was found: `rows` memories at most, or the `raw` answers as JSON. Returns whether
    the user is known; a newcomer's recommendations are printed all the same.

    Raises:
        InspectError: no answer, or none that is of use. Where only the bank cannot be read at the moment, what is
            recommended meanwhile is printed first.
    """
    _check_ids(user, *question.ignore)
    service = Service(url, key)
    found = _asked(service, user, question)
    if raw:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        _show(service, found, question, rows)
    if found.refusal is not None and found.refusal.code != UNKNOWN:
        raise found.refusal
    return found.refusal is None


def _check_ids(*ids: str) -> None:
    for one in ids:
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise InspectError(f"the id {plain(one)} is not valid Unicode") from error


def _asked(service: Service, user: str, question: Question) -> Findings:
    memory, refusal = None, None
    try:
        memory = service.get(f"/users/{encoded(user)}/memory")
    except RefusedError as error:
        if error.code != UNKNOWN and error.status != 503:
            raise
        refusal = error
    requests = question.requests(user)
    answers = service.post("/recommend/batch", {"requests": requests})
    if len(understood(RecommendBatchResponse, answers)["results"]) != len(requests):
        raise InspectError("more or fewer answers came than were asked for")
    return Findings(user, memory, answers["results"], refusal)


def _show(service: Service, found: Findings, question: Question, rows: int) -> None:
    """Print all of it for people."""
    bank = None if found.memory is None else understood(UserMemoryResponse, _with_habits(found.memory))
    asked, *usual = understood(list[RecommendResponse], found.recommendations)
    lists = Lists(asked, time.time(), usual[0] if usual else None, question.varied)
    titles = Titles(service.titles(nameable(bank, lists, rows)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    console = Console(highlight=False, markup=False, emoji=False)
    readable = found.refusal is None or found.refusal.code == UNKNOWN
    for part in portrait(found.user_id, bank, lists, titles, rows, readable):
        console.print(part)


def _with_habits(memory: Any) -> Any:
    """A bank as services tell it now; those before habits were kept say nothing of them."""
    if not (isinstance(memory, dict) and isinstance(memory.get("entries"), list)):
        return memory
    unknown = {"mean_gap_s": None, "occasions_since": 0, "usual_hour": None, "usual_day": None}
    entries = [
        {"first_time": entry.get("timestamp"), **unknown, **entry} if isinstance(entry, dict) else entry
        for entry in memory["entries"]
    ]
    return memory | {"entries": entries}


# --------------------------------------------------------------------------------------- the service


class Service:
    """The REST API, asked with a key. It is never asked through a proxy, and no redirection is followed: a key goes to
    nobody but the address that was given.
    """

    def __init__(self, url: str, key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise InspectError(f"{plain(url)} is no URL of a REST API: it begins with http:// or https://")
        if key and not (key.isascii() and key.isprintable()):
            raise InspectError("the API key holds characters that no key has")
        self._url, self._headers = url.rstrip("/"), {"Authorization": f"Bearer {key}"} if key else {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay)

    def get(self, path: str) -> Any:
        """What a path holds."""
        return self._answer(path, None)

    def post(self, path: str, body: Any) -> Any:
        """What is answered to a body."""
        return self._answer(path, json.dumps(body).encode())

    def titles(self, item_ids: Sequence[str]) -> dict[str, str]:
        """What the catalogue calls items."""
        found: dict[str, str] = {}
        for query in queries(item_ids):
            answer = understood(ItemsResponse, self.get(f"/items?{query}"))
            found |= {item.item_id: item.title for item in answer.items}
        return found

    def _answer(self, path: str, body: bytes | None) -> Any:
        text = self._text(path, body)
        try:
            return json.loads(text, parse_constant=_no_number)
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
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last: no URL after all
            reason = getattr(error, "reason", error)
            raise InspectError(plain(f"cannot reach {self._url}: {reason}", LINE)) from error


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Nowhere else."""


def encoded(item_or_user: str) -> str:
    """An id as a part of a path, or in a query: dots too, for what lies between makes something else of `..`.

    >>> encoded("a/b ..")
    'a%2Fb%20%2E%2E'
    """
    return quote(item_or_user, safe="").replace(".", "%2E")


def queries(item_ids: Sequence[str]) -> Iterator[str]:
    """Query strings that name all the items, each once, as many in one as a look-up and a line of HTTP hold."""
    query: list[str] = []
    for one in dict.fromkeys(item_ids):
        word = f"id={encoded(one)}"
        if query and (len(query) == ITEMS_LIMIT or sum(map(len, query)) + len(query) + len(word) > QUERY_LIMIT):
            yield "&".join(query)
            query = []
        query.append(word)
    if query:
        yield "&".join(query)


def understood(face: type[Face], answer: Any) -> Face:
    """An answer, if it has the face that is expected."""
    try:
        return TypeAdapter(face).validate_python(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InspectError(
            plain(f"an answer is not understood ({where}: {first['msg']}); is this a RAMRec api of this version?", LINE)
        ) from error


def _refusal(url: str, error: urllib.error.HTTPError) -> RefusedError:
    """What a problem document says."""
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
