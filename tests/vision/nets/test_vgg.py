"""VGG networks beside torchvision's, and the plain network beside the residual one."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from vision.nets import build_net, outline


def test_vgg_computes_what_torchvisions_does() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.vgg11(num_classes=5).eval()
    net = build_net("imagenet_vgg11", method="none", num_classes=5).eval()
    state = zip(net.state_dict(), theirs.state_dict().values(), strict=True)
    net.load_state_dict(dict(state), assign=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(images), theirs(images))


@pytest.mark.parametrize(("method", "norms"), [("none", 0), ("batchnorm", 16)])
def test_vgg_19_has_a_norm_behind_every_convolution(method: str, norms: int) -> None:
    modules = list(outline("imagenet_vgg19", method=method).modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == norms
    assert sum(isinstance(module, nn.Conv2d) for module in modules) == 16
    assert [m.p for m in modules if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_the_plain_network_is_the_residual_one_without_shortcuts() -> None:
    plain, residual = (
        outline(f"imagenet_{kind}34", method="batchnorm") for kind in ("plain", "resnet")
    )
    shapes = {n: p.shape for n, p in residual.named_parameters() if "shortcut" not in n}
    assert {n: p.shape for n, p in plain.named_parameters()} == shapes
    assert len(dict(residual.named_parameters())) == len(shapes) + 3 * 3
