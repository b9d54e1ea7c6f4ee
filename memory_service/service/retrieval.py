"""Retrieval: a question about a batch of users is answered by one space, with residents as they are in Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from memory_service.protocol.answer import Answer
from memory_service.protocol.columns import BadRequest
from memory_service.protocol.plans import stale_user
from memory_service.protocol.question import Question
from memory_service.protocol.structs import StaleUser
from memory_service.service.catalogue import Catalogue
from memory_service.service.freshness import Freshness
from memory_service.service.models import Models
from memory_service.service.outage import Outage
from memory_service.service.space import Space
from memory_service.store.presence import Presence
from memory_service.store.redis.errors import StoreUnavailable
from memory_service.store.store import Store
from model.memory.changes import without
from model.memory.record import UserRecord


class Retrieval:
    """Answers questions."""

    def __init__(
        self,
        store: Store,
        outage: Outage,
        catalogue: Catalogue,
        models: Models,
        freshness: Freshness,
        presence: Presence,
    ) -> None:
        self._store, self._outage, self._catalogue = store, outage, catalogue
        self._models, self._freshness, self._presence = models, freshness, presence

    async def answer(self, question: Question) -> Answer:
        """What is known about the users. While Redis is out of reach, residents are answered as they are, and the
        answer is degraded.

        Args:
            question: its arrays must have full length, as those that `Question.unpacked` makes.

        Raises:
            ModelMismatch: the model of the question is not loaded.
            BadRequest: there are no users, or the queries do not fit the model.
        """
        space = await self._models.space(question.model_version)
        if not question.users:
            raise BadRequest("no users")
        with_others = space.collective is not None and self._presence.is_current
        is_degraded = not space.is_complete or (space.collective is not None and not with_others)
        altered = await self._altered(space, question) if question.ignored else {}
        try:
            is_partial = await self._freshness.refresh(space, question.users)
        except StoreUnavailable:
            is_partial = True
        answer = space.answer(question, altered, with_others=with_others, is_degraded=is_degraded or is_partial)
        stale = {row: model for row, model in space.stale_rows(question.users).items() if row not in altered}
        return await self._redirected(space, question, answer, stale) if stale else answer

    async def _altered(self, space: Space, question: Question) -> dict[int, UserRecord | None]:
        """Rows of users who took some of the items that they ignore → the record without these items; None: Redis,
        which has the record, is out of reach.
        """
        ignored = question.ignored
        try:
            with self._outage.guard():
                records = await self._store.load_readable(sorted({question.users[row] for row in ignored}))
                await self._catalogue.cover(records.values())
        except StoreUnavailable:
            return dict.fromkeys(ignored)
        altered: dict[int, UserRecord | None] = {}
        for row, items in ignored.items():
            record = records.get(question.users[row])
            if record is not None and not space.is_stale(record):
                left = without(record, items)
                if left is not record:
                    altered[row] = left
        return altered

    async def _redirected(self, space: Space, question: Question, answer: Answer, stale: Mapping[int, str]) -> Answer:
        """The answer with what must be done about the rows whose records belong to another model: ask that model, if it
        is loaded, or rekey the record.
        """
        await self._models.follow_to(stale.values())
        loaded = {self._models.serving.model_version, self._models.wanted.model_version}
        moved = {row: model for row, model in stale.items() if model in loaded}
        jobs = await self._jobs(space, [question.users[row] for row in stale if row not in moved])
        return replace(answer, moved=moved, stale=jobs)

    async def _jobs(self, space: Space, users: Sequence[str]) -> list[StaleUser]:
        """What would bring these users to the space's model; nothing while Redis is out of reach."""
        if not users:
            return []
        try:
            return stale_users(space, await self._store.load_readable(list(dict.fromkeys(users))))
        except StoreUnavailable:
            return []


def stale_users(space: Space, records: Mapping[str, UserRecord]) -> list[StaleUser]:
    """The users whose records are not of the space's model, and what would bring them to it."""
    return [stale_user(user, record) for user, record in records.items() if space.is_stale(record)]
