"""The use case behind `POST /recommend`, a micro-batch at a time.

Encode the sequences that were sent, ask the memory once for all users, fuse and score in one pass, answer. Where
memory is out of reach the encoder (given a sequence) or popularity answers, and the response says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from api.catalogue.catalogue import Indices
from api.http.problems import MemoryUnavailable, ModelGone
from api.http.schemas import MemoryUse, Recommended, RecommendRequest, RecommendResponse, Scope
from api.memory.client import Remembered
from api.models.engine import Engine
from api.models.lifecycle import MODEL_TRIES, Models
from api.recommend.explain import tell
from memory_service.protocol.structs import RetrieveRequest
from memory_service.protocol.telemetry import span
from model.memory import rules as rule
from model.memory.bank import Entries, Retrieved
from model.memory.collective import LAST
from model.memory.events import EncodeJob
from model.memory.rules import Ints
from model.serving.recommender import NO_ITEMS, Query, Ranked

TRIES = 3
"""How often users who ignore memories are asked about while others write them."""
SCOPES: tuple[Scope, ...] = ("own", "collective")
"""Scopes that can be asked for."""
NO_STATE: NDArray[np.float32] = np.zeros(0, np.float32)
NOTHING_LAST: NDArray[np.uint32] = np.zeros(LAST, "<u4")


@dataclass
class Asked:
    """A request on its way, its time given: the model's items of its sequence, its state (d,) float32 or None, and what
    memory knows of the user; last (LAST,), what the state was made of last, and seen: catalogue numbers.
    """

    request: RecommendRequest
    sequence: NDArray[np.int64] = field(default_factory=lambda: NO_ITEMS)
    unknown_items: list[str] = field(default_factory=list)
    state: NDArray[np.float32] | None = None
    last: NDArray[np.uint32] = field(default_factory=lambda: NOTHING_LAST)
    seen: Ints = field(default_factory=lambda: NO_ITEMS)
    known: bool = False
    version: int = 0

    @property
    def at(self) -> float:
        """The time of the request, seconds."""
        assert self.request.timestamp is not None  # see `received`
        return self.request.timestamp

    def wants(self, scope: Scope) -> bool:
        """Whether memories of a scope are to be used."""
        return self.request.scopes is None or scope in self.request.scopes

    @property
    def asks_memory(self) -> bool:
        """Whether memory may know something: about the user, or about others in the situation of the sequence."""
        return self.request.user_id is not None or (self.state is not None and self.wants("collective"))


def received(requests: Sequence[RecommendRequest]) -> None:
    """Give what was received at one time that time, where a request names none."""
    now = time.time()
    for request in requests:
        if request.timestamp is None:
            request.timestamp = now


async def recommend(models: Models, requests: Sequence[RecommendRequest]) -> list[RecommendResponse]:
    """Answer a batch of requests, each user by the model that the user's record belongs to, as of the time that a
    request names; where it names none, as of now.
    """
    received(requests)
    with span("recommend"):
        for _ in range(MODEL_TRIES):
            try:
                return await _recommend(models, models.serving, requests)
            except ModelGone:
                with suppress(MemoryUnavailable):
                    await models.follow()
        return await _recommend(models, models.serving, requests, last=True)


async def _recommend(
    models: Models, engine: Engine, requests: Sequence[RecommendRequest], last: bool = False
) -> list[RecommendResponse]:
    """Answer with one model, except for users who have moved to another. `last`: what is still not right then is
    answered without memory.
    """
    asked = [_resolve(engine, request) for request in requests]
    await _encode_sequences(engine, asked)
    retrieved, degraded, moved = await _remember(models, engine, asked, last)
    if not moved:
        return await _answers(engine, asked, retrieved, degraded)
    answers: dict[int, RecommendResponse] = {}
    for other, rows in moved.items():
        elsewhere = await _recommend(models, other, [requests[row] for row in rows], last)
        answers |= zip(rows, elsewhere, strict=True)
    stay = [row for row in range(len(asked)) if row not in answers]
    if stay:
        here = [asked[row] for row in stay]
        answers |= zip(stay, await _answers(engine, here, retrieved.take(np.array(stay)), degraded), strict=True)
    return [answers[row] for row in range(len(asked))]


async def _answers(
    engine: Engine, asked: Sequence[Asked], retrieved: Retrieved, degraded: bool
) -> list[RecommendResponse]:
    """Rank for what is known now."""
    indices = Indices(engine.catalogue, engine.recommender.index_of, retrieved.collective.item)
    ranked = await engine.compute(_rank, engine, asked, retrieved, indices)
    return _responses(engine, asked, retrieved, indices, ranked, degraded)


def _resolve(engine: Engine, request: RecommendRequest) -> Asked:
    if request.sequence is None and request.candidates is None:
        return Asked(request)
    index_of = engine.recommender.index_of
    sequence = [index_of.get(item, 0) for item in request.sequence or ()]
    unknown = [item for item in (*(request.sequence or ()), *(request.candidates or ())) if item not in index_of]
    known = np.array([index for index in sequence if index], np.int64)
    last = _newest(np.array(engine.catalogue.numbers(request.sequence or ()), "<u4"))
    return Asked(request, known, list(dict.fromkeys(unknown)), last=last)


def _newest(items: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The last of a sequence, the newest first, (LAST,); 0 = nothing."""
    last = items[: -LAST - 1 : -1]
    return np.pad(last, (0, LAST - len(last)))


