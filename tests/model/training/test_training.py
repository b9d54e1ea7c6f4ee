import math

import numpy as np
import pytest
import torch

from model.config import Config, ConfigError, load_config
from model.data.dataset import Targets, leave_one_out
from model.data.interactions import DatasetError
from model.network.encoder import SequenceEncoder
from model.serving.recommender import Recommender
from model.training.encoder_stage import Windows, next_item_loss, training_batches, validate_encoder
from model.training.evaluation import EvaluationError, check_items, evaluate, memory_space_of
from model.training.fusion_stage import fusion_targets
from model.training.metrics import ranks, relative_gain, summary
from model.training.optimisation import Progress, TrainingError, adamw, step
from model.training.replay import adaptive, replay, trajectory
from model.training.train import hold_out, train
from tests.synthetic import cyclic_dataset, random_checkpoint, small_config


class SimulatedCrashError(Exception):
    pass


def one_by_one(events: np.ndarray) -> Targets:
    """Each event is asked about by itself."""
    return Targets(events, events)


def test_the_encoder_learns_a_cycle(tmp_path):
    dataset = cyclic_dataset()
    reports = []
    train(dataset, small_config(max_epochs=40, learning_rate=0.01, patience=40), tmp_path, reports.append)
    encoder = [report for report in reports if report.stage == "encoder"]
    assert encoder[-1].loss < encoder[0].loss / 3
    assert max(report.validation["hr@5"] for report in encoder) > 0.9


@pytest.mark.parametrize("more", [{}, {"fusion_targets": "validation"}])
def test_equal_seeds_give_equal_checkpoints_and_an_interrupted_run_ends_the_same(tmp_path, more):
    dataset, config = cyclic_dataset(), small_config(max_epochs=4, **more)
    whole = train(dataset, config, tmp_path / "whole")

    def interrupt(report):
        if report.stage == "encoder" and report.epoch == 2:
            raise SimulatedCrashError

    with pytest.raises(SimulatedCrashError):
        train(dataset, config, tmp_path / "parts", interrupt)
    resumed_at = []
    parts = train(dataset, config, tmp_path / "parts", lambda report: resumed_at.append((report.stage, report.epoch)))
    assert resumed_at[0] == ("encoder", 3)
    assert parts.version == whole.version
    assert train(dataset, small_config(max_epochs=4, seed=1), tmp_path / "other").version != whole.version


def test_the_fusion_is_fitted_on_events_that_the_encoder_never_saw_and_judged_on_other_users():
    dataset = cyclic_dataset(users=40)
    split, owner, event = leave_one_out(dataset), dataset.owners(), np.arange(len(dataset))
    config = small_config().training
    held_out = hold_out(dataset.users, config)
    fitted, judging = fusion_targets(dataset, config, held_out)
    assert held_out.sum() == 6
    assert np.array_equal(fitted.event, np.flatnonzero(held_out[owner] & (event < split.train_end[owner])))
    assert np.array_equal(judging.event, split.validation)
    for targets in (fitted, judging):  # each is asked about alone
        assert np.array_equal(targets.before, targets.event)
    config = small_config(fusion_targets="validation").training
    held_out = hold_out(dataset.users, config)
    fitted, judging = fusion_targets(dataset, config, held_out)
    assert not held_out.any()
    assert np.array_equal(np.sort(np.concatenate([fitted.event, judging.event])), split.validation)
    assert (len(fitted), len(judging)) == (32, 8)


def test_a_run_of_another_config_is_not_resumed(tmp_path):
    dataset = cyclic_dataset()
    train(dataset, small_config(max_epochs=1), tmp_path)
    with pytest.raises(TrainingError, match="another config"):
        train(dataset, small_config(max_epochs=1, learning_rate=0.5), tmp_path)


@pytest.mark.parametrize("fusion_targets", ["held-out-users", "validation"])
def test_a_log_of_too_short_histories_is_refused(tmp_path, fusion_targets):
    with pytest.raises(DatasetError, match="no user has three events"):
        train(cyclic_dataset(length=2), small_config(fusion_targets=fusion_targets), tmp_path)


def test_a_loss_that_is_not_finite_is_refused():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(TrainingError, match="nan"):
        step(
            adamw(layer.parameters(), 0.1, 0.0),
            layer,
            layer(torch.full((1, 2), math.nan)).sum(),
        )


