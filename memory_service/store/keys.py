"""Every key in Redis and what it holds. Redis has the truth; all else in this service is a cache of it.

    ramrec:{USER}                     a user's record (`store.record`); its key: `protocol.hash_slots.user_key`
    ramrec:forgotten:HASH             tombstone of a forgotten user: time f8, last version u8; expires. HASH is a
                                      keyed hash of the user id, so that the key does not reveal who was forgotten
    ramrec:secret                     key of that hash, made once
    ramrec:model                      the serving and the wanted model (`ModelState` as JSON); missing until another
                                      model is asked for
    ramrec:quota:KEY:SECOND           requests of an API key granted in a second; expires
    ramrec:catalogue:{items}:number   hash item id → catalogue number (from 1; a number never changes)
    ramrec:catalogue:{items}:id       list of item ids in the order of their numbers
    ramrec:catalogue:{items}:about    hash item id → metadata as JSON
    ramrec:catalogue:{items}:hidden   set of hidden item ids
    ramrec:catalogue:{items}:revision counts changes of metadata and hidden flags of registered items
    ramrec:catalogue:{items}:changes  list of the numbers of changed items, one for each revision, newest first
    ramrec:replicas                   sorted set of memory replicas: `+URL`, or `-URL` while one is still loading, by
                                      the time (ms) until which it counts as present

In a Redis Cluster, the part in braces decides a key's hash slot: that of a record follows from the user id, and all
keys of the catalogue share one.
"""

from __future__ import annotations

from hashlib import blake2b

RECORDS = b"ramrec:{*}"
"""Pattern of all records' keys."""
MODEL, SECRET, REPLICAS = "ramrec:model", "ramrec:secret", "ramrec:replicas"
CATALOGUE = NUMBERS, IDS, ABOUT, HIDDEN, REVISION, CHANGES = [
    f"ramrec:catalogue:{{items}}:{name}" for name in ("number", "id", "about", "hidden", "revision", "changes")
]


def records_of(prefix: str) -> bytes:
    """Pattern of the records of all users whose id begins with a prefix."""
    escaped = "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in prefix)
    return b"ramrec:{" + escaped.encode() + b"*}"


def tombstone_key(user_id: str, secret: bytes) -> bytes:
    """Key of a user's tombstone; `secret` is the value of SECRET."""
    return f"ramrec:forgotten:{blake2b(user_id.encode(), key=secret, digest_size=16).hexdigest()}".encode()


def quota_key(key: str, second: int) -> str:
    """Key of the requests that an API key was granted in a second."""
    return f"ramrec:quota:{key}:{second}"
