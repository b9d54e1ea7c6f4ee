"""The messages between api and memory service: msgpack bodies, in which vectors and columns of numbers are
little-endian bytes.

A call names the model version that it was made with. The service answers 409 `model_mismatch` if that model is not
loaded, and to a plan or rekey also if it is not the wanted model. Items are named by catalogue numbers; a caller that
sees a larger `catalogue_size` in a reply than it knows fetches the new items.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from memory_service.protocol.columns import Columns, Job

CONTENT_TYPE = "application/msgpack"


class RetrieveRequest(msgspec.Struct):
    """A question about B users (`memory_service.protocol.question`); the user "" is nobody, so that only the query
    counts.

    `query_rows` (u4): rows of the users whose query is sent along; the others are searched with their record's state.
    `queries` (f4): these queries, one row each, of unit length. `last` (u4, `collective.LAST` per query, newest first,
    0 = none): the items that each query was made of last; a row of zeros: those of the user's record. `k` (i4, B): 0 =
    adaptive. `ignore`: row → items that the user is treated as never having taken. `uncounted`: rows whose retrievals
    do not count as accesses; rows that ignore items never count. `alone`: rows that want no memories of other users.
    `entropy` (f4, B): used for users without memories. `now` (f8, B): time of each request in seconds, for models that
    retrieve by habits; empty: by similarity alone.
    """

    model_version: str
    users: list[str]
    query_rows: bytes = b""
    queries: bytes = b""
    last: bytes = b""
    k: bytes = b""
    ignore: dict[int, list[int]] = {}
    uncounted: list[int] = []
    alone: list[int] = []
    entropy: bytes = b""
    now: bytes = b""


class StaleUser(msgspec.Struct):
    """A user whose record belongs to another model. The caller encodes `job`, sends the result to `rekey` and asks
    again.
    """

    user_id: str
    version: int
    job: Job


class RetrieveReply(msgspec.Struct):
    """The answer about B users (`memory_service.protocol.answer`).

    Columns of length B: `known` u1, `versions` i8, `entropy` f4, `k`, `collective_k` and `bank_size` i4, `states` f4
    (B, d). `own` and `collective`: the memories found. `seen_count` i4 and `seen` u4: all items ever taken, user after
    user. `stale`: users to be rekeyed before they can be asked about. `degraded`: Redis is out of reach and the answer
    comes from resident banks, or the collective index is still being filled.
    `without`: for rows that ignore items the user had taken, the job that encodes the state without them, to be sent as
    the row's query; a job without items: nothing is left to encode. `moved`: rows whose records belong to another
    loaded model, which must be asked instead.
    For a model that retrieves by habits, asked with `now`: `habits` (f4, `habits.FEATURES` per own entry, in the order
    of `own`), and the items that each user took at that very time (`present_count` i4, `present` u4); otherwise empty.
    """

    catalogue_size: int
    degraded: bool
    known: bytes
    versions: bytes
    entropy: bytes
    k: bytes
    collective_k: bytes
    bank_size: bytes
    states: bytes
    own: Columns
    collective: Columns
    seen_count: bytes
    seen: bytes
    stale: list[StaleUser]
    without: dict[int, Job] = {}
    moved: dict[int, str] = {}
    habits: bytes = b""
    present_count: bytes = b""
    present: bytes = b""


class EventIn(msgspec.Struct):
    """One interaction; `index` is its place in the caller's request. Events of a user with the same basket happen at
    the same time.
    """

    index: int
    item_id: str
    timestamp: float | None = None
    rating: float | None = None
    event_id: str | None = None
    basket_id: str | None = None


class UserEvents(msgspec.Struct):
    """Events of one user."""

    user_id: str
    events: list[EventIn]


class PlanRequest(msgspec.Struct):
    """Asks what events would mean. `received_at`: time of events that have none, in seconds."""

    model_version: str
    received_at: float
    users: list[UserEvents]


class UserPlan(msgspec.Struct):
    """What one user's events mean: the indices of those that are new, known already, or older than a forget.

    `job`: the states that the keys of the accepted events are made from, in the order of `accepted`. `version`: of the
    record; it must be sent with the write. `stale`: set if the record must be rekeyed first. `token`: names this plan;
    a write that sends it need not be planned again.
    """

    user_id: str
    version: int
    accepted: list[int]
    duplicates: list[int]
    forgotten: list[int]
    job: Job
    stale: StaleUser | None = None
    token: str = ""


class PlanReply(msgspec.Struct):
    """Plans in the order of the request."""

    catalogue_size: int
    users: list[UserPlan]


class UserWrite(msgspec.Struct):
    """Planned events of one user, with keys (f4, one row per accepted event) and the state after them (f4), computed
    from the record of `version`. `token`: that of the plan; empty: the events are planned again.
    """

    user_id: str
    version: int
    events: list[EventIn]
    keys: bytes
    state: bytes
    token: str = ""


class WriteRequest(msgspec.Struct):
    """Writes planned events, atomically per user, if the records have not changed since the plan."""

    model_version: str
    received_at: float
    users: list[UserWrite]


class UserWritten(msgspec.Struct):
    """The outcome for one user. `version`: of the record after the write. `retry`: the current plan, if the record had
    changed; nothing was written then.
    """

    user_id: str
    version: int
    accepted: list[int]
    duplicates: list[int]
    forgotten: list[int]
    retry: UserPlan | None = None


class WriteReply(msgspec.Struct):
    """Outcomes in the order of the request."""

    catalogue_size: int
    users: list[UserWritten]


class UserRekey(msgspec.Struct):
    """New keys (f4, one row per entry, in bank order) and state (f4) for a stale record of `version`."""

    user_id: str
    version: int
    keys: bytes
    state: bytes


class RekeyRequest(msgspec.Struct):
    """Moves stale records to this model. A record that changed meanwhile is left alone, and found stale again."""

    model_version: str
    users: list[UserRekey]


class RekeyReply(msgspec.Struct):
    """Users whose records were written."""

    rekeyed: list[str]


class Forgotten(msgspec.Struct):
    """`existed`: whether anything was known about the user. `replicas`: URLs of the other memory replicas, which must
    drop the user from memory, too.
    """

    existed: bool
    replicas: list[str] = []


class Item(msgspec.Struct):
    """A catalogue item. `metadata`: the caller's attributes (title, genres, …)."""

    item_id: str
    metadata: dict[str, Any] | None = None
    hidden: bool = False


