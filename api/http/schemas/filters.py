"""The filter language of `POST /recommend`: conditions on the metadata of items."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from api.http.schemas.fields import Identifier

Number = Annotated[int, Field(ge=-(2**63), lt=2**64)] | float
"""Numbers that metadata can hold."""
Text = Annotated[str, Field(max_length=1024)]
Operand = bool | Number | Text
Operands = Annotated[list[Operand], Field(min_length=1, max_length=1000)]
Bound = Number | Text


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Condition(TypedDict, total=False):
    """A condition on one attribute of an item; all operators that are given must hold. An attribute that is a list
    stands for its elements: `eq` and `any` require one element to equal the value or one of the values, `all` requires
    every value, `ne` and `none` require that there is none; one element must lie within all of `gt`, `gte`, `lt` and
    `lte` (numbers, or texts compared by code point). An item without the attribute (or with null) satisfies only `ne`,
    `none` and `exists: false`. Booleans, numbers and texts never equal each other.
    """

    eq: Operand
    ne: Operand
    any: Operands
    all: Operands
    none: Operands
    gt: Bound
    gte: Bound
    lt: Bound
    lte: Bound
    exists: bool


OPERATORS = ", ".join(Condition.__annotations__)


def _known_operators(value: Any) -> Any:
    if isinstance(value, dict) and (unknown := [name for name in value if name not in Condition.__annotations__]):
        raise ValueError(f"{str(unknown[0])[:50]!r} is not an operator; the operators are {OPERATORS}")
    return value


def _comparable(value: Condition) -> Condition:
    if not value:
        raise ValueError(f"a condition needs at least one of {OPERATORS}")
    bounds: list[Any] = [bound for name, bound in value.items() if name in ("gt", "gte", "lt", "lte")]
    if len({isinstance(bound, str) for bound in bounds}) > 1:
        raise ValueError("the bounds of a condition must be all numbers or all texts")
    return value


Filter = Annotated[
    dict[Identifier, Annotated[Condition, BeforeValidator(_known_operators), AfterValidator(_comparable)]],
    Field(max_length=16, examples=[{"genres": {"any": ["Comedy"]}, "year": {"gte": 1990}}]),
]
"""Attribute of an item's metadata → condition."""
