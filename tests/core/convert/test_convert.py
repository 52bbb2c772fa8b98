"""``fixup_``: what it finds in other people's networks, what it makes of them, what it refuses."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import (
    ResidualBranch,
    WeightLayer,
    assert_depth_stable,
    branch_scale,
    collect_branches,
    depth_check,
    fixup_,
    fixup_init_,
    param_groups,
    scalars,
)
from fixup_core.convert.attach import BEFORE
from fixup_core.errors import UserError
from fixup_core.measure.depth import branch_weights
from fixup_core.rules.frozen import FrozenNorm, RemovedNorm
from fixup_core.rules.init import draw_zero_heads_
from fixup_core.rules.standards import NORMS
from tests.core.foreign import GatedMlp, PreActivation, Separable
from tests.core.nets import method_of, unit_scale

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision").models
        return getattr(models, name)(num_classes=10, **options)

    return make


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, num_classes=10, **options)

    return make


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a head."""

    def __init__(self, depth: int = 2, norm_first: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, dropout, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images.flatten(2)[..., :16]).mean(dim=1))


class Basic(nn.Module):
    """A block of the authors' network, with batch normalisation, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.relu(h + x).mean((2, 3)))


NETS: dict[str, tuple[Callable[[], nn.Module], int, set[int]]] = {
    "resnet18": (_torchvision("resnet18"), 8, {2}),
    "resnet50": (_torchvision("resnet50"), 16, {3}),
    "convnext_tiny": (_torchvision("convnext_tiny"), 18, {3}),
    "vit_b_16": (_torchvision("vit_b_16", image_size=32), 24, {2}),
    "swin_t": (_torchvision("swin_t"), 24, {2}),
    "resnet50d": (_timm("resnet50d"), 16, {3}),
    "seresnet": (_timm("seresnet33ts"), 10, {3}),
    "resnetv2": (_timm("resnetv2_50"), 16, {3}),
    "timm vit": (_timm("vit_tiny_patch16_224", img_size=32), 24, {2}),
    "timm vit, drop path": (
        _timm("vit_tiny_patch16_224", img_size=32, depth=2, drop_path_rate=0.5),
        4,
        {2},
    ),
    "timm mixer": (_timm("mixer_s16_224", img_size=32), 16, {2}),
    "timm convnext": (_timm("convnext_atto"), 12, {3}),
    "encoder": (Encoder, 4, {2}),
    "encoder, norm first": (lambda: Encoder(norm_first=True), 4, {2}),
    "PreActivation": (PreActivation, 4, {2}),
    "Separable": (Separable, 3, {3}),
    "GatedMlp": (GatedMlp, 6, {2, 3}),
}


SLOW = {"seresnet", "resnetv2", "timm mixer", "timm convnext", "swin_t"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NETS]
)
def test_branches_are_found_and_logits_start_at_zero(name: str) -> None:
    make, num_branches, depths = NETS[name]
    net = make()
    before = dict(net.named_parameters())
    removed = {id(p) for m in net.modules() if isinstance(m, NORMS) for p in m.parameters()}
    report = fixup_(net, example_inputs=IMAGES, verbose=False)
    assert report.num_branches == len(collect_branches(net)) == num_branches
    assert {branch.m for branch in report.branches} == depths
    for branch in report.branches:
        assert branch.factor == pytest.approx(num_branches ** (-1 / (2 * branch.m - 2)))
    assert net(IMAGES).shape == (4, 10) and net(IMAGES).abs().max() == 0
    assert not [m for m in net.modules() if isinstance(m, NORMS)]
    after = dict(net.named_parameters())
    for path, parameter in before.items():
        assert (after.get(path) is parameter) is (id(parameter) not in removed), path
    added = after.keys() - before.keys()
    assert len(added) == report.scalars == sum(1 for _ in scalars(net))
    assert all(after[path].shape == (1,) for path in added)


@pytest.mark.parametrize("name", ["resnet18", "encoder", "PreActivation", "Separable", "GatedMlp"])
def test_training_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    net = NETS[name][0]()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    optimizer = torch.optim.SGD(param_groups(net, lr=0.1), momentum=0.9)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(IMAGES), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(10)) and losses[-1] < losses[0]
    # Under an InstanceNorm that is gone nothing is lost; a softmax ignores what all logits share.
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not silent


def test_scalars_stand_where_the_authors_have_them() -> None:
    net = Basic()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    _disturb_(net)
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


def _disturb_(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("norm_first", [False, True])
def test_evaluation_of_a_transformer_does_not_pass_its_scalars_by(norm_first: bool) -> None:
    net = Encoder(norm_first=norm_first)
    fixup_(net, example_inputs=IMAGES, verbose=False)
    _disturb_(net)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(IMAGES), net.train()(IMAGES))
        without = copy.deepcopy(net).eval()
        for scalar in scalars(without):
            scalar.weight.zero_()
        assert not torch.allclose(without(IMAGES), net.eval()(IMAGES))


def test_encoder_and_decoder_with_masks_and_keywords() -> None:
    net = nn.Transformer(16, 2, 1, 2, 32, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    inputs = {"src": source, "tgt": target, "tgt_mask": mask}
    report = fixup_(net, example_inputs=inputs, verbose=False)
    assert [branch.m for branch in report.branches] == [2] * 8
    crossing = report.branches[3]
    assert crossing.layers == tuple(
        f"decoder.layers.0.multihead_attn.{n}" for n in ("in_proj_weight", "out_proj.weight")
    )
    assert not report.head and "no head" in str(report)
    torch.testing.assert_close(net(**inputs), target)  # every branch is 0


def test_a_converted_network_is_copied_pickled_and_loaded() -> None:
    net = PreActivation()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    _disturb_(net)
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
    net = _torchvision("convnext_tiny")()
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


def test_another_rule_and_a_generator() -> None:
    nets = [GatedMlp(), GatedMlp()]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, rule in zip(nets, (lambda L, m: 1.0, lambda L, m: 0.25), strict=True):
        generator = torch.Generator().manual_seed(3)
        fixup_(
            net, example_inputs=IMAGES, method=method_of(rule), generator=generator, verbose=False
        )
    torch.testing.assert_close(nets[0].layers[0].v.weight, 4 * nets[1].layers[0].v.weight)


CONSTANT = {
    "resnet18": {"bn1", *(f"layer{i}.0.downsample.1" for i in (2, 3, 4))},
    "encoder": {f"encoder.layers.{i}.norm{k}" for i in (0, 1) for k in (1, 2)},
    "encoder, norm first": {f"encoder.layers.{i}.norm{k}" for i in (0, 1) for k in (1, 2)},
    "PreActivation": {"norms.0", "norms.2", "norms.4", "norms.6", "norm"},
    "Separable": {"stem.1", "head.0"},
    "GatedMlp": {f"layers.{i}.norm{k}" for i in (0, 1, 2) for k in (1, 2)} | {"norm"},
}


@pytest.mark.parametrize("name", CONSTANT)
def test_what_norms_did_to_a_batch_is_kept(name: str) -> None:
    net = NETS[name][0]()
    torch.manual_seed(1)
    report = fixup_(net, example_inputs=3 * IMAGES + 2, calibrate=True, verbose=False)
    assert f"({len(CONSTANT[name])} are constants now)" in str(report)
    state = torch.get_rng_state()
    constants = {p.rpartition(".")[0]: m for p, m in net.named_modules() if type(m) is FrozenNorm}
    assert set(constants) == set(report.frozen) == CONSTANT[name]
    seen: dict[str, Tensor] = {}

    def look(path: str) -> Any:
        return lambda module, args, output: seen.update({path: output.detach()})

    for path, module in net.named_modules():
        if path.endswith(BEFORE) or module in constants.values():
            module.register_forward_hook(look(path))
    assert net(3 * IMAGES + 2).abs().max() == 0 and net.training
    assert torch.equal(state, torch.get_rng_state())
    for path, entering in seen.items():
        assert abs(entering.mean()) < 1e-4 * entering.abs().max(), path
        if not path.endswith(BEFORE):
            assert entering.var(correction=0) == pytest.approx(1.0, abs=1e-2)
    assert net.eval()(IMAGES).abs().max() == 0


class Small(nn.Module):
    """A small signal, and norms in the places where they are easily taken for others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_q, self.norm_head, self.norm_out = (nn.LayerNorm(8) for _ in range(4))
        self.q, self.v, self.o, self.up, self.down, self.out = (nn.Linear(8, 8) for _ in range(6))
        self.norm_twice = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = 0.01 * x.flatten(2)[..., :8]
        weights = torch.softmax(self.q(self.norm_q(x)) @ x.transpose(1, 2), dim=-1)
        x = x + self.o(weights @ self.v(self.norm(x)))
        x = x + self.down(self.norm_twice(self.up(self.norm_twice(self.norm(x)))))
        return self.norm_out(self.out(self.norm_head(x)))


