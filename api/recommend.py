"""The use case behind `POST /recommend`, a micro-batch at a time.

Encode the sequences that were sent, ask the memory once for all users, fuse and score in one pass, answer. Where
memory is out of reach the encoder (given a sequence) or popularity answers, and the response says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from api.catalogue import Indices
from api.engine import Engine
from api.memory_client import Remembered
from api.problems import MemoryUnavailable
from api.schemas import Because, MemoryUse, Recommended, RecommendRequest, RecommendResponse, Scope, ScopeUse
from memory_service.schemas import RetrieveRequest
from model import rules as rule
from model.bank import Entries, Retrieved
from model.events import EncodeJob
from model.recommender import NO_ITEMS, Influence, Query, Ranked
from model.rules import Ints

SCOPES: tuple[Scope, ...] = ("own", "collective")
"""Scopes that can be asked for."""
REASONS = 3
"""Memories named for each item when explaining, the largest part first; a negative part speaks against the item."""


@dataclass
class Asked:
    """A request on its way: the model's items of its sequence, its state (d,) float32 or None, and what memory knows of
    the user; seen: catalogue numbers.
    """

    request: RecommendRequest
    sequence: NDArray[np.int64]
    unknown_items: list[str]
    state: NDArray[np.float32] | None = None
    seen: NDArray[np.int64] = field(default_factory=lambda: NO_ITEMS)
    known: bool = False
    version: int = 0

    def wants(self, scope: Scope) -> bool:
        """Whether memories of a scope are to be used."""
        return self.request.scopes is None or scope in self.request.scopes

    @property
    def asks_memory(self) -> bool:
        """Whether memory may know something: about the user, or about others in the situation of the sequence."""
        return self.request.user_id is not None or (self.state is not None and self.wants("collective"))


async def recommend(engine: Engine, requests: Sequence[RecommendRequest]) -> list[RecommendResponse]:
    """Answer a batch of requests."""
    asked = [_resolve(engine, request) for request in requests]
    await _encode_sequences(engine, asked)
    retrieved, degraded = await _remember(engine, asked)
    indices = Indices(engine.catalogue, engine.recommender.index_of, retrieved.collective.item)
    ranked = await engine.compute("recommend", _rank, engine, asked, retrieved, indices)
    return [_response(engine, asked, retrieved, indices, row, ranked[row], degraded) for row in range(len(asked))]


def _resolve(engine: Engine, request: RecommendRequest) -> Asked:
    index_of = engine.recommender.index_of
    sequence = [index_of.get(item, 0) for item in request.sequence or ()]
    unknown = [item for item in (*(request.sequence or ()), *(request.candidates or ())) if item not in index_of]
    known = np.array([index for index in sequence if index], np.int64)
    return Asked(request, known, list(dict.fromkeys(unknown)))


async def _encode_sequences(engine: Engine, asked: Sequence[Asked]) -> None:
    given = [one for one in asked if len(one.sequence)]
    if given:
        jobs = [EncodeJob(0, one.sequence.astype("<u4"), NO_ITEMS) for one in given]
        for one, (_, state) in zip(given, await engine.encode(jobs), strict=True):
            one.state = np.asarray(state, np.float32)


async def _remember(engine: Engine, asked: Sequence[Asked]) -> tuple[Retrieved, bool]:
    """What memory says, for every row of the batch, and whether it could not be asked properly."""
    rows = [row for row, one in enumerate(asked) if one.asks_memory]
    nothing = _nothing(engine, asked)
    if not rows:
        return nothing, False
    begin = time.perf_counter()
    try:
        remembered = await _retrieve(engine, [asked[row] for row in rows], nothing.entropy[rows])
    except MemoryUnavailable:
        return nothing, True
    finally:
        engine.metrics.seconds.labels("retrieve").observe(time.perf_counter() - begin)
    for n, row in enumerate(rows):
        if remembered.known[n]:
            _learn(engine, asked[row], remembered, n)
    return _spread(nothing, remembered.retrieved, rows, asked), remembered.degraded


async def _retrieve(engine: Engine, asked: Sequence[Asked], entropy: NDArray[np.float32]) -> Remembered:
    """One call for all users; users of another model are keyed anew and asked about once more."""
    request = _retrieve_request(engine, asked, entropy)
    remembered = await engine.memory.retrieve(request)
    await engine.know(remembered.catalogue_size)
    if remembered.stale:
        await engine.rekey(remembered.stale)
        remembered = await engine.memory.retrieve(request)
        await engine.know(remembered.catalogue_size)
    return remembered


def _retrieve_request(engine: Engine, asked: Sequence[Asked], entropy: NDArray[np.float32]) -> RetrieveRequest:
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
        alone=[row for row, one in enumerate(asked) if not one.wants("collective")],
        entropy=entropy.astype("<f4").tobytes(),
    )


def _learn(engine: Engine, one: Asked, remembered: Remembered, row: int) -> None:
    one.known, one.version = True, int(remembered.versions[row])
    one.seen = remembered.seen[row].astype(np.int64)
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


def _spread(nothing: Retrieved, found: Retrieved, rows: Sequence[int], asked: Sequence[Asked]) -> Retrieved:
    """The rows that were asked about put in their places; scopes not wanted, or without a state, are left empty."""

    def spread(into: NDArray[Any], values: NDArray[Any], kept: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        whole = np.zeros((len(asked), *values.shape[1:]), into.dtype)
        whole[rows] = values if kept is None else np.where(kept.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
        return whole

    def entries(found: Entries, kept: NDArray[np.bool_]) -> Entries:
        return Entries(*(spread(getattr(found, name), getattr(found, name), kept) for name in Entries.COLUMNS))

    own = np.array([asked[row].wants("own") for row in rows])
    others = np.array([asked[row].state is not None for row in rows])
    entropy = nothing.entropy.copy()
    entropy[rows] = found.entropy
    return Retrieved(
        entropy=entropy,
        k=spread(nothing.k, found.k, own),
        bank_size=spread(nothing.bank_size, found.bank_size),
        own=entries(found.own, own),
        collective=entries(found.collective, others),
        collective_k=spread(nothing.k, found.collective_k, others),
    )


def _rank(engine: Engine, asked: Sequence[Asked], retrieved: Retrieved, indices: Indices) -> list[Ranked]:
    """Runs in the model's thread."""
    recommender = engine.recommender
    scored = [row for row, one in enumerate(asked) if one.state is not None]
    ranked: list[Ranked | None] = [None] * len(asked)
    if scored:
        own = replace(retrieved.own, item=engine.catalogue.indices(retrieved.own.item))
        others = replace(retrieved.collective, item=indices.of(retrieved.collective.item))
        batch = replace(retrieved, own=own, collective=others).take(np.array(scored))
        queries = [_query(engine, asked[row], indices) for row in scored]
        explain = [asked[row].request.explain for row in scored]
        for row, answer in zip(scored, recommender.recommend(queries, batch, explain), strict=True):
            ranked[row] = answer
    return [
        answer or recommender.most_popular(_query(engine, asked[row], indices)) for row, answer in enumerate(ranked)
    ]


