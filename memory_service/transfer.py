"""`python -m memory_service.transfer export|import`: users' memories from one deployment to another.

JSON lines: items first (`{"item": …}`), then users (`{"user": …}`).

Items are named by id, so numbers need not agree; keys travel as base64 of little-endian fp16, sums and state of f4.
An export from before habits were kept is taken, too; they are made from its logs (`model.memory.events.with_habits`).
Tombstones stay behind: who was forgotten is known only to the deployment that forgot.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from memory_service.settings import RedisSettings, user_data_dir
from memory_service.store.embedded import embedded_valkey, running_valkey
from memory_service.store.link import StoreUnavailable
from memory_service.store.store import CatalogueItem, Store
from model.config import RulesConfig, describe
from model.errors import RamrecError
from model.memory.bank import ENTRY_FIELDS, KEY, NOT_SHARED, Banks
from model.memory.collective import cells_of
from model.memory.events import EncodeJob, UserRecord, rekey_job, with_habits
from model.memory.habits import DAY_HALF_LIVES, OCCASION_HALF_LIVES, SUMS

BATCH = 500
TIMEOUT_S = 30.0
LARGEST = 1000
"""Capacity that any bank fits into."""
MOST = 2**32 - 1
"""The largest count of a record."""
COUNTS = len(OCCASION_HALF_LIVES) + len(DAY_HALF_LIVES)
"""Sums that are counts; the others are of cos and sin."""


class TransferError(RamrecError):
    """A line that is no export of this version; names it."""


class ItemLine(msgspec.Struct, forbid_unknown_fields=True):
    """An item of the catalogue; `about` is its metadata."""

    item_id: str
    about: msgspec.Raw = msgspec.Raw(b"null")
    hidden: bool = False


class EntryLine(msgspec.Struct, forbid_unknown_fields=True):
    """A memory entry without key and sums; `cell` says where the collective index files it: −1 nowhere, else it
    is found anew at import.
    """

    item_id: str
    cell: int
    frequency: int
    access: int
    rating: float | None
    time: float
    last_access: float
    first_time: float = 0.0
    occasion: int = 0


class UserLine(msgspec.Struct, forbid_unknown_fields=True):
    """A record. keys: (n, d) fp16; state: (d,) f4; sums: (n, SUMS) f4. occasions: None where habits were not kept.
    basket: the identity of the newest one (0: none).
    """

    user_id: str
    version: int
    model_version: str
    events: int
    share: bool
    pruned: int
    entries: list[EntryLine]
    keys: bytes
    log: list[tuple[str, float]]
    seen: list[str]
    event_ids: list[int]
    state: bytes
    occasions: int | None = None
    sums: bytes = b""
    basket: int = 0


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One line: an item or a user."""

    item: ItemLine | None = None
    user: UserLine | None = None


