"""The 16,384 hash slots of Redis Cluster, by which jobs divide the users among themselves."""

from __future__ import annotations

from redis.crc import key_slot

SLOTS = 16384
ALL_SLOTS = range(SLOTS)


def user_key(user_id: str) -> bytes:
    """The key of a user's record in Redis. Its hash slot is that of the user id."""
    return b"ramrec:{" + user_id.encode() + b"}"


def user_of(key: bytes) -> str:
    """The user whose record has this key."""
    return key[len(b"ramrec:{") : -1].decode()


def slot_of(user_id: str) -> int:
    """The hash slot of a user's record."""
    return int(key_slot(user_key(user_id)))
