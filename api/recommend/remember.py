"""Third stage: what memory knows about the users of a batch.

One retrieval is nearly always enough. It is repeated with new states for users who ignore items, after users of a model
that is loaded nowhere were moved to the wanted one, and after the memory service changed its model; `Attempts` bounds
all repetitions together. Requests for which nothing can be found out are answered without memory, as degraded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from api.http.problems import MemoryUnavailable, ModelGone
from api.models.engine import Engine
from api.models.lifecycle import LoadedModels
from api.recommend.encode import EncodedBatch, State, encode, encode_without
from api.recommend.request import ParsedBatch, TimedRequest, parse, wants
from memory_service.protocol.answer import Answer
from memory_service.protocol.call.context import CALL
from memory_service.protocol.columns import Job
from memory_service.protocol.question import Question
from model.memory.retrieval import Entries, Retrieved
from model.memory.rules import Bools, Ints, unit
from model.serving.recommender import NO_ITEMS

ATTEMPTS = 8
"""Retrievals for one batch: enough to follow to another model, to move users there and to leave out what is ignored,
and to do so twice.
"""
Moved = Mapping[Engine, list[int]]
"""Rows that another model answers."""


class Attempts:
    """Counts the retrievals of a batch. The last one comes after ATTEMPTS, or once the deadline has passed."""

    def __init__(self) -> None:
        self._left = ATTEMPTS

    def take(self) -> bool:
        """Count a retrieval; returns whether it is the last one."""
        self._left -= 1
        call = CALL.get()
        return self._left <= 0 or (call is not None and call.left_s <= 0)


@dataclass(frozen=True)
class RememberedBatch:
    """Parsed requests and what memory knows; every column has length B.

    retrieved: memories of the scopes that each request wants. states: (width,) float32, or None: there is nothing to
    recommend by. known: whether the user has a record; versions: its version. seen: items that the user took, as
    catalogue numbers. degraded: memory was wanted, but could not be asked, or answered only in part.
    """

    parsed: ParsedBatch
    retrieved: Retrieved
    states: Sequence[State | None]
    known: Sequence[bool]
    versions: Sequence[int]
    seen: Sequence[Ints]
    degraded: Sequence[bool]

    def take(self, rows: Sequence[int]) -> RememberedBatch:
        """The batch of some rows."""
        return RememberedBatch(
            parsed=self.parsed.take(rows),
            retrieved=self.retrieved.take(np.array(rows, np.int64)),
            states=[self.states[row] for row in rows],
            known=[self.known[row] for row in rows],
            versions=[self.versions[row] for row in rows],
            seen=[self.seen[row] for row in rows],
            degraded=[self.degraded[row] for row in rows],
        )


async def remember(
    models: LoadedModels, engine: Engine, requests: Sequence[TimedRequest], attempts: Attempts
) -> tuple[RememberedBatch, Moved]:
    """What memory knows, by the model of `engine`, or of the one that serves in its place by now; and rows whose users
    belong to another model that is loaded here, which must be asked about with that one.
    """
    batch = await encode(parse(engine, requests))
    if not batch.rows_for_memory():
        return _without_memory(batch, degraded=False), {}
    begin = time.perf_counter()
    try:
        while True:
            is_last = attempts.take()
            try:
                outcome = await _attempt(models, batch, is_last)
            except ModelGone:
                if is_last:
                    return _without_memory(batch, degraded=True), {}
                with suppress(MemoryUnavailable):
                    await models.follow()
                batch = await encode(parse(models.serving, requests))
                continue
            if not isinstance(outcome, EncodedBatch):
                return outcome
            batch = outcome
    except MemoryUnavailable:
        return _without_memory(batch, degraded=True), {}
    finally:
        engine.metrics.stage("retrieve", begin)


async def _attempt(
    models: LoadedModels, batch: EncodedBatch, is_last: bool
) -> EncodedBatch | tuple[RememberedBatch, Moved]:
    """Ask memory once; gives what it knows, or the batch that is to be asked about next."""
    rows = batch.rows_for_memory()
    question = _question(batch, rows)
    answer = await _ask(batch.parsed.engine, question)
    if is_last:
        return _learned(batch, rows, answer, {}), {}
    if answer.stale:
        await models.wanted.know(answer.catalogue_size)
        await models.wanted.rekey(answer.stale)
        return batch
    if question.ignored != _ignored(batch, rows):  # the catalogue did not hold all these items yet
        return batch
    jobs = _jobs_without(batch, rows, answer)
    if jobs != batch.without:  # also where a user was written since
        return await encode_without(batch, jobs)
    moved = await _moved(models, answer, rows)
    return _learned(batch, rows, answer, moved), moved


async def _ask(engine: Engine, question: Question) -> Answer:
    answer = await engine.memory.retrieve(question)
    if answer.states.shape[1] != engine.recommender.config.encoder.width:
        raise MemoryUnavailable("memory service: its states do not have the width of this model's")
    await engine.know(answer.catalogue_size)
    return answer


def _question(batch: EncodedBatch, rows: Sequence[int]) -> Question:
    parsed = batch.parsed
    requests = [parsed.requests[row] for row in rows]
    given = [(n, batch.last[row], state) for n, row in enumerate(rows) if (state := batch.states[row]) is not None]
    return Question(
        model_version=parsed.engine.version,
        users=[request.user_id or "" for request in requests],
        query_rows=np.array([n for n, _, _ in given], np.int64),
        queries=np.array([unit(state) for _, _, state in given], np.float32),
        last=np.array([last for _, last, _ in given], np.uint32),
        k=np.array([request.k or 0 for request in requests], np.int64),
        ignored=_ignored(batch, rows),
        uncounted=np.array([request.explain for request in requests], bool),
        alone=np.array([not wants(request, "collective") for request in requests], bool),
        entropy=parsed.entropy[rows],
        now=parsed.times[rows],
    )


def _ignored(batch: EncodedBatch, rows: Sequence[int]) -> dict[int, list[int]]:
    """The catalogue numbers of what the requests ignore, by position in `rows`."""
    ignored = ((n, batch.parsed.requests[row].ignore_memories) for n, row in enumerate(rows))
    return {n: [*batch.parsed.engine.catalogue.numbers(items)] for n, items in ignored if items}


def _jobs_without(batch: EncodedBatch, rows: Sequence[int], answer: Answer) -> dict[int, Job]:
    """Rows to search with another state than that of the record, and how it is encoded; sequences that came with the
    requests stay.
    """
    sequences = batch.parsed.sequences
    return {rows[n]: job for n, job in answer.without.items() if job.items and not len(sequences[rows[n]])}


async def _moved(models: LoadedModels, answer: Answer, rows: Sequence[int]) -> dict[Engine, list[int]]:
    """Rows that other models answer, as far as those can be loaded here.

    Raises ModelGone if one of these models is not wanted any more.
    """
    moved: dict[Engine, list[int]] = {}
    for n, version in answer.moved.items():
        engine = await models.find(version)
        if engine is not None:
            moved.setdefault(engine, []).append(rows[n])
        elif not models.stuck:
            raise ModelGone(f"model {version} is not wanted any more")
    return moved


def _learned(batch: EncodedBatch, rows: Sequence[int], answer: Answer, moved: Moved) -> RememberedBatch:
    """The batch with an answer about some rows."""
    is_partial = bool(answer.stale) or sum(map(len, moved.values())) < len(answer.moved)
    nothing = _without_memory(batch, degraded=answer.degraded or is_partial)
    states, known, versions, seen = [*nothing.states], [*nothing.known], [*nothing.versions], [*nothing.seen]
    for n, row in enumerate(rows):
        if answer.known[n]:
            known[row], versions[row], seen[row] = True, int(answer.versions[n]), answer.seen[n]
            if states[row] is None and n not in answer.without:
                states[row] = answer.states[n]
    retrieved = _spread(batch, nothing.retrieved, answer.retrieved, rows, states)
    return replace(nothing, retrieved=retrieved, states=states, known=known, versions=versions, seen=seen)


def _without_memory(batch: EncodedBatch, *, degraded: bool) -> RememberedBatch:
    """The batch as far as it can be answered without memory; `degraded`: memory was to be asked."""
    count = len(batch.parsed)
    asked = set(batch.rows_for_memory()) if degraded else set[int]()
    return RememberedBatch(
        parsed=batch.parsed,
        retrieved=Retrieved.nothing(batch.parsed.entropy),
        states=batch.states,
        known=[False] * count,
        versions=[0] * count,
        seen=[NO_ITEMS] * count,
        degraded=[row in asked for row in range(count)],
    )


def _spread(
    batch: EncodedBatch, nothing: Retrieved, found: Retrieved, rows: Sequence[int], states: Sequence[State | None]
) -> Retrieved:
    """`found`, which is about some rows, for all rows; scopes that are not wanted, or without a state, stay empty."""
    count = len(batch.parsed)
    own = np.array([wants(batch.parsed.requests[row], "own") for row in rows])
    others = np.array([states[row] is not None for row in rows])
    if len(rows) == count and own.all() and others.all():
        return found

    def spread(values: NDArray[Any], kept: Bools | None = None) -> NDArray[Any]:
        whole = np.zeros((count, *values.shape[1:]), values.dtype)
        whole[rows] = values if kept is None else np.where(kept.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
        return whole

    def entries(found: Entries, kept: Bools) -> Entries:
        return Entries(*(spread(getattr(found, name), kept) for name in Entries.COLUMNS))

    entropy = nothing.entropy.copy()
    entropy[rows] = found.entropy
    return Retrieved(
        entropy=entropy,
        k=spread(found.k, own),
        bank_size=spread(found.bank_size),
        own=entries(found.own, own),
        collective=entries(found.collective, others),
        collective_k=spread(found.collective_k, others),
        habits=spread(found.habits, own),
        present=spread(found.present),
    )
