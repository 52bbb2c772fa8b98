"""Chains of small layers on vectors: the networks that gradient flow is shown on.

All have the same shape, ``Linear(inputs, width)``, ``depth`` layers or blocks, a classifier, and
differ in what makes them trainable. Tensors are [B, D]. No linear layer but the gates and the
classifier has a bias vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.rules.branches import ResidualBranch, WeightLayer
from fixup_core.rules.init import draw_zero_heads_, initialise_
from fixup_core.rules.method import Method
from fixup_core.rules.methods import METHODS


class PlainLayer(nn.Sequential):
    """A linear layer and its activation; no shortcut."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__(nn.Linear(width, width, bias=False), activation())


class ResidualBlock(nn.Module):
    """``x + fc2(relu(fc1(x)))``, m = 2, with the scalars or norms of a method."""

    def __init__(self, width: int, method: Method) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.biases = nn.ModuleList(method.make_bias() for _ in range(3))
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) if method.norm else nn.Identity() for _ in range(2)
        )
        self.residual = method.make_residual()

    def residual_branches(self) -> Iterator[ResidualBranch]:
        layers = (WeightLayer(self.fc1, role="fc1"), WeightLayer(self.fc2, role="fc2"))
        yield ResidualBranch("branch", layers)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norms[0](self.fc1(self.biases[0](x)))
        hidden = torch.relu(self.biases[1](hidden))
        return self.residual(x, self.norms[1](self.fc2(self.biases[2](hidden))))


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
    """How a link is made from its width and the method, and which method of the registry it is."""

    link: Callable[[int, Method], nn.Module]
    method: str


def _plain(activation: Callable[[], nn.Module]) -> Callable[[int, Method], nn.Module]:
    return lambda width, method: PlainLayer(width, activation)


VARIANTS: dict[str, Variant] = {
    "tanh": Variant(_plain(nn.Tanh), "xavier"),
    "relu": Variant(_plain(nn.ReLU), "none"),
    "highway": Variant(lambda width, method: HighwayLayer(width), "none"),
    "batchnorm": Variant(ResidualBlock, "batchnorm"),
    "fixup": Variant(ResidualBlock, "fixup"),
    "residual": Variant(ResidualBlock, "none"),
    "sigmoid": Variant(_plain(nn.Sigmoid), "xavier"),
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
    chosen, method = VARIANTS[variant], METHODS[VARIANTS[variant].method]
    chain = Chain([chosen.link(width, method) for _ in range(depth)], inputs, width, classes)
    initialise_(chain, method)
    if not zero_head:
        draw_zero_heads_(chain.classifier_layers())
    return chain
