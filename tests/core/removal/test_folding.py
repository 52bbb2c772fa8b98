"""Affine maps taken into the layers beside them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core.removal.folding import fold_maps_, maps_left
from fixup_core.removal.kinds import NormKind
from fixup_core.removal.leaving import FixedAffine

G = torch.Generator().manual_seed(0)
X = torch.randn(4, 5, 8, generator=G).double()
IMAGES = torch.randn(2, 8, 6, 6, generator=G).double()
TOKEN, CHANNEL = NormKind((-1,)), NormKind((1,), True, 8, 8)


def _map(kind: NormKind = TOKEN, *, one: bool = False, **options: Any) -> FixedAffine:
    size = 1 if one else 8
    weight, bias = (torch.rand(size, generator=G) + 0.5 for _ in range(2))
    settings = {"centring": kind.of_tokens, "then": {}, "bias": bias} | options
    return FixedAffine(kind, weight, **settings)


def _linears(*sizes: int) -> list[nn.Linear]:
    return [nn.Linear(a, b) for a, b in pairwise(sizes)]


class Given(nn.Module):
    """Parts by name, and a forward pass."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.own = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


def _seq(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts)


def _conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, **options)


def _attention() -> nn.Module:
    return Given(
        lambda n, x: n.a(h := n.map(x), h, h, need_weights=False)[0],
        map=_map(),
        a=nn.MultiheadAttention(8, 2, batch_first=True),
    )


def _heads(n: Any, x: Tensor) -> Tensor:
    h = n.map(x).view(4, 5, 8)
    return torch.tanh(n.a(h)) + torch.tanh(n.b(h))


FOLDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "before a linear layer": (lambda: _seq(nn.Tanh(), _map(), nn.Linear(8, 3)), X),
    "behind one": (lambda: _seq(nn.Linear(8, 8), _map(), nn.Tanh()), X),
    "no biases": (
        lambda: _seq(nn.Linear(8, 8, bias=False), _map(bias=None), nn.Tanh()),
        X,
    ),
    "one number": (lambda: _seq(nn.Tanh(), _map(one=True, bias=None), nn.Linear(8, 3)), X),
    "one number, behind": (lambda: _seq(nn.Linear(8, 8), _map(one=True), nn.Tanh()), X),
    "a bias anew": (lambda: _seq(nn.Tanh(), _map(), nn.Linear(8, 3, bias=False)), X),
    "no centring": (lambda: _seq(nn.Tanh(), _map(centring=False), nn.Linear(8, 3)), X),
    "two readers": (lambda: Given(_heads, map=_map(), a=nn.Linear(8, 8), b=nn.Linear(8, 8)), X),
    "packed attention": (_attention, X),
    "a convolution before": (lambda: _seq(_conv(padding=1), _map(CHANNEL), nn.Tanh()), IMAGES),
    "grouped, before": (lambda: _seq(_conv(groups=4), _map(CHANNEL), nn.Tanh()), IMAGES),
    "a convolution behind": (lambda: _seq(nn.Tanh(), _map(CHANNEL), _conv()), IMAGES),
    "tokens of images": (
        lambda: _seq(nn.Tanh(), _map(NormKind((1,))), nn.Conv2d(8, 4, 1)),
        IMAGES,
    ),
    "an activation in it": (
        lambda: _seq(_conv(), _map(CHANNEL, then={"drop": nn.Identity(), "act": nn.ReLU()})),
        IMAGES,
    ),
    "no activation in it": (
        lambda: _seq(nn.Tanh(), _map(CHANNEL, then={"act": nn.Identity()}), _conv()),
        IMAGES,
    ),
    "vectors": (lambda: _seq(nn.Linear(8, 8), _map(CHANNEL), nn.Tanh()), X[:, 0]),
}


@pytest.mark.parametrize("name", FOLDS)
def test_what_folds_computes_the_same(name: str) -> None:
    make, inputs = FOLDS[name]
    net = make().double()
    before = net(inputs)
    assert len(fold_maps_(net, inputs)) == 1 and not list(maps_left(net))
    torch.testing.assert_close(net(inputs), before, rtol=0, atol=1e-9)


