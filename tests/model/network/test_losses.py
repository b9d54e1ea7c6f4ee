"""The objectives against plain formulas."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from model.network.contrast import ContrastiveViews
from model.network.encoder import SequenceEncoder
from model.network.losses import contrastive_loss, gbce_loss, sampled_softmax_loss, softmax_loss
from tests.synthetic import cyclic_dataset, small_config


def case(scale: float, rows: int = 150) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    states = (torch.randn(rows, 8, generator=generator) * scale).requires_grad_()
    table = torch.randn(31, 8, generator=generator).requires_grad_()
    return states, table, torch.randint(31, (rows,), generator=generator)


@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_softmax_loss_is_cross_entropy_with_its_gradients(scale):
    states, table, target = case(scale)  # 150 rows: more than one tile; scale 40: logits that need shifting
    loss = softmax_loss(states, table, target)
    found = torch.autograd.grad(loss, (states, table))
    plain = functional.cross_entropy(states @ table.T, target)
    wanted = torch.autograd.grad(plain, (states, table))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_sampled_softmax_estimates_the_full_one():
    states, table, target = case(0.5)
    with torch.no_grad():
        estimate = torch.stack([sampled_softmax_loss(states, table, target, 2000) for _ in range(5)]).mean()
        assert estimate.item() == pytest.approx(softmax_loss(states, table, target).item(), rel=0.02)


def test_gbce_without_calibration_is_binary_cross_entropy():
    states, table, target = case(0.5, rows=4)
    torch.manual_seed(0)
    loss = gbce_loss(states, table, target, 5, 0.0)
    torch.manual_seed(0)
    drawn = torch.randint(31, (5,))
    total = 0.0
    for row in range(4):
        logits = (table @ states[row]).tolist()
        total += math.log1p(math.exp(-logits[int(target[row])]))
        total += sum(math.log1p(math.exp(logits[n])) for n in drawn.tolist() if n != int(target[row]))
    assert loss.item() == pytest.approx(total / 4 / 6, rel=1e-5)


def test_contrastive_loss_by_hand():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = contrastive_loss(first, first, 1.0)  # partner at cosine 1, two others at 0
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 2)), rel=1e-6)


def test_contrastive_views_lead_to_the_same_next_item():
    dataset = cyclic_dataset(users=20, items=6, length=9)
    views = ContrastiveViews(dataset, np.ones(20, bool), window=4)
    windows, length = views._leading_to(np.array([3, 5, 3]), np.random.default_rng(0))
    for window, reach, item in zip(windows, length, [3, 5, 3], strict=True):
        assert 1 <= reach <= 4
        assert window[reach - 1] % 6 + 1 == item  # users walk round six items
    encoder = SequenceEncoder(small_config().encoder, 6)
    loss = views.loss(encoder, np.array([[1, 2, 3], [4, 5, 0], [6, 0, 0]]), np.random.default_rng(0), 1.0)
    assert loss.item() > 0
    loss.backward()
    assert encoder.item.weight.grad.abs().sum() > 0
