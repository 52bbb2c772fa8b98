"""``fixup_``: what it makes of a network."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import collect_branches, fixup_, scalars
from fixup_core.rules.frozen import RemovedNorm
from fixup_core.rules.standards import NORMS
from tests.core.convert.nets import IMAGES, Basic, Encoder, Net, disturb_, torchvision_net
from tests.core.foreign import GatedMlp, PreActivation, Separable, Tied
from tests.core.nets import method_of


def test_scalars_stand_where_the_authors_have_them() -> None:
    net = Basic()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    disturb_(net)
    s = {n: p for n, p in net.named_parameters() if p.shape == (1,)}
    assert len(s) == 6  # b1a, b1b, b2a, the multiplier, b2b, and the head's
    h = F.conv2d(IMAGES + s["conv1.fixup_before.weight"], net.conv1.weight, padding=1)
    h = F.relu(h + s["bn1.scalar_bias.weight"]) + s["conv2.fixup_before.weight"]
    h = F.conv2d(h, net.conv2.weight, padding=1) * s["conv2.fixup_multiplier.weight"]
    h = F.relu(h + s["conv2.fixup_after.weight"] + IMAGES).mean((2, 3))
    logits = net.fc(h)  # the hook adds the head's bias
    torch.testing.assert_close(net(IMAGES), logits)
    expected = F.linear(h + s["fc.fixup_before.weight"], net.fc.weight, net.fc.bias)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_evaluation_of_a_transformer_does_not_pass_its_scalars_by(norm_first: bool) -> None:
    net = Encoder(norm_first=norm_first)
    fixup_(net, example_inputs=IMAGES, verbose=False)
    disturb_(net)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(IMAGES), net.train()(IMAGES))
        without = copy.deepcopy(net).eval()
        for scalar in scalars(without):
            scalar.weight.zero_()
        assert not torch.allclose(without(IMAGES), net.eval()(IMAGES))


def test_a_converted_network_is_copied_pickled_and_loaded() -> None:
    net = PreActivation()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    disturb_(net)
    other = PreActivation()
    fixup_(other, example_inputs=IMAGES, verbose=False)
    other.load_state_dict(net.state_dict())
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (other, copy.deepcopy(net), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(IMAGES), net(IMAGES))
        assert {b.name for b in collect_branches(twin)} == {b.name for b in collect_branches(net)}
        own = {id(module) for module in twin.modules()}
        layers = [layer for branch in collect_branches(twin) for layer in branch.layers]
        assert all(id(layer.module) in own for layer in layers)


def test_the_weights_of_the_original_load_by_name() -> None:
    original, net = PreActivation(), PreActivation()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    missing, unexpected = net.load_state_dict(original.state_dict(), strict=False)
    assert all("fixup_" in name or ".scalar_bias." in name for name in missing)
    assert all(name.startswith("norm") for name in unexpected)
    assert torch.equal(net.convs[0].weight, original.convs[0].weight)


def test_what_lies_outside_the_branches_stays() -> None:
    torch.manual_seed(0)
    net = GatedMlp()
    before = {name: p.clone() for name, p in net.named_parameters()}
    report = fixup_(net, example_inputs=IMAGES, verbose=False)
    kept = {"patches.weight", "patches.bias", "positions", "layers.0.q.weight", "layers.0.k.bias"}
    assert kept <= set(report.kept)
    after = dict(net.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in report.kept)
    drawn = ("layers.0.v.weight", "layers.0.gate.weight", "layers.0.down.weight", "head.weight")
    assert not any(torch.equal(after[name], before[name]) for name in drawn)
    assert report.branches[0].gates == ("layers.0.q.weight", "layers.0.k.weight")


def test_standard_deviations_of_grouped_convolutions_are_their_own() -> None:
    net = Separable(depth=2, width=64)
    report = fixup_(net, example_inputs=IMAGES, verbose=False)
    factor = report.branches[0].factor
    for weight, fan in ((net.blocks[0].down.weight, 4), (net.blocks[0].mix.weight, 32)):
        expected = factor * math.sqrt(2 / fan)
        assert weight.std().item() == pytest.approx(expected, rel=6 / math.sqrt(2 * weight.numel()))


def test_layer_scales_start_at_one() -> None:
    net = torchvision_net("convnext_tiny")()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    assert torch.equal(net.features[1][0].layer_scale, torch.ones(96, 1, 1))


def test_norms_can_be_kept() -> None:
    net = PreActivation()
    report = fixup_(net, example_inputs=IMAGES, keep_norms=True, verbose=False)
    assert not report.removed and net(IMAGES).abs().max() == 0
    assert sum(isinstance(m, NORMS) for m in net.modules()) == 9


def test_a_norm_with_an_activation_in_it_keeps_that() -> None:
    norm = nn.BatchNorm2d(3)
    norm.act = nn.ReLU()
    empty = RemovedNorm(norm, biased=True)
    with torch.no_grad():
        empty.scalar_bias.weight.fill_(-0.5)
    torch.testing.assert_close(empty(IMAGES), F.relu(IMAGES - 0.5))


class RootMeanSquare(nn.Module):
    """A norm that is written out, of no class that PyTorch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Wrapped(nn.Module):
    """A norm that holds another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x.float())


@pytest.mark.parametrize("norm_type", [RootMeanSquare, Wrapped])
def test_types_of_norms_can_be_named(norm_type: type[nn.Module]) -> None:
    net = Net(lambda n, x: n.e(x + n.after(n.b(F.relu(n.a(n.before(x)))))))
    net.before, net.after = norm_type(), norm_type()
    options: Any = {"norm_types": (norm_type,), "calibrate": True, "verbose": False}
    report = fixup_(net, example_inputs=torch.randn(2, 3, 8), **options)
    assert report.branches[0].layers == ("a.weight", "b.weight") and report.branches[0].m == 2
    assert set(report.removed) == {"before", "after", "norm"} and report.frozen == ("before",)
    assert not [m for m in net.modules() if isinstance(m, (norm_type, nn.LayerNorm))]


@pytest.mark.parametrize("calibrate", [False, True])
def test_what_is_new_has_the_training_mode_of_its_place(calibrate: bool) -> None:
    net = PreActivation().eval()
    net.convs[0].train()
    net.norms[1].train()
    fixup_(net, example_inputs=IMAGES, calibrate=calibrate, verbose=False)
    training = {path for path, module in net.named_modules() if module.training}
    assert training == {"convs.0", "convs.0.fixup_before", "norms.1", "norms.1.scalar_bias"}


def test_state_dicts_with_the_older_names_load() -> None:
    net, other = Separable(), Separable()
    for one, images in ((net, 3 * IMAGES + 1), (other, IMAGES)):
        fixup_(one, example_inputs=images, calibrate=True, verbose=False)
    disturb_(net)
    older = {
        name.replace(".frozen.", ".constant.").replace(".scalar_bias.", ".shift."): value
        for name, value in net.state_dict().items()
    }
    assert older.keys() & {"stem.1.constant.shift", "blocks.0.norm1.shift.weight"}
    names = set(older)
    other.load_state_dict(older)
    assert set(older) == names
    torch.testing.assert_close(other(IMAGES), net(IMAGES))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*stem.1.scalar_bias.weight"):
        other.load_state_dict({**older, "stem.1.shift.weight": torch.zeros(1)})


def test_another_rule_and_a_generator() -> None:
    nets = [GatedMlp(), GatedMlp()]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, rule in zip(nets, (lambda L, m: 1.0, lambda L, m: 0.25), strict=True):
        generator = torch.Generator().manual_seed(3)
        fixup_(
            net, example_inputs=IMAGES, method=method_of(rule), generator=generator, verbose=False
        )
    torch.testing.assert_close(nets[0].layers[0].v.weight, 4 * nets[1].layers[0].v.weight)


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = fixup_(GatedMlp(), example_inputs=IMAGES)
    assert str(report) in capsys.readouterr().out
    assert "L = 6 residual branches; at 0: head.weight" in str(report)


def test_without_rule_1_nothing_is_zero_and_the_report_says_so() -> None:
    net = PreActivation()
    report = fixup_(net, example_inputs=IMAGES, method="fixup_rule2", verbose=False)
    assert "at 0: nothing" in str(report) and "(the last is 0)" not in str(report)
    head = next(row for row in report.init.rows if row.role == "classifier")
    assert head.standard == "PyTorch default" and net.get_parameter(head.name).all()
    assert all(net.get_parameter(name).any() for b in report.branches for name in b.layers)


def test_a_compiled_network_declares_its_branches_once() -> None:
    net = PreActivation()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    assert len(collect_branches(torch.compile(net))) == 4


def test_an_output_that_is_an_embedding_cannot_be_zero() -> None:
    net = Tied()
    before = net.embed.weight.clone()
    report = fixup_(net, example_inputs=torch.arange(6).view(2, 3), verbose=False)
    assert torch.equal(net.embed.weight, before) and "cannot be 0" in str(report)
