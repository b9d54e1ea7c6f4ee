from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from model.memory.record import EncodeJob
from model.memory.retrieval import Entries, Retrieved
from model.serving.recommender import Query, Recommender, top_items
from tests.synthetic import habitual_config, random_checkpoint, random_memories

ITEMS = 30


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return Recommender.of(random_checkpoint(items=ITEMS))


@pytest.fixture(scope="module")
def habitual() -> Recommender:
    """One with a repeat head."""
    return Recommender.of(random_checkpoint(habitual_config(), items=ITEMS))


def queries(rows: int, seed: int = 0, **fields: object) -> list[Query]:
    rng = np.random.default_rng(seed)
    return [
        Query(rng.normal(size=16).astype(np.float32), seen=rng.integers(1, ITEMS + 1, 4), **fields) for _ in range(rows)
    ]


def test_a_batch_answers_like_its_requests_alone(recommender):
    memories, asked = random_memories(5, 6, ITEMS), queries(5)
    together = recommender.recommend(asked, memories, [False] * 5)
    for row, answer in enumerate(together):
        alone = recommender.recommend([asked[row]], memories.take(slice(row, row + 1)), [False])[0]
        assert alone.items.tolist() == answer.items.tolist()
        assert np.allclose(alone.scores, answer.scores, atol=1e-5)


def test_padding_of_memories_changes_no_score(recommender):
    memories, asked = random_memories(3, 4, ITEMS), queries(3)
    wide = Entries(*(np.pad(getattr(memories.own, name), ((0, 0), (0, 5))) for name in Entries.COLUMNS))
    padded = replace(memories, own=wide, habits=np.pad(memories.habits, ((0, 0), (0, 5), (0, 0))))
    for a, b in zip(
        recommender.recommend(asked, memories, [False] * 3),
        recommender.recommend(asked, padded, [False] * 3),
        strict=True,
    ):
        assert np.allclose(a.scores, b.scores, atol=1e-5)


def test_without_memories_the_encoder_alone_answers(recommender):
    state = np.random.default_rng(3).normal(size=(1, 16)).astype(np.float32)
    nothing = Retrieved.nothing(np.full(1, 0.5, np.float32))
    answer = recommender.recommend([Query(state[0], top_n=ITEMS)], nothing, [True])[0]
    with torch.inference_mode():
        shifted = torch.from_numpy(state) + recommender.fusion.shift
        plain = torch.log_softmax(recommender.encoder.logits(shifted), dim=1)[0].numpy()
    assert answer.explanation.gate == 0.0
    assert answer.explanation.influences == []
    assert not answer.explanation.memories.any()
    assert np.allclose(answer.scores, plain[answer.items], atol=1e-5)


def test_scores_are_log_probabilities_of_all_items(recommender):
    answer = recommender.recommend(queries(1, top_n=ITEMS), random_memories(1, 4, ITEMS, empty_row=False), [False])[0]
    assert len(answer.items) == ITEMS
    assert np.exp(answer.scores).sum() == pytest.approx(1.0, abs=1e-5)
    assert (np.diff(answer.scores) <= 0).all()


def test_memory_parts_add_up_to_the_fused_logit(recommender):
    memories, asked = random_memories(1, 6, ITEMS, empty_row=False), queries(1, top_n=ITEMS)
    answer = recommender.recommend(asked, memories, [True])[0]
    told = answer.explanation
    prediction = recommender.predict(asked[0].state[None], memories, [asked[0].seen])
    table = recommender.encoder.item.weight.detach().numpy()[answer.items]
    bias = np.where(np.isin(answer.items, asked[0].seen), recommender.fusion.repeat_bias.item(), 0.0)
    log_z = np.log(np.exp(recommender_logits(recommender, prediction, asked[0])).sum())
    assert np.allclose(told.state, (1 - told.gate) * (table @ asked[0].state), atol=1e-5)
    assert np.allclose(told.calibration, table @ recommender.fusion.shift.detach().numpy() + bias, atol=1e-5)
    assert told.log_z == pytest.approx(log_z, abs=1e-5)
    assert len(told.influences) == memories.own.valid.sum() + memories.collective.valid.sum()
    assert sum(influence.weight for influence in told.influences) == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(told.memories, sum(influence.part for influence in told.influences), atol=1e-6)
    model_share = prediction.log_p[0, answer.items].numpy()
    assert np.allclose(told.state + told.calibration + told.memories - told.log_z, model_share, atol=1e-4)


