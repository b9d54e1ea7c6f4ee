"""Words and figures of what `ramrec inspect` prints. No I/O.

Ids and titles come from callers and may hold anything. They are printed only through `plain`, and never as markup.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

LONGEST = 120
"""Most characters shown of an id or a title."""
JOINERS = "\u200c\u200d"
"""Format characters that words of some scripts need."""
HOUR_S, DAY_S = 3600.0, 86400.0
UNITS = {
    "year": 365.25 * DAY_S,
    "month": 30.44 * DAY_S,
    "week": 7 * DAY_S,
    "day": DAY_S,
    "hour": HOUR_S,
    "minute": 60.0,
}
DAYS = ("Mondays", "Tuesdays", "Wednesdays", "Thursdays", "Fridays", "Saturdays", "Sundays")
MARKS = 3
"""Most combining marks shown on one character."""


def plain(text: str, most: int = LONGEST) -> str:
    """Text that is safe to print: one line of at most `most` characters. Characters that control a terminal, change the
    direction of writing or are invisible are shown as �.

    >>> plain("a\\x1b[2Jb\\n\\u202ec")
    'a�[2Jb �c'
    """
    shown, marks = "", 0
    for character in unicodedata.normalize("NFC", text[: 4 * most]):
        kind = unicodedata.category(character)
        marks = marks + 1 if kind in ("Mn", "Me") else 0
        if character.isspace():
            shown += " "
        elif kind[0] == "C" and character not in JOINERS:
            shown += "�"
        elif marks <= MARKS:
            shown += character
    shown = " ".join(shown.split())
    return shown if len(shown) <= most and len(text) <= 4 * most else shown[: most - 1] + "…"


@dataclass(frozen=True)
class Titles:
    """Titles of items; an item without a title is called by its id."""

    title_of: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, item_id: str) -> str:
        return plain(self.title_of.get(item_id, item_id))

    def differ_from(self, item_ids: Sequence[str]) -> bool:
        """Whether some of the items have a title other than their id."""
        return any(self.title_of.get(item, item) != item for item in item_ids)


def counted(number: int, what: str, many: str = "") -> str:
    """A number and its noun.

    >>> counted(1, "memory", "memories"), counted(1200, "event")
    ('1 memory', '1,200 events')
    """
    return f"{number:,} {what if number == 1 else many or what + 's'}"


def percent(share: float) -> str:
    """A share in a few characters.

    >>> [percent(share) for share in (0, 2e-7, 0.00012, 0.0041, 0.0999, 0.456, 1)]
    ['0 %', '<0.001 %', '0.012 %', '0.41 %', '10 %', '46 %', '100 %']
    """
    if 0 < share < 1e-5:
        return "<0.001 %"
    return f"{100 * share:.0f} %" if share >= 0.095 or share == 0 else f"{100 * share:.2g} %"


def change(by: float) -> str:
    """A relative change.

    >>> [change(by) for by in (0, 0.0123, -0.5, 2e-6, -2e-6, 24)]
    ['0 %', '+1.2 %', '-50 %', '+<0.001 %', '-<0.001 %', '25-fold']
    """
    if by >= 10:
        return f"{1 + by:,.0f}-fold" if by < 1e6 else f"{1 + by:.0e}-fold"
    return ("" if by == 0 else "+" if by > 0 else "-") + percent(abs(by))


def day(timestamp: float) -> str:
    """The UTC date of a time in seconds; the number itself if it is beyond the calendar."""
    try:
        return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d")
    except (OverflowError, OSError, ValueError):
        return f"{timestamp:.3g}"


def ago(seconds: float) -> str:
    """How long ago something happened.

    >>> ago(3 * 86400), ago(3600), ago(-7200), ago(5)
    ('3 days ago', '1 hour ago', '2 hours ahead', 'a moment ago')
    """
    how = _measured(abs(seconds))
    return "a moment ago" if how is None else f"{counted(*how)} {'ahead' if seconds < 0 else 'ago'}"


def _measured(seconds: float) -> tuple[int, str] | None:
    """A duration as number and unit, in the largest unit that is precise enough; None below a minute."""
    for unit, length in UNITS.items():
        number = seconds / length
        if number >= 1.95 or (number >= 0.95 and (number <= 1.05 or unit == "minute")):
            return math.floor(number + 0.5), unit
    return None


def habit_kept(
    count: int, mean_gap_s: float | None, since_s: float, usual_hour: float | None, usual_day: float | None
) -> str:
    """How often and when an entry of a bank was taken. `api/inspector/static/habit.js` has the same rules.

    >>> habit_kept(7, 6 * 86400, 3 * 86400, 7.9, None)
    '7 times, every 6 days, last 3 days ago, usually around 08:00 UTC'
    """
    words = [_times(count)]
    if count > 1 and mean_gap_s:
        words.append(_rhythm(count, mean_gap_s))
    words += _last(count, since_s)
    if count > 1 and (usual_hour is not None or usual_day is not None):
        on = "" if usual_day is None else f" on {DAYS[math.floor(usual_day) % 7]}"
        around = " (UTC)" if usual_hour is None else f" around {math.floor(usual_hour + 0.5) % 24:02}:00 UTC"
        words.append(f"usually{on}{around}")
    return ", ".join(words)


def habit_now(count: int, since_s: float | None, at_this_hour: bool, on_this_day: bool) -> str:
    """The habit of a memory at the time of the request.

    >>> habit_now(7, 3 * 86400, True, False)
    '7 times, last 3 days ago, usually at this hour'
    """
    words = [_times(count), *_last(count, since_s)]
    when = ["on this day of the week"] * on_this_day + ["at this hour"] * at_this_hour
    if when:
        words.append(f"usually {' and '.join(when)}")
    return ", ".join(words)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _rhythm(count: int, mean_gap_s: float) -> str:
    how = _measured(mean_gap_s)
    if how is None:
        return "seconds apart"
    if count == 2:
        return f"{counted(*how)} apart"
    return f"every {how[1] if how[0] == 1 else counted(*how)}"


def _last(count: int, since_s: float | None) -> list[str]:
    if since_s is None:
        return []
    return [ago(since_s) if count == 1 else f"last {ago(since_s)}"]
