"""A group of memory replicas over one Redis: each owns the users of some slots, and together they are one memory.

Who owns what stands in Redis (`memory_service.slots.Table`), changed by compare-and-set by whoever sees that it should
be: a replica joins, leaves, or has not been heard of. Any replica answers for any user, with the version checked in
Redis; the owner has the bank at hand, and it alone holds the user's memories for others. So others' memories are asked
of every replica, each of its own ranges.

How many users hold an item is counted over all replicas: each tells the others, through Redis, how many it counts, up
to what matters. While a range changes hands nobody counts it: too few is safe, too many would give away an item that
only one other holds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from memory_service.ending import end
from memory_service.link import StoreUnavailable
from memory_service.schemas import GroupReply
from memory_service.slots import RANGES, Part, Table, Written, departing, pack, read, revised
from memory_service.space import Space
from memory_service.store import Store
from model.rules import Bools

TICK_S = 0.4
SETTLE_S = 4 * TICK_S
"""From when an heir is named to when it takes over at the earliest: the owner has stopped counting, and all know."""
GRACE_S = 5.0
"""How long a replica goes on searching what it lost: callers may not have heard of it yet."""
LINGER_S = 3.0
"""How long a replica that owns nothing any more stays, for callers who have not heard of it."""
RETOLD_S = 60.0
"""After this all counts are told anew."""
LONGEST = 200
"""Changes of counts after which all are told anew."""
log = logging.getLogger(__name__)


class Group:
    """This replica, reached at `me`, in the group. Who is silent for `patience_s` is taken for gone.

    load: reads the memories of ranges (RANGES,) into the collective scope. spaces: those of the loaded models.
    """

    def __init__(
        self,
        store: Store,
        me: str,
        part: Part,
        patience_s: float,
        spaces: Callable[[], Mapping[str, Space]],
        load: Callable[[Bools], Awaitable[None]],
    ) -> None:
        self.me, self.part, self.table = me, part, Table()
        self.alive: frozenset[str] = frozenset()
        self.joined = asyncio.Event()
        """Set once everything that is kept has been loaded for the first time."""
        self._store, self._patience_s, self._spaces, self._load = store, patience_s, spaces, load
        self._kept_since, self._heir_since, self._lost_since = (np.full(RANGES, np.inf) for _ in range(3))
        self._steady_since = np.inf
        self._is_leaving = False
        self._ticking = asyncio.Lock()
        self._exchange = Exchange(store, me)
        self._tasks: set[asyncio.Task[None]] = set()  # what takes longer than being heard of may wait
        self._loading: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Take part for good."""
        try:
            while True:
                try:
                    await self.tick()
                except StoreUnavailable as error:
                    self._steady_since = np.inf
                    log.debug("the group was not heard of: %s", error)
                await asyncio.sleep(TICK_S)
        finally:
            await end(self._tasks)

    async def leave(self, limit_s: float) -> None:
        """Hand over everything to the others, as far as there are any, and answer on until callers have heard of it;
        returns at the latest after `limit_s`.
        """
        self._is_leaving, end = True, time.monotonic() + limit_s
        with suppress(StoreUnavailable):
            while (now := time.monotonic()) < end:
                await self.tick()
                if self.table.leaving >= self.alive | {self.me}:
                    break  # nobody stays
                if not self.table.owned(self.me).any():
                    end = min(end, now + LINGER_S)
                await asyncio.sleep(TICK_S)
            await self._store.silence(self.me)

    async def tick(self) -> None:
        """Be heard, look who else is there and who owns what, and bring both in order. Raises StoreUnavailable."""
        async with self._ticking:
            raw, self.alive = await self._store.beat(self.me, round(self._patience_s * 1000))
            now = time.monotonic()
            self._steady_since = min(self._steady_since, now)
            table = read(msgspec.msgpack.decode(raw, type=Written)) if raw else Table()
            new = departing(table, self.me) if self._is_leaving else table
            new = revised(new, self.me, self._gone(table), self._ready())
            if not new.same(table):
                table = replace(new, epoch=table.epoch + 1)
                if not await self._store.swap_table(raw, msgspec.msgpack.encode(table.write())):
                    return  # another was faster
            self._adopt(table)
            await self._tend()

    def described(self) -> GroupReply:
        """The group as this replica sees it."""
        return GroupReply(self.me, sorted(self.alive), pack(self.part.loaded), self.table.write())

    def counts(self) -> dict[str, int]:
        """Ranges that are owned, held and loaded here, and those that change hands anywhere."""
        states = {
            "owned": self.table.owned(self.me),
            "held": self.part.kept,
            "loaded": self.part.loaded,
            "changing": self.table.contested(),
        }
        return {state: int(ranges.sum()) for state, ranges in states.items()}

    def misses(self, asked: Bools | None) -> bool:
        """Whether some of the ranges asked about (None: all) are not loaded here."""
        return bool((~self.part.loaded if asked is None else asked & ~self.part.loaded).any())

    async def exchange(self) -> None:
        """Tell the others what is counted here, and hear what they count. Raises StoreUnavailable."""
        others = [one for one in self.table.members if one != self.me]
        await self._exchange.between(self._spaces().values(), others)

    # ------------------------------------------------------------------------------------------- seams

    def _gone(self, table: Table) -> set[str]:
        """Members who are silent, judged by one who has itself been heard of without a break."""
        if time.monotonic() - self._steady_since < self._patience_s:
            return set()
        return set(table.members) - self.alive - {self.me}

    def _ready(self) -> Bools:
        """(RANGES,) what may be taken over."""
        return np.asarray(self.part.loaded & (time.monotonic() - self._heir_since >= SETTLE_S))

    def _adopt(self, table: Table) -> None:
        """Keep what is ours or is to be; others' ranges for a while yet."""
        if table.epoch != self.table.epoch:
            log.info("group %d: %s", table.epoch, ", ".join(f"{m}: {int(table.owned(m).sum())}" for m in table.members))
        self.table, now = table, time.monotonic()
        heir = table.inherited(self.me)
        mine = table.owned(self.me) | heir
        self._heir_since = np.where(heir, np.minimum(self._heir_since, now), np.inf)
        self.part.kept |= mine
        lost = self.part.kept & ~mine
        self._lost_since = np.where(lost, np.minimum(self._lost_since, now), np.inf)

    async def _tend(self) -> None:
        """Load what is missing, let go what others have taken, and count what is ours alone."""
        part, owned = self.part, self.table.owned(self.me)
        over = part.kept & (time.monotonic() - self._lost_since >= GRACE_S)
        if over.any():
            part.kept &= ~over
            part.loaded &= ~over
            self._begin(self._let_go())
        if (part.kept & ~part.loaded).any() and (self._loading is None or self._loading.done()):
            self._loading = self._begin(self._load_missing())
        counted = owned & part.loaded & ~self.table.contested()
        if (counted != part.counted).any():
            part.counted[:] = counted
            for space in self._spaces().values():
                if space.collective is not None:
                    space.collective.count()
        await self.exchange()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _let_go(self) -> None:
        for space in list(self._spaces().values()):
            if space.collective is not None:
                await space.collective.let_go()

    async def _load_missing(self) -> None:
        """Tries again at a later tick where Redis cannot be reached."""
        while (missing := self.part.kept & ~self.part.loaded).any():
            try:
                await self._load(missing)
            except StoreUnavailable:
                return
            self.part.loaded |= missing & self.part.kept
        self.joined.set()


