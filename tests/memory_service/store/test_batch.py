"""Many records read at once, against the same records read one by one."""

from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_service.index.collective import CollectiveScope
from memory_service.store.batch import SHARED_FIELDS, read_batch
from memory_service.store.record import RecordError, pack_record, unpack_record
from model.checkpoint import load_checkpoint
from model.memory.collective.layout import LAST
from model.memory.record import UserRecord
from model.memory.rules import unit
from tests.memory_service.store.test_record import golden
from tests.synthetic import random_banks, small_config

DIM = 16
RULES = small_config().rules
MODEL = "0123456789abcdef"
TAIL = ("log_item", "log_time", "seen", "event_ids", "state")
KINDS = ("plain", "plain", "plain", "damaged", "cut", "older", "missing", "private", "moved", "large", "wide")


def record(seed: int, entries: int, model: str = MODEL, dim: int = DIM, rules=RULES) -> UserRecord:
    rng = np.random.default_rng(seed)
    banks = random_banks(1, entries, dim, rules, seed=seed)
    banks.fields["cell"][:] = np.arange(banks.key.shape[1]) % 5 - 1
    return UserRecord(
        banks=banks,
        version=1 + seed,
        model_version=model,
        events=entries,
        log_item=rng.integers(1, 30, entries).astype("<u4"),
        log_time=np.sort(rng.random(entries)),
        seen=rng.integers(1, 40, seed % 7).astype("<u4"),
        event_ids=rng.integers(1, 2**60, seed % 4).astype("<u8"),
        state=rng.random(dim).astype("<f4"),
        basket=seed,
    )


def packed(kind: str, seed: int, entries: int, model: str = MODEL) -> bytes | None:
    """A record of some kind, of which only a plain one may be in a batch."""
    if kind == "missing":
        return None
    if kind == "older":
        return golden(3)[0]
    if kind == "large":
        return pack_record(record(seed, 40, model, rules=RULES.model_copy(update={"capacity": 64})))
    if kind == "wide":
        return pack_record(record(seed, entries, model, dim=DIM + 4))
    data = pack_record(replace(record(seed, entries, "f" * 16 if kind == "moved" else model), share=kind != "private"))
    if kind == "damaged":
        at = seed * 37 % len(data)
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
    if kind == "cut":
        data = data[:-4]
        return data[:16] + crc32(data[20:], crc32(data[:16])).to_bytes(4, "little") + data[20:]
    return data


MANY = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 50), st.integers(0, 14)), max_size=12)


def readable(data: bytes | None) -> UserRecord | None:
    try:
        return None if data is None else unpack_record(data, RULES)
    except RecordError:
        return None


@settings(max_examples=60, deadline=None)
@given(MANY)
def test_a_batch_has_what_its_records_have_one_by_one(many):
    found = [packed(*one) for one in many]
    rows, batch = read_batch(found, RULES, DIM, MODEL)
    assert rows == [row for row, (kind, _, _) in enumerate(many) if kind == "plain"]
    records = [record for row in rows if (record := readable(found[row])) is not None]
    assert len(records) == len(rows) == len(batch)
    assert batch.stamps == [one.stamp for one in records]
    assert batch.newest_item >= max([one.newest_item for one in records], default=0)
    for n, (one, other) in enumerate(zip(batch.stacked().records, records, strict=True)):
        assert pack_record(one) == pack_record(other) == found[rows[n]]
        for name in TAIL:
            assert np.array_equal(getattr(one, name), getattr(other, name))
        for name, values in other.banks.fields.items():
            assert np.array_equal(batch.banks.fields[name][n], values[0], equal_nan=values.dtype.kind == "f")
        assert (one.stamp, one.share, one.model_version) == (other.stamp, other.share, other.model_version)


@settings(max_examples=40, deadline=None)
@given(st.lists(MANY, min_size=1, max_size=5), st.booleans())
def test_an_index_is_the_same_whether_filled_one_by_one_or_in_batches(run, rounds, split):
    """Also where users are written again, move to another model, or stop sharing."""
    checkpoint = load_checkpoint(run, with_weights=False)
    singly, at_once = CollectiveScope(checkpoint), CollectiveScope(checkpoint)
    rules, model = checkpoint.config.rules, checkpoint.version
    for many in rounds:
        found = [packed(*one, model) for one in many]
        names = [f"u{n}" for n in range(len(found))]
        records = {name: one for name, data in zip(names, found, strict=True) if (one := readable(data)) is not None}
        records = {name: one for name, one in records.items() if one.banks.key.shape[2] == DIM}
        singly.put(records.items())
        rows, batch = read_batch(found, rules, DIM, model, SHARED_FIELDS)
        at_once.put_batch([names[row] for row in rows], batch, split=split)
        taken = {names[row] for row in rows}
        at_once.put((name, one) for name, one in records.items() if name not in taken)
    at_once.index.compact()
    assert (len(singly), singly.users, singly.known) == (len(at_once), at_once.users, at_once.known)
    queries = unit(np.random.default_rng(0).normal(size=(5, DIM)))
    asked = queries, np.zeros((5, LAST), np.int64), ["u0", "u1", "u2", "u3", "x"], np.full(5, 500)
    one, other = singly.search(*asked), at_once.search(*asked)
    for name in one.COLUMNS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("entries", [0, 1, 9])
def test_only_the_columns_that_are_asked_for_are_read(entries):
    _, batch = read_batch([packed("plain", 3, entries)], RULES, DIM, MODEL, SHARED_FIELDS)
    whole = record(3, entries).banks
    size = int(whole.size[0])
    for name, values in whole.fields.items():
        wanted = values[0, :size] if name in SHARED_FIELDS else np.zeros_like(values[0, :size])
        assert np.array_equal(batch.banks.fields[name][0, :size], wanted, equal_nan=name == "rating")
    assert np.array_equal(batch.banks.key[0, :size], whole.key[0, :size])