class CatalogueReply(msgspec.Struct):
    """Items from number `since` on, in order of their numbers (the first item has number 1), as many as one listing
    holds, of `catalogue_size`. `revision`: counts changes of metadata and hidden flags. `changed`: items before
    `since`, with their numbers, that changed after the revision in the request; None: that revision is too old.
    """

    since: int
    revision: int
    items: list[Item]
    catalogue_size: int
    changed: list[tuple[int, Item]] | None = []


class RegisterRequest(msgspec.Struct):
    """Registers items. Metadata is set if an item has none, or with `overwrite`; None leaves it as it is. Hidden flags
    are set with `overwrite` and `flags`.
    """

    items: list[Item]
    overwrite: bool = False
    flags: bool = True


class RegisterReply(msgspec.Struct):
    """Catalogue numbers, in the order of the request."""

    numbers: list[int]
    catalogue_size: int
    revision: int


class QuotaRequest(msgspec.Struct):
    """Asks how many of the `want` requests of an API key may be answered, where `limit` may be in this second (Unix
    time). `key`: identifies the API key.
    """

    key: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    second: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    limit: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    want: Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class QuotaReply(msgspec.Struct):
    """`granted`: requests that may be answered; they count as used."""

    granted: int


class Users(msgspec.Struct):
    """User ids that begin with the prefix, sorted; any of them if there are more than the limit."""

    users: list[str]


class ModelReply(msgspec.Struct):
    """The model that serves in this process and the one that it writes records for, with the folders that they were
    read from. `moved` of about `users` users are in the collective index of the wanted model. `trouble`: why the model
    that Redis names cannot be loaded.
    """

    serving: str
    wanted: str
    serving_run: str
    wanted_run: str
    users: int
    moved: int
    trouble: str = ""


class ModelRequest(msgspec.Struct):
    """Makes model `version` from folder `run` the wanted one; with `cut_over`: lets that wanted model serve."""

    version: str
    run: str = ""
    cut_over: bool = False


class StalePage(msgspec.Struct):
    """A page of users whose records belong to other models, out of `looked_at` users. `cursor`: of the next page; 0:
    this was the last.
    """

    cursor: int
    looked_at: int
    catalogue_size: int
    users: list[StaleUser]


class ReplicasReply(msgspec.Struct):
    """The memory replicas that are present, by URL, and whether each has loaded everything. `me`: the one that
    answers.
    """

    me: str
    replicas: dict[str, bool]


class UserPage(msgspec.Struct):
    """A page of users. `cursor`: of the next page; 0: this was the last. A user may be on several pages."""

    cursor: int
    users: list[str]


class Problem(msgspec.Struct):
    """An error of the service: a stable code and what was wrong."""

    code: str
    detail: str
