"""What a service remembers about a user, and what it did with it, as `ramrec inspect` prints it. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from api.commands.drawing import (
    Titles,
    alarm,
    bar,
    change,
    counted,
    day,
    habit_kept,
    habit_now,
    heading,
    legend,
    listing,
    note,
    percent,
    plain,
    stacked,
)
from api.http.schemas import (
    Because,
    Habit,
    HowMany,
    MemoryUse,
    PrunedItem,
    QualityParts,
    Recommended,
    RecommendResponse,
    Scope,
    UserMemoryResponse,
)

NARROW, DIVERSE = 0.4, 0.6
"""Entropies from which on a taste is called so: around 0.5, where K is neither raised nor lowered."""
TOLD = 3
"""Figures of an answer that the bank has told already."""
CLUSTERS = 8
"""Clusters that are shown, the heaviest."""
NAMING = 3
"""Memories that name a cluster."""

QUALITY = {"frequency": "█", "recency": "▓", "access": "▒", "rating": "░"}
COLOURS = {"frequency": "cyan", "recency": "green", "access": "magenta", "rating": "yellow"}
LEGEND = {
    "frequency": "taken often",
    "recency": "recently",
    "access": "retrieved often",
    "rating": "rated well",
}
SHARES = {"state": "█", "memories": "▓", "copied": "░"}
SHARE_COLOURS = {"state": "blue", "memories": "green", "copied": "yellow"}
SHARE_LEGEND = {"state": "from the user's state", "memories": "raised by memories", "copied": "copied from others"}
EXACTLY = (
    "The bar is as long as P against the best, in its exact shares. memories: what all that were retrieved do to P "
    "(minus: they speak against it); below, what those do that speak most for the item. copied: share of P that is "
    "copied from others who took it. Whose a memory of others is, is never said."
)
OF: tuple[Scope, ...] = ("own", "collective")
WHOSE = {"own": "own", "collective": "others"}
SCOPES = {"own": "the user's own memories", "collective": "others' memories"}


def portrait(
    user_id: str, bank: UserMemoryResponse | None, lists: Lists, titles: Titles, rows: int, readable: bool = True
) -> Iterator[RenderableType]:
    """All there is to tell, part by part. Without a bank the user is unknown, or it is not
    `readable` at the moment."""
    if bank is not None:
        yield from bank_shown(bank, titles, rows, lists.at)
    else:
        yield Rule(Text(f"User {plain(user_id)}", "bold"), align="left", style="dim")
        yield Text("Nothing is remembered about this user.") if readable else alarm("The bank cannot be read now.")
    yield from lists_shown(lists, titles, bank)
    yield from map(note, remarks(bank, lists))


def nameable(bank: UserMemoryResponse | None, lists: Lists, rows: int) -> list[str]:
    """The items that are shown by their titles."""
    items = list(lists.varied.get("ignore_memories", ()))
    for answer in lists.answers:
        for item in answer["items"]:
            items += [item["item_id"], *(reason["item_id"] for reason in item.get("because", ()))]
    if bank is not None:
        items += [entry.item_id for entry in bank.entries] + [one.item_id for one in bank.pruned_items[:rows]]
    return items


# ------------------------------------------------------------------------------------------- the bank


def bank_shown(bank: UserMemoryResponse, titles: Titles, rows: int, now: float) -> Iterator[RenderableType]:
    """A user's memory, laid open: `rows` memories and forgotten items at most, seen at `now` (seconds)."""
    yield from headline(bank)
    yield heading("How diverse is the taste?")
    yield from diversity(bank, titles)
    yield heading("How many memories are fetched? (adaptive K)")
    yield from how_many(bank)
    yield heading("The memories")
    yield from memories(bank, titles, rows)
    yield from habits(bank, titles, rows, now)
    yield heading("What was forgotten")
    yield from forgotten(bank, titles, rows)