def test_explanations_of_a_batch_are_those_of_its_requests_alone(recommender):
    """Own and collective memories of different numbers, one row with none, one not explained."""
    memories, asked = random_memories(5, 6, ITEMS), queries(5, top_n=7)
    together = recommender.recommend(asked, memories, [True, True, False, True, True])
    assert together[2].explanation is None
    for row in (0, 1, 3, 4):
        mine = recommender.recommend([asked[row]], memories.take(slice(row, row + 1)), [True])[0].explanation
        told = together[row].explanation
        for name in ("gate", "copying", "log_z", "state", "calibration", "memories", "copied"):
            assert np.allclose(getattr(told, name), getattr(mine, name), atol=1e-5), name
        assert [(one.scope, one.entry) for one in told.influences] == [(o.scope, o.entry) for o in mine.influences]
        for one, other in zip(told.influences, mine.influences, strict=True):
            assert np.allclose(one.part, other.part, atol=1e-5)


@given(st.integers(0, 1000), st.integers(1, 8), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_parts_of_an_explanation_give_the_score(recommender, seed, width, unknown):
    """p·(1 − copied) = (1 − λ)·exp(state + calibration + Σ logit − log Z), and copied = Σ copied_m, for every item."""
    memories, asked = random_memories(3, width, ITEMS, seed), queries(3, seed, top_n=2 * ITEMS)
    if unknown:
        memories.collective.item[0, 0] = ITEMS + 3
    for answer in recommender.recommend(asked, memories, [True] * 3):
        told = answer.explanation
        logit = told.state + told.calibration + sum(one.part for one in told.influences)
        by_model = np.nan_to_num((1 - told.copying) * np.exp(logit - told.log_z))
        copied = sum((one.copied for one in told.influences), np.zeros(len(answer.items)))
        whole = np.exp(answer.scores)
        assert np.allclose(by_model + whole * copied, whole, rtol=1e-4)
        assert (copied * whole).sum() == pytest.approx(told.copying, abs=1e-5)
        assert np.array_equal(np.isnan(told.state), answer.items > ITEMS)


@given(st.integers(0, 1000), st.integers(1, 8), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_parts_give_the_score_with_a_repeat_head_too(habitual, seed, width, unknown):
    """A memory's part holds what it adds to its own item's logit, calibration what is added to what the user has at
    this very time.
    """
    memories, asked = random_memories(3, width, ITEMS, seed), queries(3, seed, top_n=2 * ITEMS)
    if unknown:
        memories.own.item[0, 0], memories.collective.item[0, 0] = 0, ITEMS + 3
    prediction = habitual.predict(np.stack([one.state for one in asked]), memories, [one.seen for one in asked])
    for row, answer in enumerate(habitual.recommend(asked, memories, [True] * 3)):
        told = answer.explanation
        assert np.exp(answer.scores).sum() == pytest.approx(1.0, abs=1e-4)
        logit = told.state + told.calibration + sum(one.part for one in told.influences)
        by_model = np.nan_to_num((1 - told.copying) * np.exp(logit - told.log_z))
        whole = np.exp(answer.scores)
        assert np.allclose(by_model + whole * told.copied, whole, rtol=1e-3)
        own = [one for one in told.influences if one.scope == "own"]
        assert [one.habit for one in own] == pytest.approx(prediction.added[row, [one.entry for one in own]].tolist())
        assert not any(one.habit for one in told.influences if one.scope == "collective")
        assert all(one.habit != 0 for one in own if memories.own.item[row, one.entry] > 0)


def test_what_a_memory_adds_counts_for_its_own_item_alone(habitual):
    memories, asked = random_memories(1, 3, ITEMS, empty_row=False), queries(1, top_n=ITEMS)
    told = habitual.recommend(asked, memories, [True])[0]
    without = replace(memories, habits=memories.habits[:, :, :0], present=memories.present[:, :0])
    plain = habitual.recommend(asked, without, [True])[0]
    place = {item: n for n, item in enumerate(plain.items.tolist())}
    for mine, other in zip(told.explanation.influences, plain.explanation.influences, strict=True):
        assert other.habit == 0
        for n, item in enumerate(told.items.tolist()):
            its_own = mine.scope == "own" and memories.own.item[0, mine.entry] == item
            assert mine.part[n] - other.part[place[item]] == pytest.approx(mine.habit * its_own, abs=1e-4)


def test_what_is_taken_at_this_very_time_bears_its_bias(habitual):
    memories, asked = random_memories(1, 3, ITEMS, empty_row=False), queries(1)
    one, none = (replace(memories, present=np.array([[item, 0]])) for item in (5, 0))
    state, seen = asked[0].state[None], [asked[0].seen]
    with_it, without = (habitual.predict(state, some, seen).logits[0, 1:] for some in (one, none))
    assert np.allclose((with_it - without).numpy(), np.where(np.arange(1, ITEMS + 1) == 5, -2, 0), atol=1e-5)


def recommender_logits(recommender, prediction, query):
    """Logits of all items by hand from the fused state."""
    table = recommender.encoder.item.weight.detach().numpy()[1:]
    bias = np.isin(np.arange(1, ITEMS + 1), query.seen) * recommender.fusion.repeat_bias.item()
    return table @ (prediction.fused.state[0].numpy() + recommender.fusion.shift.detach().numpy()) + bias


def test_copies_and_the_model_share_every_probability_exactly(recommender):
    memories = random_memories(1, 6, ITEMS, empty_row=False)
    asked = queries(1, top_n=ITEMS)
    answer = recommender.recommend(asked, memories, [True])[0]
    told = answer.explanation
    prediction = recommender.predict(asked[0].state[None], memories, [asked[0].seen])
    by_model = (1 - told.copying) * np.exp(prediction.log_p[0, answer.items].numpy())
    whole = np.exp(answer.scores)
    assert 0 < told.copying < 1
    assert np.allclose(by_model + told.copied * whole, whole, atol=1e-5)
    assert np.allclose(sum(influence.copied for influence in told.influences), told.copied)
    assert (told.copied * whole).sum() == pytest.approx(told.copying, abs=1e-5)
    copied = set(memories.collective.item[memories.collective.valid].tolist())
    assert {int(item) for item in answer.items[told.copied > 0]} == copied


def test_an_item_that_the_model_never_saw_is_recommended_when_others_took_it(recommender):
    memories = random_memories(1, 3, ITEMS, empty_row=False)
    memories.collective.item[0, 0] = ITEMS + 5
    answer = recommender.recommend(queries(1, top_n=ITEMS + 9), memories, [True])[0]
    place = answer.items.tolist().index(ITEMS + 5)
    assert answer.explanation.copied[place] == pytest.approx(1.0)
    assert len(answer.items) == ITEMS + 1
    assert np.exp(answer.scores).sum() == pytest.approx(1.0, abs=1e-5)


def test_the_repeat_bias_weighs_on_copies_too(recommender):
    memories = random_memories(1, 3, ITEMS, empty_row=False)
    item = int(memories.collective.item[0, 0])
    state = queries(1)[0].state[None]
    fresh = recommender.predict(state, memories, [np.array([], int)]).copying.weights[0, 0]
    had = recommender.predict(state, memories, [np.array([item])]).copying.weights[0, 0]
    assert had < fresh or memories.collective.valid.sum() == 1


def test_seen_items_carry_the_repeat_bias(recommender):
    state = np.random.default_rng(5).normal(size=16).astype(np.float32)
    memories = random_memories(2, 3, ITEMS, empty_row=False)
    same = memories.take(np.array([0, 0]))
    log_p = recommender.predict(np.stack([state, state]), same, [np.array([7]), np.array([], int)]).log_p
    difference = (log_p[0] - log_p[1])[1:].numpy()
    difference -= difference[0]  # what normalising takes from all alike
    assert difference[6] == pytest.approx(-1.5, abs=1e-5)
    assert np.allclose(np.delete(difference, 6), 0, atol=1e-5)


def test_excluded_items_and_candidates_are_respected(recommender):
    memories = random_memories(1, 3, ITEMS, empty_row=False)
    query = queries(1, excluded=np.array([0, 2, 3]), candidates=np.array([2, 3, 4, 5]), top_n=10)
    assert sorted(recommender.recommend(query, memories, [False])[0].items.tolist()) == [4, 5]


def test_an_item_unknown_to_the_model_is_a_memory_all_the_same(recommender):
    memories = random_memories(1, 3, ITEMS, empty_row=False)
    memories.own.item[0, 0] = 0
    answer = recommender.recommend(queries(1), memories, [True])[0]
    assert np.isfinite(answer.scores).all()
    assert len(answer.explanation.influences) == memories.own.valid.sum() + memories.collective.valid.sum()


def test_popularity_ranks_by_share(recommender):
    query = Query(np.zeros(16, np.float32), excluded=np.array([1]), top_n=3)
    assert recommender.most_popular(query).items.tolist() == [2, 3, 4]


def test_top_items_break_ties_by_index():
    scores = np.array([9.0, 1.0, 2.0, 2.0, -np.inf, 2.0], np.float32)
    asked = [Query(np.zeros(1, np.float32), top_n=top_n) for top_n in (2, 9)]
    two, all_ = top_items(np.stack([scores, scores]), asked)
    assert two[0].tolist() == [2, 3]
    assert all_[0].tolist() == [2, 3, 5, 1]
    assert all_[1].tolist() == [2, 2, 2, 1]
    assert top_items(scores[None].copy(), asked[:1])[0][0].tolist() == [2, 3]


@given(st.data())
def test_top_items_are_those_of_a_full_sort(data):
    width, rows = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    values = st.sampled_from([0.0, 1.0, 2.0, -np.inf])
    scores = np.array([[data.draw(values) for _ in range(width)] for _ in range(rows)], np.float32)
    some = st.lists(st.integers(0, width + 1), max_size=4).map(lambda items: np.array(items, np.int64))
    passing = st.none() | st.lists(st.booleans(), min_size=width + 2, max_size=width + 2).map(np.array)
    parts = (some, st.none() | some, st.integers(1, 14), passing)
    asked = [Query(np.zeros(1, np.float32), (), *map(data.draw, parts)) for _ in range(rows)]
    for row, (items, found) in enumerate(top_items(scores.copy(), asked)):
        barred, among, passing = set(asked[row].excluded.tolist()), asked[row].candidates, asked[row].passing
        pool = [i for i in range(1, width) if i not in barred and (among is None or i in among.tolist())]
        pool = [i for i in pool if passing is None or passing[i]]
        wanted = sorted((i for i in pool if scores[row, i] > -np.inf), key=lambda i: (-scores[row, i], i))
        assert items.tolist() == wanted[: asked[row].top_n]
        assert found.tolist() == scores[row, items].tolist()


def test_encode_gives_unit_keys_and_the_last_state(recommender):
    job = EncodeJob(0, np.array([1, 2, 0, 3], np.uint32), np.array([0, 2, -1]))
    keys, state = recommender.encode([job])[0]
    assert np.allclose(np.linalg.norm(keys, axis=1), 1, atol=1e-6)
    assert state.shape == (16,)
    assert np.allclose(keys[0], keys[2])
    assert recommender.encode([]) == []


def test_a_checkpoint_survives_the_disk(tmp_path, recommender):
    version = save_checkpoint(tmp_path, recommender.checkpoint)
    loaded = Recommender.load(tmp_path)
    memories, asked = random_memories(2, 3, ITEMS), queries(2)
    before, after = (r.recommend(asked, memories, [False] * 2) for r in (recommender, loaded))
    assert loaded.version == version
    assert [a.items.tolist() for a in before] == [a.items.tolist() for a in after]
    assert load_checkpoint(tmp_path, with_weights=False).weights == {}
    assert loaded.checkpoint.metadata == {"i1": {"title": "One"}}


@pytest.mark.parametrize("damage", ["weights", "header", "missing", "format", "swapped", "not-json"])
def test_a_damaged_checkpoint_is_refused_with_the_reason(tmp_path, damage):
    save_checkpoint(tmp_path, random_checkpoint())
    weights, header = tmp_path / "model.safetensors", tmp_path / "checkpoint.json"
    if damage == "weights":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 0xFF
        weights.write_bytes(content)
    elif damage == "header":
        header.write_text(header.read_text().replace('"dim": 16', '"dim": "many"'))
    elif damage == "missing":
        weights.unlink()
    elif damage == "format":
        header.write_text(header.read_text().replace('"format": 3', '"format": 99'))
    elif damage == "swapped":
        save_checkpoint(tmp_path / "other", random_checkpoint(seed=1))
        weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    else:
        header.write_text("{")
    expected = {
        "weights": "damaged",
        "header": "dim",
        "missing": "missing",
        "format": "99",
        "swapped": "versions differ",
        "not-json": "cannot read",
    }
    with pytest.raises(CheckpointError, match=expected[damage]):
        Recommender.load(tmp_path)
