"""The use case behind `POST /recommend`, a micro-batch at a time.

Encode the sequences that were sent, ask the memory once for all users, fuse and score in one pass, answer. Where
memory is out of reach the encoder (given a sequence) or popularity answers, and the response says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from api.engine import Engine
from api.memory_client import Remembered
from api.problems import InvalidRequest, MemoryUnavailable
from api.schemas import Because, MemoryUse, Recommended, RecommendRequest, RecommendResponse, Scope, ScopeUse
from memory_service.schemas import RetrieveRequest
from model import rules as rule
from model.bank import Entries, Retrieved
from model.events import EncodeJob
from model.recommender import NO_ITEMS, Query, Ranked
from model.rules import Ints

SCOPES: tuple[Scope, ...] = ("own",)
"""Scopes that can be asked for."""
REASONS = 3
"""Memories named for each item when explaining, the largest part first; a negative part speaks against the item."""


@dataclass
class Asked:
    """A request on its way: item ids resolved, its state (d,) float32 or None, and what memory knows of the user."""

    request: RecommendRequest
    sequence: NDArray[np.int64]
    candidates: NDArray[np.int64] | None
    unknown_items: list[str]
    state: NDArray[np.float32] | None = None
    seen: NDArray[np.int64] = field(default_factory=lambda: NO_ITEMS)
    known: bool = False
    version: int = 0

    @property
    def source(self) -> Literal["memory", "encoder", "popularity"]:
        """What answers this request."""
        if self.known:
            return "memory"
        return "popularity" if self.state is None else "encoder"


async def recommend(engine: Engine, requests: Sequence[RecommendRequest]) -> list[RecommendResponse]:
    """Answer a batch of requests."""
    asked = [_resolve(engine, request) for request in requests]
    await _encode_sequences(engine, asked)
    retrieved, degraded = await _remember(engine, asked)
    ranked = await engine.compute("recommend", _rank, engine, asked, retrieved)
    return [_response(engine, asked, retrieved, row, ranked[row], degraded) for row in range(len(asked))]


def check_scopes(request: RecommendRequest) -> None:
    """Raises InvalidRequest for a scope that the model was not trained with."""
    for scope in request.scopes or ():
        if scope not in SCOPES:
            raise InvalidRequest(f"this model has no {scope} scope; it has: {', '.join(SCOPES)}", "scope_unavailable")


def _resolve(engine: Engine, request: RecommendRequest) -> Asked:
    index_of = engine.recommender.index_of
    sequence = [index_of.get(item, 0) for item in request.sequence or ()]
    unknown = [item for item in (*(request.sequence or ()), *(request.candidates or ())) if item not in index_of]
    candidates = None
    if request.candidates is not None:
        candidates = np.array([index_of[item] for item in request.candidates if item in index_of], np.int64)
    known = np.array([index for index in sequence if index], np.int64)
    return Asked(request, known, candidates, list(dict.fromkeys(unknown)))


async def _encode_sequences(engine: Engine, asked: Sequence[Asked]) -> None:
    given = [one for one in asked if len(one.sequence)]
    if given:
        jobs = [EncodeJob(0, one.sequence.astype("<u4"), NO_ITEMS) for one in given]
        for one, (_, state) in zip(given, await engine.encode(jobs), strict=True):
            one.state, one.seen = np.asarray(state, np.float32), one.sequence


async def _remember(engine: Engine, asked: Sequence[Asked]) -> tuple[Retrieved, bool]:
    """What memory says, for every row of the batch, and whether it could not be asked properly."""
    rows = [row for row, one in enumerate(asked) if one.request.user_id is not None]
    nothing = _nothing(engine, asked)
    if not rows:
        return nothing, False
    begin = time.perf_counter()
    try:
        remembered = await _retrieve(engine, [asked[row] for row in rows])
    except MemoryUnavailable:
        return nothing, True
    finally:
        engine.metrics.seconds.labels("retrieve").observe(time.perf_counter() - begin)
    for n, row in enumerate(rows):
        if remembered.known[n]:
            _learn(engine, asked[row], remembered, n)
    return _spread(nothing, remembered.retrieved, rows, engine, asked), remembered.degraded


async def _retrieve(engine: Engine, asked: Sequence[Asked]) -> Remembered:
    """One call for all users; users of another model are keyed anew and asked about once more."""
    request = _retrieve_request(engine, asked)
    remembered = await engine.memory.retrieve(request)
    await engine.know(remembered.catalogue_size)
    if remembered.stale:
        await engine.rekey(remembered.stale)
        remembered = await engine.memory.retrieve(request)
        await engine.know(remembered.catalogue_size)
    return remembered


def _retrieve_request(engine: Engine, asked: Sequence[Asked]) -> RetrieveRequest:
    with_query = [row for row, one in enumerate(asked) if one.state is not None]
    queries = [rule.unit(one.state) for one in asked if one.state is not None]
    return RetrieveRequest(
        model_version=engine.recommender.version,
        users=[one.request.user_id or "" for one in asked],
        query_rows=np.array(with_query, "<u4").tobytes(),
        queries=b"".join(query.astype("<f4").tobytes() for query in queries),
        k=np.array([one.request.k or 0 for one in asked], "<i4").tobytes(),
        ignore={
            row: engine.catalogue.numbers(one.request.ignore_memories)
            for row, one in enumerate(asked)
            if one.request.ignore_memories
        },
        uncounted=[row for row, one in enumerate(asked) if one.request.explain],
    )


def _learn(engine: Engine, one: Asked, remembered: Remembered, row: int) -> None:
    one.known, one.version = True, int(remembered.versions[row])
    had = engine.catalogue.indices(remembered.seen[row].astype(np.int64))
    one.seen = np.union1d(one.sequence, had[had > 0])
    if one.state is None:
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


def _spread(
    nothing: Retrieved, found: Retrieved, rows: Sequence[int], engine: Engine, asked: Sequence[Asked]
) -> Retrieved:
    """The rows that were asked about put in their places; scopes not wanted are left empty."""
    entropy, k, size = nothing.entropy.copy(), nothing.k.copy(), nothing.bank_size.copy()
    own = Entries(*(getattr(Entries.empty(len(asked), found.own.item.shape[1]), c).copy() for c in Entries.COLUMNS))
    for n, row in enumerate(rows):
        if not asked[row].known:
            continue
        entropy[row], size[row] = found.entropy[n], found.bank_size[n]
        if asked[row].request.scopes is None or "own" in (asked[row].request.scopes or ()):
            k[row] = found.k[n]
            for column in Entries.COLUMNS:
                getattr(own, column)[row] = getattr(found.own, column)[n]
    return replace(nothing, entropy=entropy, k=k, bank_size=size, own=own)


def _rank(engine: Engine, asked: Sequence[Asked], retrieved: Retrieved) -> list[Ranked]:
    """Runs in the model's thread."""
    recommender = engine.recommender
    scored = [row for row, one in enumerate(asked) if one.state is not None]
    ranked: list[Ranked | None] = [None] * len(asked)
    if scored:
        own = replace(retrieved.own, item=engine.catalogue.indices(retrieved.own.item))
        batch = replace(retrieved, own=own).take(np.array(scored))
        queries = [_query(engine, asked[row]) for row in scored]
        explain = [asked[row].request.explain for row in scored]
        for row, answer in zip(scored, recommender.recommend(queries, batch, explain), strict=True):
            ranked[row] = answer
    return [answer or recommender.most_popular(_query(engine, asked[row])) for row, answer in enumerate(ranked)]


