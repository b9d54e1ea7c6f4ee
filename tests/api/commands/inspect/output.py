"""What a command printed, and how to read it."""

import unicodedata
from typing import NamedTuple

from rich.cells import cell_len


class Told(NamedTuple):
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str


def harmless(text: str) -> bool:
    """Nothing that steers a terminal, and no line longer than it is wide."""
    lines = text.split("\n")
    steering = [c for line in lines for c in line if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    return not steering and max(map(cell_len, lines)) <= 80


def section(told: Told, title: str) -> list[str]:
    """The lines of one section."""
    lines = told.out.split("\n")
    first = next(n for n, line in enumerate(lines) if line.startswith(title))
    rest = lines[first + 1 :]
    return rest[: rest.index("")] if "" in rest else rest