async def _encode_sequences(engine: Engine, asked: Sequence[Asked]) -> None:
    given = [one for one in asked if len(one.sequence)]
    if given:
        jobs = [EncodeJob(0, one.sequence.astype("<u4"), NO_ITEMS) for one in given]
        for one, (_, state) in zip(given, await engine.encode(jobs), strict=True):
            one.state = np.asarray(state, np.float32)


async def _remember(
    models: Models, engine: Engine, asked: Sequence[Asked], last: bool
) -> tuple[Retrieved, bool, dict[Engine, list[int]]]:
    """What memory says, for every row of the batch, whether it could not be asked properly, and the rows that have
    moved to other models. Raises ModelGone, unless this is the `last` attempt.
    """
    rows = [row for row, one in enumerate(asked) if one.asks_memory]
    nothing = _nothing(engine, asked)
    if not rows:
        return nothing, False, {}
    begin = time.perf_counter()
    try:
        remembered = await _retrieve(models, engine, [asked[row] for row in rows], nothing.entropy[rows])
        moved = await _moved(models, remembered, rows) if remembered.moved and not last else {}
        if remembered.stale and not last:
            raise ModelGone("users were moved while they were asked about")
    except MemoryUnavailable as error:
        if isinstance(error, ModelGone) and not last:
            raise
        return nothing, True, {}
    finally:
        engine.metrics.stage("retrieve", begin)
    for n, row in enumerate(rows):
        if remembered.known[n]:
            _learn(asked[row], remembered, n)
    unanswered = bool(remembered.stale) or sum(map(len, moved.values())) < len(remembered.moved)
    return _spread(nothing, remembered.retrieved, rows, asked), remembered.degraded or unanswered, moved


async def _moved(models: Models, remembered: Remembered, rows: Sequence[int]) -> dict[Engine, list[int]]:
    """Rows to be answered by other models, as far as those can be loaded here. Raises ModelGone where one is not wanted
    any more.
    """
    moved: dict[Engine, list[int]] = {}
    for n, version in remembered.moved.items():
        engine = await models.find(version)
        if engine is not None:
            moved.setdefault(engine, []).append(rows[n])
        elif not models.stuck:
            raise ModelGone(f"model {version} is not wanted any more")
    return moved


async def _retrieve(models: Models, engine: Engine, asked: Sequence[Asked], entropy: NDArray[np.float32]) -> Remembered:
    """One call for all users. Users of a model that nobody serves any more are keyed anew for the wanted one, those who
    ignore memories get another state, and all are asked about once more.
    """
    remembered = await _ask(engine, asked, entropy)
    if remembered.stale:
        await models.wanted.know(remembered.catalogue_size)
        await models.wanted.rekey(remembered.stale)
        remembered = await _ask(engine, asked, entropy)
    if any(one.request.ignore_memories and one.request.user_id is not None for one in asked):
        remembered = await _ask_without(engine, asked, entropy, remembered)
    return remembered


async def _ask(engine: Engine, asked: Sequence[Asked], entropy: NDArray[np.float32]) -> Remembered:
    remembered = await engine.memory.retrieve(_retrieve_request(engine, asked, entropy))
    if remembered.states.shape[1] != engine.recommender.config.encoder.width:
        raise MemoryUnavailable("memory service: states are not of this model's width")
    await engine.know(remembered.catalogue_size)
    return remembered


