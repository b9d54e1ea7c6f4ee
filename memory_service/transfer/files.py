"""Export and import of everything in a Redis, as files or line by line."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import msgspec

from memory_service.store.items import CatalogueItem
from memory_service.store.redis.errors import StoreUnavailable
from memory_service.store.store import Store
from memory_service.transfer.conversion import line_of, record_of
from memory_service.transfer.lines import LARGEST, ItemLine, Line, TransferError, UserLine, read
from model.config import RulesConfig

BATCH = 500
"""Lines, or users, that are handled at once."""
TIMEOUT_S = 30.0


def export_file(url: str, file: Path) -> int:
    """Export everything in a Redis to a file, which appears only once it is complete; returns the number of lines.

    Raises:
        TransferError: Redis is out of reach, or the file cannot be written.
    """

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
    """Import a file of `export_file` into a Redis; returns counts of users as `load` does.

    Raises:
        TransferError: Redis is out of reach, or the file cannot be read; see `load` for invalid lines.
    """

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
    """A JSON line for each item, then one for each user. Each line shows its user at one moment."""
    _, items = await store.catalogue(1)
    for item in items:
        yield Line(item=ItemLine(item.item_id, msgspec.Raw(item.about or b"null"), item.hidden)).packed()
    ids = [item.item_id for item in items]
    done: set[str] = set()
    async for names in store.all_users(BATCH):
        wanted = [name for name in names if name not in done]
        done.update(wanted)
        for name, record in (await store.load_readable(wanted)).items():
            if record.newest_item > len(ids):
                ids += await store.item_ids(len(ids) + 1)
            yield Line(user=line_of(name, record, ids)).packed()


async def load(store: Store, lines: Iterable[bytes], overwrite: bool) -> Counter[str]:
    """Import exported lines.

    Args:
        store: where to.
        lines: of `export`.
        overwrite: replace the records of users who have one already.

    Returns:
        Counts of users: `imported`, `kept` (they have a record already), `forgotten` (they were forgotten here).

    Raises:
        TransferError: a line is invalid. Earlier batches of lines have been imported.
    """
    outcome: Counter[str] = Counter({"imported": 0, "kept": 0, "forgotten": 0})
    numbered = enumerate(lines, start=1)
    while chunk := list(islice(numbered, BATCH)):
        found = [read(number, line) for number, line in chunk]
        items = [line.item for line in found if line.item is not None]
        await store.register([item.registered() for item in items], overwrite=False)
        await store.register([CatalogueItem(item.item_id, b"", True) for item in items if item.hidden], overwrite=True)
        users = {line.user.user_id: line.user for line in found if line.user is not None}
        outcome.update(await _import_users(store, list(users.values()), overwrite))
    return outcome


async def _import_users(store: Store, users: list[UserLine], overwrite: bool) -> Counter[str]:
    if not users:
        return Counter()
    names = [user.user_id for user in users]
    there, tombstones = await store.stamps(names), await store.tombstones(names)
    named = sorted({item for user in users for item in user.items()})
    numbers = await store.register([CatalogueItem(item, b"", False) for item in named], overwrite=False)
    number_of = dict(zip(named, numbers, strict=True))
    writes, outcome = [], Counter[str]()
    for user, stamp, tombstone in zip(users, there, tombstones, strict=True):
        version = stamp >> 32
        if tombstone is not None and version == 0:
            outcome["forgotten"] += 1
        elif version and not overwrite:
            outcome["kept"] += 1
        else:
            record = record_of(user, number_of, store.rules)
            writes.append((user.user_id, stamp, replace(record, version=max(record.version, version + 1))))
    done = await store.commit(writes)
    imported = sum(record is not None for record in done)
    outcome.update(imported=imported, kept=len(done) - imported)
    return outcome
