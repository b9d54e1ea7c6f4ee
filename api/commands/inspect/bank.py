"""A user's bank, as `ramrec inspect` prints it. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from api.commands.inspect.text import Titles, counted, day, habit_kept, percent, plain
from api.commands.inspect.widgets import bar, heading, legend, listing, note, stacked
from api.http.schemas.memories import HowMany, PrunedItem, QualityParts, UserMemoryResponse

NARROW, DIVERSE = 0.4, 0.6
"""Entropies below which a taste is called narrow and above which it is called diverse; 0.5 leaves K as it is."""
CLUSTERS = 8
"""Number of clusters shown, the heaviest first."""
NAMING = 3
"""Number of memories that describe a cluster."""

QUALITY = {"frequency": "█", "recency": "▓", "access": "▒", "rating": "░"}
COLOURS = {"frequency": "cyan", "recency": "green", "access": "magenta", "rating": "yellow"}
LEGEND = {
    "frequency": "taken often",
    "recency": "recently",
    "access": "retrieved often",
    "rating": "rated well",
}


def bank_shown(bank: UserMemoryResponse, titles: Titles, rows: int, now: float) -> Iterator[RenderableType]:
    """A user's bank at the time `now` (seconds UTC), with at most `rows` memories and `rows` pruned items."""
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
    """The user, the size of the bank, and the model."""
    yield Rule(Text(f"User {plain(bank.user_id)}", "bold"), align="left", style="dim")
    yield Text.assemble(
        (f"{bank.bank_size} of {counted(bank.capacity, 'memory', 'memories')}", "bold"),
        f" · {counted(bank.events, 'event')} · {bank.pruned:,} pruned · version {bank.version}"
        f" · model {plain(bank.model_version)}",
    )
    if not bank.share:
        yield Text("Not shared: nobody else is recommended anything because of these memories.")


def diversity(bank: UserMemoryResponse, titles: Titles) -> Iterator[RenderableType]:
    """The entropy, what it means, and the clusters behind it."""
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
    """K and how it was computed, for the own and the collective scope."""
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
    """The K of the rule before it is rounded and bounded."""
    return how.base * (0.5 + entropy) * how.growth


def _reckoned(how: HowMany, entropy: float) -> tuple[str, str]:
    asked = wanted(how, entropy)
    formula = f"{how.base:g} · (0.5 + {entropy:.2f}) · {how.growth:.2f} = {asked:.2f}"
    return formula, f"{math.floor(asked + 0.5)}"


def _bounds(how: HowMany, there_are: int | None = None) -> str:
    bounds = f"{how.k_min} to {how.k_max}"
    return bounds if there_are is None else f"{bounds}, there are {there_are}"


def memories(bank: UserMemoryResponse, titles: Titles, rows: int) -> Iterator[RenderableType]:
    """The bank as a table, the highest quality first."""
    best = sorted(bank.entries, key=lambda one: (-one.quality, -one.timestamp))
    shown = best[:rows]
    with_ids = titles.differ_from([entry.item_id for entry in shown])
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
    """How often and when items were taken, the most frequent first. Empty if no item has a known gap between events."""
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
    """The quality (marked if below the threshold), its bar, and its four parts."""
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
    """Items that were pruned from the bank and are still in the log, and why they were pruned."""
    if not bank.pruned and not bank.pruned_items:
        yield Text("Nothing: the bank was never over-full.")
        return
    yield Text(
        f"{bank.pruned:,} times a memory was pruned. {counted(len(bank.pruned_items), 'item')} of the log "
        f"{'is' if len(bank.pruned_items) == 1 else 'are'} not in the bank (any more):"
    )
    shown = bank.pruned_items[:rows]
    with_ids = titles.differ_from([one.item_id for one in shown])
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
    """How a pruned item would compare with the bank today."""
    if bank.threshold is None or not bank.entries:
        return "-"
    if one.quality < min(entry.quality for entry in bank.entries):
        return "weakest"
    return "too weak" if one.quality < bank.threshold else "would stay"


def _honestly(bank: UserMemoryResponse) -> Iterator[str]:
    """What the table of pruned items cannot show."""
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
