"""All that is known about a user, for people to look at: the reply to `GET /v1/user`."""

from __future__ import annotations

import msgspec


class QualityParts(msgspec.Struct):
    """What each term contributes to a quality."""

    frequency: float
    recency: float
    access: float
    rating: float


class EntryOut(msgspec.Struct):
    """One memory of a bank.

    `mean_gap_s`: mean time between its events; None: there was one, or the log has no times. `occasions_since`: number
    of the user's later occasions. `usual_hour` (0 to 24, UTC) and `usual_day` (0 to 7 from Monday, 0:00 UTC): when it
    is taken, if that is regular. `place`: see `UserMemory`.
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
    the quality that it would have today, unrated and never retrieved.
    """

    item: int
    time: float
    frequency: int
    quality: float
    parts: QualityParts


class HowMany(msgspec.Struct):
    """How K follows from the entropy: base · (0.5 + entropy) · growth, rounded, within k_min and k_max, and for a
    user's own memories at most their number. `growth` is 1 for memories of other users.
    """

    base: float
    growth: float
    k_min: int
    k_max: int
    k: int


class UserMemory(msgspec.Struct):
    """All that is known about a user.

    `clusters`: item cluster → its share, weighted by quality; the entropy is that of these shares. `log`: (item, time).
    `place` of the entries and `standing`, the place of the user's state, lie in the plane that keeps most of the
    variance of all keys. `threshold`: entries of a lower quality are pruned when the bank is over-full; None: quality
    does not decide. `gone`: newest first.
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
