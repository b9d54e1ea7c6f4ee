"""Recommendations and where they come from, as `ramrec inspect` prints them. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from api.commands.inspect.text import Titles, change, counted, habit_now, percent
from api.commands.inspect.widgets import alarm, heading, legend, listing, note, stacked
from api.http.schemas.fields import Scope
from api.http.schemas.memories import UserMemoryResponse
from api.http.schemas.recommend import Because, Habit, MemoryUse, Recommended, RecommendResponse

FIGURES_SHOWN_BEFORE = 3
"""Number of leading figures of an answer that the bank section already shows."""
IGNORED_SHOWN = 3
"""Number of ignored items that are listed by name."""

SHARES = {"state": "█", "memories": "▓", "copied": "░"}
SHARE_COLOURS = {"state": "blue", "memories": "green", "copied": "yellow"}
SHARE_LEGEND = {"state": "from the user's state", "memories": "raised by memories", "copied": "copied from others"}
EXPLANATION = (
    "The bar is as long as P against the best, in its exact shares. memories: what all that were retrieved do to P "
    "(minus: they speak against it); below, what those do that speak most for the item. copied: share of P that is "
    "copied from others who took it. Whose a memory of others is, is never said."
)
OF: tuple[Scope, ...] = ("own", "collective")
WHOSE = {"own": "own", "collective": "others"}
SCOPES = {"own": "the user's own memories", "collective": "others' memories"}


@dataclass(frozen=True)
class Recommendations:
    """The answer to the caller's request (`asked`), and to the same request without their changes (`usual`; None: there
    were none). `varied` holds the changed fields of the request, `at` the time of the request in seconds UTC.
    """

    asked: RecommendResponse
    at: float
    usual: RecommendResponse | None = None
    varied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[RecommendResponse]:
        """One answer, or two if something was varied."""
        return [self.asked] if self.usual is None else [self.asked, self.usual]


def lists_shown(
    lists: Recommendations, titles: Titles, bank: UserMemoryResponse | None = None
) -> Iterator[RenderableType]:
    """The recommendations, where they come from, and what the changes to the request changed."""
    yield heading("What is recommended" if lists.usual is None else "What if?")
    if lists.usual is not None:
        yield Text(f"Asked for: {in_words(lists.varied, titles)}.", "bold")
    if any(answer["memory"]["degraded"] for answer in lists.answers):
        yield alarm("DEGRADED: memories could not be asked, or only in part. With all of them the list may be another.")
    yield from _origin(lists)
    yield _items_table(lists, titles, _since(bank, lists.at))
    if lists.usual is not None:
        yield from _no_longer(lists.asked, lists.usual, titles)
    if _explained(lists):
        yield legend(SHARES, SHARE_COLOURS, SHARE_LEGEND)
        yield note(EXPLANATION)


def in_words(varied: Mapping[str, Any], titles: Titles) -> str:
    """The changed fields of a request in words."""
    words = []
    if "k" in varied:
        words.append(f"{counted(varied['k'], 'own memory', 'own memories')}")
    if "scopes" in varied:
        words.append("all scopes" if len(varied["scopes"]) > 1 else f"only {SCOPES[varied['scopes'][0]]}")
    if ignored := varied.get("ignore_memories"):
        more = f" and {len(ignored) - IGNORED_SHOWN} more" if len(ignored) > IGNORED_SHOWN else ""
        words.append("as if never taken: " + ", ".join(titles[item] for item in ignored[:IGNORED_SHOWN]) + more)
    return "; ".join(words)


def _origin(lists: Recommendations) -> Iterator[RenderableType]:
    """What answered, and how much memory contributed."""
    asked, usual = lists.asked, lists.usual
    yield Text(_source(asked))
    if all(answer["source"] == "popularity" for answer in lists.answers):
        return
    if usual is not None:
        yield _figures_beside(usual, asked)
    else:
        figures = _figures(asked)
        yield Text("; ".join(f"{name}: {figures[name]}" for name in list(figures)[FIGURES_SHOWN_BEFORE:]))
    uses = [answer["memory"][scope] for answer in lists.answers for scope in OF]
    if any(use["retrieved"] < use["k"] for use in uses):
        yield note("Fewer than wanted: the rest is not enough like the present situation.")


def _figures_beside(usual: RecommendResponse, asked: RecommendResponse) -> RenderableType:
    table = listing("", "usual", "what if", right=("usual", "what if"))
    before, after = _figures(usual), _figures(asked)
    for name, figure in before.items():
        table.add_row(name, figure, Text(after[name], "bold" if after[name] != figure else ""))
    return table


def _source(answer: RecommendResponse) -> str:
    return {
        "memory": "Answered from memory.",
        "encoder": "Answered by the encoder alone: no memories were found.",
        "popularity": "Nothing to go by: what most people take, as for a newcomer.",
    }[answer["source"]]


def _found(memory: MemoryUse, scope: Scope) -> str:
    return f"{memory[scope]['retrieved']} of {memory[scope]['k']} wanted"


def _figures(answer: RecommendResponse) -> dict[str, str]:
    memory = answer["memory"]
    return {
        "source": answer["source"],
        "memories in the bank": str(memory["bank_size"]),
        "entropy": f"{memory['entropy']:.2f}",
        "own memories retrieved": _found(memory, "own"),
        "others' retrieved": _found(memory, "collective"),
        "memory's share in the state (gate)": percent(memory.get("gate", 0.0)),
        "copied from others in all (λ)": percent(memory.get("copying", 0.0)),
    }


def _since(bank: UserMemoryResponse | None, at: float) -> dict[str, float]:
    """Item → seconds between its last event and the time `at`."""
    return {} if bank is None else {entry.item_id: at - entry.timestamp for entry in bank.entries}


def _items_table(lists: Recommendations, titles: Titles, since: Mapping[str, float]) -> RenderableType:
    """The items in order, each with the memories that raised it, and with its habit if one of them is its own."""
    items = lists.asked["items"]
    if not items:
        return Text("Nothing is left to recommend.")
    moved = ("moved",) if lists.usual else ()
    figures = ("log P", "P", "", "memories", "copied") if _explained(lists) else ("log P", "P")
    table = listing("#", *moved, "item", *figures, right=("#", "log P", "P", "memories", "copied"), wide="item")
    before, best = _places(lists.usual), max(item["score"] for item in items)
    for rank, item in enumerate(items, start=1):
        movement = (_moved(rank, before.get(item["item_id"])),) if moved else ()
        title, score = Text(titles[item["item_id"]], "bold"), item["score"]
        parts = _split(item, math.exp(score - best)) if _explained(lists) else ()
        table.add_row(f"{rank}", *movement, title, f"{score:.2f}", percent(math.exp(min(score, 0))), *parts)
        for reason in item.get("because", ()):
            table.add_row("", *("" for _ in moved), _speaks(reason, titles), "", "", "", *_does(reason))
            if "habit" in reason and reason["item_id"] == item["item_id"]:
                table.add_row("", *("" for _ in moved), _usual(reason["habit"], since.get(reason["item_id"], 0.0)))
    return table


def _explained(lists: Recommendations) -> bool:
    return any("parts" in item for item in lists.asked["items"])


def _places(answer: RecommendResponse | None) -> dict[str, int]:
    return {item["item_id"]: rank for rank, item in enumerate(answer["items"] if answer else (), start=1)}


def _moved(rank: int, before: int | None) -> Text:
    if before is None:
        return Text("new", "green")
    by = before - rank
    return Text(f"▲ {by}", "green") if by > 0 else Text(f"▼ {-by}", "red") if by else Text("=", "dim")


def shares(item: Recommended) -> dict[str, float]:
    """The parts of an item's probability, which add up to 1: the calibrated state alone, what memories contribute to
    the logit (negative if they lower it), and the part copied from others. Empty if the item has no `parts`.
    """
    parts = item.get("parts")
    if parts is None:
        return {}
    copied = min(max(parts["copied"], 0.0), 1.0)
    if parts["memories"] is None:
        return {"state": 0.0, "memories": 0.0, "copied": copied}
    alone = (1 - copied) * math.exp(-max(parts["memories"], -700.0))
    return {"state": alone, "memories": 1 - copied - alone, "copied": copied}


def _split(item: Recommended, length: float) -> Iterator[Text]:
    """A bar of an item's shares (`length`: share of the full width), the effect of memories, and the copied share."""
    split = shares(item)
    drawn = split if split.get("memories", 0) >= 0 else split | {"state": 1 - split["copied"], "memories": 0.0}
    yield stacked({name: share * length for name, share in drawn.items()}, SHARES, SHARE_COLOURS, 10)
    logit = item["parts"]["memories"] if "parts" in item else None
    yield Text("-" if logit is None else _factor(logit))
    yield Text(percent(split["copied"]) if split.get("copied") else "")


