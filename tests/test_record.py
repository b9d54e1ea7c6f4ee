"""The record's bytes: the present format, and those of earlier versions (`tests/golden`)."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import redis

from memory_service.record import FORMAT, RecordError, pack_record, unpack_record
from memory_service.slots import user_key
from memory_service.transfer import UserLine, _user_line
from model.checkpoint import load_checkpoint
from model.config import RulesConfig
from tests.synthetic import small_config
from tests.test_memory_service import Caller, opened

GOLDEN = Path(__file__).parent / "golden"
RULES = small_config().rules
ITEMS = [f"i{n}" for n in range(1, 31)]


def golden(form: int) -> tuple[bytes, UserLine]:
    """A record as that version wrote it, and all that is in it."""
    about = msgspec.json.decode((GOLDEN / f"record-format{form}.json").read_bytes(), type=UserLine)
    return (GOLDEN / f"record-format{form}.bin").read_bytes(), about


@pytest.mark.parametrize("form", [1, 2])
def test_records_of_every_format_are_read_whole(form):
    data, about = golden(form)
    assert int.from_bytes(data[4:6], "little") == form
    assert _user_line("user", unpack_record(data, RULES), ITEMS) == about


def test_an_older_record_is_written_anew_in_the_present_format():
    data, _ = golden(1)
    again = pack_record(unpack_record(data, RULES))
    assert int.from_bytes(again[4:6], "little") == FORMAT
    assert again == golden(FORMAT)[0]


@pytest.mark.parametrize("form", [1, 2])
def test_any_damaged_byte_is_noticed(form):
    data, _ = golden(form)
    unnoticed = set(range(6, 16)) if form == 1 else set()  # the first format's checksum did not cover the version
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        if at not in unnoticed:
            with pytest.raises(RecordError):
                unpack_record(damaged, RULES)


def test_a_larger_bank_than_the_rules_allow_keeps_its_best_entries():
    record = unpack_record(golden(2)[0], RulesConfig(**RULES.model_dump() | {"capacity": 4}))
    whole = unpack_record(golden(2)[0], RULES)
    best = np.argsort(-whole.banks.quality()[0, : whole.size])[:4]
    assert set(record.banks.fields["item"][0, :4]) == set(whole.banks.fields["item"][0, best])


def test_a_bank_written_by_the_first_version_goes_on(run, valkey_url, stack):
    """An upgraded service over the Redis of an old one: the record is of another model, and is keyed anew."""
    with redis.Redis.from_url(valkey_url) as client:
        client.set(user_key("old"), golden(1)[0])
    caller = Caller(stack.enter_context(opened(run, valkey_url)), load_checkpoint(run).version)
    reply = caller.retrieve("old", "new")
    assert [one.user_id for one in reply.stale] == ["old"]
    assert reply.stale[0].version == golden(1)[1].version