async def _ask_without(
    engine: Engine, asked: Sequence[Asked], entropy: NDArray[np.float32], remembered: Remembered
) -> Remembered:
    """Ask with the states that users would have without what they ignore, until they are made of the logs that the
    answer is made of (users may be written meanwhile). The query of a sequence that was sent stays.
    """
    free = [one.state is None for one in asked]
    for _ in range(TRIES):
        jobs = remembered.without
        rows = [row for row, job in jobs.items() if free[row] and job.items]
        for one, is_free in zip(asked, free, strict=True):
            one.state = None if is_free else one.state
        for row, (_keys, state) in zip(rows, await engine.encode([jobs[row] for row in rows]), strict=True):
            asked[row].state = np.asarray(state, np.float32)
            asked[row].last = _newest(jobs[row].unpack().items.astype("<u4"))
        remembered = await _ask(engine, asked, entropy)
        if remembered.without == jobs:
            break
    return remembered


def _retrieve_request(engine: Engine, asked: Sequence[Asked], entropy: NDArray[np.float32]) -> RetrieveRequest:
    with_query = [row for row, one in enumerate(asked) if one.state is not None]
    queries = [rule.unit(one.state) for one in asked if one.state is not None]
    return RetrieveRequest(
        model_version=engine.recommender.version,
        users=[one.request.user_id or "" for one in asked],
        query_rows=np.array(with_query, "<u4").tobytes(),
        queries=b"".join(query.astype("<f4").tobytes() for query in queries),
        last=b"".join(asked[row].last.tobytes() for row in with_query),
        k=np.array([one.request.k or 0 for one in asked], "<i4").tobytes(),
        ignore={
            row: engine.catalogue.numbers(one.request.ignore_memories)
            for row, one in enumerate(asked)
            if one.request.ignore_memories
        },
        uncounted=[row for row, one in enumerate(asked) if one.request.explain],
        alone=[row for row, one in enumerate(asked) if not one.wants("collective")],
        entropy=entropy.astype("<f4").tobytes(),
        now=np.array([one.at for one in asked], "<f8").tobytes(),
    )


def _learn(one: Asked, remembered: Remembered, row: int) -> None:
    one.known, one.version = True, int(remembered.versions[row])
    one.seen = remembered.seen[row]
    if one.state is None and row not in remembered.without:
        one.state = remembered.states[row]


def _nothing(engine: Engine, asked: Sequence[Asked]) -> Retrieved:
    """No memories; the entropy is that of the sequence sent, or neutral."""
    clusters, count = engine.recommender.checkpoint.item_clusters, len(asked)
    entropy = np.full(count, rule.NEUTRAL, np.float32)
    for row, one in enumerate(asked):
        if len(one.sequence):
            weights, cluster = np.ones((1, len(one.sequence))), clusters[one.sequence][None]
            entropy[row] = rule.entropy(weights, cluster, engine.recommender.config.rules.clusters)[0]
    return Retrieved.nothing(entropy)