def headline(bank: UserMemoryResponse) -> Iterator[RenderableType]:
    """Who, how much, and of which model."""
    yield Rule(Text(f"User {plain(bank.user_id)}", "bold"), align="left", style="dim")
    yield Text.assemble(
        (f"{bank.bank_size} of {counted(bank.capacity, 'memory', 'memories')}", "bold"),
        f" · {counted(bank.events, 'event')} · {bank.pruned:,} pruned · version {bank.version}"
        f" · model {plain(bank.model_version)}",
    )
    if not bank.share:
        yield Text("Not shared: nobody else is recommended anything because of these memories.")


def diversity(bank: UserMemoryResponse, titles: Titles) -> Iterator[RenderableType]:
    """Entropy, what it means, and the clusters that it is of."""
    yield Text.assemble("Entropy ", (f"{bank.entropy:.2f}", "bold"), f"   0 narrow {_scale(bank.entropy)} diverse 1")
    yield Text(_taste(bank))
    table = listing("cluster", "", "share", "the best memories in it", right=("share",), wide="the best memories in it")
    heaviest = sorted(bank.clusters.items(), key=lambda one: -one[1])
    most = max(bank.clusters.values(), default=1.0)
    for cluster, share in heaviest[:CLUSTERS]:
        table.add_row(
            Text(plain(cluster)),
            Text(bar(share / most, 12), "cyan"),
            percent(share),
            Text(_named(bank, cluster, titles)),
        )
    if heaviest:
        yield table
    if rest := heaviest[CLUSTERS:]:
        share = sum(share for _, share in rest)
        yield note(f"and {counted(len(rest), 'smaller cluster')}, together {percent(share)}")
    if strangers := sum(entry.cluster is None for entry in bank.entries):
        yield note(f"{counted(strangers, 'memory', 'memories')} of items that the model does not know: in no cluster")


def _scale(entropy: float, width: int = 30) -> str:
    at = round(min(max(entropy, 0), 1) * (width - 1))
    return "├" + "─" * at + "●" + "─" * (width - 1 - at) + "┤"


def _taste(bank: UserMemoryResponse) -> str:
    """One sentence about the entropy."""
    placed = sum(entry.cluster is not None for entry in bank.entries)
    if placed <= 1:
        return "Too few memories to tell: 0.50 stands for neither narrow nor diverse."
    among = f"{counted(placed, 'memory', 'memories')} in {counted(len(bank.clusters), 'cluster')} of like items"
    if bank.entropy < NARROW:
        return f"A narrow taste ({among}): a few memories say it all, so fewer are fetched."
    if bank.entropy > DIVERSE:
        return f"A diverse taste ({among}): one memory says little of the next, so more are fetched."
    return f"In between ({among}): neither fewer nor more memories than usual are fetched."


def _named(bank: UserMemoryResponse, cluster: str, titles: Titles) -> str:
    best = sorted((one for one in bank.entries if str(one.cluster) == cluster), key=lambda one: -one.quality)
    return " · ".join(titles[entry.item_id] for entry in best[:NAMING])


def how_many(bank: UserMemoryResponse) -> Iterator[RenderableType]:
    """K, and how it was reached, for the user's own memories and others'."""
    if bank.adaptive_k is None:
        yield Text(f"K = {bank.k} of the user's own; this service does not tell how it was reached.")
        return
    own, others = bank.adaptive_k.own, bank.adaptive_k.collective
    table = listing("", "base · (0.5 + entropy) · growth", "wanted", "bounds", "K", right=("wanted", "K"))
    table.add_row("own memories", *_reckoned(own, bank.entropy), _bounds(own, bank.bank_size), Text(str(own.k), "bold"))
    table.add_row("others'", *_reckoned(others, bank.entropy), _bounds(others), Text(str(others.k), "bold"))
    yield table
    yield note(
        f"Growth counts how full the bank is ({bank.bank_size} of {bank.capacity}); 1 for others' memories, which a "
        "newcomer needs most."
    )


def wanted(how: HowMany, entropy: float) -> float:
    """The number of memories that the rule asks for, before it is rounded and bounded."""
    return how.base * (0.5 + entropy) * how.growth


