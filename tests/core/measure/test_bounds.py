"""What the theory says of gradients, against what is measured; in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core import ScalarBias
from fixup_core.errors import UserError
from fixup_core.measure.bounds import activation_bounds, euler_identity, gradient_bounds
from fixup_core.measure.chains import build_chain
from fixup_core.measure.homogeneous import homogeneous_sets, is_positively_homogeneous
from vision.nets import build_net

CLASSES = 10
DEEP = (4, 8, 16, 32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _vectors(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 64).double(), torch.randint(CLASSES, (count,))


def _images(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 3, 8, 8).double(), torch.randint(CLASSES, (count,))


def _resnet(method: str = "none", shortcut: str = "B", **options) -> nn.Module:
    return build_net("cifar_resnet8", method=method, shortcut=shortcut, **options).double()


def _disturbed(net: nn.Module) -> nn.Module:
    """As after some training: no parameter at 0, no bias either."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("method", ["none", "fixup", "fixup_no_bias"])
def test_the_papers_sets_are_found_and_are_homogeneous(method: str, order: str) -> None:
    """With the biases that follow, even in a network full of scalars."""
    net, (x, _) = _disturbed(_resnet(method, order=order)), _images()
    sets = homogeneous_sets(net, x)
    assert list(sets) == [
        "first layer",
        "classifier",
        "shortcut stages.1.0",
        "shortcut stages.2.0",
    ]
    for name, parameters in sets.items():
        finding = is_positively_homogeneous(net, parameters, x)
        assert finding and not finding.vacuous, (name, finding)


def test_a_layer_alone_is_homogeneous_only_while_biases_are_0() -> None:
    net, (x, _) = _resnet(), _images()
    assert is_positively_homogeneous(net, ["stem.conv.weight"], x)
    assert is_positively_homogeneous(_disturbed(_resnet("batchnorm")), net_classifier(), x)
    for broken in (_disturbed(net), _disturbed(_resnet("fixup")), _resnet("batchnorm")):
        finding = is_positively_homogeneous(broken, ["stem.conv.weight"], x)
        assert not finding and finding.deviation > 1e-3


def net_classifier() -> list[str]:
    return ["head.fc.weight", "head.fc.bias"]


def test_of_the_branch_beside_a_shortcut_exactly_one_layer_belongs_to_the_set() -> None:
    net, (x, _) = _resnet(), _images()
    projection, *convs = (
        f"stages.1.0.{name}.weight" for name in ("shortcut.conv", "convs.0", "convs.1")
    )
    for conv in convs:
        assert is_positively_homogeneous(net, [projection, conv], x)
    for wrong in ([projection], convs[:1], [projection, *convs]):
        finding = is_positively_homogeneous(net, wrong, x)
        assert not finding and finding.deviation > 1e-3


def test_looking_changes_nothing() -> None:
    net, (x, y) = _resnet("batchnorm", dropout=0.5), _images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(1)
    gradient_bounds(net, x, y)
    with pytest.raises(UserError):
        gradient_bounds(net, x, y, sets={"wrong": ["stem.conv.weight", "stem.nothing"]})
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "random numbers were taken"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_dropout_is_homogeneous_when_it_is_drawn_once() -> None:
    x, _ = _vectors()
    net = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 5, bias=False))
    assert is_positively_homogeneous(net.double().train(), ["0.weight", "0.bias"], x)


def test_a_network_of_zeros_passes_vacuously() -> None:
    net, (x, _) = _resnet("fixup"), _images()
    assert is_positively_homogeneous(net, ["stem.conv.weight"], x).vacuous


@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_times_the_parameters_is_the_loss_less_the_entropy(soft: bool) -> None:
    net, (x, y) = _disturbed(build_chain("fixup", depth=6).double()), _vectors()
    target = F.one_hot(y, CLASSES) * 0.7 + 0.03 if soft else y
    for parameters in homogeneous_sets(net, x).values():
        sides = euler_identity(net, parameters, x, target)
        assert sides.product == pytest.approx(sides.excess, rel=1e-6)
        assert abs(sides.excess) > 1e-3
    logits = net(x)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    loss = F.cross_entropy(logits, target)
    assert sides.excess == pytest.approx((loss - entropy).item(), rel=1e-6)


def test_the_identity_fails_for_a_set_that_is_not_homogeneous() -> None:
    net, (x, y) = _disturbed(build_chain("fixup", depth=6).double()), _vectors()
    for wrong in (["first.weight"], ["head.bias"], ["links.0.fc1.weight"]):
        sides = euler_identity(net, wrong, x, y)
        assert sides.product != pytest.approx(sides.excess, rel=1e-2)


