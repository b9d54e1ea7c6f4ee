"""The record's bytes: the present format, and those of earlier versions (`tests/golden`)."""

from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np
import pytest
import redis

from memory_service.protocol.hash_slots import user_key
from memory_service.store.batch import read_batch
from memory_service.store.record import FORMAT, FORMATS, HABITS, REST, RecordError, pack_record, unpack_record
from memory_service.transfer.conversion import line_of
from memory_service.transfer.lines import UserLine
from model.checkpoint import load_checkpoint
from model.config import RulesConfig
from model.memory.habits import DAY_HALF_LIVES, DAY_S, OCCASION_HALF_LIVES, PERIODS_H, SUMS
from tests.memory_service.calling import Caller, opened
from tests.synthetic import small_config

GOLDEN = Path(__file__).parents[2] / "golden"
RULES = small_config().rules
ITEMS = [f"i{n}" for n in range(1, 31)]
DIM, MODEL_VERSION = 16, "0123456789abcdef"
"""Of the golden records."""


def golden(form: int) -> tuple[bytes, UserLine]:
    """A record as that version wrote it, and all that is in it."""
    about = msgspec.json.decode((GOLDEN / f"record-format{form}.json").read_bytes(), type=UserLine)
    return (GOLDEN / f"record-format{form}.bin").read_bytes(), about


def as_of(form: int, line: UserLine) -> UserLine:
    """What a record of that format has of it: no basket before format 4, no habits before format 3."""
    if form < 4:
        line = msgspec.structs.replace(line, basket=0)
    if form < 3:
        entries = [msgspec.structs.replace(entry, first_time=0.0, occasion=0) for entry in line.entries]
        line = msgspec.structs.replace(line, entries=entries, occasions=None, sums=b"")
    return line


def assert_alike(line: UserLine, other: UserLine) -> None:
    """But for rounding of the sums."""
    sums = [np.frombuffer(one.sums, "<f4") for one in (line, other)]
    assert np.allclose(*sums, atol=1e-5)
    assert msgspec.structs.replace(line, sums=b"") == msgspec.structs.replace(other, sums=b"")


@pytest.mark.parametrize("form", FORMATS)
def test_records_of_every_format_are_read_whole(form):
    data, about = golden(form)
    assert int.from_bytes(data[4:6], "little") == form
    line = line_of("user", unpack_record(data, RULES), ITEMS)
    assert as_of(form, line) == about
    present = golden(FORMAT)[1]
    assert present.basket > 0
    assert_alike(line, as_of(max(form, 3), present))  # habits, where there are none, are made from the log


def test_the_habits_are_those_that_the_log_tells():
    """Computed event by event, in plain numbers."""
    about = golden(FORMAT)[1]
    moments = sorted({time for _, time in about.log})
    sums = np.frombuffer(about.sums, "<f4").reshape(len(about.entries), SUMS)
    assert about.occasions == len(moments) == 21
    for entry, found in zip(about.entries, sums, strict=True):
        times = [time for item, time in about.log if item == entry.item_id][-entry.frequency :]
        assert (entry.first_time, entry.time) == (times[0], times[-1])
        assert entry.occasion == 1 + moments.index(times[-1])
        passed = [(entry.occasion - 1 - moments.index(time), (times[-1] - time) / DAY_S) for time in times]
        wanted = [sum(2 ** -(occasions / half) for occasions, _ in passed) for half in OCCASION_HALF_LIVES]
        wanted += [sum(2 ** -(days / half) for _, days in passed) for half in DAY_HALF_LIVES]
        turns = [[2 * np.pi * time / 3600 / period for time in times] for period in PERIODS_H]
        wanted += [sum(map(of, turn)) for of in (np.cos, np.sin) for turn in turns]
        assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("form", [2, 3])
def test_an_older_record_is_written_anew_in_the_present_format(form):
    data, _ = golden(form)
    again = pack_record(unpack_record(data, RULES))
    assert int.from_bytes(again[4:6], "little") == FORMAT
    assert pack_record(unpack_record(again, RULES)) == again
    assert_alike(line_of("user", unpack_record(again, RULES), ITEMS), as_of(3, golden(FORMAT)[1]))
    assert len(again) == len(golden(FORMAT)[0])


@pytest.mark.parametrize("form", FORMATS)
def test_any_damaged_byte_is_noticed(form):
    data, _ = golden(form)
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        with pytest.raises(RecordError):
            unpack_record(damaged, RULES)
        assert read_batch([damaged], RULES, DIM, MODEL_VERSION)[0] == []


@pytest.mark.parametrize("form", [0, 1, 5])
def test_other_formats_are_refused_with_those_that_can_be_read(form):
    data = golden(FORMAT)[0]
    with pytest.raises(RecordError, match=f"format {form}; this version reads formats 2 to 4"):
        unpack_record(data[:4] + bytes([form, 0]) + data[6:], RULES)


def test_a_larger_bank_than_the_rules_allow_keeps_its_best_entries():
    for form in FORMATS:
        record = unpack_record(golden(form)[0], RulesConfig(**RULES.model_dump() | {"capacity": 4}))
        whole = unpack_record(golden(form)[0], RULES)
        best = np.sort(np.argsort(-whole.banks.quality()[0, : whole.size])[:4])
        for name in ("item", *HABITS):
            assert np.array_equal(record.banks.fields[name][0, :4], whole.banks.fields[name][0, best])
        assert record.banks.occasions.tolist() == whole.banks.occasions.tolist() == [21]


def test_a_record_cut_short_is_none_even_with_a_fitting_checksum():
    start = golden(FORMAT)[0][:16]
    for body in (b"", bytes(REST.size - 1), bytes(REST.size + 1)):
        with pytest.raises(RecordError):
            unpack_record(start + crc32(body, crc32(start)).to_bytes(4, "little") + body, RULES)


def test_a_bank_in_the_oldest_format_goes_on(run, valkey_url, stack):
    """An upgraded service over the Redis of an old one: the record is of another model, and is keyed anew."""
    with redis.Redis.from_url(valkey_url) as client:
        client.set(user_key("old"), golden(2)[0])
    caller = Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)
    reply = caller.retrieve("old", "new")
    assert [one.user_id for one in reply.stale] == ["old"]
    assert reply.stale[0].version == golden(2)[1].version