class Exchange:
    """How many users hold each item: told to the other replicas, and heard from them, by model."""

    def __init__(self, store: Store, me: str) -> None:
        self._store, self._me = store, me
        self._told: dict[str, NDArray[np.uint8]] = {}
        self._since: dict[str, tuple[int, float]] = {}
        self._heard: dict[tuple[str, str], NDArray[np.uint8]] = {}
        self._at: dict[tuple[str, str], str] = {}
        self._lock = asyncio.Lock()

    async def between(self, spaces: Iterable[Space], others: Iterable[str]) -> None:
        """Tell and hear of some spaces. Raises StoreUnavailable."""
        async with self._lock:
            for space in list(spaces):
                if space.collective is not None:
                    await self._tell(space.model_version, space.collective.holders())
                    heard = await self._hear(space.model_version, list(others))
                    space.collective.count_elsewhere(heard)

    async def _tell(self, model: str, now: NDArray[np.uint8]) -> None:
        before = self._told.get(model)
        count, when = self._since.get(model, (0, 0.0))
        if before is not None:
            wide = np.zeros(len(now), np.uint8)
            wide[: len(before)] = before[: len(now)]
            changed = np.flatnonzero(wide != now)
            if count < LONGEST and time.monotonic() - when < RETOLD_S:
                if not len(changed):
                    return
                fields = {b"items": changed.astype("<u4").tobytes(), b"counts": now[changed].tobytes()}
                await self._store.tell_holders(model, self._me, fields, anew=False)
                self._told[model], self._since[model] = now, (count + 1, when)
                return
        await self._store.tell_holders(model, self._me, {b"all": now.tobytes()}, anew=True)
        self._told[model], self._since[model] = now, (0, time.monotonic())

    async def _hear(self, model: str, others: list[str]) -> list[NDArray[np.uint8]]:
        told = await self._store.hear_holders(model, [(one, self._at.get((model, one), "")) for one in others])
        for one, messages in zip(others, told, strict=True):
            for at, fields in messages:
                self._take((model, one), fields)
                self._at[model, one] = at
        self._heard = {key: counts for key, counts in self._heard.items() if key[0] != model or key[1] in others}
        self._at = {key: at for key, at in self._at.items() if key in self._heard}
        return [self._heard[model, one] for one in others if (model, one) in self._heard]

    def _take(self, key: tuple[str, str], fields: Mapping[bytes, bytes]) -> None:
        if b"all" in fields:
            self._heard[key] = np.frombuffer(fields[b"all"], "u1").copy()
            return
        items, counts = np.frombuffer(fields[b"items"], "<u4"), np.frombuffer(fields[b"counts"], "u1")
        mine = self._heard.get(key)
        if mine is None or not len(items):
            return  # all are told anew before long
        if items.max() >= len(mine):
            mine = np.pad(mine, (0, int(items.max()) + 1 - len(mine)))
        mine[items] = counts
        self._heard[key] = mine