def _reckoned(how: HowMany, entropy: float) -> tuple[str, str]:
    asked = wanted(how, entropy)
    formula = f"{how.base:g} · (0.5 + {entropy:.2f}) · {how.growth:.2f} = {asked:.2f}"
    return formula, f"{math.floor(asked + 0.5)}"


def _bounds(how: HowMany, there_are: int | None = None) -> str:
    bounds = f"{how.k_min} to {how.k_max}"
    return bounds if there_are is None else f"{bounds}, there are {there_are}"


def memories(bank: UserMemoryResponse, titles: Titles, rows: int) -> Iterator[RenderableType]:
    """The bank as a table, the most valuable memories first."""
    best = sorted(bank.entries, key=lambda one: (-one.quality, -one.timestamp))
    shown = best[:rows]
    with_ids = titles.tell_more([entry.item_id for entry in shown])
    yield Text("worth (quality):  ").append_text(legend(QUALITY, COLOURS, LEGEND))
    table = _worth_table(with_ids, "cl", "taken", "rated", "last, UTC")
    for entry in shown:
        table.add_row(
            *_called(entry.item_id, titles, with_ids),
            "-" if entry.cluster is None else str(entry.cluster),
            *_worth(entry.quality, entry.quality_parts, bank.threshold),
            f"{entry.frequency:,}",
            "-" if entry.rating is None else f"{entry.rating:g}",
            day(entry.timestamp),
        )
    if shown:
        yield table
    if more := len(best) - len(shown):
        yield note(f"and {counted(more, 'memory', 'memories')} of lower quality, not shown (--memories)")
    yield note(_what_goes(bank))


def habits(bank: UserMemoryResponse, titles: Titles, rows: int, now: float) -> Iterator[RenderableType]:
    """What was taken more than once, the most often first: how often, and when; nothing where data has no times."""
    again = [entry for entry in bank.entries if entry.mean_gap_s is not None]
    shown = sorted(again, key=lambda one: (-one.frequency, -one.timestamp))[:rows]
    if not shown:
        return
    yield heading("How often, and when?")
    for entry in shown:
        since = now - entry.timestamp
        told = habit_kept(entry.frequency, entry.mean_gap_s, since, entry.usual_hour, entry.usual_day)
        yield Text.assemble((titles[entry.item_id], "bold"), f": {told}")
    if more := len(again) - len(shown):
        yield note(f"and {counted(more, 'memory', 'memories')} taken less often, not shown (--memories)")


def _worth_table(with_ids: bool, first: str, *rest: str) -> Table:
    names = ("id", "title") if with_ids else ("item",)
    cluster = (first,) if first else ()
    right = ("worth", "freq", "rec", "acc", "rat", "cl", *rest)
    columns = (*names, *cluster, "worth", "", "freq", "rec", "acc", "rat", *rest)
    return listing(*columns, right=right, wide=names[-1], short=("id",))


def _called(item_id: str, titles: Titles, with_ids: bool) -> tuple[Text, ...]:
    title = Text(titles[item_id])
    return (Text(plain(item_id), "dim"), title) if with_ids else (title,)


def _worth(quality: float, parts: QualityParts | None, threshold: float | None) -> Iterator[RenderableType]:
    """Quality, marked where it is below the threshold; its bar; its four parts."""
    low = threshold is not None and quality < threshold
    yield Text(("↓" if low else "") + f"{quality:.2f}", "bold red" if low else "bold")
    shares = {} if parts is None else {name: float(getattr(parts, name)) for name in QUALITY}
    yield stacked(shares, QUALITY, COLOURS, 10)
    for name in QUALITY:
        yield Text(f"{shares[name]:.2f}".removeprefix("0") if shares else "-", COLOURS[name])


def _what_goes(bank: UserMemoryResponse) -> str:
    if bank.threshold is None:
        return "Which memory goes when the bank is over-full, does not depend on quality here."
    weak = sum(entry.quality < bank.threshold for entry in bank.entries)
    full = "The bank is full" if bank.bank_size >= bank.capacity else f"Room for {bank.capacity - bank.bank_size} more"
    below = f"{weak} below it now (↓)" if weak else "none below it now"
    return f"{full}. When over-full, what is below {bank.threshold:.2f} goes, and the weakest anyway: {below}."


