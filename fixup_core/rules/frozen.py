"""What stands where a normalisation layer was removed from a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.rules.scalars import ScalarBias
from fixup_core.rules.standards import BATCH_NORMS


class FrozenNorm(nn.Module):
    """What a normalisation layer does to one batch, as constants: ``x * scale + shift``.

    Nothing in it is learnt. It starts as the identity; ``convert.calibration`` sets it.

    Args:
        norm: A BatchNorm has one scale and shift a channel, shape [C]; any other layer one number,
            shape [].
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        size = (norm.num_features,) if isinstance(norm, BATCH_NORMS) else ()
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("shift", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        size = (-1, *[1] * (x.dim() - 2)) if self.scale.dim() else ()
        scale, shift = (part.to(x.dtype).view(size) for part in (self.scale, self.shift))
        return torch.addcmul(shift, x, scale)

    def reset_(self) -> None:
        """Become the identity again."""
        self.scale.fill_(1.0)
        self.shift.zero_()


def frozen_norms(net: nn.Module) -> Iterator[FrozenNorm]:
    """The frozen norms of ``net``."""
    return (module for module in net.modules() if isinstance(module, FrozenNorm))


class RemovedNorm(nn.Module):
    """Stands where a normalisation layer stood: the identity, a frozen norm, a scalar bias.

    Args:
        norm: What was there; an activation or dropout that is part of it (as in timm's
            ``BatchNormAct2d``) stays.
        biased: Add a scalar bias, for the activation that follows.
        frozen: Keep what the layer does to one batch.
    """

    eps, weight, bias = 0.0, None, None  # looked at by nn.TransformerEncoder

    def __init__(self, norm: nn.Module, *, biased: bool = False, frozen: bool = False) -> None:
        super().__init__()
        if frozen:
            self.add_module("frozen", FrozenNorm(norm))
        if biased:
            self.add_module("scalar_bias", ScalarBias())
        for name in ("drop", "act"):
            if isinstance(getattr(norm, name, None), nn.Module):
                self.add_module(name, norm.get_submodule(name))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        for step in self.children():
            x = step(x)
        return x
