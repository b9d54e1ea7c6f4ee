"""The REST faces: what callers send and get. Unknown fields and anything outside the bounds: 422.

The answer to `POST /recommend` is a plain dict: thousands a second are made, and nothing needs to be validated.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal, NotRequired

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, with_config
from typing_extensions import TypedDict

ID_LIMIT_BYTES = 256
METADATA_LIMIT_BYTES = 65536
ITEMS_LIMIT = 200
"""Items that one look-up names."""
METADATA_DEPTH = 16
RATING_LIMIT = 1e9
"""Largest size of a rating: far inside what a memory entry (32 bits) can hold."""
MILLISECONDS = 1e11
"""Timestamps from here on are taken for milliseconds (in seconds it is the year 5138)."""
FUTURE_S = 86400.0
"""How far ahead of the clock here a timestamp may be."""


def _identifier(value: str) -> str:
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError("not valid Unicode") from error
    if not 1 <= size <= ID_LIMIT_BYTES:
        raise ValueError(f"an id has 1 to {ID_LIMIT_BYTES} bytes, this one {size}")
    if "\0" in value:
        raise ValueError("an id holds no NUL")
    return value


def checked_metadata(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what the wire or Redis cannot carry: it would be found out only after it was stored."""
    try:
        size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
        msgspec.msgpack.encode(value)
    except (OverflowError, RecursionError, ValueError) as error:
        raise ValueError("metadata holds finite numbers of 64 bits and valid Unicode, not too deeply nested") from error
    if size > METADATA_LIMIT_BYTES or _depth(value) > METADATA_DEPTH:
        raise ValueError(f"metadata has at most {METADATA_LIMIT_BYTES} bytes and {METADATA_DEPTH} levels")
    return value


