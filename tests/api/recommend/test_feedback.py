"""What became of recommendations: ids that carry it, and what /metrics makes of them."""

import re
from collections.abc import Callable
from contextlib import ExitStack

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.http.app import create_app
from api.http.schemas.memories import Interaction
from api.recommend.feedback import LIFETIME_S, LISTED, Feedback, RecommendationIds, labels
from api.settings import ApiSettings
from tests.conftest import served

NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=60)
K = st.integers(0, 100)


@given(NAMES, K, K, st.lists(NAMES, max_size=LISTED + 5))
def test_an_id_says_what_was_put_into_it_to_every_process_with_the_key(user, own_k, collective_k, items):
    made = RecommendationIds("key").make(user, own_k, collective_k, items)
    assert len(made.encode()) <= 256
    assert re.fullmatch(r"[A-Za-z0-9_-]+", made)
    shown = RecommendationIds("key").read(made, user)
    assert (shown.own_k, shown.collective_k) == (own_k, collective_k)
    assert all(shown.holds(item) for item in items[:LISTED])
    assert RecommendationIds("other").read(made, user) is None
    assert RecommendationIds("key").read(made, user + "x") is None


@given(st.integers(0, 53), st.sampled_from("-_ABCabc019"))
def test_a_changed_id_is_unknown(place, letter):
    made = RecommendationIds().make("u", 13, 66, [f"i{n}" for n in range(8)])
    changed = made[:place] + letter + made[place + 1 :]
    assert (RecommendationIds().read(changed, "u") is None) == (changed != made)


@pytest.mark.parametrize("text", ["", "a", "a3c9b1d2e4f54c0b8f6a7d8e9f0a1b2c", "ü", "=" * 9, "A" * 256, "AQ==AQ"])
def test_what_is_no_id_is_unknown(text):
    assert RecommendationIds().read(text, "u") is None


def test_ids_are_all_different_and_one_for_nobody_is_anybodys():
    ids = RecommendationIds()
    made = {ids.make(None, 0, 0, ["i1"]) for _ in range(1000)}
    assert len(made) == 1000
    assert ids.read(made.pop(), "u").holds("i1")


def test_items_that_were_not_listed_are_no_hits():
    shown = RecommendationIds().read(RecommendationIds().make("u", 1, 1, [f"i{n}" for n in range(10)]), "u")
    assert sum(shown.holds(f"other{n}") for n in range(10_000)) < 10  # 1.5 expected of 2 bytes an item


def test_old_ids_are_unknown(monkeypatch):
    made = RecommendationIds().make("u", 1, 1, [])
    at = RecommendationIds().read(made, "u").at
    for when, known in ((at + LIFETIME_S - 1, True), (at + LIFETIME_S + 1, False), (at - 3600, False)):
        monkeypatch.setattr("api.recommend.feedback.time.time", lambda when=when: float(when))
        assert (RecommendationIds().read(made, "u") is not None) == known


def test_scope_and_range_of_k():
    assert labels(0, 0) == (("any", "any"), ("none", "0"))
    assert labels(13, 0) == (("any", "any"), ("own", "11-20"))
    assert labels(2, 100) == (("any", "any"), ("own", "1-2"), ("collective", "51-100"))


def test_what_is_remembered_of_answers_is_bounded(monkeypatch):
    monkeypatch.setattr("api.recommend.feedback.REMEMBERED", 100)
    feedback = Feedback()
    memory = {"own": {"k": 1, "retrieved": 1}, "collective": {"k": 0, "retrieved": 0}}
    for _ in range(110):
        made = feedback.answered("u", memory, ["i"])
        feedback.taken([Interaction.model_construct(user_id="u", item_id="i", recommendation_id=made)])
    assert len(feedback._counted) == 100
    assert feedback._hits["own", "1-2"] == 110


# ---------------------------------------------------------------------------------------- end to end


@pytest.fixture
def api(memory_url, run, stack: ExitStack) -> Callable[[], httpx2.Client]:
    """Another api process over the same memory."""

    def start() -> httpx2.Client:
        url = stack.enter_context(served(create_app(ApiSettings(run=run, memory_url=memory_url, feedback_key="k"))))
        return stack.enter_context(httpx2.Client(base_url=url))

    return start


