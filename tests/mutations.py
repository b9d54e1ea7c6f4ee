"""Seeded damage to bytes, msgpack, JSON and safetensors files, for the fuzz tests."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

HUGE = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
"""Headers of an array, a map, bytes and a string of 2³² - 1."""
DEEP = 100_000
NUMBERS = [0, 1, -1, 255, 2**31 - 1, 2**31, -(2**31), 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
REALS = [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -0.0, 1e12]
TEXTS = ["", "\0", "x" * 5000, "é\U0010ffff", "NaN", "null", "../..", "{}", "1"]
NOTHINGS: list[Any] = [None, True, False, [], {}, [None], {"x": None}, {"": {"": []}}, [[[[[]]]]]]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Cuts, flips, overwrites, removes or repeats some bytes."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randint(1, 40)) + data[end:]
    if kind == 3:
        return data[:at] + data[end:]
    return data[:at] + data[at:end] * 2 + data[end:] if kind == 4 else rng.randbytes(rng.randint(0, 200))


def damaged_msgpack(rng: random.Random, data: bytes) -> bytes:
    """Damages the bytes or a value of a message, or inserts a header that promises too much."""
    kind = rng.randrange(10)
    if kind < 3:
        return damaged(rng, data)
    if kind == 3:
        at = rng.randrange(len(data))
        return data[:at] + rng.choice(HUGE) + data[at:]
    if kind == 4:
        return rng.choice([b"\x91", b"\x81\xa1x"]) * DEEP
    return msgspec.msgpack.encode(with_one_changed(rng, msgspec.msgpack.decode(data, strict=False)))


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """Damages the bytes or a value of JSON text, or nests it too deeply."""
    kind = rng.randrange(8)
    if kind < 2:
        return damaged(rng, data)
    if kind == 2:
        return rng.choice([b"[", b'{"x":']) * DEEP
    return json.dumps(with_one_changed(rng, json.loads(data), _json_value)).encode()


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Damages the bytes of a safetensors file, the length of its header, or a value in the header."""
    kind = rng.randrange(8)
    if kind < 3:
        return damaged(rng, data)
    length = int.from_bytes(data[:8], "little")
    if kind == 3:
        return (
            rng.choice([0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[8:]
        )
    header = damaged_json(rng, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def with_one_changed(rng: random.Random, value: Any, other: Callable[[random.Random, Any], Any] | None = None) -> Any:
    """Returns a copy in which one value is replaced, removed or repeated."""
    other = other or _other
    place = rng.choice(list(_places(value)))
    return _replaced(rng, value, place, other)


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of keys to a value and to all values inside it."""
    yield way
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from _places(child, (*way, key))


def _replaced(rng: random.Random, value: Any, place: tuple[Any, ...], other: Callable[..., Any]) -> Any:
    if not place:
        return other(rng, value)
    copy = value.copy()
    key, *rest = place
    if not rest and rng.random() < 0.15:
        del copy[key]
    elif not rest and isinstance(copy, list) and rng.random() < 0.2:
        copy.extend([copy[key]] * rng.randint(1, 5))
    else:
        copy[key] = _replaced(rng, value[key], tuple(rest), other)
    return copy


def _other(rng: random.Random, value: Any) -> Any:
    """A value to replace another one, mostly of the same type."""
    if rng.random() < 0.3:
        return rng.choice([*NOTHINGS, *NUMBERS, *REALS, *TEXTS, b"", b"\xff" * 8])
    if isinstance(value, bytes):
        return _other_bytes(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([*NUMBERS, value + 1, value - 1])
    if isinstance(value, float):
        return rng.choice(REALS)
    return rng.choice(TEXTS) if isinstance(value, str) else rng.choice(NOTHINGS)


def _other_bytes(rng: random.Random, value: bytes) -> bytes:
    """A column to replace another one: longer, shorter, or with other numbers, NaN or extreme numbers."""
    nan, low, high = b"\x00\x00\xc0\x7f", b"\xff" * 4, b"\xff\xff\xff\x7f"
    filled = [(number * (len(value) // 4 + 1))[: len(value)] for number in (nan, low, high, b"\0" * 4)]
    at = rng.randrange(len(value) // 4 + 1) * 4
    spoilt = [value[:at] + number + value[at + 4 :] for number in (nan, low, high)]
    lengths = [value + b"\0", value + value, value[:-1], value[:-4], value + b"\0\0\x80\x3f" * 4]
    return rng.choice([*filled, *spoilt, *lengths, rng.randbytes(len(value)), rng.randbytes(rng.randint(0, 64))])


def _json_value(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and rng.random() < 0.3:
        return value | {"unheard_of": 1}
    found = _other(rng, value)
    return found.decode("latin-1") if isinstance(found, bytes) else found
