"""Feedback: what recommendations led to, counted by scope and K.

A `recommendation_id` contains everything that is needed to count what it led to: which scopes were used with which K,
when, and a mark of each item in the list. So nothing is stored, and every api process can read the ids of all others.
Ids are authenticated together with the user they were made for: one that is forged, or sent for another user, is
unknown.
"""

from __future__ import annotations

import os
import time
from binascii import Error, a2b_base64, b2a_base64
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from hmac import compare_digest
from itertools import count
from struct import Struct
from zlib import crc32

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from api.http.schemas.memories import Interaction
from api.http.schemas.recommend import MemoryUse

HEAD = Struct("<BBBIQ")
"""Kind, K of own and collective scope (0: not used), time in seconds, a unique number."""
FOR_USER, FOR_NOBODY = 1, 2
"""Kinds. An id that was made for no user in particular is valid for every user."""
MARK_BYTES, MAC_BYTES = 2, 8
LISTED = 80
"""Items whose marks fit into an id of 256 bytes; an item further down the list is not recognised as a hit."""
LIFETIME_S = 7 * 86400
AHEAD_S = 60
"""How far the clock of another api process may be ahead of this one."""
REMEMBERED = 100_000
"""Number of recommendations that are remembered as counted, so that each counts only once."""
K_BOUNDS = (0, 2, 5, 10, 20, 50, 100)
K_LABELS = ("0", "1-2", "3-5", "6-10", "11-20", "21-50", "51-100")
Label = tuple[str, str]
"""Scope, and range of K."""
URL_SAFE, STANDARD = bytes.maketrans(b"+/", b"-_"), bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class Shown:
    """What an id says about its recommendation; `marks` of the items in the list."""

    own_k: int
    collective_k: int
    at: int
    number: int
    marks: bytes

    def holds(self, item_id: str) -> bool:
        """Whether the item was in the list; a false positive has probability 1/65,536 for each item of the list."""
        mark = _mark(item_id)
        return any(self.marks[n : n + MARK_BYTES] == mark for n in range(0, len(self.marks), MARK_BYTES))


class RecommendationIds:
    """Makes and reads recommendation ids. `key`: a secret of all api processes; without it, ids can be forged."""

    def __init__(self, key: str = "") -> None:
        self._mac = blake2b(key=blake2b(key.encode()).digest(), digest_size=MAC_BYTES)
        self._number = count(int.from_bytes(os.urandom(7), "little"))

    def make(self, user_id: str | None, own_k: int, collective_k: int, item_ids: Sequence[str]) -> str:
        """An id for a list of items; `own_k`, `collective_k`: K of each scope, 0 if it was not used."""
        kind = FOR_NOBODY if user_id is None else FOR_USER
        head = HEAD.pack(kind, own_k, collective_k, int(time.time()), next(self._number))
        said = head + b"".join(map(_mark, item_ids[:LISTED]))
        return b2a_base64(said + self._seal(said, user_id), newline=False).translate(URL_SAFE).rstrip(b"=").decode()

    def read(self, recommendation_id: str, user_id: str) -> Shown | None:
        """What an id says; None if it was made for another user, is older than LIFETIME_S or is not authentic."""
        try:
            text = recommendation_id.encode("ascii").translate(STANDARD)
            whole = a2b_base64(text + b"=" * (-len(text) % 4), strict_mode=True)
        except (Error, UnicodeEncodeError):
            return None
        said, seal = whole[:-MAC_BYTES], whole[-MAC_BYTES:]
        if len(said) < HEAD.size or not compare_digest(
            seal, self._seal(said, user_id if said[0] == FOR_USER else None)
        ):
            return None
        _, own_k, collective_k, at, number = HEAD.unpack_from(said)
        if not -AHEAD_S <= time.time() - at <= LIFETIME_S:
            return None
        return Shown(own_k, collective_k, at, number, said[HEAD.size :])

    def _seal(self, said: bytes, user_id: str | None) -> bytes:
        mac = self._mac.copy()
        mac.update(said)
        if user_id is not None:
            mac.update(user_id.encode())
        return mac.digest()


