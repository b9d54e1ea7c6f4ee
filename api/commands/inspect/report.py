"""All that `ramrec inspect` prints about a user, part by part. No I/O."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.rule import Rule
from rich.text import Text

from api.commands.inspect.bank import bank_shown
from api.commands.inspect.recommendations import Recommendations, lists_shown
from api.commands.inspect.text import Titles, plain
from api.commands.inspect.widgets import alarm, note
from api.http.schemas.memories import UserMemoryResponse


def user_report(
    user_id: str,
    bank: UserMemoryResponse | None,
    lists: Recommendations,
    titles: Titles,
    rows: int,
    readable: bool = True,
) -> Iterator[RenderableType]:
    """The whole report. Without a bank, the user is unknown, or the bank cannot be read now (`readable` is False)."""
    if bank is not None:
        yield from bank_shown(bank, titles, rows, lists.at)
    else:
        yield Rule(Text(f"User {plain(user_id)}", "bold"), align="left", style="dim")
        yield Text("Nothing is remembered about this user.") if readable else alarm("The bank cannot be read now.")
    yield from lists_shown(lists, titles, bank)
    yield from map(note, remarks(bank, lists))


def nameable(bank: UserMemoryResponse | None, lists: Recommendations, rows: int) -> list[str]:
    """Ids of all items that the report shows by title."""
    items = list(lists.varied.get("ignore_memories", ()))
    for answer in lists.answers:
        for item in answer["items"]:
            items += [item["item_id"], *(reason["item_id"] for reason in item.get("because", ()))]
    if bank is not None:
        items += [entry.item_id for entry in bank.entries] + [one.item_id for one in bank.pruned_items[:rows]]
    return items


def remarks(bank: UserMemoryResponse | None, lists: Recommendations) -> Iterator[str]:
    """Notes on answers that do not match each other."""
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