def export_file(url: str, file: Path) -> int:
    """Export a Redis to a file, which appears only once it is complete; returns the number of lines."""

    async def written() -> int:
        store, lines, partial = _store(url), 0, file.with_name(file.name + ".partial")
        try:
            with partial.open("wb") as out:
                async for line in export(store):
                    out.write(line)
                    lines += 1
            partial.replace(file)
        except (StoreUnavailable, OSError) as error:
            raise TransferError(f"export to {file}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
            await store.close()
        return lines

    return asyncio.run(written())


def import_file(url: str, file: Path, overwrite: bool) -> Counter[str]:
    """Take a file of `export_file` into a Redis; see `load`."""

    async def taken() -> Counter[str]:
        store = _store(url)
        try:
            with file.open("rb") as lines:
                return await load(store, lines, overwrite)
        except (StoreUnavailable, OSError) as error:
            raise TransferError(f"import of {file}: {error}") from error
        finally:
            await store.close()

    return asyncio.run(taken())


def _store(url: str) -> Store:
    return Store(url, RulesConfig(capacity=LARGEST), TIMEOUT_S)


async def export(store: Store) -> AsyncIterator[bytes]:
    """All items, then all users, a JSON line each. Every user's line is consistent in itself."""
    _, items = await store.catalogue(1)
    for item in items:
        yield _line(Line(item=ItemLine(item.item_id, msgspec.Raw(item.about or b"null"), item.hidden)))
    ids = [item.item_id for item in items]
    done: set[str] = set()
    async for names in store.all_users(BATCH):
        wanted = [name for name in names if name not in done]
        done.update(wanted)
        for name, record in (await store.load_readable(wanted)).items():
            if record.newest_item > len(ids):
                ids += await store.item_ids(len(ids) + 1)
            yield _line(Line(user=_user_line(name, record, ids)))


async def load(store: Store, lines: Iterable[bytes], overwrite: bool) -> Counter[str]:
    """Take exported lines in; counts users `imported`, `kept` (there already, unless `overwrite`), `forgotten` (here).

    Raises:
        TransferError: a line is not of this format; those before it are in.
    """
    outcome: Counter[str] = Counter({"imported": 0, "kept": 0, "forgotten": 0})
    numbered = enumerate(lines, start=1)
    while chunk := list(islice(numbered, BATCH)):
        read = [_read(number, line) for number, line in chunk]
        items = [line.item for line in read if line.item is not None]
        await store.register(
            [CatalogueItem(i.item_id, b"" if bytes(i.about) == b"null" else bytes(i.about), i.hidden) for i in items],
            overwrite=False,
        )
        await store.register([CatalogueItem(item.item_id, b"", True) for item in items if item.hidden], overwrite=True)
        users = [line.user for line in read if line.user is not None]
        outcome.update(await _take(store, list({user.user_id: user for user in users}.values()), overwrite))
    return outcome


async def _take(store: Store, users: list[UserLine], overwrite: bool) -> Counter[str]:
    if not users:
        return Counter()
    names = [user.user_id for user in users]
    there, stones = await store.stamps(names), await store.tombstones(names)
    named = sorted({item for user in users for item in _items(user)})
    numbers = await store.register([CatalogueItem(item, b"", False) for item in named], overwrite=False)
    number_of = dict(zip(named, numbers, strict=True))
    writes, outcome = [], Counter[str]()
    for user, stamp, stone in zip(users, there, stones, strict=True):
        version = stamp >> 32
        if stone is not None and version == 0:
            outcome["forgotten"] += 1
        elif version and not overwrite:
            outcome["kept"] += 1
        else:
            record = _record(user, number_of, store.rules)
            writes.append((user.user_id, stamp, replace(record, version=max(record.version, version + 1))))
    done = await store.commit(writes)
    imported = sum(record is not None for record in done)
    outcome.update(imported=imported, kept=len(done) - imported)
    return outcome


def _line(line: Line) -> bytes:
    filled = {name: getattr(line, name) for name in ("item", "user") if getattr(line, name) is not None}
    return msgspec.json.encode(filled) + b"\n"


def _read(number: int, line: bytes) -> Line:
    try:
        found = msgspec.json.decode(line, type=Line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TransferError(f"line {number}: {error}") from error
    if (found.item is None) == (found.user is None):
        raise TransferError(f"line {number}: wanted one of item and user")
    if found.user is not None:
        _check(number, found.user)
    return found


def _check(number: int, user: UserLine) -> None:
    dim = len(user.state) // 4
    if dim == 0 or len(user.state) % 4 or len(user.keys) != len(user.entries) * dim * KEY.itemsize:
        raise TransferError(f"line {number}: keys and state of {user.user_id!r} do not fit together")
    numbers = [np.frombuffer(user.state, "<f4"), np.frombuffer(user.keys, KEY).astype(np.float32)]
    if not all(np.isfinite(one).all() for one in numbers):
        raise TransferError(f"line {number}: keys or state of {user.user_id!r} are not finite")
    if user.version < 1 or len(user.entries) > LARGEST or not 1 <= len(user.user_id.encode()) <= 256:
        raise TransferError(f"line {number}: version, bank size or user_id out of range")
    if any(not 0 <= one < 2**64 for one in user.event_ids) or user.events < len(user.log):
        raise TransferError(f"line {number}: event counts or ids of {user.user_id!r} are out of range")
    if not 0 <= user.basket < 2**64 or (user.basket and not user.log):
        raise TransferError(f"line {number}: basket of {user.user_id!r} is out of range, or of no event in its log")
    if user.occasions is not None:
        _check_habits(number, user)


def _check_habits(number: int, user: UserLine) -> None:
    if len(user.sums) != len(user.entries) * 4 * SUMS:
        raise TransferError(f"line {number}: sums and entries of {user.user_id!r} do not fit together")
    sums = np.frombuffer(user.sums, "<f4").reshape(-1, SUMS)
    if not (np.abs(sums) <= MOST).all() or (sums[:, :COUNTS] < 0).any():  # NaN is not
        raise TransferError(f"line {number}: sums of {user.user_id!r} are not finite or out of range")
    if not all(0 <= one <= MOST for one in (user.occasions or 0, *(entry.occasion for entry in user.entries))):
        raise TransferError(f"line {number}: occasions of {user.user_id!r} are out of range")
    if any(entry.frequency < 1 or entry.first_time > entry.time for entry in user.entries):
        raise TransferError(f"line {number}: frequency or first_time of an entry of {user.user_id!r} is out of range")


def _items(user: UserLine) -> Iterable[str]:
    yield from (entry.item_id for entry in user.entries)
    yield from (item for item, _ in user.log)
    yield from user.seen


def _user_line(user_id: str, record: UserRecord, ids: list[str]) -> UserLine:
    n, fields = record.size, record.banks.fields
    columns = {name: fields[name][0, :n].tolist() for name in ENTRY_FIELDS if name != "sums"}
    rating = [None if np.isnan(one) else one for one in columns.pop("rating")]
    items = [ids[number - 1] for number in columns.pop("item")]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return UserLine(
        user_id=user_id,
        version=record.version,
        model_version=record.model_version,
        events=record.events,
        share=record.share,
        pruned=int(record.banks.pruned[0]),
        entries=[EntryLine(item_id=items[r], rating=rating[r], **row) for r, row in enumerate(rows)],
        keys=record.banks.key[0, :n].astype(KEY).tobytes(),
        log=[(ids[i - 1], t) for i, t in zip(record.log_item.tolist(), record.log_time.tolist(), strict=True)],
        seen=[ids[number - 1] for number in record.seen.tolist()],
        event_ids=record.event_ids.tolist(),
        state=record.state.astype("<f4").tobytes(),
        occasions=int(record.banks.occasions[0]),
        sums=fields["sums"][0, :n].tobytes(),
        basket=record.basket,
    )


def _record(user: UserLine, number_of: dict[str, int], rules: RulesConfig) -> UserRecord:
    n, state = len(user.entries), np.frombuffer(user.state, "<f4")
    banks = Banks(1, len(state), rules)
    for name in (name for name in ENTRY_FIELDS if name != "sums"):
        banks.fields[name][0, :n] = [_value(entry, name, number_of) for entry in user.entries]
    banks.key[0, :n] = np.frombuffer(user.keys, KEY).reshape(n, len(state))
    banks.size[0], banks.pruned[0] = n, user.pruned
    if user.occasions is not None:
        banks.fields["sums"][0, :n] = np.frombuffer(user.sums, "<f4").reshape(n, SUMS)
        banks.occasions[0] = user.occasions
    record = UserRecord(
        banks=banks,
        version=user.version,
        model_version=user.model_version,
        events=user.events,
        share=user.share,
        log_item=_numbers([item for item, _ in user.log], number_of),
        log_time=np.array([when for _, when in user.log], "<f8"),
        seen=_numbers(user.seen, number_of),
        event_ids=np.array(user.event_ids, "<u8"),
        state=state,
        basket=user.basket,
    )
    banks.fields["cell"][0, :n] = _filed(record)
    return with_habits(record) if user.occasions is None else record


def _filed(record: UserRecord) -> NDArray[np.int32]:
    """Cells (n,) of a record's entries: as they are, where that is what the log says of the item at some time; else as
    it says of the last time, for items had other numbers where the record comes from.
    """
    fields, start = record.banks.fields, record.log_start
    item, cell = (fields[name][0, : record.size] for name in ("item", "cell"))
    every = cells_of(EncodeJob(start, record.log_item, start + np.arange(len(record.log_item))))
    stays = ((record.log_item[:, None] == item) & (every[:, None] == cell)).any(axis=0) | (cell == NOT_SHARED)
    return np.where(stays, cell, cells_of(rekey_job(record))).astype(np.int32)


def _value(entry: EntryLine, name: str, number_of: dict[str, int]) -> float:
    if name == "item":
        return number_of[entry.item_id]
    value: float | None = getattr(entry, name)
    return float("nan") if value is None else value


def _numbers(items: list[str], number_of: dict[str, int]) -> NDArray[np.uint32]:
    return np.array([number_of[item] for item in items], "<u4")


def main() -> int:
    """The command line. Exit code 2 with one line where something expected is missing."""
    parser = argparse.ArgumentParser(prog="python -m memory_service.transfer", description=__doc__)
    parser.add_argument("what", choices=("export", "import"))
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="import: replace users who are there already")
    parser.add_argument("--redis-url", help="redis://, rediss:// or unix://; none: the embedded Valkey")
    parser.add_argument("--data-dir", type=Path, default=user_data_dir(), help="folder of the embedded Valkey")
    asked = parser.parse_args()
    try:
        given = RedisSettings(**({"redis_url": asked.redis_url} if asked.redis_url else {})).redis_url
        with _redis_url(given, asked.data_dir) as url:
            if asked.what == "export":
                print(f"{export_file(url, asked.file):,} lines written to {asked.file}")
            else:
                counts = import_file(url, asked.file, asked.overwrite)
                print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    except ValidationError as error:
        print(f"ramrec: settings: {describe(error)}", file=sys.stderr)
        return 2
    except RamrecError as error:
        print(f"ramrec: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _redis_url(given: str | None, data_dir: Path) -> Iterator[str]:
    """The Redis meant: the one given, or the embedded Valkey, which may be running."""
    running = given or running_valkey(data_dir)
    if running is not None:
        yield running
    else:
        with embedded_valkey(data_dir, "everysec") as url:
            yield url


if __name__ == "__main__":
    sys.exit(main())
