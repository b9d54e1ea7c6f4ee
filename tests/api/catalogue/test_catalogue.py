"""The live catalogue: what changed comes over in small pieces, every process sees it, a search holds nobody up."""

import asyncio

import httpx2
import msgspec
import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from api.catalogue.catalogue import CatalogueMirror
from api.http.app import create_app as create_api
from api.http.metrics import ApiMetrics
from api.memory.client import MemoryClient
from api.models.engine import Engine
from api.settings import ApiSettings
from memory_service.protocol.structs import CatalogueReply, Item
from memory_service.store.items import CatalogueItem
from memory_service.store.store import Store
from model.config import RulesConfig
from model.serving.recommender import Recommender
from tests.api.calls import ids, recommend
from tests.conftest import served


@pytest.fixture
def store(valkey_url, go) -> Store:
    store = Store(valkey_url, RulesConfig(), 5)
    yield store
    go(store.close())


def register(store: Store, *items: str, about: bytes = b"", hidden: bool = False, overwrite: bool = False):
    return store.register([CatalogueItem(item, about, hidden) for item in items], overwrite=overwrite)


def test_only_items_that_were_there_before_count_as_changed(store, go):
    go(register(store, "a", "b", about=b"{}"))
    go(register(store, "a", "c"))
    go(register(store, "b", about=b'{"n": 1}'))  # it has metadata already
    assert go(store.changed(0, 9)) == (0, {})
    go(register(store, "c", about=b'{"n": 2}'))
    go(register(store, "b", "new", hidden=True, overwrite=True))
    assert go(store.changed(0, 9)) == (
        2,
        {2: CatalogueItem("b", b"{}", True), 3: CatalogueItem("c", b'{"n": 2}', False)},
    )
    assert go(store.changed(1, 9)) == (2, {2: CatalogueItem("b", b"{}", True)})
    assert go(store.changed(1, 2)) == (2, {})
    assert go(store.changed(2, 9)) == (2, {})


def test_changes_too_long_ago_are_not_made_up(store, go, monkeypatch, valkey_url):
    monkeypatch.setattr("memory_service.store.items.CHANGES_KEPT", 3)
    go(register(store, *"abcde"))
    for item in "abcd":
        go(register(store, item, about=b"{}"))
    assert sorted(go(store.changed(1, 9))[1]) == [2, 3, 4]
    assert go(store.changed(0, 9)) == (4, None)
    assert go(store.changed(7, 9)) == (4, None)  # the revision of another catalogue
    with redis.Redis.from_url(valkey_url) as client:
        assert client.llen("ramrec:catalogue:{items}:changes") == 3


@pytest.mark.parametrize("number", [0, -1, 2**40, 2**63, -(2**70), 2**70])
def test_numbers_and_revisions_that_cannot_be_are_no_trouble(memory_url, number):
    for asked in ({"since": number}, {"since": 2, "revision": number}):
        answer = httpx2.get(f"{memory_url}/v1/catalogue", params=asked)
        assert answer.status_code == 200
        reply = msgspec.msgpack.decode(answer.content, type=CatalogueReply)
        assert reply.catalogue_size == 30
        assert len(reply.items) == (29 if "revision" in asked else 30 if number < 1 else 0)


@pytest.fixture
def engine(run, memory_url, go) -> Engine:
    async def opened() -> Engine:
        return Engine(Recommender.load(run), MemoryClient(memory_url, 5), ApiMetrics())

    engine = go(opened())
    yield engine
    go(engine.close())


@pytest.mark.parametrize("kept", [2, 100])
def test_the_mirror_is_the_catalogue_however_it_came_over(engine, store, go, monkeypatch, kept):
    monkeypatch.setattr("memory_service.store.items.CHANGES_KEPT", kept)
    monkeypatch.setattr("memory_service.service.catalogue.LISTED", 4)
    monkeypatch.setattr("api.catalogue.filters.RUN", 8)

    def check() -> None:
        go(engine.sync())
        everything = go(store.catalogue(1))[1]
        mirror = engine.catalogue
        assert [item.item_id for item in mirror.items] == [item.item_id for item in everything]
        assert [item.hidden for item in mirror.items] == [item.hidden for item in everything]
        assert mirror.hidden.tolist() == [n for n, item in enumerate(everything, start=1) if item.hidden]
        assert mirror.number_of == {item.item_id: n for n, item in enumerate(everything, start=1)}
        assert [item for run in mirror.filters.runs for item in run.items] == mirror.items
        titled = [(item.metadata or {}).get("n") == 1 for item in mirror.items]
        assert mirror.filters.mask({"n": {"eq": 1}})[1:].tolist() == titled
        assert sum(titled) == sum(item.about == b'{"n": 1}' for item in everything)

    check()
    assert engine.catalogue.size == 30
    before = engine.catalogue
    go(register(store, "i3", "new", "i7", about=b'{"n": 1}', overwrite=True))
    check()
    go(register(store, "i3", "i30", "another", hidden=True, overwrite=True))
    go(register(store, "i4", about=b'{"n": 1}', overwrite=True))
    check()
    go(register(store, "i3", overwrite=True))
    check()
    assert engine.catalogue.numbers(["another"]) == [32]
    assert (engine.catalogue is before) == (kept == 100)


