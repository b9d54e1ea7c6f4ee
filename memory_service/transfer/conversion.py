"""Records as lines of an export, and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memory_service.transfer.lines import EntryLine, UserLine
from model.config import RulesConfig
from model.memory.bank import ENTRY_FIELDS, KEY, NOT_SHARED, Banks
from model.memory.changes import rekey_job, with_habits
from model.memory.collective.layout import cells_of
from model.memory.habits import SUMS
from model.memory.record import EncodeJob, UserRecord


def line_of(user_id: str, record: UserRecord, ids: list[str]) -> UserLine:
    """The line of a record; `ids` are the item ids in the order of their catalogue numbers."""
    n, fields = record.size, record.banks.fields
    columns = {name: fields[name][0, :n].tolist() for name in ENTRY_FIELDS if name != "sums"}
    rating = [None if np.isnan(value) else value for value in columns.pop("rating")]
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


def record_of(user: UserLine, number_of: dict[str, int], rules: RulesConfig) -> UserRecord:
    """The record of a line; `number_of` gives the catalogue number of each item id."""
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
    banks.fields["cell"][0, :n] = _cells(record)
    return with_habits(record) if user.occasions is None else record


def _cells(record: UserRecord) -> NDArray[np.int32]:
    """Cells (n,) of a record's entries under the catalogue numbers of this deployment.

    An entry keeps its cell if some event of its item in the log would file it there; otherwise it gets the cell of the
    item's last event, as the cell was computed from other catalogue numbers.
    """
    fields, start = record.banks.fields, record.log_start
    item, cell = (fields[name][0, : record.size] for name in ("item", "cell"))
    of_events = cells_of(EncodeJob(start, record.log_item, start + np.arange(len(record.log_item))))
    stays = ((record.log_item[:, None] == item) & (of_events[:, None] == cell)).any(axis=0) | (cell == NOT_SHARED)
    return np.where(stays, cell, cells_of(rekey_job(record))).astype(np.int32)


def _value(entry: EntryLine, name: str, number_of: dict[str, int]) -> float:
    if name == "item":
        return number_of[entry.item_id]
    value: float | None = getattr(entry, name)
    return float("nan") if value is None else value


def _numbers(items: list[str], number_of: dict[str, int]) -> NDArray[np.uint32]:
    return np.array([number_of[item] for item in items], "<u4")
