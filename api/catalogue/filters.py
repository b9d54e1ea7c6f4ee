"""Which catalogue items pass a metadata filter. Attributes are kept in sorted columns, results as masks.

    {"genres": {"any": ["Comedy", "Drama"]}, "year": {"gte": 1990, "lt": 2000}}     all conditions must hold

An attribute that is a list stands for its elements; objects, null and lists within lists are ignored. Items are divided
into runs that are never changed, only replaced: a new or changed item costs the columns of its run only.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from threading import Lock
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from memory_service.protocol.structs import Item

RUN = 8192
"""Items in a run: few enough to build its columns in milliseconds, many enough that a million items make few runs."""
KEPT = 64
"""Number of filters whose masks are kept; a mask has one byte for each item."""
KIND: dict[type, int] = {bool: 0, int: 1, float: 1, str: 2}
"""Only values of one kind are compared: True, 1 and "1" are all different."""
Mask = NDArray[np.bool_]
Conditions = Mapping[str, Any]
"""Operator → operand, as validated by `api.http.schemas.filters.Condition`."""
Filter = Mapping[str, Conditions]


class Column:
    """One attribute of a run of items: which items have it (`present`), and its values in sorted order."""

    def __init__(self, attributes: Sequence[Any]) -> None:
        self.present: Mask = np.array([attribute is not None for attribute in attributes], bool)
        values: list[list[Any]] = [[], [], []]
        places: list[list[int]] = [[], [], []]
        for place, attribute in enumerate(attributes):
            for value in attribute if isinstance(attribute, list) else (attribute,):
                if (kind := KIND.get(type(value))) is not None:
                    values[kind].append(value)
                    places[kind].append(place)
        self._of_kind = [_Sorted(*column) for column in zip(values, places, strict=True)]

    def among(self, values: Iterable[Any]) -> Mask:
        """Items of which the attribute has one of the values."""
        found = np.zeros(len(self.present), bool)
        for value in values:
            found[self._of_kind[KIND[type(value)]].between(value, value)] = True
        return found

    def within(self, bounds: Conditions) -> Mask:
        """Items of which one value of the attribute is within all bounds."""
        found = np.zeros(len(self.present), bool)
        found[self._of_kind[KIND[type(next(iter(bounds.values())))]].inside(bounds)] = True
        return found


class _Sorted:
    """Values of one kind in order, and the position in the run of the item of each."""

    def __init__(self, values: Sequence[Any], places: Sequence[int]) -> None:
        order = sorted(range(len(values)), key=values.__getitem__)
        self._values = [values[n] for n in order]
        self._places: NDArray[np.int32] = np.array(places, np.int32)[order]

    def between(self, low: Any, high: Any) -> NDArray[np.int32]:
        """Positions of the values from `low` to `high`, both inclusive."""
        return self._places[bisect_left(self._values, low) : bisect_right(self._values, high)]

    def inside(self, bounds: Conditions) -> NDArray[np.int32]:
        """Positions of the values within the bounds."""
        begin, end = 0, len(self._values)
        for name, bound in bounds.items():
            cut = (bisect_left if name in ("gte", "lt") else bisect_right)(self._values, bound)
            begin, end = (max(begin, cut), end) if name in ("gt", "gte") else (begin, min(end, cut))
        return self._places[begin:end]


OPERATORS: dict[str, Callable[[Column, Any], Mask]] = {
    "eq": lambda column, value: column.among([value]),
    "ne": lambda column, value: ~column.among([value]),
    "any": lambda column, values: column.among(values),
    "none": lambda column, values: ~column.among(values),
    "all": lambda column, values: np.all([column.among([value]) for value in values], axis=0),
    "exists": lambda column, wanted: column.present == wanted,
}
BOUNDS = ("gt", "gte", "lt", "lte")
"""Operators that apply together: one value must be within all of them."""


class Run:
    """Consecutive items, and columns of their attributes. A run is never changed, only replaced."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.columns: dict[str, Column] = {}
        """Columns that were used so far; only of attributes that some item has, as callers may name any."""
        self._names: frozenset[str] | None = None
        self._text: tuple[str, list[int]] | None = None

    def matching(self, wanted: Filter) -> Mask:
        """Which items satisfy all conditions."""
        allowed = np.ones(len(self.items), bool)
        for name, conditions in wanted.items():
            column = self._column(name)
            bounds = {operator: operand for operator, operand in conditions.items() if operator in BOUNDS}
            if bounds:
                allowed &= column.within(bounds)
            for operator in conditions.keys() - bounds.keys():
                allowed &= OPERATORS[operator](column, conditions[operator])
        return allowed

    def mentioning(self, folded: str) -> Iterator[Item]:
        """Items whose id or metadata contains a text, regardless of case; `folded`: the text, casefolded."""
        joined, starts = self._folded()
        at = joined.find(folded)
        while at >= 0:
            place = bisect_right(starts, at) - 1
            if any(folded in text for text in _texts(self.items[place])):  # and not across two of them
                yield self.items[place]
            at = joined.find(folded, starts[place + 1]) if place + 1 < len(starts) else -1

    def _folded(self) -> tuple[str, list[int]]:
        """All texts joined, so that a single search covers them, and where those of each item begin."""
        if self._text is None:
            texts = ["\0".join(_texts(item)) + "\0" for item in self.items]
            self._text = "".join(texts), list(accumulate(map(len, texts[:-1]), initial=0))
        return self._text

    def _column(self, name: str) -> Column:
        if self._names is None:
            self._names = frozenset(name for item in self.items for name in item.metadata or ())
        if name not in self._names:
            return Column([None] * len(self.items))
        if name not in self.columns:  # two threads may both build it, which does no harm
            self.columns[name] = Column([(item.metadata or {}).get(name) for item in self.items])
        return self.columns[name]


