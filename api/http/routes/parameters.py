"""Parameters that several routes take."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query
from starlette.convertors import Convertor, register_url_convertor

from api.http.schemas.fields import Identifier


class IdConvertor(Convertor[str]):
    """`{user_id:id}` in a path: any characters, including slashes and line breaks.

    Starlette's own convertors stop at line breaks: a user with one in the id could not be looked at or forgotten.
    """

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        """The id in a path."""
        return value

    def to_string(self, value: str) -> str:
        """An id for a path."""
        return value


register_url_convertor("id", IdConvertor())

UserId = Annotated[
    Identifier, Path(description="The user's id, percent-encoded.", openapi_examples={"user": {"value": "196"}})
]
ItemId = Annotated[
    Identifier, Path(description="The item's id, percent-encoded.", openapi_examples={"item": {"value": "50"}})
]
Limit = Annotated[int, Query(ge=1, le=1000, description="Maximum number of results.", examples=[10])]
