"""Logs with repeats and baskets: what is held out, asked for, trained on and measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import RulesConfig
from model.data.dataset import Dataset, Targets, last_basket, leave_one_out, split_of
from model.memory.habits import DAY_S, FEATURES
from model.serving.recommender import Recommender
from model.training.encoder_stage import Windows, next_item_loss, training_batches
from model.training.evaluation import evaluate, memory_space_of, rank_test_items
from model.training.memory_rules import EARLIEST, measured_rules, recent_targets
from model.training.metrics import basket_summary
from model.training.replay import replay, trajectory
from model.training.train import train
from tests.synthetic import cyclic_dataset, random_checkpoint, small_config


def dataset_of(*users: list[tuple[float, int]], items: int = 12) -> Dataset:
    """A dataset of events (time, item) of each user; whole baskets are held out."""
    lengths = [len(one) for one in users]
    events = [event for one in users for event in one]
    return Dataset(
        user_ids=tuple(f"u{n}" for n in range(len(users))),
        item_ids=tuple(f"i{n}" for n in range(1, items + 1)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.array([item for _, item in events], np.int32),
        times=np.array([time for time, _ in events], float),
        ratings=np.full(len(events), np.nan, np.float32),
        has_times=True,
        has_ratings=False,
        holdout="last-basket",
    )


BY_HAND = dataset_of(
    [(0, 1), (0, 2), (10, 1), (10, 3), (10, 4), (20, 2)],  # events 0 to 5: three baskets
    [(0, 5), (1, 5), (1, 1)],  # 6 to 8: two
    [(1, 2), (6, 2), (7, 2), (7, 3)],  # 9 to 12: three; the first at the time of the last one of the user before
    [],
)


def weekly_shop(users: int = 30, baskets: int = 12, items: int = 12, seed: int = 0) -> Dataset:
    """Every user has two favourites, each in most baskets, a day apart, and something else in each."""
    rng = np.random.default_rng(seed)
    histories = []
    for _ in range(users):
        favourites = rng.choice(items, 2, replace=False) + 1
        events = []
        for day in range(baskets):
            others = np.setdiff1d(np.arange(1, items + 1), favourites)
            basket = [int(item) for item in favourites if rng.random() < 0.8] + [int(rng.choice(others))]
            events += [(day * DAY_S, item) for item in basket]
        histories.append(events)
    return dataset_of(*histories, items=items)


@pytest.fixture(scope="module")
def shopping() -> Dataset:
    return weekly_shop()


@pytest.fixture(scope="module")
def trained(shopping, tmp_path_factory) -> Recommender:
    return Recommender.of(train(shopping, small_config(repeat_max_epochs=3), tmp_path_factory.mktemp("baskets")))


# --------------------------------------------------------------------------------------- what is held out


def test_what_opens_a_basket_and_what_repeats():
    opens, again = [True, False, True, False, False, True], [False, False, True, False, False, True]
    assert BY_HAND.opens().tolist() == [*opens, True, True, False, True, True, True, False]
    assert BY_HAND.is_repeat().tolist() == [*again, False, True, False, False, True, True, False]
    assert BY_HAND.repeats()


def test_the_last_two_baskets_are_held_out_where_there_are_three():
    split = last_basket(BY_HAND)
    assert split.train_end.tolist() == [2, 9, 10, 13]
    assert split.validation.tolist() == [2, -1, 10, -1]
    assert split.validation_end.tolist() == [5, -1, 11, -1]
    assert split.test.tolist() == [5, -1, 11, -1]
    assert split.test_end.tolist() == [6, -1, 13, -1]


def test_the_dataset_says_which_split_it_is():
    assert split_of(BY_HAND).test_end.tolist() == [6, -1, 13, -1]
    split = split_of(replace(BY_HAND, holdout="leave-one-out"))
    assert split.train_end.tolist() == leave_one_out(BY_HAND).train_end.tolist() == [4, 7, 11, 13]
    assert (split.validation.tolist(), split.validation_end.tolist()) == ([4, 7, 11, -1], [5, 8, 12, -1])
    assert (split.test.tolist(), split.test_end.tolist()) == ([5, 8, 12, -1], [6, 9, 13, -1])


def test_targets_are_all_items_of_a_basket_asked_before_its_first():
    split = last_basket(BY_HAND)
    validation = Targets.of(split.validation, split.validation_end)
    assert (validation.event.tolist(), validation.before.tolist()) == ([2, 3, 4, 10], [2, 2, 2, 10])
    test = Targets.of(split.test, split.test_end)
    assert (test.event.tolist(), test.before.tolist()) == ([5, 11, 12], [5, 11, 11])
    some = validation.take(np.array([True, False, False, True]))
    assert (len(some), some.event.tolist(), some.before.tolist()) == (2, [2, 10], [2, 10])
    assert len(Targets.of(np.array([-1, -1]), np.array([-1, -1]))) == 0


def test_the_rules_that_are_measured_on_the_training_part():
    """It has six events: two of the first user, three of the second, one of the third. One is a repeat; the gaps are
    0, 1 and 0 s.
    """
    rules = measured_rules(BY_HAND, RulesConfig())
    assert rules.repeat_share == pytest.approx(1 / 6, abs=1e-6)
    assert rules.longest_gap_s == pytest.approx(0.998)


def test_recent_targets_are_training_events_asked_before_their_baskets(shopping):
    config = small_config(repeat_positions=8).training
    targets, owner, split = recent_targets(shopping, config, 10**6), shopping.owners(), split_of(shopping)
    wanted = [
        event
        for event in range(len(shopping))
        if split.train_end[owner[event]] - 8 <= event < split.train_end[owner[event]]
    ]
    assert targets.event.tolist() == wanted
    assert shopping.opens()[targets.before].all()
    assert (shopping.times[targets.before] == shopping.times[targets.event]).all()
    assert (owner[targets.before] == owner[targets.event]).all()
    assert (shopping.positions()[targets.before] >= EARLIEST).all()
    few = recent_targets(shopping, config, 20)
    assert len(few) == 20
    assert set(few.event) <= set(wanted)


# ------------------------------------------------------------------------------------------- what is asked


def test_a_question_before_a_basket_sees_nothing_of_it():
    recommender = Recommender.of(random_checkpoint(items=12))
    space, split = memory_space_of(recommender), split_of(BY_HAND)
    test = Targets.of(split.test, split.test_end)

    def asked_of(dataset: Dataset):
        return replay(dataset, trajectory(dataset, recommender.encoder), space, test, k=5, habits=True)

    items = BY_HAND.items.copy()
    items[[5, 11, 12]] = [9, 10, 11]
    mine, other = asked_of(BY_HAND), asked_of(replace(BY_HAND, items=items))
    assert mine.banks.size.tolist() == [4, 0, 1, 0]
    assert mine.replay.times.tolist() == [20, 7, 7]
    own = mine.replay.retrieved.own
    assert [sorted(row[there].tolist()) for row, there in zip(own.item, own.valid, strict=True)] == [
        [1, 2, 3, 4],
        [2],
        [2],
    ]
    count = mine.replay.retrieved.habits[1, 0, FEATURES.index("log_count")]
    assert count == pytest.approx(np.log(2))
    assert not mine.replay.retrieved.present.any()
    for a, b in (
        (own.item, other.replay.retrieved.own.item),
        (own.similarity, other.replay.retrieved.own.similarity),
        (mine.replay.retrieved.habits, other.replay.retrieved.habits),
        (mine.replay.state, other.replay.state),
    ):
        assert np.allclose(a, b, atol=1e-6)


def test_a_question_within_a_basket_knows_its_earlier_items():
    recommender = Recommender.of(random_checkpoint(items=12))
    state, event = trajectory(BY_HAND, recommender.encoder), np.array([12, 4, 5])
    asked = replay(BY_HAND, state, memory_space_of(recommender), Targets(event, event), k=5, habits=True).replay
    assert asked.event.tolist() == [12, 4, 5]
    assert [sorted(row[row > 0].tolist()) for row in asked.retrieved.present] == [[2], [1, 3], []]
    assert asked.retrieved.habits[0, 0, FEATURES.index("log_count")] == pytest.approx(np.log(3))


# ---------------------------------------------------------------------------------------- what is measured


def test_figures_of_two_baskets_by_hand():
    """Basket 4 is found at ranks 1, 12 and 30, basket 9 at 11 and 25.

    The best three places are worth 1 + 1/log2(3) + 1/2 = 2.13093, the best two 1.63093.
    At 10: recall 1/3 and 0; gain 1 / 2.13093 = 0.469279 and 0; hit and not.
    At 20: recall 2/3 and 1/2; gain (1 + 1/log2(13)) / 2.13093 = (1 + 0.270238) / 2.13093 = 0.596096
    and 1/log2(12) / 1.63093 = 0.278943 / 1.63093 = 0.171033; both are hit.
    """
    figures = basket_summary(np.array([12, 11, 1, 25, 30]), np.array([4, 9, 4, 9, 4]))
    assert figures == {
        "basket-recall@10": pytest.approx(1 / 6),
        "basket-ndcg@10": pytest.approx(0.469279 / 2, abs=1e-6),
        "basket-phr@10": 0.5,
        "basket-recall@20": pytest.approx(7 / 12),
        "basket-ndcg@20": pytest.approx((0.596096 + 0.171033) / 2, abs=2e-6),
        "basket-phr@20": 1.0,
    }


def test_a_basket_of_more_than_ten_can_be_ranked_perfectly():
    figures = basket_summary(np.arange(1, 13), np.zeros(12, int))
    assert figures["basket-ndcg@10"] == figures["basket-ndcg@20"] == pytest.approx(1)
    assert (figures["basket-recall@10"], figures["basket-recall@20"]) == (pytest.approx(10 / 12), 1)


# ----------------------------------------------------------------------------------------- what is trained


def test_every_item_of_a_window_is_predicted_from_before_its_basket():
    """Event n takes item n + 1, so the items of a window tell where it begins."""
    times = [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 5, 6]
    dataset, config = dataset_of([(time, n + 1) for n, time in enumerate(times)], items=14), small_config()
    basket = [0, 0, 2, 2, 2, 5, 6, 6, 8, 8, 8, 8]  # the event that opens each one's
    found = []
    for seed in range(5):
        for batch in training_batches(dataset, np.ones(1, bool), config, np.random.default_rng(seed)):
            for items, before in zip(batch.targets, batch.before, strict=True):
                events = items[items > 0] - 1
                assert before[items > 0].tolist() == [max(basket[event] - events[0], 0) for event in events]
                found += events.tolist()
    assert sorted(found) == sorted(list(range(12)) * 5)


def test_the_loss_of_a_basket_does_not_depend_on_the_order_of_its_other_items():
    torch.manual_seed(0)
    checkpoint, settings = random_checkpoint(items=12), small_config().training
    encoder, before = Recommender.of(checkpoint).encoder, np.array([[0, 1, 1, 1]])
    losses = [
        next_item_loss(encoder, Windows(np.array([[5, *items]]), before), settings).item()
        for items in ([1, 2, 3], [3, 1, 2], [2, 3, 1])
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    in_order = next_item_loss(encoder, Windows(np.array([[5, 1, 2, 3]])), settings).item()
    assert in_order != pytest.approx(losses[0], abs=1e-3)


def test_training_measures_how_often_items_repeat(shopping, trained):
    rules, split = trained.config.rules, split_of(shopping)
    had, repeats, count = [set() for _ in range(shopping.users)], 0, 0
    for event, owner in enumerate(shopping.owners()):
        if event < split.train_end[owner]:
            repeats, count = repeats + (shopping.items[event] in had[owner]), count + 1
            had[owner].add(shopping.items[event])
    assert rules.repeat_share == pytest.approx(repeats / count, abs=1e-6)
    assert not rules.exclude_seen
    assert rules.activation.keys() == {*FEATURES, "similarity"}
    assert rules.longest_gap_s == DAY_S


def test_whole_baskets_are_evaluated(shopping, trained):
    tested, split = rank_test_items(trained, shopping), split_of(shopping)
    wanted = np.concatenate([np.arange(a, b) for a, b in zip(split.test, split.test_end, strict=True)])
    assert tested.basket.tolist() == np.repeat(split.test, split.test_end - split.test).tolist()
    assert tested.repeat.tolist() == shopping.is_repeat()[wanted].tolist()
    assert {len(ranks) for ranks in tested.ranks.values()} == {len(wanted)}
    report = evaluate([trained], shopping, "shop")
    rows = {(row["variant"], row["store"]): row for row in report["rows"]}
    assert {row["protocol"] for row in rows.values()} == {"unmasked"}
    for (variant, store), row in rows.items():
        ranks = tested.ranks[variant, "unmasked", store]
        assert row["basket-recall@10"] == basket_summary(ranks, tested.basket)["basket-recall@10"]
        assert row["repeat-share"] == pytest.approx(tested.repeat.mean())
        assert row["repeat-hr@10"] == pytest.approx(np.mean(ranks[tested.repeat] <= 10))
        assert row["explore-hr@10"] == pytest.approx(np.mean(ranks[~tested.repeat] <= 10))


def test_a_log_without_repeats_gives_a_model_without_a_repeat_head(tmp_path):
    checkpoint = train(cyclic_dataset(length=11), small_config(max_epochs=1), tmp_path)
    assert checkpoint.config.rules.activation == {}
    assert checkpoint.config.rules.repeat_share == 0
    assert checkpoint.config.rules.exclude_seen
    assert not checkpoint.config.fusion.repeats
    assert not Recommender.load(tmp_path).fusion.config.repeats
