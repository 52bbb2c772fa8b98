"""NF-ResNets: number for number what the paper's equations give, and what they promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from fixup_core import METHODS, initialise_, param_groups
from fixup_core.errors import UserError
from fixup_core.rules.parametrised import plain_copy
from fixup_core.rules.standardised import Standardised, is_standardised
from vision.nets import build_net, check_net

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SMALL: dict[str, dict[str, Any]] = {"cifar_resnet14": {"width": 4}, "imagenet_resnet50": {}}
ORIGINAL = "parametrizations.weight.original"
GAINS = {
    "relu": (F.relu, math.sqrt(2 / (1 - 1 / math.pi))),
    "tanh": (torch.tanh, 1.5927),
    "sigmoid": (torch.sigmoid, 4.8023),
}


def _build(name: str = "cifar_resnet14", **options: Any) -> Any:
    torch.manual_seed(0)
    return build_net(name, method="nf", num_classes=5, **SMALL[name] | options)


def _disturbed(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


class _Plain:
    """Brock et al. 2021, figure 1 and equation 1, on the numbers of a state dict."""

    def __init__(self, state: dict[str, Tensor], strides: dict[str, int]) -> None:
        self.state, self.strides = state, strides

    def weight(self, conv: str) -> Tensor:
        w = self.state[f"{conv}.parametrizations.weight.original"]
        gain = self.state[f"{conv}.parametrizations.weight.0.gain"]
        rows = []
        for row, g in zip(w, gain, strict=True):
            variance = row.var(correction=0)
            rows.append(g * (row - row.mean()) / (row.numel() * variance).sqrt())
        return torch.stack(rows)

    def conv(self, path: str, x: Tensor) -> Tensor:
        w = self.weight(path)
        stride, padding = self.strides[path], w.shape[-1] // 2
        return F.conv2d(x, w, self.state[f"{path}.bias"], stride, padding)

    def block(self, path: str, x: Tensor, layers: int, beta: float) -> Tensor:
        entering = 1.7139588594436646 * F.relu(x) * beta
        projected = f"{path}.shortcut.conv.bias" in self.state
        shortcut = self.conv(f"{path}.shortcut.conv", entering) if projected else x
        h = self.conv(f"{path}.convs.0", entering)
        for i in range(1, layers):
            h = self.conv(f"{path}.convs.{i}", 1.7139588594436646 * F.relu(h))
        return 0.2 * self.state[f"{path}.residual.multiplier.weight"] * h + shortcut


@pytest.mark.parametrize("name", SMALL)
def test_the_blocks_are_the_papers_equations(name: str) -> None:
    net = _disturbed(_build(name)).double().eval()
    strides = {p: m.stride[0] for p, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    plain = _Plain(net.state_dict(), strides)
    images = IMAGES.double()
    x = plain.conv("stem.conv", images)
    x = F.max_pool2d(x, 3, 2, 1) if name.startswith("imagenet") else x
    std, layers = 1.0, 3 if "50" in name else 2
    for s, stage in enumerate(net.stages):
        for b, block in enumerate(stage):
            x = plain.block(f"stages.{s}.{b}", x, layers, 1 / std)
            std = math.sqrt((1.0 if block.shortcut is not None else std**2) + 0.2**2)
    pooled = (1.7139588594436646 * F.relu(x)).mean((2, 3))
    torch.testing.assert_close(net(images), net.head.fc(pooled))


def variance(x: Tensor) -> float:
    """Of the channels of [B, C, H, W], their mean."""
    return x.var(dim=(0, 2, 3)).mean().item()


def test_the_stream_has_the_variance_that_branches_are_divided_by() -> None:
    torch.manual_seed(0)
    net = build_net("cifar_resnet56", method="nf", num_classes=5, width=32)
    numbers = [getattr(block.before_convs[0], "number", 1.0) for block in net.blocks()]
    # The sum of nine branches enters the second stage, whose projection starts at 1 again.
    added = [*range(10), *range(1, 10), *range(1, 9)]
    assert numbers == pytest.approx([(1 + 0.04 * branches) ** -0.5 for branches in added])
    x = net.stem(torch.randn(16, 3, 16, 16))
    with torch.no_grad():
        for block, number in zip(net.blocks(), numbers, strict=True):
            # The zeros around small images take some of it.
            assert variance(x) == pytest.approx(number**-2, rel=0.35)
            block.residual.multiplier.weight.fill_(1.0)
            x = block(x)


@pytest.mark.parametrize("activation", GAINS)
def test_activations_keep_a_variance_of_1(activation: str) -> None:
    function, gain = GAINS[activation]
    own = _build(activation=activation).stages[0][0].activation
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(own(x), gain * function(x), rtol=2e-3, atol=1e-6)
    sample = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert own(sample).var().item() == pytest.approx(1.0, abs=0.01)


def test_it_starts_as_the_authors_draw_it() -> None:
    net = _build()
    report = net.report
    conv = net.stages[2][1].convs[0]
    row = next(r for r in report.rows if r.name.endswith("stages.2.1.convs.0." + ORIGINAL))
    assert row.standard == "LeCun normal" and row.std == pytest.approx((16 * 9) ** -0.5)
    assert all((m.gain == 1).all() for m in net.modules() if isinstance(m, Standardised))
    assert [b.residual.multiplier.value().item() for b in net.blocks()] == [0.0] * 6
    assert [b.residual.multiplier.constant.value().item() for b in net.blocks()] == [
        pytest.approx(0.2)
    ] * 6
    torch.testing.assert_close(conv.weight.mean((1, 2, 3)), torch.zeros(16), atol=1e-6, rtol=0)
    torch.testing.assert_close(conv.weight.square().sum((1, 2, 3)), torch.ones(16))
    before = conv.weight.clone()
    again = initialise_(net, "nf")
    assert again.rows == report.rows and not torch.equal(conv.weight, before)


def test_plain_convolutions_are_left_when_the_parametrisation_is_removed() -> None:
    net = _disturbed(_build()).eval()
    logits, plain = net(IMAGES), plain_copy(net)
    torch.testing.assert_close(plain(IMAGES), logits)
    assert torch.equal(net(IMAGES), logits)
    assert not any(is_parametrized(m) for m in plain.modules())
    convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert convs and {type(m) for m in convs} == {nn.Conv2d}
    own = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert all(is_standardised(m) for m in own)
    for conv in own:
        remove_parametrizations(conv, "weight")
    torch.testing.assert_close(net(IMAGES), logits)
    assert {type(m) for m in own} == {nn.Conv2d}


def test_gains_and_biases_do_not_decay() -> None:
    net = _build()
    record = METHODS["nf"]
    groups = param_groups(net, lr=0.1, weight_decay=1e-4, decay_vectors=record.decays_vectors)
    weights, scalars, vectors = (group["params"] for group in groups)
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0, 0.0]
    assert {p.dim() for p in weights} == {2, 4} and {p.dim() for p in vectors} == {1}
    assert len(scalars) == 6
    everything = {id(p) for p in net.parameters()}
    assert {id(p) for p in (*weights, *scalars, *vectors)} == everything
    assert sum(map(len, (weights, scalars, vectors))) == len(everything)
    decayed = param_groups(net, lr=0.1, weight_decay=1e-4)
    assert [group["weight_decay"] for group in decayed] == [1e-4, 1e-4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "post"}, "'nf' is defined for order pre and shortcut B or C"),
        ({"shortcut": "A"}, "'nf' is defined for order pre and shortcut B or C"),
        ({"shortcut": "none"}, "'nf' is not defined for plain networks"),
    ],
    ids=str,
)
def test_other_orders_and_shortcuts_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as no:
        check_net("cifar_resnet14", method="nf", **options)
    assert "\n" not in str(no.value)
    check_net("cifar_resnet14", method="nf", shortcut="C")
