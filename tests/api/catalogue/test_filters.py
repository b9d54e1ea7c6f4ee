"""Metadata filters: the language, the masks against a look at every item, and the whole way through the service."""

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from api.catalogue.filters import KEPT, Filters, extended
from api.http.app import create_app as create_api
from api.http.schemas.filters import Filter
from api.settings import ApiSettings
from memory_service.protocol.structs import Item
from tests.api.calls import ids, recommend, remember, scores
from tests.conftest import served

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
        patched.setattr("api.catalogue.filters.RUN", 3)
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
    monkeypatch.setattr("api.catalogue.filters.RUN", 2)
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


def test_attributes_that_no_item_has_leave_nothing_behind():
    filters = filters_of(FILMS)
    for n in range(KEPT * 3):
        assert filters.mask({f"made up {n}": {"exists": False}}).all()
    assert filters.mask({"year": {"gte": 1990}}).sum() == 2
    assert [list(run.columns) for run in filters.runs] == [["year"]]


def test_an_item_of_which_nothing_is_known_passes_what_items_without_the_attribute_pass():
    filters = filters_of(FILMS)
    wanted = [{"a": {"ne": 1}}, {"a": {"exists": False}}, {"a": {"eq": 1}}, {"a": {"lt": 1}}, {}]
    assert [bool(filters.mask(one)[0]) for one in wanted] == [True, True, False, False, True]


# ------------------------------------------------------------------------------------------ end to end

GENRES = ("Comedy", "Drama", "Crime")


@pytest.fixture
def client(api_url, stack) -> httpx2.Client:
    """A service whose item iN is of GENRES[N % 3] and of year 1980 + N."""
    client = stack.enter_context(httpx2.Client(base_url=api_url))
    for n in range(1, 31):
        metadata = {"genres": [GENRES[n % 3]], "year": 1980 + n}
        assert client.put(f"/items/i{n}", json={"metadata": metadata}).status_code == 200
    return client


CRIME = {"genres": {"any": ["Crime"]}}
LATE_CRIME = CRIME | {"year": {"gte": 1990}}
LATE = [f"i{n}" for n in range(11, 31, 3)]
ASKED = [
    {"user_id": "u"},
    {"user_id": "stranger"},
    {},
    {"sequence": ["i4", "i5"]},
    {"user_id": "u", "sequence": ["i3"]},
]


@pytest.mark.parametrize("asked", ASKED)
def test_the_best_of_those_that_pass_are_returned_whatever_answers(client, asked):
    remember(client, ("u", "i1"), ("u", "i2"), ("v", "i2"), ("w", "i3"))
    everything = recommend(client, **asked, top_n=30)
    wanted = [item for item in ids(everything) if item in LATE]
    assert len(wanted) >= 6
    answer = recommend(client, **asked, top_n=4, filter=LATE_CRIME)
    assert ids(answer) == wanted[:4]
    assert answer["source"] == everything["source"]
    assert scores(answer) == pytest.approx({item: scores(everything)[item] for item in wanted[:4]}, abs=1e-4)
    assert ids(recommend(client, **asked, top_n=30, filter=LATE_CRIME)) == wanted
    assert ids(recommend(client, **asked, top_n=30, filter={})) == ids(everything)


def test_everything_that_restricts_an_answer_holds_at_once(client):
    remember(client, ("u", "i11"), ("u", "i1"))
    client.patch("/items/i14", json={"hidden": True})
    asked = {"user_id": "u", "top_n": 30, "filter": LATE_CRIME, "exclude_items": ["i17"]}
    assert sorted(ids(recommend(client, **asked))) == ["i20", "i23", "i26", "i29"]
    assert sorted(ids(recommend(client, **asked, exclude_seen=False))) == ["i11", "i20", "i23", "i26", "i29"]
    assert ids(recommend(client, **asked, candidates=["i26", "i27", "i5", "i14", "i17", "nope"])) == ["i26"]


def test_an_answer_may_be_empty(client):
    for asked in ASKED:
        answer = client.post("/recommend", json=asked | {"filter": {"genres": {"eq": "Western"}}, "explain": True})
        assert (answer.status_code, answer.json()["items"]) == (200, [])
        assert ids(recommend(client, **asked, filter=CRIME, candidates=["i1", "i3"])) == []


def test_each_request_of_a_batch_has_a_filter_of_its_own(client):
    remember(client, ("u", "i1"), ("v", "i2"))
    filters = [LATE_CRIME, None, {"year": {"lt": 1990}}, {"genres": {"none": ["Crime", "Drama"]}}, CRIME, CRIME]
    requests = [{"user_id": "uv"[n % 2], "top_n": 30, "filter": one} for n, one in enumerate(filters)]
    together = client.post("/recommend/batch", json={"requests": requests}).json()["results"]
    assert [ids(answer) for answer in together] == [ids(recommend(client, **request)) for request in requests]
    assert [len(ids(answer)) for answer in together] == [7, 29, 8, 10, 10, 9]