NO_METADATA = Run([Item("")])


def extended(runs: tuple[Run, ...], items: Sequence[Item], changed: Iterable[int] = ()) -> tuple[Run, ...]:
    """The runs of the whole catalogue `items`, given the runs of its beginning; `changed`: positions whose items have
    changed since. Runs without a new or changed item are kept.
    """
    full = sum(len(run.items) == RUN for run in runs)
    kept = list(runs[:full]) + [Run(items[at : at + RUN]) for at in range(full * RUN, len(items), RUN)]
    for n in {place // RUN for place in changed if place < full * RUN}:
        kept[n] = Run(items[n * RUN : (n + 1) * RUN])
    return tuple(kept)


class Filters:
    """Masks of filters over the present catalogue. The last `KEPT` masks are kept; after a change of the catalogue,
    only the runs that were replaced are examined again. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self.runs: tuple[Run, ...] = ()
        self._kept: OrderedDict[bytes, tuple[tuple[Run, ...], Mask]] = OrderedDict()
        self._lock = Lock()

    def is_ready(self, wanted: Filter) -> bool:
        """Whether the mask of a filter is up to date."""
        kept = self._kept.get(_key(wanted))
        return kept is not None and kept[0] is self.runs

    def mask(self, wanted: Filter) -> Mask:
        """Whether each item passes a filter, by catalogue number. Number 0 is an item without metadata."""
        key, runs = _key(wanted), self.runs
        with self._lock:
            seen, mask = self._kept[key] = self._kept.get(key) or ((), NO_METADATA.matching(wanted))
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        if seen is not runs:
            mask = _updated(runs, seen, mask, wanted)
            with self._lock:
                self._kept[key] = runs, mask
        return mask


def _updated(runs: tuple[Run, ...], seen: tuple[Run, ...], mask: Mask, wanted: Filter) -> Mask:
    """The mask of `runs`, given that of the earlier runs `seen`."""
    parts = [mask[:1]]
    for n, run in enumerate(runs):
        known = n < len(seen) and seen[n] is run
        parts.append(mask[1 + n * RUN : 1 + (n + 1) * RUN] if known else run.matching(wanted))
    return np.concatenate(parts)


def _texts(item: Item) -> list[str]:
    texts = [item.item_id.casefold()]
    for attribute in (item.metadata or {}).values():
        values = attribute if isinstance(attribute, list) else (attribute,)
        texts += [value.casefold() for value in values if isinstance(value, str)]
    return texts


def _key(wanted: Filter) -> bytes:
    return msgspec.json.encode(wanted, order="deterministic")
