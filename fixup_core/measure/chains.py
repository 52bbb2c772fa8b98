"""Chains of small layers on vectors: the networks that gradient flow is shown on.

All have the same shape, ``Linear(inputs, width)``, ``depth`` layers or blocks, a classifier, and
differ in what makes them trainable. Tensors are [B, D]. No linear layer but the gates and the
classifier has a bias vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.rules.branches import ResidualBranch, WeightLayer
from fixup_core.rules.init import draw_zero_heads_, fixup_init_, standard_init_
from fixup_core.rules.scalars import ScalarBias, ScalarMultiplier
from fixup_core.rules.standards import HE_NORMAL, XAVIER_NORMAL


class PlainLayer(nn.Sequential):
    """A linear layer and its activation; no shortcut."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__(nn.Linear(width, width, bias=False), activation())


class ResidualBlock(nn.Module):
    """``x + fc2(relu(fc1(x)))``, m = 2, with scalars or norms around, or nothing."""

    def __init__(self, width: int, *, scalars: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        before = ScalarBias if scalars else nn.Identity
        self.biases = nn.ModuleList(before() for _ in range(3))
        self.multiplier = ScalarMultiplier() if scalars else nn.Identity()
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) if norm else nn.Identity() for _ in range(2)
        )

    def residual_branches(self) -> Iterator[ResidualBranch]:
        yield ResidualBranch("branch", (WeightLayer(self.fc1), WeightLayer(self.fc2)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norms[0](self.fc1(self.biases[0](x)))
        hidden = torch.relu(self.biases[1](hidden))
        return x + self.multiplier(self.norms[1](self.fc2(self.biases[2](hidden))))


class HighwayLayer(nn.Module):
    """``H T + x (1 - T)`` (Srivastava et al. 2015), the gate's bias starting at -3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width, bias=False)
        gate: Any = nn.Linear(width, width)
        gate.initial_bias = -3.0  # read by the initialisation, which writes all weights
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.gate(x)) * (torch.relu(self.transform(x)) - x)


class Chain(nn.Module):
    """A first layer, the chain, a classifier: [B, inputs] -> [B, classes]."""

    def __init__(self, links: list[nn.Module], inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width, bias=False)
        self.links = nn.Sequential(*links)
        self.head = nn.Linear(width, classes)

    def classifier_layers(self) -> Iterator[nn.Module]:
        yield self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.links(self.first(x)))


@dataclass(frozen=True)
class Variant:
    """How a link is made from its width, and what writes the weights of the chain."""

    link: Callable[[int], nn.Module]
    initialise: Callable[..., Any]


_he = partial(standard_init_, convolution=HE_NORMAL)
_xavier = partial(standard_init_, convolution=XAVIER_NORMAL)

VARIANTS: dict[str, Variant] = {
    "tanh": Variant(partial(PlainLayer, activation=nn.Tanh), _xavier),
    "relu": Variant(partial(PlainLayer, activation=nn.ReLU), _he),
    "highway": Variant(HighwayLayer, _he),
    "batchnorm": Variant(partial(ResidualBlock, norm=True), _he),
    "fixup": Variant(partial(ResidualBlock, scalars=True), fixup_init_),
    "residual": Variant(ResidualBlock, _he),
    "sigmoid": Variant(partial(PlainLayer, activation=nn.Sigmoid), _xavier),
}
"""Plain chains of tanh, ReLU and sigmoid layers, drawn as suits each; gated layers; residual blocks
with BatchNorm, by Fixup, and drawn as He has it with nothing else."""


def build_chain(
    variant: str,
    *,
    depth: int = 50,
    width: int = 64,
    inputs: int = 64,
    classes: int = 10,
    zero_head: bool = True,
) -> Chain:
    """A chain of ``depth`` links with its weights written.

    Args:
        variant: A name in ``VARIANTS``.
        depth: Layers of a plain or highway chain, blocks of two layers of a residual one.
        width: Of all layers.
        inputs: Features of the input.
        classes: Of the classifier.
        zero_head: False draws Fixup's classifier as PyTorch does, as the others have it: with
            one of zeros no gradient enters the network at the first step.

    Raises:
        UserError: There is no such variant, or no link.
    """
    if variant not in VARIANTS:
        raise UserError(f"there is no chain {variant!r}; choose one of {', '.join(VARIANTS)}")
    if depth < 1:
        raise UserError(f"a chain has at least 1 link, got a depth of {depth}")
    chosen = VARIANTS[variant]
    chain = Chain([chosen.link(width) for _ in range(depth)], inputs, width, classes)
    chosen.initialise(chain)
    if not zero_head:
        draw_zero_heads_(chain.classifier_layers())
    return chain
