"""The studies of benchmarks/quality on small made-up data: they run, and what must hold by construction holds."""

import numpy as np
import pytest

from benchmarks.quality import adaptive, pruning, streams
from model.data.dataset import split_of
from model.serving.recommender import Recommender
from model.training.evaluation import rank_test_items, report
from model.training.train import train
from tests.synthetic import cyclic_dataset, small_config

CONFIG = small_config(max_epochs=2, fusion_max_epochs=1)


def test_restricting_keeps_order_and_drops_empty_users():
    dataset = cyclic_dataset(users=4, items=6, length=5)
    keep = dataset.owners() != 2
    keep[0] = False
    some = streams.restricted(dataset, keep)
    assert some.user_ids == ("u0", "u1", "u3")
    assert some.lengths().tolist() == [4, 5, 5]
    assert some.items.tolist() == dataset.items[keep].tolist()


def test_rounds_write_each_users_events_in_order():
    owner, events = np.array([3, 1, 3, 3, 1]), np.arange(5)
    assert [one.tolist() for one in streams._rounds(owner, events)] == [[1, 0], [4, 2], [3]]


def test_over_time_covers_the_stream(tmp_path):
    dataset = cyclic_dataset(users=30, items=12, length=20)
    study = streams.over_time(dataset, CONFIG, tmp_path)
    assert study["events"] == 180
    assert {len(curve) for curve in study["curves"].values()} == {6}
    assert all(0 <= point["hr@10"] <= 1 for curve in study["curves"].values() for point in curve)


def test_new_items_can_be_recommended_through_the_memory_alone(tmp_path):
    dataset = cyclic_dataset(users=60, items=40, length=15)
    study = streams.new_items(dataset, CONFIG, tmp_path)
    assert study["targets"] > 0
    assert study["new items, no memory"]["hr@10"] == 0
    assert study["new items, live memory"]["hr@10"] > 0


def test_new_users_are_only_those_held_back(tmp_path):
    dataset = cyclic_dataset(users=60, items=12, length=15)
    whole = Recommender.of(train(dataset, CONFIG, tmp_path / "whole"))
    study = streams.new_users(dataset, CONFIG, tmp_path, whole)
    known = np.random.default_rng(7).random(60) < 0.8
    assert study["users"] == (~known).sum()


@pytest.mark.parametrize(("length", "protocol"), [(11, "masked"), (15, "unmasked")])
def test_adaptive_study_reads_the_ranks(tmp_path, length, protocol):
    dataset = cyclic_dataset(length=length)
    tested = [rank_test_items(Recommender.of(train(dataset, CONFIG, tmp_path)), dataset)]
    study = adaptive.study(tested)
    rows = {(r["variant"], r["protocol"], r["store"]): r for r in report(tested, "x")["rows"]}
    assert study["own"]["ndcg@10"]["5"] == pytest.approx(rows["own-k-5", protocol, "train"]["ndcg@10"])
    assert study["collective"]["ndcg@10"]["adaptive"] == pytest.approx(rows["memory", protocol, "train"]["ndcg@10"])
    assert np.mean(study["own"]["by_entropy_quintile"]["10"]) == pytest.approx(study["own"]["ndcg@10"]["10"], abs=0.02)


def test_the_repeat_log_repeats_as_it_says():
    dataset = pruning.repeat_log(users=60, items=200)
    test_events = split_of(dataset).test
    repeated = np.mean(
        [dataset.items[e] in had for e, had in zip(test_events, dataset.history(test_events), strict=True)]
    )
    assert 0.35 < repeated < 0.75
    assert (np.diff(dataset.times)[np.diff(dataset.owners()) == 0] > 0).all()
