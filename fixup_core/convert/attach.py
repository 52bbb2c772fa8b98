"""Scalars attached to the modules of a network that was written without them.

A module keeps its class, its forward pass and the names of its parameters; the scalars are
submodules of it under new names, applied by hooks. Hooks are functions of this module and hold
nothing, so that a network can still be copied, pickled and loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.rules.scalars import ScalarBias, ScalarMultiplier
from fixup_core.rules.standards import BATCH_NORMS

BEFORE, MULTIPLIER, AFTER = "fixup_before", "fixup_multiplier", "fixup_after"


class Constant(nn.Module):
    """What a normalisation layer does to one batch, made a constant: ``x * scale + shift``.

    Nothing in it is learnt. At first it is the identity (``calibration`` sets it).

    Args:
        norm: Of a BatchNorm scale and shift have one number a channel, shape [C], of all others
            one number, shape [].
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
        """The identity again."""
        self.scale.fill_(1.0)
        self.shift.zero_()


def constants(network: nn.Module) -> Iterator[Constant]:
    """Those of ``network``."""
    return (module for module in network.modules() if isinstance(module, Constant))


class NoNorm(nn.Module):
    """Stands where a normalisation layer stood: the identity, a constant, a scalar bias.

    Args:
        norm: What was there; an activation or dropout that is part of it (as in timm's
            ``BatchNormAct2d``) stays.
        shifted: With a scalar bias, for the activation that follows.
        constant: With what the layer does to one batch.
    """

    eps, weight, bias = 0.0, None, None  # looked at by nn.TransformerEncoder

    def __init__(self, norm: nn.Module, *, shifted: bool = False, constant: bool = False) -> None:
        super().__init__()
        if constant:
            self.add_module("constant", Constant(norm))
        if shifted:
            self.add_module("shift", ScalarBias())
        for name in ("drop", "act"):
            if isinstance(getattr(norm, name, None), nn.Module):
                self.add_module(name, norm.get_submodule(name))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        for step in self.children():
            x = step(x)
        return x


class PackedWeight:
    """A parameter with another name than ``weight``, as what initialises weights looks at them.

    Args:
        module: That holds it.
        name: Of the parameter.
        bias: Name of its bias vector, where it has one.
    """

    def __init__(self, module: nn.Module, name: str, bias: str | None) -> None:
        self.module, self.name, self.bias_name = module, name, bias

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.module.get_parameter(self.bias_name) if self.bias_name else None


class Declared:
    """What a network declares by a method that was given to it: an iterator over ``items``."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = tuple(items)

    def __call__(self) -> Iterator[Any]:
        return iter(self.items)


def attach_before_(module: nn.Module) -> None:
    """A scalar bias on what comes in: on the query of attention, and on keys and values that are
    the same tensor.
    """
    module.add_module(BEFORE, ScalarBias())
    module.register_forward_pre_hook(_add_before, with_kwargs=True)


def attach_multiplier_(module: nn.Module) -> None:
    """A scalar multiplier on what goes out."""
    module.add_module(MULTIPLIER, ScalarMultiplier())
    module.register_forward_hook(_multiply)


def attach_after_(module: nn.Module) -> None:
    """A scalar bias on what goes out, behind the multiplier."""
    module.add_module(AFTER, ScalarBias())
    module.register_forward_hook(_add_after)


def _add_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    entering = args[0] if args else kwargs.get("query", next(iter(kwargs.values())))
    shifted = module.get_submodule(BEFORE)(entering)
    args = tuple(shifted if given is entering else given for given in args)
    return args, {k: shifted if given is entering else given for k, given in kwargs.items()}


def _multiply(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return _on_first(module.get_submodule(MULTIPLIER), output)


def _add_after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return _on_first(module.get_submodule(AFTER), output)


def _on_first(scalar: nn.Module, output: Any) -> Any:
    if isinstance(output, tuple):
        return (scalar(output[0]), *output[1:])
    return scalar(output)