def _depth(value: Any) -> int:
    """Levels of objects and lists."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def refused_time(stamp: float, now: float) -> tuple[str, str] | None:
    """Why a timestamp is none: a stable code, and what is wrong with it; None where it is one. In seconds."""
    if stamp < 0:
        return "timestamp_negative", f"{stamp} lies before 1970"
    if stamp >= MILLISECONDS:
        return "timestamp_in_milliseconds", f"{stamp} is no time in seconds"
    if stamp > now + FUTURE_S:
        return "timestamp_in_future", f"{stamp} is more than a day ahead"
    return None


def _moment(value: float) -> float:
    refusal = refused_time(value, time.time())
    if refusal is not None:
        raise ValueError(refusal[1])
    return value


ID_SCHEMA = {"type": "string", "minLength": 1, "maxLength": ID_LIMIT_BYTES, "pattern": r"^[^\x00]*$"}
Identifier = Annotated[str, AfterValidator(_identifier), WithJsonSchema(ID_SCHEMA)]
Metadata = Annotated[dict[str, Any], AfterValidator(checked_metadata)]
Moment = Annotated[
    float,
    AfterValidator(_moment),
    WithJsonSchema({"type": "number", "minimum": 0, "exclusiveMaximum": MILLISECONDS}),
]
"""A time, seconds UTC."""
Scope = Literal["own", "collective"]


Number = Annotated[int, Field(ge=-(2**63), lt=2**64)] | float
"""What metadata can hold."""
Text = Annotated[str, Field(max_length=1024)]
Operand = bool | Number | Text
Operands = Annotated[list[Operand], Field(min_length=1, max_length=1000)]
Bound = Number | Text


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Condition(TypedDict, total=False):
    """What an attribute of an item has to be; all that is named must hold. A list stands for its elements: `eq` and
    `any` want one of them to be the value or among the values, `all` wants every value, `ne` and `none` want none; one
    element must lie inside all of `gt`, `gte`, `lt`, `lte` (numbers, or texts by code point). An item without the
    attribute (or with null) fulfils only `ne`, `none` and `exists: false`. Truth values, numbers and texts never equal
    each other.
    """

    eq: Operand
    ne: Operand
    any: Operands
    all: Operands
    none: Operands
    gt: Bound
    gte: Bound
    lt: Bound
    lte: Bound
    exists: bool


def _operators(value: Any) -> Any:
    """Refuse unknown operators with a list of those there are."""
    known = Condition.__annotations__
    if isinstance(value, dict) and (unknown := [str(name) for name in value if name not in known]):
        raise ValueError(f"{unknown[0][:50]!r} is no operator; there are {', '.join(known)}")
    return value


def _condition(value: Condition) -> Condition:
    if not value:
        raise ValueError(f"a condition names at least one of {', '.join(Condition.__annotations__)}")
    bounds: list[Any] = [bound for name, bound in value.items() if name in ("gt", "gte", "lt", "lte")]
    if len({isinstance(bound, str) for bound in bounds}) > 1:
        raise ValueError("bounds are all numbers or all texts")
    return value


Filter = Annotated[
    dict[Identifier, Annotated[Condition, BeforeValidator(_operators), AfterValidator(_condition)]],
    Field(max_length=16, examples=[{"genres": {"any": ["Comedy"]}, "year": {"gte": 1990}}]),
]
"""Attribute of the item metadata → condition."""


class _Face(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class RecommendRequest(_Face):
    """Whom to recommend to: a user, a sequence of items (oldest first), both, or nobody in particular. Only items are
    recommended that are among the `candidates` and pass the `filter` on their metadata, where these are given.
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
    """Whose memories answer."""
    sequence: Annotated[list[Identifier], Field(max_length=1000)] | None = None
    """Items that count as the newest, oldest first; those that the model does not know are listed in the answer."""
    top_n: Annotated[int, Field(ge=1, le=1000)] = 10
    """The most items in the answer."""
    timestamp: Moment | None = None
    """When it is asked for, seconds UTC; absent: the time of receipt, one for all requests of a batch. Where people
    come back to things, the model looks at how long ago they took each, and at the hour and the day of the week.
    """
    exclude_seen: bool | None = None
    """Leave out what the user, or the sequence, had already. Absent: as the model that answers has learned, whether the
    people of its data come back to things (`rules.exclude_seen` of `GET /model`).
    """
    exclude_items: Annotated[list[Identifier], Field(max_length=10_000)] | None = None
    """Left out, too."""
    candidates: Annotated[list[Identifier], Field(max_length=10_000)] | None = None
    """The only items that may be recommended."""
    filter: Filter | None = None
    """Conditions on the metadata of what may be recommended."""
    k: Annotated[int, Field(ge=1, le=100)] | None = None
    """Memories of the user to retrieve; absent: as the user's entropy says."""
    scopes: Annotated[list[Scope], Field(max_length=2)] | None = None
    """Whose memories are used: the user's own, those of all others (collective); absent: both."""
    ignore_memories: (
        Annotated[
            list[Identifier],
            Field(
                max_length=1000,
                description="Answer as if the user had not taken these items: bank, entropy, K, state and repeat bias "
                "are those without them. `exclude_seen` still counts them as seen, and a `sequence` that is sent stays "
                "as it is.",
            ),
        ]
        | None
    ) = None
    explain: bool = False
    """Say which memories speak for each item."""


class Habit(TypedDict):
    """What an own memory tells about coming back at the time of the request, as the model sees it: how often its item
    was taken, how long ago the last time, after how long on average (null: it was taken once), and whether it is
    usually taken at this hour of the day, and on this day of the week. `since_s` grows no further once the user has
    been away for longer than (nearly) anybody in the data (`rules.longest_gap_s`); it is null where the data has no
    times. `logit`: what the memory adds for this to the logit of its own item, and of no other.
    """

    count: int
    since_s: float | None
    mean_gap_s: float | None
    at_this_hour: bool
    on_this_day: bool
    logit: float


class Because(TypedDict):
    """A memory that speaks for an item: its attention weight, its exact part in the item's logit, and the exact share
    of the item's probability that is copied from it. Own memories have a `habit` where the model looks at habits; at
    the memory's own item, `logit` contains the habit's. Whose a collective memory is, is not said, and none is used
    whose item fewer than two others hold (`RAMREC_MEMORY_COLLECTIVE_USERS`).
    """

    item_id: str
    scope: Scope
    similarity: float
    weight: float
    habit: NotRequired[Habit]
    logit: float
    copied: float


