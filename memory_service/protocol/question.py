"""What the api asks the memory service about a batch of users: arrays on both sides, `RetrieveRequest` in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memory_service.protocol.bounds import TIME_LIMIT_S, UNIT_LIMIT
from memory_service.protocol.columns import BadRequest, check_rows, column, mask
from memory_service.protocol.structs import RetrieveRequest
from model.memory.collective.layout import LAST
from model.memory.rules import Bools, Floats, Ints


@dataclass(frozen=True)
class Question:
    """A question about B users; the user "" is nobody, so that only the query counts. Items are catalogue numbers.

    model_version: the model whose states are searched with.
    query_rows (Q,): rows of the users whose query is sent along; the others are searched with their record's state.
    queries (Q, d) float32: these queries, of unit length.
    last (Q, LAST) uint32: the items that each query was made of last, newest first, 0 = none. A row of zeros: those of
        the user's record.
    k (B,): number of own memories; 0 or an empty array: adaptive.
    ignored: row → items that the user is treated as never having taken.
    uncounted (B,) bool: rows whose retrievals do not count as accesses; rows with `ignored` items never count.
    alone (B,) bool: rows that want no memories of other users. For both, an empty array means no rows.
    entropy (B,) float32, 0 to 1: used for users without memories; None: neutral.
    now (B,) float64: time of each request in seconds, for models that retrieve by habits; None: by similarity alone.
    """

    model_version: str
    users: Sequence[str]
    query_rows: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    queries: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    last: NDArray[np.uint32] = field(default_factory=lambda: np.zeros((0, LAST), np.uint32))
    k: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    ignored: Mapping[int, list[int]] = field(default_factory=dict)
    uncounted: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    alone: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    entropy: NDArray[np.float32] | None = None
    now: NDArray[np.float64] | None = None

    def packed(self) -> RetrieveRequest:
        """The question as a request body."""
        return RetrieveRequest(
            model_version=self.model_version,
            users=list(self.users),
            query_rows=self.query_rows.astype("<u4").tobytes(),
            queries=self.queries.astype("<f4").tobytes(),
            last=self.last.astype("<u4").tobytes(),
            k=self.k.astype("<i4").tobytes(),
            ignore=dict(self.ignored),
            uncounted=np.flatnonzero(self.uncounted).tolist(),
            alone=np.flatnonzero(self.alone).tolist(),
            entropy=b"" if self.entropy is None else self.entropy.astype("<f4").tobytes(),
            now=b"" if self.now is None else self.now.astype("<f8").tobytes(),
        )

    @classmethod
    def unpacked(cls, request: RetrieveRequest) -> Question:
        """The question in a request body, with every array of full length. Raises BadRequest if columns do not fit.

        The width of the queries is that of the bytes; `queries_or` compares it with the model's.
        """
        users = len(request.users)
        rows = column(request.query_rows, "<u4", len(request.query_rows) // 4, "query_rows").astype(np.int64)
        check_rows(rows.tolist(), users, "query_rows")
        check_rows(request.ignore, users, "ignore")
        width = len(request.queries) // (4 * len(rows)) if len(rows) else 0
        last = (
            column(request.last, "<u4", len(rows) * LAST, "last") if request.last else np.zeros(len(rows) * LAST, "u4")
        )
        k = column(request.k, "<i4", users, "k") if request.k else np.zeros(users)
        return cls(
            model_version=request.model_version,
            users=request.users,
            query_rows=rows,
            queries=column(request.queries, "<f4", len(rows) * width, "queries", UNIT_LIMIT).reshape(len(rows), width),
            last=last.reshape(len(rows), LAST),
            k=np.maximum(k.astype(np.int64), 0),
            ignored={row: items for row, items in request.ignore.items() if items},
            uncounted=mask(request.uncounted, users, "uncounted"),
            alone=mask(request.alone, users, "alone"),
            entropy=column(request.entropy, "<f4", users, "entropy").clip(0, 1) if request.entropy else None,
            now=column(request.now, "<f8", users, "now", TIME_LIMIT_S) if request.now else None,
        )

    def queries_or(self, own: Floats) -> Floats:
        """What each user is searched with, (B, d): the query sent along, otherwise `own` (B, d).

        Raises BadRequest if the queries have another width than `own`.
        """
        if not len(self.query_rows):
            return own
        if self.queries.shape[1] != own.shape[1]:
            raise BadRequest(f"queries have {self.queries.shape[1]} numbers each, expected {own.shape[1]}")
        chosen = own.copy()
        chosen[self.query_rows] = self.queries
        return chosen

    def last_or(self, own: Ints) -> Ints:
        """The items taken last, (B, LAST): those sent along with a query, otherwise `own` (B, LAST)."""
        chosen = own.astype(np.int64)
        told = self.last.any(axis=1)
        chosen[self.query_rows[told]] = self.last[told]
        return chosen
