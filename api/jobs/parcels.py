"""A portion of a log cut into requests. Pure: the same portion gives the same parcels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, inf

from model.data.streaming import LogLine

PARCEL = 1000
"""Interactions of a request, as many as `POST /memories` takes."""
BLOCK = 100
"""Events of one user in a row. The service works on a request's users side by side, and on one user's events one after
another; the encoder's windows are filled best by long runs. On ML-1M 20, 50, 100 and 250 events cost 153, 118, 108 and
122 µs each, both services together."""
GOLDEN = 0.618034
LAYOUT = f"{PARCEL}/{BLOCK}/baskets together"


@dataclass(frozen=True)
class Parcel:
    """Interactions of one request, the rows of the portion that they come from, and whose they are."""

    rows: list[int]
    lines: list[LogLine]
    users: frozenset[str]


def named(portions: Iterable[list[LogLine]], identity: str) -> Iterator[list[LogLine]]:
    """A file's portions; what has neither `event_id` nor timestamp is given an id, the file's `identity` and the row
    in it, so that it is recognised when sent again.
    """
    first_row = 0
    for lines in portions:
        for row, line in enumerate(lines, first_row):
            if line.event_id is None and line.timestamp is None:
                line.event_id = f"{identity}:{row}"
        first_row += len(lines)
        yield lines


def parcels(lines: Sequence[LogLine]) -> list[Parcel]:
    """Parcels to be sent in their order; each user's events are in order of time (ties and unknown times: of rows),
    those of a basket one after another.
    """
    return [_parcel(lines, rows) for rows in _packed(_spread(lines))]


def _spread(lines: Sequence[LogLine]) -> Iterator[list[int]]:
    """Blocks of rows. A user's lie evenly over the portion, so that requests under way seldom share a user."""
    blocks: list[tuple[float, list[int]]] = []
    for nth, rows in enumerate(_rows_of_users(lines)):
        parts, phase = ceil(len(rows) / BLOCK), nth * GOLDEN % 1.0
        blocks += [((part + phase) / parts, rows[part * BLOCK : (part + 1) * BLOCK]) for part in range(parts)]
    blocks.sort()
    return (rows for _, rows in blocks)


def _rows_of_users(lines: Sequence[LogLine]) -> Iterator[list[int]]:
    users: dict[str, list[int]] = {}
    for row, line in enumerate(lines):
        users.setdefault(line.user_id, []).append(row)
    return (_in_order(lines, rows) for rows in users.values())


def _in_order(lines: Sequence[LogLine], rows: list[int]) -> list[int]:
    """Rows of a user in order of time; in the file's where events have none (they happen when they are sent). Those of
    a basket follow its first: a request may end within it, and the next then goes on with the basket that is newest.
    """
    known = [time for row in rows if (time := lines[row].timestamp) is not None]
    own = dict(zip(rows, known if len(known) == len(rows) else rows, strict=True))
    first: dict[str | None, float] = {}
    for row in rows:
        basket = lines[row].basket_id
        if basket is not None:
            first[basket] = min(own[row], first.get(basket, inf))
    return sorted(rows, key=lambda row: (first.get(lines[row].basket_id, own[row]), own[row], row))


def _packed(blocks: Iterator[list[int]]) -> Iterator[list[int]]:
    """Whole blocks, as many as fit into one request."""
    packed: list[int] = []
    for rows in blocks:
        if len(packed) + len(rows) > PARCEL:
            yield packed
            packed = []
        packed = packed + rows
    if packed:
        yield packed


def _parcel(lines: Sequence[LogLine], rows: list[int]) -> Parcel:
    taken = [lines[row] for row in rows]
    return Parcel(rows, taken, frozenset(line.user_id for line in taken))
