"""Every network with every method, and the authors' networks number for number."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core import METHODS, Scalar, collect_branches
from fixup_core.errors import UserError
from tests.vision.reference import authors_cifar_resnet, authors_imagenet_resnet
from vision.nets import FAMILIES, build_net, check_net, load_reference_state_dict
from vision.nets.blocks import Block
from vision.nets.families import Family

SMALL = {
    "cifar_resnet8": {"width": 4},
    "cifar_wrn10_1": {},
    "imagenet_resnet18": {},
    "imagenet_resnet50": {},
    "highway4": {"image_size": 16},
    "highway_conv7": {},
}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def _build(name: str, method: str, **options) -> nn.Module:
    torch.manual_seed(1)
    return build_net(name, method=method, num_classes=5, batch=IMAGES, **(SMALL[name] | options))


def _takes(name: str, method: str) -> bool:
    """Highway networks have no norms; ZeroInit needs a norm at the end of a branch."""
    if name.startswith("highway"):
        return method in ("none", "xavier", "lsuv")
    if METHODS[method].only not in ("", "ResNets"):
        return False
    return method != "zeroinit" or "wrn" not in name


PAIRS = [(name, method) for name in SMALL for method in METHODS if _takes(name, method)]
FIXUP = [(name, method) for name, method in PAIRS if method.startswith("fixup")]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_forward_pass_is_finite_and_backward_reaches_every_parameter(
    name: str, method: str
) -> None:
    net = _build(name, method)
    assert net(IMAGES).shape == (4, 5) and net(IMAGES).isfinite().all()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES), LABELS).backward()
        optimizer.step()
    still = [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert still == []


@pytest.mark.parametrize(("name", "method"), FIXUP)
def test_fixup_starts_at_zero_and_its_ablation_without_rule_1_does_not(
    name: str, method: str
) -> None:
    net = _build(name, method)
    largest = max(
        block.residual.only(block.branch(torch.randn(2, *_input_of(block)))).abs().max().item()
        for block in net.blocks()
    )
    if method == "fixup_rule2":
        assert largest > 0 and net(IMAGES).abs().max() > 0
    else:
        assert largest == 0 and net(IMAGES).abs().max() == 0
        assert F.cross_entropy(net(IMAGES), LABELS).item() == pytest.approx(math.log(5), abs=1e-6)


def _input_of(block: Block) -> tuple[int, int, int]:
    return block.convs[0].in_channels, 8, 8


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_wrn10_1", "imagenet_resnet50"])
def test_fixup_has_no_normalisation_and_counts_its_branches(name: str) -> None:
    net = _build(name, "fixup")
    assert not any("Norm" in type(module).__name__ for module in net.modules())
    branches = collect_branches(net)
    assert len(branches) == len(net.blocks())
    assert {b.layers_per_branch for b in branches} == {3 if "50" in name else 2}


@pytest.mark.parametrize(
    ("method", "biases", "multipliers"),
    [
        ("fixup", 3 * 4 + 2, 3),
        ("fixup_no_bias", 0, 3),
        ("fixup_no_multiplier", 3 * 4 + 2, 0),
        ("fixup_rule2", 0, 0),
        ("batchnorm", 0, 0),
    ],
)
def test_scalars_of_the_ablations(method: str, biases: int, multipliers: int) -> None:
    initial = [
        m.initial for m in _build("cifar_resnet8", method).modules() if isinstance(m, Scalar)
    ]
    assert (initial.count(0.0), initial.count(1.0)) == (biases, multipliers)


def test_the_factor_of_rule_2_and_the_ablation_without_it() -> None:
    def factors(method: str) -> set[float]:
        report = build_net("cifar_resnet20", method=method).report
        return {row.factor for row in report.rows if row.factor}

    assert factors("fixup") == {9**-0.5}
    assert factors("fixup_no_factor") == {1.0}


@pytest.mark.parametrize("name", ["cifar_resnet8", "imagenet_resnet18", "imagenet_resnet50"])
def test_the_authors_state_dict_gives_the_authors_outputs_and_gradients(name: str) -> None:
    torch.manual_seed(2)
    if name.startswith("cifar"):
        theirs = authors_cifar_resnet(1, num_classes=5)
    else:
        theirs = authors_imagenet_resnet(int(name[-2:]), num_classes=5)
    for parameter in theirs.parameters():  # no branch at 0, no scalar at its start
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    net = build_net(name, method="fixup", num_classes=5)
    load_reference_state_dict(net, theirs.state_dict())
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in theirs.parameters())
    images = torch.randn(2, 3, 32, 32)
    out, expected = net(images), theirs(images)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    F.cross_entropy(out, LABELS[:2]).backward(), F.cross_entropy(expected, LABELS[:2]).backward()
    got = sorted(p.grad.norm().item() for p in net.parameters())
    assert got == pytest.approx(sorted(p.grad.norm().item() for p in theirs.parameters()), rel=1e-3)


def test_a_state_dict_of_another_network_is_refused() -> None:
    state = authors_cifar_resnet(2, num_classes=5).state_dict()
    net = build_net("cifar_resnet8", method="fixup", num_classes=5)
    with pytest.raises(ValueError, match=r"another network: stages\.0\.1\..* is of no use here"):
        load_reference_state_dict(net, state)
    with pytest.raises(ValueError, match="no network here has: encoder"):
        load_reference_state_dict(net, {"encoder.weight": torch.zeros(1)})
    wider = authors_cifar_resnet(1, num_classes=7).state_dict()
    with pytest.raises(ValueError, match=r"head\.fc\.weight is \(7, 64\) there"):
        load_reference_state_dict(net, wider)


def test_torchvisions_resnet_gives_torchvisions_outputs() -> None:
    from torchvision.models import resnet18

    theirs = resnet18(num_classes=5).eval()
    net = build_net("imagenet_resnet18", method="batchnorm", num_classes=5).eval()
    load_reference_state_dict(net, theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shortcut", ["A", "B", "C", "none"])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_shortcuts_and_orders(shortcut: str, order: str) -> None:
    net = _build("cifar_resnet8", "batchnorm", shortcut=shortcut, order=order)
    projections = sum(block.shortcut is not None for block in net.blocks())
    assert projections == {"A": 2, "B": 2, "C": 3, "none": 0}[shortcut]
    assert len(collect_branches(net)) == (0 if shortcut == "none" else 3)
    assert net(IMAGES).isfinite().all()


def test_a_plain_network_passes_nothing_round_its_layers() -> None:
    plain = _build("cifar_resnet8", "none", shortcut="none").blocks()[0]
    nn.init.zeros_(plain.convs[1].weight)
    assert plain(torch.randn(1, 4, 8, 8)).abs().max() == 0
    residual = _build("cifar_resnet8", "none").blocks()[0]
    nn.init.zeros_(residual.convs[1].weight)
    assert residual(torch.randn(1, 4, 8, 8)).abs().max() > 0


@pytest.mark.parametrize("method", ["fixup", "batchnorm"])
def test_checkpointing_changes_nothing(method: str) -> None:
    plain = _build("cifar_resnet8", method)
    thrifty = _build("cifar_resnet8", method, checkpointing=True)
    thrifty.load_state_dict(plain.state_dict())
    for net in (plain, thrifty):
        F.cross_entropy(net(IMAGES), LABELS).backward()
    for (name, p), q in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, b), c in zip(plain.named_buffers(), thrifty.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)  # running statistics saw the batch once


@pytest.mark.parametrize("name", ["cifar_resnet8", "highway4", "highway_conv7"])
def test_lsuv_gives_every_layer_unit_variance(name: str) -> None:
    net = _build(name, "lsuv")
    seen = []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, i, o: seen.append(o.std().item()))
    net(IMAGES)
    assert seen == pytest.approx([1.0] * len(seen), rel=1e-3)


def test_a_projection_in_pre_order_has_no_norm() -> None:
    for order, count in (("pre", 0), ("post", 1)):
        net = _build("cifar_resnet8", "batchnorm", shortcut="B", order=order)
        norms = [m for m in net.stages[1][0].shortcut.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == count


def test_highway_gates_start_by_carrying() -> None:
    net = _build("highway4", "none", gate_bias=-20.0)
    x = torch.randn(3, 50)
    torch.testing.assert_close(net.layers(x), x)
    opened = _build("highway4", "none", gate_bias=20.0)
    assert (opened.layers(x) - x).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("highway4", {"activation": "relx", "method": "none"}, "activation is 'relx'; choose one"),
        ("cifar_resnet21", {}, "not 6n.2: take 20 or 26"),
        ("cifar_resnet2", {}, "not 6n.2: take 8"),
        ("cifar_wrn41_2", {}, "not 6n.4"),
        ("imagenet_resnet49", {}, "the depths are 18, 34, 50"),
        ("cifar_resnt20", {}, "nearest family: cifar_resnet20"),
        ("highway50", {}, "gates in place"),
        ("cifar_resnet20", {"method": "fixpu"}, "there is no method 'fixpu'"),
        ("cifar_resnet20", {"shortcut": "D"}, "shortcut is 'D'; choose one of A, B, C, none"),
        ("cifar_resnet20", {"shortcut": "none"}, "plain networks, which have no residual"),
        ("cifar_resnet20", {"widht": 3}, "has no option 'widht'; did you mean width"),
        ("cifar_resnet20", {"width": "wide"}, "the option width is 'wide': give a whole number"),
        ("cifar_resnet20", {"checkpointing": 1}, "checkpointing is 1: give true or false"),
        ("highway_conv4", {"widths": ["a"], "method": "none"}, "give a list of whole numbers"),
        ("highway_conv4", {"widths": [], "method": "none"}, "give a list of whole numbers"),
        ("cifar_wrn10_1", {"method": "zeroinit"}, "no branch of ResNet ends with"),
    ],
)
def test_what_cannot_be_built_is_told(name: str, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_net(name, **options)
    with pytest.raises(ValueError, match=says):
        check_net(name, **options)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.example)
def test_the_example_of_a_family_is_one_of_its_networks(family: Family) -> None:
    match = re.fullmatch(family.pattern, family.example)
    assert match and all(int(number) > 1 for number in match.groups())
    others = [f for f in FAMILIES if f is not family and re.fullmatch(f.pattern, family.example)]
    assert not others
    check_net(family.example, method="none")  # builds it, without memory
    with pytest.raises(UserError):
        check_net(family.example + "x", method="none")


@pytest.mark.slow
def test_ten_thousand_layers_build() -> None:
    net = build_net("cifar_resnet10004", method="fixup")
    assert len(net.blocks()) == 5001


def test_a_block_left_out_passes_its_shortcut_through_the_activation() -> None:
    block = build_net("cifar_resnet8", method="none", shortcut="B").blocks()[1]
    x = torch.randn(2, 16, 8, 8).relu()
    with block.left_out():
        torch.testing.assert_close(block(x), block.shortcut(x).relu())
    assert not torch.equal(block(x), block.shortcut(x).relu())
