"""Large catalogues: what the index finds and the shortlist scores, held against scoring everything."""

from dataclasses import replace

import numpy as np
import pytest

from model.memory.retrieval import Retrieved
from model.serving.item_index import ItemTableIndex
from model.serving.recommender import Query, Recommender
from model.serving.shortlist import FETCH
from tests.synthetic import habitual_config, random_checkpoint, random_memories, small_config

ITEMS = 20_000
DIM = 16
ROWS = 8


@pytest.fixture(scope="module")
def exact() -> Recommender:
    return Recommender.of(random_checkpoint(items=ITEMS))


@pytest.fixture(scope="module")
def quick(exact) -> Recommender:
    """The same model, with an index."""
    return Recommender(exact.checkpoint, exact.encoder, exact.fusion, exact_items=1000)


@pytest.fixture(scope="module")
def memories() -> Retrieved:
    return random_memories(ROWS, 20, ITEMS)


@pytest.fixture(scope="module")
def habitual() -> tuple[Recommender, Recommender]:
    """A model with a repeat head, scoring everything, and with an index."""
    exact = Recommender.of(random_checkpoint(habitual_config(), items=ITEMS))
    return exact, Recommender(exact.checkpoint, exact.encoder, exact.fusion, exact_items=1000)


@pytest.fixture(scope="module")
def baskets(memories) -> Retrieved:
    """The same users, each with a basket open: of an own memory that others have too, of an item that only others have,
    and of one that is in no memory. One of their memories the model does not know.
    """
    own, others = memories.own.item.copy(), memories.collective.item.copy()
    others[:, 0] = np.where(memories.collective.valid[:, 0], own[:, 0], 0)
    own[:, 2] = 0
    present = np.stack([own[:, 0], others[:, 1], np.arange(1, ROWS + 1)], axis=1)
    present[0] = 0
    collective = replace(memories.collective, item=others)
    return replace(memories, own=replace(memories.own, item=own), collective=collective, present=present)


def queries(seed: int = 0, **fields: object) -> list[Query]:
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    return [Query(state, **{"seen": rng.integers(1, ITEMS + 1, 60), "top_n": 100} | fields) for state in states]


def unlike(exact: Recommender, quick: Recommender, asked: list[Query], memories: Retrieved) -> float:
    """The largest difference of a score; the items have to be the same ones in the same order, but for ties."""
    none, worst = [False] * len(asked), 0.0
    for wanted, found in zip(*(one.recommend(asked, memories, none) for one in (exact, quick)), strict=True):
        assert len(wanted.items) == len(found.items)
        worst = max(worst, float(np.abs(wanted.scores - found.scores).max(initial=0)))
        moved = wanted.items != found.items
        assert np.allclose(wanted.scores[moved], found.scores[moved], atol=2e-3)
    return worst