class Feedback:
    """Counts the recommendations of this process, and those that an interaction named or of which an item was taken."""

    def __init__(self, key: str = "") -> None:
        self.ids = RecommendationIds(key)
        self._answers: Counter[Label] = Counter()
        self._clicks: Counter[Label] = Counter()
        self._hits: Counter[Label] = Counter()
        self._interactions = {"hit": 0, "other": 0, "unknown": 0}
        self._counted: OrderedDict[int, bool] = OrderedDict()

    def answered(self, user_id: str | None, memory: MemoryUse, item_ids: Sequence[str]) -> str:
        """Count a recommendation. Returns its id."""
        own, others = memory["own"], memory["collective"]
        own_k = own["k"] if own["retrieved"] else 0
        collective_k = others["k"] if others["retrieved"] else 0
        for label in labels(own_k, collective_k):
            self._answers[label] += 1
        return self.ids.make(user_id, own_k, collective_k, item_ids)

    def taken(self, interactions: Iterable[Interaction]) -> None:
        """Count accepted interactions that name a recommendation."""
        for interaction in interactions:
            if interaction.recommendation_id is None:
                continue
            shown = self.ids.read(interaction.recommendation_id, interaction.user_id)
            if shown is None:
                self._interactions["unknown"] += 1
                continue
            hit = shown.holds(interaction.item_id)
            self._interactions["hit" if hit else "other"] += 1
            self._count(shown, hit)

    def _count(self, shown: Shown, hit: bool) -> None:
        """A recommendation counts once as named and once as hit, however many interactions name it."""
        before = self._counted.pop(shown.number, None)
        for label in labels(shown.own_k, shown.collective_k):
            self._clicks[label] += before is None
            self._hits[label] += hit and not before
        self._counted[shown.number] = hit or bool(before)
        if len(self._counted) > REMEMBERED:
            self._counted.popitem(last=False)

    def collect(self) -> Iterator[Metric]:
        """For a Prometheus registry. Rates are of this process; for several, divide the sums of the counters."""
        outcomes = CounterMetricFamily(
            "ramrec_api_feedback", "Accepted interactions that name a recommendation", labels=["outcome"]
        )
        for outcome, number in self._interactions.items():
            outcomes.add_metric([outcome], number)
        yield outcomes
        for name, about, counts in (
            ("ramrec_api_recommendations", "Recommendations by scope and its K", self._answers),
            ("ramrec_api_clicks", "Recommendations that an interaction named", self._clicks),
            ("ramrec_api_hits", "Recommendations an item of which was taken", self._hits),
        ):
            counter = CounterMetricFamily(name, about, labels=["scope", "k"])
            for label, number in counts.items():
                counter.add_metric(label, number)
            yield counter
        for name, about, counts in (
            ("ramrec_api_click_through", "Clicks of all recommendations", self._clicks),
            ("ramrec_api_hit_rate", "Hits of all recommendations", self._hits),
        ):
            rate = GaugeMetricFamily(name, about, labels=["scope", "k"])
            for label, number in self._answers.items():
                rate.add_metric(label, counts[label] / number)
            yield rate


@lru_cache(K_BOUNDS[-1] ** 2)
def labels(own_k: int, collective_k: int) -> tuple[Label, ...]:
    """The labels that a recommendation counts under: ("any", "any"), and each scope used with its range of K."""
    used = [(scope, _range(k)) for scope, k in (("own", own_k), ("collective", collective_k)) if k]
    return ("any", "any"), *(used or [("none", "0")])


def _range(k: int) -> str:
    return K_LABELS[min(bisect_left(K_BOUNDS, k), len(K_LABELS) - 1)]


@lru_cache(65536)
def _mark(item_id: str) -> bytes:
    """Two bytes that stand for an item, the same in every process."""
    return (crc32(item_id.encode()) & 0xFFFF).to_bytes(MARK_BYTES, "little")
