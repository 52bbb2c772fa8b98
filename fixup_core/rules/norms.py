"""Normalisation, and the point-wise functions that stand in its place.

DyT and Derf compute nothing from the data: every element goes through one squashing function, so
they need no batch, no mean and no variance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fixup_core.rules.scalars import KeepsFloat32

START = 0.5
"""Of the slope ``a`` of DyT and Derf, as their authors have it."""


class Pointwise(KeepsFloat32):
    """``weight * squashed(x) + bias``.

    Args:
        channels: C, of ``weight`` and ``bias``.
        dims: Dimensions behind the channels: 0 for [..., C], 2 for [B, C, H, W].
    """

    def __init__(self, channels: int, dims: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((1,), START))
        self.tail = (1,) * dims

    def squashed(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p.to(x.dtype).view(-1, *self.tail) for p in (self.weight, self.bias))
        return torch.addcmul(bias, weight, self.squashed(x).to(x.dtype))

    def starts(self) -> list[tuple[nn.Parameter, float]]:
        """The parameters beside ``weight`` and ``bias``, and where they start."""
        return [(self.slope, START)]


class DyT(Pointwise):
    """Dynamic tanh: ``weight * tanh(a x) + bias``, ``a`` a learnable number (Zhu et al. 2025)."""

    def squashed(self, x: Tensor) -> Tensor:
        return torch.tanh(self.slope * x)


class Derf(Pointwise):
    """``weight * erf(a x + s) + bias``, ``a`` and ``s`` learnable numbers (Chen et al. 2025)."""

    def __init__(self, channels: int, dims: int = 0) -> None:
        super().__init__(channels, dims)
        self.shift = nn.Parameter(torch.zeros(1))

    def squashed(self, x: Tensor) -> Tensor:
        return torch.erf(self.slope * x + self.shift)

    def starts(self) -> list[tuple[nn.Parameter, float]]:
        return [*super().starts(), (self.shift, 0.0)]


POINTWISE: dict[str, type[Pointwise]] = {"dyt": DyT, "derf": Derf}
"""By the name of the method that has them in the place of its norms."""