def test_a_branch_has_back_what_its_input_was_divided_by() -> None:
    net = Small()
    report = fixup_(net, example_inputs=IMAGES, calibrate=True, verbose=False)
    assert set(report.frozen) == {"norm", "norm_q", "norm_head"}  # none behind a layer or head
    size = 0.01 * IMAGES.flatten(2)[..., :8].std(correction=0)
    for last in (net.o, net.down):
        assert last.fixup_multiplier.value().item() == pytest.approx(size.item(), rel=0.1)
    assert net.norm.frozen.scale.item() == pytest.approx(1 / size.item(), rel=0.1)
    assert net(IMAGES).abs().max() == 0
    fixup_init_(net)
    assert net.norm.frozen.scale == 1 and net.o.fixup_multiplier.value() == 1


def test_a_norm_with_two_names_becomes_one_constant() -> None:
    net = Small()
    net.also = net.norm
    fixup_(net, example_inputs=IMAGES, calibrate=True, verbose=False)
    assert net.also is net.norm and net.norm.frozen.scale > 50


def test_a_signal_that_is_not_there_is_not_magnified() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), Basic())
    images = IMAGES * torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    fixup_(net, example_inputs=images, calibrate=True, verbose=False)
    assert net[0].frozen.scale[1] == 1


def test_named_branches_have_their_biases_set_alone() -> None:
    net = PreActivation(depth=1)
    options: Any = {"branches": {"block": ["convs.0", "convs.1"]}, "head": "fc"}
    report = fixup_(net, example_inputs=3 + IMAGES, calibrate=True, verbose=False, **options)
    assert not report.frozen and "the batch set biases alone" in str(report)
    assert net.convs[0].fixup_before.value() != 0


