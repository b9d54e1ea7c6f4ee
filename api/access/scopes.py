"""The check of a caller's API key against the scope that a route needs."""

from __future__ import annotations

from collections.abc import Mapping

from api.access.keys import Key, KeyRing, KeyScope
from api.http.problems import Forbidden, Unauthorized


def presented(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The key that a request carries: `Authorization: Bearer …`, otherwise `X-API-Key`."""
    sent = headers.get(b"authorization")
    if sent is not None and sent[:7].lower() == b"bearer ":
        return sent[7:].strip()
    return headers.get(b"x-api-key")


def admit(ring: KeyRing, scope: KeyScope, headers: Mapping[bytes, bytes]) -> Key:
    """The caller's key, which allows `scope`.

    Raises:
        Unauthorized: the request carries no key, or an unknown one. Forbidden: the key does not allow the scope.
    """
    sent = presented(headers)
    if sent is None:
        raise Unauthorized("an API key is required: Authorization: Bearer …, or X-API-Key")
    key = ring.find(sent)
    if key is None:
        raise Unauthorized("this API key is not known", known=False)
    if scope not in key.scopes:
        raise Forbidden(f"this needs an API key with the scope {scope}")
    return key