class Parts(TypedDict):
    """Where an item's probability p = exp(score) comes from, exactly: p·(1 − copied) = (1 − memory.copying) ·
    exp(state + calibration + memories − memory.log_z). `state` is the user's state alone, `calibration` repeat bias and
    shift, `memories` the sum over all memories with their habits, of which `because` names three; `copied` the share of
    p that is copied from others. The three logits are null for an item that the model does not know: that is copied
    only.
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
    """A memory that was retrieved, and its share of the attention; an own one with its `habit`, where the model looks
    at habits.
    """

    item_id: str
    scope: Scope
    similarity: float
    weight: float
    habit: NotRequired[Habit]


class ScopeUse(TypedDict):
    """Memories wanted and found in one scope."""

    k: int
    retrieved: int


class MemoryUse(TypedDict):
    """What memory contributed; `degraded` says that it could not be asked, or only partly. When explained: `gate` is
    the share of memory in the fused state, `copying` that of copies in all probability, `log_z` the logarithm of the
    sum over all items that turns logits into probabilities, `memories` all that were retrieved, of each scope the most
    similar first; own ones the most active, where the model has learned which memories people come back to.
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
    """The top-N and how it came about."""

    recommendation_id: str
    user_id: str | None
    source: Literal["memory", "encoder", "popularity"]
    items: list[Recommended]
    memory: MemoryUse
    unknown_items: list[str]
    model_version: str


class RecommendBatchRequest(_Face):
    """Up to 256 requests."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"requests": [{"user_id": "196"}, {"sequence": ["50", "172"], "top_n": 3}]}]}
    )

    requests: Annotated[list[RecommendRequest], Field(min_length=1, max_length=256)]
    """Answered together, in this order."""


class RecommendBatchResponse(TypedDict):
    """Answers in the order of the requests."""

    results: list[RecommendResponse]


class Interaction(_Face):
    """Who took what, when (seconds UTC; absent: now). `event_id` makes retries harmless; `basket_id` says what was
    taken together; `recommendation_id` names the answer that led to it, for hit rate and click-through in `/metrics`.
    """

    user_id: Identifier
    """Who took it."""
    item_id: Identifier
    """What was taken; an item nobody has heard of is registered."""
    timestamp: float | None = None
    """Seconds UTC; absent: the time of receipt."""
    rating: Annotated[float, Field(ge=-RATING_LIMIT, le=RATING_LIMIT)] | None = None
    """What the user made of it, on the scale that the model was trained with."""
    event_id: Identifier | None = None
    """The same id again is a duplicate, whatever else it says."""
    basket_id: Identifier | None = None
    """Interactions of one user and basket happen at once, at the time of the first of them, also where they come in
    several calls, as long as nothing newer came in between. An item counts once in a basket: again, it is a duplicate.
    """
    recommendation_id: Identifier | None = None
    """The answer that led to it: it counts as a click in the metrics."""


class IngestRequest(_Face):
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
    """An interaction that was not kept, and why."""

    index: int
    code: str
    detail: str


class IngestResponse(BaseModel):
    """What became of the interactions, and each written user's version."""

    accepted: int
    duplicates: int
    rejected: list[Rejected]
    versions: dict[str, int]


class QualityParts(BaseModel):
    """What each of the four terms gives to a quality: they sum to it."""

    frequency: float
    recency: float
    access: float
    rating: float


