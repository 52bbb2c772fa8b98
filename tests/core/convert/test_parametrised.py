"""``fixup_`` and parametrised weights, as weight norm's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import (
    ResidualBranch,
    WeightLayer,
    collect_branches,
    depth_check,
    fixup_,
    fixup_init_,
    param_groups,
)
from fixup_core.errors import UserError
from fixup_core.measure.depth import branch_weights
from fixup_core.rules.init import draw_zero_heads_
from tests.core.convert.nets import BATCH, IMAGES, Encoder, assert_refused
from tests.core.foreign import GatedMlp, PreActivation


class Doubled(nn.Module):
    """A parametrisation that can take every value."""

    def forward(self, half: Tensor) -> Tensor:
        return 2 * half

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2


class Positive(nn.Module):
    """One that can take no negative value."""

    def forward(self, log: Tensor) -> Tensor:
        return log.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log()


def _parametrised() -> PreActivation:
    """The stem stays; a branch's first and last layer and the head are written."""
    net = PreActivation(depth=2)
    for module in (net.stem, net.convs[0], net.convs[1]):
        nn.utils.parametrizations.weight_norm(module)
    nn.utils.parametrize.register_parametrization(net.convs[2], "weight", Doubled())
    nn.utils.parametrizations.weight_norm(net.fc)
    return net


def test_parametrised_weights_take_what_the_rules_draw() -> None:
    nets = [_parametrised(), PreActivation(depth=2)]
    before = dict(nets[0].named_parameters())
    stem = nets[0].stem.weight.detach().clone()
    for net in nets:
        fixup_(net, example_inputs=IMAGES, generator=torch.manual_seed(0), verbose=False)
    net, plain = nets
    assert nn.utils.parametrize.is_parametrized(net.convs[0])
    assert all(p is before[name] for name, p in net.named_parameters() if "original" in name)
    assert torch.equal(net.stem.weight, stem)
    for own, other in zip((*net.convs, net.fc), (*plain.convs, plain.fc), strict=True):
        torch.testing.assert_close(own.weight, other.weight)
    assert net(IMAGES).abs().max() == 0 and len(collect_branches(net)) == 2
    optimizer = torch.optim.SGD(param_groups(net, lr=0.1), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES), torch.arange(4)).backward()
        optimizer.step()
    assert net.convs[1].weight.abs().max() > 0 and net(IMAGES).isfinite().all()
    stem = net.stem.weight.detach().clone()
    fixup_init_(net, keep=list(net.stem.parameters()))
    assert net(IMAGES).abs().max() == 0 and torch.equal(net.stem.weight, stem)
    draw_zero_heads_([net.fc])
    assert net(IMAGES).abs().max() > 0


def test_a_parametrised_network_is_measured_by_the_depth_check() -> None:
    def make_net(depth: int) -> nn.Module:
        net = GatedMlp(depth)
        for layer in net.layers:
            nn.utils.parametrize.register_parametrization(layer.down, "weight", Doubled())
        fixup_(net, example_inputs=IMAGES, verbose=False)
        return net

    check = depth_check(make_net, batch=BATCH, depths=[1, 2, 3], seeds=1)
    assert all(0 < size < 1 for sizes in check.sizes for size in sizes)


def test_a_parametrised_packed_weight() -> None:
    net = Encoder()
    for layer in net.encoder.layers:
        nn.utils.parametrize.register_parametrization(layer.self_attn, "in_proj_weight", Doubled())
    fixup_(net, example_inputs=IMAGES, verbose=False)
    assert len(collect_branches(net)) == 4 and net(IMAGES).abs().max() == 0
    assert all(weight.is_leaf for weight in branch_weights(net))


@pytest.mark.parametrize("kind", ["spectral_norm", "orthogonal", "positive"])
def test_a_parametrisation_that_cannot_take_all_values_is_refused(kind: str) -> None:
    net = PreActivation()
    if kind == "positive":
        net.convs[1].weight.data.abs_()
        nn.utils.parametrize.register_parametrization(net.convs[1], "weight", Positive())
    else:
        getattr(nn.utils.parametrizations, kind)(net.convs[1])
    message = "convs.1.weight is parametrised by .* which cannot take"
    assert_refused(net, message, example_inputs=IMAGES)
    names, before = list(net.state_dict()), copy.deepcopy(net.train().state_dict())
    net.residual_branches = lambda: [ResidualBranch("a", tuple(map(WeightLayer, net.convs)))]
    with pytest.raises(UserError, match=message):
        fixup_init_(net, keep=[p for n, p in net.named_parameters() if "norm" in n])
    assert list(net.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_branch_with_a_weight_that_hooks_compute_is_left_out() -> None:
    net = PreActivation()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.convs[1])
    report = fixup_(net, example_inputs=IMAGES, verbose=False)
    assert report.num_branches == 3 and len(report.left_out) == 1
    assert "weight of convs.1 is computed from" in report.left_out[0]
