"""Ids in paths: `{user_id:id}` takes any characters, slashes and line ends too. Starlette's own convertors stop at line
ends: a user with one in the id could be neither looked at nor forgotten.
"""

from __future__ import annotations

from starlette.convertors import Convertor, register_url_convertor


class IdConvertor(Convertor[str]):
    """An id, as it stands."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        """From the path."""
        return value

    def to_string(self, value: str) -> str:
        """Into a path."""
        return value


register_url_convertor("id", IdConvertor())
