"""The 16,384 slots of Redis Cluster: which one a user's record lies in. Jobs share users out by them."""

from __future__ import annotations

from redis.crc import key_slot

SLOTS = 16384
ALL_SLOTS = range(SLOTS)


def user_key(user_id: str) -> bytes:
    """Key of a user's record in Redis; its slot is that of the user id."""
    return b"ramrec:{" + user_id.encode() + b"}"


def user_of(key: bytes) -> str:
    """The user whose record a key is."""
    return key[len(b"ramrec:{") : -1].decode()


def slot_of(user_id: str) -> int:
    """The slot of a user."""
    return int(key_slot(user_key(user_id)))
