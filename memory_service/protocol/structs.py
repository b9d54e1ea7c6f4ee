"""The wire between api and memory service: msgpack bodies, vectors and number columns as little-endian bytes.

Every call names the model version it was made with; the service answers 409 `model_mismatch` to one that is not loaded,
and to a plan or rekey for another than the wanted one.
Items travel as catalogue numbers; `catalogue_size` in a reply tells the caller when to fetch new ones.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.memory.bank import Entries
from model.memory.events import EncodeJob

CONTENT_TYPE = "application/msgpack"


class Job(msgspec.Struct):
    """`model.memory.events.EncodeJob`: items as u4, positions as i8."""

    start: int
    items: bytes
    positions: bytes

    @classmethod
    def pack(cls, job: EncodeJob) -> Job:
        """Columns to bytes."""
        return cls(job.start, job.items.astype("<u4").tobytes(), job.positions.astype("<i8").tobytes())

    def unpack(self) -> EncodeJob:
        """Bytes to columns."""
        return EncodeJob(self.start, np.frombuffer(self.items, "<u4"), np.frombuffer(self.positions, "<i8"))


class Columns(msgspec.Struct):
    """`bank.Entries` without its padding: count (B,) i4, then the entries of all queries one after another."""

    count: bytes
    item: bytes
    similarity: bytes
    quality: bytes
    recency: bytes
    rating: bytes

    @classmethod
    def pack(cls, entries: Entries) -> Columns:
        """Padded arrays to ragged bytes."""
        valid = entries.valid
        reals = [getattr(entries, name)[valid].astype("<f4").tobytes() for name in cls.__struct_fields__[2:]]
        return cls(valid.sum(axis=1).astype("<i4").tobytes(), entries.item[valid].astype("<u4").tobytes(), *reals)

    def unpack(self) -> Entries:
        """Ragged bytes to padded arrays."""
        count = np.frombuffer(self.count, "<i4")
        valid = np.arange(int(count.max(initial=0))) < count[:, None]
        item = np.zeros(valid.shape, np.int64)
        item[valid] = np.frombuffer(self.item, "<u4")

        def padded(values: bytes) -> NDArray[np.float32]:
            column = np.zeros(valid.shape, np.float32)
            column[valid] = np.frombuffer(values, "<f4")
            return column

        return Entries(
            item,
            padded(self.similarity),
            padded(self.quality),
            padded(self.recency),
            padded(self.rating),
            valid,
        )


class RetrieveRequest(msgspec.Struct):
    """A micro-batch of B users.

    `query_rows` (u4) name the users whose query comes along in `queries` (f4, one row each, unit length), with the item
    numbers that it was made of last in `last` (u4, `collective.LAST` each, the newest first, 0 = none; where that
    is none at all, those of the user's record); the others are asked with what is in their record.
    `k` (i4, B): 0 = adaptive. `ignore`: row → numbers of items that the user
    is taken not to have had. `uncounted`: rows whose retrievals do not count as accesses (where something was ignored
    they never do). `alone`: rows that want no memories of others. `now` (f8, B): the times of the requests in seconds,
    at which a model that looks at habits retrieves by them, too; none: by similarity alone.
    A user "" is nobody: only the query counts. `entropy` (f4, B) is that of users of whom nothing is known.
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
    """A user whose record belongs to another model: encode `job`, send it to `rekey`, ask again."""

    user_id: str
    version: int
    job: Job


class RetrieveReply(msgspec.Struct):
    """Columns of length B: known u1, versions i8, entropy f4, k and collective_k i4, bank_size i4, states f4 (B, d);
    then the entries, the items seen (seen_count i4, seen u4 ragged) and the users to be keyed anew. `degraded`: Redis
    was out of reach and the answer comes from resident banks, or the collective index is still being filled.
    `without`: for rows that ignore some of what the user had, the job that makes the state without it, which is to be
    sent as the row's query; a job without items: nothing is left that a state could be made of.
    `moved`: rows of users whose records are of another model that is loaded too, which this call does not answer: ask
    again for that model.
    Of a model that looks at habits, asked with `now`: `habits`, what the own entries tell (f4,
    `habits.FEATURES` of one after another, in the order of `own`), and the items of each bank that were taken at
    that very time (present_count i4, present u4 ragged); else empty.
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
    """One interaction; `index` is its place in the caller's request. Those of one user and basket happen at once."""

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
    """What would these events mean? `received_at` is the time of events without one."""

    model_version: str
    received_at: float
    users: list[UserEvents]


class UserPlan(msgspec.Struct):
    """Answer for one user: keys are wanted for the accepted events, in the order given, as `job` says.

    `version` must come back with the write. `stale` is set where the record must be keyed anew first.
    """

    user_id: str
    version: int
    accepted: list[int]
    duplicates: list[int]
    forgotten: list[int]
    job: Job
    stale: StaleUser | None = None


class PlanReply(msgspec.Struct):
    """Plans in the order of the request."""

    catalogue_size: int
    users: list[UserPlan]


class UserWrite(msgspec.Struct):
    """Events with keys (f4, one row an accepted event) and the state after them (f4), computed from `version`."""

    user_id: str
    version: int
    events: list[EventIn]
    keys: bytes
    state: bytes


class WriteRequest(msgspec.Struct):
    """Compare-and-set writes, atomic per user."""

    model_version: str
    received_at: float
    users: list[UserWrite]


class UserWritten(msgspec.Struct):
    """`version` is the record's after the write. On a conflict nothing was written; `retry` is the plan as of now."""

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
    """New keys (f4, one row an entry, in bank order) and state (f4) for a stale record of `version`."""

    user_id: str
    version: int
    keys: bytes
    state: bytes


class RekeyRequest(msgspec.Struct):
    """Bring stale records to this model. A record that changed meanwhile is left alone and found stale again."""

    model_version: str
    users: list[UserRekey]


class RekeyReply(msgspec.Struct):
    """Users whose records were written."""

    rekeyed: list[str]


class QualityParts(msgspec.Struct):
    """What each term gives to a quality."""

    frequency: float
    recency: float
    access: float
    rating: float


class EntryOut(msgspec.Struct):
    """One memory of a bank. `mean_gap_s`: the mean time between its events (None: there was one, or a log has no
    times); `occasions_since`: how many times the user did something since; `usual_hour` (0 to 24, UTC) and `usual_day`
    (0 to 7 from Monday, 0:00 UTC): when it happens, where that is regular.
    """

    item: int
    quality: float
    recency: float
    rating: float | None
    time: float
    frequency: int
    access: int
    last_access: float
    cluster: int
    parts: QualityParts | None = None
    place: tuple[float, float] | None = None
    first_time: float = 0.0
    mean_gap_s: float | None = None
    occasions_since: int = 0
    usual_hour: float | None = None
    usual_day: float | None = None


class GoneOut(msgspec.Struct):
    """An item of the log that the bank has pruned: when it was last taken, how often as far as the log reaches, and
    what it would be worth today, unrated and never retrieved, in all and by the parts of the quality.
    """

    item: int
    time: float
    frequency: int
    quality: float
    parts: QualityParts


class HowMany(msgspec.Struct):
    """How K was reached: base · (0.5 + entropy) · growth, rounded, within k_min and k_max, and for a user's own
    memories no more than there are. growth is 1 for others' memories.
    """

    base: float
    growth: float
    k_min: int
    k_max: int
    k: int


class UserMemory(msgspec.Struct):
    """A bank laid open: `clusters` is the quality-weighted distribution that the entropy is of; log is (item, time).
    `place` of the entries and `standing`, that of the user's state, lie in the plane that keeps most of the spread of
    all keys. Entries of a quality below `threshold` go when the bank is over-full (None: quality does not decide).
    `gone`: newest first.
    """

    user_id: str
    version: int
    model_version: str
    events: int
    share: bool
    entropy: float
    k: int
    capacity: int
    pruned: int
    clusters: dict[int, float]
    entries: list[EntryOut]
    log: list[tuple[int, float]]
    seen: int
    catalogue_size: int
    standing: tuple[float, float] | None = None
    threshold: float | None = None
    own: HowMany | None = None
    collective: HowMany | None = None
    gone: list[GoneOut] = []


class Forgotten(msgspec.Struct):
    """Whether anything was known about the user before; `replicas` are the others, by URL, that are to let go, too."""

    existed: bool
    replicas: list[str] = []


class Item(msgspec.Struct):
    """A catalogue item. `metadata` holds the caller's attributes (title, genres, …)."""

    item_id: str
    metadata: dict[str, Any] | None = None
    hidden: bool = False


class CatalogueReply(msgspec.Struct):
    """Items from number `since` on, in order of their numbers (the first item has number 1): as many as one listing
    holds, of `catalogue_size`. `revision` counts changes of metadata and hidden flags; `changed`: items before `since`,
    with their numbers, that changed since the revision asked with; None where that was too long ago to be known.
    """

    since: int
    revision: int
    items: list[Item]
    catalogue_size: int
    changed: list[tuple[int, Item]] | None = []


class RegisterRequest(msgspec.Struct):
    """Make items known. Metadata is set only where an item has none, unless `overwrite`; None leaves it alone. Hidden
    flags are set only where `overwrite` and `flags` are.
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
    """How many of the `want` requests may be answered, of `limit` in this second (Unix time)? `key` names whose."""

    key: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    second: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    limit: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    want: Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class QuotaReply(msgspec.Struct):
    """They count as used."""

    granted: int


class Users(msgspec.Struct):
    """User ids that begin with the prefix asked for, sorted; where there are more than the limit, some of them."""

    users: list[str]


class ModelReply(msgspec.Struct):
    """Which model serves in this process and which one it writes records for, with the folders that they were
    read from. `moved` of about `users` are in the wanted model's collective index already.
    """

    serving: str
    wanted: str
    serving_run: str
    wanted_run: str
    users: int
    moved: int
    trouble: str = ""


class ModelRequest(msgspec.Struct):
    """Want the model `version` from folder `run`; with `cut_over`: the wanted model `version` is to serve."""

    version: str
    run: str = ""
    cut_over: bool = False


class StalePage(msgspec.Struct):
    """A step through all users: `cursor` goes on (0: all were named), `looked_at` users, and those of other models."""

    cursor: int
    looked_at: int
    catalogue_size: int
    users: list[StaleUser]


class ReplicasReply(msgspec.Struct):
    """The replicas that are there, by URL, and whether everything is loaded at each; `me` answers."""

    me: str
    replicas: dict[str, bool]


class UserPage(msgspec.Struct):
    """A step through users: `cursor` goes on (0: all were named); one may be named at several steps."""

    cursor: int
    users: list[str]


class Problem(msgspec.Struct):
    """Any error of the service: a stable code and what is wrong."""

    code: str
    detail: str
