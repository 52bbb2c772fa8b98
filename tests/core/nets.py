"""Small networks that declare their residual branches, and methods that break the rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fixup_core import (
    METHODS,
    Method,
    ResidualBranch,
    ScalarBias,
    ScalarMultiplier,
    WeightLayer,
)
from fixup_core.rules.standards import TORCH_DEFAULT


def unit_scale(num_branches: int, m: int) -> float:
    """No factor: the negative twin of rule 2."""
    return 1.0


def method_of(rule: Callable[[int, int], float], *, zero: bool = True) -> Method:
    """Fixup with another factor, ``rule(L, m)``; without ``zero`` also without rule 1."""
    return replace(
        METHODS["fixup"],
        factor=lambda place: rule(place.num_branches, place.branch.layers_per_branch),
        zero_last=zero,
        zero_head=zero,
    )


class MlpBlock(nn.Module):
    """m = 2, with every scalar of rule 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.biases = nn.ModuleList(ScalarBias() for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.multiplier = ScalarMultiplier()

    def residual_branches(self):
        yield ResidualBranch("mlp", (WeightLayer(self.fc1), WeightLayer(self.fc2)))

    def branch(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.biases[1](self.fc1(self.biases[0](x))))
        return self.multiplier(self.fc2(self.biases[2](hidden)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Mlp(nn.Module):
    """A residual network of ``depth`` blocks on vectors."""

    def __init__(self, depth: int, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.Sequential(*(MlpBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def classifier_layers(self):
        yield self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class Bottleneck(nn.Module):
    """m = 3: three convolutions, with a projection beside them that is in no branch."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, groups=groups, bias=False)
        self.conv3 = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.projection = nn.Conv2d(inputs, outputs, 1, bias=False)

    def residual_branches(self):
        layers = (self.conv1, self.conv2, self.conv3)
        yield ResidualBranch("convs", tuple(WeightLayer(layer) for layer in layers))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return torch.relu(self.projection(x) + self.conv3(hidden))


class ConvNet(nn.Module):
    """Convolutions, whose stem keeps PyTorch's own initialisation."""

    def __init__(self, depth: int, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Bottleneck(width, width) for _ in range(depth)))
        self.fc = nn.Linear(width, 10)

    def standard_layers(self):
        yield WeightLayer(self.stem, standard=TORCH_DEFAULT)

    def classifier_layers(self):
        yield self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean(dim=(2, 3)))