def _residual(n: Any, x: Tensor) -> Tensor:
    h = n.map(n.a(x) + x)
    return n.b(h) + h


def _activated() -> nn.Module:
    return _seq(nn.Tanh(), _map(CHANNEL, then={"act": nn.ReLU()}), _conv())


def _tied() -> nn.Module:
    net = _seq(nn.Embedding(9, 8), nn.Tanh(), _map(), nn.Linear(8, 9, bias=False))
    net[3].weight = net[0].weight
    return net


STAYS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "on a stream": (lambda: Given(_residual, map=_map(), a=_seq(*_linears(8, 8)), b=_seq()), X),
    "another reads it": (
        lambda: Given(lambda n, x: n.a(h := n.map(x.tanh())) + h, map=_map(), a=nn.Linear(8, 8)),
        X,
    ),
    "it is returned": (lambda: _seq(nn.Tanh(), _map()), X),
    "padding": (lambda: _seq(nn.Tanh(), _map(CHANNEL), _conv(padding=1)), IMAGES),
    "groups behind": (lambda: _seq(nn.Tanh(), _map(CHANNEL), _conv(groups=4)), IMAGES),
    "centring before groups": (
        lambda: _seq(_conv(groups=4), _map(NormKind((1,))), nn.Tanh()),
        IMAGES,
    ),
    "an activation in it": (_activated, IMAGES),
    "a tied weight": (_tied, torch.arange(8)[None]),
    "called twice": (
        lambda: Given(lambda n, x: n.b(n.map(n.a(n.map(x)).tanh())), map=_map(), a=nn.Linear(8, 8),
                      b=nn.Linear(8, 8)),
        X,
    ),
    "its layer is used elsewhere": (
        lambda: Given(lambda n, x: n.a(n.map(x.tanh())) + n.a(x), map=_map(), a=nn.Linear(8, 8)),
        X,
    ),
    "many dims": (
        lambda: _seq(nn.Tanh(), FixedAffine(
            NormKind((-2, -1)), torch.rand(5, 8), torch.rand(5, 8), True, {}
        ), nn.Linear(8, 3)),
        X,
    ),
    "flattened": (
        lambda: Given(lambda n, x: n.a(n.map(x.tanh()).flatten(1)), map=_map(),
                      a=nn.Linear(40, 3)),
        X,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_cannot_fold_stays_as_it_is(name: str) -> None:
    make, inputs = STAYS[name]
    net = make().double()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    expected = net(inputs)
    assert fold_maps_(net, inputs) == [] and len(list(maps_left(net))) == 1
    assert all(torch.equal(value, before[n]) for n, value in net.state_dict().items())
    assert torch.equal(net(inputs), expected)


def test_frozen_layers_stay_frozen() -> None:
    net = _seq(nn.Tanh(), _map(), nn.Linear(8, 3, bias=False))
    net[2].requires_grad_(False)
    fold_maps_(net, X.float())
    assert [p.requires_grad for p in net.parameters()] == [False, False]


def test_folding_a_network_without_maps_does_nothing() -> None:
    net = _seq(nn.Linear(8, 3))
    weight = net[0].weight
    assert fold_maps_(net, X.float()) == [] and net[0].weight is weight


def test_a_border_of_zeros_is_what_padding_sees() -> None:
    """The twin: folding that map would change the border."""
    net = STAYS["padding"][0]().double()
    conv, fixed = net[2], net[1]
    h = torch.tanh(IMAGES)
    scaled = conv.weight * fixed.weight.view(1, -1, 1, 1)
    shift = (conv.weight.sum((2, 3)) @ fixed.bias).view(1, -1, 1, 1)
    folded = F.conv2d(h, scaled, conv.bias, padding=1) + shift
    off = (folded - net(IMAGES)).abs()
    assert off[..., 1:-1, 1:-1].max() < 1e-9 < 1e-2 < off.max()
