"""What stays of scalars and frozen norms where no weight can hold it: plain constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core.convert.attach import on_entering, on_first


@dataclass(frozen=True)
class Numbers:
    """The scalars around a layer: ``layer(x + before) * multiplier + after``."""

    before: float = 0.0
    multiplier: float = 1.0
    after: float = 0.0


NONE = Numbers()


class Unnormalised(nn.Identity):
    """The identity where a normalisation layer stood; like that it may take further arguments."""

    eps, weight, bias = 0.0, None, None  # looked at by nn.TransformerEncoder

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class Affine(nn.Module):
    """``x * scale + shift`` where a normalisation layer stood, then what was part of that.

    Args:
        scale: Shape [C], one for each channel of ``x`` [B, C, ...], or []; ``None`` for 1.
        shift: Likewise; ``None`` for 0.
        then: Modules that follow, as the activation of timm's ``BatchNormAct2d``.
    """

    eps, weight, bias = 0.0, None, None  # looked at by nn.TransformerEncoder
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self, scale: Tensor | None, shift: Tensor | None, then: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        for name, module in then.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        parts = (self.scale, self.shift)
        scale, shift = (None if p is None else _along_channels(p, x) for p in parts)
        if scale is not None and shift is not None:
            x = torch.addcmul(shift, x, scale)
        elif scale is not None:
            x = x * scale
        elif shift is not None:
            x = x + shift
        for step in self.children():
            x = step(x)
        return x

    def extra_repr(self) -> str:
        parts = {"scale": self.scale, "shift": self.shift}
        return ", ".join(f"{n}: {list(p.shape)}" for n, p in parts.items() if p is not None)


def _along_channels(part: Tensor, x: Tensor) -> Tensor:
    return part.to(x.dtype).view(-1, *[1] * (x.dim() - 2)) if part.dim() else part.to(x.dtype)


class WithConstants(nn.Module):
    """A layer with constants around it: ``layer(x + before) * multiplier + after``.

    ``before`` is added to the first argument, and to others that are the same tensor; of a tuple
    the first output is changed. Any other attribute is the layer's.

    Args:
        layer: Any module.
        numbers: The constants; they become buffers, in float32 or wider.
        like: A tensor on their device.
    """

    before: Tensor | None
    multiplier: Tensor | None
    after: Tensor | None

    def __init__(self, layer: nn.Module, numbers: Numbers, like: Tensor) -> None:
        super().__init__()
        self.layer = layer
        for name, number in vars(numbers).items():
            used = number != getattr(NONE, name)
            self.register_buffer(name, torch.full_like(like, number) if used else None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Copies and pickles ask for their own methods, and before there is a layer.
            if name == "layer" or name.startswith("__"):
                raise
            return getattr(self.layer, name)

    def forward(self, *args: Any, **options: Any) -> Any:
        before = self.before
        if before is not None:
            args, options = on_entering(lambda x: x + before, args, options)
        return on_first(self._rescaled, self.layer(*args, **options))

    def _rescaled(self, x: Tensor) -> Tensor:
        x = x if self.multiplier is None else x * self.multiplier
        return x if self.after is None else x + self.after

    def extra_repr(self) -> str:
        names = ("before", "multiplier", "after")
        parts = {name: self._buffers[name] for name in names}
        return ", ".join(f"{n}={p.item():.4g}" for n, p in parts.items() if p is not None)


class _Bordered:
    """A convolution whose border is a number other than 0: ``fill`` stands on all ``sides``.

    It is kept in the state dict, as the floor of an activation is.
    """

    fill: float
    sides: list[int]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bordered = F.pad(x, self.sides, value=self.fill)
        return super()._conv_forward(bordered, weight, bias)  # type: ignore[misc]

    def get_extra_state(self) -> Tensor:
        """The fill, for a state dict."""
        return torch.tensor(self.fill, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the fill of a state dict."""
        self.fill = state.item()

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, fill={self.fill:.4g}, sides={self.sides}"


class BorderedConv1d(_Bordered, nn.Conv1d):
    """``nn.Conv1d`` within a border of a number other than 0."""


class BorderedConv2d(_Bordered, nn.Conv2d):
    """``nn.Conv2d`` within a border of a number other than 0."""


class BorderedConv3d(_Bordered, nn.Conv3d):
    """``nn.Conv3d`` within a border of a number other than 0."""


BORDERED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: BorderedConv1d,
    nn.Conv2d: BorderedConv2d,
    nn.Conv3d: BorderedConv3d,
}


def fill_border_(conv: Any, fill: float) -> None:
    """Have a plain convolution with zero padding see ``fill`` there in place of 0."""
    conv.sides, conv.fill = list(conv._reversed_padding_repeated_twice), fill
    conv.padding = (0,) * len(conv.kernel_size)
    conv.__class__ = BORDERED[type(conv)]
