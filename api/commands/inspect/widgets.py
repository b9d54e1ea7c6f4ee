"""Bars, legends and tables of what `ramrec inspect` prints. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text


def bar(share: float, width: int) -> str:
    """A bar that fills a share of `width` characters, to an eighth of a character.

    >>> bar(0.5, 4), bar(0.01, 4), bar(0, 4)
    ('██', '▏', '')
    """
    eighths = round(min(max(share, 0), 1) * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def stacked(parts: Mapping[str, float], signs: Mapping[str, str], colours: Mapping[str, str], width: int) -> Text:
    """A bar of several parts, each a share of `width` characters with its own sign and colour."""
    text, end, drawn = Text(), 0.0, 0
    for name, part in parts.items():
        end += max(part, 0)
        upto = round(min(end, 1) * width)
        text.append(signs[name] * (upto - drawn), colours[name])
        drawn = upto
    return text


def legend(signs: Mapping[str, str], colours: Mapping[str, str], words: Mapping[str, str]) -> Text:
    """The meaning of the signs of a stacked bar."""
    return Text("  ").join(Text.assemble((sign, colours[name]), f" {words[name]}") for name, sign in signs.items())


def heading(words: str) -> RenderableType:
    """The title of a section."""
    return Group("", Rule(Text(words, "bold"), align="left", style="dim"))


def note(words: str) -> Text:
    """A line of explanation."""
    return Text(words, "dim")


def alarm(words: str) -> Text:
    """A warning."""
    return Text(f"!! {words}", "bold red")


def listing(*columns: str, right: Sequence[str] = (), wide: str = "", short: Sequence[str] = ()) -> Table:
    """A table without lines. The `wide` column takes the remaining width; `short` columns are cut at 10 characters."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=bool(wide), header_style="dim")
    for name in columns:
        table.add_column(
            Text(name),
            justify="right" if name in right else "left",
            ratio=1 if name == wide else None,
            max_width=10 if name in short else None,
            no_wrap=True,
            overflow="ellipsis",
        )
    return table