def _query(engine: Engine, one: Asked, indices: Indices) -> Query:
    request = one.request
    had = np.union1d(indices.named(request.sequence or ()), indices.of(one.seen))
    barred = [indices.of(engine.catalogue.hidden), indices.named(request.exclude_items or ())]
    return Query(
        state=np.zeros(0, np.float32) if one.state is None else one.state,
        seen=had[had <= engine.recommender.item_count],
        excluded=np.concatenate([*barred, had] if request.exclude_seen else barred),
        candidates=None if request.candidates is None else indices.named(request.candidates),
        top_n=request.top_n,
    )


def _response(
    engine: Engine,
    asked: Sequence[Asked],
    retrieved: Retrieved,
    indices: Indices,
    row: int,
    ranked: Ranked,
    degraded: bool,
) -> RecommendResponse:
    one, ids = asked[row], engine.recommender.checkpoint.item_ids
    because: Sequence[list[Because] | None] = [None] * len(ranked.items)
    if one.request.explain:
        because = _because(engine, retrieved, row, ranked)
    _observe(engine, one, retrieved, row, degraded)
    return RecommendResponse.model_construct(
        recommendation_id=uuid4().hex,
        user_id=one.request.user_id,
        source=_source(one, retrieved, row),
        items=[
            _recommended(indices.item_id(int(index), ids), float(ranked.scores[n]), because[n])
            for n, index in enumerate(ranked.items)
        ],
        memory=_memory_use(one, retrieved, row, ranked, degraded),
        unknown_items=one.unknown_items,
        model_version=engine.recommender.version,
    )


def _source(one: Asked, retrieved: Retrieved, row: int) -> Literal["memory", "encoder", "popularity"]:
    """What answers a request: memory knows the user or gave memories of others; else the encoder, if it has a state."""
    if one.known or retrieved.collective.valid[row].any():
        return "memory"
    return "popularity" if one.state is None else "encoder"


def _memory_use(one: Asked, retrieved: Retrieved, row: int, ranked: Ranked, degraded: bool) -> MemoryUse:
    k = int(retrieved.k[row])
    use = MemoryUse.model_construct(
        entropy=float(retrieved.entropy[row]),
        k=k,
        bank_size=int(retrieved.bank_size[row]),
        version=one.version,
        own=ScopeUse.model_construct(k=k, retrieved=int(retrieved.own.valid[row].sum())),
        collective=ScopeUse.model_construct(
            k=int(retrieved.collective_k[row]), retrieved=int(retrieved.collective.valid[row].sum())
        ),
        degraded=degraded and one.asks_memory,
    )
    if one.request.explain:
        use.gate, use.copying = ranked.gate, ranked.copying
    return use


def _recommended(item_id: str, score: float, because: list[Because] | None) -> Recommended:
    item = Recommended.model_construct(item_id=item_id, score=score)
    if because is not None:
        item.because = because
    return item


def _because(engine: Engine, retrieved: Retrieved, row: int, ranked: Ranked) -> list[list[Because]]:
    """For each item the memories that raise the logarithm of its probability most, in its logit or as copies."""
    reasons: list[list[Because]] = []
    for n in range(len(ranked.items)):
        strongest = sorted(ranked.influences, key=lambda one: -one.raises(n))[:REASONS]
        reasons.append(
            [
                Because.model_construct(
                    item_id=engine.catalogue.item_id(int(_entries(retrieved, one).item[row, one.entry])),
                    scope=one.scope,
                    similarity=float(_entries(retrieved, one).similarity[row, one.entry]),
                    weight=one.weight,
                    logit=float(one.part[n]),
                    copied=float(one.copied[n]),
                )
                for one in strongest
            ]
        )
    return reasons


def _entries(retrieved: Retrieved, one: Influence) -> Entries:
    return retrieved.own if one.scope == "own" else retrieved.collective


def _observe(engine: Engine, one: Asked, retrieved: Retrieved, row: Ints | int, degraded: bool) -> None:
    metrics = engine.metrics
    metrics.sources.labels(_source(one, retrieved, int(row))).inc()
    if degraded and one.asks_memory:
        metrics.degraded.inc()
    if one.known:
        metrics.entropy.observe(float(retrieved.entropy[row]))
        metrics.k.observe(int(retrieved.k[row]))