def _query(engine: Engine, one: Asked) -> Query:
    index_of, request = engine.recommender.index_of, one.request
    barred = np.array([index_of.get(item, 0) for item in request.exclude_items or ()], np.int64)
    seen = one.seen if request.exclude_seen else NO_ITEMS
    return Query(
        state=np.zeros(0, np.float32) if one.state is None else one.state,
        seen=one.seen,
        excluded=np.concatenate([engine.catalogue.hidden, barred, seen]).astype(np.int64),
        candidates=one.candidates,
        top_n=request.top_n,
    )


def _response(
    engine: Engine, asked: Sequence[Asked], retrieved: Retrieved, row: int, ranked: Ranked, degraded: bool
) -> RecommendResponse:
    one, ids = asked[row], engine.recommender.checkpoint.item_ids
    because: Sequence[list[Because] | None] = [None] * len(ranked.items)
    if one.request.explain:
        because = _because(engine, retrieved, row, ranked)
    _observe(engine, one, retrieved, row, degraded)
    return RecommendResponse.model_construct(
        recommendation_id=uuid4().hex,
        user_id=one.request.user_id,
        source=one.source,
        items=[
            _recommended(ids[index - 1], float(ranked.scores[n]), because[n]) for n, index in enumerate(ranked.items)
        ],
        memory=_memory_use(one, retrieved, row, ranked, degraded),
        unknown_items=one.unknown_items,
        model_version=engine.recommender.version,
    )


def _memory_use(one: Asked, retrieved: Retrieved, row: int, ranked: Ranked, degraded: bool) -> MemoryUse:
    k = int(retrieved.k[row])
    use = MemoryUse.model_construct(
        entropy=float(retrieved.entropy[row]),
        k=k,
        bank_size=int(retrieved.bank_size[row]),
        version=one.version,
        own=ScopeUse.model_construct(k=k, retrieved=int(retrieved.own.valid[row].sum())),
        collective=ScopeUse.model_construct(k=0, retrieved=0),
        degraded=degraded and one.request.user_id is not None,
    )
    if one.request.explain:
        use.gate = ranked.gate
    return use


def _recommended(item_id: str, score: float, because: list[Because] | None) -> Recommended:
    item = Recommended.model_construct(item_id=item_id, score=score)
    if because is not None:
        item.because = because
    return item


def _because(engine: Engine, retrieved: Retrieved, row: int, ranked: Ranked) -> list[list[Because]]:
    """For each item the memories that raise its logit most."""
    reasons: list[list[Because]] = []
    for n in range(len(ranked.items)):
        strongest = sorted(ranked.influences, key=lambda one: -one.part[n])[:REASONS]
        reasons.append(
            [
                Because.model_construct(
                    item_id=engine.catalogue.item_id(int(retrieved.own.item[row, one.entry])),
                    scope=one.scope,
                    similarity=float(retrieved.own.similarity[row, one.entry]),
                    weight=one.weight,
                    logit=float(one.part[n]),
                )
                for one in strongest
            ]
        )
    return reasons


def _observe(engine: Engine, one: Asked, retrieved: Retrieved, row: Ints | int, degraded: bool) -> None:
    metrics = engine.metrics
    metrics.sources.labels(one.source).inc()
    if degraded and one.request.user_id is not None:
        metrics.degraded.inc()
    if one.known:
        metrics.entropy.observe(float(retrieved.entropy[row]))
        metrics.k.observe(int(retrieved.k[row]))