def test_a_change_of_metadata_counts_at_once(client):
    assert "i1" not in ids(recommend(client, filter=CRIME, top_n=30))
    client.patch("/items/i1", json={"metadata": {"genres": "Crime"}})
    assert ids(recommend(client, filter=CRIME, top_n=30))[0] == "i1"
    client.put("/items/i1", json={})
    assert "i1" not in ids(recommend(client, filter=CRIME, top_n=30))
    assert ids(recommend(client, filter={"genres": {"exists": False}}, top_n=30)) == ["i1"]


def test_without_a_catalogue_nothing_is_known_of_any_item(run, stack):
    api = create_api(ApiSettings(run=run, memory_url="http://127.0.0.1:9"))
    client = stack.enter_context(httpx2.Client(base_url=stack.enter_context(served(api))))
    answer = recommend(client, user_id="u", filter=CRIME)
    assert (answer["items"], answer["memory"]["degraded"]) == ([], True)
    assert ids(recommend(client, filter={"genres": {"none": ["Crime"]}}, top_n=2)) == ["i1", "i2"]


@pytest.mark.parametrize(
    ("wanted", "field", "told"),
    [
        ({"year": {"like": 3}}, "filter.year", "'like' is not an operator; the operators are eq, ne, any, all,"),
        ({"year": {}}, "filter.year", "at least one of eq,"),
        ({"year": {"gt": 1, "lt": "z"}}, "filter.year", "all numbers or all texts"),
        ({"year": {"gt": True}}, "filter.year.gt", "valid number"),
        ({"year": {"eq": None}}, "filter.year.eq", "valid string"),
        ({"year": {"eq": [1]}}, "filter.year.eq", "valid boolean"),
        ({"year": {"any": []}}, "filter.year.any", "at least 1 item"),
        ({"year": {"any": [1] * 1001}}, "filter.year.any", "at most 1000"),
        ({"year": {"eq": "x" * 1025}}, "filter.year.eq", "at most 1024"),
        ({"year": {"exists": 1}}, "filter.year.exists", "valid boolean"),
        ({"year": 1990}, "filter.year", "should be"),
        ({"": {"eq": 1}}, "filter.", "1 to 256 bytes"),
        ({str(n): {"eq": n} for n in range(17)}, "filter", "at most 16"),
        (["year"], "filter", "should be"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused_with_the_field_named(client, wanted, field, told):
    answer = client.post("/recommend", json={"filter": wanted})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["errors"][0]["field"].startswith(field)
    assert told in answer.text


# ------------------------------------------------------------------------------------- a new item's life


def test_an_item_the_model_never_saw_is_recommended_once_others_took_it(client):
    context = ["i4", "i9", "i13"]
    ask = {"user_id": "anna", "scopes": ["collective"], "top_n": 30}
    remember(client, *(("anna", item, 1.6e9 + n) for n, item in enumerate(context)))
    about = {"genres": ["Crime"], "year": 2026}
    put = client.put("/items/brand new", json={"metadata": about})
    one = {"item_id": "brand new", "title": "brand new", "metadata": about, "hidden": False}
    assert put.json() == one | {"known_to_model": False, "cluster": None}
    assert "brand new" not in ids(recommend(client, **ask))
    for other in ("bert", "cleo"):
        remember(client, *((other, item, 1.6e9 + n) for n, item in enumerate([*context, "brand new"])))
    fresh = {"year": {"gte": 2020}}
    assert "brand new" in ids(recommend(client, **ask))
    assert ids(recommend(client, **ask, filter=fresh)) == ["brand new"]
    assert "brand new" in ids(recommend(client, **ask, filter=LATE_CRIME))
    assert "brand new" not in ids(recommend(client, **ask, filter={"year": {"lt": 2020}}))
    both = recommend(client, **ask, candidates=["brand new", "i20"])
    assert (sorted(ids(both)), both["unknown_items"]) == (["brand new", "i20"], ["brand new"])
    assert "brand new" in ids(recommend(client, sequence=context, top_n=30, filter=fresh))
    because = recommend(client, **ask, filter=fresh, explain=True)["items"][0]["because"]
    assert because[0]["item_id"] == "brand new"
    assert because[0]["copied"] > 0

    best = ids(recommend(client, **ask | {"top_n": 3}, candidates=["brand new", "i20", "i21", "i22"]))
    assert len(best) == 3
    assert client.patch("/items/brand new", json={"hidden": True}).status_code == 200
    assert "brand new" not in ids(recommend(client, **ask))
    assert ids(recommend(client, **ask, filter=fresh)) == []
    left = ids(recommend(client, **ask | {"top_n": 3}, candidates=["brand new", "i20", "i21", "i22"]))
    assert sorted(left) == ["i20", "i21", "i22"]
    client.patch("/items/brand new", json={"hidden": False})
    assert ids(recommend(client, **ask, filter=fresh)) == ["brand new"]