def forgotten(bank: UserMemoryResponse, titles: Titles, rows: int) -> Iterator[RenderableType]:
    """What the bank has pruned and the log still names, and why it went."""
    if not bank.pruned and not bank.pruned_items:
        yield Text("Nothing: the bank was never over-full.")
        return
    yield Text(
        f"{bank.pruned:,} times a memory was pruned. {counted(len(bank.pruned_items), 'item')} of the log "
        f"{'is' if len(bank.pruned_items) == 1 else 'are'} not in the bank (any more):"
    )
    shown = bank.pruned_items[:rows]
    with_ids = titles.tell_more([one.item_id for one in shown])
    table = _worth_table(with_ids, "", "last, UTC", "today")
    for one in shown:
        table.add_row(
            *_called(one.item_id, titles, with_ids),
            *_worth(one.quality, one.quality_parts, bank.threshold),
            day(one.timestamp),
            _why(one, bank),
        )
    if shown:
        yield table
    if more := len(bank.pruned_items) - len(shown):
        yield note(f"and {counted(more, 'item')} taken before, not shown (--memories)")
    yield from map(note, _honestly(bank))


def _why(one: PrunedItem, bank: UserMemoryResponse) -> str:
    """Where an item that was pruned would stand today."""
    if bank.threshold is None or not bank.entries:
        return "-"
    if one.quality < min(entry.quality for entry in bank.entries):
        return "weakest"
    return "too weak" if one.quality < bank.threshold else "would stay"


def _honestly(bank: UserMemoryResponse) -> Iterator[str]:
    """What the table of pruned items cannot know."""
    if bank.threshold is not None and bank.entries:
        lowest = min(entry.quality for entry in bank.entries)
        yield (
            f"today: weakest = worth less than the lowest kept ({lowest:.2f}), too weak = below {bank.threshold:.2f}, "
            "would stay = what decided then is forgotten: a low rating, no retrievals, a stronger bank."
        )
    yield (
        "Worth is reckoned as of today. Rating and retrievals went with the memory: it counts as unrated and never "
        "retrieved."
    )
    if bank.events > len(bank.log):
        yield f"The log has the newest {len(bank.log)} of {bank.events:,} events; what went before cannot be named."


# ----------------------------------------------------------------------------------- recommendations


@dataclass(frozen=True)
class Lists:
    """What is recommended: `asked` as the caller wants to see it; `usual` without anything that they varied (None: they
    varied nothing). `varied`: these fields of the request. `at`: when they were asked for, seconds.
    """

    asked: RecommendResponse
    at: float
    usual: RecommendResponse | None = None
    varied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[RecommendResponse]:
        """One or two."""
        return [self.asked] if self.usual is None else [self.asked, self.usual]


def lists_shown(lists: Lists, titles: Titles, bank: UserMemoryResponse | None = None) -> Iterator[RenderableType]:
    """Recommendations, where they come from, and what would be otherwise."""
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
        yield note(EXACTLY)


def in_words(varied: Mapping[str, Any], titles: Titles) -> str:
    """What is asked for otherwise than usual."""
    words = []
    if "k" in varied:
        words.append(f"{counted(varied['k'], 'own memory', 'own memories')}")
    if "scopes" in varied:
        words.append("all scopes" if len(varied["scopes"]) > 1 else f"only {SCOPES[varied['scopes'][0]]}")
    if ignored := varied.get("ignore_memories"):
        more = f" and {len(ignored) - NAMING} more" if len(ignored) > NAMING else ""
        words.append("as if never taken: " + ", ".join(titles[item] for item in ignored[:NAMING]) + more)
    return "; ".join(words)