def test_the_constant_of_a_batch_norm_is_each_channels_own() -> None:
    net = Basic()
    net.conv1.weight.data.mul_(torch.tensor([1.0, 10.0, 100.0])[:, None, None, None])
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), net)
    before = copy.deepcopy(net)
    fixup_(net, example_inputs=IMAGES, calibrate=True, verbose=False)
    assert net[1].frozen.scale.shape == (3,)
    torch.testing.assert_close(net[:2](IMAGES), before[:2](IMAGES), rtol=1e-4, atol=1e-5)


def test_a_calibrated_network_is_loaded_and_runs_in_half_precision() -> None:
    nets = [Separable() for _ in range(2)]
    for net, images in zip(nets, (IMAGES, 5 + 2 * IMAGES), strict=True):
        fixup_(net, example_inputs=images, calibrate=True, verbose=False)
    nets[1].load_state_dict(nets[0].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert nets[1](IMAGES).dtype == torch.bfloat16
    stem = [net.stem[1](net.stem[0](IMAGES)) for net in nets]
    assert torch.equal(*stem)
    assert nets[0].bfloat16()(IMAGES.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": {"a": ["fc1", "fc2"]}}, "calibrate=True needs a batch"),
        ({"example_inputs": IMAGES, "keep_norms": True}, "calibrate=True needs a batch"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(options: dict[str, Any], message: str) -> None:
    _left_alone(PreActivation(), message, calibrate=True, **options)


def test_a_batch_that_is_not_finite_is_refused() -> None:
    net = PreActivation()
    before, shown = copy.deepcopy(net.state_dict()), repr(net)
    with pytest.raises(UserError, match="numbers that are not finite"):
        fixup_(net, example_inputs=IMAGES / 0, calibrate=True, verbose=False)
    assert repr(net) == shown and not any(m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_report_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report = fixup_(GatedMlp(), example_inputs=IMAGES)
    assert str(report) in capsys.readouterr().out
    assert "L = 6 residual branches; at 0: head.weight" in str(report)


# By declaration


class Untraceable(nn.Module):
    """Its path depends on what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            for _ in range(3)
        )
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if x.sum() > -1e9:
                x = x + block(x)
        return self.fc(x)


BRANCHES = {f"blocks.{i}": [f"blocks.{i}.1", f"blocks.{i}.3"] for i in range(3)}


def test_branches_that_are_named() -> None:
    net, x = Untraceable(), torch.randn(5, 8)
    with pytest.raises(UserError, match=r"cannot be traced.*branches="):
        fixup_(net, example_inputs=x, verbose=False)
    report = fixup_(net, branches=BRANCHES, head="fc", verbose=False)
    assert report.num_branches == 3 and net(x).abs().max() == 0
    assert not [m for m in net.modules() if isinstance(m, nn.LayerNorm)]
    assert net.blocks[0][1].weight.std() > 0 and not net.blocks[0][3].weight.any()


def test_branches_that_the_network_declares_need_no_inputs() -> None:
    from tests.core.nets import ConvNet

    report = fixup_(ConvNet(4), verbose=False)
    assert report.num_branches == 4 and report.head == ("fc.weight",)


# What is refused


class Net(nn.Module):
    """``forward`` is given; eight layers of eight, a recurrent one and a norm are there for it."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(8, 8) for _ in range(6))
        self.lstm, self.norm = nn.LSTM(8, 8, batch_first=True), nn.LayerNorm(8)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def _plain(n: Any, x: Tensor) -> Tensor:
    return n.b(n.norm(n.a(x)))


def _one_layer(n: Any, x: Tensor) -> Tensor:
    return n.e(x + n.a(F.relu(x)))


def _by_product(n: Any, x: Tensor) -> Tensor:
    return n.e(x * n.b(F.relu(n.a(x))))


def _by_concatenation(n: Any, x: Tensor) -> Tensor:
    return torch.cat([x, n.b(F.relu(n.a(x)))], dim=-1)


def _tied(n: Any, x: Tensor) -> Tensor:
    x = x + n.b(F.relu(n.a(x)))
    return n.e(x + n.c(F.relu(n.a(x))))


def _recurrent(n: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + n.b(F.relu(n.a(x)))
    return n.e(x)


def _twice_in_one(n: Any, x: Tensor) -> Tensor:
    return n.e(x + n.b(n.a(F.relu(n.a(x)))))


def _used_elsewhere(n: Any, x: Tensor) -> Any:
    h = n.b(F.relu(n.a(x)))
    return n.e(x + h), h


def _nested(n: Any, x: Tensor) -> Tensor:
    h = n.a(x)
    h = h + n.c(F.relu(n.b(h)))
    return n.e(x + n.d(h))


def _side_by_side(n: Any, x: Tensor) -> Tensor:
    h = F.relu(n.a(x))
    return n.e(x + n.d(n.b(h) + n.c(h)))


def _uncovered(n: Any, x: Tensor) -> Tensor:
    return n.e(x + n.b(n.lstm(n.a(x))[0]))


def _norm_by_function(n: Any, x: Tensor) -> Tensor:
    return n.e(x + n.b(F.relu(F.layer_norm(n.a(x), (8,)))))


REFUSED = {
    _plain: "Net has no residual branch",
    _one_layer: r"ends in the network itself \(add\) has one weight layer, a.weight.*branches=",
    _by_product: r"no residual branch.*otherwise than by addition in the network itself \(mul\)",
    _by_concatenation: r"no residual branch.*in the network itself \(cat\)",
    _tied: "a.weight is used in .*branch 1.* and in .*branch 2",
    _recurrent: "a.weight is used in",
    _twice_in_one: "a.weight is used twice in the residual branch",
    _used_elsewhere: "used outside of it too.*reaches the output twice",
    _nested: "holds other residual branches",
    _side_by_side: "side by side",
    _uncovered: r"no rule covers lstm.*allow=\[",
    _norm_by_function: "normalises by a function.*norm_types=",
}


def _gelu(u: Tensor) -> Tensor:
    return 0.5 * u * (1 + torch.tanh(0.797 * (u + 0.0447 * u**3)))


def _attention(n: Any, x: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    return n.d(made(torch.softmax(n.a(x) @ n.b(x).transpose(-1, -2), dim=-1)) @ n.c(x))


FOUND: dict[str, tuple[Callable[[Any, Tensor], Any], list[tuple[str, ...]]]] = {
    "an activation written out": (lambda n, x: n.e(x + n.b(_gelu(n.a(x)))), [("a", "b")]),
    "a product of two layers": (
        lambda n, x: n.e(x + n.c(F.silu(n.a(x)) * n.b(x))),
        [("a", "b", "c")],
    ),
    "a squared activation": (lambda n, x: n.e(x + n.b(F.relu(n.a(x)) ** 2)), [("a", "a", "b")]),
    "a gate written out": (
        lambda n, x: n.e(x + n.b(n.a(x)) * F.relu6(n.c(x) + 3) / 6),
        [("a", "b")],
    ),
    "weights scaled behind the softmax": (
        lambda n, x: n.e(x + _attention(n, x, lambda w: (w * 0.9).masked_fill(w < 0.01, 0.0))),
        [("c", "d")],
    ),
    "two branches beside one another": (
        lambda n, x: n.e(x + n.b(F.gelu(n.a(n.norm(x)))) + n.d(F.gelu(n.c(x)))),
        [("a", "b"), ("c", "d")],
    ),
    "a branch taken off": (lambda n, x: n.e(x - n.b(F.relu(n.a(x)))), [("a", "b")]),
    "a mask drawn anew": (
        lambda n, x: n.e(x + n.b(F.relu(n.a(x))) * (torch.rand_like(x) < 0.9)),
        [("a", "b")],
    ),
    "a branch scaled": (lambda n, x: n.e(x + 0.5 * n.b(F.relu(n.a(x)))), [("a", "b")]),
    "a head in two places": (
        lambda n, x: (lambda y: (n.e(y), n.e(y.flip(1))))(x + n.b(F.relu(n.a(x)))),
        [("a", "b")],
    ),
    "a head in the middle": (
        lambda n, x: (lambda y: (n.f(y), n.e(y + n.d(F.relu(n.c(y))))))(x + n.b(F.relu(n.a(x)))),
        [("a", "b"), ("c", "d")],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_branch_is_the_product_of_its_layers(name: str) -> None:
    forward, expected = FOUND[name]
    net, x = Net(forward), torch.randn(2, 3, 8)
    report = fixup_(net, example_inputs=x, verbose=False)
    branches = collect_branches(net)
    paths = {id(module): path for path, module in net.named_modules()}
    found = [
        tuple(paths[id(layer.module)] for layer in b.layers for _ in range(layer.copies))
        for b in branches
    ]
    assert found == expected and [b.m for b in report.branches] == [len(e) for e in expected]
    outputs = net(x)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert not output.any()


def test_other_ways_to_join_are_noted() -> None:
    net = Net(lambda n, x: n.e(torch.lerp(y := x + n.b(n.a(x)), n.d(n.c(y)), 0.5)))
    report = fixup_(net, example_inputs=torch.randn(2, 3, 8), verbose=False)
    assert any("not taken for a residual branch" in n and "lerp" in n for n in report.notes)


def test_frozen_weights_are_refused() -> None:
    net = Net(lambda n, x: n.e(x + n.b(n.a(x))))
    net.a.requires_grad_(False)
    _left_alone(net, "a.weight is frozen", example_inputs=torch.randn(2, 3, 8))


def test_a_compiled_network_declares_its_branches_once() -> None:
    net = PreActivation()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    assert len(collect_branches(torch.compile(net))) == 4


def test_a_users_hook_can_be_removed_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    net, called = PreActivation(), []
    handle = net.stem.register_forward_hook(lambda *_: called.append(1))
    monkeypatch.setattr("fixup_core.convert.convert._report", lambda *_: 1 / 0)
    monkeypatch.setattr("fixup_core.convert.convert.initialise_", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fixup_(net, example_inputs=IMAGES, verbose=False)
    handle.remove()
    called.clear()
    net(IMAGES)
    assert not called


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_what_no_rule_covers_is_refused_and_the_network_left_alone(forward: Any) -> None:
    net = Net(forward)
    _left_alone(net, REFUSED[forward], example_inputs=torch.randn(2, 3, 8))


def _left_alone(net: nn.Module, message: str, **options: Any) -> None:
    net.eval()
    next(net.children()).train()
    before, shown = copy.deepcopy(net.state_dict()), repr(net)
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    with pytest.raises(UserError, match=message) as caught:
        fixup_(net, verbose=False, **options)
    assert "\n" not in str(caught.value)
    assert repr(net) == shown and torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == modes
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not hasattr(net, "residual_branches")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "example_inputs="),
        ({"branches": BRANCHES}, "head="),
        ({"branches": BRANCHES, "head": "fd"}, "no module 'fd'"),
        ({"branches": BRANCHES, "head": "blocks"}, "'blocks' .ModuleList. has no weight"),
        ({"branches": {"x": ["blocks.0.1"]}, "head": "fc"}, "'x' has 1 weight layer"),
        ({"branches": {"x": ["blocks.0.1", "no"]}, "head": "fc"}, "no module 'no'"),
        (
            {"branches": BRANCHES | {"x": ["blocks.0.1", "blocks.0.3"]}, "head": "fc"},
            "blocks.0.1.weight lies in the branch 'blocks.0' and in the branch 'x'",
        ),
    ],
)
def test_wrong_declarations_are_told(options: dict[str, Any], message: str) -> None:
    _left_alone(Untraceable(), message, **options)


def test_a_failure_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise UserError("halfway")

    monkeypatch.setattr("fixup_core.convert.convert.initialise_", fail)
    _left_alone(PreActivation(), "halfway", example_inputs=IMAGES)


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
    _left_alone(net, message, example_inputs=IMAGES)
    names, before = list(net.state_dict()), copy.deepcopy(net.train().state_dict())
    net.residual_branches = lambda: [ResidualBranch("a", tuple(map(WeightLayer, net.convs)))]
    with pytest.raises(UserError, match=message):
        fixup_init_(net, keep=[p for n, p in net.named_parameters() if "norm" in n])
    assert list(net.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_weight_that_hooks_compute_is_refused() -> None:
    net = PreActivation()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.convs[1])
    with pytest.raises(UserError, match=r"weight of convs.1 is computed from .* first"):
        fixup_(net, example_inputs=IMAGES, verbose=False)


def test_a_second_time_is_refused() -> None:
    net = PreActivation()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    with pytest.raises(UserError, match="has Fixup's scalars already"):
        fixup_(net, example_inputs=IMAGES, verbose=False)


def test_what_is_allowed_stays() -> None:
    net = Net(_uncovered)
    before = net.lstm.weight_ih_l0.clone()
    report = fixup_(net, example_inputs=torch.randn(2, 3, 8), allow=["lstm"], verbose=False)
    assert torch.equal(net.lstm.weight_ih_l0, before) and "lstm.weight_ih_l0" in report.kept


def test_an_output_that_is_an_embedding_cannot_be_zero() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, words: Tensor) -> Tensor:
            x = self.embed(words)
            return self.out(x + self.fc2(F.gelu(self.fc1(self.norm(x)))))

    net = Language()
    before = net.embed.weight.clone()
    report = fixup_(net, example_inputs=torch.arange(6).view(2, 3), verbose=False)
    assert torch.equal(net.embed.weight, before) and "cannot be 0" in str(report)


# Depth


def _converted(
    make: Callable[[int], nn.Module], rule: Any, calibrate: bool = False
) -> Callable[[int], nn.Module]:
    def make_net(depth: int) -> nn.Module:
        net = make(depth)
        fixup_(
            net, example_inputs=IMAGES, method=method_of(rule), calibrate=calibrate, verbose=False
        )
        return net

    return make_net


BATCH = (IMAGES, torch.arange(4))
STACKS: dict[str, Callable[[int], nn.Module]] = {
    "PreActivation": PreActivation,
    "GatedMlp": GatedMlp,
    "encoder": Encoder,
    "encoder, norm first": lambda depth: Encoder(depth, norm_first=True),
}


def test_a_converted_network_is_depth_stable_by_its_factor() -> None:
    options: Any = {"batch": BATCH, "depths": [1, 3, 6], "seeds": 2, "tolerance": 0.4}
    assert_depth_stable(_converted(GatedMlp, branch_scale), **options)
    with pytest.raises(AssertionError, match="growing"):
        assert_depth_stable(_converted(GatedMlp, unit_scale), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_calibrated_networks_are_depth_stable(name: str) -> None:
    options: Any = {"batch": BATCH, "depths": [2, 4, 8, 16, 32], "seeds": 4, "tolerance": 0.3}
    assert_depth_stable(_converted(STACKS[name], branch_scale, calibrate=True), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_converted_networks_are_depth_stable(name: str) -> None:
    options: Any = {"batch": BATCH, "depths": [2, 4, 8, 16, 32], "seeds": 10, "tolerance": 0.3}
    assert_depth_stable(_converted(STACKS[name], branch_scale), **options)
    with pytest.raises(AssertionError, match="growing"):
        assert_depth_stable(_converted(STACKS[name], unit_scale), **(options | {"seeds": 3}))