class MemoryEntry(BaseModel):
    """One memory: quality and recency in [0, 1], time in seconds UTC, how often taken and retrieved. `position`: where
    its key lies in the plane in which the keys of this model spread most; memories near each other were made in like
    situations.
    Its habit: since when it has been taken (`first_time`), after how long on average (`mean_gap_s`; null: once), how
    many times the user did something since (`occasions_since`; all that has one timestamp is one occasion), and when it
    is usually taken, if at any regular time: `usual_hour` (0 to 24, UTC) of the day, `usual_day` (0 to 7, from Monday
    0:00 UTC, in days) of the week.
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
    """An item of the log that the bank has forgotten: when it was last taken, how often as far as the log reaches, and
    what it would be worth today if it had not been: unrated and never retrieved, for rating and access are forgotten.
    """

    item_id: str
    timestamp: float
    frequency: int
    quality: float
    quality_parts: QualityParts


class HowMany(BaseModel):
    """How K was reached: base · (0.5 + entropy) · growth, rounded, within k_min and k_max, and of a user's own memories
    no more than there are. `growth`: the square root of how full the bank is; 1 for others' memories.
    """

    base: float
    growth: float
    k_min: int
    k_max: int
    k: int


class AdaptiveK(BaseModel):
    """How many memories are retrieved, the user's own and others'."""

    own: HowMany
    collective: HowMany


class LogEntry(BaseModel):
    """One of the newest 512 interactions."""

    item_id: str
    timestamp: float


class UserMemoryResponse(BaseModel):
    """A user's bank: `clusters` is the distribution over item clusters whose entropy decides K. When the bank is
    over-full, memories of a quality below `threshold` go, the lowest in any case. `pruned_items` are those of the log
    that have gone, the newest first. `position`: where the user stands now, in the plane of the entries' positions.
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
    """Whether anything was known before; nothing is now."""

    user_id: str
    existed: bool


class UsersResponse(BaseModel):
    """User ids."""

    users: list[str]


class ItemOut(BaseModel):
    """A catalogue item; `title`: what its metadata calls it, else its id; `known_to_model`: whether the encoder was
    trained with it; `cluster`: the item cluster that counts for a user's entropy (null: unknown to the model).
    """

    item_id: str
    title: str
    metadata: dict[str, Any]
    hidden: bool
    known_to_model: bool
    cluster: int | None


class ItemsResponse(BaseModel):
    """Items found."""

    items: list[ItemOut]


class ItemPut(_Face):
    """All there is to say about an item."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"metadata": {"title": "Alien", "year": 1979}}]})

    metadata: Metadata = {}
    """Attributes to filter by and to show."""
    hidden: bool = False
    """Never recommended."""


class ItemPatch(_Face):
    """What to change about an item."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"hidden": True}]})

    metadata: Metadata | None = None
    """Attributes to set; those not named stay."""
    hidden: bool | None = None
    """Whether it is never recommended; absent: as it is."""


class FieldError(BaseModel):
    """What is wrong with one field of a request."""

    field: str
    message: str


class Problem(BaseModel):
    """An error (RFC 9457): `code` is stable, `detail` is for people; `request_id` stands in the log too. `errors`: the
    fields of an invalid request; `committed`: users whose interactions were kept nevertheless.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str = ""
    errors: list[FieldError] = []
    committed: list[str] = []


class Moving(BaseModel):
    """A model is to take over: `moved` of about `users` are in its collective index already."""

    wanted: str
    users: int
    moved: int


class Ready(BaseModel):
    """Recommendations with memory can be given; `memory_s` is what the question took."""

    status: Literal["ready"]
    model_version: str
    memory_s: float
    moving: Moving | None = None


class Unready(BaseModel):
    """Why recommendations with memory cannot be given."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "memory service: no answer in time"}]})

    status: str


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"]


class ReloadRequest(_Face):
    """Folder of the checkpoint, as all processes see it; none: each process's configured one, read anew."""

    run: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """The folder."""


class ReloadResponse(BaseModel):
    """Which model serves and which is wanted; `moved` of about `users` belong to the wanted one's collective index."""

    serving: str
    wanted: str
    state: Literal["serving", "moving"]
    users: int
    moved: int


class ModelResponse(BaseModel):
    """The checkpoint that answers, and the one that is wanted (the same, unless another is to take over)."""

    model_version: str
    wanted: str
    items: int
    scopes: list[Scope]
    config: dict[str, Any]
