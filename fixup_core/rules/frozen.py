"""What stands where a normalisation layer was removed from a network."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.rules.scalars import ScalarBias
from fixup_core.rules.standards import BATCH_NORMS


class FrozenNorm(nn.Module):
    """What a normalisation layer does to one batch, as constants: ``x * scale + shift``.

    Nothing in it is learnt. It starts as the identity; ``convert.calibration`` sets it.

    Args:
        norm: The layer.

    Attributes:
        scale: Shape [C] for a BatchNorm, one for each channel of ``x`` [B, C, ...]; else shape [].
        shift: Likewise.
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


OLDER_NAMES = {"scalar_bias": "shift", "frozen": "constant"}
"""Parts of a ``RemovedNorm``, and what state dicts of the first networks call them."""


STAYING = ("drop", "act")
"""Parts of a norm that are none of its normalisation."""


class RemovedNorm(nn.Module):
    """Stands where a normalisation layer stood: the identity, a frozen norm, a scalar bias.

    A state dict that has these parts under their older names, ``shift`` for ``scalar_bias`` and
    ``constant`` for ``frozen``, is loaded too.

    Args:
        norm: What was there. An activation or dropout that is part of it (as in timm's
            ``BatchNormAct2d``) stays; the training mode is the norm's.
        biased: Add a scalar bias, for the activation that follows.
        frozen: Keep what the layer does to one batch.
    """

    eps, bias = 0.0, None  # looked at by nn.TransformerEncoder
    weight: Tensor | None = None
    """Ones where the norm had a gain, no part of the state dict: others look at its dtype."""

    def __init__(self, norm: nn.Module, *, biased: bool = False, frozen: bool = False) -> None:
        super().__init__()
        gain = getattr(norm, "weight", None)
        if isinstance(gain, Tensor):
            self.weight = torch.ones_like(gain, requires_grad=False)
        if frozen:
            self.add_module("frozen", FrozenNorm(norm))
        if biased:
            self.add_module("scalar_bias", ScalarBias())
        self.train(norm.training)
        for name in STAYING:
            if isinstance(getattr(norm, name, None), nn.Module):
                self.add_module(name, norm.get_submodule(name))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        for step in self.children():
            x = step(x)
        return x

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.weight is not None:
            self.weight = fn(self.weight)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any
    ) -> None:
        for name, older in OLDER_NAMES.items():
            start = f"{prefix}{older}."
            for key in [key for key in state_dict if key.startswith(start)]:
                state_dict[f"{prefix}{name}.{key.removeprefix(start)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
