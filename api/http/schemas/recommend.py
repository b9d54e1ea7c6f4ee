"""Bodies of `POST /recommend` and `POST /recommend/batch`.

Responses are plain dicts, not pydantic models: thousands are made per second, and they need no validation.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from api.http.schemas.fields import Identifier, RequestBody, Scope, Timestamp
from api.http.schemas.filters import Filter


class RecommendRequest(RequestBody):
    """Whom to recommend to: a user, a sequence of items (oldest first), both, or nobody in particular. If `candidates`
    or a `filter` are given, only items among the candidates whose metadata passes the filter are recommended.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "196", "top_n": 5, "explain": True},
                {"user_id": "196", "filter": {"genres": {"any": ["Comedy"]}, "year": {"gte": 1990}}},
                {"user_id": "196", "timestamp": 1764000000.0, "exclude_seen": False},
            ]
        }
    )

    user_id: Identifier | None = None
    """The user to recommend to."""
    sequence: Annotated[list[Identifier], Field(max_length=1000)] | None = None
    """The newest items, oldest first. Those that the model does not know are listed in the response."""
    top_n: Annotated[int, Field(ge=1, le=1000)] = 10
    """Maximum number of items in the response."""
    timestamp: Timestamp | None = None
    """The time to recommend for, in seconds UTC; absent: the time at which the request arrives, the same for a whole
    batch. A model that has learned habits looks at how long ago each item was taken, and at the hour and the day of the
    week.
    """
    exclude_seen: bool | None = None
    """Leave out items that the user has taken or that are in the sequence. Absent: as the model's data suggests, by
    whether its users come back to items (`rules.exclude_seen` of `GET /model`).
    """
    exclude_items: Annotated[list[Identifier], Field(max_length=10_000)] | None = None
    """Items that are not recommended."""
    candidates: Annotated[list[Identifier], Field(max_length=10_000)] | None = None
    """The only items that may be recommended."""
    filter: Filter | None = None
    """Conditions on the metadata of what may be recommended."""
    k: Annotated[int, Field(ge=1, le=100)] | None = None
    """Number of own memories to retrieve; absent: chosen by the user's entropy."""
    scopes: Annotated[list[Scope], Field(max_length=2)] | None = None
    """Whose memories to use: the user's own, those of all other users (collective); absent: both."""
    ignore_memories: (
        Annotated[
            list[Identifier],
            Field(
                max_length=1000,
                description="Answer as if the user had never taken these items: bank, entropy, K, state and repeat "
                "bias are computed without them. They still count as seen for `exclude_seen`, and they stay in a "
                "`sequence` that is sent.",
            ),
        ]
        | None
    ) = None
    explain: bool = False
    """Explain each item by the memories that it is recommended for."""


class Habit(TypedDict):
    """The habit of an own memory at the time of the request, as the model sees it: how often its item was taken, how
    long ago last, after how long on average (null: taken once), and whether it is usually taken at this hour of the day
    and on this day of the week. `since_s` is capped at the longest absence that is common in the data
    (`rules.longest_gap_s`); it is null where the data has no times. `logit`: what the habit adds to the logit of the
    memory's own item; it adds nothing to other items.
    """

    count: int
    since_s: float | None
    mean_gap_s: float | None
    at_this_hour: bool
    on_this_day: bool
    logit: float


class Because(TypedDict):
    """A memory that an item is recommended for: its attention weight, its exact part in the item's logit, and the exact
    share of the item's probability that is copied from it. Own memories have a `habit` if the model has learned habits;
    at the memory's own item, `logit` includes that of the habit. Collective memories do not name their user, and only
    items held by at least two other users are used (`RAMREC_MEMORY_COLLECTIVE_USERS`).
    """

    item_id: str
    scope: Scope
    similarity: float
    weight: float
    habit: NotRequired[Habit]
    logit: float
    copied: float


class Parts(TypedDict):
    """The exact parts of an item's probability p = exp(score): p·(1 − copied) = (1 − memory.copying) ·
    exp(state + calibration + memories − memory.log_z). `state`: the logit by the user's state alone; `calibration`:
    repeat bias and shift; `memories`: the sum over all memories and their habits, the strongest three of which are in
    `because`; `copied`: the share of p that is copied from collective memories. The three logits are null for an item
    that the model does not know: it is recommended by copying alone.
    """

    state: float | None
    calibration: float | None
    memories: float | None
    copied: float


class Recommended(TypedDict):
    """One item; `score` is the natural logarithm of its probability among all items."""

    item_id: str
    score: float
    because: NotRequired[list[Because]]
    parts: NotRequired[Parts]


class RetrievedMemory(TypedDict):
    """A memory that was retrieved, and its attention weight. Own memories have a `habit` if the model has learned
    habits.
    """

    item_id: str
    scope: Scope
    similarity: float
    weight: float
    habit: NotRequired[Habit]


class ScopeUse(TypedDict):
    """How many memories of one scope were wanted (`k`) and retrieved."""

    k: int
    retrieved: int


class MemoryUse(TypedDict):
    """What the memory service contributed; `degraded`: it could not be reached, or answered only in part. With
    `explain`: `gate` is the share of memories in the fused state, `copying` the share of copying in all probability,
    `log_z` the logarithm of the sum over all items that turns logits into probabilities, `memories` everything that was
    retrieved, of each scope the most similar first (own memories by activation, if the model has learned habits).
    """

    entropy: float
    k: int
    bank_size: int
    version: int
    own: ScopeUse
    collective: ScopeUse
    gate: NotRequired[float]
    copying: NotRequired[float]
    log_z: NotRequired[float]
    memories: NotRequired[list[RetrievedMemory]]
    degraded: bool


class RecommendResponse(TypedDict):
    """The top-N, and what it is based on."""

    recommendation_id: str
    user_id: str | None
    source: Literal["memory", "encoder", "popularity"]
    items: list[Recommended]
    memory: MemoryUse
    unknown_items: list[str]
    model_version: str


class RecommendBatchRequest(RequestBody):
    """Up to 256 requests."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"requests": [{"user_id": "196"}, {"sequence": ["50", "172"], "top_n": 3}]}]}
    )

    requests: Annotated[list[RecommendRequest], Field(min_length=1, max_length=256)]
    """Answered together, in this order."""


class RecommendBatchResponse(TypedDict):
    """Responses in the order of the requests."""

    results: list[RecommendResponse]