def _speaks(reason: Because, titles: Titles) -> Text:
    return Text.assemble((f"  {WHOSE[reason['scope']]:<7}", "dim"), titles[reason["item_id"]])


def _usual(habit: Habit, since: float) -> RenderableType:
    """A habit in words. The model bounds `since_s`; the bank knows the true time since the last event (`since`)."""
    since_s = None if habit["since_s"] is None else max(habit["since_s"], since)
    told = habit_now(habit["count"], since_s, habit["at_this_hour"], habit["on_this_day"])
    return Padding(Text(told, "dim", no_wrap=False, overflow="fold"), (0, 0, 0, 4))


def _does(reason: Because) -> Iterator[Text]:
    yield Text(_factor(reason["logit"]), "dim")
    yield Text(percent(reason["copied"]) if reason["copied"] else "", "dim")


def _factor(logit: float) -> str:
    """By how much a part of the logit changes the model's probability."""
    return change(math.expm1(min(logit, 700.0)))


def _no_longer(asked: RecommendResponse, usual: RecommendResponse, titles: Titles) -> Iterator[RenderableType]:
    """Items of the usual list that are missing from this one."""
    now = _places(asked)
    gone = [(item, rank) for item, rank in _places(usual).items() if item not in now]
    if gone:
        yield Text(
            "No longer in the list: " + ", ".join(f"{titles[item]} (was {rank})" for item, rank in gone),
            "red",
        )
    elif list(now) == list(_places(usual)):
        yield Text("The same items in the same order as usual.")
