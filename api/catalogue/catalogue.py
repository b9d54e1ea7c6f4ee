"""A mirror of the item catalogue: catalogue numbers ↔ ids ↔ item indices, metadata, hidden items, filters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from api.catalogue.filters import Filter, Filters, Mask, extended
from memory_service.protocol.structs import CatalogueReply, Item
from model.memory.ids import CatalogueNumber, CatalogueNumbers, ItemIndex, ItemIndices
from model.memory.retrieval import Retrieved

TITLES = ("title", "name")
"""Attributes with the title of an item; also as the end of a name, as in `movie_title`."""


def title_of(item_id: str, metadata: Mapping[str, Any]) -> str:
    """The title in an item's metadata; without one, its id."""
    for end in TITLES:
        for name, value in metadata.items():
            if name.casefold().rpartition("_")[2] == end and isinstance(value, str) and value.strip():
                return value.strip()
    return item_id


class CatalogueMirror:
    """What the memory service has listed of the catalogue. Numbers are only ever added.

    `index_of`: item id → item index of the model.
    """

    def __init__(self, index_of: Mapping[str, ItemIndex]) -> None:
        self._index_of = index_of
        self.items: list[Item] = []
        self.number_of: dict[str, CatalogueNumber] = {}
        self.model_index = ItemIndices(np.zeros(1, np.int64))
        """Catalogue number → item index; 0 if the model does not know the item."""
        self.number = CatalogueNumbers(np.zeros(len(index_of) + 1, np.int64))
        """Item index → catalogue number; 0 if the catalogue does not hold the item yet."""
        self.hidden = CatalogueNumbers(np.zeros(0, np.int64))
        """Catalogue numbers of hidden items."""
        self.filters = Filters()
        self.revision = 0

    @property
    def size(self) -> int:
        """Number of items."""
        return len(self.items)

    def take(self, reply: CatalogueReply) -> None:
        """Add a listing of the items after the last number, and of earlier items that changed.

        The model's thread may be reading the arrays: they are replaced, never changed.
        """
        assert reply.since == self.size + 1, (reply.since, self.size)
        self.revision = reply.revision
        listed = [*(reply.changed or ()), *enumerate(reply.items, start=reply.since)]
        if not listed:
            return
        self.items += reply.items
        for number, item in reply.changed or ():
            self.items[number - 1] = item
        self.number_of |= {item.item_id: CatalogueNumber(number) for number, item in listed}
        before = np.setdiff1d(self.hidden, [number for number, _ in listed])
        hidden = np.array([number for number, item in listed if item.hidden], np.int64)
        self.hidden = CatalogueNumbers(np.union1d(before, hidden))
        self.filters.runs = extended(self.filters.runs, self.items, [number - 1 for number, _ in reply.changed or ()])
        self._place(reply)

    def _place(self, reply: CatalogueReply) -> None:
        """Add the item indices of new items. This comes last, so that filters cover all numbers that are in use."""
        indices = np.array([self._index_of.get(item.item_id, 0) for item in reply.items], np.int64)
        self.model_index = ItemIndices(np.concatenate([self.model_index, indices]))
        known = np.flatnonzero(indices)
        if len(known):
            number = self.number.copy()
            number[indices[known]] = reply.since + known
            self.number = CatalogueNumbers(number)

    def item_id(self, number: CatalogueNumber) -> str:
        """The id of a catalogue number."""
        return self.items[number - 1].item_id

    def indices(self, numbers: CatalogueNumbers) -> ItemIndices:
        """Item indices of catalogue numbers, of any shape; 0 for items that the model does not know."""
        return ItemIndices(self.model_index[numbers])

    def numbers(self, item_ids: Iterable[str]) -> list[CatalogueNumber]:
        """The catalogue numbers of item ids, without unknown ones."""
        return [self.number_of[item] for item in item_ids if item in self.number_of]

    def named(self, item_ids: Iterable[str]) -> list[Item]:
        """The items with these ids, without unknown ones."""
        return [self.items[number - 1] for number in self.numbers(item_ids)]

    def find(self, query: str, limit: int) -> list[Item]:
        """Items whose id or metadata contains the query, regardless of case. May run in any thread."""
        found = (item for run in self.filters.runs for item in run.mentioning(query.casefold()))
        return list(islice(found, limit))


class Indices:
    """Item indices of catalogue items, for one batch. Items that the model does not know, but that are among the
    collective memories (`numbers`), get indices beyond the model's, so that copying can recommend them; others are 0.
    """

    def __init__(
        self, catalogue: CatalogueMirror, index_of: Mapping[str, ItemIndex], numbers: CatalogueNumbers
    ) -> None:
        self._catalogue, self._index_of, self._first = catalogue, index_of, len(index_of) + 1
        self._beyond = CatalogueNumbers(np.unique(numbers[(numbers > 0) & (catalogue.indices(numbers) == 0)]))

    def of(self, numbers: CatalogueNumbers) -> ItemIndices:
        """The indices of catalogue numbers, of any shape."""
        index = self._catalogue.indices(numbers)
        if not len(self._beyond):
            return index
        place = np.minimum(np.searchsorted(self._beyond, numbers), len(self._beyond) - 1)
        return ItemIndices(np.where(self._beyond[place] == numbers, self._first + place, index))

    def translated(self, retrieved: Retrieved) -> Retrieved:
        """What memory answered in catalogue numbers, in item indices: what the model takes."""
        numbers = CatalogueNumbers
        return replace(
            retrieved,
            own=replace(retrieved.own, item=self._catalogue.indices(numbers(retrieved.own.item))),
            collective=replace(retrieved.collective, item=self.of(numbers(retrieved.collective.item))),
            present=self._catalogue.indices(numbers(retrieved.present)),
        )

    def named(self, item_ids: Iterable[str]) -> ItemIndices:
        """The indices of item ids. Items of the model need not be in the catalogue."""
        ids = list(item_ids)
        numbers = CatalogueNumbers(np.array([self._catalogue.number_of.get(item, 0) for item in ids], np.int64))
        own = np.array([self._index_of.get(item, 0) for item in ids], np.int64)
        return ItemIndices(np.where(own > 0, own, self.of(numbers)))

    def passing(self, wanted: Filter) -> Mask:
        """Whether each item passes a filter, by index."""
        number = self._catalogue.number
        mask = self._catalogue.filters.mask(wanted)
        return np.concatenate([mask[number], mask[self._beyond]])

    @property
    def reaches_beyond(self) -> bool:
        """Whether there are indices beyond the model's."""
        return len(self._beyond) > 0

    def item_ids(self, indices: ItemIndices, own: Sequence[str]) -> list[str]:
        """The item ids of indices (n,); `own`: the ids of the model's items."""
        return [
            own[index - 1] if index < self._first else self._catalogue.item_id(self._beyond[index - self._first].item())
            for index in indices.tolist()
        ]