def took(client: httpx2.Client, user: str, item: str, **more: object) -> dict[str, object]:
    response = client.post("/memories", json={"interactions": [{"user_id": user, "item_id": item, **more}]})
    assert response.status_code == 200
    return response.json()


def figures(client: httpx2.Client) -> dict[str, float]:
    """What /metrics says about feedback, by name and labels."""
    lines = re.findall(r"^ramrec_api_(\S+) (\S+)$", client.get("/metrics").text, re.M)
    kept = ("feedback", "recommendations", "clicks", "hits", "click_through", "hit_rate")
    return {name: float(value) for name, value in lines if name.split("{")[0].removesuffix("_total") in kept}


def test_hit_rate_and_click_through_by_scope_and_k(api):
    client = api()
    for n in range(1, 6):
        for user in ("u", "v", "w"):
            took(client, user, f"i{n}")
    answers = [client.post("/recommend", json={"user_id": "u", "top_n": 3}).json() for _ in range(4)]
    nobody = client.post("/recommend", json={"top_n": 3}).json()
    own_k, collective_k = answers[0]["memory"]["own"]["k"], answers[0]["memory"]["collective"]["k"]
    assert 1 <= own_k <= 6 <= collective_k
    (_, own), (_, others) = labels(own_k, collective_k)[1:]
    listed = answers[0]["items"][0]["item_id"]
    first, second, _, _ = (answer["recommendation_id"] for answer in answers)
    took(client, "u", listed, recommendation_id=first)
    took(client, "u", answers[0]["items"][1]["item_id"], recommendation_id=first)  # the same answer once more
    took(client, "u", "not listed", recommendation_id=second)
    took(client, "w", nobody["items"][2]["item_id"], recommendation_id=nobody["recommendation_id"])
    found = figures(client)
    for scope, k in (("own", own), ("collective", others)):
        labelled = f'{{k="{k}",scope="{scope}"}}'
        assert found[f"recommendations_total{labelled}"] == 4
        assert found[f"clicks_total{labelled}"] == 2
        assert found[f"hits_total{labelled}"] == 1
        assert found[f"click_through{labelled}"] == 0.5
        assert found[f"hit_rate{labelled}"] == 0.25
    assert found['hit_rate{k="0",scope="none"}'] == 1
    assert found['recommendations_total{k="any",scope="any"}'] == 5
    assert found['hit_rate{k="any",scope="any"}'] == 0.4
    assert found['click_through{k="any",scope="any"}'] == 0.6


def test_a_batch_and_two_processes(api):
    one, other = api(), api()
    asked = [{"user_id": "u", "top_n": 2}, {"user_id": "v", "top_n": 2}]
    answers = one.post("/recommend/batch", json={"requests": asked}).json()["results"]
    for answer in answers:
        took(other, answer["user_id"], answer["items"][0]["item_id"], recommendation_id=answer["recommendation_id"])
    assert figures(one)['recommendations_total{k="any",scope="any"}'] == 2
    assert figures(other)['hits_total{k="any",scope="any"}'] == 2


def test_what_is_forged_repeated_or_refused_does_not_count(api):
    client = api()
    answer = client.post("/recommend", json={"user_id": "u", "top_n": 2}).json()
    made, item = answer["recommendation_id"], answer["items"][0]["item_id"]
    assert took(client, "u", item, recommendation_id="made up")["accepted"] == 1
    assert took(client, "v", item, recommendation_id=made)["accepted"] == 1
    for accepted in (1, 0, 0):  # sent again
        event = {"timestamp": 1e9, "event_id": "e", "recommendation_id": made}
        assert took(client, "u", item, **event)["accepted"] == accepted
    took(client, "u", item, timestamp=-1, recommendation_id=made)
    took(client, "u", item)
    found = figures(client)
    assert found['feedback_total{outcome="unknown"}'] == 2
    assert found['feedback_total{outcome="hit"}'] == 1
    assert found['feedback_total{outcome="other"}'] == 0
    assert found['hits_total{k="any",scope="any"}'] == 1
