"""Metadata filters: the language, the masks against a look at every item, and the whole way through the service."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from api.filters import KEPT, Filters, extended
from api.schemas import Filter
from memory_service.schemas import Item

FILMS = [
    Item("a", {"genres": ["Comedy", "Drama"], "year": 1985, "title": "Ähre"}),
    Item("b", {"genres": "Comedy", "year": 1990.0, "title": "brick", "ok": True}),
    Item("c", {"genres": [], "year": [1980, 2010], "title": None, "ok": 1}),
    Item("d", None),
    Item("e", {"genres": ["Drama", ["Comedy"], {"x": "Comedy"}], "year": "1990", "ok": False, "extra": {"deep": 1}}),
]


def filters_of(items: list[Item]) -> Filters:
    filters = Filters()
    filters.runs = extended((), items)
    return filters


def found(items: list[Item], wanted: Filter) -> str:
    """Ids of the items that a filter lets through."""
    TypeAdapter(Filter).validate_python(wanted, strict=True)
    mask = filters_of(items).mask(wanted)
    return "".join(item.item_id for item, passes in zip(items, mask[1:], strict=True) if passes)


@pytest.mark.parametrize(
    ("wanted", "those"),
    [
        ({}, "abcde"),
        ({"genres": {"any": ["Comedy"]}}, "ab"),  # an element, or the value itself; not what is nested deeper
        ({"genres": {"eq": "Drama"}}, "ae"),
        ({"genres": {"all": ["Drama", "Comedy"]}}, "a"),
        ({"genres": {"none": ["Drama", "Crime"]}}, "bcd"),
        ({"genres": {"ne": "Comedy"}}, "cde"),
        ({"genres": {"exists": True}}, "abce"),
        ({"title": {"exists": False}}, "cde"),  # null is as good as nothing
        ({"extra": {"exists": True}}, "e"),
        ({"extra": {"none": [1]}}, "abcde"),
        ({"year": {"gte": 1990}}, "bc"),
        ({"year": {"gt": 1990}}, "c"),
        ({"year": {"gt": 1980, "lt": 2010}}, "ab"),  # one value within both: not 1980 for one, 2010 for the other
        ({"year": {"eq": 1990}}, "b"),
        ({"year": {"eq": "1990"}}, "e"),
        ({"year": {"lte": "2"}}, "e"),
        ({"title": {"gte": "b", "lt": "c"}}, "b"),
        ({"title": {"gt": "c"}}, "a"),  # by code point
        ({"ok": {"eq": True}}, "b"),
        ({"ok": {"eq": 1}}, "c"),
        ({"ok": {"any": [0, False]}}, "e"),
        ({"genres": {"eq": "Comedy", "ne": "Drama"}, "year": {"lt": 2000}}, "b"),
        ({"nothing like it": {"lt": 3}}, ""),
    ],
)
def test_what_a_filter_lets_through(wanted, those):
    assert found(FILMS, wanted) == those


VALUE = st.sampled_from([True, False, 0, 1, 1.0, 1.5, -2, 2**53, 2**53 + 1, float(2**53), "", "1", "a", "B", "é"])
ATTRIBUTE = VALUE | st.none() | st.lists(VALUE | st.none() | st.just([1]), max_size=3) | st.just({"a": 1})
ITEM = st.none() | st.dictionaries(st.sampled_from("xy"), ATTRIBUTE, max_size=2)
NUMBER_OR_TEXT = VALUE.filter(lambda value: not isinstance(value, bool))
SOME = st.lists(VALUE, min_size=1, max_size=3)
CONDITION = st.fixed_dictionaries(
    {},
    optional={"eq": VALUE, "ne": VALUE, "any": SOME, "all": SOME, "none": SOME, "exists": st.booleans()}
    | dict.fromkeys(("gt", "gte", "lt", "lte"), NUMBER_OR_TEXT),
)
COMPARE = {
    "gt": lambda value, bound: value > bound,
    "gte": lambda value, bound: value >= bound,
    "lt": lambda value, bound: value < bound,
    "lte": lambda value, bound: value <= bound,
}


def is_valid(condition: dict) -> bool:
    try:
        TypeAdapter(Filter).validate_python({"x": condition}, strict=True)
    except ValidationError:
        return False
    return True


def passes(attribute: object, condition: dict) -> bool:
    """What the language means, told once more and slowly."""
    values = attribute if isinstance(attribute, list) else [attribute]
    values = [value for value in values if isinstance(value, bool | int | float | str)]

    def same(one: object, other: object) -> bool:
        return one == other and len({isinstance(one, bool), isinstance(other, bool)}) == 1

    def holds(wanted: object) -> bool:
        return any(same(value, wanted) for value in values)

    def inside(value: object) -> bool:
        return not isinstance(value, bool) and all(
            isinstance(value, str) == isinstance(bound, str) and COMPARE[name](value, bound)
            for name, bound in bounds.items()
        )

    bounds = {name: bound for name, bound in condition.items() if name in COMPARE}
    checks = {
        "eq": lambda wanted: holds(wanted),
        "ne": lambda wanted: not holds(wanted),
        "any": lambda wanted: any(map(holds, wanted)),
        "all": lambda wanted: all(map(holds, wanted)),
        "none": lambda wanted: not any(map(holds, wanted)),
        "exists": lambda wanted: (attribute is not None) == wanted,
    }
    rest = condition.keys() - bounds.keys()
    return all(checks[name](condition[name]) for name in rest) and (not bounds or any(map(inside, values)))


def by_hand(items: list[Item], wanted: dict) -> list[bool]:
    return [
        all(passes((item.metadata or {}).get(name), condition) for name, condition in wanted.items()) for item in items
    ]


@given(st.lists(ITEM, max_size=12), st.dictionaries(st.sampled_from("xy"), CONDITION.filter(is_valid), max_size=2))
def test_masks_are_what_a_look_at_every_item_gives(attributes, wanted):
    items = [Item(f"i{n}", metadata) for n, metadata in enumerate(attributes)]
    assert filters_of(items).mask(wanted)[1:].tolist() == by_hand(items, wanted)


STEP = st.tuples(st.lists(ITEM, max_size=4), st.dictionaries(st.integers(0, 20), ITEM, max_size=2))


@given(st.lists(STEP, min_size=1, max_size=6), CONDITION.filter(is_valid), CONDITION.filter(is_valid))
def test_a_catalogue_that_grows_and_changes_is_filtered_as_it_is_now(steps, one, other):
    filters, items = Filters(), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("api.filters.RUN", 3)
        for new, changes in steps:
            items += [Item(f"i{len(items) + n}", metadata) for n, metadata in enumerate(new)]
            changed = [place for place in changes if place < len(items)]
            for place in changed:
                items[place] = Item(items[place].item_id, changes[place])
            filters.runs = extended(filters.runs, items, changed)
            assert [item for run in filters.runs for item in run.items] == items
            for wanted in ({"x": one}, {"y": other}, {"x": one, "y": other}):
                assert filters.mask(wanted)[1:].tolist() == by_hand(items, wanted)
                assert filters.is_ready(wanted)


def test_only_what_changed_is_looked_at_again(monkeypatch):
    monkeypatch.setattr("api.filters.RUN", 2)
    filters = filters_of(FILMS)
    before, mask = filters.runs, filters.mask({"year": {"gte": 1990}})
    filters.runs = extended(before, [*FILMS[:2], Item("c", {"year": 2000}), *FILMS[3:], Item("f", {"year": 1995})], [2])
    assert [one is other for one, other in zip(before, filters.runs, strict=True)] == [True, False, False]
    assert not filters.is_ready({"year": {"gte": 1990}})
    assert filters.mask({"year": {"gte": 1990}}).tolist() == [False, False, True, True, False, False, True]
    assert mask.tolist() == [False, False, True, True, False, False]  # somebody may still be reading it


def test_masks_are_kept_for_the_last_filters_only():
    filters = filters_of(FILMS)
    first = filters.mask({"year": {"eq": 0}})
    assert filters.mask({"year": {"eq": 0}}) is first
    for year in range(1, KEPT):
        filters.mask({"year": {"eq": year}})
    assert filters.mask({"year": {"eq": 0}}) is first  # asked for again, so others go first
    filters.mask({"year": {"eq": KEPT}})
    assert [filters.is_ready({"year": {"eq": year}}) for year in (0, 1, 2)] == [True, False, True]


def test_an_item_of_which_nothing_is_known_passes_what_items_without_the_attribute_pass():
    filters = filters_of(FILMS)
    wanted = [{"a": {"ne": 1}}, {"a": {"exists": False}}, {"a": {"eq": 1}}, {"a": {"lt": 1}}, {}]
    assert [bool(filters.mask(one)[0]) for one in wanted] == [True, True, False, False, True]
