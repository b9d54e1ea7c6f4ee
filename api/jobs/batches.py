"""Cuts a portion of a log into batches, each of which is sent as one request. Pure: the same portion gives the same
batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, inf

from model.data.streaming import LogLine

LARGEST = 1000
"""Interactions in a batch; `POST /memories` takes no more."""
BLOCK = 100
"""Events of one user in a row. The service works on the users of a request side by side and on one user's events one
after another, and long runs fill the encoder's windows best. On ML-1M, blocks of 20, 50, 100 and 250 events cost 153,
118, 108 and 122 µs an event, both services together."""
GOLDEN = 0.618034
"""Fractional part of the golden ratio: its multiples are spread evenly over the unit interval."""
LAYOUT = f"{LARGEST}/{BLOCK}/baskets together"
"""Identifies how portions are cut; a journal is valid only for the same layout."""


@dataclass(frozen=True)
class LogBatch:
    """Interactions of one request, their rows in the portion, and their users."""

    rows: list[int]
    lines: list[LogLine]
    users: frozenset[str]


def with_event_ids(portions: Iterable[list[LogLine]], identity: str) -> Iterator[list[LogLine]]:
    """Gives lines without `event_id` and timestamp an id, so that the service recognises them when they are sent again.

    The id consists of the file's `identity` and the line's row in the file.
    """
    first_row = 0
    for lines in portions:
        for row, line in enumerate(lines, first_row):
            if line.event_id is None and line.timestamp is None:
                line.event_id = f"{identity}:{row}"
        first_row += len(lines)
        yield lines


def batches(lines: Sequence[LogLine]) -> list[LogBatch]:
    """Cuts a portion into batches, to be sent in this order.

    Each user's events are in order of time; those of equal or unknown times in order of rows. Events of a basket follow
    one another.
    """
    return [_batch(lines, rows) for rows in _packed(_blocks(lines))]


def _blocks(lines: Sequence[LogLine]) -> Iterator[list[int]]:
    """Blocks of rows. Each user's are spread over the portion, so that requests sent together seldom share a user."""
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
    return (_ordered(lines, rows) for rows in users.values())


def _ordered(lines: Sequence[LogLine], rows: list[int]) -> list[int]:
    """Sorts a user's rows by time. If some have no time, keeps the order of the file: they happen when they are sent.

    Events of a basket follow its first event. A request may end within a basket; the next one then continues it, since
    it is still the user's newest basket.
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
    """Joins whole blocks, as many as fit into one batch."""
    packed: list[int] = []
    for rows in blocks:
        if len(packed) + len(rows) > LARGEST:
            yield packed
            packed = []
        packed = packed + rows
    if packed:
        yield packed


def _batch(lines: Sequence[LogLine], rows: list[int]) -> LogBatch:
    chosen = [lines[row] for row in rows]
    return LogBatch(rows, chosen, frozenset(line.user_id for line in chosen))