def _spread(nothing: Retrieved, found: Retrieved, rows: Sequence[int], asked: Sequence[Asked]) -> Retrieved:
    """The rows that were asked about put in their places; scopes not wanted, or without a state, are left empty."""

    own = np.array([asked[row].wants("own") for row in rows])
    others = np.array([asked[row].state is not None for row in rows])
    if len(rows) == len(asked) and own.all() and others.all():
        return found

    def spread(values: NDArray[Any], kept: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        whole = np.zeros((len(asked), *values.shape[1:]), values.dtype)
        whole[rows] = values if kept is None else np.where(kept.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
        return whole

    def entries(found: Entries, kept: NDArray[np.bool_]) -> Entries:
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


def _rank(engine: Engine, asked: Sequence[Asked], retrieved: Retrieved, indices: Indices) -> list[Ranked]:
    """Runs in the model's thread."""
    recommender, begin = engine.recommender, time.perf_counter()
    queries = _queries(engine, asked, indices)
    scored = [row for row, one in enumerate(asked) if one.state is not None]
    ranked: dict[int, Ranked] = {}
    if scored:
        own = replace(retrieved.own, item=engine.catalogue.indices(retrieved.own.item))
        others = replace(retrieved.collective, item=indices.of(retrieved.collective.item))
        present = engine.catalogue.indices(retrieved.present)
        batch = replace(retrieved, own=own, collective=others, present=present)
        batch = batch if len(scored) == len(asked) else batch.take(np.array(scored))
        chosen = [queries[row] for row in scored]
        states = np.stack([query.state for query in chosen])
        prediction = recommender.predict(states, batch, [query.seen for query in chosen])
        begin = engine.metrics.stage("fuse", begin)
        answers = recommender.rank(prediction, chosen, batch, [asked[row].request.explain for row in scored])
        ranked = dict(zip(scored, answers, strict=True))
    answered = [ranked.get(row) or recommender.most_popular(queries[row]) for row in range(len(asked))]
    engine.metrics.stage("score", begin)
    return answered


def _queries(engine: Engine, asked: Sequence[Asked], indices: Indices) -> list[Query]:
    """What each request means to the model."""
    hidden = indices.of(engine.catalogue.hidden)
    seen = indices.of(np.concatenate([one.seen for one in asked]).astype(np.int64))
    per_user = np.split(seen, np.cumsum([len(one.seen) for one in asked])[:-1])
    return [_query(engine, one, had, hidden, indices) for one, had in zip(asked, per_user, strict=True)]


def _query(engine: Engine, one: Asked, had: NDArray[np.int64], hidden: NDArray[np.int64], indices: Indices) -> Query:
    """`had`: what the user had, sorted or not. What is to be ignored stays seen, but has no repeat bias."""
    request, taken = one.request, had
    if request.ignore_memories:
        taken = np.setdiff1d(had, indices.named(request.ignore_memories))
    if request.sequence:
        sent = indices.named(request.sequence)
        had, taken = np.union1d(had, sent), np.union1d(taken, sent)
    barred = [hidden, had] if _excludes_seen(engine, request) else [hidden]
    if request.exclude_items:
        barred.append(indices.named(request.exclude_items))
    return Query(
        state=NO_STATE if one.state is None else one.state,
        seen=taken[taken <= engine.recommender.item_count] if indices.reaches_beyond else taken,
        excluded=np.concatenate(barred),
        candidates=None if request.candidates is None else indices.named(request.candidates),
        top_n=request.top_n,
        passing=indices.passing(request.filter) if request.filter else None,
    )


def _excludes_seen(engine: Engine, request: RecommendRequest) -> bool:
    """Whether what the user had is left out: as the request says, else as the model's data does."""
    if request.exclude_seen is None:
        return engine.recommender.config.rules.exclude_seen
    return request.exclude_seen


def _responses(
    engine: Engine,
    asked: Sequence[Asked],
    retrieved: Retrieved,
    indices: Indices,
    ranked: Sequence[Ranked],
    degraded: bool,
) -> list[RecommendResponse]:
    """The answers, in the order of the requests."""
    version, used = engine.recommender.version, _memory_use(asked, retrieved, degraded)
    timed = engine.recommender.config.rules.time_unit == "seconds"
    identify = engine.metrics.feedback.answered
    answers: list[RecommendResponse] = []
    for row, (one, best, memory) in enumerate(zip(asked, ranked, used, strict=True)):
        items = _items(engine, best, indices)
        if one.request.explain:
            tell(engine.catalogue, retrieved, row, best, items, memory, timed)
        source = _source(one, memory)
        engine.metrics.answered(source, memory, known=one.known)
        answers.append(
            {
                "recommendation_id": identify(one.request.user_id, memory, [item["item_id"] for item in items]),
                "user_id": one.request.user_id,
                "source": source,
                "items": items,
                "memory": memory,
                "unknown_items": one.unknown_items,
                "model_version": version,
            }
        )
    return answers


def _items(engine: Engine, ranked: Ranked, indices: Indices) -> list[Recommended]:
    names = indices.item_ids(ranked.items, engine.recommender.checkpoint.item_ids)
    return [{"item_id": name, "score": score} for name, score in zip(names, ranked.scores.tolist(), strict=True)]


def _source(one: Asked, memory: MemoryUse) -> Literal["memory", "encoder", "popularity"]:
    """What answers a request: popularity without a state to go by; memory where it knows the user or gave memories of
    others; else the encoder.
    """
    if one.state is None:
        return "popularity"
    return "memory" if one.known or memory["collective"]["retrieved"] else "encoder"


def _memory_use(asked: Sequence[Asked], retrieved: Retrieved, degraded: bool) -> list[MemoryUse]:
    """What memory contributed to each answer."""
    columns = (
        retrieved.entropy,
        retrieved.k,
        retrieved.bank_size,
        retrieved.own.valid.sum(axis=1),
        retrieved.collective_k,
        retrieved.collective.valid.sum(axis=1),
    )
    return [
        {
            "entropy": entropy,
            "k": k,
            "bank_size": size,
            "version": one.version,
            "own": {"k": k, "retrieved": own},
            "collective": {"k": collective_k, "retrieved": others},
            "degraded": degraded and one.asks_memory,
        }
        for one, entropy, k, size, own, collective_k, others in zip(
            asked, *(column.tolist() for column in columns), strict=True
        )
    ]
