"""Ask the service about a user, and print what it answered.

Nothing is changed: neither reading a bank nor a request with `explain` counts as a use of a memory.
"""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console

from api.commands.inspect.client import InspectClient, InspectError, RefusedError, encoded, understood
from api.commands.inspect.recommendations import Recommendations
from api.commands.inspect.report import nameable, user_report
from api.commands.inspect.text import Titles, plain
from api.http.schemas.fields import Scope
from api.http.schemas.memories import UserMemoryResponse
from api.http.schemas.recommend import RecommendBatchResponse, RecommendResponse

UNKNOWN = "user_not_found"


@dataclass(frozen=True)
class WhatIf:
    """A request for recommendations and what to change in it: K, scopes and ignored items as in `POST /recommend`."""

    top_n: int = 5
    k: int | None = None
    scopes: tuple[Scope, ...] = ()
    ignore: tuple[str, ...] = ()

    @property
    def varied(self) -> dict[str, Any]:
        """The changed fields of the request."""
        ways = {"k": self.k, "scopes": list(dict.fromkeys(self.scopes)), "ignore_memories": list(self.ignore)}
        return {name: way for name, way in ways.items() if way}

    def requests(self, user: str) -> list[dict[str, Any]]:
        """The request, and if something is varied, the same request without the changes."""
        usual = {"user_id": user, "top_n": self.top_n, "explain": True}
        return [usual | self.varied, usual] if self.varied else [usual]


@dataclass(frozen=True)
class Findings:
    """The answers of the api. If there is no bank, `memory` is None and `refusal` says why."""

    user_id: str
    memory: Any
    recommendations: list[Any]
    refusal: RefusedError | None

    def as_json(self) -> dict[str, Any]:
        """All answers as one object; `usual` is the answer without the changes."""
        usual = {"usual": self.recommendations[1]} if len(self.recommendations) > 1 else {}
        return {"user_id": self.user_id, "memory": self.memory, "recommendations": self.recommendations[0], **usual}


def look(url: str, user: str, question: WhatIf, *, key: str | None = None, rows: int = 15, raw: bool = False) -> bool:
    """Ask about a user and print a report with at most `rows` memories, or with `raw` the answers as JSON.

    Returns:
        Whether the user is known. The recommendations for an unknown user are printed, too.

    Raises:
        InspectError: the service did not answer, or its answer is not valid. If only the bank cannot be read, the
            recommendations are printed first.
    """
    _check_ids(user, *question.ignore)
    service = InspectClient(url, key)
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


def _asked(service: InspectClient, user: str, question: WhatIf) -> Findings:
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
        raise InspectError("the api sent more or fewer answers than requests")
    return Findings(user, memory, answers["results"], refusal)


def _show(service: InspectClient, found: Findings, question: WhatIf, rows: int) -> None:
    """Print the report for people."""
    bank = None if found.memory is None else understood(UserMemoryResponse, found.memory)
    asked, *usual = understood(list[RecommendResponse], found.recommendations)
    lists = Recommendations(asked, time.time(), usual[0] if usual else None, question.varied)
    titles = Titles(service.titles(nameable(bank, lists, rows)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    console = Console(highlight=False, markup=False, emoji=False)
    readable = found.refusal is None or found.refusal.code == UNKNOWN
    for part in user_report(found.user_id, bank, lists, titles, rows, readable):
        console.print(part)