def test_every_training_interaction_is_a_target_once_and_nothing_else():
    dataset, config = cyclic_dataset(users=20, length=37), small_config()
    users = ~hold_out(dataset.users, config.training)
    for seed in range(3):
        batches = list(training_batches(dataset, users, config, np.random.default_rng(seed)))
        found = np.sort(np.concatenate([batch.targets[batch.targets > 0] for batch in batches]))
        ends = leave_one_out(dataset).train_end
        wanted = [dataset.items[dataset.offsets[u] : ends[u]] for u in np.flatnonzero(users)]
        assert found.tolist() == np.sort(np.concatenate(wanted)).tolist()
        assert max(batch.targets.shape[1] for batch in batches) <= config.encoder.window
        assert all(batch.before is None for batch in batches)


def test_the_loss_of_a_batch_is_the_mean_over_real_positions():
    torch.manual_seed(0)
    encoder = SequenceEncoder(small_config().encoder, 12).eval()
    settings = small_config().training
    together, short, long = (
        next_item_loss(encoder, Windows(np.array(items)), settings).item()
        for items in ([[3, 4, 0, 0], [5, 6, 7, 8]], [[3, 4]], [[5, 6, 7, 8]])
    )
    assert together == pytest.approx((short * 2 + long * 4) / 6, abs=1e-5)


def test_early_stopping_counts_from_the_best_epoch():
    progress = Progress(epoch=7, best_epoch=4)
    assert progress.over(max_epochs=100, patience=3)
    assert not progress.over(max_epochs=100, patience=4)
    assert progress.over(max_epochs=7, patience=99)


def test_replay_answers_from_earlier_events_alone():
    """The answer before event t is the same whether or not anything happens from t on."""
    dataset, checkpoint = cyclic_dataset(users=6, length=15, items=12), random_checkpoint(items=12)
    recommender = Recommender.of(checkpoint)
    space, state = memory_space_of(recommender), trajectory(dataset, recommender.encoder)
    every = replay(dataset, state, space, one_by_one(np.arange(len(dataset)))).replay
    middle = np.arange(7, len(dataset), 15)
    alone = replay(dataset, state, space, one_by_one(middle))
    picked = every.take(middle)
    assert alone.banks.size.tolist() == [7] * 6
    assert alone.replay.event.tolist() == picked.event.tolist() == middle.tolist()
    assert np.array_equal(picked.retrieved.own.item, alone.replay.retrieved.own.item)
    assert np.allclose(picked.state, alone.replay.state, atol=1e-5)
    assert np.array_equal(alone.replay.times, dataset.times[middle])


def test_replay_answers_in_the_order_of_its_questions():
    dataset, checkpoint = cyclic_dataset(users=6, length=15, items=12), random_checkpoint(items=12)
    recommender = Recommender.of(checkpoint)
    space, state = memory_space_of(recommender), trajectory(dataset, recommender.encoder)
    events = np.random.default_rng(1).permutation(len(dataset))[:40]
    ascending = replay(dataset, state, space, one_by_one(np.sort(events))).replay
    mixed = replay(dataset, state, space, one_by_one(events)).replay
    assert mixed.event.tolist() == events.tolist()
    again = mixed.take(np.argsort(events))
    assert np.array_equal(again.retrieved.own.item, ascending.retrieved.own.item)
    assert np.array_equal(again.state, ascending.state)


def test_replay_equals_writing_one_user_at_a_time():
    dataset, checkpoint = cyclic_dataset(users=5, length=30, items=12), random_checkpoint(items=12)
    recommender = Recommender.of(checkpoint)
    space, state = memory_space_of(recommender), trajectory(dataset, recommender.encoder)
    last = one_by_one(np.arange(29, len(dataset), 30))
    together = replay(dataset, state, space, last)
    for user in range(5):
        alone = replay(dataset, state, space, last.take(slice(user, user + 1)))
        assert alone.banks.size[user] == together.banks.size[user]
        for name, values in together.banks.fields.items():
            assert np.array_equal(values[user], alone.banks.fields[name][user], equal_nan=True)
        assert np.array_equal(adaptive(alone.replay).own.item[0, :3], adaptive(together.replay).own.item[user, :3])


def test_history_is_strictly_earlier():
    dataset = cyclic_dataset(users=2, length=4, items=12)
    assert [one.tolist() for one in dataset.history(np.array([0, 2, 7]))] == [
        [],
        dataset.items[:2].tolist(),
        dataset.items[4:7].tolist(),
    ]