def clustered(items: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around centres, as long as cosine scores make them; row 0 is padding."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(200, dim))
    table = centres[rng.integers(0, 200, items + 1)] + 0.7 * rng.normal(size=(items + 1, dim))
    table *= 3.78 / np.linalg.norm(table, axis=1, keepdims=True)
    table[0] = 0
    return table.astype(np.float32)


def log_z(index: ItemTableIndex, asked: np.ndarray) -> np.ndarray:
    products = index.nearest(asked, FETCH)[1]
    return index.log_z(asked, products, products)


@pytest.mark.parametrize("dim", [64, 48, 15])
def test_the_index_finds_the_nearest_and_knows_their_products(dim):
    table, asked = clustered(ITEMS, dim), clustered(50, dim, seed=1)[1:]
    found, products = ItemTableIndex(table).nearest(asked, FETCH)
    every = asked @ table[1:].T
    wanted = np.argsort(-every, axis=1)[:, :100] + 1
    recall = np.mean([len(np.intersect1d(*rows)) / 100 for rows in zip(wanted, found[:, :100], strict=True)])
    assert recall >= 0.99
    assert np.allclose(products, np.take_along_axis(every, found - 1, 1), atol=1e-4)
    assert (np.diff(products, axis=1) <= 0).all()
    assert found.min() > 0


def test_log_z_is_estimated_closely_and_exactly_where_the_sample_is_everything(monkeypatch):
    table, asked = clustered(ITEMS, 64), clustered(50, 64, seed=1)[1:]
    exact = np.log(np.exp((asked @ table[1:].T).astype(np.float64)).sum(axis=1))
    index = ItemTableIndex(table)
    assert np.abs(log_z(index, asked) - exact).max() < 1e-3
    monkeypatch.setattr("model.serving.item_index.SAMPLED", 4000)
    index = ItemTableIndex(table)
    errors = log_z(index, asked) - exact
    assert np.abs(errors).max() < 0.1
    assert abs(errors.mean()) < 0.02


def test_items_that_are_all_alike_count_in_full(monkeypatch):
    monkeypatch.setattr("model.serving.item_index.SAMPLED", 4000)
    table = np.tile(clustered(1, DIM)[1], (ITEMS + 1, 1))
    index = ItemTableIndex(table)
    assert log_z(index, table[:1])[0] == pytest.approx(table[0] @ table[0] + np.log(ITEMS), abs=1e-4)


def test_answers_are_those_of_scoring_everything(exact, quick, memories):
    assert quick.index is not None
    assert exact.index is None
    assert unlike(exact, quick, queries(), memories) < 1e-3


def test_without_memories_too(exact, quick):
    assert unlike(exact, quick, queries(), Retrieved.nothing(np.full(ROWS, 0.5, np.float32))) < 1e-3


def test_scores_with_cosine_and_sketch():
    checkpoint = random_checkpoint(small_config({"score": "cosine", "sketch": 8}), items=ITEMS)
    exact = Recommender.of(checkpoint)
    quick = Recommender(checkpoint, exact.encoder, exact.fusion, exact_items=1000)
    asked = [replace(one, state=np.tile(one.state, 2)[: DIM + 8]) for one in queries()]
    assert unlike(exact, quick, asked, random_memories(ROWS, 20, ITEMS)) < 1e-3


@pytest.mark.parametrize("bias", [-30.0, 30.0])
def test_items_that_the_user_had_get_the_repeat_bias(exact, quick, memories, monkeypatch, bias):
    monkeypatch.setattr(exact.fusion.repeat_bias, "data", exact.fusion.repeat_bias.new_tensor(bias))
    near = exact.recommend(queries(top_n=700), memories, [False] * ROWS)
    asked = [replace(one, seen=best.items[:400]) for one, best in zip(queries(top_n=20), near, strict=True)]
    assert unlike(exact, quick, asked, memories) < 5e-3


@pytest.mark.parametrize("present", [-8.0, 4.0])
@pytest.mark.parametrize("lift", [1.0, 12.0])
def test_what_the_user_comes_back_to_is_lifted_as_where_everything_is_scored(
    habitual, baskets, monkeypatch, lift, present
):
    repeats = habitual[0].fusion.repeats
    monkeypatch.setattr(repeats.present, "data", repeats.present.new_tensor(present))
    monkeypatch.setattr(repeats.layers[-1].weight, "data", repeats.layers[-1].weight.detach() * lift)
    had = [np.concatenate([a, b, [7, 9]]) for a, b in zip(baskets.own.item, baskets.present, strict=True)]
    asked = [replace(one, seen=seen) for one, seen in zip(queries(), had, strict=True)]
    added = habitual[1].predict(np.stack([one.state for one in asked]), baskets, had).added
    assert added.abs().max() > 1
    assert unlike(*habitual, asked, baskets) < 2e-3
    candidates = np.unique(np.concatenate(had))
    assert unlike(*habitual, [replace(one, candidates=candidates) for one in asked], baskets) < 2e-3


def test_explanations_with_a_repeat_head_are_those_of_scoring_everything(habitual, baskets):
    had = [np.concatenate([a, b]) for a, b in zip(baskets.own.item, baskets.present, strict=True)]
    candidates = np.unique(np.concatenate([*had, np.arange(40)]))
    asked = [replace(one, seen=seen, candidates=candidates) for one, seen in zip(queries(), had, strict=True)]
    for wanted, found in zip(*(one.recommend(asked, baskets, [True] * ROWS) for one in habitual), strict=True):
        mine, theirs = found.explanation, wanted.explanation
        assert [one.habit for one in mine.influences] == pytest.approx(
            [one.habit for one in theirs.influences], abs=1e-3
        )
        logit = mine.state + mine.calibration + mine.memories
        by_model = (1 - mine.copying) * np.exp(logit - mine.log_z)
        assert np.allclose(by_model + mine.copied * np.exp(found.scores), np.exp(found.scores), rtol=1e-3)


def test_exclusions_leave_the_list_full(exact, quick, memories):
    near = exact.recommend(queries(top_n=1000), memories, [False] * ROWS)
    asked = [replace(one, excluded=best.items) for one, best in zip(queries(), near, strict=True)]
    assert unlike(exact, quick, asked, memories) < 1e-3
    answers = quick.recommend(asked, memories, [False] * ROWS)
    assert all(len(answer.items) == 100 for answer in answers)


def test_far_more_exclusions_than_are_ever_fetched(exact, quick, memories):
    excluded = np.random.default_rng(0).permutation(ITEMS)[: ITEMS - 150] + 1
    assert unlike(exact, quick, queries(excluded=excluded), memories) < 1e-3


@pytest.mark.parametrize("scored", [16_384, 2])
@pytest.mark.parametrize("count", [5, 300, 15_000])
def test_candidates_are_the_only_ones_returned(exact, quick, memories, monkeypatch, scored, count):
    monkeypatch.setattr("model.serving.shortlist.SCORED", scored)
    candidates = np.append(np.random.default_rng(1).permutation(ITEMS)[:count], [0, ITEMS + 9])
    asked = queries(candidates=candidates, excluded=candidates[:3])
    assert unlike(exact, quick, asked, memories) < 1e-3
    for answer in quick.recommend(asked, memories, [False] * ROWS):
        assert set(answer.items) <= set(candidates[3:-1])
        assert len(answer.items) >= min(100, count - 3)


@pytest.mark.parametrize("scored", [16_384, 2])
@pytest.mark.parametrize("count", [0, 5, 300, 5_000, 15_000])
def test_only_what_passes_is_returned(exact, quick, memories, monkeypatch, scored, count):
    monkeypatch.setattr("model.serving.shortlist.SCORED", scored)
    passing = np.random.default_rng(1).permutation(ITEMS + 10) < count
    asked = queries(passing=passing)
    assert unlike(exact, quick, asked, memories) < 1e-3
    for answer in quick.recommend(asked, memories, [False] * ROWS):
        assert passing[answer.items].all()
        assert len(answer.items) >= min(100, passing[1 : ITEMS + 1].sum())
    among = queries(passing=passing, candidates=np.arange(0, ITEMS, 2))
    assert unlike(exact, quick, among, memories) < 1e-3
    for answer in quick.recommend(among, memories, [False] * ROWS):
        assert len(answer.items) == min(100, passing[2:ITEMS:2].sum())
        assert not (answer.items % 2).any()


def test_a_long_list(exact, quick, memories):
    assert unlike(exact, quick, queries(top_n=1000), memories) < 1e-3
    assert unlike(exact, quick, queries(top_n=ITEMS + 5), memories) < 1e-3


def test_copies_lift_items_from_anywhere_and_those_the_model_never_saw(exact, quick, memories):
    unknown = replace(memories, collective=replace(memories.collective, item=memories.collective.item.copy()))
    unknown.collective.item[:, 0] = ITEMS + 5
    assert unlike(exact, quick, queries(), unknown) < 1e-3
    for row, answer in enumerate(quick.recommend(queries(top_n=ITEMS), unknown, [False] * ROWS)):
        assert set(unknown.collective.item[row][unknown.collective.valid[row]]) <= set(answer.items)


def test_explanations_add_up_as_where_everything_is_scored(exact, quick, memories):
    for wanted, found in zip(
        *(one.recommend(queries(top_n=5), memories, [True] * ROWS) for one in (exact, quick)), strict=True
    ):
        assert found.items.tolist() == wanted.items.tolist()
        mine, theirs = found.explanation, wanted.explanation
        assert mine.gate == pytest.approx(theirs.gate, abs=1e-5)
        for name in ("copying", "log_z", "state", "calibration", "memories", "copied"):
            assert np.allclose(getattr(mine, name), getattr(theirs, name), atol=1e-3), name
        for one, other in zip(mine.influences, theirs.influences, strict=True):
            assert np.allclose(one.part, other.part, atol=1e-5)
        logit = mine.state + mine.calibration + mine.memories
        by_model = (1 - mine.copying) * np.exp(logit - mine.log_z)
        assert np.allclose(by_model + mine.copied * np.exp(found.scores), np.exp(found.scores), rtol=1e-4)


def test_a_batch_answers_like_its_requests_alone_and_again(quick, memories):
    asked = queries()
    together, again = (quick.recommend(asked, memories, [False] * ROWS) for _ in range(2))
    for row, answer in enumerate(together):
        alone = quick.recommend([asked[row]], memories.take(slice(row, row + 1)), [False])[0]
        assert alone.items.tolist() == answer.items.tolist() == again[row].items.tolist()
        assert np.allclose(alone.scores, answer.scores, atol=1e-5)
        assert answer.scores.tolist() == again[row].scores.tolist()


def test_another_index_of_the_same_model_answers_the_same(exact, quick, memories):
    other = Recommender(exact.checkpoint, exact.encoder, exact.fusion, exact_items=1000)
    for a, b in zip(*(one.recommend(queries(), memories, [False] * ROWS) for one in (quick, other)), strict=True):
        assert a.items.tolist() == b.items.tolist()
        assert a.scores.tolist() == b.scores.tolist()


@pytest.mark.parametrize("candidates", [None, np.array([0, 7, 3, 5, ITEMS + 2]), np.arange(40, ITEMS)])
def test_popularity_looks_as_far_as_it_must(quick, candidates):
    query = Query(np.zeros(DIM, np.float32), excluded=np.array([2, 3, 50]), candidates=candidates, top_n=6)
    wanted = [item for item in range(1, ITEMS) if item not in (2, 3, 50)]
    wanted = [item for item in wanted if candidates is None or item in candidates][:6]
    answer = quick.most_popular(query)
    assert answer.items.tolist() == wanted
    passing = np.isin(np.arange(ITEMS + 3), wanted[::2])
    assert quick.most_popular(replace(query, passing=passing)).items.tolist() == wanted[::2]
    assert np.allclose(answer.scores, np.log(quick.checkpoint.popularity[wanted]))