def test_a_mirror_of_a_catalogue_that_is_gone_starts_anew(engine, store, go, valkey_url):
    go(engine.sync())
    with redis.Redis.from_url(valkey_url) as client:
        client.flushall()
    go(register(store, "only"))
    go(engine.sync())
    assert engine.catalogue.number_of == {"only": 1}


def test_what_one_process_hides_the_others_hide_too(run, memory_url, stack, monkeypatch):
    monkeypatch.setattr("api.http.lifespan.REFRESH_S", 0.01)
    one, other = (
        stack.enter_context(
            httpx2.Client(base_url=stack.enter_context(served(create_api(ApiSettings(run=run, memory_url=memory_url)))))
        )
        for _ in range(2)
    )
    assert "i1" in ids(recommend(other, top_n=3))
    assert one.patch("/items/i1", json={"hidden": True}).status_code == 200
    assert ids(recommend(one, top_n=3)) == ["i2", "i3", "i4"]  # at once
    while "i1" in ids(recommend(other, top_n=3)):
        pass
    assert ids(recommend(other, top_n=3)) == ["i2", "i3", "i4"]
    other.patch("/items/i1", json={"hidden": False, "metadata": {"title": "Back"}})
    while one.get("/items/i1").json()["metadata"] != {"title": "Back"}:
        pass
    assert ids(recommend(one, top_n=3)) == ["i1", "i2", "i3"]


def test_changes_of_one_item_at_the_same_time_are_all_kept(api_url, go):
    async def changed() -> list[int]:
        async with httpx2.AsyncClient(base_url=api_url) as client:
            changes = [{"metadata": {str(n): n}} for n in range(15)] + [{"hidden": True}]
            answers = await asyncio.gather(*(client.patch("/items/i1", json=change) for change in changes))
            return [answer.status_code for answer in answers]

    assert set(go(changed())) == {200}
    item = httpx2.get(f"{api_url}/items/i1").json()
    assert item["metadata"] == {"title": "One"} | {str(n): n for n in range(15)}
    assert item["hidden"] is True


def test_what_a_change_does_not_name_is_left_alone(store, go):
    go(register(store, "a", about=b"1", hidden=True, overwrite=True))
    go(store.register([CatalogueItem("a", b"2", False)], overwrite=True, flags=False))
    assert go(store.catalogue(1))[1] == [CatalogueItem("a", b"2", True)]
    go(register(store, "a", hidden=False, overwrite=True))
    assert go(store.catalogue(1))[1] == [CatalogueItem("a", b"2", False)]


def test_metadata_does_not_outgrow_its_limit_by_and_by(api_url):
    with httpx2.Client(base_url=api_url) as client:
        assert client.patch("/items/i1", json={"metadata": {"a": "x" * 40_000}}).status_code == 200
        refused = client.patch("/items/i1", json={"metadata": {"b": "x" * 40_000}})
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
        assert "at most 65536 bytes" in refused.json()["detail"]
        assert set(client.get("/items/i1").json()["metadata"]) == {"title", "a"}
        assert client.patch("/items/i1", json={}).json()["metadata"]["title"] == "One"


# ---------------------------------------------------------------------------------------------- search

TEXT = st.text(st.sampled_from("aAßs\0é"), max_size=4)
ITEM = st.builds(
    Item,
    st.text(st.sampled_from("aAßsé"), min_size=1, max_size=3),
    st.none() | st.dictionaries(st.sampled_from("xy"), TEXT | st.lists(TEXT, max_size=2) | st.just(1), max_size=2),
)


def mentions(item: Item, query: str) -> bool:
    texts = [item.item_id]
    for value in (item.metadata or {}).values():
        texts += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    return any(query.casefold() in text.casefold() for text in texts)


@given(st.lists(ITEM, max_size=9), TEXT, st.integers(1, 4))
def test_a_search_finds_what_a_look_at_every_item_finds(items, query, limit):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("api.catalogue.filters.RUN", 3)
        mirror = CatalogueMirror({})
        mirror.take(CatalogueReply(1, 0, items, len(items)))
        found = mirror.find(query, limit)
    assert found == [item for item in items if mentions(item, query)][:limit]


def test_the_catalogue_mirror_grows_and_changes_step_by_step():
    mirror = CatalogueMirror({"a": 1, "b": 2})
    mirror.take(CatalogueReply(1, 0, [Item("a")], 3))
    before = mirror.model_index
    mirror.take(CatalogueReply(2, 0, [Item("new"), Item("b", None, True)], 3))
    assert before.tolist() == [0, 1]  # the model's thread may still be reading it
    assert mirror.model_index.tolist() == [0, 1, 0, 2]
    assert mirror.number_of == {"a": 1, "new": 2, "b": 3}
    assert mirror.hidden.tolist() == [3]
    assert mirror.indices(np.array([[1, 3]])).tolist() == [[1, 2]]
    mirror.take(CatalogueReply(4, 2, [Item("c")], 4, [(1, Item("a", {"n": 1}, True)), (3, Item("b"))]))
    assert mirror.numbers(["a", "no", "c"]) == [1, 4]
    assert [item.metadata for item in mirror.items] == [{"n": 1}, None, None, None]
    assert (mirror.hidden.tolist(), mirror.revision) == ([1], 2)
