"""Networks that ``fixup_`` is tried on, and how a refusal is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixup_core import fixup_
from fixup_core.convert.plan import Branches
from fixup_core.errors import UserError
from tests.core.foreign import GatedMlp, PreActivation, Separable

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BATCH = (IMAGES, torch.arange(4))


def torchvision_net(name: str, **options: Any) -> Callable[[], nn.Module]:
    """What makes a network of torchvision, for ten classes."""

    def make() -> nn.Module:
        models = pytest.importorskip("torchvision").models
        return getattr(models, name)(num_classes=10, **options)

    return make


def timm_net(name: str, **options: Any) -> Callable[[], nn.Module]:
    """What makes a network of timm, for ten classes."""

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


BRANCHES: Branches = {f"blocks.{i}": [f"blocks.{i}.1", f"blocks.{i}.3"] for i in range(3)}
"""Of ``Untraceable``."""


class Net(nn.Module):
    """``forward`` is given; it can use six layers of eight, a recurrent one and a norm."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(8, 8) for _ in range(6))
        self.lstm, self.norm = nn.LSTM(8, 8, batch_first=True), nn.LayerNorm(8)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


NETS: dict[str, tuple[Callable[[], nn.Module], int, set[int]]] = {
    "resnet18": (torchvision_net("resnet18"), 8, {2}),
    "resnet50": (torchvision_net("resnet50"), 16, {3}),
    "convnext_tiny": (torchvision_net("convnext_tiny"), 18, {3}),
    "vit_b_16": (torchvision_net("vit_b_16", image_size=32), 24, {2}),
    "swin_t": (torchvision_net("swin_t"), 24, {2}),
    "resnet50d": (timm_net("resnet50d"), 16, {3}),
    "seresnet": (timm_net("seresnet33ts"), 10, {3}),
    "resnetv2": (timm_net("resnetv2_50"), 16, {3}),
    "timm vit": (timm_net("vit_tiny_patch16_224", img_size=32), 24, {2}),
    "timm vit, drop path": (
        timm_net("vit_tiny_patch16_224", img_size=32, depth=2, drop_path_rate=0.5),
        4,
        {2},
    ),
    "timm mixer": (timm_net("mixer_s16_224", img_size=32), 16, {2}),
    "timm convnext": (timm_net("convnext_atto"), 12, {3}),
    "encoder": (Encoder, 4, {2}),
    "encoder, norm first": (lambda: Encoder(norm_first=True), 4, {2}),
    "PreActivation": (PreActivation, 4, {2}),
    "Separable": (Separable, 3, {3}),
    "GatedMlp": (GatedMlp, 6, {2, 3}),
}
"""Each with its number of branches and the layers that they have."""
SLOW = {"seresnet", "resnetv2", "timm mixer", "timm convnext", "swin_t"}


def disturb_(net: nn.Module) -> None:
    """Add noise to every parameter: at initialisation too much is 0 for a comparison."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def assert_refused(net: nn.Module, message: str, **options: Any) -> None:
    """``fixup_`` raises one line that has ``message`` in it, and leaves no trace in ``net``."""
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
