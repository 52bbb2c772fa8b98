"""Folded networks: plain, and with the outputs of the network they come from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fixup_core import Scalar
from fixup_core.errors import UserError
from fixup_core.fuse.fold import Floor, fold
from tests.core.fuse.test_ops import METHODS, NETS, _net

PLAIN = (nn.Conv2d, nn.Linear, Floor, nn.Identity, nn.MaxPool2d)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "options", "size"), NETS)
def test_a_folded_network_is_plain_and_the_same(
    name: str, options: dict, size: int, method: str
) -> None:
    net = _net(name, method, **options).eval()
    folded = fold(net)
    images = torch.randn(3, 3, size, size)
    expected = net(images)
    near = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=near)
    assert not any(isinstance(module, Scalar) for module in folded.modules())
    leaves = {type(m) for m in folded.modules() if not list(m.children())}
    assert all(leaf in PLAIN or leaf.__name__ == "Subsample" for leaf in leaves)


def test_folding_leaves_the_network_as_it_is() -> None:
    net = _net("imagenet_resnet18")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded = fold(net)
    for parameter in folded.parameters():
        parameter.zero_()
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_state_dict_holds_the_floors() -> None:
    first, second = fold(_net("cifar_resnet8")), fold(_net("cifar_resnet8", noise=0.3))
    images = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(first(images), second(images))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images), second(images))


def test_what_cannot_be_folded_is_told() -> None:
    with pytest.raises(UserError, match="Linear cannot be folded: give it a folded"):
        fold(nn.Linear(2, 2))
    with pytest.raises(UserError, match="only networks with Fixup's scalars, plain weights"):
        fold(_net("cifar_resnet8", "batchnorm"))
    with pytest.raises(UserError, match="only networks with Fixup's scalars, plain weights"):
        fold(_net("cifar_resnet8", activation="tanh"))
