"""The repeat head, and which parts of a fitted fusion are kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.config import Config, FusionConfig
from model.data.dataset import Dataset, Targets, split_of
from model.network.fusion import MemoryFusion, MemoryTokens, RepeatHead
from model.serving.recommender import Recommender
from model.training.distributed import ALONE
from model.training.evaluation import memory_space_of
from model.training.fusion_stage import _calibrate, _Fit, _leave_out, _no_memory, memory_ranks, set_parts
from model.training.replay import adaptive, collective, replay, trajectory
from model.training.train import train
from tests.synthetic import cyclic_dataset, habitual_config, random_checkpoint, random_memories, small_config


def repeat_head() -> RepeatHead:
    torch.manual_seed(0)
    head = RepeatHead(FusionConfig()).eval()
    with torch.no_grad():
        head.layers[-1].weight.normal_()
        head.layers[-1].bias.fill_(3.0)
    return head


@torch.inference_mode()
def test_the_repeat_head_adds_nothing_for_padding_and_items_that_the_model_does_not_know():
    memories = random_memories(4, 5, 30)
    memories.own.item[0, 0] = 0
    memories.own.item[1, 0] = 31  # beyond the model's items
    tokens = MemoryTokens.of(memories, 30)
    added = repeat_head()(tokens, torch.zeros(4, 5)).numpy()
    there = memories.own.valid.copy()
    there[[0, 1], 0] = False
    assert (added[~there] == 0).all()
    assert (added[there] != 0).all()
    assert there.any(axis=1).tolist()[-1] is False


def with_head(fusion):
    fusion.repeats.load_state_dict(repeat_head().state_dict())
    return fusion.eval()


@torch.inference_mode()
def test_the_repeat_head_sees_the_models_own_probability_only_if_the_config_says_so():
    tokens, unsure, sure = MemoryTokens.of(random_memories(4, 5, 30), 30), torch.full((4, 5), -9.0), torch.zeros(4, 5)
    looking, blind = (with_head(MemoryFusion(FusionConfig(repeat_log_p=looks), 32)).own_lift for looks in (True, False))
    assert not torch.equal(looking(tokens, unsure), looking(tokens, sure))
    assert torch.equal(blind(tokens, unsure), blind(tokens, sure))


@torch.inference_mode()
def test_a_new_repeat_head_changes_nothing():
    memories = random_memories(4, 5, 30)
    tokens = MemoryTokens.of(memories, 30)
    fusion = MemoryFusion(FusionConfig(heads=2), 16).eval()
    assert not fusion.own_lift(tokens, torch.zeros(4, 5)).any()
    assert not fusion.present_lift(tokens).any()
    assert fusion.seen_bias == 0


def test_without_its_repeat_head_a_model_answers_as_without_habits():
    recommender = Recommender.of(random_checkpoint(habitual_config()))
    memories, states = random_memories(4, 5, 30), np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    told = replace(memories, habits=memories.habits[:, :, :0], present=memories.present[:, :0])
    seen = [np.array([3, 4])] * 4
    with_it = recommender.predict(states, memories, seen).scores()
    set_parts(recommender.fusion, repeats=False)
    without = recommender.predict(states, memories, seen).scores()
    assert torch.allclose(without[:, 1:], recommender.predict(states, told, seen).scores()[:, 1:])
    assert not torch.allclose(without[:-1, 1:], with_it[:-1, 1:], atol=1e-2)


# ------------------------------------------------------------------------------ what is kept of the fusion


def judged(dataset: Dataset, config: Config, recommender: Recommender) -> _Fit:
    """A fit whose validation questions are asked with the encoder of a model."""
    split, space, state = split_of(dataset), memory_space_of(recommender), trajectory(dataset, recommender.encoder)
    asked = replay(dataset, state, space, Targets.of(split.validation, split.validation_end)).replay
    asked = collective(dataset, state, space, asked, "train")
    return _Fit(dataset, config, recommender.encoder.table().detach(), asked, lambda epoch: None, ALONE)


@pytest.fixture(scope="module")
def fit(tmp_path_factory) -> _Fit:
    dataset, config = cyclic_dataset(), small_config(max_epochs=10, learning_rate=0.01)
    return judged(dataset, config, Recommender.of(train(dataset, config, tmp_path_factory.mktemp("cycle"))))


def test_a_part_that_hurts_is_left_out(fit):
    fusion = MemoryFusion(fit.config.fusion, 16)
    set_parts(fusion, attention=True, copying=False, repeats=False)
    with torch.no_grad():
        fusion.out.weight.normal_(std=1e3)
    figure, without = (fit.validated(fusion, choose)["ndcg@10"] for choose in (adaptive, _no_memory))
    assert figure < without
    _leave_out(fit, fusion)
    assert not fusion.config.attention
    assert fit.validated(fusion, adaptive)["ndcg@10"] == without


def test_a_part_that_helps_is_kept_and_a_part_without_effect_is_left_out():
    class Judge:
        def validated(self, fusion, choose):
            return {"ndcg@10": 0.5 + 0.1 * fusion.config.attention - 0.1 * fusion.config.copying}

    fusion = MemoryFusion(FusionConfig(heads=2), 16)
    set_parts(fusion, attention=True, copying=True, repeats=True)
    _leave_out(Judge(), fusion)
    assert fusion.config.attention
    assert not fusion.config.copying
    assert not fusion.config.repeats


@pytest.mark.parametrize("rate", [3e-3, 1.0])
def test_calibration_never_makes_validation_worse(fit, rate):
    settings = fit.config.training.model_copy(update={"fusion_calibration_rate": rate})
    judging = replace(fit, config=fit.config.model_copy(update={"training": settings}))
    fusion = MemoryFusion(fit.config.fusion, 16)
    without = judging.validated(fusion, _no_memory)["ndcg@10"]
    _calibrate(judging, fusion, fit.validation.take(slice(0, None, 2)))
    assert judging.validated(fusion, _no_memory)["ndcg@10"] >= without


@pytest.mark.parametrize("bias", [15.0, -15.0])
def test_a_repeat_bias_is_kept_only_if_validation_improves(monkeypatch, bias):
    """Each user takes a tenth of twelve items: a bias above 0 on the nine earlier ones hides it, one below 0 helps."""
    monkeypatch.setattr("model.training.fusion_stage.repeat_bias", lambda *given: bias)
    dataset, config = cyclic_dataset(length=11), small_config()
    settings = config.training.model_copy(update={"fusion_max_epochs": 0})  # the bias alone
    recommender = Recommender.of(random_checkpoint(items=12))
    judging = judged(dataset, config.model_copy(update={"training": settings}), recommender)
    fusion = MemoryFusion(config.fusion, 16)
    without = judging.validated(fusion, _no_memory)["ndcg@10"]
    fusion.repeat_bias.data.fill_(bias)
    assert (judging.validated(fusion, _no_memory)["ndcg@10"] > without) == (bias < 0)
    _calibrate(judging, fusion, judging.validation)
    assert fusion.repeat_bias.item() == min(bias, 0)


@torch.inference_mode()
def test_without_attention_the_state_stays_and_nothing_is_attended_to(monkeypatch):
    memories, states = MemoryTokens.of(random_memories(4, 5, 30), 30), torch.randn(4, 16)
    fusion, table = MemoryFusion(FusionConfig(heads=2), 16).eval(), torch.randn(31, 16)
    assert not torch.equal(fusion(states, memories, table).state[:-1], states[:-1])
    set_parts(fusion, attention=False)
    monkeypatch.delattr(MemoryFusion, "attend")
    fused = fusion(states, memories, table)
    assert torch.equal(fused.state, states)
    assert not fused.gate.any()


def test_ranks_without_the_repeat_head_are_those_of_a_model_without_one():
    dataset, checkpoint = cyclic_dataset(users=20, length=9), random_checkpoint(habitual_config(), items=12)
    recommender = Recommender.of(checkpoint)
    recommender.fusion.repeats.seen.data.fill_(-50.0)  # none of the answers was seen
    asked = judged(dataset, recommender.config, recommender).validation
    parts = (recommender.fusion, recommender.table, dataset, asked, adaptive(asked))
    config, with_it, without = recommender.fusion.config, memory_ranks(*parts), memory_ranks(*parts, repeats=False)
    assert recommender.fusion.config is config
    assert not np.array_equal(with_it.unmasked, without.unmasked)
    set_parts(recommender.fusion, repeats=False)
    assert np.array_equal(memory_ranks(*parts).unmasked, without.unmasked)