@pytest.mark.parametrize("variant", ["residual", "fixup", "relu"])
@pytest.mark.parametrize("steps", [0, 5])
def test_no_gradient_is_below_its_bound(variant: str, steps: int) -> None:
    """At initialisation and in training."""
    (x, y), net = _vectors(), build_chain(variant, depth=6).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    for row in gradient_bounds(net, x, y).rows:
        assert row.homogeneity and row.measured >= row.bound and row.tightest <= 1
    for row in activation_bounds(net, x, y, blocks=net.links).rows:
        if row.homogeneity:  # not behind a bias that has learnt
            assert row.measured >= row.bound and row.tightest <= 1
    assert steps or all(
        row.homogeneity for row in activation_bounds(net, x, y, blocks=["links"]).rows
    )


def test_the_bounds_are_those_of_the_paper() -> None:
    net, (x, y) = build_chain("residual", depth=6).double(), _vectors()
    table, logits = gradient_bounds(net, x, y), net(x)
    each = F.cross_entropy(logits, y, reduction="none")
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    size = math.hypot(net.first.weight.norm().item(), net.head.bias.norm().item())
    theorem2 = ((each - entropy).sum() / (len(x) * size)).item()
    assert table["first layer"].bound == pytest.approx(theorem2, rel=1e-9)
    hidden = net.first(x)
    theorem1 = ((each - entropy) / hidden.norm(dim=1)).mean().item()
    (row,) = activation_bounds(net, x, y, blocks=["links.0"]).rows
    assert row.bound == pytest.approx(theorem1, rel=1e-9)
    assert table.loss == pytest.approx(each.mean().item())
    assert table.entropy == pytest.approx(entropy.mean().item())


def test_over_random_labels_the_mean_gradient_is_above_the_expected_bound() -> None:
    net, (x, _) = build_chain("residual", depth=12).double(), _vectors()
    tables = [gradient_bounds(net, x, torch.randint(CLASSES, (len(x),))) for _ in range(20)]
    for name in ("first layer", "classifier"):
        expected = tables[0][name].expected
        assert 0 < expected < sum(table[name].measured for table in tables) / len(tables)
        bounds = sum(table[name].bound for table in tables) / len(tables)
        assert expected < 1.05 * bounds, "a bound of the bound, up to the draw of the labels"


def test_without_fixup_the_bound_explodes_with_depth_and_with_it_is_0() -> None:
    x, y = _vectors()
    he, fixup = (
        [gradient_bounds(build_chain(variant, depth=d).double(), x, y) for d in DEEP]
        for variant in ("residual", "fixup")
    )
    for name in ("first layer", "classifier"):
        bounds = [table[name].bound for table in he]
        assert all(later > 5 * earlier > 0 for earlier, later in itertools.pairwise(bounds))
        assert all(table[name].bound == 0 for table in fixup)
    assert all(table.loss == pytest.approx(math.log(CLASSES)) for table in fixup)
    assert all(table.entropy == pytest.approx(math.log(CLASSES)) for table in fixup)
    gradients = [table["classifier"].measured for table in fixup]
    assert max(gradients) < 1.5 * min(gradients)


def test_of_a_set_that_is_not_homogeneous_the_theorem_says_nothing() -> None:
    net, (x, y) = _disturbed(build_chain("fixup", depth=3).double()), _vectors()
    (row,) = gradient_bounds(net, x, y, sets={"mine": [net.first.weight]}).rows
    assert math.isnan(row.bound) and math.isnan(row.ratio) and row.measured > 0
    (behind,) = activation_bounds(net, x, y, blocks=["links.1"]).rows
    assert math.isnan(behind.bound) and not behind.homogeneity
    assert "nan" in str(gradient_bounds(net, x, y, sets={"mine": ["first.weight"]}))


def test_a_network_need_declare_nothing() -> None:
    net, (x, y) = (
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double(),
        _vectors(),
    )
    for name in ("first layer", "classifier"):
        assert gradient_bounds(net, x, y)[name].homogeneity


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda n, x, y: gradient_bounds(n, x, y, sets={"a": ["first.wight"]}), "first.weight"),
        (lambda n, x, y: gradient_bounds(n, x, y, sets={"a": []}), "at least one parameter"),
        (lambda n, x, y: activation_bounds(n, x, y, blocks=["link"]), "no module 'link'"),
        (lambda n, x, y: activation_bounds(n, x, y, blocks=[ScalarBias()]), "no module 'Scal"),
        (lambda n, x, y: gradient_bounds(nn.Flatten(0), x, y, sets={"a": ["b"]}), "no parameter"),
    ],
)
def test_mistakes_are_told(call, says: str) -> None:
    net, (x, y) = build_chain("residual", depth=2).double(), _vectors()
    with pytest.raises(UserError, match=says):
        call(net, x, y)
