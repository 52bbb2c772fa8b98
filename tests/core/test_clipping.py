"""Adaptive gradient clipping: by units, by the size of the weights, never more than asked."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fixup_core import ScalarMultiplier
from fixup_core.clipping import clip_adaptively_
from fixup_core.errors import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.scale = ScalarMultiplier()
        self.fc = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def classifier_layers(self):
        yield self.head


def _filled(gradient: float) -> Net:
    torch.manual_seed(0)
    net = Net()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    return net


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_each_unit_is_clipped_to_its_share(share: float) -> None:
    net = _filled(5.0)
    before = net.fc.weight.grad.clone()
    clip_adaptively_(net, share)
    for layer in (net.conv, net.fc):
        for weight, gradient in zip(layer.weight, layer.weight.grad, strict=True):
            assert gradient.norm().item() == pytest.approx(share * weight.norm().item(), rel=1e-4)
    # The direction stays.
    ratio = net.fc.weight.grad / before
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_small_gradients_scalars_and_the_head_stay() -> None:
    net = _filled(1e-9)
    assert clip_adaptively_(net) == 0
    net = _filled(5.0)
    clip_adaptively_(net)
    assert net.head.weight.grad.eq(5).all() and net.head.bias.grad.eq(5).all()
    assert net.scale.weight.grad.item() == 5


def test_a_unit_at_zero_can_still_learn() -> None:
    net = _filled(5.0)
    nn.init.zeros_(net.fc.weight)
    clip_adaptively_(net, 0.01, floor=1e-3)
    assert net.fc.weight.grad.norm(dim=1).tolist() == pytest.approx([1e-5] * 4, rel=1e-4)


def test_a_scale_that_comes_off_later_changes_nothing() -> None:
    plain, scaled = _filled(5.0), _filled(5.0 * 1024)
    assert clip_adaptively_(plain) == clip_adaptively_(scaled, scale=1 / 1024)
    torch.testing.assert_close(plain.fc.weight.grad, scaled.fc.weight.grad / 1024)


@pytest.mark.parametrize("share", [0.0, -1.0, math.nan, math.inf])
def test_a_share_that_makes_no_sense(share: float) -> None:
    with pytest.raises(UserError, match="share of adaptive clipping is above 0"):
        clip_adaptively_(_filled(1.0), share)