def test_the_report_has_every_variant_under_both_protocols(tmp_path):
    dataset = cyclic_dataset(length=11)
    runs = [Recommender.of(train(dataset, small_config(seed=seed), tmp_path / str(seed))) for seed in (0, 1)]
    report = evaluate(runs, dataset, "cycle")
    rows = {(row["variant"], row["protocol"], row["store"]): row for row in report["rows"]}
    variants = {variant for variant, _, _ in rows}
    assert variants >= {"encoder", "own", "collective", "memory", "own-k-5", "collective-k-20", "shuffled"}
    assert {store for variant, _, store in rows if variant == "memory"} == {"train", "live", "strict"}
    assert {store for variant, _, store in rows if variant == "own"} == {"none"}
    assert all((variant, "masked", store) in rows for variant, _, store in rows)
    for row in rows.values():
        assert row["seeds"] == 2
        assert 0 <= row["ndcg@5"] <= row["ndcg@10"] <= row["hr@10"] <= 1
    one = evaluate(runs[:1], dataset, "cycle"), evaluate(runs[1:], dataset, "cycle")
    mean = np.mean([report["rows"][0]["mrr"] for report in one])
    assert report["rows"][0]["mrr"] == pytest.approx(mean)
    assert 0 <= report["entropy"]["mean"] <= 1
    gains = {(gain["variant"], gain["protocol"], gain["store"]): gain for gain in report["gains"]}
    memory, base = rows["memory", "masked", "train"], rows["encoder+calibration", "masked", "none"]
    assert gains["memory", "masked", "train"]["gain"] == pytest.approx(memory["ndcg@10"] / base["ndcg@10"] - 1)


def test_logs_with_repeats_are_evaluated_unmasked_with_metrics_of_repeats(tmp_path):
    dataset = cyclic_dataset()
    recommender = Recommender.of(train(dataset, small_config(), tmp_path))
    rows = evaluate([recommender], dataset, "cycle")["rows"]
    assert {row["protocol"] for row in rows} == {"unmasked"}
    assert {row["variant"] for row in rows} >= {"encoder", "own", "collective", "memory", "own-k-5", "shuffled"}
    assert not any("repeat-hr@10" in row for row in rows)  # all 40 test items are repeats: the 15th of 12 in a circle


def test_a_run_is_not_evaluated_on_other_items():
    with pytest.raises(EvaluationError, match="30 items"):
        check_items(Recommender.of(random_checkpoint(items=30)), cyclic_dataset(items=12))


@pytest.mark.parametrize("length", [6, 15])
def test_validation_masks_earlier_items_only_in_logs_without_repeats(length):
    dataset = cyclic_dataset(items=12, length=length)
    encoder = SequenceEncoder(small_config().encoder, 12)
    with torch.no_grad():  # all items have the same score: ties count as better
        encoder.item.weight[1:] = 1.0
    ranked = 12 if length == 15 else 12 - (length - 2)
    assert dataset.repeats() == (length == 15)
    assert validate_encoder(encoder, dataset)["mrr"] == pytest.approx(1 / ranked)


def test_metrics_by_hand():
    scores = np.array([[-np.inf, 0.9, 0.5, 0.5, 0.1], [-np.inf, 0.1, 0.2, 0.3, 0.4]])
    assert ranks(scores, np.array([2, 4])).tolist() == [3, 1]  # ties count as better
    figures = summary(np.array([1, 3, 7, 11]))
    assert figures["hr@5"] == 0.5
    assert figures["hr@10"] == 0.75
    assert figures["ndcg@5"] == pytest.approx((1 + 0.5) / 4)
    assert figures["ndcg@10"] == pytest.approx((1 + 0.5 + 1 / 3) / 4)
    assert figures["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 7 + 1 / 11) / 4)


def test_a_config_names_what_is_wrong(tmp_path):
    file = tmp_path / "c.toml"
    for text, message in (
        ("[encoder]\nwidth = 3\n", "encoder.width: unknown key"),
        ("[encoder]\ndim = -1\n", "encoder.dim"),
        ("[fusion]\nheads = 7\n", "fusion.heads"),
        ("[encoder\n", "not TOML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(file)
    with pytest.raises(ConfigError, match="ml-100k"):
        load_config(tmp_path / "none.toml")
    assert isinstance(load_config("ml-100k"), Config)


def test_relative_gain_is_a_paired_bootstrap():
    rng = np.random.default_rng(1)
    without = rng.random(400)
    gain = relative_gain(without * 1.1, without)
    assert [gain[name] for name in ("gain", "low", "high")] == pytest.approx([0.1, 0.1, 0.1], abs=1e-5)
    noise = relative_gain(rng.permutation(without), without)
    assert noise["low"] < 0 < noise["high"]
    assert noise["gain"] == pytest.approx(0, abs=1e-9)
