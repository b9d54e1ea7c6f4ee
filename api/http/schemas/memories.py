"""Bodies about users: `POST /memories`, `GET` and `DELETE /users/{user_id}/memory`, `GET /users`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from api.http.schemas.fields import Identifier, RequestBody
from memory_service.protocol.bounds import RATING_LIMIT


class Interaction(RequestBody):
    """A user took an item. `event_id` makes retries harmless; `basket_id` groups items that were taken together;
    `recommendation_id` names the response that led to it, for hit rate and click-through in `/metrics`.
    """

    user_id: Identifier
    """Who took the item."""
    item_id: Identifier
    """The item; one that is not in the catalogue is added to it."""
    timestamp: float | None = None
    """When, in seconds UTC; absent: the time at which the request arrives."""
    rating: Annotated[float, Field(ge=-RATING_LIMIT, le=RATING_LIMIT)] | None = None
    """The user's rating, on the scale that the model was trained with."""
    event_id: Identifier | None = None
    """A second interaction of the user with the same id is a duplicate, whatever else differs."""
    basket_id: Identifier | None = None
    """Interactions of one user and basket happen at once, at the time of the first of them, even if they arrive in
    several requests, as long as nothing newer arrived in between. An item counts once per basket: a second time, it is
    a duplicate.
    """
    recommendation_id: Identifier | None = None
    """The response that led to it; it counts as a click in the metrics."""


class IngestRequest(RequestBody):
    """1 to 1000 interactions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"interactions": [{"user_id": "me", "item_id": "50", "rating": 5}]},
                {"interactions": [{"user_id": "me", "item_id": item, "basket_id": "b-17"} for item in ("50", "172")]},
            ]
        }
    )

    interactions: Annotated[list[Interaction], Field(min_length=1, max_length=1000)]
    """In any order; each user's are sorted by time."""


class Rejected(BaseModel):
    """An interaction that was not stored, and why; `index` is its position in the request."""

    index: int
    code: str
    detail: str


class IngestResponse(BaseModel):
    """What became of the interactions, and the version of each user who was written."""

    accepted: int
    duplicates: int
    rejected: list[Rejected]
    versions: dict[str, int]


class QualityParts(BaseModel):
    """The four terms of a quality, which is their sum."""

    frequency: float
    recency: float
    access: float
    rating: float


class MemoryEntry(BaseModel):
    """One memory: quality and recency in [0, 1], times in seconds UTC, how often it was taken (`frequency`) and
    retrieved (`access`). `position`: where its key lies in the plane in which the keys of this model vary most;
    memories near each other were made in similar situations.
    Its habit: when it was first taken (`first_time`), after how long on average it was taken again (`mean_gap_s`; null:
    taken once), how many occasions the user had since (`occasions_since`; interactions with one timestamp are one
    occasion), and at which regular time it is taken, if any: `usual_hour` (0 to 24, UTC) of the day, `usual_day` (0 to
    7, in days from Monday 0:00 UTC) of the week.
    """

    item_id: str
    quality: float
    recency: float
    rating: float | None
    timestamp: float
    frequency: int
    access: int
    last_access: float | None
    cluster: int | None
    quality_parts: QualityParts | None
    position: tuple[float, float] | None
    first_time: float
    mean_gap_s: float | None
    occasions_since: int
    usual_hour: float | None
    usual_day: float | None


class PrunedItem(BaseModel):
    """An item of the log that is no longer in the bank: when it was last taken, how often within the log, and the
    quality that it would have today. Ratings and retrievals are lost, so that quality counts it as unrated and never
    retrieved.
    """

    item_id: str
    timestamp: float
    frequency: int
    quality: float
    quality_parts: QualityParts


class HowMany(BaseModel):
    """How K was computed: base · (0.5 + entropy) · growth, rounded, between k_min and k_max, and for own memories at
    most as many as there are. `growth`: the square root of how full the bank is; 1 for the collective scope.
    """

    base: float
    growth: float
    k_min: int
    k_max: int
    k: int


class AdaptiveK(BaseModel):
    """How many memories are retrieved in each scope."""

    own: HowMany
    collective: HowMany


class LogEntry(BaseModel):
    """One of the newest 512 interactions."""

    item_id: str
    timestamp: float


class UserMemoryResponse(BaseModel):
    """A user's bank. `clusters`: the distribution over item clusters whose entropy decides K. `threshold`: a bank that
    is over-full drops the memories of a lower quality, and in any case the lowest. `pruned_items`: items of the log
    that were dropped, newest first. `position`: where the user's state lies in the plane of the entries' positions.
    """

    user_id: str
    version: int
    model_version: str
    events: int
    bank_size: int
    capacity: int
    pruned: int
    seen: int
    share: bool
    entropy: float
    k: int
    clusters: dict[str, float]
    entries: list[MemoryEntry]
    log: list[LogEntry]
    position: tuple[float, float] | None
    threshold: float | None
    adaptive_k: AdaptiveK | None
    pruned_items: list[PrunedItem]


class ForgetResponse(BaseModel):
    """The user is forgotten; `existed`: whether anything was known before."""

    user_id: str
    existed: bool


class UsersResponse(BaseModel):
    """User ids."""

    users: list[str]
