"""The body of every error response (RFC 9457)."""

from __future__ import annotations

from pydantic import BaseModel


class FieldError(BaseModel):
    """What is wrong with one field of a request."""

    field: str
    message: str


class Problem(BaseModel):
    """An error (RFC 9457). `code` is stable, `detail` is for people, `request_id` also stands in the log. `errors`: the
    invalid fields of a request; `committed`: users whose interactions were stored in spite of the error.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str = ""
    errors: list[FieldError] = []
    committed: list[str] = []