def remarks(bank: UserMemoryResponse | None, lists: Lists) -> Iterator[str]:
    """What does not fit together."""
    if bank is None:
        return
    version = lists.asked["memory"]["version"]
    if version != bank.version and not lists.asked["memory"]["degraded"]:
        yield f"The user took something meanwhile: the bank is shown at version {bank.version}, the list at {version}."
    if lists.asked["model_version"] != bank.model_version:
        yield f"The memories belong to another model than the one that answered, {plain(lists.asked['model_version'])}."
    held = {entry.item_id for entry in bank.entries} | {entry.item_id for entry in bank.log}
    strange = [item for item in lists.varied.get("ignore_memories", ()) if item not in held]
    if strange:
        yield f"Neither in the bank nor in the log, so nothing to ignore: {', '.join(map(plain, strange))}."


def _origin(lists: Lists) -> Iterator[RenderableType]:
    """What answered, and how much memory had to say."""
    asked, usual = lists.asked, lists.usual
    yield Text(_source(asked))
    if all(answer["source"] == "popularity" for answer in lists.answers):
        return
    if usual is not None:
        yield _figures_beside(usual, asked)
    else:
        figures = _figures(asked)
        yield Text("; ".join(f"{name}: {figures[name]}" for name in list(figures)[TOLD:]))
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
    """How long before a time each item of a bank was taken last."""
    return {} if bank is None else {entry.item_id: at - entry.timestamp for entry in bank.entries}


def _items_table(lists: Lists, titles: Titles, since: Mapping[str, float]) -> RenderableType:
    """The items in order; below each the memories that speak for it, and what is usual where it is the item's own."""
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


def _explained(lists: Lists) -> bool:
    return any("parts" in item for item in lists.asked["items"])


def _places(answer: RecommendResponse | None) -> dict[str, int]:
    return {item["item_id"]: rank for rank, item in enumerate(answer["items"] if answer else (), start=1)}


def _moved(rank: int, before: int | None) -> Text:
    if before is None:
        return Text("new", "green")
    by = before - rank
    return Text(f"▲ {by}", "green") if by > 0 else Text(f"▼ {-by}", "red") if by else Text("=", "dim")


def shares(item: Recommended) -> dict[str, float]:
    """What an item's probability is made of: the state alone with its calibration, what memories add to it in the
    logit (negative: they take it away), and copies. Adds up to 1.
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
    """The bar of an item's shares, as long as its probability against the best one's; what memories do to it, and what
    is copied from them, in figures.
    """
    split = shares(item)
    drawn = split if split.get("memories", 0) >= 0 else split | {"state": 1 - split["copied"], "memories": 0.0}
    yield stacked({name: share * length for name, share in drawn.items()}, SHARES, SHARE_COLOURS, 10)
    logit = item["parts"]["memories"] if "parts" in item else None
    yield Text("-" if logit is None else _factor(logit))
    yield Text(percent(split["copied"]) if split.get("copied") else "")


def _speaks(reason: Because, titles: Titles) -> Text:
    return Text.assemble((f"  {WHOSE[reason['scope']]:<7}", "dim"), titles[reason["item_id"]])


def _usual(habit: Habit, since: float) -> RenderableType:
    """A habit; the model looks no further back than `since_s`, it may be longer ago (`since`)."""
    since_s = None if habit["since_s"] is None else max(habit["since_s"], since)
    told = habit_now(habit["count"], since_s, habit["at_this_hour"], habit["on_this_day"])
    return Padding(Text(told, "dim", no_wrap=False, overflow="fold"), (0, 0, 0, 4))


def _does(reason: Because) -> Iterator[Text]:
    yield Text(_factor(reason["logit"]), "dim")
    yield Text(percent(reason["copied"]) if reason["copied"] else "", "dim")


def _factor(logit: float) -> str:
    """What a part of the logit does to what the model reckons."""
    return change(math.expm1(min(logit, 700.0)))


def _no_longer(asked: RecommendResponse, usual: RecommendResponse, titles: Titles) -> Iterator[RenderableType]:
    """What the usual list has and this one has not."""
    now = _places(asked)
    gone = [(item, rank) for item, rank in _places(usual).items() if item not in now]
    if gone:
        yield Text(
            "No longer in the list: " + ", ".join(f"{titles[item]} (was {rank})" for item, rank in gone),
            "red",
        )
    elif list(now) == list(_places(usual)):
        yield Text("The same items in the same order as usual.")
