"""What can go wrong with Redis, and the translation of redis-py's errors into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

from model.errors import RamrecError

UNREACHABLE = (ConnectionError, TimeoutError, BusyLoadingError, ClusterDownError, OSError)
"""A server is out of reach, is loading its data, or has lost its cluster."""
REFUSING = (ReadOnlyError, OutOfMemoryError)


class StoreURLError(RamrecError):
    """A Redis URL cannot be used. The message does not quote the URL, which may contain a password."""

    def __init__(self) -> None:
        super().__init__(
            "the URL of Redis is unusable: it needs redis://, rediss:// (TLS) or unix://, a password percent-encoded, "
            "and only options that redis-py knows. Several URLs, separated by commas, must all lead to servers of one "
            "Redis Cluster, which has no database but 0"
        )


class StoreUnavailable(RuntimeError):  # noqa: N818 - a state of the store, not of the call
    """Redis is out of reach, is loading, refuses writes (memory or disk full), or did not answer in time."""


class ShardUnavailable(StoreUnavailable):
    """One primary of a Redis Cluster is unavailable in this way, while others may answer."""


def as_unavailable(error: Exception, kind: type[StoreUnavailable] = StoreUnavailable) -> Exception:
    """An error of redis-py that tells of the state of a server, as `kind`; any other error as it is."""
    if isinstance(error, kind):
        return error
    # The append-only file cannot be written: redis-py has no class for this.
    cannot_persist = isinstance(error, ResponseError) and "MISCONF" in str(error)
    if cannot_persist or isinstance(error, (StoreUnavailable, *UNREACHABLE, *REFUSING)):
        return kind(str(error) or type(error).__name__)
    return error


@contextmanager
def translated() -> Iterator[None]:
    """Around calls of redis-py: raises StoreUnavailable instead of redis-py's errors about the state of a server."""
    try:
        yield
    except Exception as error:
        translation = as_unavailable(error)
        if translation is error:
            raise
        raise translation from error
